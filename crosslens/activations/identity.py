"""What decides the sequences of a dataset, so that a cache's tokens can be used again without tokenising.

A file is identified by a hash of its contents, a dataset on the hub by its name, documents and token arrays in memory
by a hash of them, and the tokenizer by its definition. What cannot be read twice has no identity: its tokens are
compared instead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    options = {field.name: getattr(dataset, field.name) for field in fields(dataset) if field.name != "source"}
    return json.loads(json.dumps({"data": source, "tokenizer": defined, "seed": seed, **options}, default=str))


def data_digest(source: Any) -> str | None:
    """A hash of the documents; of a dataset on the hub its name, and None of what can be read once."""
    digest = xxhash.xxh3_128()
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
