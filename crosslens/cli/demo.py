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
from collections.abc import Generator
from contextlib import contextmanager
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
from crosslens.pipeline.summary import summarise_study
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
    """Sizes of the demo; with the defaults it takes about five minutes on two cores."""

    hook_name: str = "blocks.1.hook_resid_post"
    """Hook point, the output of the middle block."""
    first_step: int = 48
    """The crosscoder is trained on the snapshots from this step on. Those before are all but untrained: of them only
    accuracy and the phases of training are measured."""
    n_documents: int = 8_000
    """Documents of the grammar to train the crosscoder on."""
    n_tokens: int = 160_000
    """Tokens per epoch."""
    epochs: int = 8
    """Passes over the tokens."""
    d_sae: int = 256
    """Number of features."""
    k: int = 16
    """Active features per token."""
    batch_size: int = 1024
    """Tokens per training step."""
    lr: float = 7e-4
    """Learning rate."""
    n_prompts: int = 60
    """Prompts per task, language and split."""
    n_random: int = 100
    """Sets drawn per control at the last snapshot."""
    n_exact: int = 100
    """Features with the largest effects to ablate one by one."""
    n_probes: int = 50
    """Features to probe."""


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
    timings: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Generator[None, None, None]:
        began = time.perf_counter()
        yield
        timings[name] = round(time.perf_counter() - began, 1)

    with timed("seconds"):
        run.claim({"seed": seed, **asdict(config)}, part="demo")
        with timed("pretraining"):
            every = snapshots or Snapshots.demo(seed)
        with timed("train"):
            trained = every[[s for s, step in enumerate(every.steps) if (step or 0) >= config.first_step]]
            _train(run, trained, seed, config)
        tasks = tuple(Task.demo(name, n=2 * config.n_prompts, seed=seed) for name in TASKS)
        with timed("accuracy"):
            for task in tasks:  # of the untrained model, too
                measure_accuracy(run, task, every, CPU)
        with timed("evolve"):
            # all pretraining data is counted: the crosscoder's tokens are too few for the entropy of bigrams
            batches = islice(demo_batches(seed), PretrainingConfig().n_steps)
            counts = count_ngrams(batches, every.tokenizer) if snapshots is None else None
            options = EvolveOptions(n_probes=config.n_probes, seed=seed)
            tables = evolve(run, options, device="cpu", counts=counts, snapshots=every)
        with timed("study"):
            # the paired prompts differ in the number of the head noun, so effects measure number, not mere presence
            sizes = StudyOptions(task=tasks, n_draws_last=config.n_random, n_exact=config.n_exact, seed=seed)
            studies = dict(study(run, sizes, device="cpu"))
        summary = _summary(run, studies, tables)
        run.update(timings=timings)
        with timed("report"):
            report(run, ReportOptions(title=f"crosslens demo, seed {seed}"))
        delete(run.path / "activations", run.path)  # 450 MB that can be harvested again in seconds
    summary = to_json({"seconds": timings.pop("seconds"), "timings": timings, **summary})
    write_text(run.path / "summary.json", json.dumps(summary, indent=1, allow_nan=False))
    return summary


def _train(run: RunDir, snaps: Snapshots, seed: int, config: DemoConfig) -> None:
    corpus = run.path / "documents.txt"
    if not corpus.exists():
        write_text(corpus, "\n".join(grammar.documents(config.n_documents, seed + 1_000_003)))
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


def _summary(run: RunDir, studies: dict[str, Study], tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    evaluation, accuracy = run.table("evaluation"), run.table("accuracy")
    assert evaluation is not None and accuracy is not None
    errors = [each.tables[f"completeness/{name}"]["completeness_error"] for name, each in studies.items()]
    columns = {"label": "label", "low_step": "step_low", "high_step": "step_high", "lead": "lead"}
    parts = {name: summarise_study(each) for name, each in studies.items()}
    effects = {name: each.ie for name, each in studies.items()}
    late, change = late_feature(effects[name] for name in ATTRACTORS), sign_change(effects.values())
    crosscoder, acts = read_run(run, "cpu")
    return {
        "snapshots": acts.snapshots.labels,
        "accuracy": {
            name: table.sort_values("snapshot")["accuracy"].round(4).tolist()
            for name, table in accuracy.groupby("task", sort=False)
        },
        "explained_variance": evaluation["explained_variance"].tolist(),
        "phases": {
            str(row["event"]): {name: row[column] for name, column in columns.items()}
            for row in tables["phases"].to_dict("records")
        },
        "l0": float(evaluation["l0"].mean()),
        "dead_fraction": float(evaluation["dead_fraction"].iloc[0]),
        "completeness_error": pd.concat(errors, axis=1).max(axis=1).tolist(),
        **{
            key: {name: part[key] for name, part in parts.items()}
            for key in ("ablation", "spearman_ie_exact", "agreement", "validation", "additivity", "transfer_to_last")
        },
        "probe": probe_correlation(tables["probe"]),
        "late_feature": {**late, "examples": top_examples(crosscoder, acts, late["feature"])},
        "sign_change": {**change, "examples": top_examples(crosscoder, acts, change["feature"])},
    }
