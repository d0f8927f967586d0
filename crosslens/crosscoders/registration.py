"""All architectures by name. Importing this module registers them with SAELens."""

from __future__ import annotations

import importlib
import pkgutil

from sae_lens import register_sae_class, register_sae_training_class
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from crosslens.crosscoders import architectures
from crosslens.crosscoders.declaration import Architecture


def _declared() -> dict[str, Architecture]:
    """The declarations of the modules in the folder of architectures, by name."""
    names = sorted(found.name for found in pkgutil.iter_modules(architectures.__path__))
    modules = [importlib.import_module(f"{architectures.__name__}.{name}") for name in names]
    return {module.ARCHITECTURE.name: module.ARCHITECTURE for module in modules}


DECLARATIONS = _declared()
"""What every architecture declares, by the name that `cfg.architecture()` gives."""
ARCHITECTURES = {name: declared.inference for name, declared in DECLARATIONS.items()}
"""The classes of trained crosscoders and of their configs."""
TRAINING_ARCHITECTURES = {name: declared.training for name, declared in DECLARATIONS.items()}
"""The classes of crosscoders in training and of their configs."""


def register() -> None:
    """Add the crosscoder architectures to SAELens's registries; calling it again changes nothing."""
    for name, (sae_class, config_class) in ARCHITECTURES.items():
        if name not in SAE_CLASS_REGISTRY:
            register_sae_class(name, sae_class, config_class)
    for name, (sae_class, config_class) in TRAINING_ARCHITECTURES.items():
        if name not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(name, sae_class, config_class)


register()
