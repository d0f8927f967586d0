"""Snapshots whose models are in memory, or come from a function: `Snapshots.from_models`.

1. A model is a TransformerBridge, a HookedTransformer or a causal language model of transformers. It is never changed:
   `load` gives a copy of its modules whose parameters share the memory of the original, so that nothing is stored twice
   and evaluation mode, hooks and gradients of the two are independent. Only another device or dtype copies weights.
2. A function is called whenever its model is needed, and the result is not kept, so one model at a time is in memory.
3. The fingerprint is the checksum of the parameters. A model of transformers has that of the folder that
   `save_pretrained` makes of it. A model that changes after it was read is refused.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from crosslens.distributed.devices import find_device
from crosslens.errors import UserError, first_line
from crosslens.snapshots.bridge import BRIDGE, HOOKED, kind_of, transformers_model
from crosslens.snapshots.folders import steps_of
from crosslens.snapshots.settings import ModelSettings
from crosslens.snapshots.snapshot import LanguageModel, Snapshot, quiet
from crosslens.snapshots.weights import hash_named

PLAIN = "transformers model"


@dataclass(frozen=True)
class _Known:
    """What is read once from a model."""

    kind: str
    config: PretrainedConfig
    dtype: torch.dtype
    fingerprint: str | None
    """Of a model from a function, which is not there later."""
    hooks: frozenset[str] | None
    """Names of its hook points; None for a model that is not a bridge yet."""
    tokenizer: PreTrainedTokenizerBase | None
    state: tuple[tuple[int, int], ...]
    """Which tensors, and how often each was written to."""


@dataclass(frozen=True)
class LoadedSnapshot(Snapshot):
    """A snapshot whose model is in memory, or comes from a function.

    Raises:
        UserError: in every method, a model that is none of the three kinds or has no language-model head, a function
            that fails, a model without a tokenizer, or one that changed. The message names the snapshot.
    """

    source: Any = field(default=None, repr=False)
    """The model, or a function without arguments that returns it."""
    given_tokenizer: PreTrainedTokenizerBase | None = field(default=None, repr=False, compare=False)
    """The tokenizer; None takes that of the bridge or HookedTransformer."""

    @property
    def is_function(self) -> bool:
        """Whether the model comes from a function."""
        return not isinstance(self.source, nn.Module)

    @property
    def identity(self) -> str:
        """Different for different objects."""
        return str(id(self.source))

    @property
    def kind(self) -> str:
        """What the model is."""
        return self._known.kind

    @property
    def hooks(self) -> frozenset[str] | None:
        """Names of its hook points; None for a model of transformers, whose configuration says which it will have."""
        return self._known.hooks

    @property
    def fingerprint(self) -> str:
        """sha256 of the parameters; for a model of transformers, that of the folder that `save_pretrained` makes."""
        if not self.is_function:
            self._check_unchanged(self.source)
        return self._known.fingerprint or self._fingerprint

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of most parameters."""
        return self._known.dtype

    def config(self) -> PretrainedConfig:
        """The configuration; that of a HookedTransformer in the names of transformers."""
        return copy.deepcopy(self._known.config)

    def folder(self) -> Path:
        """There is none."""
        raise self._error("its model is in memory, not in a folder: save it with save_pretrained to have one")

    def is_on_disk(self) -> bool:
        """True: nothing needs to be downloaded."""
        return True

    def evict(self) -> int:
        """Nothing is deleted."""
        return 0

    def tokenizer_source(self) -> Path:
        """A temporary folder with the tokenizer: TransformerLens changes tokenizers, and reads them from a place."""
        return Path(self._saved_tokenizer.name)

    def load(
        self,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "float32",
        backend: str = "bridge",
        n_blocks: int | None = None,
        *,
        attention: str = "eager",
    ) -> LanguageModel:
        """The model in evaluation mode, its parameters without gradients; the original stays as it is.

        Args:
            device: CUDA where it is available when None; weights on another device are copied to it.
            dtype: dtype of its parameters; weights of another dtype are copied.
            backend: "bridge" for models of transformers, which become one; bridges and HookedTransformers stay what
                they are.
            n_blocks: ignored: the whole model is in memory anyway.
            attention: "eager", whose scores TransformerLens's hooks show.
        """
        del n_blocks
        if attention != "eager":
            raise self._error(f"attention={attention!r} is not available for models in memory: use attention='eager'")
        if self._known.kind == PLAIN:
            return super().load(device, dtype, backend)
        if backend == "hooked_transformer" and self._known.kind == BRIDGE:
            raise self._not_hooked()
        where = find_device() if device is None else str(device)
        how: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
        settings = ModelSettings(where, **how)
        self._check_device(settings.device)
        with quiet():
            model = self._private_copy(getattr(torch, settings.dtype))
            if {p.device for p in model.parameters()} != {torch.device(settings.device)}:
                model = model.to(settings.device)
        return model.eval()

    def _load_transformers(self, dtype: torch.dtype, n_blocks: int | None) -> Any:
        """A private copy of the transformers model, with the attention that TransformerLens's hooks need."""
        del n_blocks
        model = self._private_copy(dtype)
        model.set_attn_implementation("eager")
        return model

    def _official(self) -> Snapshot:
        raise self._not_hooked()

    def _not_hooked(self) -> UserError:
        return self._error(
            f"backend='hooked_transformer' does not fit a {self._known.kind} in memory: use backend='bridge', or give "
            "HookedTransformers"
        )

    def _private_copy(self, dtype: torch.dtype) -> Any:
        """A copy of the modules around the same weights; the weights too, if the dtype is another."""
        original = self._original()
        if not self.is_function:
            self._check_unchanged(original)
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in original.parameters()}
        shared |= {id(buffer): buffer for buffer in original.buffers()}
        for module in original.modules():  # bridges keep results of the last run, with their graph
            held = [value for value in vars(module).values() if isinstance(value, Tensor) and not value.is_leaf]
            shared |= {id(value): value.detach() for value in held}
        tokenizer = getattr(original, "tokenizer", None)
        shared |= {id(tokenizer): tokenizer}
        model = copy.deepcopy(original, shared)
        for parameter in model.parameters():  # not `to`, which would round the tables of rotary embeddings too
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        if self._known.kind != PLAIN:
            model.cfg.dtype = dtype
        return model

    def _original(self) -> Any:
        """The model, called for if it comes from a function."""
        if not self.is_function:
            return self.source
        try:
            model = self.source()
        except UserError:
            raise
        except Exception as error:
            # a function of the user's may raise anything
            raise self._error(f"its function failed: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(model, nn.Module):
            raise self._error(f"its function returned a {type(model).__name__}: return {_VALID}")
        return model

    def _check_unchanged(self, model: Any) -> None:
        if _state(model) != self._known.state:
            raise self._error(
                "its weights were changed or moved after they were read: give copies (copy.deepcopy) of models that "
                "are still trained"
            )

    @cached_property
    def _known(self) -> _Known:
        model = self._original()
        kind = self.check_kind(model)
        if any(p.is_meta for p in model.parameters()):
            raise self._error("its weights are not loaded (device meta): load them first")
        sizes: dict[torch.dtype, int] = {}
        for p in model.parameters():
            sizes[p.dtype] = sizes.get(p.dtype, 0) + p.numel()
        return _Known(
            kind,
            _as_transformers(model) if kind == HOOKED else (transformers_model(model) or model).config,
            max(sizes, key=lambda dtype: sizes[dtype]),
            _hash(model, kind) if self.is_function else None,
            None if kind == PLAIN else frozenset(model.hook_dict),
            getattr(model, "tokenizer", None),
            _state(model),
        )

    def check_kind(self, model: Any) -> str:
        """What kind of model `model` is.

        Args:
            model: of transformers or TransformerLens.

        Raises:
            UserError: it is neither, or has no language-model head.
        """
        if kind := kind_of(model):
            return kind
        if isinstance(model, PreTrainedModel):
            if model.get_output_embeddings() is None:
                raise self._error(
                    f"{type(model).__name__} has no language-model head: load it with AutoModelForCausalLM"
                )
            return PLAIN
        merge = "; merge an adapter first, with merge_and_unload()" if hasattr(model, "merge_and_unload") else ""
        raise self._error(f"{type(model).__name__} is not a model that can be used: give {_VALID}{merge}")

    @cached_property
    def _fingerprint(self) -> str:
        return _hash(self.source, self.kind)

    @cached_property
    def _saved_tokenizer(self) -> tempfile.TemporaryDirectory[str]:
        tokenizer = self.given_tokenizer if self.given_tokenizer is not None else self._known.tokenizer
        if tokenizer is None:
            raise self._error("its model has no tokenizer: give one with tokenizer=")
        folder = tempfile.TemporaryDirectory(prefix="crosslens-tokenizer-")
        tokenizer.save_pretrained(folder.name)
        return folder


_VALID = "a TransformerBridge, a HookedTransformer, or a causal language model of transformers"


def loaded_snapshots(
    models: Sequence[Any],
    labels: Sequence[str] | None,
    steps: Sequence[int | None] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[LoadedSnapshot]:
    """A snapshot for each model or function; nothing is computed, and no function called.

    Raises:
        UserError: no list, no labels, lists of different lengths, one object twice, something that is neither a model
            nor a function, a wrong tokenizer, or models of transformers without one.
    """
    if isinstance(models, nn.Module) or not isinstance(models, Sequence) or not models:
        what = "an empty list" if isinstance(models, Sequence) else f"a {type(models).__name__}"
        raise UserError(f"models is {what}: give a list of models, or of functions that load one")
    n = len(models)
    if labels is None or isinstance(labels, str):
        raise UserError(f"labels={labels!r} must be a list of {n} names, one for each model, such as ['base', 'chat']")
    for name, values in (("labels", labels), ("steps", steps)):
        if values is not None and len(values) != n:
            raise UserError(f"{len(values)} {name} for {n} models: give one for each")
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"tokenizer is a {type(tokenizer).__name__}: give a tokenizer of transformers")
    rows = list(zip(labels, steps or steps_of(labels), models, strict=True))
    for label, _, model in rows:
        if not isinstance(model, nn.Module) and (isinstance(model, type) or not callable(model)):
            raise UserError(
                f"snapshot {label!r}: a {type(model).__name__} is neither a model nor a function: give {_VALID}, or a "
                "function that loads one"
            )
    snapshots = [
        LoadedSnapshot(label, step, None, "model in memory", source=model, given_tokenizer=tokenizer)
        for label, step, model in rows
    ]
    for snapshot in snapshots:
        if not snapshot.is_function:
            snapshot.check_kind(snapshot.source)
            if tokenizer is None and getattr(snapshot.source, "tokenizer", None) is None:
                raise snapshot._error("its model has no tokenizer: give one with tokenizer=")
    return snapshots


def _state(model: nn.Module) -> tuple[tuple[int, int], ...]:
    return tuple((p.data_ptr(), p._version) for p in model.parameters())


def _hash(model: Any, kind: str) -> str:
    """sha256 of the parameters; those of a model of transformers under the names that `save_pretrained` writes."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    if kind == PLAIN:
        # transformers 4 writes the names that the modules have
        with contextlib.suppress(ImportError):
            from transformers.core_model_loading import revert_weight_conversion

            named = revert_weight_conversion(model, named)
    return hash_named({name: partial(Tensor.cpu, tensor) for name, tensor in named.items()})


def _as_transformers(model: Any) -> PretrainedConfig:
    """The configuration of a HookedTransformer, in the names of transformers."""
    cfg = model.cfg
    entries: dict[str, Any] = dict(
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads,
        head_dim=cfg.d_head,
        vocab_size=cfg.d_vocab,
        max_position_embeddings=cfg.n_ctx,
        use_parallel_residual=cfg.parallel_attn_mlp,
        parameter_bytes=sum(p.nbytes for p in model.parameters()),
    )
    return PretrainedConfig(**entries)
