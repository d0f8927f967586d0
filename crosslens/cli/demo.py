"""The whole pipeline on a tiny model, in a few minutes on two CPU cores.

1. `Snapshots.demo(seed)` pretrains a tiny GPT-NeoX on a generated grammar of agreement in two languages.
2. Train a BatchTopK crosscoder on the output of its middle block, which has attention above it, at every snapshot from
   step 48 on: a random model has as many directions as dimensions, and most features would be spent on it.
3. Find when features form (`evolve`), probe them, and attribute and ablate them on three constructions: features are
   selected on one half of the prompts and ablated on the other.
4. Write the results to `summary.json` and `report/index.html`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from crosslens.causal.analyses import Study
from crosslens.causal.timeline import late_feature, sign_change, top_examples
from crosslens.cli.display import to_json
from crosslens.config import (
    CacheOptions,
    CrosscoderOptions,
    EvolveOptions,
    ReportOptions,
    SourceOptions,
    StudyOptions,
    TrainingOptions,
)
from crosslens.evolution.ngrams import count_ngrams
from crosslens.evolution.probes import probe_correlation
from crosslens.pipeline.evolving import evolve
from crosslens.pipeline.opening import read_run
from crosslens.pipeline.reporting import report
from crosslens.pipeline.studying import measure_accuracy, study
from crosslens.pipeline.training import train
from crosslens.rundir import RunDir, delete, write_text
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import PretrainingConfig, demo_batches
from crosslens.tasks.task import Task

TASKS = ("simple", "pp", "subj_rel")
ATTRACTORS = ("pp", "subj_rel")  # a noun of the other number stands between head noun and verb
CPU = ModelSettings(device="cpu")
"""Models this small are fast on a CPU, and give the same numbers on every machine."""


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; with the defaults it takes about five minutes on two cores.

    Attributes:
        hook_name: hook point, the output of the middle block.
        first_step: the crosscoder is trained on the snapshots from this step on. Those before are all but untrained:
            of them only accuracy and the phases of training are measured.
        n_documents: documents of the grammar to train the crosscoder on.
        n_tokens: tokens per epoch.
        epochs: passes over the tokens.
        d_sae: number of features.
        k: active features per token.
        batch_size: tokens per training step.
        lr: learning rate.
        n_prompts: prompts per task, language and split.
        n_random: sets of random and of size-matched features drawn at the last snapshot.
        n_exact: features with the largest effects to ablate one by one.
        n_probes: features to probe.
    """

    hook_name: str = "blocks.1.hook_resid_post"
    first_step: int = 48
    n_documents: int = 8_000
    n_tokens: int = 160_000
    epochs: int = 8
    d_sae: int = 256
    k: int = 16
    batch_size: int = 1024
    lr: float = 7e-4
    n_prompts: int = 60
    n_random: int = 100
    n_exact: int = 100
    n_probes: int = 50


def run_demo(
    out: str | Path, seed: int = 0, config: DemoConfig | None = None, snapshots: Snapshots | None = None
) -> dict[str, Any]:
    """Run the demo in a run directory, reusing a trained model and crosscoder that are there.

    Args:
        out: the run directory.
        seed: seed of the model, its data, the crosscoder and every draw.
        config: sizes.
        snapshots: snapshots to use instead of the demo's own.

    Returns:
        The contents of `summary.json`.

    Raises:
        UserError: `out` holds another run.
    """
    run = RunDir(out)
    with run.writing():
        return _run(run, seed, config or DemoConfig(), snapshots)


def _run(run: RunDir, seed: int, config: DemoConfig, snapshots: Snapshots | None) -> dict[str, Any]:
    began = time.perf_counter()
    run.claim({"seed": seed, **asdict(config)}, part="demo")
    timings: dict[str, float] = {}

    def lap(name: str, since: float) -> float:
        now = time.perf_counter()
        timings[name] = round(now - since, 1)
        return now

    every = snapshots or Snapshots.demo(seed)
    snaps = every[[s for s, step in enumerate(every.steps) if (step or 0) >= config.first_step]]
    mark = lap("pretraining", began)
    _train(run, snaps, seed, config)
    mark = lap("train", mark)
    tasks = tuple(Task.demo(name, n=2 * config.n_prompts, seed=seed) for name in TASKS)
    for task in tasks:
        measure_accuracy(run, task, every, CPU)
    mark = lap("accuracy", mark)
    # all pretraining data is counted: the crosscoder's tokens are too few for the entropy of bigrams
    batches = islice(demo_batches(seed), PretrainingConfig().n_steps)
    counts = count_ngrams(batches, snaps.tokenizer) if snapshots is None else None
    evolving = EvolveOptions(n_probes=config.n_probes, seed=seed)
    tables = evolve(run, evolving, device="cpu", counts=counts, snapshots=every)
    mark = lap("evolve", mark)
    # the paired prompts differ in the number of the head noun, so effects measure number, not mere presence
    studying = StudyOptions(task=tasks, n_draws_last=config.n_random, n_exact=config.n_exact, seed=seed)
    studies = dict(study(run, studying, device="cpu"))
    mark = lap("study", mark)
    summary = _summary(run, snaps, studies, tables)
    effects = {name: each.ie for name, each in studies.items()}
    crosscoder, acts = read_run(run, "cpu")
    for name, finding in (
        ("late_feature", late_feature(effects[name] for name in ATTRACTORS)),
        ("sign_change", sign_change(effects.values())),
    ):
        summary[name] = {**finding, "examples": top_examples(crosscoder, acts, finding["feature"])}
    run.update(timings=timings)
    report(run, ReportOptions(title=f"crosslens demo, seed {seed}"))
    lap("report", mark)
    delete(run.path / "activations", run.path)  # 450 MB that can be harvested again in seconds
    summary = to_json({"seconds": round(time.perf_counter() - began, 1), "timings": timings, **summary})
    write_text(run.path / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    return summary


def _train(run: RunDir, snaps: Snapshots, seed: int, config: DemoConfig) -> None:
    corpus = run.path / "documents.txt"
    text = "\n".join(grammar.documents(config.n_documents, seed + 1_000_003))
    if not corpus.exists():
        write_text(corpus, text)
    source = SourceOptions(
        snapshots=snaps, hook=(config.hook_name,), dataset=str(corpus), n_tokens=config.n_tokens, seed=seed
    )
    training = TrainingOptions(
        training_tokens=config.epochs * config.n_tokens,
        batch_size=config.batch_size,
        lr=config.lr,
        dead_tokens=50_000,
    )
    crosscoder = CrosscoderOptions(d_sae=config.d_sae, k=config.k, topk_threshold_lr=0.02)
    train(run, source, crosscoder, training, models=CPU, cache=CacheOptions(cache=run.path / "activations"))


def _ablation_summary(found: Study) -> dict[str, float]:
    table = found.tables[f"ablation/{found.task}"]
    at_last = table[table["snapshot"] == table["snapshot"].max()].set_index(["mode", "features", "k"]).sort_index()
    largest = min(100, int(at_last.loc[("keep", "top")].index.max()))  # fewer features may be active on the prompts

    zeroing = found.tables[f"zeroing/{found.task}"]
    zeroed = zeroing[(zeroing["snapshot"] == zeroing["snapshot"].max()) & (zeroing["features"] == "top")]

    def metric(mode: str, features: str, k: int, column: str = "metric") -> float:
        return float(at_last.loc[(mode, features, k), column])

    return {
        "clean": metric("ablate", "top", 15, "clean"),
        "top_k": metric("ablate", "top", 15),
        "random_k": metric("ablate", "random", 15),
        "random_k_sd": metric("ablate", "random", 15, "metric_sd"),
        "size_matched_k": metric("ablate", "size_matched", 15),
        "size_matched_k_sd": metric("ablate", "size_matched", 15, "metric_sd"),
        "change_matched_k": metric("ablate", "change_matched", 15),
        "change_matched_k_sd": metric("ablate", "change_matched", 15, "metric_sd"),
        "zeroed_k": float(zeroed["metric"].mean()),
        "keep_k": metric("keep", "top", largest),
        "reconstruction_only": metric("ablate", "top", 15, "reconstruction_only"),
        "n_kept": largest,
        "n_active": int(found.ie.active[:, -1].sum()),
    }


def _additivity_summary(found: Study) -> dict[str, float]:
    row = found.tables[f"additivity/{found.task}.snapshots"].iloc[-1]
    return {name: float(row[name]) for name in ("interacting", "deviation")}


def _validation_summary(found: Study) -> dict[str, dict[str, list[float]]]:
    """Correlation of each measure with exact effects over the snapshots of a feature, and its interval."""
    table = found.tables.get(f"validation/{found.task}.summary")
    if table is None:
        return {}
    return {
        str(target): {
            str(row["measure"]): [
                round(float(row[name]), 3) for name in ("correlation", "correlation_low", "correlation_high")
            ]
            for row in pd.DataFrame(rows).to_dict("records")
        }
        for target, rows in table[table["kind"] == "within"].groupby("target")
    }


def _transfer_summary(found: Study) -> list[float]:
    """Faithfulness at the last snapshot of the top features selected at each snapshot."""
    table = found.tables[f"transfer/{found.task}"]
    at_last = table[table["ablated_at"] == table["ablated_at"].max()]  # rows are in order of `selected_at`
    return [round(float(share), 4) for share in at_last["share"]]


def _summary(
    run: RunDir, snaps: Snapshots, studies: dict[str, Study], tables: dict[str, pd.DataFrame]
) -> dict[str, Any]:
    evaluation, accuracy = run.table("evaluation"), run.table("accuracy")
    assert evaluation is not None and accuracy is not None
    completeness = pd.DataFrame(
        {name: each.tables[f"completeness/{name}"]["completeness_error"] for name, each in studies.items()}
    )
    return {
        "snapshots": snaps.labels,
        # of the untrained model, too
        "accuracy": {
            name: table.sort_values("snapshot")["accuracy"].round(4).tolist()
            for name, table in accuracy.groupby("task", sort=False)
        },
        "explained_variance": evaluation["explained_variance"].tolist(),
        "phases": {
            str(row["event"]): {
                "label": row["label"],
                "low_step": row["step_low"],
                "high_step": row["step_high"],
                "lead": row["lead"],
            }
            for row in tables["phases"].to_dict("records")
        },
        "l0": float(evaluation["l0"].mean()),
        "dead_fraction": float(evaluation["dead_fraction"].iloc[0]),
        "completeness_error": completeness.max(axis=1).tolist(),
        "ablation": {name: _ablation_summary(each) for name, each in studies.items()},
        "spearman_ie_exact": {
            name: {
                "removal": each.rank_agreement(),
                "gradient": each.rank_agreement("gradient"),
                "ig": each.rank_agreement("ig"),
                "ig_both_ends": each.rank_agreement("ig", "both"),
            }
            for name, each in studies.items()
        },
        "agreement": {name: [round(v, 4) for v in each.ie.agreement.tolist()] for name, each in studies.items()},
        "validation": {name: _validation_summary(each) for name, each in studies.items()},
        "additivity": {name: _additivity_summary(each) for name, each in studies.items()},
        "transfer_to_last": {name: _transfer_summary(each) for name, each in studies.items()},
        "probe": probe_correlation(tables["probe"]),
    }
