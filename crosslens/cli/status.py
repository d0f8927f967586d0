"""What a run directory holds: each part, what is missing or damaged, and the command to type next.

Everything is compared with its checksum: run.json, the crosscoder's tensors, the files of the last checkpoint, and all
tables. Nothing is changed. Torch, which takes seconds to import, is not needed.
"""

from __future__ import annotations

import json
import os
import shlex
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from crosslens.cli.display import counted, number, percent, size
from crosslens.errors import UserError, brief, json_checksum
from crosslens.rundir import RunDir, complete_checkpoints, inspect_checkpoint
from crosslens.tables import maker, task_of

OK, MISSING, DAMAGED, OLD, UNFINISHED = "ok", "missing", "damaged", "out of date", "unfinished"
OF_EVOLVE = (
    "evolution",
    "lifecycles",
    "birth_counts",
    "examples",
    "example_tokens",
    "lens",
    "nearest",
    "dynamics",
    "probe",
)
"""Tables that `crosslens evolve` always writes, the last ones last."""
_BLOCK = 1 << 24


class Part(NamedTuple):
    """A part of a run directory."""

    name: str
    state: str
    about: str
    """Its contents; or what is wrong with it, and the remedy."""
    command: str = ""
    """What makes or repairs it."""


class Status(NamedTuple):
    """What `inspect_run` has found."""

    about: str
    """The run in a line."""
    parts: list[Part]
    next: str
    """The command to type next, or what to do instead."""


def inspect_run(path: Path) -> Status:
    """Read and check everything in a run directory.

    Raises:
        UserError: it is not a run directory, or its run.json is damaged.
    """
    run = RunDir.open(path)
    info = run.read_json()
    name = shlex.quote(str(path))
    tables, damaged = _read_tables(run)
    parts = [_crosscoder(run, info)]
    parts += _checkpoints(run, info, trained=parts[0].state == OK)
    if parts[0].state == OK or tables or damaged:
        parts += [_evaluation(run, info, tables, damaged), _evolution(name, tables, damaged)]
        parts += _tasks(run, name, info, tables, damaged)
        parts += _others(run, info, tables, damaged)
        parts.append(_labels(tables, damaged))
        parts.append(_report(run, name))
    return Status(_describe(info), parts, _next(run, parts))


def _describe(info: dict[str, Any]) -> str:
    identity = info.get("identity", {})
    snapshots = [row["label"] for row in identity.get("snapshots") or ()]
    if not snapshots:
        return "nothing has been trained here yet"
    where = f"{len(snapshots)} snapshots" if len(snapshots) > 1 else "1 snapshot"
    spread = f" ({snapshots[0]} to {snapshots[-1]})" if len(snapshots) > 1 else f" ({snapshots[0]})"
    architecture = str(identity.get("architecture", {}).get("architecture", "crosscoder")).replace("_", " ")
    features = identity.get("architecture", {}).get("d_sae", 0)
    return (
        f"{architecture} of {features:,} features, {identity.get('hook_name')}, {where}{spread} of "
        f"{identity.get('model_name')}"
    )


def _repeat(run: RunDir, info: dict[str, Any]) -> str:
    """The command that made the run, with the place where the run is now."""
    command = [str(part) for part in info.get("command") or []]
    for option in ("--run-dir", "--out"):
        command = [f"{option}={run.path}" if part.startswith(f"{option}=") else part for part in command]
        if option in command[:-1]:
            command[command.index(option) + 1] = str(run.path)
    return shlex.join(command) if command and command[0] == "crosslens" else ""


def _crosscoder(run: RunDir, info: dict[str, Any]) -> Part:
    again = _repeat(run, info)
    config, weights = run.crosscoder / "cfg.json", run.crosscoder / "sae_weights.safetensors"
    if not config.is_file() or not weights.is_file():
        return Part("crosscoder", MISSING, "no training has been completed", again)
    try:
        n_compared = _compare_tensors(config, weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        return Part("crosscoder", DAMAGED, f"{brief(error)}; training again sets it aside", again)
    seconds = info.get("timings", {}).get("train")
    took = "" if seconds is None else f"; trained in {seconds:,.0f} s"
    checked = f"{counted(n_compared, 'tensor')} compared with their checksums" if n_compared else "without checksums"
    return Part("crosscoder", OK, f"{size(weights.stat().st_size)}, {checked}{took}")


def _compare_tensors(config: Path, weights: Path) -> int:
    """Compare cfg.json and every tensor with the checksums in cfg.json, as `crosscoders.checksums` does with torch.

    Returns:
        Number of tensors; 0 without checksums.
    """
    import xxhash

    from crosslens.progress import tqdm

    contents = json.loads(config.read_text(encoding="utf-8"))
    expected = contents["metadata"].pop("checksums", None)
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > weights.stat().st_size:
            raise ValueError(f"{weights.name} is cut off")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if 8 + length + max(tensor["data_offsets"][1] for tensor in header.values()) != weights.stat().st_size:
            raise ValueError(f"{weights.name} does not have the length that its header says")
        if expected is None:
            return 0
        if expected.pop("cfg.json", None) != json_checksum(contents):
            raise ValueError("cfg.json does not have the checksum in it")
        total = weights.stat().st_size
        with tqdm(total=total, desc="Checking", unit="B", unit_scale=True, leave=False, delay=2) as bar:
            for name, tensor in header.items():
                begin, end = tensor["data_offsets"]
                file.seek(8 + length + begin)
                digest = xxhash.xxh3_64()
                for at in range(begin, end, _BLOCK):
                    digest.update(file.read(min(_BLOCK, end - at)))
                    bar.update(min(_BLOCK, end - at))
                if digest.hexdigest() != expected.get(name):
                    raise ValueError(f"{weights.name}: {name} does not have the checksum in cfg.json")
    return len(header)


def _checkpoints(run: RunDir, info: dict[str, Any], trained: bool) -> Iterator[Part]:
    total = info.get("identity", {}).get("training", {}).get("training_tokens")
    found = complete_checkpoints(run.checkpoints)
    if found and not trained:
        done = int(found[-1].name.removeprefix("tokens-"))
        of = f" of {total:,} ({done / total:.0%})" if total else ""
        _, damage = inspect_checkpoint(found[-1])
        if damage:
            earlier = "the one before is used" if len(found) > 1 else "training starts again from the first token"
            yield Part("checkpoints", DAMAGED, f"at {done:,} tokens: {damage}; {earlier}", _repeat(run, info))
        else:
            yield Part("checkpoints", UNFINISHED, f"to resume from, at {done:,}{of} tokens", _repeat(run, info))
    if aside := [*run.checkpoints.glob("damaged-*"), *run.path.glob("damaged-crosscoder")]:
        names = ", ".join(str(path.relative_to(run.path)) for path in aside)
        yield Part("set aside", DAMAGED, f"{names}: replaced since, and may be deleted")


def _read_tables(run: RunDir) -> tuple[dict[str, Any], dict[str, str]]:
    """The tables of a run, and what is wrong with those that cannot be read."""
    tables: dict[str, Any] = {}
    damaged: dict[str, str] = {}
    for name in run.table_names():
        try:
            tables[name] = run.table(name)
        except UserError as error:
            damaged[name] = str(error)
    return tables, damaged


def _evaluation(run: RunDir, info: dict[str, Any], tables: dict[str, Any], damaged: dict[str, str]) -> Part:
    if "evaluation" in damaged:
        return Part("evaluation", DAMAGED, damaged["evaluation"], _repeat(run, info))
    table = tables.get("evaluation")
    if table is None:
        return Part(
            "evaluation", MISSING, "explained variance, L0 and dead features on held-out tokens", _repeat(run, info)
        )
    explained = table["explained_variance"]
    least = table.loc[explained.idxmin(), "label"] if explained.notna().any() else "-"
    return Part(
        "evaluation",
        OK,
        f"EV {number(explained.mean())} on average, {number(explained.min())} at {least}; "
        f"L0 {number(table['l0'].mean(), 1)}; {percent(table['dead_fraction'].iloc[0])} of the features dead",
    )


def _evolution(name: str, tables: dict[str, Any], damaged: dict[str, str]) -> Part:
    command = f"crosslens evolve {name}"
    broken = [table for table in damaged if maker(table) == "evolve"]
    if broken:
        return Part("evolution", DAMAGED, _first_damage(damaged, broken), command)
    missing = [table for table in OF_EVOLVE if table not in tables]
    if len(missing) == len(OF_EVOLVE):
        return Part("evolution", MISSING, "when features form, what they are, examples", command)
    if missing:
        return Part("evolution", UNFINISHED, f"without {', '.join(missing)}", command)
    lifecycles = tables["lifecycles"]
    one = lifecycles[lifecycles["measure"] == lifecycles["measure"].iloc[0]]
    n = sum(maker(table) == "evolve" for table in tables)
    born = int((one["origin"] == "emergent").sum())
    return Part(
        "evolution",
        OK,
        f"{int(one['alive'].sum()):,} live features, {born:,} born after the first snapshot; {counted(n, 'table')}",
    )


def _tasks(
    run: RunDir, name: str, info: dict[str, Any], tables: dict[str, Any], damaged: dict[str, str]
) -> Iterator[Part]:
    names = sorted({task_of(table) or "" for table in [*tables, *damaged]} - {""})
    if not names:
        yield Part("tasks", MISSING, "effects of features on tasks", f"crosslens attribute {name} --task TASK")
    for task in names:
        broken = [table for table in damaged if task_of(table) == task]
        there = [table for table in tables if task_of(table) == task]
        option = info.get("tasks", {}).get(task) or (f"demo:{task}" if "demo" in info else "TASK")
        commands = {verb: f"crosslens {verb} {name} --task {shlex.quote(option)}" for verb in ("attribute", "ablate")}
        n = tables.get(f"attribution/{task}.snapshots")
        prompts = "" if n is None else f"effects on {int(n['n'].iloc[0]):,} prompts by {n['method'].iloc[0]}; "
        if broken:
            command = commands.get(maker(broken[0]), _repeat(run, info))
            yield Part(f"task {task}", DAMAGED, _first_damage(damaged, broken), command)
        elif f"attribution/{task}" not in tables:
            yield Part(f"task {task}", UNFINISHED, "without effects of features", commands["attribute"])
        elif f"ablation/{task}" not in tables:
            yield Part(f"task {task}", UNFINISHED, f"{prompts}not ablated yet", commands["ablate"])
        else:
            yield Part(f"task {task}", OK, f"{prompts}ablated; {counted(len(there), 'table')}")


def _others(run: RunDir, info: dict[str, Any], tables: dict[str, Any], damaged: dict[str, str]) -> Iterator[Part]:
    for table, about in (("consensus", "features that most seeds have"), ("sweep", "settings tried before training")):
        if table in tables:
            yield Part(table, OK, f"{counted(len(tables[table]), 'row')}: {about}")
    if "accuracy" in damaged:
        yield Part("accuracy", DAMAGED, damaged["accuracy"])
    others = [table for table in damaged if "/" not in table and maker(table) == "train" and table != "evaluation"]
    if others:
        yield Part("seeds", DAMAGED, _first_damage(damaged, others), _repeat(run, info))
    unfinished = [seed for seed in sorted(run.path.glob("seeds/*")) if not (seed / "crosscoder" / "cfg.json").is_file()]
    if unfinished:
        names = ", ".join(seed.name for seed in unfinished)
        yield Part("seeds", UNFINISHED, f"without a crosscoder from seed {names}", _repeat(run, info))


def _labels(tables: dict[str, Any], damaged: dict[str, str]) -> Part:
    if "labels" in damaged:
        return Part("labels", DAMAGED, damaged["labels"])
    if "labels" not in tables:
        return Part("labels", "none", "optional: `crosslens label` asks a language model")
    return Part("labels", OK, counted(len(tables["labels"]), "feature"))


def _report(run: RunDir, name: str) -> Part:
    page = run.report / "index.html"
    if not page.is_file():
        return Part("report", MISSING, "pages to look at", f"crosslens report {name}")
    written = page.stat().st_mtime
    newer = [table for table in run.table_names() if (run.path / f"{table}.parquet").stat().st_mtime > written]
    if newer:
        return Part("report", OLD, f"{counted(len(newer), 'table')} changed since", f"crosslens report {name}")
    return Part("report", OK, str(page))


def _next(run: RunDir, parts: list[Part]) -> str:
    if (run.path / ".lock").is_file() and os.access(run.path, os.W_OK):
        try:
            run.hold()()
        except UserError as error:
            return str(error)
    # a run is repaired from the front: what follows is computed from what comes before
    for part in parts:
        if part.state in (MISSING, DAMAGED, UNFINISHED, OLD) and part.command:
            return part.command
        if part.name in ("crosscoder", "checkpoints") and part.state in (MISSING, DAMAGED):
            return "repeat the call that trained it, with the same settings"
    return f"open {run.report / 'index.html'}"


def _first_damage(damaged: dict[str, str], names: list[str]) -> str:
    more = f" (and {counted(len(names) - 1, 'table')} more)" if len(names) > 1 else ""
    return damaged[names[0]] + more
