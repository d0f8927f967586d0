"""All causal analyses of one task in one call.

1. Split the prompts in two: a selection split and a held-out split that share no prefix.
2. On the selection split, estimate effects (`attribute`), follow the top features over snapshots (`follow_features`),
   measure single effects exactly, and compare languages (`compare_languages`).
3. On the held-out split, test the features that step 2 ranks highest: `ablate`, `transfer_matrix`, `pair_additivity`.

The clean runs of each split are made once and shared. The splits and `Study.rank_agreement` are new here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from crosslens.causal.ablation import Controls, ablate, exact_effects
from crosslens.causal.additivity import pair_additivity
from crosslens.causal.attribution import Attribution, attribute
from crosslens.causal.languages import compare_languages, split_languages
from crosslens.causal.timeline import follow_features
from crosslens.causal.transfer import transfer_matrix
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
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
        n_exact: features with the largest |IE| that are ablated one by one, at the last snapshot.
        n_pairs: pairs of features ablated together, at the last snapshot.
    """

    ablate_k: Sequence[int] = (1, 5, 15, 50)
    keep_k: Sequence[int] = (5, 15, 50, 100)
    k: int = 15
    n_draws: int = 4
    n_draws_last: int = 100
    n_exact: int = 100
    n_pairs: int = 100


@dataclass(frozen=True)
class Study:
    """Results of one task.

    Attributes:
        task: name of the task.
        ie: integrated gradients on the selection split.
        gradient: effects by a single gradient on the same split.
        exact: the features with the largest |IE| at the last snapshot, one by one, in logits: feature, ig, gradient,
            removed (drop of the metric when the feature alone is set to its baseline) and, with paired prompts, added
            (gain of the paired prompt's metric when the feature alone is set to its clean value).
        tables: by their names in a run directory: attribution/<task>, attribution/<task>.snapshots, ablation/<task>,
            transfer/<task>, additivity/<task>, additivity/<task>.snapshots, timeline/<task> and, if the items are of
            several languages, languages/<task>.
    """

    task: str
    ie: Attribution
    gradient: Attribution
    exact: pd.DataFrame
    tables: dict[str, pd.DataFrame]

    def rank_agreement(self, method: str = "ig", end: str = "removed") -> float:
        """Spearman correlation of a method with exact effects of single features, at the last snapshot.

        Integrated gradients average over the path from the baseline to the clean run, ablation looks only at its clean
        end. If the model is not additive in between, the two differ although neither is wrong.

        Args:
            method: "ig" or "gradient".
            end: "removed" (from the clean run), "added" (to the baseline), or "both", the mean of the two.

        Raises:
            UserError: an unknown method or end, or "added" without paired prompts.
        """
        if method not in ("ig", "gradient"):
            raise UserError(f"method={method!r} must be 'ig' or 'gradient'")
        if end not in ("removed", "added", "both"):
            raise UserError(f"end={end!r} must be 'removed', 'added' or 'both'")
        ends = ["removed", "added"] if end == "both" else [end]
        if missing := [name for name in ends if name not in self.exact]:
            raise UserError(
                f"end={end!r} needs the effects of {missing[0]} features: use study_task(..., baseline='patch')"
            )
        found: Any = spearmanr(self.exact[method], self.exact[ends].mean(axis=1))
        return float(found.statistic)


def study_task(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    *,
    baseline: str = "patch",
    sizes: StudySizes = StudySizes(),
    seed: int = 0,
    settings: ModelSettings | None = None,
) -> Study:
    """Attribute a task on one half of its prompts, and test the top features by intervention on the other half.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: minimal pairs; with the baseline "patch", only items with a paired prompt are used.
        baseline: what features are set to, and the baseline of their effects: "patch", "zero" or "mean".
        sizes: numbers of features and draws.
        seed: seed for the split and every draw.
        settings: how the models run; None runs them on the crosscoder's device.

    Raises:
        UserError: a single snapshot, a task that cannot be split or has no usable items, "patch" without paired
            prompts, fewer than three features active at a snapshot.
    """
    paired = baseline == "patch"

    def run(part: Task) -> PromptRuns:
        return PromptRuns(crosscoder, snapshots, part, paired=paired, settings=settings)

    selection, held_out = (run(half) for half in task.split(seed))
    ie, gradient = (attribute(selection, method, baseline=baseline) for method in ("ig", "gradient"))
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
        f"attribution/{task.name}": ie.to_frame(crosscoder.decoder_norms),
        f"attribution/{task.name}.snapshots": ie.snapshot_frame(),
        f"ablation/{task.name}": curves,
        f"transfer/{task.name}": transfer_matrix(held_out, ie, k, baseline=baseline),
        f"additivity/{task.name}": pairs.pairs,
        f"additivity/{task.name}.snapshots": pairs.summary,
        f"timeline/{task.name}": follow_features(selection, ie, min(5, most)),
    }
    parts = split_languages(selection.task) if split_languages(task) else {}
    if len(parts) > 1:
        by_language = {language: attribute(run(part), baseline=baseline) for language, part in parts.items()}
        tables[f"languages/{task.name}"] = compare_languages(by_language, min(10, most))
    largest = ie.top(min(sizes.n_exact, int(ie.active[:, last].sum())), last, by="magnitude")
    exact = pd.DataFrame(
        {
            "feature": largest.numpy(),
            "ig": ie.effects[largest, last].numpy(),
            "gradient": gradient.effects[largest, last].numpy(),
            "removed": exact_effects(selection, last, largest, baseline).numpy(),
        }
    )
    if paired:
        exact["added"] = -exact_effects(run(_swapped(selection.task)), last, largest, baseline).numpy()
    return Study(task.name, ie, gradient, exact, tables)


def _swapped(task: Task) -> Task:
    """The task with prompts and paired prompts swapped, and the same answers."""
    items = tuple(
        item if item.patch_prefix is None else replace(item, prefix=item.patch_prefix, patch_prefix=item.prefix)
        for item in task.items
    )
    return replace(task, items=items)
