"""Write the pages of a run.

1. Each figure (`entries`) gets its tables and returns a chart, a grid, or a sentence about what is missing.
2. Its numbers go to `data/<entry>.csv`, what their columns mean to `data/columns.csv`; its figure goes into the page as
   compact JSON, escaped for a <script> element.
3. The data of single features go to scripts that a page loads when it shows the feature (`features`); every task has
   a page of its own.
4. Templates turn this into HTML. Plotly's script, copied from the installed package, draws the JSON offline.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from crosslens.causal.dates import DATES
from crosslens.errors import visible
from crosslens.report.chart import THEME, Chart, Frame, Grid, Prompts, short_count, task_link, task_pages
from crosslens.report.entries import Entry, advise
from crosslens.report.features import (
    SHARD,
    FeatureSet,
    effect_figure,
    presence_figure,
    rate_figure,
    read_figure,
    write_features,
)
from crosslens.report.figures.ablation import SET_TO
from crosslens.report.findings import find, warn
from crosslens.report.sections import PAGES, TASK, Page, Section
from crosslens.report.tables import MEASURES, Tables, by_measure, free_name, main_measure, missing_column
from crosslens.rundir import RunDir, delete, without_paths, write_text

_FEATURES = "features", "Features"
_ASSETS = ("report.css", "figures.js", "table.js", "feature.js")
_PLOTLY = "plotly.min.js"
_FILES = "files.json"
_MEANINGS = "columns.csv"
# Chromium then compiles the whole script while it loads, in another thread; it is a comment to other browsers
_EARLY = "//# allFunctionsCalledOnLoad\n"
_DIGITS = 5  # significant digits of the numbers in figures; the CSV files have all
_POSITION_DIGITS = 7  # of those along x, so that close steps stay apart
_UNKNOWN = "not recorded"
_NAME = "crosslens run"  # of a report whose run names no model


def write_report(run_dir: str | Path, *, title: str | None = None, consensus: bool = False) -> Path:
    """Write the report of a run directory: `report/index.html`, the other pages, and the files that they need.

    The pages open from disk, offline. If a table is missing, the page names the command that makes it.

    Args:
        run_dir: a directory with run.json.
        title: report title; by default the model and hook point.
        consensus: show only the features that most seeds have.

    Returns:
        The path of the first page.

    Raises:
        UserError: the directory contains no run, its run.json is not JSON, or there is no consensus of seeds.
    """
    run = RunDir.open(run_dir)
    with run.writing("report"):
        return _write(run, title, consensus)


def _shown(value: Any) -> Any:
    """Nested values with control characters written as their codes, as `Tables` does."""
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shown(inner) for inner in value]
    return visible(value) if isinstance(value, str) else value


def _write(run: RunDir, title: str | None, consensus: bool) -> Path:
    info = _shown(without_paths(run.read_json()))
    tables = Tables(run, info, consensus=consensus)
    warnings = warn(tables)
    data, written = run.report / "data", set[str]()
    data.mkdir(parents=True, exist_ok=True)

    def write(name: str, text: str) -> None:
        write_text(data / name, text)
        written.add(name)

    features = write_features(tables, write)
    tables.names = features.names
    of_features = list(tables.damaged.values())
    common = {
        "report": visible(
            title or (f"{info['model']}, {_text(info.get('hook_name'))}" if info.get("model") else _NAME)
        ),
        "nav": [*((page.name, page.title) for page in PAGES), _FEATURES],
        "theme": script_json(THEME),
        "plotly": _PLOTLY,
        "warnings": warnings,
    }
    pages = {
        f"{name}.html": render(
            f"{name}.html.j2",
            **common,
            page=_FEATURES[0],
            drawn=name == "feature",
            damaged=of_features,
            meanings=None,
            **_of_features(tables, features),
        )
        for name in ("features", "feature")
    }
    csv: dict[str, pd.DataFrame] = {_MEANINGS: pd.DataFrame()}  # whose name is taken
    meanings: list[dict[str, str]] = []

    def add(name: str, page: Page, task: str | None = None, **context: Any) -> None:
        done = set(csv)
        tables.damaged.clear()
        parts = [_make_part(section, tables, csv, task) for section in page.sections]
        if page is PAGES[0]:
            context |= {
                "facts": _facts(info, tables),
                "numbers": _numbers(info, tables),
                "findings": find(tables, set(csv)),
            }
        pages[name] = render(
            "page.html.j2",
            **{**common, "title": page.title, "facts": [], "numbers": [], "findings": [], "pager": None, **context},
            snapshots=_snapshot_facts(info) if page is PAGES[0] else [],
            page="causal" if page is TASK else page.name,
            drawn=any(block.kind == "chart" for part in parts for block in part.blocks),
            damaged=list(tables.damaged.values()),
            meanings=f"data/{_MEANINGS}" if csv.keys() - done else None,
            intro=page.intro,
            parts=parts,
        )
        entries = {f"{block.id}.csv": block.entry for part in parts for block in part.blocks}
        for name in csv.keys() - done:
            write(name, _without_formulas(csv[name]).to_csv(index=False))
            meanings.extend(_meanings(name, csv[name], entries.get(name)))
            csv[name] = pd.DataFrame()  # keep the name, free the memory

    of_tasks = task_pages(tables["tasks"])
    around = [None, *of_tasks.values(), None]
    for i, (task, file) in enumerate(of_tasks.items()):
        pager = {"before": around[i], "after": around[i + 2]}
        add(file, TASK, task, title=f"Task: {task}", numbers=_task_numbers(task, tables), pager=pager)
    for page in (*PAGES[1:], PAGES[0]):  # the first one links to figures of the others
        add(f"{page.name}.html", page)
    if meanings:
        write(_MEANINGS, pd.DataFrame(meanings).sort_values("file", kind="stable").to_csv(index=False))
    made = sorted({*(f"data/{name}" for name in written), *pages})
    for stale in {*_earlier(run.report)} - {*made}:
        delete(run.report / stale, run.path)
    write_text(run.report / _FILES, json.dumps(made, indent=1))
    assets = run.report / "assets"
    assets.mkdir(exist_ok=True)
    for name in _ASSETS:
        write_text(assets / name, (files("crosslens.report") / "templates" / name).read_text(encoding="utf-8"))
    write_text(assets / _PLOTLY, _EARLY + get_plotlyjs())
    for name, page in pages.items():
        write_text(run.report / name, page)
    return run.report / "index.html"


def _earlier(report: Path) -> list[str]:
    """The files that an earlier report wrote: only these are deleted when they are not written again."""
    try:
        names: Any = json.loads((report / _FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found = names if isinstance(names, list) else []
    return [name for name in found if isinstance(name, str) and re.fullmatch(r"(data/)?[^/\\]+\.(html|js|csv)", name)]


def _meanings(file: str, table: pd.DataFrame, entry: Entry | None) -> Iterator[dict[str, str]]:
    """What the columns of a CSV file mean, as rows of columns.csv."""
    for name in map(str, table.columns):
        about = entry and entry.describe(name)
        yield {
            "file": file,
            "column": name,
            "meaning": about.meaning if about else "",
            "unit": about.unit if about else "",
        }


def _without_formulas(table: pd.DataFrame) -> pd.DataFrame:
    """A table whose text cells do not begin as the formulas of spreadsheets do."""

    def quoted(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value

    texts = [name for name in table if not pd.api.types.is_numeric_dtype(table[name])]
    return table.assign(**{str(name): table[name].map(quoted) for name in texts})


def _links_by_baseline(tasks: list[str], tables: Tables) -> list[Markup]:
    """Links to tasks, those together whose effects are of features set to the same."""
    found: dict[str, list[Markup]] = {}
    for task in tasks:
        snapshots, words = tables[f"attribution/{task}.snapshots"], ""
        if snapshots is not None and "baseline" in snapshots:
            words = f" (features set to {SET_TO[str(snapshots['baseline'].iloc[0])]})"
        found.setdefault(words, []).append(task_link(task, tables["tasks"]))
    return [Markup("{}{}").format(Markup(", ").join(links), words) for words, links in found.items()]


def _of_features(tables: Tables, features: FeatureSet) -> dict[str, Any]:
    """Context of the templates of the pages Features and Feature."""
    snapshots = _snapshots(tables["snapshots"], features.labels)
    charts = {
        "presence": presence_figure(snapshots),
        "effects": effect_figure(snapshots, features.tasks, tables["tasks"]),
        "read": read_figure(snapshots),
        "rates": rate_figure(),
    }
    figures = {
        name: script_json(figure_spec(chart)) if features.ids and name not in features.missing else None
        for name, chart in charts.items()
    }
    known = snapshots.astype(object).where(snapshots.notna(), None)
    about = {
        "shard": SHARD,
        "first": min(features.ids, default=0),
        "last": max(features.ids, default=0),
        "count": len(features.ids),
        "labels": features.labels,
        "steps": known["step"].tolist(),
        "tokens": known["tokens"].tolist(),
        "tasks": features.tasks,
        "pages": task_pages(tables["tasks"]),
        "dates": list(DATES.values()),
    }
    links = _links_by_baseline(features.tasks, tables)
    return {
        "features": features, "figures": figures, "about": script_json(about), "task_links": links,
        "dates": about["dates"],
    }  # fmt: skip


def _snapshots(recorded: Frame | None, labels: list[str]) -> Frame:
    """The snapshots of the evolution table, with steps and tokens if recorded."""
    table = pd.DataFrame({"snapshot": range(len(labels)), "label": labels})
    known = pd.DataFrame({"label": [], "step": [], "tokens": []}) if recorded is None else recorded
    times = known.drop_duplicates("label").set_index("label").reindex(labels)
    return table.assign(step=times["step"].tolist(), tokens=times["tokens"].tolist())


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("crosslens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **context: Any) -> str:
    return _templates().get_template(template).render(**context)


@dataclass(frozen=True)
class Block:
    """An entry, ready for the template.

    Attributes:
        id: id of its anchor and of its CSV file; ends in the name of the task on a task's page.
        entry: what is shown.
        content: the figure, the table of numbers or the tinted prompts.
        data: JSON for a <script> element, of a figure or of prompts.
        words: without any of these: why there is nothing to show.
        missing: whether that is because a table does not exist.
    """

    id: str
    entry: Entry
    content: Chart | Grid | Prompts | None = None
    data: Markup = Markup()
    words: str = ""
    missing: bool = False

    @property
    def kind(self) -> str:
        """chart, grid or prompts; "nonetype" without content."""
        return type(self.content).__name__.lower()


@dataclass(frozen=True)
class Part:
    """A section, ready for the template: its blocks, or why there are none."""

    section: Section
    blocks: list[Block]
    words: str = ""


def _make_part(section: Section, tables: Tables, csv: dict[str, pd.DataFrame], task: str | None) -> Part:
    """Draw the figures of a section, and add their numbers to `csv`, by file name."""
    blocks = [_block(entry, tables, csv, task) for entry in section.entries]
    if all(block.missing for block in blocks):
        first = min(blocks, key=lambda block: block.entry.optional)
        return Part(section, [], first.words)  # once, instead of for every figure
    kept: list[Block] = []
    for block in blocks:
        said = {other.words for other in kept}  # the same reason for several figures is given once
        if not (block.missing and block.entry.optional) and not (block.words and block.words in said):
            kept.append(block)
    return Part(section, kept)


def _block(entry: Entry, tables: Tables, csv: dict[str, pd.DataFrame], task: str | None) -> Block:
    id = entry.name
    if task is not None:
        id += Path(task_pages(tables["tasks"])[task]).stem.removeprefix("task")
    id = free_name(id, {Path(name).stem for name in csv})
    found = [tables[name if task is None else name.replace("<task>", task)] for name in entry.tables]
    for name, table in list(zip(entry.tables, found, strict=True))[: entry.needed]:
        if table is None:
            return Block(id, entry, words=advise(name), missing=True)
    try:
        drawn = entry.draw(*found)
    except KeyError as error:
        return Block(id, entry, words=missing_column(error))
    if isinstance(drawn, str):
        return Block(id, entry, words=drawn)
    csv[f"{id}.csv"] = drawn.data
    if isinstance(drawn, Chart):
        spec = figure_spec(drawn)
        _add_tokens(spec["layout"].get("meta"), tables["snapshots"])
        return Block(id, entry, drawn, script_json(spec))
    return Block(id, entry, drawn, script_json(drawn.contents) if isinstance(drawn, Prompts) else Markup())


def _add_tokens(meta: Any, snapshots: Frame | None) -> None:
    """Add the tokens recorded in the run to an axis of steps whose table has none."""
    if snapshots is None or not isinstance(meta, dict) or meta.get("axis") != "steps" or "tokens" in meta:
        return
    known = snapshots.dropna(subset=["step", "tokens"]).astype({"step": int, "tokens": int})
    tokens = dict(zip(known["step"], known["tokens"], strict=True))
    if len({tokens[step] for step in meta["steps"] if step in tokens}) == len(meta["steps"]):
        meta["tokens"] = [tokens[step] for step in meta["steps"]]


def figure_spec(chart: Chart) -> dict[str, Any]:
    """Data and layout of a figure for the page's script."""
    spec = chart.figure.to_dict()
    return compact({"data": spec["data"], "layout": spec["layout"]})


def compact(value: Any, digits: int = _DIGITS) -> Any:
    """A figure's dictionary with rounded floats, None for non-finite ones, and without plotly's template."""
    if isinstance(value, dict):
        # typed arrays are dictionaries of strings, which pass unchanged
        return {
            key: compact(part, _POSITION_DIGITS if key in ("x", "positions", "tickvals") else digits)
            for key, part in value.items()
            if key != "template"
        }
    if isinstance(value, np.ndarray):  # of objects, such as labels
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [compact(part, digits) for part in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        rounded = float(f"{value:.{digits}g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
    return value


def script_json(value: Any) -> Markup:
    """JSON that is safe inside a <script> element: no character can end the element or open a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _facts(info: dict[str, Any], tables: Tables) -> list[tuple[str, str]]:
    """(name, value) of what run.json says of the run."""
    tasks, architecture, command = tables["tasks"], info.get("architecture"), info.get("command")
    if isinstance(architecture, dict):
        architecture = architecture.get("architecture")
    versions: dict[str, Any] = info.get("versions") or {"crosslens": info.get("crosslens")}
    timings: dict[str, Any] = info.get("timings") or {}
    facts = [
        ("Model", _text(info.get("model"))),
        ("Hook point", _text(info.get("hook_name"))),
        ("Dataset", _text(info.get("dataset"))),
        ("Training tokens per epoch", _count(info.get("n_tokens"))),
        ("Architecture", _text(architecture)),
        ("Features", _count(info.get("d_sae"))),
        ("Seed", _text(info.get("seed"))),
        ("Tasks", Markup(", ").join(task_link(task, tasks) for task in task_pages(tasks)) or "none"),
        ("Created", _text(info.get("created"))),
        ("Command", " ".join(map(str, command)) if isinstance(command, list) else _text(command)),
        ("Versions", ", ".join(f"{name} {_text(version)}" for name, version in versions.items())),
        ("Timings", ", ".join(_timing(stage, value) for stage, value in timings.items())),
        ("Peak memory", ", ".join(f"{verb} {_gib(value)}" for verb, value in (info.get("memory") or {}).items())),
    ]
    return [(name, value) for name, value in facts if value]


def _snapshot_facts(info: dict[str, Any]) -> list[tuple[str, ...]]:
    """(label, step, tokens, fingerprint) of each snapshot in run.json."""
    return [
        (_text(s.get("label")), _count(s.get("step")), _count(s.get("tokens")), str(s.get("fingerprint") or "")[:12])
        for s in info.get("snapshots") or []
    ]


def _numbers(info: dict[str, Any], tables: Tables) -> list[tuple[str, str]]:
    """Key numbers, as far as the tables and their columns exist."""
    snapshots = info.get("snapshots")
    numbers = [(str(len(snapshots)), "snapshots")] if snapshots else []
    lifecycles = tables.get("lifecycles", "measure", "alive", "origin")
    if lifecycles is not None:
        first = by_measure(lifecycles)
        alive, origin = first["alive"].astype(bool), first["origin"].dropna()
        numbers.append((f"{alive.sum():,}", f"live features of {len(alive):,}"))
        if len(origin):
            words = f"of {len(origin):,} are emergent by {MEASURES[main_measure(lifecycles)]}"
            numbers.append((f"{(origin == 'emergent').mean():.0%}", words))
    if (table := tables.get("evaluation", "explained_variance")) is not None:
        ev = table["explained_variance"]
        numbers.append((f"{ev.mean():.3f}", f"mean explained variance (lowest {ev.min():.3f})"))
    if (table := tables.get("evaluation", "l0")) is not None:
        numbers.append((f"{table['l0'].mean():.1f}", "features per token (L0)"))
    if (table := tables.get("accuracy", "snapshot", "accuracy", "n")) is not None:
        counted = table[table["snapshot"] == table["snapshot"].max()]
        if "few" in counted:
            counted = counted[~counted["few"].astype(bool)]  # too few items for a mean
        if len(counted):
            items, word = int(counted["n"].sum()), "task" if len(counted) == 1 else "tasks"
            mean = (counted["accuracy"] * counted["n"]).sum() / items
            about = f"accuracy over the {items:,} items of {len(counted)} {word}, last snapshot"
            numbers.append((f"{mean:.0%}", about))
    if (table := tables.get("completeness/*", "completeness_error")) is not None:
        numbers.append((f"{100 * table['completeness_error'].max():.2g}%", "largest completeness error"))
    return numbers


def _task_numbers(task: str, tables: Tables) -> list[tuple[str, str]]:
    """Key numbers of a task, as far as the tables and their columns exist."""
    numbers: list[tuple[str, str]] = []
    accuracy = tables.get(f"accuracy@{task}", "n", "accuracy", "accuracy_low", "accuracy_high")
    if accuracy is not None:
        last = accuracy.loc[accuracy["snapshot"].idxmax()]
        left_out = sum(int(last[name]) for name in ("merged", "skipped") if name in last)
        numbers.append((f"{int(last['n']):,}", f"items; {left_out:,} left out"))
        interval = f"{last['accuracy_low']:.1%} to {last['accuracy_high']:.1%}"
        numbers.append((f"{last['accuracy']:.1%}", f"accuracy at {last['label']} ({interval}; chance 50%)"))
    if (snapshots := tables.get(f"attribution/{task}.snapshots", "n", "metric_clean")) is not None:
        last = snapshots.loc[snapshots["snapshot"].idxmax()]
        numbers.append((f"{last['metric_clean']:+.2f}".replace("-", "−"), f"mean metric in logits at {last['label']}"))
        numbers.append((f"{int(last['n']):,}", "prompts in each mean effect"))
    if (effects := tables.get(f"attribution/{task}", "feature", "relie")) is not None:
        known, active = effects.loc[effects["relie"].notna(), "feature"].nunique(), effects["feature"].nunique()
        numbers.append((f"{known:,}", f"features with a significant effect, of {active:,} active"))
    return numbers


def _text(value: object) -> str:
    return _UNKNOWN if value is None or value == "" else str(value)


def _count(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 1e6 else short_count(value)
    return _text(value)


def _timing(stage: str, value: object) -> str:
    """An entry of `timings`: seconds of a stage, or what training measured beside them."""
    if stage == "tokens_per_second" and isinstance(value, int | float):
        return f"{value:,.0f} tokens per second"
    if stage == "peak_memory" and isinstance(value, int | float):
        return f"{_gib(value)} of memory"
    return f"{stage.replace('_', ' ')} {_seconds(value)}"


def _gib(value: object) -> str:
    return f"{value / 2**30:.2f} GiB" if isinstance(value, int | float) else _text(value)


def _seconds(value: object) -> str:
    if not isinstance(value, int | float):
        return _text(value)
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
