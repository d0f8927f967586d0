"""Checks that snapshots are comparable: same configuration, vocabulary and dtype, but different weights.

Models that are not snapshots of one run (a base model and its chat version) may differ in all but width, vocabulary and
hook point.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from crosslens.errors import UserError, shortened
from crosslens.snapshots.bridge import check_architecture
from crosslens.snapshots.hashes import changed_entry, config_entries
from crosslens.snapshots.hooks import canonical_hook, check_hook
from crosslens.snapshots.memory import LoadedSnapshot
from crosslens.snapshots.snapshot import Snapshot, hash_files, tokenizer_files

# entries with a readable name for messages; they are compared first
_NAMED = {"hidden_size": "width", "num_hidden_layers": "depth", "model_type": "architecture"}
_ONE_RUN = "take snapshots of one pretraining run"
_MODELS = "take models of one width"


def check_configs(snapshots: Sequence[Snapshot]) -> None:
    """Refuse two snapshots in one folder, and configurations that compute different things.

    Raises:
        UserError: names both snapshots, the entry and its two values.
    """
    _check_places(snapshots)
    first, ours = snapshots[0], snapshots[0].config()
    for snapshot in list(snapshots)[1:]:
        theirs = snapshot.config()
        for key, what in _NAMED.items():
            _compare(first, snapshot, what, getattr(ours, key), getattr(theirs, key))
        one, other = config_entries(ours), config_entries(theirs)
        for key in sorted(one.keys() | other.keys()):
            _compare(first, snapshot, f"{key} of their configuration", one.get(key), other.get(key))


def check_models(snapshots: Sequence[Snapshot], hook_name: str | None) -> None:
    """Refuse one model given twice, models of different width or kind, and some that lack the hook point.

    Raises:
        UserError: names the model or models.
    """
    _check_places(snapshots)
    first, ours = snapshots[0], snapshots[0].config()
    for snapshot in snapshots:
        theirs = snapshot.config()
        if _kind(snapshot) != _kind(first):
            raise UserError(
                f"snapshots {first.label!r} and {snapshot.label!r} are a {_kind(first)} and a {_kind(snapshot)}, whose "
                "activations may differ by how weights were processed: give models of one kind"
            )
        _compare(first, snapshot, "width", ours.hidden_size, theirs.hidden_size, _MODELS)
        if hook_name is not None:
            _check_hook(snapshot, theirs, hook_name)


def check_architectures(snapshots: Sequence[Snapshot]) -> None:
    """Refuse models that TransformerLens cannot run, before their weights are downloaded.

    Raises:
        UserError: names the snapshot and the architecture.
    """
    configs = {
        type(config): (s, config) for s in snapshots if not isinstance(s, LoadedSnapshot) for config in [s.config()]
    }
    for snapshot, config in configs.values():
        try:
            check_architecture(config)
        except UserError as error:
            raise UserError(f"snapshot {snapshot.label!r}: {error}") from error


def _kind(snapshot: Snapshot) -> str:
    return snapshot.kind if isinstance(snapshot, LoadedSnapshot) else "folder"


def _check_hook(snapshot: Snapshot, config: Any, hook_name: str) -> None:
    try:
        check_hook(hook_name, config)
    except UserError as error:
        raise UserError(f"snapshot {snapshot.label!r}: {error}") from error
    if not isinstance(snapshot, LoadedSnapshot):
        return
    if snapshot.hooks is not None and canonical_hook(hook_name) not in snapshot.hooks:
        raise UserError(
            f"snapshot {snapshot.label!r}: its {snapshot.kind} has no hook point {hook_name!r}: choose one of its "
            "hook_dict"
        )


def _check_places(snapshots: Sequence[Snapshot]) -> None:
    """Refuse two snapshots in one folder, or of one object in memory."""
    places = [
        s.identity if isinstance(s, LoadedSnapshot) else "+".join(str(p.folder().resolve()) for p in s.parts())
        for s in snapshots
    ]
    check_distinct([s.label for s in snapshots], places)


def _compare(
    first: Snapshot, second: Snapshot, what: str, ours: object, theirs: object, remedy: str = _ONE_RUN
) -> None:
    if ours != theirs:
        raise UserError(
            f"snapshots {first.label!r} and {second.label!r} differ in {what}, {shortened(ours)} and "
            f"{shortened(theirs)}: {remedy}"
        )


def check_snapshots(crosscoder: Any, snapshots: Sequence[Snapshot]) -> None:
    """Refuse a crosscoder that was trained on other snapshots.

    Args:
        crosscoder: a `Crosscoder`; what it records about its snapshots is read.
        snapshots: the models.

    Raises:
        UserError: a different number of snapshots, or a snapshot with different weights or another configuration.
    """
    if len(snapshots) != crosscoder.n_snapshots:
        raise UserError(
            f"the crosscoder was trained on {crosscoder.n_snapshots} snapshots, but {len(snapshots)} were given: "
            "use those listed in its metadata.snapshots"
        )
    for trained, given in zip(crosscoder.cfg.metadata.snapshots or [], snapshots, strict=False):
        if trained.get("fingerprint") not in (None, given.fingerprint):
            raise UserError(
                f"the crosscoder was trained on other weights: its snapshot {trained.get('label')} does not match the "
                f"given {given.label}: use the snapshots it was trained on"
            )
    recorded = getattr(crosscoder.cfg.metadata, "config", None)
    if recorded and (changed := changed_entry(recorded, [config_entries(given.config()) for given in snapshots])):
        key, before, now = changed
        raise UserError(
            f"the crosscoder was trained on models with {key}={shortened(before)} in their config, and these have "
            f"{key}={shortened(now)}: use the models it was trained on"
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
                "take models with one tokenizer"
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


def check_arrival(snapshots: Sequence[Snapshot], s: int, one_run: bool = True) -> None:
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
    check_dtypes([first, snapshots[s]], one_run)


def check_dtypes(snapshots: Sequence[Snapshot], one_run: bool = True) -> None:
    """Refuse weights stored in different dtypes: the rounding error would look like training.

    Weights that were never on this disk are skipped. For models that are not of one run, which differ by more than
    rounding, it is a warning.

    Raises:
        UserError: names two snapshots and both dtypes.
    """
    there = [snapshot for snapshot in snapshots if snapshot.known_dtype is not None]
    kinds = [snapshot.known_dtype for snapshot in there]
    for snapshot, kind in zip(there, kinds, strict=True):
        if one_run:
            _compare(there[0], snapshot, "the dtype of their weights", kinds[0], kind)
        elif kind != kinds[0]:
            warnings.warn(
                f"the weights of {there[0].label!r} are stored as {kinds[0]}, those of {snapshot.label!r} as {kind}: "
                "their difference includes the rounding error",
                stacklevel=2,
            )
