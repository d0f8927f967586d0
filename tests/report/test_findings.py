"""What a report says was found, and what it warns of, against tables whose answer is known."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from crosslens.report import findings, write_report
from crosslens.report.features import MIN_ITEMS as RANKED
from crosslens.report.findings import find, warn
from crosslens.report.tables import Tables
from crosslens.rundir import RunDir
from crosslens.tasks import accuracy
from crosslens.training import progress
from tests.report.test_features import add_features
from tests.report.test_pages import PAGES, TASKS, _Page, drop, lives, make_run, table


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "r", 8)


def warnings(run: RunDir) -> list[str]:
    return [one.text for one in warn(Tables(run, run.read_json()))]


def test_bounds_are_those_of_training_and_tasks() -> None:
    assert (findings.MIN_EV, findings.MAX_DEAD) == (progress.MIN_EXPLAINED_VARIANCE, progress.MAX_DEAD_FRACTION)
    assert accuracy.MIN_ITEMS == findings.MIN_ITEMS == RANKED


def test_a_sound_run_has_no_warning(run: RunDir) -> None:
    assert warnings(run) == []
    write_report(run.path)
    assert "with care" not in _Page(run.report / "index.html", PAGES).text


def test_every_value_that_does_not_carry_is_named_with_its_bound(run: RunDir) -> None:
    evaluation = table(run, "evaluation")
    evaluation.loc[2, "explained_variance"] = 0.06
    evaluation.loc[4, "ce_recovered"] = 0.83
    run.save_table("evaluation", evaluation.assign(dead_fraction=0.31))
    scores = table(run, "accuracy")
    run.save_table("accuracy", scores.assign(n=scores["n"].where(scores["task"] != TASKS[1], 3)))
    errors = table(run, f"completeness/{TASKS[0]}")
    errors.loc[3, "completeness_error"] = 0.4
    run.save_table(f"completeness/{TASKS[0]}", errors)
    shares = table(run, f"ablation/{TASKS[0]}")
    run.save_table(f"ablation/{TASKS[0]}", shares.assign(reconstruction_only=0.5 * shares["clean"]))
    found = warnings(run)
    assert len(found) == 6
    label = evaluation["label"]
    for words in (
        f"too low at {label[2]} (0.06)", "Acceptable: 0.7 or more",
        f"zeros would cost at {label[4]} (83.0%)", "31% of the features are dead",
        "Acceptable: 20% or less", f"Task {TASKS[1]} has 3 items", "Acceptable: 20 or more",
        f"effects of {TASKS[0]} at {label[3]} miss the change of the metric by 40%",
        f"{TASKS[0]} at {label[7]} has 50% of its metric", "Acceptable: 80% to 120%",
    ):  # fmt: skip
        assert words in " ".join(found)
    write_report(run.path)
    for name in (*PAGES, "features", "feature"):
        text = _Page(run.report / "index.html", (name,)).text
        assert all(line in text for line in found), name
        links = [a.get("href") for _, a in _Page(run.report / "index.html", (name,)).elements]
        assert {f"task-{task}.html" for task in TASKS} <= set(links), name


def test_a_missing_value_is_warned_of(run: RunDir) -> None:
    evaluation = table(run, "evaluation")
    evaluation.loc[0, "explained_variance"] = float("nan")
    run.save_table("evaluation", evaluation)
    assert len(warnings(run)) == 1


def test_the_five_sentences_are_those_of_the_tables(run: RunDir) -> None:
    add_features(run)
    steps = table(run, "evaluation")["label"].tolist()
    scores = table(run, "accuracy").sort_values(["task", "snapshot"])
    simple = [0.92, 0.54, 0.8, 0.9, 0.9, 0.91, 0.99, 1.0]
    scores.loc[scores["task"] == TASKS[0], "accuracy"] = simple
    scores.loc[scores["task"] == TASKS[1], "accuracy"] = 0.51
    scores["accuracy_low"] = scores["accuracy"] - 0.05
    run.save_table("accuracy", scores)
    counts = pd.DataFrame([{"measure": "r2", "kind": "all", "threshold": 0.4, "n": 90, "born": 40, "born_reversed": 3}])
    run.save_table("birth_counts", counts)
    write_report(run.path)
    page = _Page(run.report / "index.html", ("index",))
    found = find(Tables(run, run.read_json()), {path.name for path in (run.report / "data").glob("*.csv")})
    learnt, described, born, acts, recurs = (one.text for one in found)
    assert learnt.startswith(
        f"The model answers more items correctly than chance on {TASKS[0]} from {steps[2]} on (at least 90% from "
        f"{steps[3]} on, n = 200). At the end, it is not above chance on {TASKS[1]} (51.0%, n = 200)."
    )
    ev = table(run, "evaluation")["explained_variance"]
    assert f"{ev.mean():.1%}" in described and f"{ev.min():.1%} at {steps[0]}" in described
    read = lives(run)["origin"].dropna()
    assert f"{(read == 'emergent').sum()} of {len(read)} features are born" in born
    assert born.endswith("3 are (features that fade, or noise); false births were not measured.")
    births = table(run, "lifecycles").query("measure == 'r2' and origin == 'emergent'")["birth"].astype(int)
    snapshot, most = births.value_counts().index[0], births.value_counts().iloc[0]
    assert f"after the first snapshot, with the most at {steps[snapshot]} ({most}); counted" in born
    last = pd.concat([table(run, f"ablation/{task}").assign(task=task) for task in TASKS], ignore_index=True)
    last = last[(last["snapshot"] == 7) & (last["mode"] == "ablate") & (last["k"] == 15)]
    task = last.loc[last["clean"].idxmax(), "task"]
    rows = last[last["task"] == task].set_index("features")
    numbers = [rows.loc["top", "clean"], *(rows.loc[kind, "metric"] for kind in ("top", "random", "size_matched"))]
    assert [f"{n:.2f}".replace("-", "−") for n in numbers] == re.findall(r"−?\d+\.\d\d", acts)
    effects = table(run, f"attribution/{task}").query("snapshot == 7")
    best = effects.loc[effects["ie"].idxmax(), "feature"]
    assert f'the largest effect there is that of <a href="feature.html#{best}">feature {best}</a>' in acts
    assert ("a", f"feature.html#{best}") in [(tag, a.get("href")) for tag, a in page.elements]
    consensus = table(run, "consensus").query("alive")
    assert f"have {consensus['consensus'].sum()} of {len(consensus)} live features" in recurs
    for one in found:
        assert one.links
        for _, link in one.links:
            file, _, anchor = link.partition("#")
            ids = {a.get("id") for _, a in _Page(run.report / "index.html", (file.removesuffix(".html"),)).elements}
            assert not anchor or anchor in ids, link
            assert ("a", link) in [(tag, a.get("href")) for tag, a in page.elements]


def test_births_with_as_many_reversed_are_named_in_a_sentence(run: RunDir) -> None:
    row = {"measure": "r2", "kind": "contextual", "threshold": 0.4, "n": 90, "born": 40, "born_reversed": 30}
    run.save_table("birth_counts", pd.DataFrame([row]))
    born = next(one.text for one in find(Tables(run, run.read_json()), set()) if "are born" in one.text)
    assert ". By R², 40 contextual features are born forward and 30 with the snapshots reversed: features fade" in born


def test_births_and_partners_stand_beside_what_models_without_a_history_give(run: RunDir) -> None:
    add_features(run)
    row = {"measure": "r2", "kind": "all", "threshold": 0.4, "n": 90, "born": 40, "born_reversed": 3}
    nulls = {"born_low": 35.4, "born_high": 44.0, "untrained": float("nan"), "exchangeable": 0.081}
    run.save_table("birth_counts", pd.DataFrame([{**row, **nulls}]))
    run.save_table("unrelated", pd.DataFrame([{"kind": "all", "shared": 0.44}, {"kind": "contextual", "shared": 0.16}]))
    texts = [one.text for one in find(Tables(run, run.read_json()), set())]
    born = next(text for text in texts if "are born" in text)
    assert "(95% interval of the count: 35 to 44); counted from the last snapshot backwards, 3 are" in born
    assert "(features that fade, or noise), in models" in born
    assert born.endswith("in models of other seeds at one step 8.1%.") and "never trained" not in born
    assert any(text.endswith("in a crosscoder over unrelated models 44% (contextual ones: 16%).") for text in texts)
    shares = {"shared": 0.6, "born_too": 0.5, "born_too_by_chance": 0.1, "same_birth": 0.7, "same_birth_by_chance": 0.2}
    pairs = [{"a": "0", "b": b, "kind": "all", **shares} for b in ("1", "2")]
    pairs += [{"a": "0", "b": b, "kind": "contextual", **shares, "shared": 0.3} for b in ("1", "2")]
    run.save_table("seeds_births", pd.DataFrame(pairs))
    recurs = find(Tables(run, run.read_json()), set())[-1].text
    assert recurs.endswith(
        "Of contextual features 30% have a partner in another seed, in a crosscoder over unrelated models 16%. Of "
        "features that are born and have a partner 50% are born there too (by chance 10%), 70% of these at the same "
        "snapshot (by chance 20%)."
    )


def test_the_name_of_a_feature_is_quoted_and_escaped(run: RunDir) -> None:
    tables = Tables(run, run.read_json())
    tables.names = dict.fromkeys(range(1000), "<b>os")
    (acts,) = (one.text for one in find(tables, set()) if "largest effects" in one.text)
    assert "</a> (“&lt;b&gt;os”)." in acts and "<b>" not in acts


def test_sentences_without_tables_are_left_out(run: RunDir) -> None:
    found = find(Tables(run, run.read_json()), set())
    assert "One seed was trained" in found[-1].text and len(found) == 5
    drop(run, "accuracy", "ablation", "evaluation")
    assert len(find(Tables(run, run.read_json()), set())) == 2
    drop(run, "lifecycles", "evolution")
    assert find(Tables(run, run.read_json()), set()) == []
