"""Arguments of the command line: checked here, and turned into objects by `crosslens.pipeline.opening`.

1. Each option has a check (`one_of`, `in_range`, `check_*`), which gets its name and value, and returns or refuses it.
2. `check_split`, `crosslens.cli.training_options.check_training` and `crosslens.pipeline.opening.find_snapshots` check
   values against each other.

Both read only small files and tables. They import neither torch (unless a GPU is asked for) nor pandas,
transformers or SAELens, which take seconds: a wrong argument is reported at once.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from crosslens.errors import UserError, check_inside, did_you_mean, read_json
from crosslens.rundir import RunDir, check_writable
from crosslens.snapshots.settings import ATTENTIONS, BACKENDS
from crosslens.snapshots.settings import DTYPES as MODEL_DTYPES
from crosslens.tasks import formats

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


def choose_label(labels: Sequence[str], text: str) -> str:
    """The --snapshot option, if it is a label of a run."""
    if text not in labels:
        raise UserError(f"--snapshot {text!r} is unknown: use one of {', '.join(labels)}{did_you_mean(text, labels)}")
    return text


def parse_numbers(text: str, option: str) -> list[int]:
    """Positive whole numbers, or 0, separated by commas."""
    if not all(part.replace("_", "").isdecimal() for part in text.split(",")):
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


def check_models(backend: str, attention: str, hooks: Sequence[str]) -> None:
    """Refuse fused attention or a hook point that a backend lacks."""
    from crosslens.snapshots.hooks import check_hooks

    if backend == "hooked_transformer" and attention != "eager":
        raise UserError(
            f"--attention {attention} needs --backend bridge: a HookedTransformer computes its own attention"
        )
    check_hooks(hooks, backend)
