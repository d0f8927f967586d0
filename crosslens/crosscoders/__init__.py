"""Crosscoder architectures, as SAELens classes.

In: activations `(..., S, D)` or flat `(..., S D)`. Out: features `(..., F)`, reconstructions, and in training the loss.

Start with `base`, which all architectures share, then one of `architectures`: its gate, its loss, and the declaration
(`declaration`) that other packages read. `kernels` holds the sparse training step: `topk` finds the active pairs,
`sparse` and `gated` reconstruct from them; they communicate with other processes through
`crosslens.distributed.strategy`. `loading` reads saved crosscoders after `inspection` has validated their files.
Importing this package registers the architectures with SAELens (`registration`).
"""

import importlib

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

importlib.import_module("crosslens.crosscoders.registration")
