"""What an architecture declares about itself.

The module of an architecture ends with one `ARCHITECTURE = Architecture(...)`. Whatever else depends on it reads that:
the command line, SAELens's registries, the memory that `plan` forecasts, the remedies in warnings, model cards, the
analyses that ask whether decoder norms are penalised, and the table in the docs. Its name on the command line is that
of the module.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosslens.crosscoders.base import Crosscoder, CrosscoderConfig, CrosscoderTrainingConfig, CrosscoderTrainingSAE


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture: its classes, and what other packages need to know of it."""

    title: str
    """Its name in prose."""
    active: str
    """Which features are active on a token. This and the next three are a row of the table in the docs, in Markdown."""
    penalty: str
    """What keeps their number small, or features from dying."""
    chosen: str
    """What the user chooses."""
    use: str
    """When to use it."""
    options: tuple[str, ...]
    """Those of `crosslens.config.FIELDS` that it has, written out: the file is read there without being imported."""
    default: bool = False
    """Whether it is taken where none is asked for; written out, too. One architecture has it."""
    card: str
    """What a model card calls such a crosscoder."""
    inference: tuple[type[Crosscoder], type[CrosscoderConfig]]
    """The classes of a trained crosscoder and of its config."""
    training: tuple[type[CrosscoderTrainingSAE], type[CrosscoderTrainingConfig]]
    """The same in training."""
    batch_tensors: float
    """Arrays (B, F) in a training step at its densest, as measured on CPUs by `benchmarks/distributed.py`: its column
    "off by" is the error of the forecast."""
    extra_columns: int = 0
    """Columns of a step besides, for each of its B tokens."""
    penalises_decoder: bool
    """Whether the loss shrinks decoder norms, so that they understate how strongly a snapshot holds a feature."""
    revives_dead: bool
    """Whether an auxiliary loss revives dead features."""
    denser: str
    """The change of a setting by which more features are active."""

    @property
    def name(self) -> str:
        """Its name in `cfg.json` and in SAELens's registries."""
        return self.inference[1].architecture()

    @property
    def docs_row(self) -> str:
        """Its row of the table in `docs/architectures.md`."""
        return f"| {' | '.join((self.title, self.active, self.penalty, self.chosen, self.use))} |"
