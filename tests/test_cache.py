"""The cache gives what the models give, continues where it stopped, and refuses what it does not hold."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crosslens.activations import Activations, harvest
from crosslens.cache import ActivationCache
from crosslens.errors import UserError
from crosslens.snapshots import Snapshots

HOOK = "blocks.1.hook_resid_post"
T = 16


@pytest.fixture(scope="module")
def snapshots(tiny_snapshots: Path) -> Snapshots:
    return Snapshots.local(tiny_snapshots)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslens.activations.BLOCK_TOKENS", 30 * T)  # several shards, the last one smaller


@pytest.fixture
def make(snapshots: Snapshots, tiny_text: list[str]) -> Any:
    def build(**options: Any) -> Activations:
        hook_name = options.pop("hook_name", HOOK)
        defaults: dict[str, Any] = {"n_tokens": 1000, "context_size": T, "held_out_tokens": 200}
        return Activations(snapshots, hook_name, tiny_text, **{**defaults, **options})

    return build


def state(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_batches_in_the_same_order_as_live(make: Any, tmp_path: Path, dtype: str):
    live = make()
    cached = live.cache(tmp_path / "cache", dtype)
    n = 2 * live.n_tokens // 64 + 2  # over two epochs
    for a, b in itertools.islice(zip(live.batches(64), cached.batches(64), strict=True), n):
        assert b.dtype == torch.float32
        assert torch.equal(b, a if dtype == "float32" else a.to(torch.bfloat16).float())
    for a, b in zip(live.held_out(64), cached.held_out(64), strict=True):
        assert torch.equal(b, a if dtype == "float32" else a.to(torch.bfloat16).float())
    for a, b in itertools.islice(zip(live.batches(64, start=9), cached.batches(64, start=9), strict=True), 3):
        assert torch.equal(b, a if dtype == "float32" else a.to(torch.bfloat16).float())


def test_reading_runs_no_model(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make().cache(tmp_path / "cache", "float32")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr("crosslens.activations.harvest", never)
    again = make().cache(tmp_path / "cache", "float32")
    assert len(next(again.batches(100))) == 100 and list(again.held_out())


def test_one_file_per_shard_and_snapshot_and_a_manifest(make: Any, tmp_path: Path):
    acts = make()
    acts.cache(tmp_path / "cache")
    shards = -(-len(acts.tokens) // 30)
    assert shards >= 3
    expected = {"manifest.json"}
    expected |= {f"tokens-{i:05d}.safetensors" for i in range(shards)}
    expected |= {f"acts-{i:05d}-s{s:02d}.safetensors" for i in range(shards) for s in range(3)}
    assert set(state(tmp_path / "cache")) == expected  # and nothing temporary
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["hook_name"] == HOOK and manifest["dtype"] == "bfloat16"
    assert manifest["snapshots"] == acts.snapshots.fingerprints and len(set(manifest["snapshots"])) == 3
    assert (tmp_path / "cache" / "acts-00000-s00.safetensors").stat().st_size < 30 * T * 16 * 2 + 400  # two bytes each


def test_an_interrupted_harvest_continues_at_the_first_missing_pair(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    live, calls = make(), []
    fail_at = [4]

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        calls.append((options["only"], args[1].tolist()))
        if len(calls) > fail_at[0]:
            raise KeyboardInterrupt
        return harvest(*args, **options)

    monkeypatch.setattr("crosslens.activations.harvest", watched)
    with pytest.raises(KeyboardInterrupt):
        live.cache(tmp_path / "cache", "float32")
    before = state(tmp_path / "cache")
    assert sum(name.startswith("acts-") for name in before) == 4
    (tmp_path / "cache" / "acts-00001-s01.9999.tmp").write_bytes(b"left behind by a kill")
    first, fail_at[0] = list(calls), 10**9
    calls.clear()
    cached = make().cache(tmp_path / "cache", "float32")
    shards = -(-len(live.tokens) // 30)
    assert len(calls) == 3 * shards - 4  # only what was missing
    assert calls[0] == first[4]  # beginning with the pair that was cut short
    assert [s for s, _ in [*first[:4], *calls]] == sorted([0, 1, 2] * shards)  # one snapshot after the other
    after = state(tmp_path / "cache")
    assert all(after[name] == before[name] for name in before)
    monkeypatch.undo()
    fresh = make().cache(tmp_path / "fresh", "float32")
    assert torch.equal(torch.cat(list(cached.batches(64, epochs=1))), torch.cat(list(fresh.batches(64, epochs=1))))


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"hook_name": "blocks.0.hook_resid_post"}, "float32", "its hook_name is blocks.1.* is blocks.0"),
        ({"seed": 9}, "float32", "its tokens is [0-9a-f]+[.]{3}, asked for is [0-9a-f]+[.]{3};"),
        ({"context_size": 8}, "float32", "its context_size is 16, asked for is 8"),
        ({"prepend_bos": False}, "float32", "its prepend_bos is True, asked for is False"),
        ({}, "bfloat16", "its dtype is float32, asked for is bfloat16"),
    ],
)
def test_the_cache_of_another_request_is_refused(
    make: Any, tmp_path: Path, options: dict[str, Any], dtype: str, message: str
):
    make().cache(tmp_path / "cache", "float32")
    before = state(tmp_path / "cache")
    with pytest.raises(UserError, match=message) as caught:
        make(**options).cache(tmp_path / "cache", dtype)
    assert "\n" not in str(caught.value) and state(tmp_path / "cache") == before


def test_other_snapshots_are_another_request(make: Any, snapshots: Snapshots, tiny_text: list[str], tmp_path: Path):
    make().cache(tmp_path / "cache")
    fewer = Activations(snapshots[[0, 2]], HOOK, tiny_text, n_tokens=1000, context_size=T, held_out_tokens=200)
    with pytest.raises(UserError, match="is the cache of another request: its snapshots is"):
        fewer.cache(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["byte", "header", "truncated", "gone"])
def test_damage_is_found_and_only_that_file_is_made_anew(make: Any, tmp_path: Path, damage: str):
    folder = tmp_path / "cache"
    whole = torch.cat(list(make().cache(folder, "float32").batches(64, epochs=1)))
    before = state(folder)
    victim = folder / "acts-00001-s02.safetensors"
    raw = bytearray(victim.read_bytes())
    if damage == "byte":
        raw[-40] ^= 1
    elif damage == "header":
        raw[3] ^= 0xFF
    else:
        raw = raw[:-10]
    victim.write_bytes(raw)
    cached = make().cache(folder, "float32")
    if damage == "gone":
        victim.unlink()
    message = "does not match its checksum" if damage == "byte" else "cannot be read"
    with pytest.raises(UserError, match=f"{victim.name} {message}.*delete {victim.name} and harvest again") as caught:
        list(cached.batches(64, epochs=1))
    assert "\n" not in str(caught.value)
    victim.unlink(missing_ok=True)
    repaired = make().cache(folder, "float32")
    assert torch.equal(torch.cat(list(repaired.batches(64, epochs=1))), whole)
    after = state(folder)
    assert [name for name in before if before[name] != after[name]] == [victim.name]


def test_unknown_dtype(make: Any, tmp_path: Path):
    with pytest.raises(UserError, match="dtype='float8' is unknown for a cache; use one of 'bfloat16', 'float32'"):
        make().cache(tmp_path / "cache", "float8")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("size", [1, 4, 7, 10, 50])
def test_runs_of_sequences_across_shards(tmp_path: Path, size: int):
    draw = torch.Generator().manual_seed(size)
    tokens = torch.randint(0, 9, (10, 3), generator=draw, dtype=torch.int32)
    values = torch.randn(10, 3, 2, 5, generator=draw)
    cache = ActivationCache(tmp_path, tokens, size, 2, 5, "float32", {"x": 1})
    assert cache.n_shards == -(-10 // size)
    assert cache.missing() == [(i, s) for s in range(2) for i in range(cache.n_shards)]
    for shard, s in cache.missing():
        first, last = cache.span(shard)
        cache.write(shard, s, values[first:last, :, s])
    assert cache.missing() == []
    for first in range(10):
        for last in range(first + 1, 11):
            assert torch.equal(cache.read(first, last), values[first:last])


def test_a_damaged_manifest_is_one_line(tmp_path: Path) -> None:
    tokens = torch.arange(12, dtype=torch.int32).view(4, 3)
    ActivationCache(tmp_path / "cache", tokens, 2, 2, 4, "float32", {"hook_name": "h"})
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(UserError, match="manifest.json is damaged .* delete the folder"):
        ActivationCache(tmp_path / "cache", tokens, 2, 2, 4, "float32", {"hook_name": "h"})
