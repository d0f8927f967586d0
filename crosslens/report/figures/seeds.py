"""What several trainings have in common, and how F and k were chosen."""

from __future__ import annotations

import numpy as np
import pandas as pd

from crosslens.report.chart import (
    INK,
    MUTED,
    SERIES,
    Chart,
    Frame,
    Style,
    add_line,
    error_bars,
    floats,
    ints,
    named_ticks,
    new_figure,
)
from crosslens.report.entries import figure

_BANDS = 10.0 ** np.arange(-5, 0.5, 0.5)


@figure(
    "seeds",
    section="seeds",
    title="Features by number of seeds",
    tables=("consensus", "seeds"),
    optional=True,
    columns={
        "features": "Live features that so many seeds have.",
        "share": "The same as a share of the live features.",
        "variance": "Share of the variance that they write.",
    },
)
def seeds(consensus: Frame, pairs: Frame) -> Chart | str:
    """Live features by the number of seeds that have them, this one included, as a share of their number and of the
    variance that they write, Var(f) Σ norm². Features that more than half of the seeds have are consensus features.

    Args:
        consensus: rows of `consensus` about this run.
        pairs: from `compare_seeds`.
    """
    live = consensus[consensus["alive"].astype(bool)]
    if live.empty:
        return "Every feature is dead: none is active on any held-out token."
    of = int(live["of"].iloc[0])
    counts = range(1, of + 1)
    by = live.groupby("n_seeds")
    data = pd.DataFrame({"n_seeds": list(counts)})
    data["features"] = by.size().reindex(counts, fill_value=0).to_numpy()
    data["share"] = data["features"] / len(live)
    data["variance"] = by["variance"].sum().reindex(counts, fill_value=0).to_numpy()
    figure = new_figure("share", barmode="group", bargap=0.3)
    for i, (column, name) in enumerate({"share": "of live features", "variance": "of their variance"}.items()):
        figure.add_bar(
            x=ints(data["n_seeds"]),
            y=floats(data[column]),
            name=name,
            marker={"color": SERIES[i]},
            customdata=ints(data["features"]),
            hovertemplate=(
                f"<b>%{{x}} of {of} seeds</b><br>%{{customdata}} features<br>%{{y:.1%}} {name}<extra></extra>"
            ),
        )
    figure.update_xaxes(title_text="seeds that have the feature", tickmode="array", tickvals=list(counts))
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    most = live[live["consensus"].astype(bool)]
    both = pairs[["share_a", "share_b"]].to_numpy(dtype=float)
    weighted = pairs[["variance_a", "variance_b"]].to_numpy(dtype=float)
    cosine = pairs[["cosine_a", "cosine_b"]].to_numpy(dtype=float)
    note = (
        f"Most of {of} seeds have {len(most):,} of {len(live):,} live features ({len(most) / len(live):.0%}), which "
        f"write {most['variance'].sum():.0%} of the variance. Between two seeds {both.mean():.0%} of the live features "
        f"have a partner ({both.min():.0%} to {both.max():.0%} over {len(pairs)} pair{'s' * (len(pairs) > 1)}, both "
        "directions), weighted by "
        f"variance {weighted.mean():.0%}; {cosine.mean():.0%} have a partner whose decoder also has a cosine of .7. "
        f"With permuted tokens {pairs['null_a'].mean():.1%} have one."
    )
    return Chart(figure, data, note)


@figure(
    "seeds-births",
    section="seeds",
    title="Partners in other seeds, by kind",
    tables=("seeds_births",),
    optional=True,
    columns={
        "share": "Mean of the share over pairs of seeds.",
        "by_chance": "Mean of the share by chance.",
        "question": "What the share is of.",
    },
)
def births_of_partners(births: Frame) -> Chart:
    """Live features with a partner in another seed; of those with a partner that are born (R²), how many partners are
    born too; and of these, at the same snapshot. Beside each bar what it would be by chance: with permuted tokens, of
    all partners, and with permuted dates. Means over pairs of seeds.

    Args:
        births: rows of `births_of_partners` about pairs of seeds.
    """
    means = births.groupby("kind", sort=False).mean(numeric_only=True).reset_index()
    questions = {
        "have a<br>partner": "shared",
        "born<br>in both": "born_too",
        "at the same<br>snapshot": "same_birth",
        "at most<br>one apart": "within_1",
    }
    data = pd.DataFrame(
        [
            (row["kind"], words.replace("<br>", " "), row[column], row[f"{column}_by_chance"])
            for words, column in questions.items()
            for row in means.to_dict("records")
        ],
        columns=["kind", "question", "share", "by_chance"],
    )
    figure = new_figure("share", barmode="group", bargap=0.25)
    for i, (kind, rows) in enumerate(data.groupby("kind", sort=False)):
        figure.add_bar(
            x=list(questions),
            y=floats(rows["share"]),
            name=f"{kind} features",
            marker={"color": SERIES[i]},
            customdata=floats(rows["by_chance"]),
            hovertemplate="<b>%{x}</b><br>%{y:.0%}, by chance %{customdata:.0%}<extra>%{fullData.name}</extra>",
            offsetgroup=str(i),
        )
        figure.add_bar(
            x=list(questions),
            y=floats(rows["by_chance"]),
            name="by chance",
            legendgroup="chance",
            showlegend=i == 0,
            marker={"color": "rgba(0,0,0,0)", "line": {"color": INK, "width": 1.5}},
            hoverinfo="skip",
            offsetgroup=str(i),
        )
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    pairs = len(births[["a", "b"]].drop_duplicates())
    row = means.set_index("kind").loc["all"]
    note = (
        f"{pairs} pair{'s' * (pairs > 1)} of seeds. Of the features that are born in one and have a partner, "
        f"{row['born_too']:.0%} are born in the other too (by chance {row['born_too_by_chance']:.0%}); "
        f"{row['same_birth']:.0%} of these at the same snapshot (by chance {row['same_birth_by_chance']:.0%})."
    )
    return Chart(figure, data, note)


@figure(
    "seeds-rate",
    section="seeds",
    title="Consensus by firing rate",
    tables=("consensus",),
    optional=True,
    columns={
        "rate_from": "Lower edge of the band of firing rates.",
        "rate_to": "Upper edge of the band.",
        "features": "Live features in the band.",
        "consensus": "Share of them that most seeds have.",
        "variance": "Share of the variance that they write.",
    },
)
def seeds_by_rate(consensus: Frame) -> Chart | str:
    """Share of the live features that more than half of the seeds have, by the share of held-out tokens on which the
    feature is active.

    Args:
        consensus: rows of `consensus` about this run.
    """
    live = consensus[consensus["alive"].astype(bool)]
    if live.empty:
        return "Every feature is dead: none is active on any held-out token."
    band = np.searchsorted(_BANDS, live["firing_rate"].to_numpy(dtype=float), side="right")
    by = live.groupby(band)
    data = pd.DataFrame({"features": by.size(), "consensus": by["consensus"].mean(), "variance": by["variance"].sum()})
    edges = [0.0, *_BANDS]
    low, high = [edges[int(b)] for b in data.index], [edges[min(int(b) + 1, len(edges) - 1)] for b in data.index]
    data.insert(0, "rate_from", low)
    data.insert(1, "rate_to", high)
    names = [f"{a:.1g} to {b:.1g}" if a else f"under {b:.1g}" for a, b in zip(low, high, strict=True)]
    figure = new_figure("share of consensus features", bargap=0.25)
    figure.add_bar(
        x=list(range(len(data))),
        y=floats(data["consensus"]),
        marker={"color": SERIES[0]},
        customdata=[
            [name, f"{row['features']:,} live features, {row['variance']:.1%} of the variance"]
            for name, row in zip(names, data.to_dict("records"), strict=True)
        ],
        text=[f"{n:,}" for n in ints(data["features"])],
        textposition="outside",
        hovertemplate="<b>%{customdata[0]}</b><br>%{y:.1%} in most seeds<br>%{customdata[1]}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(title_text="firing rate", **named_ticks(names))
    figure.update_yaxes(tickformat=".0%", range=[0, 1.12])
    return Chart(figure, data, "Above the bars: the number of live features.")


@figure("sweep", section="seeds", title="Choice of F and k", tables=("sweep",), wide=True, optional=True)
def sweep(table: Frame) -> Chart:
    """Share of live features with a partner in another seed, against the explained variance of the least explained
    snapshot, for several numbers of features F and of active ones k.

    Args:
        table: from `choose`.
    """
    figure = new_figure("live features with a partner", height=420)
    rows = table.sort_values(["d_sae", "k"])
    proposed = rows[rows["proposed"].astype(bool)].iloc[0]
    figure.add_scatter(
        x=[float(proposed["least_explained"])], y=[float(proposed["agreement"])], mode="markers", name="proposed",
        marker={"size": 20, "color": "rgba(0,0,0,0)", "line": {"color": INK, "width": 2}}, hoverinfo="skip",
    )  # fmt: skip
    for i, (F, of_size) in enumerate(rows.groupby("d_sae")):
        style = Style.of(i)
        texts = [
            f"<b>F={row.d_sae:.0f}, k={row.k:g}</b><br>{row.agreement:.1%} of {row.live:.0f} live features, "
            f"{row.variance:.1%} of the variance<br>least EV {row.least_explained:.3f}, mean "
            f"{row.explained_variance:.3f}, dead {row.dead:.1%}"
            for row in of_size.itertuples()
        ]
        add_line(
            figure, floats(of_size["least_explained"]), of_size, "agreement", f"F={F:,.0f}", style, hover=texts,
            hovertemplate="%{customdata}<extra></extra>", error_y=error_bars(of_size, "agreement", color=style.color),
            mode="lines+markers+text", text=[f"k={k:g}" for k in of_size["k"]], textposition="top right",
            textfont={"color": MUTED, "size": 11},
        )  # fmt: skip
    figure.update_xaxes(title_text="explained variance, least explained snapshot", showgrid=True)
    figure.update_yaxes(tickformat=".0%")
    note = (
        f"Proposed: F={proposed['d_sae']:.0f}, k={proposed['k']:g}, the largest agreement among the settings that "
        "explain nearly as much as the best and have few dead features. Error bars: smallest and largest share over "
        f"pairs of {int(proposed['seeds'])} seeds, in both directions."
    )
    return Chart(figure, rows, note)
