"""Two runs side by side: the settings that differ, how good the crosscoders are, and the features that both have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from crosslens.cli.display import Column, Output, counted, number, percent
from crosslens.errors import UserError, brief, shortened
from crosslens.rundir import RunDir

THRESHOLDS = (0.9, 0.7, 0.5)
_SAME = 0.7


class Difference(NamedTuple):
    """A setting that two runs do not share; None where a run does not have it."""

    setting: str
    a: Any
    b: Any


def list_differences(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Settings that differ between two run.json, with nested names; of snapshots the labels, or that weights differ."""
    one, other = (_flat(info.get("identity", {})) for info in (a, b))
    rows = [Difference(key, one.get(key), other.get(key)) for key in {**one, **other}]
    rows = [
        row if row.setting != "tokens_sha256" else Difference("tokens", "of this run", "other ones")
        for row in rows
        if row.a != row.b
    ]
    labels = [[row["label"] for row in info.get("identity", {}).get("snapshots") or ()] for info in (a, b)]
    if labels[0] != labels[1]:
        rows.append(Difference("snapshots", *(", ".join(each) for each in labels)))
    elif _weights(a) != _weights(b):
        rows.append(Difference("snapshots", "of the same labels", "with other weights"))
    rows += [
        Difference(f"version of {name}", a.get("versions", {}).get(name), b.get("versions", {}).get(name))
        for name in {**a.get("versions", {}), **b.get("versions", {})}
        if a.get("versions", {}).get(name) != b.get("versions", {}).get(name)
    ]
    return rows


def why_not_matched(a: dict[str, Any], b: dict[str, Any]) -> str:
    """What two runs lack for their features to be matched; empty if nothing."""
    hooks = [info.get("identity", {}).get("hook_name") for info in (a, b)]
    if hooks[0] != hooks[1]:
        return f"they read {hooks[0]} and {hooks[1]}; matching needs one hook point"
    if _weights(a) != _weights(b):
        return "they were trained on other snapshots; matching needs the same ones in the same order"
    return ""


def show_comparison(out: Output, a: RunDir, b: RunDir, pairs: pd.DataFrame | None, reason: str) -> None:
    """Print the comparison, and the values for --json.

    Args:
        out: where to print.
        a: a run.
        b: another one.
        pairs: the result of `crosslens.evolution.match`; None if features were not matched.
        reason: why not.
    """
    infos = a.read_json(), b.read_json()
    differences = list_differences(*infos)
    out.say(f"A: {a.path}\nB: {b.path}")
    if differences:
        columns = [Column("setting", left=True), Column("A", left=True), Column("B", left=True)]
        out.table(columns, [(row.setting, _shown(row.a), _shown(row.b)) for row in differences])
    else:
        out.say("all settings are the same")
    evaluation = _evaluations(a, b)
    if evaluation is not None:
        _show_evaluation(out, evaluation)
    matched: dict[str, Any] | None = None
    if pairs is None:
        out.say(f"features are not matched: {reason}")
    else:
        matched = _show_pairs(out, pairs)
    out.end(
        a=a.path, b=b.path, settings=[row._asdict() for row in differences], evaluation=evaluation,
        matched=matched, pairs=pairs, not_matched=reason or None,
    )  # fmt: skip


def _evaluations(a: RunDir, b: RunDir) -> pd.DataFrame | None:
    """Explained variance, L0 and dead features of both, by label; None if neither is evaluated."""
    names = ["explained_variance", "l0", "dead_fraction"]
    tables: list[pd.DataFrame] = []
    for suffix, run in (("_a", a), ("_b", b)):
        table = run.table("evaluation")
        if table is not None:
            tables.append(pd.DataFrame(table[["label", *names]]).set_index("label").add_suffix(suffix))
    if not tables:
        return None
    # in the order of each run, and not of the alphabet
    return pd.concat(tables, axis=1, sort=False).rename_axis("label").reset_index()


def _show_evaluation(out: Output, table: pd.DataFrame) -> None:
    columns = [Column("snapshot"), *(Column(f"{name} {run}") for name in ("EV", "L0", "dead") for run in "AB")]
    rows = [
        (
            str(row["label"]),
            *(number(row.get(f"explained_variance_{run}")) for run in "ab"),
            *(number(row.get(f"l0_{run}"), 1) for run in "ab"),
            *(percent(row.get(f"dead_fraction_{run}")) for run in "ab"),
        )
        for row in table.to_dict("records")
    ]
    out.table(columns, rows, note="EV: explained variance; both on each run's own held-out tokens")


def _show_pairs(out: Output, pairs: pd.DataFrame) -> dict[str, Any]:
    from crosslens.evolution import match_shares

    shares = match_shares(pairs, _SAME)
    rows: list[tuple[str, ...]] = []
    for threshold in THRESHOLDS:
        at = match_shares(pairs, threshold)
        found = int((pairs["correlation"] >= threshold).sum())
        rows.append(
            (
                f"{threshold:g}", f"{found:,}", percent(at["share_a"], 0), percent(at["share_b"], 0),
                percent(at["variance_a"], 0), percent(at["variance_b"], 0), percent(at["null_a"], 0),
            )
        )  # fmt: skip
    live = f"{counted(int(shares['live_a']), 'live feature')} of A, {int(shares['live_b']):,} of B"
    out.table(
        [Column("correlation from"), Column("pairs"), Column("of A"), Column("of B"),
         Column("variance of A", drop=2), Column("variance of B", drop=2), Column("by chance", drop=1)],
        rows,
        title=f"features matched one to one by activation on held-out tokens of A: {live}",
    )  # fmt: skip
    return {"threshold": _SAME, **shares}


def _weights(info: dict[str, Any]) -> list[Any]:
    return [row.get("fingerprint") for row in info.get("identity", {}).get("snapshots") or ()]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_items(settings, prefix))


def _items(settings: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if key == "snapshots":
            continue
        if isinstance(value, dict):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    return "-" if value is None else shortened(value)


def read_pairs(a: RunDir, b: RunDir, device: str | None) -> tuple[pd.DataFrame | None, str]:
    """Match the features of two runs, or say why that cannot be done.

    Args:
        a: the run whose held-out tokens are read.
        b: another run.
        device: where; None is CUDA if available.
    """
    reason = why_not_matched(a.read_json(), b.read_json())
    if reason:
        return None, reason
    from crosslens.crosscoders import load
    from crosslens.evolution import match
    from crosslens.pipeline.opening import open_run

    try:
        _, crosscoder, acts = open_run(a.path, device)
        return match(crosscoder, load(b.crosscoder, device=str(crosscoder.device)), acts), ""
    except (UserError, OSError) as error:
        return None, f"{brief(error)}; matching needs the snapshots and the text that A was trained on"
