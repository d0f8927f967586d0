"""Adam whose moments of the weight matrices are stored in bfloat16: 12 bytes per weight with its gradient, not 16.

For a block of rows at a time:

1. Convert both moments to float32.
2. Make a step of torch's fused Adam on them: the arithmetic is that of float32 moments.
3. Round them back stochastically: up with the probability (x - lower) / (upper - lower), so that the mean of the
   rounded value is x. With beta2 = .999 a step changes the second moment by .1 % at most of its own value, but
   neighbours in bfloat16 are .4 to .8 % apart: rounded to the nearest, it would never decay.

A value that bfloat16 holds exactly is not changed by rounding, so a step that fused Adam skips changes nothing. Biases
and thresholds keep float32 moments: they are few, and processes that hold the same b_dec need no common random bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Adam
from torch.optim.adam import adam
from typing_extensions import override

MOMENTS = ("exp_avg", "exp_avg_sq")
BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}  # weights per block


def moment_dtype(parameter: Tensor, adam_moments: str) -> torch.dtype:
    """The dtype that the moments of a parameter are stored in, with `TrainConfig.adam_moments`."""
    return torch.bfloat16 if adam_moments == "bfloat16" and parameter.ndim > 1 else parameter.dtype


class BFloat16Adam(Adam):
    """Fused Adam, without weight decay, with moments of matrices in bfloat16.

    The random bits of a step depend on `seed`, the number of the step and nothing else.

    Args:
        params: as for `torch.optim.Adam`; matrices contiguous.
        lr: learning rate.
        betas: decays of the moments.
        seed: seed of the rounding. Processes with different rows need different seeds, copies of the same rows equal
            ones.

    Attributes:
        n_steps: steps made so far, skipped ones included; to be set when a training resumes.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float], seed: tuple[int, ...] = (0,)
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)
        self.seed = seed
        self.n_steps = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; honours `grad_scale` and `found_inf` as torch's fused Adam does."""
        del closure
        self.n_steps += 1
        bits = int(np.random.SeedSequence((*self.seed, self.n_steps)).generate_state(1)[0])
        for generator in self._generators.values():
            generator.manual_seed(bits)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.device not in self._generators:
                    self._generators[p.device] = torch.Generator(p.device).manual_seed(bits)
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    for name in MOMENTS:
                        state[name] = torch.zeros_like(p, dtype=moment_dtype(p, "bfloat16"))
                self._update(p.detach(), p.grad, state, group)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        before = state["step"]
        rows = max(1, BLOCK["cuda" if p.is_cuda else "cpu"] // p[0].numel())
        for first in range(0, len(p), rows):
            block = slice(first, first + rows)
            stored = [state[name][block] for name in MOMENTS]
            # float32 moments are used as they are, and updated in place
            moments = mean, square = [moment.to(p.dtype) for moment in stored]
            state["step"] = before.clone()
            adam(
                [p[block]],
                [grad[block]],
                [mean],
                [square],
                [],
                [state["step"]],
                fused=True,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            if stored[0].dtype != p.dtype:
                for moment, into in zip(moments, stored, strict=True):
                    round_into(into, moment, self._generators[p.device])


def round_into(out: Tensor, x: Tensor, generator: torch.Generator) -> None:
    """Write `x` to the bfloat16 tensor `out`, rounded stochastically; float32 `x` is overwritten.

    A bfloat16 is the upper half of a float32. Adding a random 16-bit number to the lower half carries into the upper
    half with the right probability, for either sign.
    """
    x = x.float()
    random = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    random.random_(-(2**63), None, generator=generator)
    bits = random.view(torch.int16)[: x.numel()].view(x.shape)  # from -2^15
    x.view(torch.int32).add_(bits).add_(1 << 15)
    out.view(torch.int16).copy_(x.view(torch.int16)[..., 1::2])  # the upper halves, on little-endian machines
