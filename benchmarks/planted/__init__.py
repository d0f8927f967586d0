"""Synthetic activations made of known features, to test dictionaries against.

In: a regime and a seed. Out: activations of many snapshots, and scores of a dictionary against the ground truth.

Start with `regimes.Planted`, which can be used wherever `Activations` can; `scores.recovery` compares found with
planted features; `traps` plants births that are hard to read.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
