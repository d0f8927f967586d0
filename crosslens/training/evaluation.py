"""How well a crosscoder reconstructs held-out activations, and what the models lose when it is spliced in.

Per snapshot, over held-out tokens:
    explained_variance            1 - E|x_hat - x|^2 / E|x - mean x|^2  (Ge et al., arXiv 2509.17196)
    explained_variance_per_token  E[1 - |x_hat - x|^2 / |x - mean x|^2]  (Bayazit et al., arXiv 2509.05291)
    l0                            active features per token
    ce_*, kl                      cross-entropy (nats per token) of the clean model, of the model with the
                                  reconstruction at the hook point, and of the model with zeros there;
                                  KL(clean | spliced)
    ce_recovered                  1 - (ce_spliced - ce_clean) / (ce_zero - ce_clean)  (Bayazit et al.); NaN if zeros
                                  cost less than .1 nat
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from crosslens.activations.harvesting import harvest
from crosslens.activations.loader import Activations
from crosslens.activations.plan import EVALUATED_TOKENS, logit_sequences
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.parallel import ALONE, Parallel
from crosslens.intervention.splice import spliced_logits
from crosslens.printing import Result
from crosslens.progress import tqdm

MIN_ZERO_COST = 0.1  # nats; below this, ce_recovered would divide by noise


@torch.no_grad()
def reconstruction_table(crosscoder: Crosscoder, acts: Activations, parallel: Parallel = ALONE) -> pd.DataFrame:
    """Explained variance, L0 and dead features on the held-out activations, one row per snapshot.

    Args:
        crosscoder: an inference crosscoder, or one in training and in `eval()` mode, with the features of this process.
        acts: held-out activations of its snapshots.
        parallel: the processes that hold its features; all of them call this and return the same table. Processes that
            split the tokens of a training batch split these tokens, too.
    """
    S = crosscoder.n_snapshots
    n = 0
    total = torch.zeros(S, crosscoder.d_model, dtype=torch.float64)
    for x in acts.held_out():
        n += len(x)
        total += x.double().sum(0)
    mean = total / n
    error, variance, ratio, active = (torch.zeros(S, dtype=torch.float64) for _ in range(4))
    fired = torch.zeros(crosscoder.n_own)
    for x in acts.held_out():
        x = x[parallel.data_rank :: parallel.n_data_ranks].to(crosscoder.device)
        features = crosscoder.encode(x)
        squared = (crosscoder.decode(features) - x).double().square().sum(-1).cpu()
        around = (x.double().cpu() - mean).square().sum(-1)
        error += squared.sum(0)
        variance += around.sum(0)
        ratio += (squared / around).sum(0)
        for s in range(S):
            active[s] += crosscoder.snapshot_acts(features, s).count_nonzero().item()
        fired += (features != 0).any(0).cpu()
    sums = torch.stack([error, variance, ratio, active / n]).to(crosscoder.device)
    # processes with the same tokens and other features have the same errors
    error, variance, ratio, _ = parallel.sum_data_(sums.clone()).cpu()
    l0 = parallel.sum_(sums[3].clone()).cpu()
    silent = (parallel.sum_data_(fired.to(crosscoder.device)) == 0).double().sum()
    return pd.DataFrame(
        {
            **_columns(acts),
            "explained_variance": (1 - error / variance).tolist(),
            "explained_variance_per_token": (1 - ratio / n).tolist(),
            "l0": l0.tolist(),
            "dead_fraction": float(parallel.sum_features_(silent)) / crosscoder.cfg.d_sae,
        }
    )


def quick_metrics(crosscoder: Crosscoder, acts: Activations, parallel: Parallel = ALONE) -> dict[str, float]:
    """Held-out metrics by W&B name: SAELens's names, with `/<label>` for each snapshot."""
    table = reconstruction_table(crosscoder, acts, parallel)
    metrics: dict[str, float] = {"metrics/held_out/dead_fraction": float(table["dead_fraction"].iloc[0])}
    for name in ("explained_variance", "l0"):
        metrics[f"metrics/held_out/{name}"] = float(table[name].mean())
        for label, value in zip(table["label"], table[name], strict=True):
            metrics[f"metrics/held_out/{name}/{label}"] = float(value)
    return metrics


def evaluate(
    crosscoder: Crosscoder, acts: Activations, *, n_tokens: int = EVALUATED_TOKENS, parallel: Parallel = ALONE
) -> pd.DataFrame:
    """All held-out metrics, one row per snapshot.

    Args:
        crosscoder: the crosscoder; see `reconstruction_table`.
        acts: held-out activations of the snapshots it was trained on.
        n_tokens: tokens for the spliced models; reconstruction is measured on all held-out tokens.
        parallel: the processes that hold its features; all of them call this and return the same table.

    Returns:
        One row per snapshot: snapshot, label, step, tokens, explained_variance, explained_variance_per_token, l0
        (features per token), dead_fraction (fraction of features that never fire here), ce_clean, ce_spliced, ce_zero,
        kl (nats per token), ce_recovered.

    Raises:
        UserError: the activations do not fit the crosscoder, or are not finite.
    """
    table = reconstruction_table(crosscoder, acts, parallel)
    held_out = acts.held_out_tokens()
    tokens = held_out[: max(1, n_tokens // held_out.shape[1])].long()
    spliced = pd.DataFrame(splice_losses(crosscoder, acts, tokens, parallel=parallel))
    whole, F = pd.concat([table, spliced], axis=1), crosscoder.cfg.d_sae
    dead = round(float(table["dead_fraction"].iloc[0]) * F)
    return Result.of(
        whole,
        f"held-out tokens: {dead:,} of {F:,} features never fire on them",
        ["label", "explained_variance", "l0", "ce_recovered", "ce_clean", "ce_spliced"],
        f"l0: features per token; ce: nats per token, on {tokens.numel():,} tokens; ce_recovered is missing where the "
        "model predicts no better than with zeros",
    )


_ROWS = 256  # predictions whose divergence is computed at a time


@torch.no_grad()
def splice_losses(
    crosscoder: Crosscoder,
    acts: Activations,
    tokens: Int[Tensor, "N T"],
    batch_tokens: int = 4096,
    parallel: Parallel = ALONE,
) -> list[dict[str, float]]:
    """Cross-entropy and KL of clean, spliced and zeroed models, one dictionary per snapshot.

    Each process runs the models of some snapshots; all of them reconstruct together.
    """
    S, settings = crosscoder.n_snapshots, acts.settings
    keep = acts.keep(tokens)
    own = range(parallel.rank, S, parallel.n_ranks)
    x = torch.zeros(*tokens.shape, S, crosscoder.d_model)
    for s in own:
        x[:, :, s] = harvest(acts.snapshots, tokens, acts.hook_name, settings, only=s)[:, :, 0]
    step = max(1, batch_tokens // tokens.shape[1])
    for chunk in x.split(step):
        whole = parallel.sum_(chunk.to(crosscoder.device))  # each process has the activations of its own snapshots
        chunk.copy_(crosscoder.decode(crosscoder.encode(whole)))
    sums = torch.zeros(S, 4, dtype=torch.float64)
    for s in tqdm(own, desc="Cross-entropy", unit="snapshot", leave=False):
        model: Any = acts.snapshots.model(s, settings)
        few = min(step, logit_sequences(model.cfg.d_vocab, tokens.shape[1]))
        for batch, kept, decoded in zip(tokens.split(few), keep.split(few), x[:, :, s].split(few), strict=True):
            batch, kept, decoded = (part.to(settings.device) for part in (batch, kept, decoded))
            sums[s] += _losses(model, batch, kept, decoded, acts.hook_name)
    sums = parallel.sum_(sums.to(crosscoder.device)).cpu()
    rows: list[dict[str, float]] = []
    for clean, spliced, zero, kl in (sums / (tokens.shape[0] * (tokens.shape[1] - 1))).tolist():
        recovered = 1 - (spliced - clean) / (zero - clean) if zero - clean >= MIN_ZERO_COST else math.nan
        rows.append({"ce_clean": clean, "ce_spliced": spliced, "ce_zero": zero, "ce_recovered": recovered, "kl": kl})
    return rows


def _losses(
    model: Any,
    tokens: Int[Tensor, "B T"],
    keep: Bool[Tensor, "B T"],
    decoded: Float[Tensor, "B T D"],
    hook_name: str,
) -> Tensor:
    """Sums over predicted tokens of the three cross-entropies and the KL divergence."""
    sums = torch.zeros(4, dtype=torch.float64, device=tokens.device)
    # these logits are gone before the next: with a large vocabulary they are most of what evaluation holds
    zero = _predictions(tokens, spliced_logits(model, tokens, hook_name, torch.zeros_like(decoded), keep))
    sums[2] = sum(_cross_entropy(*each).double() for each in zero)
    del zero
    clean = model(tokens, return_type="logits")
    spliced = spliced_logits(model, tokens, hook_name, decoded, keep)
    for of_clean, of_spliced, target in _predictions(tokens, clean, spliced):
        sums[0] += _cross_entropy(of_clean, target)
        sums[1] += _cross_entropy(of_spliced, target)
        log_p, log_q = log_softmax(of_clean, -1), log_softmax(of_spliced, -1)
        sums[3] += (log_p.exp() * (log_p - log_q)).sum()
    return sums.cpu()


def _predictions(tokens: Int[Tensor, "B T"], *logits: Float[Tensor, "B T V"]) -> Iterator[list[Tensor]]:
    """Some rows of each of the logits at a time, in float32, and the tokens that they predict."""
    for sequence, *of_sequence in zip(tokens, *logits, strict=True):
        parts = [*(each[:-1] for each in of_sequence), sequence[1:]]
        for rows in zip(*(part.split(_ROWS) for part in parts), strict=True):
            yield [*(each.float() for each in rows[:-1]), rows[-1]]


def _cross_entropy(logits: Float[Tensor, "n V"], targets: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    return cross_entropy(logits, targets, reduction="sum")


def _columns(acts: Activations) -> dict[str, Any]:
    snapshots = acts.snapshots
    return {
        "snapshot": list(range(len(snapshots))),
        "label": snapshots.labels,
        "step": snapshots.steps,
        "tokens": snapshots.tokens,
    }
