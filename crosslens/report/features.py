"""Write the data of single features, which the pages Features and Feature load as scripts.

`fetch()` does not work on pages opened from disk, so the data are JSON inside calls of JavaScript functions:
1. `data/features.js` calls `crosslens.index` with a few columns of all features, for the table.
2. `data/features-00012.js` calls `crosslens.load(12, ...)` with everything about features 12 * SHARD to
   13 * SHARD - 1. The page Feature loads only the script of the feature that it shows.

Each part of a feature's data (examples, logit lens, ...) is cut from its tables by a function of the feature's row in
the table of lifecycles and of the words of its script, into which tokens are indices. The JSON is ASCII, so that no
token can end its string. Symbols: F features, S snapshots.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from crosslens.causal.dates import DATES
from crosslens.report.chart import (
    MUTED,
    SERIES,
    Chart,
    Frame,
    Style,
    add_level,
    add_series,
    new_figure,
    over_snapshots,
    shown,
)
from crosslens.report.entries import advise
from crosslens.report.tables import MEASURES, Tables, by_measure, curves, main_measure, missing_column

SHARD = 64
MIN_ITEMS = 20  # effects on fewer prompts do not rank features
_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"  # of presence in the table's strips
Of: TypeAlias = "Callable[[int, Words], Any]"
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
    if tables["lifecycles"] is None or tables["evolution"] is None:
        return FeatureSet([], [], [], advise("evolution"))
    lifecycles = tables.get("lifecycles", "feature", "measure")
    evolution = tables.get("evolution", "feature", "snapshot", "label", "norm")
    if lifecycles is None or evolution is None:
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
        list(features.effects),
        "",
        MEASURES[features.measure],
        features.missing,
        features.called,
        bool(features.promoted),
    )


def presence_figure(snapshots: Frame) -> Chart:
    """Every measure of presence and the threshold, without numbers: the page's script fills them in.

    Args:
        snapshots: snapshot, label, step, tokens.
    """
    figure, axis = over_snapshots(
        snapshots, "share of its largest value", height=320, yaxis_range=[-0.03, 1.05], showlegend=True
    )
    add_level(figure, 0.5, "half of the largest")
    for i, name in enumerate(MEASURES.values()):
        add_series(figure, axis, snapshots.assign(value=0.0), "value", name, Style.of(i))
    return Chart(figure, snapshots)


def read_figure(snapshots: Frame) -> Chart:
    """The encoder share of every snapshot as bars, without numbers: the page's script fills them in."""
    figure, axis = over_snapshots(
        snapshots, "encoder share", even=True, height=240, bargap=0.3, yaxis_tickformat=".0%", yaxis_zerolinecolor=MUTED
    )
    ids = list(axis.labels)
    figure.add_bar(
        x=axis.x(ids), y=[0.0] * len(ids), marker={"color": SERIES[0]}, showlegend=False, customdata=axis.hover(ids),
        hovertemplate="%{customdata}<br>%{y:.1%} of the encoder input<extra></extra>",
    )  # fmt: skip
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
    figure, axis = over_snapshots(snapshots, "IE (logits)", height=320, showlegend=True, yaxis_zerolinecolor=MUTED)
    zeros = snapshots.assign(ie=0.0, ie_low=0.0, ie_high=0.0)
    for task, style in Style.of_tasks(tasks, order).items():
        add_series(figure, axis, zeros, "ie", shown(task), style, value="%{y:+.3f}", band=True)
    return Chart(figure, snapshots)


def ascii_json(value: Any) -> str:
    """JSON in which no string can end its literal or its script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=True).replace("<", "\\u003c")


class _Features:
    """Columns over all features, and the data of single ones."""

    def __init__(self, lifecycles: Frame, evolution: Frame, labels: list[str], tables: Tables) -> None:
        self.measure, self.labels = main_measure(lifecycles), labels
        first = by_measure(lifecycles).sort_values("feature", ignore_index=True)
        self.ids = first["feature"].to_numpy(dtype=np.int64)
        # by measure, zero for features without a reading
        self.presence = {"norm": curves(evolution, self.ids, "norm")}
        for measure in [name for name in MEASURES if name != "norm" and name in set(lifecycles["measure"])]:
            rows = by_measure(lifecycles, measure)
            read = rows.loc[rows["origin"].notna(), "feature"]
            self.presence[measure] = curves(evolution, self.ids, measure) * np.isin(self.ids, read)[:, None]
        self.classes = _classes(first)
        numbers: Frame = first.reindex(columns=[*_LIFECYCLE, "firing_rate"]).apply(pd.to_numeric, errors="coerce")
        numbers = numbers.astype(float)
        self.lifecycle = {name: [None if np.isnan(at) else int(at) for at in numbers[name]] for name in _LIFECYCLE}
        self.rates = _short(numbers["firing_rate"].to_numpy())
        self.effects, self.largest = _effects(tables, self.ids, len(labels))
        self.dates, self.seeds = _dates(tables, first), _seeds(tables["consensus"], self.ids)
        self.missing = {} if self.effects else {"effects": advise("attribution/<task>")}
        if not self.dates:
            self.missing["dates"] = advise("dates/<task>")
        about = _labels(tables["labels"], self.ids)
        # labels of top tokens say no more than these, at greater length
        self.names = ["" if row["status"] == "local" else _text(row["label"]) for row in about]
        self.complexities = [None if row["complexity"] is None else int(row["complexity"]) for row in about]
        self.judged = [_judged(row) for row in about]
        self.top = [""] * len(self.ids)
        self.promoted: list[list[str]] = []
        """By snapshot, the token that each feature promotes most; none without a logit lens."""
        alive: Any = first["alive"].astype(bool) if "alive" in first else slice(None)
        self.alive = set(first.loc[alive, "feature"])
        self.parts = {
            "examples": self._part("examples", tables, self._examples, "examples", "example_tokens"),
            "samples": self._part("samples", tables, self._samples, "samples", "sample_tokens"),
            "rates": self._part("rates", tables, self._histogram, "activations"),
            "lens": self._part("lens", tables, self._lens, "lens"),
            "nearest": self._part("nearest", tables, self._nearest, "nearest"),
            "read": self._part("read", tables, self._read, "encoder"),
        }
        known = zip(self.ids.tolist(), self.names, self.top, strict=True)
        self.called = {feature: name or top for feature, name, top in known}

    def _part(self, name: str, tables: Tables, make: Callable[..., Of], *wanted: str) -> Of:
        """What cuts one part of a feature's data from its tables, or nothing if a table or a column is missing."""
        found = {table: tables.once(table) for table in wanted}
        if missing := [table for table, rows in found.items() if rows is None]:
            self.missing[name] = advise(missing[0])
        else:
            if name == "examples" and (far := tables.once("example_contexts")) is not None:
                found["example_tokens"] = _joined(found["example_tokens"], far)
            try:
                return make(*found.values())
            except KeyError as error:
                self.missing[name] = missing_column(error)
        return lambda _row, _words: None

    def promotes(self) -> Iterator[tuple[str, list[Any] | None]]:
        """The token that each feature promotes most at every snapshot, and at that of its largest effect, by name."""
        for s, tokens in enumerate(self.promoted):
            yield f"{s:05d}", _coded(tokens)
        if self.promoted and self.effects:
            at = np.where(self.largest.max(1) < 0, len(self.labels) - 1, self.largest.argmax(1)).tolist()
            yield "effect", _coded([self.promoted[s][row] for row, s in enumerate(at)])

    def index(self) -> dict[str, Any]:
        """Columns of the table of all features."""
        largest = self.largest.max(1)
        return {
            "snapshots": self.labels,
            "id": self.ids.tolist(),
            "label": self.names if any(self.names) else None,
            "complexity": self.complexities if any(self.complexities) else None,
            "token": _coded(self.top),
            "promoted": _coded(self.promoted[-1]) if self.promoted else None,
            "kind": _coded(self.classes),
            **{name: self.lifecycle[name] for name in ("birth", "peak", "lifetime")},
            "rate": self.rates,
            "ie": _short(np.where(largest < 0, np.nan, largest)),
            "heat": self._heat(),
        }

    def shard(self, rows: list[int]) -> dict[str, Any]:
        """Everything about the features in these rows."""
        words = Words()
        norms, *presence = (rounded(values[rows], 4 + (name == "norm")) for name, values in self.presence.items())
        others = list(self.presence)[1:]
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
                **{name: values[i].tolist() for name, values in zip(others, presence, strict=True) if values[i].any()},
                "effects": [
                    [number, *optional(rounded(both[:, row])).tolist()]
                    for number, both in enumerate(self.effects.values())
                    if np.isfinite(both[0, row]).any()
                ],
                "dates": self.dates.get(int(self.ids[row])),
                "seeds": self.seeds.get(int(self.ids[row])),
                **{name: of(row, words) for name, of in self.parts.items()},
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

    def _examples(self, examples: Frame, around: Frame) -> Of:
        """The gate's threshold, and the examples as in `_texts`."""
        best = examples.sort_values(["feature", "rank"]).drop_duplicates("feature")[["feature", "rank", "position"]]
        top = best.merge(around[["feature", "rank", "position", "token"]]).set_index("feature")["token"].astype(str)
        self.top = top.reindex(self.ids).fillna("").tolist()
        found, texts = self._texts(examples, around, self.labels)

        def of(row: int, words: Words) -> dict[str, Any]:
            threshold = found.rows(row)["threshold"]
            return {"threshold": float(threshold[0]) if len(threshold) else 0.0, "list": texts(row, words)}

        return of

    def _samples(self, samples: Frame, around: Frame) -> Of:
        return self._texts(samples, around, [])[1]

    def _texts(self, examples: Frame, around: Frame, labels: list[str]) -> tuple[Cut, Of]:
        """The rows of each feature, and a list of [sequence, position, first position shown, words, activations, what
        the encoder reads from each snapshot]."""
        reads = {"read": [f"read/{label}" for label in labels]}
        columns = ("rank", "sequence", "position", "threshold")
        found = Cut(examples, self.ids, ["feature", "rank"], *columns, **reads)
        near = Cut(around, self.ids, ["feature", "rank", "position"], "rank", "position", "activation", "token")

        def of(row: int, words: Words) -> list[list[Any]]:
            own, text = found.rows(row), near.rows(row)
            begins, ends = (np.searchsorted(text["rank"], own["rank"], side).tolist() for side in ("left", "right"))
            position, read = text["position"].tolist(), rounded(own["read"], 3).tolist()
            tokens, activation = words.numbers(near.names["token"], text["token"]), rounded(text["activation"]).tolist()
            where = zip(own["sequence"].tolist(), own["position"].tolist(), begins, ends, read, strict=True)
            return [
                [sequence, at, position[a] if a < b else 0, tokens[a:b], activation[a:b], reads]
                for sequence, at, a, b, reads in where
            ]

        return found, of

    def _histogram(self, counts: Frame) -> Of:
        """The first bin of a feature and the counts from there on; None if it is active nowhere."""
        found = Cut(counts, self.ids, ["feature", "bin"], "bin", "count")

        def of(row: int, _: Words) -> list[Any] | None:
            bins, n = (found.rows(row)[name].astype(int) for name in ("bin", "count"))
            return [int(bins[0]), np.bincount(bins - bins[0], n).astype(int).tolist()] if len(bins) else None

        return of

    def _lens(self, lens: Frame) -> Of:
        """By snapshot: promoted words, their logits, suppressed words, their logits."""
        S, sides = len(self.labels), ("promoted", "suppressed")
        columns = ("snapshot", *sides, *(f"{side}_logit" for side in sides))
        found = Cut(lens, self.ids, ["feature", "snapshot", "rank"], *columns)
        first = lens.sort_values("rank", kind="stable").drop_duplicates(["feature", "snapshot"])
        wide = first.assign(promoted=first["promoted"].astype(object)).pivot(
            index="feature", columns="snapshot", values="promoted"
        )
        wide = wide.reindex(index=self.ids, columns=range(S)).astype(object)
        self.promoted = [wide[s].where(wide[s].notna(), "").astype(str).tolist() for s in range(S)]

        def of(row: int, words: Words) -> list[list[Any]]:
            own = found.rows(row)
            cuts = np.searchsorted(own["snapshot"], np.arange(S + 1)).tolist()
            lists: list[list[Any]] = []
            for side in sides:
                lists += [words.numbers(found.names[side], own[side]), rounded(own[f"{side}_logit"]).tolist()]
            return [[values[a:b] for values in lists] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]

        return of

    def _nearest(self, nearest: Frame) -> Of:
        """[feature, cosine, name] of each neighbour that is alive."""
        found = Cut(nearest[nearest["other"].isin(self.alive)], self.ids, ["feature", "rank"], "other", "cosine")

        def of(row: int, _: Words) -> list[list[Any]]:
            others, cosines = found.rows(row)["other"].tolist(), rounded(found.rows(row)["cosine"], 3).tolist()
            return [[other, cosine, self.called.get(other, "")] for other, cosine in zip(others, cosines, strict=True)]

        return of

    def _read(self, encoder: Frame) -> Of:
        """Encoder share of each snapshot, None where unknown."""
        shares = encoder.set_index("feature")[[f"share/{label}" for label in self.labels]]
        found = optional(rounded(shares.reindex(self.ids).to_numpy(dtype=float), 3)).tolist()
        return lambda row, _: found[row]


def _effects(tables: Tables, ids: np.ndarray, S: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """IE and its standard error, (2, F, S), for every attributed task, and the largest |IE|, (F, S), over the tasks
    that are not small, -1 without any."""
    effects: dict[str, np.ndarray] = {}
    large: list[str] = []
    for task in tables.tasks("attribution"):
        table = tables.get(f"attribution/{task}", "feature", "snapshot", "ie", "ie_se")
        if table is not None:
            wide = table.pivot(index="feature", columns="snapshot", values=["ie", "ie_se"]).reindex(ids)
            both = [wide[name].reindex(columns=range(S)).to_numpy(np.float32) for name in ("ie", "ie_se")]
            effects[task] = np.stack(both)
            about = tables.get(f"attribution/{task}.snapshots", "n")
            if about is None or about["n"].max() >= MIN_ITEMS:
                large.append(task)
    largest = np.full((len(ids), S), -1.0)
    for task in large or effects:
        largest = np.fmax(largest, np.abs(effects[task][0]))
    return effects, largest


def _dates(tables: Tables, lifecycles: Frame) -> dict[int, list[Any]]:
    """For every feature with a date on some task: [task, `DATES`] of each; a date is [snapshot, low, high]."""
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


def _labels(labels: Frame | None, ids: np.ndarray) -> list[dict[str, Any]]:
    """The row of each feature in the table of labels, with all columns that are read, None where missing."""
    scores = [f"{name}{end}" for name in ("detection", "local_detection") for end in ("", "_low", "_high")]
    columns = ["feature", "label", "status", "complexity", "control", "control_feature", "detection_n", "local_label",
               "local_control", *scores]  # fmt: skip
    known = pd.DataFrame() if labels is None else labels
    found: Frame = known.reindex(columns=columns).drop_duplicates("feature", keep="last").set_index("feature")
    found = found.reindex(ids).astype(object)
    return found.where(found.notna(), None).to_dict("records")


def _judged(row: dict[str, Any]) -> str | None:
    """How well a label finds the passages that activate its feature, in words; None where it is not judged."""

    def scored(name: str) -> str | None:
        values = [row[f"{name}{end}"] for end in ("", "_low", "_high")]
        return None if None in values else "{:.2f} [{:.2f}, {:.2f}]".format(*values)

    own, local = scored("detection"), scored("local_detection")
    judged = own is not None and row["detection_n"] is not None
    parts: list[str] = []
    if judged:
        parts.append(f"{own} on {row['detection_n']:.0f} held-out passages")
        if row["control"] is not None and row["control_feature"] is not None:
            parts.append(f"{row['control']:.2f} with the label of feature {row['control_feature']:.0f}")
    if local is not None:
        parts.append(f"{local} by its top tokens alone")
        if row["local_control"] is not None:
            parts.append(f"{row['local_control']:.2f} by those of another feature")
    what = "Label" if judged else "Top tokens as a label"
    if not judged and row["local_label"] is not None:
        what += f" ({row['local_label']})"
    return f"{what}, judged by balanced accuracy (chance 0.5): {'; '.join(parts)}." if parts else None


def _joined(around: Frame, far: Frame) -> Frame:
    """Tokens around examples, with those further away."""
    words = pd.api.types.union_categoricals([part["token"].astype("category") for part in (around, far)])
    both = pd.concat([around.drop(columns="token"), far.drop(columns="token")], ignore_index=True)
    return both.assign(token=words)


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

    def numbers(self, names: list[str], codes: np.ndarray) -> list[int]:
        """Indices of some tokens, given as codes of names."""
        return [self._numbers.setdefault(names[code], len(self._numbers)) for code in codes.tolist()]

    def list(self) -> list[str]:
        """The strings by index."""
        return list(self._numbers)


class Cut:
    """Columns of a table by feature.

    Args:
        table: with a column feature.
        ids: features, in order.
        order: columns to sort by, the feature first.
        columns: to keep; tokens become codes.
        blocks: several columns side by side, by name.

    Attributes:
        names: what the codes of a column of tokens stand for, by column.
    """

    def __init__(self, table: Frame, ids: np.ndarray, order: list[str], *columns: str, **blocks: list[str]) -> None:
        table = table.sort_values(order, kind="stable", ignore_index=True)
        ends = [np.searchsorted(table["feature"].to_numpy(), ids, side).tolist() for side in ("left", "right")]
        self._parts = [slice(begin, end) for begin, end in zip(*ends, strict=True)]
        self._columns = {name: table[parts].to_numpy(dtype=np.float32) for name, parts in blocks.items()}
        self.names: dict[str, list[str]] = {}
        for name in columns:
            column = table[name]
            if not pd.api.types.is_numeric_dtype(column):
                column = column.astype("category").cat
                self.names[name] = [str(text) for text in column.categories]
                column = column.codes
            self._columns[name] = column.to_numpy()

    def rows(self, row: int) -> dict[str, np.ndarray]:
        """The columns of the feature in this row of `ids`."""
        return {name: column[self._parts[row]] for name, column in self._columns.items()}


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
