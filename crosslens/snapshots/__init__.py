"""Snapshots of pretraining runs: where they are, what they are, and how they are loaded and run.

In: a family and a size, a folder, or a repository and revisions. Out: `Snapshots`, each of which loads as a
TransformerBridge or a HookedTransformer.

Start with `collection.Snapshots`, a sequence of `snapshot.Snapshot`s. `settings` says how models run. `families` knows
Pythia, OLMo, BLOOM and others from `families.json`, `hub` downloads and evicts, `folders` finds local snapshots,
`lookup` finds one by index or label, `checks` rejects snapshots that are not comparable, `hooks` lists supported hook
points, `weights` reads weight files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
