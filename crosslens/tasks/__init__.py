"""Tasks: minimal pairs, a prompt with a correct and a wrong answer.

In: a benchmark by name (BLiMP, CLAMS, MultiBLiMP, SVA, IOI) or a file. Out: tokenised prompts, and how often each
snapshot prefers the correct answer.

Start with `task.Task`. `formats` has a module for each format: its reader, and its spelling as an argument. `corpora`
reads files and the hub for them, `induction` makes items of a tokenizer's words, `prompts` tokenises items, `accuracy`
scores models.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
