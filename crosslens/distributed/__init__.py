"""Train one crosscoder with several processes.

In: the environment that torchrun sets up. Out: a `Parallel` that says which features and tokens this process has, and
performs the collective operations. Start with `parallel`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
