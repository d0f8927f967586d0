"""Write the pages of a run.

1. Every entry of the pages' sections gets its tables, and draws a chart, a table, or says in words what is missing.
2. Its numbers go to `data/<entry>.csv`, its figure as compact JSON into the page, escaped for a <script> element.
3. What there is of each feature goes to scripts that a page loads when it shows that feature.
4. Templates make HTML of it; plotly's script, copied from the installed package, draws the JSON offline.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from crosslens.report.blocks import figure_spec, make_part, script_json
from crosslens.report.causes import CAUSES
from crosslens.report.chart import THEME, Frame
from crosslens.report.entries import Page
from crosslens.report.feature_figures import effect_figure, norm_figure
from crosslens.report.features import SHARD, FeatureSet, write_features
from crosslens.report.overview import overview
from crosslens.report.sections import EVOLUTION, OVERVIEW
from crosslens.report.tables import Tables
from crosslens.rundir import RunDir, write_text

PAGES = (
    Page("index", "Overview", "What the model learns when, and how well the crosscoder describes it.", OVERVIEW),
    Page("evolution", "Evolution", "When features are born, how they turn, and what becomes of them.", EVOLUTION),
    Page("causes", "Causes", "Which features a task depends on, at which snapshot, and how that was checked.", CAUSES),
)
_FEATURES = "features", "Features"
_ASSETS = ("report.css", "figures.js", "table.js", "feature.js")
_PLOTLY = "plotly.min.js"


def write_report(run_dir: str | Path, *, title: str | None = None) -> Path:
    """Write `report/index.html` of a run directory, the pages beside it, and the files that they need.

    The pages open from disk without a network. What a run has no table of is named on the page with the command that
    makes it.

    Args:
        run_dir: a directory with run.json.
        title: of the report; the model and hook point when None.

    Returns:
        The path of the first page.

    Raises:
        UserError: there is no run in the directory, or its run.json is not JSON.
    """
    run = RunDir.open(run_dir)
    info = run.read_json()
    tables = Tables(run, info)
    facts = overview(info, tables.__getitem__, run.tasks("attribution"))
    data, written = run.report / "data", set[str]()
    data.mkdir(parents=True, exist_ok=True)

    def write(name: str, text: str) -> None:
        write_text(data / name, text)
        written.add(name)

    features = write_features(tables, write)
    common = {
        "report": title or facts.title,
        "nav": [*((page.name, page.title) for page in PAGES), _FEATURES],
        "theme": script_json(THEME),
        "plotly": _PLOTLY,
    }
    pages = {
        f"{name}.html": _render(
            f"{name}.html.j2", **common, page=_FEATURES[0], drawn=name == "feature", **_of_features(tables, features)
        )
        for name in ("features", "feature")
    }
    csv: dict[str, pd.DataFrame] = {}
    for page in PAGES:
        done = set(csv)
        parts = [make_part(section, tables, csv) for section in page.sections]
        shown = facts if page is PAGES[0] else None
        pages[f"{page.name}.html"] = _render(
            "page.html.j2",
            **common,
            page=page.name,
            drawn=True,
            title=page.title,
            intro=page.intro,
            parts=parts,
            facts=shown,
        )
        for name in csv.keys() - done:
            write(name, csv[name].to_csv(index=False))
            csv[name] = pd.DataFrame()  # the name stays taken
    for stale in data.iterdir():
        if stale.name not in written:
            stale.unlink()
    assets = run.report / "assets"
    assets.mkdir(exist_ok=True)
    for name in _ASSETS:
        write_text(assets / name, (files("crosslens.report") / "templates" / name).read_text(encoding="utf-8"))
    write_text(assets / _PLOTLY, get_plotlyjs())
    for name, page in pages.items():
        write_text(run.report / name, page)
    return run.report / "index.html"


def _of_features(tables: Tables, features: FeatureSet) -> dict[str, Any]:
    """What the templates of the pages about features are given."""
    snapshots = _snapshots(tables["snapshots"], features.labels)
    figures: dict[str, Any] = {"norms": None, "effects": None}
    if features.ids:
        figures["norms"] = script_json(figure_spec(norm_figure(snapshots)))
    if features.ids and features.tasks:
        figures["effects"] = script_json(figure_spec(effect_figure(snapshots, features.tasks)))
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
    }
    return {"features": features, "figures": figures, "about": script_json(about)}


def _snapshots(recorded: Frame | None, labels: list[str]) -> Frame:
    """The snapshots of the evolution table, with their steps and tokens where these are recorded."""
    table = pd.DataFrame({"snapshot": range(len(labels)), "label": labels})
    known = pd.DataFrame({"label": [], "step": [], "tokens": []}) if recorded is None else recorded
    dates = known.drop_duplicates("label").set_index("label").reindex(labels)
    return table.assign(step=dates["step"].tolist(), tokens=dates["tokens"].tolist())


def _render(template: str, **context: Any) -> str:
    environment = Environment(
        loader=PackageLoader("crosslens.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)
