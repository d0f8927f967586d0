"""All causal analyses of one task in one call.

1. Split the prompts in two: a selection split and a held-out split that share no prefix.
2. On the selection split, estimate effects (`attribute`), ablate those with the largest effects one by one to see how
   far the estimates agree with exact effects, follow the top features over snapshots (`follow_features`), and compare
   languages (`compare_languages`).
3. On the held-out split, test the features that step 2 ranks highest: `ablate`, `transfer_matrix`, `pair_additivity`.
   Ablate every significant feature at every snapshot, to see which measure predicts when it acts (`validate`).

The clean runs of each split are made once and shared. The splits and `Study.rank_agreement` are new here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from crosslens.causal.ablation import Controls, ablate
from crosslens.causal.additivity import pair_additivity
from crosslens.causal.attribution import Attribution, attribute, exact_effects
from crosslens.causal.languages import compare_languages, split_languages
from crosslens.causal.relative import significant
from crosslens.causal.timeline import follow_features
from crosslens.causal.transfer import transfer_matrix
from crosslens.causal.validation import Validation, validate
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns, needs_pairs
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.stats import rank_correlation
from crosslens.tasks.task import Task


@dataclass(frozen=True)
class StudySizes:
    """Numbers of features and draws; those above the features active at some snapshot are reduced or left out.

    Attributes:
        ablate_k: sizes of the sets that are ablated.
        keep_k: sizes of the sets that alone are kept.
        k: features of a set in the transfer matrix, features that are paired for additivity, and the size whose
            controls are drawn `n_draws_last` times.
        n_draws: sets drawn per control, random and size-matched, at all snapshots.
        n_draws_last: sets of size k drawn per control at the last snapshot.
        n_exact: features with the largest |IE| that are ablated one by one, at every snapshot.
        n_validated: significant features that are ablated one by one on the held-out split, at every snapshot.
        n_bootstrap: replicates over prompts, for intervals.
        n_pairs: pairs of features ablated together, at the last snapshot.
    """

    ablate_k: Sequence[int] = (1, 5, 15, 50)
    keep_k: Sequence[int] = (0, 5, 15, 50, 100)
    k: int = 15
    n_draws: int = 4
    n_draws_last: int = 100
    n_exact: int = 100
    n_validated: int = 200
    n_bootstrap: int = 200
    n_pairs: int = 100


@dataclass(frozen=True)
class Study:
    """Results of one task.

    Attributes:
        task: name of the task.
        estimates: effects on the selection split by each method: "removal", "ig" and "gradient".
        exact: the features with the largest |IE| by removal at the last snapshot, one by one, in logits: feature; the
            three estimates; removed (drop of the metric when the feature alone is set to its baseline) and added (gain
            when it alone is set to its clean value in the baseline run).
        validation: exact effects at every snapshot on the held-out split; None if no effect is significant.
        tables: by their names in a run directory: attribution/<task>, attribution/<task>.snapshots, completeness/<task>
            (the snapshots of "ig", whose effects add up), prompts/<task>, ablation/<task>, transfer/<task>,
            additivity/<task>, additivity/<task>.snapshots, timeline/<task>, validation/<task>,
            validation/<task>.summary and, if the items are of several languages, languages/<task>. The first two and
            `completeness` name their split.
    """

    task: str
    estimates: dict[str, Attribution]
    exact: pd.DataFrame
    validation: Validation | None
    tables: dict[str, pd.DataFrame]

    @property
    def ie(self) -> Attribution:
        """Effects by removal, which rank the features in all tables."""
        return self.estimates["removal"]

    def rank_agreement(self, method: str = "removal", end: str = "removed") -> float:
        """Spearman correlation of a method with exact effects of single features, at the last snapshot.

        Args:
            method: "removal", "ig" or "gradient".
            end: "removed" (from the clean run), "added" (to the baseline), or "both", the mean of the two.

        Raises:
            UserError: an unknown method or end.
        """
        if method not in self.estimates:
            raise UserError(f"method={method!r} must be one of {tuple(self.estimates)}")
        if end not in ("removed", "added", "both"):
            raise UserError(f"end={end!r} must be 'removed', 'added' or 'both'")
        ends = ["removed", "added"] if end == "both" else [end]
        return float(rank_correlation(self.exact[method].to_numpy(), self.exact[ends].mean(axis=1).to_numpy()))


def study_task(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    *,
    baseline: str | None = None,
    decodability: Float[Tensor, "F S"] | None = None,
    encoder_share: Float[Tensor, "F S"] | None = None,
    sizes: StudySizes = StudySizes(),
    seed: int = 0,
    settings: ModelSettings | None = None,
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
        sizes: numbers of features and draws.
        seed: seed for the split and every draw.
        settings: how the models run; None runs them on the crosscoder's device.

    Raises:
        UserError: a single snapshot, a task that cannot be split or has no usable items, "patch" without paired
            prompts, fewer than three features active at a snapshot.
    """
    first, second = task.split(seed)
    selection = PromptRuns(crosscoder, snapshots, first, paired=needs_pairs(baseline), settings=settings)

    def run(part: Task) -> PromptRuns:  # all as the first half
        return PromptRuns(crosscoder, snapshots, part, paired=selection.paired, settings=settings)

    held_out = run(second)
    ie = attribute(selection, baseline=baseline, positions=True, n_exact=sizes.n_exact, n_bootstrap=sizes.n_bootstrap)
    estimates = {"removal": ie, **{name: attribute(selection, name, baseline=baseline) for name in ("ig", "gradient")}}
    last, most = len(snapshots) - 1, int(ie.active.sum(0).min())
    if most < 3:
        raise UserError(f"only {most} features are active on {task.name!r} at some snapshot: at least 3 are needed")
    k = min(sizes.k, most)
    ablate_k, keep_k = ([size for size in each if size <= most] for each in (sizes.ablate_k, sizes.keep_k))

    def curve(keep: bool, ks: Sequence[int], n_draws: int, at: list[int] | None = None) -> pd.DataFrame:
        kinds = ("random",) if keep else ("random", "size_matched")
        controls = Controls(kinds, n_draws, seed=seed, allow_fewer=True)
        return ablate(held_out, ie, ks, keep=keep, baseline=baseline, controls=controls, at=at)

    # the many draws at the last snapshot replace the few
    curves = pd.concat(
        [
            curve(False, [k], sizes.n_draws_last, [last]),
            curve(False, ablate_k, sizes.n_draws),
            curve(True, keep_k, sizes.n_draws),
        ]
    ).drop_duplicates(["snapshot", "mode", "features", "k"], ignore_index=True)
    pairs = pair_additivity(held_out, ie, k, sizes.n_pairs, baseline=baseline, at=[last], seed=seed)
    tables = {
        f"attribution/{task.name}": ie.to_frame(crosscoder.decoder_norms, encoder_share),
        f"attribution/{task.name}.snapshots": ie.snapshot_frame().assign(split="selection"),
        f"prompts/{task.name}": ie.prompt_frame(),
        f"completeness/{task.name}": estimates["ig"].snapshot_frame().assign(split="selection"),
        f"ablation/{task.name}": curves,
        f"transfer/{task.name}": transfer_matrix(held_out, ie, k, baseline=baseline),
        f"additivity/{task.name}": pairs.pairs,
        f"additivity/{task.name}.snapshots": pairs.summary,
        f"timeline/{task.name}": follow_features(selection, ie, min(5, most)),
    }
    validation = None
    if significant(ie).any():
        validation = validate(
            held_out, ie, baseline=baseline, decodability=decodability, max_features=sizes.n_validated, seed=seed
        )
        tables[f"validation/{task.name}"] = validation.effects
        tables[f"validation/{task.name}.summary"] = validation.summary
    parts = split_languages(selection.task) if split_languages(task) else {}
    if len(parts) > 1:
        by_language = {language: attribute(run(part), baseline=baseline) for language, part in parts.items()}
        tables[f"languages/{task.name}"] = compare_languages(by_language, min(10, most))
    largest = ie.top(min(sizes.n_exact, int(ie.active[:, last].sum())), last, by="magnitude")
    columns = {name: each.effects[largest, last] for name, each in estimates.items()}
    for name, end in (("removed", "clean"), ("added", "baseline")):
        columns[name] = exact_effects(selection, last, largest, baseline, end)
    exact = pd.DataFrame({"feature": largest.numpy(), **{name: each.numpy() for name, each in columns.items()}})
    return Study(task.name, estimates, exact, validation, tables)
