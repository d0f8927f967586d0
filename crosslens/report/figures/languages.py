"""Features that languages share."""

from __future__ import annotations

from crosslens.report.chart import Chart, Frame, Style, add_series, floats, ints, over_snapshots, shown
from crosslens.report.entries import figure
from crosslens.report.figures.ablation import effects_of


@figure(
    "languages",
    section="effects",
    title="Features shared between languages",
    tables=("languages/<task>", "attribution/<task>.snapshots"),
    wide=True,
    optional=True,
)
def language_overlap(table: Frame, snapshots: Frame | None = None) -> Chart:
    """Number of features among those with the largest |IE| in both languages, and the number expected if each feature
    is replaced by one of about its size, of those active in both.

    Args:
        table: from `compare_languages`, of one k.
        snapshots: of the effects, which say what features were set to.
    """
    figure, axis = over_snapshots(table, "features shared", yaxis_rangemode="tozero")
    for i, ((one, other), rows) in enumerate(table.groupby(["language", "other"], sort=False)):
        rows = rows.sort_values("snapshot")
        ids = ints(rows["snapshot"])
        texts = [f"{hover}, p = {p:.2g}" for hover, p in zip(axis.hover(ids), floats(rows["p"]), strict=True)]
        name = f"{shown(one)}, {shown(other)}"
        style = Style.of(i)
        add_series(figure, axis, rows, "shared", name, style, hover=texts, value="%{y:d}")
        chance = Style(style.color, dash="dot", markers=False)
        add_series(figure, axis, rows, "expected", f"{name}, by chance", chance, value="%{y:.1f}", band=True)
    k = ", ".join(str(size) for size in sorted(set(ints(table["k"]))))
    level = f"{float(table['level'].iloc[0]):.0%}"
    note = f"Sets of k = {k} features. Bands: {level} of sets of features of the same sizes, active in both languages."
    note += effects_of(snapshots, counted=False)
    return Chart(figure, table, note)
