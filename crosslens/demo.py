"""The whole river in a few minutes on two cores: pretrain, crosscode, watch evolve, attribute, ablate, report.

1. `Snapshots.demo(seed)` pretrains a tiny GPT-NeoX on a generated two-language agreement grammar.
2. A BatchTopK crosscoder is trained on the output of its middle block, with attention above it.
3. Features are dated (`evolve`), probed, attributed on three constructions, and ablated. They are chosen on one half of
   the prompts and judged on the other.
4. `summary.json` holds the figures, `report/index.html` shows them.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata

from crosslens import grammar
from crosslens.ablation import ablate, exact_effects
from crosslens.activations import Activations
from crosslens.attribution import attribute
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig, Crosscoder
from crosslens.effects import Attribution
from crosslens.evolution import evolve
from crosslens.probing import probe, probe_correlation
from crosslens.report import write_report
from crosslens.rundir import RunDir
from crosslens.runs import PromptRuns
from crosslens.shares import relie
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task
from crosslens.trainer import TrainConfig
from crosslens.training import train

TASKS = ("simple", "pp", "subj_rel")


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo; the defaults fit five minutes on two cores.

    Attributes:
        hook_name: output of the middle block.
        n_documents: documents of the grammar whose activations are crosscoded.
        n_tokens: activations to train on.
        epochs: passes over them.
        d_sae: features.
        k: features kept per token.
        k_start: k at the first step; annealing it over the first half of the steps leaves few features dead.
        batch_size: activations per step.
        lr: learning rate.
        n_prompts: prompts per task and language.
        n_random: draws of random and size-matched features at the last snapshot.
        n_exact: features of the largest effect whose single ablation is measured exactly.
        n_probes: features that are probed.
    """

    hook_name: str = "blocks.1.hook_resid_post"
    n_documents: int = 8_000
    n_tokens: int = 160_000
    epochs: int = 5
    d_sae: int = 1024
    k: int = 16
    k_start: float = 192
    batch_size: int = 1024
    lr: float = 1.5e-3
    n_prompts: int = 60
    n_random: int = 100
    n_exact: int = 100
    n_probes: int = 50


def run_demo(
    out: str | Path, seed: int = 0, config: DemoConfig | None = None, snapshots: Snapshots | None = None
) -> dict[str, Any]:
    """Run the demo into a run directory; what is already there and whole is used again.

    Args:
        out: the run directory.
        seed: of the model, its data, the crosscoder and every draw.
        config: sizes.
        snapshots: a pretraining run to use instead of the embedded one.

    Returns:
        The contents of `summary.json`.

    Raises:
        UserError: `out` holds another run.
    """
    config = config or DemoConfig()
    began = time.perf_counter()
    run = RunDir(out)
    run.claim({"seed": seed, **asdict(config)}, part="demo")
    timings: dict[str, float] = {}

    def lap(name: str, since: float) -> float:
        now = time.perf_counter()
        timings[name] = round(now - since, 1)
        return now

    snaps = snapshots or Snapshots.demo(seed)
    mark = lap("pretraining", began)
    acts, crosscoder = _crosscoder(run, snaps, seed, config)
    mark = lap("crosscoder", mark)
    run.save_table("evolution", evolve(crosscoder, acts))
    mark = lap("evolution", mark)
    probes = probe(crosscoder, acts, n_features=config.n_probes, seed=seed)
    run.save_table("probe", probes)
    mark = lap("probes", mark)
    tasks = {name: Task.demo(name, n=2 * config.n_prompts, seed=seed) for name in TASKS}
    run.save_table("accuracy", pd.concat([task.accuracy(snaps) for task in tasks.values()], ignore_index=True))
    mark = lap("accuracy", mark)
    causes = {name: _causes(run, crosscoder, snaps, task, seed, config) for name, task in tasks.items()}
    mark = lap("causes", mark)
    run.update(timings=timings)
    summary = _summary(run, snaps, causes, probes)
    for name, find in (("late_feature", late_feature), ("sign_change", sign_change)):
        finding = find({task: cause["ie"] for task, cause in causes.items()})
        summary[name] = {**finding, "examples": top_examples(crosscoder, acts, finding["feature"])}
    lap("report", mark)
    write_report(run.path, title=f"crosslens demo, seed {seed}")
    summary = _strict({"seconds": round(time.perf_counter() - began, 1), "timings": timings, **summary})
    partial = run.path / "summary.json.tmp"
    partial.write_text(json.dumps(summary, indent=1, allow_nan=False))
    os.replace(partial, run.path / "summary.json")
    return summary


def _crosscoder(run: RunDir, snaps: Snapshots, seed: int, config: DemoConfig) -> tuple[Activations, Crosscoder]:
    corpus = run.path / "documents.txt"
    text = "\n".join(grammar.documents(config.n_documents, seed + 1_000_003))
    if not corpus.exists():
        corpus.write_text(text, encoding="utf-8")
    acts = Activations(snaps, config.hook_name, corpus, config.n_tokens, seed=seed)
    cache = run.path / "activations"
    cached = acts.cache(cache)
    crosscoder = train(
        cached,
        BatchTopKCrosscoderTrainingConfig(
            d_sae=config.d_sae,
            k=config.k,
            k_start=config.k_start,
            k_anneal_steps=config.epochs * config.n_tokens // config.batch_size // 2,
            topk_threshold_lr=0.02,
            decoder_init_norm=None,
        ),
        TrainConfig(
            run_dir=run.path,
            training_tokens=config.epochs * config.n_tokens,
            batch_size=config.batch_size,
            lr=config.lr,
            dead_tokens=50_000,
            seed=seed,
        ),
    )
    return cached, crosscoder


def _causes(
    run: RunDir, crosscoder: Crosscoder, snaps: Snapshots, task: Task, seed: int, config: DemoConfig
) -> dict[str, Any]:
    """Effects on one half of the prompts; everything that judges them on the other half.

    The prompts come in pairs that differ in the number of the head noun, so the baseline, and what an ablated feature
    is set to, is its value on the paired prompt: effects are of the number, not of being there at all.
    """
    choosing, judging = task.split(seed)
    chosen_runs = PromptRuns(crosscoder, snaps, choosing, paired=True)
    judged_runs = PromptRuns(crosscoder, snaps, judging, paired=True)
    ie, gradient = (
        attribute(crosscoder, snaps, choosing, method, baseline="patch", runs=chosen_runs)
        for method in ("ig", "gradient")
    )
    run.save_table(f"attribution/{task.name}", ie.to_frame(crosscoder.decoder_norms))
    run.save_table(f"attribution/{task.name}.snapshots", ie.snapshot_frame())
    last = len(snaps) - 1
    curves = [
        ablate(
            crosscoder,
            snaps,
            judging,
            ie,
            k,
            keep=keep,
            value="patch",
            controls=controls,
            n_draws=draws,
            at=at,
            seed=seed,
            runs=judged_runs,
            cut=True,
        )
        for keep, k, draws, controls, at in (
            (False, (1, 5, 15, 50), 4, ("random", "size_matched"), None),
            (False, (15,), config.n_random, ("random", "size_matched"), [last]),
            (True, (5, 15, 50, 100), 4, ("random",), None),
        )
    ]
    # the many draws at the last snapshot replace the few
    table = pd.concat([curves[1], curves[0], curves[2]]).drop_duplicates(
        ["snapshot", "mode", "features", "k"], ignore_index=True
    )
    run.save_table(f"ablation/{task.name}", table)
    largest = ie.top(min(config.n_exact, int(ie.active[:, last].sum())), last, by="magnitude")
    exact = exact_effects(chosen_runs, last, largest, value="patch")
    rank = {
        name: spearman(exact, values.effects[largest, last]) for name, values in (("ig", ie), ("gradient", gradient))
    }
    return {"ie": ie, "ablation": _ablation_summary(table, last, ie), "spearman": rank}


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors."""
    return float(np.corrcoef(rankdata(a.numpy()), rankdata(b.numpy()))[0, 1])


def _ablation_summary(table: pd.DataFrame, last: int, ie: Attribution) -> dict[str, float]:
    at_last = table[table["snapshot"] == last].set_index(["mode", "features", "k"])

    def metric(mode: str, features: str, k: int, column: str = "metric") -> float:
        return float(at_last.loc[(mode, features, k), column])

    return {
        "clean": metric("ablate", "top", 15, "clean"),
        "top_k": metric("ablate", "top", 15),
        "random_k": metric("ablate", "random", 15),
        "random_k_sd": metric("ablate", "random", 15, "metric_sd"),
        "size_matched_k": metric("ablate", "size_matched", 15),
        "size_matched_k_sd": metric("ablate", "size_matched", 15, "metric_sd"),
        "keep_k": metric("keep", "top", 100),
        "reconstruction_only": metric("ablate", "top", 15, "reconstruction_only"),
        "n_active": int(ie.active[:, last].sum()),
    }


def _summary(run: RunDir, snaps: Snapshots, causes: dict[str, Any], probes: pd.DataFrame) -> dict[str, Any]:
    evaluation, accuracy = run.table("evaluation"), run.table("accuracy")
    assert evaluation is not None and accuracy is not None
    effects: dict[str, Attribution] = {name: cause["ie"] for name, cause in causes.items()}
    completeness = torch.stack([ie.completeness for ie in effects.values()])
    return {
        "snapshots": snaps.labels,
        "accuracy": {
            name: table.sort_values("snapshot")["accuracy"].round(4).tolist()
            for name, table in accuracy.groupby("task", sort=False)
        },
        "explained_variance": evaluation["explained_variance"].tolist(),
        "l0": float(evaluation["l0"].mean()),
        "dead_fraction": float(evaluation["dead_fraction"].iloc[0]),
        "completeness_error": completeness.amax(0).tolist(),
        "ablation": {name: cause["ablation"] for name, cause in causes.items()},
        "spearman_ie_exact": {name: cause["spearman"] for name, cause in causes.items()},
        "probe": {**probe_correlation(probes), "without_step0": probe_correlation(probes, without=(0,))},
    }


def late_feature(effects: dict[str, Attribution]) -> dict[str, Any]:
    """Of the features that carry a tenth of an attractor task's metric at the end, the one whose RelIE lies latest."""
    found: list[dict[str, Any]] = []
    for name in ("pp", "subj_rel"):
        ie = effects[name]
        share = relie(ie)
        S = share.shape[1]
        top = ie.top(min(15, int(ie.active[:, -1].sum())), S - 1)
        carried = ie.effects[top, -1] >= 0.1 * ie.metric_clean[-1]
        top = top[carried] if carried.any() else top[:1]
        centre = (share[top] * torch.arange(S) / (S - 1)).sum(-1).nan_to_num(0.0)
        feature = int(top[centre.argmax()])
        found.append(_finding(ie, feature, centre_of_mass=float(centre.max())))
    return max(found, key=lambda finding: finding["centre_of_mass"])


def sign_change(effects: dict[str, Attribution]) -> dict[str, Any]:
    """The feature whose significant effects differ most in sign: harmful at one snapshot, helpful at another."""
    found: list[dict[str, Any]] = []
    for ie in effects.values():
        sure = torch.where(ie.effects.abs() > 2 * ie.standard_errors, ie.effects, torch.zeros_like(ie.effects))
        swing = torch.minimum(sure.amax(1), -sure.amin(1))
        found.append(_finding(ie, int(swing.argmax()), swing=float(swing.max())))
    return max(found, key=lambda finding: finding["swing"])


@torch.no_grad()
def top_examples(crosscoder: Crosscoder, acts: Activations, feature: int, n: int = 8) -> list[str]:
    """Where a feature is most active in the held-out text: up to six words, the place itself in brackets."""
    tokens = acts.held_out_tokens()
    values = crosscoder.encode(acts.block(len(acts.tokens) - len(tokens), len(acts.tokens)))[..., feature]
    values = values * acts.keep(tokens)
    examples: list[str] = []
    for place in values.flatten().argsort(descending=True).tolist():
        row, position = divmod(place, tokens.shape[1])
        words = acts.snapshots.tokenizer.convert_ids_to_tokens(tokens[row, : position + 1].tolist())
        sentence = words[max(0, len(words) - 6) :]
        example = " ".join([*sentence[:-1], f"[{sentence[-1]}]"])
        if values[row, position] > 0 and example not in examples:
            examples.append(example)
        if len(examples) == n or values[row, position] <= 0:
            break
    return examples


def _strict(value: Any) -> Any:
    """The same in strict JSON: what is not a number is null."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finding(ie: Attribution, feature: int, **figures: float) -> dict[str, Any]:
    return {
        "feature": feature,
        "task": ie.task,
        **figures,
        "ie": [round(v, 4) for v in ie.effects[feature].tolist()],
        "ie_se": [round(v, 4) for v in ie.standard_errors[feature].tolist()],
        "relie": [round(v, 4) for v in relie(ie)[feature].tolist()],
    }
