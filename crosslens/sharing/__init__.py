"""Publish, download and convert crosscoders.

In: a trained crosscoder, or the name of one. Out: a repository on the hub with a model card, or a crosscoder.

Start with `pretrained.from_pretrained` to load and `publishing.push_to_hub` to publish. `registry` knows releases by
name, `importers` reads the files of other projects, `export` makes a SAELens SAE from one snapshot.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
