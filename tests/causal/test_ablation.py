"""Ablation against plain transformers with hand-written hooks, and against `Splice`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from crosslens.causal import ablation
from crosslens.causal.ablation import (
    NEIGHBOURS,
    Controls,
    ablate,
    active_features,
    draw_sets,
    faithfulness,
    feature_sizes,
    set_changes,
    set_metrics,
    size_matched,
)
from crosslens.causal.attribution import Attribution, Estimator, attribute, exact_effects
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.intervention.splice import CleanRun, Edit, Splice
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, Slow, make_crosscoder, slow_runs


# ---------------------------------------------------------------------- metrics of feature sets
@pytest.mark.parametrize(
    ("architecture", "keep", "baseline", "error"),
    [
        ("standard_crosscoder", False, "zero", True),
        ("batchtopk_crosscoder", True, "zero", False),
        ("jumprelu_crosscoder", False, "mean", False),
        ("topk_crosscoder", True, "mean", True),
        ("standard_crosscoder", False, "patch", False),
        ("jumprelu_crosscoder", True, "patch", True),
    ],
)
def test_feature_sets_equal_a_plain_splice(
    snaps: Snapshots, task: Task, architecture: str, keep: bool, baseline: str, error: bool
) -> None:
    cc = make_crosscoder(snaps, architecture, seed=1)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    runs = PromptRuns(cc, snaps, task, paired=True)
    sets = torch.tensor([[0, 3, 5], [7, 8, 23]])
    for s in (2,):
        found = set_metrics(runs, s, sets, keep=keep, error=error, baseline=baseline)
        order = torch.cat([batch.index for batch in runs.batches])
        mean = sum(run.f[s].sum(0) for run in slow) / sum(len(run.tokens[0]) - 1 for run in slow)
        for row, ids in enumerate(sets):
            for column, item in enumerate(order.tolist()):
                run, other = slow[item], paired[item]
                new = {"zero": torch.zeros_like(run.f[s]), "mean": mean.expand_as(run.f[s]), "patch": other.f[s]}[
                    baseline
                ]
                edited = run.f[s].clone() if not keep else new.clone()
                edited[:, ids] = (new if not keep else run.f[s])[:, ids]
                spliced = run.decode(edited, s)
                if error:
                    spliced = spliced + run.acts[:, s] - run.decode(run.f[s], s)
                expected = run.metric(s, spliced).double()
                torch.testing.assert_close(found[row, column], expected, rtol=1e-4, atol=1e-5)


class Spliced:
    """One prompt at a time through `Splice` and `run_with_hooks`."""

    def __init__(self, runs: PromptRuns) -> None:
        self.runs = runs
        cc, snaps = runs.crosscoder, runs.snapshots
        self.prompts: list[tuple[CleanRun, CleanRun, int, int]] = []
        for batch in runs.batches:
            assert batch.patch is not None
            for b in range(len(batch)):
                clean, patch = (CleanRun.of(cc, snaps, tokens[b : b + 1]) for tokens in (batch.tokens, batch.patch))
                self.prompts.append((clean, patch, int(batch.correct[b]), int(batch.wrong[b])))

    def metrics(
        self, s: int, ids: list[int], keep: bool, baseline: str, error: bool, positions: list[int] | None = None
    ) -> list[float]:
        """Metric of every prompt."""
        cc, model = self.runs.crosscoder, self.runs.snapshots.model(s)
        edited = [i for i in range(F) if i not in ids] if keep else ids
        found: list[float] = []
        for run, patch, correct, wrong in self.prompts:
            new: Any = {"zero": 0.0, "mean": self.runs.mean_features(s), "patch": patch}[baseline]
            splice = Splice(cc, run, s, [Edit(edited, factor=0.0, value=new, positions=positions)], error=error)
            logits = model.run_with_hooks(run.tokens, fwd_hooks=splice.fwd_hooks, return_type="logits")[0, -1]
            found.append(float(logits[correct] - logits[wrong]))
        return found


@pytest.mark.parametrize(("tokens", "entries", "batch_size"), [(8192, 1 << 22, 256), (20, 70, 2)])
@pytest.mark.parametrize(
    ("architecture", "keep", "baseline", "error", "positions"),
    [
        ("batchtopk_crosscoder", False, "mean", False, [1, -1]),
        ("jumprelu_crosscoder", True, "patch", False, [-2, -1]),
    ],
)
def test_sets_of_any_size_at_some_positions_in_any_batches(
    snaps: Snapshots, task: Task, monkeypatch: pytest.MonkeyPatch, architecture: str, keep: bool, baseline: str,
    error: bool, positions: list[int], tokens: int, entries: int, batch_size: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(ablation, "BATCH_TOKENS", tokens)
    monkeypatch.setattr(ablation, "_ENTRIES", entries)
    runs = PromptRuns(make_crosscoder(snaps, architecture), snaps, task, batch_size=batch_size, paired=True)
    sets = [[], [3], [0, 5, 7, 9], list(range(F))]
    ids = [torch.tensor(each, dtype=torch.long) for each in sets]
    found = set_metrics(runs, 1, ids, keep=keep, baseline=baseline, error=error, positions=positions)
    slow = Spliced(runs)
    expected = [slow.metrics(1, each, keep, baseline, error, positions) for each in sets]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert found.std(0).max() > 1e-2, "the sets make no difference"


@pytest.mark.parametrize("baseline", ["zero", "patch"])
def test_exact_effects_are_single_ablations(snaps: Snapshots, task: Task, baseline: str) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")
    runs = PromptRuns(cc, snaps, task, paired=True)
    effects = exact_effects(runs, 2, torch.arange(F), baseline)
    pairs = list(zip(slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix"), strict=True))
    for feature in range(0, F, 2):
        drops = [run.metric(2) - run.without(2, feature, other.f[2] * (baseline == "patch")) for run, other in pairs]
        torch.testing.assert_close(effects[feature], torch.stack(drops).double().mean(), rtol=1e-4, atol=1e-5)
    ie = attribute(runs, "exact", baseline=baseline)
    torch.testing.assert_close(effects, ie.effects[:, 2], rtol=1e-6, atol=1e-6)


def test_nothing_below_the_hook_runs_and_unchanged_prompts_run_once(snaps: Snapshots) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")
    runs = PromptRuns(cc, snaps, Task.from_items("tiny", ITEMS), batch_size=1, paired=False)
    model, rows = snaps.model(1), Counter[int]()

    def count(block: int) -> Callable[..., None]:
        def note(_module: Any, inputs: Any, _output: Any) -> None:
            rows[block] += len(inputs[0])

        return note

    handles = [model.blocks[i].original_component.register_forward_hook(count(i)) for i in range(3)]
    sets = torch.arange(F)[:, None]
    set_metrics(runs, 1, sets[:0])  # the logits are compared now, once
    rows.clear()
    set_metrics(runs, 1, sets[:0])
    alone = Counter(rows)
    rows.clear()
    set_metrics(runs, 1, sets)
    for handle in handles:
        handle.remove()
    changed = sum(int((run.f[1] != 0).any(0).sum()) for run in slow_runs(snaps, cc))
    assert changed < F * len(ITEMS)
    assert rows[2] == alone[2] + changed
    assert rows[0] == alone[0] <= 1 and rows[1] == alone[1] <= 1  # the prompt whose logits are compared


# ---------------------------------------------------------------------- curves
def slow_error(values: Any, runs: PromptRuns) -> float:
    """Standard error of a mean over groups of prompts, group by group."""
    mean, left = sum(values) / len(values), [0.0] * runs.n_groups
    for value, group in zip(values, runs.groups.tolist(), strict=True):
        left[group] += float(value - mean)
    return math.sqrt(len(left) / (len(left) - 1) * sum(each**2 for each in left)) / len(values)


@pytest.mark.parametrize(("architecture", "keep"), [("standard_crosscoder", False), ("jumprelu_crosscoder", True)])
def test_curves_equal_a_slow_loop(snaps: Snapshots, task: Task, architecture: str, keep: bool) -> None:
    """Every number of the table, one prompt and one feature set at a time."""
    cc = make_crosscoder(snaps, architecture)
    ie = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), baseline="zero")
    runs = PromptRuns(cc, snaps, task, paired=True)
    slow, n_draws, level = Spliced(runs), 3, 0.5
    controls = Controls(n_draws=n_draws, level=level, seed=5)
    table = ablate(runs, ie, [1, 3], keep=keep, baseline="patch", controls=controls, at=[2])
    assert len(table) == 2 * 4
    assert list(table["features"]) == ["top", "random", "size_matched", "change_matched"] * 2
    size = {s: (runs.mean_features(s) * cc.decoder_norms[:, s]).tolist() for s in range(3)}
    for s in (2,):
        both = {
            "clean": slow.metrics(s, [], False, "patch", True),
            "reconstruction_only": slow.metrics(s, [], False, "patch", False),
            "all_edited": slow.metrics(s, list(range(F)), False, "patch", not keep),
        }
        active = (runs.active | runs.active_paired)[:, s].sum()
        kinds = draw_sets(
            runs, ie, s, [1, 3], by="magnitude" if keep else "signed", controls=controls, baseline="patch"
        )
        for kind in kinds:
            (row,) = table[(table.snapshot == s) & (table.features == kind.kind) & (table.k == kind.k)].to_dict(
                "records"
            )
            for name, values in both.items():
                assert row[name] == pytest.approx(np.mean(values), abs=1e-4), name
            metrics = np.array([slow.metrics(s, ids.tolist(), keep, "patch", not keep) for ids in kind.sets])
            over_draws = np.sort(metrics.mean(1))
            assert row["metric"] == pytest.approx(metrics.mean(), abs=1e-4)
            assert row["metric_se"] == pytest.approx(slow_error(metrics.mean(0), runs), abs=1e-4)
            changes = [np.mean([of_set[i] for of_set in metrics]) - both["clean"][i] for i in range(len(ITEMS))]
            assert row["change_se"] == pytest.approx(slow_error(changes, runs), abs=1e-4)
            assert row["size"] == pytest.approx(np.mean([sum(size[s][i] for i in ids) for ids in kind.sets]), rel=1e-4)
            assert row["n_features"] == (len(kind.sets[0]) if kind.kind == "change_matched" else row["k"])
            assert row["n_prompts"] == 4 and row["n_groups"] == runs.n_groups
            assert row["moved"] == pytest.approx(float(set_changes(runs, s, kind.sets, "patch").mean()))
            assert row["n_draws"] == len(kind.sets) and row["n_active"] == active
            assert (row["mode"], row["baseline"], row["error"]) == ("keep" if keep else "ablate", "patch", not keep)
            assert (row["label"], row["step"]) == (snaps.labels[s], snaps.steps[s])
            if kind.kind == "top":
                effects = ie.effects[:, s].abs() if keep else ie.effects[:, s]
                best = sorted(range(F), key=lambda i: -float(effects[i]))[: kind.k]
                assert kind.sets[0].tolist() == best
                assert all(math.isnan(row[name]) for name in ("metric_sd", "metric_low", "metric_high"))
            else:
                assert row["metric_sd"] == pytest.approx(over_draws.std(ddof=1), abs=1e-4)
                # of three sorted draws, the quartiles lie halfway between neighbours
                assert row["metric_low"] == pytest.approx(over_draws[:2].mean(), abs=1e-4)
                assert row["metric_high"] == pytest.approx(over_draws[1:].mean(), abs=1e-4)


def test_with_and_without_the_error_node(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    ie = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), baseline="zero")
    runs = PromptRuns(cc, snaps, task, paired=False)
    n = int(ie.active[:, 2].sum())
    rows = {
        (keep, error): ablate(runs, ie, [n], keep=keep, error=error, at=[-1], controls=()).iloc[0]
        for keep in (False, True)
        for error in (None, True, False)
    }
    assert {row["snapshot"] for row in rows.values()} == {2}
    assert rows[False, None]["error"] and not rows[True, None]["error"]
    clean, alone = rows[True, None]["clean"], rows[True, None]["reconstruction_only"]
    assert clean == pytest.approx(float(ie.metric_clean[2]), abs=1e-5) and abs(clean - alone) > 0.1
    # the set of all active features: all kept, or all ablated
    for (keep, _), row in rows.items():
        whole = clean if row["error"] else alone
        assert row["metric"] == pytest.approx(whole if keep else row["all_edited"], abs=1e-4)
    assert abs(rows[False, True]["all_edited"] - rows[False, False]["all_edited"]) > 0.1


def test_draws_depend_on_seed_snapshot_and_size_alone(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    ie = attribute(cc, snaps, task, Estimator("ig", n_nodes=2), baseline="zero")
    runs = PromptRuns(cc, snaps, task, paired=False)
    table = ablate(runs, ie, k=[1, 4], controls=Controls(n_draws=3, seed=1))
    assert table.equals(ablate(cc, snaps, task, ie, k=[1, 4], controls=Controls(n_draws=3, seed=1)))
    alone = ablate(runs, ie, k=[4], at=[2], controls=Controls(["size_matched"], n_draws=3, seed=1))
    same = table[(table.snapshot == 2) & (table.k == 4) & table.features.isin(["top", "size_matched"])].reset_index(
        drop=True
    )
    pd.testing.assert_frame_equal(alone, same)
    other = ablate(runs, ie, k=[1, 4], controls=Controls(n_draws=3, seed=2))
    drawn = table.features != "top"
    assert not np.allclose(table[drawn].metric, other[drawn].metric)
    random = Controls(["random"], n_draws=9)
    (first, second) = (draw_sets(runs, ie, s, [3], controls=random)[1].sets for s in (0, 1))
    assert runs.active[:, 0].equal(runs.active[:, 1]) and not torch.stack(first).equal(torch.stack(second))
    few, many = (draw_sets(runs, ie, 1, [3], controls=Controls(n_draws=n, seed=4)) for n in (2, 30))
    for one, more in zip(few, many, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.sets, more.sets, strict=False))


def test_features_that_an_edit_can_change(snaps: Snapshots, task: Task) -> None:
    """Patching also moves features that are active on the paired prompts alone."""
    runs = PromptRuns(make_crosscoder(snaps, "jumprelu_crosscoder"), snaps, task, paired=True)
    for active, ids in ((runs.active, [2, 5]), (runs.active_paired, [5, 7])):
        active[:, 1] = False
        active[ids, 1] = True
    for baseline, expected in (("zero", [2, 5]), ("mean", [2, 5]), ("patch", [2, 5, 7])):
        assert active_features(runs, 1, baseline).nonzero().flatten().tolist() == expected


def test_controls_are_active_features_outside_the_top_and_reach_all_of_them(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "jumprelu_crosscoder")
    runs = PromptRuns(cc, snaps, task, paired=False)
    ie = attribute(runs, Estimator("ig", n_nodes=1))
    runs.active[4:8, 0] = False
    runs.active[8:12, 1] = False
    for s in range(3):
        active = set(runs.active[:, s].nonzero().flatten().tolist())
        kinds = draw_sets(runs, ie, s, [3], controls=Controls(n_draws=200))
        top, random, matched, changing = (torch.stack(kind.sets) for kind in kinds)
        others = active - set(top.flatten().tolist())
        assert set(random.flatten().tolist()) == others
        assert all(len(set(row)) == 3 for row in random.tolist())
        assert set(matched.flatten().tolist()) <= others and set(changing.flatten().tolist()) <= others


def test_size_matched_sets_are_of_like_size_and_disjoint() -> None:
    sizes = torch.rand(60, generator=torch.Generator().manual_seed(0)).exp()
    top, others = torch.tensor([4, 40, 11]), torch.tensor([i for i in range(60) if i not in (4, 40, 11, 50)])
    sets = size_matched(top, others, sizes, 400, np.random.default_rng(0))
    assert sets.shape == (400, 3)
    assert set(sets.flatten().tolist()) <= set(others.tolist())
    assert all(len(set(row)) == 3 for row in sets.tolist())
    # at most two of the nearest are already drawn
    near = [
        others[(sizes[others].log() - sizes[i].log()).abs().argsort()[: NEIGHBOURS + 2]].tolist() for i in top.tolist()
    ]
    for row in sets.tolist():
        assert any(all(i in near[place] for i, place in zip(row, order, strict=True)) for order in _orders)
    alone = size_matched(top[:1], others, sizes, 400, np.random.default_rng(0))
    assert set(alone.flatten().tolist()) == set(near[0][:NEIGHBOURS])


_orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]


@pytest.mark.parametrize(("architecture", "baseline"), [("jumprelu_crosscoder", "patch"), ("topk_crosscoder", "zero")])
def test_changes_at_the_hook_equal_plain_decoders(
    snaps: Snapshots, task: Task, architecture: str, baseline: str
) -> None:
    cc = make_crosscoder(snaps, architecture)
    runs = PromptRuns(cc, snaps, task, paired=True, batch_size=3)
    items = [ITEMS[int(i)] for batch in runs.batches for i in batch.index]
    sets = [torch.tensor([], dtype=torch.long), torch.tensor([3]), torch.tensor([5, 1, 20]), torch.arange(F)]
    for s in (0, 2):
        found = set_changes(runs, s, sets, baseline)
        for ids, value in zip(sets, found.tolist(), strict=True):
            norms = []
            for item in items:
                clean, pair = (Slow(snaps, cc, {**item, "prefix": item[key]}) for key in ("prefix", "patch_prefix"))
                edited = clean.f[s].clone()
                edited[:, ids] = pair.f[s][:, ids] if baseline == "patch" else 0.0
                change = clean.decode(clean.f[s], s) - clean.decode(edited, s)
                norms.append(float(change[1:].norm()))  # the BOS is not edited
            assert value == pytest.approx(np.mean(norms), rel=1e-4, abs=1e-6)


def test_change_matched_sets_move_the_activation_as_much(snaps: Snapshots, task: Task) -> None:
    """The control by size does not: of the same size, features that differ between the pair move it more."""
    runs = PromptRuns(make_crosscoder(snaps, "standard_crosscoder"), snaps, task, paired=True)
    ie = attribute(runs, "gradient", baseline="patch")
    for s in range(3):
        kinds = {kind.kind: kind for kind in draw_sets(runs, ie, s, [3], controls=Controls(n_draws=20))}
        top, matched = kinds["top"], kinds["change_matched"]
        sizes = [kinds["change_matched"].sets[0][:n] for n in range(1, F - 3)]
        reached = float(set_changes(runs, s, sizes, "patch").max())
        if reached > 1.1 * top.moved:  # else all other features together do not move it as much
            assert matched.moved == pytest.approx(top.moved, rel=0.25)


def test_sizes_are_mean_activation_times_decoder_norm(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "jumprelu_crosscoder")
    runs, slow = PromptRuns(cc, snaps, task, paired=False), slow_runs(snaps, cc)
    for s in range(3):
        mean = torch.cat([run.f[s][1:] for run in slow]).mean(0)
        norm = cc.W_dec[:, s * snaps.d_model : (s + 1) * snaps.d_model].square().sum(-1).sqrt()
        torch.testing.assert_close(feature_sizes(runs, s), mean * norm, rtol=1e-4, atol=1e-6)


def test_smaller_sets_are_allowed_on_request(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")
    ie = attribute(cc, snaps, task, Estimator("ig", n_nodes=1), baseline="zero")
    runs = PromptRuns(cc, snaps, task, paired=False)
    n = int(ie.active[:, 1].sum())
    table = ablate(runs, ie, [n - 1, n, 99], at=[1], controls=Controls(n_draws=2, allow_fewer=True))
    found = table.pivot(index="k", columns="features", values="n_features")
    assert found.to_dict() == {
        "top": {n - 1: n - 1, n: n, 99: n},
        "random": {n - 1: 1, n: 0, 99: 0},
        "size_matched": {n - 1: 1, n: 0, 99: 0},
        "change_matched": {n - 1: 1, n: 0, 99: 0},
    }
    empty = table[(table.features == "size_matched") & (table.k == n)].iloc[0]
    assert empty["metric"] == pytest.approx(empty["clean"]) and empty["size"] == 0


def test_keeping_begins_at_the_empty_set(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")
    runs = PromptRuns(cc, snaps, task, paired=False)
    ie = attribute(runs, "gradient")
    table = ablate(runs, ie, [0, 2], keep=True, at=[2], controls=Controls(n_draws=2))
    empty = table[table["k"] == 0]
    assert empty["features"].tolist() == ["top"] and empty["n_features"].tolist() == [0]
    assert empty["metric"].item() == pytest.approx(empty["all_edited"].item()) and empty["size"].item() == 0
    assert faithfulness(table)[0] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- faithfulness
def curve(ks: list[int], metrics: list[float], **more: Any) -> pd.DataFrame:
    fixed = {
        "snapshot": 0, "label": "step0", "step": 0, "mode": "ablate", "baseline": "zero", "error": True, "clean": 4.0,
        "reconstruction_only": 3.0, "all_edited": -1.0, "n_active": 20, "features": "top",
    }  # fmt: skip
    table = pd.DataFrame({"k": ks, "n_features": ks, "metric": metrics, **fixed, **more})
    return table.assign(metric_low=table["metric"] - 0.5, metric_high=table["metric"] + 0.5)


def test_faithfulness_by_hand() -> None:
    table = pd.concat([
        curve([2, 9], [3.0, -2.0]),
        curve([2, 9], [3.0, -2.0], error=False),
        curve([2, 9], [0.0, 3.0], mode="keep", error=False),
        curve([2, 9], [0.0, 5.0], mode="keep"),
        curve([2], [4.0], all_edited=3.9),
    ])  # fmt: skip
    expected = [1 / 5, 6 / 5, 0, 5 / 4, 1 / 4, 1, 1 / 5, 6 / 5, math.nan]
    np.testing.assert_allclose(faithfulness(table), expected)
    np.testing.assert_allclose(faithfulness(table, floor=0.01)[-1], 0)


# ---------------------------------------------------------------------- errors
@pytest.fixture(scope="module")
def runs(snaps: Snapshots, task: Task) -> PromptRuns:
    return PromptRuns(make_crosscoder(snaps, "standard_crosscoder"), snaps, task, paired=False)


@pytest.fixture(scope="module")
def ie(runs: PromptRuns) -> Attribution:
    return attribute(runs, "gradient")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": ["randm"]}, "control 'randm' is unknown.*did you mean 'random'"),
        ({"baseline": "men"}, "baseline='men' is unknown.*did you mean 'mean'"),
        ({"baseline": "patch"}, r"baseline='patch' needs the paired prompts: make the runs with PromptRuns\("),
        ({"k": [0]}, r"k=\[0\] must be one or more numbers"),
        ({"k": []}, r"k=\[\] must be one or more numbers"),
        ({"k": [0, 2]}, r"k=\[0, 2\] must be one or more numbers, each at least 1"),
        ({"at": [3]}, r"snapshot 3 is not in \[-3, 2\]"),
        ({"k": [1, 25]}, "k=25 is more than the [0-9]+ features that are active on 'tiny' at step0: use k up to"),
        ({"k": [20], "controls": ["size_matched"]},
         "size_matched sets of k=20 need as many active features outside the set, and 'tiny' has [0-9] at step0: "
         "use a smaller k, leave out 'size_matched', or Controls[(]allow_fewer=True[)]"),
    ],
)  # fmt: skip
def test_errors_come_before_any_ablation(
    runs: PromptRuns, ie: Attribution, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "set_metrics", None)
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        ablate(runs, ie, **{"k": [1], **options})


def test_errors_of_controls_and_positions(runs: PromptRuns) -> None:
    with pytest.raises(UserError, match="n_draws=0 must be at least 1"):
        Controls(n_draws=0)
    with pytest.raises(UserError, match="level=1.0 must be between 0 and 1"):
        Controls(level=1.0)
    with pytest.raises(UserError, match=r"position -4 is not in \[-3, 2\]: the shortest prompt of 'tiny' has 3 tokens"):
        set_metrics(runs, 0, [torch.tensor([1])], positions=[-4])


def test_effects_of_another_crosscoder(snaps: Snapshots, task: Task, runs: PromptRuns, ie: Attribution) -> None:
    cc = runs.crosscoder
    with pytest.raises(UserError, match="24 features at snapshots a, b, c, but the crosscoder has 24 at step0, step10"):
        ablate(runs, replace(ie, labels=["a", "b", "c"]), [1])
    fewer = {name: getattr(ie, name)[1:] for name in ("effects", "standard_errors", "p", "active", "sizes")}
    with pytest.raises(UserError, match="effects cover 23 features at .* has 24 .*: attribute with this"):
        ablate(runs, replace(ie, **fewer), [1])
    with pytest.raises(UserError, match="trained on 3 snapshots, but 2 were given"):
        ablate(cc, snaps[[0, 2]], task, ie, [1])
    unpaired = Task.from_items("alone", [{key: item[key] for key in ("prefix", "correct", "wrong")} for item in ITEMS])
    with pytest.raises(UserError, match="'alone' has no paired prompts"):
        ablate(cc, snaps, unpaired, ie, [1], baseline="patch")


def test_errors_of_feature_sets(runs: PromptRuns) -> None:
    with pytest.raises(UserError, match=r"feature 24 is not in \[0, 23\]: give features of this crosscoder"):
        set_metrics(runs, 0, torch.tensor([[3, 24]]))
    with pytest.raises(UserError, match=r"feature -1 is not in \[0, 23\]"):
        exact_effects(runs, 0, torch.tensor([-1]))
    with pytest.raises(UserError, match="a feature is given twice"):
        set_metrics(runs, 0, torch.tensor([[3, 3]]))
    with pytest.raises(UserError, match=r"snapshot 3 is not in \[-3, 2\]"):
        set_metrics(runs, 3, torch.tensor([[3]]))
    with pytest.raises(UserError, match="needs the paired prompts"):
        set_metrics(runs, 0, torch.tensor([[3]]), baseline="patch")
