"""How an effect is estimated: the method, the path from the baseline to the clean run, the rule that sums along it.

On the path alpha runs from 0, the baseline, to 1, the clean run. Rules for the mean of a function of alpha:

    gauss_legendre   the nodes of n-point Gauss-Legendre: exact for polynomials of degree 2n - 1
    midpoint         (i + 1/2) / n
    left             1, 1 - 1/n, ..., 1/n: counted from the clean run, as Bayazit et al. do (arXiv 2509.05291); it
                     includes the clean run and leaves out the baseline (elsewhere called a right Riemann sum)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crosslens.errors import UserError, did_you_mean

METHODS = ("ig", "gradient", "exact")
RULES = ("gauss_legendre", "midpoint", "left")
BASELINES = ("zero", "mean", "patch")
ERRORS = ("joint", "frozen")


@dataclass(frozen=True)
class Estimator:
    """How effects were, or are to be, estimated.

    Attributes:
        method: "ig" integrates the gradient along the path, "gradient" takes it at the clean run alone (attribution
            patching), "exact" sets every active feature to its baseline in turn and runs the model.
        rule: of the integral, None where the method has none.
        steps: nodes of the rule, None where the method has none.
        baseline: what features start from: "zero", "mean" over the prompts, "patch", their values on the paired prompt.
        error: "joint" lets the error node start from its baseline too, "frozen" keeps it clean.
        threshold: effects of a feature at one position of a prompt count as 0 unless they exceed this, in logits.

    Raises:
        UserError: an unknown option, steps below 1, a negative threshold, or one for "exact".
    """

    method: str = "ig"
    rule: str | None = "gauss_legendre"
    steps: int | None = 20
    baseline: str = "zero"
    error: str = "joint"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        for name, value, options in (
            ("method", self.method, METHODS),
            ("rule", self.rule, RULES),
            ("baseline", self.baseline, BASELINES),
            ("error", self.error, ERRORS),
        ):
            if value not in options and not (name == "rule" and value is None and self.method != "ig"):
                raise UserError(f"{name}={value!r} is unknown; use one of {options}{did_you_mean(value, options)}")
        if self.method != "ig":
            object.__setattr__(self, "rule", None)
            object.__setattr__(self, "steps", None)
        elif self.steps is None or self.steps < 1:
            raise UserError(f"steps={self.steps} must be at least 1")
        if not self.threshold >= 0:
            raise UserError(f"threshold={self.threshold} must be at least 0 logits")
        if self.method == "exact" and self.threshold:
            raise UserError(
                f"threshold={self.threshold} is of effects at one position, and method='exact' ablates a feature at "
                "all of them: use method='ig', or threshold=0"
            )

    def nodes(self) -> tuple[list[float], list[float]]:
        """Nodes in [0, 1] at which the gradient is taken, and their weights."""
        if self.rule is None or self.steps is None:
            return [1.0], [1.0]
        return quadrature(self.rule, self.steps)

    def __str__(self) -> str:
        path = f" ({self.rule}, {self.steps} steps)" if self.rule is not None else ""
        cut = f", threshold {self.threshold:g}" if self.threshold else ""
        return f"{self.method}{path}, {self.baseline} baseline, {self.error} error{cut}"


def quadrature(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1] and weights of a rule for the mean over alpha; weights add up to 1."""
    if rule == "gauss_legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return ((points + 1) / 2).tolist(), (weights / 2).tolist()
    if rule == "midpoint":
        return [(i + 0.5) / steps for i in range(steps)], [1 / steps] * steps
    return [1 - i / steps for i in range(steps)], [1 / steps] * steps
