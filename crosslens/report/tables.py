"""Tables of a run by the names that entries use."""

from __future__ import annotations

from typing import Any

import pandas as pd

from crosslens.rundir import RunDir


class Tables:
    """Tables of a run, or None where there is no such table or it is empty.

    A name is one of the run directory; "kind/*" is the tables of all tasks of a kind, one below the other, with a
    column `task`; "snapshots" is the list in run.json. Tables of tasks, of which there may be many, are read anew each
    time, the others once.

    Args:
        run: the run directory.
        info: run.json.
    """

    def __init__(self, run: RunDir, info: dict[str, Any]) -> None:
        self._run, self._info = run, info
        self._read: dict[str, pd.DataFrame | None] = {}

    def __getitem__(self, name: str) -> pd.DataFrame | None:
        if name not in self._read:
            found = self._load(name)
            if "/" in name and not name.endswith(".snapshots"):
                return found
            self._read[name] = found
        return self._read[name]

    def tasks(self, kind: str) -> list[str]:
        """Tasks with a table of this kind, by name."""
        return self._run.tasks(kind)

    def once(self, name: str) -> pd.DataFrame | None:
        """A large table, which is not kept."""
        found = self._load(name)
        self._read.pop(name, None)
        return found

    def _load(self, name: str) -> pd.DataFrame | None:
        if name == "snapshots":
            return self._snapshots()
        kind, star, suffix = name.partition("/*")
        if not star:
            table = self._run.table(name)
            return None if table is None or table.empty else table
        tables = {task: self[f"{kind}/{task}{suffix}"] for task in self._run.tasks(kind)}
        found = [table.assign(task=task) for task, table in tables.items() if table is not None]
        return pd.concat(found, ignore_index=True) if found else None

    def _snapshots(self) -> pd.DataFrame | None:
        """Snapshot, label, step and tokens as run.json lists them, or as the columns of the evolution table do."""
        rows: list[dict[str, Any]] = self._info.get("snapshots") or []
        evolution = self["evolution"]
        if not rows and evolution is not None:
            names = (str(name) for name in evolution.columns)
            rows = [{"label": name.removeprefix("norm/")} for name in names if name.startswith("norm/")]
        if not rows:
            return None
        columns = {key: [row.get(key) for row in rows] for key in ("label", "step", "tokens")}
        return pd.DataFrame({"snapshot": range(len(rows)), **columns})
