"""Run models with edited features.

In: a crosscoder, its snapshots, and tokens or a task. Out: clean activations and features of all snapshots, and logits
or metrics after an edit.

Start with `splice`, which edits the features of a batch of tokens. `prompt_runs` has the clean runs of a task's
prompts, which every causal analysis works from; `upper` runs only the part of a model above the hook; `view` is one
snapshot as an ordinary SAE.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
