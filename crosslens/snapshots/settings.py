"""How models run: device, dtype, attention, backend, and tokens per forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from crosslens.config import FREE, ModelOptions
from crosslens.distributed.devices import find_device


@dataclass(frozen=True)
class ModelSettings(ModelOptions):
    """How every analysis loads and runs language models, on a device that is known.

    Raises:
        UserError: an unknown dtype, attention or backend, fused attention in a HookedTransformer, or a batch of no
            tokens.
    """

    device: Annotated[str, FREE] = field(default_factory=find_device)
    """A torch device; CUDA where it is available."""
