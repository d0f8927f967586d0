"""Declarations of tables: what is saved is declared, and everything a reader is told of a table comes from there."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.tables import TABLES, VERBS, check_table, find_table, maker


def test_every_column_has_a_sentence():
    for table in TABLES:
        assert table.verb in VERBS and table.columns and table.advise()
        for name, column in table.columns.items():
            assert column.meaning.endswith(".") and "\n" not in column.meaning, f"{table.name}: {name}"
    names = [table.name for table in TABLES]
    assert len(set(names)) == len(names)


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
