"""One training step (forward, backward, clipping, Adam, firing counts): crosslens against the others.

    python benchmarks/training_step.py                   # three shapes, against SAELens and dense autograd
    python benchmarks/training_step.py --peers --report  # against the peers from PyPI too; writes a report
    python benchmarks/training_step.py --shape 8,256,16384,2048 --kinds batchtopk --rounds 3
    python benchmarks/training_step.py --device cuda --kinds batchtopk,jumprelu
    python benchmarks/training_step.py --paper           # S=32, D=768, F=98304, and half, B=4096, on one large card

Round r runs every contestant of a kind once, in rotated order, in one process. Numbers are medians over the rounds;
ratios to crosslens are taken within a round, of CPU seconds with one thread and of wall seconds otherwise. Peak memory
is measured in a separate process.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import measure
import peers
import torch
from contestants import (
    Contestant,
    Crosslens,
    CrosslensBfloat16,
    CrosslensDelta,
    CrosslensPartition,
    CrosslensTF32,
    CrosslensTF32Moments,
    Dense,
    DenseTF32,
    Setting,
    mean_l0,
)
from torch import Tensor

from crosslens.distributed.devices import Precision

SHAPES = ((3, 256, 4096, 1024), (8, 128, 4096, 2048), (32, 64, 4096, 1024))
GPU_SHAPES = ((3, 768, 16_384, 4096), (8, 768, 32_768, 4096))  # at those above a GPU mostly waits for its next kernel
# parameters, gradients and moments take 77 GB at the paper's F, or 58 with moments in bfloat16; dense steps need more
# than cards of 80 GB have
PAPER = ((32, 768, 98_304, 4096), (32, 768, 49_152, 4096))
PACKAGES = ("crosslens", "torch", "sae-lens", "eai-sparsify", "dictionary-learning")
DATA_SEED = 1_000_003  # differs from the seed of the weights, which would equal the data
BATCHES = 3  # different batches, taken in turn
WARM_UP = 1  # rounds that are not counted: the first step allocates Adam's state

FROM_PYPI: tuple[type[Contestant], ...] = (peers.DictionaryLearning, peers.Sparsify)
TOPK = (Crosslens, Dense, peers.SAELens, peers.SAELensSparse, *FROM_PYPI)
KINDS: dict[str, tuple[str, tuple[type[Contestant], ...]]] = {
    "batchtopk": ("batchtopk", (Crosslens, Dense, peers.SAELens, *FROM_PYPI)),
    "batchtopk-aux": ("batchtopk", (Crosslens, Dense, peers.SAELens, *FROM_PYPI)),
    "batchtopk-partition": ("batchtopk", (Crosslens, CrosslensPartition, CrosslensDelta)),
    "topk": ("topk", TOPK),
    "topk-aux": ("topk", TOPK),
    "jumprelu": ("jumprelu", (Crosslens, Dense, peers.SAELens, peers.DictionaryLearning)),
    "jumprelu-first": ("jumprelu", (Crosslens, Dense)),
    "standard": ("standard", (Crosslens, Dense, peers.SAELens)),
}
PRECISIONS: dict[str, tuple[type[Contestant], ...]] = {
    "bfloat16": (CrosslensBfloat16,),
    "tf32": (CrosslensTF32, DenseTF32, peers.SAELensTF32),
    "tf32, bfloat16 moments": (CrosslensTF32Moments,),
}
PRODUCT = "encoder product, "  # and its precision

NOTES = """
Data are Gaussian with mean zero and unit variance, the same batches for all: the cost of dense code does not depend on
them, and for sparse code they spread the active pairs evenly over the features. The learning rate is small, so that L0
does not change.

- *encoder product*: the library's `x @ W_enc`, (B, S·D) by (S·D, F), in the precision of the row, into a reused buffer;
  given as the product's time divided by the step's.
- *-aux*: {dead:.0%} of the features, a fixed random set, are dead: their encoder vectors are a tenth as long, so that
  they are never selected, and their counters are set before every step. Half of their pre-activations stay positive,
  so the auxiliary loss has its full number of pairs. crosslens reconstructs the residual from min(D/2, dead) features
  of a token; SAELens, dictionary-learning and sparsify from min(S·D/2, dead).
- *-partition*: half of the features shared, an eighth dedicated to the last snapshot; and the loss of the changes
  between snapshots.
- *jumprelu*: as after training, set to L0 = k. On the demo's activations, 300 steps from the start, thresholds had
  their initial value (.10), pre-activations mostly negative, norms .8 to 1.6 times the initial ones, and 5 % of the
  (token, feature, snapshot) triples in the window of the straight-through gradient; so thresholds stay at .1, norms
  get factors of .5 to 1.6, and gain and biases of the encoder are set for the L0 and {window:.0%} of the pairs in the
  window. *jumprelu-first*: a fresh initialisation, decoder norm searched. SAELens and dictionary-learning have other
  JumpReLU losses, with one gate per feature and narrow windows.
- *crosslens, bfloat16* (tf32): all large products in that precision, which changes the result; *dense, tf32*: the dense
  reference with PyTorch's switch for the whole process.
- *saelens, sparse activations*: without its rescaling by decoder norms, for which sparse tensors have no backward.
- *step MB*: peak resident memory of a step above parameters and moments (gradients, activations, temporaries; the
  kernel's high-water mark, with an allocator that returns freed memory; on CUDA the allocator's peak). The memory for
  gradients, which crosslens keeps between steps on a CPU, counts. *tensors MB*: the same
  from the tensors alive at each operation, which is deterministic but does not see inside kernels. *resting MB*:
  parameters and Adam's moments. *(B,F) floats*: most floating-point tensors of that shape alive at once. *(B,S,F)*:
  tensors of that size allocated in a step.
"""


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device; use --device cpu")
    absent = peers.missing() if args.peers else dict.fromkeys(peers.PACKAGES, "")
    if args.peers and absent:
        print(*absent.values(), sep="\n", file=sys.stderr)
    rows: list[dict[str, Any]] = []
    for shape in args.shape:
        for kind in args.kinds:
            classes = [c for c in KINDS[kind][1] if c.name not in absent]
            classes[1:1] = [contestant for precision in args.precision for contestant in PRECISIONS[precision]]
            rows += measure_kind(kind, classes, shape, args)
            if args.json:
                print(*map(json.dumps, rows[-len(classes) :]), sep="\n", flush=True)
            print(f"{shape} {kind}: measured", file=sys.stderr)
    table = measure.markdown(rows, COLUMNS)
    if not args.json:
        print(table)
    if args.report:
        body = f"{table}\n{NOTES.format(dead=args.dead, window=args.window)}"
        path = measure.write_report("training-step", "Training step", body, args.device, args.threads, PACKAGES)
        print(path, file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", type=shape_of, help="S,D,F,B; may be given several times")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--peers", action="store_true", help="also the peers from PyPI that are installed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--k", type=int, default=48, help="features per token, and JumpReLU's L0")
    parser.add_argument("--l1-l0", type=int, default=300, help="L0 of the standard crosscoder")
    parser.add_argument("--dead", type=float, default=0.1, help="fraction of dead features in the -aux kinds")
    parser.add_argument("--window", type=float, default=0.06, help="fraction of pairs in JumpReLU's window")
    parser.add_argument(
        "--precision",
        action="append",
        choices=list(PRECISIONS),
        default=[],
        help="crosslens in it, too; may be given several times",
    )
    parser.add_argument("--device", help="CUDA with --paper, else the CPU")
    parser.add_argument("--paper", action="store_true", help="paper scale, one contestant in memory at a time")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="do not measure peak memory")
    parser.add_argument("--json", action="store_true", help="one line per row instead of the table")
    parser.add_argument("--report", action="store_true", help="write a dated file under benchmarks/reports")
    args = parser.parse_args()
    unknown = set(args.kinds) - set(KINDS)
    if unknown:
        parser.error(f"--kinds {','.join(sorted(unknown))} unknown; there are {', '.join(KINDS)}")
    args.device = args.device or ("cuda" if args.paper else "cpu")
    if args.paper:
        args.kinds = [kind for kind in args.kinds if kind in ("batchtopk", "jumprelu", "jumprelu-first")]
    args.shape = args.shape or list(PAPER if args.paper else GPU_SHAPES if args.device != "cpu" else SHAPES)
    for shape in args.shape:
        if "jumprelu" in args.kinds and args.window <= args.k / shape[2]:
            parser.error(f"--window {args.window} must be above k / F = {args.k / shape[2]:.3f}: open pairs lie in it")
    return args


def shape_of(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split(","))
    if len(numbers) != 4:
        raise argparse.ArgumentTypeError(f"{text!r} is not S,D,F,B")
    return numbers


# ---------------------------------------------------------------------- one kind at one shape
def measure_kind(
    kind: str, classes: list[type[Contestant]], shape: tuple[int, ...], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per contestant."""
    on_cpu = args.device == "cpu"
    timings, facts = (measure.in_child if on_cpu else here)(time_kind, kind, classes, shape, args)
    if args.memory and on_cpu:
        for contestant in classes:
            facts[contestant.name] |= measure.in_child(memory_of, contestant, kind, shape, args)
    precisions = {contestant.name: contestant.precision for contestant in classes}
    return [figures(name, kind, shape, args, timings, facts[name], precisions[name]) for name in facts]


def time_kind(
    kind: str, classes: list[type[Contestant]], shape: tuple[int, ...], args: argparse.Namespace
) -> tuple[dict[str, list[measure.Seconds]], dict[str, dict[str, Any]]]:
    """Seconds of every round, and other facts about the contestants, by name."""
    torch.set_num_threads(args.threads)
    data = batches(shape, args.device)
    timings: dict[str, list[measure.Seconds]] = {}
    facts: dict[str, dict[str, Any]] = {}
    products = encoder_products(data[0].flatten(1), shape[2], {contestant.precision for contestant in classes})
    if args.paper:
        timings |= measure.alternate(products, args.rounds, WARM_UP, args.device)
        products = {}
        empty_cache(args.device)
        groups = [[contestant] for contestant in classes]
    else:
        groups = [classes]
    for group in groups:
        try:
            steppers = {c.name: Stepper(c, kind, shape, args, data) for c in group}
            timings |= measure.alternate({**products, **steppers}, args.rounds, WARM_UP, args.device)
            for name, stepper in steppers.items():
                facts[name] = stepper.facts()
                if args.memory and args.device != "cpu":
                    facts[name] |= measure.step_memory(stepper.whole, shape, args.device)
        except torch.OutOfMemoryError:
            facts |= {contestant.name: {"failed": "out of memory"} for contestant in group}
        steppers = {}
        gc.collect()
        empty_cache(args.device)
    return timings, facts


def memory_of(
    contestant: type[Contestant], kind: str, shape: tuple[int, ...], args: argparse.Namespace
) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    measure.return_freed_memory()
    stepper = Stepper(contestant, kind, shape, args, batches(shape, args.device))
    for _ in range(WARM_UP):
        stepper.whole()
    found = measure.step_memory(stepper.whole, shape, args.device)
    kept = stepper.contestant.kept_bytes / 1e6
    return {**found, "tensors_mb": found["tensors_mb"] + kept, "step_mb": found["step_mb"] and found["step_mb"] + kept}


class Stepper:
    """A contestant set up for its kind, with its batches."""

    def __init__(
        self,
        contestant: type[Contestant],
        kind: str,
        shape: tuple[int, ...],
        args: argparse.Namespace,
        data: list[Tensor],
    ) -> None:
        S, D, F, B = shape
        architecture = KINDS[kind][0]
        k = args.l1_l0 if architecture == "standard" else args.k
        self.contestant = contestant(Setting(architecture, S, D, F, B, k=k, device=args.device))
        self.batches = [x.flatten(1) if contestant.flat else x for x in data]
        if isinstance(self.contestant, Crosslens) and kind == "jumprelu":
            self.contestant.set_gates(self.batches[0], args.window)
        elif kind != "jumprelu-first":
            self.contestant.set_l0(self.batches[0])
        self.dead = dead_features(F, args) if kind.endswith("-aux") else None
        if self.dead is not None:
            self.contestant.silence(self.dead)
        self.n_steps = 0

    def before(self) -> None:
        if self.dead is not None:
            self.contestant.mark_dead(self.dead)

    def __call__(self) -> Any:
        self.n_steps += 1
        return self.contestant.step(self.batches[self.n_steps % BATCHES])

    def whole(self) -> None:
        self.before()
        self()

    def facts(self) -> dict[str, Any]:
        """L0 of one more step, the fraction of gates open and in the window, and the memory held between steps."""
        self.before()
        output = self()
        facts: dict[str, Any] = {"l0": None}
        if isinstance(self.contestant, Crosslens):
            facts["l0"] = int(self.contestant.trainer.n_active) / len(self.batches[0])
        elif hasattr(output, "feature_acts"):
            facts["l0"] = mean_l0(output)
        if isinstance(self.contestant, Crosslens) and self.contestant.setting.architecture == "jumprelu":
            facts |= self.contestant.gate_fractions(self.batches[0])
        parameters = sum(p.numel() * p.element_size() for p in self.contestant.module.parameters())
        return {**facts, "resting_mb": 3 * parameters / 1e6}


def batches(shape: tuple[int, ...], device: str) -> list[Tensor]:
    S, D, _, B = shape
    random = torch.Generator(device).manual_seed(DATA_SEED)
    return [torch.randn(B, S, D, device=device, generator=random) for _ in range(BATCHES)]


def dead_features(F: int, args: argparse.Namespace) -> Tensor:
    chosen = torch.randperm(F, generator=torch.Generator().manual_seed(DATA_SEED))[: round(args.dead * F)]
    return torch.zeros(F, dtype=torch.bool).index_fill(0, chosen, True).to(args.device)


def encoder_products(x: Tensor, F: int, precisions: set[Precision]) -> dict[str, Callable[[], Any]]:
    """The one dense product that every step needs, by the library, in each precision."""
    W_enc = torch.randn(x.shape[1], F, device=x.device)
    out = torch.empty(len(x), F, device=x.device)
    products: dict[str, Callable[[], Any]] = {
        "float32": partial(torch.mm, x, W_enc, out=out),
        "tf32": partial(measure.with_tf32, torch.mm, x, W_enc, out=out),
    }
    if "bfloat16" in precisions:
        products["bfloat16"] = partial(torch.mm, x.bfloat16(), W_enc.bfloat16(), out=out.bfloat16())
    return {PRODUCT + precision: products[precision] for precision in sorted(precisions)}


def empty_cache(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


# ---------------------------------------------------------------------- rows and the table
def figures(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    args: argparse.Namespace,
    timings: dict[str, list[measure.Seconds]],
    facts: dict[str, Any],
    precision: Precision,
) -> dict[str, Any]:
    """All measurements of one contestant; ratios use the kind of seconds named in `clock`."""
    clock = "cpu" if args.device == "cpu" and args.threads == 1 else "wall"
    result: dict[str, Any] = {
        "benchmark": "training_step",
        "date": datetime.date.today().isoformat(),
        "device": args.device,
        "threads": args.threads,
        "shape": list(shape),
        "kind": kind,
        "name": name,
        "clock": clock,
        **facts,
    }
    if name not in timings:
        return result
    seconds = {key: [getattr(s, clock) for s in values] for key, values in timings.items()}
    own = seconds[name]
    result["cpu_ms"] = 1e3 * statistics.median(s.cpu for s in timings[name])
    result["wall_ms"] = 1e3 * statistics.median(s.wall for s in timings[name])
    result["tokens_per_s"] = shape[3] / statistics.median(own)
    product = seconds[PRODUCT + precision]
    result["encoder_fraction"] = statistics.median(a / b for a, b in zip(product, own, strict=True))
    if Crosslens.name in seconds:
        ratios = [a / b for a, b in zip(own, seconds[Crosslens.name], strict=True)]
        result |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
    return result


def ratio(r: Mapping[str, Any]) -> str:
    if "ratio" not in r:
        return r.get("failed", "-")
    return "1" if r["name"] == Crosslens.name else f"{r['ratio']:.2f} ({r['ratio_low']:.2f}-{r['ratio_high']:.2f})"


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "S,D,F,B": lambda r: ",".join(map(str, r["shape"])),
    "kind": lambda r: r["kind"],
    "trainer": lambda r: r["name"],
    "CPU ms": measure.number("cpu_ms", ".0f"),
    "wall ms": measure.number("wall_ms", ".0f"),
    "tokens/s": measure.number("tokens_per_s", ".0f"),
    "time / crosslens": ratio,
    "encoder product": measure.number("encoder_fraction", ".0%"),
    "step MB": measure.number("step_mb", ".0f"),
    "tensors MB": measure.number("tensors_mb", ".0f"),
    "resting MB": measure.number("resting_mb", ".0f"),
    "(B,F) floats": measure.number("peak_bf", "d"),
    "(B,S,F)": measure.number("n_bsf", "d"),
    "L0": measure.number("l0", ".0f"),
    "open": measure.number("open_fraction", ".1%"),
    "window": measure.number("window_fraction", ".1%"),
}


if __name__ == "__main__":
    main()
