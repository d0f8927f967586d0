"""Train crosscoders, and measure how good they are.

In: activations, an architecture config and a `TrainConfig`. Out: an inference crosscoder, and a run directory from
which an interrupted run can resume.

Start with `run.train`. `config` holds `TrainConfig` and the learning-rate schedule, `initialisation` the scales, biases
and decoder norms at the start, `trainer` the step and the optimiser, `checkpoints` the state on disk, `evaluation`
explained variance and cross-entropy, `progress` what is shown while and after training, `recipes` the settings of the
two papers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
