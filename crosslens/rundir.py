"""The layout of a run directory. No other module builds these paths.

run.json                        what was run: versions, command, data and snapshot fingerprints, timings
crosscoder/                     cfg.json and sae_weights.safetensors, as SAELens writes them
checkpoints/                    the last two complete checkpoints of an unfinished training run
<table>.parquet                 the tables, declared in `tables`; those of tasks are in folders, such as attribution/
own/<name>.parquet              tables that a user of the library has saved
documents.txt, labels.jsonl     texts of the demo; requests to language models and their answers
seeds/<seed>/                   run directories of the same training from other seeds
sweep/<setting>/                run directories of the trainings of a sweep
report/                         the HTML pages

A run directory may be a link, which is followed. None of its parts may be one: what is written or deleted through it
would be in a place that the command does not name. `RunDir.open` and `RunDir.check_usable` refuse such a run.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from crosslens.errors import UserError, brief, did_you_mean, json_checksum, read_json, shortened
from crosslens.tables import check_table, earlier_names, folders, maker, task_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_PATIENCE = 0.5  # seconds; `status` looks whether a lock is held by taking it for a moment
_COUNT = itertools.count()
_LOCKS: list[FileLock] = []
_CHECKPOINT = re.compile(r"tokens-\d+|partial-\d+|damaged-tokens-\d+")
# what is written directly in a run directory besides the folders of tables; `check_cache` looks at caches, which can
# have any name
_PARTS = re.compile(
    r"checkpoints|crosscoder|crosscoder\.partial|damaged-crosscoder|report|seeds|sweep|activations|exports"
    r"|.+\.parquet|run\.json|labels\.jsonl|summary\.json|documents\.txt|\.lock|\.report\.lock"
)
# what is written in those of its folders that may hold other files, too
_INNER = {"checkpoints": _CHECKPOINT, "report": re.compile("assets|data"), "seeds": re.compile(r"\d+"),
          "sweep": re.compile(r"F\d.*")}  # fmt: skip
_PATH = re.compile(r"(?:file:/{2,}|~/|/|[A-Za-z]:[\\/]|\\\\).+")
_INSIDE = re.compile(r"(?<![\w:/.\])])(?:file:/{2,}|~/|/(?=[\w.]+/)|[A-Za-z]:[\\/](?=\w)|\\\\(?=\w))[^\s\"'<>|,;)]+")
# settings that earlier versions did not record; what both sides have is compared
_COMPARED_IF_KNOWN = {"models", "cache_dtype", "config", "tokenizer"}
# what is read of run.json in more than one place
_ENTRIES = {"identity": dict, "source": dict, "timings": dict, "memory": dict, "tasks": dict, "splits": dict,
            "studied": dict, "demo": dict, "seeds_compared": dict, "command": list}  # fmt: skip
_PACKAGES = ("crosslens", "sae-lens", "transformer-lens", "torch", "transformers")


class RunDir:
    """One run on disk: tables by name, and `run.json`.

    Args:
        path: the directory; it is created when something is saved.

    Attributes:
        writes: whether anything is written; of several processes that work together only the first writes.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.crosscoder = self.path / "crosscoder"
        self.checkpoints = self.path / "checkpoints"
        self.report = self.path / "report"
        self.writes = True
        self._made_with: dict[str, Any] = {}

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """Open an existing run directory.

        Raises:
            UserError: `path` holds no run, or a part of it is a link.
        """
        run = cls(path)
        if not run.exists():
            raise UserError(f"{path} is not a run directory (it has no run.json); `crosslens train` makes one")
        run.check_links()
        return run

    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / "run.json").is_file()

    def read_json(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / "run.json"
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); restore or delete it") from error
        if not isinstance(contents, dict):
            raise UserError(f"{path} holds a {type(contents).__name__}, not an object; restore or delete it")
        # a file that this package wrote has one, or null after an edit
        checksum = contents.pop("checksum", "missing" if "versions" in contents else None)
        if checksum is not None and checksum != json_checksum(contents):
            raise UserError(
                f"{path} is damaged, or was edited: its contents do not have the checksum in it; restore it, or write "
                '"checksum": null if the edit was meant'
            )
        made_by = contents.get("crosslens")
        if isinstance(made_by, str) and _release(made_by) > _release(version("crosslens")):
            raise UserError(
                f"{path} was written by crosslens {shortened(made_by)}, and this is {version('crosslens')}: update "
                "crosslens to use this run"
            )
        for key, kind in _ENTRIES.items():
            if contents.get(key) is not None and not isinstance(contents[key], kind):
                raise UserError(
                    f"{path} is not that of a run: {key}={shortened(contents[key])} is not of type {kind.__name__}; "
                    "restore or delete it"
                )
        return contents

    def write_json(self, contents: dict[str, Any]) -> None:
        """Replace run.json.

        Args:
            contents: all of it.
        """
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(contents, default=str))
        write_text(self.path / "run.json", json.dumps({"checksum": json_checksum(plain), **plain}, indent=1))

    def update(self, **entries: Any) -> None:
        """Add entries to run.json; dictionaries are merged one level deep.

        Args:
            entries: values by key.

        Raises:
            UserError: the file is damaged.
        """
        contents = self.read_json() if self.exists() else {}
        for key, value in entries.items():
            contents[key] = {**contents.get(key, {}), **value} if isinstance(value, dict) else value
        self.write_json(contents)

    def crosscoder_checksums(self) -> str:
        """The checksums of the crosscoder in its `cfg.json`, as one text: by them what depends on it is compared.

        Raises:
            UserError: there is no crosscoder, or its config is damaged.
        """
        config = read_json(self.crosscoder / "cfg.json", "config of a crosscoder")
        return str(config.get("metadata", {}).get("checksums"))

    def check_usable(self) -> None:
        """Check that a run can be written here, or continued.

        Raises:
            UserError: the path is a file or not writable, the directory holds files of something else, or a part of
                the run is a link.
        """
        check_writable(self.path)
        self.check_links()
        if not self.exists() and self.path.is_dir() and any(not _is_lock(path) for path in self.path.iterdir()):
            raise UserError(
                f"{self.path} contains files but is not a run directory; choose a new one (nothing in it was changed)"
            )

    def check_links(self) -> None:
        """Check that no part of the run is a link; the run directory itself may be one.

        Raises:
            UserError: a part is a link. It is named, with its target and the remedy.
        """
        tables = folders()
        for folder, parts in ((".", _PARTS), *_INNER.items()):
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path / folder) as found:
                for entry in found:
                    if parts.fullmatch(entry.name) or (folder == "." and entry.name in tables):
                        check_no_link(Path(entry.path), self.path)

    @contextmanager
    def writing(self, part: str = "run") -> Generator[None, None, None]:
        """Keep other processes from writing here; the lock ends with the process, however that ends.

        Args:
            part: what is written: "run", or "report", which may be drawn while a run goes on.

        Raises:
            UserError: another process is writing; or the directory cannot be used.
        """
        # what is noted within is of one command, where a program calls several
        noted, self._made_with = self._made_with, {}
        release = self.hold(part) if self.writes else None
        try:
            yield
        finally:
            self._made_with = noted
            if release is not None:
                release()

    def hold(self, part: str = "run") -> Callable[[], None]:
        """Like `writing`, until the function that is returned is called, or the process ends.

        Args:
            part: as in `writing`.

        Raises:
            UserError: as `writing`.
        """
        self.check_usable()
        new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path.resolve() / (".lock" if part == "run" else f".{part}.lock")
        lock = FileLock(path, timeout=_PATIENCE, is_singleton=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another process is writing the {part} in {self.path}: wait until it has ended, or choose another "
                "directory"
            ) from error
        _LOCKS.append(lock)  # it is released when nothing refers to it any more

        def release() -> None:
            _LOCKS.remove(lock)
            lock.release()
            if new and not self.exists() and not lock.is_locked:  # refused: leave nothing behind
                path.unlink(missing_ok=True)
                with suppress(OSError):
                    self.path.rmdir()

        return release

    def claim(self, identity: dict[str, Any], part: str = "identity", hints: Mapping[str, str] | None = None) -> None:
        """Make this the directory of a run, or check that it already is.

        Args:
            identity: the settings that tell one run from another.
            part: entry of run.json that records them; the demo records its own settings beside those of training.
            hints: by setting, what to do where it is the one that differs.

        Raises:
            UserError: the directory holds another run (the first difference is named) or other files, or cannot be
                written to; nothing is written.
        """
        wanted = json.loads(json.dumps(identity, default=str))
        self.check_usable()
        contents = self.read_json() if self.exists() else {}
        found = _recorded(contents, part)
        if part in contents and not self._has_results() and _first_difference(found, wanted):
            contents = {}  # of a command that failed before it had written anything
        if part in contents:
            self._refuse_difference(found, wanted, hints)
            return
        stamp = contents or {
            "id": uuid.uuid4().hex,
            "versions": {package: version(package) for package in _PACKAGES},
            "crosslens": version("crosslens"),
            "python": sys.version.split()[0],
            "created": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "command": [_program(sys.argv[0]), *sys.argv[1:]],
        }
        self.write_json({**stamp, part: wanted, **(_headlines(wanted) if part == "identity" else {})})

    def check_settings(self, settings: dict[str, Any], part: str = "identity") -> None:
        """Check some of the settings that `claim` compares, before the others are known.

        Args:
            settings: those that are known.
            part: entry of run.json, as in `claim`.

        Raises:
            UserError: the directory cannot be used, or holds a run with other settings.
        """
        self.check_usable()
        if self.exists() and self._has_results():
            self._refuse_difference(_common(_recorded(self.read_json(), part), settings), settings)

    def _has_results(self) -> bool:
        """Whether anything but run.json has been written."""
        return any(path.name != "run.json" and not _is_lock(path) for path in self.path.iterdir())

    def _refuse_difference(self, found: Any, wanted: Any, hints: Mapping[str, str] | None = None) -> None:
        difference = _first_difference(found, wanted)
        if difference is not None:
            key, old, new = difference
            raise UserError(
                f"{self.path} belongs to another run: it has {key}={shortened(old)}, this run has "
                f"{key}={shortened(new)}; choose another directory (nothing in this one was changed)"
                + (f"; {hints[key]}" if hints and key in hints else "")
            )

    def other_seed(self, seed: int) -> RunDir:
        """The directory of the same training from another seed.

        Args:
            seed: of the training.
        """
        return RunDir(self.path / "seeds" / str(seed))

    def setting(self, d_sae: int, k: float, seed: int) -> RunDir:
        """The directory of a training of the sweep.

        Args:
            d_sae: number of features.
            k: active features per token.
            seed: of the training.
        """
        return RunDir(self.path / "sweep" / f"F{d_sae}-k{k:g}-seed{seed}")

    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of an unfinished training run."""
        return next(reversed(complete_checkpoints(self.checkpoints)), None)

    def table(self, name: str) -> pd.DataFrame | None:
        """Read a table such as "evolution" or "attribution/simple"; None if there is none.

        Args:
            name: its name in `crosslens.tables`, or `own/<name>`.

        Returns:
            Rows and columns as the table is declared in `crosslens.tables`.

        Raises:
            UserError: the file is damaged, belongs to another run or table, or is the evolution table of an older
                version.
        """
        path = self._table_path(name)
        if not path.is_file():
            return None
        import pyarrow.parquet as pq  # half a second, which commands that only check a run directory do without

        again = f"delete it, and repeat `crosslens {maker(name)}`"
        try:
            found = pq.ParquetFile(path, page_checksum_verification=True).read()
            seal = json.loads(found.schema.metadata.get(b"crosslens", b"null"))
            if b"pandas" not in found.schema.metadata:
                raise ValueError("its description is missing")
            if seal is not None and seal["checksum"] != _seal(
                found.schema, len(found), seal["run"], seal["table"], seal.get("made_with")
            ):
                raise ValueError("its description does not have the checksum in it")
            frame = found.to_pandas()
        except Exception as error:  # a damaged file can raise anything
            raise UserError(f"{path} is damaged ({brief(error)}): {again}") from error
        if seal is not None and seal["table"] != name:
            raise UserError(f"{path} holds the table {seal['table']!r}: {again}")
        if seal is not None and seal["run"] not in (None, self._id()):
            raise UserError(f"{path} belongs to another run: {again}")
        if name == "evolution" and "snapshot" not in frame:
            raise UserError(f"{path} was written by an older version of crosslens: repeat `crosslens evolve`")
        return frame.rename(columns=earlier_names(name))

    def save_table(self, name: str, table: pd.DataFrame, *, keeps: bool = False) -> None:
        """Write a table completely or not at all, with checksums, its name, and the run that it belongs to.

        Args:
            name: of a table that `crosslens.tables` declares, or `own/<name>` for one of your own.
            table: its rows.
            keeps: some of its rows are those that the run had; what they were made with stays in the record.

        Raises:
            UserError: a table or a column that is not declared, or a name outside the run directory.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = self._table_path(name)
        check_table(name, table.columns)
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and not any(p.name == path.name for p in path.parent.iterdir()):
            raise UserError(
                f"{path} is the file of another name, which differs from {name!r} in case or in Unicode's form only, "
                "and this file system does not tell them apart: choose another name"
            )
        whole = pa.Table.from_pandas(table, preserve_index=False)
        notes, run = whole.schema.metadata, self._id()
        empty = pa.BufferOutputStream()
        pq.write_table(whole.slice(0, 0), empty)  # some types are others when they are read back
        types = pq.read_table(empty.getvalue()).schema
        made_with = json.loads(json.dumps(self._made_with, default=str))
        made_with |= {"earlier": earlier} if keeps and (earlier := self._earlier(name, made_with)) else {}
        seal = {"table": name, "run": run, "checksum": _seal(types, len(whole), run, name, made_with)}
        seal |= {"made_with": made_with} if made_with else {}
        whole = whole.replace_schema_metadata({**notes, b"crosslens": json.dumps(seal).encode()})
        with replacing(path) as partial:
            pq.write_table(whole, partial, write_page_checksum=True)

    def note(self, **made_with: Any) -> None:
        """Say what the tables that are saved from now on are made with; every one of them records it.

        What is noted within `writing` is forgotten at its end.

        Args:
            made_with: options and digests of inputs that decide the tables, by name; those noted before stay, unless
                they have the same name. None and empty lists are left out.
        """
        self._made_with = {
            key: value for key, value in {**self._made_with, **made_with}.items() if value not in (None, [])
        }

    @property
    def noted(self) -> dict[str, Any]:
        """What `note` was told."""
        return dict(self._made_with)

    def made_with(self, name: str) -> dict[str, Any]:
        """What a table was made with, as `note` was told; empty for a table of version 0.2, or where there is none.

        Args:
            name: of the table.

        Returns:
            Options and digests by name. A table that gathers the rows of several calls has what the others were made
            with under "earlier", the oldest first.

        Raises:
            UserError: a name outside the run directory.
        """
        path = self._table_path(name)
        if not path.is_file():
            return {}
        import pyarrow.parquet as pq

        try:
            metadata = pq.read_schema(path).metadata or {}
            return dict(json.loads(metadata.get(b"crosslens", b"null")) or {}).get("made_with", {})
        except (OSError, ValueError, TypeError):  # `table` says that it is damaged
            return {}

    def _earlier(self, name: str, made_with: dict[str, Any]) -> list[dict[str, Any]]:
        """What the rows that a table has were made with, each once, but for what others are made with now."""
        last = self.made_with(name)
        found: list[dict[str, Any]] = []
        for one in [*last.pop("earlier", []), last]:
            if one and one != made_with and one not in found:
                found.append(one)
        return found

    def _id(self) -> str | None:
        return self.read_json().get("id") if self.exists() else None

    def save_tables(self, tables: Mapping[str, pd.DataFrame], *, keeps: bool = False) -> None:
        """Write several tables, as `save_table` does.

        Args:
            tables: by name.
            keeps: as in `save_table`.

        Raises:
            UserError: as `save_table`.
        """
        for name, table in tables.items():
            self.save_table(name, table, keeps=keeps)

    def consensus(self) -> pd.DataFrame:
        """The table "consensus", a row per feature.

        Raises:
            UserError: there is none, because only one seed was trained.
        """
        found = self.table("consensus")
        if found is None:
            raise UserError(
                f"{self.path} has no consensus of several seeds; repeat its `crosslens train` command with --seeds 3"
            )
        return found

    def tasks(self, kind: str) -> list[str]:
        """Names of the tasks that have a table of a kind.

        Args:
            kind: such as "attribution" or "ablation".
        """
        names = (p.name.removesuffix(".parquet") for p in (self.path / kind).glob("*.parquet"))
        return sorted(name for name in names if task_of(f"{kind}/{name}") == name)

    def remove_task(self, task: str) -> list[str]:
        """Delete the tables of a task, and its rows of the table "accuracy"; returns what was deleted.

        Args:
            task: its name.

        Raises:
            UserError: there is nothing of that task; those that have something are named.
        """
        removed = [name for name in self.table_names() if task_of(name) == task]
        accuracy = self.table("accuracy")
        rest = None if accuracy is None else accuracy.query("task != @task")
        if accuracy is not None and rest is not None and len(rest) < len(accuracy):
            removed.append("accuracy")
            if rest.empty:
                delete(self._table_path("accuracy"), self.path)
            else:
                self.save_table("accuracy", rest.reset_index(drop=True), keeps=True)
        if not removed:
            known = sorted({*self.tasks("attribution"), *(() if accuracy is None else accuracy["task"])})
            raise UserError(
                f"{self.path} has no table of task {task!r}: it has {', '.join(known) or 'no task'}"
                f"{did_you_mean(task, known)}"
            )
        for name in removed:
            if name != "accuracy":
                delete(self._table_path(name), self.path)
        return removed

    def table_names(self) -> list[str]:
        """Names of all saved tables."""
        found = [*self.path.glob("*.parquet"), *self.path.glob("*/*.parquet")]
        return sorted(path.relative_to(self.path).with_suffix("").as_posix() for path in found)

    def _table_path(self, name: str) -> Path:
        path = self.path / f"{name}.parquet"
        if self.path.resolve() not in path.resolve().parents:
            raise UserError(f"table name {name!r} points outside the run directory; use a plain name")
        return path


def without_paths(value: Any) -> Any:
    """Shorten every local path in nested values to its last part, for what others will read; keys stay unchanged."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if _PATH.fullmatch(value.strip()):
        return _last(value.strip())
    return _INSIDE.sub(lambda found: _last(found[0]), value)


def _last(path: str) -> str:
    name = PureWindowsPath(path).name if "\\" in path else PurePosixPath(path).name
    return name or "a local path"


def _is_lock(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".lock")


def all_checkpoints(folder: Path) -> list[Path]:
    """Everything in a folder that training wrote: checkpoints, whole, unfinished or set aside; not files of others."""
    return [path for path in folder.glob("*") if _CHECKPOINT.fullmatch(path.name)]


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    named = [path for path in all_checkpoints(folder) if path.name.startswith("tokens-")]
    complete = [path for path in named if (path / "state.json").is_file()]
    return sorted(complete, key=lambda path: int(path.name.removeprefix("tokens-")))


def delete(path: Path, run: Path) -> None:
    """Delete a part of a run, if it is there: a file, a folder, or a link, never what a link points to.

    Nothing else in the package deletes what is in a run directory. Files of a folder that cannot be deleted are left;
    `state.json`, which makes a checkpoint complete, goes first.

    Args:
        path: the part.
        run: the run directory, or another folder above `path` that may be a link.

    Raises:
        UserError: a folder between the two is a link.
    """
    check_no_link(path.parent, run)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    (path / "state.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def check_no_link(path: Path, run: Path) -> None:
    """Check that neither a part of a run nor a folder between it and the run directory is a link.

    Args:
        path: the part, which need not exist.
        run: the run directory.

    Raises:
        UserError: one is a link.
    """
    parts = path.relative_to(run).parts
    for n in range(1, len(parts) + 1):
        part = run.joinpath(*parts[:n])
        if part.is_symlink():
            raise UserError(
                f"{part} is a link to {os.readlink(part)}: a part of a run cannot be elsewhere; move it back, and make "
                "the run directory itself the link (nothing was changed)"
            )


def check_cache(folder: Path) -> None:
    """Check that a cache of activations within a run directory is not reached through a link.

    Args:
        folder: of the cache, which need not exist; elsewhere it may be a link.

    Raises:
        UserError: it, or a folder between it and the run directory, is a link.
    """
    folder = Path(os.path.abspath(folder))  # not `resolve`, which would follow the link
    run = next((above for above in folder.parents if (above / "run.json").is_file()), None)
    if run is not None:
        check_no_link(folder, run)


def inspect_checkpoint(folder: Path, rank: int = 0, n_ranks: int = 1) -> tuple[dict[str, Any], str]:
    """The contents of `state.json` in a checkpoint, and what is wrong with its files, if anything.

    Args:
        folder: the checkpoint.
        rank: which of several processes this is; each compares the checksums of some of the files.
        n_ranks: how many they are.
    """
    path = folder / "state.json"
    try:
        numbers = dict(json.loads(path.read_text()))
        if numbers.pop("checksum", None) != json_checksum(numbers):
            return {}, f"{path.name}: its checksum does not match"
        checksums: dict[str, str] = {}
        for path in sorted(folder.glob("checksums-*.json")):
            checksums |= json.loads(path.read_text())
        for name, checksum in list(sorted(checksums.items()))[rank::n_ranks]:
            path = folder / name
            if file_checksum(path) != checksum:
                return {}, f"{name}: its checksum does not match"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return {}, f"{path.name}: {brief(error)}"
    return numbers, ""


def file_checksum(path: Path) -> str:
    """The XXH3 of a file."""
    import xxhash

    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_examples(run: RunDir) -> None:
    """Refuse to label the features of a run that has none of their examples.

    Raises:
        UserError: there are none.
    """
    if "examples" not in run.table_names():
        raise UserError(f"{run.path} has no examples of features: run `crosslens evolve {run.path}` first")


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Raises:
        UserError: the folder or one above it is a file or not writable; it is named.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UserError(f"{folder} cannot be a folder: {existing} is a file; choose another path")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written: no permission for {existing}; choose another path")


def write_text(path: Path, text: str) -> None:
    """Write a file completely or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def share(*paths: Path) -> None:
    """Give files the permissions of the user's umask; safetensors writes them for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """A new file of this process beside `path`, which takes its place at the end, or is deleted after an error."""
    partial = path.with_name(f".{path.name[:100]}.{os.getpid()}-{next(_COUNT)}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _seal(types: pa.Schema, n_rows: int, run: str | None, name: str, made_with: Any) -> str:
    """The checksum of what the checksums of a parquet file's pages leave out: names, types, sizes, owner, inputs."""
    import xxhash

    described = [types.remove_metadata().to_string(), types.metadata[b"pandas"].decode(), n_rows, run, name]
    described += [made_with] if made_with else []  # tables of version 0.2 have none
    return xxhash.xxh3_64_hexdigest(json.dumps(described).encode())


def crosscoder_folder(place: Path) -> Path | None:
    """The folder of the crosscoder in a run directory, or the one that `save` wrote; None if there is none."""
    return next((each for each in (RunDir(place).crosscoder, place) if (each / "cfg.json").is_file()), None)


def _release(name: str) -> tuple[int, ...]:
    """The first two numbers of a version: a run of a newer one may hold what this one does not know."""
    found = re.match(r"(\d{1,9})\.(\d{1,9})", name)
    return tuple(map(int, found.groups())) if found else ()


def _program(path: str) -> str:
    """The command as a person types it: `python -m crosslens`, as torchrun starts it, is crosslens."""
    place = Path(path)
    return place.parent.name if place.name == "__main__.py" else place.name


def _headlines(identity: dict[str, Any]) -> dict[str, Any]:
    """What a reader looks for first, copied to the top level of run.json."""
    architecture = identity.get("architecture", {})
    return {
        "model": identity.get("model_name"),
        "hook_name": identity.get("hook_name"),
        "dataset": identity.get("dataset_path"),
        "snapshots": identity.get("snapshots"),
        "architecture": architecture.get("architecture"),
        "d_sae": architecture.get("d_sae"),
        "n_tokens": identity.get("n_tokens"),
        "seed": identity.get("training", {}).get("seed"),
    }


def _recorded(contents: dict[str, Any], part: str) -> dict[str, Any]:
    """The settings of a run in run.json; those of version 0.2 had a part of them in the entry `source` only."""
    found, source = contents.get(part, {}), contents.get("source")
    if part != "identity" or not isinstance(source, dict):
        return found
    cache = source.get("cache")
    return {"models": source.get("settings", {}), **({"cache_dtype": cache[1]} if cache else {}), **found}


def _common(found: Any, wanted: Any) -> Any:
    """`wanted`, with the values that `found` has for the same keys."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return {key: _common(found[key], value) if key in found else value for key, value in wanted.items()}
    return found


def _first_difference(found: Any, wanted: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(found, dict) and isinstance(wanted, dict):
        known = {*found, *wanted}
        if re.split(r"[.\[]", key)[0] in _COMPARED_IF_KNOWN:
            known = {*found} & {*wanted}
        # a setting that did not exist when the run was made is off
        known = {name for name in known if name in found or wanted[name]}
        for name in sorted(known - {each for each in _COMPARED_IF_KNOWN if each not in found or each not in wanted}):
            inner = _first_difference(found.get(name), wanted.get(name), f"{key}.{name}" if key else name)
            if inner is not None:
                return inner
        return None
    if isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            inner = _first_difference(a, b, f"{key}[{i}]")
            if inner is not None:
                return inner
        return None
    return None if found == wanted else (key, found, wanted)
