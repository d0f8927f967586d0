"""The held-out activations and their features, read and encoded once for all analyses.

1. `read` encodes every block of tokens and keeps what analyses are made of (`HeldOut`): the scaled activations, and the
   few active pairs of a token and a feature. Dense features are gone with their block.
2. An analysis takes a crosscoder and either activations, which it reads, or a `HeldOut` that was read before.
3. Analyses go through the snapshots one after the other. What they hold at a time has the size of one snapshot's
   decoder or activations; sums over tokens run over active pairs (`sums_by_column`).

Symbols: B tokens of a block, n held-out tokens, S snapshots, D d_model, F features.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.distributed.together import each, gathered, rank_and_size
from crosslens.errors import UserError
from crosslens.progress import tqdm
from crosslens.snapshots.checks import check_snapshots
from crosslens.snapshots.hooks import canonical_hook

HELD_BYTES = 1 << 32  # of held-out activations in memory
_MAX_FEATURE_BYTES = 1 << 28  # of dense feature activations (B, F) in memory at a time


class HeldOut:
    """Held-out activations and their features, by `read`.

    Attributes:
        crosscoder: whose features these are, with its gate of inference.
        acts: where the activations are from.
        x: S tensors (n, D) in float32 on the host: activations in the space the crosscoder is trained in. Where they
            take more than `HELD_BYTES` together each is read from a temporary file whenever it is asked for.
        f: (n, F) sparse matrix (scipy's csr) of the features f_i.
    """

    def __init__(
        self, crosscoder: Crosscoder, acts: Activations, x: list[Tensor] | _OnDisk, pairs: list[tuple[Any, ...]]
    ) -> None:
        self.crosscoder, self.acts, self.x = crosscoder, acts, x
        counts, features, values, gated = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
        shape = len(counts), crosscoder.cfg.d_sae
        self.f: Any = scipy.sparse.csr_array((values, features, np.append(0, counts.cumsum())), shape=shape)
        self._gated = gated

    def __len__(self) -> int:
        return self.f.shape[0]

    @property
    def device(self) -> torch.device:
        """Where products are computed."""
        return self.crosscoder.W_dec.device

    def gated(self, s: int) -> Any:
        """The features f_is as a sparse matrix: those of `f` where the gate is shared by all snapshots."""
        if not self.crosscoder.gate_per_snapshot:
            return self.f
        found: Any = self.f.copy()
        found.data[:] = self._gated[:, s]
        found.eliminate_zeros()
        return found

    @cached_property
    def means(self) -> Float64[Tensor, "S D"]:
        """Mean activations."""
        return torch.stack([x.double().mean(0) for x in self.x])

    @cached_property
    def covariances(self) -> Float64[Tensor, "S D D"]:
        """Covariances of the activations of every snapshot."""
        return torch.stack(each(lambda s: self.covariance(s, s), range(len(self.x))))

    def covariance(self, s: int, t: int) -> Float64[Tensor, "D D"]:
        """Covariances of the activations of snapshot s with those of t."""
        one, other = (self.x[i].double() - self.means[i] for i in (s, t))
        return one.T @ other / len(self)


def read(crosscoder: Crosscoder, acts: Activations | HeldOut, purpose: str = "Held-out features") -> HeldOut:
    """Encode the held-out activations once; what was read before is returned as it is.

    Args:
        crosscoder: trained on the snapshots of `acts`.
        acts: with held-out tokens.
        purpose: what is read, in a word or two, for the progress bar.

    Raises:
        UserError: no activations are held out, or they do not fit the crosscoder.
    """
    if isinstance(acts, HeldOut):
        return acts
    check_activations(crosscoder, acts)
    crosscoder, (rank, size) = _with_gate_of_inference(crosscoder), rank_and_size()
    blocks = enumerate(_blocks(crosscoder, acts, purpose))
    return hold(crosscoder, acts, ((x, crosscoder.encode(x) if i % size == rank else None) for i, x in blocks))


@torch.no_grad()
def hold(
    crosscoder: Crosscoder,
    acts: Activations,
    blocks: Iterable[tuple[Float[Tensor, "B S D"], Float[Tensor, "B F"] | None]],
) -> HeldOut:
    """Keep activations and the active ones of their features.

    Args:
        crosscoder: whose features these are.
        acts: where the activations are from.
        blocks: raw activations and dense features of some tokens at a time; None where another process has them.
    """
    S = crosscoder.n_snapshots
    kept: list[list[Tensor]] = [[] for _ in range(S)]
    on_disk: _OnDisk | None = None
    pairs: dict[int, tuple[Any, ...]] = {}
    for i, (x, features) in enumerate(blocks):
        for parts, part in zip(kept, crosscoder.scale(x).float().cpu().unbind(1), strict=True):
            parts.append(part.contiguous())
        if on_disk is None and S * sum(part.nbytes for part in kept[0]) > HELD_BYTES:
            on_disk = _OnDisk(S, crosscoder.d_model)
        if on_disk is not None:
            on_disk.append(kept)
        if features is None:
            continue
        tokens, ids = features.nonzero(as_tuple=True)
        values, gated = features[tokens, ids], torch.empty(len(ids), 0)
        if crosscoder.gate_per_snapshot:
            gated = torch.stack([crosscoder.snapshot_acts(features, s)[tokens, ids] for s in range(S)], 1)
        found = torch.bincount(tokens, minlength=len(x)), ids.int(), values.float(), gated.float()
        pairs[i] = tuple(part.cpu().numpy() for part in found)
    pairs = {i: found for theirs in gathered(pairs) for i, found in theirs.items()}
    joined: list[Tensor] = []
    for parts in kept if on_disk is None else ():  # a snapshot at a time, so that little is held twice
        joined.append(torch.cat(parts))
        parts.clear()
    return HeldOut(crosscoder, acts, joined if on_disk is None else on_disk, [pairs[i] for i in sorted(pairs)])


class _OnDisk:
    """Activations by snapshot, each in a temporary file: not mapped, since pages that are mapped count as memory."""

    def __init__(self, S: int, D: int) -> None:
        self.files, self.D = [tempfile.TemporaryFile() for _ in range(S)], D  # noqa: SIM115 (they go with this object)

    def append(self, parts: list[list[Tensor]]) -> None:
        """Move parts of every snapshot to its file."""
        for file, waiting in zip(self.files, parts, strict=True):
            for part in waiting:
                file.write(part.numpy().data)
            waiting.clear()

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Float[Tensor, "n D"]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, s: int) -> Float[Tensor, "n D"]:
        file = self.files[s]
        out = np.empty((file.seek(0, os.SEEK_END) // (4 * self.D), self.D), np.float32)
        file.seek(0)
        file.readinto(out.data)
        return torch.from_numpy(out)


def sums_by_column(f: Any, rows: Float[Tensor, "n N"]) -> Float[Tensor, "F N"]:
    """`f^T rows` for a sparse matrix f (n, F) by columns (scipy's csc)."""
    entries, first, values = (torch.from_numpy(part).to(rows.device) for part in (f.indices, f.indptr[:-1], f.data))
    return embedding_bag(entries, rows, first, mode="sum", per_sample_weights=values)


@torch.no_grad()
def held_out_features(
    crosscoder: Crosscoder, acts: Activations, purpose: str = "Held-out features"
) -> Iterator[tuple[Float[Tensor, "B S D"], Float[Tensor, "B F"]]]:
    """Yield held-out activations and their dense features, as many tokens at a time as memory allows.

    Args:
        crosscoder: trained on the snapshots of `acts`.
        acts: with held-out tokens.
        purpose: what they are read for, in a word or two, for the progress bar.

    Raises:
        UserError: no activations are held out, or they do not fit the crosscoder.
    """
    crosscoder = _with_gate_of_inference(crosscoder)
    for x in _blocks(crosscoder, acts, purpose):
        yield x, crosscoder.encode(x)


def _blocks(crosscoder: Crosscoder, acts: Activations, purpose: str) -> Iterator[Float[Tensor, "B S D"]]:
    n = 0
    with tqdm(desc=purpose, unit=" tokens", unit_scale=True, leave=False, delay=2) as bar:
        for x in acts.held_out(batch_tokens(crosscoder.cfg.d_sae)):
            if len(x):
                yield x.to(crosscoder.W_dec.device)
                bar.update(len(x))
                n += len(x)
    if not n:
        raise UserError("no activations are held out: give Dataset(held_out_tokens=...) of 1 or more")


def _with_gate_of_inference(crosscoder: Crosscoder) -> Crosscoder:
    """The gate used in training may depend on the batch."""
    return crosscoder.to_inference() if isinstance(crosscoder, CrosscoderTrainingSAE) else crosscoder


def check_activations(crosscoder: Crosscoder, acts: Activations) -> None:
    """Refuse activations of snapshots or a hook point that the crosscoder was not trained on.

    A crosscoder without recorded fingerprints is not checked.

    Raises:
        UserError: another number of snapshots, other weights, or another hook point.
    """
    metadata = crosscoder.cfg.metadata
    recorded: list[dict[str, Any]] = metadata.snapshots or []
    if not any(row.get("fingerprint") for row in recorded):
        return
    if metadata.hook_name and canonical_hook(metadata.hook_name) != canonical_hook(acts.hook_name):
        raise UserError(
            f"the crosscoder was trained on {metadata.hook_name}, the activations are from {acts.hook_name}: "
            f"use Activations(..., hook_name={metadata.hook_name!r})"
        )
    check_snapshots(crosscoder, acts.snapshots)


def batch_tokens(d_sae: int) -> int:
    """Tokens to encode at a time so that the dense activations of `d_sae` features stay small."""
    return max(1, min(4096, _MAX_FEATURE_BYTES // (4 * d_sae)))
