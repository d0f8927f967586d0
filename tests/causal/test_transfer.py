"""Feature sets of one snapshot ablated at another, against single splices."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crosslens.causal.ablation import ablate
from crosslens.causal.attribution import Attribution, Estimator, attribute
from crosslens.causal.transfer import transfer_matrix
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import F, make_crosscoder, slow_runs


@pytest.mark.parametrize(("architecture", "keep"), [("jumprelu_crosscoder", False), ("standard_crosscoder", True)])
def test_every_entry_equals_a_plain_splice(snaps: Snapshots, task: Task, architecture: str, keep: bool) -> None:
    """The sets of snapshot s, ablated at snapshot s' by hand-written hooks in plain transformers."""
    cc = make_crosscoder(snaps, architecture)
    ie = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), baseline="zero")
    runs = PromptRuns(cc, snaps, task, paired=False)
    k = 4
    table = transfer_matrix(runs, ie, k, keep=keep)
    assert table[["selected_at", "ablated_at"]].to_numpy().tolist() == [[a, b] for a in range(3) for b in range(3)]
    slow = slow_runs(snaps, cc)
    size = ie.effects.abs() if keep else ie.effects
    best = [sorted(range(F), key=lambda i: -float(size[i, s]))[:k] for s in range(3)]
    assert best[0] != best[2], "the same set at all snapshots would hide a wrong index"
    empty, full = (
        [np.mean([float(run.metric(s, run.decode(part * run.f[s], s) + (0 if keep else run.error(s)))) for run in slow])
         for s in range(3)]
        for part in (0, 1)
    )  # fmt: skip
    for row in table.itertuples():
        a, b = row.selected_at, row.ablated_at
        metrics: list[float] = []
        for run in slow:
            f = run.f[b].clone()
            f[:, [i for i in range(F) if (i in best[a]) != keep]] = 0
            metrics.append(float(run.metric(b, run.decode(f, b) + (0 if keep else run.error(b)))))
        assert row.metric == pytest.approx(np.mean(metrics), abs=1e-4)
        assert row.metric_se == pytest.approx(np.std(metrics, ddof=1) / 2, abs=1e-4)
        change = full[b] - np.mean(metrics) if not keep else np.mean(metrics) - empty[b]
        if not np.isnan(row.share):
            assert row.share == pytest.approx(change / (full[b] - empty[b]), abs=1e-3)
        active = {i for i in range(F) if any((run.f[b][:, i] != 0).any() for run in slow)}
        assert row.k_active == len(active & set(best[a])) and row.n_active == len(active)
        assert row.shared == len(set(best[a]) & set(best[b]))
        assert (row.selected_at_label, row.ablated_at_label) == (snaps.labels[a], snaps.labels[b])
        assert (row.selected_at_step, row.ablated_at_step) == (snaps.steps[a], snaps.steps[b])
    assert table["share"].notna().sum() >= 6


def test_the_diagonal_is_the_curve(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    ie = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), baseline="patch")
    runs = PromptRuns(cc, snaps, task, paired=True)
    table = transfer_matrix(runs, ie, 3, baseline="patch")
    curve = ablate(runs, ie, [3], baseline="patch", controls=())
    diagonal = table[table["selected_at"] == table["ablated_at"]].reset_index(drop=True)
    same = [
        "mode",
        "baseline",
        "error",
        "clean",
        "reconstruction_only",
        "all_edited",
        "n_active",
        "metric",
        "metric_se",
    ]
    pd.testing.assert_frame_equal(diagonal[same], curve[same])
    assert (diagonal["shared"] == 3).all()
    two = transfer_matrix(cc, snaps, task, ie, 3, at=[0, -1], baseline="patch")
    pd.testing.assert_frame_equal(
        two[["selected_at", "ablated_at", "metric"]],
        table.query("selected_at != 1 and ablated_at != 1")[["selected_at", "ablated_at", "metric"]].reset_index(
            drop=True
        ),
    )
    matrix = table.pivot(index="selected_at", columns="ablated_at", values="share")
    assert matrix.shape == (3, 3)


@pytest.fixture(scope="module")
def effects(snaps: Snapshots, task: Task) -> tuple[PromptRuns, Attribution]:
    runs = PromptRuns(make_crosscoder(snaps, "topk_crosscoder"), snaps, task, paired=False)
    return runs, attribute(runs, "gradient")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 25}, "k=25 is more than the .* features that are active on 'tiny' at step0: use k up to"),
        ({"at": [0, 5]}, "snapshot 5 is not in [-3, 2]"),
        ({"baseline": "zeros"}, "did you mean 'zero'"),
    ],
)
def test_errors_are_one_line(effects: tuple[PromptRuns, Attribution], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as found:
        transfer_matrix(*effects, **{"k": 2, **options})
    assert re.search(message.replace("[", r"\["), str(found.value)) and "\n" not in str(found.value)
