"""Circuits: edges between the features of two crosscoders at two hook points of the same snapshots.

At snapshot s, a lower feature i acts on an upper feature j through the blocks between the two hook points. With a_s and
b_s the clean activations at the lower and the upper hook:

1. Set the lower feature to its baseline at all positions: a_s - (f_is - f0_is) W_dec[i, s] / c_s goes into model s. The
   gates are those of the clean run, and the error node is kept.
2. Model s carries it to the upper hook, b'_s. The upper crosscoder reads b'_s at snapshot s and the *clean* b_r of
   every other snapshot r, so that only snapshot s changes. Its pre-activations move by
   h'_j - h_j = c_s (b'_s - b_s) W_enc[s, :, j], and its gates are recomputed.
3. The edge is the drop of the upper feature, summed over the positions of a prompt and averaged over prompts:

       target="activation"      sum_t f_js(t) - f'_js(t),  f_js as snapshot s gates it
       target="pre_activation"  sum_t h_j(t) - h'_j(t),    over all kept positions, whether the feature is active or not

   A positive edge means that the lower feature excites the upper one. Its unit is that of the target.
4. To first order the edge is (f_is - f0_is) <W_dec[i, s] / c_s, d target_j / d a_s> at the clean run, with the upper
   gates of the clean run: one backward pass per upper feature gives the edges from all lower features and from the
   error node. The largest edges are then measured exactly, by the intervention, and `Edges.agreement` compares the two.

Edges between crosscoders, the input of the upper one, and the measures of agreement are new here.

Symbols: B prompts of a batch, T positions, S snapshots, D d_model, F upper features, L and U selected lower and upper
features, n edited copies of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.causal.attribution import BATCH_TOKENS, Estimator, baseline_activation, check_baseline
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError, did_you_mean
from crosslens.intervention.prompt_runs import BatchAt, PromptRuns, check_features
from crosslens.intervention.splice import CleanRun
from crosslens.intervention.upper import UpperRun
from crosslens.snapshots.hooks import canonical_hook


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
        effects: (L, U, S) first-order effects, mean over prompts.
        standard_errors: (L, U, S) of these means; NaN with a single prompt.
        exact: (L, U, S) effects by intervention; NaN where the lower feature was not intervened on.
        exact_errors: (L, U, S) standard errors of these.
        error_effects: (U, S) first-order effects of the error node at the lower hook.
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

        Columns: lower, upper, snapshot, label, step, effect and effect_se (first order), exact and exact_se (NaN where
        not measured), clean (target in the clean run); all in the unit of the upper feature's target.
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
        """How well first-order and exact effects agree, on the pairs that have both: a row per snapshot.

        Columns: snapshot, label, step, n (pairs), spearman, pearson, slope (of exact on first-order effects through the
        origin: above 1 if the first order is too small), same_sign (share of the pairs), off (sum of |difference| over
        sum of |exact|). NaN if there are no pairs, or none with an effect.
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


TARGETS = ("activation", "pre_activation")
_POINTS = (
    *("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid"),
    *("ln2.hook_normalized", "mlp.hook_in", "hook_mlp_out", "hook_resid_post"),
)
_ENTRIES = 1 << 24  # entries of a dense (token, upper feature) matrix that is made at a time


def connect_features(
    lower_runs: PromptRuns,
    upper_runs: PromptRuns,
    lower_features: Sequence[int] | Int[Tensor, " L"],
    upper_features: Sequence[int] | Int[Tensor, " U"],
    *,
    n_exact: int = 20,
    target: str = "activation",
    baseline: str = "zero",
) -> Edges:
    """The effect of each lower feature on each upper one, per snapshot: all to first order, the largest exactly.

    Args:
        lower_runs: clean runs of a task with the crosscoder at the lower hook point; answers are not used.
        upper_runs: clean runs of the same prompts with the crosscoder at the upper hook point.
        lower_features: ids, such as `attribute(lower_runs).top(20, -1)`.
        upper_features: ids.
        n_exact: pairs with the largest first-order effect at each snapshot whose lower features are intervened on, one
            at a time; this measures their effects on all selected upper features.
        target: "activation" or "pre_activation" of the upper features.
        baseline: what lower features are set to: "zero", their "mean" over the prompts, or "patch", their values on the
            paired prompt.

    Raises:
        UserError: an unknown option, a feature out of range, hook points in the wrong order, runs of different
            snapshots, tasks or batches, "patch" with runs that are not paired.
    """
    if target not in TARGETS:
        raise UserError(f"target={target!r} is unknown; use one of {TARGETS}{did_you_mean(target, TARGETS)}")
    if n_exact < 0:
        raise UserError(f"n_exact={n_exact} must be at least 0, a number of pairs")
    check_baseline(baseline, lower_runs)
    check_order(lower_runs.hook_name, upper_runs.hook_name)
    lower = check_features(lower_features, lower_runs.crosscoder.cfg.d_sae)
    upper = check_features(upper_features, upper_runs.crosscoder.cfg.d_sae)
    _check_same_prompts(lower_runs, upper_runs)
    snapshots, task = lower_runs.snapshots, lower_runs.task
    progress = tqdm(range(len(snapshots)), desc=f"Connecting on {task.name}", unit="snapshot", leave=False)
    columns = [
        _connect_snapshot(lower_runs, upper_runs, s, (lower, upper), n_exact, target, baseline) for s in progress
    ]
    return Edges(
        task=task.name,
        labels=snapshots.labels,
        steps=snapshots.steps,
        target=target,
        baseline=baseline,
        lower=lower,
        upper=upper,
        n_prompts=len(lower_runs),
        **{name: torch.stack([column[name] for column in columns], -1) for name in columns[0]},
    )


def check_order(lower: str, upper: str) -> None:
    """Refuse an upper hook point that is not above the lower one.

    Raises:
        UserError: it is not.
    """

    def depth(name: str) -> tuple[int, int]:
        _, block, point = canonical_hook(name).split(".", 2)
        return int(block), _POINTS.index(point)

    if depth(lower) >= depth(upper):
        raise UserError(
            f"the upper crosscoder reads {upper}, which is not above {lower}, where the lower one reads: give the runs "
            "of the lower hook point first, then those of a hook point above it"
        )


class _Moments:
    """Mean over prompts and its standard error, accumulated batch by batch in float64 on the CPU."""

    def __init__(self, *shape: int) -> None:
        self.n = 0
        self.total, self.squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))

    def add(self, values: Float[Tensor, "B ..."]) -> None:
        values = values.double().cpu()
        self.n += len(values)
        self.total += values.sum(0)
        self.squares += values.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.total / self.n

    @property
    def standard_error(self) -> Tensor:
        if self.n < 2:
            return torch.full_like(self.total, math.nan)
        spread = (self.squares - self.total.square() / self.n).clamp_min(0)
        return (spread / (self.n - 1) / self.n).sqrt()


@dataclass(frozen=True)
class _Lower:
    """How removing a selected feature, or the error node, moves the activation of a batch at the lower hook.

    Attributes:
        part: the batch.
        change: (B, T, L) f_is - f0_is.
        directions: (L, D) W_dec[i, s] / c_s.
        error: (B, T, D) e_s minus its baseline.
    """

    part: BatchAt
    change: Float[Tensor, "B T L"]
    directions: Float[Tensor, "L D"]
    error: Float[Tensor, "B T D"]

    @classmethod
    def of(
        cls, part: BatchAt, runs: PromptRuns, s: int, ids: Int[Tensor, " L"], baseline: str, mean: Tensor | None
    ) -> _Lower:
        crosscoder, device = runs.crosscoder, part.clean.device
        place = torch.full((crosscoder.cfg.d_sae,), -1).index_copy_(0, ids, torch.arange(len(ids)))
        columns = place[runs.features].to(device)
        change = part.clean.new_zeros(part.keep.numel(), len(ids))
        error = part.clean - baseline_activation(part, Estimator(baseline=baseline), mean)
        for pairs in part.changes(baseline, mean):
            column = columns[pairs.features]
            ours = column >= 0
            change[pairs.tokens[ours], column[ours]] = pairs.values[ours]
            error = error - part.moved(pairs)
        directions = crosscoder.W_dec_by_snapshot[ids.to(device), s].float() / crosscoder.activation_scale[s]
        return cls(part, change.view(*part.keep.shape, -1), directions, error)


@dataclass(frozen=True)
class _Upper:
    """The upper crosscoder on a batch whose activation at one snapshot is replaced.

    Attributes:
        crosscoder: the upper one.
        snapshot: s.
        features: (U,) ids.
        target: "activation" or "pre_activation".
        clean: (B, T, D) raw activation of snapshot s.
        hidden: (B, T, F) pre-activations of the clean activations of all snapshots.
        keep: (B, T) positions that the crosscoder reads.
    """

    crosscoder: Crosscoder
    snapshot: int
    features: Int[Tensor, " U"]
    target: str
    clean: Float[Tensor, "B T D"]
    hidden: Float[Tensor, "B T F"]
    keep: Bool[Tensor, "B T"]

    @classmethod
    def of(cls, run: CleanRun, runs: PromptRuns, s: int, ids: Int[Tensor, " U"], target: str) -> _Upper:
        crosscoder = runs.crosscoder
        hidden = crosscoder.hidden_pre(crosscoder.process_sae_in(run.acts))
        return cls(crosscoder, s, ids.to(hidden.device), target, run.acts[:, :, s], hidden, run.keep)

    @property
    def hook_name(self) -> str:
        return self.crosscoder.cfg.metadata.hook_name

    def moved(self, change: Float[Tensor, "... D"], features: Int[Tensor, " n"] | None) -> Float[Tensor, "... n"]:
        """Change of the pre-activations of some features, or all, for a change of the raw activation of snapshot s."""
        encoder = self.crosscoder.W_enc_by_snapshot[self.snapshot].detach()
        encoder = encoder if features is None else encoder[:, features]
        return (self.crosscoder.activation_scale[self.snapshot] * change).to(encoder.dtype) @ encoder

    def values(self, x: Float[Tensor, "n T D"], rows: Int[Tensor, " n"]) -> Float[Tensor, "n T U"]:
        """The target of the selected features at every position, 0 at positions that the crosscoder does not read.

        Args:
            x: raw activations of snapshot s.
            rows: the prompt of the batch that each row belongs to.
        """
        change, keep = (x - self.clean[rows]).flatten(0, 1), self.keep[rows].flatten()
        hidden = self.hidden[rows].flatten(0, 1)
        if self.target == "pre_activation":
            read = hidden[:, self.features] + self.moved(change, self.features)
        else:
            blocks = torch.arange(len(change), device=change.device).split(max(1, _ENTRIES // hidden.shape[1]))
            read = torch.cat([self._gated(hidden[block] + self.moved(change[block], None)) for block in blocks])
        return (read * keep[:, None]).unflatten(0, x.shape[:2])

    def _gated(self, hidden: Float[Tensor, "n F"]) -> Float[Tensor, "n U"]:
        return self.crosscoder.snapshot_acts(self.crosscoder.gate(hidden), self.snapshot)[:, self.features]

    def slopes(self, values: Float[Tensor, "B T U"]) -> Float[Tensor, "B T U"]:
        """d target / d pre-activation at the clean run; `values` are the targets there."""
        if self.target == "pre_activation":
            return self.keep[..., None].to(values).expand_as(values)
        return (values != 0).to(values)


@torch.no_grad()
def _connect_snapshot(
    below: PromptRuns,
    above: PromptRuns,
    s: int,
    ids: tuple[Tensor, Tensor],
    n_exact: int,
    target: str,
    baseline: str,
) -> dict[str, Tensor]:
    L, U = len(ids[0]), len(ids[1])
    first, exact, error, clean = _Moments(L, U), _Moments(L, U), _Moments(U), _Moments(U)
    mean = below.mean(s).to(below.crosscoder.device) if baseline == "mean" else None

    def batches() -> Iterator[tuple[_Lower, _Upper]]:
        for part, (_, run, _) in zip(below.at(s), above.clean(), strict=True):
            yield _Lower.of(part, below, s, ids[0], baseline, mean), _Upper.of(run, above, s, ids[1], target)

    for lower, upper in batches():
        values = upper.values(upper.clean, torch.arange(len(upper.clean), device=upper.clean.device))
        clean.add(values.sum(1))
        effects, error_effects = _first_order(lower, upper, upper.slopes(values))
        first.add(effects)
        error.add(error_effects)
    selected = torch.zeros(L, dtype=torch.bool)
    selected[first.mean.abs().flatten().topk(min(n_exact, L * U)).indices // U] = True
    if selected.any():
        for lower, upper in batches():
            exact.add(_intervened(lower, upper, selected.to(lower.change.device)))
    return {
        "effects": first.mean,
        "standard_errors": first.standard_error,
        "exact": exact.mean.masked_fill(~selected[:, None], math.nan),
        "exact_errors": exact.standard_error.masked_fill(~selected[:, None], math.nan),
        "error_effects": error.mean,
        "clean": clean.mean,
    }


def _first_order(
    lower: _Lower, upper: _Upper, slopes: Float[Tensor, "B T U"]
) -> tuple[Float[Tensor, "B L U"], Float[Tensor, "B U"]]:
    """Effects of the selected lower features and of the error node, one backward pass per upper feature."""
    part, (B, T, L) = lower.part, lower.change.shape
    U = slopes.shape[-1]
    effects, errors = part.clean.new_zeros(B, L, U), part.clean.new_zeros(B, U)
    for rows in torch.arange(B, device=part.clean.device).split(max(1, BATCH_TOKENS // T)):
        with torch.enable_grad():
            x = part.clean[rows].requires_grad_()
            arrived = carry(part.upper, x, rows, upper.hook_name)
            targets = (upper.moved(arrived, upper.features) * slopes[rows]).sum((0, 1)).unbind()
        if not arrived.requires_grad:
            continue  # attention and MLP of a parallel block do not affect each other
        for j, target in enumerate(targets):
            (gradient,) = torch.autograd.grad(target, x, retain_graph=True)
            effects[rows, :, j] = (lower.change[rows] * (gradient @ lower.directions.T)).sum(1)
            errors[rows, j] = (lower.error[rows] * gradient).sum((1, 2))
    return effects, errors


def _intervened(lower: _Lower, upper: _Upper, selected: Bool[Tensor, " L"]) -> Float[Tensor, "B L U"]:
    """Drop of the upper features when each selected lower feature alone is set to its baseline."""
    part, (B, T, L) = lower.part, lower.change.shape
    everything = torch.arange(B, device=part.clean.device)
    clean = upper.values(upper.clean, everything)
    effects = part.clean.new_zeros(B, L, clean.shape[-1])
    changed = (lower.change != 0).any(1) & selected
    for version in changed.nonzero().split(max(1, BATCH_TOKENS // T)):
        rows, i = version.unbind(-1)
        shift = lower.change[rows, :, i][..., None] * lower.directions[i][:, None]
        arrived = carry(part.upper, part.clean[rows] - shift, rows, upper.hook_name)
        effects[rows, i] = (clean[rows] - upper.values(arrived, rows)).sum(1)
    return effects


class _Arrived(Exception):
    """Carries the activation out of the model once it reaches the upper hook, so that no block above it runs."""

    def __init__(self, activation: Tensor) -> None:
        super().__init__()
        self.activation = activation


def carry(run: UpperRun, x: Float[Tensor, "n T D"], rows: Int[Tensor, " n"], hook_name: str) -> Float[Tensor, "n T D"]:
    """The activation at the upper hook when that at the lower hook is `x`; no block above it runs.

    Args:
        run: the model above the lower hook, on prompts.
        x: activations at all positions; may carry gradients.
        rows: the prompt of the batch that each row belongs to.
        hook_name: the upper hook.

    Raises:
        UserError: the model has no such hook point.
    """

    def stop(activation: Tensor, hook: Any) -> None:
        del hook  # TransformerLens passes the hook point by this name
        raise _Arrived(activation.flatten(2))

    name = canonical_hook(hook_name)
    with run.upper.model.hooks(fwd_hooks=[(name, stop)]):
        try:
            run.logits(x, rows)
        except _Arrived as arrived:
            return arrived.activation
    raise UserError(f"{type(run.upper.model).__name__} never reached hook point {name}: use one that it has")


def _check_same_prompts(lower: PromptRuns, upper: PromptRuns) -> None:
    if lower.snapshots != upper.snapshots or lower.task != upper.task:
        raise UserError(
            f"the lower runs use {lower.task.name!r} at {', '.join(lower.snapshots.labels)}, the upper runs use "
            f"{upper.task.name!r} at {', '.join(upper.snapshots.labels)}: make both with the same task and snapshots"
        )
    lower_batches, upper_batches = ([batch.index.tolist() for batch in runs.batches] for runs in (lower, upper))
    if lower_batches != upper_batches:
        raise UserError(
            "the lower and upper runs have different batches: make both with one batch_size, and both paired or neither"
        )
