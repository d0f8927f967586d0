"""What results show of themselves where they are printed, and in a notebook."""

from __future__ import annotations

import dataclasses
import pickle
import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

import crosslens as cl
from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.printing import Result, as_html
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.given import CONTROL, controls
from tests.plain_model import F, few_effects, make_crosscoder

HOSTILE = '<img src=x onerror="alert(1)"> & co'


@pytest.fixture(scope="module")
def crosscoder(snaps: Snapshots) -> Crosscoder:
    return make_crosscoder(snaps, "batchtopk_crosscoder")


@pytest.fixture(scope="module")
def effects(crosscoder: Crosscoder, snaps: Snapshots, task: Task) -> cl.causal.Attribution:
    return few_effects(crosscoder, snaps, task)


def test_a_result_prints_the_columns_that_matter_and_names_the_others() -> None:
    table = pd.DataFrame({"snapshot": [0, 1], "label": ["a", HOSTILE], "x": [0.5, np.nan], "y": [1.0, 2.0]})
    result = Result.of(table, "two of 3 <things>", ["label", "x"], "x: a share")
    for shown in (result, pickle.loads(pickle.dumps(result))):
        lines = str(shown).splitlines()
        assert lines[0] == "two of 3 <things>" and lines[1].split() == ["label", "x"]
        assert lines[2].split() == ["a", "0.500"] and lines[3].split()[-1] == "-"
        assert lines[4:] == ["x: a share", "further columns: snapshot, y"]
    made = result._repr_html_()
    assert made is not None and "<img" not in made and "&lt;things&gt;" in made and "&lt;img" in made
    # everything else is a plain data frame
    pd.testing.assert_frame_equal(pd.DataFrame(result), table)
    for plain in (result[["label"]], result[result["x"] > 0], result.assign(z=1), pd.concat([result, result])):
        assert type(plain) is pd.DataFrame
    assert "further columns" not in str(result.rename(columns={"x": "z"}))


@pytest.mark.parametrize("text", CONTROL.values(), ids=CONTROL)
def test_control_characters_are_shown_as_their_codes(text: str) -> None:
    table = pd.DataFrame({"token": [text], text: [1.0]})
    result = Result.of(table, text, ["token", text], text)
    made = result._repr_html_()
    assert made is not None and not controls(made) and not controls(repr(result)) and not controls(str(result))
    assert made.count("\\u00") + made.count("\\u20") >= 3


@pytest.mark.parametrize("text", CONTROL.values(), ids=CONTROL)
def test_labels_of_snapshots_are_shown_as_their_codes(text: str, snaps: Snapshots) -> None:
    named = Snapshots([dataclasses.replace(one, label=f"{i}{text}") for i, one in enumerate(snaps)], text)
    assert not controls(repr(named)) and not controls(named._repr_html_())


def test_long_texts_are_whole_and_many_rows_are_cut() -> None:
    made = as_html("t", pd.DataFrame({"text": ["&" * 99, *"abc" * 30]}))
    assert "&amp;" * 99 in made and made.count("<tr>") < 50


@pytest.mark.filterwarnings("ignore:the 4 prompts of")
def test_what_decides_is_printed_first(
    crosscoder: Crosscoder, snaps: Snapshots, acts: Activations, task: Task, effects: cl.causal.Attribution
) -> None:
    evaluated = cl.evaluate(crosscoder, acts, n_tokens=64)
    first, header, *_ = str(evaluated).splitlines()
    assert re.fullmatch(rf"held-out tokens: \d+ of {F} features never fire on them", first)
    assert header.split()[:3] == ["label", "explained_variance", "l0"]
    accuracy = Task.from_items("t", [*task.items, task.items[0], {"prefix": "x", "correct": "a", "wrong": "a b"}])
    first, header, *_ = str(accuracy.accuracy(snaps)).splitlines()
    assert first.startswith("t: 4 of 6 items, 1 merged (the same item), 1 skipped (")
    assert "To keep more: use words that the tokenizer knows" in first and header.split()[:2] == ["label", "accuracy"]
    ablated = cl.ablate(crosscoder, snaps, task, effects, k=[1, 2], controls=cl.causal.Controls(n_draws=2))
    first, header, *_ = str(ablated).splitlines()
    assert first == "tiny, features ablated: metric in logits on 4 prompts in 4 groups"
    assert header.split() == ["label", "features", "k", "metric", "clean", "change_se"]


def test_effects_print_no_tensor(effects: cl.causal.Attribution) -> None:
    shown = str(effects)
    assert "tensor(" not in shown and len(shown.splitlines()) == 2 + 3 + 1
    assert shown.startswith("tiny: effects of ") and f" active features of {F}, by removal" in shown
    assert "4 prompts in 4 groups" in shown and re.search(r"feature \d+ [+-]\d\.\d{3}", shown)
    assert "read from all snapshots" in shown  # the caveat of a single feature


def test_objects_show_themselves_in_a_notebook(
    crosscoder: Crosscoder, snaps: Snapshots, acts: Activations, effects: cl.causal.Attribution
) -> None:
    hostile = Task.from_items("t", [{"prefix": HOSTILE, "correct": "sees", "wrong": "likes"}])
    traced = cl.trace(crosscoder, snaps, "the cat", ("sees", "likes"))
    with pytest.warns(UserWarning, match="tokens are held out"):
        found = cl.evolve(crosscoder, acts)
    several: list[tuple[Any, str]] = [
        (hostile, "1 items"), (snaps, "3 snapshots"), (acts, "blocks.1.hook_resid_post"), (crosscoder, f"{F:,}"),
        (effects, "largest effects"), (traced, "no error bars"), (found, f"of {F}"),
    ]  # fmt: skip
    for one, words in several:
        made = one._repr_html_()
        assert "<table" in made and words in made and "<img" not in made and len(made) < 10_000
    assert "1 traced prompt; " in str(traced) and "tensor(" not in str(traced)
