"""A task's features over snapshots against loops, examples against every position of every prompt, and the charts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from crosslens.causal import timeline
from crosslens.causal.attribution import Attribution, attribute
from crosslens.causal.relative import significant
from crosslens.causal.timeline import SEPARATOR, find_examples, follow_features
from crosslens.errors import UserError
from crosslens.intervention import prompt_runs
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.report.chart import THEME
from crosslens.report.figures.feature_timeline import N_TIMELINE, feature_timeline
from crosslens.report.figures.languages import language_overlap
from crosslens.report.page import compact
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, as_if_of, make_crosscoder, slow_runs

MORE = [*ITEMS, *({"prefix": f"the {who} near", "correct": "the", "wrong": "a"} for who in ("cat", "dog", "king"))]


@pytest.fixture(scope="module")
def task() -> Task:
    return Task.from_items("tiny", MORE)


@pytest.fixture(scope="module")
def runs(snaps: Snapshots, task: Task) -> PromptRuns:
    return PromptRuns(make_crosscoder(snaps, "jumprelu_crosscoder"), snaps, task, batch_size=2, paired=False)


@pytest.fixture(scope="module")
def ie(runs: PromptRuns) -> Attribution:
    """Two of the strongest features are inactive at one snapshot each; errors are as if of 400 prompts."""
    found = attribute(runs, "gradient")
    found = as_if_of(found, 400)
    for feature, s in ((19, 1), (4, 0)):
        found.effects[feature, s] = found.standard_errors[feature, s] = 0.0
        found.active[feature, s] = False
    return found


@pytest.mark.parametrize(
    ("k", "by", "min_effect"),
    [(6, "magnitude", None), (5, "magnitude", 0.25), (3, "signed", 0.0), (4, "negative", 0.02)],
)
def test_the_table_equals_loops(runs: PromptRuns, ie: Attribution, k: int, by: str, min_effect: float | None) -> None:
    cc, counts = runs.crosscoder, significant(ie, min_effect)
    table = follow_features(runs, ie, k, by=by, min_effect=min_effect, n_examples=2)
    taken: set[tuple[int, int]] = set()
    for s in range(3):
        signs = {"magnitude": (1, -1), "signed": (1,), "negative": (-1,)}[by]
        listed = [(max(sign * float(ie.effects[i, s]) for sign in signs), i) for i in range(F) if ie.active[i, s]]
        for size, i in sorted(listed, reverse=True)[:k]:
            if size > 0 and significant(ie, min_effect)[i, s]:
                taken.add((i, s))
    features = {i for i, _ in taken}
    assert len(table) == 3 * len(features) and set(table["feature"]) == features and len(features) > 1
    centres: list[float] = []
    for feature, rows in table.groupby("order", sort=True):
        i = int(rows["feature"].iloc[0])
        assert rows["snapshot"].tolist() == [0, 1, 2] and rows["step"].tolist() == [0, 10, 20]
        norms = [float(cc.W_dec[i, s * 16 : (s + 1) * 16].detach().norm()) for s in range(3)]
        effects = [float(ie.effects[i, s]) for s in range(3)]
        kept = [abs(e) if counts[i, s] else 0.0 for s, e in enumerate(effects)]
        totals = [float(sum(abs(ie.effects[j, s]) for j in range(F) if counts[j, s])) for s in range(3)]
        of_total = [e / total if total else 0.0 for e, total in zip(kept, totals, strict=True)]
        assert rows["norm"].tolist() == pytest.approx(norms)
        assert rows["strength"].tolist() == pytest.approx([n / max(norms) for n in norms])
        assert rows["ie"].tolist() == effects
        assert rows["ie_se"].tolist() == [float(ie.standard_errors[i, s]) for s in range(3)]
        assert rows["relie"].tolist() == pytest.approx([e / sum(kept) for e in kept])
        assert rows["share_relie"].tolist() == pytest.approx([e / sum(of_total) for e in of_total])
        assert rows["top"].tolist() == [(i, s) in taken for s in range(3)]
        for s, rank in enumerate(rows["rank"]):
            larger = sum(bool(ie.active[j, s]) and abs(ie.effects[j, s]) > abs(ie.effects[i, s]) for j in range(F))
            assert (rank is pd.NA) if not ie.active[i, s] else rank == 1 + larger
        centres.append(sum(s * e / sum(of_total) for s, e in enumerate(of_total)) / 2)
        assert rows["centre_of_mass"].tolist() == pytest.approx([centres[-1]] * 3), feature
        texts = find_examples(runs, [i], 2)["text"].tolist()
        assert rows["examples"].tolist() == [SEPARATOR.join(texts)] * 3
        assert rows["class"].nunique() == rows["signed_class"].nunique() == 1
    assert centres == sorted(centres) and table["rank"].isna().sum() == len(features & {4, 19})


@pytest.mark.parametrize("architecture", ["jumprelu_crosscoder", "topk_crosscoder"])
@pytest.mark.parametrize(("n", "batch_size"), [(1, 2), (4, 2), (100, 256)])
def test_examples_are_the_positions_of_largest_activation(
    snaps: Snapshots, task: Task, architecture: str, n: int, batch_size: int
) -> None:
    cc = make_crosscoder(snaps, architecture)
    features = [5, 0, 17]
    found = find_examples(PromptRuns(cc, snaps, task, batch_size=batch_size, paired=False), features, n)
    every: dict[int, dict[str, tuple[float, int, int]]] = {i: {} for i in features}
    words = [item["prefix"].split() for item in MORE]
    for item, run in enumerate(slow_runs(snaps, cc, items=MORE)):
        value = torch.stack(run.f).amax(0)  # what the snapshots whose gate is open share
        for i in features:
            for t in range(1, len(value)):
                text = " ".join([*words[item][: t - 1], f"[{words[item][t - 1]}]"])
                if value[t, i] > 0:
                    every[i][text] = (float(value[t, i]), t, len(value) - 1 - t)
    listed = [i for i in features for _ in range(min(n, len(every[i])))]
    assert found["feature"].tolist() == listed
    for i in features:
        rows = found[found["feature"] == i]
        assert rows["rank"].tolist() == list(range(len(rows))) and rows["text"].is_unique
        best = sorted((value for value, _, _ in every[i].values()), reverse=True)[:n]
        np.testing.assert_allclose(rows["activation"], best, rtol=1e-4, atol=1e-5)
        for row in rows.itertuples():
            value, position, _ = every[i][str(row.text)]
            prompt = words[int(row.item)]
            assert (row.activation, row.position) == (pytest.approx(value, rel=1e-4, abs=1e-5), position)
            assert row.token == prompt[position - 1] and row.from_end == len(prompt) - position
            assert " ".join(prompt).startswith(str(row.text).replace("[", "").replace("]", ""))


def test_examples_as_text_for_any_tokenizer() -> None:
    """A word-level tokenizer puts spaces between words, a byte-level one has them in its tokens."""
    vocabulary = {"<s>": 0, "the": 1, "cat": 2, ".": 3}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<s>")), bos_token="<s>"
    )
    raw = Tokenizer(models.BPE({"<s>": 0, "the": 1, "Ġcat": 2, "s": 3, "Ġ": 4}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pieces = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>")
    for tokenizer, tokens, text in (
        (words, [0, 1], "[the]"),
        (words, [0, 1, 2], "the [cat]"),
        (words, [0, 1, 2, 3], "the cat [.]"),
        (words, [0, 1, 0], "the [<s>]"),
        (pieces, [0, 1], "[the]"),
        (pieces, [0, 1, 2], "the [cat]"),
        (pieces, [0, 1, 2, 3], "the cat[s]"),
        (pieces, [0, 1, 4], "the [Ġ]"),
        (pieces, [0], "[<s>]"),
    ):
        assert timeline._in_brackets(tokenizer, tokens) == text


def test_no_model_runs_without_examples(
    snaps: Snapshots, task: Task, runs: PromptRuns, ie: Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_examples = follow_features(PromptRuns(runs.crosscoder, snaps, task, batch_size=3, paired=False), ie, 3)
    monkeypatch.setattr(prompt_runs, "harvest", None)
    without = follow_features(runs.crosscoder, snaps, task, ie, 3, n_examples=0)
    pd.testing.assert_frame_equal(without, with_examples.assign(examples=""))
    assert (with_examples["examples"] != "").any()


def test_nothing_is_followed_without_significant_effects(runs: PromptRuns, ie: Attribution) -> None:
    unsure = dataclasses.replace(ie, p=torch.ones_like(ie.p))
    table = follow_features(runs, unsure, 3)
    full = follow_features(runs, ie, 3)
    assert table.empty and list(table) == list(full)
    words = "No feature has a significant effect on this task (false discovery rate 5%)."
    assert feature_timeline(table) == f"{words} With more items, smaller effects become significant."


def test_errors_are_one_line(snaps: Snapshots, task: Task, runs: PromptRuns, ie: Attribution) -> None:
    cc = runs.crosscoder
    other = dataclasses.replace(ie, labels=["a", "b", "c"])
    with pytest.raises(
        UserError, match="effects cover 24 features at snapshots a, b, c, but the crosscoder has 24 at step0"
    ):
        follow_features(runs, other)
    with pytest.raises(UserError, match="trained on 3 snapshots, but 2 were given"):
        follow_features(cc, snaps[[0, 1]], task, ie)
    with pytest.raises(UserError, match="k=25 is not in"):
        follow_features(runs, ie, 25)
    with pytest.raises(UserError, match="by='size' is unknown"):
        follow_features(runs, ie, by="size")
    with pytest.raises(UserError, match="n_examples=-1 must be at least 0"):
        follow_features(runs, ie, n_examples=-1)
    with pytest.raises(UserError, match=r"feature 24 is not in \[0, 23\]"):
        find_examples(runs, [24])
    with pytest.raises(UserError, match="n=0 must be at least 1"):
        find_examples(runs, [1], 0)


def spec(figure: Any) -> dict[str, Any]:
    """What the page draws."""
    return json.loads(json.dumps(compact({"data": figure.to_dict()["data"], "layout": figure.to_dict()["layout"]})))


def colors(value: Any, key: str = "") -> set[str]:
    """All colours of a figure, as the page's script finds them."""
    if isinstance(value, dict):
        return set().union(*(colors(part, name) for name, part in value.items()))
    if isinstance(value, list):
        return set().union(*(colors(part, key) for part in value)) if key.endswith("colorscale") else set()
    return {value} if isinstance(value, str) and key.endswith(("color", "colorscale")) else set()


def test_the_chart_of_features(runs: PromptRuns, ie: Attribution) -> None:
    table = follow_features(runs, ie, 3, min_effect=0.0)
    chart = feature_timeline(table.sample(frac=1, random_state=0))
    assert not isinstance(chart, str)
    drawn = spec(chart.figure)
    *heat, marks = drawn["data"]
    features = table.drop_duplicates("feature")["feature"].tolist()
    assert [trace["xaxis"] for trace in heat] == ["x", "x2", "x3"]
    for trace, column in zip(heat, ("strength", "ie", "share_relie"), strict=True):
        assert trace["type"] == "heatmap" and trace["x"] == [0, 1, 2]
        wanted = table.pivot(index="feature", columns="snapshot", values=column).loc[features].to_numpy(dtype=float)
        np.testing.assert_allclose(np.array(trace["z"], dtype=float), wanted, rtol=1e-4)
    places = {(features[y], x) for x, y in zip(marks["x"], marks["y"], strict=True)}
    top = table[table["top"]]
    assert places == set(zip(top["feature"], top["snapshot"], strict=True)) and marks["xaxis"] == "x2"
    layout = drawn["layout"]
    assert layout["yaxis"]["ticktext"][0].startswith(str(features[0])) and layout["height"] == 190 + 20 * len(features)
    largest = table["ie"].abs().max()
    assert layout["coloraxis2"]["cmax"] == pytest.approx(largest, rel=1e-3) == -layout["coloraxis2"]["cmin"]
    assert layout["coloraxis3"]["cmax"] == pytest.approx(table["share_relie"].max(), rel=1e-3)
    titles = ["decoder norm / largest norm", "IE (logits)", "share RelIE"]
    assert [each["text"] for each in layout["annotations"]] == titles
    domains = [layout[name]["domain"] for name in ("xaxis", "xaxis2", "xaxis3")]
    assert domains[0][0] == 0 and domains[2][1] == 1 and all(a[1] < b[0] for a, b in zip(domains, domains[1:]))  # noqa: B905
    assert colors(drawn) - {"rgba(0,0,0,0)"} <= set(THEME)
    first = table[table["feature"] == features[0]].iloc[0]
    assert heat[1]["text"][0][0].startswith(f"{layout['yaxis']['ticktext'][0]}<br>step0, step 0: IE (logits) ")
    assert first["examples"].partition("]")[0] in heat[1]["text"][0][0]
    pd.testing.assert_frame_equal(chart.data, table.drop(columns="order"))
    blank = feature_timeline(table, None, pd.DataFrame({"label": ["step0"]}))
    assert not isinstance(blank, str) and "Share RelIE is not drawn at step0, where accuracy is at chance" in blank.note
    _, ie_, share, _ = spec(blank.figure)["data"]
    assert all(row[0] is None and row[1] is not None for row in share["z"])
    assert ie_["z"] == heat[1]["z"]


def test_the_chart_shows_only_the_largest_features() -> None:
    n = N_TIMELINE + 7
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "order": np.repeat(np.arange(n), 2), "feature": np.repeat(draw.permutation(n), 2), "snapshot": [0, 1] * n,
            "label": ["<a>", "b"] * n, "step": [0, 8] * n, "strength": 1.0, "ie": draw.normal(size=2 * n),
            "share_relie": 0.5, "top": True, "examples": "the [<cat>] | a [b]",
        }
    )  # fmt: skip
    chart = feature_timeline(table)
    assert not isinstance(chart, str)
    assert f"The {N_TIMELINE} features with the largest |IE| are drawn, of {n}." in chart.note
    largest = table["ie"].abs().groupby(table["feature"]).max().nlargest(N_TIMELINE).index
    assert set(chart.data["feature"]) == set(largest)
    text = json.dumps(spec(chart.figure), ensure_ascii=False)
    assert "<cat>" not in text and "&lt;cat&gt;" in text and "<a>" not in text


def test_the_picture_of_overlap() -> None:
    table = pd.DataFrame(
        {
            "snapshot": [0, 1], "label": ["a", "b"], "step": [0, 8], "language": "en", "other": "fr", "k": 10,
            "shared": [1, 7], "expected": [2.0, 2.5], 
            "expected_low": [0, 1], "expected_high": [4, 5], "level": 0.95, "p": [0.9, 1e-4],
        }
    )  # fmt: skip
    chart = language_overlap(table, pd.DataFrame([{"baseline": "patch", "n": 8, "n_groups": 4}]))
    assert chart.note.endswith(" Effects are those of features set to their values on the paired prompt.")
    shared, band, expected = chart.figure.data
    assert (shared.name, expected.name) == ("en, fr", "en, fr, by chance") and band.meta == "band"
    assert list(shared.y) == [1, 7] and list(expected.y) == [2, 2.5] and set(band.y) == {0, 1, 4, 5}
    assert shared.customdata[1] == "b, step 8, p = 0.0001"
    assert chart.note.startswith("Sets of k = 10 features. Bands: 95% of sets of features of the same")
    assert colors(spec(chart.figure)) - {"rgba(0,0,0,0)"} <= set(THEME)
