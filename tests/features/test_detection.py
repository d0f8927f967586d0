"""Scores of labels against plain loops, libraries, and exact coverage."""

from __future__ import annotations

from collections import Counter
from math import log

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

from crosslens.features.detection import (
    BATCH,
    Passage,
    balanced_accuracy,
    choose_controls,
    detection_prompts,
    local_labels,
    local_text,
    local_verdicts,
    read_passages,
    read_verdicts,
    score,
)
from crosslens.features.labels import describe_labels, summarise_labels, weighted_kappa


@pytest.mark.parametrize(("n1", "n0", "seed"), [(20, 20, 0), (7, 13, 1), (4, 1, 2), (3, 5, 3), (1, 9, 4)])
def test_scores_in_loops(n1: int, n0: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    passages = [Passage((), float(a)) for a in [*rng.permutation(n1) + 0.5, *[0.0] * n0]]
    passages = [passages[i] for i in rng.permutation(n1 + n0)]
    verdicts: list[bool | None] = [None if u < 0.15 else bool(u < 0.6) for u in rng.random(n1 + n0)]
    verdicts[[p.activation > 0 for p in passages].index(True)] = True
    verdicts[[p.activation > 0 for p in passages].index(False)] = True
    found = score(passages, verdicts)
    pairs = [(p.activation, v) for p, v in zip(passages, verdicts, strict=True) if v is not None]
    assert found["n"] == len(pairs)
    assert found["score"] == pytest.approx(balanced_accuracy_score([a > 0 for a, _ in pairs], [v for _, v in pairs]))
    passed = [not v for a, v in pairs if a == 0]
    assert found["inactive"] == pytest.approx(sum(passed) / len(passed))
    hits = [v for a, v in sorted(pairs) if a > 0]
    size, more = divmod(len(hits), 4)  # the first quarters have one more
    for q, name in enumerate(("weakest", "weak", "strong", "strongest")):
        begin = q * size + min(q, more)
        part = hits[begin : begin + size + (q < more)]
        assert found[name] == pytest.approx(sum(part) / len(part) if part else float("nan"), nan_ok=True)
    assert found["low"] <= found["score"] <= found["high"]


def test_scores_of_nothing() -> None:
    for passages in ([], [Passage((), 1.0)], [Passage((), 0.0)]):
        found = score(passages, [True] * len(passages))
        assert found["n"] == len(passages) and np.isnan([found["score"], found["low"], found["high"]]).all()


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_of_balanced_accuracy(level: float) -> None:
    # Newcombe (1998), table II (a), method 10: 56/70 - 48/80
    value, low, high = balanced_accuracy(56, 70, 80 - 48, 80)
    assert [2 * end - 1 for end in (value, low, high)] == pytest.approx([0.2, 0.0524, 0.3339], abs=5e-5)
    assert all(0 <= end <= 1 for k in (0, 3, 10) for m in (0, 10) for end in balanced_accuracy(k, 10, m, 10, level))


@pytest.mark.parametrize(("n1", "n0"), [(20, 20), (10, 20)])
def test_coverage(n1: int, n0: int) -> None:
    """Over all outcomes, weighted by their probability; lowest where 10 passages are nearly all found."""
    ends = {(k, m): balanced_accuracy(k, n1, m, n0)[1:] for k in range(n1 + 1) for m in range(n0 + 1)}
    covered: list[float] = []
    for p in (0.5, 0.7, 0.9, 0.97):
        for q in (0.3, 0.5, 0.8, 0.95):
            first, second = binom.pmf(range(n1 + 1), n1, p), binom.pmf(range(n0 + 1), n0, q)
            inside = (first[k] * second[m] for (k, m), (low, high) in ends.items() if low <= (p + q) / 2 <= high)
            covered.append(float(sum(inside)))
    assert min(covered) > 0.9 and np.mean(covered) > 0.945


@pytest.mark.parametrize("seed", range(3))
def test_controls_in_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rates = {int(f): float(r) for f, r in zip(rng.permutation(40), rng.random(40) ** 3, strict=True)}
    labels = {f: f"label {f % 7}" for f in sorted(rates)[:-4]} | {99: "without a rate"}
    rates[0] = 0.0
    found = choose_controls(labels, rates, seed)
    eligible = [f for f in labels if rates.get(f, 0) > 0]
    assert set(found) == set(eligible)
    for f, control in found.items():
        gap = {g: abs(log(rates[g] / rates[f])) for g in eligible if labels[g] != labels[f]}
        assert control in sorted(gap, key=lambda g: gap[g])[:5]
    backwards = dict(reversed(labels.items()))
    assert choose_controls(backwards, rates, seed) == found != choose_controls(labels, rates, seed + 1)
    known = {f: eligible[0] for f in eligible}
    kept = choose_controls(labels, rates, seed, known)
    for f in eligible:
        assert kept[f] == (eligible[0] if labels[f] != labels[eligible[0]] else found[f])
    assert choose_controls({1: "a", 2: "a"}, rates, seed) == {}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ('{"1": 1, "2": 0, "3": 1}', [True, False, True]),
        ('Sure:\n```json\n{"3": false, "1": true, "2": 0}\n```', [True, False, False]),
        ('{"1": 1, "2": 0}', None),
        ('{"1": 1, "2": 0, "3": 1, "4": 1}', None),
        ('{"1": 1, "2": 0, "3": 2}', None),
        ('{"1": 1, "2": 0, "3": "1"}', None),
        ('{"1": 1, "2": 0, "3": 1.0}', None),
        ('{"1": 1, "2": 0, "3": null}', None),
        ('{"a": 1, "b": 0, "c": 1}', None),
        ("[1, 0, 1]", None),
        ("1\n0\n1", None),
        ('{"1": 1, "2"', None),
        ('{"1":' * 100_000, None),
        ("", None),
    ],
)
def test_reading_verdicts(text: str, want: list[bool] | None) -> None:
    assert read_verdicts(text, 3) == want


def test_prompts() -> None:
    passages = [Passage((f" w{i}", '"}\n{"passage": 9', "half \ud800"), 0.0) for i in range(BATCH + 3)]
    prompts = detection_prompts("the label", passages)
    assert [len(prompt.user.split("\n")) for prompt in prompts] == [BATCH + 1, 4]
    assert prompts[1].user.split("\n")[0] == '{"description": "the label"}'
    assert prompts[1].user.split("\n")[1] == (
        '{"passage": 1, "text": " w20\\"}\\n{\\"passage\\": 9half ?"}'
    )  # a passage cannot end its line
    prompts[1].user.encode()


def make_tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    rows = [
        {"feature": f, "active": active, "rank": r, "sequence": 3 * r + f, "begin": r % 2, "end": 4,
         "activation": active * (1.0 + r), "rate": 0.1 * (f + 1)}
        for f in (0, 2) for active in (True, False) for r in range(4)
    ]  # fmt: skip
    tokens = [{"sequence": n, "position": t, "token": f" {n}.{t}"} for n in range(20) for t in range(5)]
    return pd.DataFrame(rows), pd.DataFrame(tokens).sample(frac=1, random_state=0).astype({"token": "category"})


def test_reading_passages() -> None:
    passages, tokens = make_tables()
    found, rates = read_passages(passages, tokens, [2, 7], 6, seed=1)
    assert list(found) == [2] and rates == pytest.approx({0: 0.1, 2: 0.3})  # controls need the rates of all
    want = [
        (tuple(f" {3 * r + 2}.{t}" for t in range(r % 2, 4)), a * (1.0 + r)) for a in (True, False) for r in range(3)
    ]
    assert sorted((p.tokens, p.activation) for p in found[2]) == sorted(want)
    both, _ = read_passages(passages, tokens, [0, 2], 6, seed=1)
    assert both[2] == found[2] != read_passages(passages, tokens, [2], 6, seed=2)[0][2]
    assert len(read_passages(passages, tokens, [2], 40, seed=1)[0][2]) == 8


def test_local_labels() -> None:
    examples = pd.DataFrame({"feature": [3, 3, 3, 3, 5], "rank": [0, 1, 2, 3, 0], "position": [1, 0, 1, 0, 2]})
    tokens = pd.DataFrame(
        {"feature": [3] * 8 + [5], "rank": [0, 0, 1, 1, 2, 2, 3, 3, 0], "position": [0, 1] * 4 + [2],
         "token": ["x", " a", " b", "y", "z", " b", " c", "u", '"\n']}
    ).sample(frac=1, random_state=0)  # fmt: skip
    assert local_labels(examples, tokens, 3) == {3: (" b", " a"), 5: ('"\n',)}
    assert local_labels(examples, tokens, 9)[3] == (" b", " a", " c")
    assert local_text((" b", " ", '"\n')) == 'fires on: "b", " ", "\\"\\n"'
    passages = [Passage(("x", " a"), 1.0), Passage(("a", "ba"), 0.0), Passage((), 1.0)]
    assert local_verdicts((" b", " a"), passages) == [True, False, False]


@pytest.mark.parametrize("seed", range(3))
def test_kappa(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tables: list[np.ndarray] = []
    for _ in range(4):
        a = rng.integers(1, 6, 30)
        b = np.clip(a + rng.integers(-1, 3, 30), 1, 5)
        counts = np.zeros((5, 5), dtype=int)
        for x, y in zip(a, b, strict=True):
            counts[x - 1, y - 1] += 1
        tables.append(counts)
        want = cohen_kappa_score(a, b, labels=[1, 2, 3, 4, 5], weights="quadratic")
        assert float(weighted_kappa(counts[None])[0]) == pytest.approx(want, abs=1e-12)
    together = weighted_kappa(np.stack(tables))
    assert together.tolist() == [float(weighted_kappa(table[None])[0]) for table in tables]
    assert np.isnan(weighted_kappa(np.diag([0, 0, 9, 0, 0])[None])[0])


def make_labels(n: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    first = rng.integers(1, 6, n)
    columns = {name: rng.random(n) for name in ("detection", "control", "local_detection", "local_control")}
    labels = pd.DataFrame({"feature": range(n), "label": "x", "complexity": first, **columns})
    labels["complexity_2"] = pd.array(np.clip(first + rng.integers(-1, 2, n), 1, 5), dtype="Int8")
    labels.loc[rng.random(n) < 0.2, "complexity_2"] = pd.NA
    for name in columns:
        labels.loc[rng.random(n) < 0.2, name] = np.nan
    return labels


@pytest.mark.parametrize(("n", "seed"), [(25, 0), (60, 1)])
def test_summary_in_loops(n: int, seed: int) -> None:
    from scipy.stats import spearmanr, ttest_1samp

    labels = make_labels(n, seed)
    found = summarise_labels(labels, n_bootstrap=200, level=0.9, seed=seed).set_index("measure")
    for name, row in found.iloc[:-2].iterrows():
        a, _, b = str(name).partition(" - ")
        pairs = [(r[a], r[b] if b else 0.0) for r in labels.to_dict("records")]
        values = [x - y for x, y in pairs if x == x and y == y]
        test = ttest_1samp(values, 0).confidence_interval(0.9)
        assert row["n"] == len(values) and row["value"] == pytest.approx(sum(values) / len(values))
        assert [row["low"], row["high"]] == pytest.approx([test.low, test.high])
    assert len(found) == 9
    rated = labels.dropna(subset=["complexity_2"])
    x, y = rated["complexity"].to_numpy(dtype=int), rated["complexity_2"].to_numpy(dtype=int)
    rng = np.random.default_rng(seed + 100)
    picks = [rng.integers(0, len(x), len(x)) for _ in range(200)]
    for name, of in (
        ("kappa", lambda a, b: cohen_kappa_score(a, b, labels=[1, 2, 3, 4, 5], weights="quadratic")),
        ("spearman", lambda a, b: spearmanr(a, b)[0]),
    ):
        row = found.loc[name]
        assert row["n"] == len(x) and row["value"] == pytest.approx(of(x, y), abs=1e-12)
        drawn = np.quantile([of(x[pick], y[pick]) for pick in picks], [0.05, 0.95])
        assert [row["low"], row["high"]] == pytest.approx(drawn, abs=0.06)  # both are draws


def test_what_is_said_of_labels() -> None:
    labels = make_labels(25, 0).assign(detection_n=40, local_n=38)
    said = describe_labels(labels)
    assert [line.split(":")[0] for line in said] == [
        "labels", "top tokens", "labels minus top tokens", "two ratings of complexity"
    ]  # fmt: skip
    counts = Counter(labels["detection"].notna())
    assert f"{counts[True]} features, 40 passages each; " in said[0] and said[0].endswith("(chance 0.50)")
    assert describe_labels(labels[["feature", "label", "complexity"]]) == []
    alone = describe_labels(labels.iloc[:1].assign(detection=0.75, control=np.nan, local_detection=np.nan))
    assert alone[0] == "labels: balanced accuracy 0.75 [nan, nan], 1 features, 40 passages each (chance 0.50)"
