"""The training settings of the two papers: a recipe is (architecture config, TrainConfig)."""

from __future__ import annotations

import dataclasses
from typing import Any

from crosslens.crosscoders import JumpReLUCrosscoderTrainingConfig, StandardCrosscoderTrainingConfig
from crosslens.training.config import TrainConfig


def evolution_of_concepts(
    d_sae: int = 98_304, training_tokens: int = 800_000_000, batch_size: int = 2048, **training: Any
) -> tuple[JumpReLUCrosscoderTrainingConfig, TrainConfig]:
    """JumpReLU with a tanh-quadratic penalty (Ge et al., arXiv 2509.17196): the Pythia-160m settings.

    Loss, gradients, initialisation and optimiser are those of the released code (OpenMOSS/Language-Model-SAEs), down
    to b_enc, which it holds once per snapshot. On the warmup of the learning rate the sources disagree: 10 % of the
    steps in the paper's appendix, 5,000 steps in the released code and its command. The default is the fraction,
    because it also fits short runs; `lr_warm_up_steps=5_000` gives the released number.

    Args:
        d_sae: number of features.
        training_tokens: activations to train on; they determine the number of warmup steps.
        batch_size: activations per step.
        training: other fields of `TrainConfig`, such as `run_dir`.

    Raises:
        UserError: a number is out of range, or there are fewer activations than one batch.
    """
    steps = training_tokens // batch_size
    architecture = JumpReLUCrosscoderTrainingConfig(
        d_sae=d_sae, sparsity_warm_up_steps=steps // 10, b_enc_per_snapshot=True, bias_init="zero", scale="norm"
    )
    config = TrainConfig(
        training_tokens=training_tokens,
        batch_size=batch_size,
        lr=5e-5,
        lr_warm_up=0.1,
        lr_decay=0.2,
        lr_end_factor=1 / 32,
        max_grad_norm=None,
    )
    return architecture, dataclasses.replace(config, **training)


def crosscoding_through_time(
    d_sae: int = 16_384, training_tokens: int = 400_000_000, batch_size: int = 4096, **training: Any
) -> tuple[StandardCrosscoderTrainingConfig, TrainConfig]:
    """ReLU with a decoder-norm-weighted L1 penalty (Bayazit et al., arXiv 2509.05291).

    Args:
        d_sae: number of features.
        training_tokens: activations to train on; they determine the number of warmup steps.
        batch_size: activations per step.
        training: other fields of `TrainConfig`, such as `run_dir`.

    Raises:
        UserError: a number is out of range, or there are fewer activations than one batch.
    """
    steps = training_tokens // batch_size
    architecture = StandardCrosscoderTrainingConfig(
        d_sae=d_sae,
        l1_coefficient=2.0,
        l1_warm_up_steps=steps // 20,
        decoder_init_norm=0.08,
        bias_init="zero",
        scale="norm",
    )
    config = TrainConfig(
        training_tokens=training_tokens, batch_size=batch_size, lr=5e-5, lr_decay=0.2, max_grad_norm=1.0
    )
    return architecture, dataclasses.replace(config, **training)
