"""Checks that snapshots are comparable: same configuration, vocabulary and dtype, but different weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from crosslens.errors import UserError, shortened
from crosslens.snapshots.snapshot import Snapshot, hash_files, tokenizer_files

# entries with a readable name for messages; they are compared first
_NAMED = {"hidden_size": "width", "num_hidden_layers": "depth", "model_type": "architecture"}
# entries that depend on the release of transformers, on training or on generation: the computation is the same
_IRRELEVANT = {
    *("_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "return_dict"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp", "is_decoder"),
    *("attention_dropout", "hidden_dropout", "classifier_dropout", "slow_but_exact", "output_attentions"),
    *("output_hidden_states", "chunk_size_feed_forward", "problem_type", "id2label", "label2id"),
}


def check_configs(snapshots: Sequence[Snapshot]) -> None:
    """Refuse two snapshots in one folder, and configurations that compute different things.

    Raises:
        UserError: names both snapshots, the entry and its two values.
    """
    check_distinct([s.label for s in snapshots], [str(s.folder().resolve()) for s in snapshots])
    first, ours = snapshots[0], snapshots[0].config()
    for snapshot in list(snapshots)[1:]:
        theirs = snapshot.config()
        for key, what in _NAMED.items():
            _compare(first, snapshot, what, getattr(ours, key), getattr(theirs, key))
        one, other = _entries(ours), _entries(theirs)
        for key in sorted(one.keys() | other.keys()):
            _compare(first, snapshot, f"{key} of their configuration", one.get(key), other.get(key))


def _entries(config: Any) -> dict[str, Any]:
    # entries unknown to transformers come from older releases and have no effect
    known = type(config)().to_dict().keys() - _IRRELEVANT
    return {key: value for key, value in config.to_dict().items() if key in known}


def _compare(first: Snapshot, second: Snapshot, what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise UserError(
            f"snapshots {first.label!r} and {second.label!r} differ in {what}, {shortened(ours)} and "
            f"{shortened(theirs)}: take snapshots of one pretraining run"
        )


def check_tokenizers(snapshots: Sequence[Snapshot], tokenizer: PreTrainedTokenizerBase, n_embedded: int) -> None:
    """Refuse tokenizers with different vocabularies, and one that is larger than the models' embedding.

    Equal files are one vocabulary; tokenizers with different files are loaded and compared.

    Raises:
        UserError: names two snapshots, or both sizes.
    """
    if len(tokenizer) > n_embedded:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {n_embedded}: give the tokenizer that the model was "
            "trained with"
        )
    vocabulary = tokenizer.get_vocab()
    seen: set[str] = set()
    for snapshot in snapshots:
        files = hash_files(tokenizer_files(snapshot.tokenizer_source()))
        if files not in seen and snapshot.read_tokenizer().get_vocab() != vocabulary:
            raise UserError(
                f"snapshots {snapshots[0].label!r} and {snapshot.label!r} have tokenizers with different vocabularies: "
                "take snapshots of one pretraining run"
            )
        seen.add(files)


def check_distinct(labels: Sequence[str], identities: Sequence[str]) -> None:
    """Refuse two snapshots with the same identity.

    Raises:
        UserError: names both.
    """
    first: dict[str, str] = {}
    for label, identity in zip(labels, identities, strict=True):
        if identity in first:
            raise UserError(
                f"snapshots {first[identity]!r} and {label!r} have equal weights: leave one of them out, or check that "
                "each folder or revision holds its own snapshot"
            )
        first[identity] = label


def check_known(snapshots: Sequence[Snapshot]) -> None:
    """Refuse snapshots that are known to be equal before anything is downloaded: by recorded fingerprints, those of
    weights on this disk, and the hub's own checksums.

    Raises:
        UserError: names both.
    """
    for identities in ([s.known_fingerprint for s in snapshots], [s.weight_etags() for s in snapshots]):
        known = [(s.label, str(found)) for s, found in zip(snapshots, identities, strict=True) if found is not None]
        check_distinct([label for label, _ in known], [identity for _, identity in known])


def check_arrival(snapshots: Sequence[Snapshot], s: int) -> None:
    """Download the weights of a snapshot, and refuse them if they equal others that were known before, or if they are
    stored in another dtype.

    Raises:
        UserError: names both snapshots.
    """
    own = snapshots[s].fingerprint
    known = [(other, own if i == s else other.known_fingerprint) for i, other in enumerate(snapshots)]
    equal = [other.label for other, found in known if found == own]
    check_distinct(equal, [own] * len(equal))
    first = next(other for other in snapshots if other.known_dtype is not None)
    _compare(first, snapshots[s], "the dtype of their weights", first.known_dtype, snapshots[s].known_dtype)


def check_dtypes(snapshots: Sequence[Snapshot]) -> None:
    """Refuse weights stored in different dtypes: the rounding error would look like training.

    Weights that were never on this disk are skipped.

    Raises:
        UserError: names two snapshots and both dtypes.
    """
    there = [snapshot for snapshot in snapshots if snapshot.known_dtype is not None]
    kinds = [snapshot.known_dtype for snapshot in there]
    for snapshot, kind in zip(there, kinds, strict=True):
        _compare(there[0], snapshot, "the dtype of their weights", kinds[0], kind)
