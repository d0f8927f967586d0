"""What a user sets: one dataclass per component, a sentence under each field, limits in the annotations.

The command line, its `--help`, files of options, `run.json`, the functions of `crosslens.pipeline` and the tables of
options in the docs are all read from these classes by cyclopts. Nothing here imports torch, so that a wrong option is
refused at once.

1. `Parameter(validator=...)` in an annotation refuses values, on the command line and, by `check`, in Python.
2. A value is that of the command line, else of the file of `--config`, else of the recipe (`RECIPES`), else the
   default.
3. `COMMON` marks the options that most runs need: `--help` lists them, `--help-all` the others, too.
4. Every option decides the result unless it is marked `FREE`; `ORDER` marks those that decide the order of live data
   only. `decisive` gives those that count, which a run records, and compares when it is continued.
5. The file of an architecture declares which options it has (`ARCHITECTURES`); nothing here names one but recipes.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter

from crosslens.errors import UserError, did_you_mean


def _declared(keyword: str) -> dict[str, Any]:
    """What the file of every architecture says by a keyword of its declaration `ARCHITECTURE`; by name.

    Files are parsed and not imported, because they import torch. The name of a file is that of its architecture.
    """
    files = sorted((Path(__file__).parent / "crosscoders" / "architectures").glob("[!_]*.py"))
    return {
        path.stem: ast.literal_eval(each.value)
        for path in files
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Architecture"
        for each in node.keywords
        if each.arg == keyword
    }


ARCHITECTURES: dict[str, tuple[str, ...]] = _declared("options")
"""All architectures, and the options of `CrosscoderOptions` that each has and others do not."""
DEFAULT_ARCHITECTURE: str = next(iter(_declared("default")))

if TYPE_CHECKING:
    Architecture: TypeAlias = str
    WithK: TypeAlias = str
else:
    Architecture = Literal[tuple(ARCHITECTURES)]
    WithK = Literal[tuple(name for name, options in ARCHITECTURES.items() if "k" in options)]
Attention: TypeAlias = Literal["eager", "sdpa"]
Backend: TypeAlias = Literal["bridge", "hooked_transformer"]
Baseline: TypeAlias = Literal["zero", "mean", "patch"]
CacheDtype: TypeAlias = Literal["bfloat16", "float32", "int8"]
Client: TypeAlias = Literal["openai", "anthropic"]
Format: TypeAlias = Literal["sae", "json", "neuronpedia"]
Method: TypeAlias = Literal["removal", "both_ends", "ig", "gradient", "exact"]
ModelDtype: TypeAlias = Literal["float32", "bfloat16", "float16"]
Moments: TypeAlias = Literal["float32", "bfloat16"]
Precision: TypeAlias = Literal["float32", "tf32", "bfloat16"]
Recipe: TypeAlias = Literal["evolution_of_concepts", "crosscoding_through_time"]
Rule: TypeAlias = Literal["gauss_legendre", "midpoint", "left"]
SampleBy: TypeAlias = Literal["line", "paragraph"]
Scale: TypeAlias = Literal["std", "norm"]

MAX_SEED = 2**32 - 1
"""The largest seed that every random generator in use accepts."""
MAX_FEATURES = 2**24
DEFAULT_K = 64
"""That of the architecture's config, which is in a module that imports torch; a test compares them."""
TEXT_FILES = (".txt", ".text", ".jsonl", ".json", ".csv", ".tsv", ".parquet")

RECIPES: dict[str, dict[str, Any]] = {
    "evolution_of_concepts": {
        "architecture": "jumprelu",
        "training_tokens": 800_000_000,
        "batch_size": 2048,
        "lr": 5e-5,
        "lr_warm_up": 0.1,
        "lr_decay": 0.2,
        "lr_end_factor": 1 / 32,
        "max_grad_norm": None,
    },
    "crosscoding_through_time": {
        "architecture": "standard",
        "training_tokens": 400_000_000,
        "batch_size": 4096,
        "lr": 5e-5,
        "lr_decay": 0.2,
        "max_grad_norm": 1.0,
    },
}
"""Options that a recipe sets where nobody else does; `crosslens.training.recipes` makes its architecture's config."""


# ---------------------------------------------------------------------- numbers and limits
def limited(words: str, holds: Callable[[Any], bool]) -> Callable[[Any, Any], None]:
    """A validator that refuses values, or tuples with values, for which `holds` is false; None is no value."""

    def validate(_: Any, value: Any) -> None:
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and not holds(one):
                raise UserError(f"must be {words}")

    return validate


def _whole(_: Any, tokens: Sequence[Any]) -> int:
    """A whole number, which may be written as 2e7 or 20_000_000."""
    text = tokens[-1].value
    try:
        number = float(text)
        exact = int(text) if "e" not in text.lower() and "." not in text else int(number)
    except (ValueError, OverflowError):
        number, exact = math.nan, 0
    if number != exact:
        raise UserError("must be a whole number")
    return exact


def _wholes(_: Any, tokens: Sequence[Any]) -> tuple[int, ...]:
    """Whole numbers, separated by commas or given one by one."""
    parts = [part for token in tokens for part in token.value.split(",")]
    if not all(part.replace("_", "").isdecimal() for part in parts):
        raise UserError("must be whole numbers separated by commas, such as 1,5,15")
    return tuple(int(part) for part in parts)


def _prices(_: Any, tokens: Sequence[Any]) -> tuple[float, ...]:
    try:
        return tuple(float(part) for token in tokens for part in token.value.split(","))
    except ValueError:
        raise UserError(_TWO_PRICES) from None


_TWO_PRICES = "must be two numbers, the prices of a million tokens in and out, such as 3,15"


def _check_prices(_: Any, value: Any) -> None:
    if value is not None and (len(value) != 2 or not all(0 <= price < math.inf for price in value)):
        raise UserError(_TWO_PRICES)


def _texts(_: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    return tuple(token.value for token in tokens)


def _listed(_: Any, tokens: Sequence[Any]) -> tuple[str, ...]:
    """Words separated by commas or given one by one."""
    return tuple(part.strip() for token in tokens for part in token.value.split(",") if part.strip())


def counted(text: str) -> tuple[str, int]:
    """Label and number of an option such as step512=64.

    Raises:
        UserError: it has another form.
    """
    label, _, number = text.rpartition("=")
    if not label or not number.isdecimal() or not 0 < int(number) <= MAX_FEATURES:
        raise UserError("must be label=number, such as step512=64 or step0+step1=32")
    return label, int(number)


def _check_counted(_: Any, value: Any) -> None:
    labels = [counted(each)[0] for each in value or ()]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"names {twice[0]} twice: give one number")


def _words(_: Any, tokens: Sequence[Any]) -> str:
    """A list of a TOML file as it would be typed."""
    return ",".join(token.value.removesuffix(".0") for token in tokens)


LARGEST = 2**53
"""The largest number of anything: what a float holds exactly, as JSON and tables have it."""


def at_least(low: int, high: int | None = None) -> Parameter:
    """A whole number from `low`, to `high` if that is given."""
    words = f"at least {low}" if high is None else f"between {low} and {high:,}"
    limit = limited(words, lambda value: low <= value and (high is None or value <= high))
    return Parameter(
        converter=_whole, validator=(limit, limited(f"at most {LARGEST:,}", lambda value: value <= LARGEST))
    )


def all_at_least(low: int, high: int | None = None) -> Parameter:
    """Whole numbers from `low`."""
    return Parameter(converter=_wholes, validator=at_least(low, high).validator, n_tokens=1)


def read_mix(text: str) -> dict[str, float] | None:
    """Datasets and weights as in `a.jsonl=0.7,user/name=0.3`; None if it is one dataset."""
    parts = [part.rpartition("=") for part in text.split(",")]
    if Path(text).is_file() or not all(name and _NUMBER.fullmatch(weight) for name, _, weight in parts):
        return None
    return {name: float(weight) for name, _, weight in parts}


_NUMBER = re.compile(r"\d*\.?\d+(e-?\d+)?")


def check_weights(weights: Mapping[Any, Any]) -> None:
    """Refuse a mix of fewer than two datasets, and weights that are not above 0 or do not sum to 1.

    Raises:
        UserError: names the dataset or the sum.
    """
    shown = ",".join(f"{name}={weight}" for name, weight in weights.items())
    if len(weights) < 2:
        raise UserError(f"the mix {shown or '{}'} has fewer than two datasets: give the one as it is")
    for name, weight in weights.items():
        if not isinstance(name, (str, Path)) or type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise UserError(
                f"the mix gives {name!r} the weight {weight!r}: give hub names or paths, with numbers above 0 that sum "
                "to 1"
            )
    total = math.fsum(weights.values())
    if abs(total - 1) > 1e-6:
        shares = ",".join(f"{name}={weight / total:.4g}" for name, weight in weights.items())
        raise UserError(f"the weights of the mix {shown} sum to {total:g}, not 1: give {shares}")


def _check_dataset(_: Any, value: Any) -> None:
    """Refuse a file that does not exist or has an unsupported type; other names are datasets on the hub."""
    if not isinstance(value, str):
        return
    if mix := read_mix(value):
        check_weights(mix)
    for name in mix or (value,):
        try:
            _check_place(Path(name), name)
        except UserError as error:
            raise UserError(f"{error}" if mix is None else f"has {name}, which {error}") from error


def _check_place(path: Path, name: str) -> None:
    known = ", ".join(TEXT_FILES)
    if path.is_file():
        if not {*path.suffixes} & {*TEXT_FILES}:
            raise UserError(f"has an unsupported file type: use {known}, each also with .gz")
        if not os.access(path, os.R_OK):
            raise UserError("cannot be read: no permission")
    elif path.exists():
        raise UserError(f"is not a regular file: give a file ({known}) or a hub name")
    elif path.suffix in {*TEXT_FILES, ".gz"} or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError("does not exist: give an existing file, or a hub name such as user/name")


COMMON = "in --help"
FREE = "decides no result"
"""Marks options with which a run may be continued whatever they were before."""
ORDER = "decides the order of live data"
"""Marks options that decide nothing once activations are on disk."""
COUNT, NUMBER, SEED = at_least(1), at_least(0), at_least(0, MAX_SEED)
COUNTS, NUMBERS = all_at_least(1), all_at_least(0)
FEATURES = at_least(1, MAX_FEATURES)
POSITIVE = Parameter(validator=limited("a finite number above 0", lambda value: 0 < value < math.inf))
COEFFICIENT = Parameter(validator=limited("a finite number, 0 or above", lambda value: 0 <= value < math.inf))
FRACTION = Parameter(validator=limited("a fraction of the steps, between 0 and 1", lambda value: 0 <= value <= 1))
DEDICATED = Parameter(converter=_listed, validator=_check_counted, n_tokens=1)
PRICES = Parameter(converter=_prices, validator=_check_prices, n_tokens=1)
# 1 is refused, because it could mean one step or all of them
DURATION = Parameter(
    validator=limited(
        "a fraction of the steps below 1, or a number of steps from 2",
        lambda value: 0 <= value < 1 or (value > 1 and float(value).is_integer()),
    )
)
_DATA, _CROSSCODER, _TRAINING, _MODELS, _RUN = (
    Parameter(name="*", group=Group(name, sort_key=place), negative=())
    for place, name in enumerate(("Data", "Crosscoder", "Training", "Models and processes", "Analysis"), 1)
)


def check(options: Any) -> None:
    """Refuse values of an object that are not among the choices or within the limits of their annotations.

    Raises:
        UserError: the first of them.
    """
    for name, (choices, validators) in _limits(type(options)).items():
        value = getattr(options, name)
        if choices and value is not None and value not in choices:
            raise UserError(
                f"{name}={value!r} is unknown: use one of {', '.join(choices)}{did_you_mean(value, choices)}"
            )
        for validate in validators:
            try:
                validate(None, value)
            except UserError as error:
                raise UserError(f"{name}={value} {error}") from error


def decisive(options: Any, *, live: bool = True) -> dict[str, Any]:
    """The options of an object that decide the result, by name: all but those marked `FREE`.

    Args:
        options: of one of the classes here, or of a class derived from one.
        live: models run in training; otherwise those marked `ORDER` are left out, too.
    """
    hints = get_type_hints(type(options), include_extras=True)
    left_out = {FREE} if live else {FREE, ORDER}
    marks = {each.name: {mark for mark in getattr(hints[each.name], "__metadata__", ()) if isinstance(mark, str)}
             for each in fields(options)}  # fmt: skip
    return {name: getattr(options, name) for name, found in marks.items() if not found & left_out}


@cache
def _limits(cls: type) -> dict[str, tuple[tuple[str, ...], list[Callable[[Any, Any], None]]]]:
    """The choices and validators of every field."""
    hints = get_type_hints(cls, include_extras=True)
    found: dict[str, tuple[tuple[str, ...], list[Callable[[Any, Any], None]]]] = {}
    for name in (each.name for each in fields(cls)):
        hint, metadata = hints[name], getattr(hints[name], "__metadata__", ())
        kinds = [hint, *get_args(hint), *get_args(getattr(hint, "__origin__", None))]
        choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
        parts: list[Any] = [part for part in metadata if isinstance(part, Parameter)]
        found[name] = choices, [validate for part in parts for validate in part.validator]
    return found


# ---------------------------------------------------------------------- what is read
@_DATA
@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Which activations: of which snapshots, at which hook points, on which text."""

    snapshots: Annotated[Any, COMMON]
    """A folder of snapshots; a model such as pythia-160m, olmo2-1b, amber-7b or stanford-gpt2-small-21 (choose with
    --steps; crosslens ls lists them); a hub repository with revisions such as org/model@step0,step1000; a series with
    {step} in it, such as org/model@step{step}, org/model/checkpoints/step{step}, org/model-step-{step} or
    model+runs/lora/checkpoint-{step}; any models of one width, as base=place,chat=place, where a place is a folder,
    org/model[/folder][@revision], or model+adapter with a LoRA adapter in such a place; a release such as
    crosslens-demo; or demo."""
    steps: Annotated[str | None, Parameter(converter=_words, n_tokens=-1), COMMON] = None
    """Training steps such as 0,512,143000, revisions, or a named set: all, paper, triplet, log:12, linear:12. Default:
    paper for Pythia, otherwise all or log:8."""
    hook: Annotated[tuple[str, ...], COMMON]
    """Hook point, such as blocks.6.hook_resid_post. plan and harvest take several from one pass: repeat it."""
    dataset: Annotated[Any, Parameter(validator=_check_dataset), COMMON]
    """A dataset on the hub, or a text, jsonl, csv or parquet file; or a mix, as a.jsonl=0.7,user/name=0.3, of which
    every document is drawn by weight."""
    n_tokens: Annotated[int | None, COUNT, COMMON] = None
    """Tokens per epoch of training. Default: the whole dataset."""
    context_size: Annotated[int | None, at_least(2)] = None
    """Tokens per sequence. Default: the models' context, at most 1024."""
    drop_positions: Annotated[int, NUMBER] = 0
    """Leave out this many tokens at the start of every sequence and document. 1 for models trained without BOS: the
    norm of the first token is then many times that of others (the FAQ shows how to see it)."""
    column: str = "text"
    """Column of the dataset that holds the text, conversations, or token ids. A dataset without text is read from
    messages or conversations, which go through the tokenizer's chat template."""
    keep_roles: Annotated[tuple[str, ...] | None, Parameter(converter=_listed, n_tokens=1)] = None
    """Of conversations, keep only what these roles say, such as assistant, or user,assistant."""
    drop_roles: Annotated[tuple[str, ...] | None, Parameter(converter=_listed, n_tokens=1)] = None
    """Of conversations, leave out what these roles say, such as system."""
    sample_by: SampleBy = "line"
    """What is a document in a text file."""
    split: str | None = None
    """Split of a dataset on the hub. Default: train."""
    seed: Annotated[int, SEED] = 0
    """Seed of all random numbers."""
    trust_remote_code: bool = False
    """Run the Python code that a model or tokenizer brings with it, which can do whatever you can. Such models are
    refused otherwise."""

    def __post_init__(self) -> None:
        check(self)
        if self.split is not None and isinstance(self.dataset, str) and Path(self.dataset).is_file():
            raise UserError(
                f"split={self.split!r} is for datasets on the hub, and {self.dataset} is a file: leave it out"
            )


@_DATA
@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Activations on disk."""

    cache: Annotated[Path | None, FREE] = None
    """Write the activations to this folder first, or read them from it; created if missing."""
    cache_dtype: CacheDtype = "bfloat16"
    """Format on disk."""

    def __post_init__(self) -> None:
        check(self)


@_DATA
@dataclass(frozen=True, kw_only=True)
class HarvestOptions(CacheOptions):
    """How activations are written (`crosslens harvest`)."""

    cache: Annotated[Path, FREE] = field()
    """Folder for the activations; created if missing."""
    evict: Annotated[bool, COMMON] = False
    """Delete the weights that this command downloads, those of each snapshot as soon as it is done."""
    verify: Annotated[bool, COMMON] = False
    """Compare the checksums of activations on disk."""


def _check_device(_: Any, value: str | None) -> None:
    if value is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", str(value)):
        raise UserError("is unknown: use cpu, cuda, or cuda:1 for the second GPU")


@_MODELS
@dataclass(frozen=True)
class ModelOptions:
    """How language models are loaded and run."""

    device: Annotated[str | None, Parameter(validator=_check_device), FREE] = None
    """cpu, cuda or cuda:N. Default: cuda if available."""
    dtype: Annotated[ModelDtype, Parameter(name="--model-dtype")] = "float32"
    """Of the models' parameters. Activations are always float32; the error that another dtype causes is printed."""
    backend: Backend = "bridge"
    """TransformerLens class: a TransformerBridge, or a HookedTransformer without weight processing."""
    batch_tokens: Annotated[int, COUNT, ORDER] = 16_384
    """Tokens per forward pass; in harvests fewer where scores of eager attention would take more than 1 GiB, and on a
    CPU at most 4,096."""
    attention: Attention = "eager"
    """eager computes all scores (B, heads, T, T), which TransformerLens's hooks inside attention show; sdpa is torch's
    fused attention: faster, in less memory, without those hooks, with a small error, which is printed. Some families
    have the first only."""

    def __post_init__(self) -> None:
        check(self)
        if self.attention != "eager" and self.backend == "hooked_transformer":
            raise UserError(
                f"attention={self.attention!r} needs backend='bridge': a HookedTransformer computes its own attention"
            )


# ---------------------------------------------------------------------- what is trained
FIELDS = {
    "k": "k",
    "k_start": "k_start",
    "k_anneal": "k_anneal_steps",
    "aux": "aux_loss_coefficient",
    "topk_threshold_lr": "topk_threshold_lr",
    "sparsity": "sparsity_coefficient",
    "sparsity_warm_up": "sparsity_warm_up_steps",
    "target_l0": "target_l0",
    "l0": "l0_coefficient",
    "pre_act": "pre_act_loss_coefficient",
    "direct_thresholds": "direct_thresholds",
    "l1": "l1_coefficient",
    "l1_warm_up": "l1_warm_up_steps",
}
"""Options that some architectures have, and the fields of their configs. Those that count steps are given as a fraction
of them below 1, and as a number from 2."""


def architectures_with(option: str) -> tuple[str, ...]:
    """The architectures that have an option of `FIELDS`."""
    return tuple(name for name, options in ARCHITECTURES.items() if option in options)


_HAS = (f"{name} has --{', --'.join(options).replace('_', '-')}" for name, options in ARCHITECTURES.items())
_WHICH = Parameter(
    help=f"What keeps the number of active features small. Default: {DEFAULT_ARCHITECTURE}. {'; '.join(_HAS)}."
)


@_CROSSCODER
@dataclass(frozen=True, kw_only=True)
class CrosscoderOptions:
    """What is trained. None is the value of the recipe, otherwise that of the architecture's config."""

    d_sae: Annotated[int | None, FEATURES, COMMON] = None
    """Number of features. train needs it or --recipe; in plan it adds the memory of training."""
    k: Annotated[int | None, COUNT, COMMON] = None
    """Active features per token. Default: 64."""
    architecture: Annotated[Architecture | None, _WHICH] = None
    recipe: Annotated[Recipe | None, COMMON] = None
    """All training settings of a paper. Other options override it; for a small run give at least --d-sae and
    --training-tokens. (In Python `crosslens.training.recipes`.)"""
    init_from: Path | None = None
    """Start from the weights of this crosscoder, in a folder or run directory: of the same snapshots or fewer, with as
    many features or fewer."""
    scale: Scale | None = None
    """Bring snapshots to the same variance (std) or the same mean norm (norm). Default: std."""
    k_start: Annotated[float | None, POSITIVE] = None
    """k at the first step, to fall to --k over --k-anneal, so that more features learn early."""
    k_anneal: Annotated[float | None, DURATION] = None
    """Annealing of k. Below 1: a fraction of the steps; from 2: a number of steps."""
    aux: Annotated[float | None, COEFFICIENT] = None
    """Coefficient of the auxiliary loss that revives dead features, as a share of the data's
    variance. Default: 1/32 = 0.03125."""
    topk_threshold_lr: Annotated[float | None, POSITIVE] = None
    """Weight of the newest batch in the moving average of the threshold. Default: 0.01."""
    sparsity: Annotated[float | None, COEFFICIENT] = None
    """Coefficient of the penalty on the frequencies of features. Default: 0.3."""
    sparsity_warm_up: Annotated[float | None, DURATION] = None
    """Warmup of --sparsity from 0. Below 1: a fraction of the steps; from 2: a number of steps. Default: none."""
    target_l0: Annotated[float | None, POSITIVE] = None
    """Steer --sparsity until this many features are active per token, as a mean over snapshots. Default: off."""
    l0: Annotated[float | None, POSITIVE] = None
    """Aim at --target-l0 by a loss with this coefficient, (L0 / target - 1)^2, that moves the thresholds, and leave
    --sparsity as it is (0 for this loss alone). Default: off."""
    pre_act: Annotated[float | None, POSITIVE] = None
    """Coefficient of the loss that brings dead features back, by how far they are below their thresholds. Default:
    off."""
    direct_thresholds: Annotated[bool | None, Parameter(negative="")] = None
    """Train thresholds themselves, not their logarithms, which move little under Adam."""
    l1: Annotated[float | None, COEFFICIENT] = None
    """Coefficient of the L1 penalty. Default: 2."""
    l1_warm_up: Annotated[float | None, DURATION] = None
    """Warmup of --l1 from 0. Below 1: a fraction of the steps; from 2: a number of steps. Default: none."""
    n_shared: Annotated[int | None, COUNT] = None
    """Features with one decoder row for all snapshots. Default: none."""
    shared_penalty: Annotated[float | None, POSITIVE] = None
    """What sparsity costs a shared feature, relative to others: below 1, shared features take what snapshots have in
    common. Default: 1."""
    dedicated: Annotated[tuple[str, ...] | None, DEDICATED] = None
    """Features of one snapshot, or of several joined by +, which are zero at all others: label=number, such as
    step512=64 or step0+step1=32. Repeat it, or separate by commas. Default: none."""
    delta: Annotated[float | None, COEFFICIENT] = None
    """Weight of the squared error of the change from each snapshot to the next. Default: 0."""

    def __post_init__(self) -> None:
        check(self)
        name, of_recipe = self.name, RECIPES.get(self.recipe or "", {}).get("architecture")
        if of_recipe is not None and name != of_recipe:
            raise UserError(
                f"architecture={name!r} contradicts recipe={self.recipe}, which is {of_recipe!r}: leave one of them out"
            )
        for option in FIELDS:
            value = getattr(self, option)
            if value is not None and not self.has(option):
                other = "" if of_recipe else f", or use --architecture {' or '.join(architectures_with(option))}"
                of_recipe_ = f" (recipe={self.recipe})" if of_recipe else ""
                raise UserError(
                    f"{option}={value:g} is no setting of {name!r} crosscoders{of_recipe_}: leave it out{other}"
                )
        for option, k in (("k", self.k or DEFAULT_K), ("k_start", self.k_start or 0)) if self.has("k") else ():
            if self.d_sae is not None and k > self.d_sae:
                raise UserError(f"{option}={k:g} must be at most d_sae={self.d_sae}")
        for needs, other in (("l0", "target_l0"), ("shared_penalty", "n_shared")):
            if getattr(self, needs) is not None and getattr(self, other) is None:
                raise UserError(f"--{needs.replace('_', '-')} needs --{other.replace('_', '-')}")
        if self.d_sae is not None and (self.target_l0 or 0) > self.d_sae:
            raise UserError(f"target_l0={self.target_l0:g} must be at most d_sae={self.d_sae}")
        if (self.k_start is None) != (self.k_anneal is None):
            given, missing = ("k_start", "--k-anneal") if self.k_anneal is None else ("k_anneal", "--k-start")
            raise UserError(
                f"{given}={getattr(self, given):g} needs {missing}: k falls from --k-start to --k over the steps of "
                "--k-anneal"
            )

    @property
    def name(self) -> str:
        """The architecture: that of the option, the recipe, or the default."""
        return self.architecture or RECIPES.get(self.recipe or "", {}).get("architecture", DEFAULT_ARCHITECTURE)

    def has(self, option: str) -> bool:
        """Whether the architecture has an option of `FIELDS`."""
        return option in ARCHITECTURES[self.name]

    def settings(self, total: int | None) -> dict[str, Any]:
        """The fields of the architecture's config that are given; without `total`, its steps, without durations.

        Raises:
            UserError: a warmup or annealing is longer than the training.
        """
        of_all = {"d_sae": "d_sae", "scale": "scale", "n_shared": "n_shared", "shared_penalty": "shared_penalty",
                  "delta": "delta_coefficient"}  # fmt: skip
        found = {name: value for option, name in of_all.items() if (value := getattr(self, option)) is not None}
        if self.dedicated:
            found["dedicated"] = dict(counted(each) for each in self.dedicated)
        for option, name in FIELDS.items():
            value = getattr(self, option)
            if value is not None and not name.endswith("_steps"):
                found[name] = value
            elif value is not None and total is not None:
                found[name] = round(value * total) if value < 1 else int(value)
                if found[name] > total:
                    raise UserError(
                        f"--{option.replace('_', '-')} {value:g} exceeds the {total:,} steps of this run: give at most "
                        "that many, or a fraction below 1"
                    )
        return found


@_TRAINING
@dataclass(kw_only=True)
class TrainingOptions:
    """How a crosscoder is trained; `crosslens.training.TrainConfig` adds where."""

    lr: Annotated[float, POSITIVE, COMMON] = 3e-4
    """Learning rate of Adam, after the warmup."""
    training_tokens: Annotated[int | None, COUNT, COMMON] = None
    """Tokens to train on; more than --n-tokens means several epochs. Default: one."""
    batch_size: Annotated[int, COUNT] = 4096
    """B, tokens per training step."""
    dead_tokens: Annotated[int, COUNT, COMMON] = 10_000_000
    """Tokens without firing after which a feature counts as dead and joins the auxiliary loss; in shorter runs give
    about a twentieth of the training tokens."""
    lr_warm_up: Annotated[float, DURATION] = 0.0
    """Warmup of --lr from 0. Below 1: a fraction of the steps; from 2: a number of steps."""
    lr_decay: Annotated[float, FRACTION] = 0.2
    """Fraction of the steps, at the end, over which --lr falls."""
    lr_end_factor: Annotated[float, COEFFICIENT] = 0.0
    """Final learning rate relative to --lr."""
    max_grad_norm: Annotated[float | None, POSITIVE] = 1.0
    """Global norm that gradients are clipped to (except those of thresholds); none does not clip."""
    precision: Precision | None = None
    """Of the large dense products; tf32 needs CUDA and Triton. Parameters and sums stay in float32. The faster ones
    change the result: rounding moves features across the gate, and parameters drift a few per cent from a float32 run.
    Default: tf32 on CUDA, float32 on CPUs."""
    adam_moments: Moments = "float32"
    """Of the two moments of the weights: bfloat16 takes 12 bytes a weight instead of 16; they are rounded
    stochastically (`crosslens.training.adam`)."""
    adam_beta1: Annotated[float, FRACTION] = 0.9
    """First-moment decay of Adam."""
    adam_beta2: Annotated[float, FRACTION] = 0.999
    """Second-moment decay of Adam."""
    scale_tokens: Annotated[int, COUNT] = 100_000
    """Tokens used to estimate the scale of each snapshot."""
    n_checkpoints: Annotated[int, NUMBER, FREE] = 4
    """Checkpoints to resume from, evenly spaced, besides the final one."""
    data_parallel: Annotated[int, COUNT, FREE] = 1
    """Groups of processes that split the tokens of a batch; the processes in a group split the features."""
    evaluate: Annotated[bool, Parameter(negative="--no-evaluate"), FREE] = True
    """Measure EV, L0, CE and KL per snapshot on held-out tokens at the end."""
    wandb_project: Annotated[str | None, FREE] = None
    """Log to this W&B project. WANDB_MODE=offline works."""
    wandb_run_name: Annotated[str | None, FREE] = None
    """Name of the W&B run."""
    wandb_log_frequency: Annotated[int, COUNT, FREE] = 10
    """Steps between logged losses and metrics."""
    wandb_eval_frequency: Annotated[int, COUNT, FREE] = 100
    """Logged steps between held-out evaluations."""

    def __post_init__(self) -> None:
        check(self)
        if self.training_tokens is not None and self.training_tokens < self.batch_size:
            raise UserError(
                f"training_tokens={self.training_tokens} is less than one batch of batch_size={self.batch_size}"
            )
        if self.lr_warm_up < 1 < self.lr_warm_up + self.lr_decay:
            raise UserError(
                f"lr_warm_up={self.lr_warm_up} and lr_decay={self.lr_decay} are fractions of the steps: at most 1 "
                "together"
            )


@_CROSSCODER
@dataclass(frozen=True, kw_only=True)
class SeedsOptions:
    """How often it is trained."""

    seeds: Annotated[int, COUNT, FREE] = 1
    """Crosscoders to train, from --seed on: the first in the run directory, the others in its folder seeds. Then says
    which features they have in common."""

    def __post_init__(self) -> None:
        check(self)


@_CROSSCODER
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """A grid of trainings (`crosslens sweep`)."""

    d_sae: Annotated[tuple[int, ...], all_at_least(1, MAX_FEATURES), COMMON]
    """Numbers of features, such as 256,512,1024."""
    k: Annotated[tuple[int, ...], COUNTS, COMMON]
    """Numbers of active features per token, such as 4,8,16."""
    seeds: Annotated[int, at_least(2)] = 2
    """Trainings per setting, from --seed on."""
    architecture: WithK = DEFAULT_ARCHITECTURE
    """What keeps the number of active features small."""

    def __post_init__(self) -> None:
        check(self)
        if max(self.k) > min(self.d_sae):
            raise UserError(f"k={max(self.k)} must be at most d_sae={min(self.d_sae)}, the smallest of the grid")


@_MODELS
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is for, besides the training (`crosslens plan`)."""

    processes: Annotated[int, COUNT, COMMON] = 1
    """Processes that torchrun will start."""

    def __post_init__(self) -> None:
        check(self)


# ---------------------------------------------------------------------- analyses
@_RUN
@dataclass(frozen=True, kw_only=True)
class AnalysisOptions:
    """What every analysis of a run accepts."""

    allow_changed_data: Annotated[bool, FREE] = False
    """Go on although the dataset or the tokenizer changed since training, which is refused otherwise; the tables record
    it."""

    def __post_init__(self) -> None:
        check(self)


@_RUN
@dataclass(frozen=True, kw_only=True)
class EvolveOptions(AnalysisOptions):
    """When features form, rotate, split and fade (`crosslens evolve`)."""

    untrained: Annotated[bool, Parameter(negative="--no-untrained"), COMMON] = False
    """Also train a crosscoder on as many models that never trained, with the run's settings, and count births there:
    the rate of false births. Takes as long as the run's harvest and training."""
    null: Annotated[str | None, COMMON] = None
    """A JSON file that names trained models of one step that differ in their seeds, such as
    {"seed1": "org/model@step1000", "seed2": "runs/b/step1000"}: count births in a crosscoder over them, where time does
    not exist."""
    n_probes: Annotated[int, COUNT, COMMON] = 50
    """Features that linear probes are fitted to, drawn from those that are active often enough."""
    dynamics_steps: Annotated[str | None, Parameter(converter=_words, n_tokens=-1)] = None
    """Steps of the models whose predictions are measured for the phases of training, as in --steps of train; those of
    the run are always among them. With all the fall of the bigram KL begins at its beginning. Default: those of the
    run."""
    seed: Annotated[int, SEED] = 0
    """Seed of the random directions, the intervals, and the draw of the features to probe."""


@_RUN
@dataclass(frozen=True, kw_only=True)
class TaskOptions(AnalysisOptions):
    """On which tasks, and what features are set to."""

    task: Annotated[tuple[Any, ...], Parameter(converter=_texts), COMMON]
    """A file with the columns prefix, correct and wrong; or a task in another format, such as sva:FILE or ioi, which
    `crosslens ls tasks` lists. Repeat it for several tasks. (In Python also `crosslens.tasks.Task`s.)"""
    baseline: Annotated[Baseline | None, COMMON] = None
    """What a feature is set to: zero, its mean over the prompts, or patch, its value on the paired prompt. Default:
    patch if half of the prompts or more are paired, otherwise zero; in ablate as in attribute."""


@_RUN
@dataclass(frozen=True, kw_only=True)
class AccuracyOptions:
    """How often models prefer the correct answers of tasks (`crosslens accuracy`)."""

    snapshots: Annotated[Any, COMMON]
    """As in train: a folder, a model such as pythia-160m, a repository, base=place,chat=place, a release, or demo."""
    steps: Annotated[str | None, Parameter(converter=_words, n_tokens=-1), COMMON] = None
    """Training steps, labels, or a named set such as log:12."""
    task: Annotated[tuple[Any, ...], Parameter(converter=_texts), COMMON]
    """As in attribute: a file with prefix, correct and wrong; sva:FILE, blimp:FILE, ... Repeat it for several tasks."""
    trust_remote_code: bool = False
    """Run the Python code that a model or tokenizer brings with it."""

    def __post_init__(self) -> None:
        check(self)


@_RUN
@dataclass(frozen=True, kw_only=True)
class AttributeOptions(TaskOptions):
    """The effect of every feature on tasks at every snapshot, on the selection half (`crosslens attribute`)."""

    method: Annotated[Method, COMMON] = "removal"
    """removal (what is lost without a feature), both_ends (the mean of that and of what adding it gains), ig
    (integrated gradients, whose effects add up), gradient (attribution patching) or exact (ablate features one by
    one)."""
    rule: Rule = "gauss_legendre"
    """Quadrature rule of ig."""
    n_nodes: Annotated[int, COUNT] = 20
    """Nodes of the rule, each a backward pass."""
    n_exact: Annotated[int, NUMBER, COMMON] = 20
    """Ablate this many of the largest effects one by one at every snapshot, to see how far the estimates agree. 0:
    none."""
    consensus: Annotated[bool, COMMON] = False
    """Only features that most seeds have, after `train --seeds`."""
    seed: Annotated[int, SEED] = 0
    """Seed of the split into halves and of the intervals."""


@_RUN
@dataclass(frozen=True, kw_only=True)
class AblateOptions(TaskOptions):
    """Ablate the top features, and keep only them, on the held-out half (`crosslens ablate`)."""

    k: Annotated[tuple[int, ...], COUNTS, COMMON] = (1, 5, 15, 50)
    """Sizes of the sets of top features."""
    n_draws: Annotated[int, COUNT, COMMON] = 20
    """Sets of random and of matched features to compare with."""
    seed: Annotated[int, SEED] = 0
    """Seed of the split into halves and of the draws."""


@_RUN
@dataclass(frozen=True, kw_only=True)
class StudySizes:
    """Numbers of features and draws of a study; those above the features active at some snapshot are reduced.

    Raises:
        UserError: a number out of its range.
    """

    ablate_k: Annotated[tuple[int, ...], COUNTS] = (1, 5, 15, 50)
    """Sizes of the sets that are ablated."""
    keep_k: Annotated[tuple[int, ...], NUMBERS] = (0, 5, 15, 50, 100)
    """Sizes of the sets that alone are kept."""
    k: Annotated[int, at_least(3), COMMON] = 15
    """Features of a set in the transfer matrix, features that are paired for additivity, and the size whose controls
    are drawn `n_draws_last` times."""
    n_draws: Annotated[int, COUNT] = 4
    """Sets drawn per control, random, size-matched and change-matched, at all snapshots."""
    n_draws_last: Annotated[int, COUNT] = 100
    """Sets of size k drawn per control at the last snapshot."""
    n_exact: Annotated[int, at_least(3), COMMON] = 100
    """Features with the largest effects that are ablated one by one, at every snapshot."""
    n_validated: Annotated[int, NUMBER] = 200
    """Significant features that are ablated one by one on the held-out half, at every snapshot."""
    n_bootstrap: Annotated[int, NUMBER] = 200
    """Replicates over prompts, for intervals."""
    n_pairs: Annotated[int, NUMBER] = 100
    """Pairs of features ablated together, at the last snapshot."""
    n_read_out: Annotated[int, COUNT] = 8
    """Features with the largest effects whose late values are put into every snapshot, and whose dates are compared."""
    everywhere: bool = False
    """Date concepts at all positions from the first in which paired prompts differ; otherwise at the last."""

    def __post_init__(self) -> None:
        check(self)


@_RUN
@dataclass(frozen=True, kw_only=True)
class StudyOptions(StudySizes, TaskOptions):
    """Every causal analysis of tasks (`crosslens study`): effects, ablation with controls, transfer, additivity,
    timeline, validation, languages."""

    seed: Annotated[int, SEED] = 0
    """Seed of the split into halves and of every draw."""


@_RUN
@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Prompts through all snapshots (`crosslens trace`)."""

    answers: Annotated[str | None, COMMON] = None
    """The correct and the wrong continuation, such as are,is. Default: the two next tokens that the last snapshot finds
    most probable; with --pair, the most probable one after each of the two prompts."""
    pair: Annotated[str | None, COMMON] = None
    """Another prompt of as many tokens: effects are then those of the difference between the two."""
    file: Annotated[Path | None, COMMON] = None
    """More prompts: a .txt file with one in each line, or a file of a task, such as sva:FILE, with answers."""
    fresh: Annotated[bool, COMMON] = False
    """Forget the prompts that were traced before, which the report keeps otherwise."""
    allow_changed_data: Annotated[bool, FREE] = False
    """Go on although the tokenizer changed since training, which is refused otherwise; the tables record it."""

    def __post_init__(self) -> None:
        check(self)
        parts = [] if self.answers is None else self.answers.split(",")
        if self.answers is not None and (len(parts) != 2 or not all(part.strip() for part in parts)):
            raise UserError(f"answers={self.answers!r} must be the correct and the wrong one, such as are,is")


@_RUN
@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """Continuations of prompts with features turned up or down (`crosslens steer`)."""

    feature: Annotated[tuple[int, ...], NUMBERS, COMMON]
    """Numbers of the features, such as 217."""
    factor: Annotated[float | None, COMMON] = None
    """What their activations are multiplied by: 0 removes them, 1 changes nothing."""
    add: Annotated[float | None, COMMON] = None
    """What is added to their activations at every position, instead of --factor."""
    at: Annotated[str | None, Parameter(converter=_words, n_tokens=-1), COMMON] = None
    """Snapshots, such as step640,step128. Default: the last one."""
    length: Annotated[int, COUNT, COMMON] = 20
    """Tokens to write."""
    temperature: Annotated[float, COEFFICIENT, COMMON] = 0.0
    """Of sampling; 0 takes the most probable token."""
    loss_tokens: Annotated[int, NUMBER] = 2_048
    """Held-out tokens on which the change of the loss is measured. 0: none."""
    seed: Annotated[int, SEED] = 0
    """Seed of sampling."""
    allow_changed_data: Annotated[bool, FREE] = False
    """Go on although the dataset or the tokenizer changed since training, which is refused otherwise; the table records
    it."""

    def __post_init__(self) -> None:
        check(self)
        if (self.factor is None) == (self.add is None):
            raise UserError("give either --factor, such as 3, or --add, such as 4.0")
        for name in ("factor", "add"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name}={value} must be a finite number")


@_RUN
@dataclass(frozen=True, kw_only=True)
class ConnectOptions(AnalysisOptions):
    """Edges into the features of a run from those of a run at an earlier hook point (`crosslens connect`)."""

    lower: Annotated[Path, COMMON]
    """Run directory of the crosscoder at the earlier hook point, of the same snapshots."""
    task: Annotated[tuple[Any, ...], Parameter(converter=_texts), COMMON]
    """The prompts, as in `crosslens attribute`. Repeat it for several tasks."""
    feature: Annotated[tuple[int, ...] | None, NUMBERS, COMMON] = None
    """Features that edges lead to. Default: the ten with the largest effects on the task at the last snapshot."""
    n_edges: Annotated[int, COUNT, COMMON] = 10
    """Edges into each of them, from the lower features with the largest."""


@_RUN
@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Labels of features by a language model or by their tokens, and scores (`crosslens label`)."""

    client: Annotated[Client | None, COMMON] = None
    """API of the server. The key is read from OPENAI_API_KEY or ANTHROPIC_API_KEY."""
    model: Annotated[str | None, COMMON] = None
    """Name of the language model on the server."""
    local: Annotated[bool, COMMON] = False
    """Label each feature by the tokens of its examples instead, without a language model."""
    base_url: Annotated[str | None, COMMON] = None
    """URL of another server with that API, such as a local one."""
    features: Annotated[tuple[int, ...] | None, NUMBERS, COMMON] = None
    """Feature ids. Default: all."""
    n_features: Annotated[int | None, COUNT, COMMON] = None
    """Label this many of them, drawn at random."""
    n_examples: Annotated[int, COUNT] = 7
    """Examples shown per feature."""
    score: Annotated[bool, Parameter(negative="--no-score"), COMMON] = True
    """Have complexity rated a second time, and judge every label, and as a control another feature's, on held-out
    passages: six requests per feature instead of one."""
    second_model: str | None = None
    """Model of the second rating. Default: the same, asked once more."""
    attempts: Annotated[int, COUNT] = 1
    """Requests of each kind until an answer can be parsed."""
    requests_per_minute: Annotated[float, POSITIVE] = 50.0
    """Rate limit."""
    workers: Annotated[int, COUNT] = 4
    """Concurrent requests."""
    prices: Annotated[tuple[float, float] | None, PRICES] = None
    """Prices of a million tokens in and out."""
    seed: Annotated[int, SEED] = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check(self)
        if not self.local and (self.client is None or self.model is None):
            raise UserError("give --client and --model, or --local for labels without a language model")


@_RUN
@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The HTML pages of a run (`crosslens report`)."""

    wandb: Annotated[bool, COMMON] = False
    """Add heat map and tables to the run on W&B."""
    wandb_project: str | None = None
    """W&B project to add them to, for a run trained without W&B."""
    consensus: Annotated[bool, COMMON] = False
    """Only features that most seeds have, after `train --seeds`."""
    title: Annotated[str | None, COMMON] = None
    """Heading of the report."""

    def __post_init__(self) -> None:
        check(self)
