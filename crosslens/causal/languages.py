"""Which features serve several languages: how far the features of largest effect coincide, and when that comes about.

The same task in several languages gives an `Attribution` each, all of one crosscoder. At every snapshot the set of a
language is its k features of largest effect (less those without any, or without one of the wanted sign), and a feature
*serves* the languages in whose sets it is. Bayazit et al. (arXiv 2509.05291) count both, without chance beside them.

Two sets coincide by chance, too, and the more so the fewer features are active on the prompts at all. Chance draws the
sets anew from the features that could have been in both:

1. Two languages: of the N features that are active in both, n_a are in the one set and n_b in the other. Drawn at
   random their overlap is hypergeometric, with mean n_a n_b / N. Features that are active in one language alone cannot
   coincide, and count for nothing.
2. How many features serve exactly m languages: features that are active in the same languages are exchangeable. Of N
   such features n_l are in the set of language l, so one of them is with probability n_l / N, and the number of its
   languages is a sum of independent draws. With two languages this is 1 again.

Both comparisons with chance are this project's own.

    parts = split_languages(Task.demo("pp"))
    effects = {language: attribute(cc, snaps, part) for language, part in parts.items()}
    compare_languages(effects, k=10)

Letters: L languages, S snapshots, F features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import hypergeom
from torch import Tensor

from crosslens.causal.attribution import Attribution
from crosslens.errors import UserError
from crosslens.tasks.task import Task


def split_languages(task: Task) -> dict[str, Task]:
    """The items of `task` by `item.info["language"]`, in order of first appearance; empty where an item states none."""
    named = [item.info.get("language") for item in task.items]
    if None in named:
        return {}
    return {
        language: replace(
            task,
            name=f"{task.name}-{language}",
            items=tuple(item for item, own in zip(task.items, named, strict=True) if own == language),
            duplicates=0,
        )
        for language in dict.fromkeys(str(name) for name in named)
    }


def compare_languages(
    effects: Mapping[str, Attribution], k: int = 10, *, by: str = "magnitude", level: float = 0.95
) -> pd.DataFrame:
    """How far the features of largest effect coincide between languages: a row per snapshot and pair of languages.

    Args:
        effects: of one crosscoder on the same task, by language.
        k: features in the set of a language.
        by: what ranks them: "magnitude", "signed" (the most helpful) or "negative" (the most harmful).
        level: of the interval of what chance gives.

    Returns:
        snapshot, label, step, language, other, k; n and n_other (features in the sets, fewer than k where the others
        have no effect), shared (in both), same_sign (of these, with effects of one sign), jaccard (shared / in either);
        candidates (features that are active in both languages), in_candidates and other_in_candidates (of the sets);
        expected (mean of the overlap by chance), low and high (the central `level` of it), level, p (chance of an
        overlap as large or larger, of this row alone) and expected_jaccard (mean by chance).

    Raises:
        UserError: fewer than two languages, effects of different crosscoders or snapshots, a k larger than the active
            features, an unknown `by`, a level outside (0, 1).
    """
    if not 0 < level < 1:
        raise UserError(f"level={level} is not between 0 and 1: 0.95 is usual")
    chosen = _sets(effects, k, by)
    rows: list[dict[str, Any]] = []
    for s in range(len(_first(effects).labels)):
        for one, other in combinations(effects, 2):
            a, b = chosen[one][:, s], chosen[other][:, s]
            both = a & b
            signs = effects[one].effects[:, s] * effects[other].effects[:, s] > 0
            candidates = effects[one].active[:, s] & effects[other].active[:, s]
            rows.append(
                {
                    **_snapshot(effects, s),
                    "language": one,
                    "other": other,
                    "k": k,
                    "n": int(a.sum()),
                    "n_other": int(b.sum()),
                    "shared": int(both.sum()),
                    "same_sign": int((both & signs).sum()),
                    **_by_chance(a, b, candidates, level),
                }
            )
    return _tidy(rows)


def list_languages(effects: Mapping[str, Attribution], k: int = 10, *, by: str = "magnitude") -> pd.DataFrame:
    """Which languages every feature serves: a row per snapshot and feature that serves any language at any snapshot.

    Args:
        effects: of one crosscoder on the same task, by language.
        k: features in the set of a language.
        by: what ranks them, as in `compare_languages`.

    Returns:
        feature, snapshot, label, step, n_languages, languages ("en, fr", or empty), and its effect in each language,
        ie/<language>, in logits.

    Raises:
        UserError: as `compare_languages`.
    """
    chosen = _sets(effects, k, by)
    masks = torch.stack(list(chosen.values()), -1)  # (F, S, L)
    rows: list[dict[str, Any]] = []
    for feature in masks.any(-1).any(-1).nonzero().flatten().tolist():
        for s, serves in enumerate(masks[feature].tolist()):
            served = [language for language, is_in in zip(effects, serves, strict=True) if is_in]
            rows.append(
                {
                    "feature": feature,
                    **_snapshot(effects, s),
                    "n_languages": len(served),
                    "languages": ", ".join(served),
                    **{f"ie/{language}": float(each.effects[feature, s]) for language, each in effects.items()},
                }
            )
    return _tidy(rows)


def count_languages(effects: Mapping[str, Attribution], k: int = 10, *, by: str = "magnitude") -> pd.DataFrame:
    """How many features serve one language, two, ..., all: a row per snapshot and number of languages.

    Args:
        effects: of one crosscoder on the same task, by language.
        k: features in the set of a language.
        by: what ranks them, as in `compare_languages`.

    Returns:
        snapshot, label, step, k, n_languages (1 to L), features (that serve exactly so many), share (of the features
        that serve any), expected (mean number of features by chance).

    Raises:
        UserError: as `compare_languages`.
    """
    chosen = _sets(effects, k, by)
    rows: list[dict[str, Any]] = []
    for s in range(len(_first(effects).labels)):
        in_set = torch.stack([mask[:, s] for mask in chosen.values()], -1)
        active = torch.stack([each.active[:, s] for each in effects.values()], -1)
        counts = in_set.sum(-1).bincount(minlength=len(effects) + 1)
        expected = _expected_counts(in_set, active)
        rows += [
            {
                **_snapshot(effects, s),
                "k": k,
                "n_languages": m,
                "features": int(counts[m]),
                "share": float(counts[m] / counts[1:].sum()) if counts[1:].any() else np.nan,
                "expected": float(expected[m]),
            }
            for m in range(1, len(effects) + 1)
        ]
    return _tidy(rows)


def _sets(effects: Mapping[str, Attribution], k: int, by: str) -> dict[str, Bool[Tensor, "F S"]]:
    """Features in the set of every language at every snapshot."""
    _check(effects)
    chosen: dict[str, Tensor] = {}
    for language, each in effects.items():
        mask = torch.zeros_like(each.active)
        for s in range(len(each.labels)):
            mask[each.top(k, s, by), s] = True
        # fewer than k features may have an effect, or one of the wanted sign
        chosen[language] = mask & ({"signed": each.effects, "negative": -each.effects}.get(by, each.effects.abs()) > 0)
    return chosen


def _by_chance(
    a: Bool[Tensor, " F"], b: Bool[Tensor, " F"], candidates: Bool[Tensor, " F"], level: float
) -> dict[str, float]:
    N, n_a, n_b = (int(mask.sum()) for mask in (candidates, a & candidates, b & candidates))
    shared, either = int((a & b).sum()), int((a | b).sum())
    law: Any = hypergeom(max(N, 1), n_a, n_b)  # scipy has no law of nothing
    low, high = law.interval(level)
    possible = np.arange(min(n_a, n_b) + 1)
    united = np.maximum(int(a.sum()) + int(b.sum()) - possible, 1)  # 1 where both sets are empty
    return {
        "jaccard": shared / either if either else float("nan"),
        "candidates": N,
        "in_candidates": n_a,
        "other_in_candidates": n_b,
        "expected": n_a * n_b / N if N else 0.0,
        "low": int(low),
        "high": int(high),
        "level": level,
        "p": float(law.sf(shared - 1)),
        "expected_jaccard": float(law.pmf(possible) @ (possible / united)) if either else float("nan"),
    }


def _expected_counts(in_set: Bool[Tensor, "F L"], active: Bool[Tensor, "F L"]) -> Float[np.ndarray, " counts"]:
    """Features that serve exactly 0, 1, ..., L languages, on average by chance."""
    expected = np.zeros(active.shape[1] + 1)
    patterns, which = active.unique(dim=0, return_inverse=True)
    for i in range(len(patterns)):
        members = in_set[which == i].double()
        law = np.ones(1)
        for share in members.mean(0).tolist():
            law = np.convolve(law, (1 - share, share))
        expected += len(members) * law
    return expected


def _check(effects: Mapping[str, Attribution]) -> None:
    if len(effects) < 2:
        raise UserError(f"{len(effects)} language(s) are given: give the effects on the same task in two or more")
    first = _first(effects)
    for language, each in effects.items():
        if each.labels != first.labels or each.effects.shape != first.effects.shape:
            raise UserError(
                f"the effects in {language!r} are of {len(each.effects)} features at {', '.join(each.labels)}, those "
                f"in {next(iter(effects))!r} of {len(first.effects)} at {', '.join(first.labels)}: attribute all with "
                "one crosscoder"
            )


def _first(effects: Mapping[str, Attribution]) -> Attribution:
    return next(iter(effects.values()))


def _snapshot(effects: Mapping[str, Attribution], s: int) -> dict[str, Any]:
    first = _first(effects)
    return {"snapshot": s, "label": first.labels[s], "step": first.steps[s]}


def _tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"step": "Int64"})
