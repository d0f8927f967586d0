"""`evolve`: everything about the features of a run over time that needs no task.

1. Encode the held-out activations once, and find when features form, rotate, split and fade, with controls
   (`crosslens.evolution`).
2. Collect examples, contexts, the logit lens and neighbours of every feature (`crosslens.features`).
3. Measure what the models predict beside the features, and propose snapshots; with the accuracy on tasks where it is
   known.
4. Fit probes to some features.

Every part leaves its tables as soon as it ends.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pandas as pd

from crosslens.config import EvolveOptions, decisive
from crosslens.distributed import n_processes
from crosslens.distributed.together import together
from crosslens.errors import UserError
from crosslens.evolution import add_consensus, match, measure_dynamics, probe, shares_by_kind
from crosslens.evolution import evolve as evolve_features
from crosslens.evolution.dynamics import MIN_COSINE
from crosslens.features import feature_tables
from crosslens.pipeline.nulls import (
    births_without_history,
    null_births,
    null_crosscoder,
    read_models,
    recorded_training,
)
from crosslens.pipeline.opening import more_snapshots, read_run, working
from crosslens.rundir import RunDir

if TYPE_CHECKING:
    from crosslens.evolution import NgramCounts
    from crosslens.snapshots import Snapshots


def evolve(
    run: RunDir,
    options: EvolveOptions | None = None,
    *,
    device: str | None = None,
    counts: NgramCounts | None = None,
    snapshots: Snapshots | None = None,
) -> dict[str, pd.DataFrame]:
    """Analyse the features of a trained run over time, and save the tables.

    Args:
        run: with a trained crosscoder.
        options: `EvolveOptions()` if None.
        device: of models and crosscoder; CUDA if available.
        counts: unigrams and bigrams of the pretraining corpus, by `count_ngrams`; of the run's training tokens if None.
        snapshots: snapshots whose predictions are measured, those of the run among them; those of the run if None.

    Returns:
        The tables by name, as in the run directory (`crosslens.tables`).

    Raises:
        UserError: the run has no trained crosscoder, one snapshot only, or too few held-out tokens; its dataset or
            tokenizer changed; its source has no such `dynamics_steps`; or another process is writing in it.
    """
    options = options or EvolveOptions()
    others = None if options.null is None else read_models(options.null)
    if n_processes() > 1 and (options.untrained or others is not None):
        raise UserError(
            f"--untrained and --null train another crosscoder, in one process: `crosslens evolve {run.path}` with "
            "them but without torchrun; later calls use what they found"
        )
    with ExitStack() as stack:
        stack.enter_context(working(run))
        decided = json.loads(json.dumps(decisive(options)))
        run.note(evolve=decided)
        crosscoder, acts = read_run(run, device, allow_changed_data=options.allow_changed_data)
        if options.dynamics_steps is not None and snapshots is None:
            snapshots = more_snapshots(run, acts.snapshots, options.dynamics_steps)
        stack.enter_context(together(acts.settings.device))
        if options.untrained:
            found = null_births(acts, *recorded_training(run, acts.settings.device))
            run.save_table("untrained_births", found)
        unrelated = None
        if others is not None:
            with null_crosscoder(acts, *recorded_training(run, acts.settings.device), models=others) as (other, live):
                run.save_table("exchangeable_births", births_without_history(other, live))
                unrelated = match(crosscoder, other, acts, acts_b=live)
        known = {name: run.table(f"{name}_births") for name in ("untrained", "exchangeable")}
        nulls = {name: table for name, table in known.items() if table is not None}
        before = {name: run.made_with(f"{name}_births") for name in nulls}  # maybe by another call, of another seed
        run.note(nulls={name: made for name, made in before.items() if made and made.get("evolve") != decided} or None)
        evolution = evolve_features(crosscoder, acts, nulls=nulls, seed=options.seed)
        tables = evolution.tables()
        consensus = run.table("consensus")
        if consensus is not None:
            tables["lifecycles"] = add_consensus(tables["lifecycles"], consensus)
        seeds, min_cosine = run.table("seeds_rotation"), MIN_COSINE
        if seeds is not None:
            angles = seeds.groupby("after")["apart"].median()
            tables["rotation"]["seeds_angle"] = tables["rotation"]["after"].map(angles.to_dict())
            last = float(angles.reindex([crosscoder.n_snapshots - 1]).iloc[0])
            min_cosine = math.cos(math.radians(last)) if math.isfinite(last) else min_cosine
        if unrelated is not None and evolution.decodability is not None:
            kinds = evolution.decodability.lexical
            tables["unrelated"] = shares_by_kind(unrelated, ["lexical" if one else "contextual" for one in kinds])
        run.save_tables(tables)
        run.save_tables(feature_tables(crosscoder, acts))
        accuracy = run.table("accuracy")
        if accuracy is not None:
            run.note(accuracy=sorted({*accuracy["task"].astype(str)}))
            accuracy = pd.DataFrame(accuracy[accuracy["label"].isin(acts.snapshots.labels)])
        dynamics = measure_dynamics(
            crosscoder,
            acts,
            counts,
            evolution=evolution,
            snapshots=snapshots,
            accuracy=accuracy,
            min_cosine=min_cosine,
            seed=options.seed,
        )
        run.save_tables(dynamics)
        probes = probe(crosscoder, acts, evolution, n_features=options.n_probes, seed=options.seed)
        run.save_tables(probes)
    return {**tables, **dynamics, **probes}
