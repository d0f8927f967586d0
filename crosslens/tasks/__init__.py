"""Tasks: minimal pairs of a prompt with a right and a wrong answer.

In: a benchmark by name (BLiMP, CLAMS, MultiBLiMP, SVA, IOI) or a file. Out: prompts in tokens, and how often each
snapshot prefers the right answer.

Start with `task.Task`. `corpora` reads the sources, `generated` makes items from templates, `prompts` turns items into
tokens, `accuracy` scores models.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
