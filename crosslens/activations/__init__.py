"""Activations of the same tokens at one hook point of every snapshot.

In: snapshots, a hook point, a dataset. Out: batches of activations `(B, S, D)` in an order that depends only on the
seed, computed live or read from a cache on disk.

Start with `loader.Activations`. `tokens` turns a `Dataset` into sequences, `harvesting` runs the models up to the
hook, `cache` and `files` are the format on disk, `rows` and `feed` make batches, and `plan` estimates the cost before
anything runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
