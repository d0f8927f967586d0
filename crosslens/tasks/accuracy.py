"""How often each snapshot prefers the correct answer, with binomial intervals, and which items were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.distributed.together import each
from crosslens.errors import UserError
from crosslens.printing import Result
from crosslens.snapshots.bridge import last_position
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.stats import wilson_interval
from crosslens.tasks.prompts import AnswerBatch, Answers, PromptBatch, Prompts, logit_difference, summed_log_probability

CHANCE = 0.5
# what would keep items that are left out, by a part of the reason
_KEEPS = {
    "same prompt": "give sentences that differ before their answers",
    "exactly one token": "give answers of one token, or answers='multi', which only accuracy reads",
    "longer than": "shorten their prompts",
    "unknown to the tokenizer": "use words that the tokenizer knows",
    "beginning of the other": "add what follows the answers, such as a full stop",
}
MIN_ITEMS = 20  # a task with fewer usable items is marked, and left out of means over tasks


@torch.no_grad()
def accuracy_table(
    name: str,
    snapshots: Snapshots,
    prompts: Prompts | Answers,
    batch_size: int,
    settings: ModelSettings,
    merged: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """The table of `Task.accuracy`.

    Raises:
        UserError: a snapshot has non-finite logits.
    """
    batches: Sequence[PromptBatch | AnswerBatch] = list(prompts.batches(batch_size))
    n = len(prompts)

    def measure_at(s: int) -> dict[str, float]:
        model = snapshots.model(s, settings)
        metric = _metric(model, batches, len(prompts.items), settings.device)[[each.item for each in prompts.usable]]
        if not torch.isfinite(metric).all():
            raise UserError(
                f"snapshot {snapshots.labels[s]} has non-finite logits on task {name!r}: leave this snapshot out, "
                "or check its weights"
            )
        right = float((metric > 0).sum() + 0.5 * (metric == 0).sum())
        low, high = wilson_interval(right, n)
        return {
            "accuracy": right / n,
            "accuracy_low": low,
            "accuracy_high": high,
            "at_chance": low <= CHANCE <= high,
            "metric": float(metric.mean()),
            "n": n,
        }

    rows = each(measure_at, range(len(snapshots)), f"Accuracy on {name}")
    where = {
        "task": [name] * len(snapshots),
        "snapshot": range(len(snapshots)),
        "label": snapshots.labels,
        "step": pd.array(snapshots.steps, dtype="Int64"),
        "tokens": pd.array(snapshots.tokens, dtype="Int64"),
    }
    table = pd.concat([pd.DataFrame(where), pd.DataFrame(rows)], axis=1)
    merged = merged or {}
    table = table.assign(
        few=n < MIN_ITEMS,
        skipped=sum(prompts.skipped.values()),
        reasons=list_counts(prompts.skipped, prompts.examples),
        merged=sum(merged.values()),
        merged_reasons=list_counts(merged),
    )
    columns = ["label", "accuracy", "accuracy_low", "accuracy_high", "metric", "at_chance"]
    note = f"95% intervals; of the {n} items used; metric: mean logit difference"
    return Result.of(table, describe_items(table), columns, note)


def list_counts(counts: Mapping[str, int], examples: Mapping[str, str] | None = None) -> str:
    """Reasons with their counts, the most frequent first: "too long: 3, unknown: 1"; a single one without its count.

    Args:
        counts: by reason.
        examples: of some reasons.
    """
    told = {reason: f"{reason}, such as {example}" for reason, example in (examples or {}).items()}
    ordered = sorted(counts.items(), key=lambda entry: -entry[1])
    return ", ".join(told.get(reason, reason) + f": {n}" * (len(counts) > 1) for reason, n in ordered)


def describe_items(table: pd.DataFrame) -> str:
    """How many items of a task are used, why others are left out, and what would keep them.

    Args:
        table: from `Task.accuracy`, of one task.
    """
    first = table.iloc[0]
    left_out = [
        f"{first[name]} {name} ({first[reasons]})"
        for name, reasons in (("merged", "merged_reasons"), ("skipped", "reasons"))
        if first[name]
    ]
    why = f"{first['merged_reasons']} {first['reasons']}"
    keeps = [words for reason, words in _KEEPS.items() if reason in why]
    few = f"; fewer than {MIN_ITEMS}, so means over tasks leave it out" if first["few"] else ""
    total = first["n"] + first["merged"] + first["skipped"]
    of = f" of {total}" if left_out else ""
    used = f"{first['task']}: {first['n']}{of} items" + "".join(f", {part}" for part in left_out) + few
    return f"{used}. To keep more: {'; '.join(keeps)}" if keeps else used


def describe_accuracy(table: pd.DataFrame) -> list[str]:
    """Lines for a terminal: what was left out of a task, and its accuracy at every snapshot.

    Args:
        table: from `Task.accuracy`, of one task.
    """
    lines = [describe_items(table)]
    for row in table.to_dict("records"):
        chance = ", at chance" if row["at_chance"] else ""
        interval = f"[{row['accuracy_low']:.1%}, {row['accuracy_high']:.1%}]"
        lines.append(f"{row['label']:>12}  accuracy {row['accuracy']:.1%} {interval}{chance}")
    return lines


def _metric(
    model: Any, batches: Sequence[PromptBatch | AnswerBatch], n_items: int, device: str
) -> Float[Tensor, " items"]:
    """The metric of every item; 0 for items in no batch."""
    metric = torch.zeros(n_items, dtype=torch.float64)
    last = last_position(model)
    for batch in batches:
        options = last if isinstance(batch, PromptBatch) else {}
        logits = model(batch.tokens.to(device), return_type="logits", **options)
        if isinstance(batch, PromptBatch):
            metric[batch.index] = logit_difference(logits[:, -1].float(), batch).double().cpu()
        else:
            scores = summed_log_probability(logits, batch).cpu()
            # an item has one string of each kind, so no index is repeated in either sum
            for kind, sign in ((batch.correct, 1), (~batch.correct, -1)):
                metric[batch.index[kind]] += sign * scores[kind]
    return metric
