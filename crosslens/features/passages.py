"""Draw the held-out passages that labels are judged on.

A passage is a window of at most 2 x `WINDOW` + 1 tokens. It is *active* if the feature is active anywhere in it.

1. In one pass, draw for each feature active tokens, and tokens with no activation within `WINDOW` of them, at most one
   of either kind per sequence. A sequence with m of the n tokens of a kind comes first with probability m / n: it draws
   log(u) / m with u uniform, and the largest are kept (Efraimidis and Spirakis 2006). The token is uniform among its m.
2. Drop sequences that hold one of the feature's examples, which its label was written from, and passages of the same
   tokens as an example or an earlier passage.

Random numbers depend on the seed and the sequence only. Memory does not grow with the number of tokens. Symbols: b, N
sequences, T positions, n features, E examples, R candidates of a kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

WINDOW = 8
"""Tokens on each side of the one that is drawn."""


class PassageSampler:
    """Candidates for the passages of each feature, collected batch by batch.

    Attributes:
        window: tokens on each side of the one that is drawn.
        keys: (2, n, R) log(u) / m in falling order, -inf where there is no candidate; active ones first.
        sequences: (2, n, R) indices of held-out sequences.
        positions: (2, n, R) positions of the tokens that were drawn.
        values: (2, n, R) largest activation in the window; 0 in the second half.
        n_active: (n,) tokens on which each feature is active.
        n_tokens: tokens seen.

    Args:
        n: number of features.
        candidates: R, of either kind.
        seed: seed of the draw.
        window: tokens on each side.
    """

    def __init__(self, n: int, candidates: int, seed: int = 0, window: int = WINDOW) -> None:
        self.window, self._seed = window, seed
        self.keys = torch.full((2, n, candidates), -torch.inf, dtype=torch.float64)
        self.sequences = torch.zeros(2, n, candidates, dtype=torch.long)
        self.positions, self.values = self.sequences.clone(), torch.zeros(2, n, candidates)
        self.n_active, self.n_tokens = torch.zeros(n, dtype=torch.long), 0

    def add(self, values: Float[Tensor, "b T n"], keep: Bool[Tensor, "b T"], at: int) -> None:
        """Draw from a few sequences, of which the first has index `at`; activations are 0 where `keep` is False."""
        b, T, n = values.shape
        active, device = values != 0, values.device
        self.n_active += active.sum((0, 1)).cpu()
        self.n_tokens += int(keep.sum())
        if not self.keys.numel():
            return
        t = torch.arange(T, device=device)
        before = torch.nn.functional.pad(active.cumsum(1, dtype=torch.int32), (0, 0, 1, 0))  # (b, T + 1, n)
        around = before[:, (t + self.window + 1).clamp(max=T)] - before[:, (t - self.window).clamp(min=0)]
        inactive = (around == 0) & keep[..., None].to(device)
        drawn = [np.random.default_rng([self._seed, at + i]).random(2 * (n + T)) for i in range(b)]
        of_features, of_tokens = torch.from_numpy(np.stack(drawn)).split([2 * n, 2 * T], dim=1)
        for kind, which in enumerate((active, inactive)):
            order = of_tokens[:, kind * T : (kind + 1) * T].to(device, torch.float32)
            position = torch.where(which, order[..., None], -1.0).argmax(1)  # (b, n), uniform among the tokens
            u, count = of_features[:, kind * n : (kind + 1) * n], which.sum(1).cpu()
            keys = torch.where(count > 0, torch.log1p(-u) / count.clamp(min=1), -torch.inf)
            shown = position[:, None] + torch.arange(-self.window, self.window + 1, device=device)[:, None]
            highest = values.gather(1, shown.clamp(0, T - 1)).amax(1).float().cpu()
            sequences = torch.arange(at, at + b)[:, None].expand(b, n)
            self._merge(kind, keys, sequences, position.cpu(), highest)

    def merge(self, other: PassageSampler) -> None:
        """Add what another one has drawn from later sequences, with the same seed."""
        self.n_active += other.n_active
        self.n_tokens += other.n_tokens
        for kind in range(2):
            found = (each[kind].T for each in (other.keys, other.sequences, other.positions, other.values))
            self._merge(kind, *found)

    def _merge(self, kind: int, keys: Tensor, *found: Tensor) -> None:
        merged = torch.cat([self.keys[kind], keys.T], 1)
        self.keys[kind], order = (
            kept[:, : self.keys.shape[2]] for kept in merged.sort(dim=1, descending=True, stable=True)
        )
        for held, new in zip((self.sequences, self.positions, self.values), found, strict=True):
            held[kind] = torch.cat([held[kind], new.T], 1).gather(1, order)


def passage_tables(
    sampler: PassageSampler,
    tokens: Int[Tensor, "N T"],
    texts: Any,
    used: Int[Tensor, "n E"],
    at: Int[Tensor, "n E"],
    n_passages: int,
) -> dict[str, pd.DataFrame]:
    """Tabulate passages that share no sequence and no text with the examples.

    Args:
        sampler: has seen all held-out sequences.
        tokens: the held-out sequences.
        texts: a function from token ids to a categorical column of texts.
        used: sequences of each feature's examples, -1 where there is none.
        at: their positions.
        n_passages: at most this many of either kind.

    Returns:
        passages: feature, active, rank (in random order, within feature and kind), sequence, begin, end (the one after
        the last position), activation (the largest in the passage), rate (the share of tokens on which the feature is
        active).
        held_out_tokens: sequence, position, token; the sequences that have a passage.
    """
    ids, T, W = tokens.numpy(), tokens.shape[1], sampler.window
    rate = (sampler.n_active.double() / max(1, sampler.n_tokens)).tolist()
    rows: list[tuple[Any, ...]] = []

    def window(position: int) -> tuple[int, int]:
        return max(0, position - W), min(T, position + W + 1)

    for i, (own, places) in enumerate(zip(used.tolist(), at.tolist(), strict=True)):
        seen = {ids[n, slice(*window(t))].tobytes() for n, t in zip(own, places, strict=True) if n >= 0}
        for kind, active in enumerate((True, False)):
            candidates = (getattr(sampler, name)[kind, i].tolist() for name in ("keys", "sequences", "positions"))
            rank = 0
            for (key, n, t), value in zip(zip(*candidates, strict=True), sampler.values[kind, i].tolist(), strict=True):
                begin, end = window(t)
                text = ids[n, begin:end].tobytes()
                if rank == n_passages or key == -np.inf:
                    break
                if n in own or text in seen:
                    continue
                seen.add(text)
                rows.append((i, active, rank, n, begin, end, value, rate[i]))
                rank += 1
    names = ("feature", "active", "rank", "sequence", "begin", "end", "activation", "rate")
    types = dict(zip(names, ["int32", "bool", "int16", "int32", "int32", "int32", "float32", "float64"], strict=True))
    passages = pd.DataFrame(rows, columns=pd.Index(names)).astype(types)
    known = np.unique(passages["sequence"].to_numpy())
    held_out = {
        "sequence": np.repeat(known, T).astype(np.int32),
        "position": np.tile(np.arange(T, dtype=np.int32), len(known)),
        "token": texts(ids[known].reshape(-1)),
    }
    return {"passages": passages, "held_out_tokens": pd.DataFrame(held_out)}
