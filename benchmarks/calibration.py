"""How far relative effects, classes and intervals of features are right, on effects of known size.

Effects on 60 prompts of 400 features, half of which have none. The others act over S snapshots as one profile says:
from the middle on (step), at the last (last), at all (flat), until the middle (falling), at a middle one (transient),
or rising linearly to the last one, from 0 at a snapshot drawn in the first half (ramp) or at the first (slow ramp), or
from up to .6 of the largest effect at the first (raised ramp). The largest effect of a feature is some standard errors
(z), its sign is drawn, and noise is normal, alone or shared by the snapshots of a prompt. Significance is that of
`crosslens.causal.significant`.

1. Per profile, S and z: features that have a class; of all, those with the class of their true profile, by RelIE of
   significant effects (the package's), by all effects (version 0.2), with the noise's part subtracted, after
   empirical-Bayes shrinkage (Stephens 2017, Biostatistics 18, 275: a point mass at 0 and normals of many widths,
   effects with a posterior probability of 0 above .5 cut), with neighbours of significant effects let in one by
   one (`extended`) or pooled (`pooled`), and with the share of nulls estimated (Storey, Taylor and Siegmund 2004, JRSS
   B 66, 187) among features, among features and the snapshots of each, and so with lambda by their bootstrap instead
   of .5; mean |RelIE - truth|; coverage of the 95 % interval, over all snapshots and over those at which the feature
   acts, and its mean width there; features without effects that have a class, as the package selects, with these
   estimates, and by Benjamini-Hochberg over all features and snapshots at once.
2. For ramps, whose centre of mass lies near the boundary of two classes: the share that readings get right which know
   more than any reading of data can, and the error of centres of mass; the share right by distance of the true centre
   of mass from the boundary, and by the class that was read.
3. The same as 1 of share RelIE, with all profiles in one set of features.
4. Prompts of G groups with an effect of their own: rate of p <= .05 and of significant features where answers are
   swapped at random, a prompt or a group at a time, and coverage of the interval of an effect; over groups, and as if
   prompts were independent.

    python benchmarks/calibration.py [--snapshots 2,3,9,32] [--z 4,6,12] [--draws 3] [--correlation 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from crosslens.causal.attribution import Bootstrap, clustered_error
from crosslens.causal.relative import (
    FDR,
    centre_of_mass,
    classes,
    effect_interval,
    relie,
    relie_interval,
    share_relie,
    shares,
    significant,
)
from crosslens.stats import q_values, resample_counts, sign_flip_p

PROFILES = ("step", "last", "flat", "falling", "transient", "ramp", "slow ramp", "raised ramp")
RAMPS = PROFILES[5:]
F, N = 400, 60
# of the centre of mass from .7, the boundary of `classes` between maintained and emerged
DISTANCES = (-np.inf, -0.1, -0.03, 0.0, 0.03, np.inf)


@dataclass
class Effects:
    """What `crosslens.causal.relative` reads, from effects `x` (N, F, S) of prompts in groups."""

    x: np.ndarray
    group: np.ndarray
    replicates: int = 200
    bootstrap: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        n, features, S = self.x.shape
        self.n_groups = int(self.group.max()) + 1
        self.labels = [str(s) for s in range(S)]
        self.active = torch.ones(features, S, dtype=torch.bool)
        sums = np.zeros((self.n_groups, features, S))
        np.add.at(sums, self.group, self.x)
        sizes = np.bincount(self.group).astype(float)
        self.effects = torch.from_numpy(sums.sum(0) / n)
        self.standard_errors = clustered_error(torch.from_numpy(sums), torch.from_numpy(sizes))
        self.p = torch.from_numpy(sign_flip_p(sums.sum(0), (sums**2).sum(0)))
        if self.replicates:
            counts = resample_counts(self.n_groups, self.replicates, 0)
            drawn = np.tensordot(counts, sums, 1) / (counts @ sizes)[:, None, None]
            self.bootstrap = Bootstrap(torch.arange(features), torch.from_numpy(drawn), torch.zeros(1, 1))


def course(profile: str, S: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Size of the effects (n, S) of n features, at most 1."""
    s = np.arange(S)
    start = rng.integers(0, max(1, S // 2), n)[:, None] if profile == "ramp" else np.zeros((n, 1))
    floor = rng.uniform(0, 0.6, n)[:, None] if profile == "raised ramp" else np.zeros((n, 1))
    one = {
        "step": s >= S - max(1, S // 2),
        "last": s == S - 1,
        "flat": s >= 0,
        "falling": s < max(1, S // 2),
        "transient": s == S // 2,
        "ramp": np.clip((s - start) / (S - 1 - start), 0, 1),
        "slow ramp": s / (S - 1),
        "raised ramp": floor + (1 - floor) * s / (S - 1),
    }[profile]
    return np.broadcast_to(one, (n, S)).astype(float)


def simulate(
    profiles: list[str], S: int, z: float, correlation: float, rng: np.random.Generator
) -> tuple[np.ndarray, Effects]:
    """True effects (F, S), and effects on prompts; the first half of the features have effects."""
    each = np.concatenate([course(name, S, F // 2 // len(profiles), rng) for name in profiles])
    mean = np.zeros((F, S))
    mean[: len(each)] = each * z / N**0.5 * rng.choice([-1, 1], len(each))[:, None]
    noise = correlation**0.5 * rng.normal(size=(N, F, 1)) + (1 - correlation) ** 0.5 * rng.normal(size=(N, F, S))
    return mean, Effects(mean + noise, np.arange(N))


def shrunk(effects: Effects) -> Tensor:
    """Sizes of effects after shrinkage to a mixture that all of them share, fitted by expectation-maximisation."""
    b, se = effects.effects.numpy().ravel(), effects.standard_errors.numpy().ravel()
    widths = np.concatenate([[0.0], np.median(se) / 4 * 2 ** np.arange(0, np.log2(8 * np.abs(b / se).max()), 0.5)])
    likelihood = norm.pdf(b[:, None], 0, np.hypot(se[:, None], widths))
    weights = np.full(len(widths), 1 / len(widths))
    posterior = likelihood
    for _ in range(100):
        posterior = likelihood * weights
        posterior /= posterior.sum(1, keepdims=True)
        weights = posterior.mean(0)
    kept = widths**2 / (widths**2 + se[:, None] ** 2)
    mean = np.where(posterior[:, 0] <= 0.5, (posterior * kept).sum(1) * b, 0.0)
    return torch.from_numpy(np.abs(mean).reshape(effects.effects.shape))


def extended(effects: Effects, least: float = 1.64, run: int = 3) -> Tensor:
    """Sizes where runs of three significant effects go on at neighbours of their sign above 1.64 standard errors."""
    z, counts = (effects.effects / effects.standard_errors).numpy(), significant(effects).numpy()
    kept = counts.copy()
    for order in (slice(None), slice(None, None, -1)):
        now, there, length, goes_on = kept[:, order], z[:, order], np.zeros(len(z)), np.zeros(len(z), dtype=bool)
        for s in range(1, z.shape[1]):
            length = np.where(counts[:, order][:, s - 1], length + 1, 0)
            goes_on = (goes_on | (length >= run)) & (there[:, s] * there[:, s - 1] > 0) & (np.abs(there[:, s]) > least)
            now[:, s] |= goes_on  # a view: `kept` changes
    return torch.where(torch.from_numpy(kept), effects.effects.abs(), 0.0)


def pooled(effects: Effects, level: float = 0.01) -> Tensor:
    """Sizes where runs of effects that are not significant, next to one that is, enter with their mean.

    Of windows of 2, 4, 8, 16 effects and the whole run, the one with the largest sum relative to its error is tested,
    corrected for their number and that of runs.
    """
    y, counts = effects.effects.numpy(), significant(effects).numpy()
    sizes, S = np.where(counts, np.abs(y), 0.0), y.shape[1]
    for i in np.flatnonzero(counts.any(1)):
        ends = np.flatnonzero(np.diff(np.concatenate([[1], counts[i], [1]])) != 0).reshape(-1, 2)
        runs = [list(range(a, b))[::-1] for a, b in ends if b < S] + [list(range(a, b)) for a, b in ends if a > 0]
        for run in runs:
            sign = np.sign(y[i, run[0] - 1 if run[0] and counts[i, run[0] - 1] else run[0] + 1])
            windows = [run[:n] for n in {2, 4, 8, 16, len(run)} if n <= len(run)]
            found = [
                (sign_flip_p(v.sum(), (v**2).sum()), w)
                for w in windows
                if (v := effects.x[:, i, w].sum(1)).sum() * sign > 0
            ]
            if found:
                p, window = min(found, key=lambda each: float(each[0]))
                if p * len(windows) * len(runs) <= level:
                    sizes[i, window] = np.maximum(sizes[i, window], abs(y[i, window].mean()))
    return torch.from_numpy(sizes)


def share_of_nulls(p: np.ndarray, bootstrap: bool) -> float:
    """Storey's estimate, for lambda = .5 or that with the least mean squared error by the bootstrap, in closed form."""
    levels = np.arange(0.05, 0.96, 0.05) if bootstrap else np.array([0.5])
    above = (p[:, None] > levels).sum(0)
    found = (1 + above) / (len(p) * (1 - levels))
    if bootstrap:
        variance = above / (len(p) * (1 - levels)) ** 2 * (1 - above / len(p))
        found = found[(variance + (found - np.quantile(found, 0.1)) ** 2).argmin()]
    return float(np.minimum(found, 1.0).squeeze())


def storey(effects: Effects, snapshots: bool = False, bootstrap: bool = False) -> Tensor:
    """Which effects count if the share of nulls is estimated among features, and among the snapshots of each."""
    p = effects.p.numpy()
    q = np.stack([q_values(row) for row in p])
    simes = q.min(1)
    nulls = share_of_nulls(simes, bootstrap)
    selected = q_values(simes) * nulls <= FDR
    within = min(FDR, FDR * selected.mean() / nulls)
    if snapshots:
        q = q * np.array([share_of_nulls(row, bootstrap) for row in p])[:, None]
    return torch.from_numpy(selected[:, None] & (q <= within))


STOREY: dict[str, Callable[[Effects], Tensor]] = {
    "Storey, features": storey,
    "Storey, both": partial(storey, snapshots=True),
    "Storey, bootstrap": partial(storey, snapshots=True, bootstrap=True),
}


def knows_ramps(effects: Effects, S: int, z: float, correlation: float) -> np.ndarray:
    """Most probable class of every feature, given that it is a ramp of this size that starts in the first half."""
    s, starts = np.arange(S), np.arange(max(1, S // 2))[:, None]
    ramps = np.clip((s - starts) / (S - 1 - starts), 0, 1)
    precision = np.linalg.inv((correlation + (1 - correlation) * np.eye(S)) / N)
    y = effects.effects.numpy()
    fit = np.stack([((d := y[:, None] - sign * ramps * z / N**0.5) @ precision * d).sum(-1) for sign in (-1, 1)]).min(0)
    weight, names = np.exp(-(fit - fit.min(1, keepdims=True)) / 2), classes(shares(torch.from_numpy(ramps)))
    kinds = sorted(set(names))
    return np.array(kinds, dtype=object)[np.stack([weight[:, names == kind].sum(1) for kind in kinds]).argmax(0)]


def judge(mean: np.ndarray, effects: Effects, share: bool) -> dict[str, np.ndarray]:
    """Figures of the features that have effects, a value each; NaN where a figure is not defined."""
    size = np.abs(mean)
    if share:
        size = size / np.maximum(size.sum(0), 1e-12)
    acts = torch.from_numpy(mean).abs().sum(1) > 0
    truth = shares(torch.from_numpy(size))[acts]
    expected = classes(truth)
    found = (share_relie if share else relie)(effects)[acts]
    low, high = (end[acts] for end in relie_interval(effects, share=share))
    kept = ~found.isnan().any(-1)
    right_sign = torch.from_numpy(np.sign(mean))[acts] * effects.effects.sign()[acts]
    covered = ((low - 1e-9 <= truth * right_sign) & (truth * right_sign <= high + 1e-9)).double()
    where = (truth > 0).double()
    figures = {
        "kept": kept,
        "right": torch.from_numpy(classes(found) == expected),
        "error": (found - truth).abs().mean(-1).masked_fill(~kept, torch.nan),
        "coverage": covered.mean(-1).masked_fill(~kept, torch.nan),
        "acting": ((covered * where).sum(-1) / where.sum(-1)).masked_fill(~kept, torch.nan),
        "width": (((high - low) * where).sum(-1) / where.sum(-1)).masked_fill(~kept, torch.nan),
    }
    if not share:
        sizes, error = effects.effects.abs(), effects.standard_errors
        least = (sizes**2 - error**2).clamp_min(0).sqrt()
        any_effect = kept[:, None]
        for name, values in (("all", sizes), ("less noise", least)):
            figures[name] = torch.from_numpy(classes(shares(values)[acts].where(any_effect, torch.nan)) == expected)
        tried = {"shrunk": shrunk(effects), "extended": extended(effects), "pooled": pooled(effects)}
        tried |= {name: torch.where(rule(effects), sizes, 0.0) for name, rule in STOREY.items()}
        for name, found in tried.items():
            figures[name] = torch.from_numpy(classes(shares(found)[acts]) == expected)
    return {name: values.double().numpy() for name, values in figures.items()}


def false_classes(mean: np.ndarray, effects: Effects) -> dict[str, float]:
    """Share of the features without effects that have a class, by way of selecting effects."""
    null = torch.from_numpy(np.abs(mean).sum(1) == 0)
    counts = {"as the package selects": significant(effects)} | {name: rule(effects) for name, rule in STOREY.items()}
    counts["by one correction for all effects"] = torch.from_numpy(q_values(effects.p.numpy()) <= FDR)
    return {name: float(each[null].any(1).double().mean()) for name, each in counts.items()}


def print_profiles(arguments: argparse.Namespace) -> None:
    rules = ("all", "less noise", "shrunk", "extended", "pooled", *STOREY)
    print(f"| S | profile | z | classed | right | {' | '.join(rules)} | error | coverage | where it acts | width |")
    print("|" + "---|" * (9 + len(rules)))
    worst: dict[str, list[tuple[float, str]]] = {}
    rates: dict[tuple[int, str], list[dict[str, float]]] = {}
    for S in arguments.snapshots:
        for profile in PROFILES:
            if S < 3 and profile in ("transient", *RAMPS):
                continue
            for z in arguments.z:
                found: list[dict[str, np.ndarray]] = []
                for mean, effects in draws(arguments, S, profile, z):
                    found.append(judge(mean, effects, False))
                    rates.setdefault((S, profile), []).append(false_classes(mean, effects))
                mid = {name: float(np.nanmean(np.concatenate([each[name] for each in found]))) for name in found[0]}
                columns = ("kept", "right", *rules, "error", "coverage", "acting", "width")
                print(f"| {S} | {profile} | {z:g} | " + " | ".join(f"{mid[name]:.3f}" for name in columns) + " |")
                where = f"S = {S}, {profile}, z = {z:g}"
                if z >= 6:
                    kind = profile if profile in RAMPS else "others"
                    worst.setdefault(f"classes right, {kind}, z >= 6", []).append((mid["right"], where))
                worst.setdefault("coverage", []).append((mid["coverage"], where))
                worst.setdefault("coverage where it acts", []).append((mid["acting"], where))
    print()
    for name, values in worst.items():
        print(f"least {name}: {min(values)[0]:.3f} ({min(values)[1]})")
    for name in next(iter(rates.values()))[0]:
        means = {key: float(np.mean([each[name] for each in values])) for key, values in rates.items()}
        key = max(means, key=lambda each: means[each])
        print(f"most false classes of features without effects, {name}: {means[key]:.3f} (S = {key[0]}, {key[1]})")


def draws(arguments: argparse.Namespace, S: int, profile: str, z: float) -> Iterator[tuple[np.ndarray, Effects]]:
    """The effects of one profile, draw by draw."""
    for seed in range(arguments.draws):
        rng = np.random.default_rng([S, PROFILES.index(profile), int(z), seed])
        yield simulate([profile], S, z, arguments.correlation, rng)


def print_limits(arguments: argparse.Namespace) -> None:
    """Ramps, read by what no data tell."""
    print(
        "\nRamps: classes right by significant effects; where it is known which effects are 0; by all effects with "
        "their known sign; where profile and size are known. "
        "Then the mean error of the centre of mass, and its mean absolute error, by significant effects and the rules."
    )
    columns = "right | known zeros | known sign | known ramps"
    columns += " | bias | error | extended, bias | error | pooled, bias | error"
    print(f"| S | profile | z | {columns} |\n{'|---' * 13}|")
    for S in (each for each in arguments.snapshots if each > 2):
        for profile in RAMPS:
            for z in arguments.z:
                found = [
                    limits(mean, effects, z, arguments.correlation, profile == "ramp")
                    for mean, effects in draws(arguments, S, profile, z)
                ]
                print(f"| {S} | {profile} | {z:g} | " + " | ".join(f"{v:.3f}" for v in np.mean(found, 0)) + " |")


def limits(mean: np.ndarray, effects: Effects, z: float, correlation: float, drawn: bool) -> list[float]:
    """The figures of `print_limits`."""
    true = torch.from_numpy(mean)
    acts = true.abs().sum(1) > 0
    truth = shares(true.abs())[acts]
    centre, expected, S = centre_of_mass(truth), classes(truth), true.shape[1]
    package = torch.where(significant(effects), effects.effects.abs(), 0.0)
    zeros = torch.where(true != 0, effects.effects.abs(), 0.0)
    signed = effects.effects[acts] * true[acts].sum(1, keepdim=True).sign()
    low_high = np.digitize(centre_of_mass(shares(signed)), (0.3, 0.7)) == np.digitize(centre, (0.3, 0.7))
    known = knows_ramps(effects, S, z, correlation)[acts.numpy()] == expected if drawn else np.nan
    row = [(classes(shares(sizes)[acts]) == expected).mean() for sizes in (package, zeros)]
    row += [low_high.mean(), np.mean(known)]
    for sizes in (package, extended(effects), pooled(effects)):
        off = centre_of_mass(shares(sizes)[acts]) - centre
        row += [float(off.nanmean()), float(off.abs().nanmean())]
    return [float(value) for value in row]


def print_distances(arguments: argparse.Namespace) -> None:
    """How far a class of a ramp can be trusted, by significant effects."""
    print(
        "\nRamps: share of classes right, by distance of the true centre of mass from .7, the boundary of maintained "
        "and emerged (features); of those read as each class; how late the centre is read, where 95 % are."
    )
    ends = [f"{low:g} to {high:g}" for low, high in pairwise(DISTANCES[1:-1])]
    bins = " | ".join([f"below {DISTANCES[1]:g}", *ends, f"above {DISTANCES[-2]:g}"])
    print(f"| S | profile | z | {bins} | read maintained | read emerged | late by |\n{'|---' * (5 + len(DISTANCES))}|")
    for S in (each for each in arguments.snapshots if each > 2):
        for profile in RAMPS:
            for z in arguments.z:
                parts: list[tuple[np.ndarray, ...]] = []
                for mean, effects in draws(arguments, S, profile, z):
                    acts = torch.from_numpy(np.abs(mean).sum(1) > 0)
                    truth, read = shares(torch.from_numpy(np.abs(mean)))[acts], relie(effects)[acts]
                    late = centre_of_mass(read) - centre_of_mass(truth)
                    parts.append((centre_of_mass(truth).numpy() - 0.7, classes(truth), classes(read), late.numpy()))
                distance, expected, found, late = (np.concatenate(each) for each in zip(*parts, strict=True))
                right = found == expected
                place = np.digitize(distance, DISTANCES) - 1
                where = [place == i for i in range(len(DISTANCES) - 1)] + [found == "maintained", found == "emerged"]
                cells = [f"{right[each].mean():.3f} ({each.sum()})" if each.any() else "–" for each in where]
                low, high = np.nanquantile(late, [0.025, 0.975])
                print(f"| {S} | {profile} | {z:g} | {' | '.join(cells)} | {low:.2f} to {high:.2f} |")


def print_shares(arguments: argparse.Namespace) -> None:
    print("\nShare RelIE, all profiles together")
    print("| S | z | right but for ramps | right, ramp | coverage | where it acts |\n|---|---|---|---|---|---|")
    for S in arguments.snapshots:
        profiles = [name for name in PROFILES[:6] if S > 2 or name not in ("transient", "ramp")]
        n = F // 2 // len(profiles)
        for z in arguments.z:
            found: list[dict[str, np.ndarray]] = []
            for seed in range(arguments.draws):
                mean, effects = simulate(
                    profiles, S, z, arguments.correlation, np.random.default_rng([S, int(z), seed])
                )
                found.append(judge(mean, effects, True))
            ramp = [i for i, name in enumerate(profiles) if name == "ramp"]
            right = np.mean([each["right"].reshape(len(profiles), n).mean(1) for each in found], 0)
            others = float(np.delete(right, ramp).mean())
            of_ramp = f"{right[ramp[0]]:.3f}" if ramp else "–"
            ends = [
                float(np.nanmean(np.concatenate([each[name] for each in found]))) for name in ("coverage", "acting")
            ]
            print(f"| {S} | {z:g} | {others:.3f} | {of_ramp} | {ends[0]:.3f} | {ends[1]:.3f} |")


def print_groups(arguments: argparse.Namespace) -> None:
    print("\nPrompts of G groups, 120 prompts, 100 features, 9 snapshots")
    print(
        "| G | answers swapped | unit | p <= .05 | significant features | coverage of an effect |\n" + "|---" * 6 + "|"
    )
    for G in (5, 10, 20, 40):
        for swapped in ("by prompt", "by group"):
            for unit in ("group", "prompt"):
                found: list[tuple[float, float, float]] = []
                for seed in range(5 * arguments.draws):
                    rng = np.random.default_rng([G, seed])
                    group = np.arange(120) % G
                    own = rng.normal(0, 1, (G, 100, 9))
                    noise = rng.normal(0, 1, (120, 100, 9))
                    flips = rng.choice([-1, 1], 120) if swapped == "by prompt" else rng.choice([-1, 1], G)[group]
                    mean = rng.normal(0, 1, (100, 9))
                    units = group if unit == "group" else np.arange(120)
                    null = Effects((mean + own[group] + noise) * flips[:, None, None], units, 0)
                    low, high = effect_interval(Effects(mean + own[group] + noise, units, 0))
                    true = torch.from_numpy(mean)
                    found.append((float((null.p <= 0.05).double().mean()),
                                  float(significant(null).any(-1).double().mean()),
                                  float(((low <= true) & (true <= high)).double().mean())))  # fmt: skip
                print(f"| {G} | {swapped} | {unit} | " + " | ".join(f"{v:.3f}" for v in np.mean(found, 0)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", default="2,3,9,32", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--z", default="4,6,12", type=lambda text: [float(part) for part in text.split(",")])
    parser.add_argument("--draws", default=3, type=int)
    parser.add_argument("--correlation", default=0.0, type=float)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_profiles(arguments)
    print_limits(arguments)
    print_distances(arguments)
    print_shares(arguments)
    print_groups(arguments)


if __name__ == "__main__":
    main()
