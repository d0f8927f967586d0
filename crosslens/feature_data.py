"""What there is to see of each feature, as one JSON file that any viewer can read: examples, logit lens, densities.

    {"format": "crosslens-features/1",
     "crosscoder": {"architecture", "d_sae", "d_model", "model_name", "hook_name"},
     "data": {"dataset", "context_size", "tokens"},         tokens: number that the densities are of
     "snapshots": [{"label", "step", "tokens"}, ...],        step and tokens may be null
     "features": [
       {"feature": 17,
        "density": [S],              share of the tokens on which it is active, at each snapshot
        "decoder_norm": [S],         in the normalised space
        "max_activation": 3.2,       over those tokens
        "examples": [                the strongest first, one of each sequence
          {"sequence": 5, "position": 12,                    of the held-out sequences; BOS is position 0
           "tokens": ["the", ...], "activations": [0.0, ...],  around it
           "peak": 8}],                                      place of the activation in the two lists
        "logit_lens": [              of each snapshot
          {"positive": [["sleeps", 0.31], ...], "negative": [["sleep", -0.28], ...]}]}]}

The logit lens of a feature at a snapshot is what its decoder row adds to the logits when nothing lies between the hook
point and the unembedding: `W_U^T (g * (w - mean w))`, w the row in raw space, g the weight of the final norm, whose
division by the norm of the whole residual is left out (RMSNorm does not subtract the mean); the mean over the
vocabulary is subtracted, for it changes no probability.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from crosslens.activations import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention import check_snapshots

FORMAT = "crosslens-features/1"
_DIGITS = 5


@torch.no_grad()
def export_features(
    crosscoder: Crosscoder,
    acts: Activations,
    path: str | Path,
    *,
    features: Sequence[int] | None = None,
    n_examples: int = 10,
    window: int = 8,
    n_logits: int = 10,
) -> Path:
    """Write the data of features, in the schema of this module's docstring.

    Args:
        crosscoder: the crosscoder.
        acts: activations of the snapshots it was trained on; the held-out tokens are used.
        path: of the JSON file.
        features: ids; all when None.
        n_examples: strongest positions of each feature, at most one of a sequence.
        window: tokens shown on each side of an example.
        n_logits: tokens at either end of the logit lens.

    Returns:
        The path.

    Raises:
        UserError: a crosscoder of other snapshots, a feature that it does not have, or a number below 0.
    """
    check_snapshots(crosscoder, acts.snapshots)
    for name, value in (("n_examples", n_examples), ("window", window), ("n_logits", n_logits)):
        if value < 0:
            raise UserError(f"{name}={value} must be 0 or more")
    F = crosscoder.cfg.d_sae
    ids = list(range(F)) if features is None else [int(feature) for feature in features]
    if wrong := [feature for feature in ids if not 0 <= feature < F]:
        raise UserError(f"feature {wrong[0]} is not in [0, {F - 1}], the features of this crosscoder")
    index = torch.tensor(ids, dtype=torch.long)
    tokens = acts.held_out_tokens()
    values, density = held_out_features(crosscoder, acts, index)
    lenses = [logit_lens(crosscoder, acts, s, index, n_logits) for s in range(crosscoder.n_snapshots)]
    norms = crosscoder.decoder_norms[index.to(crosscoder.device)].cpu()
    words = acts.snapshots.tokenizer.convert_ids_to_tokens
    table = [
        {
            "feature": feature,
            "density": _rounded(density[i]),
            "decoder_norm": _rounded(norms[i]),
            "max_activation": round(float(values[..., i].max()), _DIGITS),
            "examples": find_windows(tokens, values[..., i], n_examples, window, words),
            "logit_lens": [lens[i] for lens in lenses],
        }
        for i, feature in enumerate(ids)
    ]
    metadata = acts.metadata()
    contents = {
        "format": FORMAT,
        "crosscoder": {
            "architecture": crosscoder.cfg.architecture(),
            "d_sae": F,
            "d_model": crosscoder.d_model,
            "model_name": metadata["model_name"],
            "hook_name": metadata["hook_name"],
        },
        "data": {
            "dataset": metadata["dataset_path"],
            "context_size": metadata["context_size"],
            "tokens": int(acts.keep(tokens).sum()),
        },
        "snapshots": [{"label": s.label, "step": s.step, "tokens": s.tokens} for s in acts.snapshots],
        "features": table,
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".tmp")
    partial.write_text(json.dumps(contents, allow_nan=False, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, target)
    return target


def held_out_features(
    crosscoder: Crosscoder, acts: Activations, index: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "N T n"], Float[Tensor, "n S"]]:
    """Values f_i on the held-out sequences, 0 at positions that are left out, and densities at each snapshot."""
    tokens = acts.held_out_tokens()
    first, step = len(acts.tokens) - len(tokens), acts.block_sequences
    fired = torch.zeros(len(index), crosscoder.n_snapshots)
    blocks: list[Tensor] = []
    for begin in tqdm(range(first, len(acts.tokens), step), desc="Features", unit="block", leave=False):
        end = min(begin + step, len(acts.tokens))
        keep = acts.keep(acts.tokens[begin:end])[..., None]
        encoded = crosscoder.encode(acts.block(begin, end).to(crosscoder.device))
        for s in range(crosscoder.n_snapshots):
            active = crosscoder.snapshot_acts(encoded, s)[..., index.to(encoded.device)].cpu() != 0
            fired[:, s] += (active & keep).sum((0, 1))
        blocks.append(encoded[..., index.to(encoded.device)].cpu().float() * keep)
    return torch.cat(blocks), fired / max(1, int(acts.keep(tokens).sum()))


def logit_lens(
    crosscoder: Crosscoder, acts: Activations, s: int, index: Int[Tensor, " n"], n: int
) -> list[dict[str, list[list[Any]]]]:
    """Tokens that the decoder rows of one snapshot write to most, and against most."""
    model = acts.snapshots.model(s, device=acts.device, backend=acts.backend)
    logits = direct_logits(model, crosscoder.W_dec_by_snapshot[index.to(crosscoder.device), s].to(acts.device))
    logits = logits / crosscoder.activation_scale[s].to(logits.device)
    # rows of the unembedding beyond the tokenizer are padding, and no token
    words = acts.snapshots.tokenizer.convert_ids_to_tokens
    logits = logits[:, : len(acts.snapshots.tokenizer)].cpu()
    n = min(n, logits.shape[1])
    lens: list[dict[str, list[list[Any]]]] = []
    for row in logits:
        ends = {"positive": row.topk(n), "negative": (-row).topk(n)}
        lens.append(
            {
                side: [[words(t), round(float(row[t]), _DIGITS)] for t in found.indices.tolist()]
                for side, found in ends.items()
            }
        )
    return lens


def direct_logits(model: Any, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
    """What rows of the residual stream add to the logits but for the norm of the whole, centred over the vocabulary."""
    if "RMS" not in str(model.cfg.normalization_type):
        rows = rows - rows.mean(-1, keepdim=True)
    logits = (rows.float() * model.ln_final.w.float()) @ model.W_U.float()
    return logits - logits.mean(-1, keepdim=True)


def find_windows(
    tokens: Int[Tensor, "N T"], values: Float[Tensor, "N T"], n: int, window: int, words: Any
) -> list[dict[str, Any]]:
    """The strongest positions of a feature, of each sequence the strongest, with the tokens around them."""
    best, places = values.max(-1)
    examples: list[dict[str, Any]] = []
    for sequence in best.argsort(descending=True, stable=True)[:n].tolist():
        if best[sequence] <= 0:
            break
        position = int(places[sequence])
        begin, end = max(0, position - window), min(tokens.shape[1], position + window + 1)
        examples.append(
            {
                "sequence": sequence,
                "position": position,
                "tokens": words(tokens[sequence, begin:end].tolist()),
                "activations": _rounded(values[sequence, begin:end]),
                "peak": position - begin,
            }
        )
    return examples


def _rounded(values: Float[Tensor, " n"]) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]
