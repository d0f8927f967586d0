"""Linear probes, and top tokens of neighbouring snapshots."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from crosslens.report.chart import (
    AT,
    INK,
    MUTED,
    SERIES,
    Chart,
    Frame,
    SnapshotAxis,
    Style,
    add_level,
    add_points,
    add_series,
    error_bars,
    evenly_spaced,
    floats,
    ints,
    name_rows,
    new_figure,
    new_panels,
    over_snapshots,
    pick,
    shown,
)
from crosslens.report.entries import figure
from crosslens.report.tables import MEASURES

MAX_POINTS = 4000  # of a scatter plot; more make the page slow
_PARTS = {
    "all": "all snapshots",
    "trained": "without step 0",
    "within_features": "within features",
    "within_snapshots": "within snapshots",
    "disattenuated": "corrected for probe noise",
}
_NORM_BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)


@figure(
    "probe-presence",
    section="probes",
    title="Probe error and presence, within features",
    tables=("probe_presence",),
    wide=True,
    optional=True,
)
def probe_presence(table: Frame) -> Chart | str:
    """Rank correlation of probe error with each measure of presence, with 95% intervals over features: within features
    over snapshots (is a feature easier to decode where the measure is higher?), and between features at one snapshot,
    which says nothing about training.

    Args:
        table: from `probe_presence`.
    """
    known = table.dropna(subset=["spearman"]).reset_index(drop=True)
    if known.empty:
        return "No feature that was probed has a reading of presence."
    known = known.iloc[np.argsort(known["part"] == "between_features", kind="stable")].reset_index(drop=True)
    names = [f"{MEASURES[row.measure]}, {row.part.replace('_', ' ')}" for row in known.itertuples()]
    figure = new_figure("", height=140 + 36 * len(names))
    colors = [SERIES[0] if part == "within_features" else MUTED for part in known["part"]]
    texts = [
        f"{n:,} points of {features:,} features" for n, features in zip(known["n"], known["n_features"], strict=True)
    ]
    _add_correlations(
        figure, known, "spearman", names, texts, marker_color=colors, error_x_color=MUTED, showlegend=False
    )
    _set_axes(figure, names, "Spearman correlation")
    within = known[known["part"] == "within_features"].to_dict("records")
    words = [
        f"{MEASURES[str(row['measure'])]} "
        + f"{row['spearman']:.2f} ({row['spearman_low']:.2f} to {row['spearman_high']:.2f})".replace("-", "−")
        for row in within
    ]
    note = f"Within features: {', '.join(words)}. Correlations between features have nothing to do with training."
    return Chart(figure, table, note)


@figure(
    "probe",
    section="probes",
    title="Probe error by feature and snapshot",
    tables=("probe", "evolution", "names"),
    wide=True,
)
def probe(table: Frame, evolution: Frame, names: Frame | None = None) -> Chart | str:
    """Share of held-out tokens on which a linear probe of one snapshot's activations misclassifies whether the feature
    is active, against the feature's R² there, and its decoder norm divided by its largest."""
    points = table.dropna(subset=["norm", "probe_error"])
    if len(points) < 3:
        return f"Only {len(points)} probes could be fitted, too few to draw."
    points = points.merge(evolution[["feature", "snapshot", "r2"]], on=["feature", "snapshot"], how="left")
    drawn = evenly_spaced(points, MAX_POINTS)
    axis = SnapshotAxis.of(table, even=True)
    panels = [("norm", "decoder norm / largest norm", "norm")]
    if points["r2"].notna().any():
        panels.insert(0, ("r2", "R²", "R²"))
    figure = new_panels(len(panels), height=480)
    for col, (column, title, name) in enumerate(panels, 1):
        at: dict[str, Any] = {"row": 1, "col": col}
        known: Frame = drawn.dropna(subset=[column])
        add_points(figure, axis, known, column, "probe_error", f"{name} %{{x:.3f}}, error %{{y:.3f}}", names, **at)
        figure.add_hline(
            y=0.5, line={"color": MUTED, "dash": "dot"}, annotation={"text": "chance", "font_color": MUTED}, **at
        )
        figure.update_xaxes(title_text=title, showgrid=True, zeroline=False, **at)
    figure.update_yaxes(range=[0, 1.05 * max(0.5, float(points["probe_error"].max()))])
    figure.update_layout(yaxis_title_text="probe error (share of tokens)")
    note = f"All points, by decoder norm: {_correlation(points, [])}."
    untrained = sorted(set(ints(points.loc[pd.to_numeric(points["step"], errors="coerce") == 0, "snapshot"])))
    if untrained and len(axis.labels) > 1:
        note += f" Without step 0: {_correlation(points, untrained)}."
    if len(drawn) < len(points):
        note += f" {len(drawn):,} of {len(points):,} points are drawn, evenly spaced in the table."
    return Chart(figure, pick(drawn, "feature", *AT, "r2", "norm", "probe_error", "n"), note)


def _add_correlations(
    figure: go.Figure, rows: Frame, column: str, names: list[str], texts: list[str], above: float = 0, **trace: Any
) -> None:
    """Add a point per correlation with its interval; `texts` are added to the tooltips."""
    ends = zip(names, rows[f"{column}_low"], rows[f"{column}_high"], texts, strict=True)
    figure.add_scatter(
        x=floats(rows[column]),
        y=[row - above for row in range(len(names))],
        mode="markers",
        name=column.capitalize(),
        marker_size=9,
        error_x=error_bars(rows, column, thickness=1.5),
        customdata=[[name, f"{low:.2f} to {high:.2f}, {text}"] for name, low, high, text in ends],
        hovertemplate=("<b>%{fullData.name}</b>, %{customdata[0]}<br>%{x:.3f}<br>%{customdata[1]}<extra></extra>"),
        **trace,
    )


def _set_axes(figure: go.Figure, names: list[str], title: str) -> None:
    """Axes of a figure with a row per correlation."""
    name_rows(figure, names)
    figure.update_xaxes(title_text=title, range=[-1.03, 0.53], showgrid=True)
    figure.add_vline(x=0, line={"color": INK, "width": 1})


def _correlation(points: Frame, without: list[int]) -> str:
    """Rank correlation of norm and error with its interval, in words."""
    # imports SAELens, which takes seconds that most reports do not need
    from crosslens.evolution.probes import probe_correlation

    kept = points[~points["snapshot"].isin(without)]
    if kept["feature"].nunique() < 2:
        return "too few features for a correlation"
    found = probe_correlation(points, without=without)
    text = f"Spearman {found['spearman']:.2f}, 95% interval {found['spearman_low']:.2f} to {found['spearman_high']:.2f}"
    return f"{text}, {found['n']:,} points of {found['n_features']:,} features".replace("-", "−")


@figure(
    "probe-parts",
    section="probes",
    title="Correlation of probe error and decoder norm by part",
    tables=("probe_parts",),
    optional=True,
)
def probe_parts(table: Frame) -> Chart:
    """With 95% intervals over features: over all points, without step 0 if it is a snapshot, after subtracting each
    feature's means, after subtracting each snapshot's means, and corrected for the noise of single probes."""
    n = table.set_index("part")["n"]
    untrained = n.get("trained") != n.get("all")  # whether step 0 is a snapshot
    table = table if untrained else table[table["part"] != "trained"].reset_index(drop=True)
    names = [_PARTS.get(str(part), shown(part)) for part in table["part"]]
    figure = new_figure("", height=140 + 40 * len(names))
    texts = [f"{n:,} points" for n in ints(table["n"])]
    for i, measure in enumerate(("spearman", "pearson")):
        style = Style.of(i)
        look = {"marker_color": style.color, "marker_symbol": style.symbol, "error_x_color": style.color}
        _add_correlations(figure, table, measure, names, texts, above=-0.12 if i else 0.12, **look)
    _set_axes(figure, names, "correlation")
    last = table.iloc[-1]
    note = (
        f"{'Without step 0, the' if untrained else 'The'} standard deviation of probe errors is "
        f"{last['sd_error']:.3f} and that of relative norms {last['sd_norm']:.2f}; the reliability of the errors is "
        f"{last['reliability']:.2f}. If a feature can be decoded from every snapshot, there is little variation for "
        "its norm to explain."
    )
    return Chart(figure, table, note)


@figure(
    "agreement",
    section="probes",
    title="Agreement of neighbouring snapshots",
    tables=("agreement",),
    optional=True,
    columns={
        "mean": "Mean share of tokens that both snapshots have among the strongest.",
        "size": "Features in the band.",
        "norm_from": "Lower edge of the band of norms, relative to the feature's largest.",
        "norm_to": "Upper edge of the band.",
    },
)
def agreement(table: Frame) -> Chart | str:
    """Share of a feature's 20 strongest held-out tokens that two neighbouring snapshots have in common, when the
    feature is computed from each snapshot alone."""
    known = table.dropna(subset=["agreement"])
    if known.empty:
        return "No feature has a decoder vector long enough to compare at two neighbouring snapshots."
    pairs = known.rename(columns={"snapshot": "before"}).assign(
        snapshot=known["other"], label=known["other_label"], step=known["other_step"]
    )
    figure, axis = over_snapshots(pairs, "shared tokens (share)", yaxis_range=[-0.03, 1.05])
    chance = float(known["chance"].iloc[0])
    add_level(figure, chance, "chance")
    drawn: list[Frame] = []
    for i, (low, high) in enumerate(zip(_NORM_BANDS, _NORM_BANDS[1:], strict=False)):
        band = pairs[(pairs["norm"] > low) & (pairs["norm"] <= high)]
        if band.empty:
            continue
        means = band.groupby("snapshot")["agreement"].agg(["mean", "size"]).reset_index()
        ids = ints(means["snapshot"])
        texts = [f"{text}, {n:,} features" for text, n in zip(axis.hover(ids), ints(means["size"]), strict=True)]
        add_series(figure, axis, means, "mean", f"norm {low:g} to {high:g}", Style.of(i), hover=texts)
        drawn.append(means.assign(norm_from=low, norm_to=high))
    note = (
        "Each point compares a snapshot with the one before it. Norms are the smaller of the two, relative to the "
        f"feature's largest. Chance is {chance:.4f}."
    )
    return Chart(figure, pd.concat(drawn, ignore_index=True), note)
