"""A checkpoint of a model: where its weights lie, what they are, and how it is loaded.

1. A checkpoint is a local folder, or a revision of a repository on the Hugging Face hub. A revision is first resolved
   to the folder of its commit in the hub's cache; config, weights and tokenizer are read from that folder alone.
   (Libraries ignore `revision=` for folders without a word: every snapshot would then have the same weights.)
2. Its fingerprint is a checksum of the tensors themselves, not of the files.
3. Loading gives a raw TransformerBridge (no compatibility mode, which would centre the weights), or a HookedTransformer
   without weight processing. Both compute what the model computes in transformers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import pickle
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from crosslens.errors import UserError, did_you_mean, first_line

LanguageModel: TypeAlias = Any
"""A TransformerBridge or a HookedTransformer; both have run_with_cache, run_with_hooks and stop_at_layer."""

BACKENDS = ("bridge", "hooked_transformer")

# one of the first makes a tokenizer, the others go with it
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_TOKENIZER_EXTRAS = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")
# masks and tables that follow from the config: older files of a model hold them, newer ones do not
_BUFFERS = (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer that lie in a folder; empty where they make none."""
    found = [folder / name for name in _TOKENIZERS + _TOKENIZER_EXTRAS if (folder / name).is_file()]
    return found if found and found[0].name in _TOKENIZERS else []


def hash_files(files: Iterable[Path]) -> str:
    """sha256 over names and contents of small files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _hub_folder(repo: str, revision: str) -> Path:
    """Folder of a revision's commit in the hub's cache, with config.json in it; looked up once per process."""
    where = f"{repo}@{revision}"
    try:
        return Path(huggingface_hub.hf_hub_download(repo, "config.json", revision=revision)).parent
    except hub_errors.HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a repository: give one such as 'EleutherAI/pythia-14m'") from error
    except hub_errors.GatedRepoError as error:
        raise UserError(f"{where} is gated: accept its terms on huggingface.co, then run `hf auth login`") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no repository {repo!r} on the hub: check its spelling; if it is private, run `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo} has no revision {revision!r}: see https://huggingface.co/{repo}/tree/main for those it has"
        ) from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise UserError(f"{where} is not in the local cache and {_unreachable(repo, revision)}") from error
    except hub_errors.EntryNotFoundError as error:
        raise UserError(f"{where} has no config.json: choose a repository in the layout of transformers") from error


def _hub_file(repo: str, commit: str, filename: str) -> Path | None:
    """A file of a commit, downloaded where it is not in the cache yet; None where it cannot be had."""
    cached = huggingface_hub.try_to_load_from_cache(repo, filename, revision=commit)
    if isinstance(cached, str):
        return Path(cached)
    if cached is not None:  # the hub said earlier that this commit has no such file
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(repo, filename, revision=commit))
    except (hub_errors.EntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        return None


def _unreachable(repo: str, revision: str) -> str:
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    return (
        f"{'HF_HUB_OFFLINE is set' if offline else 'the hub cannot be reached'}: "
        f"run `hf download {repo} --revision {revision}` once {'without it' if offline else 'with a connection'}"
    )


@functools.cache
def _hash_tensors(files: tuple[tuple[Path, int, int], ...]) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, by name.

    Args:
        files: path, size and time of change of each file; the latter two let the cache see a change.
    """
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        readers: dict[str, Callable[[], Tensor]] = {}
        for path, _, _ in files:
            readers.update(_open_weights(path, stack))
        for name in sorted(readers):
            if not name.endswith(_BUFFERS):
                tensor = readers[name]()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _open_weights(path: Path, stack: contextlib.ExitStack) -> dict[str, Callable[[], Tensor]]:
    """A reader for each tensor of a file, which stays open and mapped into memory as long as `stack` does."""
    try:
        if path.suffix == ".safetensors":
            file = stack.enter_context(safe_open(path, framework="pt"))
            return {name: functools.partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
        # early checkpoints of some families have nothing else; weights_only lets no code in
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: functools.partial(state.get, name) for name in state}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise _DamagedFileError(path) from error


@contextlib.contextmanager
def _quiet() -> Generator[None, None, None]:
    """Hold back warnings, log lines and bars of the libraries that load models; afterwards all is as it was."""
    logged = logging.root.manager.disable
    bars, no_hub_bars = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(max(logged, logging.WARNING))
        if bars:
            transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            if bars:
                transformers_logging.enable_progress_bar()  # switches the hub's on as well
                if no_hub_bars:
                    disable_progress_bars()
            logging.disable(logged)


class _DamagedFileError(Exception):
    """A file of weights that cannot be read."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path = path


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint of a pretraining run. Nothing is looked up before it is asked for.

    Every method raises `UserError` for a folder, repository, revision or file that is missing or damaged; the message
    names the snapshot, the file and the remedy.
    """

    label: str
    """Its name in tables and plots."""
    step: int | None
    """Optimiser steps taken, where known."""
    tokens: int | None
    """Tokens seen in training, where known."""
    name: str
    """Repository on the hub; a local folder in the layout of transformers where `revision` is None."""
    revision: str | None = None
    """Branch, tag or commit of the repository."""
    tokenizer_folder: str | None = None
    """Local folder of the tokenizer; None: it lies with the weights."""

    def __post_init__(self) -> None:
        if self.revision is not None and Path(self.name).is_dir():
            raise self._error(
                f"{self.name!r} is a local folder, which has no revision {self.revision!r}: use Snapshots.local, or "
                "work where no folder bears the name of the repository"
            )

    def folder(self) -> Path:
        """The local folder with config.json in it; of a repository, that of the commit in the hub's cache."""
        if self.revision is not None:
            try:
                return _hub_folder(self.name, self.revision)
            except UserError as error:
                raise self._error(str(error)) from error
        folder = Path(self.name)
        if not folder.is_dir():
            raise self._error(f"there is no folder {folder}: check its path (a repository needs a revision: 'main')")
        if not (folder / "config.json").is_file():
            raise self._error(f"{folder} has no config.json: give a model in the layout of transformers")
        return folder

    def config(self) -> PretrainedConfig:
        """The configuration, from config.json alone."""
        folder = self.folder()
        try:
            with _quiet():
                return AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise self._error(f"transformers cannot read {folder / 'config.json'}: {first_line(error)}") from error

    def read_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer in `tokenizer_source`."""
        folder = self.tokenizer_source()
        try:
            with _quiet():
                return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise self._error(f"transformers cannot read the tokenizer in {folder}: {first_line(error)}") from error

    @property
    def fingerprint(self) -> str:
        """sha256 of the tensors, however they are split into files; computed once per process."""
        files = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in self._weights())
        try:
            return _hash_tensors(files)
        except _DamagedFileError as error:
            raise self._damaged(error.path) from error

    def tokenizer_source(self) -> Path:
        """The folder of the tokenizer; the repository's main branch where the revision has none."""
        if self.tokenizer_folder is not None:
            return Path(self.tokenizer_folder)
        if self._fetch_tokenizer():
            return self.folder()
        if self.revision not in (None, "main"):
            with contextlib.suppress(UserError):  # not cached, say; the message below is about what was asked for
                main = replace(self, revision="main")
                if main._fetch_tokenizer():
                    return main.folder()
        remedy = "save one there with save_pretrained"
        if self.revision is not None:
            remedy = f"the repository has none, or {_unreachable(self.name, self.revision)}"
        raise self._error(f"there is no tokenizer in {self.folder()}: {remedy}")

    def load(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, backend: str = "bridge"
    ) -> LanguageModel:
        """The model in evaluation mode, its parameters without gradients.

        Args:
            device: where it lives.
            dtype: of its parameters.
            backend: "bridge" for a raw TransformerBridge; "hooked_transformer" for a HookedTransformer without weight
                processing, for hub repositories that TransformerLens knows by name.
        """
        if backend not in BACKENDS:
            raise self._error(
                f"unknown backend {backend!r}: choose {' or '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
            )
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise self._error(f"device={str(device)!r} needs CUDA, which is not available here: use device='cpu'")
        if backend == "hooked_transformer":
            self._require_hooked_transformer()
        tokenizer = self.read_tokenizer()
        original = self._load_transformers(dtype)
        # imported late: it takes seconds
        from transformer_lens import HookedTransformer
        from transformer_lens.model_bridge import TransformerBridge

        with _quiet():
            if backend == "bridge":
                model = TransformerBridge.boot_transformers(
                    self.name, hf_model=original.to(device), tokenizer=tokenizer, device=str(device), dtype=dtype
                )
            else:
                # checkpoint_value= would look for weights of its own; revision= is for the config, read once more
                model = HookedTransformer.from_pretrained_no_processing(
                    self.name,
                    hf_model=original,
                    tokenizer=tokenizer,
                    device=str(device),
                    dtype=dtype,
                    revision=self.folder().name,
                )
        return model.requires_grad_(False).eval()

    def _load_transformers(self, dtype: torch.dtype) -> Any:
        """The model of transformers on the CPU, with the attention that TransformerLens's hooks need."""
        from_pretrained: Any = AutoModelForCausalLM.from_pretrained
        try:
            with contextlib.ExitStack() as stack:
                for path in self._weights():
                    _open_weights(path, stack)
            with _quiet():
                model, report = from_pretrained(
                    self.folder(), dtype=dtype, attn_implementation="eager", output_loading_info=True
                )
        except _DamagedFileError as error:
            raise self._damaged(error.path) from error
        except UserError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise self._error(f"transformers cannot load {self.folder()}: {first_line(error)}") from error
        if missing := sorted(report["missing_keys"]):
            raise self._error(
                f"{self.folder()} lacks {len(missing)} tensors, such as {missing[0]}, which would be random numbers: "
                "copy or convert the weights again"
            )
        return model

    def _require_hooked_transformer(self) -> None:
        known = self.revision is not None
        if known:
            from transformer_lens.loading_from_pretrained import get_official_model_name

            try:
                get_official_model_name(self.name)
            except ValueError:
                known = False
        if not known:
            raise self._error(
                f"HookedTransformer cannot load {self.name}, only hub repositories that TransformerLens knows by name: "
                "use backend='bridge'"
            )

    def _file(self, filename: str) -> Path | None:
        """A file beside the config, downloaded at need; None where there is none."""
        if self.revision is not None:
            return _hub_file(self.name, self.folder().name, filename)
        path = self.folder() / filename
        return path if path.is_file() else None

    def _fetch_tokenizer(self) -> bool:
        """Whether the checkpoint has a tokenizer; its files are in the folder afterwards."""
        if not any(self._file(name) for name in _TOKENIZERS):
            return False
        for name in _TOKENIZER_EXTRAS:
            self._file(name)
        return True

    def _weights(self) -> list[Path]:
        """The files of the weights, chosen as transformers chooses them."""
        for filename in ("model.safetensors", "pytorch_model.bin"):
            if single := self._file(filename):
                return [single]
            if index := self._file(f"{filename}.index.json"):
                try:
                    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise self._damaged(index) from error
                shards = [self._file(name) for name in names]
                if None in shards:
                    raise self._absent(names[shards.index(None)])
                return [shard for shard in shards if shard]
        raise self._absent("model.safetensors or pytorch_model.bin")

    def _absent(self, what: str) -> UserError:
        remedy = "copy the weights there"
        if self.revision is not None:
            remedy = f"the repository has none, or {_unreachable(self.name, self.revision)}"
        return self._error(f"there is no {what} in {self.folder()}: {remedy}")

    def _damaged(self, path: Path) -> UserError:
        remedy = "copy it again, or leave this snapshot out"
        if self.revision is not None:
            remedy = f"run `hf download {self.name} --revision {self.revision} --force-download`"
        return self._error(f"{path} is truncated, damaged or no file of weights: {remedy}")

    def _error(self, message: str) -> UserError:
        return UserError(f"snapshot {self.label!r}: {message}")
