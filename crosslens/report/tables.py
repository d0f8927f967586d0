"""Read the tables of a run by the names that the sections use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from crosslens.errors import UserError, visible
from crosslens.report.chart import Frame
from crosslens.rundir import RunDir

MEASURES = {"r2": "R²", "within": "within-token R²", "norm": "decoder norm"}


def missing_column(error: KeyError) -> str:
    """Why a figure is missing, for a reader: pandas names one column as 'x', and several as a list in a sentence."""
    several = re.search(r"\[([^\[\]]+)\]", str(error))
    names = re.findall(r"'[^']*'", several[1] if several else "") or [str(error)]
    return (
        f"A table of this run has no column {' or '.join(names)}. It was written by another version of crosslens; "
        "rerun the command that writes it."
    )


# the pages of features show every character of a token, as ␀ or ⟨U+202E⟩
_TOKENS = ("lens", "examples", "example_tokens", "example_contexts", "samples", "sample_tokens")


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table with control characters in its texts, such as labels, written as their codes; tokens have their own."""
    table.columns = [visible(str(column)) for column in table.columns]  # some are named after snapshots
    for column in table.columns:
        texts = {text for text in table[column] if isinstance(text, str)} if table[column].dtype.kind == "O" else ()
        codes = {text: visible(text) for text in texts if visible(text) != text}
        if codes:
            table[column] = [codes.get(text, text) if isinstance(text, str) else text for text in table[column]]
    return table


class Tables:
    """Tables of a run; None if a table does not exist or is empty.

    A name is that of a table in the run directory. "kind/*" is the tables of a kind of all tasks, concatenated, with a
    column `task`, and "table@task" the rows of a table with that task; "chance@task" is the labels of the snapshots at
    which its accuracy is at chance, which may have no rows; "snapshots" is the list in run.json; "names" is
    `names`, which may have no rows, and "tasks" the tasks in the order of their colours, with the files of their pages.
    Tables of single tasks can be many, so they are read at every access; the others are read once.

    Args:
        run: the run directory.
        info: run.json.
        consensus: leave out of tables about features those that few seeds have.

    Raises:
        UserError: `consensus`, but the run has no such table.
    """

    def __init__(self, run: RunDir, info: dict[str, Any], *, consensus: bool = False) -> None:
        self._run, self._info = run, info
        found = run.consensus() if consensus else None
        self._kept = None if found is None else set(found.loc[found["consensus"], "feature"])
        self._read: dict[str, pd.DataFrame | None] = {}
        self.names: dict[int, str] = {}
        """The label or the top token of each feature, once the data of features are written."""
        self.damaged: dict[str, str] = {}
        """What is wrong with the tables that were asked for since this was last cleared; pages do without them."""
        self._defects: dict[str, str] = {}

    def __getitem__(self, name: str) -> pd.DataFrame | None:
        found = self._read[name] if name in self._read else self._load(name)
        if not set("/@") & set(name) or name.endswith(".snapshots"):
            self._read[name] = found
        kind, star, _ = name.partition("*")
        self.damaged |= {t: said for t, said in self._defects.items() if t == name or (star and t.startswith(kind))}
        return found

    def get(self, name: str, *columns: str) -> Frame | None:
        """A table that has these columns; None if it has not, or does not exist."""
        found = self[name]
        return None if found is None or not set(columns) <= set(found) else found

    def tasks(self, kind: str) -> list[str]:
        """Names of the tasks that have a table of this kind."""
        return self._run.tasks(kind)

    def once(self, name: str) -> pd.DataFrame | None:
        """A large table, which is not kept in memory."""
        found = self._load(name)
        self._read.pop(name, None)
        return found

    def _load(self, name: str) -> pd.DataFrame | None:
        if name == "snapshots":
            return self._snapshots()
        if name == "names":
            return pd.DataFrame({"feature": list(self.names), "name": list(self.names.values())})
        if name == "tasks":
            return self._tasks()
        whole, at, task = name.partition("@")
        if whole == "chance":
            found = self[f"accuracy@{task}"]
            if found is None or not {"label", "at_chance"} <= set(found):
                return pd.DataFrame({"label": []})
            return pd.DataFrame({"label": found.loc[found["at_chance"].astype(bool), "label"]})
        if at and "/" not in whole:
            table = self[whole]
            rows = None if table is None or "task" not in table else table[table["task"].astype(str) == task]
            return None if rows is None or rows.empty else pd.DataFrame(rows).reset_index(drop=True)
        kind, star, suffix = name.partition("/*")
        if not star:
            try:
                table = self._run.table(name)
            except UserError as error:
                self._defects[name] = str(error).replace(f"{self._run.path}{os.sep}", "")
                return None
            if table is not None and name not in _TOKENS:
                table = _shown(table)
            if table is not None and self._kept is not None and "feature" in table and name != "consensus":
                table = pd.DataFrame(table[table["feature"].isin(self._kept)]).reset_index(drop=True)
            if table is not None and name == "accuracy" and {"snapshot", "label", "step"} <= set(table):
                table = _numbered_alike(table)
            return None if table is None or table.empty else table
        tables = {task: self[f"{kind}/{task}{suffix}"] for task in self._run.tasks(kind)}
        found = [table.assign(task=task) for task, table in tables.items() if table is not None]
        return pd.concat(found, ignore_index=True) if found else None

    def _tasks(self) -> pd.DataFrame | None:
        """Each task, the file of its page, and the row of its last snapshot in the accuracy table, if it has one."""
        found, pages = self["accuracy"], dict[str, str]()
        accuracy = found if found is not None and {"task", "snapshot"} <= set(found) else None
        first = [] if accuracy is None else accuracy["task"].astype(str).tolist()
        for task in (*first, *self.tasks("attribution"), *self.tasks("ablation"), *self.tasks("edges")):
            if task not in pages:
                pages[task] = free_name(f"task-{slug(task)}", pages.values())
        tasks = pd.DataFrame({"task": list(pages), "page": [f"{page}.html" for page in pages.values()]})
        if accuracy is not None:
            last = accuracy.sort_values("snapshot").drop_duplicates("task", keep="last")
            tasks = tasks.merge(last, how="left", on="task")
        return None if tasks.empty else tasks

    def _snapshots(self) -> pd.DataFrame | None:
        """Snapshot, label, step and tokens from run.json, or from the evolution table."""
        rows: list[dict[str, Any]] = self._info.get("snapshots") or []
        evolution = self["evolution"]
        if not rows and evolution is not None:
            rows = evolution.drop_duplicates("snapshot").sort_values("snapshot").to_dict("records")
        if not rows:
            return None
        columns = {key: [row.get(key) for row in rows] for key in ("label", "step", "tokens")}
        return pd.DataFrame({"snapshot": range(len(rows)), **columns})


def _numbered_alike(accuracy: Frame) -> Frame:
    """The accuracy table with one number per snapshot: tasks may have been measured on different sets of snapshots."""
    pairs = accuracy[["snapshot", "label"]].drop_duplicates()
    if pairs["snapshot"].is_unique and pairs["label"].is_unique:
        return accuracy
    order = accuracy.drop_duplicates("label").sort_values("step", kind="stable")["label"]
    return accuracy.assign(snapshot=accuracy["label"].map({label: i for i, label in enumerate(order)}))


def slug(text: str) -> str:
    """Text as part of an id or a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:60] or "task"


def free_name(name: str, taken: Iterable[str]) -> str:
    """The name, with a number if it is taken: the tasks "a b" and "a-b" have the same slug."""
    used, free, number = {one.casefold() for one in taken}, name, 2  # some file systems do not know case
    while free.casefold() in used:
        free, number = f"{name}-{number}", number + 1
    return free


def main_measure(lifecycles: Frame) -> str:
    """The measure of presence that the report puts first: R2 where activations were given."""
    known = set(lifecycles["measure"])
    return next(measure for measure in MEASURES if measure in known)


def by_measure(lifecycles: Frame, measure: str | None = None) -> Frame:
    """Lifecycles by one measure of presence, the main one if None."""
    return lifecycles[lifecycles["measure"] == (measure or main_measure(lifecycles))].reset_index(drop=True)


def curves(evolution: Frame, features: Any, column: str) -> np.ndarray:
    """One column of the evolution table as (features, S), 0 where it is missing or below 0."""
    wide = evolution.pivot(index="feature", columns="snapshot", values=column)
    return np.nan_to_num(wide.reindex(features).to_numpy(dtype=float)).clip(0)
