"""What can be done with snapshots and a run directory: `plan`, `harvest`, `train`, and the analyses of a run.

In: the options of `crosslens.config`, and a run directory where there is one. Out: objects, and tables in the run
directory. The command line, the demo and a script call the same functions. Start with `opening`, which makes
snapshots, activations and tasks from what a user writes, and opens runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
