"""Figures of a single feature, without its numbers: the page's script puts those of the feature that it shows in."""

from __future__ import annotations

from crosslens.report.chart import MUTED, Chart, Frame, SnapshotAxis, Style, add_level, add_line, new_figure, shown


def norm_figure(snapshots: Frame) -> Chart:
    """A line for the decoder norm, and a level from which the feature counts as present.

    Args:
        snapshots: snapshot, label, step, tokens.
    """
    axis = SnapshotAxis.of(snapshots)
    ids = list(axis.labels)
    figure = new_figure("decoder norm", height=320)
    add_level(figure, 0.5, "half of its largest")
    add_line(figure, axis.x(ids), [0.0] * len(ids), "decoder norm", Style.of(0), hover=axis.hover(ids))
    figure.update_yaxes(rangemode="tozero")
    axis.apply(figure)
    return Chart(figure, snapshots)


def effect_figure(snapshots: Frame, tasks: list[str]) -> Chart:
    """For each task a band and a line: the indirect effect at every snapshot, with two standard errors."""
    axis = SnapshotAxis.of(snapshots)
    ids = list(axis.labels)
    zeros = [0.0] * len(ids)
    figure = new_figure("IE (logits)", height=320)
    for i, task in enumerate(tasks):
        add_line(
            figure, axis.x(ids), zeros, shown(task), Style.of(i), hover=axis.hover(ids), number="+.3f", low=zeros,
            high=zeros,
        )  # fmt: skip
    figure.update_layout(showlegend=True)
    figure.update_yaxes(zeroline=True, zerolinecolor=MUTED)
    axis.apply(figure)
    return Chart(figure, snapshots)
