"""Late values in earlier snapshots: against slow loops over plain transformers, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import polar

from crosslens.causal.attribution import exact_effects
from crosslens.causal.read_out import _least_squares, _rotation, _table, read_by_last, read_out
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.snapshots.collection import Snapshots
from crosslens.stats import resample_counts
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, make_crosscoder, slow_runs


@pytest.mark.parametrize("architecture", ["topk_crosscoder", "jumprelu_crosscoder"])
def test_effects_equal_a_plain_splice(snaps: Snapshots, task: Task, architecture: str) -> None:
    """One prompt and one feature at a time, by hand-written hooks in plain transformers."""
    cc = make_crosscoder(snaps, architecture)
    runs = PromptRuns(cc, snaps, task, paired=True)
    ids = runs.features[:3].tolist()
    found = read_out(runs, ids, n_random=2)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    order = [i for batch in runs.batches for i in batch.index.tolist()]
    assert sorted(order) == list(range(len(ITEMS)))
    L = len(snaps) - 1
    W, c = cc.W_dec_by_snapshot, cc.activation_scale
    for s in range(len(snaps)):
        for which in [*[[i] for i in ids], ids]:
            drops: list[float] = []
            for run, other in zip(slow, paired, strict=True):
                x = run.acts[:, s].clone()
                for i in which:
                    row = W[i, s] / W[i, s].norm() * W[i, L].norm() / c[s]
                    x += (other.f[L][:, i] - run.f[L][:, i])[:, None] * row
                drops.append(float(run.metric(s) - run.metric(s, x)))
            rows = found[found["feature"].isna()] if which is ids else found[found["feature"] == which[0]]
            row = rows[rows["snapshot"] == s].iloc[0]
            assert row["effect"] == pytest.approx(np.mean(drops), abs=1e-4)
            assert (row["label"], row["step"]) == (snaps.labels[s], snaps.steps[s])


def test_at_the_last_snapshot_a_feature_is_exchanged_exactly(snaps: Snapshots) -> None:
    """With one prompt in four groups the effect is sure wherever there is one."""
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    task = Task.from_items("one", [{**ITEMS[0], "wrong": wrong, "group": wrong} for wrong in ("likes", "finds", ".")])
    runs = PromptRuns(cc, snaps, task, paired=True)
    last = len(snaps) - 1
    found = read_out(runs, runs.features)
    at_last = found[found["feature"].notna() & (found["snapshot"] == last)]
    exact = exact_effects(runs, last, runs.features, "patch", "clean")
    assert at_last["effect"].to_numpy() == pytest.approx(exact.numpy(), abs=1e-5)
    sure = at_last["effect"].abs() > 2 * at_last["effect_se"]
    assert (
        sure.any() and at_last["share"].notna().tolist() == sure.tolist() and not at_last.loc[~sure, "read_out"].any()
    )
    assert at_last.loc[sure, ["share", "share_low", "share_high"]].to_numpy() == pytest.approx(1)
    assert at_last.loc[sure, "mapped_share"].to_numpy() == pytest.approx(1, abs=1e-3)


def test_the_rotation_is_found_and_leaves_the_rest(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    runs = PromptRuns(cc, snaps, task, paired=True)
    D, last = cc.d_model, len(snaps) - 1
    torch.testing.assert_close(_rotation(runs, last), torch.eye(D).double(), atol=1e-6, rtol=0)
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0)))[0]
    acts = [part[last] for part in runs._clean.acts]
    for part, late in zip(runs._clean.acts, acts, strict=True):
        part[0] = late @ turn
    found = _rotation(runs, 0)
    torch.testing.assert_close(found @ found.T, torch.eye(D).double(), atol=1e-6, rtol=0)
    x = torch.cat([late.flatten(0, 1) for late in acts[: len(runs.batches)]]).double()
    x = (x - x.mean(0))[:3]
    assert torch.cosine_similarity(x @ found, x @ turn.double()).min() > 0.9


def test_least_squares_are_those_of_the_normal_equations() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 5, generator=g).double() for _ in range(2))
    lam = 0.1 * float((x**2).sum()) / 5
    for i in range(5):
        expected = np.linalg.lstsq(
            np.vstack([x.numpy(), lam**0.5 * np.eye(5)]), np.append(y[:, i].numpy(), np.zeros(5)), rcond=None
        )[0]
        assert _least_squares(x, y, 0.1)[:, i].numpy() == pytest.approx(expected)


def test_activations_of_the_last_snapshot_are_read_by_it(snaps: Snapshots) -> None:
    """The last row maps a snapshot to itself; its metric is near the clean one, and others are given beside it."""
    nouns = ["cat", "dog", "king", "child", "house", "bread"]
    items = [
        {"prefix": f"the {a}{end}", "correct": "sees", "wrong": "likes", "group": a}
        for a in nouns
        for end in ("", " near the house", " sees a", " likes the bread")
    ]
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    runs = PromptRuns(cc, snaps, Task.from_items("many", items), paired=False)
    found = read_by_last(runs, ridge=1e-4)
    last = len(snaps) - 1
    clean = torch.cat([batch.metric(batch.clean) for batch in runs.at(last)])
    row = found.iloc[-1]
    assert row["share"] == 1 and row["metric"] == pytest.approx(float(clean.mean()), abs=0.3 * float(clean.std()))
    assert abs(row["accuracy"] - float((clean > 0).double().mean())) <= 0.25
    assert found["snapshot"].tolist() == list(range(len(snaps))) and found["label"].tolist() == list(snaps.labels)


def test_what_cannot_be_exchanged_is_refused(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "batchtopk_crosscoder")
    with pytest.raises(UserError, match="no paired prompts"):
        read_out(PromptRuns(cc, snaps, task, paired=False), [0])
    with pytest.raises(UserError, match="n_random=0"):
        read_out(cc, snaps, task, [0], n_random=0)
    with pytest.raises(UserError, match="feature 24 is not in"):
        read_out(cc, snaps, task, [24])
    one = Task.from_items("one", [{**ITEMS[0], "group": "x"}, {**ITEMS[1], "group": "x"}])
    with pytest.raises(UserError, match="one group"):
        read_by_last(PromptRuns(cc, snaps, one, paired=False))


@pytest.mark.parametrize(("m", "seed"), [(1, 0), (4, 1), (7, 2)])
def test_shares_are_those_of_plain_loops(snaps: Snapshots, m: int, seed: int) -> None:
    """Shares, their intervals over groups, and what is read out, from effects that are drawn."""
    cc, rng, S = make_crosscoder(snaps, "batchtopk_crosscoder"), np.random.default_rng(seed), len(snaps)
    nouns = ["cat", "dog", "king", "child", "house", "bread"]
    items = [
        {"prefix": f"the {a}{end}", "correct": "sees", "wrong": "likes", "group": a}
        for a in nouns
        for end in ("", " near the house", " sees a")[: 1 + len(a) % 3]
    ]
    runs = PromptRuns(cc, snaps, Task.from_items("many", items), paired=False)
    group, N, ids = runs.groups.tolist(), len(runs), torch.arange(m)
    own, mapped = (rng.normal(size=(m + 1, S, N)) + rng.uniform(-1, 3, (m + 1, S, 1)) for _ in range(2))
    random = rng.uniform(0, 0.6, (m + 1, S))
    found = _table(runs, ids, own, mapped, random)
    draws = resample_counts(runs.n_groups, 500, 0)
    sizes = np.bincount(group)
    for i in range(m + 1):
        rows = found[found["feature"].isna()] if i == m else found[found["feature"] == i]
        sums = np.bincount(group, own[i, -1])
        spread = sum((sums[g] - sizes[g] * own[i, -1].mean()) ** 2 for g in range(len(sizes)))
        se = (len(sizes) / (len(sizes) - 1) * spread) ** 0.5 / N
        assert rows["effect_se"].iloc[-1] == pytest.approx(se)
        for s in range(S):
            row = rows.iloc[s]
            if abs(own[i, -1].mean()) <= 2 * se:
                assert np.isnan(row["share"]) and np.isnan(row["share_low"]) and not row["read_out"]
                continue
            read = False
            for name, values in (("share", own[i, s]), ("mapped_share", mapped[i, s])):
                share = values.mean() / own[i, -1].mean()
                drawn = [
                    sum(values[n] * one[group[n]] for n in range(N))
                    / sum(own[i, -1, n] * one[group[n]] for n in range(N))
                    for one in draws
                ]
                low, high = np.quantile(drawn, [0.025, 0.975])
                assert row[[name, f"{name}_low", f"{name}_high"]].tolist() == pytest.approx([share, low, high])
                read |= share >= max(0.1, row["random_share"]) and low > 0
            assert row["random_share"] == pytest.approx(random[i, s] / abs(own[i, -1].mean()))
            assert row["read_out"] == read


@pytest.mark.parametrize("architecture", ["batchtopk_crosscoder", "jumprelu_crosscoder"])
def test_mapped_and_random_directions_equal_plain_splices(snaps: Snapshots, architecture: str) -> None:
    """The rotation from a polar decomposition, the same draws, and one prompt at a time."""
    cc, L = make_crosscoder(snaps, architecture), len(snaps) - 1
    items = [{**ITEMS[0], "wrong": wrong, "group": wrong} for wrong in ("likes", "finds", ".")]
    runs = PromptRuns(cc, snaps, Task.from_items("one", items), paired=True)
    ids = [int(i) for i in runs.features]
    found = read_out(runs, ids, n_random=3, seed=4)
    slow = slow_runs(snaps, cc, items=items)
    paired = slow_runs(snaps, cc, "patch_prefix", items=items)
    unit = torch.randn(3, len(ids), cc.d_model, generator=torch.Generator().manual_seed(4))
    unit /= unit.norm(dim=-1, keepdim=True)
    W, c = cc.W_dec_by_snapshot, cc.activation_scale
    compared = 0
    for s in range(len(snaps)):
        late, here = (np.concatenate([run.acts[1:, at].double().numpy() for run in slow]) for at in (L, s))
        shared = (late - late.mean(0)).T @ (here - here.mean(0))
        turn = torch.from_numpy(polar(shared + 1e-3 * np.linalg.norm(shared, 2) * np.eye(len(shared)))[0]).float()

        def drop(i: int, row: torch.Tensor, s: int = s) -> float:
            drops: list[float] = []
            for run, other in zip(slow, paired, strict=True):
                change = (other.f[L][:, i] - run.f[L][:, i])[:, None] * row * W[i, L].norm() / c[s]
                drops.append(float(run.metric(s) - run.metric(s, run.acts[:, s] + change)))
            return float(np.mean(drops))

        for place, i in enumerate(ids):
            rows = found[found["feature"] == i]
            if rows["share"].isna().any() or abs(rows["effect"].iloc[-1]) < 1e-3 or compared >= 9:
                continue
            row, full = rows.iloc[s], rows["effect"].iloc[-1]
            turned = W[i, L] @ turn
            assert row["mapped_share"] * full == pytest.approx(drop(i, turned / turned.norm()), abs=2e-4)
            control = np.sqrt(np.mean([drop(i, one[place]) ** 2 for one in unit]))
            assert row["random_share"] * abs(full) == pytest.approx(control, abs=2e-4)
            compared += 1
    assert compared >= 3
