"""Edges between the features of two hook points."""

from __future__ import annotations

import math

from crosslens.report.chart import AT, Cell, Frame, Grid, feature_names, pick
from crosslens.report.entries import figure

_ROWS = 60


@figure(
    "edges",
    section="effects",
    title="Edges from an earlier hook point",
    tables=("edges/<task>", "names"),
    wide=True,
    optional=True,
)
def edges(table: Frame, names: Frame | None = None) -> Grid | str:
    """What a feature reads less when a feature of an earlier hook point is set to zero, to first order, by snapshot,
    the last one first: mean over prompts ± standard error over groups of prompts. Blue makes the feature fire, orange
    keeps it from firing.

    Args:
        table: of `causal.connect_features`.
        names: feature, name.
    """
    if table.empty:
        return "None of the features fires on the prompts, so nothing leads to them."
    called = feature_names(names)
    late = table.drop_duplicates("snapshot").sort_values("snapshot", ascending=False)
    keys = table.drop_duplicates(["feature", "from_feature"])[["feature", "from_feature"]].itertuples(index=False)
    listed = [(int(upper), int(lower)) for upper, lower in keys]
    cells = table.set_index(["feature", "from_feature", "snapshot"])[["edge", "edge_se"]].to_dict("index")
    largest = float(table["edge"].abs().max()) or 1.0
    rows: list[list[Cell]] = []
    for upper, lower in listed[:_ROWS]:
        row = [Cell(called(upper), link=f"feature.html#{upper}"), Cell(f"lower feature {lower}")]
        for s in late["snapshot"]:
            edge, error = cells[upper, lower, s]["edge"], cells[upper, lower, s]["edge_se"]
            text = f"{edge:+.3f}" + ("" if math.isnan(error) else f" ±\N{NO-BREAK SPACE}{error:.3f}")
            row.append(Cell(text.replace("-", "−"), math.copysign(math.sqrt(abs(edge) / largest), edge)))
        rows.append(row)
    cut = f" The first {_ROWS} of {len(listed)} edges." if len(listed) > _ROWS else ""
    note = (
        f"Lower features are those of {table['from_hook'].iloc[0]}, on {table['n_prompts'].iloc[0]} prompts in "
        f"{table['n_groups'].iloc[0]} groups.{cut}"
    )
    header = ["feature", "from", *late["label"].astype(str)]
    return Grid(header, rows, pick(table, "feature", "from_feature", *AT, "edge", "edge_se", "part"), note)
