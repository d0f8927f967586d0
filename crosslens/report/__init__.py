"""Write the results of a run as pages that open offline, or log them to Weights & Biases.

In: a run directory. Out: `report/index.html` and the pages beside it, with every table of the run as a figure, its
definition and its numbers as CSV.

Start with `page.write_report`. `sections` lists the pages and their sections; the functions in `figures`, each under
the decorator `entries.figure`, draw what they show with the primitives in `chart`; `features` writes the data of single
features, which the scripts in templates/ show. `wandb_log` adds the tables to a run on W&B.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
