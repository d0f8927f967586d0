"""Checkpoints of pretraining runs: where they are, what they are, and how they are loaded.

In: a family and a size, a folder, or a list of repositories and revisions. Out: `Snapshots`, each of which loads as a
TransformerBridge or a HookedTransformer.

Start with `collection.Snapshots`; one of them is a `snapshot.Snapshot`. `families` knows Pythia, OLMo, BLOOM and others
by `families.json`; `hub` downloads and evicts, `folders` finds local ones, `checks` refuses what cannot be compared,
`hooks` knows which hook points are supported.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
