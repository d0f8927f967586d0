"""`trace` and `steer` on a run: tables, what is printed, and the page Prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import crosslens as cl
from crosslens.cli.app import app
from crosslens.cli.prompts import _traced_words
from crosslens.config import SteerOptions, TraceOptions
from crosslens.errors import UserError
from crosslens.pipeline import open_run
from crosslens.pipeline.steering import steer
from crosslens.pipeline.tracing import TABLES, trace
from crosslens.report import write_report
from crosslens.report.figures.trace import traced_prompts
from crosslens.rundir import RunDir
from crosslens.snapshots import Snapshots


@pytest.fixture(scope="module")
def run(train_upper: Callable[[int], RunDir]) -> RunDir:
    """A run of 32 features, trained from the command line and evolved."""
    made = train_upper(4)
    app(["evolve", str(made.path), "--device", "cpu", "--n-probes", "8"])
    return made


def test_prompts_are_traced_and_kept(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    app(["trace", str(run.path), "the cat", "the king sees a", "--answers", "sees,likes", "--device", "cpu"])
    shown = capsys.readouterr().out
    assert "“the cat”; logit of 'sees' minus that of 'likes'" in shown
    assert shown.count("nothing here is significant") == 2 and "(page Prompts)" in shown
    _, crosscoder, acts = open_run(run.path, "cpu")
    expected = cl.trace(
        crosscoder,
        acts.snapshots,
        ["the cat", "the king sees a"],
        ("sees", "likes"),
        lifecycles=run.table("lifecycles"),
    )
    saved = {name: run.table(name) for name in TABLES}
    for name, attribute in TABLES.items():
        table, wanted = saved[name], getattr(expected, attribute)
        assert table is not None
        pd.testing.assert_frame_equal(table[list(wanted)], wanted, check_dtype=False, atol=1e-6)
    following: Any = saved["trace_predictions"]
    for number, printed in enumerate(shown.split("“the ")[1:3]):
        top = following[(following["prompt"] == number) & (following["rank"] == 0)]
        assert all(f"{token!r}" in " ".join(printed.split()) for token in top["token"]) and len(top) == 3
    for name in ("traces", "trace_features"):
        assert [*saved[name]][[*saved[name]].index("snapshot") :][:3] == ["snapshot", "label", "step"]  # type: ignore[misc]
    marked = saved["trace_features"]
    assert marked is not None and {"read_later", "mostly_later"} <= set(marked)
    # more prompts come after them; those that are asked again are replaced
    trace(run, ["the cat"], TraceOptions(answers="sees,likes", pair="the dog"), device="cpu")
    trace(run, ["the cat"], TraceOptions(answers="sees,likes"), device="cpu")
    table: Any = run.table("traces")
    rows = table.drop_duplicates("prompt")
    assert rows["text"].tolist() == ["the king sees a", "the cat", "the cat"] and rows["prompt"].tolist() == [0, 1, 2]
    assert rows["paired"].fillna("").tolist() == ["", "the dog", ""]
    trace(run, ["a dog"], TraceOptions(fresh=True), device="cpu")
    table = run.table("traces")
    assert set(table["text"]) == {"a dog"}


def test_prompts_come_from_files_and_go_to_json(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe dog near the\n")
    (tmp_path / "items.jsonl").write_text('{"prefix": "the cat", "correct": "sees", "wrong": "likes"}\n')
    capsys.readouterr()
    for name, texts in (("prompts.txt", ["the cat", "the dog near the"]), ("items.jsonl", ["the cat"])):
        app(["trace", str(run.path), "--file", str(tmp_path / name), "--device", "cpu", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert list(dict.fromkeys(row["text"] for row in found["prompts"])) == texts
        assert found["error_bars"] is None and {"features", "predictions", "tokens"} <= set(found)
        assert all(0 <= row["probability"] <= 1 for row in found["predictions"])


def test_models_are_steered(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    trace(run, ["the cat"], TraceOptions(fresh=True), device="cpu")
    features = run.table("trace_features")
    assert features is not None
    feature = str(int(features.sort_values("activation")["feature"].iloc[-1]))
    words = ["steer", str(run.path), "the cat", "--feature", feature, "--at", "step20,step10", "--device", "cpu"]
    capsys.readouterr()
    app([*words, "--factor", "1", "--length", "5"])
    shown = capsys.readouterr().out
    assert "“the cat” with feature" in shown and "(+0.000)" in shown
    app([*words, "--factor", "-20", "--length", "5", "--loss-tokens", "64", "--json"])
    rows = json.loads(capsys.readouterr().out)["steered"]
    assert [row["label"] for row in rows] == ["step20", "step10"]
    assert abs(rows[0]["text_loss_change"]) > 1e-4 and rows[0]["n_tokens"] >= 64
    _, crosscoder, acts = open_run(run.path, "cpu")
    snapshots: Snapshots = acts.snapshots
    ids = [0, *snapshots.tokenizer("the cat")["input_ids"]]
    with cl.steer(crosscoder, snapshots, "step20", {int(feature): -20.0}) as model:
        plain: Any = model
        text = plain.generate(
            torch.tensor([ids]), max_new_tokens=5, do_sample=False, return_type="tokens", verbose=False
        )  # fmt: skip
        held_out = acts.held_out_tokens()[: -(-64 // acts.tokens.shape[1])].long()
        change = float(plain(held_out, return_type="loss"))
    unsteered: Any = snapshots.model("step20")
    change -= float(unsteered(held_out, return_type="loss"))
    assert rows[0]["text_loss_change"] == pytest.approx(change, abs=1e-5)
    assert snapshots.tokenizer.decode(text[0, len(ids) :].tolist()) == rows[0]["steered"]
    table: Any = run.table("steered")
    table = table[table["factor"].isin([1, -20])]
    assert len(table) == 4 and (table.loc[table["factor"] == 1, "text_loss_change"] == 0).all()
    assert (table.loc[table["factor"] == 1, "plain"] == table.loc[table["factor"] == 1, "steered"]).all()


def test_features_without_examples_are_called_by_the_word_on_which_they_were_strongest(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert _traced_words(run) == {}
    rows = {"feature": [3, 3, 5, 3], "token": [" cat", " dog", " a", " the"], "activation": [1.0, 2.5, 0.1, 2.0]}
    run.save_table("trace_features", pd.DataFrame(rows))
    assert _traced_words(run) == {3: "“dog”", 5: "“a”"}


def test_the_page_shows_them(run: RunDir) -> None:
    trace(run, ["the cat", "the </script> cat"], TraceOptions(fresh=True), device="cpu")
    assert list(steer(run, ["the cat"], SteerOptions(feature=(1,), factor=2.0, at="step20", length=3), device="cpu"))
    page = write_report(run.path).with_name("prompts.html").read_text()
    assert "Prompts through training" in page and "without error bars" in page and "What steered models write" in page
    tables: Any = [run.table(name) for name in TABLES]
    found: Any = traced_prompts(*tables)
    assert [prompt["text"] for prompt in found.contents["prompts"]] == ["the </script> cat", "the cat"]
    one, features = found.contents["prompts"][1], tables[2][tables[2]["prompt"] == 0]
    for row in one["map"]:
        effects = features[features["feature"] == row["feature"]].sort_values("snapshot")["effect"]
        assert row["effects"] == [float(f"{effect:.3g}") for effect in effects]
    total = tables[3][(tables[3]["prompt"] == 0) & (tables[3]["snapshot"] == 2)].groupby("position")["effect"].sum()
    assert {t: one["effects"][2][t] for t in total.index} == {t: float(f"{x:.3g}") for t, x in total.items()}


def test_mistakes_are_refused(run: RunDir, tmp_path: Path) -> None:
    options: dict[str, Any]
    for prompts, options, words in (
        ([], {}, "no prompts are given"),
        (["a", "b"], {"pair": "c"}, "is compared with one prompt"),
        ([], {"file": tmp_path / "none.txt"}, "none.txt"),
    ):
        with pytest.raises(UserError, match=words):
            trace(run, prompts, TraceOptions(**options), device="cpu")
    for options, words in (
        ({}, "either --factor"),
        ({"factor": 1.0, "add": 1.0}, "either"),
        ({"add": float("nan")}, "finite"),
    ):
        with pytest.raises(UserError, match=words):
            SteerOptions(feature=(1,), **options)
    with pytest.raises(UserError, match="answers='are' must be"):
        TraceOptions(answers="are")
    for options, prompts, words in (
        ({"at": "step5"}, ["the cat"], "no snapshot has the label 'step5'"),
        ({"feature": (32,)}, ["the cat"], "feature 32 is not in"),
        ({"length": 40}, ["the cat"], "exceed the models' context of 32"),
        ({}, [], "no prompts are given"),
    ):
        with pytest.raises(UserError, match=words):
            options = {"feature": (1,), "factor": 2.0, **options}
            next(steer(run, prompts, SteerOptions(**options), device="cpu"))


def test_accuracy_needs_no_training(tiny_snapshots: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prefix": "the cat", "correct": "sees", "wrong": "likes"},
        {"prefix": "a dog", "correct": "x", "wrong": "y"},
    ]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["accuracy", "--snapshots", str(tiny_snapshots), "--steps", "0,20", "--task", str(tmp_path / "task.jsonl")]
    capsys.readouterr()
    app(words)
    shown = capsys.readouterr().out
    assert (
        "task: 1 of 2 items, 1 skipped (a word is unknown to the tokenizer)" in shown and shown.count("accuracy") == 2
    )
    app([*words, "--json"])
    table = json.loads(capsys.readouterr().out)["tasks"]["task"]
    snapshots = Snapshots.local(tiny_snapshots)[[0, 2]]
    expected = cl.Task.local(tmp_path / "task.jsonl").accuracy(snapshots)
    assert [row["metric"] for row in table] == pytest.approx(expected["metric"].tolist(), abs=1e-6)
