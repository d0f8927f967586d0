"""Several processes that train one crosscoder.

In: what torchrun puts into the environment. Out: a `Parallel` that says which features and which tokens this process
has, and performs the collective operations on them. Start with `parallel`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
