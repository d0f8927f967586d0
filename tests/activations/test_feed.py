"""Batches reach every process and device as one process reads them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosslens.activations import feed as feed_module
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.distributed.parallel import join
from crosslens.snapshots.collection import Snapshots
from tests.ranks import run_ranks

HOOK, T, B = "blocks.1.hook_resid_post", 16, 48
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cached(tiny_snapshots: Path, tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Caches of about 1,000 tokens in four shards, by dtype; and a live buffer of 200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crosslens.activations.cache.FILE_BYTES", 30 * T * 32)
        acts = Activations(Snapshots.local(tiny_snapshots), HOOK, Dataset(tiny_text, 1000, T, 200))
        folder = tmp_path_factory.mktemp("caches")
        found: dict[str, Any] = {name: acts.cache(folder / name, name) for name in ("float32", "bfloat16", "int8")}
    live = Activations(Snapshots.local(tiny_snapshots), HOOK, Dataset(tiny_text, 1000, T, 200), mixing_tokens=200)
    return {**found, "live": live}


def first_batches(acts: Activations, n: int, **options: Any) -> Tensor:
    return torch.stack([batch.clone() for batch in itertools.islice(acts.batches(B, **options), n)])


def rows(x: Tensor) -> list[list[float]]:
    return sorted(x.flatten(1).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["bfloat16", "live"])
def test_processes_read_together_what_one_reads(cached: dict[str, Any], world: int, kind: str, tmp_path: Path):
    """All tokens in each, or a part of them; from any start, so that the number of processes may change."""
    acts, n = cached[kind], 30  # beyond an epoch

    def body(rank: int) -> dict[str, Tensor]:
        del rank
        together, _ = join("cpu", 1)
        apart, _ = join("cpu", world)
        held = next(acts.batches(B, parallel=together))
        return {
            "features": first_batches(acts, n, parallel=together, whole=False),
            "whole": first_batches(acts, 6, start=7, parallel=apart),
            "tokens": first_batches(acts, n, parallel=apart, whole=False),
            "held": held,
        }

    found = run_ranks(world, tmp_path, body)
    alone = first_batches(acts, n)
    for each in found:
        assert torch.equal(each["features"], alone) and torch.equal(each["whole"], alone[7:13])
        assert torch.equal(each["held"], alone[0])
        assert each["tokens"].shape[1] == B // world
    for i in range(n):
        assert rows(torch.cat([each["tokens"][i] for each in found])) == rows(alone[i])


@pytest.mark.slow
def test_processes_that_share_no_memory_read_by_themselves(
    cached: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    acts = cached["float32"]
    monkeypatch.setattr(feed_module, "SHARED_MEMORY", tmp_path / "absent")

    def body(rank: int) -> Tensor:
        del rank
        return first_batches(acts, 5, parallel=join("cpu")[0])

    alone = first_batches(acts, 5)
    assert all(torch.equal(found, alone) for found in run_ranks(2, tmp_path, body))


@pytest.mark.slow
def test_each_process_reads_its_part_of_a_batch(cached: dict[str, Any], tmp_path: Path):
    acts = cached["bfloat16"]

    def body(rank: int) -> Tensor:
        del rank
        read: list[int] = []
        gather = acts._cache.gather
        acts._cache.gather = lambda shard, s, rows, repair: (
            read.append(len(rows.rows)) or gather(shard, s, rows, repair)
        )
        first_batches(acts, 4, parallel=join("cpu")[0], epochs=1)
        return torch.tensor(sum(read))

    # four batches and one or two ahead, of three snapshots
    counts = [int(n) for n in run_ranks(3, tmp_path, body)]
    assert all(4 * 3 * B // 3 <= n <= 6 * 3 * B // 3 for n in counts)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "live"])
def test_batches_on_a_gpu_are_those_on_the_cpu(cached: dict[str, Any], kind: str):
    acts = cached[kind]
    alone = first_batches(acts, 25)
    moved = list(itertools.islice(acts.batches(B, device="cuda"), 25))
    assert all(batch.device.type == "cuda" and batch.dtype == torch.float32 for batch in moved)
    assert torch.equal(torch.stack([batch.cpu() for batch in moved]), alone)
    assert len(list(acts.batches(B, device="cuda", epochs=1))) == acts.n_tokens // B
