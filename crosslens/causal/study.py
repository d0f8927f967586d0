"""All that is asked of one task, in one call: effects on one half of the prompts, what judges them on the other.

The parts are `attribute`, `ablate`, `transfer_matrix`, `pair_additivity`, `follow_features` and
`compare_languages`; they share the clean runs of the two halves, so nothing below the hook is run twice. The division
of prompts, and `rank_agreement`, are this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from scipy.stats import spearmanr

from crosslens.causal.ablation import ablate, exact_effects
from crosslens.causal.additivity import pair_additivity
from crosslens.causal.attribution import Attribution, attribute
from crosslens.causal.languages import compare_languages, split_languages
from crosslens.causal.timeline import follow_features
from crosslens.causal.transfer import transfer_matrix
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task

ABLATE = (1, 5, 15, 50)
KEEP = (5, 15, 50, 100)


@dataclass(frozen=True)
class Study:
    """What was found of one task.

    Attributes:
        task: its name.
        ie: integrated gradients on the half that chooses features.
        gradient: one gradient on the same half.
        exact: the features of largest |IE| at the last snapshot, one by one, in logits: feature, ig, gradient, removed
            (what the metric loses when the feature alone is set to its baseline) and, with paired prompts, added (what
            the metric of the paired prompt gains when the feature alone is set to its clean value).
        tables: by the name under which a run directory keeps them: attribution/<task>, attribution/<task>.snapshots,
            ablation/<task>, transfer/<task>, additivity/<task>, timeline/<task>, and languages/<task>
            where the items are of several languages.
    """

    task: str
    ie: Attribution
    gradient: Attribution
    exact: pd.DataFrame
    tables: dict[str, pd.DataFrame]

    def rank_agreement(self, method: str = "ig", end: str = "removed") -> float:
        """Spearman correlation of a method with exact effects of single features, at the last snapshot.

        Integrated gradients average over the whole way from the baseline to the clean run, ablation looks at its clean
        end alone; where the model is not additive in between, both differ although neither is wrong.

        Args:
            method: "ig" or "gradient".
            end: "removed" (from the clean run), "added" (to the baseline), or "both", the mean of the two.

        Raises:
            UserError: an unknown method or end, or effects of adding without paired prompts.
        """
        if method not in ("ig", "gradient"):
            raise UserError(f"method={method!r} must be 'ig' or 'gradient'")
        if end not in ("removed", "added", "both"):
            raise UserError(f"end={end!r} must be 'removed', 'added' or 'both'")
        ends = ["removed", "added"] if end == "both" else [end]
        if missing := [name for name in ends if name not in self.exact]:
            raise UserError(f"effects of features {missing[0]} alone were not measured: they need value='patch'")
        found: Any = spearmanr(self.exact[method], self.exact[ends].mean(axis=1))
        return float(found.statistic)


def study_task(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    *,
    value: str = "patch",
    ablate_k: Sequence[int] = ABLATE,
    keep_k: Sequence[int] = KEEP,
    k: int = 15,
    n_draws: int = 4,
    n_draws_last: int = 100,
    n_exact: int = 100,
    n_pairs: int = 100,
    seed: int = 0,
    device: str = "cpu",
    backend: str = "bridge",
) -> Study:
    """Attribute a task on half of its prompts, and judge by intervention on the other half.

    Sizes that exceed the features active at some snapshot are left out.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: minimal pairs; with value "patch" every item needs a paired prompt.
        value: what features are set to, and the baseline of their effects: "patch", "zero" or "mean".
        ablate_k: sizes of the sets that are ablated.
        keep_k: sizes of the sets that alone are kept.
        k: features of a set in the transfer matrix, features that are paired for additivity, and the size whose
            controls are drawn `n_draws_last` times at the last snapshot.
        n_draws: sets drawn per control, random and size-matched, at all snapshots.
        n_draws_last: sets drawn per control at the last one, of size k.
        n_exact: features of largest |IE| that are ablated one by one, at the last snapshot.
        n_pairs: pairs of features ablated together, at the last snapshot.
        seed: of the halves and of every draw.
        device: where everything runs.
        backend: "bridge" or "hooked_transformer".

    Raises:
        UserError: one snapshot only, a task that cannot be halved or has no usable items, items without a paired
            prompt, fewer than three features active at a snapshot.
    """
    paired = value == "patch"
    choosing, judging = task.split(seed)
    chosen, judged = (
        PromptRuns(crosscoder, snapshots, half, paired=paired, device=device, backend=backend)
        for half in (choosing, judging)
    )
    ie, gradient = (
        attribute(crosscoder, snapshots, choosing, method, baseline=value, runs=chosen) for method in ("ig", "gradient")
    )
    last, most = len(snapshots) - 1, int(ie.active.sum(0).min())
    if most < 3:
        raise UserError(f"only {most} features are active on {task.name!r} at a snapshot: three are needed")
    k = min(k, most)
    ablate_k, keep_k = ([size for size in sizes if size <= most] for sizes in (ablate_k, keep_k))

    def curve(keep: bool, sizes: Sequence[int], draws: int, at: list[int] | None = None) -> pd.DataFrame:
        controls = ("random",) if keep else ("random", "size_matched")
        return ablate(
            crosscoder, snapshots, judging, ie, sizes, keep=keep, value=value, controls=controls, n_draws=draws,
            at=at, seed=seed, runs=judged, cut=True,
        )  # fmt: skip

    # the many draws at the last snapshot replace the few
    curves = pd.concat(
        [curve(False, [k], n_draws_last, [last]), curve(False, ablate_k, n_draws), curve(True, keep_k, n_draws)]
    ).drop_duplicates(["snapshot", "mode", "features", "k"], ignore_index=True)
    pairs = pair_additivity(
        crosscoder, snapshots, judging, ie, k, n_pairs, value=value, at=[last], seed=seed, runs=judged
    )
    tables = {
        f"attribution/{task.name}": ie.to_frame(crosscoder.decoder_norms),
        f"attribution/{task.name}.snapshots": ie.snapshot_frame(),
        f"ablation/{task.name}": curves,
        f"transfer/{task.name}": transfer_matrix(
            crosscoder, snapshots, judging, ie, k, value=value, runs=judged
        ),
        f"additivity/{task.name}": pairs.pairs,
        f"additivity/{task.name}.snapshots": pairs.summary,
        f"timeline/{task.name}": follow_features(crosscoder, snapshots, choosing, ie, min(5, most), runs=chosen),
    }  # fmt: skip
    parts = split_languages(choosing) if split_languages(task) else {}
    if len(parts) > 1:
        by_language = {
            language: attribute(
                crosscoder, snapshots, part, "ig", baseline=value, device=device, backend=backend
            )
            for language, part in parts.items()
        }  # fmt: skip
        tables[f"languages/{task.name}"] = compare_languages(by_language, min(10, most))
    largest = ie.top(min(n_exact, int(ie.active[:, last].sum())), last, by="magnitude")
    exact = pd.DataFrame(
        {
            "feature": largest.numpy(),
            "ig": ie.effects[largest, last].numpy(),
            "gradient": gradient.effects[largest, last].numpy(),
            "removed": exact_effects(chosen, last, largest, value=value).numpy(),
        }
    )
    if paired:
        swapped = PromptRuns(crosscoder, snapshots, _swapped(choosing), paired=True, device=device, backend=backend)
        exact["added"] = -exact_effects(swapped, last, largest, value=value).numpy()
    return Study(task.name, ie, gradient, exact, tables)


def _swapped(task: Task) -> Task:
    """Every prompt in the place of its paired prompt, with the same answers."""
    items = tuple(
        item if item.patch_prefix is None else replace(item, prefix=item.patch_prefix, patch_prefix=item.prefix)
        for item in task.items
    )
    return replace(task, items=items)
