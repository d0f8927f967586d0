"""How often each snapshot prefers the correct answer, with binomial intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import norm
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.tasks.prompts import AnswerBatch, Answers, PromptBatch, Prompts, logit_difference, summed_log_probability


def wilson_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion; `successes` may be fractional, because a tie counts as half."""
    z = float(norm.ppf((1 + level) / 2))
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def accuracy_table(
    name: str, snapshots: Snapshots, prompts: Prompts | Answers, batch_size: int, settings: ModelSettings
) -> pd.DataFrame:
    """The table of `Task.accuracy`.

    Raises:
        UserError: a snapshot has non-finite logits.
    """
    batches: Sequence[PromptBatch | AnswerBatch] = list(prompts.batches(batch_size))
    n = len(prompts)
    rows: list[dict[str, float]] = []
    for s in tqdm(range(len(snapshots)), desc=f"Accuracy on {name}", unit="snapshot", leave=False):
        model = snapshots.model(s, settings)
        metric = _metric(model, batches, len(prompts.items), settings.device)[[each.item for each in prompts.usable]]
        if not torch.isfinite(metric).all():
            raise UserError(
                f"snapshot {snapshots.labels[s]} has non-finite logits on task {name!r}: leave this snapshot out, "
                "or check its weights"
            )
        right = float((metric > 0).sum() + 0.5 * (metric == 0).sum())
        low, high = wilson_interval(right, n)
        rows.append({"accuracy": right / n, "low": low, "high": high, "metric": float(metric.mean()), "n": n})
    where = {
        "task": [name] * len(snapshots),
        "snapshot": range(len(snapshots)),
        "label": snapshots.labels,
        "step": pd.array(snapshots.steps, dtype="Int64"),
        "tokens": pd.array(snapshots.tokens, dtype="Int64"),
    }
    table = pd.concat([pd.DataFrame(where), pd.DataFrame(rows)], axis=1)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in prompts.skipped.most_common())
    return table.assign(skipped=sum(prompts.skipped.values()), reasons=reasons)


def _metric(
    model: Any, batches: Sequence[PromptBatch | AnswerBatch], n_items: int, device: str
) -> Float[Tensor, " items"]:
    """The metric of every item; 0 for items in no batch."""
    metric = torch.zeros(n_items, dtype=torch.float64)
    for batch in batches:
        logits = model(batch.tokens.to(device), return_type="logits")
        if isinstance(batch, PromptBatch):
            metric[batch.index] = logit_difference(logits[:, -1].float(), batch).double().cpu()
        else:
            scores = summed_log_probability(logits, batch).cpu()
            # an item has one string of each kind, so no index is repeated in either sum
            for kind, sign in ((batch.correct, 1), (~batch.correct, -1)):
                metric[batch.index[kind]] += sign * scores[kind]
    return metric
