"""What features do for a task, at every snapshot.

In: clean runs of a task (`PromptRuns`), or crosscoder, snapshots and task. Out: indirect effects `(F, S)`, their shares
over the snapshots (RelIE), and exact ablations that check them.

Start with `attribution.attribute`, then `ablation.ablate`; `analyses.study` runs the whole analysis. `relative` has
RelIE, significance and classes; `validation`, `additivity`, `transfer`, `timeline` and `languages` each cover one
further analysis; `recipes` has the estimators of a paper.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
