"""Time and memory (beyond its weights) of the analyses of a large crosscoder.

    python benchmarks/evolution.py [--shape 16384,8,512] [--tokens 4000]
    python benchmarks/evolution.py --device cuda --shape 98304,32,768 --only "evolve, whole"    # the papers' scale

The crosscoder is random, with F features, S snapshots and width D (`--shape F,S,D`) and about 32 active features per
token; the held-out activations are planted (`planted.PlantedTraps`). Every analysis runs in its own
process; memory is the kernel's peak minus what the process held before, and on a CUDA device the peak of what is
allocated there minus what was. The last row is everything that `cl.evolve` and
`Evolution.tables` do, births with their intervals and controls among it, and its whole memory; the line below says how
often it encoded the held-out tokens, what its time goes into, and its time over that of one encoding; and its memory
beside what `crosslens plan` forecasts for this shape. `--only` measures some of the rows.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from collections.abc import Callable
from typing import Any

import measure
import torch
from planted import PlantedTraps, Trap

import crosslens as cl
from crosslens.evolution.controls import encoder_share, latent_scaling
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.geometry import (
    decoder_cosines,
    feature_dimensionality,
    rotation_per_interval,
    total_dimensionality,
)
from crosslens.evolution.held_out import held_out_features
from crosslens.evolution.history import evolve
from crosslens.evolution.presence import plan_decodability
from crosslens.evolution.splitting import replacements, splits

L0 = 32
ENCODING, WHOLE = "encoding (one pass over held-out tokens)", "evolve, whole"


PARTS = {
    "counted": "encoding",
    "cholesky": "solves: Cholesky factors of D x D for R²",
    "cholesky_solve": "solves: their right-hand sides, of tokens or of features",
    "_solve": "solves: least squares of decoder rows on halves (conjugate gradients)",
    "_inverse": "solves: inverses of covariances",
    "solve": "solves: maps between snapshots",
    "_top": "products of tokens with all decoder rows for the agreement (F x D x tokens, as many as the encoding has)",
    "measure_decodability": "R², its solves included",
    "_dimensionality": "products of rows with their second moments (F x D x D, every snapshot, four kinds)",
    "compare": "CKA of pairs of snapshots",
    "_neighbours": "cosines of all pairs of decoder rows",
}
"""What most of the time goes into, by function."""


def planted(S: int, D: int, n: int) -> PlantedTraps:
    """n held-out activations, the same on every call."""
    return PlantedTraps(Trap(n_each=(D - 16) // 7, d_model=D, n_snapshots=S), n_held_out=n)


def make(acts: PlantedTraps, F: int) -> cl.crosscoders.Crosscoder:
    """Make a crosscoder with rows that rotate and vary in norm, and a bias that leaves about `L0` features active."""
    S, D = acts.n_snapshots, acts.d_model
    generator = torch.Generator().manual_seed(0)
    cc = cl.crosscoders.StandardCrosscoder(cl.crosscoders.StandardCrosscoderConfig(d_in=S * D, d_sae=F, n_snapshots=S))
    with torch.no_grad():
        first, last = (torch.randn(F, 1, D, generator=generator) for _ in range(2))
        way = torch.linspace(0, 1, S)[None, :, None]
        rows = torch.nn.functional.normalize(first * (1 - way) + last * way, dim=-1)
        cc.W_dec.copy_((rows * torch.rand(F, S, 1, generator=generator)).flatten(1))
        cc.W_enc.copy_(cc.W_dec.T)
        cc.activation_scale.copy_(D**0.5 / next(acts.held_out(4000)).norm(dim=-1).mean(0))
        sample = cc.scale(next(acts.held_out(1024))).flatten(1)
        h = sample @ cc.W_enc
        cc.b_enc.copy_(-h.quantile(1 - L0 / F, dim=0) if len(sample) * L0 >= F else -h.amax(0) * 0.9)
    return cc.requires_grad_(False)


def encode(crosscoder: Any, acts: Any) -> None:
    """Encode the held-out activations once, and keep nothing."""
    for _ in held_out_features(crosscoder, acts):
        pass


def whole(crosscoder: Any, acts: Any) -> None:
    """All analyses that need no task."""
    calls, encoded = crosscoder.encode, 0

    def counted(x: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        encoded += len(x)
        return calls(x)

    crosscoder.encode = counted
    profile = cProfile.Profile()
    profile.runcall(lambda: evolve(crosscoder, acts).tables())
    print(f"held-out tokens encoded {encoded / len(acts.held_out_tokens().flatten()):g} times", flush=True)
    times: dict[str, float] = {}
    for (_, _, name), (*_, seconds, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        short = name.strip("<>").split(" ")[-1].rpartition(".")[2].removeprefix("linalg_")
        times[short] = max(times.get(short, 0), seconds)
    for function, what in PARTS.items():
        print(f"  {what}: {times.get(function, 0):.1f} s", flush=True)
    solves = sum(times.get(function, 0) for function, what in PARTS.items() if what.startswith("solves"))
    encoding = times["counted"]
    whole = pstats.Stats(profile).total_tt  # type: ignore[attr-defined]
    print(
        f"encoding {encoding:.1f} s, solves {solves:.1f} s, the rest {whole - encoding - solves:.1f} s; "
        f"without solves {(whole - solves) / encoding:.1f} times the encoding",
        flush=True,
    )


# every function takes the crosscoder, and either activations, the result of `measure_firing`, or nothing else
ANALYSES: dict[str, tuple[Callable[..., Any], str]] = {
    ENCODING: (encode, "acts"),
    "firing": (measure_firing, "acts"),
    "evolution table": (evolve, "firing"),
    "dimensionality, per feature": (feature_dimensionality, "firing"),
    "dimensionality, total and of random directions": (total_dimensionality, "firing"),
    "rotation per interval": (rotation_per_interval, ""),
    "cosines between snapshots": (decoder_cosines, ""),
    "latent scaling": (latent_scaling, "acts"),
    "encoder share": (encoder_share, "acts"),
    "replacements": (replacements, "acts"),
    "splits": (splits, ""),
    WHOLE: (whole, "acts"),
}


def measure_one(name: str, shape: tuple[int, int, int], threads: int, n_tokens: int, device: str) -> dict[str, Any]:
    """Seconds of one analysis, and the peak minus the memory held before (None if the kernel has neither)."""
    torch.set_num_threads(threads)
    measure.return_freed_memory()
    F, S, D = shape
    acts = planted(S, D, n_tokens)
    cc = make(acts, F).to(device)
    function, wanted = ANALYSES[name]
    given = {"acts": lambda: [acts], "firing": lambda: [measure_firing(cc, acts)], "": list}[wanted]()
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = measure.reset_resident_peak()  # what making the crosscoder took does not count
        before = 0 if name == WHOLE and before is not None else before
    began = time.perf_counter()
    function(cc, *given)
    measure.synchronise(device)
    seconds = time.perf_counter() - began
    after = torch.cuda.max_memory_allocated() if on_gpu else measure.resident("VmHWM")
    memory = None if before is None or after is None else (after - before) / 1e6
    return {"analysis": name, "seconds": seconds, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="16384,8,512", help="F,S,D; %(default)s by default")
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--only", nargs="*", choices=ANALYSES, default=list(ANALYSES), help="rows; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-evolution-…")
    arguments = parser.parse_args()
    F, S, D = (int(size) for size in arguments.shape.split(","))
    rows: list[dict[str, Any]] = []
    for name in arguments.only:
        rows.append(
            measure.in_child(measure_one, name, (F, S, D), arguments.threads, arguments.tokens, arguments.device)
        )
        print(rows[-1], flush=True)
    found = {row["analysis"]: row for row in rows}
    if {WHOLE, ENCODING} <= found.keys():
        print(f"whole over one encoding: {found[WHOLE]['seconds'] / found[ENCODING]['seconds']:.1f}")
    if WHOLE in found:
        forecast, _ = plan_decodability(F, S, D, arguments.tokens)
        took = found[WHOLE]["memory"]
        # on the device weights are held before, and the process is elsewhere
        beside = 8e-6 * F * S * D if arguments.device.startswith("cuda") else 0
        more = "" if beside else " and the process"
        print(f"memory of the whole {took + beside:,.0f} MB, forecast {forecast / 1e6:,.0f} MB{more}")
    table = measure.markdown(
        rows,
        {
            "analysis": lambda row: row["analysis"],
            "seconds": measure.number("seconds", ".2f"),
            "memory beyond what was held before, MB": measure.number("memory", ".0f"),
        },
    )
    body = f"F = {F:,}, S = {S}, D = {D}; the two weight matrices take {8 * F * S * D / 1e6:,.0f} MB.\n\n{table}"
    if arguments.report:
        title = "Analyses of a large crosscoder"
        print(
            measure.write_report("evolution", title, body, arguments.device, arguments.threads, ("crosslens", "torch"))
        )


if __name__ == "__main__":
    main()
