"""Effects in single prompts."""

from __future__ import annotations

from typing import Any

import pandas as pd

from crosslens.report.chart import Frame, Prompts, feature_names, floats, ints
from crosslens.report.entries import figure
from crosslens.report.figures.ablation import effects_of


@figure(
    "words",
    section="prompts",
    title="Effects in single prompts",
    tables=("prompts/<task>", "names", "attribution/<task>.snapshots"),
    wide=True,
    optional=True,
)
def prompt_words(table: Frame, names: Frame | None = None, effects: Frame | None = None) -> Prompts | str:
    """A word is coloured by the effect of all features active on it at the selected snapshot: blue where they support
    the correct answer, orange where they oppose it. A click opens the feature with the largest effect there.

    Args:
        table: from `Attribution.prompt_frame`.
        names: feature, name.
        effects: from `Attribution.snapshot_frame`.
    """
    if not table["effect"].abs().max() > 0:
        return "No feature has an effect on these prompts."
    called = feature_names(names)
    rows = table.sort_values(["prompt", "position", "snapshot"])
    written = _spaced(rows) if "prefix" in rows else rows["token"].astype(str)
    words, text = pd.factorize(written.where(written.str.strip() != "", "␣"))
    rows = rows.assign(word=words)
    snapshots = rows.drop_duplicates("snapshot").sort_values("snapshot")
    prompts: list[dict[str, Any]] = []
    for prompt, part in rows.groupby("prompt", sort=True):
        wide = {
            column: part.pivot(index="snapshot", columns="position", values=column)
            for column in ("effect", "feature", "word")
        }
        acting = [[float(f"{effect:.3g}") for effect in floats(line)] for line in wide["effect"].to_numpy()]
        features = [ints(line) for line in wide["feature"].to_numpy()]
        tokens = ints(wide["word"].iloc[0])
        answers = part.iloc[0][["correct", "wrong"]].tolist() if {"correct", "wrong"} <= set(part) else []
        prompts.append(
            {"id": int(str(prompt)), "tokens": tokens, "effects": acting, "features": features, "answers": answers}
        )
    largest = float(rows["effect"].abs().max())
    known = sorted(set(ints(rows.loc[rows["feature"] >= 0, "feature"])))
    contents = {
        "labels": [str(label) for label in snapshots["label"]],
        "words": text.tolist(),
        "names": {str(feature): called(feature) for feature in known},
        "largest": largest,
        "prompts": prompts,
    }
    note = f"The deepest colour is an effect of {largest:.2f} logits. The {len(prompts)} prompts that were kept."
    note += effects_of(effects, counted=False)
    return Prompts(contents, rows.drop(columns="word").reset_index(drop=True), note)


def _spaced(rows: Frame) -> pd.Series:
    """The tokens with the spaces before them in the prompt, which tokenizers of whole words leave out."""
    texts: dict[tuple[int, int], str] = {}
    for prompt, part in rows.drop_duplicates(["prompt", "position"]).groupby("prompt"):
        prefix, at = str(part["prefix"].iloc[0]), 0
        for position, token in part[["position", "token"]].astype({"token": str}).itertuples(index=False):
            before, found, _ = prefix[at:].partition(token or " ")
            inside = bool(token) and bool(found) and not before.strip()
            texts[int(str(prompt)), position] = before + token if inside else token
            at += (len(before) + len(token)) * inside
    return pd.Series([texts[key] for key in zip(rows["prompt"], rows["position"], strict=True)], rows.index)
