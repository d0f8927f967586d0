"""Batches reach every process and device as one process reads them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from crosslens.activations import feed as feed_module
from crosslens.activations import harvesting
from crosslens.activations.harvesting import run_to_hooks
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.distributed.parallel import ALONE, Parallel, join
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from tests.ranks import run_ranks

HOOK, T, B = "blocks.1.hook_resid_post", 16, 48
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cached(tiny_snapshots: Path, tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Caches of about 1,000 tokens in four shards, by dtype; live, a buffer of 200, and one of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crosslens.activations.cache.FILE_BYTES", 30 * T * 32)
        acts = Activations(Snapshots.local(tiny_snapshots), HOOK, Dataset(tiny_text, 1000, T, 200))
        folder = tmp_path_factory.mktemp("caches")
        found: dict[str, Any] = {name: acts.cache(folder / name, name) for name in ("float32", "bfloat16", "int8")}
    for name, size in (("live", 200), ("held", None)):  # passes of three sequences
        settings = ModelSettings("cpu", batch_tokens=3 * T)
        data = Dataset(tiny_text, 1000, T, 200)
        found[name] = Activations(Snapshots.local(tiny_snapshots), HOOK, data, mixing_tokens=size, settings=settings)
    return found


def first_batches(acts: Activations, n: int, **options: Any) -> Tensor:
    return torch.stack([batch.clone() for batch in itertools.islice(acts.batches(B, **options), n)])


def rows(x: Tensor) -> list[list[float]]:
    return sorted(x.flatten(1).tolist())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "kind", ["bfloat16", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("live", "held"))]
)
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
@pytest.mark.parametrize("world", [2, 3])
def test_each_process_runs_a_part_of_the_passes(
    cached: dict[str, Any], world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Forward passes of three sequences each, in all processes together those of one, for every snapshot."""

    def passes(parallel: Parallel) -> Tensor:
        acts = copy.copy(cached["live"])
        ran: list[list[int]] = []

        def watched(model: Any, tokens: Tensor, *args: Any) -> None:
            ran.extend([id(model), len(part), int(part.long().sum())] for part in tokens.split(3))
            run_to_hooks(model, tokens, *args)

        monkeypatch.setattr(harvesting, "run_to_hooks", watched)
        assert len(first_batches(acts, 30, parallel=parallel, epochs=1)) == acts.n_tokens // B  # to the end
        return torch.tensor(ran)

    alone = passes(ALONE)
    each = run_ranks(world, tmp_path, lambda _: passes(join("cpu", 1)[0]))
    assert rows(torch.cat(each)[:, 1:]) == rows(alone[:, 1:])  # models are loaded by each process
    assert max(map(len, each)) <= len(alone) / world + 4 * 3


@pytest.mark.slow
def test_a_part_of_the_processes_may_have_filled_the_buffer(cached: dict[str, Any], tmp_path: Path):
    acts = copy.copy(cached["held"])
    acts._held = None

    def body(rank: int) -> Tensor:
        if rank == 1:
            first_batches(acts, 1)
        return first_batches(acts, 5, parallel=join("cpu")[0])

    alone = first_batches(cached["held"], 5)
    assert all(torch.equal(found, alone) for found in run_ranks(2, tmp_path, body))


@pytest.mark.slow
def test_all_processes_say_which_snapshot_is_not_finite(
    cached: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(model: Any, tokens: Tensor, outs: Any, *args: Any) -> None:
        run_to_hooks(model, tokens, outs, *args)
        if dist.get_rank() == 0:
            outs[HOOK][0, 0, 0] = torch.nan

    monkeypatch.setattr(harvesting, "run_to_hooks", broken)

    def body(rank: int) -> Tensor:
        del rank
        with pytest.raises(UserError, match=f"snapshot step0 has non-finite activations at {HOOK}"):
            first_batches(cached["live"], 1, parallel=join("cpu")[0])
        return torch.ones(1)

    assert len(run_ranks(2, tmp_path, body)) == 2


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
        gather = acts.store.gather
        acts.store.gather = lambda shard, s, rows: read.append(len(rows.rows)) or gather(shard, s, rows)
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
