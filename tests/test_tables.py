"""Declarations of tables: what is saved is declared, and everything a reader is told of a table comes from there."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from crosslens.errors import UserError
from crosslens.report import entries
from crosslens.rundir import RunDir
from crosslens.tables import TABLES, VERBS, check_table, earlier_names, find_table, maker, render_markdown


def test_every_column_has_a_sentence():
    for table in TABLES:
        assert table.verb in VERBS and table.columns and table.advise()
        for name, column in table.columns.items():
            assert column.meaning.endswith(".") and "\n" not in column.meaning, f"{table.name}: {name}"
    names = [table.name for table in TABLES]
    assert len(set(names)) == len(names)


def test_what_features_are_set_to_stands_in_every_table_of_their_ablations():
    known = {table.name: set(table.columns) for table in TABLES}
    for kind in ("ablation", "zeroing", "transfer", "additivity", "exact", "validation", "completeness"):
        found = [name for name in known if name.startswith(f"{kind}/")]
        assert found and all("baseline" in known[name] for name in found), kind
    for name in known:
        errors = [column for column in known[name] if column.endswith("_se")]
        groups = known[name] | known.get(f"{name}.snapshots", set())  # effects say it by snapshot
        assert not errors or "n_groups" in groups or name.startswith("timeline/"), name


@pytest.mark.parametrize(
    ("name", "declared", "verb"),
    [
        ("evaluation", "evaluation", "train"),
        ("consensus", "consensus", "train"),
        ("attribution/a.b c", "attribution/<task>", "attribute"),
        ("attribution/a.snapshots", "attribution/<task>.snapshots", "attribute"),
        ("ablation/a", "ablation/<task>", "ablate"),
        ("transfer/a", "transfer/<task>", "study"),
        ("completeness/a", "completeness/<task>", "study"),
        ("labels", "labels", "label"),
        ("births", None, "evolve"),
        ("attribution/", None, "evolve"),
    ],
)
def test_names_are_matched(name: str, declared: str | None, verb: str):
    found = find_table(name)
    assert (found and found.name) == declared and maker(name) == verb


def test_undeclared_tables_and_columns_are_refused(tmp_path: Path):
    run = RunDir(tmp_path)
    with pytest.raises(UserError) as caught:
        run.save_table("evolution", pd.DataFrame({"feature": [1], "age": [1], "mood": [1]}))
    assert str(caught.value) == (
        "the table 'evolution' has no column 'age', 'mood': declare it in crosslens.tables, or name a table of your "
        "own own/evolution, with any columns"
    )
    with pytest.raises(UserError, match="did you mean 'evolution'.*name a table of your own own/evolutoin"):
        run.save_table("evolutoin", pd.DataFrame({"feature": [1]}))
    assert not list(tmp_path.iterdir())
    mine = pd.DataFrame({"age": [1], "mood": ["x"]})
    run.save_table("own/evolution", mine)
    pd.testing.assert_frame_equal(run.table("own/evolution"), mine)  # type: ignore[arg-type]
    check_table("encoder", ["feature", "share/step 1", "share/a/b"])
    with pytest.raises(UserError, match="no column 'share/', 'shares/x'"):
        check_table("encoder", ["share/", "shares/x"])


def test_tables_of_older_versions_are_read(tmp_path: Path):
    old = pd.DataFrame({"snapshot": [0], "mood": [1]})
    run = RunDir(tmp_path)
    run.update(id="x")
    old.to_parquet(tmp_path / "evolution.parquet", index=False)
    pd.testing.assert_frame_equal(run.table("evolution"), old)  # type: ignore[arg-type]


def test_own_tables_stay_when_a_task_is_removed(tmp_path: Path):
    run = RunDir(tmp_path)
    run.save_tables({name: pd.DataFrame({"k": [1]}) for name in ("ablation/mine", "own/mine")})
    assert run.remove_task("mine") == ["ablation/mine"]
    assert run.table_names() == ["own/mine"]


def test_the_page_of_the_docs_runs_and_lists_every_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = (Path(__file__).parent.parent / "docs" / "tables.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert entries.list_figures()
    monkeypatch.setattr(entries, "_FIGURES", dict(entries._FIGURES))
    names: dict[str, object] = {"__name__": "mine"}
    for code in re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S):
        exec(code, names)
    page = (tmp_path / "my-run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "Norm of the weights" in page and "Explained variance" in page
    assert "Norm of the weights." in (tmp_path / "my-run" / "report" / "data" / "columns.csv").read_text()
    (tmp_path / "my-run" / "own" / "weights.parquet").unlink()
    names["cl"].write_report("my-run")  # type: ignore[attr-defined]
    page = (tmp_path / "my-run" / "report" / "index.html").read_text(encoding="utf-8")
    assert "The run has no table own/weights." in page
    listed = render_markdown()
    for table in TABLES:
        section = listed.partition(f"### `{table.name}`\n")[2].partition("\n##")[0]
        assert re.findall(r"^\| `(.*?)` \|", section, flags=re.M) == list(table.columns)


def test_every_figure_stands_on_a_page_and_takes_declared_tables():
    from crosslens.report.sections import PAGES, TASK

    places = [section.name for page in (*PAGES, TASK) for section in page.sections]
    figures = entries.list_figures()
    assert {entry.section for entry in figures} == set(places) and len(places) == len(set(places))
    for entry in figures:
        made = {"names", "chance@<task>"}
        assert all(name in made or entries._declarations(name) for name in entry.tables), entry.name


def test_columns_follow_one_grammar():
    """Ends of an interval carry the name of what it is of; steps and tokens are in these units; no bare ends."""
    bare = {"low", "high", "lower", "upper", "ci_low", "ci_high", "p_value", "q_value", "fdr"}
    for table in TABLES:
        columns = table.columns
        assert not bare & set(columns), table.name
        for name, column in columns.items():
            stem, _, end = name.rpartition("_")
            if end in ("low", "high"):
                other = f"{stem}_{'high' if end == 'low' else 'low'}"
                assert stem in columns and other in columns, f"{table.name}: {name}"
                assert column.unit == columns[stem].unit, f"{table.name}: {name}"
            if end in ("step", "tokens"):
                assert column.unit == {"step": "steps", "tokens": "tokens"}[end], f"{table.name}: {name}"


def test_columns_of_version_0_2_are_read_by_their_names_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = pd.DataFrame({"task": ["a"], "snapshot": [0], "accuracy": [0.5], "low": [0.25], "high": [0.75]})
    run = RunDir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("crosslens.rundir.check_table", lambda *_: None)  # as that version wrote it
        run.save_table("accuracy", old)
    found = run.table("accuracy")
    assert found is not None and found.columns.tolist() == [
        "task", "snapshot", "accuracy", "accuracy_low", "accuracy_high",
    ]  # fmt: skip
    assert found["accuracy_low"].tolist() == [0.25]
    for name, renamed in ((table.name, earlier_names(table.name)) for table in TABLES):
        assert all(find_table(name).column(new) and not find_table(name).column(old) for old, new in renamed.items())  # type: ignore[union-attr]
