"""The training settings of the two papers: a recipe is (architecture config, TrainConfig)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crosslens.config import RECIPES
from crosslens.errors import UserError
from crosslens.training.config import TrainConfig

if TYPE_CHECKING:
    from crosslens.crosscoders import JumpReLUCrosscoderTrainingConfig, StandardCrosscoderTrainingConfig


def evolution_of_concepts(d_sae: int = 98_304, **training: Any) -> tuple[JumpReLUCrosscoderTrainingConfig, TrainConfig]:
    """JumpReLU with a tanh-quadratic penalty (Ge et al., arXiv 2509.17196): the Pythia-160m settings.

    Loss, gradients, initialisation and optimiser are those of the released code (OpenMOSS/Language-Model-SAEs), down
    to b_enc, which it holds once per snapshot. On the warmup of the learning rate the sources disagree: 10 % of the
    steps in the paper's appendix, 5,000 steps in the released code and its command. The default is the fraction,
    because it also fits short runs; `lr_warm_up_steps=5_000` gives the released number.

    Args:
        d_sae: number of features.
        training: fields of `TrainConfig` that differ from the paper's 800 million activations in batches of 2,048, such
            as `training_tokens`, or that it does not set, such as `run_dir`. The coefficient of the penalty is warmed
            up over a tenth of the steps.

    Raises:
        UserError: a number is out of range, or there are fewer activations than one batch.
    """
    from crosslens.crosscoders import JumpReLUCrosscoderTrainingConfig

    config, steps = _config("evolution_of_concepts", training)
    architecture = JumpReLUCrosscoderTrainingConfig(
        d_sae=d_sae,
        sparsity_warm_up_steps=steps // 10,
        b_enc_per_snapshot=True,
        bias_init="zero",
        scale="norm",
        apply_b_dec_to_input=False,
    )
    return architecture, config


def crosscoding_through_time(
    d_sae: int = 16_384, **training: Any
) -> tuple[StandardCrosscoderTrainingConfig, TrainConfig]:
    """ReLU with a decoder-norm-weighted L1 penalty (Bayazit et al., arXiv 2509.05291).

    Args:
        d_sae: number of features.
        training: fields of `TrainConfig` that differ from the paper's 400 million activations in batches of 4,096, such
            as `training_tokens`, or that it does not set, such as `run_dir`. The coefficient of the penalty is warmed
            up over a twentieth of the steps.

    Raises:
        UserError: a number is out of range, or there are fewer activations than one batch.
    """
    from crosslens.crosscoders import StandardCrosscoderTrainingConfig

    config, steps = _config("crosscoding_through_time", training)
    architecture = StandardCrosscoderTrainingConfig(
        d_sae=d_sae,
        l1_coefficient=2.0,
        l1_warm_up_steps=steps // 20,
        decoder_init_norm=0.08,
        bias_init="zero",
        apply_b_dec_to_input=False,
        scale="norm",
    )
    return architecture, config


def _config(recipe: str, training: dict[str, Any]) -> tuple[TrainConfig, int]:
    """How a recipe trains, and its number of steps."""
    of_paper = {name: value for name, value in RECIPES[recipe].items() if name != "architecture"}
    config = TrainConfig(**{**of_paper, **training})
    if config.training_tokens is None:
        raise UserError(
            "training_tokens=None: the warmup of a recipe depends on the number of activations; give it, or leave it "
            f"out for the paper's {of_paper['training_tokens']:,}"
        )
    return config, config.training_tokens // config.batch_size
