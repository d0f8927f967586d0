"""The soak: hostile surroundings of every kind, none silent, raw or outside."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmark_runs import benchmark_counts


@pytest.mark.exhaustive
def test_hostile_surroundings_are_told_recorded_or_change_nothing(tmp_path: Path):
    counts, said = benchmark_counts("hostile.py", "--quick", "--seed", "7", cwd=tmp_path)
    tried, same, recorded, told, refused, silent, raw, hang, outside = map(sum, zip(*counts.values(), strict=True))
    assert tried == 3 * len(counts) == same + recorded + told, said
    assert refused == silent == raw == hang == outside == 0 and told, said
