"""Effects of features at one hook point on features at another, and how far they are from linear.

Effects are in the unit of the upper feature's target: its activation, or its pre-activation. The measures are this
project's own. Letters: S snapshots, L lower features, U upper features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Edges:
    """Effects of lower features on upper ones, per snapshot.

    Attributes:
        task: name of the task.
        labels: S snapshot labels.
        steps: S training steps, None where not recorded.
        target: "activation" or "pre_activation" of the upper features.
        baseline: what lower features are set to.
        lower: (L,) ids.
        upper: (U,) ids.
        effects: (L, U, S) to first order, mean over prompts.
        standard_errors: (L, U, S) of those means; NaN with a single prompt.
        exact: (L, U, S) by intervention, NaN where the lower feature was not intervened on.
        exact_errors: (L, U, S) standard errors of those.
        error_effects: (U, S) of the error node at the lower hook, to first order.
        clean: (U, S) the target in the clean run, summed over positions, mean over prompts.
        n_prompts: prompts averaged over.
    """

    task: str
    labels: list[str]
    steps: list[int | None]
    target: str
    baseline: str
    lower: Int[Tensor, " L"]
    upper: Int[Tensor, " U"]
    effects: Float[Tensor, "L U S"]
    standard_errors: Float[Tensor, "L U S"]
    exact: Float[Tensor, "L U S"]
    exact_errors: Float[Tensor, "L U S"]
    error_effects: Float[Tensor, "U S"]
    clean: Float[Tensor, "U S"]
    n_prompts: int

    def to_frame(self) -> pd.DataFrame:
        """A row per pair and snapshot.

        Columns: lower, upper, snapshot, label, step, effect and effect_se (to first order), exact and exact_se (NaN
        where not measured), clean (the upper feature's target in the clean run).
        """
        L, U, S = self.effects.shape
        columns = {
            "effect": self.effects,
            "effect_se": self.standard_errors,
            "exact": self.exact,
            "exact_se": self.exact_errors,
            "clean": self.clean.expand(L, U, S),
        }
        table = pd.DataFrame(
            {
                "lower": self.lower.repeat_interleave(U * S).numpy(),
                "upper": self.upper.repeat_interleave(S).repeat(L).numpy(),
                "snapshot": np.tile(np.arange(S), L * U),
                "label": self.labels * (L * U),
                "step": pd.array(self.steps * (L * U), dtype="Int64"),
            }
        )
        return table.assign(**{name: values.flatten().numpy() for name, values in columns.items()})

    def agreement(self) -> pd.DataFrame:
        """How far the first order is from the intervention, on the pairs that have both: a row per snapshot.

        Columns: snapshot, label, step, n (pairs), spearman, pearson, slope (of the exact effects on the first order,
        through the origin: above 1 where the first order is too small), same_sign (share of the pairs), off (sum of
        |difference| over sum of |exact|). NaN where there are no pairs, or none with an effect.
        """
        rows: list[dict[str, Any]] = []
        for s in range(len(self.labels)):
            measured = ~self.exact[..., s].isnan()
            first, exact = self.effects[..., s][measured], self.exact[..., s][measured]
            pairs = pd.DataFrame({"first": first.numpy(), "exact": exact.numpy()})
            rows.append(
                {
                    "snapshot": s,
                    "label": self.labels[s],
                    "step": self.steps[s],
                    "n": len(pairs),
                    "spearman": _correlation(pairs.rank()),
                    "pearson": _correlation(pairs),
                    "slope": float(first @ exact / (first @ first)),
                    "same_sign": float((first.sign() == exact.sign()).double().mean()),
                    "off": float((first - exact).abs().sum() / exact.abs().sum()),
                }
            )
        return pd.DataFrame(rows).astype({"step": "Int64"})


def _correlation(pairs: pd.DataFrame) -> float:
    constant = len(pairs) < 2 or bool((pairs.nunique() < 2).any())
    return math.nan if constant else float(np.corrcoef(pairs["first"], pairs["exact"])[0, 1])
