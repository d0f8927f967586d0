"""What the pages Features and Feature show, as scripts that they load: fetch() does not work on a page from disk.

`data/features.js` calls `crosslens.index` with a few columns of all features, for the table. `data/features-00012.js`
calls `crosslens.load(12, ...)` with all that is known of features 12 * SHARD to 13 * SHARD - 1; a page loads the one
that it shows. Everything is JSON in ASCII, so that no token can be read as anything but a string.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from crosslens.report.blocks import AGAIN
from crosslens.report.chart import Frame
from crosslens.report.feature_parts import Effects, Examples, Lens, Nearest, Words, optional, rounded
from crosslens.report.tables import Tables

SHARD = 64
_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of a decoder norm in the table's strips
_LIFE = ("birth", "peak", "death", "lifetime")
_EVOLVE = "No evolution has been computed: crosslens evolve RUN_DIR."
_COLLECT = "None have been collected: crosslens evolve RUN_DIR does it."
_ATTRIBUTE = "No attribution has been run: crosslens attribute RUN_DIR --task TASK."


@dataclass(frozen=True)
class FeatureSet:
    """What there is of features.

    Attributes:
        ids: of the features; empty where `words` say why.
        labels: of the snapshots.
        tasks: those with effects of features.
        words: why there are no features.
        missing: why there are none of effects, examples, lens or nearest, in words.
    """

    ids: list[int]
    labels: list[str]
    tasks: list[str]
    words: str = ""
    missing: dict[str, str] = field(default_factory=dict)


def write_features(tables: Tables, write: Callable[[str, str], None]) -> FeatureSet:
    """Write the scripts.

    Args:
        tables: of the run.
        write: a file below data/, by name and text.
    """
    lives = tables["evolution"]
    if lives is None:
        return FeatureSet([], [], [], _EVOLVE)
    labels = [str(name)[5:] for name in lives.columns if str(name).startswith("norm/")]
    if not labels or "feature" not in lives:
        return FeatureSet([], [], [], f"The table of the evolution names no features or snapshots. {AGAIN}")
    features = _Features(lives.sort_values("feature", ignore_index=True), labels, tables)
    write("features.js", f"crosslens.index({ascii_json(features.index())});\n")
    shards = features.ids // SHARD
    for shard in np.unique(shards).tolist():
        contents = features.shard(np.flatnonzero(shards == shard).tolist())
        write(f"features-{shard:05d}.js", f"crosslens.load({shard}, {ascii_json(contents)});\n")
    return FeatureSet(features.ids.tolist(), labels, list(features.effects.of_task), "", features.missing)


def ascii_json(value: Any) -> str:
    """JSON in which a string is never more than a string, wherever it stands."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True).replace("<", "\\u003c")


class _Features:
    """Columns over all features, and what is written of some of them. Letters: F features, S snapshots."""

    def __init__(self, lives: Frame, labels: list[str], tables: Tables) -> None:
        self.lives, self.labels = lives, labels
        self.ids = lives["feature"].to_numpy(dtype=np.int64)
        self.norms = np.nan_to_num(lives[[f"norm/{label}" for label in labels]].to_numpy(dtype=float))
        self.kinds = _kinds(lives)
        self.life = {name: self._integers(name) for name in _LIFE}
        self.rates = _short(self._floats("firing_rate"))
        self.effects = Effects(tables, self.ids, len(labels))
        self.missing = {} if self.effects.of_task else {"effects": _ATTRIBUTE}
        ids, S = self.ids, len(labels)
        self.examples: Examples | None = self._part(
            "examples",
            tables,
            ("examples", "example_tokens"),
            lambda table, around: Examples(table, around, ids, labels),
        )
        self.lens: Lens | None = self._part("lens", tables, ("lens",), lambda table: Lens(table, ids, S))
        self.nearest: Nearest | None = self._part("nearest", tables, ("nearest",), lambda table: Nearest(table, ids))
        nothing = [""] * len(ids)
        self.names = [_text(name) for name in _labelled(tables["labels"], ids, "label")]
        judged = _labelled(tables["labels"], ids, "complexity")
        self.complexities = [None if complexity is None else int(complexity) for complexity in judged]
        self.top = self.examples.tops() if self.examples else nothing
        self.promoted = self.lens.tops(self.norms.argmax(1)) if self.lens else nothing
        known = zip(ids.tolist(), self.names, self.top, strict=True)
        self._called = {feature: name or top for feature, name, top in known}

    def _part(self, name: str, tables: Tables, wanted: tuple[str, ...], make: Callable[..., Any]) -> Any:
        found = [tables.once(table) for table in wanted]
        if any(table is None for table in found):
            self.missing[name] = _COLLECT
            return None
        try:
            return make(*found)
        except KeyError as error:
            self.missing[name] = f"A table of this run has no column {error}. {AGAIN}"
            return None

    def index(self) -> dict[str, Any]:
        """The columns of the table."""
        return {
            "snapshots": self.labels,
            "id": self.ids.tolist(),
            "label": self.names if any(self.names) else None,
            "complexity": self.complexities if any(self.complexities) else None,
            "token": _coded(self.top),
            "promoted": _coded(self.promoted),
            "kind": _coded(self.kinds),
            **{name: self.life[name] for name in ("birth", "peak", "lifetime")},
            "rate": self.rates,
            "ie": _short(self.effects.largest()),
            "heat": self._heat(),
        }

    def shard(self, rows: list[int]) -> dict[str, Any]:
        """All that is known of the features of these rows."""
        words = Words()
        norms = rounded(self.norms[rows], 5)
        features = [
            {
                "id": int(self.ids[row]),
                "name": self.names[row],
                "complexity": self.complexities[row],
                "kind": self.kinds[row],
                "rate": self.rates[row],
                **{name: values[row] for name, values in self.life.items()},
                "norms": norms[i].tolist(),
                "effects": self.effects.of(row),
                "examples": self.examples.of(row, words) if self.examples else None,
                "lens": self.lens.of(row, words) if self.lens else None,
                "nearest": self.nearest.of(row, self._called) if self.nearest else None,
            }
            for i, row in enumerate(rows)
        ]
        return {"words": words.list(), "features": features}

    def _heat(self) -> str:
        """A character per feature and snapshot: the decoder norm as a share of the feature's largest."""
        shares = self.norms / np.maximum(self.norms.max(1, keepdims=True), 1e-30)
        levels = (shares * (len(_LEVELS) - 1)).round().astype(np.uint8).flatten()
        return np.frombuffer(_LEVELS.encode(), np.uint8)[levels].tobytes().decode()

    def _floats(self, name: str) -> np.ndarray:
        if name not in self.lives:
            return np.full(len(self.lives), np.nan)
        numbers: Frame = pd.to_numeric(self.lives[name], errors="coerce")
        return numbers.to_numpy(dtype=float, na_value=np.nan)

    def _integers(self, name: str) -> list[int | None]:
        return [None if np.isnan(value) else int(value) for value in self._floats(name)]


def _kinds(lives: Frame) -> list[str]:
    """Origin and fate of each feature, or "dead"."""
    parts = [lives[name].astype(object) for name in ("origin", "fate") if name in lives]
    kinds = [", ".join(filter(None, map(_text, row))) for row in zip(*parts, strict=True)] or [""] * len(lives)
    alive = lives["alive"].astype(bool).tolist() if "alive" in lives else [True] * len(lives)
    return [kind if lives else "dead" for kind, lives in zip(kinds, alive, strict=True)]


def _labelled(labels: Frame | None, ids: np.ndarray, column: str) -> list[Any]:
    """What a column of the table of labels says of each feature; None where it says nothing."""
    if labels is None or not {"feature", column} <= set(labels):
        return [None] * len(ids)
    said = labels.dropna(subset=[column])
    found = dict(zip(said["feature"], said[column], strict=True))
    return [found.get(feature) for feature in ids.tolist()]


def _short(values: np.ndarray) -> list[float | None]:
    return optional(rounded(values[:, None], 3))[:, 0].tolist()


def _coded(words: list[str]) -> list[Any] | None:
    """Numbers of words, and the words; nothing where all are empty."""
    if not any(words):
        return None
    coded: Any = pd.Categorical(words)
    return [np.asarray(coded.codes).tolist(), [str(word) for word in coded.categories]]


def _text(value: object) -> str:
    return "" if value is None or value is pd.NA or value != value else str(value)
