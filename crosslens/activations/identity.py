"""What decides the sequences of a dataset, so that a cache's tokens can be used again without tokenising.

A file is identified by a hash of its contents, a dataset on the hub by its name, documents and token arrays in memory
by a hash of them, and the tokenizer by its definition. What cannot be read twice has no identity: its tokens are
compared instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from crosslens.activations.tokens import Dataset
from crosslens.snapshots.hashes import tokenizer_definition

_BYTES = 1 << 24  # of a file at a time


def source_identity(dataset: Dataset, tokenizer: Any, seed: int) -> dict[str, Any] | None:
    """Everything that decides the sequences, in types of JSON; None if that cannot be said.

    Args:
        dataset: source and options.
        tokenizer: a Hugging Face tokenizer.
        seed: seed for the order of the sequences.
    """
    source, defined = data_digest(dataset.source), tokenizer_definition(tokenizer)
    if source is None or defined is None:
        return None
    left = ("source", "keep_roles", "drop_roles")
    options = {field.name: getattr(dataset, field.name) for field in fields(dataset) if field.name not in left}
    options |= chosen_roles(dataset)
    if template := getattr(tokenizer, "chat_template", None):
        options["chat_template"] = xxhash.xxh3_128_hexdigest(json.dumps(template).encode())
    return json.loads(json.dumps({"data": source, "tokenizer": defined, "seed": seed, **options}, default=str))


def chosen_roles(dataset: Dataset) -> dict[str, list[str]]:
    """The roles that are kept or left out, if any are; nothing otherwise, as in caches and runs of earlier versions."""
    both = {"keep_roles": dataset.keep_roles, "drop_roles": dataset.drop_roles}
    return {name: [*roles] for name, roles in both.items() if roles is not None}


def data_digest(source: Any) -> str | None:
    """A hash of the documents; of a dataset on the hub its name, of a mix those of its parts, and None of what can be
    read once."""
    digest = xxhash.xxh3_128()
    if isinstance(source, Mapping):
        return ", ".join(f"{data_digest(name)}={weight!r}" for name, weight in source.items())
    if isinstance(source, (str, Path)):
        if not Path(source).is_file():
            return str(source)
        with open(source, "rb") as file:
            while part := file.read(_BYTES):
                digest.update(part)
    elif isinstance(source, (Tensor, np.ndarray)):
        array = np.ascontiguousarray(source.numpy() if isinstance(source, Tensor) else source)
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    elif isinstance(source, Sequence) and all(isinstance(text, str) for text in source):
        for text in source:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(f"{len(raw)} ".encode())
            digest.update(raw)
    else:
        return None
    return digest.hexdigest()
