"""LoRA adapters in the files of peft, merged into the weights of a model.

    weight + scale * B A                 scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora
    weight + scale * (B A)^T             of GPT-2's layers, whose weights are (in, out) (fan_in_fan_out)

from Hu et al. (arXiv 2106.09685) and Kalajdzievski (arXiv 2312.03732). Tensors of an adapter that belong to no LoRA
(trained biases, `modules_to_save`) take the place of the model's. Every tensor of the file must find its place; what is
not LoRA, or another kind of it, is refused before anything is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from crosslens.errors import UserError, first_line, read_json, shortened

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_A|embedding_B|A|B)(?:\.default)?(?:\.weight)?")
# what changes the arithmetic or the shape of the model in another way
_UNSUPPORTED = (
    *("use_dora", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices"),
    *("alora_invocation_tokens", "use_qalora", "arrow_config", "use_bdlora"),
)
_MERGE = "merge it with peft's merge_and_unload(), and save the model"


def read_settings(path: Path) -> dict[str, Any]:
    """The entries of an adapter_config.json.

    Raises:
        UserError: it is damaged, no LoRA, or a kind of LoRA that is not merged here.
    """
    found = read_json(path, "config of an adapter")
    kind = found.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path} is of an adapter of type {shortened(kind)}: only LORA is merged here; {_MERGE}")
    if given := [name for name in _UNSUPPORTED if found.get(name)]:
        raise UserError(f"{path} has {given[0]}={shortened(found[given[0]])}, which is not merged here: {_MERGE}")
    begun = found.get("init_lora_weights")
    if isinstance(begun, str) and begun not in ("gaussian", "eva", "orthogonal"):  # others change the base as well
        raise UserError(f"{path} has init_lora_weights={shortened(begun)}, which is not merged here: {_MERGE}")
    numbers: list[Any] = [found.get("r"), found.get("lora_alpha")]
    patterns: list[Any] = [found.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns) or any(
        type(number) not in (int, float) or number <= 0
        for number in (*numbers, *(value for pattern in patterns for value in pattern.values()))
    ):
        raise UserError(f"{path} has no numbers above 0 for r and lora_alpha: copy it again")
    return found


def _of_module(settings: Mapping[str, Any], what: str, module: str) -> float:
    """A rank or alpha: that of the first pattern that matches the end of a module's name, else of all."""
    for pattern, value in (settings.get(f"{'rank' if what == 'r' else 'alpha'}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(settings[what])


@torch.no_grad()
def merge(
    model: nn.Module, settings: Mapping[str, Any], tensors: Mapping[str, Callable[[], Tensor]], n_blocks: int | None
) -> None:
    """Merge an adapter into a model of transformers, in place; sums are computed in float32.

    Args:
        model: on the CPU.
        settings: from `read_settings`.
        tensors: readers of the adapter's tensors by their names in the file.
        n_blocks: number of blocks of a model that was cut; tensors of those above are left out. None: it was not cut.

    Raises:
        UserError: a tensor that has no place in the model, lacks its partner, or has another shape.
    """
    modules, pairs = dict(model.named_modules()), dict[str, dict[str, str]]()
    for key in tensors:
        name = key.removeprefix(_PREFIX)
        if match := _LORA.fullmatch(name):
            module = match["module"]
            if _is_cut(module, n_blocks):
                continue
            if module not in modules:
                raise UserError(f"its tensor {key} has no place in the model: give the model it was trained on")
            pairs.setdefault(module, {})[match["kind"][-1]] = key
        elif not _is_cut(name, n_blocks):
            # peft 0.19 and earlier wrote the wrapper's name
            _replace(modules, name.replace(".modules_to_save.default.", ".").replace(".base_layer.", "."), key, tensors)
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise UserError(f"its tensor {next(iter(pair.values()))} lacks its partner: copy the adapter again")
        _add(modules[module], settings, module, *(tensors[pair[kind]]().float() for kind in "AB"))


def _is_cut(name: str, n_blocks: int | None) -> bool:
    block = re.search(r"\.(\d+)\.", name)
    return n_blocks is not None and block is not None and int(block[1]) >= n_blocks


def _add(module: Any, settings: Mapping[str, Any], name: str, a: Tensor, b: Tensor) -> None:
    """Add the product of one pair: `a` (r, in), `b` (out, r); of an embedding `a` (r, rows), `b` (width, r)."""
    rank = _of_module(settings, "r", name)
    alpha = _of_module(settings, "lora_alpha", name)
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    weight = getattr(module, "weight", None)
    turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    try:
        if a.shape[0] != rank or b.shape[1] != rank:
            raise ValueError(f"rank {a.shape[0]}, its config says {rank:g}")
        change = scale * (b @ a)
        change = change.T if turned else change
        if weight is None or weight.shape != change.shape:
            raise ValueError(f"{tuple(change.shape)}, the model has {None if weight is None else tuple(weight.shape)}")
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"its change of {name} does not fit ({first_line(error)}): give the model it was trained on"
        ) from error
    weight.copy_((weight.float() + change).to(weight.dtype))


def _replace(modules: Mapping[str, Any], name: str, key: str, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
    """Put a tensor that was trained as a whole into its place."""
    module, _, what = name.rpartition(".")
    there = getattr(modules.get(module), what, None)
    value = tensors[key]()
    if not isinstance(there, Tensor) or there.shape != value.shape:
        raise UserError(f"its tensor {key} has no place in the model: give the model it was trained on")
    owners = [other for other in modules.values() if getattr(other, what, None) is there]
    if len(owners) > 1 and not torch.equal(there, value.to(there.dtype)):
        raise UserError(f"its tensor {key} takes the place of weights that two layers share: {_MERGE}")
    there.copy_(value.to(there.dtype))
