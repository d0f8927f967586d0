"""The soak: some random faults over a whole analysis, none silent and none raw."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmark_runs import benchmark_counts


@pytest.mark.exhaustive
def test_random_faults_are_survived_or_told(tmp_path: Path):
    counts, said = benchmark_counts("faults.py", "--n", "24", "--seed", "7", cwd=tmp_path)
    tried, survived, told, silent, raw, hang = map(sum, zip(*counts.values(), strict=True))
    assert tried == 24 == survived + told and silent == raw == hang == 0, said
    assert survived and told
