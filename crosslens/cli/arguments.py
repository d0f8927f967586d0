"""Arguments of the command line: first checked, then turned into snapshots, activations, tasks and runs.

1. Each option has a check (`one_of`, `in_range`, `check_*`), which gets its name and value, and returns or refuses it.
2. `find_snapshots`, `check_split` and `crosslens.cli.training_options.check_training` check values against each other.
3. `open_*` and `parse_*` make the objects, by the library's functions of the same subject.

Steps 1 and 2 read only small files and tables. They import neither torch (unless a GPU is asked for) nor pandas,
transformers or SAELens, which take seconds: a wrong argument is reported at once.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from crosslens.errors import UserError, check_inside, did_you_mean, read_json
from crosslens.rundir import RunDir, check_writable
from crosslens.snapshots import families
from crosslens.snapshots.settings import ATTENTIONS, BACKENDS
from crosslens.snapshots.settings import DTYPES as MODEL_DTYPES
from crosslens.tasks import formats

if TYPE_CHECKING:
    from torch import Tensor

    from crosslens.activations import Activations
    from crosslens.causal import Attribution
    from crosslens.crosscoders import Crosscoder
    from crosslens.snapshots import ModelSettings, Snapshots
    from crosslens.tasks import Task

    LoadSnapshots: TypeAlias = Callable[[], Snapshots]

__all__ = ["ATTENTIONS", "BACKENDS", "MODEL_DTYPES"]

# the library's own tables are in modules that import torch; a test compares them
ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")
SCALES = ("std", "norm")
PRECISIONS = ("float32", "tf32", "bfloat16")
MOMENTS = ("float32", "bfloat16")
CACHE_DTYPES = ("bfloat16", "float32", "int8")
SAMPLES = ("line", "paragraph")
METHODS = ("removal", "both_ends", "ig", "gradient", "exact")
RULES = ("gauss_legendre", "midpoint", "left")
BASELINES = ("zero", "mean", "patch")
TEXT_FILES = (".txt", ".text", ".jsonl", ".json", ".csv", ".tsv", ".parquet")

MAX_SEED = 2**32 - 1
"""The largest seed that every random generator in use accepts."""
MAX_FEATURES = 2**24
GPU_FILES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/kfd", "/dev/dxg")  # on Linux: NVIDIA, Jetson, AMD, WSL


# ---------------------------------------------------------------------- one option
def one_of(*valid: str) -> Callable[[str, str | None], str | None]:
    """A callback that refuses all other values."""

    def check(option: str, value: str | None) -> str | None:
        if value is not None and value not in valid:
            raise UserError(f"{option} {value!r} is unknown: use one of {', '.join(valid)}{did_you_mean(value, valid)}")
        return value

    return check


def in_range(low: int, high: int | None = None) -> Callable[[str, int | None], int | None]:
    """A callback that refuses numbers below `low` or above `high`."""

    def check(option: str, value: int | None) -> int | None:
        if value is not None and not (low <= value and (high is None or value <= high)):
            limit = f"at least {low}" if high is None else f"between {low} and {high:,}"
            raise UserError(f"{option} {value} must be {limit}")
        return value

    return check


def check_positive(option: str, value: float | None) -> float | None:
    """Refuse a number that is not above 0, infinite or not a number."""
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"{option} {value} must be a finite number above 0")
    return value


def check_coefficient(option: str, value: float | None) -> float | None:
    """Refuse a number that is below 0, infinite or not a number."""
    if value is not None and not 0 <= value < math.inf:
        raise UserError(f"{option} {value} must be a finite number, 0 or above")
    return value


def check_fraction(option: str, value: float | None) -> float | None:
    """Refuse a number below 0 or above 1."""
    if value is not None and not 0 <= value <= 1:
        raise UserError(f"{option} {value} must be a fraction of the steps, between 0 and 1")
    return value


def check_duration(option: str, value: float | None) -> float | None:
    """Refuse what is neither a fraction of the steps, below 1, nor a whole number of them.

    1 is refused, because it could mean one step or all of them.
    """
    if value is not None and not (0 <= value < 1 or (value > 1 and value.is_integer())):
        raise UserError(f"{option} {value:g} must be a fraction of the steps below 1, or a number of steps from 2")
    return value


def check_device(option: str, value: str | None) -> str | None:
    """Refuse a device that is unknown, or not in this machine; torch is asked only if there may be a GPU."""
    if value is None or value == "cpu":
        return value
    if not re.fullmatch(r"cuda(:\d+)?", value):
        raise UserError(f"{option} {value!r} is unknown: use cpu, cuda, or cuda:1 for the second GPU")
    if find_assumed_device(None) == "cpu":
        count = 0
    else:
        import torch

        count = torch.cuda.device_count()
    if not count:
        raise UserError(f"{option} {value!r} needs CUDA, which is not available here: use {option} cpu")
    if int(value.partition(":")[2] or 0) >= count:
        raise UserError(f"{option} {value!r} does not exist: there are {count} GPUs, from cuda:0")
    return value


def find_assumed_device(value: str | None) -> str:
    """The --device option, or cuda where there may be a GPU: torch, which knows, takes seconds to import."""
    if value is not None:
        return value
    return "cpu" if sys.platform == "linux" and not any(map(os.path.exists, GPU_FILES)) else "cuda"


def check_hooks(_: str, values: list[str]) -> list[str]:
    """Refuse what is not the name of a supported hook point, and one that is given twice."""
    from crosslens.snapshots.hooks import check_hooks, hook_layer

    for value in values:
        hook_layer(value)
    check_hooks(values)
    return values


def check_one_hook(option: str, values: list[str]) -> list[str]:
    """Refuse several hook points, too."""
    check_hooks(option, values)
    if len(values) > 1:
        raise UserError(
            f"{option} is given {len(values)} times: a crosscoder reads one hook point, so train once for each (a "
            "folder that `crosslens harvest` filled for several serves them all)"
        )
    return values


def check_dataset(option: str, value: str) -> str:
    """Refuse a file that does not exist or has an unsupported type; other names are datasets on the hub."""
    path, known = Path(value), ", ".join(TEXT_FILES)
    if path.is_file():
        if not {*path.suffixes} & {*TEXT_FILES}:
            raise UserError(f"{option} {value} has an unsupported file type: use {known}, each also with .gz")
        if not os.access(path, os.R_OK):
            raise UserError(f"{option} {value} cannot be read: no permission")
    elif path.exists():
        raise UserError(f"{option} {value} is not a regular file: give a file ({known}) or a hub name")
    elif path.suffix in {*TEXT_FILES, ".gz"} or value.count("/") > 1 or value.startswith((".", "/", "~")):
        raise UserError(f"{option} {value} does not exist: give an existing file, or a hub name such as user/name")
    return value


def check_folder(_: str, value: Path | None) -> Path | None:
    """Refuse a folder that cannot be created or written to."""
    if value is not None:
        check_writable(value)
    return value


def check_export(_: str, value: Path | None) -> Path | None:
    """Refuse a place whose folder cannot be created or written to."""
    if value is not None:
        check_writable(value.parent)
    return value


def check_new_run(_: str, value: Path) -> Path:
    """Refuse a directory where no run can be written."""
    RunDir(value).check_usable()
    return value


def check_run(value: Path) -> Path:
    """Refuse what is not a run directory."""
    RunDir.open(value).read_json()
    return value


def check_trained_run(value: Path) -> Path:
    """Refuse a run directory without a trained crosscoder, or without a record of its activations."""
    run = RunDir.open(value)
    if run.read_json().get("source") is None:
        raise UserError(f"{value} does not record where its activations came from: use the Python functions instead")
    check_crosscoder(run.crosscoder, f"{value} has no trained crosscoder: run its `crosslens train` command again")
    return value


def check_published(value: Path) -> Path:
    """Refuse what is neither a run directory nor the folder of a crosscoder."""
    folder = RunDir(value).crosscoder if RunDir(value).exists() else value
    check_crosscoder(folder, f"{value} holds no crosscoder: give a run directory, or a folder that `save` wrote")
    return value


def check_crosscoder(folder: Path, otherwise: str) -> None:
    """Refuse a folder without the two files of a crosscoder, or with a config that is not JSON."""
    if not all((folder / name).is_file() for name in ("cfg.json", "sae_weights.safetensors")):
        raise UserError(otherwise)
    read_json(folder / "cfg.json", "config of a crosscoder")


def check_repository(value: str) -> str:
    """Refuse what is not the name of a repository."""
    from crosslens.sharing.repositories import check_repository

    return check_repository(value)


def check_id(option: str, value: str | None) -> str | None:
    """Refuse an id that is not a path inside a repository."""
    return None if value is None else check_inside(value, option)


def check_numbers(option: str, value: str | None) -> str | None:
    """Refuse what is not a list of whole numbers."""
    if value is not None:
        parse_numbers(value, option)
    return value


def check_tasks(option: str, values: list[str]) -> list[str]:
    """Refuse tasks that do not exist, and files of another format."""
    return [formats.check(value, option) for value in values]


# ---------------------------------------------------------------------- options together
def find_snapshots(spec: str, steps: str | None, hooks: Sequence[str] = ()) -> LoadSnapshots:
    """Check a --snapshots and a --steps option, and return the function that makes the `Snapshots`.

    Args:
        spec: a folder; a model in the table of families, such as `pythia-160m`; `org/model@revision,revision`;
            `org/model@pattern` with {step} in it; `label=place,label=place`, where a place is a folder, `org/model` or
            `org/model@revision`; a release such as crosslens-demo; or demo.
        steps: steps, labels or revisions, or the name of a set; None for all snapshots of a folder or release.
        hooks: hook points that a model in a local folder must have.

    Raises:
        UserError: `spec` is none of these, or a step or the hook point does not exist.
    """
    from crosslens.sharing.registry import list_releases

    if spec == "demo":
        return lambda: _demo(steps)
    if Path(spec).is_dir():
        return _local(Path(spec), steps, hooks)
    if release := list_releases().get(spec):
        where = release.snapshots or {}
        steps = steps or ",".join(where.get("trained", ())) or None
        if "folder" in where:
            return _local(Path(where["folder"]), steps, hooks)
        if "revisions" in where:
            labels = where.get("labels", where["revisions"])
            chosen = _choose(spec, labels, where.get("steps", [None] * len(labels)), steps)
            return lambda: _released(spec, every=True)[chosen]
        return lambda: _released(spec)  # raises
    if re.match(r"[^/@=,]+=", spec):
        return _models(spec, steps, hooks)
    repository, at, revisions = spec.partition("@")
    if at and "{step}" in revisions:
        return _of_model(families.pattern_model(repository, revisions), steps or "all")
    if model := families.match_model(spec):
        default = "paper" if "paper" in model.sets else "log:8" if model.steps is None else "all"
        return _of_model(model, steps or default)
    if at and revisions:
        check_repository(repository)
        if steps is not None:
            raise UserError(f"--steps {steps} contradicts {spec!r}, which names its revisions: leave one of them out")
        return lambda: _snapshots().from_hub(repository, revisions.split(","))
    raise UserError(
        f"--snapshots {spec!r} is neither a folder nor a known model: give a folder, pythia-160m, "
        f"org/model@revision,revision, label=place,label=place, a release, or demo{did_you_mean(spec, list_releases())}"
    )


def _of_model(model: families.Model, steps: str) -> LoadSnapshots:
    from crosslens.snapshots.hub import list_revisions

    wanted = parse_steps(steps)
    model.revisions(wanted, lambda: list_revisions(model.repository))
    return lambda: _snapshots().from_model(model, wanted)


def _local(folder: Path, steps: str | None, hooks: Sequence[str]) -> LoadSnapshots:
    from crosslens.snapshots.folders import read_rows

    root = folder.expanduser().resolve()
    name, rows = read_rows(root)
    chosen = _choose(name, [row["label"] for row in rows], [row["step"] for row in rows], steps)
    _check_hooks_in(root / rows[0]["path"], hooks)
    return lambda: _snapshots().local(root)[chosen]


def _models(spec: str, steps: str | None, hooks: Sequence[str]) -> LoadSnapshots:
    from crosslens.snapshots.folders import check_places

    pairs = [(label, place) for label, _, place in (part.partition("=") for part in spec.split(","))]
    if not all(label and place for label, place in pairs):
        raise UserError(f"--snapshots {spec!r} mixes forms: give label=place,label=place, such as base=a,chat=b")
    labels = [label for label, _ in pairs]
    if len(set(labels)) < len(labels):
        raise UserError(f"--snapshots {spec!r} has a label twice: give each model its own")
    for name, revision in check_places(dict[str, str | Path](pairs)).values():
        if revision is None:
            _check_hooks_in(Path(name), hooks)
    chosen = _choose(spec, labels, [None] * len(labels), steps)
    return lambda: _snapshots().of(dict[str, str | Path](pairs))[chosen]


def _check_hooks_in(folder: Path, hooks: Sequence[str]) -> None:
    """Refuse hook points that the model in a folder does not have."""
    from crosslens.snapshots.hooks import check_hook

    path = folder / "config.json"
    if hooks and path.is_file():
        config = read_json(path, "config of a model")
        if {"num_hidden_layers", "model_type"} <= config.keys():
            for hook in hooks:
                check_hook(hook, SimpleNamespace(**config))


def _demo(steps: str | None) -> Snapshots:
    from crosslens.synthetic import PretrainingConfig

    known = PretrainingConfig().snapshot_steps
    chosen = _choose("the demo", [f"step{step}" for step in known], known, steps)
    return _snapshots().demo()[chosen]


def _released(name: str, *, every: bool = False) -> Snapshots:
    from crosslens.sharing.registry import load_snapshots

    return load_snapshots(name, every=every)


def _snapshots() -> type[Snapshots]:
    from crosslens.snapshots import Snapshots

    return Snapshots


def _choose(name: str, labels: Sequence[str], steps: Sequence[int | None], text: str | None) -> list[int]:
    """Indices of the snapshots that a --steps option names, in the order of training."""
    if text is None or text == "all":
        return list(range(len(labels)))
    known = [step for step in steps if step is not None]
    even = families.read_spaced(text)
    if even and len(known) == len(steps):
        wanted: set[int | str] = {*families.spaced(known, *even)}
    else:
        parsed = parse_steps(text)
        wanted = {parsed} if isinstance(parsed, str) else {*parsed}
    if unknown := wanted - {*labels, *known}:
        raise UserError(
            f"--steps {text!r}: {name} has no snapshot {sorted(map(str, unknown))[0]}; it has {', '.join(labels)}"
        )
    return [i for i, names in enumerate(zip(labels, steps, strict=True)) if wanted & {*names}]


def check_split(dataset: str, split: str | None) -> str:
    """The --split of a dataset on the hub, by default train; refused for a file, which has none."""
    if split is not None and Path(dataset).is_file():
        raise UserError(f"--split {split!r} is for datasets on the hub, and {dataset} is a file: leave it out")
    return split or "train"


def check_processes(processes: int, data_parallel: int) -> None:
    """Refuse groups of processes of unequal size; whether they can split d_sae and the batch is checked with torch."""
    if processes % data_parallel:
        raise UserError(
            f"--data-parallel {data_parallel} does not divide the {processes} process{'es' * (processes > 1)} of this "
            f"run: start a multiple of {data_parallel} processes with torchrun, or leave it out"
        )


def list_labels(path: Path) -> list[str]:
    """Labels of the snapshots of a trained run."""
    return [row["label"] for row in RunDir(path).read_json()["source"]["snapshots"]["snapshots"]]


def choose_label(labels: Sequence[str], text: str) -> str:
    """The --snapshot option, if it is a label of a run."""
    if text not in labels:
        raise UserError(f"--snapshot {text!r} is unknown: use one of {', '.join(labels)}{did_you_mean(text, labels)}")
    return text


# ---------------------------------------------------------------------- what they stand for
def parse_snapshots(spec: str, steps: str | None) -> Snapshots:
    """Make the snapshots that `find_snapshots` has found."""
    return find_snapshots(spec, steps)()


def parse_steps(text: str) -> str | list[int | str]:
    """Steps (`0,512,143000`), revisions (`step1000-tokens2B,main`), or the name of a set (`paper`, `log:12`)."""
    parts: list[int | str] = [int(p.replace("_", "")) if _is_number(p) else p for p in text.split(",")]
    return parts if len(parts) > 1 or isinstance(parts[0], int) else text


def _is_number(text: str) -> bool:
    return text.replace("_", "").isdecimal()


def parse_numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers, or 0, separated by commas."""
    if not all(map(_is_number, text.split(","))):
        raise UserError(f"{option} {text!r} must be whole numbers separated by commas, such as 1,5,15")
    return [int(part.replace("_", "")) for part in text.split(",")]


def parse_prices(text: str) -> tuple[float, float]:
    """Prices of a million tokens in and out."""
    try:
        into, out = map(float, text.split(","))
    except ValueError:
        raise UserError(
            f"--prices {text!r} must be two numbers, the prices of a million tokens in and out, such as 3,15"
        ) from None
    return into, out


def parse_tasks(specs: Sequence[str]) -> list[Task]:
    """Make the tasks that `check_tasks` has accepted; two of one name are refused, because names are file names."""
    tasks = [_parse_task(spec) for spec in specs]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--task names {name!r} twice: give each task once")
    return tasks


def _parse_task(spec: str) -> Task:
    from crosslens.tasks import Task

    kind, _, rest = spec.partition(":")
    if kind == "multiblimp":
        language, _, phenomenon = rest.partition(":")
        return Task.multiblimp(language, phenomenon or None)
    if kind == "ioi":
        return Task.ioi(rest or None)
    if kind in ("demo", "sva", "blimp", "clams"):
        return getattr(Task, kind)(rest)
    return Task.local(spec)


def check_models(backend: str, attention: str, hooks: Sequence[str]) -> None:
    """Refuse fused attention or a hook point that a backend lacks."""
    from crosslens.snapshots.hooks import check_hooks

    if backend == "hooked_transformer" and attention != "eager":
        raise UserError(
            f"--attention {attention} needs --backend bridge: a HookedTransformer computes its own attention"
        )
    check_hooks(hooks, backend)


def parse_settings(device: str | None, backend: str = "bridge", **others: Any) -> ModelSettings:
    """How models run; device None is CUDA if available."""
    from crosslens.snapshots import ModelSettings

    given: dict[str, Any] = {} if device is None else {"device": device}
    return ModelSettings(**given, backend=backend, **others)


def parse_activations(
    load: LoadSnapshots,
    hook: Sequence[str],
    dataset: str,
    n_tokens: int | None,
    context_size: int | None,
    *,
    settings: ModelSettings,
    seed: int = 0,
    **others: Any,
) -> Activations:
    """The activations that a command asks for; `others` are further fields of `Dataset`."""
    from crosslens.activations import Activations, Dataset

    data = Dataset(dataset, n_tokens, context_size, **others)
    return Activations(load(), hook, data, seed=seed, settings=settings)


def open_run(path: Path, device: str | None) -> tuple[RunDir, Crosscoder, Activations]:
    """Open a trained run: its crosscoder, and the activations it was trained on."""
    from crosslens.activations import Activations
    from crosslens.crosscoders import load

    run = RunDir.open(path)
    run.hold()
    source = run.read_json()["source"]
    settings = parse_settings(device, **source["settings"])
    return run, load(run.crosscoder, device=settings.device), Activations.from_dict(source, settings)


def encoder_shares(run: RunDir, ie: Attribution) -> Tensor | None:
    """Encoder shares (F, S) that `crosslens evolve` has saved, for the features and snapshots of the effects."""
    table = run.table("encoder")
    columns = [f"share/{label}" for label in ie.labels]
    if table is None or len(table) != len(ie.effects) or not set(columns) <= set(table):
        return None
    import torch

    return torch.as_tensor(table.sort_values("feature")[columns].to_numpy(dtype=float).copy())


def open_consensus(path: Path) -> list[int]:
    """Features of a run that most of its seeds have."""
    found = RunDir.open(path).consensus()
    return [int(feature) for feature in found.loc[found["consensus"], "feature"]]
