"""A run directory belongs to one run, is written whole, and is read back as it was."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from crosslens.activations.cache import ActivationCache
from crosslens.errors import UserError, check_file_name
from crosslens.rundir import RunDir, all_checkpoints, check_cache, delete
from crosslens.tables import TABLES

IDENTITY: dict[str, Any] = {
    "model_name": "tiny",
    "hook_name": "blocks.1.hook_resid_post",
    "dataset_path": "text.txt",
    "snapshots": [{"label": "a", "step": 0}, {"label": "b", "step": 10}],
    "architecture": {"architecture": "topk_crosscoder", "d_sae": 64, "k": 4},
    "training": {"lr": 3e-4, "seed": 1},
    "n_tokens": 1234,
}


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("program", ["/somewhere/bin/crosslens", "/somewhere/crosslens/__main__.py"])
def test_claiming_a_new_directory_writes_what_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str):
    monkeypatch.setattr(sys, "argv", [program, "train", "runs/a"])
    run = RunDir(tmp_path / "runs" / "a")
    assert not run.exists() and not (tmp_path / "runs").exists()  # nothing is written before
    run.claim(IDENTITY)
    record = RunDir.open(tmp_path / "runs" / "a").read_json()
    assert record["identity"] == IDENTITY
    assert record["command"] == ["crosslens", "train", "runs/a"]
    assert set(record["versions"]) == {"crosslens", "sae-lens", "transformer-lens", "torch", "transformers"}
    headlines = {
        "model": "tiny", "hook_name": "blocks.1.hook_resid_post", "dataset": "text.txt",
        "snapshots": IDENTITY["snapshots"], "architecture": "topk_crosscoder", "d_sae": 64, "n_tokens": 1234, "seed": 1,
    }  # fmt: skip
    assert {key: record[key] for key in headlines} == headlines
    assert [p.name for p in run.path.iterdir()] == ["run.json"]  # nothing temporary


def test_claiming_it_again_changes_nothing(tmp_path: Path):
    run = RunDir(tmp_path / "a")
    run.claim(IDENTITY)
    before = contents(run.path)
    run.claim(json.loads(json.dumps(IDENTITY)))
    assert contents(run.path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_tokens": 99}, "it has n_tokens=1234, this run has n_tokens=99"),
        ({"training": {"lr": 1e-3, "seed": 1}}, "it has training.lr=0.0003, this run has training.lr=0.001"),
        ({"training": {"lr": 3e-4}}, "it has training.seed=1, this run has training.seed=None"),
        (
            {"architecture": {**IDENTITY["architecture"], "extra": 5}},
            "architecture.extra=None, .*=5",
        ),
        ({"snapshots": [{"label": "a", "step": 0}, {"label": "c", "step": 10}]}, r"snapshots\[1\].label=b, .*=c"),
        ({"snapshots": IDENTITY["snapshots"][:1]}, "it has snapshots="),
    ],
)
def test_another_run_is_refused_without_changing_a_byte(tmp_path: Path, change: dict[str, Any], message: str):
    run = RunDir(tmp_path / "a")
    run.claim(IDENTITY)
    run.save_table("evolution", pd.DataFrame({"feature": [1]}))
    before = contents(run.path)
    with pytest.raises(UserError, match=message) as caught:
        run.claim({**IDENTITY, **change})
    assert "belongs to another run: it has " in str(caught.value) and "\n" not in str(caught.value)
    assert contents(run.path) == before


def test_a_directory_with_other_files_is_refused(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="contains files but is not a run directory"):
        RunDir(tmp_path).claim(IDENTITY)
    assert contents(tmp_path) == before
    (tmp_path / "empty").mkdir()
    RunDir(tmp_path / "empty").claim(IDENTITY)  # an empty one is as good as none


def test_update_merges_one_level_deep(tmp_path: Path):
    run = RunDir(tmp_path / "a")
    run.update(timings={"train": 1.5})
    run.update(timings={"evolve": 2.0}, wandb_id="x")
    run.update(wandb_id="y", labels=["b"])
    assert run.read_json() == {"timings": {"train": 1.5, "evolve": 2.0}, "wandb_id": "y", "labels": ["b"]}


def test_tables_come_back_as_they_were(tmp_path: Path):
    run = RunDir(tmp_path / "a")
    table = pd.DataFrame(
        {"snapshot": [0, 1], "norm/step 0": [0.25, float("nan")], "label": ["initial", "never"], "step": [None, 7]}
    )
    assert run.table("attribution/b") is None and run.tasks("attribution") == []
    run.save_table("own/b", table)
    pd.testing.assert_frame_equal(run.table("own/b"), table)  # type: ignore[arg-type]
    table = table.drop(columns="norm/step 0")
    for name in ("attribution/b", "attribution/b.snapshots", "attribution/a.b c"):
        run.save_table(name, table)
        pd.testing.assert_frame_equal(run.table(name), table)  # type: ignore[arg-type]
    assert run.tasks("attribution") == ["a.b c", "b"]
    assert not list(tmp_path.rglob("*.tmp"))
    run.save_table("evolution", table[["label"]])  # a row per feature, as older versions wrote it
    with pytest.raises(UserError, match="was written by an older version of crosslens: repeat `crosslens evolve`"):
        run.table("evolution")


@pytest.mark.parametrize("name", ["../outside", "attribution/../../outside", "/tmp/outside"])
def test_tables_stay_in_the_directory(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="points outside the run directory"):
        RunDir(tmp_path / "a").save_table(name, pd.DataFrame({"x": [1]}))
    assert not list(tmp_path.parent.rglob("outside*"))


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = RunDir(tmp_path / "a")
    run.save_table("own/x", pd.DataFrame({"x": [1]}))

    write = pq.write_table

    def interrupted(written: Any, where: Any, **options: Any) -> None:
        write(written, where, **options)
        if isinstance(where, Path):
            where.write_bytes(where.read_bytes()[:100])
            raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.save_table("own/x", pd.DataFrame({"x": [2]}))
    assert run.table("own/x")["x"].tolist() == [1]  # type: ignore[index]


def test_the_last_checkpoint_is_the_one_with_most_tokens(tmp_path: Path):
    run = RunDir(tmp_path)
    assert run.last_checkpoint() is None
    for name in ("tokens-900", "tokens-10000", "partial-20000", "tokens-30000"):
        (run.checkpoints / name).mkdir(parents=True)
        if name != "tokens-30000":  # one that is being deleted
            (run.checkpoints / name / "state.json").touch()
    assert run.last_checkpoint() == run.checkpoints / "tokens-10000"


def test_what_is_no_run_directory(tmp_path: Path):
    with pytest.raises(UserError, match="is not a run directory"):
        RunDir.open(tmp_path)
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(UserError, match="is not valid JSON"):
        RunDir.open(tmp_path).read_json()


# ---------------------------------------------------------------------- damage


def table() -> pd.DataFrame:
    numbers = pd.array([1, None, 3], dtype="Int64")
    return pd.DataFrame(
        {"feature": [0, 1, 2], "label": ["a", "b", None], "reldec": [0.5, float("nan"), 1.0], "step": numbers}
    )


def test_no_flipped_bit_of_a_table_goes_unnoticed(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    run.claim(IDENTITY)
    run.save_table("evolution", table())
    path = run.path / "evolution.parquet"
    whole = path.read_bytes()
    found = 0
    for at in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        try:
            again = run.table("evolution")
        except UserError as error:
            assert str(error).startswith(f"{path} ") and "repeat `crosslens evolve`" in str(error)
            found += 1
        else:  # a byte that nothing reads, such as a statistic
            assert again is not None
            pd.testing.assert_frame_equal(again, table())
    assert found > len(whole) / 6


def test_tables_of_another_run_or_name_are_refused(tmp_path: Path):
    runs = [RunDir(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        run.claim(IDENTITY)
        run.save_table("attribution/simple", table())
    (runs[0].path / "attribution/simple.parquet").replace(runs[1].path / "attribution/simple.parquet")
    with pytest.raises(UserError, match="belongs to another run: delete it, and repeat `crosslens attribute`"):
        runs[1].table("attribution/simple")
    runs[0].save_table("evolution", table())
    (runs[0].path / "evolution.parquet").replace(runs[0].path / "births.parquet")
    with pytest.raises(UserError, match="births.parquet holds the table 'evolution': delete it"):
        runs[0].table("births")


def test_tables_without_checksums_are_read(tmp_path: Path):
    """As other programs write them."""
    RunDir(tmp_path).claim(IDENTITY)
    table().to_parquet(tmp_path / "mine.parquet", index=False)
    found = RunDir(tmp_path).table("mine")
    assert found is not None
    pd.testing.assert_frame_equal(found, table())


def test_a_changed_run_json_is_refused(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    run.claim(IDENTITY)
    path = run.path / "run.json"
    path.write_text(path.read_text().replace("0.0003", "0.0007"))
    with pytest.raises(UserError, match="run.json is damaged, or was edited: .* or write .checksum.: null"):
        run.read_json()
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if '"checksum"' not in line))
    with pytest.raises(UserError, match="run.json is damaged, or was edited"):  # a line may be lost, too
        run.read_json()
    path.write_text("\n".join(' "checksum": null,' if '"checksum"' in line else line for line in lines))
    assert run.read_json()["identity"]["training"]["lr"] == 7e-4


# ---------------------------------------------------------------------- one writer


def holding(path: Path, part: str, held: Any, done: Any) -> None:
    with RunDir(path).writing(part):
        held.set()
        done.wait()


@pytest.mark.parametrize("part", ["run", "report"])
def test_a_second_writer_is_refused_until_the_first_ends(tmp_path: Path, part: str):
    run = RunDir(tmp_path / "run")
    run.claim(IDENTITY)
    fork = multiprocessing.get_context("fork")
    held, done = fork.Event(), fork.Event()
    process = fork.Process(target=holding, args=(run.path, part, held, done))
    process.start()
    assert held.wait(60)
    refused = pytest.raises(UserError, match=f"another process is writing the {part} in .*run: wait until it has ended")
    with refused, run.writing(part):
        pass
    with run.writing("report" if part == "run" else "run"):
        pass
    process.kill()  # a lock ends with its process
    process.join()
    with run.writing(part), run.writing(part):  # a command may call another
        pass
    assert run.read_json()["identity"] == IDENTITY


@pytest.mark.skipif(os.name != "posix", reason="there is no umask")
@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002], ids=oct)
def test_locks_have_the_permissions_of_the_users_umask(tmp_path: Path, umask: int):
    """A group can share a run or a cache if the umask of its members says so, and nobody else can write its locks."""
    before = os.umask(umask)
    try:
        cache = ActivationCache(tmp_path / "cache", torch.zeros(4, 3, dtype=torch.int32), 2, 1, 4, "float32", {})
        with RunDir(tmp_path / "run").writing(), RunDir(tmp_path / "run").writing("report"), cache.lock():
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*/*.lock")}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys((".lock", ".report.lock", "harvest.lock"), 0o666 & ~umask)


def test_a_refused_command_leaves_no_directory(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match="no such thing"), run.writing():
        raise UserError("no such thing")
    assert not list(tmp_path.iterdir())


def test_a_claim_without_results_is_replaced(tmp_path: Path):
    run = RunDir(tmp_path / "run")
    with run.writing():
        run.claim(IDENTITY)
    other = {**IDENTITY, "n_tokens": 5}
    run.check_settings({"n_tokens": 5}, part="identity")
    run.claim(other)
    assert run.read_json()["identity"] == other
    run.save_table("evolution", table())
    with pytest.raises(UserError, match="it has n_tokens=5, this run has n_tokens=1234"):
        run.claim(IDENTITY)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"crosslens": "99.0.1"}, "was written by crosslens 99.0.1, and this is .*: update crosslens to use this run"),
        ({"identity": [1]}, r"identity=\[1\] is not of type dict; restore or delete it"),
        ({"source": 5}, "source=5 is not of type dict"),
        ({"timings": []}, "timings=.* is not of type dict"),
        ({"command": "crosslens train"}, "command=crosslens train is not of type list"),
    ],
)
def test_a_run_json_of_another_kind_is_refused(tmp_path: Path, entries: dict[str, Any], message: str):
    run = claimed(tmp_path)
    run.write_json({**run.read_json(), **entries})
    with pytest.raises(UserError, match=message):
        RunDir.open(run.path).read_json()


def test_names_of_tasks_cannot_be_those_of_the_tables_beside_them():
    suffixes = {table.name.rpartition("<task>")[2] for table in TABLES if "<task>" in table.name and "/" in table.name}
    for suffix in suffixes - {""}:
        with pytest.raises(UserError, match="is reserved in file names"):
            check_file_name(f"simple{suffix}", "task")


# ---------------------------------------------------------------------- links, and files of others
def claimed(folder: Path) -> RunDir:
    run = RunDir(folder / "run")
    run.claim(IDENTITY)
    return run


PARTS = ("checkpoints", "crosscoder", "crosscoder.partial", "report", "report/data", "seeds", "seeds/1", "sweep",
         "checkpoints/tokens-64", "checkpoints/partial-64", "evolution.parquet", "labels.jsonl", ".lock", "activations",
         "own", *sorted({table.name.split("/")[0] for table in TABLES if "/" in table.name}))  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_run_that_is_a_link_is_refused(tmp_path: Path, part: str):
    run, target = claimed(tmp_path), tmp_path / "elsewhere"
    target.mkdir()
    (run.path / part).parent.mkdir(exist_ok=True)
    (run.path / part).symlink_to(target)
    message = f"{part} is a link to {target}: a part of a run cannot be elsewhere; .*make the run directory itself the"
    for call in (lambda: RunDir.open(run.path), run.hold, run.check_usable, lambda: run.check_settings({})):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(UserError, match="is a link to"):
        check_cache(run.path / part / "inside")
    assert not any(target.iterdir())


def test_the_run_directory_itself_may_be_a_link(tmp_path: Path):
    run = claimed(tmp_path)
    (tmp_path / "link").symlink_to(run.path)
    linked = RunDir.open(tmp_path / "link")
    with linked.writing():
        linked.save_table("evolution", pd.DataFrame({"snapshot": [0]}))
    check_cache(linked.path / "cache")
    delete(linked.path / "evolution.parquet", linked.path)
    assert run.table_names() == []


def test_what_is_deleted_is_never_behind_a_link(tmp_path: Path):
    run, victim = claimed(tmp_path), tmp_path / "victim"
    (victim / "tokens-1").mkdir(parents=True)
    (victim / "tokens-1" / "state.json").write_text("{}")
    run.checkpoints.mkdir()
    (run.checkpoints / "tokens-1").symlink_to(victim / "tokens-1")
    delete(run.checkpoints / "tokens-1", run.path)
    (run.checkpoints / "tokens-2").mkdir()
    (run.checkpoints / "tokens-2" / "inside").symlink_to(victim)
    delete(run.checkpoints / "tokens-2", run.path)
    assert not any(run.checkpoints.iterdir())
    run.checkpoints.rmdir()
    run.checkpoints.symlink_to(victim)
    with pytest.raises(UserError, match="is a link to"):
        delete(run.checkpoints / "tokens-1", run.path)
    assert (victim / "tokens-1" / "state.json").is_file()


def test_files_of_others_among_checkpoints(tmp_path: Path):
    run = claimed(tmp_path)
    ours = ("tokens-1000", "partial-2000", "damaged-tokens-500")
    for name in (*ours, "tokens-abc", "tokens-", "damaged-mine", "partial", "mine"):
        (run.checkpoints / name).mkdir(parents=True)
        (run.checkpoints / name / "state.json").touch()
    (run.checkpoints / ".DS_Store").touch()
    (run.checkpoints / "tokens-of-love").symlink_to(tmp_path)  # whose name is not ours
    assert sorted(path.name for path in all_checkpoints(run.checkpoints)) == sorted(ours)
    assert run.last_checkpoint() == run.checkpoints / "tokens-1000"
    RunDir.open(run.path)
