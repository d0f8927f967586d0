"""The data of single features in the report, against the tables, and what is shown without them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from crosslens.features.labels import complexity_correlation
from crosslens.report import write_report
from crosslens.report.features import SHARD, write_features
from crosslens.report.figures.structure import complexity as complexity_figure
from crosslens.report.tables import Tables
from crosslens.rundir import RunDir
from tests.given import CONTROL, controls
from tests.report import test_pages
from tests.report.test_pages import HOSTILE, PAGES, STEPS, TASKS, _Page, drop, lives, make_run, table, wide

TOKENS = [
    HOSTILE, "</script>", "<!--", "\"'`&", "שלום", "\u202egnirts", "👩\u200d💻", "\x00", "\n", "\u2028", "%{x}", 
    "{{ 1 }}", "a,b", '"', " the", "boy", "__proto__", "constructor",
]  # fmt: skip
FORMAT = re.compile(r"crosslens\.(index|load)\((?:(\d+), )?(.*)\);\n", re.S)


def add_features(run: RunDir, seed: int = 0) -> RunDir:
    """Add random tables as `feature_tables` makes them, with hostile tokens."""
    rng = np.random.default_rng(seed)
    rows = lives(run)
    labels = list(wide(run, "norm"))
    F, S, E, W, K = len(rows), len(labels), 3, 5, 4
    alive = rows["alive"].to_numpy(dtype=bool)
    feature = np.repeat(np.flatnonzero(alive), E)
    n = len(feature)
    position = rng.integers(0, 30, n)
    examples = pd.DataFrame(
        {
            "feature": feature, "rank": np.tile(np.arange(E), alive.sum()), "sequence": rng.integers(0, 99, n),
            "position": position, "activation": rng.uniform(0.5, 3, n), "threshold": 0.25,
            **{f"read/{label}": rng.normal(size=n) for label in labels},
        }
    )  # fmt: skip
    around = examples.loc[examples.index.repeat(W), ["feature", "rank"]].reset_index(drop=True)
    around["position"] = np.repeat(position, W) + np.tile(np.arange(W) - W // 2, n)
    around["activation"] = np.where(
        np.tile(np.arange(W) == W // 2, n), np.repeat(examples["activation"], W), rng.uniform(0, 0.5, n * W)
    )
    around["token"] = pd.Categorical.from_codes(rng.integers(0, len(TOKENS), n * W), TOKENS)
    around = around[around["position"] >= 0].reset_index(drop=True)
    run.save_table("examples", examples)
    run.save_table("example_tokens", around)
    lens = pd.DataFrame(
        {
            "feature": np.repeat(np.arange(F), S * K), "snapshot": np.tile(np.repeat(np.arange(S), K), F),
            "rank": np.tile(np.arange(K), F * S),
            **{
                name: pd.Categorical.from_codes(rng.integers(0, len(TOKENS), F * S * K), TOKENS)
                for name in ("promoted", "suppressed")
            },
            "promoted_logit": rng.uniform(0, 2, F * S * K), "suppressed_logit": -rng.uniform(0, 2, F * S * K),
        }
    )  # fmt: skip
    run.save_table("lens", lens)
    other = (np.repeat(np.arange(F), 2) + np.tile([1, 7], F)) % F
    run.save_table(
        "nearest",
        pd.DataFrame({"feature": np.repeat(np.arange(F), 2), "rank": np.tile([0, 1], F), "other": other,
                      "cosine": rng.uniform(-1, 1, 2 * F)}),
    )  # fmt: skip
    complexity = pd.array([4, None], dtype="Int8")
    add_activations(run, examples, around, rng)
    labels = {"feature": [5, 7], "label": [f"plural {HOSTILE}", "verbs"], "complexity": complexity}
    run.save_table("labels", pd.DataFrame(labels))
    return run


def add_activations(run: RunDir, examples: pd.DataFrame, around: pd.DataFrame, rng: np.random.Generator) -> None:
    """Add contexts, samples, histograms, encoder shares, prompts and seeds, of the same features."""
    feature = examples["feature"].unique()
    F, labels = len(lives(run)), list(wide(run, "norm"))
    n = len(examples)
    far = examples.loc[examples.index.repeat(10), ["feature", "rank"]].reset_index(drop=True)
    far["position"] = np.repeat(examples["position"].to_numpy(), 10) + np.tile(np.arange(3, 13), n)  # further right
    far["activation"] = rng.uniform(0, 0.5, 10 * n)
    far["token"] = pd.Categorical.from_codes(rng.integers(0, len(TOKENS), 10 * n), TOKENS)
    run.save_table("example_contexts", far)
    run.save_table("samples", examples.drop(columns=[name for name in examples if name.startswith("read/")]))
    run.save_table("sample_tokens", around)
    bins = pd.DataFrame({"feature": np.repeat(feature, 3), "bin": np.tile([-2, 1, 5], len(feature))})
    run.save_table("activations", bins.assign(count=rng.integers(1, 99, len(bins))))
    shares = rng.dirichlet(np.ones(len(labels)), F)
    run.save_table(
        "encoder", pd.DataFrame(shares, columns=[f"share/{label}" for label in labels]).assign(feature=range(F))
    )
    for task in TASKS:
        effects = table(run, f"attribution/{task}")
        dates = effects.drop_duplicates("snapshot")[["snapshot", "label", "step"]]
        words = pd.DataFrame({"position": range(4), "token": TOKENS[:4], "feature": [-1, 2, 4, 8]})
        prompts = pd.DataFrame({"prompt": [3, 9]}).merge(dates, how="cross").merge(words, how="cross")
        effect = rng.normal(size=len(prompts)) * (prompts["feature"] >= 0)
        run.save_table(f"prompts/{task}", prompts.assign(effect=effect, feature_effect=effect))
    live = np.isin(np.arange(F), feature)
    consensus = pd.DataFrame({"feature": range(F), "alive": live, "firing_rate": 0.01, "variance": live / live.sum()})
    consensus = consensus.assign(n_seeds=2 * live, of=3, consensus=live, correlation=0.8)
    partner = pd.array(np.where(live, np.arange(F)[::-1], -1), dtype="Int64")
    partner[partner < 0] = pd.NA
    partner[feature[0]] = pd.NA
    consensus["partner/1"], consensus["correlation/1"] = partner, np.where(partner.isna(), np.nan, 0.9)
    run.save_table("consensus", consensus)
    pair = {f"{name}_{end}": 0.5 for name in ("share", "variance", "cosine") for end in "ab"}
    run.save_table("seeds", pd.DataFrame([{"a": "0", "b": "1", **pair, "null_a": 0.5}]))


def script(run: RunDir, name: str) -> Any:
    """The data in a script, which must be a single call with JSON."""
    text = (run.report / "data" / name).read_text(encoding="ascii")
    found = FORMAT.fullmatch(text)
    assert found is not None and not set("<\x00") & set(text)
    assert (found[1], found[2]) == (("index", None) if name == "features.js" else ("load", str(int(name[9:14]))))
    return json.loads(found[3])


def shards(run: RunDir) -> dict[int, tuple[dict[str, Any], list[str]]]:
    """Features by number, each with the words of its script."""
    found: dict[int, tuple[dict[str, Any], list[str]]] = {}
    for path in sorted((run.report / "data").glob("features-*.js")):
        contents = script(run, path.name)
        for feature in contents["features"]:
            assert feature["id"] // SHARD == int(path.name[9:14])
            found[feature["id"]] = feature, contents["words"]
    return found


def write_scripts(run: RunDir) -> None:
    """Write only the scripts of a report."""
    data = run.report / "data"
    data.mkdir(parents=True, exist_ok=True)
    write_features(Tables(run, run.read_json()), lambda name, text: (data / name).write_text(text, encoding="utf-8"))


@pytest.fixture(scope="module", params=sorted(STEPS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = add_features(make_run(tmp_path_factory.mktemp("run") / "r", request.param))
    write_scripts(run)
    return run


def near(a: Any, b: Any, digits: int = 3, size: float = 0.0) -> bool:
    """Equal to so many digits of the largest value, or of `size`; None stands for NaN."""
    one = np.array([np.nan if value is None else value for value in a], dtype=float)
    other = np.asarray(b, dtype=float)
    size = size or np.nanmax(np.abs(other), initial=1e-30)
    return one.shape == other.shape and np.allclose(one, other, rtol=0, atol=size * 10.0**-digits, equal_nan=True)


def test_every_feature_is_what_the_tables_say(written: RunDir) -> None:
    source, found = lives(written), shards(written)
    curves = {name: wide(written, name).clip(lower=0) for name in ("norm", "r2", "within")}
    within = lives(written, "within")["origin"].notna()
    assert list(found) == source["feature"].tolist()
    effects = {task: table(written, f"attribution/{task}") for task in TASKS}
    for row in source.to_dict("records"):
        i, read = row["feature"], isinstance(row["origin"], str)
        feature, _ = found[i]
        assert near(feature["norms"], curves["norm"].loc[i])
        assert ("r2" in feature) == read and ("within" in feature) == within[i]
        for name in {"r2", "within"} & set(feature):
            assert near(feature[name], curves[name].loc[i])
        for name in ("birth", "peak", "death", "lifetime"):
            assert feature[name] == (None if pd.isna(row[name]) else row[name])
        words = f"{row['origin']}, {row['fate']}, {row['kind']}"
        assert feature["kind"] == (words if read else "unknown" if row["alive"] else "dead")
        assert feature["rate"] == pytest.approx(row["firing_rate"], rel=1e-2)
        assert feature["name"] == {5: f"plural {HOSTILE}", 7: "verbs"}.get(row["feature"], "")
        drawn = {TASKS[task]: (ie, se) for task, ie, se in feature["effects"]}
        for task, source in effects.items():
            rows = source[source["feature"] == row["feature"]].sort_values("snapshot")
            assert (task in drawn) == (len(rows) > 0)
            if task in drawn:
                assert near(drawn[task][0], rows["ie"]) and near(drawn[task][1], rows["ie_se"])


def test_dates_are_those_of_readable_concepts_and_of_features_with_effects(tmp_path: Path) -> None:
    run = add_features(make_run(tmp_path / "r", 3))
    concepts = {"feature": [4, 5, 6], "birth": [1, 2, 1], "birth_low": [0, 1, 1], "birth_high": [2, 2, 2]}
    run.save_table("concepts/simple", pd.DataFrame({**concepts, "readable_q": [0.01, 0.2, 0.05]}))
    dated = {"feature": [6, 7], "matters": [2.0, np.nan], "matters_low": [1.0, np.nan], "succeeds": [1, 1]}
    run.save_table("dates/simple", pd.DataFrame(dated))
    write_scripts(run)
    found = {number: feature["dates"] for number, (feature, _) in shards(run).items() if feature.get("dates")}
    born = {row["feature"]: int(row["birth"]) for row in lives(run).dropna(subset=["birth"]).to_dict("records")}
    context = [born[4]] * 3 if 4 in born else None
    assert found == {
        4: [["simple", [context, [1, 0, 2], None, None, None]]],
        6: [["simple", [None, None, None, [2, 1, 2], [1, 1, 1]]]],
        7: [["simple", [None, None, None, None, [1, 1, 1]]]],
    }


def test_examples_lens_and_nearest_are_those_of_the_tables(written: RunDir) -> None:
    found = shards(written)
    examples, around = table(written, "examples"), table(written, "example_tokens")
    lens, nearest = table(written, "lens"), table(written, "nearest")
    far, bins, consensus = (table(written, name) for name in ("example_contexts", "activations", "consensus"))
    shares = table(written, "encoder").set_index("feature")
    reads = [name for name in examples if name.startswith("read/")]
    tops, source = top_tokens(written), lives(written)
    alive = source.loc[source["alive"], "feature"]
    for number, (feature, words) in found.items():
        rows = examples[examples["feature"] == number].sort_values("rank")
        assert len(feature["examples"]["list"]) == len(rows)
        assert feature["examples"]["threshold"] == (0.25 if len(rows) else 0)
        for (_, row), example in zip(rows.iterrows(), feature["examples"]["list"], strict=True):
            sequence, position, first, tokens, activations, read = example
            part = pd.concat([around, far])
            part = part[(part["feature"] == number) & (part["rank"] == row["rank"])].sort_values("position")
            assert (sequence, position, first) == (row["sequence"], row["position"], part["position"].iloc[0])
            assert [words[token] for token in tokens] == part["token"].tolist()
            assert near(activations, part["activation"], 2) and near(read, row[reads], 2)
        for s, (up, ups, down, downs) in enumerate(feature["lens"]):
            part = lens[(lens["feature"] == number) & (lens["snapshot"] == s)].sort_values("rank")
            assert [words[token] for token in up] == part["promoted"].tolist()
            assert [words[token] for token in down] == part["suppressed"].tolist()
            assert near(ups, part["promoted_logit"], 2) and near(downs, part["suppressed_logit"], 2)
        own = bins[bins["feature"] == number]
        if len(own):
            first, counts = feature["rates"]
            assert {first + i: n for i, n in enumerate(counts) if n} == dict(zip(own["bin"], own["count"], strict=True))
        else:
            assert feature["rates"] is None
        assert len(feature["samples"]) == len(rows)
        assert near(feature["read"], shares.loc[number], 2)
        seeds = consensus.loc[number]
        if seeds["alive"]:
            partner = [] if pd.isna(seeds["partner/1"]) else [["1", int(seeds["partner/1"]), 0.9]]
            assert feature["seeds"] == {"n": 2, "of": 3, "partners": partner}
        else:
            assert feature["seeds"] is None
        part = nearest[(nearest["feature"] == number) & nearest["other"].isin(alive)].sort_values("rank")
        assert [other for other, _, _ in feature["nearest"]] == part["other"].tolist()
        assert near([cosine for _, cosine, _ in feature["nearest"]], part["cosine"], 2)
        for other, _, name in feature["nearest"]:
            assert name == (found[other][0]["name"] or tops.get(other, ""))


def top_tokens(run: RunDir) -> dict[int, str]:
    best = table(run, "examples").query("rank == 0").set_index("feature")["position"]
    around = table(run, "example_tokens").query("rank == 0")
    return {
        f: str(token)
        for f, position, token in zip(around["feature"], around["position"], around["token"], strict=True)
        if best[f] == position
    }


def test_the_index_has_a_row_per_feature(written: RunDir) -> None:
    index, source = script(written, "features.js"), lives(written)
    F, S = len(source), len(index["snapshots"])
    assert index["id"] == source["feature"].tolist() and len(index["heat"]) == F * S
    found = shards(written)
    tops = top_tokens(written)
    names = {"token": tops, "kind": {f: feature["kind"] for f, (feature, _) in found.items()}}
    for name, expected in names.items():
        codes, words = index[name]
        assert [words[code] for code in codes] == [expected.get(f, "") for f in index["id"]]
    r2 = wide(written, "r2").to_numpy().clip(0) * source["origin"].notna().to_numpy()[:, None]
    lens = table(written, "lens").query("rank == 0").set_index(["feature", "snapshot"])["promoted"]
    codes, words = index["promoted"]
    assert [words[code] for code in codes] == [lens[f, S - 1] for f in range(F)], "the last snapshot"
    sizes = np.full((F, S), -1.0)
    for task in TASKS:
        for row in table(written, f"attribution/{task}").itertuples():
            sizes[row.feature, row.snapshot] = max(sizes[row.feature, row.snapshot], abs(row.ie))
    strongest = [int(row.argmax()) if row.max() >= 0 else S - 1 for row in sizes]
    for name, at in (*((f"{s:05d}", [s] * F) for s in range(S)), ("effect", strongest)):
        text = (written.report / "data" / f"promotes-{name}.js").read_text(encoding="ascii")
        assert text.startswith(f'crosslens.promotes("{name}", ') and text.endswith(");\n")
        codes, words = json.loads(text[len(f'crosslens.promotes("{name}", ') : -3])
        assert [words[code] for code in codes] == [lens[f, s] for f, s in enumerate(at)]
    for f in range(F):
        levels = [int(level, 36) for level in index["heat"][f * S : (f + 1) * S]]
        assert np.abs(np.array(levels) / 35 - r2[f] / max(r2[f].max(), 1e-9)).max() <= 0.5 / 35 + 1e-9
    for name in ("birth", "peak", "lifetime"):
        assert index[name] == [found[f][0][name] for f in index["id"]]
    assert index["label"][5] == f"plural {HOSTILE}" and index["label"][6] == ""
    largest = pd.concat([table(written, f"attribution/{task}") for task in TASKS])
    sizes = largest["ie"].abs().groupby(largest["feature"]).max()
    for f, value in zip(index["id"], index["ie"], strict=True):
        assert (value is None) == (f not in sizes.index)
        assert value is None or value == pytest.approx(sizes[f], rel=1e-2)


def test_shuffled_tables_give_the_same_scripts(tmp_path: Path) -> None:
    run = add_features(make_run(tmp_path, 3))
    write_scripts(run)
    first = {path.name: path.read_bytes() for path in (run.report / "data").glob("*.js")}
    for name in ("evolution", "lifecycles", "examples", "example_tokens", "lens", "nearest"):
        run.save_table(name, table(run, name).sample(frac=1, random_state=0))
    for task in TASKS:
        run.save_table(f"attribution/{task}", table(run, f"attribution/{task}").sample(frac=1, random_state=0))
    write_scripts(run)
    for name, before in first.items():
        assert (run.report / "data" / name).read_bytes() == before, name


def test_no_page_has_a_control_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in labels, names, commands, tokens, examples, prompts and what steered models write
    monkeypatch.setattr(test_pages, "HOSTILE", " ".join(CONTROL.values()))
    monkeypatch.setitem(globals(), "HOSTILE", " ".join(CONTROL.values()))
    monkeypatch.setitem(globals(), "TOKENS", [*CONTROL.values(), *TOKENS])
    run = add_features(make_run(tmp_path, 3))
    text = test_pages.HOSTILE
    common = {"snapshot": 2, "label": "step1000", "step": 1000, "text": text}
    run.save_table("steered", pd.DataFrame([{**common, "features": "3", "factor": 2.0, "add": np.nan, "plain": text,
        "steered": text, "prompt_loss": 2.0, "prompt_loss_change": -0.1, "text_loss": 2.0, "text_loss_change": 0.1,
        "n_tokens": 64}]))  # fmt: skip
    index = write_report(run.path, title=text)
    names = {path.name for path in index.parent.glob("*.html")}
    assert {"index.html", "feature.html", "features.html", "prompts.html", "task-simple.html"} <= names
    for name in names:
        assert not controls(index.with_name(name).read_text(encoding="utf-8")), name
    assert "\\u001b]0;owned\\u0007" in index.read_text(encoding="utf-8")
    for path in sorted((run.report / "data").glob("*.js")):  # whose tokens the page's own script shows by name
        assert not controls(path.read_text(encoding="utf-8")), path.name


def test_missing_tables_are_named(tmp_path: Path) -> None:
    run = drop(make_run(tmp_path, 3), "accuracy", "evaluation", "probe", "ablation")
    for task, baseline in zip(TASKS, ["zero", *["patch"] * len(TASKS)], strict=False):
        name = f"attribution/{task}.snapshots"
        run.save_table(name, table(run, name).assign(baseline=baseline))
    index = write_report(run.path)
    text = index.with_name("feature.html").read_text(encoding="utf-8")
    for words in ("(features set to zero)", "(features set to their values on the paired prompt)"):
        assert text.count(words) == 1, "of all tasks together"
    assert text.count("Not collected yet. Run: crosslens evolve RUN_DIR") == 3
    assert "No effects on tasks" not in text
    contents = script(run, "features-00000.js")
    assert contents["words"] == [] and len(contents["features"]) == SHARD
    assert all(contents["features"][3][name] is None for name in ("examples", "lens", "nearest"))
    found = script(run, "features.js")
    assert found["token"] is None and found["promoted"] is None and found["label"] is None
    add_features(run)
    run.save_table("lens", table(run, "lens").drop(columns="suppressed"))
    for task in TASKS:
        for part in ("", ".snapshots"):
            (tmp_path / "attribution" / f"{task}{part}.parquet").unlink()
    text = write_report(run.path).with_name("feature.html").read_text(encoding="utf-8")
    assert "A table of this run has no column &#39;suppressed&#39;." in text
    assert (
        "No effects on tasks have been computed. Run: crosslens attribute" in text and "figure-effects-spec" not in text
    )
    assert all(value is None for value in script(run, "features.js")["ie"])
    assert script(run, "features-00001.js")["features"][0]["examples"]["list"]


def test_features_need_not_be_all_of_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    kept = [3, 64, 65, 119]
    run.save_table("lifecycles", table(run, "lifecycles").query("feature in @kept").drop(columns=["fate", "death"]))
    add = add_features(make_run(tmp_path / "whole", 3))
    for name in ("examples", "example_tokens", "lens", "nearest"):
        run.save_table(name, table(add, name))
    write_scripts(run)
    found = shards(run)
    assert list(found) == kept and found[64][0]["death"] is None
    assert found[65][0]["kind"].split(",")[0] in ("initial", "emergent", "never", "dead")
    assert len(found[119][0]["lens"]) == 3


def test_labels_are_not_markup(tmp_path: Path) -> None:
    index = write_report(add_features(drop(make_run(tmp_path, 3), "probe")).path)
    for name in ("features", "feature", *PAGES):
        page = _Page(index, (name,))
        assert "alert(1)" not in "".join(text for a, text in page.scripts if a.get("type") != "application/json")
        assert not any("alert" in str(value) for _, a in page.elements for value in a.values())


def test_scores_of_labels_in_scripts(tmp_path: Path) -> None:
    run = add_features(make_run(tmp_path / "r", 8))
    ids = lives(run)["feature"].tolist()[:3]
    nothing = [np.nan] * 3
    scores = {
        "detection": [0.8712, np.nan, np.nan], "detection_low": [0.75, np.nan, np.nan],
        "detection_high": [0.94, np.nan, np.nan], "detection_n": pd.array([40, None, None], dtype="Int64"),
        "control": [0.52, np.nan, np.nan], "control_feature": pd.array([ids[1], None, None], dtype="Int64"),
        "local_detection": [0.61, 0.58, np.nan], 
        "local_detection_low": [0.5, 0.4, np.nan], "local_detection_high": [0.7, 0.7, np.nan],
        "local_control": nothing, "local_label": [None, "fires on: x", None], "status": ["answered", "local", "local"],
    }  # fmt: skip
    run.save_table("labels", pd.DataFrame({"feature": ids, "label": "verbs", "complexity": nothing, **scores}))
    write_scripts(run)
    found = {id: feature["judged"] for id, (feature, _) in shards(run).items()}
    assert found[ids[0]] == (
        "Label, judged by balanced accuracy (chance 0.5): 0.87 [0.75, 0.94] on 40 held-out passages; 0.52 with the "
        f"label of feature {ids[1]}; 0.61 [0.50, 0.70] by its top tokens alone."
    )
    assert found[ids[1]] == (
        "Top tokens as a label (fires on: x), judged by balanced accuracy (chance 0.5): 0.58 [0.40, 0.70] by its top "
        "tokens alone."
    )
    assert found[ids[2]] is None
    assert [shards(run)[id][0]["name"] for id in ids] == ["verbs", "", ""]


def test_complexity_in_scripts_and_figure(tmp_path: Path) -> None:
    run = add_features(make_run(tmp_path / "r", 8))
    source, rng = lives(run), np.random.default_rng(0)
    judged = rng.permutation(source["feature"])[:90]
    complexity = pd.array(rng.integers(1, 6, 90), dtype="Int8")
    complexity[:5] = pd.NA
    run.save_table("labels", pd.DataFrame({"feature": judged, "label": "verbs", "complexity": complexity}))
    write_scripts(run)
    known = {int(f): int(c) for f, c in zip(judged, complexity, strict=True) if c is not pd.NA}
    index = script(run, "features.js")
    assert index["complexity"] == [known.get(feature) for feature in index["id"]]
    assert {id: feature["complexity"] for id, (feature, _) in shards(run).items()} == {
        feature: known.get(feature) for feature in index["id"]
    }
    snapshots = pd.DataFrame({"snapshot": range(8), "label": list("abcdefgh"), "step": STEPS[8]})
    chart = complexity_figure(table(run, "labels"), table(run, "lifecycles"), snapshots)
    assert not isinstance(chart, str)
    drawn = {trace.name: trace for trace in chart.figure.data if trace.meta != "band"}
    numbers = chart.data
    for event, name in (("birth", "born here"), ("peak", "strongest here")):
        dates = {row["feature"]: row[event] for row in source.to_dict("records") if not pd.isna(row[event])}
        for s in range(8):
            values = [c for feature, c in known.items() if dates.get(feature) == s]
            row = numbers[(numbers["event"] == event) & (numbers["snapshot"] == s)]
            assert len(row) == bool(values)
            if values:
                assert row["mean"].item() == pytest.approx(np.mean(values)) and row["n"].item() == len(values)
            if len(values) > 1:
                assert row["se"].item() == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)
        assert list(drawn[name].y) == numbers.loc[numbers["event"] == event, "mean"].tolist()
    found = complexity_correlation(table(run, "labels"), source, unit="index").set_index("event")
    assert f"Spearman with birth {found.loc['birth', 'spearman']:+.2f}".replace("-", "−") in chart.note
    run.save_table("labels", pd.DataFrame({"feature": judged, "label": "verbs"}))
    write_scripts(run)
    assert script(run, "features.js")["complexity"] is None
