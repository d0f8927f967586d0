"""What training tells: a progress bar, a table at the end, and warnings that come with a remedy."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd

from crosslens.crosscoders import DECLARATIONS, CrosscoderTrainingConfig
from crosslens.progress import tqdm

MIN_EXPLAINED_VARIANCE = 0.7
MAX_DEAD_FRACTION = 0.2
REDRAWN = 1.0  # seconds between two updates of the bar


class Measured(NamedTuple):
    """How good a crosscoder is on some tokens."""

    explained_variance: list[float]
    """Of each snapshot."""
    l0: float
    """Active features per token."""
    dead_fraction: float
    """Fraction of the features that are dead."""


class Bar:
    """A progress bar in tokens, with explained variance, L0 and dead features.

    Args:
        total: tokens to train on.
        done: tokens that an earlier run has trained on.
        hidden: show nothing; several processes need one bar.
    """

    def __init__(self, total: int, done: int, hidden: bool = False) -> None:
        disable: dict[str, Any] = {"disable": True} if hidden else {}  # else TQDM_DISABLE decides
        # miniters and mininterval: tqdm draws at every `update`, and `advance` decides when that is
        self._bar = tqdm(
            total=total,
            initial=done,
            desc="Training",
            unit=" tokens",
            unit_scale=True,
            leave=False,
            miniters=1,
            mininterval=0,
            **disable,
        )
        self._drawn, self._running = time.monotonic(), False

    def advance(self, done: int, measure: Callable[[], Measured]) -> None:
        """Set the number of tokens done.

        Args:
            done: tokens trained on so far.
            measure: makes the host wait for a GPU, so it is called only if a second has passed since the last time.
        """
        if not self._running:  # the first batch may wait for models that fill a buffer: that is not the pace of steps
            self._bar.unpause()
            self._running = True
        if not self._bar.disable and time.monotonic() - self._drawn >= REDRAWN:
            self.draw(done, measure())

    def draw(self, done: int, measured: Measured) -> None:
        """Draw the bar now."""
        explained = math.fsum(measured.explained_variance) / len(measured.explained_variance)
        words = f"EV {explained:.3f}, L0 {measured.l0:.1f}, dead {measured.dead_fraction:.1%}"
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(done - self._bar.n)
        self._drawn = time.monotonic()

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def quality_table(table: pd.DataFrame, n_features: int, n_tokens: int) -> str:
    """The result of `evaluate` in a line per snapshot, for a terminal.

    Args:
        table: the result of `evaluate`.
        n_features: F.
        n_tokens: held-out tokens that it was measured on.
    """
    shown = pd.DataFrame(
        {
            "snapshot": table["label"],
            "EV": table["explained_variance"].map("{:.3f}".format),
            "L0": table["l0"].map("{:.1f}".format),
            "CE recovered": table["ce_recovered"].map(lambda x: "-" if math.isnan(x) else f"{x:.1%}"),
        }
    )
    dead = float(table["dead_fraction"].iloc[0])
    lines = [
        f"on {n_tokens:,} held-out tokens:",
        shown.to_string(index=False),
        f"mean EV {table['explained_variance'].mean():.3f}; {round(dead * n_features):,} of {n_features:,} features "
        f"({dead:.1%}) are dead: they never fire on these tokens",
    ]
    if table["ce_recovered"].isna().any():
        lines.append("CE recovered is - where the model predicts no better with its activations than with zeros")
    return "\n".join(lines)


def warn_if_poor(
    labels: list[str],
    measured: Measured,
    architecture: CrosscoderTrainingConfig,
    dead_tokens: int,
    training_tokens: int,
) -> None:
    """Warn, with a remedy, of snapshots that are explained badly and of many dead features.

    Args:
        labels: labels of the snapshots.
        measured: on held-out or training tokens.
        architecture: how the crosscoder was trained; the remedies depend on it.
        dead_tokens: tokens without firing after which the auxiliary loss revives a feature.
        training_tokens: tokens that the crosscoder was trained on.
    """
    declared = DECLARATIONS[architecture.architecture()]
    pairs = zip(labels, measured.explained_variance, strict=True)
    poor = [f"{label} ({value:.2f})" for label, value in pairs if not value >= MIN_EXPLAINED_VARIANCE]
    if poor:
        names = ", ".join(poor[:6]) + (f" and {len(poor) - 6} more" if len(poor) > 6 else "")
        scale = 'scale="std", ' if getattr(architecture, "scale", "std") == "norm" else ""
        warnings.warn(
            f"the crosscoder explains less than {MIN_EXPLAINED_VARIANCE:.0%} of the variance of {names}. If these "
            f"snapshots are untrained or nearly so, leave them out; otherwise try {scale}more training tokens, "
            f"or {declared.denser}",
            stacklevel=4,
        )
    if measured.dead_fraction > MAX_DEAD_FRACTION:
        remedy = f"a smaller d_sae (now {architecture.d_sae:,})"
        if not declared.revives_dead:
            remedy += f", or {declared.denser}"
        elif dead_tokens < training_tokens:
            remedy += f", or a smaller dead_tokens (now {dead_tokens:,}), so that the auxiliary loss acts earlier"
        else:
            remedy += (
                f", or a smaller dead_tokens: {dead_tokens:,} is no less than the {training_tokens:,} tokens of this "
                "training, so the auxiliary loss never acted"
            )
        warnings.warn(
            f"{measured.dead_fraction:.0%} of the features are dead. If they are more than the data needs, this is "
            f"harmless; otherwise try {remedy}",
            stacklevel=4,
        )
