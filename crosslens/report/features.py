"""Write the data of single features, which the pages Features and Feature load as scripts.

`fetch()` does not work on pages opened from disk, so the data are JSON inside calls of JavaScript functions:
1. `data/features.js` calls `crosslens.index` with a few columns of all features, for the table.
2. `data/features-00012.js` calls `crosslens.load(12, ...)` with everything about features 12 * SHARD to
   13 * SHARD - 1. The page Feature loads only the script of the feature that it shows.

`Effects`, `Examples`, `Lens` and `Nearest` each cut the rows of one feature from their tables; `of(row, ...)` returns
the data of the feature in that row of the evolution table. Tokens are indices into a list of words per script. The JSON
is ASCII, so that no token can end its string. Symbols: F features, S snapshots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from crosslens.causal.dates import DATES
from crosslens.report.chart import (
    MUTED,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    Style,
    add_level,
    add_line,
    new_figure,
    shown,
)
from crosslens.report.entries import advise
from crosslens.report.tables import MEASURES, Tables, by_measure, curves, main_measure, missing_column

SHARD = 64
MIN_ITEMS = 20  # effects on fewer prompts do not rank features
_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of presence in the table's strips
_LIFECYCLE = ("birth", "peak", "death", "lifetime")


@dataclass(frozen=True)
class FeatureSet:
    """Which features were written.

    Attributes:
        ids: feature ids.
        labels: snapshot labels.
        tasks: with effects of features.
        words: why there are no features; empty if there are some.
        measure: what presence is read by, in words.
        missing: why effects, examples, lens, nearest, read (encoder shares) or rates (histograms) are missing, by name.
        names: the label or the top token of each feature.
        selects: whether "Promotes" can be shown at every snapshot.
    """

    ids: list[int]
    labels: list[str]
    tasks: list[str]
    words: str = ""
    measure: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    selects: bool = False


def write_features(tables: Tables, write: Callable[[str, str], None]) -> FeatureSet:
    """Write the scripts.

    Args:
        tables: tables of the run.
        write: writes a file in data/, given its name and text.
    """
    lifecycles, evolution = tables["lifecycles"], tables["evolution"]
    if lifecycles is None or evolution is None:
        return FeatureSet([], [], [], advise("evolution"))
    if not {"feature", "measure"} <= set(lifecycles) or not {"feature", "snapshot", "label", "norm"} <= set(evolution):
        return FeatureSet([], [], [], "The evolution table lists no features or no snapshots: repeat crosslens evolve.")
    labels = evolution.drop_duplicates("snapshot").sort_values("snapshot")["label"].astype(str).tolist()
    features = _Features(lifecycles, evolution, labels, tables)
    write("features.js", f"crosslens.index({ascii_json(features.index())});\n")
    shards = features.ids // SHARD
    for shard in np.unique(shards).tolist():
        contents = features.shard(np.flatnonzero(shards == shard).tolist())
        write(f"features-{shard:05d}.js", f"crosslens.load({shard}, {ascii_json(contents)});\n")
    for name, tokens in features.promotes():
        write(f"promotes-{name}.js", f"crosslens.promotes({json.dumps(name)}, {ascii_json(tokens)});\n")
    return FeatureSet(
        features.ids.tolist(),
        labels,
        list(features.effects.of_task),
        "",
        MEASURES[features.measure],
        features.missing,
        features.called,
        features.lens is not None,
    )


def presence_figure(snapshots: Frame) -> Chart:
    """Every measure of presence and the threshold, without numbers: the page's script fills them in.

    Args:
        snapshots: snapshot, label, step, tokens.
    """
    axis = SnapshotAxis.of(snapshots)
    ids = list(axis.labels)
    figure = new_figure("share of its largest value", height=320)
    add_level(figure, 0.5, "half of the largest")
    for i, name in enumerate(MEASURES.values()):
        add_line(figure, axis.x(ids), [0.0] * len(ids), name, Style.of(i), hover=axis.hover(ids))
    figure.update_yaxes(range=[-0.03, 1.05])
    figure.update_layout(showlegend=True)
    axis.apply(figure)
    return Chart(figure, snapshots)


def read_figure(snapshots: Frame) -> Chart:
    """The encoder share of every snapshot as bars, without numbers: the page's script fills them in."""
    axis = SnapshotAxis.of(snapshots, even=True)
    ids = list(axis.labels)
    figure = new_figure("encoder share", height=240, bargap=0.3, yaxis_tickformat=".0%")
    figure.add_bar(
        x=axis.x(ids), y=[0.0] * len(ids), marker={"color": SERIES[0]}, showlegend=False, customdata=axis.hover(ids),
        hovertemplate="%{customdata}<br>%{y:.1%} of the encoder input<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    axis.apply(figure)
    return Chart(figure, snapshots)


def rate_figure() -> Chart:
    """A histogram of activations, without numbers: the page's script fills them in."""
    figure = new_figure("share of active tokens", height=240, bargap=0.05, yaxis_tickformat=".0%")
    figure.add_bar(
        x=[0.0], y=[0.0], marker={"color": SERIES[0]}, showlegend=False,
        hovertemplate=(
            "activation %{customdata[0]}<br>%{customdata[1]:,} tokens, %{y:.2%} of the active ones<extra></extra>"
        ),
    )  # fmt: skip
    figure.update_xaxes(title_text="activation (log scale)")
    figure.update_yaxes(rangemode="tozero")
    return Chart(figure, pd.DataFrame())


def effect_figure(snapshots: Frame, tasks: list[str], order: Frame | None = None) -> Chart:
    """A line and a band per task: IE with two standard errors, without numbers: the page's script fills them in.

    Args:
        snapshots: snapshot, label, step, tokens.
        tasks: with effects.
        order: the table `tasks`, which gives every task its colour.
    """
    axis = SnapshotAxis.of(snapshots)
    ids = list(axis.labels)
    zeros = [0.0] * len(ids)
    figure = new_figure("IE (logits)", height=320)
    for task, style in Style.of_tasks(tasks, order).items():
        add_line(
            figure, axis.x(ids), zeros, shown(task), style, hover=axis.hover(ids), value="%{y:+.3f}",
            band=(zeros, zeros),
        )  # fmt: skip
    figure.update_layout(showlegend=True)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    axis.apply(figure)
    return Chart(figure, snapshots)


def ascii_json(value: Any) -> str:
    """JSON in which no string can end its literal or its script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True).replace("<", "\\u003c")


class _Features:
    """Columns over all features, and the data of single ones."""

    def __init__(self, lifecycles: Frame, evolution: Frame, labels: list[str], tables: Tables) -> None:
        self.measure = main_measure(lifecycles)
        first = by_measure(lifecycles).sort_values("feature", ignore_index=True)
        self.lifecycles, self.labels = first, labels
        self.ids = first["feature"].to_numpy(dtype=np.int64)
        self.norms = curves(evolution, self.ids, "norm")
        # by measure, zero for features without a reading
        self.presence = {"norm": self.norms}
        for measure in [name for name in MEASURES if name != "norm" and name in set(lifecycles["measure"])]:
            rows = by_measure(lifecycles, measure)
            read = rows.loc[rows["origin"].notna(), "feature"]
            self.presence[measure] = curves(evolution, self.ids, measure) * np.isin(self.ids, read)[:, None]
        lifecycles = first
        self.classes = _classes(lifecycles)
        self.lifecycle = {name: self._integers(name) for name in _LIFECYCLE}
        self.rates = _short(self._floats("firing_rate"))
        self.effects = Effects(tables, self.ids, len(labels))
        self.missing = {} if self.effects.of_task else {"effects": advise("attribution/<task>")}
        self.dates = _dates(tables, first)
        if not self.dates:
            self.missing["dates"] = advise("dates/<task>")
        ids, S = self.ids, len(labels)
        self.examples: Examples | None = self._part(
            "examples",
            tables,
            ("examples", "example_tokens"),
            lambda table, around: Examples(table, _with_contexts(around, tables), ids, labels),
        )
        self.samples: Examples | None = self._part(
            "samples", tables, ("samples", "sample_tokens"), lambda table, around: Examples(table, around, ids, [])
        )
        self.rates_: Cut | None = self._part(
            "rates", tables, ("activations",), lambda table: Cut(table, ["feature", "bin"], ids)
        )
        self.seeds = _seeds(tables["consensus"], ids)
        self.lens: Lens | None = self._part("lens", tables, ("lens",), lambda table: Lens(table, ids, S))
        alive = set(ids.tolist()) if "alive" not in first else set(first.loc[first["alive"].astype(bool), "feature"])
        self.nearest: Nearest | None = self._part(
            "nearest", tables, ("nearest",), lambda table: Nearest(table, ids, alive)
        )
        self.read: np.ndarray | None = self._part("read", tables, ("encoder",), lambda table: _read(table, ids, labels))
        nothing = [""] * len(ids)
        statuses = _labelled(tables["labels"], ids, "status")
        self.names = [  # labels of top tokens say no more than these, at greater length
            "" if status == "local" else _text(name)
            for name, status in zip(_labelled(tables["labels"], ids, "label"), statuses, strict=True)
        ]
        rated = _labelled(tables["labels"], ids, "complexity")
        self.complexities = [None if complexity is None else int(complexity) for complexity in rated]
        self.judged = _judged(tables["labels"], ids)
        self.top = self.examples.tops() if self.examples else nothing
        self.promoted = self.lens.tops(np.full(len(ids), S - 1)) if self.lens else nothing
        known = zip(ids.tolist(), self.names, self.top, strict=True)
        self.called = {feature: name or top for feature, name, top in known}

    def _part(self, name: str, tables: Tables, wanted: tuple[str, ...], make: Callable[..., Any]) -> Any:
        found = {table: tables.once(table) for table in wanted}
        if missing := [table for table, rows in found.items() if rows is None]:
            self.missing[name] = advise(missing[0])
            return None
        try:
            return make(*found.values())
        except KeyError as error:
            self.missing[name] = missing_column(error)
            return None

    def promotes(self) -> Iterator[tuple[str, list[Any] | None]]:
        """The token that each feature promotes most at every snapshot, and at that of its largest effect, by name."""
        if self.lens is None:
            return
        for s, _ in enumerate(self.labels):
            yield f"{s:05d}", _coded(self.lens.tops(np.full(len(self.ids), s)))
        if self.effects.of_task:
            yield "effect", _coded(self.lens.tops(self.effects.peak()))

    def index(self) -> dict[str, Any]:
        """Columns of the table of all features."""
        return {
            "snapshots": self.labels,
            "id": self.ids.tolist(),
            "label": self.names if any(self.names) else None,
            "complexity": self.complexities if any(self.complexities) else None,
            "token": _coded(self.top),
            "promoted": _coded(self.promoted),
            "kind": _coded(self.classes),
            **{name: self.lifecycle[name] for name in ("birth", "peak", "lifetime")},
            "rate": self.rates,
            "ie": _short(self.effects.largest()),
            "heat": self._heat(),
        }

    def shard(self, rows: list[int]) -> dict[str, Any]:
        """Everything about the features in these rows."""
        words = Words()
        norms = rounded(self.norms[rows], 5)
        presence = {column: rounded(values[rows], 4) for column, values in self.presence.items() if column != "norm"}
        features = [
            {
                "id": int(self.ids[row]),
                "name": self.names[row],
                "top": self.top[row],
                "complexity": self.complexities[row],
                "judged": self.judged[row],
                "kind": self.classes[row],
                "rate": self.rates[row],
                **{name: values[row] for name, values in self.lifecycle.items()},
                "norms": norms[i].tolist(),
                **{column: values[i].tolist() for column, values in presence.items() if values[i].any()},
                "effects": self.effects.of(row),
                "dates": self.dates.get(int(self.ids[row])),
                "examples": self.examples.of(row, words) if self.examples else None,
                "samples": self.samples.of(row, words)["list"] if self.samples else None,
                "rates": None if self.rates_ is None else _histogram(self.rates_, row),
                "seeds": self.seeds.get(int(self.ids[row])),
                "lens": self.lens.of(row, words) if self.lens else None,
                "nearest": self.nearest.of(row, self.called) if self.nearest else None,
                "read": None if self.read is None else optional(rounded(self.read[row], 3)).tolist(),
            }
            for i, row in enumerate(rows)
        ]
        return {"words": words.list(), "features": features}

    def _heat(self) -> str:
        """A character per feature and snapshot: presence relative to the feature's largest."""
        values = self.presence[self.measure]
        shares = values / np.maximum(values.max(1, keepdims=True), 1e-30)
        levels = (shares * (len(_LEVELS) - 1)).round().astype(np.uint8).flatten()
        return np.frombuffer(_LEVELS.encode(), np.uint8)[levels].tobytes().decode()

    def _floats(self, name: str) -> np.ndarray:
        if name not in self.lifecycles:
            return np.full(len(self.lifecycles), np.nan)
        numbers: Frame = pd.to_numeric(self.lifecycles[name], errors="coerce")
        return numbers.to_numpy(dtype=float, na_value=np.nan)

    def _integers(self, name: str) -> list[int | None]:
        return [None if np.isnan(value) else int(value) for value in self._floats(name)]


def _dates(tables: Tables, lifecycles: Frame) -> dict[int, list[Any]]:
    """For every feature with a date on some task: [task, `DATES`] of each such task, as [snapshot, low, high]."""
    found: dict[int, list[Any]] = {}
    known = _dated(lifecycles, "birth")
    for task in tables.tasks("dates"):
        table, concepts = tables[f"dates/{task}"], tables[f"concepts/{task}"]
        rows: dict[int, dict[str, Any]] = {}
        if concepts is not None:  # most features have no effect: only two of the dates are known of them
            read = _dated(concepts[concepts["readable_q"] <= 0.05], "birth")
            rows = {feature: {"context": known.get(feature), "concept": birth} for feature, birth in read.items()}
        if table is not None:
            dates = {name: _dated(table, name) for name in DATES}
            rows |= {feature: {name: dates[name].get(feature) for name in DATES} for feature in table["feature"]}
        for feature, row in rows.items():
            found.setdefault(int(feature), []).append([task, [row.get(name) for name in DATES]])
    return found


def _dated(table: Frame, name: str) -> dict[int, list[int]]:
    """A date of features and the ends of its interval; the date itself where there is none."""
    if name not in table:
        return {}
    at = table[name]
    columns = [at, *(table[f"{name}_{end}"].fillna(at) if f"{name}_{end}" in table else at for end in ("low", "high"))]
    dated = pd.concat(columns, axis=1)[at.notna()].astype(int)
    return dict(zip(table.loc[at.notna(), "feature"].astype(int), dated.to_numpy().tolist(), strict=True))


def _classes(lifecycles: Frame) -> list[str]:
    """Origin, fate and kind of each feature; "dead", or "unknown" where it lives but presence has no reading."""
    n = len(lifecycles)
    parts = [lifecycles[name].astype(object) for name in ("origin", "fate", "kind") if name in lifecycles]
    classes = [", ".join(filter(None, map(_text, row))) for row in zip(*parts, strict=True)] or [""] * n
    alive = lifecycles["alive"].astype(bool).tolist() if "alive" in lifecycles else [True] * n
    read = lifecycles["origin"].notna().tolist() if "origin" in lifecycles else [True] * n
    return [
        one if lives and known else "unknown" if lives else "dead"
        for one, lives, known in zip(classes, alive, read, strict=True)
    ]


def _labelled(labels: Frame | None, ids: np.ndarray, column: str) -> list[Any]:
    """A column of the labels table for each feature, None where missing."""
    if labels is None or not {"feature", column} <= set(labels):
        return [None] * len(ids)
    known = labels.dropna(subset=[column])
    found = dict(zip(known["feature"], known[column], strict=True))
    return [found.get(feature) for feature in ids.tolist()]


def _judged(labels: Frame | None, ids: np.ndarray) -> list[str | None]:
    """How well the label of each feature finds the passages that activate it, in words; None where it is not judged."""
    names = ("detection", "detection_low", "detection_high", "detection_n", "control", "control_feature")
    local = ("local_label", "local_detection", "local_detection_low", "local_detection_high", "local_control")
    values = {name: _labelled(labels, ids, name) for name in (*names, *local)}
    found: list[str | None] = []
    for row in range(len(ids)):
        value = {name: column[row] for name, column in values.items()}
        parts: list[str] = []
        judged = all(
            value[name] is not None for name in ("detection", "detection_low", "detection_high", "detection_n")
        )
        if judged:
            interval = f"[{value['detection_low']:.2f}, {value['detection_high']:.2f}]"
            parts.append(f"{value['detection']:.2f} {interval} on {value['detection_n']:.0f} held-out passages")
            if value["control"] is not None and value["control_feature"] is not None:
                parts.append(f"{value['control']:.2f} with the label of feature {value['control_feature']:.0f}")
        if all(value[name] is not None for name in ("local_detection", "local_detection_low", "local_detection_high")):
            interval = f"[{value['local_detection_low']:.2f}, {value['local_detection_high']:.2f}]"
            parts.append(f"{value['local_detection']:.2f} {interval} by its top tokens alone")
            if value["local_control"] is not None:
                parts.append(f"{value['local_control']:.2f} by those of another feature")
        what = "Label" if judged else "Top tokens as a label"
        if not judged and value["local_label"] is not None:
            what += f" ({value['local_label']})"
        words = f"{what}, judged by balanced accuracy (chance 0.5): {'; '.join(parts)}."
        found.append(words if parts else None)
    return found


def _with_contexts(around: Frame, tables: Tables) -> Frame:
    """Tokens around examples, with those further away if the run has them."""
    far = tables.once("example_contexts")
    if far is None:
        return around
    words = pd.api.types.union_categoricals([part["token"].astype("category") for part in (around, far)])
    both = pd.concat([around.drop(columns="token"), far.drop(columns="token")], ignore_index=True)
    return both.assign(token=words)


def _histogram(counts: Cut, row: int) -> list[Any] | None:
    """The first bin of a feature and the counts from there on."""
    part = counts.parts[row]
    if part.start == part.stop:
        return None
    bins = counts["bin"][part].astype(int)
    found = np.zeros(bins[-1] - bins[0] + 1, dtype=int)
    found[bins - bins[0]] = counts["count"][part]
    return [int(bins[0]), found.tolist()]


def _seeds(consensus: Frame | None, ids: np.ndarray) -> dict[int, dict[str, Any]]:
    """In how many seeds each live feature was found, and [seed, partner, correlation] in the others."""
    if consensus is None or not {"feature", "alive", "n_seeds", "of"} <= set(consensus):
        return {}
    live = consensus[consensus["alive"].astype(bool) & consensus["feature"].isin(ids)]
    others = [str(name).removeprefix("partner/") for name in live if str(name).startswith("partner/")]
    found: dict[int, dict[str, Any]] = {}
    for row in live.to_dict("records"):
        pairs = [
            [seed, None if pd.isna(row[f"partner/{seed}"]) else int(row[f"partner/{seed}"]),
             round(float(row[f"correlation/{seed}"]), 3)]
            for seed in others if not pd.isna(row[f"correlation/{seed}"])
        ]  # fmt: skip
        found[int(row["feature"])] = {"n": int(row["n_seeds"]), "of": int(row["of"]), "partners": pairs}
    return found


def _read(encoder: Frame, ids: np.ndarray, labels: list[str]) -> np.ndarray:
    """Encoder share of each feature and snapshot, (F, S), NaN where unknown."""
    found = encoder.set_index("feature")[[f"share/{label}" for label in labels]]
    return found.reindex(ids).to_numpy(dtype=float)


def _short(values: np.ndarray) -> list[float | None]:
    return optional(rounded(values[:, None], 3))[:, 0].tolist()


def _coded(words: list[str]) -> list[Any] | None:
    """Codes and the words they stand for; None if all words are empty."""
    if not any(words):
        return None
    codes = {word: code for code, word in enumerate(sorted(set(words)))}  # pandas 2 takes "\0" for ""
    return [[codes[word] for word in words], list(codes)]


def _text(value: object) -> str:
    return "" if value is None or value is pd.NA or value != value else str(value)


class Words:
    """Strings of one script, each stored once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def numbers(self, tokens: Tokens, part: slice) -> list[int]:
        """Indices of some tokens."""
        names = (tokens.names[code] for code in tokens.codes[part].tolist())
        return [self._numbers.setdefault(name, len(self._numbers)) for name in names]

    def list(self) -> list[str]:
        """The strings by index."""
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
    """A sorted table in which the rows of each feature are a slice.

    Args:
        table: with a column feature.
        order: columns to sort by, the feature first.
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
    """IE and its standard error, (F, S), for every attributed task."""

    def __init__(self, tables: Tables, ids: np.ndarray, S: int) -> None:
        self._place = pd.Series(np.arange(len(ids)), ids)
        self._shape = (2, len(ids), S)
        self.of_task: dict[str, np.ndarray] = {}
        self._large: list[str] = []
        for task in tables.tasks("attribution"):
            table = tables[f"attribution/{task}"]
            if table is not None and {"feature", "snapshot", "ie", "ie_se"} <= set(table):
                self.of_task[task] = self._wide(table)
                about = tables[f"attribution/{task}.snapshots"]
                if about is None or "n" not in about or about["n"].max() >= MIN_ITEMS:
                    self._large.append(task)

    def _wide(self, table: Frame) -> np.ndarray:
        row, snapshot = table["feature"].map(self._place), table["snapshot"].to_numpy(dtype=int)
        known = row.notna().to_numpy() & (snapshot < self._shape[2])
        at = row[known].to_numpy(dtype=int), snapshot[known]
        both = np.full(self._shape, np.nan, np.float32)
        for values, name in zip(both, ("ie", "ie_se"), strict=True):
            values[at] = table[name].to_numpy(dtype=float)[known]
        return both

    def _sizes(self) -> np.ndarray:
        """Largest |IE| over tasks, (F, S), -1 without any."""
        largest = np.full(self._shape[1:], -1.0)
        for task in self._large or self.of_task:
            effects = self.of_task[task][0]
            largest = np.maximum(largest, np.where(np.isfinite(effects), np.abs(effects), -1))
        return largest

    def largest(self) -> np.ndarray:
        """Largest |IE| of each feature over snapshots and tasks, small ones left out, NaN without any."""
        largest = self._sizes().max(1)
        return np.where(largest < 0, np.nan, largest)

    def peak(self) -> np.ndarray:
        """The snapshot of the largest |IE| of each feature, the last one without any."""
        largest = self._sizes()
        return np.where(largest.max(1) < 0, self._shape[2] - 1, largest.argmax(1))

    def of(self, row: int) -> list[Any]:
        """[number of the task, IE, standard error] of the tasks in which the feature has an effect."""
        return [
            [number, *optional(rounded(both[:, row])).tolist()]
            for number, both in enumerate(self.of_task.values())
            if np.isfinite(both[0, row]).any()
        ]


class Examples:
    """Top activating examples, with their context.

    Args:
        examples: table of that name.
        tokens: table example_tokens.
        ids: features, in order.
        labels: snapshot labels.
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
        """The token at which each feature is most active, or an empty string."""
        found: list[str] = []
        for examples, around in zip(self._examples.parts, self._around.parts, strict=True):
            at = np.zeros(0, dtype=int)
            if examples.start < examples.stop:
                rank, position = (self._columns[name][examples.start] for name in ("rank", "position"))
                at = np.flatnonzero((self._rank[around] == rank) & (self._position[around] == position))
            found.append(self._tokens[around.start + int(at[0])] if len(at) else "")
        return found

    def of(self, row: int, words: Words) -> dict[str, Any]:
        """The gate's threshold, and a list of [sequence, position, first position shown, words, activations, what the
        encoder reads from each snapshot]."""
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
    """Logit lens: tokens that features promote and suppress at each snapshot.

    Args:
        lens: table of that name.
        ids: features, in order.
        S: snapshots.
    """

    def __init__(self, lens: Frame, ids: np.ndarray, S: int) -> None:
        self._lens, self._S = Cut(lens, ["feature", "snapshot", "rank"], ids), S
        self._snapshot = self._lens["snapshot"]
        place = np.repeat(np.arange(len(ids)), [part.stop - part.start for part in self._lens.parts])
        rows = np.concatenate([np.arange(part.start, part.stop) for part in self._lens.parts]) if len(ids) else place
        at = np.stack([place, self._snapshot[rows]])
        first = np.ones(len(rows), bool)
        first[1:] = (at[:, 1:] != at[:, :-1]).any(0)
        self._first = np.full((len(ids), S), -1)
        kept = first & (at[1] < S)
        self._first[at[0, kept], at[1, kept]] = rows[kept]
        self._sides = [
            (Tokens(self._lens.table, name), self._lens[f"{name}_logit"]) for name in ("promoted", "suppressed")
        ]

    def tops(self, snapshots: np.ndarray) -> list[str]:
        """The token that each feature promotes most at the snapshot given for it, or an empty string."""
        rows = self._first[np.arange(len(snapshots)), snapshots].tolist()
        return [self._sides[0][0][row] if row >= 0 else "" for row in rows]

    def of(self, row: int, words: Words) -> list[list[Any]]:
        """By snapshot: promoted words, their logits, suppressed words, their logits."""
        part = self._lens.parts[row]
        cuts = np.searchsorted(self._snapshot[part], np.arange(self._S + 1)).tolist()
        columns: list[list[Any]] = []
        for tokens, logits in self._sides:
            columns += [words.numbers(tokens, part), rounded(logits[part]).tolist()]
        return [[column[a:b] for column in columns] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class Nearest:
    """Nearest features of each feature.

    Args:
        nearest: table of that name.
        ids: features, in order.
        alive: features that are shown as neighbours.
    """

    def __init__(self, nearest: Frame, ids: np.ndarray, alive: set[int]) -> None:
        self._nearest = Cut(nearest[nearest["other"].isin(alive)], ["feature", "rank"], ids)
        self._other, self._cosine = self._nearest["other"], self._nearest["cosine"]

    def of(self, row: int, names: dict[int, str]) -> list[list[Any]]:
        """[feature, cosine, name] of each neighbour."""
        part = self._nearest.parts[row]
        others, cosines = self._other[part].tolist(), rounded(self._cosine[part], 3).tolist()
        return [[other, cosine, names.get(other, "")] for other, cosine in zip(others, cosines, strict=True)]


def rounded(values: np.ndarray, digits: int = 4) -> np.ndarray:
    """Round each row so that its largest number keeps this many significant digits."""
    largest = np.nan_to_num(np.abs(values).astype(float)).max(-1, keepdims=True, initial=1e-30)
    scale = 10.0 ** np.clip(digits - 1 - np.floor(np.log10(largest)), 0, 20)
    return np.rint(values * scale) / scale + 0.0


def optional(values: np.ndarray) -> np.ndarray:
    """Objects, with None instead of non-finite numbers."""
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found
