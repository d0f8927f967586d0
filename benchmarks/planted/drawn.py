"""An endless stream of activations that are drawn from a planted truth instead of computed by models."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.distributed.parallel import ALONE, Parallel
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.snapshot import Snapshot

STEPS = 1000
"""Training steps between two planted snapshots."""


class Drawn(Activations):
    """Activations that depend on seed, number of tokens and index of a batch only; a truth says how they are drawn.

    Args:
        title: the dataset, in the metadata of crosscoders.
        seed: seed for the ground truth and the activations.
        n_tokens: activations per epoch; every epoch is different.
        n_held_out: activations to evaluate on.
    """

    chunk = 4096
    """Held-out tokens that are drawn at a time: they are the same for every batch size."""

    def __init__(self, title: str, seed: int, n_tokens: int, n_held_out: int) -> None:
        self.title, self.seed = title, seed
        self._n_tokens, self.n_held_out = n_tokens, n_held_out
        self.hook_names, self.dataset = ("planted",), Dataset([])  # drawn, not read

    def name_snapshots(self, members: Sequence[int], tokens: int | None = None) -> None:
        """Give snapshots their labels and steps.

        Args:
            members: index of each in the truth.
            tokens: tokens of a training step.
        """
        steps = [s * STEPS for s in members]
        self.snapshots = Snapshots(
            [Snapshot(f"step{step}", step, tokens and step * tokens, name="planted") for step in steps], "planted"
        )

    def activations(self, n: int, index: int) -> Float[Tensor, "B S D"]:
        """Batch `index` of n tokens; negative ones are held out."""
        raise NotImplementedError

    @property
    @override
    def n_tokens(self) -> int:
        return self._n_tokens

    @override
    def metadata(self) -> dict[str, Any]:
        return {
            "model_name": "planted",
            "hook_name": self.hook_name,
            "dataset_path": f"{self.title}, seed {self.seed}",
            "snapshots": [{"label": s.label, "step": s.step, "tokens": s.tokens} for s in self.snapshots],
        }

    @override
    def batches(
        self,
        batch_size: int,
        *,
        start: int = 0,
        epochs: int | None = None,
        device: str | torch.device = "cpu",
        parallel: Parallel = ALONE,
        whole: bool = True,
    ) -> Generator[Float[Tensor, "B S D"], None, None]:
        last = None if epochs is None else self.n_tokens * epochs // batch_size
        i = start
        while last is None or i < last:
            batch = self.activations(batch_size, i)
            yield (batch if whole else batch[parallel.tokens(batch_size)]).to(device)
            i += 1

    @override
    def held_out(self, batch_size: int = 4096) -> Iterator[Float[Tensor, "B S D"]]:
        for i, n in self.chunks():
            yield from self.activations(n, i).split(batch_size)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Index and size of the chunks of held-out tokens."""
        for i, first in enumerate(range(0, self.n_held_out, self.chunk)):
            yield -1 - i, min(self.chunk, self.n_held_out - first)
