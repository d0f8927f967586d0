"""Snapshots: the checkpoints of one pretraining run, in the order of training.

`Snapshots` is a sequence of `Snapshot`s that come from local folders, from revisions on the Hugging Face hub, or from
the demo. `check` refuses what would make a comparison across them void: equal weights, different tokenizers, widths or
depths. `model` loads one and keeps it where memory allows. `to_dict` and `from_dict` are the recipe of the collection.
"""

from __future__ import annotations

import gc
import hashlib
import json
import operator
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import torch
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from crosslens import families
from crosslens.checkpoints import LanguageModel, Snapshot, hash_files, tokenizer_files
from crosslens.errors import UserError
from crosslens.hooks import canonical_hook, check_hook, hook_layer

if TYPE_CHECKING:
    import crosslens.pretraining

__all__ = ["Snapshot", "Snapshots", "canonical_hook", "hook_layer"]

_FORMAT = 1
_KEEP_BYTES = 2 * 2**30


def _n_bytes(model: LanguageModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _cache_folder() -> Path:
    if ours := os.environ.get("CROSSLENS_CACHE"):
        return Path(ours).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "crosslens"


def _read_manifest(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """Name and rows (label, path, step, tokens) of a `snapshots.json`."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = [
            {"label": row["label"], "path": row["path"], "step": row.get("step"), "tokens": row.get("tokens")}
            for row in manifest["snapshots"]
        ]
        if not rows:
            raise ValueError("it lists none")
        for row in rows:
            if not (isinstance(row["label"], str) and isinstance(row["path"], str)):
                raise TypeError("label and path are strings")
            if any(type(row[key]) not in (int, type(None)) for key in ("step", "tokens")):
                raise TypeError("step and tokens are whole numbers")
        return str(manifest.get("name", path.parent.name)), rows
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no manifest of snapshots ({type(error).__name__}: {error}): write "
            '{"snapshots": [{"label": "start", "path": "folder", "step": 0, "tokens": 0}, ...]}'
        ) from error


def _step_folders(root: Path) -> list[dict[str, Any]]:
    """Rows like a manifest's for the sub-folders `stepN`, by N."""
    matches = [re.fullmatch(r"step(\d+)", path.name) for path in root.iterdir() if path.is_dir()]
    found = sorted((int(match[1]), match[0]) for match in matches if match)
    if not found:
        hint = " (it holds a single model)" if (root / "config.json").is_file() else ""
        raise UserError(
            f"{root} has no sub-folders step0, step1000, ... and no snapshots.json{hint}: name the folders of the "
            'snapshots after their steps, or list them in {"snapshots": [{"label": ..., "path": ...}, ...]}'
        )
    return [{"label": name, "path": name, "step": step, "tokens": None} for step, name in found]


def _local_tokenizer(folder: Path, root: Path) -> str:
    """The folder of the tokenizer of a local snapshot: its own, `tokenizer/` or the root."""
    for candidate in (folder, root / "tokenizer", root):
        if tokenizer_files(candidate):
            return str(candidate)
    raise UserError(f"there is no tokenizer in {folder}, {root / 'tokenizer'} or {root}: put one into any of them")


class Snapshots(Sequence[Snapshot]):
    """Checkpoints of one pretraining run, in the order of training. Indexing by a slice or a list gives `Snapshots`.

    Args:
        snapshots: one or more, with labels of their own.
        name: of the model, for titles and records.
        demo: arguments of `demo`, where it made them; kept in `to_dict`.

    Raises:
        UserError: none, or two of one label.
    """

    def __init__(self, snapshots: Sequence[Snapshot], name: str, demo: Mapping[str, Any] | None = None) -> None:
        self._snapshots = tuple(snapshots)
        self.name = name
        self._demo = demo
        self._models: dict[tuple[int, str, torch.dtype, str], LanguageModel] = {}
        if not self._snapshots:
            raise UserError(f"{name} without snapshots: give one or more")
        labels = self.labels
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise UserError(f"two snapshots bear the label {twice!r}: give each a label of its own")

    @classmethod
    def local(cls, folder: str | Path) -> Snapshots:
        """Snapshots in the sub-folders of a folder, each in the layout of transformers.

        The sub-folders are `step0`, `step1000`, ..., taken by step; or any, where `snapshots.json` lists them in order:
        `{"snapshots": [{"label": "start", "path": "a", "step": 0, "tokens": 0}, ...]}` (step and tokens may be absent).
        The tokenizer lies in each of them, in `tokenizer`, or in the folder itself.

        Raises:
            UserError: no such folder, nothing in it, a folder without a model, or no tokenizer.
        """
        root = Path(folder).expanduser().resolve()
        if not root.is_dir():
            raise UserError(f"there is no folder {root}: give one with sub-folders step0, step1000, ...")
        manifest = root / "snapshots.json"
        name, rows = _read_manifest(manifest) if manifest.is_file() else (root.name, _step_folders(root))
        snapshots: list[Snapshot] = []
        for row in rows:
            path = root / row["path"]
            tokenizer = _local_tokenizer(path, root)
            snapshots.append(Snapshot(row["label"], row["step"], row["tokens"], str(path), None, tokenizer))
            snapshots[-1].folder()
        return cls(snapshots, name)

    @classmethod
    def from_hub(
        cls,
        repo: str,
        revisions: Sequence[str],
        *,
        steps: Sequence[int | None] | None = None,
        tokens: Sequence[int | None] | None = None,
        labels: Sequence[str] | None = None,
    ) -> Snapshots:
        """Revisions of a repository on the hub; nothing is downloaded yet.

        Args:
            repo: such as `EleutherAI/pythia-14m`.
            revisions: branches, tags or commits, in the order of training.
            steps: optimiser steps of each, where known.
            tokens: tokens seen by each, where known.
            labels: names of the snapshots; the revisions by default.

        Raises:
            UserError: lists of different lengths, or a repository that is the name of a local folder.
        """
        if isinstance(revisions, str):
            raise UserError(f"revisions={revisions!r} is one string: give a list, such as [{revisions!r}]")
        for key, values in (("steps", steps), ("tokens", tokens), ("labels", labels)):
            if values is not None and len(values) != len(revisions):
                raise UserError(f"{len(values)} {key} for {len(revisions)} revisions: give one for each")
        unknown: list[None] = [None] * len(revisions)
        rows = zip(labels or revisions, steps or unknown, tokens or unknown, revisions, strict=True)
        return cls(
            [Snapshot(label, step, seen, repo, revision) for label, step, seen, revision in rows],
            repo.rsplit("/", 1)[-1],
        )

    @classmethod
    def pythia(cls, size: str, steps: str | Sequence[int] = "paper") -> Snapshots:
        """Pythia's checkpoints, such as `Snapshots.pythia("160m", steps=[0, 512, 143_000])`.

        Args:
            size: 14m, 31m, 70m, 160m, 410m, 1b, 1.4b, 2.8b, 6.9b or 12b, also with `-deduped`.
            steps: of the 154 that exist; "paper" for the 32 of Ge et al. (arXiv 2509.17196), "all".

        Raises:
            UserError: a size or step that does not exist.
        """
        rows = families.pythia_revisions(size, steps)
        return cls.from_hub(
            families.repository("pythia", size),
            [row.revision for row in rows],
            steps=[row.step for row in rows],
            tokens=[row.tokens for row in rows],
            labels=[row.label for row in rows],
        )

    @classmethod
    def demo(
        cls,
        seed: int = 0,
        folder: str | Path | None = None,
        *,
        config: crosslens.pretraining.PretrainingConfig | None = None,
    ) -> Snapshots:
        """The demo's snapshots: a tiny model that is pretrained here, in about a minute, and kept for the next time.

        Args:
            seed: of initial weights and data.
            folder: where it is kept; by default in the user's cache ($CROSSLENS_CACHE, else $XDG_CACHE_HOME/crosslens,
                else ~/.cache/crosslens), where a damaged or outdated one is made again.
            config: another recipe than the default.

        Raises:
            UserError: `folder` holds something else.
        """
        # imported late: it takes seconds, and most collections are not the demo's
        from crosslens.pretraining import pretrain_demo

        variant = "" if config is None else "-" + hashlib.sha256(repr(config).encode()).hexdigest()[:12]
        target = Path(folder) if folder is not None else _cache_folder() / f"demo-seed{seed}{variant}"
        snapshots = cls.local(pretrain_demo(target, seed, config=config, overwrite=folder is None))
        again = {"seed": seed, "folder": None if folder is None else str(target.resolve())}
        return cls(snapshots, snapshots.name, again if config is None else None)

    @classmethod
    def from_dict(cls, recipe: Mapping[str, Any]) -> Snapshots:
        """The collection of a `to_dict`. The demo's is pretrained again where it is gone.

        Raises:
            UserError: not such a dictionary.
        """
        try:
            if recipe["format"] != _FORMAT:
                raise ValueError(f"format {recipe['format']!r}, where this release reads {_FORMAT}")
            rows, demo, name = [Snapshot(**row) for row in recipe["snapshots"]], recipe.get("demo"), recipe["name"]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a recipe of snapshots ({error}): give what Snapshots.to_dict returned") from error
        if demo is None:
            return cls(rows, name)
        whole = cls.demo(**demo)
        if unknown := [row.label for row in rows if row.label not in whole.labels]:
            raise UserError(f"the demo has no snapshot {unknown[0]!r}: it has {', '.join(whole.labels)}")
        return whole[[whole.labels.index(row.label) for row in rows]]

    def to_dict(self) -> dict[str, Any]:
        """A recipe for `from_dict`, in types of JSON."""
        recipe: dict[str, Any] = {"format": _FORMAT, "name": self.name, "snapshots": [asdict(s) for s in self]}
        return recipe if self._demo is None else {**recipe, "demo": dict(self._demo)}

    def __len__(self) -> int:
        return len(self._snapshots)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> Snapshots: ...
    def __getitem__(self, index: SupportsIndex | slice | Sequence[int]) -> Snapshot | Snapshots:
        if isinstance(index, SupportsIndex):
            return self._snapshots[operator.index(index)]
        chosen = self._snapshots[index] if isinstance(index, slice) else [self._snapshots[i] for i in index]
        return Snapshots(chosen, self.name, self._demo)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshots) and (self.name, self._snapshots) == (other.name, other._snapshots)

    def __hash__(self) -> int:
        return hash((self.name, self._snapshots))

    def __repr__(self) -> str:
        labels = self.labels[:1] if len(self) == 1 else [self.labels[0], self.labels[-1]]
        return f"Snapshots({self.name}: {len(self)} snapshot{'s' * (len(self) > 1)}, {' ... '.join(labels)})"

    @property
    def labels(self) -> list[str]:
        """Names in tables and plots."""
        return [s.label for s in self._snapshots]

    @property
    def steps(self) -> list[int | None]:
        """Optimiser steps, where known."""
        return [s.step for s in self._snapshots]

    @property
    def tokens(self) -> list[int | None]:
        """Tokens seen in training, where known."""
        return [s.tokens for s in self._snapshots]

    def model(
        self,
        i: SupportsIndex,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        backend: str = "bridge",
    ) -> LanguageModel:
        """The i-th snapshot's model, as `Snapshot.load` gives it, and the same object the next time.

        All are kept when the weights of all snapshots together take at most 2 GiB, otherwise the last one only. A
        caller that holds on to the model before keeps two in memory.
        """
        place = range(len(self))[operator.index(i)]
        key = (place, str(torch.device(device)), dtype, backend)
        if key not in self._models:
            largest = max((_n_bytes(model) for model in self._models.values()), default=0)
            if largest * max(len(self), len(self._models) + 1) > _KEEP_BYTES:
                self._models.clear()
                gc.collect()  # the hooks tie a model's parts into cycles
            self._models[key] = self[place].load(device, dtype, backend)
        return self._models[key]

    def check(self, hook_name: str | None = None, *, weights: bool = True) -> None:
        """Refuse what would make a comparison across the snapshots void.

        Args:
            hook_name: a hook point that all must have.
            weights: also compare the weights, which downloads those that are not in the hub's cache yet.

        Raises:
            UserError: two snapshots of different width, depth or vocabulary, or of equal weights, both named; a hook
                point that does not exist.
        """
        if hook_name is not None:
            check_hook(hook_name, self._config)
        self._check_shapes()
        self._check_tokenizers()
        if weights:
            self._check_distinct(self.fingerprints)

    def _check_shapes(self) -> None:
        self._check_distinct([str(s.folder().resolve()) for s in self])
        first = self[0]
        for snapshot in self._snapshots[1:]:
            config = snapshot.config()
            for key, what in (("hidden_size", "width"), ("num_hidden_layers", "depth"), ("model_type", "architecture")):
                ours, theirs = getattr(self._config, key), getattr(config, key)
                if ours != theirs:
                    raise UserError(
                        f"snapshots {first.label!r} and {snapshot.label!r} differ in {what}, {ours} and {theirs}: "
                        "take snapshots of one pretraining run"
                    )

    def _check_tokenizers(self) -> None:
        """Tokenizers of different files may still have one vocabulary: only those are loaded and compared."""
        if len(self.tokenizer) > self._config.vocab_size:
            raise UserError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model {self._config.vocab_size}: give the "
                "tokenizer that the model was trained with"
            )
        vocabulary = self.tokenizer.get_vocab()
        seen: set[str] = set()
        for snapshot in self:
            files = hash_files(tokenizer_files(snapshot.tokenizer_source()))
            if files not in seen and snapshot.read_tokenizer().get_vocab() != vocabulary:
                raise UserError(
                    f"snapshots {self[0].label!r} and {snapshot.label!r} have tokenizers of different vocabulary: "
                    "take snapshots of one pretraining run"
                )
            seen.add(files)

    def _check_distinct(self, identities: Sequence[str]) -> None:
        first: dict[str, str] = {}
        for label, identity in zip(self.labels, identities, strict=True):
            if identity in first:
                raise UserError(
                    f"snapshots {first[identity]!r} and {label!r} have equal weights: leave one of them out, or check "
                    "that each folder or revision holds its own checkpoint"
                )
            first[identity] = label

    @property
    def fingerprints(self) -> list[str]:
        """sha256 of the weights of each."""
        bar = tqdm(self._snapshots, desc="fingerprints", unit="snapshot", leave=False, delay=2)
        return [s.fingerprint for s in bar]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first snapshot's; `check` sees to it that the others have the same vocabulary."""
        return self[0].read_tokenizer()

    @cached_property
    def _config(self) -> PretrainedConfig:
        return self[0].config()

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return int(self._config.hidden_size)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self._config.num_hidden_layers)

    @property
    def n_ctx(self) -> int:
        """Longest context, in tokens; 2048 where the config has none (ALiBi, such as BLOOM, trained on 2048)."""
        keys = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
        return next((int(value) for key in keys if (value := getattr(self._config, key, None))), 2048)
