"""The recipe of Ge et al. against their training loop, written out densely from its formulas."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from jaxtyping import Float
from planted.regimes import Planted, Regime
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from crosslens.crosscoders import CrosscoderTrainingSAE
from crosslens.training import recipes
from crosslens.training.initialisation import initialise
from crosslens.training.run import complete
from crosslens.training.trainer import CrosscoderTrainer

S, D, F, B, STEPS = 4, 16, 96, 64, 300


class Step(torch.autograd.Function):
    """`z 1[z > t]`, with a rectangle of width 4 in place of the step's derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(z, t)
        return z * (z > t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z, t = ctx.saved_tensors
        near = ((z - t).abs() < 2) & (z > 0)
        return grad * (z > t), (-t / 4 * near * grad).sum((0, 1))


class Released(nn.Module):
    """A crosscoder of K heads (snapshots) with the layout of OpenMOSS: everything once per head, biases too."""

    def __init__(self, directions: Float[Tensor, "F D"]) -> None:
        super().__init__()
        features, d_model = directions.shape
        self.W_D = nn.Parameter(directions.expand(S, -1, -1).clone())
        self.W_E = nn.Parameter(self.W_D.detach().transpose(1, 2).clone())
        self.b_E = nn.Parameter(directions.new_zeros(S, features))
        self.b_D = nn.Parameter(directions.new_zeros(S, d_model))
        self.log_t = nn.Parameter(directions.new_full((features,), math.log(0.1)))

    def loss(self, x: Float[Tensor, "B K D"], sparsity: float) -> tuple[Tensor, Tensor]:
        h = torch.stack([x[:, k] @ self.W_E[k] + self.b_E[k] for k in range(S)]).sum(0)
        n = self.W_D.norm(dim=-1)
        stepped = Step.apply(h[:, None] * n, self.log_t.exp())
        assert isinstance(stepped, Tensor)
        f = stepped / n
        out = torch.stack([f[:, k] @ self.W_D[k] + self.b_D[k] for k in range(S)], 1)
        frequency = (4 * f * n).tanh().mean((0, 1))
        reconstruction = (out - x).square().sum(-1).mean()
        return reconstruction, reconstruction + sparsity * (frequency * (1 + frequency / 0.01)).sum()

    @torch.no_grad()
    def search(self, x: Tensor) -> None:
        """Rows of W_D of the norm, from .1 to 1 and then around the best, that reconstructs a batch best."""

        def error(norm: float) -> float:
            self.W_D.mul_(norm / self.W_D.norm(dim=-1, keepdim=True))
            self.W_E.copy_(self.W_D.transpose(1, 2))
            return self.loss(x, 0)[0].item()

        coarse = min(torch.linspace(0.1, 1, 10, dtype=torch.float64).tolist(), key=error)
        error(min(torch.linspace(coarse - 0.09, coarse + 0.1, 20, dtype=torch.float64).tolist(), key=error))


def released_run(directions: Tensor, batches: list[Tensor], lr: float, warm_up: int) -> tuple[list[float], Released]:
    """The losses of a run on raw activations, and the model; the first eight batches also initialise it."""
    norms = torch.cat(batches[:8]).double().norm(dim=-1).mean(0)
    scale = (math.sqrt(D) / norms).float()[:, None]  # the model keeps it in float32
    model = Released(directions)
    model.search((batches[7] * scale).to(directions.dtype))
    others = [p for name, p in model.named_parameters() if name != "log_t"]
    adam = torch.optim.Adam([{"params": others}, {"params": [model.log_t], "lr": 0.1 * lr}], lr=lr)
    decay = STEPS // 5

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up, 1 / 32 + (1 - 1 / 32) / decay * (STEPS - step))

    schedule, losses = LambdaLR(adam, factor), []
    for step, x in enumerate(batches):
        loss = model.loss((x * scale).to(directions.dtype), 0.3 * min(1, step / (STEPS // 10)))[1]
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model


def our_run(
    lr: float, seed: int, per_snapshot: bool = True, until: int = STEPS, **options: Any
) -> tuple[list[float], CrosscoderTrainingSAE, Tensor, list[Tensor]]:
    """The losses of the recipe, the model at the end, the initial decoder rows of one snapshot, and the data."""
    acts = Planted(Regime(n_features=48, d_model=D, n_snapshots=5, firing=(0.02, 0.1)), seed)
    kept = [0, 1, 2, 4]  # planted features need five snapshots
    acts.members, acts.snapshots = kept, acts.snapshots[kept]
    acts.rows, acts.scales = acts.rows[:, kept], acts.scales[kept]
    architecture, config = recipes.evolution_of_concepts(
        F, training_tokens=STEPS * B, batch_size=B, lr=lr, scale_tokens=8 * B, seed=seed, device="cpu", **options
    )
    assert architecture.b_enc_per_snapshot
    architecture = dataclasses.replace(architecture, dtype="float64", b_enc_per_snapshot=per_snapshot)
    sae = initialise(
        complete(architecture, acts, "cpu"), acts, batch_size=B, scale_tokens=config.scale_tokens, seed=seed
    )
    directions = sae.W_dec_by_snapshot[:, 0].detach().clone()
    batches = [batch for _, batch in zip(range(until), acts.batches(B), strict=False)]
    trainer, losses = CrosscoderTrainer(config, sae, iter(()), total=STEPS * B), []
    for batch in batches:
        losses.append(trainer.step(batch).loss.item())
        trainer.n_training_steps += 1
    return losses, sae, directions, batches


def furthest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def test_300_steps_of_the_recipe():
    """In float64: rounding to float32 moves a value across a gate now and then, which shows in the fourth digit."""
    losses, _, directions, batches = our_run(5e-5, seed=0)
    theirs, _ = released_run(directions, batches, lr=5e-5, warm_up=STEPS // 10)
    assert furthest(losses, theirs) < 1e-9
    one_bias, _, _, _ = our_run(5e-5, seed=0, per_snapshot=False, until=100)
    assert one_bias[0] == losses[0] and furthest(one_bias, theirs[:100]) > 0.01


@pytest.mark.exhaustive
def test_300_steps_with_the_released_warmup_and_every_parameter():
    losses, sae, directions, batches = our_run(1e-3, seed=1, lr_warm_up_steps=100)
    theirs, model = released_run(directions, batches, lr=1e-3, warm_up=100)
    assert furthest(losses, theirs) < 1e-9
    for wanted, found in (
        (model.W_E, sae.W_enc_by_snapshot),
        (model.W_D.transpose(0, 1), sae.W_dec_by_snapshot),
        (model.b_E.sum(0), sae.b_enc),
        (model.b_D, sae.b_dec_by_snapshot),
        (model.log_t, sae.log_threshold),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
