"""Figures of the report in a notebook."""

from __future__ import annotations

import html
import re
from pathlib import Path
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
from tests.plain_model import make_crosscoder
from tests.report.test_browser import _CHROMIUM, DRAWN, browser, chromium, shared  # noqa: F401


@pytest.fixture(scope="module")
def crosscoder(snaps: Snapshots) -> Crosscoder:
    return make_crosscoder(snaps, "batchtopk_crosscoder")


@pytest.fixture(scope="module")
def effects(crosscoder: Crosscoder, snaps: Snapshots, task: Task) -> cl.causal.Attribution:
    with pytest.warns(UserWarning, match="the 4 prompts of"):
        return cl.attribute(crosscoder, snaps, task, positions=True)


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


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome in PATH")
def test_a_trace_is_the_page_in_a_frame(
    browser: Any,
    crosscoder: Crosscoder,
    snaps: Snapshots,
    tmp_path: Path,  # noqa: F811
) -> None:
    shown = cl.trace(crosscoder, snaps, ["the cat", "the king"], ("sees", "likes")).plot()
    assert isinstance(shown, Inline)
    (document,) = re.findall('srcdoc="([^"]*)"', shown._repr_html_())
    assert html.unescape(document) == shown.html
    (tmp_path / "notebook.html").write_text(f"<!doctype html><title>n</title>{shown._repr_html_()}")
    page, said = browser.new_context(offline=True).new_page(), list[str]()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((tmp_path / "notebook.html").as_uri())
    frame = page.frame_locator("iframe")
    frame.locator(DRAWN).wait_for(state="attached")
    assert frame.locator(".prompts li .text").count() == 2
    before = frame.locator(".prompts li .next").first.inner_text()
    frame.locator(".prompts input").fill("0")
    assert frame.locator(".prompts li .next").first.inner_text() != before
    frame.locator(".through a").first.click()  # leads nowhere: its page is not here
    assert frame.locator(".prompts li .text").count() == 2 and not said
