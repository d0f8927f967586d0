"""The four architectures by name. Importing this module registers them with SAELens."""

from __future__ import annotations

from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from crosslens.crosscoders.jumprelu import (
    JumpReLUCrosscoder,
    JumpReLUCrosscoderConfig,
    JumpReLUCrosscoderTrainingConfig,
    JumpReLUCrosscoderTrainingSAE,
)
from crosslens.crosscoders.standard import (
    StandardCrosscoder,
    StandardCrosscoderConfig,
    StandardCrosscoderTrainingConfig,
    StandardCrosscoderTrainingSAE,
)
from crosslens.crosscoders.topk import (
    BatchTopKCrosscoder,
    BatchTopKCrosscoderConfig,
    BatchTopKCrosscoderTrainingConfig,
    BatchTopKCrosscoderTrainingSAE,
    TopKCrosscoder,
    TopKCrosscoderConfig,
    TopKCrosscoderTrainingConfig,
    TopKCrosscoderTrainingSAE,
)

ARCHITECTURES = {
    "standard_crosscoder": (StandardCrosscoder, StandardCrosscoderConfig),
    "topk_crosscoder": (TopKCrosscoder, TopKCrosscoderConfig),
    "batchtopk_crosscoder": (BatchTopKCrosscoder, BatchTopKCrosscoderConfig),
    "jumprelu_crosscoder": (JumpReLUCrosscoder, JumpReLUCrosscoderConfig),
}
TRAINING_ARCHITECTURES = {
    "standard_crosscoder": (StandardCrosscoderTrainingSAE, StandardCrosscoderTrainingConfig),
    "topk_crosscoder": (TopKCrosscoderTrainingSAE, TopKCrosscoderTrainingConfig),
    "batchtopk_crosscoder": (BatchTopKCrosscoderTrainingSAE, BatchTopKCrosscoderTrainingConfig),
    "jumprelu_crosscoder": (JumpReLUCrosscoderTrainingSAE, JumpReLUCrosscoderTrainingConfig),
}


def register() -> None:
    """Add the crosscoder architectures to SAELens's registries; calling it again changes nothing."""
    for name, (sae_class, config_class) in ARCHITECTURES.items():
        if name not in SAE_CLASS_REGISTRY:
            register_sae_class(name, sae_class, config_class)
    for name, (sae_class, config_class) in TRAINING_ARCHITECTURES.items():
        if name not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(name, sae_class, config_class)


register()
