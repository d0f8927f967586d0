"""The demo's language and its tiny pretraining run.

In: a seed. Out: documents of an agreement grammar in two languages, minimal pairs with a known answer, and the
snapshots of a small GPT-NeoX trained on the documents. Start with `grammar`, then `pretraining`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
