"""How well the crosscoder reconstructs each snapshot."""

from __future__ import annotations

from typing import Any

import pandas as pd

from crosslens.report.chart import AT, Chart, Frame, Style, add_series, over_snapshots, pick
from crosslens.report.entries import figure

FINE_EV, FINE_DEAD, FINE_CE, FINE_KL = 0.9, 0.1, 0.95, 0.1


@figure("explained-variance", section="reconstruction", title="Explained variance", tables=("evaluation",))
def explained_variance(table: Frame) -> Chart:
    """1 − E‖x̂ − x‖² / E‖x − mean‖² over all tokens, and the mean over tokens of 1 − ‖x̂ − x‖² / ‖x − mean‖². A perfect
    reconstruction has 1."""
    names = {"explained_variance": "over all tokens", "explained_variance_per_token": "mean over tokens"}
    small = bool(table["explained_variance"].min() >= FINE_EV)
    worst = table.loc[table["explained_variance"].idxmin()]
    note = f"Over all tokens: mean {table['explained_variance'].mean():.3f}, "
    note += f"lowest {worst['explained_variance']:.3f} at {worst['label']}."
    return _per_snapshot(table, names, "explained variance", note, value="%{y:.4f}", small=small)


@figure("l0", section="reconstruction", title="L0", tables=("evaluation",))
def l0(table: Frame) -> Chart | str:
    """Mean number of active features per token. It differs between snapshots only if each snapshot has its own gate
    (JumpReLU)."""
    if table["l0"].nunique() == 1:
        return f"{table['l0'].iloc[0]:.2f} at every snapshot."
    note = f"Mean {table['l0'].mean():.2f}."
    if "dead_fraction" in table:
        note += f" Dead features: {table['dead_fraction'].iloc[0]:.1%}."
    return _per_snapshot(table, {"l0": "L0"}, "L0", note, value="%{y:.2f}", small=True, yaxis_rangemode="tozero")


@figure(
    "dead",
    section="reconstruction",
    title="Dead features",
    tables=("evaluation",),
    optional=True,
    columns={"dead": "Dead features, in per cent."},
)
def dead(table: Frame) -> Chart | str:
    """Percentage of features that are active on no held-out token. It differs between snapshots only if each snapshot
    has its own gate (JumpReLU)."""
    percent = table.assign(dead=100 * table["dead_fraction"])
    if percent["dead"].nunique() == 1:
        return f"{percent['dead'].iloc[0]:.1f}% at every snapshot."
    small = bool(percent["dead"].max() <= 100 * FINE_DEAD)
    names = {"dead": "dead features"}
    return _per_snapshot(percent, names, "dead (%)", value="%{y:.2f}", small=small, yaxis_rangemode="tozero")


@figure("cross-entropy", section="reconstruction", title="Cross-entropy loss", tables=("evaluation",))
def cross_entropy(table: Frame) -> Chart:
    """Next-token loss in nats per token: of the clean model, with the reconstruction spliced in at the hook point, and
    with zeros there (zero ablation)."""
    names = {"ce_clean": "clean", "ce_spliced": "spliced", "ce_zero": "zero-ablated"}
    recovered: Any = pd.to_numeric(table["ce_recovered"], errors="coerce") if "ce_recovered" in table else pd.Series()
    known = recovered.dropna()
    if known.empty:
        note = "CE recovered is undefined at every snapshot: zero ablation costs less than 0.1 nats."
    else:
        note = f"CE recovered: {known.min():.3f} to {known.max():.3f}."
        if missing := len(table) - len(known):
            note += f" Undefined at {missing} of {len(table)} snapshots, where zero ablation costs less than 0.1 nats."
    return _per_snapshot(table, names, "nats per token", note, small=bool(known.min() >= FINE_CE))


@figure("kl", section="reconstruction", title="KL divergence from the clean model", tables=("evaluation",))
def kl(table: Frame) -> Chart:
    """Mean KL divergence from the clean model's next-token distribution to that of the model with the reconstruction
    spliced in, in nats per token."""
    small = bool(table["kl"].max() <= FINE_KL)
    return _per_snapshot(table, {"kl": "KL"}, "nats per token", value="%{y:.4f}", small=small, yaxis_rangemode="tozero")


def _per_snapshot(
    table: Frame,
    names: dict[str, str],
    y_title: str,
    note: str = "",
    *,
    value: str = "%{y:.3f}",
    small: bool,
    **layout: Any,
) -> Chart:
    """A line per column of a table with one row per snapshot."""
    rows = table.sort_values("snapshot")
    figure, axis = over_snapshots(rows, y_title, height=210 if small else 320, **layout)
    present = [column for column in names if column in rows]
    for i, column in enumerate(present):
        add_series(figure, axis, rows, column, names[column], Style.of(i), value=value)
    figure.update_layout(showlegend=len(present) > 1)
    return Chart(figure, pick(rows, *AT, "tokens", *present), note, small)
