"""Attribution: what each feature does for a task, at every snapshot, by gradients along a path or exact ablation.

For a prompt and snapshot s, with gates frozen from the clean run (see `crosslens.intervention.prompt_runs`):

1. f_s are the clean features, e_s = a_s - decode(f_s) is the error node; f0, e0 are their baselines: zeros, the mean
   over the prompts, or the values on the paired prompt. `error="frozen"` keeps e0 = e_s.
2. The decoder is linear, so the path f0 + alpha (f_s - f0), e0 + alpha (e_s - e0) is a straight line of activations
   x(alpha) at the hook. One backward pass per node alpha gives the gradient of the metric m at x(alpha), and the
   weights of a quadrature rule average it: g = sum_k w_k dm/dx(alpha_k)   (Sundararajan et al., arXiv 1703.01365; for
   features Marks et al., arXiv 2403.19647). The rules for the mean of a function of alpha are

       gauss_legendre   n-point Gauss-Legendre: exact for polynomials of degree 2n - 1
       midpoint         (i + 1/2) / n
       left             1, 1 - 1/n, ..., 1/n, as in Bayazit et al. (arXiv 2509.05291): includes the clean run, leaves
                        out the baseline (elsewhere called a right Riemann sum)

3. IE_is = sum_t (f_is - f0_is)(t) <W_dec[i, s] / c_s, g(t)>, summed over the spliced positions and averaged over
   prompts; the error node's effect is sum_t <e_s - e0, g>. Together they must add up to m(clean) - m(baseline):
   completeness, an axiom of integrated gradients.

Which part of the path g is averaged over depends on the question:

    removal     the tenth of the path at the clean run: what is lost if the feature alone is set to its baseline. This
                is what ablation measures, and the default: it ranks features most like exact ablation does
    both_ends   the tenths at either end: the mean of what is lost by removing the feature from the clean run, and
                gained by adding it to the baseline
    ig          the whole path: how the effect of all features together divides among them. Only these effects are
                complete; in between the ends the model can behave unlike at either
    gradient    the clean run alone (attribution patching)
    exact       no gradient: IE_is = m(clean) - m(f_is set to f0_is at all positions, everything else clean), with a run
                of the model per prompt and active feature

`attribute(..., n_exact=100)` compares the largest effects with exact ones of the same kind: removed from the clean run,
or for `both_ends` and `ig` the mean of that and of added to the baseline.

m = logit(correct) - logit(wrong) at the last position, so a positive effect supports the correct answer. Nothing below
the hook is run again, and effects are computed on (token, feature) pairs, never on dense features. Effects by position
are new here.

Symbols: N prompts in G groups, B of a batch, T positions, S snapshots, D d_model, F features, A features active on any
prompt, O positions counted from the end of the prompt, R bootstrap replicates.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.causal.relative import (
    effect_interval,
    q_values,
    reldec,
    relie,
    relie_interval,
    share_relie,
    significant,
)
from crosslens.distributed.together import each, shares
from crosslens.errors import UserError, did_you_mean
from crosslens.intervention.prompt_runs import BatchAt, Pairs, PromptRuns, check_features, on_runs
from crosslens.printing import as_html, as_text, plot
from crosslens.snapshots.lookup import find_snapshot
from crosslens.stats import rank_correlation, resample_counts, sign_flip_p
from crosslens.tasks.items import Item
from crosslens.tasks.prompts import logit_difference

METHODS = ("removal", "both_ends", "ig", "gradient", "exact")
RULES = ("gauss_legendre", "midpoint", "left")
BASELINES = ("zero", "mean", "patch")
ERRORS = ("joint", "frozen")
ENDS = ("clean", "baseline")
END, END_NODES = 0.1, 2  # of the path, near the clean run or the baseline
BATCH_TOKENS = 4096  # tokens in one pass through the model above the hook
SIGNIFICANT_GROUPS = 6  # with 5 groups of prompts the smallest p-value of `stats.sign_flip_p` is .08
MIN_GROUPS = 20  # of prompts; with fewer `attribute` warns
PROMPTS = 16  # that `positions=True` keeps word by word, evenly spaced among all
_ESTIMATOR = ("method", "rule", "n_nodes", "baseline", "error", "threshold")  # columns of `snapshot_frame`


@dataclass(frozen=True)
class Estimator:
    """How to estimate effects.

    Attributes:
        method: "removal", "both_ends", "ig", "gradient" or "exact", see `crosslens.causal.attribution`.
        rule: quadrature rule of "ig"; None is "gauss_legendre", and for other methods it is always None.
        n_nodes: quadrature nodes of "ig", each a backward pass; None is 20, and for other methods it is always None.
        baseline: where features start: "zero", "mean" over the prompts, or "patch", their values on the paired prompt.
            None is "patch" where prompts are paired, and otherwise "zero": on a path to the paired prompt effects agree
            better with ablations.
        error: "joint" moves the error node along the path too, "frozen" keeps it clean.
        threshold: effects of a feature at one position of a prompt count as 0 unless they exceed this, in logits.

    Raises:
        UserError: an unknown option, n_nodes below 1, a negative threshold, or one for "exact".
    """

    method: str = "removal"
    rule: str | None = None
    n_nodes: int | None = None
    baseline: str | None = None
    error: str = "joint"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.method in ("removal", "both_ends") and (self.rule, self.n_nodes) != (None, None):
            raise UserError(
                f"rule={self.rule!r} and n_nodes={self.n_nodes} belong to method='ig', not to {self.method!r}: give "
                "method='ig' with them, or leave them out"
            )
        if self.method == "ig":
            object.__setattr__(self, "rule", self.rule or "gauss_legendre")
            object.__setattr__(self, "n_nodes", 20 if self.n_nodes is None else self.n_nodes)
        optional = ("baseline",) if self.method == "ig" else ("baseline", "rule")
        for name, value, options in (
            ("method", self.method, METHODS),
            ("rule", self.rule, RULES),
            ("baseline", self.baseline, BASELINES),
            ("error", self.error, ERRORS),
        ):
            if value not in options and not (value is None and name in optional):
                raise UserError(f"{name}={value!r} is unknown; use one of {options}{did_you_mean(value, options)}")
        if self.method != "ig":
            object.__setattr__(self, "rule", None)
            object.__setattr__(self, "n_nodes", None)
        elif self.n_nodes is None or self.n_nodes < 1:
            raise UserError(f"n_nodes={self.n_nodes} must be at least 1; 20 is usual")
        if not self.threshold >= 0:
            raise UserError(f"threshold={self.threshold} must be at least 0 logits")
        if self.method == "exact" and self.threshold:
            raise UserError(
                f"threshold={self.threshold} applies to effects at one position, but method='exact' ablates a feature "
                "at all positions: use method='ig', or threshold=0"
            )

    @property
    def start(self) -> str:
        """The baseline; where none was given and prompts did not decide, "zero"."""
        return self.baseline or "zero"

    def nodes(self) -> tuple[list[float], list[float]]:
        """Nodes in [0, 1] where the gradient is taken, and their weights."""
        if self.rule is not None and self.n_nodes is not None:
            return quadrature(self.rule, self.n_nodes)
        if self.method == "gradient":
            return [1.0], [1.0]
        points, weights = quadrature("gauss_legendre", END_NODES)
        near_clean = [1 - END + END * point for point in points]
        if self.method == "removal":
            return near_clean, weights
        return [END * point for point in points] + near_clean, [weight / 2 for weight in [*weights, *weights]]

    def __str__(self) -> str:
        path = f" ({self.rule}, {self.n_nodes} nodes)" if self.rule is not None else ""
        cut = f", threshold {self.threshold:g}" if self.threshold else ""
        error = "error node kept" if self.error == "frozen" else "error node moved too"
        return f"{self.method}{path}, {self.baseline or 'default'} baseline, {error}{cut}"


def quadrature(rule: str, n_nodes: int) -> tuple[list[float], list[float]]:
    """Nodes in [0, 1] and weights, which sum to 1, of a rule for the mean over alpha."""
    if rule == "gauss_legendre":
        points, weights = np.polynomial.legendre.leggauss(n_nodes)
        return ((points + 1) / 2).tolist(), (weights / 2).tolist()
    if rule == "midpoint":
        return [(i + 0.5) / n_nodes for i in range(n_nodes)], [1 / n_nodes] * n_nodes
    return [1 - i / n_nodes for i in range(n_nodes)], [1 / n_nodes] * n_nodes


@on_runs
def attribute(
    runs: PromptRuns,
    method: str | Estimator = "removal",
    *,
    baseline: str | None = None,
    positions: bool = False,
    features: Sequence[int] | Int[Tensor, " n"] | None = None,
    n_exact: int = 0,
    n_bootstrap: int = 0,
    seed: int = 0,
) -> Attribution:
    """Indirect effects of every feature on a task, at every snapshot.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place.
        method: "removal" (the default), "both_ends", "ig", "gradient" or "exact", see `crosslens.causal.attribution`;
            an `Estimator` sets rule, nodes, error node and threshold too.
        baseline: "zero", "mean" over the prompts, or "patch", the features of the paired prompt; None is that of the
            `Estimator`.
        positions: keep effects by position from the end of the prompt, as `Attribution.positions`, and those of some
            prompts word by word, for `Attribution.prompt`.
        features: for "exact", ids of the features to ablate; effects of the others are 0, and completeness is NaN.
        n_exact: at every snapshot, ablate this many features with the largest |IE| one by one, for
            `Attribution.agreement`; 0 ablates none.
        n_bootstrap: replicates over groups of prompts, for the intervals of RelIE; 0 keeps none.
        seed: seed for the replicates.

    Raises:
        UserError: an unknown option, feature ids out of range, "patch" with runs that are not paired; a crosscoder of
            other snapshots, or a task without usable (or without paired) prompts.
    """
    estimator = method if isinstance(method, Estimator) else Estimator(method)
    estimator = replace(estimator, baseline=resolve_baseline(baseline or estimator.baseline, runs))
    selected = None if features is None else check_features(features, runs.crosscoder.cfg.d_sae)
    if selected is not None and estimator.method != "exact":
        raise UserError(f"method={estimator.method!r} computes all features at once: features= needs method='exact'")
    if positions and estimator.method == "exact":
        raise UserError("method='exact' ablates a feature at all positions at once: use method='ig' for positions=True")
    if n_exact < 0 or n_exact in (1, 2):
        raise UserError(f"n_exact={n_exact} must be 0, or at least 3 for a correlation; 100 is usual")
    if n_bootstrap < 0:
        raise UserError(f"n_bootstrap={n_bootstrap} must be at least 0; 200 is usual")
    warn_of_few_groups(runs.task.name, runs.n_groups, len(runs))
    draws = _draws(runs.n_groups, n_bootstrap, seed)
    snapshots, task = runs.snapshots, runs.task
    columns = runs.each_snapshot(
        lambda s: _attribute_snapshot(runs, s, estimator, draws, positions, selected, n_exact), desc="Attributing"
    )
    # snapshots last, as everywhere in an Attribution
    words = [column.pop("words") for column in columns]
    stacked = {name: torch.stack([column[name] for column in columns], -1) for name in columns[0]}
    active = runs.active | runs.active_paired if estimator.baseline == "patch" else runs.active
    if selected is not None:
        active = active & torch.zeros(len(active), 1, dtype=torch.bool).index_fill_(0, selected, True)
    for name, elsewhere in (("effects", 0.0), ("standard_errors", 0.0), ("p", 1.0)):
        of_active = stacked[name]
        stacked[name] = torch.full(active.shape, elsewhere, dtype=of_active.dtype).index_copy_(
            0, runs.features, of_active
        )
    kept = {name: stacked.pop(f"bootstrap_{name}") for name in ("effects", "metric")}
    placed = {field: stacked.pop(f"position_{field}") for field in ("effects", "sizes", "error_effects", "error_sizes")}
    return Attribution(
        task=task.name,
        labels=snapshots.labels,
        steps=snapshots.steps,
        estimator=estimator,
        active=active,
        sizes=torch.stack([feature_sizes(runs, s) for s in range(len(snapshots))], -1),
        n_prompts=len(runs),
        n_groups=runs.n_groups,
        bootstrap=Bootstrap(runs.features, **kept) if n_bootstrap else None,
        positions=Positions(snapshots.labels, runs.features, **placed) if positions else None,
        prompts=_words_of_prompts(runs, words) if positions else None,
        items=_shown_items(runs) if positions else {},
        **stacked,
    )


def feature_sizes(runs: PromptRuns, snapshot: int) -> Float[Tensor, " F"]:
    """Size of every feature: mean of `f_is` over the prompts' positions, times the decoder norm."""
    return runs.mean_features(snapshot).cpu() * runs.crosscoder.decoder_norms[:, snapshot].detach().cpu()


@dataclass(frozen=True, repr=False)
class Attribution:
    """Effects of features on a task, per snapshot.

    Attributes:
        task: name of the task.
        labels: S snapshot labels.
        steps: S training steps, None where not recorded.
        estimator: how effects were estimated.
        effects: (F, S) mean IE over prompts, in logits.
        standard_errors: (F, S) of these means, over groups of prompts; NaN with a single group.
        p: (F, S) p-value of each effect against 0, see `stats.sign_flip_p`; not adjusted.
        error_effect: (S,) effect of the error node, in logits.
        metric_clean: (S,) mean metric of the clean models.
        metric_baseline: (S,) mean metric at the baseline.
        completeness: (S,) mean |sum of effects - (clean - baseline)| over prompts, relative to mean |clean - baseline|.
            For "ig" the error of the quadrature; for other methods a measure of the model's nonlinearity.
        agreement: (S,) Spearman correlation of the largest effects with exact ones; NaN where not measured.
        active: (F, S) whether the feature is active on any prompt (for "patch", or on any paired prompt).
        sizes: (F, S) mean activation times decoder norm on the prompts.
        n_prompts: prompts averaged over.
        n_groups: groups of prompts, the units of standard errors, p-values and replicates.
        bootstrap: replicates over groups of prompts, if requested.
        positions: effects by position, if requested.
        prompts: with them, the effects in some prompts: columns prompt, snapshot, position (from the start of the
            prompt), token, feature (-1 where none has an effect), effect; see `prompt`.
        items: the items of these prompts, by prompt.
    """

    task: str
    labels: list[str]
    steps: list[int | None]
    estimator: Estimator
    effects: Float[Tensor, "F S"]
    standard_errors: Float[Tensor, "F S"]
    p: Float[Tensor, "F S"]
    error_effect: Float[Tensor, " S"]
    metric_clean: Float[Tensor, " S"]
    metric_baseline: Float[Tensor, " S"]
    completeness: Float[Tensor, " S"]
    agreement: Float[Tensor, " S"]
    active: Bool[Tensor, "F S"]
    sizes: Float[Tensor, "F S"]
    n_prompts: int
    n_groups: int
    bootstrap: Bootstrap | None = None
    positions: Positions | None = None
    prompts: pd.DataFrame | None = None
    items: dict[int, Item] = field(default_factory=dict)

    def __repr__(self) -> str:
        return as_text(*self._summary())

    def _repr_html_(self) -> str:
        return as_html(*self._summary())

    def _summary(self) -> tuple[str, pd.DataFrame, str]:
        """What is printed: the metric and the largest effects at every snapshot."""
        sure, rows = significant(self), list[dict[str, Any]]()
        for s, label in enumerate(self.labels):
            n = int(self.active[:, s].sum())
            top = self.top(min(3, n), s, by="magnitude").tolist() if n else []
            rows.append(
                {
                    "snapshot": label,
                    "metric": float(self.metric_clean[s]),
                    "active": n,
                    "significant": int(sure[:, s].sum()),
                    "largest effects": ", ".join(
                        f"feature {i} {float(self.effects[i, s]):+.3f}{'*' * bool(sure[i, s])}" for i in top
                    ),
                }
            )
        n = int(self.active.any(-1).sum())
        title = (
            f"{self.task}: effects of {n:,} active features of {len(self.effects):,}, by {self.estimator}; "
            f"{self.n_prompts:,} prompts in {self.n_groups:,} groups"
        )
        note = (
            "metric and effects in logits; * significant (false discovery rate 5%). A feature's activation is read "
            "from all snapshots: which effects are mostly read from later ones, evolution.encoder_share says, in "
            "to_frame(decoder_norms, encoder_share)"
        )
        return title, pd.DataFrame(rows), note

    def plot(self, figure: str = "ie") -> Any:
        """A figure of the report, in a notebook.

        Args:
            figure: "ie" (effects of the largest features), "relie", "share-relie", "ie-relie", "ie-table", or with
                `positions=True` "words".

        Raises:
            UserError: no such figure.
        """
        norms = torch.full(self.effects.shape, math.nan)
        tables = {
            f"attribution/{self.task}": self.to_frame(norms),
            f"attribution/{self.task}.snapshots": self.snapshot_frame(),
        }
        if self.prompts is not None:
            tables[f"prompts/{self.task}"] = self.prompt_frame()
        return plot(tables, figure, self.task)

    def prompt(self, prompt: int) -> pd.DataFrame:
        """Effects in one prompt, a row per snapshot, position and feature.

        Args:
            prompt: index of a prompt, one of `Attribution.prompts["prompt"]`.

        Returns:
            snapshot, label, position (from the start of the prompt), token, feature, effect (logits). The effects of a
            feature add up to its effect on this prompt.

        Raises:
            UserError: effects were computed without `positions=True`, or this prompt is not kept.
        """
        every = self._kept_prompts()
        kept = every["prompt"].unique().tolist()
        if prompt not in kept:
            raise UserError(f"prompt {prompt} is not kept; these are: {', '.join(map(str, kept))}")
        table = every[(every["prompt"] == prompt) & (every["feature"] >= 0)]
        table = table.drop(columns="prompt").reset_index(drop=True)
        table.insert(1, "label", [self.labels[s] for s in table["snapshot"]])
        return table

    def prompt_frame(self) -> pd.DataFrame:
        """The words of the kept prompts: a row per prompt, snapshot and position.

        Returns:
            prompt, snapshot, label, step, position, token, effect (of all active features there, in logits), feature
            (the one with the largest effect there, -1 where none has one), feature_effect (logits); of the prompt's
            item: prefix, correct, wrong, paired (the paired prefix, if it has one).

        Raises:
            UserError: effects were computed without `positions=True`.
        """
        every = self._kept_prompts()
        # features that a ranking leaves out are no features of a word
        known = self.active.any(-1).numpy()
        table = every.assign(effect=every["effect"].where(known[every["feature"].clip(lower=0)], 0.0))
        table["feature"] = table["feature"].where(table["effect"] != 0, -1)
        keys = ["prompt", "snapshot", "position"]
        table["size"] = table["effect"].abs()
        largest = table.sort_values([*keys, "size"], kind="stable").groupby(keys, sort=True).tail(1)
        total = table.groupby(keys, sort=True)["effect"].sum().reset_index(drop=True)
        largest = largest.rename(columns={"effect": "feature_effect"}).reset_index(drop=True).assign(effect=total)
        largest["label"] = [self.labels[s] for s in largest["snapshot"]]
        largest["step"] = [self.steps[s] for s in largest["snapshot"]]
        items = [self.items[prompt] for prompt in largest["prompt"]]
        for name in ("prefix", "correct", "wrong"):
            largest[name] = [getattr(item, name) for item in items]
        largest["paired"] = [item.patch_prefix for item in items]
        columns = [*keys[:2], "label", "step", "position", "token", "effect", "feature", "feature_effect"]
        return pd.DataFrame(largest[[*columns, "prefix", "correct", "wrong", "paired"]])

    def _kept_prompts(self) -> Any:
        if self.prompts is None:
            raise UserError("no prompts are kept: compute the effects with positions=True")
        return self.prompts

    def top(self, k: int, snapshot: int, by: str = "signed") -> Int[Tensor, " k"]:
        """The k active features with the largest effect at a snapshot.

        Args:
            k: how many.
            snapshot: index of the snapshot; -1 is the last.
            by: "signed" for the most helpful, "negative" for the most harmful, "magnitude" for the largest |IE|.

        Raises:
            UserError: k exceeds the number of active features, no such snapshot, or an unknown `by`.
        """
        if by not in ("signed", "negative", "magnitude"):
            raise UserError(f"by={by!r} is unknown; use 'signed', 'negative' or 'magnitude'")
        snapshot = find_snapshot(self.labels, snapshot)
        active = int(self.active[:, snapshot].sum())
        if not 1 <= k <= active:
            raise UserError(f"k={k} is not in [1, {active}], the features active on {self.task!r} at this snapshot")
        effects = self.effects[:, snapshot]
        ranking = {"signed": effects, "negative": -effects, "magnitude": effects.abs()}[by]
        return ranking.masked_fill(~self.active[:, snapshot], -math.inf).topk(k).indices

    def among(self, features: Sequence[int]) -> Attribution:
        """The same with all other features marked inactive, so that rankings and tables leave them out.

        Effects, completeness and error node stay as measured.

        Args:
            features: the features to keep, such as those that most seeds have.
        """
        kept = torch.zeros(len(self.active), 1, dtype=torch.bool)
        kept[list(features)] = True
        return replace(self, active=self.active & kept.to(self.active.device))

    def to_frame(
        self, decoder_norms: Float[Tensor, "F S"], encoder_share: Float[Tensor, "F S"] | None = None
    ) -> pd.DataFrame:
        """Long table of the active features: a row per feature and snapshot.

        An effect at an early snapshot may belong to a feature that is active because of what later snapshots hold: all
        snapshots share one activation. The encoder share says where it is read from.

        Args:
            decoder_norms: the crosscoder's, for RelDec.
            encoder_share: as from `evolution.encoder_share`.

        Returns:
            feature, snapshot, label, step, ie and ie_se (standard error over groups of prompts) and their 95 % interval
            ie_low and ie_high, all in logits, p, q (adjusted p-value), significant, share_relie, relie, reldec, active,
            size (mean activation times decoder norm); with bootstrap replicates also the 95 % intervals
            share_relie_low, share_relie_high, relie_low and relie_high (signed, see `relie_interval`); with encoder
            shares encoder_share, read_later (the sum over later snapshots) and mostly_later (whether that is above .5).
        """
        features = self.active.any(-1).nonzero().flatten()
        S = len(self.labels)
        columns: dict[str, Tensor] = {
            "ie": self.effects,
            "ie_se": self.standard_errors,
            "p": self.p,
            "q": q_values(self),
            "significant": significant(self),
            "share_relie": share_relie(self),
            "relie": relie(self),
            "reldec": reldec(decoder_norms),
            "active": self.active,
            "size": self.sizes,
        }
        columns["ie_low"], columns["ie_high"] = effect_interval(self)
        if self.bootstrap is not None:
            columns["share_relie_low"], columns["share_relie_high"] = relie_interval(self, share=True)
            columns["relie_low"], columns["relie_high"] = relie_interval(self)
        if encoder_share is not None:
            share = encoder_share.double().cpu()
            later = share.sum(-1, keepdim=True) - share.cumsum(-1)
            columns |= {"encoder_share": share, "read_later": later, "mostly_later": later > 0.5}
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
        """One row per snapshot: the metric, completeness, and how effects were estimated.

        Returns:
            snapshot, label, step; metric_clean, metric_baseline, features_effect (sum of effects) and error_effect, in
            logits; completeness_error, agreement, n_active (features), n (prompts), n_groups (of prompts), method,
            rule, n_nodes, baseline, error, threshold (in logits).
        """
        how = self.estimator
        return pd.DataFrame(
            {
                "snapshot": range(len(self.labels)),
                "label": self.labels,
                "step": self.steps,
                "metric_clean": self.metric_clean.numpy(),
                "metric_baseline": self.metric_baseline.numpy(),
                "features_effect": self.effects.sum(0).numpy(),
                "error_effect": self.error_effect.numpy(),
                "completeness_error": self.completeness.numpy(),
                "agreement": self.agreement.numpy(),
                "n_active": self.active.sum(0).numpy(),
                "n": self.n_prompts,
                "n_groups": self.n_groups,
                "method": how.method,
                "rule": how.rule,
                "n_nodes": how.n_nodes,
                "baseline": how.baseline,
                "error": how.error,
                "threshold": how.threshold,
            }
        )

    @classmethod
    def from_frames(cls, task: str, frame: pd.DataFrame, snapshots: pd.DataFrame, d_sae: int) -> Attribution:
        """Rebuild an attribution from `to_frame` and `snapshot_frame`; replicates and positions are not kept.

        Args:
            task: name of the task.
            frame: from `to_frame`.
            snapshots: from `snapshot_frame`.
            d_sae: F, the number of features.

        Raises:
            UserError: the table lacks a column that says how effects were estimated.
        """
        missing = [name for name in (*_ESTIMATOR, "agreement", "n_groups") if name not in snapshots]
        missing += [name for name in ("size", "p") if name not in frame]
        if missing:
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
                n_nodes=None if pd.isna(first["n_nodes"]) else int(first["n_nodes"]),
                baseline=str(first["baseline"]),
                error=str(first["error"]),
                threshold=float(first["threshold"]),
            ),
            effects=column("ie"),
            standard_errors=column("ie_se"),
            p=column("p"),
            error_effect=per_snapshot("error_effect"),
            metric_clean=per_snapshot("metric_clean"),
            metric_baseline=per_snapshot("metric_baseline"),
            completeness=per_snapshot("completeness_error"),
            agreement=per_snapshot("agreement"),
            active=column("active"),
            sizes=column("size"),
            n_prompts=int(first["n"]),
            n_groups=int(first["n_groups"]),
        )


@dataclass(frozen=True)
class Bootstrap:
    """Effects on groups of prompts resampled with replacement, the same groups at all snapshots.

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
    """Effects by position, counted from the end of the prompt: 0 is the last position, 1 the one before it.

    At position 0 a feature can act without attention between positions; effects elsewhere need attention to move them
    to the last position. With only the unembedding above the hook, all effects are at position 0, and are direct logit
    attribution.

    Attributes:
        labels: S snapshot labels.
        features: (A,) ids.
        effects: (O, A, S) mean over prompts of the effect at each position; they add up to the feature's effect.
        sizes: (O, A, S) mean over prompts of the absolute effect.
        error_effects: (O, S) the same for the error node.
        error_sizes: (O, S) its mean absolute effect.
    """

    labels: list[str]
    features: Int[Tensor, " A"]
    effects: Float[Tensor, "O A S"]
    sizes: Float[Tensor, "O A S"]
    error_effects: Float[Tensor, "O S"]
    error_sizes: Float[Tensor, "O S"]

    def shares(self) -> pd.DataFrame:
        """Share of the absolute effect by position: a row per snapshot and position.

        Columns: snapshot, label, position, share (of the absolute effect, summed over features and prompts; 1 per
        snapshot), error_share (the same for the error node).
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
        """Where each feature acts: a row per feature and snapshot with an effect.

        Columns: feature, snapshot, label, position (of the largest absolute effect), share (of the absolute effect
        there), last_share (of the absolute effect at the last position).
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
        """All nonzero effects, in logits: position, feature, snapshot, ie, size."""
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


def resolve_baseline(baseline: str | None, runs: PromptRuns, ie: Attribution | None = None) -> str:
    """What features are set to: as given, as in the effects, or "patch" where prompts are paired and "zero" elsewhere.

    Raises:
        UserError: an unknown baseline, or "patch" with runs that lack the paired prompts.
    """
    if baseline is None and ie is not None:
        baseline = ie.estimator.baseline
    if baseline is None:
        return "patch" if runs.paired else "zero"
    if baseline not in BASELINES:
        raise UserError(f"baseline={baseline!r} is unknown; use one of {BASELINES}{did_you_mean(baseline, BASELINES)}")
    if baseline == "patch" and not runs.paired:
        raise UserError("baseline='patch' needs the paired prompts: make the runs with PromptRuns(..., paired=True)")
    return baseline


@torch.no_grad()
def _attribute_snapshot(
    runs: PromptRuns,
    s: int,
    estimator: Estimator,
    draws: Int[Tensor, "R G"],
    positions: bool,
    selected: Int[Tensor, " n"] | None,
    n_exact: int,
) -> dict[str, Tensor]:
    sums = _Sums(runs, draws, positions)
    mean = runs.mean(s).to(runs.crosscoder.device) if estimator.baseline == "mean" else None
    wanted = (
        torch.ones(len(runs.features), dtype=torch.bool) if selected is None else torch.isin(runs.features, selected)
    )
    for part in runs.at(s):
        start = baseline_activation(part, estimator, mean)
        clean, baseline = metrics(part, part.clean, start).double().cpu().chunk(2)
        if estimator.method == "exact":
            effects = single_effects(part, estimator.start, mean, wanted)
            error = _error_effect(part, start, clean, estimator, mean)
        else:
            effects, error = _integrated(part, start, estimator, mean, sums)
        sums.add_prompts(part.first, effects, error, clean, baseline)
    found = sums.result(len(runs), complete=selected is None)
    return {**found, "agreement": torch.tensor(_agreement(runs, s, estimator, found["effects"], n_exact))}


def _agreement(runs: PromptRuns, s: int, estimator: Estimator, effects: Float[Tensor, " A"], n: int) -> float:
    """Spearman correlation of the n largest effects with exact ones of the same kind."""
    top = effects.abs().topk(min(n, int((effects != 0).sum()))).indices
    if len(top) < 3:
        return math.nan
    if estimator.method == "exact":
        return math.nan
    ends = ("clean", "baseline") if estimator.method in ("both_ends", "ig") else ("clean",)
    exact = torch.stack([exact_effects(runs, s, runs.features[top], estimator.baseline, end) for end in ends]).mean(0)
    return float(rank_correlation(effects[top].numpy(), exact.numpy()))


@on_runs
@torch.no_grad()
def exact_effects(
    runs: PromptRuns, snapshot: int, features: Int[Tensor, " n"], baseline: str | None = None, end: str = "clean"
) -> Float[Tensor, " n"]:
    """Exact effect of each feature on the metric, in logits, mean over prompts.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place.
        snapshot: index of the snapshot.
        features: ids of the features.
        baseline: "zero", "mean" or "patch"; use that of the attribution it is compared with. None as in `Estimator`.
        end: "clean" is the drop when the feature alone is set to its baseline in the clean run; "baseline" the gain
            when it alone is set to its clean value where all features, and the error node, are at their baseline.

    Raises:
        UserError: no such snapshot, feature or end, a feature twice, "patch" without paired prompts.
    """
    s = find_snapshot(runs.snapshots.labels, snapshot)
    baseline = resolve_baseline(baseline, runs)
    if end not in ENDS:
        raise UserError(f"end={end!r} is unknown; use one of {ENDS}{did_you_mean(end, ENDS)}")
    ids = check_features(features, runs.crosscoder.cfg.d_sae)
    mean = runs.mean(s).to(runs.crosscoder.device) if baseline == "mean" else None
    total = torch.zeros(len(runs.features), dtype=torch.float64)

    def add_up(some: Tensor) -> Tensor:
        wanted = torch.isin(runs.features, some)
        return sum((single_effects(part, baseline, mean, wanted, end).sum(0) for part in runs.at(s)), total)

    found = torch.zeros(runs.crosscoder.cfg.d_sae, dtype=torch.float64)
    found[runs.features] = sum(each(add_up, shares(ids)), total) / len(runs)
    return found[ids]


class _Sums:
    """Sums over the prompts of one snapshot, in float64 on the CPU; those of effects by group of prompts."""

    def __init__(self, runs: PromptRuns, draws: Int[Tensor, "R G"], positions: bool) -> None:
        A, self.groups = len(runs.features), runs.groups
        G = draws.shape[1]
        length = max(batch.tokens.shape[1] for batch in runs.batches) if positions else 0
        self.positions, self.draws = positions, draws.double()
        self.sizes = self.groups.bincount(minlength=G).double()
        self.effects, self.metric = (torch.zeros(G, n, dtype=torch.float64) for n in (A, 1))
        self.position_effects, self.position_sizes = (torch.zeros(length, A, dtype=torch.float64) for _ in range(2))
        self.error_effects, self.error_sizes = (torch.zeros(length, dtype=torch.float64) for _ in range(2))
        # error node, clean metric, baseline metric, |residual|, |change|
        self.scalars = torch.zeros(5, dtype=torch.float64)
        self.shown = _shown(runs) if positions else torch.zeros(0)
        self.words: list[Tensor] = []

    def add_prompts(self, first: int, effects: Tensor, error: Tensor, clean: Tensor, baseline: Tensor) -> None:
        """Add effects (B, A), error node, clean and baseline metric (B,) of a batch that starts at prompt `first`."""
        groups = self.groups[first : first + len(effects)]
        self.effects.index_add_(0, groups, effects)
        self.metric.index_add_(0, groups, clean[:, None])
        change = clean - baseline
        residual = effects.sum(-1) + error - change
        self.scalars += torch.stack([error, clean, baseline, residual.abs(), change.abs()]).sum(-1)

    def add_pairs(self, pairs: Pairs, values: Tensor, length: int, first: int) -> None:
        """Add effects of (token, feature) pairs of a batch by position; all its prompts have the same length."""
        prompts = first + pairs.tokens // length
        shown = torch.isin(prompts, self.shown)
        columns = prompts, pairs.tokens % length, pairs.features, values
        self.words.append(torch.stack([column[shown].double() for column in columns], 1))
        A = self.effects.shape[1]
        place = (length - 1 - pairs.tokens % length) * A + pairs.features
        self.position_effects.view(-1).index_add_(0, place, values)
        self.position_sizes.view(-1).index_add_(0, place, values.abs())

    def add_errors(self, errors: Float[Tensor, "B T"]) -> None:
        """Add effects of the error node by position."""
        length = errors.shape[1]
        self.error_effects[:length] += errors.sum(0).flip(0)
        self.error_sizes[:length] += errors.abs().sum(0).flip(0)

    def result(self, n: int, complete: bool) -> dict[str, Tensor]:
        """Fields of an Attribution, for one snapshot and n prompts."""
        error, clean, baseline, residual, change = (self.scalars / n).unbind()
        total, drawn = self.effects.sum(0), (self.draws @ self.sizes)[:, None]
        p = sign_flip_p(total.numpy(), self.effects.square().sum(0).numpy())
        return {
            "effects": total / n,
            "standard_errors": clustered_error(self.effects, self.sizes),
            "p": torch.from_numpy(p),
            "error_effect": error,
            "metric_clean": clean,
            "metric_baseline": baseline,
            "completeness": residual / change if complete else torch.full_like(change, math.nan),
            "bootstrap_effects": (self.draws @ self.effects / drawn).float(),
            "bootstrap_metric": (self.draws @ self.metric / drawn)[:, 0],
            "position_effects": self.position_effects / n,
            "position_sizes": self.position_sizes / n,
            "position_error_effects": self.error_effects / n,
            "position_error_sizes": self.error_sizes / n,
            "words": torch.cat([*self.words, torch.zeros(0, 4, dtype=torch.float64)]),
        }


def clustered_error(sums: Float[Tensor, "G ..."], sizes: Float[Tensor, " G"]) -> Float[Tensor, " ..."]:
    """Standard error of a mean over prompts, from its sums over groups of them; NaN with a single group.

    sqrt(G / (G - 1) sum_g (X_g - n_g mean)^2) / N, for sums X_g and sizes n_g (Liang and Zeger 1986, Biometrika 73,
    13); with one prompt per group the usual one.

    Args:
        sums: of every group.
        sizes: number of prompts of every group.
    """
    G, mean = len(sums), sums.sum(0) / sizes.sum()
    if G < 2:
        return torch.full_like(mean, math.nan)
    spread = (sums - sizes.view(-1, *[1] * mean.ndim) * mean).square().sum(0)
    return (G / (G - 1) * spread).sqrt() / sizes.sum()


def _shown(runs: PromptRuns) -> Int[Tensor, " n"]:
    """The prompts whose words are kept."""
    return torch.linspace(0, len(runs) - 1, min(PROMPTS, len(runs))).round().long()


def _shown_items(runs: PromptRuns) -> dict[int, Item]:
    """`Attribution.items`."""
    order = torch.cat([batch.index for batch in runs.batches])
    return {i: runs.task.items[int(order[i])] for i in _shown(runs).tolist()}


def _words_of_prompts(runs: PromptRuns, words: list[Float[Tensor, "_ 4"]]) -> pd.DataFrame:
    """`Attribution.prompts`, from rows of prompt, position, column of `runs.features` and effect at every snapshot."""
    prompts = [tokens for batch in runs.batches for tokens in batch.tokens]
    every = [(int(i), t) for i in _shown(runs) for t in range(len(prompts[i]))]
    texts = runs.snapshots.tokenizer.batch_decode([[int(prompts[i][t])] for i, t in every])
    tokens: Any = pd.DataFrame(every, columns=["prompt", "position"]).assign(token=texts)
    tables: list[Any] = []
    for s, rows in enumerate(words):
        prompt, position, column = rows[:, :3].long().T.numpy()
        features = runs.features.numpy()[column]
        effects = {"prompt": prompt, "position": position, "feature": features, "effect": rows[:, 3].numpy()}
        # an edit's change may come in two parts: where the feature is clean, and where it is in the paired prompt
        table: Any = pd.DataFrame(effects)
        summed = table.groupby(["prompt", "position", "feature"], as_index=False)["effect"].sum()
        table = tokens.merge(summed[summed["effect"] != 0], how="left", on=["prompt", "position"])
        tables.append(table.fillna({"feature": -1, "effect": 0.0}).assign(snapshot=s))
    found: Any = pd.concat(tables, ignore_index=True).astype({"feature": "int64"})
    return found[["prompt", "snapshot", "position", "token", "feature", "effect"]]


def check_statistics(task: str, n_prompts: int) -> None:
    """Refuse a half of a task that is a single prompt.

    Raises:
        UserError: one prompt, whose effects have no standard errors.
    """
    if n_prompts < 2:
        raise UserError(
            f"one prompt of task {task!r} is usable in this half, and effects on one prompt have no standard errors: "
            "give more items, 40 or more; `crosslens trace` follows single prompts"
        )


def warn_of_few_groups(task: str, n_groups: int, n_prompts: int) -> None:
    """Warn where there are too few groups of prompts for what is said of effects to be general."""
    if n_groups < MIN_GROUPS:
        few = "few effects" if n_groups >= SIGNIFICANT_GROUPS else "no effect, whatever its size,"
        warnings.warn(
            f"the {n_prompts} prompts of {task!r} are of {n_groups} groups, such as head nouns, fewer than "
            f"{MIN_GROUPS}: {few} can be significant, and intervals are wide; give prompts of more groups, or "
            "another column `group` if the prompts of a group are independent",
            stacklevel=3,
        )


def _draws(n: int, replicates: int, seed: int) -> Int[Tensor, "R G"]:
    """How often each group is drawn in each replicate; the same at all snapshots."""
    return torch.from_numpy(resample_counts(n, replicates, seed).astype(np.int16))


def baseline_activation(part: BatchAt, estimator: Estimator, mean: Tensor | None) -> Float[Tensor, "B T D"]:
    """x(0): the activation at the hook with features, and the error node unless frozen, at their baseline."""
    if estimator.error == "frozen":
        start = part.clean - sum(part.moved(pairs) for pairs in part.changes(estimator.start, mean))
    elif estimator.baseline == "patch":
        assert part.patch is not None
        start = part.patch
    else:
        start = part.bias if mean is None else part.bias + mean @ part.directions
    return torch.where(part.keep[..., None], start, part.clean)


def metrics(part: BatchAt, *activations: Float[Tensor, "B T D"]) -> Float[Tensor, " nB"]:
    """Metric of every prompt for each of n activations at the hook, in as few passes as possible."""
    B, T = part.keep.shape
    rows = torch.arange(B, device=part.clean.device)
    # an activation that does not depend on the prompt (but for rounding at the BOS) needs only one row
    sizes = [1 if part.upper.upper.at_output and _all_alike(x) else B for x in activations]
    x, prompts = (
        torch.cat([each[:n] for each, n in zip(all_rows, sizes, strict=True)])
        for all_rows in (activations, [rows] * len(sizes))
    )
    chunks = torch.arange(len(x), device=x.device).split(max(1, BATCH_TOKENS // T))
    logits = torch.cat([part.upper.logits(x[chunk], prompts[chunk]) for chunk in chunks])
    found = [logit_difference(each.expand(B, -1), part.prompts, part.upper.wanted) for each in logits.split(sizes)]
    return torch.cat(found)


def _all_alike(x: Float[Tensor, "B T D"]) -> bool:
    return torch.allclose(x, x[:1], rtol=0, atol=1e-6 * float(x.abs().max()))


def mean_gradient(
    part: BatchAt, start: Float[Tensor, "B T D"], nodes: Sequence[float], weights: Sequence[float]
) -> Float[Tensor, "B T D"]:
    """Weighted mean of the metric's gradient at the nodes of the path from `start` to the clean activation.

    Several nodes and prompts share a pass through the model, up to `BATCH_TOKENS` tokens.
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
    # the error node is what changes along the path minus the features' part
    errors = ((part.clean - start) * gradient).sum(-1).double().cpu()
    for pairs in part.changes(estimator.start, mean):
        values = part.along(pairs, gradient).double().cpu()
        pairs = pairs.to("cpu")
        errors.view(-1).index_add_(0, pairs.tokens, values, alpha=-1)
        if estimator.threshold:
            values = torch.where(values.abs() > estimator.threshold, values, 0.0)
        effects.index_add_(0, pairs.tokens // T * A + pairs.features, values)
        if sums.positions:
            sums.add_pairs(pairs, values, T, part.first)
    if estimator.error == "frozen":
        errors.zero_()  # only rounding is left
    if sums.positions:
        sums.add_errors(errors)
    return effects.view(B, A), errors.sum(-1)


def single_effects(
    part: BatchAt, baseline: str, mean: Tensor | None, wanted: Bool[Tensor, " A"], end: str = "clean"
) -> Float[Tensor, "B A"]:
    """Change of the metric when one feature is set to its baseline, or its clean value, at all positions.

    Args:
        part: a batch at a snapshot.
        baseline: "zero", "mean" or "patch".
        mean: mean of each feature, for "mean".
        wanted: features to edit; effects of the others are 0.
        end: as in `exact_effects`.
    """
    B, T = part.keep.shape
    A, device = len(part.directions), part.clean.device
    effects = torch.zeros(B * A, dtype=torch.float64)
    sign = -1 if end == "clean" else 1
    origin = part.clean if end == "clean" else baseline_activation(part, Estimator(baseline=baseline), mean)
    unedited = metrics(part, origin).double().cpu()
    for pairs in part.changes(baseline, mean):
        ours = wanted.to(device)[pairs.features]
        tokens, features, values = pairs.tokens[ours], pairs.features[ours], pairs.values[ours]
        # every (prompt, feature) is one version of the prompt; its pairs are adjacent
        version, order = (tokens // T * A + features).sort(stable=True)
        versions, which = version.unique_consecutive(return_inverse=True)
        shift = values[order, None] * part.directions[features[order]]
        position = tokens[order] % T
        for first in range(0, len(versions), max(1, BATCH_TOKENS // T)):
            block = versions[first : first + max(1, BATCH_TOKENS // T)]
            inside = slice(
                *torch.searchsorted(which, torch.tensor([first, first + len(block)], device=device)).tolist()
            )
            x = origin[block // A]
            x.flatten(0, 1).index_add_(0, (which[inside] - first) * T + position[inside], shift[inside], alpha=sign)
            edited = part.metric(x, block // A).double().cpu()
            effects[block.cpu()] = sign * (edited - unedited[(block // A).cpu()])
    return effects.view(B, A)


def _error_effect(
    part: BatchAt, start: Tensor, clean: Tensor, estimator: Estimator, mean: Tensor | None
) -> Float[Tensor, " B"]:
    """Drop of the metric when the error node alone is set to its baseline."""
    if estimator.error == "frozen":
        return torch.zeros(len(clean), dtype=torch.float64)
    without = start + sum(part.moved(pairs) for pairs in part.changes(estimator.start, mean))
    return clean - metrics(part, without).double().cpu()
