"""What each feature does for a task, at every snapshot: integrated gradients through the splice, or exact ablation.

For a prompt and snapshot s (gates frozen from the clean run, see `changes`):

1. f_s are the clean features, e_s = a_s - decode(f_s) the error node; f0, e0 their baseline: zeros, the mean over the
   prompts, or the paired prompt's. `error="frozen"` keeps e0 = e_s.
2. The path f0 + alpha (f_s - f0), e0 + alpha (e_s - e0) is a straight line of activations x(alpha) at the hook, for the
   decoder is linear. One backward pass per node alpha gives the gradient of the metric m at x(alpha); the weights of
   the rule average it: g = sum_k w_k dm/dx(alpha_k)   (Sundararajan et al., arXiv 1703.01365; for features Marks et
   al., arXiv 2403.19647; the rule "left" is that of Bayazit et al., arXiv 2509.05291).
3. IE_is = sum_t (f_is - f0_is)(t) <W_dec[i, s] / c_s, g(t)>, summed over real positions, averaged over prompts; the
   error node's effect is sum_t <e_s - e0, g>. Together they must make up m(clean) - m(baseline): completeness.

`method="gradient"` takes g at the clean run alone. `method="exact"` runs the model once for every prompt and feature
that is active in it: IE_is = m(clean) - m(f_is set to f0_is at all positions, all else clean).

m = logit(correct) - logit(wrong) at the last position, so a positive effect supports the correct answer. Nothing below
the hook is run again, and no feature is dense: effects are products over (token, feature) pairs, added up per prompt.

Letters: N prompts, B of a batch, T positions, S snapshots, D d_model, A features active on any prompt, O positions
counted from the end, R bootstrap replicates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.changes import BatchAt, Pairs
from crosslens.crosscoders import Crosscoder
from crosslens.effects import Attribution as Attribution
from crosslens.effects import Bootstrap, Positions
from crosslens.errors import UserError
from crosslens.prompts import logit_difference
from crosslens.quadrature import BASELINES as BASELINES
from crosslens.quadrature import Estimator
from crosslens.runs import PromptRuns, check_features
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task

BATCH_TOKENS = 4096  # tokens in one pass through the model above the hook


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
    threshold: float = 0.0,
    positions: bool = False,
    n_bootstrap: int = 0,
    seed: int = 0,
    features: Sequence[int] | Int[Tensor, " n"] | None = None,
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
        method: "ig" integrates the gradient along the path, "gradient" takes it at the clean activations alone, "exact"
            ablates every active feature in turn.
        rule: "gauss_legendre", "midpoint", or "left" (alpha = 1, 1 - 1/n, ..., 1/n).
        steps: nodes of the rule; more where `completeness` says so.
        baseline: "zero", "mean" over the prompts, or "patch", the paired prompt's features.
        error: "joint" moves the error node along the path, "frozen" keeps it clean.
        threshold: effects at one position of a prompt count as 0 unless they exceed this, in logits.
        positions: keep effects by position from the end of the prompt, as `Attribution.positions`.
        n_bootstrap: replicates over prompts, for intervals of RelIE; 0 keeps none.
        seed: of the replicates.
        features: for "exact", ablate these alone; effects of the others are 0, and completeness NaN.
        batch_size: prompts per forward pass below the hook.
        device: where everything runs.
        backend: "bridge" or "hooked_transformer".
        runs: clean runs of the task to use again; batch_size, device and backend are theirs then.

    Raises:
        UserError: unknown option, crosscoder of other snapshots, task without usable prompts, runs of something else,
            feature ids out of range.
    """
    estimator = Estimator(method, rule, steps, baseline, error, threshold)
    chosen = None if features is None else check_features(features, crosscoder.cfg.d_sae)
    if chosen is not None and method != "exact":
        raise UserError(f"method={method!r} gives all features at once: choose features for method='exact' only")
    if positions and method == "exact":
        raise UserError("method='exact' changes a feature at all positions at once: use method='ig' for positions=True")
    if n_bootstrap < 0:
        raise UserError(f"n_bootstrap={n_bootstrap} must be at least 0; 200 is usual")
    if runs is None:
        paired = baseline == "patch"
        runs = PromptRuns(
            crosscoder, snapshots, task, batch_size=batch_size, device=device, backend=backend, paired=paired
        )
    elif not runs.are_of(crosscoder, snapshots, task):
        raise UserError(f"the given runs are not of this crosscoder, these snapshots and {task.name!r}: leave them out")
    elif baseline == "patch" and not runs.paired:
        raise UserError("the given runs lack the paired prompts of baseline='patch': make PromptRuns(..., paired=True)")
    draws = _draws(len(runs), n_bootstrap, seed)
    progress = tqdm(range(len(snapshots)), desc=f"Attributing {task.name}", unit="snapshot", leave=False)
    columns = [_attribute_snapshot(runs, s, estimator, draws, positions, chosen) for s in progress]
    # snapshots last, as everywhere in an Attribution
    stacked = {name: torch.stack([column[name] for column in columns], -1) for name in columns[0]}
    active = runs.active | runs.active_paired if baseline == "patch" else runs.active
    if chosen is not None:
        active = active & torch.zeros(len(active), 1, dtype=torch.bool).index_fill_(0, chosen, True)
    for name in ("effects", "standard_errors"):
        of_active = stacked[name]
        stacked[name] = torch.zeros(active.shape, dtype=of_active.dtype).index_copy_(0, runs.features, of_active)
    kept = {name: stacked.pop(f"bootstrap_{name}") for name in ("effects", "metric")}
    placed = {field: stacked.pop(f"position_{field}") for field in ("effects", "sizes", "error_effects", "error_sizes")}
    return Attribution(
        task=task.name,
        labels=snapshots.labels,
        steps=snapshots.steps,
        estimator=estimator,
        active=active,
        n_prompts=len(runs),
        bootstrap=Bootstrap(runs.features, **kept) if n_bootstrap else None,
        positions=Positions(snapshots.labels, runs.features, **placed) if positions else None,
        **stacked,
    )


def crosscoding_through_time() -> dict[str, Any]:
    """Arguments of `attribute` for the rule of Bayazit et al. (arXiv 2509.05291): `attribute(..., **these)`.

    The left rule at alpha = 1, .9, ..., .1, a baseline of zero for features and error alike, and effects at one token
    that do not exceed .1 logits cut to 0. Effects are here summed over the positions of a prompt and averaged over
    prompts, where their code averages over the positions of a batch, padding included.
    """
    return {"method": "ig", "rule": "left", "steps": 10, "baseline": "zero", "error": "joint", "threshold": 0.1}


class _Sums:
    """Sums over the prompts of one snapshot, in float64 on the CPU; what they take does not grow with the prompts."""

    def __init__(self, runs: PromptRuns, draws: Int[Tensor, "R N"], positions: bool) -> None:
        A, R = len(runs.features), len(draws)
        length = max(batch.tokens.shape[1] for batch in runs.batches) if positions else 0
        self.positions, self.draws = positions, draws
        self.effects, self.squares = (torch.zeros(A, dtype=torch.float64) for _ in range(2))
        self.replicates = torch.zeros(R, A, dtype=torch.float64)
        self.metric_replicates = torch.zeros(R, dtype=torch.float64)
        self.position_effects, self.position_sizes = (torch.zeros(length, A, dtype=torch.float64) for _ in range(2))
        self.error_effects, self.error_sizes = (torch.zeros(length, dtype=torch.float64) for _ in range(2))
        # error node, clean metric, baseline metric, |residual|, |change|
        self.scalars = torch.zeros(5, dtype=torch.float64)

    def add_prompts(self, first: int, effects: Tensor, error: Tensor, clean: Tensor, baseline: Tensor) -> None:
        """Effects (B, A), error node, clean and baseline metric (B,) of a batch; `first` is its first prompt."""
        self.effects += effects.sum(0)
        self.squares += effects.square().sum(0)
        weights = self.draws[:, first : first + len(effects)].double()
        self.replicates += weights @ effects
        self.metric_replicates += weights @ clean
        change = clean - baseline
        residual = effects.sum(-1) + error - change
        self.scalars += torch.stack([error, clean, baseline, residual.abs(), change.abs()]).sum(-1)

    def add_pairs(self, pairs: Pairs, values: Tensor, length: int) -> None:
        """Effects of (token, feature) pairs, to where they lie from the end of prompts of a length."""
        A = len(self.effects)
        place = (length - 1 - pairs.tokens % length) * A + pairs.features
        self.position_effects.view(-1).index_add_(0, place, values)
        self.position_sizes.view(-1).index_add_(0, place, values.abs())

    def add_errors(self, errors: Float[Tensor, "B T"]) -> None:
        """Effects of the error node by position."""
        length = errors.shape[1]
        self.error_effects[:length] += errors.sum(0).flip(0)
        self.error_sizes[:length] += errors.abs().sum(0).flip(0)

    def result(self, n: int, complete: bool) -> dict[str, Tensor]:
        """What an Attribution holds, for one snapshot and n prompts."""
        error, clean, baseline, residual, change = (self.scalars / n).unbind()
        spread = (self.squares - self.effects.square() / n).clamp_min(0)
        return {
            "effects": self.effects / n,
            "standard_errors": (spread / (n - 1) / n).sqrt() if n > 1 else torch.full_like(spread, math.nan),
            "error_effect": error,
            "metric_clean": clean,
            "metric_baseline": baseline,
            "completeness": residual / change if complete else torch.full_like(change, math.nan),
            "bootstrap_effects": (self.replicates / n).float(),
            "bootstrap_metric": self.metric_replicates / n,
            "position_effects": self.position_effects / n,
            "position_sizes": self.position_sizes / n,
            "position_error_effects": self.error_effects / n,
            "position_error_sizes": self.error_sizes / n,
        }


@torch.no_grad()
def _attribute_snapshot(
    runs: PromptRuns,
    s: int,
    estimator: Estimator,
    draws: Int[Tensor, "R N"],
    positions: bool,
    chosen: Int[Tensor, " n"] | None,
) -> dict[str, Tensor]:
    sums = _Sums(runs, draws, positions)
    mean = runs.mean(s).to(runs.crosscoder.device) if estimator.baseline == "mean" else None
    wanted = torch.ones(len(runs.features), dtype=torch.bool) if chosen is None else torch.isin(runs.features, chosen)
    for part in runs.at(s):
        start = baseline_activation(part, estimator, mean)
        clean, baseline = metrics(part, part.clean, start).double().cpu().chunk(2)
        if estimator.method == "exact":
            effects, error = _ablated(part, start, clean, estimator, mean, wanted)
        else:
            effects, error = _integrated(part, start, estimator, mean, sums)
        sums.add_prompts(part.first, effects, error, clean, baseline)
    return sums.result(len(runs), complete=chosen is None)


def baseline_activation(part: BatchAt, estimator: Estimator, mean: Tensor | None) -> Float[Tensor, "B T D"]:
    """x(0): the activation at the hook when features, and the error node unless it is frozen, are at their baseline."""
    if estimator.error == "frozen":
        start = part.clean - sum(part.moved(pairs) for pairs in part.changes(estimator.baseline, mean))
    elif estimator.baseline == "patch":
        assert part.patch is not None
        start = part.patch
    else:
        start = part.bias if mean is None else part.bias + mean @ part.directions
    return torch.where(part.keep[..., None], start, part.clean)


def metrics(part: BatchAt, *activations: Float[Tensor, "B T D"]) -> Float[Tensor, " nB"]:
    """Metric of every prompt for each of n activations at the hook, one after the other; in as few passes as can be."""
    B, T = part.keep.shape
    rows = torch.arange(B, device=part.clean.device)
    # one that knows nothing of the prompt differs in the rounding of its BOS at most: one row serves all
    sizes = [1 if part.upper.upper.at_output and _all_alike(x) else B for x in activations]
    x, prompts = (
        torch.cat([each[:n] for each, n in zip(all_rows, sizes, strict=True)])
        for all_rows in (activations, [rows] * len(sizes))
    )
    chunks = torch.arange(len(x), device=x.device).split(max(1, BATCH_TOKENS // T))
    logits = torch.cat([part.upper.logits(x[chunk], prompts[chunk]) for chunk in chunks])
    return torch.cat([logit_difference(each.expand(B, -1), part.prompts) for each in logits.split(sizes)])


def _all_alike(x: Float[Tensor, "B T D"]) -> bool:
    return torch.allclose(x, x[:1], rtol=0, atol=1e-6 * float(x.abs().max()))


def mean_gradient(
    part: BatchAt, start: Float[Tensor, "B T D"], nodes: Sequence[float], weights: Sequence[float]
) -> Float[Tensor, "B T D"]:
    """Weighted mean over the nodes of the metric's gradient on the path from `start` to the clean activation.

    Nodes of one prompt and prompts of one batch go through the model together, as many as `BATCH_TOKENS` allows.
    """
    mean = torch.zeros_like(start)
    per_pass = max(1, BATCH_TOKENS // start.shape[1])
    points = torch.tensor(list(zip(nodes, weights, strict=True)), dtype=start.dtype, device=start.device)
    for rows in torch.arange(len(start), device=start.device).split(per_pass):
        origin, span = start[rows], part.clean[rows] - start[rows]
        for alpha, weight in (chunk.unbind(-1) for chunk in points.split(max(1, per_pass // len(rows)))):
            with torch.enable_grad():
                x = (origin + alpha[:, None, None, None] * span).requires_grad_()
                metric = part.metric(x.flatten(0, 1), rows.repeat(len(alpha))).unflatten(0, (len(alpha), -1))
                (gradient,) = torch.autograd.grad(weight @ metric.sum(-1), x)
            mean[rows] += gradient.sum(0)
    return mean


def _integrated(
    part: BatchAt, start: Tensor, estimator: Estimator, mean: Tensor | None, sums: _Sums
) -> tuple[Float[Tensor, "B A"], Float[Tensor, " B"]]:
    """Effects of features and of the error node, from the mean gradient."""
    gradient = mean_gradient(part, start, *estimator.nodes())
    B, T = part.keep.shape
    A = len(part.directions)
    effects = torch.zeros(B * A, dtype=torch.float64)
    # all that changes on the path, minus what features change, is the error node
    errors = ((part.clean - start) * gradient).sum(-1).double().cpu()
    for pairs in part.changes(estimator.baseline, mean):
        values = part.along(pairs, gradient).double().cpu()
        pairs = pairs.to("cpu")
        errors.view(-1).index_add_(0, pairs.tokens, values, alpha=-1)
        if estimator.threshold:
            values = torch.where(values.abs() > estimator.threshold, values, 0.0)
        effects.index_add_(0, pairs.tokens // T * A + pairs.features, values)
        if sums.positions:
            sums.add_pairs(pairs, values, T)
    if estimator.error == "frozen":
        errors.zero_()  # nothing but rounding is left of it
    if sums.positions:
        sums.add_errors(errors)
    return effects.view(B, A), errors.sum(-1)


def _ablated(
    part: BatchAt, start: Tensor, clean: Tensor, estimator: Estimator, mean: Tensor | None, wanted: Tensor
) -> tuple[Float[Tensor, "B A"], Float[Tensor, " B"]]:
    """What the metric loses when a feature, or the error node, alone is set to its baseline at all positions."""
    B, T = part.keep.shape
    A, device = len(part.directions), part.clean.device
    effects = torch.zeros(B * A, dtype=torch.float64)
    without_error = start.clone()
    for pairs in part.changes(estimator.baseline, mean):
        without_error += part.moved(pairs)
        ours = wanted.to(device)[pairs.features]
        tokens, features, values = pairs.tokens[ours], pairs.features[ours], pairs.values[ours]
        # every (prompt, feature) is one version of the prompt; its pairs are next to one another
        version, order = (tokens // T * A + features).sort(stable=True)
        versions, which = version.unique_consecutive(return_inverse=True)
        shift = values[order, None] * part.directions[features[order]]
        position = tokens[order] % T
        for first in range(0, len(versions), max(1, BATCH_TOKENS // T)):
            block = versions[first : first + max(1, BATCH_TOKENS // T)]
            inside = slice(
                *torch.searchsorted(which, torch.tensor([first, first + len(block)], device=device)).tolist()
            )
            x = part.clean[block // A]
            x.flatten(0, 1).index_add_(0, (which[inside] - first) * T + position[inside], shift[inside], alpha=-1)
            ablated = part.metric(x, block // A).double().cpu()
            effects[block.cpu()] = clean[(block // A).cpu()] - ablated
    if estimator.error == "frozen":
        return effects.view(B, A), torch.zeros(B, dtype=torch.float64)
    return effects.view(B, A), clean - metrics(part, without_error).double().cpu()


def _draws(n: int, replicates: int, seed: int) -> Int[Tensor, "R N"]:
    """How often each prompt is drawn in each replicate; the same at all snapshots."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=replicates)
    return torch.from_numpy(counts.astype(np.int16))
