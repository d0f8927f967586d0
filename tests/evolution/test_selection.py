"""Similarity against plain loops and known answers; the proposal against all possible choices."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.evolution.selection import (
    Comparison,
    describe_doubtful,
    doubtful_snapshots,
    propose_snapshots,
    snapshot_similarity,
    untrained_steps,
)
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.snapshot import Snapshot


class Labels:
    """Snapshots of which only the labels are used."""

    def __init__(self, labels: list[str]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


class Given(Activations):
    """Given held-out activations."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        self.snapshots: Any = Labels([f"step{s}" for s in range(x.shape[1])])

    @property
    def d_model(self) -> int:
        return self.x.shape[-1]

    def held_out(self, batch_size: int = 4096) -> Any:
        return iter(self.x.split(min(batch_size, 5)))


# ---- similarity


@pytest.mark.parametrize(("B", "S", "D", "seed", "most"), [(12, 3, 4, 0, 4096), (30, 4, 2, 1, 13), (7, 2, 9, 2, 7)])
def test_similarities_match_plain_loops(B: int, S: int, D: int, seed: int, most: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, S, D, generator=generator) * torch.rand(S, 1, generator=generator) + torch.randn(
        D, generator=generator
    )
    table = snapshot_similarity(Given(x), max_tokens=most)
    used = x[:most].double().numpy()
    n = len(used)
    assert list(zip(table["snapshot"], table["other"], strict=True)) == [(s, t) for s in range(S) for t in range(s, S)]
    assert table["other_label"].tolist() == [f"step{t}" for t in table["other"]] and set(table["n"]) == {n}
    for row in table.to_dict("records"):
        a, b = used[:, row["snapshot"]], used[:, row["other"]]
        cosines = [u @ w / np.sqrt((u @ u) * (w @ w)) for u, w in zip(a, b, strict=True)]
        assert row["cosine"] == pytest.approx(np.mean(cosines))
        assert row["pearson"] == pytest.approx(np.mean([np.corrcoef(u, w)[0, 1] for u, w in zip(a, b, strict=True)]))
        # CKA from the Gram matrices of tokens, as HSIC
        centre = np.eye(n) - 1 / n
        k, m = (centre @ (y @ y.T) @ centre for y in (a, b))
        assert row["cka"] == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def test_cka_is_invariant_to_rotations_and_cosine_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator)
    turned = x @ torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q * 3 + 1
    found = snapshot_similarity(Given(torch.stack([x, turned, 2 * x], 1))).set_index(["snapshot", "other"])
    assert found.loc[(0, 1), "cka"] == pytest.approx(1, abs=1e-5) and abs(found.loc[(0, 1), "cosine"]) < 0.5
    assert found.loc[(0, 2), ["cosine", "pearson", "cka"]].tolist() == pytest.approx([1, 1, 1])
    assert found.loc[(1, 1), ["cosine", "pearson", "cka"]].tolist() == pytest.approx([1, 1, 1])


def test_real_activations(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    snaps = Snapshots.local(tiny_snapshots)
    acts = Activations(snaps, "blocks.1.hook_resid_post", Dataset(tiny_text, 1000, 16, 300))
    found = snapshot_similarity(acts, max_tokens=200)
    assert found["label"].unique().tolist() == ["step0", "step10", "step20"] and set(found["n"]) == {200}
    alike = found.set_index(["snapshot", "other"])["cka"]
    assert alike[0, 1] < 1 and alike[0, 2] < alike[1, 2] < 1
    chosen = propose_snapshots(found, 2, steps=snaps.steps)
    assert chosen["chosen"].tolist() == [True, False, True] and chosen["nearest"].tolist() == [
        "step0",
        "step20",
        "step20",
    ]


# ---- proposal


def similarity_of(alike: Any) -> pd.DataFrame:
    S = len(alike)
    rows = [
        {
            "snapshot": s,
            "other": t,
            "label": f"step{s}",
            "other_label": f"step{t}",
            "cka": alike[s][t],
            "cosine": alike[t][s],
        }
        for s in range(S)
        for t in range(s, S)
    ]
    return pd.DataFrame(rows)


def accuracy_of(n: int = 100, **curves: Any) -> pd.DataFrame:
    tables: list[pd.DataFrame] = []
    for task, values in curves.items():
        labels = [f"step{s}" for s in range(len(values))]
        tables.append(pd.DataFrame({"task": task, "snapshot": range(len(values)), "label": labels, "accuracy": values}))
    return pd.concat(tables).assign(n=n)


def random_similarity(S: int, seed: int) -> Any:
    """Of points on a random path."""
    steps = np.random.default_rng(seed).exponential(size=(S, 3)) * np.random.default_rng(seed + 1).choice(
        [0.1, 1], (S, 1)
    )
    path = steps.cumsum(0)
    return np.exp(-np.linalg.norm(path[:, None] - path, axis=-1))


@pytest.mark.parametrize(
    ("S", "k", "seed", "weight"), [(5, 2, 0, 0.5), (8, 3, 1, 0.5), (8, 5, 2, 0.0), (9, 4, 3, 1.0), (6, 6, 4, 0.3)]
)
def test_no_other_choice_is_better(S: int, k: int, seed: int, weight: float) -> None:
    alike = random_similarity(S, seed)
    rng = np.random.default_rng(seed)
    curves = {task: np.sort(rng.uniform(0.4, 1, S)) for task in ("a", "b")}
    table = propose_snapshots(similarity_of(alike), k, accuracy_of(**curves), weight=weight)
    distance = np.zeros((S, S))
    far, apart = np.zeros((S, S)), np.zeros((S, S))
    for s in range(S):
        for t in range(S):
            far[s, t] = 1 - alike[s, t] if s != t else 0
            squares = [(c[s] - c[t]) ** 2 - c[s] * (1 - c[s]) / 100 - c[t] * (1 - c[t]) / 100 for c in curves.values()]
            apart[s, t] = np.sqrt(max(0, np.mean(squares))) if s != t else 0
    distance = (1 - weight) * far / far.max() + weight * apart / apart.max()

    def cost(chosen: tuple[int, ...]) -> float:
        total = 0.0
        for a, b in zip(chosen, chosen[1:], strict=False):
            total += sum(min(distance[a, j], distance[b, j]) for j in range(a + 1, b))
        return total

    choices = [(0, *middle, S - 1) for middle in combinations(range(1, S - 1), k - 2)]
    best = min(cost(choice) for choice in choices)
    chosen = tuple(np.flatnonzero(table["chosen"]).tolist())
    assert len(chosen) == k and cost(chosen) == pytest.approx(best)
    assert table["distance"].sum() == pytest.approx(best) and (table.loc[table["chosen"], "distance"] == 0).all()
    for place in range(1, k - 1):
        without = chosen[:place] + chosen[place + 1 :]
        assert table.loc[chosen[place], "cost"] == pytest.approx(cost(without) - best)
    assert table.loc[[0, S - 1], "cost"].isna().all()


def test_the_table_says_why() -> None:
    """Three plateaus of three snapshots: one of each is chosen, and the accuracy rises before the middle one."""
    level = np.repeat([0, 1, 2], 3)
    alike = 1 - 0.4 * abs(level[:, None] - level) - 0.01 * abs(np.arange(9)[:, None] - np.arange(9))
    table = propose_snapshots(
        similarity_of(alike),
        3,
        accuracy_of(agreement=[0.5] * 3 + [0.95] * 6, flat=[0.6] * 9),
        steps=[10 * s for s in range(9)],
    )
    assert np.flatnonzero(table["chosen"]).tolist() == [0, 4, 8]
    assert table["nearest"].tolist() == ["step0"] * 3 + ["step4"] * 3 + ["step8"] * 3
    assert table["stands_for"].tolist()[4] == "step3, step4, step5" and table["stands_for"].iloc[1] == ""
    assert table["step"].tolist() == [10 * s for s in range(9)]
    assert table["previous_similarity"].iloc[1:].tolist() == pytest.approx([alike[s - 1, s] for s in range(1, 9)])
    reasons = table["reason"].tolist()
    assert reasons[0] == "the first snapshot; stands for 2 others"
    assert (
        "cka 0.56 to step0, the one chosen before" in reasons[4]
        and "accuracy on agreement 50% to 95% since then" in reasons[4]
    )
    assert "without it the summed distance grows by" in reasons[4] and reasons[8].startswith("the last snapshot")
    assert "accuracy" not in reasons[8] and reasons[1] == ""
    assert table["accuracy/agreement"].tolist() == [0.5] * 3 + [0.95] * 6


def test_differences_in_accuracy_within_chance_do_not_count() -> None:
    alike = np.ones((5, 5)) - 0.1 * (1 - np.eye(5))
    noise = accuracy_of(n=50, task=[0.5, 0.52, 0.48, 0.51, 0.5])
    assert propose_snapshots(similarity_of(alike), 3, noise, weight=1.0)["distance"].sum() == 0
    sure = accuracy_of(n=50, task=[0.5, 0.52, 0.98, 0.97, 0.99])
    assert (
        propose_snapshots(similarity_of(alike), 2, sure, weight=1.0)["nearest"].tolist()
        == ["step0"] * 2 + ["step4"] * 3
    )


def test_the_named_measure_is_used() -> None:
    one, other = random_similarity(7, 0), random_similarity(7, 5)
    alike = np.triu(one) + np.tril(other, -1)  # the upper half is cka, the lower one cosine
    table = similarity_of(alike)
    for measure, expected in (("cka", one), ("cosine", other)):
        found = propose_snapshots(table, 4, measure=measure)
        pd.testing.assert_frame_equal(
            found.drop(columns="reason"),
            propose_snapshots(similarity_of(expected), 4, measure="cka").drop(columns="reason"),
        )


def test_errors() -> None:
    table, accuracy = similarity_of(random_similarity(4, 0)), accuracy_of(task=[0.5, 0.6, 0.7])
    for arguments, options, message in (
        ((table, 1), {}, r"k=1 is not in \[2, 4\]"),
        ((table, 5), {}, r"k=5 is not in \[2, 4\]"),
        ((table, 2), {"measure": "rbf"}, "measure='rbf' is unknown: use 'cosine', 'pearson', 'cka'"),
        ((table, 2), {"weight": 2}, r"weight=2 is not in \[0, 1\]"),
        ((table, 2), {"steps": [1]}, "1 steps for 4 snapshots"),
        (
            (table, 2, accuracy),
            {},
            "accuracy on 'task' has the snapshots step0, step1, step2, similarity has step0,",
        ),
        ((table.iloc[[0, 1, 3, 9]], 2), {}, "cka is missing for some pairs of the 4 snapshots"),
    ):
        with pytest.raises(UserError, match=message):
            propose_snapshots(*arguments, **options)
    with pytest.raises(UserError, match="similarity needs at least 2 snapshots, but there is only 1"):
        snapshot_similarity(Given(torch.ones(4, 1, 3)))
    with pytest.raises(UserError, match="max_tokens=1 must be 2 or more"):
        snapshot_similarity(Given(torch.ones(4, 2, 3)), max_tokens=1)
    with pytest.raises(UserError, match=r"1 token\(s\) are held out"):
        snapshot_similarity(Given(torch.ones(1, 2, 3)))


def test_doubtful_snapshots_are_named_with_reasons() -> None:
    draw = torch.Generator().manual_seed(0)
    low = torch.randn(300, 3, generator=draw) @ torch.randn(3, 12, generator=draw)
    spread = torch.randn(300, 12, generator=draw)
    other, last = (torch.randn(300, 3, generator=draw) @ torch.randn(3, 12, generator=draw) for _ in range(2))
    x = torch.stack([spread, low, low * 2 + 1e-3 * spread, other, last], 1)
    acts = Given(x)
    acts.snapshots = Snapshots([Snapshot(f"step{n}", n, None, name="x") for n in (1, 8, 16, 64, 512)], "x")
    table = doubtful_snapshots(acts, min_similarity=0.0)
    for s in range(5):
        values = torch.linalg.eigvalsh(torch.cov(x[:, s].double().T))
        expected = float(values.sum() ** 2 / values.square().sum())
        assert table["participation_ratio"][s] == pytest.approx(expected, rel=1e-6)
    assert table["reason"][0].startswith("as if untrained (participation ratio 1")
    assert table["reason"][2] == "nearly equal to step8 (CKA 1.000)"
    assert table["reason"].tolist()[1::2] == ["", ""] and table["reason"][4] == ""
    similarity = snapshot_similarity(acts).set_index(["snapshot", "other"])["cka"]
    for s in range(5):
        expected = [similarity[t, s] for t in range(s)] + [similarity[s, 4]] * (s < 4)
        assert table["similarity"][s] == max(expected)
    lines = describe_doubtful(table)
    assert lines[-1] == "to leave these out: --steps 8,64,512" and len(lines) == 3
    share = torch.full((7, 5), 0.1)
    share[:, 3] = 0.61
    share[0] = torch.nan
    read = doubtful_snapshots(acts, share, min_similarity=0.0)
    assert read["reason"][3] == "most features are read from it (median encoder share 61%, 3/S = 60%)"
    assert read["encoder_share"].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.61, 0.1])
    assert describe_doubtful(table[table["reason"] == ""]) == []
    # of two that are nearly equal the earlier one goes, if the other is the last
    acts.x = torch.cat([x[:, :4], x[:, 3:4] * 2], 1)
    given = doubtful_snapshots(acts, min_similarity=0.0)
    assert given["reason"][3:].tolist() == ["nearly equal to step512 (CKA 1.000)", ""]


@pytest.mark.parametrize(("ratio", "named"), [(1.45, False), (1.55, True)])
def test_a_snapshot_of_half_as_many_directions_more_than_the_last_is_as_if_untrained(ratio: float, named: bool) -> None:
    acts = Given(torch.randn(60, 3, 8, generator=torch.Generator().manual_seed(0)))
    acts.snapshots = Snapshots([Snapshot(f"step{n}", n, None, name="x") for n in (8, 64, 512)], "x")
    comparison = Comparison(snapshot_similarity(acts), np.array([4 * ratio, 4.0, 4.0]))
    reason = doubtful_snapshots(acts, comparison=comparison, min_similarity=0.0)["reason"][0]
    assert reason.startswith("as if untrained (participation ratio") == named


def test_a_snapshot_that_shares_nothing_with_the_others_is_named() -> None:
    draw = torch.Generator().manual_seed(0)
    alone, shared, noise = (torch.randn(400, 12, generator=draw) for _ in range(3))
    x = torch.stack([alone, shared, shared + noise, shared + 0.5 * noise], 1)
    acts = Given(x)
    acts.snapshots = Snapshots([Snapshot(f"step{n}", n, None, name="x") for n in (16, 64, 128, 512)], "x")
    similarity = snapshot_similarity(acts).set_index(["snapshot", "other"])["cka"]
    most = max(similarity[0, t] for t in (1, 2, 3))
    found = f"next to nothing in common with any other (CKA {most:.2f} at most)"
    assert doubtful_snapshots(acts)["reason"].tolist() == [found, "", "", ""]
    assert doubtful_snapshots(acts, min_similarity=0.0)["reason"].tolist() == [""] * 4
    # the last one stands for the trained model, and of two neither is chosen
    for kept in ([1, 2, 0], [0, 1]):
        acts.x = x[:, kept]
        acts.snapshots = Snapshots([Snapshot(f"step{n}", n, None, name="x") for n in range(1, len(kept) + 1)], "x")
        assert doubtful_snapshots(acts)["reason"].tolist() == [""] * len(kept)


def test_a_snapshot_before_the_first_training_took_effect_is_named() -> None:
    """The participation ratio falls and rises again, so the first is about that of the last."""
    draw = torch.Generator().manual_seed(1)
    base = torch.randn(500, 24, generator=draw)
    spectra = [torch.ones(24), 0.1 ** torch.arange(24), 0.7 ** torch.arange(24), torch.ones(24)]
    x = torch.stack([torch.randn(500, 24, generator=draw), *(base * spectrum.sqrt() for spectrum in spectra[1:])], 1)
    acts = Given(x)
    acts.snapshots = Snapshots([Snapshot(f"step{n}", n, None, name="x") for n in (16, 64, 128, 512)], "x")
    table = doubtful_snapshots(acts, min_similarity=0.0)
    ratios = table["participation_ratio"]
    assert ratios[1] < ratios[2] / 3 and ratios[2] < ratios[3] and ratios[0] < 1.5 * ratios[3]
    found = f"before the first training took effect (participation ratio {ratios[0]:.1f}, {ratios[1]:.1f} at step64)"
    assert table["reason"].tolist() == [found, "", "", ""]
    assert doubtful_snapshots(acts, min_similarity=0.0, max_fall=100.0)["reason"].tolist() == [""] * 4
    assert describe_doubtful(table)[-1] == "to leave these out: --steps 64,128,512"


@pytest.mark.parametrize("seed", range(4))
def test_doubtful_snapshots_are_not_proposed(seed: int) -> None:
    alike = random_similarity(7, seed)
    doubtful = pd.DataFrame({"snapshot": range(7), "reason": ["untrained (step 0)", "", "", "odd", "", "", ""]})
    curves = np.random.default_rng(seed).random(7)
    table = propose_snapshots(
        similarity_of(alike),
        4,
        accuracy_of(task=curves),
        steps=range(7),
        doubtful=doubtful.sample(frac=1, random_state=0),
    )
    kept = [1, 2, 4, 5, 6]
    left = [[alike[s][t] for t in kept] for s in kept]
    names = {f"step{i}": f"step{s}" for i, s in enumerate(kept)}
    alone = propose_snapshots(similarity_of(left), 4, accuracy_of(task=curves[kept]))
    of_kept = table.loc[kept].reset_index(drop=True)
    assert of_kept["chosen"].tolist() == alone["chosen"].tolist()
    assert of_kept["nearest"].tolist() == alone["nearest"].map(names).tolist()
    assert of_kept["distance"].tolist() == pytest.approx(alone["distance"].tolist())
    assert of_kept["cost"].tolist() == pytest.approx(alone["cost"].tolist(), nan_ok=True)
    assert table["reason"][[0, 3]].tolist() == ["left out: untrained (step 0)", "left out: odd"]
    assert table.loc[[0, 3], ["nearest", "distance"]].isna().all(axis=None) and not table["chosen"][[0, 3]].any()
    assert table["reason"][1].startswith("the first snapshot that is not doubtful")
    assert table["reason"][6].startswith("the last snapshot;")
    assert propose_snapshots(similarity_of(alike), 7, doubtful=doubtful)["chosen"].sum() == 5
    hopeless = doubtful.assign(reason="odd")
    everything = propose_snapshots(similarity_of(alike), 7, doubtful=hopeless)
    assert everything["chosen"].all() and not everything["reason"].str.contains("left out").any()
    with pytest.raises(UserError, match="doubtful has 2 snapshots, similarity has 7"):
        propose_snapshots(similarity_of(alike), 3, doubtful=doubtful[:2])


def test_step_0_is_untrained_and_unknown_steps_are_not_printed() -> None:
    draw = torch.Generator().manual_seed(1)
    acts = Given(torch.randn(50, 1, 4, generator=draw) + 0.5 * torch.randn(50, 3, 4, generator=draw))
    for steps, last in (((0, 1, 2), "to leave these out: --steps 1,2"), ((0, None, 2), None)):
        acts.snapshots = Snapshots([Snapshot(f"s{i}", n, None, name="x") for i, n in enumerate(steps)], "x")
        lines = describe_doubtful(doubtful_snapshots(acts))
        assert lines == ["s0: untrained (step 0)", *([last] if last else [])]
        assert untrained_steps(acts.snapshots.labels, list(steps)) == lines
    assert untrained_steps(["a", "b"], [None, 5]) == []
