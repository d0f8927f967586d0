"""The command line, `crosslens COMMAND`.

In: the arguments of a subcommand (`ls`, `plan`, `harvest`, `sweep`, `train`, `evolve`, `attribute`, `ablate`, `status`,
`export`, `diff`, `remove`, `label`, `report`, `push`, `demo`). Out: a run directory, and what is printed. Start with
`app`: each subcommand is one function there, which calls the library function of the same name. `arguments` checks
values before anything heavy is imported, and turns them into snapshots, tasks and configs; `config_file` reads options
from a file. `display` prints lines, tables and JSON; `results` says what of an analysis is printed; `status` inspects a
run directory, `comparison` two of them. `demo` is the whole pipeline on a tiny model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
