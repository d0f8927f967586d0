"""What a crosscoder records of its snapshots, its activations and its training, in `metadata` of its `cfg.json`.

Entries that are not declared here are kept as they are. Any entry may be null, or missing.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints, is_typeddict


class _Named(TypedDict):
    label: str


class SnapshotEntry(_Named, total=False):
    """One snapshot."""

    step: int | None
    tokens: int | None
    fingerprint: str | None


class Metadata(TypedDict, total=False):
    """The entries that this package reads."""

    sae_lens_training_version: str | None
    training_architecture: str | None
    training_architecture_details: dict[str, Any] | None
    model_name: str | None
    hook_name: str | None
    dataset_path: str | None
    context_size: int | None
    prepend_bos: bool | None
    keep_special: bool | None
    separator: str | None
    drop_positions: int | None
    keep_roles: list[str] | None
    drop_roles: list[str] | None
    snapshots: list[SnapshotEntry] | None
    config: list[dict[str, Any]] | None
    tokenizer: str | None
    trust_remote_code: bool | None
    imported_from: str | None
    l0: float | None
    num_dead_features: int | None
    activation_scale: list[float] | None


def fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read from JSON has a declared type.

    Args:
        value: of JSON.
        kind: a plain type, a Literal, a TypedDict, or a union, list or dict of such; a whole number is a float, too.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if is_typeddict(kind):
        known = get_type_hints(kind)
        return (
            isinstance(value, dict)
            and value.keys() >= kind.__required_keys__
            and all(fits(value[name], known[name]) for name in value.keys() & known.keys())
        )
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(each, inner[1]) for each in value.values())
    if inner:  # of a union
        return any(fits(value, each) for each in inner)
    return type(value) in ((float, int) if kind is float else (kind,))


def in_words(kind: Any) -> str:
    """A declared type as it is written, for messages."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
