"""Save snapshots of a model while it trains, in the layout that `Snapshots.local` reads.

    runs/my-model/
        snapshots.json      label, folder, step and tokens of every snapshot, in the order of training
        tokenizer/          once
        step0/ step1/ ...   a model each, as `save_pretrained` writes it

1. `save` writes one snapshot, for a training loop of one's own. A folder is written under another name and renamed at
   the end, and the manifest is replaced after it: what has its final name is whole, whenever the process is killed.
2. `SaveSnapshots` calls it from a `transformers.Trainer`, at the steps that are asked for. One process writes; a step
   that is there already is left alone, so a run that resumes from a checkpoint continues.

Tokens seen are those that the Trainer counts, or batch size x gradient accumulation x processes x length of a sequence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase, TrainerCallback
from typing_extensions import override

from crosslens.errors import UserError
from crosslens.rundir import check_writable, share, write_text
from crosslens.snapshots.families import read_spaced

_MANIFEST = "snapshots.json"


def choose_steps(steps: str | Sequence[int], last: int) -> list[int]:
    """The steps at which snapshots are saved.

    Args:
        steps: numbers of steps; "log:32", 32 steps from 0 to `last`, evenly spaced in log(1 + step); or "linear:32".
        last: number of steps of the whole training.

    Returns:
        Steps in order, without those after `last`.

    Raises:
        UserError: neither of these, a negative step, or fewer than 2 or more than `last` + 1 evenly spaced ones.
    """
    even = read_spaced(steps) if isinstance(steps, str) else None
    if even is None:
        listed = [] if isinstance(steps, str) else list(steps)
        if not listed or any(not isinstance(step, int) or step < 0 for step in listed):
            raise UserError(f"steps={steps!r} must be whole numbers from 0, or a set such as 'log:32' or 'linear:32'")
        return sorted({step for step in listed if step <= last})
    n, scale = even
    if not 2 <= n <= last + 1:
        raise UserError(f"steps={steps!r} asks for {n} snapshots of {last} steps: give a number from 2 to {last + 1}")
    marks = np.linspace(0, last, n) if scale == "linear" else np.expm1(np.linspace(0, np.log1p(last), n))
    chosen: list[int] = []
    for mark in marks.round().astype(int).tolist():
        chosen.append(max(mark, chosen[-1] + 1) if chosen else mark)  # early steps are further apart than their marks
    return chosen


def save(
    model: Any,
    step: int,
    folder: str | Path,
    *,
    tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Save a model as the snapshot of a step; in distributed training only the first process writes.

    Args:
        model: a causal language model of transformers, also inside DistributedDataParallel. Parameters that are sharded
            over processes have to be gathered first.
        step: optimiser steps so far.
        folder: of all snapshots of this training; created if missing.
        tokens: tokens seen so far, if known.
        tokenizer: written once.

    Returns:
        The folder of the snapshot, `folder/step<step>`. One that is there already is left as it is.

    Raises:
        UserError: a negative step, a model without `save_pretrained`, or a folder that cannot be written.
    """
    if step < 0:
        raise UserError(f"step={step} must be 0 or more: give the number of optimiser steps so far")
    model = _whole_model(model)
    if not hasattr(model, "save_pretrained"):
        raise UserError(
            f"a {type(model).__name__} has no save_pretrained: give a causal language model of transformers"
        )
    root = Path(folder)
    place = root / f"step{step}"
    if not _writes():
        return place
    check_writable(root)
    root.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None and not (root / "tokenizer").is_dir():
        _whole(root / "tokenizer", tokenizer.save_pretrained)
    if not place.is_dir():
        _whole(place, model.save_pretrained)
    _record(root, step, tokens)
    return place


class SaveSnapshots(TrainerCallback):
    """Save snapshots while a `transformers.Trainer` trains.

        Trainer(model, args, train_dataset=data, callbacks=[SaveSnapshots("runs/my-model", steps="log:32")]).train()
        cl.Snapshots.local("runs/my-model")

    Snapshots are no checkpoints to resume from: those are the Trainer's own. A run that resumes saves the steps that
    come again only where they are missing. The Trainer looks for parameters by their names in memory. For some models
    (the unembedding of GPT-NeoX) files have other names, and what it does not find it leaves as it was made. Make the
    model of a resumed run with `from_pretrained(checkpoint)`; otherwise a warning names what is lost.

    Args:
        folder: of the snapshots; created if missing.
        steps: as in `choose_steps`, of the whole training; step 0 is the model before training.
        tokenizer: written once; None takes the Trainer's `processing_class`.
        context_size: tokens per sequence, to record the tokens seen; not needed where the Trainer counts them itself
            (`include_num_input_tokens_seen`). Without either they are left out.

    Raises:
        UserError: unknown steps; when training begins, more steps than there are, a folder that cannot be written, no
            tokenizer, or a model that is split over processes.
    """

    def __init__(
        self,
        folder: str | Path,
        steps: str | Sequence[int] = "log:32",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        context_size: int | None = None,
    ) -> None:
        choose_steps(steps, 2**53)  # refuses what is no set of steps
        if context_size is not None and context_size < 1:
            raise UserError(f"context_size={context_size} must be at least 1, the tokens of a sequence")
        self.folder, self.steps, self.tokenizer, self.context_size = Path(folder), steps, tokenizer, context_size
        self._chosen: list[int] = []

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Choose the steps, and save the first.

        Args:
            args: the Trainer's arguments.
            state: its state, with the numbers of steps.
            control: not used.
            kwargs: with the model and the tokenizer.
        """
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise UserError(
                "SaveSnapshots saves whole models, and FSDP and DeepSpeed split them over processes: save checkpoints "
                "with the Trainer, and read the folder of its checkpoint-N with Snapshots.local"
            )
        if lost := _not_loaded(kwargs["model"], Path(args.output_dir) / f"checkpoint-{state.global_step}"):
            warnings.warn(
                f"the Trainer has not loaded {', '.join(lost)} from checkpoint-{state.global_step}, which has other "
                "names: training goes on from what the model had. Make it with from_pretrained(checkpoint) before "
                "resuming",
                stacklevel=2,
            )
        self._chosen = choose_steps(self.steps, state.max_steps)
        self.tokenizer = self.tokenizer or kwargs.get("processing_class")
        if self.tokenizer is None and not (self.folder / "tokenizer").is_dir():
            raise UserError(
                "snapshots need their tokenizer: give SaveSnapshots(..., tokenizer=tokenizer), or the Trainer a "
                "processing_class"
            )
        self._save(args, state, kwargs["model"])

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save this step, if it is one of those.

        Args:
            args: the Trainer's arguments.
            state: its state, with the number of the step.
            control: not used.
            kwargs: with the model.
        """
        self._save(args, state, kwargs["model"])

    def _save(self, args: Any, state: Any, model: Any) -> None:
        step = int(state.global_step)
        if step in self._chosen and not (self.folder / f"step{step}" / "config.json").is_file():
            save(model, step, self.folder, tokens=self._tokens(args, state), tokenizer=self.tokenizer)

    def _tokens(self, args: Any, state: Any) -> int | None:
        step, seen = int(state.global_step), int(getattr(state, "num_input_tokens_seen", 0) or 0)
        if not step:
            return 0
        if seen:
            return seen
        if self.context_size is None:
            return None
        sequences = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return step * sequences * self.context_size


def _not_loaded(model: Any, checkpoint: Path) -> list[str]:
    """Names of parameters of which a checkpoint has neither the name nor, under another one, the values."""
    path = checkpoint / "model.safetensors"
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        names = {*file.keys()}
        missing = {name: each for name, each in _whole_model(model).named_parameters() if name not in names}
        others = [file.get_tensor(name) for name in names] if missing else []
    return [
        name
        for name, each in missing.items()
        if not any(other.shape == each.shape and torch.equal(other, each.detach().cpu()) for other in others)
    ]


def _whole_model(model: Any) -> Any:
    """The model inside DistributedDataParallel and other wrappers."""
    while not hasattr(model, "save_pretrained") and hasattr(model, "module"):
        model = model.module
    return model


def _writes() -> bool:
    """Whether this process is the first: by the process group, or by torchrun's environment before there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def _whole(place: Path, write: Any) -> None:
    """Write a folder completely or not at all; what a killed process left is removed."""
    for left in place.parent.glob(f".{place.name}.partial-*"):
        shutil.rmtree(left, ignore_errors=True)
    partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
    try:
        write(partial)
        share(*partial.glob("*.safetensors"))
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _record(root: Path, step: int, tokens: int | None) -> None:
    """Put a snapshot, and others whose process was killed before it could, into the manifest."""
    path = root / _MANIFEST
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"name": root.name}
    rows = {row["step"]: row for row in known.get("snapshots", [])}
    there = [re.fullmatch(r"step(\d{1,15})", each.name) for each in root.iterdir() if each.is_dir()]
    for match in filter(None, there):
        rows.setdefault(int(match[1]), {"label": match[0], "path": match[0], "step": int(match[1]), "tokens": None})
    if tokens is not None:
        rows[step]["tokens"] = tokens
    known["snapshots"] = [rows[each] for each in sorted(rows)]
    write_text(path, json.dumps(known, indent=1) + "\n")
