"""Collect the positions where features are most active, in one pass over the held-out sequences.

1. Encode a few sequences at a time. A feature's strongest position in every sequence is a candidate.
2. Keep the E strongest candidates so far, with the activations around them and the terms of the pre-activation there,
   one per snapshot: `(c_s x_s) . W_enc[s, :, i]`.
3. At the end subtract the mean of each term over all tokens. A term then says how much more than usual the snapshot
   contributes.

All snapshots share one list of examples: what a feature writes at a snapshot, `f_i n_is`, is proportional to `f_i`, so
the order is the same at every snapshot where its gate is open.

Processes that work together each read their share of the sequences, and the first merges what they found.

Memory does not grow with the number of tokens. Symbols: N sequences, T positions, S snapshots, D d_model, F features,
n requested features, E examples, W = 2 window + 1 positions around one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.distributed.together import alone, share, to_first
from crosslens.evolution.held_out import batch_tokens
from crosslens.features.activations import ActivationSample
from crosslens.features.passages import PassageSampler
from crosslens.progress import tqdm

_ENTRIES = 1 << 24  # numbers to gather at a time


@dataclass
class Examples:
    """The strongest positions of each feature, strongest first and at most one per sequence.

    Attributes:
        values: (n, E) activations f_i, 0 if a feature is active in fewer sequences.
        sequences: (n, E) indices of held-out sequences.
        positions: (n, E) positions in the sequence.
        activations: (n, E, W) activations around it, 0 outside the sequence and at positions that are left out.
        read: (n, E, S) terms of the pre-activation there, minus their means.
    """

    values: Float[Tensor, "n E"]
    sequences: Int[Tensor, "n E"]
    positions: Int[Tensor, "n E"]
    activations: Float[Tensor, "n E W"]
    read: Float[Tensor, "n E S"]

    def window(self, i: int, e: int, length: int) -> tuple[int, int]:
        """First position of an example's window and the one after the last, in a sequence of this length."""
        half, at = self.activations.shape[-1] // 2, int(self.positions[i, e])
        return max(0, at - half), min(length, at + half + 1)

    def shown(self, i: int, e: int, length: int) -> Float[Tensor, " w"]:
        """Activations at the positions of `window`."""
        begin, end = self.window(i, e, length)
        first = int(self.positions[i, e]) - self.activations.shape[-1] // 2
        return self.activations[i, e, begin - first : end - first]


@torch.no_grad()
def collect_examples(
    crosscoder: Crosscoder,
    acts: Activations,
    index: Int[Tensor, " n"],
    n_examples: int,
    window: int,
    sampler: PassageSampler | None = None,
    sample: ActivationSample | None = None,
) -> tuple[Examples, Float[Tensor, "n S"], Float[Tensor, " n"]]:
    """Collect examples of features.

    Args:
        crosscoder: any.
        acts: activations of its snapshots; the held-out ones are used.
        index: features.
        n_examples: E, at most the number of sequences.
        window: positions on each side.
        sampler: also draws passages of these features.
        sample: is given the activations of these features too.

    Returns:
        The examples, the share of tokens on which each feature is active at each snapshot, and its largest activation.
        Of several processes, the first has those of all sequences, and the others those of their share.
    """
    if isinstance(crosscoder, CrosscoderTrainingSAE):
        crosscoder = crosscoder.to_inference()  # the gate used in training may depend on the batch
    device, S, n = crosscoder.W_dec.device, crosscoder.n_snapshots, len(index)
    tokens, chosen = acts.held_out_tokens(), index.to(device)
    N, T = tokens.shape
    first, E = len(acts.tokens) - N, min(n_examples, N)
    best = _none(n, E, 2 * window + 1, S)
    # a gate shared by all snapshots needs one column only
    gates = S if crosscoder.gate_per_snapshot else 1
    fired, highest = torch.zeros(n, gates), torch.zeros(n)
    total, count = torch.zeros(S, crosscoder.d_model).double(), 0
    size = max(1, batch_tokens(crosscoder.cfg.d_sae) // T)
    own = share(range(first, len(acts.tokens)))
    with alone():  # reading, too: the others read other sequences
        for begin in tqdm(own[:: acts.block_sequences], desc="Examples", unit="block", leave=False):
            block = acts.block(begin, min(begin + acts.block_sequences, own.stop))
            for start in range(0, len(block), size):
                x = block[start : start + size].to(device)
                at = begin - first + start
                keep = acts.keep(tokens[at : at + len(x)])
                encoded = crosscoder.encode(x)
                values = encoded[..., chosen] * keep[..., None].to(device)
                if sampler is not None:
                    sampler.add(values, keep, at)
                if sample is not None:
                    sample.add(values, at)
                for s in range(gates):
                    active = crosscoder.snapshot_acts(encoded, s)[..., chosen] != 0
                    fired[:, s] += (active & keep[..., None].to(device)).sum((0, 1)).cpu()
                scaled = crosscoder.scale(x)
                total += scaled[keep.to(device)].double().sum(0).cpu()
                count += int(keep.sum())
                highest = torch.maximum(highest, values.amax((0, 1)).float().cpu())
                if E:
                    _merge(best, _candidates(crosscoder, scaled, values, chosen, best, at, window))
    found = best, sampler, sample, fired, highest, total, count
    for other, passages, samples, n_fired, most, sums, n_tokens in to_first(found)[1:]:  # of later sequences
        _merge(best, other)
        if sampler is not None and passages is not None:
            sampler.merge(passages)
        if sample is not None and samples is not None:
            sample.merge(samples)
        highest = torch.maximum(highest, most)
        fired, total, count = fired + n_fired, total + sums, count + n_tokens
    mean = (total / max(1, count)).to(device).float()
    usual = torch.stack([mean[s] @ crosscoder.W_enc_by_snapshot[s][:, chosen].float() for s in range(S)], 1).cpu()
    best.read = (best.read - usual[:, None]) * (best.values > 0)[..., None]
    return best, (fired / max(1, count)).expand(n, S), highest


def _none(n: int, E: int, W: int, S: int) -> Examples:
    places = torch.zeros(n, E, dtype=torch.long)
    return Examples(torch.zeros(n, E), places, places.clone(), torch.zeros(n, E, W), torch.zeros(n, E, S))


def _candidates(
    crosscoder: Crosscoder,
    scaled: Float[Tensor, "b T S D"],
    values: Float[Tensor, "b T n"],
    chosen: Int[Tensor, " n"],
    best: Examples,
    at: int,
    window: int,
) -> Examples:
    """The strongest positions in a few sequences, of which the first has index `at`; `read` is only computed for those
    stronger than the weakest example kept."""
    T, device = values.shape[1], values.device
    strongest, places = values.max(1)  # (b, n), the first of equals
    order = strongest.T.sort(dim=1, descending=True, stable=True).indices[:, : best.values.shape[1]]  # (n, e)
    top, positions = strongest.T.gather(1, order), places.T.gather(1, order)
    around = positions[..., None] + torch.arange(-window, window + 1, device=device)
    features = torch.arange(len(top), device=device)[:, None, None]
    activations = values[order[..., None], around.clamp(0, T - 1), features]
    activations = activations * ((around >= 0) & (around < T))
    entering: Bool[Tensor, "n e"] = (top > best.values[:, -1:].to(device)) & (top > 0)
    read = torch.zeros(*top.shape, scaled.shape[2], device=device)
    rows, columns = entering.nonzero(as_tuple=True)
    parts: list[Tensor] = []
    for part in torch.arange(len(rows), device=device).split(max(1, _ENTRIES // crosscoder.W_enc.shape[0])):
        row, column = rows[part], columns[part]
        x = scaled[order[row, column], positions[row, column]].float()  # (m, S, D)
        parts.append(torch.einsum("msd,sdm->ms", x, crosscoder.W_enc_by_snapshot[:, :, chosen[row]].float()))
    if parts:
        read[rows, columns] = torch.cat(parts)
    found = Examples(top.float(), order + at, positions, activations.float(), read)
    return Examples(*(getattr(found, field.name).cpu() for field in fields(found)))


def _merge(best: Examples, found: Examples) -> None:
    """Keep the strongest of both, the earlier ones in a tie."""
    E = best.values.shape[1]
    # sorting is stable, `topk` is not
    order = torch.cat([best.values, found.values], 1).sort(dim=1, descending=True, stable=True).indices[:, :E]
    for field in fields(best):
        both = torch.cat([getattr(best, field.name), getattr(found, field.name)], 1)
        where = order if both.ndim == 2 else order[..., None].expand(-1, -1, both.shape[-1])
        setattr(best, field.name, both.gather(1, where))
