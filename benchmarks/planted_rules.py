"""Does a date mean what a reader takes it to mean? Rules put into real pretraining at known steps, and every reading.

    python benchmarks/planted_rules.py FOLDER [--quick] [--pretraining 0,1,2] [--dictionaries 0,1,2] > report.md

Small models learn the language of `planted.rules`, in which eight rules begin during training, three hold from the
start and five never hold. The truth of a rule is the snapshot at which the model acquires it. Crosscoders are trained
on text of the end of training, and of each one the features that carry a rule are dated by every reading of the
package. A carrier is a feature (a) of whose variance, over sentences of the rule at the token before the answer, the
class explains half or more, and (b) of whose squared activations over all text a twentieth or more is there. This rule
was fixed on pretraining seed 100, which is not judged, by the number of carriers that it finds and not by their dates;
and so was, on seeds 100 and 0, the threshold of R2 on pairs: at half of the largest, features of XOR seemed readable as
soon as both classes were known, because any nonlinearity of their sum holds some of it. Judged are seeds 1, 2 and 3.

*Early* is a date before any snapshot was trained on the rule. Printed with shares are 95 % intervals over rules: all
carriers of a rule, in all dictionaries, are drawn together; the main readings are given by pretraining seed, too. Every
step that is there already in FOLDER is not repeated.

Controls that must stay silent: rules that never hold; pairs whose differences of features belong to other pairs
(*shuffled*); and every snapshot replaced by the last (*identical*). How far do random directions of the size of a
rule's carriers move the metric, relative to these? The answer is compared with what a linear read-out gives: in D
dimensions a random direction has a cosine of root mean square 1 / sqrt(D) with any other.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pandas as pd
import torch
from planted.rules import PER_ROW, Pretrained, Pretraining

import crosslens as cl
from crosslens.activations import Dataset
from crosslens.activations.harvesting import harvest
from crosslens.causal.read_out import _effects, _late_changes, read_out
from crosslens.causal.relative import share_relie, significant
from crosslens.errors import UserError
from crosslens.evolution.concepts import concept_births
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.lifecycles import birth_index
from crosslens.evolution.probes import probe_errors
from crosslens.intervention.prompt_runs import Differences, PromptRuns
from crosslens.stats import bootstrap

HOOK = "blocks.2.hook_resid_post"
MIN_EXPLAINED, MIN_SHARE = 0.5, 0.05
N_PAIRS = 400
THRESHOLDS = (0.3, 0.5, 0.7)
MAIN = ("R², 0.5", "decoder norm, 0.5", "R² on pairs, 0.7", "effect, 0.1")
TABLES = ("dates", "probes", "placebo", "read_out", "controls", "random")


def train(pretrained: Pretrained, snapshots: cl.Snapshots, seed: int, folder: Path, quick: bool) -> tuple[Any, Any]:
    """A crosscoder on text of the end of training, and the activations."""
    n_tokens, held_out = (100_000, 30_000) if quick else (300_000, 60_000)
    rng = np.random.default_rng([pretrained.config.seed, 77])
    rows = pretrained.language.rows(rng, (n_tokens + held_out) // (8 * PER_ROW) + 40, pretrained.in_force)
    acts = cl.Activations(
        snapshots, HOOK, Dataset(torch.tensor(rows), n_tokens=n_tokens, held_out_tokens=held_out)
    ).cache(folder.parent / "cache")
    if not (folder / "crosscoder" / "cfg.json").exists():
        trained = cl.train(
            acts,
            cl.BatchTopKCrosscoderTrainingConfig(d_sae=512, k=4),
            cl.TrainConfig(
                training_tokens=500_000 if quick else 1_500_000, batch_size=1024, lr=1e-3, dead_tokens=50_000, seed=seed
            ),
        )
        trained.save(folder / "crosscoder")
    return cl.load(folder / "crosscoder"), acts


@torch.no_grad()
def find_carriers(pretrained: Pretrained, snapshots: cl.Snapshots, crosscoder: Any) -> dict[int, list[int]]:
    """Features that carry the class of each rule that holds at the end."""
    language, rules = pretrained.language, pretrained.rules
    rng = np.random.default_rng([pretrained.config.seed, 5])
    drawn = language.sentences(rng, 600 * PER_ROW, pretrained.in_force)
    tokens = np.concatenate([np.zeros((600, 1), int), drawn.ids.reshape(600, -1)], 1)
    x = harvest(snapshots, torch.tensor(tokens), HOOK)[:, 1:].flatten(0, 1)
    f = torch.cat([crosscoder.encode(part) for part in x.split(2048)]).double().numpy()
    squares = (f**2).sum(0)
    found: dict[int, list[int]] = {}
    for r, rule in enumerate(rules):
        if not pretrained.in_force[r]:
            continue
        rows = np.flatnonzero((drawn.rule == r) & (drawn.latent >= 0))
        here, z = f[rows * 8 + drawn.position[rows]], drawn.latent[rows]
        means = np.stack([here[z == c].mean(0) for c in range(rule.classes)])
        around = ((here - here.mean(0)) ** 2).sum(0)
        within = sum(((here[z == c] - means[c]) ** 2).sum(0) for c in range(rule.classes))
        with np.errstate(invalid="ignore", divide="ignore"):
            explained, share = 1 - within / around, (here**2).sum(0) / squares
        found[r] = np.flatnonzero((explained >= MIN_EXPLAINED) & (share >= MIN_SHARE)).tolist()
    return found


def about(pretrained: Pretrained, r: int) -> dict[str, Any]:
    """The rule and its truth."""
    rule = pretrained.rules[r]
    return {
        "rule": r, "kind": f"{rule.kind}{rule.classes}", "start": rule.start, "first": int(pretrained.first[r]),
        "acquired": int(pretrained.acquired[r]),
    }  # fmt: skip


def first(present: np.ndarray) -> int:
    """Birth of one feature from where it is present."""
    return int(birth_index(present, 2))


def relative_dates(name: str, curve: np.ndarray, thresholds: tuple[float, ...] = THRESHOLDS) -> dict[str, float]:
    """Births at shares of the largest value; NaN for a curve without a reading."""
    curve = np.nan_to_num(curve).clip(0)
    read = curve.max() > 0
    return {f"{name}, {t:g}": first(curve >= t * curve.max()) if read else np.nan for t in thresholds}


def date(pretrained: Pretrained, snapshots: Any, crosscoder: Any, acts: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Dates of every carrier by every reading but probes, and what rules that never hold seem to have."""
    run = cl.evolve(crosscoder, acts)
    carriers = find_carriers(pretrained, snapshots, crosscoder)
    rows: list[dict[str, Any]] = []
    placebo: list[dict[str, Any]] = []
    for r in range(len(pretrained.rules)):
        task = cl.Task.from_items(f"rule {r}", pretrained.language.items(r, N_PAIRS, 50))
        runs = PromptRuns(crosscoder, snapshots, task, paired=True)
        try:
            concept = concept_births(runs)
        except UserError as error:
            print(f"rule {r}: {error}")
            concept = None
        if r not in carriers:
            births = pd.DataFrame() if concept is None else concept.births.query("birth > 0 and q <= 0.05")
            placebo.append({**about(pretrained, r), "born": len(births)})
            continue
        print(about(pretrained, r), "carriers", carriers[r], flush=True)
        if not carriers[r]:
            rows.append({**about(pretrained, r), "feature": -1})
            continue
        curves = {} if concept is None else dict(iter(concept.curves.groupby("feature")["r2"]))
        ie = cl.attribute(runs, baseline="patch")
        share, counted = share_relie(ie).numpy(), significant(ie).numpy()
        for feature in carriers[r]:
            dates = {}
            for name, values in run.curves.items():
                dates |= relative_dates({"norm": "decoder norm", "r2": "R²", "within": "within-token R²"}[name],
                                        values[feature])  # fmt: skip
            dates |= relative_dates("R² on pairs", curves[feature].to_numpy() if feature in curves else np.zeros(1))
            size = ie.effects[feature].abs().numpy()
            dates |= relative_dates("effect", size * counted[feature].any(), (0.1, 0.5))
            dates |= relative_dates("share RelIE", share[feature], (0.5,))
            dates["effect, significant"] = first(counted[feature]) if counted[feature].any() else np.nan
            rows += [
                {**about(pretrained, r), "feature": feature, "reading": name, "birth": birth}
                for name, birth in dates.items()
            ]
    return pd.DataFrame(rows), pd.DataFrame(placebo)


def probe(pretrained: Pretrained, snapshots: Any, crosscoder: Any, acts: Any) -> pd.DataFrame:
    """Dates of every carrier by linear probes, of accuracy above chance: against any tokens, and the same token."""
    carriers = find_carriers(pretrained, snapshots, crosscoder)
    features = sorted({feature for each in carriers.values() for feature in each})
    firing = measure_firing(crosscoder, acts)
    only = torch.zeros_like(firing.rate).index_copy(0, torch.tensor(features), firing.rate[features])
    rows: list[dict[str, Any]] = []
    for name, negatives in (("probe", "any"), ("probe, same token", "same_token")):
        try:
            errors = probe_errors(
                crosscoder, acts, firing=replace(firing, rate=only), n_features=len(features), n_samples=1000,
                min_samples=200, max_tokens=acts.n_tokens, negatives=negatives,
            )  # fmt: skip
        except UserError as error:
            print(f"{name}: {error}")
            continue
        curves = {feature: 1 - 2 * one["probe_error"].to_numpy() for feature, one in errors.groupby("feature")}
        for r, found in carriers.items():
            rows += [
                {**about(pretrained, r), "feature": feature, "reading": reading, "birth": birth}
                for feature in found
                for reading, birth in relative_dates(name, curves.get(feature, np.zeros(1))).items()
            ]
    return pd.DataFrame(rows)


class Shuffled(PromptRuns):
    """Pairs with the differences of features of other pairs."""

    def differences(self, *, everywhere: bool = False) -> Differences:
        rows = super().differences(everywhere=everywhere)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(rows.prompts)))
        return rows._replace(features=rows.features[order], paired_features=rows.paired_features[order])


class Identical(PromptRuns):
    """The last snapshot in place of all."""

    def differences(self, *, everywhere: bool = False) -> Differences:
        rows = super().differences(everywhere=everywhere)
        return rows._replace(acts=rows.acts[:, -1:].expand_as(rows.acts))


def control(pretrained: Pretrained, snapshots: Any, crosscoder: Any) -> pd.DataFrame:
    """How many concepts are born, with q up to .05, where there are none to be born."""
    rows: list[dict[str, Any]] = []
    for r in np.flatnonzero(pretrained.in_force):
        task = cl.Task.from_items(f"rule {r}", pretrained.language.items(r, N_PAIRS, 50))
        for name, kind in (("shuffled", Shuffled), ("identical", Identical)):
            try:
                births = concept_births(kind(crosscoder, snapshots, task, paired=True), n_bootstrap=50).births
            except UserError as error:
                print(f"rule {r}: {error}")
                continue
            born = births.query("birth > 0 and q <= 0.05")
            rows.append({**about(pretrained, r), "control": name, "features": len(births), "born": len(born)})
    return pd.DataFrame(rows)


def random_directions(pretrained: Pretrained, snapshots: Any, crosscoder: Any, draws: int = 32) -> pd.DataFrame:
    """The share of the late effect that random directions have at the last snapshot, and that a linear one would give.

    With a_ni the change of feature i in prompt n and g_n the gradient of the metric, the effect is `sum_i <v_i, h_i>`,
    h_i the mean over prompts of a_ni g_n, summed over positions; that of random directions of norms |v_i| has the root
    mean square `sqrt(sum_i |v_i|^2 |h_i|^2 / D)`.
    """
    rows: list[dict[str, Any]] = []
    last = len(snapshots) - 1
    for r, carriers in find_carriers(pretrained, snapshots, crosscoder).items():
        if not carriers:
            continue
        task = cl.Task.from_items(f"rule {r}", pretrained.language.items(r, N_PAIRS // 4, 51))
        runs = PromptRuns(crosscoder, snapshots, task, paired=True)
        h, v = torch.zeros(2, len(carriers), crosscoder.d_model, dtype=torch.float64)
        columns = torch.searchsorted(runs.features, torch.tensor(carriers))
        for batch in runs.at(last):
            with torch.enable_grad():
                x = batch.clean.clone().requires_grad_()
                (gradient,) = torch.autograd.grad(batch.metric(x).sum(), x)
            (pairs,) = batch.changes("patch")
            change = torch.zeros(batch.keep.numel(), len(runs.features))
            change[pairs.tokens, pairs.features] = pairs.values
            h += torch.einsum("nc,nd->cd", change[:, columns], gradient.flatten(0, 1)).double()
            v = batch.directions[columns].double()
        unit = torch.nn.functional.normalize(
            torch.randn(draws, *v.shape, generator=torch.Generator().manual_seed(0)), dim=-1
        )
        ways = torch.cat([v[None].float(), v.norm(dim=-1, keepdim=True).float() * unit])
        own, *drawn = _effects(runs, last, _late_changes(runs, torch.tensor(carriers)), ways)[:, -1].mean(-1)
        measured = np.sqrt(np.mean(np.square(drawn))) / abs(own)
        linear = (v.square().sum(1) * h.square().sum(1)).sum().sqrt() / crosscoder.d_model**0.5 / (v * h).sum().abs()
        rows.append({**about(pretrained, r), "measured": measured, "linear": float(linear)})
    return pd.DataFrame(rows)


def cost(pretrained: Pretrained, snapshots: Any, crosscoder: Any, rounds: int = 3) -> None:
    """Print the CPU seconds of dating the concept of a task, and of its effects, on the same clean runs."""
    task = cl.Task.from_items("rule", pretrained.language.items(9, N_PAIRS, 50))
    runs = PromptRuns(crosscoder, snapshots, task, paired=True)
    births = concept_births(runs).births
    calls = {"births": partial(concept_births, runs), "effects": partial(cl.attribute, runs, baseline="patch")}
    found = measure.alternate(calls, rounds, 1, "cpu")
    seconds = {name: float(np.median([each.cpu for each in times])) for name, times in found.items()}
    print(
        f"{len(runs)} pairs, {len(snapshots)} snapshots, {len(births)} features: concept_births "
        f"{seconds['births']:.2f}, attribute {seconds['effects']:.2f} CPU s"
    )


def put_in(pretrained: Pretrained, snapshots: Any, crosscoder: Any) -> pd.DataFrame:
    """What the carriers of each rule, all together, do when their late values are put into every snapshot."""
    parts: list[pd.DataFrame] = []
    for r, carriers in find_carriers(pretrained, snapshots, crosscoder).items():
        if not carriers:
            continue
        task = cl.Task.from_items(f"rule {r}", pretrained.language.items(r, N_PAIRS // 4, 51))
        found = read_out(PromptRuns(crosscoder, snapshots, task, paired=True), carriers)
        parts.append(found[found["feature"].isna()].assign(**about(pretrained, r)))
    return pd.concat(parts, ignore_index=True).drop(columns="feature")


def judge_read_out(found: pd.DataFrame) -> pd.DataFrame:
    """Mean share of the late effect by kind: before the rule, until it is acquired, then, and later."""
    found, since = found.copy(), found["snapshot"] - found["acquired"]
    found["when"] = np.select(
        [found["snapshot"] < found["first"], since < 0, since == 0], ["before", "not yet acquired", "acquired"], "later"
    )
    rows: list[dict[str, Any]] = []
    for (kind, when), one in found.groupby([found["kind"].str[0], "when"]):
        row = {"kind": kind, "when": when, "n": len(one)}
        for name in ("share", "mapped_share", "random_share"):
            row |= {name: one[name].mean(), f"most {name}": one[name].abs().max()}
        rows.append({**row, "read out": one["read_out"].mean()})
    return pd.DataFrame(rows)


def judge(dates: pd.DataFrame) -> pd.DataFrame:
    """Shares of early and right dates by kind and reading, with intervals over rules."""
    rows: list[dict[str, Any]] = []
    for kind in ("X", "D", "L", "all"):
        one_kind = dates if kind == "all" else dates[dates["kind"].str[0] == kind]
        for reading, one in one_kind.groupby("reading", sort=False):
            rules = one.groupby(["pretraining", "rule"]).ngroup().to_numpy()
            rows.append({"kind": kind, "reading": reading, "carriers": len(one), "rules": int(rules.max()) + 1})
            for name, right in verdicts(one).items():
                rows[-1][name] = show(right.to_numpy(dtype=float), rules)
            rows[-1]["median error"] = (one["birth"] - one["acquired"]).median()
    return pd.DataFrame(rows)


def verdicts(dates: pd.DataFrame) -> dict[str, pd.Series]:
    error = dates["birth"] - dates["acquired"]
    return {
        "early": dates["birth"] < dates["first"], "within 1": error.abs() <= 1, "late": error > 1,
        "not dated": dates["birth"].isna(),
    }  # fmt: skip


def judge_seeds(dates: pd.DataFrame) -> pd.DataFrame:
    """The main readings by pretraining seed, all kinds: early / within one snapshot."""
    rows: list[dict[str, Any]] = []
    for reading in MAIN:
        row: dict[str, Any] = {"reading": reading}
        for seed, one in dates[dates["reading"] == reading].groupby("pretraining"):
            early, right, *_ = (values.mean() for values in verdicts(one).values())
            row[f"seed {seed}"] = f"{early:.2f} / {right:.2f} of {len(one)}"
        rows.append(row)
    return pd.DataFrame(rows)


def judge_bars(dates: pd.DataFrame, placebo: pd.DataFrame, read: pd.DataFrame) -> pd.DataFrame:
    """What was asked for before it was measured, and what was measured."""
    rows: list[dict[str, Any]] = []

    def bar(what: str, measured: float, least: float = -np.inf, most: float = np.inf) -> None:
        asked = f"at least {least:g}" if np.isfinite(least) else f"at most {most:g}"
        asked = f"{least:g}" if least == most else asked
        met = "yes" if least <= measured <= most else "no"
        rows.append({"bar": what, "asked": asked, "measured": f"{measured:.3f}", "met": met})

    for kinds, reading, early, right in (
        ("X", "R² on pairs, 0.7", 0.02, 0.95), ("DL", "R² on pairs, 0.7", 0.05, 0.9), ("XDL", "effect, 0.1", 0.05, 0.7)
    ):  # fmt: skip
        one = dates[dates["kind"].str[0].isin(list(kinds)) & (dates["reading"] == reading)]
        found = verdicts(one)
        words = f"{reading}, {' and '.join(kinds)}"
        bar(f"{words}: early", found["early"].mean(), most=early)
        bar(f"{words}: within 1", found["within 1"].mean(), least=right)
        if kinds == "X":
            bar(f"{words}: median error", (one["birth"] - one["acquired"]).median(), 0, 0)
    bar("rules that never hold without a concept birth", float((placebo["born"] == 0).mean()), least=0.95)
    before = read[(read["kind"].str[0] == "X") & (read["snapshot"] < read["acquired"])]
    bar("read out, X before acquisition: largest share", before["share"].abs().max(), most=0.05)
    bar("read out: largest share of random directions", read["random_share"].max(), most=0.1)
    return pd.DataFrame(rows)


def show(values: np.ndarray, rules: np.ndarray) -> str:
    """A mean with its interval over rules."""
    sums, sizes = np.bincount(rules, values), np.bincount(rules)
    low, high = bootstrap(lambda picks: sums[picks].sum(1) / sizes[picks].sum(1), len(sums))
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="one pretraining of half the length, one dictionary")
    numbers = {"type": lambda text: [int(part) for part in text.split(",")]}
    parser.add_argument("--pretraining", default="1,2,3", **numbers, help="seeds of the models")
    parser.add_argument("--dictionaries", default="0,1,2", **numbers, help="seeds of the crosscoders of each")
    parser.add_argument("--cost", action="store_true", help="time the first dictionary that is there, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [(100, 0)] if arguments.quick else [
        (p, d) for p in arguments.pretraining for d in arguments.dictionaries
    ]  # fmt: skip
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in TABLES}
    n_snapshots = 0
    for p, d in seeds:
        home = arguments.folder / ("quick" if arguments.quick else f"pretraining-{p}")
        config = Pretraining(p, n_steps=2000, every=200) if arguments.quick else Pretraining(p)
        pretrained = Pretrained(home / "models", config)
        n_snapshots = len(pretrained.steps)
        folder, snapshots = home / f"dictionary-{d}", cl.Snapshots.local(home / "models")
        if arguments.cost:
            cost(pretrained, snapshots, cl.load(folder / "crosscoder"))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            crosscoder, acts = train(pretrained, snapshots, d, folder, arguments.quick)
            stages: dict[tuple[str, ...], Callable[[], Any]] = {
                ("dates", "placebo"): partial(date, pretrained, snapshots, crosscoder, acts),
                ("probes",): partial(probe, pretrained, snapshots, crosscoder, acts),
                ("read_out",): partial(put_in, pretrained, snapshots, crosscoder),
                ("controls",): partial(control, pretrained, snapshots, crosscoder),
                ("random",): partial(random_directions, pretrained, snapshots, crosscoder),
            }
            for names, make in stages.items():
                if all((folder / f"{name}.parquet").exists() for name in names):
                    continue
                made = make()
                for name, table in zip(names, made if len(names) > 1 else [made], strict=True):
                    table.to_parquet(folder / f"{name}.parquet")
        for name in TABLES:
            tables[name].append(pd.read_parquet(folder / f"{name}.parquet").assign(pretraining=p, dictionary=d))
    dates, probes, placebo, read, controls, random = (pd.concat(tables[name], ignore_index=True) for name in TABLES)
    report(pd.concat([dates, probes], ignore_index=True), placebo, read, controls, random, n_snapshots)


def report(
    dates: pd.DataFrame, placebo: pd.DataFrame, read: pd.DataFrame, controls: pd.DataFrame, random: pd.DataFrame,
    n_snapshots: int,
) -> None:  # fmt: skip
    """Print all tables."""

    def table(rows: pd.DataFrame, **forms: str) -> None:
        columns = {name: measure.number(name, forms.get(name, "")) for name in rows}
        print(measure.markdown(rows.to_dict("records"), columns) + "\n")

    print(f"Machine: {measure.machine('cpu')}, one thread.\n")
    dates = dates[dates["start"] > 0]
    rules = dates.drop_duplicates(["pretraining", "dictionary", "rule"])
    missed, unheld = int((rules["acquired"] == n_snapshots).sum()), int((rules["feature"] < 0).sum())
    print(
        f"{len(rules)} pairs of a dictionary and a rule that begins. Left out below: {missed} whose rule is not "
        f"acquired, {unheld} without a carrier\n"
    )
    known = dates[(dates["feature"] >= 0) & (dates["acquired"] < n_snapshots)]
    read = read[(read["start"] > 0) & (read["acquired"] < n_snapshots)]
    table(judge_bars(known, placebo, read))
    table(judge(known), **{"median error": ".1f"})
    print("By pretraining seed, early / within one snapshot:\n")
    table(judge_seeds(known))
    print("Late values of all carriers of a rule in earlier snapshots, as shares of the late effect:\n")
    found = judge_read_out(read)
    table(found, **dict.fromkeys(set(found) - {"kind", "when", "n"}, ".2f"))
    print("Random directions at the last snapshot, and what they would do in a linear read-out:\n")
    found = random.groupby("kind", as_index=False).agg(
        rules=("rule", "size"), measured=("measured", "mean"), most=("measured", "max"), linear=("linear", "mean")
    )
    table(found, measured=".2f", most=".2f", linear=".2f")
    print(f"Rules that never hold: no concept birth (q <= .05) in {(placebo['born'] == 0).sum()} of {len(placebo)}\n")
    silent = controls.assign(silent=controls["born"] == 0).groupby("control")[["silent", "features", "born"]]
    table(silent.agg({"silent": "sum", "features": "sum", "born": "sum"}).assign(of=silent.size()).reset_index())


if __name__ == "__main__":
    main()
