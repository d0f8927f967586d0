"""Crosscoders with given decoders, and given activations, to test the analyses of features on."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from crosslens.activations.loader import Activations
from crosslens.crosscoders import (
    JumpReLUCrosscoder,
    JumpReLUCrosscoderConfig,
    StandardCrosscoder,
    StandardCrosscoderConfig,
)


class Held(Activations):
    """Given held-out activations, in batches of five at most."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x
        S = x.shape[1]
        self.snapshots: Any = SimpleNamespace(labels=[str(s) for s in range(S)], steps=[None] * S)

    @property
    def n_snapshots(self) -> int:
        return self.x.shape[1]

    def held_out(self, batch_size: int = 4096) -> Iterator[torch.Tensor]:
        return iter(self.x.split(min(batch_size, 5)))

    def held_out_tokens(self) -> torch.Tensor:
        return torch.ones(len(self.x), 1, dtype=torch.long)

    def keep(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens != 0


def snapshots_at(*steps: int) -> list[dict[str, Any]]:
    """Metadata of snapshots, with seven tokens per step."""
    return [{"label": f"step{n}", "step": n, "tokens": 7 * n} for n in steps]


def of_rows(rows: Any, recorded: Any = None, *, jumprelu: bool = False) -> Any:
    """A crosscoder with the given decoder rows (F, S, D); the encoder is the decoder transposed."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    F, S, D = rows.shape
    shape = {"d_in": S * D, "d_sae": F, "n_snapshots": S}
    made = (
        JumpReLUCrosscoder(JumpReLUCrosscoderConfig(**shape))
        if jumprelu
        else StandardCrosscoder(StandardCrosscoderConfig(**shape))
    )
    made.W_dec.data = rows.flatten(1).clone()
    made.W_enc.data = rows.flatten(1).T.clone()
    if recorded is not None:
        made.cfg.metadata.snapshots = recorded
    return made.requires_grad_(False)


def of_norms(norms: Any, recorded: Any = None, D: int = 4, seed: int = 0, *, jumprelu: bool = False) -> Any:
    """A crosscoder with random directions and the given decoder norms (F, S)."""
    norms = torch.as_tensor(norms, dtype=torch.float32)
    rows = torch.randn(*norms.shape, D, generator=torch.Generator().manual_seed(seed))
    return of_rows(rows * (norms / rows.norm(dim=-1))[..., None], recorded, jumprelu=jumprelu)


class Read(Held):
    """Given held-out activations of given tokens, whose token 0 is left out as BOS is."""

    def __init__(self, x: torch.Tensor, tokens: torch.Tensor) -> None:
        super().__init__(x[tokens != 0])
        self.read = tokens

    def held_out_tokens(self) -> torch.Tensor:
        return self.read


CONTROL = {
    "ESC": "\x1b[2J", "OSC": "\x1b]0;owned\x07", "BEL": "a\x07b", "NUL": "a\x00b", "C1": "\x9b31m", "DEL": "a\x7fb",
    "RTL override": "\u202egnp.exe", "line separator": "a\u2028b",
}  # fmt: skip
"""Texts that would move the cursor of a terminal, rename its window, or begin another line; not line breaks."""


def controls(text: str) -> list[str]:
    """The characters of a text that no terminal and no page should get."""
    kinds = {"Cc", "Zl", "Zp"}
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return [c for c in text if c not in "\n\t"
            and (unicodedata.category(c) in kinds or unicodedata.bidirectional(c) in directions)]  # fmt: skip
