"""The command line, `crosslens COMMAND`.

In: the arguments of a subcommand (`ls`, `plan`, `harvest`, `sweep`, `train`, `evolve`, `attribute`, `ablate`, `study`,
`run`, `status`, `export`, `diff`, `remove`, `label`, `report`, `push`, `demo`). Out: a run directory, and what is
printed. Start with `app`: each subcommand is one function there, which calls the one of `crosslens.pipeline` of the
same name and prints what it returns. cyclopts reads the options from `crosslens.config`; `help` chooses what `--help`
lists and words mistakes, `config_file` reads options from a file, `arguments` checks run directories and tasks before
anything heavy is imported. `display` prints lines, tables and JSON; `results` says what of an analysis is printed;
`listing` is `ls`, `running` is `run`; `status` inspects a run directory, `comparison` two of them. `demo` is the whole
pipeline on a tiny model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
