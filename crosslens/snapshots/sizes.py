"""Limits of the numbers in a config.json: larger ones are mistakes or traps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosslens.config import LARGEST
from crosslens.errors import UserError, read_json, shortened

_LIMITS = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "num_labels", "num_attention_heads", "n_head"), 1_000_000),
    **dict.fromkeys(("intermediate_size", "n_inner", "vocab_size"), 100_000_000),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 100_000_000),
}


def check_sizes(path: Path) -> None:
    """Refuse a config.json with sizes that no model has, before transformers makes lists and matrices of them.

    Raises:
        UserError: the file is no JSON object, or names the first such size.
    """

    def check(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                check(str(key), part)
        elif isinstance(value, list):
            for part in value:
                check(name, part)
        elif type(value) is int or (type(value) is float and name in _LIMITS):
            most = _LIMITS.get(name, LARGEST)
            if abs(value) > most:
                raise UserError(
                    f"{path}: {name}={shortened(value)} is more than {most:,}, which no model has: correct it"
                )

    check("", read_json(path, "config of a model"))
