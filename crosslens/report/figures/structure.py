"""How features share dimensions, split, write, read and vary in complexity."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crosslens.features.labels import complexity_correlation
from crosslens.report.chart import (
    FEATURES,
    HEAT,
    SERIES,
    Chart,
    Frame,
    Style,
    add_bars,
    add_diagonal,
    add_matrix,
    add_series,
    apply_colors,
    evenly_spaced,
    feature_names,
    floats,
    ints,
    named_ticks,
    new_figure,
    over_snapshots,
    shown,
)
from crosslens.report.entries import figure
from crosslens.report.tables import by_measure, curves

MAX_POINTS = 4000  # of a scatter plot; more make the page slow
_EVENTS = {"birth": "born here", "peak": "strongest here"}


@figure("dimensionality", section="evolution", title="Total dimensionality", tables=("dimensionality",), optional=True)
def dimensionality(table: Frame) -> Chart | str:
    """Sum over present features of |w|⁴ / Σ (w · w')², divided by d_model, where w is the decoder vector times the
    feature's RMS activation, or the decoder vector alone, as Elhage et al. wrote it; beside as many random directions
    of the same lengths, and the participation ratio of the activations, (Σ variances)² / Σ variances² over principal
    directions."""
    if not table["total"].any():
        return "No feature is present at any snapshot."
    figure, axis = over_snapshots(table, "dimensions / d_model", yaxis_rangemode="tozero")
    d_model = float((table["total"] / table["share"]).max())
    drawn = table.assign(participation=table["participation_ratio"] / d_model)
    lines = {
        "share": "features, by activation",
        "random_share": "random directions, by activation",
        "elhage_share": "features, all alike (Elhage et al.)",
        "random_elhage_share": "random directions, all alike",
        "participation": "participation ratio of the activations",
    }
    for i, (column, name) in enumerate(lines.items()):
        add_series(figure, axis, drawn, column, name, Style.of(i))
    first, last = table.iloc[0], table.iloc[-1]
    note = (
        f"By decoder norm, {int(first['present']):,} features are present at {first['label']}, "
        f"{int(last['present']):,} at {last['label']}. The participation ratio is {first['participation_ratio']:.1f} "
        f"and {last['participation_ratio']:.1f} of {d_model:.0f} dimensions."
    )
    return Chart(figure, table, note)


@figure(
    "splits",
    section="evolution",
    title="Feature splitting and replacement",
    tables=("split_counts", "snapshots", "splits", "replacements"),
    optional=True,
    columns={
        "replacement": "Features born here in place of one that dies.",
        "split": "Pairs that share a direction until here.",
        "merger": "Pairs that share a direction from here on.",
    },
)
def splits_and_replacements(
    found: Frame, snapshots: Frame, splits: Frame | None = None, replacements: Frame | None = None
) -> Chart | str:
    """Number of feature pairs by snapshot. Split: two features share a direction before this snapshot but not from it
    on. Merger: the reverse. Replacement: a feature is born when another with the same direction, active on the same
    tokens, dies. By chance: with the snapshots in random orders, or with the dates of births permuted.

    Args:
        found: from `split_counts`.
        snapshots: snapshot, label, step.
        splits: from `splits`; None if no feature splits or merges.
        replacements: from `replacements`; None if no feature is replaced.
    """
    figure, axis = over_snapshots(snapshots, "pairs of features", even=True, barmode="group", bargap=0.25)
    kinds: dict[str, pd.Series] = {"replacement": pd.Series() if replacements is None else replacements["birth"]}
    for kind in ("split", "merger"):
        kinds[kind] = pd.Series() if splits is None else splits.loc[splits["kind"] == kind, "at"]
    counts = pd.DataFrame({name: axis.count(dates) for name, dates in kinds.items()})
    if not counts.to_numpy().sum():
        return "No feature splits, merges or is replaced at these thresholds."
    add_bars(figure, axis, counts, "pairs")
    data = counts.rename_axis("snapshot").reset_index()
    data.insert(1, "label", list(axis.labels.values()))
    of_all = found[found["features"] == "all"] if "features" in found else found
    words = [
        f"{row['n']:,} {row['kind']}{'s' * (row['n'] != 1)} (by chance {row['by_chance']:.1f}, in 95% of draws at most "
        f"{row['most_by_chance']:.0f})"
        for row in of_all.to_dict("records")
    ]
    note = f"{'; '.join(words)}."
    if "features" in found:
        surely = found[(found["features"] != "all") & (found["n"] > found["most_by_chance"])]
        parts = [
            f"{row['features']} {row['kind']}s {row['n']:,} ({row['by_chance']:.1f})"
            for row in surely.to_dict("records")
        ]
        note += f" By kind of features, more than chance gives: {', '.join(parts) or 'none'}."
    return Chart(figure, data, note)


@figure(
    "scaling",
    section="evolution",
    title="Latent scaling",
    tables=("scaling", "evolution", "lifecycles", "names"),
    optional=True,
    columns={
        "strength": "Decoder norm divided by the feature's largest.",
        "scaling": "Latent scaling divided by the largest decoder norm.",
    },
)
def scaling(table: Frame, evolution: Frame, lifecycles: Frame, names: Frame | None = None) -> Chart | str:
    """Least-squares coefficient of the feature's direction at its peak on what the other features leave unexplained,
    against its decoder norm, both divided by its largest norm. Above the line, the direction is stronger in the
    activations than the norm suggests.

    Args:
        table: from `LatentScaling.to_frame`.
        evolution: a row per feature and snapshot, from `evolve`.
        lifecycles: a row per measure and feature.
        names: feature, name.
    """
    called = feature_names(names)
    labels = [str(name).removeprefix("peak/") for name in table.columns if str(name).startswith("peak/")]
    by_norm = by_measure(lifecycles, "norm")
    features = by_norm.loc[by_norm["alive"].astype(bool), "feature"]
    norm = curves(evolution, features, "norm")
    top = norm.max(1, keepdims=True)
    found = table.set_index("feature").loc[features, [f"peak/{label}" for label in labels]].to_numpy(dtype=float)
    v, beta = norm / top, found / top
    keep = np.isfinite(beta)
    if not keep.any():
        return "No feature fires on the held-out tokens."
    feature, snapshot = np.nonzero(keep)
    data = pd.DataFrame(
        {
            "feature": features.to_numpy()[feature],
            "label": np.array(labels, dtype=object)[snapshot],
            "strength": v[keep],
            "scaling": beta[keep],
        }
    )
    drawn = evenly_spaced(data, MAX_POINTS)
    figure = new_figure("latent scaling / largest norm", height=440)
    add_diagonal(figure, [0, 1], "scaling = norm")
    figure.add_scattergl(
        x=floats(drawn["strength"]),
        y=floats(drawn["scaling"]),
        mode="markers",
        name="a feature at a snapshot",
        marker={"size": 4, "opacity": 0.4, "color": SERIES[0]},
        customdata=[
            [f, shown(called(f)), shown(label, 40)]
            for f, label in zip(ints(drawn["feature"]), drawn["label"], strict=True)
        ],
        meta=FEATURES,
        hovertemplate="feature %{customdata[1]}<br>%{customdata[2]}<br>norm %{x:.3f}, scaling %{y:.3f}<extra></extra>",
    )
    figure.update_xaxes(title_text="decoder norm / largest norm", showgrid=True, zeroline=False)
    absent = v[keep] < 0.5
    hidden = float((beta[keep][absent] >= 0.5).mean()) if absent.any() else 0.0
    note = (
        f"At {int(absent.sum()):,} points the norm says the feature is absent (below half of its largest norm); at "
        f"{hidden:.1%} of them the scaling says it is present."
    )
    if len(drawn) < len(data):
        note += f" {len(drawn):,} of {len(data):,} points are drawn, evenly spaced."
    return Chart(figure, data, note)


@figure(
    "encoder",
    section="evolution",
    title="Encoder share by snapshot",
    tables=("encoder", "lifecycles"),
    optional=True,
    columns={"born": "Number of the snapshot at which the features are born."},
)
def encoder(table: Frame, lifecycles: Frame) -> Chart | str:
    """Share of each snapshot in a feature's encoder input: how much the snapshot's part of the pre-activation rises
    from all tokens to those where the feature is active. Median over the features born at a snapshot.

    Args:
        table: from `encoder_share`, a column share/<label> per snapshot.
        lifecycles: a row per measure and feature; the main measure dates births.
    """
    evolution = by_measure(lifecycles)
    columns = [str(name) for name in table.columns if str(name).startswith("share/")]
    labels = [name.removeprefix("share/") for name in columns]
    birth = evolution.set_index("feature")["birth"].reindex(table["feature"]).reset_index(drop=True)
    known = birth.notna() & table[columns].notna().all(axis=1)
    if not known.any():
        return "No feature is born at any snapshot."
    rows = table.loc[known, columns].groupby(birth[known].astype(int)).median()
    counts = birth[known].astype(int).value_counts()
    shares = rows.to_numpy(dtype=float)
    figure = new_figure("born at", height=180 + 28 * len(rows))
    names = {b: f"{shown(labels[b], 14)} ({counts[b]})" for b in rows.index.tolist()}
    cells = rows.set_axis(labels, axis=1).stack().rename_axis(["born", "label"]).rename("share").reset_index()
    cells["text"] = [
        f"born at {names[row.born]}<br>read from {shown(row.label)}: {row.share:.1%}" for row in cells.itertuples()
    ]
    places = {label: i for i, label in enumerate(labels)}
    add_matrix(figure, cells, "share", ("born", names), ("label", places))
    apply_colors(figure, HEAT, {0.0: "0%", float(shares.max()): f"{shares.max():.0%} of the encoder input"})
    figure.update_xaxes(title_text="read from", **named_ticks([shown(label, 14) for label in labels], slanted=True))
    before = [line[: int(b)].sum() for b, line in zip(rows.index, shares, strict=True) if b > 0]
    note = "Number of features in parentheses. Left of the diagonal: read from snapshots before birth."
    if before:
        note += f" These shares sum to at most {max(before):.0%}."
    data = rows.reset_index().rename(columns={"birth": "born"})
    return Chart(figure, data, note)


@figure(
    "complexity",
    section="evolution",
    title="Complexity",
    tables=("labels", "lifecycles", "snapshots"),
    optional=True,
    columns={
        "event": "Whether features are born or strongest at the snapshot.",
        "mean": "Mean complexity.",
        "se": "Its standard error.",
        "n": "Features.",
    },
)
def complexity(labels: Frame, lifecycles: Frame, snapshots: Frame) -> Chart | str:
    """Mean complexity, from 1 (a single token) to 5 (diverse contexts with one theme), as rated by a language model, of
    the features born, and of those strongest, at a snapshot. Bands are ± two standard errors; correlations have 95%
    bootstrap intervals over features.

    Args:
        labels: from `label_features`: feature, complexity.
        lifecycles: a row per measure and feature; the main measure dates births and peaks.
        snapshots: snapshot, label, step.
    """
    evolution = by_measure(lifecycles)
    rated = labels[["feature", "complexity"]].dropna()
    if rated.empty:
        return "No feature has a complexity rating."
    rated = rated.merge(evolution[["feature", *_EVENTS]], on="feature").astype({"complexity": float})
    figure, axis = over_snapshots(snapshots, "complexity (1 to 5)", yaxis_range=[0.8, 5.2], yaxis_dtick=1)
    parts: list[pd.DataFrame] = []
    for i, (event, name) in enumerate(_EVENTS.items()):
        grouped = rated.dropna(subset=[event]).astype({event: int}).groupby(event)["complexity"]
        rows = grouped.agg(mean="mean", se="sem", n="count").reset_index(names="snapshot")
        ids = ints(rows["snapshot"])
        hover = [f"{text}<br>{n:,} features" for text, n in zip(axis.hover(ids), ints(rows["n"]), strict=True)]
        band = rows.assign(mean_low=rows["mean"] - 2 * rows["se"], mean_high=rows["mean"] + 2 * rows["se"])
        add_series(figure, axis, band, "mean", name, Style.of(i), hover=hover, value="%{y:.2f}", band=True)
        names = [axis.labels[snapshot] for snapshot in ids]
        parts.append(rows.assign(event=event, label=names)[["event", "snapshot", "label", "mean", "se", "n"]])
    note = f"{len(rated):,} features have a complexity rating."
    for row in complexity_correlation(rated, evolution, unit="index").to_dict("records"):
        if np.isfinite(row["spearman"]):
            interval = f"[{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]"
            note += f" Spearman with {row['event']} {row['spearman']:+.2f} {interval}, {row['n']:,} features."
    return Chart(figure, pd.concat(parts, ignore_index=True), note.replace("-", "−"))
