"""The options of training: checked, then turned into (architecture config, TrainConfig), here and nowhere else.

An option that is not given is None. A setting is that of its option, else of the recipe, else the library's default.
`check_training` is quick: like `crosslens.cli.arguments`, it imports neither torch nor SAELens.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crosslens.cli.arguments import check_processes, find_assumed_device
from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.training import recipes
from crosslens.training.config import TrainConfig

if TYPE_CHECKING:
    from crosslens.crosscoders import CrosscoderTrainingConfig

DEFAULT_ARCHITECTURE = "batchtopk"
DEFAULT_K = 64
"""That of the configs, which are in modules that import torch; a test compares them."""

_TOPK, _JUMPRELU, _STANDARD = ("topk", "batchtopk"), ("jumprelu",), ("standard",)
ONLY = {
    "k": (_TOPK, "k"),
    "k_start": (_TOPK, "k_start"),
    "k_anneal": (_TOPK, "k_anneal_steps"),
    "aux": (_TOPK, "aux_loss_coefficient"),
    "sparsity": (_JUMPRELU, "sparsity_coefficient"),
    "sparsity_warm_up": (_JUMPRELU, "sparsity_warm_up_steps"),
    "l1": (_STANDARD, "l1_coefficient"),
    "l1_warm_up": (_STANDARD, "l1_warm_up_steps"),
}
"""Options of some architectures: which, and the field of their config."""
DURATIONS = ("k_anneal", "sparsity_warm_up", "l1_warm_up")
"""Those of them that are a fraction of the steps below 1, and a number of steps above it."""


@dataclass(kw_only=True)
class TrainingOptions:
    """The options of `crosslens train` that say what is trained, and how; None where an option is not given.

    Attributes:
        others: fields of `TrainConfig` that no recipe sets.
    """

    recipe: str | None = None
    architecture: str | None = None
    d_sae: int | None = None
    k: int | None = None
    k_start: float | None = None
    k_anneal: float | None = None
    aux: float | None = None
    sparsity: float | None = None
    sparsity_warm_up: float | None = None
    l1: float | None = None
    l1_warm_up: float | None = None
    scale: str | None = None
    training_tokens: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    lr_warm_up: float | None = None
    lr_decay: float | None = None
    dead_tokens: int | None = None
    precision: str | None = None
    adam_moments: str | None = None
    others: dict[str, Any] = field(default_factory=dict[str, Any])

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the options that are given."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def chosen_architecture(self) -> str:
        """The architecture of the option, the recipe, or the default."""
        return self.architecture or recipes.ARCHITECTURES.get(self.recipe or "", DEFAULT_ARCHITECTURE)


def check_training(options: TrainingOptions, device: str | None, n_tokens: int | None = None) -> None:
    """Check the options of training against each other, and against the run directory.

    Args:
        options: each of them checked by itself already.
        device: the --device option.
        n_tokens: the --n-tokens option.

    Raises:
        UserError: an option that the architecture or recipe does not have, numbers that contradict each other,
            processes that cannot be grouped, or the directory of another run.
    """
    name = options.chosen_architecture
    _check_architecture(options, name)
    config = _train_config(options, find_assumed_device(device))
    if n_tokens is not None and config.batch_size > n_tokens:
        raise UserError(f"--batch-size {config.batch_size} must be at most --n-tokens {n_tokens}, one epoch")
    if config.training_tokens is not None:
        for option, value in options.given(*DURATIONS).items():
            _steps(option, value, config.training_tokens // config.batch_size)
    check_processes(int(os.environ.get("WORLD_SIZE", "1")), config.data_parallel)
    if config.run_dir is not None:
        fields = {ONLY[option][1]: value for option, value in options.given(*(ONLY.keys() - {*DURATIONS})).items()}
        default = {"k": DEFAULT_K} if name in _TOPK else {}
        details = {"architecture": f"{name}_crosscoder", **default, **fields, **options.given("d_sae", "scale")}
        names = ("batch_size", "lr", "lr_warm_up", "lr_decay", "dead_tokens", "adam_moments", "seed")
        training = {name: getattr(config, name) for name in names}
        RunDir(config.run_dir).check_settings({"architecture": details, "training": training})


def parse_training(
    options: TrainingOptions, device: str, n_tokens: int
) -> tuple[CrosscoderTrainingConfig, TrainConfig]:
    """What is trained, and how.

    Args:
        options: accepted by `check_training`.
        device: of the crosscoder.
        n_tokens: activations of an epoch, which is trained on if no option or recipe gives another number.

    Raises:
        UserError: a warmup or annealing is longer than the training, or the device does not have the precision.
    """
    from crosslens.crosscoders import TRAINING_ARCHITECTURES

    config = _train_config(options, device)
    total = (config.training_tokens or n_tokens) // config.batch_size
    fields: dict[str, Any] = {
        ONLY[option][1]: _steps(option, value, total) if option in DURATIONS else value
        for option, value in options.given(*ONLY).items()
    }
    fields |= options.given("d_sae", "scale")
    if options.recipe is None:
        return TRAINING_ARCHITECTURES[f"{options.chosen_architecture}_crosscoder"][1](**fields), config
    of_paper = {"training_tokens": config.training_tokens, "batch_size": config.batch_size, "device": device}
    architecture, _ = getattr(recipes, options.recipe)(**of_paper)
    return dataclasses.replace(architecture, **fields), config


def _check_architecture(options: TrainingOptions, name: str) -> None:
    if options.recipe is not None and name != recipes.ARCHITECTURES[options.recipe]:
        raise UserError(
            f"--architecture {name!r} contradicts --recipe {options.recipe}, which is "
            f"{recipes.ARCHITECTURES[options.recipe]!r}: leave one of them out"
        )
    if options.recipe is None and options.d_sae is None:
        raise UserError("--d-sae is missing: give the number of features, or a --recipe, which sets it")
    for option, value in options.given(*ONLY).items():
        architectures, _ = ONLY[option]
        if name not in architectures:
            other = "" if options.recipe else f", or use --architecture {' or '.join(architectures)}"
            raise UserError(
                f"{_name(option)} {value} is no setting of {name!r} crosscoders{_of_recipe(options)}: "
                f"leave it out{other}"
            )
    if name in _TOPK:
        for option, k in {"k": DEFAULT_K, **options.given("k", "k_start")}.items():
            if options.d_sae is not None and k > options.d_sae:
                raise UserError(f"{_name(option)} {k} must be at most --d-sae {options.d_sae}")
    if (options.k_start is None) != (options.k_anneal is None):
        given, missing = ("k_start", "k_anneal") if options.k_anneal is None else ("k_anneal", "k_start")
        raise UserError(
            f"{_name(given)} {getattr(options, given)} needs {_name(missing)}: k falls from --k-start to --k over the "
            "steps of --k-anneal"
        )


def _train_config(options: TrainingOptions, device: str) -> TrainConfig:
    names = ("training_tokens", "batch_size", "lr", "lr_decay", "dead_tokens", "precision", "adam_moments")
    warm_up: dict[str, Any] = options.given("lr_warm_up")
    if options.lr_warm_up is not None and options.lr_warm_up >= 1:
        warm_up = {"lr_warm_up_steps": int(options.lr_warm_up)}
    of_recipe = {} if options.recipe is None else recipes.TRAINING[options.recipe]
    fields: dict[str, Any] = {**of_recipe, **options.given(*names), **warm_up, **options.others, "device": device}
    return TrainConfig(**fields)


def _steps(option: str, value: float, total: int) -> int:
    """The number of steps that a fraction of all steps, or a number of them, stands for."""
    steps = round(value * total) if value < 1 else int(value)
    if steps > total:
        raise UserError(
            f"{_name(option)} {steps:,} exceeds the {total:,} steps of this run: give at most that many, or a fraction "
            "below 1"
        )
    return steps


def _name(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _of_recipe(options: TrainingOptions) -> str:
    return "" if options.recipe is None else f" (--recipe {options.recipe})"
