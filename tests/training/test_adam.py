"""Adam with moments in bfloat16, against Adam in float64 and against rounding by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from crosslens.training.adam import BLOCK, MOMENTS, BFloat16Adam, round_into
from crosslens.training.trainer import guarded_step

LR, BETAS = 1e-2, (0.9, 0.999)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((7, 5), (11,), (3, 8))]


def gradients(step: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=draw) * 10.0 ** (i - 2) for i, p in enumerate(parameters())]


def stepped(optimizer: Adam, params: list[nn.Parameter], steps: range, divisor: float = 1.0) -> None:
    for step in steps:
        for p, grad in zip(params, gradients(step), strict=True):
            p.grad = grad.clone()
        guarded_step(optimizer, torch.tensor(divisor), torch.tensor(False))


# ---------------------------------------------------------------------- rounding


def rounded_by_hand(x: float, random: int) -> float:
    """The neighbour of x in bfloat16 that a random number in [0, 2^16) selects."""
    bits = int(np.float32(x).view(np.uint32))
    towards_zero, share = bits - bits % 65536, bits % 65536
    away = random >= 65536 - share
    return float(np.uint32(towards_zero + 65536 * away).view(np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 33)])
def test_rounding_is_that_by_hand(shape: tuple[int, int]):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=draw) * 10.0 ** torch.randint(-30, 30, shape, generator=draw)
    out = torch.empty(shape, dtype=torch.bfloat16)
    round_into(out, x.clone(), torch.Generator().manual_seed(7))
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
    words.random_(-(2**63), None, generator=torch.Generator().manual_seed(7))
    random = words.numpy().view(np.uint16)[: x.numel()].astype(int)
    expected = [
        rounded_by_hand(value, (int(r) + 2**15) % 2**16) for value, r in zip(x.flatten().tolist(), random, strict=True)
    ]
    assert out.flatten().double().tolist() == expected


@pytest.mark.parametrize("x", [1.001, -1.001, 0.7, -3e-5, 1e-38, 2.9e20])
def test_rounding_is_to_a_neighbour_and_right_on_average(x: float):
    n = 100_000
    out = torch.empty(n, dtype=torch.bfloat16)
    round_into(out, torch.full((n,), x), torch.Generator().manual_seed(3))
    values = out.double().unique()
    assert len(values) == 2 and values[0] < x < values[1]
    gap = float(values[1] - values[0])
    assert gap < abs(x) / 100 and abs(float(out.double().mean()) - float(np.float32(x))) < 5 * gap / 2 / n**0.5


def test_what_bfloat16_holds_is_not_changed():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[:3] = torch.tensor([0.0, -0.0, 1.0])
    out = torch.empty_like(x)
    round_into(out, x.float(), torch.Generator().manual_seed(0))
    assert torch.equal(out.view(torch.int16), x.view(torch.int16))


def test_a_second_moment_decays_which_nearest_rounding_would_stop():
    p = nn.Parameter(torch.zeros(40, 50))
    optimizer = BFloat16Adam([p], 1e-3, BETAS)
    p.grad = torch.ones_like(p)
    optimizer.step()
    first = optimizer.state[p]["exp_avg_sq"].clone()
    nearest = first.clone()
    for _ in range(1000):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        nearest = (0.999 * nearest.float()).bfloat16()
    assert torch.equal(nearest, first)
    left = float(optimizer.state[p]["exp_avg_sq"].double().mean() / first.double().mean())
    assert left == pytest.approx(0.999**1000, rel=0.01)


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize("block", [1, 12, 1 << 18])
def test_steps_are_adams_with_rounded_moments(block: int, monkeypatch: pytest.MonkeyPatch):
    """In every step, from the same stored moments: the same parameters, and moments within their rounding."""
    monkeypatch.setitem(BLOCK, "cpu", block)
    params = parameters()
    optimizer = BFloat16Adam([{"params": [p], "lr": LR * (i + 1)} for i, p in enumerate(params)], LR, BETAS)
    for step in range(1, 12):
        before = [(p.detach().double(), optimizer.state[p]) for p in params]
        slow = []
        for (value, state), grad in zip(before, gradients(step), strict=True):
            m, v = (state[name].double() if state else torch.zeros_like(value) for name in MOMENTS)
            grad = grad.double() / 3
            slow.append((value, m + (1 - BETAS[0]) * (grad - m), BETAS[1] * v + (1 - BETAS[1]) * grad**2))
        stepped(optimizer, params, range(step, step + 1), divisor=3.0)
        for i, (p, (value, m, v)) in enumerate(zip(params, slow, strict=True)):
            change = LR * (i + 1) * (m / (1 - BETAS[0] ** step)) / ((v / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
            torch.testing.assert_close(p.detach().double(), value - change, rtol=1e-5, atol=1e-6)
            state = optimizer.state[p]
            assert float(state["step"]) == step
            for name, wanted in zip(MOMENTS, (m, v), strict=True):
                assert state[name].dtype == (torch.bfloat16 if p.ndim > 1 else torch.float32)
                torch.testing.assert_close(state[name].double(), wanted, rtol=2**-7, atol=1e-12)


def test_vectors_are_trained_as_by_adam():
    ours, theirs = parameters(), parameters()
    stepped(BFloat16Adam(ours, LR, BETAS), ours, range(20))
    stepped(Adam(theirs, LR, BETAS, fused=True), theirs, range(20))
    assert torch.equal(ours[1], theirs[1])
    assert not torch.equal(ours[0], theirs[0]) and torch.allclose(ours[0], theirs[0], atol=0.05 * 20 * LR)


def test_a_skipped_step_changes_nothing():
    params = parameters()
    optimizer = BFloat16Adam(params, LR, BETAS)
    stepped(optimizer, params, range(3))

    def state() -> list[Tensor]:
        return [x.clone() for p in params for x in (p.detach(), *optimizer.state[p].values())]

    before = state()
    for p in params:
        p.grad = torch.full_like(p, torch.nan)
    guarded_step(optimizer, torch.tensor(torch.nan), torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))


def test_the_bits_depend_on_the_seed_and_the_step_only():
    def after(seed: int, interrupted: bool = False) -> list[Tensor]:
        params = parameters()
        optimizer = BFloat16Adam(params, LR, BETAS, seed=(seed, 0))
        stepped(optimizer, params, range(4))
        if interrupted:
            state, steps = [optimizer.state[p] for p in params], optimizer.n_steps
            optimizer = BFloat16Adam(params, LR, BETAS, seed=(seed, 0))
            optimizer.n_steps = steps
            optimizer.state.update(dict(zip(params, state, strict=True)))
        stepped(optimizer, params, range(4, 8))
        return [p.detach() for p in params]

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    torch.rand(3)
    assert same(after(0), after(0)) and same(after(0), after(0, interrupted=True)) and not same(after(0), after(1))


@pytest.mark.gpu
def test_a_gpu_steps_as_a_cpu_but_for_the_bits():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    ours: dict[str, Any] = {}
    for device in ("cpu", "cuda"):
        params = [nn.Parameter(p.detach().to(device)) for p in parameters()]
        optimizer = BFloat16Adam(params, LR, BETAS)
        for step in range(20):
            for p, grad in zip(params, gradients(step), strict=True):
                p.grad = grad.to(device)
            guarded_step(optimizer, torch.tensor(2.0, device=device), torch.tensor(False, device=device))
        ours[device] = [p.detach().cpu() for p in params]
    torch.testing.assert_close(ours["cpu"][1], ours["cuda"][1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours["cpu"][0], ours["cuda"][0], rtol=0, atol=0.05 * 20 * LR)
