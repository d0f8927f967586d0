"""Which snapshot a user means: by its index, counted from either end, or by its label."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

from crosslens.errors import UserError, did_you_mean


class NoSnapshotError(UserError, IndexError):
    """No snapshot has this index or label. An `IndexError`, too, so that a collection of snapshots is a sequence."""


def find_snapshot(labels: Sequence[str], snapshot: SupportsIndex | str, steps: Sequence[int | None] = ()) -> int:
    """Index of a snapshot, counted from the left.

    Args:
        labels: of all snapshots.
        snapshot: index, negative ones counted from the right, or label.
        steps: of all snapshots, to say which has the step that was taken for an index.

    Raises:
        NoSnapshotError: no such snapshot.
    """
    S = len(labels)
    there = f"there are {S} snapshots, {', '.join(labels)}"
    if isinstance(snapshot, str):
        if snapshot not in labels:
            raise NoSnapshotError(f"no snapshot has the label {snapshot!r}: {there}{did_you_mean(snapshot, labels)}")
        return list(labels).index(snapshot)
    place = operator.index(snapshot)
    if not -S <= place < S:
        step = f"; for step {place} use {labels[steps.index(place)]!r}" if place in steps else ""
        raise NoSnapshotError(f"snapshot {place} is not in [{-S}, {S - 1}]: {there}{step}")
    return place % S
