"""Linear probes, and top tokens of neighbouring snapshots."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from crosslens.report.chart import (
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
    page="evolution",
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
    names = [
        f"{MEASURES[str(row['measure'])]}, {str(row['part']).replace('_', ' ')}" for row in known.to_dict("records")
    ]
    order = np.argsort(known["part"] == "between_features", kind="stable")
    known, names = known.iloc[order].reset_index(drop=True), [names[i] for i in order]
    figure = new_figure("", height=140 + 36 * len(names))
    values, low, high = (floats(known[f"spearman{end}"]) for end in ("", "_low", "_high"))
    figure.add_scatter(
        x=values,
        y=list(range(len(names))),
        mode="markers",
        showlegend=False,
        marker={"color": [SERIES[0] if part == "within_features" else MUTED for part in known["part"]], "size": 9},
        error_x=error_bars(values, low, high, color=MUTED, thickness=1.5),
        customdata=[
            [name, f"{a:.2f} to {b:.2f}, {n:,} points of {features:,} features"]
            for name, a, b, n, features in zip(
                names, low, high, ints(known["n"]), ints(known["n_features"]), strict=True
            )
        ],
        hovertemplate="<b>%{customdata[0]}</b><br>%{x:.3f}<br>%{customdata[1]}<extra></extra>",
    )
    _correlations(figure, names, "Spearman correlation")
    within = known[known["part"] == "within_features"].to_dict("records")
    words = [
        f"{MEASURES[str(row['measure'])]} "
        + f"{row['spearman']:.2f} ({row['spearman_low']:.2f} to {row['spearman_high']:.2f})".replace("-", "−")
        for row in within
    ]
    note = f"Within features: {', '.join(words)}. Correlations between features have nothing to do with training."
    return Chart(figure, table.reset_index(drop=True), note)


@figure(
    "probe",
    page="evolution",
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
    figure = new_panels("probe error (share of tokens)", len(panels), height=480)
    top = 1.05 * max(0.5, float(points["probe_error"].max()))
    for place, (column, title, name) in enumerate(panels):
        end = str(place + 1) if place else ""
        known: Frame = drawn.dropna(subset=[column])
        add_points(figure, axis, known, column, "probe_error", f"{name} %{{x:.3f}}, error %{{y:.3f}}", names)
        figure.data[-1].update(xaxis=f"x{end}", yaxis=f"y{end}")
        figure.add_shape(
            type="line", xref=f"x{end} domain", yref=f"y{end}", x0=0, x1=1, y0=0.5, y1=0.5,
            line={"color": MUTED, "dash": "dot"},
        )  # fmt: skip
        figure.add_annotation(
            text="chance", xref=f"x{end} domain", yref=f"y{end}", x=1, y=0.5, xanchor="right", yanchor="bottom",
            showarrow=False, font={"color": MUTED},
        )  # fmt: skip
        figure.update_layout(
            {
                f"xaxis{end}": {"title": {"text": title}, "showgrid": True, "zeroline": False},
                f"yaxis{end}": {"range": [0, top]},
            }
        )
    note = f"All points, by decoder norm: {_correlation(points, [])}."
    untrained = sorted(set(ints(points.loc[pd.to_numeric(points["step"], errors="coerce") == 0, "snapshot"])))
    if untrained and len(axis.labels) > 1:
        note += f" Without step 0: {_correlation(points, untrained)}."
    if len(drawn) < len(points):
        note += f" {len(drawn):,} of {len(points):,} points are drawn, evenly spaced in the table."
    columns = [c for c in ("feature", "snapshot", "label", "step", "r2", "norm", "probe_error", "n") if c in drawn]
    return Chart(figure, drawn[columns].reset_index(drop=True), note)


def _correlations(figure: go.Figure, names: list[str], title: str) -> None:
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
    page="evolution",
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
    for i, measure in enumerate(("spearman", "pearson")):
        values, low, high = (floats(table[f"{measure}{end}"]) for end in ("", "_low", "_high"))
        style = Style.of(i)
        figure.add_scatter(
            x=values,
            y=[row + (0.12 if i else -0.12) for row in range(len(names))],
            mode="markers",
            name=measure.capitalize(),
            marker={"color": style.color, "symbol": style.symbol, "size": 9},
            error_x=error_bars(values, low, high, color=style.color, thickness=1.5),
            customdata=[
                [name, f"{a:.2f} to {b:.2f}, {n:,} points"]
                for name, a, b, n in zip(names, low, high, ints(table["n"]), strict=True)
            ],
            hovertemplate="<b>%{fullData.name}</b>, %{customdata[0]}<br>%{x:.3f}<br>%{customdata[1]}<extra></extra>",
        )
    _correlations(figure, names, "correlation")
    last = table.iloc[-1]
    note = (
        f"{'Without step 0, the' if untrained else 'The'} standard deviation of probe errors is "
        f"{last['sd_error']:.3f} and that of relative norms {last['sd_norm']:.2f}; the reliability of the errors is "
        f"{last['reliability']:.2f}. If a feature can be decoded from every snapshot, there is little variation for "
        "its norm to explain."
    )
    return Chart(figure, table.reset_index(drop=True), note)


@figure(
    "agreement",
    page="evolution",
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
    axis = SnapshotAxis.of(pairs)
    figure = new_figure("shared tokens (share)", yaxis_range=[-0.03, 1.05])
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
    axis.apply(figure)
    note = (
        "Each point compares a snapshot with the one before it. Norms are the smaller of the two, relative to the "
        f"feature's largest. Chance is {chance:.4f}."
    )
    return Chart(figure, pd.concat(drawn, ignore_index=True), note)
