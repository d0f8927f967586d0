"""Describe each feature by its examples, logit lens, densities and nearest features.

`feature_tables` returns tables, which the report shows; `export_features` writes one JSON file for other viewers:

    {"format": "crosslens-features/1",
     "crosscoder": {"architecture", "d_sae", "d_model", "model_name", "hook_name"},
     "data": {"dataset", "context_size", "tokens"},         tokens: how many the densities refer to
     "snapshots": [{"label", "step", "tokens"}, ...],        step and tokens may be null
     "features": [
       {"feature": 17,
        "density": [S],              share of tokens on which it is active, at each snapshot
        "decoder_norm": [S],         in the scaled space
        "max_activation": 3.2,       over these tokens
        "examples": [                strongest first, at most one per sequence
          {"sequence": 5, "position": 12,                    of the held-out sequences; BOS is position 0
           "tokens": ["the", ...], "activations": [0.0, ...],  in a window around it
           "peak": 8}],                                      index of the example in the two lists
        "logit_lens": [              one per snapshot
          {"positive": [["sleeps", 0.31], ...], "negative": [["sleep", -0.28], ...]}]}]}

The logit lens of a feature at a snapshot is the direct effect of its decoder row on the logits, ignoring all blocks
above the hook point: `W_U^T (g * (w - mean w))` with w the row in raw space and g the weight of the final norm (RMSNorm
does not subtract the mean). The final norm's division by the norm of the residual is left out, and the mean over the
vocabulary is subtracted, since it does not change probabilities. The schema and this form of the lens are
new here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.distributed.together import each, rank_and_size
from crosslens.errors import UserError
from crosslens.evolution.columns import snapshot_columns
from crosslens.evolution.held_out import check_activations
from crosslens.features.activations import ActivationSample
from crosslens.features.examples import Examples, collect_examples
from crosslens.features.passages import PassageSampler, passage_tables
from crosslens.rundir import write_text
from crosslens.snapshots.checks import check_snapshots

FORMAT = "crosslens-features/1"
_DIGITS = 5
_ENTRIES = 1 << 24  # logits, or cosines, at a time


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
    """Write features to a JSON file with the schema in this module's docstring.

    Args:
        crosscoder: any.
        acts: activations of the snapshots it was trained on; the held-out tokens are used.
        path: path of the JSON file.
        features: indices; all if None.
        n_examples: strongest positions per feature, at most one per sequence.
        window: tokens on each side of an example.
        n_logits: tokens at either end of the logit lens.

    Returns:
        The path.

    Raises:
        UserError: activations of other snapshots, an unknown feature, or a number below 0.
    """
    check_snapshots(crosscoder, acts.snapshots)
    _check_sizes(n_examples=n_examples, window=window, n_logits=n_logits)
    F = crosscoder.cfg.d_sae
    ids = list(range(F)) if features is None else [int(feature) for feature in features]
    if wrong := [feature for feature in ids if not 0 <= feature < F]:
        raise UserError(f"feature {wrong[0]} is not in [0, {F - 1}], the range of this crosscoder's features")
    index = torch.tensor(ids, dtype=torch.long)
    tokens = acts.held_out_tokens()
    examples, density, highest = collect_examples(crosscoder, acts, index, n_examples, window)
    lens_ids, lens_logits = logit_lens(crosscoder, acts, index, n_logits)
    texts = token_texts(acts.snapshots.tokenizer, torch.cat([tokens.flatten(), lens_ids.flatten()]).unique().tolist())
    norms = crosscoder.decoder_norms[index.to(crosscoder.device)].cpu()
    table = [
        {
            "feature": feature,
            "density": _rounded(density[i]),
            "decoder_norm": _rounded(norms[i]),
            "max_activation": round(float(highest[i]), _DIGITS),
            "examples": _windows(tokens, examples, i, texts),
            "logit_lens": [
                {
                    side: [
                        list(pair) for pair in zip(map(texts.__getitem__, ids.tolist()), _rounded(logits), strict=True)
                    ]
                    for side, ids, logits in zip(
                        ("positive", "negative"), lens_ids[i, s], lens_logits[i, s], strict=True
                    )
                }
                for s in range(crosscoder.n_snapshots)
            ],
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
    write_text(target, json.dumps(contents, allow_nan=False, ensure_ascii=False))
    return target


def feature_tables(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    n_examples: int = 8,
    window: int = 8,
    n_logits: int = 8,
    n_nearest: int = 8,
    n_samples: int = 12,
    context: int = 24,
    n_passages: int = 20,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Tabulate examples, passages, activations, logit lens and nearest features of all features.

    Args:
        crosscoder: any.
        acts: activations of the snapshots it was trained on; the held-out tokens are used.
        n_examples: strongest positions per feature, at most one per sequence.
        window: tokens on each side of an example.
        n_logits: tokens at either end of the logit lens.
        n_nearest: features with the largest cosine.
        n_samples: random active tokens per feature.
        context: tokens on each side in example_contexts and sample_tokens.
        n_passages: at most this many passages where a feature is active, and as many where it is not.
        seed: seed for the draw of passages.

    Returns:
        examples: feature, rank, sequence, position, activation (f_i there), threshold (the feature is active at a
        snapshot if its activation times its decoder norm exceeds this; 0 if the gate is shared), and read/<label> (the
        snapshot's part of the pre-activation there, minus its mean over all tokens).
        example_tokens: feature, rank, position, token, activation; the tokens around each example.
        passages, held_out_tokens: what labels are judged on, see `passages.passage_tables`.
        example_contexts: the same, of tokens further away.
        samples, sample_tokens: random active tokens, strongest first, with the same columns, but without read/<label>.
        activations: feature, bin, count; the histogram of `activations.ActivationSample`.
        lens: feature, snapshot, rank, promoted, promoted_logit, suppressed, suppressed_logit.
        nearest: feature, rank, other, cosine (of the concatenated decoder rows of all snapshots).
        Of several processes that work together the first gets the tables, and the others none.

    Raises:
        UserError: activations of other snapshots or another hook point, or a number below 0.
    """
    check_activations(crosscoder, acts)
    check_snapshots(crosscoder, acts.snapshots)
    _check_sizes(
        n_examples=n_examples, window=window, n_logits=n_logits, n_nearest=n_nearest, n_samples=n_samples,
        context=context, n_passages=n_passages, seed=seed,
    )  # fmt: skip
    index = torch.arange(crosscoder.cfg.d_sae)
    sample = ActivationSample(len(index), n_samples, context)
    # as many again, in place of those that are dropped
    sampler = PassageSampler(len(index), 2 * n_passages + n_examples if n_passages else 0, seed)
    examples, _, _ = collect_examples(crosscoder, acts, index, n_examples, max(window, context), sampler, sample)
    lens = logit_lens(crosscoder, acts, index, n_logits)
    if rank_and_size()[0]:
        return {}
    used, texts = examples.sequences.where(examples.values > 0, -1), partial(_categories, acts.snapshots.tokenizer)
    return {
        **_example_tables(crosscoder, acts, examples, window),
        **_sample_tables(crosscoder, acts, sample),
        **passage_tables(sampler, acts.held_out_tokens(), texts, used, examples.positions, n_passages),
        "lens": _lens_table(acts, *lens),
        "nearest": _nearest_table(*nearest_features(crosscoder, n_nearest)),
    }


@torch.no_grad()
def logit_lens(
    crosscoder: Crosscoder, acts: Activations, index: Int[Tensor, " n"], k: int
) -> tuple[Int[Tensor, "n S 2 k"], Float[Tensor, "n S 2 k"]]:
    """Find the tokens that each decoder row promotes and suppresses most, and their logits."""
    # rows of the unembedding beyond the tokenizer's vocabulary are padding
    S, vocabulary = crosscoder.n_snapshots, len(acts.snapshots.tokenizer)
    k = min(k, vocabulary)

    def read_at(s: int) -> tuple[Int[Tensor, "n 2 k"], Float[Tensor, "n 2 k"]]:
        ids, values = torch.zeros(len(index), 2, k, dtype=torch.long), torch.zeros(len(index), 2, k)
        model = acts.snapshots.model(s, acts.settings)
        for part in torch.arange(len(index)).split(max(1, _ENTRIES // vocabulary)):
            rows = crosscoder.W_dec_by_snapshot[index[part].to(crosscoder.device), s]
            rows = (rows / crosscoder.activation_scale[s]).to(acts.settings.device)
            logits = direct_logits(model, rows)[:, :vocabulary].cpu()
            for side, sign in enumerate((1, -1)):
                found = (sign * logits).topk(k)
                ids[part, side], values[part, side] = found.indices, sign * found.values
        return ids, values

    ids, values = zip(*each(read_at, range(S), "Logit lens"), strict=True)
    return torch.stack(ids, 1), torch.stack(values, 1)


def direct_logits(model: Any, rows: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
    """Direct effect of residual vectors on the logits without the final norm's scale, centred over the vocabulary."""
    if "RMS" not in str(model.cfg.normalization_type):
        rows = rows - rows.mean(-1, keepdim=True)
    gain = getattr(model.ln_final, "w", None)  # OLMo's norm has none
    logits = (rows.float() if gain is None else rows.float() * gain.float()) @ model.W_U.float()
    return logits - logits.mean(-1, keepdim=True)


@torch.no_grad()
def nearest_features(crosscoder: Crosscoder, n: int) -> tuple[Int[Tensor, "F n"], Float[Tensor, "F n"]]:
    """Find the other features with the largest cosine between concatenated decoder rows."""
    F = crosscoder.cfg.d_sae
    rows = torch.nn.functional.normalize(crosscoder.W_dec.detach().float(), dim=-1)
    n = min(n, F - 1)
    ids, cosines = torch.zeros(F, n, dtype=torch.long), torch.zeros(F, n)
    for part in torch.arange(F).split(max(1, _ENTRIES // F)):
        found = rows[part.to(rows.device)] @ rows.T
        found[torch.arange(len(part)), part] = -torch.inf
        top = found.topk(n)
        ids[part], cosines[part] = top.indices.cpu(), top.values.clamp(-1, 1).cpu()
    return ids, cosines


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Decode tokens one by one for display; use the token's name if it is not a whole character.

    A token that the tokenizer sets apart from the one before begins with a space, whether the tokenizer writes the
    space into the token (Ġ, ▁) or between tokens, as those of whole words do.
    """
    texts: dict[int, str] = {}
    for token in ids:
        name, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
        if not text or "\ufffd" in text:
            text = name
        elif str(tokenizer.decode([token, token])) == f"{text} {text}":
            text = f" {text}"
        texts[token] = text
    return texts


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 0:
            raise UserError(f"{name}={value} must be 0 or more")


def _windows(tokens: Int[Tensor, "N T"], examples: Examples, i: int, texts: dict[int, str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for e in range(int((examples.values[i] > 0).sum())):
        sequence, position = int(examples.sequences[i, e]), int(examples.positions[i, e])
        begin, end = examples.window(i, e, tokens.shape[1])
        found.append(
            {
                "sequence": sequence,
                "position": position,
                "tokens": [texts[token] for token in tokens[sequence, begin:end].tolist()],
                "activations": _rounded(examples.shown(i, e, tokens.shape[1])),
                "peak": position - begin,
            }
        )
    return found


def _example_tables(
    crosscoder: Crosscoder, acts: Activations, examples: Examples, window: int
) -> dict[str, pd.DataFrame]:
    feature, rank = (column.numpy() for column in (examples.values > 0).nonzero(as_tuple=True))
    sequence, position = (found[feature, rank] for found in (examples.sequences, examples.positions))
    labels = snapshot_columns(crosscoder)["label"]
    table = {
        "feature": feature.astype(np.int32),
        "rank": rank.astype(np.int16),
        "sequence": sequence.numpy().astype(np.int32),
        "position": position.numpy().astype(np.int32),
        "activation": examples.values[feature, rank].numpy(),
        "threshold": _thresholds(crosscoder)[feature],
        **{f"read/{label}": examples.read[feature, rank, s].numpy() for s, label in enumerate(labels)},
    }
    found = pd.DataFrame(table)
    around, distance = _token_table(acts, found, examples.activations[feature, rank].numpy())
    near = distance <= window
    tokens, contexts = (around.loc[rows].reset_index(drop=True) for rows in (near, ~near))
    return {"examples": found, "example_tokens": tokens, "example_contexts": contexts}


def _sample_tables(crosscoder: Crosscoder, acts: Activations, sample: ActivationSample) -> dict[str, pd.DataFrame]:
    found, activations = sample.sample()
    found["threshold"] = _thresholds(crosscoder)[found["feature"].to_numpy()]
    around, _ = _token_table(acts, found, activations)
    return {"samples": found, "sample_tokens": around, "activations": sample.histogram()}


def _thresholds(crosscoder: Crosscoder) -> np.ndarray:
    """What activation times decoder norm must exceed, 0 where all snapshots share the gate."""
    threshold: Any = crosscoder.threshold if crosscoder.gate_per_snapshot else torch.zeros(crosscoder.cfg.d_sae)
    return threshold.detach().float().cpu().numpy()


def _token_table(acts: Activations, found: pd.DataFrame, activations: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """The tokens around some places, given the activations there, (rows, W), and how far from the place each is."""
    tokens = acts.held_out_tokens().numpy()
    half = activations.shape[1] // 2
    around = found["position"].to_numpy()[:, None] + np.arange(-half, half + 1)
    row, column = ((around >= 0) & (around < tokens.shape[1])).nonzero()
    places = around[row, column]
    table = pd.DataFrame(
        {
            "feature": found["feature"].to_numpy()[row],
            "rank": found["rank"].to_numpy()[row],
            "position": places.astype(np.int32),
            "token": _categories(acts.snapshots.tokenizer, tokens[found["sequence"].to_numpy()[row], places]),
            "activation": activations[row, column],
        }
    )
    return table, np.abs(column - half)


def _lens_table(acts: Activations, ids: Int[Tensor, "F S 2 k"], values: Float[Tensor, "F S 2 k"]) -> pd.DataFrame:
    F, S, _, k = ids.shape
    table: dict[str, Any] = {
        "feature": np.repeat(np.arange(F, dtype=np.int32), S * k),
        "snapshot": np.tile(np.repeat(np.arange(S, dtype=np.int16), k), F),
        "rank": np.tile(np.arange(k, dtype=np.int16), F * S),
    }
    for side, name in enumerate(("promoted", "suppressed")):
        table[name] = _categories(acts.snapshots.tokenizer, ids[:, :, side].flatten().numpy())
        table[f"{name}_logit"] = values[:, :, side].flatten().numpy()
    return pd.DataFrame(table)


def _nearest_table(ids: Int[Tensor, "F n"], cosines: Float[Tensor, "F n"]) -> pd.DataFrame:
    F, n = ids.shape
    return pd.DataFrame(
        {
            "feature": np.repeat(np.arange(F, dtype=np.int32), n),
            "rank": np.tile(np.arange(n, dtype=np.int16), F),
            "other": ids.flatten().numpy().astype(np.int32),
            "cosine": cosines.flatten().numpy(),
        }
    )


def _categories(tokenizer: Any, ids: np.ndarray) -> pd.Categorical:
    """Tokens as a categorical column of texts."""
    unique, codes = np.unique(ids, return_inverse=True)
    texts = token_texts(tokenizer, unique.tolist())
    names, which = np.unique(np.array([texts[token] for token in unique.tolist()], dtype=object), return_inverse=True)
    return pd.Categorical.from_codes(which[codes.reshape(-1)], categories=pd.Index(names, dtype=object))


def _rounded(values: Float[Tensor, " n"]) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]
