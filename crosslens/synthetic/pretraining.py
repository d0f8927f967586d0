"""Pretrain the demo's model: a tiny GPT-NeoX that learns number agreement in about a minute on two CPU cores.

1. Turn documents of `grammar` into rows of word ids: `<|endoftext|>` precedes each document, each row begins with a new
   document and is cut at the context size. Every row is used once.
2. Train a `GPTNeoXForCausalLM` on them with AdamW, a linear warmup and a cosine decay.
3. Write the weights at `snapshot_steps` to folders `step{N}` in the layout of transformers, each with the tokenizer,
   and the manifest `snapshots.json`, which holds the recipe and a checksum of every file.

Everything is written to a temporary folder that is renamed at the end, so a folder with the final name is complete. The
same seed gives the same bytes on the same machine with the same number of threads.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from crosslens.errors import UserError
from crosslens.progress import tqdm
from crosslens.rundir import share
from crosslens.synthetic import grammar

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"

_FORMAT = 2  # 1 had one tokenizer beside the snapshots
_MANIFEST = "snapshots.json"


@dataclass(frozen=True)
class PretrainingConfig:
    """The recipe of the demo's model. The defaults were chosen by measurement.

    Raises:
        UserError: a number out of range, heads that do not divide the width, or snapshot steps that do not rise to the
            last step.
    """

    n_layers: int = 3
    """Number of blocks; with three, the middle one has attention below and above it."""
    d_model: int = 128
    """D, the width of the residual stream."""
    n_heads: int = 4
    """Attention heads; divides `d_model`."""
    d_mlp: int = 512
    """Width of the hidden layer of the MLPs."""
    context_size: int = 48
    """Length of a row in tokens, the leading `<|endoftext|>` included."""
    batch_size: int = 32
    """Rows per step."""
    n_steps: int = 640
    """Optimiser steps."""
    lr: float = 3e-3
    """Highest learning rate, reached at the end of the warmup."""
    warmup_steps: int = 30
    """Steps over which the learning rate rises linearly."""
    final_lr_fraction: float = 0.05
    """Learning rate of the last step, relative to `lr`."""
    weight_decay: float = 0.01
    """Decoupled weight decay of all parameters."""
    snapshot_steps: tuple[int, ...] = (0, 8, 16, 24, 32, 48, 96, 128, 176, 224, 272, 336, 448, 640)
    """Steps after which the weights are saved, rising; the last is `n_steps`. Those before 48 resolve the time in which
    the model learns bigrams."""

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "d_mlp", "batch_size", "n_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is too small: choose 1 or more")
        if self.context_size < 2:
            raise UserError(f"context_size={self.context_size} is too small to predict a token: choose 2 or more")
        if self.d_model % self.n_heads or (self.d_model // self.n_heads) % 2:
            raise UserError(
                f"d_model={self.d_model} does not split into {self.n_heads} heads of even width: "
                f"choose a multiple of {2 * self.n_heads}"
            )
        if not 0 <= self.warmup_steps <= self.n_steps:
            raise UserError(f"warmup_steps={self.warmup_steps} is outside 0 to n_steps={self.n_steps}")
        if not self.lr > 0:
            raise UserError(f"lr={self.lr} is too small: choose a number above 0")
        steps = self.snapshot_steps
        if not steps or list(steps) != sorted(set(steps)) or steps[0] < 0 or steps[-1] != self.n_steps:
            raise UserError(f"snapshot_steps={steps} must rise from 0 or more to n_steps={self.n_steps}")


def fine_tune(
    model: GPTNeoXForCausalLM, documents: Iterable[str], n_steps: int = 100, lr: float = 1e-3, batch_size: int = 32
) -> GPTNeoXForCausalLM:
    """Train a copy of the demo's model on other documents, with AdamW, a warmup over a tenth of the steps and a linear
    decay to 0.

    Args:
        model: the model, which is left as it is.
        documents: texts in the demo's words, such as `grammar.documents(10**9, seed, fronted=.5)`; every row of tokens
            is used once.
        n_steps: optimiser steps.
        lr: highest learning rate.
        batch_size: rows per step.

    Returns:
        The trained copy in float32 and evaluation mode.

    Raises:
        UserError: too few documents.
    """
    tuned = copy.deepcopy(model).float().train()  # published weights are in half precision, which Adam cannot train
    rows = _rows(documents, model.config.max_position_embeddings)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warmup = max(1, n_steps // 10)
    for step in tqdm(range(n_steps), desc="fine-tuning", unit="step", leave=False):
        batch = list(islice(rows, batch_size))
        if len(batch) < batch_size:
            raise UserError(f"the documents end after {step} of n_steps={n_steps} steps: give more documents")
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, (n_steps - step) / (n_steps - warmup))
        _train_step(tuned, optimizer, torch.tensor(batch))
    return tuned.eval()


def demo_tokenizer() -> PreTrainedTokenizerFast:
    """The demo's tokenizer: one id per word of its language, words being separated by spaces.

    Id 0 is `<|endoftext|>` (BOS, EOS and padding), id 1 stands for unknown words.
    """
    ids = {word: index for index, word in enumerate([END_OF_TEXT, UNKNOWN, *grammar.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
    )


def demo_is_intact(folder: str | Path, seed: int = 0, config: PretrainingConfig | None = None) -> bool:
    """Whether `folder` holds what `pretrain_demo` would write for this seed and recipe, by the checksum of every file.

    A folder that is missing, damaged, or of another recipe, seed, language or format gives False, never an error.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
        if any(manifest[key] != value for key, value in _recipe(seed, config or PretrainingConfig()).items()):
            return False
        return all(_sha256(folder / name) == checksum for name, checksum in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def pretrain_demo(
    folder: str | Path,
    seed: int = 0,
    *,
    config: PretrainingConfig | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Pretrain the demo's model, unless `folder` holds it already.

    `step{N}/` in it holds a model and its tokenizer for `from_pretrained`, and `snapshots.json` the manifest:
    `snapshots` (label, path, step, tokens seen), `seed`, `config` and `files` (sha256 of each).

    Args:
        folder: where to write.
        seed: seed for the initial weights and the data.
        config: the recipe; None for the default.
        overwrite: replace a folder that holds something else, once training is done.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something else, and `overwrite` is False.
    """
    config = config or PretrainingConfig()
    folder = Path(folder)
    if demo_is_intact(folder, seed, config):
        return folder
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} exists and is not the demo of seed {seed} with this recipe: "
            "choose another folder, or pass overwrite=True"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    whole = folder.resolve()  # "." has no name
    partial = whole.with_name(f".{whole.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process with the same id
    try:
        _write_demo(partial, seed, config, progress)
        if overwrite and folder.exists() and not demo_is_intact(folder, seed, config):
            shutil.rmtree(folder)
        try:
            partial.rename(whole)
        except OSError:
            if not demo_is_intact(folder, seed, config):  # otherwise another process finished first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_demo(folder: Path, seed: int, config: PretrainingConfig, progress: bool) -> None:
    folder.mkdir()
    tokenizer = demo_tokenizer()
    snapshots: list[dict[str, Any]] = []
    for step, model in _train(seed, config, progress):
        label = f"step{step}"
        _save(model, folder / label)
        # a bridge booted from a folder without a tokenizer reads other tokens, silently
        tokenizer.save_pretrained(folder / label)
        tokens = step * config.batch_size * config.context_size
        snapshots.append({"label": label, "path": label, "step": step, "tokens": tokens})
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {**_recipe(seed, config), "snapshots": snapshots, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _save(model: GPTNeoXForCausalLM, folder: Path) -> None:
    """`save_pretrained` without its progress bar, which would interrupt ours ten times."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        share(*folder.glob("*.safetensors"))
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _train(seed: int, config: PretrainingConfig, progress: bool) -> Iterator[tuple[int, GPTNeoXForCausalLM]]:
    """Yield (step, model) at every snapshot; the model is trained further afterwards."""
    model = _initial_model(seed, config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    batches = demo_batches(seed, config)
    steps = range(config.n_steps + 1)
    for step in tqdm(steps, desc=f"pretraining, seed {seed}", unit="step", leave=False, disable=not progress):
        if step in config.snapshot_steps:
            yield step, model
        if step == config.n_steps:
            return
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _lr_factor(step, config)
        _train_step(model, optimizer, next(batches))


def _train_step(
    model: GPTNeoXForCausalLM, optimizer: torch.optim.Optimizer, tokens: Int[Tensor, "rows context"]
) -> None:
    logits = model(tokens, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _lr_factor(step: int, config: PretrainingConfig) -> float:
    """Learning rate at a step, relative to `lr`: linear warmup, then cosine decay to `final_lr_fraction`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.n_steps - config.warmup_steps)
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * 0.5 * (1 + math.cos(math.pi * done))


def _initial_model(seed: int, config: PretrainingConfig) -> GPTNeoXForCausalLM:
    model_config = GPTNeoXConfig(
        vocab_size=len(grammar.vocabulary()) + 2,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.d_mlp,
        max_position_embeddings=config.context_size,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    # transformers uses only the global generator: seed it, and restore it afterwards
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPTNeoXForCausalLM(model_config)


def demo_batches(seed: int = 0, config: PretrainingConfig | None = None) -> Iterator[Int[Tensor, "rows context"]]:
    """Yield the demo's pretraining data, a batch of token ids per step, without end."""
    config = config or PretrainingConfig()
    rows = _rows(grammar.documents(2**62, seed), config.context_size)
    while True:
        yield torch.tensor([next(rows) for _ in range(config.batch_size)])


def _rows(documents: Iterable[str], context_size: int) -> Iterator[list[int]]:
    """Yield rows of `context_size` word ids, each beginning with the end-of-text token and a new document."""
    # the tokenizer's ids from a dictionary, which is much faster
    ids = {word: index for index, word in enumerate(grammar.vocabulary(), start=2)}
    row: list[int] = []
    for document in documents:
        row.append(0)
        row += [ids[word] for word in document.split()]
        if len(row) >= context_size:
            yield row[:context_size]
            row = []


def _recipe(seed: int, config: PretrainingConfig) -> dict[str, Any]:
    """Everything that determines the weights, as recorded in the manifest (JSON types only)."""
    language = "\n".join([*grammar.vocabulary(), *grammar.documents(50, 0)])
    return {
        "format": _FORMAT,
        "name": f"crosslens-demo-seed{seed}",
        "seed": seed,
        "config": {**asdict(config), "snapshot_steps": list(config.snapshot_steps)},
        "language": hashlib.sha256(language.encode()).hexdigest(),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
