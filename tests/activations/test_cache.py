"""The cache gives what the models give, continues where it stopped, and refuses what it does not hold."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from crosslens.activations import files as files_module
from crosslens.activations.cache import ActivationCache
from crosslens.activations.files import Rows, decode, runs_of
from crosslens.activations.harvesting import run_to_hooks
from crosslens.activations.identity import source_identity
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshot, Snapshots

HOOK = "blocks.1.hook_resid_post"
T = 16


@pytest.fixture(scope="module")
def snapshots(tiny_snapshots: Path) -> Snapshots:
    return Snapshots.local(tiny_snapshots)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crosslens.activations.cache.FILE_BYTES", 30 * T * 32)  # several shards of at most 30 sequences


@pytest.fixture
def make(snapshots: Snapshots, tiny_text: list[str]) -> Any:
    def build(**options: Any) -> Activations:
        hook_name, seed = options.pop("hook_name", HOOK), options.pop("seed", 0)
        given: dict[str, Any] = {"n_tokens": 1000, "context_size": T, "held_out_tokens": 200, **options}
        return Activations(snapshots, hook_name, Dataset(tiny_text, **given), seed=seed)

    return build


def state(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}


def rounded(x: Tensor, dtype: str) -> Tensor:
    return x if dtype == "float32" else x.to(torch.bfloat16).float()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_batches_in_the_same_order_as_live_where_the_buffer_holds_all(make: Any, tmp_path: Path, dtype: str):
    live = make()
    cached = live.cache(tmp_path / "cache", dtype)
    assert live.data_order == cached.data_order == "shuffled"
    n = 2 * live.n_tokens // 64 + 2  # over two epochs
    for a, b in itertools.islice(zip(live.batches(64), cached.batches(64), strict=True), n):
        assert b.dtype == torch.float32 and torch.equal(b, rounded(a, dtype))
    for a, b in zip(live.held_out(64), cached.held_out(64), strict=True):
        assert torch.equal(b, rounded(a, dtype))
    for a, b in itertools.islice(zip(live.batches(64, start=9), cached.batches(64, start=9), strict=True), 3):
        assert torch.equal(b, rounded(a, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_tokens_as_from_a_mixing_buffer(make: Any, tmp_path: Path, dtype: str, monkeypatch: Any):
    monkeypatch.setattr("crosslens.activations.mixing.UNIT", 50)
    live, small = make(), make()
    small._mixing_tokens = 200
    cached = live.cache(tmp_path / "cache", dtype)
    n = live.n_tokens
    mixed, read = (next(acts.batches(n, epochs=1)) for acts in (small, cached))
    assert small.data_order != cached.data_order and not torch.equal(mixed, read)

    def in_order(x: Tensor) -> list[list[float]]:
        return sorted(x.flatten(1).tolist())

    # other sequences share a forward pass, which may change the last bit
    torch.testing.assert_close(
        torch.tensor(in_order(rounded(mixed, dtype))), torch.tensor(in_order(read)), atol=0.03, rtol=0.01
    )


def test_reading_runs_no_model(make: Any, pristine: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr("crosslens.activations.harvesting.run_to_hooks", never)
    again = make().cache(pristine, "float32")
    assert len(next(again.batches(100))) == 100 and list(again.held_out())


def n_shards(acts: Activations, most: int = 30) -> int:
    """Shards of at most 30 sequences, of training and held-out ones."""
    return sum(-(-len(tokens) // most) for tokens in (acts.train_tokens(), acts.held_out_tokens()))


def test_one_file_per_shard_and_snapshot_and_a_manifest(make: Any, tmp_path: Path):
    acts = make()
    acts.cache(tmp_path / "cache")
    shards = n_shards(acts)
    assert shards >= 4
    expected = {"manifest.json"}
    expected |= {f"tokens-{i:05d}.safetensors" for i in range(shards)}
    expected |= {f"acts-{i:05d}-s{s:02d}.safetensors" for i in range(shards) for s in range(3)}
    assert set(state(tmp_path / "cache")) == expected  # and nothing temporary
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["format"] == 2 and manifest["hook_name"] == HOOK and manifest["dtype"] == "bfloat16"
    assert manifest["snapshots"] == acts.snapshots.fingerprints and len(set(manifest["snapshots"])) == 3
    first = tmp_path / "cache" / "acts-00000-s00.safetensors"
    n = manifest["shard_sequences"] * T
    assert first.stat().st_size == 4096 + n * 16 * 2 + -(-n // 32) * 4  # two bytes each
    with safe_open(first, framework="pt") as file:  # any program can read it
        assert file.get_tensor("data").shape == (n, 16)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    plan = acts.plan(measure=False)
    assert plan.n_files == len(expected) and plan.cache_bytes == pytest.approx(size, rel=0.05)


def test_an_interrupted_harvest_continues_at_the_first_missing_pair(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    live, calls = make(), []
    kept = set(live.snapshots._models)  # pyright: ignore[reportPrivateUsage]
    fail_at, loaded = [4], []
    load = Snapshot.load

    def watched(model: Any, tokens: torch.Tensor, *args: Any, **options: Any) -> None:
        calls.append((loaded[-1], tokens.tolist()))
        if len(calls) > fail_at[0]:
            raise KeyboardInterrupt
        run_to_hooks(model, tokens, *args, **options)

    def noted(snapshot: Snapshot, *args: Any, **options: Any) -> Any:
        loaded.append(snapshot.step)
        return load(snapshot, *args, **options)

    monkeypatch.setattr("crosslens.activations.harvesting.run_to_hooks", watched)
    monkeypatch.setattr(Snapshot, "load", noted)
    with pytest.raises(KeyboardInterrupt):
        live.cache(tmp_path / "cache", "float32")
    before = state(tmp_path / "cache")
    assert sum(name.startswith("acts-") for name in before) == 4
    left = tmp_path / "cache" / "acts-00001-s01.tmp"
    left.write_bytes(b"left behind by a kill")
    first, fail_at[0] = list(calls), 10**9
    calls.clear()
    cached = make().cache(tmp_path / "cache", "float32")
    shards = n_shards(live)
    assert len(calls) == 3 * shards - 4  # only what was missing
    assert calls[0] == first[4]  # beginning with the pair that was cut short
    assert [s for s, _ in [*first[:4], *calls]] == sorted([0, 10, 20] * shards)  # one snapshot after the other
    after = state(tmp_path / "cache")
    assert all(after[name] == before[name] for name in before if not name.endswith(".lock")) and not left.exists()
    monkeypatch.undo()
    monkeypatch.setattr("crosslens.activations.cache.FILE_BYTES", 30 * T * 32)
    fresh = make().cache(tmp_path / "fresh", "float32")
    assert torch.equal(torch.cat(list(cached.batches(64, epochs=1))), torch.cat(list(fresh.batches(64, epochs=1))))
    assert live.snapshots._models.keys() == kept  # pyright: ignore[reportPrivateUsage] (harvesting keeps no model)


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"hook_name": "blocks.0.hook_resid_post"}, "float32", "it has hook_name=blocks.1.*=blocks.0"),
        ({"seed": 9}, "float32", "it has tokens=[0-9a-f]+[.]{3}, .* tokens=[0-9a-f]+[.]{3};"),
        ({"context_size": 8}, "float32", "it has context_size=16, this request has context_size=8"),
        ({"prepend_bos": False}, "float32", "it has prepend_bos=True, this request has prepend_bos=False"),
        ({}, "bfloat16", "it has dtype=float32, this request has dtype=bfloat16"),
    ],
)
def test_the_cache_of_another_request_is_refused(
    make: Any, pristine: Path, tmp_path: Path, options: dict[str, Any], dtype: str, message: str
):
    shutil.copytree(pristine, tmp_path / "cache")
    before = state(tmp_path / "cache")
    with pytest.raises(UserError, match=message) as caught:
        make(**options).cache(tmp_path / "cache", dtype)
    assert "\n" not in str(caught.value) and state(tmp_path / "cache") == before


def test_other_snapshots_are_another_request(snapshots: Snapshots, tiny_text: list[str], pristine: Path):
    fewer = Activations(snapshots[[0, 2]], HOOK, Dataset(tiny_text, 1000, T, 200))
    before = state(pristine)
    with pytest.raises(UserError, match="is a cache for a different request: it has snapshots="):
        fewer.cache(pristine, "float32")
    assert state(pristine) == before


@pytest.fixture(scope="module")
def pristine(snapshots: Snapshots, tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole float32 cache of what `make()` asks for; to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crosslens.activations.cache.FILE_BYTES", 30 * T * 32)
        acts = Activations(snapshots, HOOK, Dataset(tiny_text, 1000, T, 200))
        acts.cache(tmp_path_factory.mktemp("pristine") / "cache", "float32")
    return tmp_path_factory.getbasetemp() / "pristine0" / "cache"


def damage_file(path: Path, damage: str) -> None:
    raw = bytearray(path.read_bytes())
    if damage == "byte":
        raw[4096 + (len(raw) - 4096) // 2] ^= 1
    elif damage == "header":
        raw[3] ^= 0xFF
    elif damage == "truncated":
        raw = raw[:-10]
    path.unlink() if damage == "gone" else path.write_bytes(raw)


@pytest.mark.parametrize(
    ("when", "damage"),
    [("before", "byte"), ("before", "header"), ("after", "byte"), ("after", "truncated"), ("after", "gone")],
)
def test_damage_is_found_and_only_that_file_is_harvested_again(
    make: Any, pristine: Path, tmp_path: Path, damage: str, when: str
):
    folder = Path(shutil.copytree(pristine, tmp_path / "cache"))
    whole = torch.cat(list(make().cache(folder, "float32").batches(64, epochs=1)))
    before = state(folder)
    victim = folder / "acts-00001-s02.safetensors"
    as_written = victim.read_bytes()
    cached = make().cache(folder, "float32") if when == "after" else None
    damage_file(victim, damage)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cached = cached or make().cache(folder, "float32")
        assert torch.equal(torch.cat(list(cached.batches(64, epochs=1))), whole)
    # a wrong length is seen and repaired when the cache is opened, a wrong value when it is read
    again = "harvesting it again" if damage == "byte" or when == "after" else "it has to be harvested again"
    assert [victim.name in str(w.message) for w in caught if again in str(w.message)] == [True]
    after = state(folder)
    assert [name for name in before if before[name] != after[name]] == [victim.name] and before.keys() == after.keys()
    assert victim.read_bytes() == as_written


def test_a_cache_can_be_verified(make: Any, pristine: Path, tmp_path: Path):
    folder = Path(shutil.copytree(pristine, tmp_path / "cache"))
    before, victim = state(folder), folder / "acts-00000-s01.safetensors"
    as_written = victim.read_bytes()
    damage_file(victim, "byte")
    make().cache(folder, "float32")
    assert victim.read_bytes() != as_written
    with pytest.warns(UserWarning, match=f"{victim.name} is damaged: it has to be harvested again"):
        make().cache(folder, "float32", verify=True)
    assert victim.read_bytes() == as_written
    assert [name for name, when in state(folder).items() if before[name] != when] == [victim.name]


def test_without_models_damage_is_an_error_of_one_line(tmp_path: Path):
    tokens = torch.arange(12, dtype=torch.int32).view(4, 3)
    cache = ActivationCache(tmp_path, tokens, 2, 1, 4, "float32", {"x": 1})
    for shard in (0, 1):
        cache.write(shard, 0, torch.randn(2, 3, 4))
    damage_file(cache.path(1, 0), "byte")
    cache.read(0, 2)
    with pytest.raises(
        UserError, match="acts-00001-s00.safetensors does not match its checksum; run the same harv"
    ) as e:
        cache.read(1, 3)
    assert "\n" not in str(e.value)


# ---------------------------------------------------------------------- types


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rounding_is_measured(tmp_path: Path, dtype: str):
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (10, 3), generator=draw, dtype=torch.int32)
    values = torch.randn(10, 3, 2, 64, generator=draw) * torch.tensor([1.0, 30.0])[:, None]
    values[3, 1] = 0
    values[4, 2, :, 7] = 500  # an outlier spoils its own position and no other
    cache = ActivationCache(tmp_path, tokens, 4, 2, 64, dtype, {"x": 1})
    for shard, s in cache.missing():
        first, last = cache.span(shard)
        cache.write(shard, s, values[first:last, :, s])
    found = cache.read(0, 10)
    errors = ((found - values).double().square().sum((0, 1, 3)) / values.double().square().sum((0, 1, 3))).tolist()
    assert cache.rounding_errors() == pytest.approx(errors, rel=1e-6)
    if dtype == "float32":
        assert torch.equal(found, values)
    elif dtype == "bfloat16":
        assert torch.equal(found, values.to(torch.bfloat16).float())
    else:
        step = values.abs().amax(-1, keepdim=True) / 127
        assert bool(((found - values).abs() <= step * 0.5001).all())
        assert cache.path(0, 0).stat().st_size == 4096 + 4 + 4 * 3 * (64 + 4)
    assert torch.equal(cache.read(3, 7), found[3:7])


def test_the_error_of_rounding_is_printed(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for dtype, told in (("int8", 1e-3), ("float32", 0.0)):
        live = make(n_tokens=600, held_out_tokens=10)
        cached = live.cache(tmp_path / dtype, dtype)
        line = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "by rounding" in line]
        assert len(line) == (dtype != "float32")
        a, b = (torch.cat(list(acts.batches(64, epochs=1))).double() for acts in (live, cached))
        error = float((a - b).square().sum() / a.square().sum())
        assert error <= told and (error > 0) == (dtype != "float32")
        if line:
            assert re.match(
                rf"{dtype} loses \S+ of the squared norm by rounding on average, at most \S+ \(step\d+\)", line[0]
            )
            mean = float(line[0].split()[2])
            assert mean == pytest.approx(error, rel=0.5)


def test_files_of_others_stay(make: Any, tmp_path: Path):
    folder = tmp_path / "cache"
    folder.mkdir()
    names = ["manifest.old.tmp", "thesis.tmp"]
    for name in (*names, "manifest.tmp"):  # the last of a process that was killed
        (folder / name).write_text("text")
    make().cache(folder, "float32")
    assert sorted(path.name for path in folder.glob("*.tmp")) == names


def test_unknown_dtype(make: Any, tmp_path: Path):
    with pytest.raises(UserError, match="dtype='float8' is unknown for a cache; use one of 'bfloat16', 'float32', 'in"):
        make().cache(tmp_path / "cache", "float8")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("size", [1, 4, 7, 10, 50])
def test_sequences_and_rows_across_shards(tmp_path: Path, size: int, dtype: str):
    draw = torch.Generator().manual_seed(size)
    tokens = torch.randint(0, 4, (13, 3), generator=draw, dtype=torch.int32)
    kept = tokens != 0
    values = torch.randn(13, 3, 2, 5, generator=draw)
    cache = ActivationCache(tmp_path, tokens, size, 2, 5, dtype, {"x": 1}, n_train=10, kept=kept, seed=size)
    assert cache.n_training_shards == -(-10 // size) and cache.n_shards == -(-10 // size) + -(-3 // size)
    assert cache.missing() == [(i, s) for s in range(2) for i in range(cache.n_shards)]
    for shard, s in cache.missing():
        first, last = cache.span(shard)
        cache.write(shard, s, values[first:last, :, s])
    assert cache.missing() == cache.missing(verify=True) == []
    whole = cache.read(0, 13)
    torch.testing.assert_close(whole, values, atol=0.0 if dtype == "float32" else 0.02, rtol=0.0)
    for first in range(13):
        for last in range(first + 1, 14):
            assert torch.equal(cache.read(first, last), whole[first:last])
    # the rows that training reads: kept positions of training sequences, each once, not in reading order
    for s in range(2):
        parts = [decode(cache.gather(i, s, Rows(np.arange(n)))) for i, n in enumerate(cache.training_counts())]
        rows, expected = torch.cat(parts).tolist(), whole[:10, :, s][kept[:10]].tolist()
        assert sorted(rows) == sorted(expected) and (rows != expected or size == 1)


def test_other_training_positions_of_the_same_tokens_are_another_request(tmp_path: Path):
    """As many, so that no count differs."""
    tokens = torch.arange(12, dtype=torch.int32).view(4, 3)
    kept = tokens != 4
    for _ in range(2):
        ActivationCache(tmp_path, tokens, 2, 1, 5, "float32", {}, kept=kept)
    with pytest.raises(UserError, match="is a cache for a different request: it has training_positions="):
        ActivationCache(tmp_path, tokens, 2, 1, 5, "float32", {}, kept=tokens != 5)


def test_runs_of_rows():
    for rows in ([3], [3, 4, 5, 9, 10, 2, 3, 7], [5, 4, 3], list(range(40))):
        runs = runs_of(np.array(rows))
        assert [first + i for first, n in runs for i in range(n)] == rows
        assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(runs))  # as long as can be


def test_a_damaged_manifest_is_one_line(tmp_path: Path) -> None:
    tokens = torch.arange(12, dtype=torch.int32).view(4, 3)
    ActivationCache(tmp_path / "cache", tokens, 2, 2, 4, "float32", {"hook_name": "h"})
    manifest = tmp_path / "cache" / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(UserError, match="manifest.json is damaged .* delete the folder"):
        ActivationCache(tmp_path / "cache", tokens, 2, 2, 4, "float32", {"hook_name": "h"})


def test_a_changed_manifest_is_refused_even_where_no_request_differs(tmp_path: Path) -> None:
    tokens = torch.arange(12, dtype=torch.int32).view(4, 3)

    def opened() -> int:
        return ActivationCache(tmp_path / "cache", tokens, 2, 2, 4, "float32", {"hook_name": "h"}).size

    assert opened() == 2
    manifest = tmp_path / "cache" / "manifest.json"
    whole = manifest.read_text()
    for text in (
        whole.replace('"shard_sequences": 2', '"shard_sequences": 1'),
        '{"a":' * 100_000 + "1" + "}" * 100_000,
    ):
        manifest.write_text(text)
        with pytest.raises(UserError, match="manifest.json is damaged .* delete the folder"):
            opened()
    contents = json.loads(whole)
    del contents["checksum"]  # as older releases wrote it
    manifest.write_text(json.dumps(contents))
    assert opened() == 2


def test_a_damaged_shard_of_tokens_is_written_again_and_told(make: Any, pristine: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pristine, tmp_path / "cache"))
    victim = folder / "tokens-00001.safetensors"
    as_written = victim.read_bytes()
    damage_file(victim, "byte")
    with pytest.warns(UserWarning, match=f"{victim.name} is damaged: writing it again"):
        make().cache(folder, "float32")
    assert victim.read_bytes() == as_written
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make().cache(folder, "float32")


# ---------------------------------------------------------------------- what a file is


def test_a_cache_without_its_manifest_is_refused(make: Any, pristine: Path, tmp_path: Path):
    folder = Path(shutil.copytree(pristine, tmp_path / "cache"))
    (folder / "manifest.json").unlink()
    before = state(folder)
    with pytest.raises(
        UserError, match=r"has activations \(acts-\S+\) without a manifest.json .* put it back, or"
    ) as e:
        make().cache(folder, "float32")
    after = state(folder)
    assert "\n" not in str(e.value) and {name: after[name] for name in before} == before


def test_a_cache_of_an_older_version_is_refused(make: Any, tmp_path: Path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").write_text(json.dumps({"format": 1, "hook_name": HOOK}))
    with pytest.raises(UserError, match="cache of format 1, which this version cannot read .*: delete the folder, or"):
        make().cache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "place", "what"),
    [
        ("acts-00000-s00", "acts-00000-s01", "shard 0, snapshot 0"),
        ("acts-00001-s02", "acts-00000-s02", "shard 1, snapshot 2"),
        ("other", "acts-00000-s00", "another cache"),
    ],
)
def test_a_file_that_belongs_elsewhere_is_refused(
    make: Any, pristine: Path, tmp_path: Path, file: str, place: str, what: str
):
    folder = Path(shutil.copytree(pristine, tmp_path / "cache"))
    make().cache(folder, "float32")
    if file == "other":
        make(hook_name="blocks.0.hook_resid_post").cache(tmp_path / "others", "float32")
        source = tmp_path / "others" / f"{place}.safetensors"
    else:
        source = folder / f"{file}.safetensors"
    as_written = (folder / f"{place}.safetensors").read_bytes()
    shutil.copy(source, folder / f"{place}.safetensors")
    with pytest.raises(UserError, match=f"{place}.safetensors holds activations of {what}, not what .* delete") as e:
        make().cache(folder, "float32")
    assert "\n" not in str(e.value)
    (folder / f"{place}.safetensors").unlink()  # the remedy works
    make().cache(folder, "float32")
    assert (folder / f"{place}.safetensors").read_bytes() == as_written


def test_every_bit_of_a_file_counts(tmp_path: Path):
    """A flipped bit anywhere behind the header's padding is found."""
    tokens = torch.arange(120, dtype=torch.int32).view(40, 3) % 9
    cache = ActivationCache(tmp_path, tokens, 40, 1, 4, "int8", {"x": 1})
    cache.write(0, 0, torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0)))
    raw = cache.path(0, 0).read_bytes()
    used = raw.index(b"   ", 8)
    for place in [*range(8, used, 7), *range(4096, len(raw), 5)]:
        cache.path(0, 0).write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        fresh = ActivationCache(tmp_path, tokens, 40, 1, 4, "int8", {"x": 1})
        with pytest.raises(UserError):
            fresh.missing(verify=True)
            fresh.read(0, 40)
    cache.path(0, 0).write_bytes(raw)
    assert ActivationCache(tmp_path, tokens, 40, 1, 4, "int8", {"x": 1}).missing(verify=True) == []


def test_only_what_is_read_is_verified_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokens = torch.arange(300, dtype=torch.int32).view(100, 3) % 9
    cache = ActivationCache(tmp_path, tokens, 100, 1, 4, "float32", {"x": 1}, n_train=0)
    values = torch.randn(100, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    cache.write(0, 0, values[:, :, 0])
    checked: list[int] = []
    check = files_module._check  # pyright: ignore[reportPrivateUsage]

    def watched(raw: Sequence[tuple[memoryview, int]], i: int) -> int:
        data, size = raw[0]
        checked.append(len(data[i * size : (i + 1) * size]) // 16)  # rows of four float32
        return check(raw, i)

    monkeypatch.setattr(files_module, "_check", watched)
    assert torch.equal(cache.read(10, 12), values[10:12]) and checked == [32, 32]  # rows 30 to 35
    with monkeypatch.context() as patch:  # what is verified is read alone, without the rest of its block
        patch.setattr(files_module.Rows, "whole_blocks", None)
        assert torch.equal(cache.read(11, 13), values[11:13]) and len(checked) == 2
    assert torch.equal(cache.read(0, 100), values) and checked[2:] == [32] * 7 + [12]


# ---------------------------------------------------------------------- starting again


def test_a_complete_cache_needs_neither_dataset_nor_network(
    snapshots: Snapshots, tiny_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny_text))

    def given(**options: Any) -> Activations:
        asked: dict[str, Any] = {"source": path, "n_tokens": 1000, "context_size": T, **options}
        return Activations(snapshots, HOOK, Dataset(**asked))

    first = given().cache(tmp_path / "cache")
    expected = next(first.batches(100))

    def never(*_: Any) -> Any:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr("crosslens.activations.tokens.read_sequences", never)
        again = given().cache(tmp_path / "cache")
        assert torch.equal(next(again.batches(100)), expected)
        assert torch.equal(again.tokens, first.tokens) and torch.equal(again.held_out_tokens(), first.held_out_tokens())
        in_memory = Activations(snapshots, HOOK, tiny_text, 1000, T)
        for other in (given(n_tokens=900), given(sample_by="paragraph"), given(prepend_bos=False), in_memory):
            with pytest.raises(AssertionError, match="tokenised again"):
                other.cache(tmp_path / "cache")
        path.write_text("\n".join(reversed(tiny_text)))
        with pytest.raises(AssertionError, match="tokenised again"):
            given().cache(tmp_path / "cache")
    path.write_text("\n".join(tiny_text))
    # the same tokens from elsewhere are the same request
    assert torch.equal(next(in_memory.cache(tmp_path / "cache").batches(100)), expected)
    # damaged tokens are made again
    tokens = tmp_path / "cache" / "tokens-00000.safetensors"
    raw = tokens.read_bytes()
    damage_file(tokens, "byte")
    assert torch.equal(next(given().cache(tmp_path / "cache").batches(100)), expected) and tokens.read_bytes() == raw


def test_the_identity_of_a_source():
    class Words:
        bos_token_id = eos_token_id = pad_token_id = 0

        class backend_tokenizer:
            state: dict[str, Any] = {"model": {"vocab": {"a": 0}}, "truncation": None, "padding": None}

            @classmethod
            def to_str(cls) -> str:
                return json.dumps(cls.state)

    def identity(source: Any, seed: int = 0, **options: Any) -> Any:
        return source_identity(Dataset(source, **options), Words, seed)

    assert identity(["a", "b"]) == identity(["a", "b"]) != identity(["ab"])
    assert identity(["a", "b"]) != identity(["a", "b"], 1) and identity(["a"]) != identity(["a"], n_tokens=5)
    assert identity("org/data") == identity("org/data") != identity("org/data", split="test")
    grid = torch.arange(12)
    assert identity(grid) == identity(grid.numpy()) != identity(grid.int())
    assert identity(grid) != identity(grid.view(3, 4)) != identity(grid.view(4, 3))
    before = identity(["a"])
    Words.backend_tokenizer.state = {**Words.backend_tokenizer.state, "truncation": {"max_length": 5}}
    assert identity(["a"]) == before  # which a call leaves behind
    Words.backend_tokenizer.state = {"model": {"vocab": {"b": 0}}}
    assert identity(["a"]) != before
    Words.backend_tokenizer = None  # type: ignore[assignment,misc]
    assert identity(["a"]) is None


def test_what_is_there_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokens = torch.arange(120, dtype=torch.int32).view(40, 3) % 9
    cache = ActivationCache(tmp_path, tokens, 2, 3, 4, "float32", {"x": 1})
    for shard, s in cache.missing():
        cache.write(shard, s, torch.zeros(2, 3, 4))
    opened: list[str] = []
    read = files_module.read_header
    monkeypatch.setattr(files_module, "read_header", lambda path: opened.append(path.name) or read(path))
    listed = [0]
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.__setitem__(0, listed[0] + 1) or scan(path))
    assert cache.missing() == cache.missing() == [] and listed == [2]
    assert sorted(opened) == sorted(path.name for path in tmp_path.glob("acts-*"))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_lock_that_goes_while_the_folder_is_listed_is_no_fault(tmp_path: Path):
    cache = ActivationCache(tmp_path, torch.zeros(4, 3, dtype=torch.int32), 2, 1, 4, "float32", {"x": 1})
    (tmp_path / "harvest-00000-s00.lock").symlink_to("gone")  # it is listed, and there is nothing to stat
    assert cache.missing() == [(shard, s) for s in range(cache.n_snapshots) for shard in range(cache.n_shards)]
