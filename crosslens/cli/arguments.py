"""What a user types on the command line, turned into snapshots, tasks, numbers and runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslens.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from crosslens.activations.loader import Activations
    from crosslens.crosscoders import Crosscoder, CrosscoderTrainingConfig
    from crosslens.rundir import RunDir
    from crosslens.snapshots.collection import Snapshots
    from crosslens.tasks.task import Task

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu")


def parse_snapshots(spec: str, steps: str | None) -> Snapshots:
    """Snapshots from what a user types.

    Args:
        spec: a folder; a model of the families' table, such as `pythia-160m`; `org/model@revision,revision`;
            `org/model@pattern` with {step} in it; a release, such as crosslens-demo; or demo.
        steps: steps, labels or revisions, or the name of a set; all snapshots of a folder or release when None.

    Raises:
        UserError: nothing of these, or steps that do not exist.
    """
    from crosslens.sharing.registry import list_releases, load_snapshots
    from crosslens.snapshots import families
    from crosslens.snapshots.collection import Snapshots

    if spec == "demo":
        return _among(Snapshots.demo(), steps)
    if Path(spec).is_dir():
        return _among(Snapshots.local(spec), steps)
    if spec in list_releases():
        return _among(load_snapshots(spec), steps)
    if model := families.match_model(spec):
        default = "paper" if "paper" in model.sets else "log:8" if model.steps is None else "all"
        return Snapshots.from_model(model, parse_steps(steps or default))
    repository, at, revisions = spec.partition("@")
    if at and "{step}" in revisions:
        return Snapshots.from_model(families.pattern_model(repository, revisions), parse_steps(steps or "all"))
    if at and revisions:
        if steps is not None:
            raise UserError(f"--steps {steps} beside {spec!r}, which names revisions already; leave one of them out")
        return Snapshots.from_hub(repository, revisions.split(","))
    raise UserError(
        f"--snapshots {spec!r} is no folder and no known model; give a folder, pythia-160m, "
        "org/model@revision,revision, a release, or demo"
    )


def _among(found: Snapshots, steps: str | None) -> Snapshots:
    """Those of these steps or labels, in the order of training."""
    if steps is None or steps == "all":
        return found
    from crosslens.snapshots.families import read_spaced, spaced

    even = read_spaced(steps)
    if even and None not in found.steps:
        wanted: set[int | str] = {*spaced([step for step in found.steps if step is not None], *even)}
    else:
        parsed = parse_steps(steps)
        wanted = {parsed} if isinstance(parsed, str) else {*parsed}
    if unknown := wanted - {*found.labels, *found.steps}:
        raise UserError(
            f"--steps {steps!r}: {found.name} has no snapshot {sorted(map(str, unknown))[0]}; it has "
            f"{', '.join(found.labels)}"
        )
    return found[[i for i, names in enumerate(zip(found.labels, found.steps, strict=True)) if wanted & {*names}]]


def parse_steps(text: str) -> str | list[int | str]:
    """Steps (`0,512,143000`), revisions (`step1000-tokens2B,main`), or the name of a set (`paper`, `log:12`)."""
    parts: list[int | str] = [int(p.replace("_", "")) if _is_number(p) else p for p in text.split(",")]
    return parts if len(parts) > 1 or isinstance(parts[0], int) else text


def _is_number(text: str) -> bool:
    return text.replace("_", "").isdecimal()


def parse_task(spec: str) -> Task:
    """A task from what a user types: KIND:WHAT, as in the error below, or a file."""
    from crosslens.tasks.task import Task

    kind, _, rest = spec.partition(":")
    if kind == "demo":
        return Task.demo(rest)
    if kind == "sva":
        return Task.sva(rest)
    if kind == "blimp":
        return Task.blimp(rest)
    if kind == "clams":
        return Task.clams(rest)
    if kind == "multiblimp":
        language, _, phenomenon = rest.partition(":")
        return Task.multiblimp(language, phenomenon or None)
    if kind == "ioi":
        return Task.ioi(rest or None)
    if not Path(spec).is_file():
        raise UserError(
            f"--task {spec!r} is no file and no task; give demo:simple, sva:FILE, blimp:UID, clams:FILE, "
            "multiblimp:LANGUAGE, ioi, or a file"
        )
    return Task.local(spec)


def parse_numbers(text: str, option: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        return [int(part.replace("_", "")) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text!r} must be whole numbers separated by commas, such as 0,512,143000") from None


def open_run(path: Path, device: str) -> tuple[RunDir, Crosscoder, Activations]:
    """The run in a directory: its crosscoder, and the activations it was trained on."""
    from crosslens.activations.loader import Activations
    from crosslens.crosscoders import load
    from crosslens.rundir import RunDir
    from crosslens.snapshots.settings import ModelSettings

    run = RunDir.open(path)
    source = run.read_json().get("source")
    if source is None:
        raise UserError(f"{path} does not record where its activations came from; use the functions from Python")
    settings = ModelSettings(**source["settings"], device=device)
    return run, load(run.crosscoder, device=device), Activations.from_dict(source, settings)


def open_activations(
    snapshots: str,
    steps: str | None,
    hook: str,
    dataset: str,
    *data: Any,
    seed: int = 0,
    device: str,
    backend: str,
    **reading: Any,
) -> Activations:
    """The `Activations` that options of several verbs describe; `snapshots` and `steps` as in `parse_snapshots`."""
    from crosslens.activations.loader import Activations
    from crosslens.activations.tokens import Dataset
    from crosslens.snapshots.settings import ModelSettings

    found = parse_snapshots(snapshots, steps)
    settings = ModelSettings(device, backend=backend)
    return Activations(found, hook, Dataset(dataset, *data, **reading), seed=seed, settings=settings)


def parse_architecture(name: str, d_sae: int, k: int) -> CrosscoderTrainingConfig:
    """The training config of an architecture by its short name.

    Raises:
        UserError: no such name.
    """
    from crosslens import crosscoders

    if name not in ARCHITECTURES:
        raise UserError(
            f"--architecture {name!r} is unknown; use one of {', '.join(ARCHITECTURES)}"
            f"{did_you_mean(name, ARCHITECTURES)}"
        )
    options: dict[str, Any] = {"k": k} if name in ("topk", "batchtopk") else {}
    return crosscoders.TRAINING_ARCHITECTURES[f"{name}_crosscoder"][1](d_sae=d_sae, **options)
