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
carriers of a rule, in all dictionaries, are drawn together. Every step that is there already in FOLDER is not repeated.
"""

from __future__ import annotations

import argparse
import warnings
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
from crosslens.causal.read_out import read_out
from crosslens.causal.relative import share_relie, significant
from crosslens.errors import UserError
from crosslens.evolution.concepts import concept_births
from crosslens.evolution.lifecycles import birth_index
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.stats import bootstrap

HOOK = "blocks.2.hook_resid_post"
MIN_EXPLAINED, MIN_SHARE = 0.5, 0.05
N_PAIRS = 400
THRESHOLDS = (0.3, 0.5, 0.7)
COLUMNS = {
    **{name: measure.number(name, "") for name in ("kind", "reading", "carriers", "rules")},
    **{name: measure.number(name, "") for name in ("early", "within 1", "late", "not dated")},
    "median error": measure.number("median error", ".1f"),
}


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


def first(present: np.ndarray) -> int:
    """Birth of one feature from where it is present."""
    return int(birth_index(present, 2))


def relative_dates(name: str, curve: np.ndarray, thresholds: tuple[float, ...] = THRESHOLDS) -> dict[str, float]:
    """Births at shares of the largest value; NaN for a curve without a reading."""
    curve = np.nan_to_num(curve).clip(0)
    read = curve.max() > 0
    return {f"{name}, {t:g}": first(curve >= t * curve.max()) if read else np.nan for t in thresholds}


def date(run: Any, pretrained: Pretrained, snapshots: Any, crosscoder: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Dates of every carrier by every reading, and what rules that never hold seem to have."""
    carriers = find_carriers(pretrained, snapshots, crosscoder)
    rows: list[dict[str, Any]] = []
    placebo: list[dict[str, Any]] = []
    for r, rule in enumerate(pretrained.rules):
        task = cl.Task.from_items(f"rule {r}", pretrained.language.items(r, N_PAIRS, 50))
        runs = PromptRuns(crosscoder, snapshots, task, paired=True)
        about = {"rule": r, "kind": f"{rule.kind}{rule.classes}", "start": rule.start,
                 "first": int(pretrained.first[r]), "acquired": int(pretrained.acquired[r])}  # fmt: skip
        try:
            concept = concept_births(runs)
        except UserError as error:
            print(f"rule {r}: {error}")
            concept = None
        if r not in carriers:
            births = pd.DataFrame() if concept is None else concept.births.query("birth > 0 and q <= 0.05")
            placebo.append({**about, "born": len(births)})
            continue
        print(about, "carriers", carriers[r], flush=True)
        if not carriers[r]:
            rows.append({**about, "feature": -1})
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
            rows += [{**about, "feature": feature, "reading": name, "birth": birth} for name, birth in dates.items()]
    return pd.DataFrame(rows), pd.DataFrame(placebo)


def put_in(pretrained: Pretrained, snapshots: Any, crosscoder: Any) -> pd.DataFrame:
    """What the carriers of each rule, all together, do when their late values are put into every snapshot."""
    parts: list[pd.DataFrame] = []
    for r, carriers in find_carriers(pretrained, snapshots, crosscoder).items():
        if not carriers:
            continue
        task = cl.Task.from_items(f"rule {r}", pretrained.language.items(r, N_PAIRS // 4, 51))
        found = read_out(PromptRuns(crosscoder, snapshots, task, paired=True), carriers)
        rule = pretrained.rules[r]
        about = {"rule": r, "kind": f"{rule.kind}{rule.classes}", "start": rule.start}
        parts.append(found[found["feature"].isna()].assign(
            **about, first=int(pretrained.first[r]), acquired=int(pretrained.acquired[r])
        ))  # fmt: skip
    return pd.concat(parts, ignore_index=True).drop(columns="feature")


def judge_read_out(found: pd.DataFrame) -> pd.DataFrame:
    """Mean share of the late effect by kind: before the rule, until it is acquired, then, and later."""
    found = found[(found["start"] > 0) & (found["acquired"] <= found["snapshot"].max())].copy()
    since = found["snapshot"] - found["acquired"]
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
    n_snapshots = int(dates["acquired"].max()) + 1
    judged = dates.loc[(dates["start"] > 0) & (dates["feature"] >= 0) & (dates["acquired"] < n_snapshots)]
    kinds = {"X": ("X2",), "D": ("D2", "D4"), "L": ("L2",), "all": ("X2", "D2", "D4", "L2")}
    for kind, members in kinds.items():
        for reading, one in judged[judged["kind"].isin(members)].groupby("reading", sort=False):
            error = one["birth"] - one["acquired"]
            values = {
                "early": one["birth"] < one["first"], "within 1": error.abs() <= 1, "late": error > 1,
                "not dated": one["birth"].isna(),
            }  # fmt: skip
            row: dict[str, Any] = {"kind": kind, "reading": reading, "carriers": len(one)}
            rules = one.groupby(["pretraining", "rule"]).ngroup().to_numpy()
            row["rules"] = int(rules.max()) + 1
            for name, right in values.items():
                row[name] = show(right.to_numpy(dtype=float), rules)
            row["median error"] = error.median()
            rows.append(row)
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
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = [(100, 0)] if arguments.quick else [
        (p, d) for p in arguments.pretraining for d in arguments.dictionaries
    ]  # fmt: skip
    tables: list[list[pd.DataFrame]] = [[], [], []]
    for p, d in seeds:
        home = arguments.folder / ("quick" if arguments.quick else f"pretraining-{p}")
        config = Pretraining(p, n_steps=2000, every=200) if arguments.quick else Pretraining(p)
        pretrained = Pretrained(home / "models", config)
        folder = home / f"dictionary-{d}"
        if not (folder / "placebo.parquet").exists():
            snapshots = cl.Snapshots.local(home / "models")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                crosscoder, acts = train(pretrained, snapshots, d, folder, arguments.quick)
                found = date(cl.evolve(crosscoder, acts), pretrained, snapshots, crosscoder)
            for table, name in zip(found, ("dates", "placebo"), strict=True):
                table.assign(pretraining=p, dictionary=d).to_parquet(folder / f"{name}.parquet")
        if not (folder / "read_out.parquet").exists():
            crosscoder, snapshots = cl.load(folder / "crosscoder"), cl.Snapshots.local(home / "models")
            put_in(pretrained, snapshots, crosscoder).to_parquet(folder / "read_out.parquet")
        for i, name in enumerate(("dates", "placebo", "read_out")):
            tables[i].append(pd.read_parquet(folder / f"{name}.parquet"))
    dates, placebo, read = (pd.concat(each, ignore_index=True) for each in tables)
    print(f"Machine: {measure.machine('cpu')}, one thread.\n")
    timed = dates[dates["start"] > 0].drop_duplicates(["pretraining", "dictionary", "rule"])
    print(f"{len(timed)} rules that begin, {int((timed['feature'] < 0).sum())} without a carrier\n")
    print(measure.markdown(judge(dates).to_dict("records"), COLUMNS))
    silent = float((placebo["born"] == 0).mean())
    print("\nLate values of all carriers of a rule in earlier snapshots, as shares of the late effect:\n")
    columns = {"kind": "", "when": "", "n": ""} | dict.fromkeys(
        ["share", "most share", "mapped_share", "most mapped_share", "random_share", "most random_share", "read out"],
        ".2f",
    )
    found = judge_read_out(read).to_dict("records")
    print(measure.markdown(found, {name: measure.number(name, form) for name, form in columns.items()}))
    print(f"\nRules that never hold: no concept birth (q <= .05) in {silent:.2f} of {len(placebo)}")


if __name__ == "__main__":
    main()
