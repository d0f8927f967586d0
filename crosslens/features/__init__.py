"""Descriptions of single features.

In: a crosscoder and held-out activations. Out: top examples, promoted tokens, nearest features, labels.

Start with `tables.feature_tables`, or `tables.export_features` for one JSON file. `examples` finds the top positions;
`labels` asks a language model for a label and a complexity through the clients in `explainers`, and scores labels by
`detection` on `passages`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
