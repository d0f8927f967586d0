"""Clean activations and features of a task's prompts in all snapshots, computed once and shared by every analysis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.harvest import harvest, special_positions
from crosslens.intervention import CleanRun, clean_run
from crosslens.prompts import PromptBatch
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task


class PromptRuns:
    """Clean activations and features of a task's prompts in all snapshots, computed once.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: its prompts are tokenised with the snapshots' tokenizer.
        batch_size: prompts per forward pass.
        device: where models and crosscoder run.
        backend: "bridge" or "hooked_transformer".
        paired: also run the paired prompts; prompts without one are left out.

    Raises:
        UserError: a crosscoder of other snapshots, a task without usable (or without paired) prompts.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        snapshots: Snapshots,
        task: Task,
        *,
        batch_size: int = 256,
        device: str = "cpu",
        backend: str = "bridge",
        paired: bool = False,
    ) -> None:
        check_snapshots(crosscoder, snapshots)
        metadata = crosscoder.cfg.metadata
        self.crosscoder, self.snapshots, self.task = crosscoder, snapshots, task
        self.hook_name: str = metadata.hook_name
        self.device, self.backend = device, backend
        self.keep_special = bool(metadata.keep_special)
        bos = True if metadata.prepend_bos is None else bool(metadata.prepend_bos)
        self.prompts = task.prompts(snapshots.tokenizer, prepend_bos=bos, max_length=snapshots.n_ctx)
        self.batches: list[PromptBatch] = list(self.prompts.batches(batch_size))
        if paired:
            self.batches = [batch for batch in self.batches if batch.patch is not None]
            if not self.batches:
                raise UserError(
                    f"task {task.name!r} has no paired prompts, which the 'patch' baseline needs; use 'zero' or 'mean'"
                )
        self._clean = self._run([batch.tokens for batch in self.batches])
        self._patch = self._run([_patch(batch) for batch in self.batches]) if paired else None

    def _run(self, tokens: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        out: list[tuple[Tensor, Tensor, Tensor]] = []
        by_length: dict[int, list[int]] = {}
        for i, batch in enumerate(tokens):
            by_length.setdefault(batch.shape[1], []).append(i)
        acts: dict[int, Tensor] = {}
        for members in by_length.values():
            together = torch.cat([tokens[i] for i in members])
            harvested = harvest(self.snapshots, together, self.hook_name, device=self.device, backend=self.backend)
            acts.update(zip(members, harvested.split([len(tokens[i]) for i in members]), strict=True))
        for i, batch in enumerate(tokens):
            keep = torch.ones_like(batch, dtype=torch.bool)
            if not self.keep_special:
                keep = ~special_positions(batch, self.snapshots.tokenizer)
            run = clean_run(self.crosscoder, batch, acts[i].to(self.crosscoder.device), keep.to(self.device))
            # features are kept sparse: dense (B, T, F) exists for one batch at a time
            out.append((run.acts, run.features.to_sparse(), run.keep))
        return out

    def __len__(self) -> int:
        """Prompts."""
        return sum(len(batch.tokens) for batch in self.batches)

    def clean(self) -> Iterator[tuple[PromptBatch, CleanRun, CleanRun | None]]:
        """Batches with their clean run and, when paired, the clean run of the paired prompts."""
        for i, batch in enumerate(self.batches):
            patch = None
            if self._patch is not None:
                acts, features, keep = self._patch[i]
                patch = CleanRun(_patch(batch).to(self.device), acts, features.to_dense(), keep)
            acts, features, keep = self._clean[i]
            yield batch, CleanRun(batch.tokens.to(self.device), acts, features.to_dense(), keep), patch

    def mean_features(self, snapshot: int) -> Float[Tensor, " F"]:
        """Mean of `f_is` over the kept positions of all prompts."""
        total = torch.zeros(self.crosscoder.cfg.d_sae, device=self.crosscoder.device)
        count = 0
        for _, run, _ in self.clean():
            total += run.snapshot_acts(self.crosscoder, snapshot).sum((0, 1))
            count += int(run.keep.sum())
        return total / count

    def baseline(self, kind: str, snapshot: int, run: CleanRun, patch: CleanRun | None, mean: Tensor | None) -> Tensor:
        """Baseline features f0 (B, T, F), zero where positions are left out."""
        if kind == "patch":
            assert patch is not None
            return patch.snapshot_acts(self.crosscoder, snapshot)
        if kind == "mean":
            assert mean is not None
            return mean * run.keep[..., None]
        return torch.zeros_like(run.features)


def check_snapshots(crosscoder: Crosscoder, snapshots: Snapshots) -> None:
    """Refuse a crosscoder that was trained on other snapshots.

    Raises:
        UserError: another number of snapshots, or the first one whose weights differ.
    """
    recorded: list[dict[str, Any]] = crosscoder.cfg.metadata.snapshots or []
    if len(snapshots) != crosscoder.n_snapshots:
        raise UserError(
            f"the crosscoder was trained on {crosscoder.n_snapshots} snapshots, {len(snapshots)} are given; "
            "give the ones of its metadata.snapshots"
        )
    for trained, given in zip(recorded, snapshots, strict=False):
        if trained.get("fingerprint") not in (None, given.fingerprint):
            raise UserError(
                f"the crosscoder was trained on other weights: its snapshot {trained.get('label')} is not the given "
                f"{given.label}; load the snapshots it was trained on"
            )


def _patch(batch: PromptBatch) -> Tensor:
    assert batch.patch is not None
    return batch.patch
