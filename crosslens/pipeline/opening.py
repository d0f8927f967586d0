"""What the words of a user stand for: snapshots, activations, tasks, and runs that are there already.

`find_snapshots` checks a spelling with small files and tables alone, and returns the function that makes the
snapshots. It imports neither torch nor pandas, transformers or SAELens, which take seconds, so that a mistake is
reported at once; the other functions make the objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeAlias

from crosslens.config import ModelOptions, SourceOptions, read_mix
from crosslens.distributed.devices import check_device, check_launcher, is_first, own_device
from crosslens.errors import UserError, did_you_mean, json_checksum, read_json
from crosslens.rundir import RunDir
from crosslens.snapshots import families

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from crosslens.activations import Activations
    from crosslens.crosscoders import Crosscoder
    from crosslens.snapshots import ModelSettings, Snapshots
    from crosslens.tasks import Task

    LoadSnapshots: TypeAlias = Callable[[], Snapshots]


_FEW = 32
"""Snapshots of a model that are all taken by default."""


def find_activations(source: SourceOptions, models: ModelOptions) -> Callable[[], Activations]:
    """Check which activations are asked for, and return the function that opens them.

    Args:
        source: snapshots, hook points and text.
        models: how language models run.

    Raises:
        UserError: no such device, hook point, snapshot or step.
    """
    from crosslens.snapshots.hooks import check_hooks, hook_layer

    check_device(models.device)
    for hook in source.hook:
        hook_layer(hook)
    check_hooks(source.hook, models.backend)
    load = find_snapshots(source.snapshots, source.steps, source.hook)

    def open_activations() -> Activations:
        from crosslens.activations import Activations, Dataset

        names = ("column", "sample_by", "drop_positions", "keep_roles", "drop_roles")
        more: dict[str, Any] = {name: getattr(source, name) for name in names}
        mix = read_mix(source.dataset) if isinstance(source.dataset, str) else None
        data = Dataset(
            mix or source.dataset, source.n_tokens, source.context_size, split=source.split or "train", **more
        )
        snapshots = load().trusting_code(source.trust_remote_code)
        return Activations(snapshots, source.hook, data, seed=source.seed, settings=parse_settings(**vars(models)))

    return open_activations


def find_snapshots(spec: str | Snapshots, steps: str | None, hooks: Sequence[str] = ()) -> LoadSnapshots:
    """Check a --snapshots and a --steps option, and return the function that makes the `Snapshots`.

    Args:
        spec: a folder; a model in the table of families, such as `pythia-160m`; `org/model@revision,revision`;
            a series of places, with {step} in it; `label=place,label=place`, where a place is as in `Snapshots.of`; a
            release such as crosslens-demo; or demo. Or snapshots that are made already.
        steps: steps, labels or revisions, or the name of a set; None for all snapshots of a folder or release.
        hooks: hook points that a model in a local folder must have.

    Raises:
        UserError: `spec` is none of these, or a step or the hook point does not exist.
    """
    from crosslens.sharing.registry import list_releases

    if not isinstance(spec, str):
        return lambda: spec
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
    if "{step" in spec:
        return _of_model(families.pattern_model(spec), steps or "all")
    repository, at, revisions = spec.partition("@")
    if model := families.match_model(spec):
        default = "paper" if "paper" in model.sets else "all" if 0 < len(model.steps or ()) <= _FEW else "log:8"
        return _of_model(model, steps or default)
    if at and revisions:
        from crosslens.sharing.repositories import check_repository

        check_repository(repository)
        if steps is not None:
            raise UserError(f"--steps {steps} contradicts {spec!r}, which names its revisions: leave one of them out")
        return lambda: _snapshots().from_hub(repository, revisions.split(","))
    raise UserError(
        f"--snapshots {spec!r} is neither a folder nor a known model: give a folder, pythia-160m, "
        f"org/model@revision,revision, label=place,label=place, a release, or demo{did_you_mean(spec, list_releases())}"
    )


def _of_model(model: families.Model, steps: str) -> LoadSnapshots:
    from crosslens.snapshots.folders import list_model

    wanted = parse_steps(steps)
    model.revisions(wanted, lambda: list_model(model))
    return lambda: _snapshots().from_model(model, wanted)


def _local(folder: Path, steps: str | None, hooks: Sequence[str]) -> LoadSnapshots:
    from crosslens.snapshots.folders import read_rows

    root = folder.expanduser().resolve()
    name, rows = read_rows(root)
    chosen = _choose(name, [row["label"] for row in rows], [row["step"] for row in rows], steps)
    _check_hooks_in(root / rows[0]["path"], hooks)
    return lambda: _snapshots().local(root)[chosen]


def _models(spec: str, steps: str | None, hooks: Sequence[str]) -> LoadSnapshots:
    from crosslens.snapshots.folders import check_places, steps_of

    pairs = [(label, place) for label, _, place in (part.partition("=") for part in spec.split(","))]
    if not all(label and place for label, place in pairs):
        raise UserError(f"--snapshots {spec!r} mixes forms: give label=place,label=place, such as base=a,chat=b")
    labels = [label for label, _ in pairs]
    if len(set(labels)) < len(labels):
        raise UserError(f"--snapshots {spec!r} has a label twice: give each model its own")
    for place in check_places(dict[str, str | Path](pairs)).values():
        if place.revision is None:
            _check_hooks_in(Path(place.name), hooks)
    chosen = _choose(spec, labels, steps_of(labels), steps)
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


def list_labels(path: Path) -> list[str]:
    """Labels of the snapshots of a trained run."""
    return [row["label"] for row in RunDir(path).read_json()["source"]["snapshots"]["snapshots"]]


def parse_snapshots(spec: str, steps: str | None) -> Snapshots:
    """Make the snapshots that `find_snapshots` has found."""
    return find_snapshots(spec, steps)()


def parse_steps(text: str) -> str | list[int | str]:
    """Steps (`0,512,143000`), revisions (`step1000-tokens2B,main`), or the name of a set (`paper`, `log:12`)."""
    parts: list[int | str] = [int(p.replace("_", "")) if _is_number(p) else p for p in text.split(",")]
    return parts if len(parts) > 1 or isinstance(parts[0], int) else text


def _is_number(text: str) -> bool:
    return text.replace("_", "").isdecimal()


def parse_tasks(specs: Sequence[str | Task]) -> list[Task]:
    """Make the tasks that `check_tasks` has accepted, unless they are made already; two of one name are refused,
    because names are file names."""
    from crosslens.tasks import Task

    tasks = [Task.parse(spec) if isinstance(spec, str) else spec for spec in specs]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--task names {name!r} twice: give each task once")
    return tasks


def items_digest(task: Task) -> str:
    """The XXH3 of a task's items, which a table records."""
    return json_checksum([[item.prefix, item.correct, item.wrong, item.patch_prefix] for item in task.items])


def parse_settings(device: str | None, **others: Any) -> ModelSettings:
    """How models run; device None is CUDA if available."""
    from crosslens.snapshots import ModelSettings

    return ModelSettings(**others) if device is None else ModelSettings(device, **others)


def open_run(path: Path, device: str | None) -> tuple[RunDir, Crosscoder, Activations]:
    """Open a trained run to read it: its crosscoder, and the activations it was trained on."""
    run = RunDir.open(path)
    return (run, *read_run(run, device))


@contextmanager
def working(run: RunDir) -> Generator[None, None, None]:
    """Keep other commands from writing in a run. Of the processes that torchrun started, only the first writes."""
    check_launcher()
    run.writes = is_first()
    with run.writing():
        yield


def read_run(
    run: RunDir, device: str | None, *, reads_text: bool = True, allow_changed_data: bool = False
) -> tuple[Crosscoder, Activations]:
    """The crosscoder of a trained run, and the activations it was trained on.

    Args:
        run: with a trained crosscoder.
        device: of models and crosscoder; None is CUDA if available.
        reads_text: whether the activations will be read; what only runs prompts does without the tokens of the dataset.
        allow_changed_data: go on with another dataset or tokenizer; `RunDir.made_with` says so of tables saved later.

    Raises:
        UserError: the dataset or the tokenizer is not that of the training.
    """
    from crosslens.activations import Activations
    from crosslens.crosscoders import load

    source = run.read_json()["source"]
    settings = parse_settings(device, **source["settings"])
    crosscoder = load(run.crosscoder, device=own_device(settings.device))
    acts = Activations.from_dict(source, settings)
    changed = changed_data(run, acts, reads_text=reads_text)
    if changed and not allow_changed_data:
        raise UserError(
            f"the {' and the '.join(changed)} changed since the crosscoder in {run.path} was trained: restore what "
            "there was, or go on with --allow-changed-data (in Python allow_changed_data=True), which the tables record"
        )
    run.note(changed_data=changed, activations=acts.cache_dtype or "live")
    return crosscoder, acts


def more_snapshots(run: RunDir, snapshots: Snapshots, steps: str) -> Snapshots:
    """Snapshots of a run and others from the place that they came from, in the order of training.

    Args:
        run: made by the command line, which records the place.
        snapshots: those of the run.
        steps: of the others, as in a --steps option; such as all.

    Raises:
        UserError: the run was made in Python, its place has no such steps, or its snapshots are not from there.
    """
    spec = run.read_json().get("options", {}).get("snapshots")
    if spec is None:
        raise UserError(
            f"dynamics_steps={steps!r}: {run.path} was made in Python and does not record the place of its snapshots: "
            "call crosslens.pipeline.evolve with snapshots="
        )
    every = find_snapshots(spec, "all")()
    try:
        wanted = {*find_snapshots(spec, steps)().labels, *snapshots.labels}
    except UserError as error:
        raise UserError(str(error).replace("--steps", "--dynamics-steps")) from None
    if missing := {*snapshots.labels} - {*every.labels}:
        raise UserError(
            f"dynamics_steps={steps!r}: {spec} no longer has the snapshot {sorted(missing)[0]} of the run: restore it, "
            "or leave dynamics_steps out"
        )
    trusted = snapshots[0].trust_remote_code
    return every[[i for i, label in enumerate(every.labels) if label in wanted]].trusting_code(trusted)


def changed_data(run: RunDir, acts: Activations, *, reads_text: bool) -> list[str]:
    """What changed since a run was trained: "dataset", "tokenizer". What the run did not record is not compared.

    Args:
        run: the run.
        acts: its activations, opened again.
        reads_text: compare the tokens, which are read for it; otherwise the digest of the file, if it is there.
    """
    from crosslens.activations.identity import data_digest
    from crosslens.snapshots.hashes import changed_tokenizer

    recorded = run.read_json()
    trained, source = recorded.get("identity", {}), recorded["source"]
    tokenizer = changed_tokenizer(trained.get("tokenizer"), acts.snapshots.tokenizer_digest)
    before, place = source.get("data"), source["dataset"]["source"]
    files = [Path(name) for name in (place if isinstance(place, dict) else [place])]
    dataset = before is not None and all(map(Path.is_file, files)) and data_digest(place) != before
    if reads_text and not tokenizer or dataset:  # a file may have changed where it was not read
        dataset = trained.get("tokens_sha256") not in (None, acts.tokens_sha256)
    return ["dataset"] * dataset + ["tokenizer"] * tokenizer


def evolved_table(run: RunDir, name: str) -> pd.DataFrame | None:
    """A table of `evolve` that other commands read; None before `evolve`. Tables that are saved later record what it
    was made with.

    Raises:
        UserError: `evolve` has left others, but not this one: results would be silently without it.
    """
    table = run.table(name)
    if table is None and (run.path / "evolution.parquet").is_file():
        raise UserError(
            f"{run.path} has lost the table {name!r}, which its other tables of `crosslens evolve` belong to: repeat "
            f"`crosslens evolve {run.path}`"
        )
    run.note(evolved=run.made_with(name) or None)
    return table


def encoder_shares(run: RunDir, d_sae: int, labels: Sequence[str]) -> Tensor | None:
    """Encoder shares (F, S) that `evolve` has saved, if they are of these features and snapshots.

    Raises:
        UserError: as `evolved_table`.
    """
    table = evolved_table(run, "encoder")
    columns = [f"share/{label}" for label in labels]
    if table is None or len(table) != d_sae or not set(columns) <= set(table):
        return None
    import torch

    return torch.as_tensor(table.sort_values("feature")[columns].to_numpy(dtype=float).copy())


def open_consensus(path: Path) -> list[int]:
    """Features of a run that most of its seeds have."""
    found = RunDir.open(path).consensus()
    return [int(feature) for feature in found.loc[found["consensus"], "feature"]]
