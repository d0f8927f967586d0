"""How models run: device, dtype, attention, backend, and tokens per forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from crosslens.distributed.devices import find_device
from crosslens.errors import UserError, did_you_mean

BACKENDS = ("bridge", "hooked_transformer")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class ModelSettings:
    """How every analysis loads and runs language models.

    Raises:
        UserError: an unknown dtype, attention or backend, fused attention in a HookedTransformer, or a batch of no
            tokens.
    """

    device: str = field(default_factory=find_device)
    """A torch device; CUDA where it is available."""
    dtype: str = "float32"
    """Dtype of the models' parameters. Activations are always float32."""
    backend: str = "bridge"
    """`"bridge"` for a TransformerBridge, `"hooked_transformer"` for a HookedTransformer without weight processing."""
    batch_tokens: int = 16_384
    """Tokens per forward pass; in harvests fewer where scores of eager attention would take more than 1 GiB, and
    on a CPU at most 4,096."""
    attention: str = "eager"
    """`"eager"` computes all scores (B, heads, T, T), which TransformerLens's hooks inside attention show; `"sdpa"` is
    torch's fused attention: faster, in less memory, without those hooks. Some families have the first only."""

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("dtype", self.dtype, DTYPES),
            ("backend", self.backend, BACKENDS),
            ("attention", self.attention, ATTENTIONS),
        ):
            if value not in valid:
                raise UserError(f"{name}={value!r} is unknown: use {' or '.join(valid)}{did_you_mean(value, valid)}")
        if self.attention != "eager" and self.backend == "hooked_transformer":
            raise UserError("attention='sdpa' needs backend='bridge': a HookedTransformer computes its own attention")
        if self.batch_tokens < 1:
            raise UserError(f"batch_tokens={self.batch_tokens} must be at least 1")
