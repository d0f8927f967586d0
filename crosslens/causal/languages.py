"""Features shared between languages: how far the top features of the same task overlap, compared with chance.

The same task in several languages gives one `Attribution` per language, all of one crosscoder. At every snapshot the
set of a language is its k features with the largest effect (without those that have no effect, or none of the requested
sign). A feature *serves* the languages whose sets contain it. Bayazit et al. (arXiv 2509.05291) count shared features
without a comparison with chance.

Sets also overlap by chance: the more so the fewer features are active on the prompts, and because a feature that is
large in one language (mean activation times decoder norm) tends to be large, and so to have a large effect, in the
other. The null model redraws the set of every language: each feature is replaced by one of the `ablation.NEIGHBOURS`
active features nearest in size in that language, itself included, and none is drawn twice.

1. `compare_languages`, for two languages: the features active in both are redrawn among themselves. Features that are
   active in one language only cannot be shared and do not count.
2. `count_languages`, for features that serve exactly m languages: each set is redrawn among all features active in its
   language.

The null model is new here.

    parts = split_languages(Task.demo("pp"))
    effects = {language: attribute(cc, snaps, part) for language, part in parts.items()}
    compare_languages(effects, k=10)

Symbols: L languages, S snapshots, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslens.causal.ablation import size_matched
from crosslens.causal.attribution import Attribution
from crosslens.causal.relative import check_level
from crosslens.errors import UserError
from crosslens.stats import interval
from crosslens.tasks.task import Task


def split_languages(task: Task) -> dict[str, Task]:
    """Split `task` by `item.info["language"]`, in order of first appearance; empty if any item lacks it."""
    named = [item.info.get("language") for item in task.items]
    if None in named:
        return {}
    return {
        language: replace(
            task,
            name=f"{task.name}-{language}",
            items=tuple(item for item, own in zip(task.items, named, strict=True) if own == language),
            duplicates=0,
            same_prompt=0,
        )
        for language in dict.fromkeys(str(name) for name in named)
    }


def compare_languages(
    effects: Mapping[str, Attribution],
    k: int = 10,
    *,
    by: str = "magnitude",
    level: float = 0.95,
    n_draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """How far the top features of languages overlap, beside chance: a row per snapshot and pair of languages.

    Args:
        effects: effects of one crosscoder on the same task, by language.
        k: features in the set of a language.
        by: what ranks them: "magnitude", "signed" (the most helpful) or "negative" (the most harmful).
        level: confidence level of the chance interval.
        n_draws: sets of features of the same sizes drawn per language.
        seed: seed for the draws.

    Returns:
        snapshot, label, step, language, other, k; n and n_other (features in the sets, fewer than k if the others have
        no effect), shared (in both), same_sign (of these, with effects of one sign), jaccard (shared / in either);
        candidates (features active in both languages), in_candidates and other_in_candidates (of the two sets);
        expected (mean overlap of size-matched sets), low and high (its central `level`), level, p (probability of an
        overlap at least as large by chance, of this row alone), expected_jaccard (mean by chance) and n_draws.

    Raises:
        UserError: fewer than two languages, effects of different crosscoders or snapshots, a k larger than the active
            features, an unknown `by`, a level outside (0, 1).
    """
    check_level(level)
    sets = _sets(effects, k, by)
    rows: list[dict[str, Any]] = []
    for s in range(len(_first(effects).labels)):
        for one, other in combinations(effects, 2):
            a, b = sets[one][:, s], sets[other][:, s]
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
                    **_by_chance(
                        (a, b),
                        [effects[name].sizes[:, s] for name in (one, other)],
                        candidates,
                        level,
                        n_draws,
                        (seed, s),
                    ),
                }
            )
    return _tidy(rows)


def count_languages(
    effects: Mapping[str, Attribution], k: int = 10, *, by: str = "magnitude", n_draws: int = 500, seed: int = 0
) -> pd.DataFrame:
    """How many features serve one language, two, ..., all: a row per snapshot and number of languages.

    Args:
        effects: effects of one crosscoder on the same task, by language.
        k: features in the set of a language.
        by: what ranks them, as in `compare_languages`.
        n_draws: sets of features of the same sizes drawn per language.
        seed: seed for the draws.

    Returns:
        snapshot, label, step, k, n_languages (1 to L), features (that serve exactly this many), share (of the features
        that serve any), expected (mean number by chance).

    Raises:
        UserError: as `compare_languages`.
    """
    sets = _sets(effects, k, by)
    rows: list[dict[str, Any]] = []
    for s in range(len(_first(effects).labels)):
        in_set = torch.stack([mask[:, s] for mask in sets.values()], -1)
        counts = in_set.sum(-1).bincount(minlength=len(effects) + 1)
        drawn = torch.zeros(n_draws, len(in_set), dtype=torch.long)
        for i, each in enumerate(effects.values()):
            rng = np.random.default_rng((seed, s, i))
            drawn += _redrawn(in_set[:, i], each.active[:, s], each.sizes[:, s], n_draws, rng)
        expected = [float((drawn == m).sum(-1).double().mean()) for m in range(len(effects) + 1)]
        rows += [
            {
                **_snapshot(effects, s),
                "k": k,
                "n_languages": m,
                "features": int(counts[m]),
                "share": float(counts[m] / counts[1:].sum()) if counts[1:].any() else np.nan,
                "expected": expected[m],
            }
            for m in range(1, len(effects) + 1)
        ]
    return _tidy(rows)


def _sets(effects: Mapping[str, Attribution], k: int, by: str) -> dict[str, Bool[Tensor, "F S"]]:
    """The set of every language at every snapshot."""
    _check(effects)
    sets: dict[str, Tensor] = {}
    for language, each in effects.items():
        mask = torch.zeros_like(each.active)
        for s in range(len(each.labels)):
            mask[each.top(k, s, by), s] = True
        # fewer than k features may have an effect of the requested sign
        sets[language] = mask & ({"signed": each.effects, "negative": -each.effects}.get(by, each.effects.abs()) > 0)
    return sets


def _redrawn(
    chosen: Bool[Tensor, " F"],
    candidates: Bool[Tensor, " F"],
    sizes: Float[Tensor, " F"],
    n_draws: int,
    rng: np.random.Generator,
) -> Bool[Tensor, "n F"]:
    """Sets in which each chosen candidate is replaced by a candidate of about its size."""
    drawn = torch.zeros(n_draws, len(chosen), dtype=torch.bool)
    top, pool = ((mask & candidates).nonzero().flatten() for mask in (chosen, candidates))
    return drawn.scatter_(1, size_matched(top, pool, sizes, n_draws, rng), True) if len(top) else drawn


def _by_chance(
    sets: tuple[Bool[Tensor, " F"], Bool[Tensor, " F"]],
    sizes: Sequence[Float[Tensor, " F"]],
    candidates: Bool[Tensor, " F"],
    level: float,
    n_draws: int,
    seed: tuple[int, int],
) -> dict[str, float]:
    a, b = sets
    shared, either = int((a & b).sum()), int((a | b).sum())
    one, other = (
        _redrawn(chosen, candidates, size, n_draws, np.random.default_rng((*seed, i)))
        for i, (chosen, size) in enumerate(zip(sets, sizes, strict=True))
    )
    overlap = (one & other).sum(-1).double()
    low, high = interval(overlap, level)
    united = (int(a.sum()) + int(b.sum()) - overlap).clamp_min(1)  # 1 where both sets are empty
    return {
        "jaccard": shared / either if either else float("nan"),
        "candidates": int(candidates.sum()),
        "in_candidates": int((a & candidates).sum()),
        "other_in_candidates": int((b & candidates).sum()),
        "expected": float(overlap.mean()),
        "expected_low": float(low),
        "expected_high": float(high),
        "level": level,
        "p": (1 + int((overlap >= shared).sum())) / (1 + n_draws),
        "expected_jaccard": float((overlap / united).mean()) if either else float("nan"),
        "n_draws": n_draws,
    }


def _check(effects: Mapping[str, Attribution]) -> None:
    if len(effects) < 2:
        raise UserError(f"effects of {len(effects)} language(s) are given: give those on the same task in two or more")
    first = _first(effects)
    for language, each in effects.items():
        if each.labels != first.labels or each.effects.shape != first.effects.shape:
            raise UserError(
                f"the effects in {language!r} cover {len(each.effects)} features at {', '.join(each.labels)}, those "
                f"in {next(iter(effects))!r} cover {len(first.effects)} at {', '.join(first.labels)}: attribute all "
                "with one crosscoder"
            )


def _first(effects: Mapping[str, Attribution]) -> Attribution:
    return next(iter(effects.values()))


def _snapshot(effects: Mapping[str, Attribution], s: int) -> dict[str, Any]:
    first = _first(effects)
    return {"snapshot": s, "label": first.labels[s], "step": first.steps[s]}


def _tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).astype({"step": "Int64"})
