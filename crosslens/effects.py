"""The result of an attribution: effects per feature and snapshot, and where in the prompts they arise.

Completeness, that effects add up to the change of the metric, is an axiom of integrated gradients (Sundararajan et al.,
arXiv 1703.01365); effects by position are this project's own.

Letters: S snapshots, F features, A features that are active on any prompt, O positions counted from the end (0 the
last), R bootstrap replicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.errors import UserError
from crosslens.quadrature import Estimator
from crosslens.shares import reldec, relie, relie_interval

_ESTIMATOR = ("method", "rule", "ig_steps", "baseline", "error", "threshold")


@dataclass(frozen=True)
class Bootstrap:
    """Effects on prompts drawn with replacement, the same prompts at all snapshots.

    Attributes:
        features: (A,) ids.
        effects: (R, A, S) mean IE.
        metric: (R, S) mean metric of the clean models.
    """

    features: Int[Tensor, " A"]
    effects: Float[Tensor, "R A S"]
    metric: Float[Tensor, "R S"]


@dataclass(frozen=True)
class Positions:
    """Where effects arise, by position counted from the end of the prompt: 0 is the last, 1 the one before it.

    At position 0 a feature can act through the blocks above without attention between positions; what acts elsewhere
    must be moved to the last position by attention. With nothing but the unembedding above the hook, all effects lie at
    position 0 and are direct logit attribution.

    Attributes:
        labels: S snapshot labels.
        features: (A,) ids.
        effects: (O, A, S) mean over prompts of the effect at each position; they add up to the feature's effect.
        sizes: (O, A, S) mean over prompts of its absolute value.
        error_effects: (O, S) of the error node.
        error_sizes: (O, S) mean absolute value.
    """

    labels: list[str]
    features: Int[Tensor, " A"]
    effects: Float[Tensor, "O A S"]
    sizes: Float[Tensor, "O A S"]
    error_effects: Float[Tensor, "O S"]
    error_sizes: Float[Tensor, "O S"]

    def shares(self) -> pd.DataFrame:
        """Share of the absolute effect by position: a row per snapshot and position.

        Columns: snapshot, label, position, share (over features, prompts and positions of the snapshot it is 1),
        error_share (the same of the error node).
        """
        n, S = self.error_sizes.shape
        size = self.sizes.sum(1)
        return pd.DataFrame(
            {
                "snapshot": np.tile(np.arange(S), n),
                "label": self.labels * n,
                "position": np.repeat(np.arange(n), S),
                "share": (size / size.sum(0)).flatten().numpy(),
                "error_share": (self.error_sizes / self.error_sizes.sum(0)).flatten().numpy(),
            }
        ).sort_values(["snapshot", "position"], ignore_index=True)

    def main(self) -> pd.DataFrame:
        """Where each feature acts: a row per feature and snapshot at which it has an effect.

        Columns: feature, snapshot, label, position (of the largest absolute effect), share (of it there), last_share
        (of it at the last position).
        """
        size = self.sizes.sum(0)
        share = self.sizes / size
        a, s = size.nonzero(as_tuple=True)
        position = self.sizes.argmax(0)
        return pd.DataFrame(
            {
                "feature": self.features[a].numpy(),
                "snapshot": s.numpy(),
                "label": [self.labels[i] for i in s.tolist()],
                "position": position[a, s].numpy(),
                "share": share.amax(0)[a, s].numpy(),
                "last_share": share[0][a, s].numpy(),
            }
        )

    def to_frame(self) -> pd.DataFrame:
        """All effects that are not 0: position, feature, snapshot, ie, size."""
        where = self.sizes.nonzero(as_tuple=True)
        o, a, s = where
        return pd.DataFrame(
            {
                "position": o.numpy(),
                "feature": self.features[a].numpy(),
                "snapshot": s.numpy(),
                "ie": self.effects[where].numpy(),
                "size": self.sizes[where].numpy(),
            }
        )


@dataclass(frozen=True)
class Attribution:
    """Effects of features on a task, per snapshot.

    Attributes:
        task: name of the task.
        labels: S snapshot labels.
        steps: S training steps, None where not recorded.
        estimator: how the effects were estimated.
        effects: (F, S) mean IE over prompts, in logits.
        standard_errors: (F, S) of those means; NaN with a single prompt.
        error_effect: (S,) effect of the error node.
        metric_clean: (S,) mean metric of the clean models.
        metric_baseline: (S,) mean metric at the baseline.
        completeness: (S,) mean |sum of effects - (clean - baseline)| over prompts, relative to mean |clean - baseline|.
            An error of the integral for "ig"; for "gradient" and "exact" how far from linear the model is.
        active: (F, S) whether the feature is active anywhere on the prompts (on the paired ones too for "patch").
        n_prompts: prompts averaged over.
        bootstrap: replicates over prompts, where asked for.
        positions: effects by position, where asked for.
    """

    task: str
    labels: list[str]
    steps: list[int | None]
    estimator: Estimator
    effects: Float[Tensor, "F S"]
    standard_errors: Float[Tensor, "F S"]
    error_effect: Float[Tensor, " S"]
    metric_clean: Float[Tensor, " S"]
    metric_baseline: Float[Tensor, " S"]
    completeness: Float[Tensor, " S"]
    active: Bool[Tensor, "F S"]
    n_prompts: int
    bootstrap: Bootstrap | None = None
    positions: Positions | None = None

    def top(self, k: int, snapshot: int, by: str = "signed") -> Int[Tensor, " k"]:
        """The k active features of the largest effect at a snapshot.

        Args:
            k: how many.
            snapshot: index of the snapshot; -1 is the last.
            by: "signed" for the most helpful, "negative" for the most harmful, "magnitude" for either.

        Raises:
            UserError: k is more than the features that are active on the prompts, or no such snapshot.
        """
        S = len(self.labels)
        if by not in ("signed", "negative", "magnitude"):
            raise UserError(f"by={by!r} is unknown; use 'signed', 'negative' or 'magnitude'")
        if not -S <= snapshot < S:
            raise UserError(f"snapshot {snapshot} does not exist: there are {S}, 0 to {S - 1}")
        active = int(self.active[:, snapshot].sum())
        if not 1 <= k <= active:
            raise UserError(f"k={k} is not in [1, {active}], the features active on {self.task!r} at this snapshot")
        effects = self.effects[:, snapshot]
        ranking = {"signed": effects, "negative": -effects, "magnitude": effects.abs()}[by]
        return ranking.masked_fill(~self.active[:, snapshot], -math.inf).topk(k).indices

    def to_frame(self, decoder_norms: Float[Tensor, "F S"]) -> pd.DataFrame:
        """Long table of the features that are active somewhere: a row per feature and snapshot.

        Args:
            decoder_norms: those of the crosscoder, for RelDec.

        Returns:
            feature, snapshot, label, step, ie and ie_se (its standard error), both in logits, relie, relie_normalised
            (effects divided by the metric first), reldec, active; with replicates relie_low and relie_high.
        """
        features = self.active.any(-1).nonzero().flatten()
        S = len(self.labels)
        columns = {
            "ie": self.effects,
            "ie_se": self.standard_errors,
            "relie": relie(self),
            "relie_normalised": relie(self, normalised=True),
            "reldec": reldec(decoder_norms),
            "active": self.active,
        }
        if self.bootstrap is not None:
            columns["relie_low"], columns["relie_high"] = relie_interval(self)
        return pd.DataFrame(
            {
                "feature": features.repeat_interleave(S).numpy(),
                "snapshot": np.tile(np.arange(S), len(features)),
                "label": list(self.labels) * len(features),
                "step": list(self.steps) * len(features),
                **{name: values.cpu()[features].flatten().numpy() for name, values in columns.items()},
            }
        )

    def snapshot_frame(self) -> pd.DataFrame:
        """One row per snapshot: the metric, what became of it, and how all was estimated.

        Returns:
            snapshot, label, step; metric_clean, metric_baseline and error_effect, in logits; completeness_error,
            n_active (features), n (prompts), method, rule, ig_steps, baseline, error, threshold (in logits).
        """
        how = self.estimator
        return pd.DataFrame(
            {
                "snapshot": range(len(self.labels)),
                "label": self.labels,
                "step": self.steps,
                "metric_clean": self.metric_clean.numpy(),
                "metric_baseline": self.metric_baseline.numpy(),
                "error_effect": self.error_effect.numpy(),
                "completeness_error": self.completeness.numpy(),
                "n_active": self.active.sum(0).numpy(),
                "n": self.n_prompts,
                "method": how.method,
                "rule": how.rule,
                "ig_steps": how.steps,
                "baseline": how.baseline,
                "error": how.error,
                "threshold": how.threshold,
            }
        )

    @classmethod
    def from_frames(cls, task: str, frame: pd.DataFrame, snapshots: pd.DataFrame, d_sae: int) -> Attribution:
        """The attribution that `to_frame` and `snapshot_frame` were made from; replicates and positions are not kept.

        Args:
            task: name of the task.
            frame: from `to_frame`.
            snapshots: from `snapshot_frame`.
            d_sae: F, the number of features.

        Raises:
            UserError: a table of another release, which does not say how it was made.
        """
        if missing := [name for name in _ESTIMATOR if name not in snapshots]:
            raise UserError(f"the table of task {task!r} lacks {', '.join(missing)}: attribute the task again")
        S = len(snapshots)
        features = torch.as_tensor(frame["feature"].to_numpy()[::S].copy())
        first = snapshots.iloc[0]

        def column(name: str) -> Tensor:
            values = torch.as_tensor(frame[name].to_numpy().copy()).view(-1, S)
            return torch.zeros(d_sae, S, dtype=values.dtype).index_copy(0, features, values)

        def per_snapshot(name: str) -> Tensor:
            return torch.as_tensor(snapshots[name].to_numpy().copy())

        return cls(
            task=task,
            labels=[str(label) for label in snapshots["label"]],
            steps=[None if pd.isna(step) else int(step) for step in snapshots["step"]],
            estimator=Estimator(
                method=str(first["method"]),
                rule=None if pd.isna(first["rule"]) else str(first["rule"]),
                steps=None if pd.isna(first["ig_steps"]) else int(first["ig_steps"]),
                baseline=str(first["baseline"]),
                error=str(first["error"]),
                threshold=float(first["threshold"]),
            ),
            effects=column("ie"),
            standard_errors=column("ie_se"),
            error_effect=per_snapshot("error_effect"),
            metric_clean=per_snapshot("metric_clean"),
            metric_baseline=per_snapshot("metric_baseline"),
            completeness=per_snapshot("completeness_error"),
            active=column("active"),
            n_prompts=int(first["n"]),
        )
