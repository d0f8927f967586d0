"""Drawing primitives shared by all figures: colours, the snapshot axis, lines with bands, points, escaped text.

Figures use the colours of the light page. `THEME` maps each one to its dark counterpart, and the page's script swaps
them, so every figure is stored once. Each colour has a contrast of at least 3:1 with its background.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup, escape

if TYPE_CHECKING:
    Frame: TypeAlias = Any  # pandas types an element of a frame as a union of everything it could hold
else:
    Frame = pd.DataFrame

INK = "#2b3036"
MUTED = "#6b747e"
GRID = "#e3e6e9"
SURFACE = "#ffffff"
# light, dark; at least 15 CIELAB units apart under full protanopia, deuteranopia or tritanopia; symbols differ too
_SERIES = (
    ("#1a6ac8", "#6db3ff"),
    ("#b8380a", "#e0702c"),
    ("#0c5a44", "#64f2b0"),
    ("#d267aa", "#d94fa6"),
    ("#a39014", "#f0dc5a"),
    ("#35147c", "#8265f0"),
)
SERIES = tuple(light for light, _ in _SERIES)
# low to high; both start near the page background, so absent features recede
HEAT = ("#eef1f4", "#b9d3e6", "#6ea8d2", "#2372ad", "#073763")
_HEAT_DARK = ("#20262d", "#23486a", "#2f74ab", "#69b1e3", "#dff1ff")
SIGNED = (SERIES[1], HEAT[0], SERIES[0])  # below zero, zero, above
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
_DASHES = ("solid", "dash", "dot")
_BAND = 0.16
AT = ("snapshot", "label", "step")
FEATURES = "features"  # the meta of traces in which a click on a point opens the feature first in its customdata
_LABEL_WIDTH = 14  # characters that fit below an axis, or at a corner of a ternary plot on a phone


def _rgba(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


_DARK_MUTED = "#9aa4ae"
THEME = {
    INK: "#e4e8ec",
    MUTED: _DARK_MUTED,
    GRID: "#2c333b",
    SURFACE: "#242a31",
    **dict(_SERIES),
    **dict(zip(HEAT, _HEAT_DARK, strict=True)),
    **{_rgba(light, _BAND): _rgba(dark, _BAND) for light, dark in ((MUTED, _DARK_MUTED), *_SERIES)},
}


@dataclass(frozen=True)
class Chart:
    """A figure with its data and caption.

    Attributes:
        figure: without a title; fills the available width.
        data: every number drawn, at full precision.
        note: caption below the figure: counts, what was left out.
        small: the values are as they should be, so the figure may be small.
    """

    figure: go.Figure
    data: Frame
    note: str = ""
    small: bool = False


@dataclass(frozen=True)
class Cell:
    """A table cell; `weight` in [-1, 1] tints it, orange below zero and blue above. It links to a page, if given;
    `muted` cells are grey."""

    text: str
    weight: float = 0.0
    link: str | None = None
    muted: bool = False


@dataclass(frozen=True)
class Grid:
    """A table; the first cell of each row is its header. `columns` are the columns of `data` that the header names,
    whose meanings become its tooltips; empty where there is none."""

    header: list[str]
    rows: list[list[Cell]]
    data: Frame
    note: str = ""
    columns: tuple[str, ...] = ()

    @property
    def tinted(self) -> bool:
        """Whether the cells are numbers tinted by size, rather than words."""
        return any(cell.weight for row in self.rows for cell in row)


@dataclass(frozen=True)
class Prompts:
    """Prompts whose words are tinted by their effects, at a snapshot that the reader selects.

    Attributes:
        contents: what the page's script shows.
        data: every number.
        note: caption.
    """

    contents: dict[str, Any]
    data: Frame
    note: str = ""


@dataclass(frozen=True)
class Style:
    """Colour, marker and dash of one series."""

    color: str
    symbol: str = "circle"
    dash: str = "solid"
    markers: bool = True

    @classmethod
    def of(cls, index: int) -> Style:
        """The style of series `index`; the first 18 are distinct."""
        return cls(SERIES[index % 6], _SYMBOLS[index % 6], _DASHES[index // 6 % 3])

    @classmethod
    def of_tasks(cls, names: Sequence[str], tasks: Frame | None) -> dict[str, Style]:
        """The style of each task, the same in every figure that knows the run's table `tasks`."""
        known = [] if tasks is None else tasks["task"].tolist()
        order = list(dict.fromkeys([*known, *names]))
        return {name: cls.of(order.index(name)) for name in names}


def task_pages(tasks: Frame | None) -> dict[str, str]:
    """File of the page of each task, from the run's table `tasks`."""
    return {} if tasks is None else dict(zip(tasks["task"], tasks["page"], strict=True))


def task_link(task: str, tasks: Frame | None) -> Markup:
    """The name of a task as a link to its page."""
    page = task_pages(tasks).get(task)
    return escape(task) if page is None else Markup('<a href="{}">{}</a>').format(page, task)


@dataclass(frozen=True)
class SnapshotAxis:
    """Snapshots along x, at log10(step) with step 0 set apart on the left, or evenly spaced if steps are unknown.

    Attributes:
        labels: by snapshot.
        steps: by snapshot; empty when unknown or repeated.
        tokens: by snapshot; empty when unknown.
        even: evenly spaced even if the steps are known.
    """

    labels: dict[int, str]
    steps: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    even: bool = False

    @classmethod
    def of(cls, table: Frame, *, even: bool = False) -> SnapshotAxis:
        """The axis of a table.

        Args:
            table: columns snapshot, label, and optionally step and tokens; any number of rows per snapshot.
            even: space the snapshots evenly, whatever their steps.
        """
        rows = table.drop_duplicates("snapshot").sort_values("snapshot")
        ids = [int(s) for s in rows["snapshot"]]
        labels = dict(zip(ids, (str(label) for label in rows["label"]), strict=True))
        steps = _known(ids, rows, "step")
        if len(set(steps.values())) < len(ids):
            steps = {}
        return cls(labels, steps, _known(ids, rows, "tokens"), even or not steps)

    @property
    def positions(self) -> dict[int, float]:
        """Position on the axis by snapshot."""
        if self.even:
            return {snapshot: float(i) for i, snapshot in enumerate(self.labels)}
        logs = [math.log10(step) for step in self.steps.values() if step > 0]
        low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
        zero = low - max(0.15, 0.1 * (high - low))
        return {s: round(math.log10(step) if step > 0 else zero, 6) for s, step in self.steps.items()}

    def x(self, snapshots: Iterable[Any]) -> list[float]:
        """Positions of these snapshots."""
        positions = self.positions
        return [positions[int(s)] for s in snapshots]

    def count(self, snapshots: Any) -> pd.Series:
        """How often each snapshot of the axis is among these."""
        return pd.Series(snapshots).astype(int).value_counts().reindex(list(self.labels), fill_value=0)

    def hover(self, snapshots: Iterable[Any]) -> list[str]:
        """Tooltips of these snapshots: label, step and tokens, escaped."""
        return [self._hover(int(s)) for s in snapshots]

    def _hover(self, snapshot: int) -> str:
        parts = [shown(self.labels[snapshot], 40)]
        if snapshot in self.steps:
            parts.append(f"step {self.steps[snapshot]:,}")
        if snapshot in self.tokens:
            parts.append(f"{short_count(self.tokens[snapshot])} tokens")
        return ", ".join(parts)

    def names(self) -> dict[int, str]:
        """Escaped tick labels by snapshot: the labels, or the steps if a label is too long."""
        if self.steps and max(map(len, self.labels.values())) > _LABEL_WIDTH:
            return {snapshot: f"step {short_count(step)}" for snapshot, step in self.steps.items()}
        return {snapshot: shown(label, _LABEL_WIDTH) for snapshot, label in self.labels.items()}

    def apply(self, figure: go.Figure) -> None:
        """Make this the x axis of a figure.

        `layout.meta` gives the page's script the true steps and tokens, and allows it to drop ticks.
        """
        positions = list(self.positions.values())
        if self.even:
            ticks, title, meta = list(self.names().values()), "snapshot", {"axis": "labels"}
        else:
            # in full, as in labels such as step1300
            ticks = [str(step) if step < 1e6 else short_count(step) for step in self.steps.values()]
            apart = 0 in self.steps.values() and len(self.steps) > 1
            title = "training steps (log scale, 0 set apart)" if apart else "training steps (log scale)"
            meta = {"axis": "steps", "positions": positions, "steps": list(self.steps.values())}
            if len(set(self.tokens.values())) == len(positions):
                meta["tokens"] = list(self.tokens.values())
        figure.update_layout(meta=meta)
        figure.update_xaxes(title_text=title, tickmode="array", tickvals=positions, ticktext=ticks, zeroline=False)


def _known(ids: list[int], rows: Frame, column: str) -> dict[int, int]:
    """A column by snapshot; empty if any value is missing."""
    if column not in rows:
        return {}
    values: Any = pd.to_numeric(rows[column], errors="coerce")
    return {} if values.isna().any() else dict(zip(ids, (int(v) for v in values), strict=True))


def shown(text: object, width: int = 32) -> str:
    """Escape text for plotly, and shorten it in the middle if it is long.

    Plotly interprets a subset of HTML in every text, and `%{...}` in hover templates.
    """
    return html.escape(shortened(text, width), quote=False).replace("{", "&#123;")


def shortened(text: object, width: int = 32) -> str:
    """Text on one line, shortened in the middle if it is long."""
    plain = " ".join(str(text).split())
    if len(plain) > width:
        keep = (width - 1) // 2
        plain = f"{plain[:keep]}…{plain[-keep:]}"
    return plain


def feature_names(names: Frame | None, width: int = 14) -> Callable[[int], str]:
    """A function that writes a feature's number, with its label or top token beside it; not escaped.

    Args:
        names: feature, name; the number stands alone for features that are not in it.
        width: characters of the name at most.
    """
    known: dict[int, str] = {} if names is None else dict(zip(names["feature"], names["name"], strict=True))

    def called(feature: int) -> str:
        # characters that cannot be seen, or change the direction of what follows, are left out
        visible = "".join(c if c.isprintable() else " " for c in known.get(feature, ""))
        return f"{feature} {shortened(visible, width)}".rstrip()

    return called


def short_count(value: float) -> str:
    """Format as 1, 512, 1k, 143k, 4.2M, with at most four significant digits."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{suffix}"
    return f"{value:.4g}"


def new_figure(y_title: str, *, height: int = 380, **layout: object) -> go.Figure:
    """An empty figure in the report's style: no background, light grid, legend below the axes.

    Args:
        y_title: title of the y axis, with its unit.
        height: pixels, without the legend; the page's script adds the legend's height.
        layout: further plotly layout options.
    """
    axis = {"gridcolor": GRID, "linecolor": GRID, "zerolinecolor": GRID, "automargin": True, "title_standoff": 10}
    title = {"title_font_size": 13, "tickfont_size": 12}
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
            "margin": {"l": 56, "r": 16, "t": 28, "b": 48},
            "height": height,
            "hovermode": "closest",
            "hoverlabel": {
                "bgcolor": SURFACE,
                "bordercolor": MUTED,
                "font": {"color": INK, "size": 13},
                "align": "left",
            },
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 0,
                "yref": "container",
                "yanchor": "bottom",
                "traceorder": "normal",
                "title_font_size": 13,
            },
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": MUTED, "activecolor": INK},
            "xaxis": {**axis, **title, "showgrid": False, "ticks": "outside", "tickcolor": GRID},
            "yaxis": {**axis, **title, "title_text": y_title},
            **layout,
        }
    )


def over_snapshots(table: Frame, y_title: str, *, even: bool = False, **layout: Any) -> tuple[go.Figure, SnapshotAxis]:
    """An empty figure over the snapshots of a table, and its axis; see `SnapshotAxis.of` and `new_figure`."""
    figure, axis = new_figure(y_title, **layout), SnapshotAxis.of(table, even=even)
    axis.apply(figure)
    return figure, axis


def new_panels(n: int, *, height: int) -> go.Figure:
    """A figure of n panels side by side, columns 1 to n of row 1, whose axes look alike."""
    figure = new_figure("", height=height)
    x, y = (figure.layout[axis].to_plotly_json() for axis in ("xaxis", "yaxis"))
    figure.set_subplots(rows=1, cols=n, horizontal_spacing=0.0526)
    figure.update_layout(grid={"rows": 1, "columns": n, "pattern": "independent"})  # how narrow screens stack them
    return figure.update_xaxes(x).update_yaxes(y)


def _outline(
    x: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> list[tuple[float | None, float | None]]:
    """Corners of a band, one closed polygon per run of finite bounds."""
    corners: list[tuple[float | None, float | None]] = []
    run: list[tuple[float, float, float]] = []
    for point in (*zip(x, low, high, strict=True), (0.0, math.nan, math.nan)):
        if math.isfinite(point[1]) and math.isfinite(point[2]):
            run.append(point)
        elif run:
            corners += [(None, None)] if corners else []
            corners += [(a, c) for a, _, c in run] + [(a, b) for a, b, _ in reversed(run)]
            run = []
    return corners


def add_line(
    figure: go.Figure,
    x: Any,
    rows: Frame,
    column: str,
    name: str,
    style: Style,
    *,
    hover: Sequence[str],
    value: str = "%{y:.3f}",
    band: bool = False,
    **trace: Any,
) -> None:
    """Add a line, over a band if there is one.

    Args:
        figure: to draw on.
        x: position of each row, a number or a name.
        rows: a row per point.
        column: of the values.
        name: name of the series, escaped.
        style: colour, marker and dash.
        hover: tooltip of each point, escaped.
        value: plotly template of the value in the tooltip.
        band: draw the band between the columns `<column>_low` and `<column>_high`, where they hold numbers.
        trace: further options of the trace, such as its panel; its meta says what a click on a point opens:
            {"feature": its number} or {"page": its file}.
    """
    outline = _outline(x, *(floats(rows[f"{column}_{end}"]) for end in ("low", "high"))) if band else []
    if outline:
        figure.add_scatter(
            x=[a for a, _ in outline],
            y=[b for _, b in outline],
            fill="toself",
            fillcolor=_rgba(style.color, _BAND),
            mode="none",
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
            name=name,
            meta="band",
        )
    looks = {
        "mode": "lines+markers" if style.markers else "lines",
        "line": {"color": style.color, "dash": style.dash, "width": 2},
        "marker": {"color": style.color, "symbol": style.symbol, "size": 7},
        "hovertemplate": f"<b>%{{fullData.name}}</b><br>%{{customdata}}<br>{value}<extra></extra>",
    }
    about = {"name": name, "legendgroup": name, "customdata": list(hover)}
    figure.add_scatter(x=list(x), y=floats(rows[column]), **about, **{**looks, **trace})


def add_series(
    figure: go.Figure,
    axis: SnapshotAxis,
    rows: Frame,
    column: str,
    name: str,
    style: Style,
    **line: Any,
) -> None:
    """Add a line over the snapshots of a table, with them as tooltips if no others are given.

    Args:
        figure: to draw on.
        axis: of the snapshots.
        rows: a row per snapshot.
        column: of the values.
        name: name of the series, escaped.
        style: colour, marker and dash.
        line: further arguments of `add_line`.
    """
    about: dict[str, Any] = {"hover": axis.hover(rows["snapshot"]), **line}
    add_line(figure, axis.x(rows["snapshot"]), rows, column, name, style, **about)


def error_bars(rows: Frame, column: str, **look: object) -> dict[str, Any]:
    """Error bars of a trace from its values, a column of a table, to `<column>_low` and `<column>_high`."""
    value, low, high = (np.array(floats(rows[f"{column}{end}"])) for end in ("", "_low", "_high"))
    ends = {"array": (high - value).tolist(), "arrayminus": (value - low).tolist()}
    return {"type": "data", "symmetric": False, "thickness": 1, **ends, **look}


def named_ticks(names: Sequence[str], *, slanted: bool = False) -> dict[str, Any]:
    """Settings of an axis with a name at 0, 1, ..."""
    ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": list(names)}
    return {**ticks, **({"tickangle": -45} if slanted else {})}


def name_rows(figure: go.Figure, names: Sequence[str], **look: Any) -> None:
    """Name the rows 0, 1, ... along y, from the top."""
    settings: Any = {"autorange": "reversed", "showgrid": False, "zeroline": False, **named_ticks(names), **look}
    figure.update_yaxes(settings)


def add_level(figure: go.Figure, y: float, name: str, dash: str = "dot") -> None:
    """Add a thin horizontal reference line, with its name in the legend."""
    figure.add_hline(y=y, line={"color": MUTED, "dash": dash, "width": 1.5}, name=name, showlegend=True)


def add_diagonal(figure: go.Figure, ends: Sequence[float], name: str) -> None:
    """Add the line on which x and y are equal."""
    figure.add_scatter(x=ends, y=ends, mode="lines", name=name, line={"color": MUTED, "dash": "dot"})


def add_bars(figure: go.Figure, axis: SnapshotAxis, counts: Frame, unit: str) -> None:
    """Add bars over the snapshots: `counts` has a row per snapshot of the axis and a column per series."""
    ids = list(axis.labels)
    for i, name in enumerate(counts):
        figure.add_bar(
            x=axis.x(ids),
            y=ints(counts[name]),
            name=str(name),
            marker={"color": SERIES[i]},
            customdata=axis.hover(ids),
            hovertemplate=f"<b>%{{fullData.name}}</b><br>%{{customdata}}<br>%{{y}} {unit}<extra></extra>",
        )


def add_points(
    figure: go.Figure,
    axis: SnapshotAxis,
    table: Frame,
    x: str,
    y: str,
    value: str,
    names: Frame | None = None,
    **trace: Any,
) -> None:
    """Add a point per row of a table with columns feature and snapshot, coloured by snapshot.

    Args:
        figure: to draw on.
        axis: axis of the snapshots.
        table: a row per point.
        x: column along x.
        y: column along y.
        value: plotly template of the values in the tooltip.
        names: feature, name.
        trace: further options of the trace, such as its panel.
    """
    called = feature_names(names)
    order = {snapshot: i for i, snapshot in enumerate(axis.labels)}
    snapshots, ends = ints(table["snapshot"]), list(axis.names().values())
    features = ints(table["feature"])
    figure.add_scatter(
        x=floats(table[x]),
        y=floats(table[y]),
        mode="markers",
        showlegend=False,
        marker={"size": 6, "opacity": 0.75, "color": [order[s] for s in snapshots], "coloraxis": "coloraxis"},
        customdata=[
            [feature, shown(called(feature)), text]
            for feature, text in zip(features, axis.hover(snapshots), strict=True)
        ],
        hovertemplate=f"feature %{{customdata[1]}}<br>%{{customdata[2]}}<br>{value}<extra></extra>",
        meta=FEATURES,
        **trace,
    )
    # no light shades: a point needs more contrast than an area
    apply_colors(figure, HEAT[2:], {0: ends[0], max(1, len(ends) - 1): ends[-1]})


def add_matrix(
    figure: go.Figure,
    table: Frame,
    value: str,
    rows: tuple[str, Mapping[Any, str]],
    columns: tuple[str, Mapping[Any, float]],
    **trace: Any,
) -> None:
    """Add a heat map on the figure's colour axis, blank where a value is missing, with its rows named from the top.

    Args:
        figure: to draw on.
        table: a row per cell, with its tooltip in the column text, escaped.
        value: column of the values.
        rows: column that says which row of the map it is, and the names of the rows, in order.
        columns: column that says where along x it is, and the positions.
        trace: further options of the trace.
    """
    index, names = rows
    across, places = columns
    cells = (
        table.pivot(index=index, columns=across, values=name).reindex(index=list(names), columns=list(places))
        for name in (value, "text")
    )
    values, texts = (wide.to_numpy() for wide in cells)
    looks: dict[str, Any] = {"coloraxis": "coloraxis", "xgap": 1, "ygap": 1}
    figure.add_heatmap(
        z=[floats(line) for line in values],
        x=list(places.values()),
        y=list(range(len(names))),
        text=texts.tolist(),
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=False,
        **{**looks, **trace},
    )
    name_rows(figure, list(names.values()))


def apply_colors(figure: go.Figure, colors: Sequence[str], ticks: dict[float, str]) -> None:
    """Add a colour axis that runs from the first to the last tick, with its bar at the top left."""
    figure.update_layout(margin_t=60)
    figure.layout["coloraxis"] = color_axis(colors, ticks, len=0.5, x=0, xpad=20, y=0.99)


def color_axis(colors: Sequence[str], ticks: dict[float, str], **place: float) -> dict[str, Any]:
    """A colour axis that runs from the first to the last tick, with its bar at a place above the figure."""
    return {
        "cmin": min(ticks),
        "cmax": max(ticks),
        "colorscale": [[i / (len(colors) - 1), color] for i, color in enumerate(colors)],
        "colorbar": {
            "orientation": "h",
            "thickness": 10,
            "xanchor": "left",
            # relative to the paper, plotly would put the x title over the tick labels
            "yref": "container",
            "yanchor": "top",
            "outlinewidth": 0,
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
            "ticklabelposition": "outside top",
            "ticklabeloverflow": "allow",
            **place,
        },
    }


def evenly_spaced(table: Frame, most: int) -> Frame:
    """At most `most` rows of a table, evenly spaced and including the first and the last."""
    return table.iloc[np.unique(np.linspace(0, len(table) - 1, min(most, len(table))).round().astype(int))]


def floats(values: pd.Series | np.ndarray) -> list[float]:
    """Plain floats, NaN where missing."""
    numbers: Any = pd.to_numeric(pd.Series(values), errors="coerce")
    return numbers.to_numpy(dtype=float, na_value=math.nan).tolist()


def ints(values: pd.Series | np.ndarray) -> list[int]:
    """Plain integers."""
    return [int(v) for v in values]


def pick(table: Frame, *columns: str) -> Frame:
    """Those of the columns that a table has, with rows numbered anew."""
    return table[[column for column in columns if column in table]].reset_index(drop=True)
