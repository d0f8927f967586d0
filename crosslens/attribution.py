"""What each feature does for a task, at every snapshot: integrated gradients through the splice, and RelIE.

For a prompt and snapshot s (gates frozen, see `intervention`):

1. f_s are the clean features, e_s = a_s - decode(f_s) the error node; f0, e0 their baseline: zeros, the mean over the
   prompts, or the paired prompt's. `error="frozen"` keeps e0 = e_s.
2. The path f0 + alpha (f_s - f0), e0 + alpha (e_s - e0) is a straight line of activations x(alpha) at the hook, for the
   decoder is linear. One backward pass per node alpha gives the gradient of the metric m at x(alpha); the weights of
   the rule average it: g = sum_k w_k dm/dx(alpha_k)   (Sundararajan et al., arXiv 1703.01365).
3. IE_is = sum_t (f_is - f0_is)(t) <W_dec[i, s] / c_s, g(t)>, summed over real positions, averaged over prompts; the
   error node's effect is sum_t <e_s - e0, g>. Together they must make up m(clean) - m(baseline): completeness.

m = logit(correct) - logit(wrong) at the last position, so a positive effect supports the correct answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError, did_you_mean
from crosslens.intervention import CleanRun, spliced_logits
from crosslens.prompts import PromptBatch, logit_difference
from crosslens.runs import PromptRuns
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task

RULES = ("gauss_legendre", "midpoint", "crosscoding_through_time")
METHODS = ("ig", "gradient")
BASELINES = ("zero", "mean", "patch")
BATCH_TOKENS = 16_384  # tokens per forward pass, over the nodes of a path


@dataclass(frozen=True)
class Attribution:
    """Effects of features on a task, per snapshot.

    Attributes:
        task: name of the task.
        labels: S snapshot labels.
        steps: S training steps, None where not recorded.
        effects: (F, S) mean IE over prompts, in logits.
        standard_errors: (F, S) of those means.
        error_effect: (S,) effect of the error node.
        metric_clean: (S,) mean metric of the clean models.
        metric_baseline: (S,) mean metric at the baseline.
        completeness: (S,) mean |sum of effects - (clean - baseline)| over prompts, relative to mean |clean - baseline|.
        active: (F, S) whether the feature is active anywhere on the prompts.
        n_prompts: prompts averaged over.
    """

    task: str
    labels: list[str]
    steps: list[int | None]
    effects: Float[Tensor, "F S"]
    standard_errors: Float[Tensor, "F S"]
    error_effect: Float[Tensor, " S"]
    metric_clean: Float[Tensor, " S"]
    metric_baseline: Float[Tensor, " S"]
    completeness: Float[Tensor, " S"]
    active: Tensor
    n_prompts: int

    def top(self, k: int, snapshot: int, by: str = "signed") -> Int[Tensor, " k"]:
        """The k features of the largest effect at a snapshot, signed or in magnitude ("magnitude").

        Raises:
            UserError: k is more than the features that are active on the prompts.
        """
        if by not in ("signed", "magnitude"):
            raise UserError(f"by={by!r} is unknown; use 'signed' or 'magnitude'")
        active = int(self.active[:, snapshot].sum())
        if not 1 <= k <= active:
            raise UserError(f"k={k} is not in [1, {active}], the features active on {self.task!r} at this snapshot")
        effects = self.effects[:, snapshot]
        ranking = effects.abs() if by == "magnitude" else effects
        return ranking.masked_fill(~self.active[:, snapshot], -math.inf).topk(k).indices

    def to_frame(self, decoder_norms: Float[Tensor, "F S"]) -> pd.DataFrame:
        """Long table of the features that are active somewhere: a row per feature and snapshot."""
        features = self.active.any(-1).nonzero().flatten()
        S = len(self.labels)
        columns = {
            "ie": self.effects,
            "ie_se": self.standard_errors,
            "relie": relie(self),
            "relie_normalised": relie(self, normalised=True),
            "reldec": (decoder_norms / decoder_norms.sum(-1, keepdim=True)).detach(),
            "active": self.active,
        }
        return pd.DataFrame(
            {
                "feature": features.repeat_interleave(S).numpy(),
                "snapshot": np.tile(np.arange(S), len(features)),
                "label": list(self.labels) * len(features),
                "step": list(self.steps) * len(features),
                **{name: values[features].flatten().cpu().numpy() for name, values in columns.items()},
            }
        )

    def snapshot_frame(self) -> pd.DataFrame:
        """One row per snapshot: metric, baseline, error node, completeness."""
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
            }
        )

    @classmethod
    def from_frames(cls, task: str, frame: pd.DataFrame, snapshots: pd.DataFrame, d_sae: int) -> Attribution:
        """The attribution that `to_frame` and `snapshot_frame` were made from."""
        S = len(snapshots)
        features = torch.as_tensor(frame["feature"].to_numpy()[::S].copy())

        def column(name: str) -> Tensor:
            values = torch.as_tensor(frame[name].to_numpy().copy()).view(-1, S)
            return torch.zeros(d_sae, S, dtype=values.dtype).index_copy(0, features, values)

        def per_snapshot(name: str) -> Tensor:
            return torch.as_tensor(snapshots[name].to_numpy().copy())

        return cls(
            task=task,
            labels=[str(label) for label in snapshots["label"]],
            steps=[None if pd.isna(step) else int(step) for step in snapshots["step"]],
            effects=column("ie"),
            standard_errors=column("ie_se"),
            error_effect=per_snapshot("error_effect"),
            metric_clean=per_snapshot("metric_clean"),
            metric_baseline=per_snapshot("metric_baseline"),
            completeness=per_snapshot("completeness_error"),
            active=column("active"),
            n_prompts=int(snapshots["n"].iloc[0]),
        )


def attribute(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    method: str = "ig",
    *,
    rule: str = "gauss_legendre",
    steps: int = 20,
    baseline: str = "zero",
    error: str = "joint",
    batch_size: int = 256,
    device: str = "cpu",
    backend: str = "bridge",
    runs: PromptRuns | None = None,
) -> Attribution:
    """Indirect effects of every feature on a task, at every snapshot.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: minimal pairs.
        method: "ig" integrates the gradient along the path, "gradient" takes it at the clean activations alone.
        rule: "gauss_legendre", "midpoint", or "crosscoding_through_time" (alpha = 1, 1 - 1/n, ..., 1/n).
        steps: nodes of the rule; more where `completeness` says so.
        baseline: "zero", "mean" over the prompts, or "patch", the paired prompt's features.
        error: "joint" moves the error node along the path, "frozen" keeps it clean.
        batch_size: prompts per forward pass.
        device: where everything runs.
        backend: "bridge" or "hooked_transformer".
        runs: clean runs of the task to use again.

    Raises:
        UserError: unknown option, crosscoder of other snapshots, task without usable prompts.
    """
    for name, value, options in (
        ("method", method, METHODS),
        ("rule", rule, RULES),
        ("baseline", baseline, BASELINES),
        ("error", error, ("joint", "frozen")),
    ):
        if value not in options:
            raise UserError(f"{name}={value!r} is unknown; use one of {options}{did_you_mean(value, options)}")
    if steps < 1:
        raise UserError(f"steps={steps} must be at least 1")
    if runs is None:
        runs = PromptRuns(
            crosscoder,
            snapshots,
            task,
            batch_size=batch_size,
            device=device,
            backend=backend,
            paired=baseline == "patch",
        )
    nodes, weights = ([1.0], [1.0]) if method == "gradient" else quadrature(rule, steps)
    columns = [
        _attribute_snapshot(runs, s, nodes, weights, baseline, error == "joint")
        for s in tqdm(range(len(snapshots)), desc=f"Attributing {task.name}", unit="snapshot", leave=False)
    ]
    stacked = {name: torch.stack([column[name] for column in columns], -1) for name in columns[0]}
    return Attribution(task=task.name, labels=snapshots.labels, steps=snapshots.steps, n_prompts=len(runs), **stacked)


def _attribute_snapshot(
    runs: PromptRuns, s: int, nodes: Sequence[float], weights: Sequence[float], baseline: str, joint: bool
) -> dict[str, Tensor]:
    crosscoder = runs.crosscoder
    model = runs.snapshots.model(s, device=runs.device, backend=runs.backend)
    mean = runs.mean_features(s) if baseline == "mean" else None
    effects: list[Tensor] = []
    errors: list[Tensor] = []
    metrics: list[Tensor] = []
    active = torch.zeros(crosscoder.cfg.d_sae, dtype=torch.bool, device=crosscoder.device)
    directions = crosscoder.W_dec_by_snapshot[:, s] / crosscoder.activation_scale[s]
    for batch, run, patch in runs.clean():
        f = run.snapshot_acts(crosscoder, s)
        f0 = runs.baseline(baseline, s, run, patch, mean)
        clean = run.acts[:, :, s]
        error = clean - crosscoder.decode_snapshot(f, s)
        if not joint:
            error0 = error
        elif patch is not None and baseline == "patch":
            error0 = patch.acts[:, :, s] - crosscoder.decode_snapshot(f0, s)
        else:
            error0 = torch.zeros_like(error)
        start = crosscoder.decode_snapshot(f0, s) + error0
        slope = mean_gradient(runs, model, batch, run, start, clean, nodes, weights)
        with torch.no_grad():
            ends = [spliced_metric(runs, model, batch, run, x[None])[0] for x in (clean, start)]
        effects.append(((f - f0) * (slope @ directions.T)).sum(1).double().cpu())
        errors.append(((error - error0) * slope).sum((1, 2)).double().cpu())
        metrics.append(torch.stack(ends, -1).double().cpu())
        active |= (f != 0).any(0).any(0)
    ie, error_effect, m = torch.cat(effects), torch.cat(errors), torch.cat(metrics)
    change = m[:, 0] - m[:, 1]
    residual = ie.sum(-1) + error_effect - change
    spread = ie.std(0, correction=1) if len(ie) > 1 else torch.full_like(ie[0], math.nan)
    return {
        "effects": ie.mean(0),
        "standard_errors": spread / math.sqrt(len(ie)),
        "error_effect": error_effect.mean(),
        "metric_clean": m[:, 0].mean(),
        "metric_baseline": m[:, 1].mean(),
        "completeness": residual.abs().mean() / change.abs().mean(),
        "active": active.cpu(),
    }


def mean_gradient(
    runs: PromptRuns,
    model: Any,
    batch: PromptBatch,
    run: CleanRun,
    start: Float[Tensor, "B T D"],
    end: Float[Tensor, "B T D"],
    nodes: Sequence[float],
    weights: Sequence[float],
) -> Float[Tensor, "B T D"]:
    """Weighted mean over the path's nodes of the metric's gradient; many nodes go through the model as one batch."""
    mean = torch.zeros_like(start)
    per_pass = max(1, BATCH_TOKENS // run.tokens.numel())
    alphas = torch.tensor(list(zip(nodes, weights, strict=True)), dtype=start.dtype, device=start.device)
    for alpha, weight in (chunk.unbind(-1) for chunk in alphas.split(per_pass)):
        x = (start + alpha[:, None, None, None] * (end - start)).requires_grad_()
        (gradient,) = torch.autograd.grad(spliced_metric(runs, model, batch, run, x).sum(), x)
        mean += torch.einsum("n,nbtd->btd", weight, gradient)
    return mean


def spliced_metric(
    runs: PromptRuns, model: Any, batch: PromptBatch, run: CleanRun, x: Float[Tensor, "n B T D"]
) -> Float[Tensor, "n B"]:
    """Metric of every prompt for n versions of the activation at the hook."""
    n = len(x)
    logits = spliced_logits(model, run.tokens.repeat(n, 1), runs.hook_name, x.flatten(0, 1), run.keep.repeat(n, 1))[
        :, -1
    ]
    return torch.stack([logit_difference(part, batch) for part in logits.unflatten(0, (n, -1))])


def quadrature(rule: str, steps: int) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1] and weights of a rule for the integral over alpha; weights add up to 1."""
    if rule == "gauss_legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return ((points + 1) / 2).tolist(), (weights / 2).tolist()
    if rule == "midpoint":
        return [(i + 0.5) / steps for i in range(steps)], [1 / steps] * steps
    return [1 - i / steps for i in range(steps)], [1 / steps] * steps


def relie(
    attribution: Attribution, min_effect: float | None = None, *, normalised: bool = False, floor: float = 0.1
) -> Float[Tensor, "F S"]:
    """Relative indirect effect `|IE_is| / sum_s' |IE_is'|`; rows sum to 1 or are NaN (Bayazit et al., section 3).

    Args:
        attribution: from `attribute`.
        min_effect: a row is NaN where every |IE| is below it; two standard errors when None.
        normalised: divide the effects of each snapshot by its clean metric first, for logits grow with training.
        floor: smallest |metric| that is divided by.
    """
    size = attribution.effects.abs()
    least = 2 * attribution.standard_errors if min_effect is None else torch.full_like(size, min_effect)
    matters = (size > least).any(-1, keepdim=True)
    if normalised:
        size = size / attribution.metric_clean.abs().clamp_min(floor)
    return torch.where(matters, size / size.sum(-1, keepdim=True), torch.nan)
