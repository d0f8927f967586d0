"""What the report shows of one feature, cut out of the tables of all: effects, examples, logit lens, neighbours.

Each part is made once from its tables; `of(row, words)` is what is written of the feature in that row of the evolution
table. Tokens are written as numbers of words, which a script lists once. Letters: F features, S snapshots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from crosslens.report.chart import Frame
from crosslens.report.tables import Tables


class Words:
    """Strings of one script, each written once; `list` gives them by number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def numbers(self, tokens: Tokens, part: slice) -> list[int]:
        """Numbers of some tokens."""
        names = (tokens.names[code] for code in tokens.codes[part].tolist())
        return [self._numbers.setdefault(name, len(self._numbers)) for name in names]

    def list(self) -> list[str]:
        """The strings."""
        return list(self._numbers)


class Tokens:
    """A column of tokens."""

    def __init__(self, table: Frame, name: str) -> None:
        found = table[name].astype("category").cat
        self.codes = np.asarray(found.codes)
        self.names = [str(name) for name in found.categories]

    def __getitem__(self, row: int) -> str:
        return self.names[self.codes[row]]


class Cut:
    """A table in order, in which the rows of one feature are a slice.

    Args:
        table: with a column feature.
        order: columns to order it by, the feature first.
        ids: features, in order.
    """

    def __init__(self, table: Frame, order: list[str], ids: np.ndarray) -> None:
        self.table: Frame = table.sort_values(order, kind="stable", ignore_index=True)
        feature = self.table["feature"].to_numpy()
        begin, end = np.searchsorted(feature, ids), np.searchsorted(feature, ids, side="right")
        self.parts = [slice(a, b) for a, b in zip(begin.tolist(), end.tolist(), strict=True)]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy()


class Effects:
    """IE and its standard error, (F, S), of every task that has a table of them."""

    def __init__(self, tables: Tables, ids: np.ndarray, S: int) -> None:
        self._place = pd.Series(np.arange(len(ids)), ids)
        self._shape = (2, len(ids), S)
        self.of_task: dict[str, np.ndarray] = {}
        for task in tables.tasks("attribution"):
            table = tables[f"attribution/{task}"]
            if table is not None and {"feature", "snapshot", "ie", "ie_se"} <= set(table):
                self.of_task[task] = self._wide(table)

    def _wide(self, table: Frame) -> np.ndarray:
        row, snapshot = table["feature"].map(self._place), table["snapshot"].to_numpy(dtype=int)
        known = row.notna().to_numpy() & (snapshot < self._shape[2])
        at = row[known].to_numpy(dtype=int), snapshot[known]
        both = np.full(self._shape, np.nan, np.float32)
        for values, name in zip(both, ("ie", "ie_se"), strict=True):
            values[at] = table[name].to_numpy(dtype=float)[known]
        return both

    def largest(self) -> np.ndarray:
        """Largest |IE| of each feature over tasks and snapshots, NaN where it has none."""
        largest = np.full(self._shape[1], -1.0)
        for effects, _ in self.of_task.values():
            largest = np.maximum(largest, np.where(np.isfinite(effects), np.abs(effects), -1).max(1))
        return np.where(largest < 0, np.nan, largest)

    def of(self, row: int) -> list[Any]:
        """[number of the task, IE, standard error] of the tasks in which the feature has an effect."""
        return [
            [number, *optional(rounded(both[:, row])).tolist()]
            for number, both in enumerate(self.of_task.values())
            if np.isfinite(both[0, row]).any()
        ]


class Examples:
    """Where features are most active, with the tokens around.

    Args:
        examples: table of that name.
        tokens: table example_tokens.
        ids: features, in order.
        labels: of the snapshots.
    """

    def __init__(self, examples: Frame, tokens: Frame, ids: np.ndarray, labels: list[str]) -> None:
        self._examples = Cut(examples, ["feature", "rank"], ids)
        self._around = Cut(tokens, ["feature", "rank", "position"], ids)
        self._columns = {name: self._examples[name] for name in ("rank", "sequence", "position", "threshold")}
        reads: Frame = self._examples.table[[f"read/{label}" for label in labels]]
        self._reads = reads.to_numpy(dtype=np.float32)
        self._tokens = Tokens(self._around.table, "token")
        self._rank, self._position = self._around["rank"], self._around["position"]
        self._activation = self._around["activation"]

    def tops(self) -> list[str]:
        """The token at which each feature is most active, or nothing."""
        found: list[str] = []
        for examples, around in zip(self._examples.parts, self._around.parts, strict=True):
            at = np.zeros(0, dtype=int)
            if examples.start < examples.stop:
                rank, position = (self._columns[name][examples.start] for name in ("rank", "position"))
                at = np.flatnonzero((self._rank[around] == rank) & (self._position[around] == position))
            found.append(self._tokens[around.start + int(at[0])] if len(at) else "")
        return found

    def of(self, row: int, words: Words) -> dict[str, Any]:
        """The threshold of its gates, and a list of [sequence, position, first position shown, words, activations,
        parts read off each snapshot]."""
        part, around = self._examples.parts[row], self._around.parts[row]
        rank, position = self._rank[around], self._position[around].tolist()
        tokens, activation = words.numbers(self._tokens, around), rounded(self._activation[around]).tolist()
        found: list[list[Any]] = []
        for e in range(part.start, part.stop):
            a, b = (int(np.searchsorted(rank, self._columns["rank"][e], side)) for side in ("left", "right"))
            where = [int(self._columns[name][e]) for name in ("sequence", "position")]
            read = rounded(self._reads[e], 3).tolist()
            found.append([*where, position[a] if a < b else 0, tokens[a:b], activation[a:b], read])
        threshold = float(self._columns["threshold"][part.start]) if found else 0.0
        return {"threshold": threshold, "list": found}


class Lens:
    """Tokens that features promote and suppress at each snapshot.

    Args:
        lens: table of that name.
        ids: features, in order.
        S: snapshots.
    """

    def __init__(self, lens: Frame, ids: np.ndarray, S: int) -> None:
        self._lens, self._S = Cut(lens, ["feature", "snapshot", "rank"], ids), S
        self._snapshot = self._lens["snapshot"]
        self._sides = [
            (Tokens(self._lens.table, name), self._lens[f"{name}_logit"]) for name in ("promoted", "suppressed")
        ]

    def tops(self, snapshots: np.ndarray) -> list[str]:
        """The token that each feature promotes most at a snapshot of its own, or nothing."""
        found: list[str] = []
        for part, snapshot in zip(self._lens.parts, snapshots.tolist(), strict=True):
            at = part.start + int(np.searchsorted(self._snapshot[part], snapshot))
            found.append(self._sides[0][0][at] if at < part.stop and self._snapshot[at] == snapshot else "")
        return found

    def of(self, row: int, words: Words) -> list[list[Any]]:
        """By snapshot: promoted words, their logits, suppressed words, their logits."""
        part = self._lens.parts[row]
        cuts = np.searchsorted(self._snapshot[part], np.arange(self._S + 1)).tolist()
        columns: list[list[Any]] = []
        for tokens, logits in self._sides:
            columns += [words.numbers(tokens, part), rounded(logits[part]).tolist()]
        return [[column[a:b] for column in columns] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class Nearest:
    """Features nearest to each.

    Args:
        nearest: table of that name.
        ids: features, in order.
    """

    def __init__(self, nearest: Frame, ids: np.ndarray) -> None:
        self._nearest = Cut(nearest, ["feature", "rank"], ids)
        self._other, self._cosine = self._nearest["other"], self._nearest["cosine"]

    def of(self, row: int, names: dict[int, str]) -> list[list[Any]]:
        """[feature, cosine, its name] of each."""
        part = self._nearest.parts[row]
        others, cosines = self._other[part].tolist(), rounded(self._cosine[part], 3).tolist()
        return [[other, cosine, names.get(other, "")] for other, cosine in zip(others, cosines, strict=True)]


def rounded(values: np.ndarray, digits: int = 4) -> np.ndarray:
    """Rounded so that the largest number of each row keeps this many digits, and that all print short."""
    largest = np.nan_to_num(np.abs(values).astype(float)).max(-1, keepdims=True, initial=1e-30)
    scale = 10.0 ** np.clip(digits - 1 - np.floor(np.log10(largest)), 0, 20)
    return np.rint(values * scale) / scale + 0.0


def optional(values: np.ndarray) -> np.ndarray:
    """None in the place of what is not finite."""
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found
