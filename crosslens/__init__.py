"""crosslens watches a language model learn: crosscoders over pretraining snapshots, for SAELens and TransformerLens.

    import crosslens as cl

    snaps = cl.Snapshots.demo(seed=0)
    acts = cl.Activations(snaps, "blocks.1.hook_resid_post", dataset="text.txt", n_tokens=250_000)
    cc = cl.train(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=1024, k=16))
    table = cl.evolve(cc, acts)

`__init__.pyi` lists the public names; each is imported when it is first used, because SAELens and TransformerLens take
seconds to load. All other functions are one level down, in the package of their subject: `cl.evolution.rotation`.

The architectures are registered with SAELens as soon as `sae_lens` is imported, before or after this package.
"""

import importlib
from importlib.metadata import version
from pathlib import Path

import lazy_loader
from wrapt import register_post_import_hook

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("crosslens")
# packages are reachable as attributes, but `from crosslens import *` brings functions and classes alone
__all__ = [name for name in _names if not (Path(__file__).parent / name).is_dir()]  # pyright: ignore

register_post_import_hook(lambda _: importlib.import_module("crosslens.crosscoders"), "sae_lens")
