"""Feature sets of one snapshot applied to another, against single splices."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crosslens.causal.ablation import ablate
from crosslens.causal.attribution import attribute
from crosslens.causal.transfer import transfer_matrix
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import F, make_crosscoder, slow_runs


@pytest.mark.parametrize(("architecture", "keep"), [("jumprelu_crosscoder", False), ("standard_crosscoder", True)])
def test_every_entry_equals_a_plain_splice(snaps: Snapshots, task: Task, architecture: str, keep: bool) -> None:
    """The sets of snapshot s, put into snapshot s' by hand-written hooks in plain transformers."""
    cc = make_crosscoder(snaps, architecture)
    ie = attribute(cc, snaps, task, steps=2)
    runs = PromptRuns(cc, snaps, task)
    k = 4
    table = transfer_matrix(cc, snaps, task, ie, k, keep=keep, runs=runs)
    assert list(zip(table["chosen"], table["judged"], strict=True)) == [(a, b) for a in range(3) for b in range(3)]
    slow = slow_runs(snaps, cc)
    size = ie.effects.abs() if keep else ie.effects
    best = [sorted(range(F), key=lambda i: -float(size[i, s]))[:k] for s in range(3)]
    assert best[0] != best[2], "one set at all snapshots would hide a mistaken index"
    for row in table.itertuples():
        a, b = row.chosen, row.judged
        metrics: list[float] = []
        for run in slow:
            f = run.f[b].clone()
            f[:, [i for i in range(F) if (i in best[a]) != keep]] = 0
            metrics.append(float(run.metric(b, run.decode(f, b) + (0 if keep else run.error(b)))))
        assert row.metric == pytest.approx(np.mean(metrics), abs=1e-4)
        assert row.metric_se == pytest.approx(np.std(metrics, ddof=1) / 2, abs=1e-4)
        empty = np.mean(
            [float(run.metric(b, run.decode(0 * run.f[b], b) + (0 if keep else run.error(b)))) for run in slow]
        )
        full = np.mean([float(run.metric(b, run.decode(run.f[b], b) if keep else None)) for run in slow])
        change = full - np.mean(metrics) if not keep else np.mean(metrics) - empty
        if not np.isnan(row.share):
            assert row.share == pytest.approx(change / (full - empty), abs=1e-3)
        active = {i for i in range(F) if any((run.f[b][:, i] != 0).any() for run in slow)}
        assert row.k_active == len(active & set(best[a])) and row.n_active == len(active)
        assert row.shared == len(set(best[a]) & set(best[b]))
        assert (row.chosen_label, row.judged_label) == (snaps.labels[a], snaps.labels[b])
        assert (row.chosen_step, row.judged_step) == (snaps.steps[a], snaps.steps[b])
    assert table["share"].notna().sum() >= 6


def test_the_diagonal_is_the_curve(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    ie = attribute(cc, snaps, task, steps=2, baseline="patch")
    runs = PromptRuns(cc, snaps, task, paired=True)
    table = transfer_matrix(cc, snaps, task, ie, 3, value="patch", runs=runs)
    curve = ablate(cc, snaps, task, ie, [3], value="patch", controls=(), runs=runs)
    diagonal = table[table["chosen"] == table["judged"]].reset_index(drop=True)
    same = ["mode", "value", "error", "clean", "reconstruction_only", "all_edited", "n_active", "metric", "metric_se"]
    pd.testing.assert_frame_equal(diagonal[same], curve[same])
    assert (diagonal["shared"] == 3).all()
    two = transfer_matrix(cc, snaps, task, ie, 3, value="patch", at=[0, -1])
    pd.testing.assert_frame_equal(
        two[["chosen", "judged", "metric"]],
        table[table["chosen"].isin([0, 2]) & table["judged"].isin([0, 2])][["chosen", "judged", "metric"]].reset_index(
            drop=True
        ),
    )
    matrix = table.pivot(index="chosen", columns="judged", values="share")
    assert matrix.shape == (3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 25}, "k=25 is more than the .* features that are active on 'tiny' at step0: use k up to"),
        ({"at": [0, 5]}, "snapshot 5 is not in [0, 2]"),
        ({"value": "zeros"}, "did you mean 'zero'"),
        ({"runs": True}, "the given runs are not of this crosscoder"),
    ],
)
def test_mistakes_are_told_in_one_line(snaps: Snapshots, task: Task, options: dict[str, Any], message: str) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")
    ie = attribute(cc, snaps, task, steps=1)
    if options.get("runs"):
        options = {"runs": PromptRuns(make_crosscoder(snaps, "topk_crosscoder", 1), snaps, task)}
    with pytest.raises(UserError) as found:
        transfer_matrix(cc, snaps, task, ie, **{"k": 2, **options})
    assert re.search(message.replace("[", r"\["), str(found.value)) and "\n" not in str(found.value)
