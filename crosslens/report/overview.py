"""The head of the page: what was run, and the few numbers that a reader looks for first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from crosslens.report.chart import short_count

UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Overview:
    """Facts from run.json and the tables, as text.

    Attributes:
        title: model and hook point.
        numbers: (value, what it is), the key numbers.
        facts: (name, value).
        snapshots: label, step, tokens, fingerprint of each.
        timings: (stage, seconds).
    """

    title: str
    numbers: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    snapshots: list[tuple[str, str, str, str]]
    timings: list[tuple[str, str]]


def overview(info: dict[str, Any], table: Callable[[str], pd.DataFrame | None], tasks: list[str]) -> Overview:
    """The overview of a run.

    Args:
        info: run.json.
        table: a table by name, or None.
        tasks: names of the attributed tasks.
    """
    model, hook = _text(info.get("model")), _text(info.get("hook_name"))
    architecture = info.get("architecture")
    if isinstance(architecture, dict):
        architecture = architecture.get("architecture")
    versions: dict[str, Any] = info.get("versions") or {"crosslens": info.get("crosslens")}
    command = info.get("command")
    facts = [
        ("Model", model),
        ("Hook point", hook),
        ("Dataset", _text(info.get("dataset"))),
        ("Training tokens per epoch", _count(info.get("n_tokens"))),
        ("Architecture", _text(architecture)),
        ("Features", _count(info.get("d_sae"))),
        ("Seed", _text(info.get("seed"))),
        ("Tasks attributed", ", ".join(tasks) or "none"),
        ("Created", _text(info.get("created"))),
        ("Command", " ".join(str(part) for part in command) if isinstance(command, list) else _text(command)),
        ("Versions", ", ".join(f"{name} {_text(version)}" for name, version in versions.items())),
    ]
    snapshots: list[dict[str, Any]] = info.get("snapshots") or []
    timings: dict[str, Any] = info.get("timings") or {}
    return Overview(
        title=f"{model}, {hook}" if info.get("model") else "crosslens run",
        numbers=_numbers(snapshots, table),
        facts=facts,
        snapshots=[
            (
                _text(s.get("label")),
                _count(s.get("step")),
                _count(s.get("tokens")),
                str(s.get("fingerprint") or "")[:12],
            )
            for s in snapshots
        ],
        timings=[(str(stage), _seconds(value)) for stage, value in timings.items()],
    )


def _numbers(snapshots: list[dict[str, Any]], table: Callable[[str], pd.DataFrame | None]) -> list[tuple[str, str]]:
    """Key numbers of the tables that are there; a table without the column has none."""
    numbers = [(str(len(snapshots)), "snapshots")] if snapshots else []

    def column(name: str, column: str) -> Any:
        found = table(name)
        return None if found is None or column not in found else found[column]

    alive, origin = column("evolution", "alive"), column("evolution", "origin")
    if alive is not None:
        numbers.append((f"{alive.sum():,}", f"features alive of {len(alive):,}"))
        if origin is not None and alive.any():
            numbers.append((f"{(origin[alive.astype(bool)] == 'emergent').mean():.0%}", "of them emergent"))
    if (ev := column("evaluation", "explained_variance")) is not None:
        numbers.append((f"{ev.mean():.3f}", f"explained variance, mean (least {ev.min():.3f})"))
    if (l0 := column("evaluation", "l0")) is not None:
        numbers.append((f"{l0.mean():.1f}", "features per token (L0)"))
    if (accuracy := column("accuracy", "accuracy")) is not None:
        snapshot = column("accuracy", "snapshot")
        last = accuracy[snapshot == snapshot.max()]
        numbers.append((f"{last.mean():.0%}", "accuracy at the last snapshot, mean over tasks"))
    if (error := column("attribution/*.snapshots", "completeness_error")) is not None:
        numbers.append((f"{100 * error.max():.2g} %", "completeness error, largest"))
    return numbers


def _text(value: object) -> str:
    return UNKNOWN if value is None or value == "" else str(value)


def _count(value: object) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 1e6 else short_count(value)
    return _text(value)


def _seconds(value: object) -> str:
    if not isinstance(value, int | float):
        return _text(value)
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"
