"""What to show first of a task: a feature that matters late, one whose effect changes sign, and where features fire."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from crosslens.activations import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.effects import Attribution
from crosslens.shares import relie


def late_feature(effects: Iterable[Attribution]) -> dict[str, Any]:
    """Of the features that carry a tenth of a task's metric at the end, the one whose RelIE lies latest."""
    found: list[dict[str, Any]] = []
    for ie in effects:
        share = relie(ie)
        S = share.shape[1]
        top = ie.top(min(15, int(ie.active[:, -1].sum())), S - 1)
        carried = ie.effects[top, -1] >= 0.1 * ie.metric_clean[-1]
        top = top[carried] if carried.any() else top[:1]
        centre = (share[top] * torch.arange(S) / (S - 1)).sum(-1).nan_to_num(0.0)
        feature = int(top[centre.argmax()])
        found.append(_finding(ie, feature, centre_of_mass=float(centre.max())))
    return max(found, key=lambda finding: finding["centre_of_mass"])


def sign_change(effects: Iterable[Attribution]) -> dict[str, Any]:
    """The feature whose significant effects differ most in sign: harmful at one snapshot, helpful at another."""
    found: list[dict[str, Any]] = []
    for ie in effects:
        sure = torch.where(ie.effects.abs() > 2 * ie.standard_errors, ie.effects, torch.zeros_like(ie.effects))
        swing = torch.minimum(sure.amax(1), -sure.amin(1))
        found.append(_finding(ie, int(swing.argmax()), swing=float(swing.max())))
    return max(found, key=lambda finding: finding["swing"])


@torch.no_grad()
def top_examples(crosscoder: Crosscoder, acts: Activations, feature: int, n: int = 8) -> list[str]:
    """Where a feature is most active in the held-out text: up to six words, the place itself in brackets."""
    tokens = acts.held_out_tokens()
    values = crosscoder.encode(acts.block(len(acts.tokens) - len(tokens), len(acts.tokens)))[..., feature]
    values = values * acts.keep(tokens)
    examples: list[str] = []
    for place in values.flatten().argsort(descending=True).tolist():
        row, position = divmod(place, tokens.shape[1])
        words = acts.snapshots.tokenizer.convert_ids_to_tokens(tokens[row, : position + 1].tolist())
        sentence = words[max(0, len(words) - 6) :]
        example = " ".join([*sentence[:-1], f"[{sentence[-1]}]"])
        if values[row, position] > 0 and example not in examples:
            examples.append(example)
        if len(examples) == n or values[row, position] <= 0:
            break
    return examples


def _finding(ie: Attribution, feature: int, **figures: float) -> dict[str, Any]:
    return {
        "feature": feature,
        "task": ie.task,
        **figures,
        "ie": [round(v, 4) for v in ie.effects[feature].tolist()],
        "ie_se": [round(v, 4) for v in ie.standard_errors[feature].tolist()],
        "relie": [round(v, 4) for v in relie(ie)[feature].tolist()],
    }
