"""The pages of a run: figures against tables and CSV files, missing tables, escaping."""

from __future__ import annotations

import base64
import html
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from crosslens.errors import UserError
from crosslens.evolution.lifecycles import classify_lifecycles
from crosslens.report import write_report
from crosslens.report.chart import SnapshotAxis, _outline, shown
from crosslens.report.figures.lifecycles import MAX_ROWS, evolution_map, ordered_features
from crosslens.report.page import compact, script_json
from crosslens.report.tables import Tables, missing_column
from crosslens.rundir import RunDir
from crosslens.tables import find_table

HOSTILE = "<script>alert(1)</script>"
STEPS = {3: [0, 64, 1000], 8: [0, 16, 48, 64, 96, 128, 192, 367]}
TASKS = ("simple", "subj_rel")


def make_run(folder: Path, n_snapshots: int = 8, *, n_features: int = 120, seed: int = 0) -> RunDir:
    """A run directory with random tables, in which features are born, peak and matter one after the other."""
    rng = np.random.default_rng(seed)
    steps = STEPS[n_snapshots]
    labels = [f"step{step}" for step in steps]
    labels[1] = HOSTILE
    S = n_snapshots
    common = pd.DataFrame(
        {"snapshot": range(S), "label": labels, "step": steps, "tokens": [step * 4096 for step in steps]}
    )
    run = RunDir(folder)
    run.write_json(
        {
            "crosslens": "0.1.0",
            "created": "2031-01-01T00:00:00",
            "command": ["crosslens", "train", HOSTILE],
            "seed": 0,
            "model": "tiny " + HOSTILE,
            "hook_name": "blocks.1.hook_resid_post",
            "dataset": "documents.txt",
            "snapshots": [{**row, "fingerprint": f"{i:064x}"} for i, row in enumerate(common.to_dict("records"))],
            "architecture": "batchtopk_crosscoder",
            "d_sae": n_features,
            "timings": {"train": 61.5, "tokens_per_second": 1234.5, "peak_memory": 3 * 2**29, "study": 150},
            "memory": {"evolve": 2**29},
        }
    )
    grown = np.linspace(0, 1, S)
    run.save_table("accuracy", pd.concat([_accuracy(common, task, i, rng) for i, task in enumerate(TASKS)]))
    run.save_table(
        "evaluation",
        common.assign(
            explained_variance=0.9 + 0.08 * grown,
            explained_variance_per_token=0.88 + 0.08 * grown,
            l0=16 + rng.normal(0, 0.2, S),
            ce_clean=4.2 - 2 * grown,
            ce_spliced=4.2 - 1.9 * grown,
            ce_zero=4.2 + grown,
            ce_recovered=np.where(grown > 0, 1 - 0.1 * grown / np.maximum(3 * grown, 1e-9), np.nan),
            kl=0.1 * grown,
            dead_fraction=0.1,
        ),
    )
    evolution, lifecycles = _evolution(labels, n_features, rng)
    run.save_table("evolution", evolution.merge(common))
    run.save_table("lifecycles", lifecycles)
    for i, task in enumerate(TASKS):
        effects, snapshots = _effects(common, n_features, i, rng)
        run.save_table(f"attribution/{task}", effects)
        run.save_table(f"attribution/{task}.snapshots", snapshots)
        run.save_table(f"completeness/{task}", snapshots.assign(method="ig", agreement=np.nan))
        run.save_table(f"ablation/{task}", _ablation(common, snapshots["metric_clean"].tolist(), rng))
    norms = rng.uniform(0, 1, (12, S))
    run.save_table(
        "probe",
        pd.DataFrame(
            {
                "feature": np.repeat(np.arange(12), S),
                "snapshot": np.tile(np.arange(S), 12),
                "label": labels * 12,
                "step": steps * 12,
                "norm": norms.flatten(),
                "probe_error": np.clip(1 - norms + rng.normal(0, 0.2, norms.shape), 0, 1).flatten(),
                "n": 1000,
            }
        ),
    )
    return run


def lives(run: RunDir, measure: str = "r2") -> pd.DataFrame:
    """Lifecycles by one measure."""
    found = table(run, "lifecycles")
    return found[found["measure"] == measure].reset_index(drop=True)


def wide(run: RunDir, column: str) -> pd.DataFrame:
    """A column of the evolution table with a row per feature, and labels as columns."""
    long = table(run, "evolution").sort_values(["feature", "snapshot"])
    labels = long["label"].iloc[: long["snapshot"].max() + 1]
    return long.pivot(index="feature", columns="snapshot", values=column).set_axis(labels.tolist(), axis=1)


def add_study(run: RunDir, task: str, seed: int = 0) -> RunDir:
    """Add random tables for a task, as `causal.study` makes them."""
    rng = np.random.default_rng(seed)
    effects = table(run, f"attribution/{task}")
    common = effects.drop_duplicates("snapshot")[["snapshot", "label", "step"]].reset_index(drop=True)
    S = len(common)
    features = effects["feature"].unique()[10:22]
    columns = ["feature", "snapshot", "label", "step", "ie", "ie_se", "share_relie", "relie"]
    followed = effects.loc[effects["feature"].isin(features), columns].assign(
        norm=1.0, strength=rng.uniform(0, 1, 12 * S), rank=1, top=rng.random(12 * S) < 0.3, centre_of_mass=0.5,
        signed_class="emerged", examples=f"the {HOSTILE} [boy]",
    )  # fmt: skip
    order = {feature: i for i, feature in enumerate(features)}
    run.save_table(f"timeline/{task}", followed.assign(order=followed["feature"].map(order), **{"class": "emerged"}))
    run.save_table(
        f"languages/{task}",
        common.assign(language="en", other=HOSTILE, k=10, shared=rng.integers(0, 10, S), expected=3.2,
                      expected_low=1, expected_high=6,
                      p=0.2, level=0.95),
    )  # fmt: skip
    grid = common.rename(columns=lambda name: "ablated_at" if name == "snapshot" else f"ablated_at_{name}").merge(
        common.rename(columns=lambda name: "selected_at" if name == "snapshot" else f"selected_at_{name}"), how="cross"
    )
    share = rng.uniform(-0.5, 2, S * S)
    run.save_table(
        f"transfer/{task}",
        grid.assign(share=np.where(grid["ablated_at"] == 0, np.nan, share), k=15, shared=7)
        .sort_values(["selected_at", "ablated_at"], ignore_index=True),
    )  # fmt: skip
    n = 30
    total = rng.normal(size=S * n)
    pairs = common.loc[common.index.repeat(n)].reset_index(drop=True)
    run.save_table(
        f"additivity/{task}",
        pairs.assign(feature_a=[*range(n)] * S, feature_b=[*range(1, n + 1)] * S, effect_a=total / 2,
                     effect_b=total / 2, sum=total, joint=total * 0.9),
    )  # fmt: skip
    run.save_table(
        f"validation/{task}.summary",
        pd.DataFrame(
            [
                {"kind": kind, "target": target, "measure": measure, "correlation": 0.1 * i,
                 "correlation_low": 0.1 * i - 0.2, "correlation_high": 0.1 * i + 0.1, "level": 0.95, "n_features": 31}
                for kind in ("within", "pairs") for target in ("effect", "share")
                for i, measure in enumerate(MEASURES)
            ]
        ),
    )  # fmt: skip
    figures = {f"{name}{edge}": 0.9 for name in ("interacting", "deviation") for edge in ("", "_low", "_high")}
    run.save_table(
        f"additivity/{task}.snapshots",
        common.assign(n_pairs=n, k=15, n_prompts=60, **figures),
    )
    return run


def drop(run: RunDir, *names: str) -> RunDir:
    """Remove tables (or kinds of tables) that a test does not need, to save time."""
    for name in names:
        shutil.rmtree(run.path / name, ignore_errors=True)
        (run.path / f"{name}.parquet").unlink(missing_ok=True)
    return run


def _accuracy(common: pd.DataFrame, task: str, i: int, rng: np.random.Generator) -> pd.DataFrame:
    S = len(common)
    value = 0.5 + 0.5 / (1 + np.exp(-10 * (np.linspace(0, 1, S) - 0.4 - 0.2 * i)))
    value = np.clip(value + rng.normal(0, 0.01, S), 0, 1)
    return common.assign(
        task=task,
        accuracy=value,
        accuracy_low=value - 0.04,
        accuracy_high=np.minimum(value + 0.04, 1),
        metric=4 * value - 2,
        n=200,
    )


def _evolution(labels: list[str], F: int, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables evolution and lifecycles, with R2, within-token R2 of the even features, and norms."""
    S, alive = len(labels), rng.random(F) > 0.1
    norms = _presence(S, F, rng) * rng.uniform(1, 3, (F, 1))
    r2 = _presence(S, F, rng) * rng.uniform(0.1, 0.9, (F, 1))
    r2[6] = 0.01  # hardly predicted: no reading
    within = np.where(np.arange(F)[:, None] % 2, np.nan, 0.8 * r2)
    long = pd.DataFrame({"feature": np.repeat(np.arange(F), S), "snapshot": np.tile(np.arange(S), F)})
    long["label"] = labels * F
    for name, values in (("norm", norms), ("r2", r2 - 0.001), ("within", within)):
        long[name] = values.flatten()
    about = pd.DataFrame({"feature": np.arange(F), "alive": alive, "firing_rate": rng.uniform(0, 0.1, F)})
    about["kind"] = np.where(np.arange(F) % 2, "lexical", "contextual")
    parts = []
    for measure, values in (("norm", norms), ("r2", r2), ("within", np.nan_to_num(within))):
        life = classify_lifecycles(
            torch.from_numpy(np.where(alive[:, None] & (values.max(1) > 0.05)[:, None], values, 0))
        )
        parts.append(pd.concat([about, life], axis=1).assign(measure=measure))
    return long, pd.concat(parts, ignore_index=True)


def _presence(S: int, F: int, rng: np.random.Generator) -> np.ndarray:
    birth, s = rng.integers(0, S, F), np.arange(S)
    peak = np.minimum(birth + rng.integers(0, 3, F), S - 1)
    death = np.where(rng.random(F) < 0.2, peak + 2, S)
    there = (s >= birth[:, None]) & (s < death[:, None])
    found = np.where(there, 1.0, 0.1) * np.exp(-0.1 * np.abs(s - peak[:, None]))
    if S > 4:
        found[:4] = 0.1
        found[:4, 2] = 1  # present at one snapshot only: never born
    return found


def _effects(common: pd.DataFrame, F: int, i: int, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    S = len(common)
    n = F // 2
    ie = rng.standard_t(2, (n, S)) * np.linspace(0.02, 0.4, S) * rng.choice([0.1, 1], (n, 1))
    relie = np.abs(ie) / np.abs(ie).sum(1, keepdims=True)
    share = np.abs(ie) / np.abs(ie).sum(0)
    share = share / share.sum(1, keepdims=True)
    relie[:7] = share[:7] = np.nan
    effects = pd.DataFrame(
        {
            "feature": np.repeat(np.arange(n) * 2, S),
            "snapshot": np.tile(np.arange(S), n),
            "label": common["label"].tolist() * n,
            "step": common["step"].tolist() * n,
            "ie": ie.flatten(),
            "ie_se": np.abs(ie).flatten() / 5,
            "share_relie": share.flatten(),
            "relie": relie.flatten(),
            "mostly_later": np.tile(np.arange(S) < 1, n),
            "reldec": np.full(n * S, 1 / S),
        }
    )
    clean = 6 * (np.linspace(0, 1, S) - 0.1 - 0.1 * i)
    snapshots = common[["snapshot", "label", "step"]].assign(
        metric_clean=clean,
        metric_baseline=0.1,
        features_effect=ie.sum(0),
        error_effect=clean - 0.1 - ie.sum(0),
        method="removal",
        agreement=np.linspace(0.9, 0.5, S),
        completeness_error=10.0 ** rng.uniform(-6, -3, S),
        n=150,
    )
    return effects, snapshots


def _ablation(common: pd.DataFrame, clean: list[float], rng: np.random.Generator) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for s, label, step in zip(common["snapshot"], common["label"], common["step"], strict=True):
        for mode, sizes in (("ablate", (1, 5, 15, 50)), ("keep", (0, 5, 15, 50, 100))):
            for features in ("top", "random", "size_matched") if mode == "ablate" else ("top", "random"):
                for k in sizes if features == "top" else sizes[-4:]:
                    part = math.log(k + 1) / math.log(101) * (1 if features == "top" else 0.2)
                    metric = clean[s] * (1 - part if mode == "ablate" else part) + rng.normal(0, 0.05)
                    rows.append(
                        {
                            "snapshot": s, "label": label, "step": step, "mode": mode, "features": features,
                            "error": mode == "ablate", "k": k, "metric": metric,
                            "metric_sd": math.nan if features == "top" else 0.3, "clean": clean[s],
                            "metric_low": math.nan if features == "top" else metric - 0.3,
                            "metric_high": math.nan if features == "top" else metric + 0.2,
                            "reconstruction_only": 0.9 * clean[s], "n_draws": 1 if features == "top" else 20,
                        }
                    )  # fmt: skip
    return pd.DataFrame(rows)


MEASURES = ("relie", "share_relie", "reldec", "decodability")
PAGES = ("index", "evolution", "causal", "prompts", "task-simple", "task-subj_rel")


class _Page(HTMLParser):
    """Parsed pages: elements with attributes, text of scripts, visible text."""

    def __init__(self, index: Path, names: tuple[str, ...] = PAGES) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._script: dict[str, str | None] | None = None
        for name in names:
            if names is not PAGES or not name.startswith("task") or index.with_name(f"{name}.html").is_file():
                self.feed(index.with_name(f"{name}.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs)
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[-1] = (self._script, self.scripts[-1][1] + data)
        else:
            self.text += data

    def specs(self) -> dict[str, dict[str, Any]]:
        """Figures by name."""
        json_scripts = [(a, text) for a, text in self.scripts if a.get("type") == "application/json"]
        return {
            str(a["id"])[len("figure-") : -len("-spec")]: json.loads(text)
            for a, text in json_scripts
            if str(a["id"]).endswith("-spec")
        }


@pytest.fixture(scope="module", params=sorted(STEPS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, _Page, int]:
    run = make_run(tmp_path_factory.mktemp("run") / "r", request.param)
    return run, _Page(write_report(run.path)), request.param


def table(run: RunDir, name: str) -> pd.DataFrame:
    found = run.table(name)
    assert found is not None
    return found


def csv(run: RunDir, name: str) -> pd.DataFrame:
    return pd.read_csv(run.report / "data" / f"{name}.csv")


def lines(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Traces by name, without the bands."""
    return {trace["name"]: trace for trace in spec["data"] if trace.get("meta") != "band"}


def close(drawn: Any, exact: Any, rel: float = 6e-5) -> bool:
    a, b = (np.asarray(list(values), dtype=float) for values in (drawn, exact))
    return a.shape == b.shape and np.allclose(a, b, rtol=rel, atol=1e-12, equal_nan=True)


def test_files_are_complete_and_local(written: tuple[RunDir, _Page, int]) -> None:
    run, page, _ = written
    linked: set[str] = set()
    for name in (*PAGES, "features", "feature"):
        one = _Page(run.report / "index.html", (name,))
        links = {str(a.get("href") or a.get("src")) for _, a in one.elements if a.get("href") or a.get("src")}
        ids = [a["id"] for _, a in one.elements if "id" in a]
        assert len(ids) == len(set(ids)), name
        assert {link[1:] for link in links if link.startswith("#") and len(link) > 1} <= set(ids), name
        linked |= {link.partition("#")[0] for link in links if not link.startswith(("#", "data:,"))}
        assert (run.report / f"{name}.html").stat().st_size < 300_000
        current = [a["href"] for _, a in one.elements if a.get("aria-current") == "page"]
        assert current == [f"{'features' if name == 'feature' else 'causal' if 'task' in name else name}.html"]
    assert all((run.report / link).is_file() for link in linked), linked
    data = {f"data/{path.name}" for path in (run.report / "data").iterdir()}
    shards = {"data/features-00000.js", "data/features-00001.js"}
    assert data == {link for link in linked if link.startswith("data/")} | shards
    assert "plotly.js v" in (run.report / "assets" / "plotly.min.js").read_text(encoding="utf-8")[:200]
    assert {path.name for path in run.report.iterdir()} == {
        *(f"{name}.html" for name in (*PAGES, "features", "feature")), "assets", "data", "files.json",
    }  # fmt: skip


def test_timings_have_units(written: tuple[RunDir, _Page, int]) -> None:
    text = _Page(written[0].report / "index.html", ("index",)).text
    assert "train 61.5 s, 1,234 tokens per second, 1.50 GiB of memory, study 2.5 min" in text
    assert "evolve 0.50 GiB" in text


def test_every_figure_is_defined_and_has_its_numbers(written: tuple[RunDir, _Page, int]) -> None:
    run, page, _ = written
    specs = page.specs()
    stems = {path.stem for path in (run.report / "data").glob("*.csv")} - {"columns"}
    assert set(specs) == {stem for stem in stems if not stem.startswith(("ie-table", "tasks"))}
    assert len(specs) == 11 + 10 * len(TASKS)
    assert "Latent scaling" not in page.text and "Additivity" not in page.text, "optional, and without tables"
    assert page.text.count("Numbers (CSV)") == len(stems)
    for name, spec in specs.items():
        assert "template" not in spec["layout"]
        if "ternary" in spec["layout"]:
            assert all(spec["layout"]["ternary"][axis]["title"]["text"] for axis in ("aaxis", "baxis", "caxis"))
        else:
            assert spec["layout"]["xaxis"]["title"]["text"], name
            assert spec["layout"]["yaxis"]["title"]["text"] or name == "origins", name
    definitions = [a for tag, a in page.elements if tag == "p" and a.get("class") == "definition"]
    assert len(definitions) == len(stems) + 1  # as many features are dead at every snapshot, which is not drawn
    for kind in ("png", "svg"):
        assert sum(a.get("data-picture") == kind for _, a in page.elements) == len(specs)


def test_every_column_of_the_numbers_has_a_meaning(written: tuple[RunDir, _Page, int]) -> None:
    run, page, _ = written
    meanings = pd.read_csv(run.report / "data" / "columns.csv", keep_default_na=False)
    assert meanings["meaning"].all(), meanings[meanings["meaning"] == ""]
    for path in (run.report / "data").glob("*.csv"):
        if path.name != "columns.csv":
            columns = meanings.loc[meanings["file"] == path.name, "column"].tolist()
            assert pd.read_csv(path, nrows=1).columns.tolist() == columns
    titles = {a["title"] for tag, a in page.elements if tag == "th" and "title" in a}
    declared = find_table("accuracy")
    assert declared is not None and declared.columns["n"].meaning in titles


def test_accuracy_and_bands_equal_the_table(written: tuple[RunDir, _Page, int]) -> None:
    run, page, _ = written
    spec, source = page.specs()["accuracy"], table(run, "accuracy")
    pd.testing.assert_frame_equal(csv(run, "accuracy"), source[csv(run, "accuracy").columns].reset_index(drop=True))
    bands = {trace["name"]: trace for trace in spec["data"] if trace.get("meta") == "band"}
    for task in TASKS:
        rows = source[source["task"] == task].sort_values("snapshot")
        assert close(lines(spec)[task]["y"], rows["accuracy"])
        assert close(bands[task]["y"], [*rows["accuracy_high"], *reversed(rows["accuracy_low"].tolist())])


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("explained-variance", ["explained_variance", "explained_variance_per_token"]),
        ("l0", ["l0"]),
        ("cross-entropy", ["ce_clean", "ce_spliced", "ce_zero"]),
        ("kl", ["kl"]),
    ],
)
def test_reconstruction_equals_the_table(written: tuple[RunDir, _Page, int], name: str, columns: list[str]) -> None:
    run, page, _ = written
    source = table(run, "evaluation")
    for trace, column in zip(page.specs()[name]["data"], columns, strict=True):
        assert close(trace["y"], source[column])
        assert close(csv(run, name)[column], source[column], rel=1e-12)


@pytest.mark.parametrize(("name", "measure"), [("evolution-map", "r2"), ("norm-map", "norm")])
def test_evolution_map_is_the_table_in_order(written: tuple[RunDir, _Page, int], name: str, measure: str) -> None:
    run, page, S = written
    spec, source = page.specs()[name], lives(run, measure)
    z = spec["data"][0]["z"]
    rows, columns = (int(n) for n in z["shape"].split(","))
    drawn = np.frombuffer(base64.b64decode(z["bdata"]), dtype=np.uint8).reshape(rows, columns) / 100
    features = spec["layout"]["meta"]["rows"]
    assert columns == S and sorted(features) == source.loc[source["origin"].notna(), "feature"].tolist()
    assert len(features) == source["alive"].sum() - (measure == "r2") * source["alive"][6]
    values = wide(run, measure).to_numpy().clip(0)
    exact = np.array([values[f] / max(values[f]) for f in features])
    assert np.abs(drawn - exact).max() <= 0.005 + 1e-9
    assert np.allclose(csv(run, name).iloc[:, -S:], exact, rtol=1e-12)
    by_feature = source.set_index("feature")
    rank = {"initial": 0, "emergent": 1, "never": 2}
    keys = [
        (
            rank[by_feature.origin[f]],
            math.inf if pd.isna(by_feature.birth[f]) else by_feature.birth[f],
            by_feature.peak[f],
        )
        for f in features
    ]
    assert keys == sorted(keys)


def test_large_evolution_map_is_thinned_and_says_so() -> None:
    F = 3 * MAX_ROWS
    evolution, lifecycles = _evolution(list("abcde"), F, np.random.default_rng(0))
    snapshots = pd.DataFrame({"snapshot": range(5), "label": list("abcde"), "step": range(5)})
    chart = evolution_map(evolution, lifecycles, snapshots, measure="norm")
    assert not isinstance(chart, str)
    by_norm = lifecycles.query("measure == 'norm'")
    alive = int(by_norm["alive"].sum())
    assert len(chart.data) == MAX_ROWS == len(set(chart.data["feature"]))
    words = f"{alive:,} features by decoder norm; left out: {F - alive:,} dead. {MAX_ROWS:,} of them are drawn"
    assert words in chart.note
    order = ordered_features(by_norm)["feature"].tolist()
    places = sorted(order.index(f) for f in chart.data["feature"])  # clustered within groups
    assert places[0] == 0 and places[-1] == alive - 1 and max(np.diff(places)) <= -(-alive // MAX_ROWS)


def test_births_and_origins_are_counted(written: tuple[RunDir, _Page, int]) -> None:
    run, page, S = written
    source = lives(run).to_dict("records")
    births, origins = page.specs()["births"], page.specs()["origins"]
    assert [trace["name"] for trace in births["data"]] == ["persistent", "transient", "by decoder norm"]
    for trace in births["data"]:
        by_norm = trace["name"] == "by decoder norm"
        counts = [
            sum(r["origin"] == "emergent" and (by_norm or r["fate"] == trace["name"]) and r["birth"] == s for r in rows)
            for rows in [lives(run, "norm").to_dict("records") if by_norm else source]
            for s in range(S)
        ]
        assert trace["y"] == counts == csv(run, "births")[trace["name"]].tolist()
    names = {"R²": "r2", "within-token R²": "within", "decoder norm": "norm"}
    of = {measure: lives(run, measure).to_dict("records") for measure in names.values()}
    for trace in origins["data"]:
        counts = [
            sum(r["origin"] == origin and r["fate"] == trace["name"] for r in of[names[name]])
            for name, origin in zip(*trace["y"], strict=True)
        ]
        assert trace["x"] == counts == csv(run, "origins")[trace["name"]].tolist()
    assert sum(map(sum, (trace["x"] for trace in origins["data"]))) == table(run, "lifecycles")["origin"].notna().sum()
    alive = sum(r["alive"] for r in source)
    assert f"{alive} live features, {len(source) - alive} dead." in page.text


@pytest.mark.parametrize("column", ["share_relie", "relie"])
def test_three_snapshots_make_a_triangle_and_others_lines(written: tuple[RunDir, _Page, int], column: str) -> None:
    run, page, S = written
    name = f"{column.replace('_', '-')}-simple"
    spec, source = page.specs()[name], table(run, "attribution/simple").dropna(subset=["relie"])
    assert {trace["type"] for trace in spec["data"]} == {"scatterternary" if S == 3 else "scatter"}
    relie = source.set_index(["feature", "snapshot"])[column]
    if S == 3:
        drawn = 0
        for trace in spec["data"]:
            for (feature, strongest, _), a, b, c in zip(
                trace["customdata"], trace["a"], trace["b"], trace["c"], strict=True
            ):
                assert close([b, c, a], relie[feature])
                effects = source.loc[source["feature"] == feature, "ie"].tolist()
                assert close([strongest], [max(effects, key=abs)])
                assert (strongest > 0) == trace["name"].startswith("supports")
                drawn += 1
        assert drawn == source["feature"].nunique() == len(csv(run, name))
        assert "7 without a significant effect" in page.text
    else:
        largest = source.groupby("feature")["ie"].agg(lambda effects: max(abs(e) for e in effects))
        wanted = largest.sort_values(ascending=False).index[:12].tolist()
        assert list(lines(spec)) == [str(feature) for feature in wanted]
        assert all(close(lines(spec)[str(feature)]["y"], relie[feature]) for feature in wanted)


def test_signed_effects_table_and_budget(written: tuple[RunDir, _Page, int]) -> None:
    run, page, S = written
    source = table(run, "attribution/subj_rel")
    ie = source.set_index(["feature", "snapshot"])["ie"]
    for name, trace in lines(page.specs()["ie-subj_rel"]).items():
        assert close(trace["y"], ie[int(name)])
    numbers = csv(run, "ie-table-subj_rel")
    assert len(numbers) == 20 * S
    assert close(numbers["ie"], [ie[f, s] for f, s in zip(numbers["feature"], numbers["snapshot"], strict=True)], 1e-12)
    links = {str(a.get("href")) for _, a in page.elements}
    assert {f"feature.html#{feature}" for feature in numbers["feature"]} <= links
    # the effects at the first snapshot are of features that later ones activate
    for row in numbers.head(2).to_dict("records"):
        cell = f"{row['ie']:+.3f} ±\N{NO-BREAK SPACE}{row['ie_se']:.3f}".replace("-", "−")
        assert cell in page.text and (f"{cell}†" in page.text) == (row["snapshot"] == 0)
    assert "† More than half of what activates the feature is read from later snapshots" in page.text
    last = f"exact ablation 0.50 at the last snapshot, lowest 0.50 at {numbers['label'].iloc[-1]}."
    assert f"Estimated by removal; rank correlation of the largest effects with {last}" in page.text
    budget = lines(page.specs()["budget-subj_rel"])
    total = [sum(ie[:, s]) for s in range(S)]
    assert close(budget["sum of IE over features"]["y"], total)
    parts = [budget[name]["y"] for name in ("sum of IE over features", "error node", "baseline metric")]
    assert np.allclose(np.sum(parts, 0), budget["clean metric"]["y"], atol=1e-2)


def test_effects_against_shares_are_pairs_of_the_table(written: tuple[RunDir, _Page, int]) -> None:
    run, page, S = written
    spec, numbers = page.specs()["ie-relie-simple"], csv(run, "ie-relie-simple")
    source = table(run, "attribution/simple").set_index(["feature", "snapshot"])
    trace = spec["data"][0]
    names = spec["layout"]["coloraxis"]["colorbar"]["ticktext"]
    for (feature, _, _), s, x, y in zip(
        trace["customdata"], trace["marker"]["color"], trace["x"], trace["y"], strict=True
    ):
        row = source.loc[(feature, s)]
        assert close([x, y], [row["share_relie"], row["ie"]])
    assert len(trace["x"]) == len(numbers) == S * source["relie"].dropna().index.get_level_values(0).nunique()
    assert names == ["step 0", "step 1k" if S == 3 else "step 367"]


def test_validation_shows_every_correlation_with_its_interval(tmp_path: Path) -> None:
    run = add_study(drop(make_run(tmp_path, 3), "probe", "evolution", "evaluation"), "simple")
    spec = _Page(write_report(tmp_path)).specs()["validation-simple"]
    source = table(run, "validation/simple.summary")
    assert len(spec["data"]) == 4
    for trace, (_, rows) in zip(spec["data"], source.groupby(["kind", "target"], sort=False), strict=True):
        value = rows.set_index("measure").loc[["share_relie", "relie", "decodability", "reldec"]]
        assert trace["x"] == ["share RelIE", "RelIE", "decodability (R²)", "RelDec (decoder norm)"]
        assert close(trace["y"], value["correlation"])
        assert close(trace["error_y"]["array"], value["correlation_high"] - value["correlation"])
        assert close(trace["error_y"]["arrayminus"], value["correlation"] - value["correlation_low"])


def test_accuracy_says_what_is_left_out_and_where_it_is_at_chance(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 3), "probe", "evolution", "evaluation", "attribution", "ablation")
    accuracy = table(run, "accuracy")
    few = accuracy["task"] == TASKS[0]
    accuracy = accuracy.assign(
        few=few, n=np.where(few, 7, 200), at_chance=(accuracy["snapshot"] == 0) & few, skipped=3,
        reasons="too long: 3", merged=2, merged_reasons="the same item: 2", accuracy=np.where(few, 0.1, 0.9),
    )  # fmt: skip
    run.save_table("accuracy", accuracy)
    text = _Page(write_report(tmp_path)).text
    left_out = "2 merged (the same item: 2), 3 skipped (too long: 3)"
    first = accuracy["label"].iloc[0]
    assert f"{TASKS[0]} 7, too few for means over tasks, {left_out}, at chance at {first}" in text
    assert f"{TASKS[1]} 200, {left_out}" in text
    assert "90%" in text and "accuracy over the 200 items of 1 task," in text  # without the task of 7 items
    assert f"Task {TASKS[0]} has 7 items, too few for means over tasks" in text


def test_tasks_measured_on_different_snapshots_share_an_axis(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 8), "probe", "evolution", "evaluation", "attribution", "ablation")
    accuracy = table(run, "accuracy")
    late = (accuracy["task"] == TASKS[1]) & (accuracy["snapshot"] >= 3)
    fewer = accuracy[late].assign(snapshot=lambda rows: rows["snapshot"] - 3)
    run.save_table("accuracy", pd.concat([fewer, accuracy[accuracy["task"] == TASKS[0]]], ignore_index=True))
    page = _Page(write_report(tmp_path))
    drawn = lines(page.specs()["accuracy"])
    assert drawn[TASKS[1]]["x"] == drawn[TASKS[0]]["x"][3:] and len(drawn[TASKS[0]]["x"]) == 8
    assert close(drawn[TASKS[1]]["y"], accuracy.loc[late, "accuracy"])
    assert "accuracy over the 400 items of 2 tasks" in page.text


def test_completeness_is_in_percent(written: tuple[RunDir, _Page, int]) -> None:
    run, page, _ = written
    for task in TASKS:
        share = table(run, f"completeness/{task}")["completeness_error"]
        assert close(lines(page.specs()["completeness"])[task]["y"], 100 * share)


@pytest.mark.parametrize("mode", ["ablate", "keep"])
def test_ablation_shares(written: tuple[RunDir, _Page, int], mode: str) -> None:
    run, page, S = written
    rows = [r for r in table(run, "ablation/simple").to_dict("records") if r["mode"] == mode]
    largest = max(abs(r["clean"]) for r in rows)
    by_key = {(r["features"], r["snapshot"], r["k"]): r for r in rows}

    def share(kind: str, s: int, k: int) -> float:
        r = by_key[kind, s, k]
        if abs(r["clean"]) < 0.1 * largest:
            return math.nan
        return r["metric"] / r["clean"] if r["clean"] > 0 else 2 - r["metric"] / r["clean"]

    names = {"top": "top features by effect", "random": "random active features"}
    sizes = sorted({r["k"] for r in rows})
    by_size, over = (lines(page.specs()[f"{mode}-{what}-simple"]) for what in ("size", "snapshots"))
    k = 15 if mode == "ablate" else 100
    for kind, name in names.items():
        own = sizes if kind == "top" else [size for size in sizes if size]
        assert close(by_size[name]["y"], [share(kind, S - 1, size) for size in own])
        if mode == "keep" and kind == "top":  # the empty set, left of the others on the logarithmic axis
            assert sizes[0] == 0 and 0 < by_size[name]["x"][0] < 5 and by_size[name]["x"][1:] == sizes[1:]
        drawn = [math.nan if y is None else y for y in over[name]["y"]]
        assert close(drawn, [share(kind, s, k) for s in range(S)])
    assert ("size-matched features" in by_size) == (mode == "ablate")
    band = next(t for t in page.specs()[f"{mode}-size-simple"]["data"] if t.get("meta") == "band")
    r = by_key["random", S - 1, next(size for size in sizes if size)]
    assert close([band["y"][0], band["y"][-1]], [(r["metric"] + 0.2) / r["clean"], (r["metric"] - 0.3) / r["clean"]])
    for row in csv(run, f"{mode}-size-simple").to_dict("records"):
        assert row["metric"] == pytest.approx(by_key[row["features"], row["snapshot"], row["k"]]["metric"], rel=1e-12)


def test_timeline_languages_transfer_and_additivity(tmp_path: Path) -> None:
    run = add_study(drop(make_run(tmp_path, 8), "probe", "evolution", "accuracy", "evaluation"), "simple")
    page = _Page(write_report(tmp_path))
    names = {"timeline", "languages", "transfer", "additivity"}
    assert {f"{name}-simple" for name in names} <= set(page.specs())
    assert not any(f"{name}-subj_rel" in page.specs() for name in names), "not studied"
    assert "has no column" not in page.text
    matrix = page.specs()["transfer-simple"]["data"][0]
    shares = table(run, "transfer/simple")
    for a in range(8):
        row = shares[shares["selected_at"] == a].sort_values("ablated_at")["share"]
        assert close([math.nan if z is None else z for z in matrix["z"][a]], row)
    top = page.specs()["transfer-simple"]["layout"]["coloraxis"]
    assert top["cmax"] == pytest.approx(shares["share"].max(), rel=1e-4) and top["cmin"] == -top["cmax"]
    assert "features of step1000" not in matrix["text"][0][0] and "ablated at step0" in matrix["text"][0][0]
    pairs = table(run, "additivity/simple").query("snapshot == 7")
    points = page.specs()["additivity-simple"]["data"][1]
    assert close(points["x"], pairs["sum"]) and close(points["y"], pairs["joint"])
    assert "At step367." in page.text


def test_bands_do_not_cross_gaps() -> None:
    corners = _outline([0, 1, 2, 3, 4], [0, 0, math.nan, 0, 0], [1, 1, math.nan, 1, 1])
    assert corners == [(0, 1), (1, 1), (1, 0), (0, 0), (None, None), (3, 1), (4, 1), (4, 0), (3, 0)]


def test_probe_points_and_correlation(written: tuple[RunDir, _Page, int]) -> None:
    run, page, _ = written
    source, (first, second) = table(run, "probe"), page.specs()["probe"]["data"]
    r2 = source[["feature", "snapshot"]].merge(table(run, "evolution"), how="left")["r2"]
    assert close(first["x"], r2) and close(first["y"], source["probe_error"])
    assert close(second["x"], source["norm"]) and close(second["y"], source["probe_error"])
    rho = source["norm"].rank().corr(source["probe_error"].rank())
    later = source[source["step"] != 0]
    rho_later = later["norm"].rank().corr(later["probe_error"].rank())
    assert f"All points, by decoder norm: Spearman −{-rho:.2f}" in page.text
    assert f"Without step 0: Spearman −{-rho_later:.2f}" in page.text


def test_labels_are_text_everywhere(written: tuple[RunDir, _Page, int]) -> None:
    run, page, _ = written
    scripts = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    assert "alert(1)" not in "".join(scripts)
    for attributes, text in page.scripts:
        if attributes.get("type") == "application/json":
            assert not set("<>&") & set(text)
    # what plotly draws is HTML of its own kind: the label must be escaped inside the JSON too
    for name, spec in page.specs().items():
        assert "<script" not in json.dumps(spec), name
    assert html.escape(HOSTILE, quote=False) + ", step" in page.specs()["accuracy"]["data"][1]["customdata"][1]
    assert HOSTILE in page.text
    assert HOSTILE in set(csv(run, "accuracy")["label"])
    assert shown("%{x} <b>") == "%&#123;x} &lt;b&gt;"
    assert shown("a" * 50, 11) == "aaaaa…aaaaa"


def test_control_characters_are_shown_in_pages(tmp_path: Path) -> None:
    """They would turn the text around them."""
    run = make_run(tmp_path, 3)
    accuracy = run.table("accuracy")
    if accuracy is None:
        run = add_study(run, "mine")
        accuracy = run.table("accuracy")
    assert accuracy is not None
    hostile = "step\u202e\x1b[2J"
    run.save_table("accuracy", accuracy.assign(label=hostile))
    page = write_report(run.path, title="a\u202eb")
    texts = [path.read_text(errors="replace") for path in page.parent.rglob("*") if path.suffix in (".html", ".csv")]
    assert not any("\u202e" in text or "\x1b" in text for text in texts)
    assert any(r"a\u202eb" in text for text in texts)
    assert any("step\\u202e\\u001b[2J" in text for text in texts)
    run.save_table("rotation", pd.DataFrame({"from": ["step1"], "to": [hostile]}))
    rotation = Tables(run, run.read_json())["rotation"]
    assert rotation is not None and rotation["to"].tolist() == ["step\\u202e\\u001b[2J"]


def test_script_json_cannot_end_its_element() -> None:
    hostile = {"a": "</script><!-- & \u2028", "b": [1.5, None]}
    text = str(script_json(hostile))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == hostile


def test_compact_rounds_and_drops() -> None:
    figure = {"y": [1.23456789, math.nan, 2.0], "x": [5.1553364], "template": {}, "s": "1.23456789"}
    assert compact(figure) == {"y": [1.2346, None, 2], "x": [5.155336], "s": "1.23456789"}


def test_snapshot_axis() -> None:
    steps = [0, 1, 512, 143_000]
    rows = pd.DataFrame({"snapshot": range(4), "label": list("abcd"), "step": steps})
    axis = SnapshotAxis.of(rows)
    zero, *rest = axis.x(range(4))
    assert rest == pytest.approx(np.log10(steps[1:]), abs=1e-6) and zero < rest[0] - 0.1
    assert axis.hover([3]) == ["d, step 143,000"]
    for unknown in (rows.assign(step=None), rows.assign(step=[0, 1, 1, 2]), rows.drop(columns="step")):
        assert SnapshotAxis.of(unknown).x(range(4)) == [0, 1, 2, 3]
    assert SnapshotAxis.of(rows, even=True).names() == {0: "a", 1: "b", 2: "c", 3: "d"}
    long = rows.assign(label=[f"step{step}-tokens{step}B" for step in steps])
    assert list(SnapshotAxis.of(long, even=True).names().values()) == ["step 0", "step 1", "step 512", "step 143k"]
    assert SnapshotAxis.of(long.assign(step=None)).names()[3] == "step14…43000B"


def test_missing_tables_are_named_with_their_command(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_json({"model": "m", "hook_name": "h"})
    page = _Page(write_report(tmp_path, title="T & U"))
    for words in (
        "The crosscoder has not been evaluated. crosslens train",
        "The evolution of features has not been computed. Run: crosslens evolve",
        "No effects on tasks have been computed. Run: crosslens attribute",
        "No probes have been fitted",
        "not recorded",
    ):
        assert page.text.count(words) >= 1, words
    assert page.text.count("No effects on tasks have been computed") == 1
    assert page.specs() == {} and not list((run.report / "data").iterdir())
    assert "T & U" in page.text
    for name in ("features", "feature"):
        assert (
            "The evolution of features has not been computed. Run: crosslens evolve"
            in _Page(run.report / "index.html", (name,)).text
        )


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("z", "no column 'z'."), (["y", "z"], "no column 'y' or 'z'."), (["a", "y", "z"], "no column 'y' or 'z'.")],
)
def test_columns_that_are_missing_are_named(wanted: str | list[str], words: str) -> None:
    with pytest.raises(KeyError) as error:
        pd.DataFrame({"a": [1]})[wanted]
    assert words in missing_column(error.value) and "index" not in missing_column(error.value)


def test_tables_with_nothing_to_draw(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    effects = table(run, "attribution/simple")
    run.save_table("attribution/simple", effects.assign(relie=math.nan, share_relie=math.nan))
    run.save_table("lifecycles", table(run, "lifecycles").assign(alive=False, origin=None))
    run.save_table("ablation/simple", table(run, "ablation/simple").query("snapshot == 2 and mode == 'ablate'"))
    run.save_table("evaluation", table(run, "evaluation").drop(columns="l0"))
    run.save_table("probe", table(run, "probe").iloc[:0])
    page = _Page(write_report(tmp_path))
    for words in (
        "No feature has a significant effect",
        "Every feature is dead",
        "No feature emerged",
        "Only one snapshot was ablated.",
        "The ablation table has no rows with mode 'keep'.",
        "has no column 'l0'",
        "No probes have been fitted",
    ):
        assert words in page.text, words
    assert {"ablate-size-simple", "relie-subj_rel"} <= set(page.specs())
    assert "relie-simple" not in page.specs()


def test_one_and_two_snapshots_are_drawn(tmp_path: Path) -> None:
    for n in (1, 2):
        run = drop(make_run(tmp_path / str(n), 3), "probe")
        for path in run.path.rglob("*.parquet"):
            frame = pd.read_parquet(path)
            if "snapshot" in frame:
                frame[frame["snapshot"] < n].to_parquet(path)
        specs = _Page(write_report(run.path)).specs()
        source = table(run, "attribution/simple").dropna(subset=["relie"])
        for name in ("relie", "share_relie"):
            drawn = lines(specs[f"{name.replace('_', '-')}-simple"])
            if n == 1:
                assert all(len(trace["x"]) == 1 for trace in drawn.values())
                continue
            assert set(drawn) == {"supports the correct answer", "opposes it"}
            seen = 0
            for trace in drawn.values():
                for (feature, _), x, y in zip(trace["customdata"], trace["x"], trace["y"], strict=True):
                    rows = source[source["feature"] == feature]
                    assert close([x], [rows[name].iloc[1]]) and close([y], [max(rows["ie"], key=abs)])
                    seen += 1
            assert seen == source["feature"].nunique()
        assert all(len(trace["x"]) == n for trace in lines(specs["accuracy"]).values())


def test_the_page_of_a_task_says_what_it_asks(written: tuple[RunDir, _Page, int]) -> None:
    run, _, S = written
    names = ["task-simple", "task-subj_rel"]
    for i, (task, name) in enumerate(zip(TASKS, names, strict=True)):
        page = _Page(run.report / "index.html", (name,))
        row = table(run, "accuracy").query("task == @task and snapshot == @S - 1").iloc[0]
        effects, snapshots = table(run, f"attribution/{task}"), table(run, f"attribution/{task}.snapshots")
        for words in (
            f"{row['accuracy']:.1%}",
            f"accuracy at {row['label']} ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%}; chance 50%)",
            "items; 0 left out",
            f"{snapshots['metric_clean'].iloc[-1]:+.2f}",
            "features with a significant effect, of 60 active",
            str(effects.dropna(subset=["relie"])["feature"].nunique()),
        ):
            assert words in page.text, words
        links = {a.get("id"): a.get("href") for tag, a in page.elements if tag == "a"}
        around = [None, *(f"{other}.html" for other in names), None]
        assert (links["before"], links["after"]) == (around[i], around[i + 2])
        drawn = lines(page.specs()[f"accuracy-{task}"])
        assert set(drawn) == {task, "chance"} or set(drawn) == {task}
        source = table(run, "accuracy").query("task == @task").sort_values("snapshot")
        assert close(drawn[task]["y"], source["accuracy"])
        assert len(csv(run, f"accuracy-{task}")) == S
    # both are linked from where they are named
    for name in ("index", "causal", "feature"):
        elements = _Page(run.report / "index.html", (name,)).elements
        assert {f"{one}.html" for one in names} <= {a.get("href") for _, a in elements}, name


def test_examples_of_items_and_all_tasks(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 3), "probe", "ablation", "evolution", "evaluation")
    run.save_table("accuracy", table(run, "accuracy").assign(skipped=2, reasons="too long: 2"))
    common = table(run, "accuracy").query("task == 'simple'")[["snapshot", "label", "step"]]
    words = pd.DataFrame({"position": [0, 1], "token": ["<s>", " boys"], "effect": [0.0, 0.5], "feature": [-1, 2]})
    items = pd.DataFrame({"prompt": [0, 4, 7, 9], "prefix": [f"the {HOSTILE} {i}" for i in range(4)]})
    items = items.assign(
        correct=[" are", " is", " were", " go"], wrong=[" is"] * 4, paired=["the boy", None, "x", None]
    )
    prompts = items.merge(common, how="cross").merge(words, how="cross")
    run.save_table("prompts/simple", prompts.assign(feature_effect=prompts["effect"]))
    page = _Page(write_report(tmp_path), ("task-simple",))
    rows = csv(run, "items-simple")
    assert rows["prefix"].tolist() == items["prefix"].tolist() and rows["correct"].tolist() == items["correct"].tolist()
    assert "prompt 0" in page.text and "prompt 9" in page.text and f"the {HOSTILE} 0" in page.text
    assert "paired prompt" in page.text and "the boy" in page.text
    shown = next(json.loads(text) for a, text in page.scripts if a.get("id") == "figure-words-simple-prompts")
    assert [one["answers"] for one in shown["prompts"]] == items[["correct", "wrong"]].to_numpy().tolist()
    other = _Page(run.report / "index.html", ("task-subj_rel",))
    assert "No effects in single prompts were kept" in other.text and "Examples of items" not in other.text
    every = csv(run, "tasks").set_index("task")
    causal = _Page(run.report / "index.html", ("causal",)).text
    for task in TASKS:
        row = table(run, "accuracy").query("task == @task and snapshot == 2").iloc[0]
        assert every.loc[task, "accuracy"] == row["accuracy"]
        for text in (
            f"{row['accuracy']:.1%}",
            f"[{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}]",
            "2 skipped (too long: 2)",
        ):
            assert text in causal


def test_a_run_without_tasks_or_with_one(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 3), "probe", "evolution", "evaluation", "completeness")
    for name in ("accuracy", "attribution/subj_rel"):
        drop(run, name)
    (run.path / "ablation" / "subj_rel.parquet").unlink()
    page = _Page(write_report(tmp_path), ("task-simple",))
    links = {a.get("id"): a.get("href") for tag, a in page.elements if tag == "a"}
    assert (links["before"], links["after"]) == (None, None)
    assert "No task accuracy has been measured" in page.text and "ie-simple" in page.specs()
    causal = _Page(run.report / "index.html", ("causal",))
    assert ("a", "task-simple.html") in [(tag, a.get("href")) for tag, a in causal.elements], "without an accuracy too"
    drop(run, "attribution", "ablation")
    write_report(tmp_path)
    assert not list(run.report.glob("task-*.html"))
    assert "No effects on tasks have been computed" in _Page(run.report / "index.html", ("causal",)).text


def test_tasks_with_similar_names_have_separate_files(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 3), "probe", "ablation", "evolution", "evaluation")
    for task in ("a b", "a-b", "<i>"):
        for name in ("", ".snapshots"):
            run.save_table(f"attribution/{task}{name}", table(run, f"attribution/simple{name}"))
    page = _Page(write_report(tmp_path), ("task-a-b", "task-a-b-2", "task-i"))
    assert {"ie-a-b", "ie-a-b-2", "ie-i"} <= set(page.specs())
    assert "Task: <i>" in page.text
    causal = _Page(run.report / "index.html", ("causal",))
    links = [a["href"] for tag, a in causal.elements if tag == "a" and str(a.get("href")).startswith("task-")]
    assert {"task-simple.html", "task-a-b.html", "task-a-b-2.html", "task-i.html"} <= set(links)


def test_writing_again_gives_the_same_pages_and_removes_stale_files(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 3), "probe", "evaluation")
    write_report(tmp_path)
    first = {path: path.read_bytes() for path in run.report.rglob("*") if path.is_file()}
    write_report(tmp_path)
    assert {path: path.read_bytes() for path in run.report.rglob("*") if path.is_file()} == first
    shutil.rmtree(tmp_path / "ablation")
    run.remove_task("subj_rel")
    theirs = [run.report / name for name in ("task-notes.html", "data/mine.csv", "data/folder/a.csv")]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a user's")
    write_report(tmp_path)
    assert all(path.read_text() == "a user's" for path in theirs)
    for path in theirs:
        path.unlink()
    left = {path.name for path in run.report.rglob("*") if path.is_file()}
    assert not [name for name in left if name.startswith(("ablate", "keep")) or name.endswith(".tmp")]
    assert [name for name in left if name.startswith("task-")] == ["task-simple.html"]


def test_a_report_is_never_written_through_a_link(tmp_path: Path) -> None:
    run, victim = make_run(tmp_path / "run", 3), tmp_path / "victim"
    write_report(run.path)
    victim.mkdir()
    (victim / "index.html").write_text("a victim's")
    run.report.joinpath("index.html").unlink()
    run.report.joinpath("index.html").symlink_to(victim / "index.html")
    write_report(run.path)
    assert not run.report.joinpath("index.html").is_symlink()
    for part in ("report/data", "report/assets", "report"):
        shutil.rmtree(run.path / part)
        (run.path / part).symlink_to(victim)
        with pytest.raises(UserError, match=f"{part} is a link to .*victim: a part of a run cannot be elsewhere; move"):
            write_report(run.path)
        (run.path / part).unlink()
        (run.path / part).mkdir()
    assert [(path.name, path.read_text()) for path in victim.iterdir()] == [("index.html", "a victim's")]


def test_no_run_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_all_snapshots_share_is_said_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    run.save_table("evaluation", table(run, "evaluation").assign(l0=15.789, dead_fraction=0.0312))
    write_report(run.path)
    page = _Page(run.report / "index.html")
    assert "15.79 at every snapshot." in page.text and "3.1% at every snapshot." in page.text
    assert not {"l0", "dead"} & set(page.specs())


def test_axes_have_the_tokens_of_the_run(written: tuple[RunDir, _Page, int]) -> None:
    _, page, S = written
    tokens = [step * 4096 for step in STEPS[S]]
    for name in ("accuracy", "l0", "budget-simple", "completeness"):
        assert page.specs()[name]["layout"]["meta"]["tokens"] == tokens, name


def test_axes_without_the_tokens_of_the_run(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 3), "probe", "ablation", "evolution")
    info = run.read_json()
    run.write_json({**info, "snapshots": [{**row, "tokens": None} for row in info["snapshots"]]})
    specs = _Page(write_report(tmp_path)).specs()
    assert "tokens" not in specs["budget-simple"]["layout"]["meta"]
    assert specs["accuracy"]["layout"]["meta"]["tokens"] == [step * 4096 for step in STEPS[3]]


def test_a_damaged_table_is_a_line_on_its_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    path = run.path / "attribution" / "simple.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    index = write_report(run.path)
    said = "attribution/simple.parquet is damaged"
    own = (index.parent / "task-simple.html").read_text()
    assert (
        said in own and "repeat `crosslens attribute`" in own and said in (index.parent / "features.html").read_text()
    )
    assert "No effects on tasks have been computed" in own and "figure-ablate-size-simple" in own
    assert str(tmp_path) not in own
    for name in ("evolution", "causal", "task-subj_rel"):
        assert said not in (index.parent / f"{name}.html").read_text(), name


def test_no_path_and_no_formula_leaves_the_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    run.update(command=["crosslens", "train", "--snapshots", "/home/someone/models"], dataset="/home/someone/text.txt")
    table = run.table("accuracy")
    assert table is not None
    run.save_table("accuracy", table.assign(task="=HYPERLINK(1)"))
    index = write_report(run.path)
    for path in index.parent.rglob("*"):
        if path.suffix in (".html", ".csv", ".js") and path.name != "plotly.min.js":
            text = path.read_text()
            assert "/home/someone" not in text and str(tmp_path) not in text, path
            assert ",=HYPERLINK" not in text and not text.startswith("=HYPERLINK"), path
    assert "train --snapshots models" in index.read_text()
    assert "'=HYPERLINK(1)" in (index.parent / "data" / "accuracy.csv").read_text()
