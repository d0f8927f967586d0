"""The page Prompts: traced prompts, and what steered models write."""

from __future__ import annotations

from typing import Any

import pandas as pd

from crosslens.causal.tracing import NO_ERROR_BARS, top_features
from crosslens.report.chart import Cell, Frame, Grid, Prompts, feature_names, floats, ints
from crosslens.report.entries import figure

_SHOWN = 20  # prompts, the newest
_FEATURES = 20  # rows of the heat map of a prompt
_FIRES = 5  # features that a word names


@figure(
    "traced",
    section="traced",
    title="Prompts through training",
    tables=("traces", "trace_predictions", "trace_features", "trace_tokens", "names"),
    definition=(
        "At the selected snapshot: the next tokens of the model with their probabilities, logit(correct) − "
        "logit(wrong), and words coloured by the effect of the features that fire there, blue where they support the "
        "correct answer. An effect is that of setting features to their values on the paired prompt, or to zero where "
        "there is none. Below, the effect of each feature at every snapshot, by the snapshot from which it matters. "
        "These are sizes of effects in one prompt, without error bars."
    ),
    wide=True,
)
def traced_prompts(
    traces: Frame, predictions: Frame, features: Frame, tokens: Frame, names: Frame | None = None
) -> Prompts | str:
    """Prompts with their predictions, tinted words and heat maps at any snapshot.

    Args:
        traces: the table "traces".
        predictions: the table "trace_predictions".
        features: the table "trace_features".
        tokens: the table "trace_tokens".
        names: feature, name.
    """
    labels = traces.drop_duplicates("snapshot").sort_values("snapshot")["label"].astype(str).tolist()
    called, known = feature_names(names), set[int]()
    words: dict[str, int] = {}

    def word(text: str) -> int:
        return words.setdefault(text if text.strip() else "␣", len(words))

    every = sorted(set(ints(traces["prompt"])), reverse=True)  # the newest first
    prompts: list[dict[str, Any]] = []
    for prompt in every[:_SHOWN]:
        rows = traces[traces["prompt"] == prompt].sort_values("snapshot")
        first = rows.iloc[0]
        fired = tokens[tokens["prompt"] == prompt]
        own = features[features["prompt"] == prompt]
        made: dict[str, Any] = {
            "id": prompt,
            "text": str(first["text"]),
            "answers": [str(first["correct"]), str(first["wrong"])],
            "chosen": not bool(first["given"]),
            "metric": [float(f"{value:.3g}") for value in floats(rows["metric"])],
            **_words(fired, len(labels), word),
            "next": _following(predictions[(predictions["prompt"] == prompt) & ~predictions["paired"]], word),
            "map": _heat(own, labels),
        }
        if not pd.isna(first["paired"]):
            after = predictions[(predictions["prompt"] == prompt) & predictions["paired"]]
            made |= {"paired": str(first["paired"]), "pairedNext": _following(after, word)}
            made["pairedMetric"] = [float(f"{value:.3g}") for value in floats(rows["paired_metric"])]
        known |= {row["feature"] for row in made["map"]}
        known |= {feature for line in made["features"] for feature in line if feature >= 0}
        known |= {feature for fires in made["fires"] for feature, _ in fires}
        prompts.append(made)
    largest = max((abs(effect) for made in prompts for line in made["effects"] for effect in line), default=0.0)
    contents = {
        "labels": labels,
        "words": list(words),
        "names": {str(feature): called(feature) for feature in sorted(known)},
        "largest": largest or 1.0,
        "prompts": prompts,
    }
    left_out = f" The newest {len(prompts)} of {len(every)} prompts." if len(every) > len(prompts) else ""
    note = (
        f"{NO_ERROR_BARS.capitalize()}. The deepest colour of a word is an effect of {largest:.2f} logits, that of a "
        f"strip its feature's largest. † More than half of the activation is read from later snapshots.{left_out}"
    )
    return Prompts(contents, features.reset_index(drop=True), note)


def _words(fired: Frame, S: int, word: Any) -> dict[str, Any]:
    """Tokens, and at every snapshot the effect of the features on each, and the one with the largest."""
    T = int(fired["position"].max()) + 1 if len(fired) else 0
    texts = dict(zip(ints(fired["position"]), fired["token"].astype(str), strict=True))
    effects, features = ([[zero] * T for _ in range(S)] for zero in (0.0, -1))
    total = fired.groupby(["snapshot", "position"])["effect"].sum()
    for (s, t), effect in total.items():
        effects[s][t] = float(f"{effect:.3g}")
    largest = fired[fired["effect"] != 0].assign(size=fired["effect"].abs()).sort_values("size", kind="stable")
    for s, t, feature in largest[["snapshot", "position", "feature"]].itertuples(index=False):
        features[s][t] = int(feature)  # the last one is the largest
    strongest = fired.sort_values("activation", ascending=False).drop_duplicates(["position", "feature"])
    strongest = strongest[strongest["activation"] > 0].groupby("position").head(_FIRES)
    fires: list[list[list[Any]]] = [[] for _ in range(T)]
    for t, feature, value in strongest[["position", "feature", "activation"]].itertuples(index=False):
        fires[t].append([int(feature), float(f"{value:.3g}")])
    # a position on which no feature fires, such as the BOS token, has no row
    tokens = [word(texts.get(t, "·")) for t in range(T)]
    return {"tokens": tokens, "effects": effects, "features": features, "fires": fires}


def _following(predictions: Frame, word: Any) -> list[list[list[Any]]]:
    """The next tokens at every snapshot, each with its probability."""
    rows = predictions.sort_values(["snapshot", "rank"])
    return [
        [[word(str(token)), float(f"{p:.3g}")] for token, p in zip(part["token"], part["probability"], strict=True)]
        for _, part in rows.groupby("snapshot")
    ]


def _heat(features: Frame, labels: list[str]) -> list[dict[str, Any]]:
    """The features with the largest effects, by the snapshot from which they matter."""
    marked = features[features["mostly_later"].astype(bool)] if "mostly_later" in features else features.iloc[:0]
    later = set(zip(ints(marked["feature"]), ints(marked["snapshot"]), strict=True))

    def at(value: Any) -> str | None:
        return None if pd.isna(value) else labels[int(value)]

    return [
        {
            "feature": int(row["feature"]), "on": str(row["token"]), "matters": at(row["matters"]),
            "readable": at(row["readable"]), "effects": [float(f"{effect:.3g}") for effect in row["effects"]],
            "later": [(int(row["feature"]), s) in later for s in range(len(labels))],
        }
        for row in top_features(features, _FEATURES).to_dict("records")
    ]  # fmt: skip


@figure(
    "steered",
    section="steered",
    title="What steered models write",
    tables=("steered", "names"),
    definition=(
        "The continuation of each prompt, and the change of the next-token loss on held-out text, in nats per token: "
        "how much the edit harms the model elsewhere."
    ),
    wide=True,
)
def steered_models(table: Frame, names: Frame | None = None) -> Grid:
    """Continuations side by side.

    Args:
        table: the table "steered".
        names: feature, name.
    """
    called = feature_names(names)
    rows: list[list[Cell]] = []
    for row in table.iloc[::-1].to_dict("records"):
        ids = [int(one) for one in row["features"].split(",")]
        how = f"+ {row['add']:g}" if pd.isna(row["factor"]) else f"× {row['factor']:g}"
        change = "" if pd.isna(row["text_loss_change"]) else f"{row['text_loss_change']:+.3f}"
        rows.append(
            [
                Cell(", ".join(map(called, ids)), link=f"feature.html#{ids[0]}"), Cell(how), Cell(str(row["label"])),
                Cell(row["text"]), Cell(row["plain"]), Cell(row["steered"]), Cell(change.replace("-", "−")),
            ]
        )  # fmt: skip
    header = ["feature", "turned", "snapshot", "prompt", "unsteered", "steered", "change of loss"]
    columns = ("features", "factor", "label", "text", "plain", "steered", "text_loss_change")
    return Grid(header, rows, table.reset_index(drop=True), "The newest first.", columns)
