"""A snapshot of a model: where its weights are, their fingerprint, and how it is loaded.

1. A snapshot is a local folder, or a revision of a repository on the Hugging Face hub. A revision is first resolved to
   the folder of its commit in the hub's cache; config, weights and tokenizer are read only from that folder.
   (Libraries silently ignore `revision=` for folders: every snapshot would then have the same weights.)
2. Its fingerprint is a checksum of the tensors, not of the files.
3. Python code that a repository brings (`auto_map` in its files) is run only with `trust_remote_code`: every load says
   so, because transformers would ask on the terminal otherwise. Kernels from the hub, which a config can name as its
   attention, are never run.
4. Loading gives a raw TransformerBridge (no compatibility mode, which would centre the weights), or a HookedTransformer
   without weight processing. Both compute what the model computes in transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import threading
import warnings
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from crosslens.distributed.devices import find_device
from crosslens.errors import UserError, brief, check_characters, check_inside, first_line
from crosslens.snapshots.adapters import merge, read_settings
from crosslens.snapshots.bridge import boot, boot_hooked, official_name
from crosslens.snapshots.hashes import remember_hash, remembered_hash
from crosslens.snapshots.hub import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    WEIGHTS,
    commit_of,
    evict,
    hub_file,
    hub_folder,
    is_on_disk,
    mark_download,
    record_fingerprint,
    recorded_dtype,
    recorded_fingerprint,
    split_name,
    split_place,
    unreachable,
    weight_etags,
)
from crosslens.snapshots.settings import ModelSettings
from crosslens.snapshots.sizes import check_sizes
from crosslens.snapshots.weights import DamagedFileError, hash_tensors, open_weights, stored_dtypes

LanguageModel: TypeAlias = Any
"""A TransformerBridge or a HookedTransformer; both have run_with_cache, run_with_hooks and stop_at_layer."""

# a tokenizer has one of the first files, and perhaps some of the second
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TOKENIZER_EXTRAS = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")

_TRUST = "if you trust it, allow it with --trust-remote-code (in Python: trust_remote_code=True)"

_LOADING = threading.RLock()


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files in a folder; empty if it has no tokenizer."""
    found = [folder / name for name in _TOKENIZERS + _TOKENIZER_EXTRAS if (folder / name).is_file()]
    return found if found and found[0].name in _TOKENIZERS else []


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over names and contents of small files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def cut_config(config: Any, n_blocks: int) -> None:
    """Cut a transformers configuration to the model's first blocks, in place."""
    config.num_hidden_layers = n_blocks
    if getattr(config, "layer_types", None):  # one per block
        config.layer_types = config.layer_types[:n_blocks]


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
    """Silence warnings, logs and progress bars of the libraries that load models, and restore them afterwards."""
    # these settings are global to the process, so threads that load models take turns
    with _LOADING, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        logged = logging.root.manager.disable
        bars, no_hub_bars = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
        warnings.simplefilter("ignore")
        logging.disable(max(logged, logging.WARNING))
        if bars:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                transformers_logging.enable_progress_bar()  # also enables the hub's
                if no_hub_bars:
                    disable_progress_bars()
            logging.disable(logged)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Snapshot:
    """One snapshot of a pretraining run. Nothing is looked up until it is needed.

    Raises:
        UserError: a revision of a local folder; in every method, a missing or damaged folder, repository, revision or
            file. The message names the snapshot, the file and the remedy.
    """

    label: str
    """Name in tables and plots."""
    step: int | None
    """Optimiser steps taken, where known."""
    tokens: int | None
    """Tokens seen in training, where known."""
    name: str
    """Repository on the hub; if `revision` is None, a local folder in the layout of transformers."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    tokenizer_folder: str | None = None
    """Local folder of the tokenizer; None if it is with the weights."""
    tokenizer_repository: str | None = None
    """Repository of the tokenizer; None if it is with the weights."""
    trust_remote_code: bool = False
    """Run the Python code that the repository or folder brings for its model or tokenizer, if it brings any."""
    adapter: str | None = None
    """A LoRA adapter that is merged into the weights: a folder, or `owner/name[/folder]@revision` on the hub."""

    _CONFIG: ClassVar[str] = CONFIG
    _WEIGHTS: ClassVar[tuple[str, ...]] = WEIGHTS

    def __post_init__(self) -> None:
        check_characters(self.label, "the label")
        if self.adapter is not None:
            check_characters(self.adapter, "the adapter")
        if self.revision is not None and Path(self.name).is_dir():
            raise self._error(
                f"{self.name!r} is a local folder, which has no revision {self.revision!r}: use Snapshots.local, or "
                "work in a directory without a folder of that name"
            )

    def parts(self) -> list[Snapshot]:
        """The model, and its adapter if it has one: what has files of its own."""
        adapter = self._adapter()
        return [self] if adapter is None else [replace(self, adapter=None), adapter]

    def _adapter(self) -> _Adapter | None:
        if self.adapter is None:
            return None
        return _Adapter(self.label, self.step, self.tokens, *split_place(self.adapter))

    @property
    def place(self) -> str:
        """Where it is, for tables: the revision or the folder, with that of an adapter."""
        last = self.parts()[-1]
        return (last.revision if last.revision not in (None, "main") else last.name) or ""

    def folder(self) -> Path:
        """The local folder with config.json; for a repository, that of the commit in the hub's cache."""
        if self.revision is not None:
            try:
                return hub_folder(self.name, self.revision, self._CONFIG)
            except UserError as error:
                raise self._error(str(error)) from error
        folder = Path(self.name)
        if not folder.is_dir():
            raise self._error(f"there is no folder {folder}: check its path (a repository needs a revision: 'main')")
        if not (folder / self._CONFIG).is_file():
            raise self._error(f"{folder} has no {self._CONFIG}: give a model in the layout of transformers")
        return folder

    @property
    def _commit(self) -> str:
        """Of a repository."""
        return commit_of(self.name, self.folder())

    def config(self) -> PretrainedConfig:
        """The configuration, from config.json, with eager attention whatever it says there."""
        folder = self.folder()
        if (folder / "adapter_config.json").is_file():  # applied to the weights, if the library peft is installed
            raise self._error(
                f"{folder} has an adapter (adapter_config.json), which is no part of the weights that are compared: "
                "give the model and the folder as model+adapter, merge it with merge_and_unload() and save the model, "
                "or delete the file"
            )
        if adapter := self._adapter():
            adapter.settings()
        try:
            check_sizes(folder / "config.json")
        except UserError as error:
            raise self._error(str(error)) from error
        try:
            with quiet():
                config = AutoConfig.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
                config._attn_implementation = (
                    "eager"  # `org/kernel` would be downloaded and run; no argument replaces it
                )
                return config
        except Exception as error:  # values of a wrong type or size can raise anything
            self._refuse_code(error, folder)
            raise self._error(f"transformers cannot read {folder / 'config.json'}: {brief(error)}") from error

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in `tokenizer_source`."""
        folder = self.tokenizer_source()
        try:
            with quiet():
                found = AutoTokenizer.from_pretrained(folder, trust_remote_code=self.trust_remote_code)
                found("a")  # some settings of a wrong type are only noticed here
                return found
        except Exception as error:  # tokenizers raises the base class
            self._refuse_code(error, folder)
            raise self._error(f"transformers cannot read the tokenizer in {folder}: {brief(error)}") from error

    @property
    def fingerprint(self) -> str:
        """sha256 of the tensors, however they are split into files; computed once, and remembered for other processes.

        For a commit on the hub whose weights were evicted, the recorded one. Weights that are not on this disk and have
        no record are downloaded.
        """
        return _join([part._own_fingerprint() for part in self.parts()])

    def _own_fingerprint(self) -> str:
        if self.revision is not None and not self.is_on_disk():
            known = recorded_fingerprint(self.name, self._commit)
            if known is not None:
                return known
        weights = self._weights()
        found = remembered_hash(weights)
        if found is None:
            files = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in weights)
            try:
                found = hash_tensors(files)
            except DamagedFileError as error:
                raise self._damaged(error.path) from error
            remember_hash(weights, found)
        if self.revision is not None and recorded_fingerprint(self.name, self._commit) != found:
            record_fingerprint(self.name, self._commit, found, _name(self.stored_dtype))
        return found

    @property
    def known_fingerprint(self) -> str | None:
        """The fingerprint, unless the weights have to be downloaded for it."""
        if self.is_on_disk():
            return self.fingerprint
        known = [
            part.fingerprint if part.is_on_disk() else recorded_fingerprint(part.name, part._commit)
            for part in self.parts()
        ]
        return None if None in known else _join([each for each in known if each])

    @property
    def known_dtype(self) -> str | None:
        """The name of `stored_dtype`, unless the weights have to be downloaded for it."""
        model = self.parts()[0]
        if not model.is_on_disk():
            return recorded_dtype(self.name, self._commit)
        return _name(self.stored_dtype)

    @property
    def origin(self) -> str:
        """What identifies the weights before they are downloaded: repository and commit; of a folder, the fingerprint.

        The contents of a commit never change.
        """
        return "+".join(p.fingerprint if p.revision is None else f"{p.name}@{p._commit}" for p in self.parts())

    def weight_etags(self) -> tuple[str, ...] | None:
        """The hub's checksums of the files of weights; None for a folder, or if the hub does not answer."""
        found: list[str] = []
        for part in self.parts():
            own = None if part.revision is None else weight_etags(part.name, part._commit, part._WEIGHTS)
            if own is None:
                return None
            found += own
        return tuple(found)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype in which most of the weights are stored."""
        counts: dict[torch.dtype, int] = {}
        try:
            with contextlib.ExitStack() as stack:
                for path in self._weights():
                    for dtype, n in stored_dtypes(path, stack):
                        counts[dtype] = counts.get(dtype, 0) + n
        except DamagedFileError as error:
            raise self._damaged(error.path) from error
        return max(counts, key=lambda dtype: counts[dtype])

    def is_on_disk(self) -> bool:
        """Whether the weights are on this disk; downloads nothing."""
        return all(p.revision is None or is_on_disk(p.name, p.revision, p._WEIGHTS) for p in self.parts())

    def evict(self) -> int:
        """Delete the weights from the hub's cache, and return the number of bytes freed.

        Local folders are kept, and so are weights that crosslens did not download.
        """
        return sum(evict(part.name, part._commit) for part in self.parts() if part.revision is not None)

    def tokenizer_source(self) -> Path:
        """The folder of the tokenizer; that of the main branch if the revision has none, or of the repository above a
        folder in it."""
        if self.tokenizer_folder is not None:
            return Path(self.tokenizer_folder)
        if self.tokenizer_repository is not None:
            return self._final().tokenizer_source()
        if found := self._fetch_tokenizer(self.name):
            return found
        if self.revision is not None:
            # the message below is about the place that was asked for
            with contextlib.suppress(UserError):
                if found := self._fetch_tokenizer(split_name(self.name)[0]):
                    return found
            with contextlib.suppress(UserError):
                if found := replace(self, revision="main")._fetch_tokenizer(self.name):
                    return found
        remedy = "save one there with save_pretrained"
        if self.revision is not None:
            remedy = f"the repository has none, or {unreachable(self.name, self.revision)}"
        raise self._error(f"there is no tokenizer in {self.folder()}: {remedy}")

    def load(
        self,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        backend: str = "bridge",
        n_blocks: int | None = None,
        *,
        attention: str = "eager",
    ) -> LanguageModel:
        """The model in evaluation mode, its parameters without gradients.

        Args:
            device: CUDA where it is available when None.
            dtype: dtype of its parameters: float32, bfloat16 or float16.
            backend: "bridge" for a raw TransformerBridge; "hooked_transformer" for a HookedTransformer without weight
                processing, for hub repositories that TransformerLens knows by name.
            n_blocks: load only the first blocks; those above are neither read nor kept in memory. The activations of
                such a model are right, its logits are meaningless.
            attention: "eager" or "sdpa", as in `ModelSettings`.
        """
        how: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "backend": backend, "attention": attention}
        settings = ModelSettings(find_device() if device is None else str(device), **how)
        device, torch_dtype = settings.device, getattr(torch, settings.dtype)
        self._check_device(device)
        official = self._official() if backend == "hooked_transformer" else self
        if attention != "eager":
            self._check_attention(attention)
        tokenizer = self.read_tokenizer()
        original = self._load_transformers(torch_dtype, n_blocks)
        trust = self.trust_remote_code
        if backend == "bridge":
            with quiet():
                model = boot(original.to(device), self.name, tokenizer, device, torch_dtype, attention, trust)
            return model.requires_grad_(False).eval()
        try:
            with quiet():
                commit = official._commit
                model = boot_hooked(original, official.name, commit, tokenizer, device, torch_dtype, n_blocks, trust)
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, RuntimeError, OSError) as error:
            raise self._error(
                f"HookedTransformer cannot load {self.name} as {official.name} ({first_line(error)}): use "
                "backend='bridge'"
            ) from error
        return model.requires_grad_(False).eval()

    def _check_attention(self, attention: str) -> None:
        config: Any = self.config()
        try:
            with quiet(), torch.device("meta"):  # the model's method that sets it does not refuse
                AutoModelForCausalLM.from_config(
                    config, attn_implementation=attention, trust_remote_code=self.trust_remote_code
                )
        except ValueError as error:
            self._refuse_code(error, self.folder())
            raise self._error(
                f"attention={attention!r} is not available for {config.model_type} in transformers: use "
                "attention='eager'"
            ) from error

    def _load_transformers(self, dtype: torch.dtype, n_blocks: int | None) -> Any:
        """The transformers model on the CPU, with the attention that TransformerLens's hooks need."""
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        config: Any = self.config()
        if n_blocks is not None:
            cut_config(config, n_blocks)
        try:
            with contextlib.ExitStack() as stack:
                for path in self._weights():
                    open_weights(path, stack)
            with quiet():
                model, report = from_pretrained(
                    self.folder(),
                    config=config,
                    dtype=dtype,
                    attn_implementation="eager",
                    output_loading_info=True,
                    trust_remote_code=self.trust_remote_code,
                )
        except DamagedFileError as error:
            raise self._damaged(error.path) from error
        except UserError:
            raise
        except Exception as error:  # as in `config`
            self._refuse_code(error, self.folder())
            raise self._error(f"transformers cannot load {self.folder()}: {brief(error)}") from error
        if missing := sorted(report["missing_keys"]):
            raise self._error(
                f"{self.folder()} is missing {len(missing)} tensors, such as {missing[0]}, which would be initialised "
                "at random: copy or convert the weights again"
            )
        if adapter := self._adapter():
            adapter.merge_into(model, n_blocks)
        return model

    def _check_device(self, device: str) -> None:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise self._error(f"device={device!r} needs CUDA, which is not available here: use device='cpu'")

    def _final(self) -> Snapshot:
        """The main branch of the tokenizer's repository."""
        assert self.tokenizer_repository is not None
        return replace(self, name=self.tokenizer_repository, revision="main", tokenizer_repository=None, adapter=None)

    def _official(self) -> Snapshot:
        """The snapshot whose name TransformerLens knows: this one, or the tokenizer's repository."""
        candidates: list[Snapshot] = [] if self.revision is None else [self]
        if self.tokenizer_repository is not None:
            candidates.append(self._final())
        candidate, known = next(((c, k) for c in candidates if (k := official_name(c.name))), (self, None))
        if known is None:
            raise self._error(
                f"HookedTransformer cannot load {self.name}, only hub repositories that TransformerLens knows by name: "
                "use backend='bridge'"
            )
        name, needs_code = known
        if needs_code and not self.trust_remote_code:
            raise self._error(
                f"for {name}, TransformerLens's HookedTransformer runs Python code from the hub: use "
                f"backend='bridge', or {_TRUST}"
            )
        return candidate

    def _file(self, filename: str) -> Path | None:
        """A file next to the config, downloaded if needed; None if it does not exist."""
        if self.revision is not None:
            return hub_file(self.name, self._commit, filename)
        path = self.folder() / filename
        return path if path.is_file() else None

    def _fetch_tokenizer(self, name: str) -> Path | None:
        """The folder with the tokenizer's files, downloaded: that of the snapshot, or its whole repository `name`."""
        there = self._file if name == self.name else functools.partial(hub_file, name, self._commit)
        found = next(filter(None, map(there, _TOKENIZERS)), None)
        for extra in _TOKENIZER_EXTRAS if found else ():
            there(extra)
        return None if found is None else found.parent

    def _weights(self) -> list[Path]:
        """The weight files that transformers would load."""
        if self.revision is not None and not is_on_disk(self.name, self.revision, self._WEIGHTS):
            mark_download(self.name, self._commit)
        for filename in self._WEIGHTS:
            if single := self._file(filename):
                return [single]
            if index := self._file(f"{filename}.index.json"):
                try:
                    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                    shards = [self._file(check_inside(name, f"{index}: file")) for name in names]
                except UserError:
                    raise
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
                    raise self._damaged(index) from error
                if None in shards:
                    raise self._absent(names[shards.index(None)])
                return [shard for shard in shards if shard]
        raise self._absent(" or ".join(self._WEIGHTS))

    def _absent(self, what: str) -> UserError:
        remedy = "copy the weights there"
        if self.revision is not None:
            remedy = f"the repository has none, or {unreachable(self.name, self.revision)}"
        return self._error(f"there is no {what} in {self.folder()}: {remedy}")

    def _damaged(self, path: Path) -> UserError:
        remedy = "copy it again, or leave this snapshot out"
        if self.revision is not None:
            remedy = f"run `hf download {self.name} --revision {self.revision} --force-download`"
        return self._error(f"{path} is truncated, damaged or not a weight file: {remedy}")

    def _refuse_code(self, error: Exception, folder: Path) -> None:
        """Say why transformers refused a folder, if it was because its own code is not trusted."""
        if not self.trust_remote_code and "trust_remote_code" in str(error):
            raise self._error(
                f"{folder} brings Python code of its own for its model or tokenizer (auto_map in its config.json or "
                f"tokenizer_config.json), which is not run: read the code, and {_TRUST}, or leave this snapshot out"
            ) from error

    def _error(self, message: str) -> UserError:
        return UserError(f"snapshot {self.label!r}: {message}")


class _Adapter(Snapshot):
    """An adapter of peft, which has its own files."""

    _CONFIG: ClassVar[str] = ADAPTER_CONFIG
    _WEIGHTS: ClassVar[tuple[str, ...]] = ADAPTER_WEIGHTS

    def settings(self) -> dict[str, Any]:
        """What its config says.

        Raises:
            UserError: it is damaged, or not merged here.
        """
        try:
            return read_settings(self.folder() / ADAPTER_CONFIG)
        except UserError as error:
            raise self._error(str(error)) from error

    def merge_into(self, model: Any, n_blocks: int | None) -> None:
        """Merge it into a model of transformers on the CPU, of which the first `n_blocks` are there (None: all).

        Raises:
            UserError: it is damaged, or was trained on another model.
        """
        try:
            with contextlib.ExitStack() as stack:
                readers: dict[str, Any] = {}
                for path in self._weights():
                    readers.update(open_weights(path, stack))
                merge(model, self.settings(), readers, n_blocks)
        except DamagedFileError as error:
            raise self._damaged(error.path) from error
        except UserError as error:
            raise self._error(f"the adapter in {self.folder()} cannot be merged: {error}") from error


def _join(fingerprints: list[str]) -> str:
    """One checksum for several; of one the same."""
    return fingerprints[0] if len(fingerprints) == 1 else hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()
