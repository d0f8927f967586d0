"""The layout of a run directory. This module alone knows it.

run.json                        what was run: versions, command, data and snapshot fingerprints, timings
crosscoder/                     cfg.json and sae_weights.safetensors, as SAELens writes them
checkpoints/                    the last whole checkpoint of an unfinished training
evaluation.parquet              explained variance, L0, CE and KL per snapshot
evolution.parquet               one row per feature
examples.parquet                where features are most active, and the tokens around: example_tokens.parquet
lens.parquet                    tokens promoted and suppressed by each feature at each snapshot
nearest.parquet                 features nearest to each
labels.parquet                  what features are called: feature, label, complexity; answers in labels.jsonl
attribution/<task>.parquet      effects per feature and snapshot
ablation/<task>.parquet         ablation curves
report/                         the pages
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from crosslens.errors import UserError, shortened

_PACKAGES = ("crosslens", "sae-lens", "transformer-lens", "torch", "transformers")


class RunDir:
    """One run on disk: tables by name, and `run.json`.

    Args:
        path: the directory; nothing is written until something is saved.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.crosscoder = self.path / "crosscoder"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report"

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run directory.

        Raises:
            UserError: there is no run in this directory.
        """
        run = cls(path)
        if not run.exists():
            raise UserError(f"{path} is not a run directory (it has no run.json); `crosslens train` makes one")
        return run

    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / "run.json").is_file()

    def read_json(self) -> dict[str, Any]:
        """The contents of run.json."""
        try:
            return json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path / 'run.json'} is not valid JSON ({error}); restore or delete it") from error

    def write_json(self, contents: dict[str, Any]) -> None:
        """Replace run.json."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "run.json", json.dumps(contents, indent=1, default=str))

    def update(self, **entries: Any) -> None:
        """Add entries to run.json; dictionaries are merged one level deep."""
        contents = self.read_json() if self.exists() else {}
        for key, value in entries.items():
            contents[key] = {**contents.get(key, {}), **value} if isinstance(value, dict) else value
        self.write_json(contents)

    def claim(self, identity: dict[str, Any], part: str = "identity") -> None:
        """Make this the directory of a run, or make sure that it already is.

        Args:
            identity: what makes two runs the same run.
            part: entry of run.json that records it; a run may be claimed by what leads to it, and by what it is.

        Raises:
            UserError: the directory holds another run; the first difference is named, nothing is written.
        """
        wanted = json.loads(json.dumps(identity, default=str))
        contents = self.read_json() if self.exists() else {}
        if not contents and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(
                f"{self.path} holds files but no run; give a new directory, nothing in this one was changed"
            )
        if part in contents:
            difference = _first_difference(contents[part], wanted)
            if difference is not None:
                key, old, new = difference
                raise UserError(
                    f"{self.path} is the directory of another run: its {key} is {shortened(old)}, asked for is "
                    f"{shortened(new)}; give another directory, nothing in this one was changed"
                )
            return
        stamp = contents or {
            "versions": {package: version(package) for package in _PACKAGES},
            "crosslens": version("crosslens"),
            "python": sys.version.split()[0],
            "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "command": [_program(sys.argv[0]), *sys.argv[1:]],
        }
        self.write_json({**stamp, part: wanted, **(_headlines(wanted) if part == "identity" else {})})

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint of an unfinished training."""
        whole = [p for p in self.checkpoints.glob("tokens-*") if (p / "state.json").is_file()]
        return max(whole, key=lambda p: int(p.name.removeprefix("tokens-")), default=None)

    def table(self, name: str) -> pd.DataFrame | None:
        """A saved table such as "evolution" or "attribution/simple", or None."""
        path = self._table_path(name)
        return pd.read_parquet(path) if path.is_file() else None

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write a table whole or not at all."""
        path = self._table_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        table.to_parquet(partial, index=False)
        os.replace(partial, path)

    def save_tables(self, tables: Mapping[str, pd.DataFrame]) -> None:
        """Write several tables, each under its name."""
        for name, table in tables.items():
            self.save_table(name, table)

    def tasks(self, kind: str) -> list[str]:
        """Tasks with a table under "attribution" or "ablation", by name."""
        names = (p.name.removesuffix(".parquet") for p in (self.path / kind).glob("*.parquet"))
        return sorted(name for name in names if not name.endswith(".snapshots"))

    def table_names(self) -> list[str]:
        """All saved tables, by name."""
        found = [*self.path.glob("*.parquet"), *self.path.glob("*/*.parquet")]
        return sorted(path.relative_to(self.path).with_suffix("").as_posix() for path in found)

    def _table_path(self, name: str) -> Path:
        path = self.path / f"{name}.parquet"
        if self.path.resolve() not in path.resolve().parents:
            raise UserError(f"table name {name!r} leaves the run directory; use a plain name")
        return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _program(path: str) -> str:
    """What a person calls it: `python -m crosslens`, as torchrun starts it, is crosslens."""
    place = Path(path)
    return place.parent.name if place.name == "__main__.py" else place.name


def _headlines(identity: dict[str, Any]) -> dict[str, Any]:
    """What a person looks for first, at the top level of run.json."""
    architecture = identity.get("architecture", {})
    return {
        "model": identity.get("model_name"),
        "hook_name": identity.get("hook_name"),
        "dataset": identity.get("dataset_path"),
        "snapshots": identity.get("snapshots"),
        "architecture": architecture.get("architecture"),
        "d_sae": architecture.get("d_sae"),
        "n_tokens": identity.get("n_tokens"),
        "seed": identity.get("training", {}).get("seed"),
    }


def _first_difference(found: Any, wanted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for name in sorted({*found, *wanted}):
            inner = _first_difference(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
            if inner is not None:
                return inner
        return None
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            inner = _first_difference(a, b, f"{key}[{i}]")
            if inner is not None:
                return inner
        return None
    return None if found == wanted else (key, found, wanted)
