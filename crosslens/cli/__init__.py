"""The command line, `crosslens COMMAND`.

In: the arguments of a subcommand (`ls`, `plan`, `harvest`, `train`, `evolve`, `attribute`, `ablate`, `label`, `report`,
`push`, `demo`). Out: a run directory. Start with `app`: each subcommand is one function there, which calls the library
function of the same name. `arguments` checks values before anything heavy is imported, and turns them into snapshots,
tasks and configs; `demo` is the whole pipeline on a tiny model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
