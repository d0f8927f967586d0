"""All causal analyses of one task in one call.

1. Split the prompts in two: a selection split and a held-out split that share no prefix.
2. On the selection split, estimate effects (`attribute`), ablate those with the largest effects one by one to see how
   far the estimates agree with exact effects, follow the top features over snapshots (`follow_features`), and compare
   languages (`compare_languages`).
3. On the held-out split, test the features that step 2 ranks highest: `ablate` (exchanged and zeroed),
   `transfer_matrix`, `pair_additivity`, `read_out`.
   Ablate every significant feature at every snapshot, to see which measure predicts when it acts (`validate`).
4. On all prompts, whose features are not chosen by anything, date when the concept is readable (`concept_births`). The
   dates of the top features by all of these readings stand side by side (`feature_dates`).

The clean runs of each split are made once, when an analysis first needs them, and shared. Every analysis leaves tables,
and those that are there already are not made again: a study continues where it was interrupted, and builds on the
effects and ablations that were computed by themselves. The splits and `Study.rank_agreement` are new here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from crosslens.causal.ablation import CONTROLS, Controls, ablate
from crosslens.causal.additivity import pair_additivity
from crosslens.causal.attribution import Attribution, attribute, check_statistics, exact_effects
from crosslens.causal.dates import feature_dates
from crosslens.causal.languages import compare_languages, split_languages
from crosslens.causal.read_out import read_by_last, read_out
from crosslens.causal.relative import significant
from crosslens.causal.timeline import follow_features
from crosslens.causal.transfer import transfer_matrix
from crosslens.causal.validation import validate
from crosslens.config import StudySizes
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.concepts import concept_births
from crosslens.intervention.prompt_runs import PromptRuns, needs_pairs
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.stats import rank_correlation
from crosslens.tasks.task import Task

METHODS = ("removal", "ig", "gradient")
"""Estimators that a study compares with exact effects; the first ranks the features in all tables."""

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Study:
    """Results of one task.

    Attributes:
        task: name of the task.
        ie: effects on the selection split by removal, which rank the features in all tables.
        tables: by their names in a run directory (`crosslens.tables`): attribution/<task>,
            attribution/<task>.snapshots, prompts/<task>, completeness/<task> (the snapshots of "ig", whose effects add
            up), exact/<task>, ablation/<task>, zeroing/<task> if it exchanges features with the paired prompt,
            transfer/<task>, additivity/<task>, additivity/<task>.snapshots,
            timeline/<task>; validation/<task> and validation/<task>.summary if an effect is significant;
            languages/<task> if the items are of several languages; and with paired prompts read_out/<task>,
            read_out/<task>.last, dates/<task> and, from eight groups of prompts, concepts/<task> and
            concepts/<task>.curves.
    """

    task: str
    ie: Attribution
    tables: Tables = field(repr=False)

    @property
    def exact(self) -> pd.DataFrame:
        """The features with the largest |IE| by removal at the last snapshot, one by one, in logits.

        Returns:
            A row per feature: feature; removal, ig and gradient (the estimates); removed (drop of the metric when the
            feature alone is set to its baseline) and added (gain when it alone is set to its clean value in the
            baseline run); baseline (what that is).
        """
        return self.tables[f"exact/{self.task}"]

    def rank_agreement(self, method: str = "removal", end: str = "removed") -> float:
        """Spearman correlation of a method with exact effects of single features, at the last snapshot.

        Args:
            method: "removal", "ig" or "gradient".
            end: "removed" (from the clean run), "added" (to the baseline), or "both", the mean of the two.

        Raises:
            UserError: an unknown method or end.
        """
        if method not in METHODS:
            raise UserError(f"method={method!r} must be one of {METHODS}")
        if end not in ("removed", "added", "both"):
            raise UserError(f"end={end!r} must be 'removed', 'added' or 'both'")
        ends = ["removed", "added"] if end == "both" else [end]
        return float(rank_correlation(self.exact[method].to_numpy(), self.exact[ends].mean(axis=1).to_numpy()))


def study(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    *,
    baseline: str | None = None,
    decodability: Float[Tensor, "F S"] | None = None,
    encoder_share: Float[Tensor, "F S"] | None = None,
    births: pd.DataFrame | None = None,
    sizes: StudySizes | None = None,
    seed: int = 0,
    settings: ModelSettings | None = None,
    accuracy: pd.DataFrame | None = None,
    known: Mapping[str, pd.DataFrame] | None = None,
    save: Callable[[Tables], object] | None = None,
) -> Study:
    """Attribute a task on one half of its prompts, and test the top features by intervention on the other half.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: minimal pairs; with the baseline "patch", only items with a paired prompt are used.
        baseline: what features are set to, and the baseline of their effects: "patch", "zero" or "mean"; None is
            "patch" if half of the prompts or more have a paired prompt, and otherwise "zero".
        decodability: of every feature at every snapshot, as from `evolution.measure_decodability(...).r2`, to be
            validated beside the effects.
        encoder_share: as from `evolution.encoder_share`, to mark effects of features that later snapshots activate.
        births: lifecycles by R2, as from `Evolution.lifecycles("r2")`, to stand beside the other dates of features.
        sizes: numbers of features and draws; those of `StudySizes()` if None.
        seed: seed for the split and every draw.
        settings: how the models run; None runs them on the crosscoder's device.
        accuracy: the result of `Task.accuracy`, to stand there, too.
        known: tables of the same task, split and baseline that are there already, by name; they are not made again.
        save: called with the tables of every analysis as soon as it ends.

    Raises:
        UserError: a single snapshot, a task that cannot be split or has no usable items, "patch" without paired
            prompts, fewer than three features active at a snapshot, known effects by another method than removal.
    """
    sizes = sizes or StudySizes()
    work = _Work(crosscoder, snapshots, task, baseline, encoder_share, sizes, seed, settings, dict(known or {}), save)
    for half in (work.selection, work.held_out):
        check_statistics(task.name, len(half))
    ie, name, last = work.ie, task.name, len(snapshots) - 1
    most = int(ie.active.sum(0).min())
    if most < 3:
        raise UserError(f"only {most} features are active on {name!r} at some snapshot: at least 3 are needed")
    k = min(sizes.k, most)
    work.make(["completeness/{}", "exact/{}"], lambda: _single_effects(work))
    work.make(["ablation/{}"], lambda: {f"ablation/{name}": _curves(work, k, most)})
    if ie.estimator.baseline == "patch":
        work.make(["zeroing/{}"], lambda: {f"zeroing/{name}": _zeroing(work, k)})
    work.make(["transfer/{}"], lambda: {f"transfer/{name}": transfer_matrix(work.held_out, ie, k, baseline=baseline)})
    work.make(["additivity/{}", "additivity/{}.snapshots"], lambda: _additivity(work, k, last))
    work.make(["timeline/{}"], lambda: {f"timeline/{name}": follow_features(work.selection, ie, min(5, most))})
    if significant(ie).any():
        work.make(["validation/{}", "validation/{}.summary"], lambda: _validation(work, decodability))
    if len(split_languages(task)) > 1:
        work.make(["languages/{}"], lambda: _languages(work, most))
    if work.selection.paired:
        _date(work, births, accuracy)
    return Study(name, ie, work.tables)


def _date(work: _Work, births: pd.DataFrame | None, accuracy: pd.DataFrame | None) -> None:
    """When the concept is readable, when features are read out, and all dates of the top features."""
    name, ie = work.task.name, work.ie
    try:
        work.make(["concepts/{}", "concepts/{}.curves"], lambda: _concepts(work))
    except UserError as error:  # too few groups of prompts, or no feature of the concept: the rest can be done
        warnings.warn(f"{name}: concepts are not dated: {error}", stacklevel=3)
    ids = ie.top(min(work.sizes.n_read_out, int(ie.active[:, -1].sum())), len(ie.labels) - 1, by="magnitude")
    work.make(["read_out/{}"], lambda: {f"read_out/{name}": read_out(work.held_out, ids, seed=work.seed)})
    if work.held_out.n_groups > 1:
        work.make(["read_out/{}.last"], lambda: {f"read_out/{name}.last": read_by_last(work.held_out)})
    # in a moment; births by R2 over text, or accuracies, may have come since
    dates = feature_dates(
        ie, births=births, concepts=work.tables.get(f"concepts/{name}"),
        read=work.tables[f"read_out/{name}"], accuracy=accuracy,
    )  # fmt: skip
    known = work.tables.pop(f"dates/{name}", None)
    if known is not None and known.equals(dates):
        work.tables[f"dates/{name}"] = known
    work.make(["dates/{}"], lambda: {f"dates/{name}": dates})


def _concepts(work: _Work) -> Tables:
    """Of all prompts: no feature is chosen by them."""
    found = concept_births(work.runs(work.task), everywhere=work.sizes.everywhere, seed=work.seed)
    return {f"concepts/{work.task.name}": found.births, f"concepts/{work.task.name}.curves": found.curves}


@dataclass
class _Work:
    """What the analyses of one task share."""

    crosscoder: Crosscoder
    snapshots: Snapshots
    task: Task
    baseline: str | None
    encoder_share: Tensor | None
    sizes: StudySizes
    seed: int
    settings: ModelSettings | None
    tables: Tables
    save: Callable[[Tables], object] | None

    @cached_property
    def halves(self) -> tuple[Task, Task]:
        return self.task.split(self.seed)

    @cached_property
    def selection(self) -> PromptRuns:
        return self._run(self.halves[0], needs_pairs(self.baseline))

    @cached_property
    def held_out(self) -> PromptRuns:
        return self.runs(self.halves[1])

    def runs(self, part: Task) -> PromptRuns:
        """Clean runs of a part of the task, paired as the selection split is."""
        return self._run(part, self.selection.paired)

    def _run(self, part: Task, paired: bool | None) -> PromptRuns:
        return PromptRuns(self.crosscoder, self.snapshots, part, paired=paired, settings=self.settings)

    def make(self, patterns: Sequence[str], analyse: Callable[[], Tables]) -> None:
        """Make the tables of an analysis, unless all are there."""
        if all(pattern.format(self.task.name) in self.tables for pattern in patterns):
            return
        self._keep(analyse())

    def _keep(self, made: Tables) -> None:
        self.tables |= made
        if self.save is not None:
            self.save(made)

    @cached_property
    def ie(self) -> Attribution:
        """Effects by removal: those that are there, or new ones."""
        known = known_effects(self.task.name, self.tables, self.crosscoder)
        if known is None:
            sizes = self.sizes
            found = attribute(
                self.selection, baseline=self.baseline, positions=True, n_exact=sizes.n_exact,
                n_bootstrap=sizes.n_bootstrap,
            )  # fmt: skip
            self._keep(effect_tables(found, self.crosscoder, self.encoder_share))
            return found
        how = known.estimator
        if how.method != METHODS[0] or self.baseline not in (None, how.baseline):
            raise UserError(
                f"the effects on {self.task.name!r} that are there are by {how}, and this study ranks features by "
                f"{METHODS[0]}, baseline {self.baseline or how.baseline}: remove the task's tables first"
            )
        self.baseline = how.baseline
        return known


def known_effects(task: str, tables: Mapping[str, pd.DataFrame], crosscoder: Crosscoder) -> Attribution | None:
    """The effects on a task in the tables of a run; None if there are none. Replicates are not kept."""
    frame, snapshots = tables.get(f"attribution/{task}"), tables.get(f"attribution/{task}.snapshots")
    if frame is None or snapshots is None:
        return None
    return Attribution.from_frames(task, frame, snapshots, crosscoder.cfg.d_sae)


def effect_tables(ie: Attribution, crosscoder: Crosscoder, encoder_share: Float[Tensor, "F S"] | None = None) -> Tables:
    """Tables of effects on the selection split, by their names in a run directory.

    They are saved in this order. That of the effects is the last: where it is there, the others are.
    """
    tables = {} if ie.prompts is None else {f"prompts/{ie.task}": ie.prompt_frame()}
    tables[f"attribution/{ie.task}.snapshots"] = ie.snapshot_frame().assign(split="selection")
    return {**tables, f"attribution/{ie.task}": ie.to_frame(crosscoder.decoder_norms, encoder_share)}


def ablation_table(
    runs: PromptRuns,
    ie: Attribution,
    ablate_k: Sequence[int],
    keep_k: Sequence[int],
    controls: Controls,
    baseline: str | None = None,
) -> pd.DataFrame:
    """Ablate the top features on the held-out split, and keep only them, beside controls.

    Args:
        runs: of the held-out split.
        ie: effects, which rank the features.
        ablate_k: sizes of the sets that are ablated.
        keep_k: sizes of the sets that alone are kept.
        controls: random and matched sets.
        baseline: as in `ablate`.
    """
    tables = [
        ablate(runs, ie, ks, keep=keep, baseline=baseline, controls=controls)
        for keep, ks in ((False, ablate_k), (True, keep_k))
    ]
    return pd.concat(tables, ignore_index=True).assign(split="held-out")


def _single_effects(work: _Work) -> Tables:
    """Estimates by every method beside exact effects of single features at the last snapshot."""
    name, last, ie = work.task.name, len(work.snapshots) - 1, work.ie
    estimates = {METHODS[0]: ie}
    estimates |= {method: attribute(work.selection, method, baseline=work.baseline) for method in METHODS[1:]}
    largest = ie.top(min(work.sizes.n_exact, int(ie.active[:, last].sum())), last, by="magnitude")
    columns = {method: each.effects[largest, last] for method, each in estimates.items()}
    for column, end in (("removed", "clean"), ("added", "baseline")):
        columns[column] = exact_effects(work.selection, last, largest, work.baseline, end)
    return {
        f"completeness/{name}": estimates["ig"].snapshot_frame().assign(split="selection"),
        f"exact/{name}": pd.DataFrame(
            {
                "feature": largest.numpy(),
                **{column: values.numpy() for column, values in columns.items()},
                "baseline": ie.estimator.baseline,
            }
        ),
    }


def _curves(work: _Work, k: int, most: int) -> pd.DataFrame:
    """Ablation curves; at the last snapshot those of size k with many draws."""
    sizes, last = work.sizes, len(work.snapshots) - 1
    ablate_k, keep_k = ([size for size in each if size <= most] for each in (sizes.ablate_k, sizes.keep_k))

    def curve(keep: bool, ks: Sequence[int], n_draws: int, at: list[int] | None = None) -> pd.DataFrame:
        kinds = ("random",) if keep else CONTROLS
        controls = Controls(kinds, n_draws, seed=work.seed, allow_fewer=True)
        return ablate(work.held_out, work.ie, ks, keep=keep, baseline=work.baseline, controls=controls, at=at)

    # the many draws at the last snapshot replace the few
    curves = pd.concat(
        [
            curve(False, [k], sizes.n_draws_last, [last]),
            curve(False, ablate_k, sizes.n_draws),
            curve(True, keep_k, sizes.n_draws),
        ]
    )
    return curves.drop_duplicates(["snapshot", "mode", "features", "k"], ignore_index=True).assign(split="held-out")


def _zeroing(work: _Work, k: int) -> pd.DataFrame:
    """The top k features of each snapshot set to zero, where the other tables exchange them with the paired prompt.

    An exchange says what the features carry of what the pair differs in, and reverses the metric if they carry it all;
    zeroing takes them away, and can leave the metric at 0 at most.
    """
    controls = Controls(CONTROLS, work.sizes.n_draws, seed=work.seed, allow_fewer=True)
    return ablate(work.held_out, work.ie, [k], baseline="zero", controls=controls).assign(split="held-out")


def _additivity(work: _Work, k: int, last: int) -> Tables:
    name, n_pairs = work.task.name, work.sizes.n_pairs
    pairs = pair_additivity(work.held_out, work.ie, k, n_pairs, baseline=work.baseline, at=[last], seed=work.seed)
    return {f"additivity/{name}": pairs.pairs, f"additivity/{name}.snapshots": pairs.summary}


def _validation(work: _Work, decodability: Tensor | None) -> Tables:
    name = work.task.name
    found = validate(
        work.held_out,
        work.ie,
        baseline=work.baseline,
        decodability=decodability,
        max_features=work.sizes.n_validated,
        seed=work.seed,
    )
    return {f"validation/{name}": found.effects, f"validation/{name}.summary": found.summary}


def _languages(work: _Work, most: int) -> Tables:
    """Effects by language, of the prompts of the selection split; empty if they are all of one."""
    parts = split_languages(work.selection.task)
    if len(parts) < 2:
        return {}
    effects = {language: attribute(work.runs(part), baseline=work.baseline) for language, part in parts.items()}
    return {f"languages/{work.task.name}": compare_languages(effects, min(10, most))}
