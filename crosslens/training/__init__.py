"""Training a crosscoder, and how good it is.

In: activations, an architecture config and a `TrainConfig`. Out: an inference crosscoder, and a run directory that a
killed run resumes from.

Start with `run.train`. `trainer` holds the training step, the optimiser and checkpoints, `initialisation` the scales
and decoder norms at the start, `evaluation` explained variance and cross-entropy, `recipes` the settings of the two
papers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
