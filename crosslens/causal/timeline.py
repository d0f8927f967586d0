"""A task's features over the snapshots: when each matters, how much, with which sign, and where it fires.

1. At every snapshot, select the k features with the largest significant effect.
2. Follow every feature that was selected at any snapshot over all of them: decoder norm, signed effect, RelIE.
3. Order them by when they matter, the centre of mass of share RelIE over the snapshots: features that the task stops
   using come first, features that it starts to use come last.
4. `find_examples` lists where in the task's prompts a feature is most active.

`late_feature` and `sign_change` each pick the one feature of several tasks that best shows the effect. A timeline says
which features matter when, not how they act on one another. Selection and order of features are new here.

Symbols: B prompts, T positions, S snapshots, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.causal.ablation import check_effects
from crosslens.causal.attribution import Attribution
from crosslens.causal.relative import classify, relie, share_relie, significant
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.lifecycles import relative_norms
from crosslens.intervention.prompt_runs import PromptRuns, check_features, on_runs

SEPARATOR = " | "  # between the examples of a feature


@on_runs
def follow_features(
    runs: PromptRuns,
    ie: Attribution,
    k: int = 5,
    *,
    by: str = "magnitude",
    min_effect: float | None = None,
    n_examples: int = 3,
) -> pd.DataFrame:
    """The k features with the largest effect at each snapshot, followed over all snapshots.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place. They are only used for examples.
        ie: effects on the task.
        k: features taken from each snapshot.
        by: what ranks them: "magnitude", "signed" (the most helpful) or "negative" (the most harmful ones).
        min_effect: a feature is selected only where its effect counts, see `relative.significant` (with a single
            prompt none is significant, and nothing is selected).
        n_examples: examples of each feature; 0 runs no model.

    Returns:
        A row per feature and snapshot, empty if no effect is large enough: order (0 is the feature that matters first),
        feature, snapshot, label, step; norm (of the decoder), strength (norm / its largest), ie and ie_se (logits),
        share_relie, relie, rank (of |IE| at this snapshot, 1 the largest, missing where the feature is not active), top
        (selected at this snapshot); and per feature class and signed_class (as in `classify`), centre_of_mass,
        examples.

    Raises:
        UserError: a single snapshot, effects of another crosscoder, k larger than the active features, a crosscoder of
            other snapshots.
    """
    if n_examples < 0:
        raise UserError(f"n_examples={n_examples} must be at least 0")
    check_effects(runs, ie)
    crosscoder, snapshots = runs.crosscoder, runs.snapshots
    counts = significant(ie, min_effect)
    selected = torch.zeros_like(ie.active)
    for s in range(len(snapshots)):
        selected[ie.top(k, s, by), s] = True
    # fewer than k features may be helpful, or harmful
    selected &= counts & ({"signed": ie.effects, "negative": -ie.effects}.get(by, ie.effects.abs()) > 0)
    courses = classify(ie, min_effect).sort_values("centre_of_mass", kind="stable", ignore_index=True)
    courses = courses.loc[selected.any(-1).numpy()[courses["feature"]]]
    features = torch.tensor(courses["feature"].to_numpy(), dtype=torch.long)
    norms = crosscoder.decoder_norms.detach().cpu().float()
    S = len(snapshots)
    columns = {
        "norm": norms,
        "strength": relative_norms(norms).float(),
        "ie": ie.effects,
        "ie_se": ie.standard_errors,
        "share_relie": share_relie(ie, min_effect),
        "relie": relie(ie, min_effect),
        "rank": _ranks(ie),
        "top": selected,
    }
    table = pd.DataFrame(
        {
            "order": torch.arange(len(features)).repeat_interleave(S).numpy(),
            "feature": features.repeat_interleave(S).numpy(),
            "snapshot": torch.arange(S).repeat(len(features)).numpy(),
            "label": snapshots.labels * len(features),
            "step": pd.array(snapshots.steps * len(features), dtype="Int64"),
            **{name: values[features].flatten().numpy() for name, values in columns.items()},
        }
    ).astype({"rank": "Int64"})
    table["rank"] = table["rank"].where(table["rank"] > 0)
    for name in ("class", "signed_class", "centre_of_mass"):
        table[name] = courses[name].to_numpy().repeat(S)
    if not n_examples or table.empty:
        return table.assign(examples="")
    found = find_examples(runs, features, n_examples).groupby("feature")["text"].agg(SEPARATOR.join)
    return table.assign(examples=table["feature"].map(found).fillna(""))


@on_runs
def find_examples(runs: PromptRuns, features: Sequence[int] | Int[Tensor, " n"], n: int = 5) -> pd.DataFrame:
    """Where features are most active on the prompts of a task, by their activation f_i, which the snapshots share.

    Activations do not depend on what follows a position, so prompts that begin with the same words count once.

    Args:
        runs: clean runs of a task; or crosscoder, snapshots and task in its place.
        features: ids.
        n: positions per feature; fewer if it is active at fewer.

    Returns:
        A row per example: feature, rank (0 the strongest), activation, item (index in the task of one prompt that
        begins like this), position (BOS is 0), from_end (0 is the last), token, text (up to the token, in brackets).

    Raises:
        UserError: a feature that the crosscoder does not have, or n below 1.
    """
    ids = check_features(features, runs.crosscoder.cfg.d_sae)
    if n < 1:
        raise UserError(f"n={n} must be at least 1")
    tokenizer = runs.snapshots.tokenizer
    rows: list[dict[str, Any]] = []
    seen: set[tuple[int, ...]] = set()
    for batch, run, _ in runs.clean():
        values = run.features[..., ids.to(run.features.device)].cpu() * _new_beginnings(batch.tokens, seen)[..., None]
        T = values.shape[1]
        largest, places = values.flatten(0, 1).topk(min(n, values[..., 0].numel()), dim=0)
        for i, feature in enumerate(ids.tolist()):
            for activation, place in zip(largest[:, i].tolist(), places[:, i].tolist(), strict=True):
                row, position = divmod(place, T)
                beginning = batch.tokens[row, : position + 1].tolist()
                if activation > 0:
                    rows.append(
                        {
                            "feature": feature,
                            "activation": activation,
                            "item": int(batch.index[row]),
                            "position": position,
                            "from_end": T - 1 - position,
                            "token": tokenizer.convert_ids_to_tokens(beginning[-1]),
                            "text": _in_brackets(tokenizer, beginning),
                        }
                    )
    place_of = {feature: i for i, feature in enumerate(ids.tolist())}
    rows.sort(key=lambda row: (place_of[row["feature"]], -row["activation"]))
    columns = ["feature", "activation", "item", "position", "from_end", "token", "text"]
    table = pd.DataFrame(rows, columns=pd.Index(columns))
    table.insert(1, "rank", table.groupby("feature").cumcount())
    return table.loc[table["rank"] < n].reset_index(drop=True)


def _ranks(ie: Attribution) -> Int[Tensor, "F S"]:
    """Rank of |IE| among the active features of each snapshot, 1 the largest; 0 where a feature is not active."""
    sizes = ie.effects.abs().masked_fill(~ie.active, -1.0)
    ranks = sizes.argsort(dim=0, descending=True, stable=True).argsort(dim=0) + 1
    return torch.where(ie.active, ranks, 0)


def _new_beginnings(tokens: Int[Tensor, "B T"], seen: set[tuple[int, ...]]) -> Bool[Tensor, "B T"]:
    """Positions up to which no earlier prompt has the same tokens; `seen` collects the new beginnings."""
    new = torch.zeros(tokens.shape, dtype=torch.bool)
    for b, prompt in enumerate(tokens.tolist()):
        for t in range(len(prompt)):
            beginning = tuple(prompt[: t + 1])
            new[b, t] = beginning not in seen
            seen.add(beginning)
    return new


def _in_brackets(tokenizer: Any, tokens: list[int]) -> str:
    """Decode tokens without special ones, the last in brackets."""

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = text(tokens[:-1]), text(tokens)
    last = whole[len(before) :] if whole.startswith(before) and whole != before else text(tokens[-1:])
    word = last.strip()
    if not word:
        # a special token, or white space
        return f"{before} [{tokenizer.convert_ids_to_tokens(tokens[-1])}]".strip()
    return f"{before}{last[: len(last) - len(last.lstrip())]}[{word}]"


def late_feature(effects: Iterable[Attribution]) -> dict[str, Any]:
    """Among features that carry a tenth of a task's metric at the last snapshot, that with the latest share RelIE."""
    found: list[dict[str, Any]] = []
    for ie in effects:
        share = share_relie(ie)
        S = share.shape[1]
        top = ie.top(min(15, int(ie.active[:, -1].sum())), S - 1)
        carried = ie.effects[top, -1] >= 0.1 * ie.metric_clean[-1]
        top = top[carried] if carried.any() else top[:1]
        centre = (share[top] * torch.arange(S) / (S - 1)).sum(-1).nan_to_num(0.0)
        feature = int(top[centre.argmax()])
        found.append(_finding(ie, feature, centre_of_mass=float(centre.max())))
    return max(found, key=lambda finding: finding["centre_of_mass"])


def sign_change(effects: Iterable[Attribution]) -> dict[str, Any]:
    """The feature with the largest significant change of sign: harmful at one snapshot, helpful at another."""
    found: list[dict[str, Any]] = []
    for ie in effects:
        counted = torch.where(significant(ie), ie.effects, torch.zeros_like(ie.effects))
        swing = torch.minimum(counted.amax(1), -counted.amin(1))
        found.append(_finding(ie, int(swing.argmax()), swing=float(swing.max())))
    return max(found, key=lambda finding: finding["swing"])


@torch.no_grad()
def top_examples(crosscoder: Crosscoder, acts: Activations, feature: int, n: int = 8) -> list[str]:
    """Where a feature is most active in the held-out text: up to six words, the last in brackets."""
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
        "share_relie": [round(v, 4) for v in share_relie(ie)[feature].tolist()],
        "relie": [round(v, 4) for v in relie(ie)[feature].tolist()],
    }
