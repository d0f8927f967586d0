"""At which fraction of active pairs dense products beat sums over pairs: the constant `sparse.DENSE_ABOVE`.

Reconstruction and the gradients of all four parameters for one batch of Gaussian data at several densities (fractions
of active pairs), alternating between the two methods. CPU seconds on one thread, or wall seconds on a GPU.

    python benchmarks/density.py [--shape 3,256,4096,1024] [--densities .02,.05,.1,.2] [--rounds 5] [--device cpu]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from crosslens.crosscoders.kernels.sparse import Weights, reconstruct
from crosslens.crosscoders.kernels.topk import pairs_above


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="S,D,F,B; may be given several times")
    parser.add_argument("--densities", default=".02,.05,.1,.15,.2,.3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| S, D, F, B | density | pairs, ms | dense, ms | dense / pairs (range) |\n|---|---|---|---|---|")
    for shape in arguments.shape or ["3,256,4096,1024", "8,128,4096,2048", "32,64,4096,1024"]:
        S, D, F, B = map(int, shape.split(","))
        for density in map(float, arguments.densities.split(",")):
            pairs, dense = both_ways(S * D, F, B, density, arguments.rounds, arguments.device)
            ratios = sorted(b / a for a, b in zip(pairs, dense, strict=True))
            times = f"{statistics.median(pairs) * 1e3:.1f} | {statistics.median(dense) * 1e3:.1f}"
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            print(f"| {shape} | {density:.2f} | {times} | {spread} |", flush=True)


def both_ways(N: int, F: int, B: int, density: float, rounds: int, device: str) -> tuple[list[float], list[float]]:
    """Seconds of each round on pairs, and with dense products."""
    draw = torch.Generator(device).manual_seed(0)
    x = torch.randn(B, N, generator=draw, device=device)
    rows = torch.randn(F, N, generator=draw, device=device) / N**0.5
    parameters = [rows.T, torch.zeros(F, device=device), rows.clone(), torch.zeros(N, device=device)]
    for parameter in parameters:
        parameter.requires_grad_()
    hidden_pre = (x @ rows.T).detach()
    quantile = hidden_pre.flatten()[::31].float().quantile(1 - density)
    hidden_pre = hidden_pre - quantile
    zero = torch.zeros(F, device=device)

    def seconds(on_pairs: bool) -> float:
        began = _now(device)
        acts = pairs_above(hidden_pre, zero) if on_pairs else hidden_pre.relu()
        x_hat, _, _ = reconstruct(x, acts, Weights(*parameters))
        torch.autograd.grad(torch.nn.functional.mse_loss(x_hat, x), parameters)
        return _now(device) - began

    pairs: list[float] = []
    dense: list[float] = []
    for i in range(rounds + 1):
        took = seconds(True), seconds(False)
        if i:
            pairs.append(took[0])
            dense.append(took[1])
    return pairs, dense


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
