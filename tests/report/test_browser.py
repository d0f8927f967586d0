"""The report in a real browser: headless Chromium, offline, from disk."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import crosslens as cl
from crosslens.pipeline.tracing import TABLES as TRACES
from crosslens.report import write_report
from crosslens.report.inline import Inline
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from tests.plain_model import F, make_crosscoder
from tests.report.test_features import TOKENS, add_features
from tests.report.test_pages import HOSTILE, PAGES, TASKS, _Page, add_study, lives, make_run, table, wide

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    # Chromium may stop drawing frames on a busy machine; the test is then repeated with a new one
    pytest.mark.flaky(reruns=1, only_rerun=["TimeoutError"]),
    pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome in PATH"),
]
ALL = (*PAGES, "features", "feature")
DRAWN = "html[data-figures=drawn]"
# finds elements of a figure that overlap
OVERLAPS = r"""() => {
  const box = (e) => e.getBoundingClientRect();
  const hit = (a, b) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const ticks = ".xtick text, .x2tick text, .x3tick text";
  const slanted = (e) => e.matches(ticks) && /rotate\(-45/.test(e.getAttribute("transform"));
  const kinds = ticks + ", .legend, .g-xtitle text, .g-ytitle text, .ytick text, .modebar-group, .annotation text, "
    + ".colorbar text";
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {
    if (!plot.clientWidth) continue;
    const parts = [...plot.querySelectorAll(kinds)], name = plot.dataset.spec, outer = box(plot);
    const title = plot.querySelector(".g-xtitle text");
    const ticks = [...plot.querySelectorAll(".xtick text")];
    const among = title && ticks.some((tick) => box(tick).bottom > box(title).top + 1);
    if (among) found.push(`${name}: x title among the ticks`);
    for (const [i, a] of parts.entries()) {
      const inner = box(a);
      const outside = inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.bottom > outer.bottom + 1;
      if (outside) found.push(`${name} is left by ${a.textContent}`);
      for (const b of parts.slice(i + 1)) {
        if (slanted(a) && slanted(b)) continue;  // boxes of slanted texts overlap where the texts do not
        if (hit(box(a), box(b))) found.push(`${name}: ${a.textContent} | ${b.textContent}`);
      }
    }
  }
  return found;
}"""


class Visitor:
    """A browser window showing a report; collects console messages."""

    def __init__(self, browser: Any, report: Path, width: int = 1280, dark: bool = False, **options: Any) -> None:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", offline=True,
            accept_downloads=True, **options,
        )  # fmt: skip
        self.page, self.report, self.troubles = context.new_page(), report, list[str]()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        # drivers log the speed of WebGL
        self.page.on("console", lambda m: self.troubles.append(m.text) if "GL Driver Message" not in m.text else None)

    def open(self, name: str, part: str = "") -> Any:
        """Open a page and wait until the figures in view are drawn."""
        self.page.goto((self.report / f"{name}.html").as_uri() + part)
        self.page.wait_for_selector(DRAWN)
        return self.page

    def feature(self, number: int) -> Any:
        """Show a feature and wait until its figures are drawn."""
        self.page.goto((self.report / "feature.html").as_uri() + f"#{number}")
        self.page.wait_for_selector(f"h1:text-is('Feature {number}')")
        self.page.wait_for_selector("#feature:not([hidden])")
        self.page.wait_for_function("document.querySelector('#figure-presence .plot').data")
        self.page.wait_for_selector(DRAWN)
        return self.page

    def scroll(self) -> None:
        """Scroll down the page until all figures are drawn."""
        for plot in self.page.query_selector_all(".plot"):
            if plot.is_visible():
                plot.evaluate("plot => plot.scrollIntoView()")  # playwright's own would wait for two frames
                plot.wait_for_selector(".main-svg", state="attached")
        self.page.wait_for_selector(DRAWN)

    def rows(self) -> list[list[str]]:
        """Cell texts of the features table."""
        return self.page.eval_on_selector_all(
            "#features tbody tr", "rows => rows.map((row) => [...row.cells].map((cell) => cell.textContent))"
        )

    def column(self, title: str) -> list[str]:
        titles = self.page.eval_on_selector_all("#features thead th", "cells => cells.map((cell) => cell.textContent)")
        return [row[titles.index(title)] for row in self.rows()]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as started:
        yield started.chromium


@pytest.fixture(scope="module")
def shared(chromium: Any) -> Iterator[Any]:
    found = chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    yield found
    found.close()


@pytest.fixture
def browser(request: pytest.FixtureRequest, chromium: Any, shared: Any) -> Iterator[Any]:
    """The module's browser; a new one when a test is repeated."""
    found = shared
    if getattr(request.node, "execution_count", 1) > 1:
        found = chromium.launch(executable_path=_CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
    yield found
    for context in found.contexts:
        context.close()
    if found is not shared:
        found.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Eight snapshots, two tasks, and 230 features in four scripts."""
    made = add_features(add_study(make_run(tmp_path_factory.mktemp("run") / "r", 8, n_features=230), "simple"))
    write_report(made.path)
    return made


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    made = add_features(add_study(make_run(tmp_path_factory.mktemp("run") / "r", 3), "simple"))
    write_report(made.path)
    return made


@pytest.mark.parametrize(
    ("which", "width", "dark"),
    [
        ("three", 1280, False),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in (("run", 375, False), ("three", 375, True), ("run", 1280, True))
        ),
    ],
)
def test_pages_load_and_nothing_overlaps(
    browser: Any, request: pytest.FixtureRequest, which: str, width: int, dark: bool
) -> None:
    report = request.getfixturevalue(which).report
    phone = {"is_mobile": True, "has_touch": True} if width < 500 else {}
    visitor = Visitor(browser, report, width, dark, **phone)
    for name in ALL:
        page = visitor.open(name, "#64" if name == "feature" else "")
        visitor.scroll()
        assert not visitor.troubles, (name, visitor.troubles)
        assert page.evaluate(OVERLAPS) == [], name
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        tables = "[...document.querySelectorAll('.scroll')].map((e) => e.scrollWidth - e.clientWidth)"
        if width > 500 and (which, name) != ("run", "features"):  # long labels of snapshots make that one scroll
            assert not any(page.evaluate(tables)), f"a table of {name} is wider than the page"
        drawn = page.locator(".js-plotly-plot .main-svg").count() and page.locator(".plot.js-plotly-plot").count()
        wanted = 4 if name == "feature" else len(_Page(report / "index.html", (name,)).specs())
        assert drawn == wanted, name
        line = ("rgb(109, 179, 255)", "rgb(26, 106, 200)")
        if wanted:
            text = page.evaluate("document.querySelector('main').innerHTML")
            assert (line[0] in text, line[1] in text) == (dark, not dark), name
            assert not dark or "rgb(43, 48, 54)" not in text, "ink of the light page"
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(22, 25, 29)" if dark else "rgb(252, 252, 251)")
    # no button of the toolbar may upload anything
    assert page.locator("[data-title='Reset axes']").count() or width < 500
    assert "Share chart" not in page.content()


@pytest.mark.exhaustive
def test_figures_out_of_view_are_drawn_for_paper_and_for_pictures_of_the_page(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report, dark=True)
    plots = "[...document.querySelectorAll('.plot')].map((plot) => Boolean(plot.querySelector('.main-svg')))"
    page = visitor.page
    page.add_init_script("window.requestIdleCallback = () => {}")  # never idle
    page.goto((run.report / "evolution.html").as_uri())
    page.wait_for_selector(DRAWN)
    assert not all(page.evaluate(plots))
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert all(page.evaluate(plots)), "without waiting"
    assert page.evaluate("Math.max(...[...document.querySelectorAll('.plot')].map((plot) => plot.layout.width))") <= 680
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    other = Visitor(browser, run.report)
    other.page.goto((run.report / "evolution.html").as_uri())
    other.page.wait_for_function(f"{plots}.every(Boolean)")
    assert other.page.evaluate("window.scrollY") == 0 and not visitor.troubles + other.troubles


def test_links_lead_to_every_page_and_back(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("index")
    for title in ("Evolution", "Causal effects", "Features", "Overview"):
        page.click(f".bar nav >> text={title}")
        page.wait_for_selector(f"h1:text-is('{title}')")
        assert page.locator("[aria-current=page]").inner_text() == title
    page.go_back()
    page.wait_for_selector("h1:text-is('Features')")
    assert not visitor.troubles


def test_search_and_sort_of_the_table(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("features")
    assert visitor.column("Feature") == [str(i) for i in range(50)]
    assert "230 features; showing 1 to 50" in page.inner_text("#found")
    page.fill("#search", "22")
    assert visitor.column("Feature") == [str(i) for i in (22, *range(220, 230))]
    page.fill("#search", "TRANSIENT emergent")
    source = lives(run)
    expected = source.query("origin == 'emergent' and fate == 'transient'")["feature"]
    assert visitor.column("Feature") == [str(i) for i in expected[:50]]
    assert f"{len(expected)} of 230 features match" in page.inner_text("#found")
    page.fill("#search", HOSTILE)
    tokens = visitor.column("Label"), visitor.column("Top token"), visitor.column("Promotes")
    assert tokens[0] and all(any(HOSTILE in text for text in row) for row in zip(*tokens, strict=True))
    page.fill("#search", "no such feature")
    assert visitor.rows() == [] and "No feature matches" in page.inner_text("#found")
    page.fill("#search", "")
    for title, reverse in (("Largest |IE|", True), ("Active (%)", True), ("Born", False)):
        page.click(f"#features thead >> text={title}")
        column = "birth" if title == "Born" else None
        shown = visitor.column("Feature")
        values = {
            "Largest |IE|": largest_effects(run),
            "Active (%)": dict(zip(source["feature"], source["firing_rate"], strict=True)),
            "Born": dict(zip(source["feature"], source["birth"].astype(float), strict=True)),
        }[title]
        ranked = [values.get(int(f), float("nan")) for f in shown]
        assert all(a == a for a in ranked), "features without a value come last"
        rounded = [float(f"{value:.2g}") for value in ranked]
        assert rounded == sorted(rounded, reverse=reverse), (title, column)
        order = page.get_attribute("#features th[aria-sort]", "aria-sort")
        assert order == ("descending" if reverse else "ascending")
        assert page.locator("#features th[aria-sort]").count() == 1
        page.click(f"#features thead >> text={title}")
        assert page.get_attribute("#features th[aria-sort]", "aria-sort") != order
    page.click("text=Last »")
    assert page.input_value("#page") == "5" and len(visitor.rows()) == 30
    assert not visitor.troubles


def largest_effects(run: RunDir) -> dict[int, float]:
    largest: dict[int, float] = {}
    for task in TASKS:
        for f, ie in table(run, f"attribution/{task}")[["feature", "ie"]].itertuples(index=False):
            largest[int(f)] = max(largest.get(int(f), 0.0), abs(ie))
    return largest


@pytest.mark.exhaustive
def test_the_table_by_keyboard_and_its_address(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("features")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main" and "#" not in page.url
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "search"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.type("persistent")
    page.keyboard.press("Tab")  # the snapshot of "Promotes"
    page.keyboard.press("Tab")  # the scrolling region
    for _ in ("Feature", "Label", "Complexity", "Top token"):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Top token"
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert page.get_attribute("#features th[aria-sort]", "aria-sort") == "descending"
    assert page.evaluate("document.activeElement.textContent") == "Top token"
    before = visitor.rows()
    page.click("#features tbody tr:nth-child(3) a")
    page.wait_for_selector("#feature:not([hidden])")
    assert page.inner_text("h1") == f"Feature {before[2][0]}"
    page.go_back()
    page.wait_for_selector("#finder:not([hidden])")
    assert visitor.rows() == before and page.input_value("#search") == "persistent"
    assert not visitor.troubles


def test_hostile_tokens_are_text(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    lens = table(run, "lens")
    for number in (5, 64, 130):
        page = visitor.feature(number)
        shown = page.eval_on_selector_all("#lens .chip", "chips => chips.map((chip) => chip.textContent)")
        part = lens[lens["feature"] == number]
        by_snapshot = [
            [*rows["promoted"], *rows["suppressed"]] for _, rows in part.sort_values("rank").groupby("snapshot")
        ]
        selected = by_snapshot[int(page.input_value("#lens-at"))]
        # the bars of the selected snapshot, then all snapshots, the last one first
        expected = [*selected, *(token for tokens in by_snapshot[::-1] for token in tokens)]
        names = {"\x00": "␀", "\n": "↵", "\u2028": "⟨U+2028⟩", "\u202egnirts": "⟨U+202E⟩gnirts",
                 "👩\u200d💻": "👩⟨U+200D⟩💻"}  # fmt: skip
        assert shown == [names.get(token, token) for token in expected]
        around = all_tokens(run).query(f"feature == {number}")
        texts = page.eval_on_selector_all("#examples > ol .token", "tokens => tokens.map((token) => token.textContent)")
        assert texts == [names.get(token, token) for token in around["token"]]
    assert set(TOKENS) <= set(lens["promoted"])
    visitor.feature(5)
    assert page.inner_text("#label") == f"plural {HOSTILE}" and HOSTILE in page.title()
    assert page.evaluate("document.querySelectorAll('main script:not([type])').length") == 0
    assert not visitor.troubles


def all_tokens(run: RunDir) -> Any:
    """Tokens around examples, near and far."""
    both = pd.concat([table(run, "example_tokens"), table(run, "example_contexts")], ignore_index=True)
    return both.sort_values(["feature", "rank", "position"])


def test_a_feature_shows_its_numbers(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    effects = table(run, "attribution/simple")
    examples = all_tokens(run)
    number = max(set(effects["feature"]) & set(examples["feature"]))
    page = visitor.feature(number)
    norms = wide(run, "norm").loc[number].to_numpy(dtype=float)
    lines = "document.querySelector('#figure-presence .plot').data.map((t) => [t.name, t.y])"
    drawn = dict(page.evaluate(lines))
    names = {"R²": "r2", "within-token R²": "within", "decoder norm": "norm"}
    read = [name for name, measure in names.items() if isinstance(lives(run, measure).loc[number, "origin"], str)]
    assert "R²" in read and list(drawn)[: len(read)] == read
    for name in read:
        values = wide(run, names[name]).loc[number].to_numpy(dtype=float).clip(0)
        assert drawn[name] == pytest.approx((values / values.max()).tolist(), abs=1e-3)
    band, line = page.evaluate("document.querySelector('#figure-effects .plot').data.map((t) => t.y)")[:2]
    rows = effects[effects["feature"] == number].sort_values("snapshot")
    assert line == pytest.approx(rows["ie"].tolist(), abs=1e-3 * rows["ie"].abs().max())
    bounds = [*(rows["ie"] + 2 * rows["ie_se"]), *(rows["ie"] - 2 * rows["ie_se"])[::-1]]
    assert band == pytest.approx(bounds, abs=3e-3 * rows["ie"].abs().max())
    # the colour of a token is what the feature writes at the snapshot: activation times norm, above the threshold
    activation = examples.query(f"feature == {number}")["activation"].to_numpy()
    silent = 0
    for s in range(len(norms)):
        page.fill("#at", str(s))
        page.dispatch_event("#at", "input")
        tints = page.eval_on_selector_all(
            "#examples > ol .token", "tokens => tokens.map((token) => Number(token.style.getPropertyValue('--w')))"
        )
        wrote = activation * norms[s]
        silent += sum((wrote > 0.02) & (wrote <= 0.25))
        wrote = wrote * (wrote > 0.25) / (activation.max() * norms.max())
        assert tints == pytest.approx(wrote, abs=5e-3)
        assert page.inner_text("#at-label") == wide(run, "norm").columns[s]
    assert silent, "nothing that a gate keeps back"
    assert not visitor.troubles


@pytest.mark.exhaustive
def test_stepping_through_features_and_back(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("feature", "#63")
    page.click("#after")
    page.wait_for_selector("h1:text-is('Feature 64')")  # of another script
    page.wait_for_selector("#feature:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "after"
    nearest = page.locator("#nearest a").first.inner_text()
    page.locator("#nearest a").first.click()
    page.wait_for_selector(f"h1:text-is('{nearest}')")
    assert page.evaluate("[document.activeElement.id, window.scrollY]") == ["name", 0]
    page.go_back()
    page.wait_for_selector("h1:text-is('Feature 64')")
    page.go_back()
    page.wait_for_selector("h1:text-is('Feature 63')")
    page.fill("#number", "229")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text-is('Feature 229')")
    assert page.url.endswith("#229") and page.get_attribute("#after", "href") is None
    for part, words in (("#230", "There is no feature 230"), ("#%3Cb%3E", "“<b>” is not a feature number")):
        visitor.open("feature", part)
        page.wait_for_selector("#trouble:not([hidden])")
        assert page.inner_text("#trouble") == f"{words}. Features are numbered 0 to 229."
    assert not visitor.troubles


@pytest.mark.exhaustive
def test_scales_and_units_of_the_axis(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("index")
    steps = [int(step) for step in table(run, "evaluation")["step"]]
    figure = "document.querySelector('#figure-accuracy .plot')"

    def axis() -> tuple[str, list[float]]:
        page.wait_for_timeout(100)
        page.wait_for_selector(DRAWN)
        points = page.evaluate(f"{figure}.data.at(-1).x")
        return page.evaluate(f"{figure}.layout.xaxis.title.text"), points

    title, logs = axis()
    assert title == "training steps (log scale, 0 set apart)"
    page.click("label:has-text('linear')")
    assert axis() == ("training steps", steps)
    page.click("label:has-text('tokens')")
    assert axis() == ("training tokens", [4096 * step for step in steps])
    page.focus("input[value=linear]")
    page.keyboard.press("ArrowLeft")
    title, found = axis()
    assert title == "training tokens (log scale, 0 set apart)"
    assert [x - found[1] for x in found[1:]] == pytest.approx([x - logs[1] for x in logs[1:]], abs=1e-5)
    ticks = page.eval_on_selector_all("#figure-accuracy .xtick text", "ticks => ticks.map((t) => t.textContent)")
    assert ticks[0] == "0" and ticks[-1] == "1.503M"
    assert not visitor.troubles


@pytest.mark.exhaustive
def test_features_open_from_figures_words_and_keys(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("evolution")
    plot = page.locator("#figure-evolution-map .plot")
    plot.scroll_into_view_if_needed()
    page.wait_for_selector("#figure-evolution-map .main-svg")
    rows = page.evaluate("document.querySelector('#figure-evolution-map .plot').layout.meta.rows")
    area = page.locator("#figure-evolution-map .nsewdrag").bounding_box()
    page.mouse.move(area["x"] + 0.5 * area["width"], area["y"] + 0.5 * area["height"])
    page.wait_for_timeout(300)
    page.mouse.click(area["x"] + 0.5 * area["width"], area["y"] + 0.5 * area["height"])
    page.wait_for_url("**/feature.html#*")
    assert abs(rows.index(int(page.url.partition("#")[2])) - len(rows) / 2) < 2
    page = visitor.feature(12)
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("h1:text-is('Feature 13')")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("h1:text-is('Feature 12')")
    page.focus("#number")
    page.keyboard.press("ArrowRight")  # moves in the field
    page.keyboard.press("Escape")
    assert page.inner_text("h1") == "Feature 12"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.wait_for_selector("#finder:not([hidden])")
    assert page.evaluate("document.activeElement.id") == "search" and page.input_value("#search") == ""
    page.keyboard.type("/")
    assert page.input_value("#search") == "/"
    page = visitor.open("task-simple")
    page.locator("#figure-words-simple").scroll_into_view_if_needed()
    prompts = table(run, "prompts/simple").query("prompt == 3 and snapshot == 1").sort_values("position")
    page.fill("#at-words-simple", "1")
    page.dispatch_event("#at-words-simple", "input")
    line = page.locator("#figure-words-simple .examples li").first
    assert line.locator(".where").inner_text() == "prompt 3"
    tints = line.locator(".token").evaluate_all(
        "tokens => tokens.map((t) => Number(t.style.getPropertyValue('--w')) * (t.classList.contains('down') ? -1 : 1))"
    )
    largest = table(run, "prompts/simple")["effect"].abs().max()
    expected = [math.copysign(math.sqrt(abs(effect) / largest), effect) for effect in prompts["effect"]]
    assert tints == pytest.approx(expected, abs=6e-3)
    links = line.locator("a").evaluate_all("links => links.map((a) => a.getAttribute('href'))")
    assert links == [f"feature.html#{feature}" for feature in prompts["feature"] if feature >= 0]
    assert not visitor.troubles


@pytest.mark.exhaustive
def test_tasks_open_from_figures_search_and_keys(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("index")

    def arrive(title: str) -> None:
        page.wait_for_selector(f"h1:text-is('Task: {title}')")
        page.wait_for_load_state()  # the page's script listens to keys from then on

    page.locator("#figure-accuracy figcaption >> text=subj_rel").click()
    arrive("subj_rel")
    page.keyboard.press("ArrowRight")  # the last one
    page.keyboard.press("ArrowLeft")
    arrive("simple")
    assert page.get_attribute("#before", "href") is None
    page.focus("#at-words-simple")
    page.keyboard.press("ArrowRight")  # moves the slider
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("ArrowRight")
    arrive("subj_rel")
    page.keyboard.press("/")
    page.wait_for_selector("#finder:not([hidden])")
    page.keyboard.type("REL subj")
    assert page.locator("#tasks a").all_inner_texts() == ["subj_rel"]
    page.fill("#search", "")
    assert not page.locator("#tasks").is_visible()
    page.fill("#search", "s")
    page.locator("#tasks a").first.click()
    arrive("simple")
    # a point of a task's line
    page = visitor.open("index")
    plot = page.locator("#figure-accuracy .plot")
    plot.scroll_into_view_if_needed()
    plot.locator(".main-svg").first.wait_for(state="attached")
    point = plot.locator(".scatterlayer .point").last.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_timeout(300)
    page.mouse.click(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    page.wait_for_url("**/task-*.html")
    page = visitor.feature(12)
    page.locator("#figure-effects figcaption >> text=simple").click()
    arrive("simple")
    assert not visitor.troubles


@pytest.mark.exhaustive
def test_promotes_and_context_are_those_of_the_selected_snapshot(browser: Any, run: RunDir) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("features")
    lens = table(run, "lens").query("rank == 0").set_index(["feature", "snapshot"])["promoted"]
    names = {"\x00": "␀", "\n": "↵", "\u2028": "⟨U+2028⟩", "\u202egnirts": "⟨U+202E⟩gnirts",
             "👩\u200d💻": "👩⟨U+200D⟩💻"}  # fmt: skip
    for value, snapshot in ((None, 7), ("00002", 2)):
        if value:
            page.select_option("#at", value)
            page.wait_for_timeout(300)
        assert visitor.column("Promotes") == [names.get(lens[f, snapshot], lens[f, snapshot]) for f in range(50)]
    page = visitor.feature(8)
    effects = pd.concat([table(run, f"attribution/{task}") for task in TASKS], ignore_index=True).query("feature == 8")
    strongest = effects.loc[effects["ie"].abs().idxmax(), "snapshot"]
    assert page.input_value("#at") == page.input_value("#lens-at") == str(strongest)
    page.fill("#lens-at", "3")
    page.dispatch_event("#lens-at", "input")
    assert page.input_value("#at") == "3" and page.inner_text("#lens-label") == page.inner_text("#at-label")
    rows = table(run, "lens").query("feature == 8 and snapshot == 3").sort_values("rank")
    shown = page.eval_on_selector_all("#lens .logits.up span", "cells => cells.map((c) => Number(c.textContent))")
    assert shown == pytest.approx(rows["promoted_logit"].tolist(), rel=1e-2)
    text = page.locator("#examples > ol .text[aria-expanded]").first
    far = text.locator(".far")
    assert far.count() and not far.first.is_visible()
    text.click()
    assert far.first.is_visible() and text.get_attribute("aria-expanded") == "true"
    assert page.locator("#samples details").count() == 3, "a sample of three tokens"
    assert "feature 221, correlation 0.9" in page.inner_text("#seeds-section")
    assert not visitor.troubles


@pytest.mark.exhaustive
def test_numbers_and_pictures_are_saved(browser: Any, run: RunDir, tmp_path: Path) -> None:
    visitor = Visitor(browser, run.report)
    page = visitor.open("index")

    def saved(selector: str) -> Path:
        with page.expect_download() as waiting:
            page.click(selector)
        target = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(target)
        return target

    picture = saved("#figure-accuracy button[data-picture=png]")
    assert picture.name == "accuracy.png" and picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    drawing = saved("#figure-accuracy button[data-picture=svg]").read_text(encoding="utf-8")
    assert drawing.startswith("<svg") and "training steps" in drawing and "rgb(252, 252, 251)" in drawing
    assert (tmp_path / "accuracy.svg").is_file()
    numbers = saved("#figure-accuracy a[download]").read_bytes()
    assert numbers == (run.report / "data" / "accuracy.csv").read_bytes()
    page = visitor.open("features")
    page.fill("#search", "emergent")
    page.click("#features thead >> text=Peak")
    rows = list(csv.DictReader(io.StringIO(saved("#numbers").read_text(encoding="utf-8"), newline="")))
    born = lives(run).query("alive and origin == 'emergent'").sort_values("peak", kind="stable")
    norms = wide(run, "norm").loc[8]
    assert [int(row["Feature"]) for row in rows] == born["feature"].tolist()
    assert [row["Peak"] for row in rows] == [norms.index[s] for s in born["peak"]]
    assert [float(row["Active (%)"]) for row in rows] == pytest.approx(100 * born["firing_rate"], rel=1e-2)
    page = visitor.feature(8)
    assert saved("#figure-presence button[data-picture=svg]").name == "feature-8-presence.svg"
    for part in ("#figure-presence", "#figure-effects", "#examples", "#lens"):
        target = saved(f"{part} button[data-numbers]")
        rows = list(csv.DictReader(io.StringIO(target.read_text(encoding="utf-8"), newline="")))
        if part == "#figure-presence":
            assert [row["label"] for row in rows] == norms.index.tolist()
            assert [float(row["norm"]) for row in rows] == pytest.approx(norms.tolist(), abs=1e-4 * norms.max())
        if part == "#figure-effects":
            assert {row["task"] for row in rows} == set(TASKS) and len(rows) == len(TASKS) * len(norms)
        if part == "#lens":
            lens = table(run, "lens").query("feature == 8")
            assert [row["promoted"] for row in rows] == lens["promoted"].tolist()
            assert [row["suppressed"] for row in rows] == lens["suppressed"].tolist()
    assert not visitor.troubles


@pytest.mark.exhaustive
def test_empty_states_in_words(browser: Any, tmp_path: Path) -> None:
    bare = RunDir(tmp_path / "bare")
    bare.write_json({"model": "m", "hook_name": "h"})
    write_report(bare.path)
    visitor = Visitor(browser, bare.report, 375)
    for name in ("index", "evolution", "causal", "features", "feature"):
        page = visitor.open(name)
        assert "crosslens" in page.inner_text("main") and page.locator(".words:visible").count(), name
    plain = make_run(tmp_path / "plain", 3)
    write_report(plain.path)
    visitor.report = plain.report
    page = visitor.open("feature", "#1")
    assert page.inner_text("main").count("Not collected yet") == 3
    assert "active on no prompt of the attributed tasks" in page.inner_text("#figure-effects")
    assert not visitor.troubles
    for lost, name, words in (
        ("data/features.js", "features", "data/features.js was not found"),
        ("data/features-00000.js", "feature", "data/features-00000.js was not found"),
        ("assets/plotly.min.js", "index", "assets/plotly.min.js was not found"),
    ):
        (plain.report / lost).unlink()
        page.goto((plain.report / f"{name}.html").as_uri())
        page.wait_for_function("words => document.querySelector('main').innerText.includes(words)", arg=words)


def test_labels_do_not_break_the_json(run: RunDir) -> None:
    about = json.loads(next(
        text for a, text in _Page(run.report / "index.html", ("feature",)).scripts if a.get("id") == "about"
    ))  # fmt: skip
    assert HOSTILE in about["labels"] and about["count"] == 230


def test_tokens_that_are_characters_only_together_are_joined(browser: Any, run: RunDir) -> None:
    page = Visitor(browser, run.report).open("features")
    rng = np.random.default_rng(0)
    shown = [byte for byte in range(256) if 32 < byte < 127 or (byte > 160 and byte != 173)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    names = [lambda part: "".join(alphabet[byte] for byte in part), lambda part: "".join(f"<0x{b:02X}>" for b in part)]
    for name, most in ((names[0], 5), (names[1], 2)):
        for text in ("Alors Saül dit à son écuyer", "он не в Москве — «да»", "日本語 👩‍💻 ok", "plain text"):
            data, at, tokens = text.encode(), 0, list[str]()
            while at < len(data):
                part = data[at : at + int(rng.integers(1, most))]
                at += len(part)
                try:
                    tokens.append(part.decode())
                except UnicodeDecodeError:  # as in `token_texts`
                    tokens += [name(part)] if name is names[0] else [name(bytes([byte])) for byte in part]
            pieces = page.evaluate("tokens => crosslens.joined(tokens)", tokens)
            assert "".join(piece[2] for piece in pieces) == text, tokens
            assert sum(piece[1] for piece in pieces) == len(tokens)
            assert [piece[0] for piece in pieces] == np.cumsum([0, *(p[1] for p in pieces)])[:-1].tolist()
    for whole in (["é", "c", "u", "y", "er"], ["Ã"], [" dit", " à", " «"], ["\ufeff", "<0xZZ>", "", "Ð"]):
        pieces = page.evaluate("tokens => crosslens.joined(tokens)", whole)
        assert pieces == [[i, 1, token] for i, token in enumerate(whole)], "nothing to join"


@pytest.fixture(scope="module")
def prompts(snaps: Snapshots, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Ten traced prompts, one of them a pair with hostile tokens, and a steered one."""
    crosscoder = make_crosscoder(snaps, "batchtopk_crosscoder")
    words = ["the cat", "the king sees a", "a child near the house", "the dog likes", "the bread", "a fish near the"]
    asked = [*words, *(f"{text} the dog" for text in words[:3]), ("the cat", "the dog")]
    share = torch.rand(F, len(snaps), generator=torch.Generator().manual_seed(0))
    found = cl.trace(crosscoder, snaps, asked, ("sees", "likes"), encoder_share=share)
    made = add_features(make_run(tmp_path_factory.mktemp("run") / "r", 3))
    tables = {name: getattr(found, attribute) for name, attribute in TRACES.items()}
    last = tables["trace_tokens"]["prompt"] == 9
    tables["trace_tokens"].loc[last, "token"] = [TOKENS[i % len(TOKENS)] for i in range(last.sum())]
    row = {
        "snapshot": 2, "label": "step20", "step": 20, "text": HOSTILE, "features": "3", "factor": 2.0, "add": math.nan,
        "plain": HOSTILE, "steered": "</script>", "prompt_loss": 2.0, "prompt_loss_change": -0.1, "text_loss": 2.0,
        "text_loss_change": 0.05, "n_tokens": 64,
    }  # fmt: skip
    made.save_tables({**tables, "steered": pd.DataFrame([row])})
    write_report(made.path)
    return made


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_prompts_at_every_snapshot(browser: Any, prompts: RunDir, width: int, dark: bool) -> None:
    phone = {"is_mobile": True, "has_touch": True} if width < 500 else {}
    visitor = Visitor(browser, prompts.report, width, dark, **phone)
    page = visitor.open("prompts")
    assert page.locator(".prompts li .text").count() == 10
    for s, label in enumerate(["step0", "step10", "step20"]):
        page.locator(".prompts input").fill(str(s))
        assert page.inner_text(".prompts output") == label
        shown = page.eval_on_selector_all(".prompts li", "items => items.map((item) => item.textContent)")
        traced: Any = prompts.table("traces")
        metric = traced[(traced["snapshot"] == s) & (traced["prompt"] == 8)]["metric"].item()
        assert f"logit difference {float(f'{metric:.3g}'):g}" in shown[1]  # the newest first
        assert "next there: " in shown[0] and "next there: " not in shown[1]
    strips = page.locator(".through").first
    assert strips.locator("tbody tr").count() > 0
    title = page.locator(".prompts .text .token").first.get_attribute("title")
    assert "logits" in title
    assert "†" in page.inner_text("main")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("main img").count() == 0 and not visitor.troubles
    link = strips.locator("a").first.get_attribute("href")
    assert link is not None and link.startswith("feature.html#")


def test_a_trace_is_the_page_in_a_frame(browser: Any, snaps: Snapshots, tmp_path: Path) -> None:
    crosscoder = make_crosscoder(snaps, "batchtopk_crosscoder")
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
