"""Joint ablation of pairs against slow loops and a model whose answer is known."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from crosslens.causal import additivity
from crosslens.causal.additivity import interacting, pair_additivity, relative_deviation
from crosslens.causal.attribution import Attribution, Estimator, attribute
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, make_crosscoder, slow_runs


@pytest.mark.parametrize(("architecture", "baseline"), [("jumprelu_crosscoder", "zero"), ("topk_crosscoder", "patch")])
def test_effects_equal_a_plain_splice(snaps: Snapshots, task: Task, architecture: str, baseline: str) -> None:
    """One prompt and one pair at a time, by hand-written hooks in plain transformers."""
    cc = make_crosscoder(snaps, architecture)
    ie = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), baseline="zero")
    found = pair_additivity(cc, snaps, task, ie, 5, 6, at=[2], seed=3, baseline=baseline)
    assert found.summary["snapshot"].tolist() == [2] and set(found.pairs["baseline"]) == {baseline}
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    for s in (2,):
        best = sorted(range(F), key=lambda i: -abs(float(ie.effects[i, s])))[:5]
        rows = found.pairs[found.pairs["snapshot"] == s]
        drawn = {(row.feature_a, row.feature_b) for row in rows.itertuples()}
        assert len(rows) == len(drawn) == 6 and drawn <= set(combinations(best, 2))

        def effect(*ids: int, s: int = s) -> float:
            drops: list[float] = []
            for run, other in zip(slow, paired, strict=True):
                f = run.f[s].clone()
                f[:, ids] = other.f[s][:, ids] if baseline == "patch" else 0.0
                drops.append(float(run.metric(s) - run.metric(s, run.decode(f, s) + run.error(s))))
            return float(np.mean(drops))

        for row in rows.itertuples():
            a, b, joint = effect(row.feature_a), effect(row.feature_b), effect(row.feature_a, row.feature_b)
            expected = (a, b, a + b, joint, joint - a - b)
            assert (row.effect_a, row.effect_b, row.sum, row.joint, row.deviation) == pytest.approx(expected, abs=1e-4)
            assert (row.label, row.step) == (snaps.labels[s], snaps.steps[s])
        (summary,) = found.summary[found.summary["snapshot"] == s].to_dict("records")
        beyond = [abs(row.joint - row.sum) > min(abs(row.effect_a), abs(row.effect_b)) / 2 for row in rows.itertuples()]
        assert rows["interacting"].tolist() == beyond and summary["interacting"] == pytest.approx(np.mean(beyond))
        deviation = sum(abs(row.joint - row.sum) for row in rows.itertuples()) / sum(map(abs, rows["sum"]))
        assert summary["deviation"] == pytest.approx(deviation)
        assert (summary["k"], summary["n_pairs"], summary["n_prompts"], summary["baseline"]) == (5, 6, 4, baseline)


def test_intervals_equal_a_slow_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """One replicate at a time: groups of prompts by multiplicity, then pairs."""
    monkeypatch.setattr(additivity, "REPLICATES", 50)
    rng = np.random.default_rng(0)
    pairs = np.array([(0, 1), (0, 2), (1, 2), (2, 3)])
    effects, groups = rng.normal(size=(4 + 4, 7)), np.array([0, 1, 1, 2, 0, 3, 4])
    found = additivity._replicates(effects, pairs, groups, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    counts, draws = rng.multinomial(5, np.full(5, 1 / 5), size=50), rng.integers(4, size=(50, 4))
    for r in range(50):
        prompts = [p for g in range(5) for _ in range(counts[r][g]) for p in range(7) if groups[p] == g]
        mean = effects[:, prompts].mean(1)
        total = [mean[pairs[i][0]] + mean[pairs[i][1]] for i in draws[r]]
        joint = [mean[4 + i] for i in draws[r]]
        smaller = [min(abs(mean[pairs[i][0]]), abs(mean[pairs[i][1]])) for i in draws[r]]
        beyond = [abs(j - t) > size / 2 for j, t, size in zip(joint, total, smaller, strict=True)]
        assert found[0][r] == pytest.approx(np.mean(beyond))
        expected = sum(abs(j - t) for j, t in zip(joint, total, strict=True)) / sum(map(abs, total))
        assert found[1][r] == pytest.approx(expected)


def test_at_the_last_block_without_a_norm_effects_add_up(snaps: Snapshots, task: Task) -> None:
    """Above the last block only the final norm is nonlinear; without it, effects add up exactly."""
    cc = make_crosscoder(snaps, "standard_crosscoder", layer=2)
    runs = PromptRuns(cc, snaps, task, paired=False)
    ie = attribute(runs, Estimator("ig", n_nodes=2))
    before = pair_additivity(runs, ie, 6, at=[2]).summary.iloc[0]
    assert before["deviation"] > 0.01
    model = snaps.model(2)
    norm = model.ln_final
    handle = norm.original_component.register_forward_hook(lambda _module, inputs, _output: inputs[0])
    try:
        found = pair_additivity(runs, ie, 6, at=[2])
    finally:
        handle.remove()
    row = found.summary.iloc[0]
    assert row["n_pairs"] == 15
    assert row["interacting"] == 0 and row["deviation"] < 1e-4
    assert row["interacting_high"] == 0 and row["deviation_high"] < 1e-4
    assert found.pairs["joint"].abs().max() > 0.1


def test_measures_by_hand() -> None:
    total = np.array([[1.0, 2.0, 4.0], [1.0, -2.0, 3.0], [0.0, 0.0, 0.0]])
    joint = np.array([[0.5, 1.0, 2.0], [2.0, -2.0, 2.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(relative_deviation(total, joint), [0.5, 2 / 6, np.nan])
    single = np.array([[1.0, 3.0], [2.0, -4.0], [0.0, 1.0]])
    assert interacting(single, np.array([4.4, -1.1, 1.0])).tolist() == [False, False, False]
    assert interacting(single, np.array([3.4, -0.9, 1.01])).tolist() == [True, True, True]


def test_draws_are_seeded_and_intervals_contain_the_estimate(snaps: Snapshots) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    many = Task.from_items(
        "many", [{**item, "prefix": f"{item['prefix']} {w}".strip()} for item in ITEMS for w in ("", "near")]
    )
    ie = attribute(cc, snaps, many, Estimator("ig", n_nodes=1), baseline="zero")
    runs = PromptRuns(cc, snaps, many, paired=False)
    one, same, other = (
        pair_additivity(runs, ie, 8, 12, seed=seed, at=at) for seed, at in ((0, None), (0, [1]), (1, None))
    )
    assert one.pairs[one.pairs["snapshot"] == 1].reset_index(drop=True).equals(same.pairs)
    assert one.summary.iloc[[1]].reset_index(drop=True).equals(same.summary)
    assert not one.pairs.equals(other.pairs)
    for name in ("interacting", "deviation"):
        assert (one.summary[f"{name}_low"] <= one.summary[f"{name}_high"]).all()
        inside = one.summary[name].between(one.summary[f"{name}_low"], one.summary[f"{name}_high"])
        assert inside.sum() >= 2
    narrow = pair_additivity(runs, ie, 8, 12, level=0.5).summary
    assert (narrow["deviation_low"] > one.summary["deviation_low"]).all()


@pytest.fixture(scope="module")
def effects(snaps: Snapshots, task: Task) -> tuple[PromptRuns, Attribution]:
    runs = PromptRuns(make_crosscoder(snaps, "topk_crosscoder"), snaps, task, paired=False)
    return runs, attribute(runs, "gradient")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 2}, "k=2 and n_pairs=200 must be at least 3"),
        ({"n_pairs": 2}, "must be at least 3"),
        ({"k": 25}, "k=25 is more than the .* features that are active on 'tiny' at step0: use k up to"),
        ({"level": 0.0}, "level=0.0 must be between 0 and 1"),
        ({"baseline": "patched"}, "did you mean 'patch'"),
        ({"at": [-4]}, "snapshot -4 is not in"),
    ],
)
def test_errors_are_one_line(effects: tuple[PromptRuns, Attribution], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        pair_additivity(*effects, **{"k": 4, **options})
