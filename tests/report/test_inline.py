"""Figures of the report in a notebook."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import pytest

import crosslens as cl
from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.report.entries import list_figures
from crosslens.report.inline import Inline
from crosslens.snapshots.collection import Snapshots
from crosslens.tasks.task import Task
from tests.plain_model import few_effects, make_crosscoder


@pytest.fixture(scope="module")
def crosscoder(snaps: Snapshots) -> Crosscoder:
    return make_crosscoder(snaps, "batchtopk_crosscoder")


@pytest.fixture(scope="module")
def effects(crosscoder: Crosscoder, snaps: Snapshots, task: Task) -> cl.causal.Attribution:
    return few_effects(crosscoder, snaps, task)


def test_effects_are_the_figure_of_the_report(effects: cl.causal.Attribution) -> None:
    drawn = effects.plot()
    entry = next(entry for entry in list_figures() if entry.name == "ie")
    tables = effects.to_frame(effects.sizes), None
    expected: Any = entry.draw(*tables)
    assert isinstance(drawn, go.Figure) and drawn.layout.title.text == "Signed effect (IE)"
    assert [line.to_plotly_json() for line in drawn.data] == [line.to_plotly_json() for line in expected.figure.data]
    words = effects.plot("words")
    assert isinstance(words, Inline) and "Effects in single prompts" in words.html


def test_evolutions_are_the_figures_of_the_report(crosscoder: Crosscoder, acts: Activations) -> None:
    with pytest.warns(UserWarning, match="tokens are held out"):
        found = cl.evolve(crosscoder, acts)
    assert isinstance(found.plot(), go.Figure) and isinstance(found.plot("origins"), go.Figure | Inline)
    with pytest.raises(UserError, match=r"the figure 'originz' is unknown; use one of .*; did you mean 'origins'"):
        found.plot("originz")
    with pytest.raises(UserError, match="the figure 'ie' needs more than is here"):
        found.plot("ie")
