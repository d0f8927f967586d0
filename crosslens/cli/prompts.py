"""The results of `trace` and `steer` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from crosslens.causal.tracing import NO_ERROR_BARS, Trace, top_features
from crosslens.cli.display import Column, Output, counted, number, percent
from crosslens.rundir import RunDir

_TOP = 12  # features shown of every prompt
_NEXT = 3  # next tokens


def show_trace(out: Output, trace: Trace, run: RunDir) -> None:
    """Print predictions, and the features with the largest effects by the first snapshot of effect, of every prompt.

    Args:
        out: where to print.
        trace: the prompts.
        run: for the names of features.
    """
    names, evolved = feature_names(run), run.table("lifecycles") is not None
    for prompt, rows in trace.prompts.groupby("prompt"):
        first: Any = rows.iloc[0]
        paired = "" if pd.isna(first["paired"]) else f" against “{first['paired']}”"
        why = "" if first["given"] else " (the last snapshot's own; --answers sets others)"
        following = trace.predictions[trace.predictions["prompt"] == prompt]
        columns = [Column("snapshot", left=True), Column("next tokens", left=True), Column("logit difference")]
        columns += [Column("on the other")] * bool(paired)
        out.table(
            columns,
            [_predicted(row, following, bool(paired)) for row in rows.to_dict("records")],
            title=f"“{first['text']}”{paired}; logit of {first['correct']!r} minus that of {first['wrong']!r}{why}",
        )
        of_prompt = trace.features[trace.features["prompt"] == prompt]
        _show_features(out, of_prompt, trace.labels, names, paired=bool(paired), evolved=evolved)


def _predicted(row: Mapping[str, Any], following: Any, paired: bool) -> tuple[str, ...]:
    at = following[(following["snapshot"] == row["snapshot"]) & (following["rank"] < _NEXT)]
    sides: list[str] = []
    for other in (False, True)[: 1 + paired]:
        shown = at[at["paired"] == other]
        sides.append(
            "  ".join(
                f"{token!r} {percent(p, 0)}" for token, p in zip(shown["token"], shown["probability"], strict=True)
            )
        )
    cells = row["label"], " | ".join(sides), number(row["metric"], 2, sign=True)
    return (*cells, number(row["paired_metric"], 2, sign=True)) if paired else cells


def _show_features(
    out: Output, features: Any, labels: Sequence[str], names: Mapping[int, str], *, paired: bool, evolved: bool
) -> None:
    top, marked = top_features(features, _TOP), False
    rows: list[tuple[str, ...]] = []
    before: str | None = None
    for row in top.to_dict("records"):
        since = "-" if pd.isna(row["matters"]) else labels[int(row["matters"])]
        effects = row["effects"]
        peak = int(abs(effects).argmax())
        later = features[features["feature"] == row["feature"]]
        mark = "mostly_later" in later and bool(later["mostly_later"].iloc[peak])
        marked |= mark
        readable = "?" if not evolved else "-" if pd.isna(row["readable"]) else labels[int(row["readable"])]
        # one number never stands without its word
        name = " ".join(filter(None, [str(row["feature"]), names.get(row["feature"], "")]))
        rows.append(
            (
                since if since != before else "", name, f"{row['token']!r} at {row['position']}",
                number(max(row["activation"], row["paired_activation"] or 0), 2), readable,
                f"{number(effects[peak], 3, sign=True)}{'†' * mark} at {labels[peak]}",
                number(effects[-1], 3, sign=True),
            )
        )  # fmt: skip
        before = since
    note = NO_ERROR_BARS + "; effects in logits: the drop of the difference when the feature is set to "
    note += "its value on the other prompt" if paired else "zero"
    note += "; matters from: |effect| is a tenth of its largest"
    note += "" if evolved else "; readable, and which effects are read from later snapshots (†): after crosslens evolve"
    note += "\n† more than half of its activation is read from later snapshots" * marked
    n = features["feature"].nunique()
    out.table(
        [Column("matters from", left=True), Column("feature", left=True), Column("strongest on", left=True),
         Column("activation", drop=2), Column("readable", drop=1), Column("largest effect"),
         Column(f"at {labels[-1]}")],
        rows,
        title=f"the {len(rows)} with the largest effects of {counted(n, 'feature')} that fire",
        note=note,
    )  # fmt: skip


def show_steered(out: Output, rows: Sequence[Mapping[str, Any]], run: RunDir) -> None:
    """Print continuations side by side, and how the loss changes.

    Args:
        out: where to print.
        rows: of the table "steered".
        run: for the names of features.
    """
    first, names = rows[0], _traced_words(run) | feature_names(run)
    called = ", ".join(" ".join(filter(None, [one, names.get(int(one), "")])) for one in first["features"].split(","))
    what = f"× {first['factor']:g}" if first["add"] is None else f"+ {first['add']:g}"
    for text in dict.fromkeys(row["text"] for row in rows):
        out.table(
            [Column("snapshot", left=True), Column("unsteered", left=True), Column("steered", left=True),
             Column("loss on the prompt"), Column("on held-out text")],
            [
                (
                    row["label"], repr(row["plain"]), repr(row["steered"]),
                    _changed(row["prompt_loss"], row["prompt_loss_change"]),
                    _changed(row["text_loss"], row["text_loss_change"]),
                )
                for row in rows if row["text"] == text
            ],
            title=f"“{text}” with feature {called} {what}",
            note="loss: nats per token, and its change by steering"
            + f"; held-out text: {counted(first['n_tokens'], 'token')} of the run" * bool(first["n_tokens"])
            + f"{_without_effect(text, rows)}",
        )  # fmt: skip


def _without_effect(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Where multiplying changed no word after a prompt, and what would."""
    same = [row["label"] for row in rows if row["text"] == text and row["plain"] == row["steered"]]
    if not same or rows[0]["add"] is not None or rows[0]["factor"] == 1:
        return ""
    return (
        f"\nno word changed at {', '.join(same)}: a feature is multiplied only where it fires; try a larger --factor, "
        "or --add N, which adds at every position"
    )


def _traced_words(run: RunDir) -> dict[int, str]:
    """The token of a traced prompt on which a feature was strongest, for want of examples."""
    found = run.table("trace_features")
    if found is None:
        return {}
    strongest = found.sort_values("activation").drop_duplicates("feature", keep="last")
    return {int(f): f"“{str(on).strip()}”" for f, on in zip(strongest["feature"], strongest["token"], strict=True)}


def _changed(loss: float | None, change: float | None) -> str:
    return "-" if loss is None else f"{number(loss)} ({number(change, sign=True)})"


def feature_names(run: RunDir) -> dict[int, str]:
    """The label of every feature, or the token on which it is strongest most often, as far as the run has them."""
    found: dict[int, str] = {}
    tokens, examples, labels = run.table("example_tokens"), run.table("examples"), run.table("labels")
    if tokens is not None and examples is not None:
        peaks = examples[["feature", "rank", "position"]].merge(tokens, on=["feature", "rank", "position"])
        common = peaks.groupby("feature")["token"].agg(lambda column: column.mode().iloc[0])
        found |= {int(feature): f"“{token.strip() or repr(token)}”" for feature, token in common.items()}  # pyright: ignore
    if labels is not None:
        known = labels[(labels["status"] != "local") & labels["label"].notna()]
        found |= {int(f): str(text) for f, text in zip(known["feature"], known["label"], strict=True)}
    return found
