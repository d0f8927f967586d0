"""At which fraction of active pairs dense products beat sums over pairs: the figures of `sparse.DENSE_ABOVE`.

Reconstruction and the gradients of all four parameters for one batch of Gaussian data at several densities (fractions
of active pairs), alternating between the two methods. CPU seconds on one thread, or wall seconds on a GPU. The last
line is the figure to enter: the median over the shapes of the density at which both take as long. On a GPU it depends
on the precision of the dense products.

    python benchmarks/density.py [--shape 3,256,4096,1024] [--densities .02,.05,.1,.2] [--rounds 5]
    python benchmarks/density.py --device cuda [--precision tf32]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from crosslens.crosscoders.kernels.sparse import Weights, reconstruct, squared_error
from crosslens.crosscoders.kernels.topk import pairs_above
from crosslens.distributed.devices import Precision

SHAPES = {
    "cpu": ("3,256,4096,1024", "8,128,4096,2048", "32,64,4096,1024"),
    "cuda": ("8,768,32768,4096", "3,2048,16384,4096", "32,512,16384,4096"),
}
DENSITIES = {"cpu": ".02,.05,.1,.15,.2,.3", "cuda": ".001,.002,.004,.008,.016,.032,.064"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="S,D,F,B; may be given several times")
    parser.add_argument("--densities", help=f"{DENSITIES['cpu']} on a CPU, {DENSITIES['cuda']} on a GPU by default")
    parser.add_argument("--precision", action="append", help="of the dense products; may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kind = torch.device(arguments.device).type
    for precision in arguments.precision or ["float32"]:
        found = measure(arguments, kind, precision)
        print(f'\nDENSE_ABOVE["{"cpu" if kind == "cpu" else precision}"] = {found:.4f}\n', flush=True)


def measure(arguments: argparse.Namespace, kind: str, precision: Precision) -> float:
    """Print the table of one precision, and return the density at which both ways take as long."""
    print(f"| S, D, F, B | density | pairs, ms | dense in {precision}, ms | dense / pairs (range) |")
    print("|---|---|---|---|---|")
    equal: list[float] = []
    for shape in arguments.shape or SHAPES[kind]:
        S, D, F, B = map(int, shape.split(","))
        measured: list[tuple[float, float]] = []
        for density in map(float, (arguments.densities or DENSITIES[kind]).split(",")):
            pairs, dense = both_ways(S * D, F, B, density, arguments.rounds, arguments.device, precision)
            ratios = sorted(b / a for a, b in zip(pairs, dense, strict=True))
            times = f"{statistics.median(pairs) * 1e3:.1f} | {statistics.median(dense) * 1e3:.1f}"
            spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
            print(f"| {shape} | {density:g} | {times} | {spread} |", flush=True)
            measured.append((density, statistics.median(ratios)))
        equal.append(crossing(measured))
    return statistics.median(equal)


def crossing(measured: list[tuple[float, float]]) -> float:
    """The density at which the ratio dense / pairs, which falls, is 1: linear in between, else the first or last."""
    for (below, high), (above, low) in itertools.pairwise(measured):
        if low <= 1:
            return below + (above - below) * max(0.0, high - 1) / max(high - low, 1e-9)
    return measured[-1][0]


def both_ways(
    N: int, F: int, B: int, density: float, rounds: int, device: str, precision: Precision
) -> tuple[list[float], list[float]]:
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
    memory = torch.empty(2, F, N) if device == "cpu" else None  # as the trainer gives it

    def seconds(on_pairs: bool) -> float:
        began = _now(device)
        acts = pairs_above(hidden_pre, zero) if on_pairs else hidden_pre.relu()
        x_hat, _, _ = reconstruct(x, acts, Weights(*parameters), precision=precision, memory=memory)
        torch.autograd.grad(squared_error(x_hat, x, memory), parameters)
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
