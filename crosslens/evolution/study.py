"""Run all analyses of one crosscoder's features in one call.

1. `study_evolution`: lifecycles and births with their controls, directions, dimensionality, splitting, snapshots that
   are better left out. It takes the result of `history.evolve`, or calls it: firing and decodability are read once.
2. `study_dynamics`: the models' predictions next to the features, and a proposal of snapshots.
3. `study_probes`: linear probes of single features.

Symbols: S snapshots, F features.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.agreement import top_agreement
from crosslens.evolution.controls import encoder_share, latent_scaling, penalises_decoder
from crosslens.evolution.dynamics import dynamics_table, measure_dynamics
from crosslens.evolution.geometry import (
    decoder_cosines,
    feature_dimensionality,
    half_cosines,
    rotation_per_interval,
    total_dimensionality,
)
from crosslens.evolution.history import Evolution, evolve
from crosslens.evolution.lifecycles import rotation, snapshot_columns
from crosslens.evolution.ngrams import NgramCounts, count_ngrams
from crosslens.evolution.phases import find_phases
from crosslens.evolution.probes import probe, probe_parts, probe_presence
from crosslens.evolution.selection import doubtful_snapshots, propose_snapshots, snapshot_similarity
from crosslens.evolution.splitting import replacements, splits
from crosslens.snapshots.collection import Snapshots

_PREDICTED = 30_000  # tokens whose predictions `study_dynamics` measures, at least, where the data has as many


def study_evolution(
    crosscoder: Crosscoder,
    acts: Activations,
    evolution: Evolution | None = None,
    *,
    untrained: pd.DataFrame | None = None,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Run every analysis of features over time that needs no task.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; the held-out ones are used.
        evolution: the result of `evolve(crosscoder, acts)`, which also sets the thresholds; computed here if None.
        untrained: the result of `untrained_births`, to stand beside the counts of births.
        seed: seed for the random directions that dimensionality is compared with, and for the intervals of births.

    Returns:
        Tables by name, as a run directory stores them. Per feature and snapshot: evolution (of `evolve`). Per measure
        of presence and feature: lifecycles (of `Evolution.to_frames`). Births by measure: birth_counts (of
        `count_births`, with untrained, the share of the features born in untrained models, if given).
        Per feature: feature_dimensionality (dimensionality/<label>), directions (cosine/<label>, with the row at the
        last snapshot), encoder (share/<label>, of `encoder_share`), and scaling (of `latent_scaling`; not for TopK and
        BatchTopK, where it equals the decoder norm).
        Per pair of features: replacements, splits. Per snapshot: dimensionality (of `total_dimensionality`, with the
        participation_ratio of the activations), doubtful (of `doubtful_snapshots`). Per pair of snapshots: rotation (of
        `rotation_per_interval`), cosines (snapshot, other, n, and mean and quartiles of the cosines of live features).
        Per feature and interval: agreement (of `top_agreement`).

    Raises:
        UserError: one snapshot only, too few activations held out, those of other snapshots or another hook point, or
            an evolution that was read without activations.
    """
    evolution = evolve(crosscoder, acts, seed=seed) if evolution is None else evolution
    firing, presence = evolution.firing, evolution.presence
    if firing is None:
        raise UserError("this evolution was read without activations: give evolve(crosscoder, acts)")
    by_norm = evolution.lifecycles("norm")
    alive = torch.tensor(by_norm["alive"].to_numpy(dtype=bool))
    labels = snapshot_columns(crosscoder)["label"].tolist()
    shares = encoder_share(crosscoder, acts)
    doubtful = doubtful_snapshots(acts, shares)
    dimensionality = total_dimensionality(crosscoder, firing, presence=presence, seed=seed)
    dimensions = feature_dimensionality(crosscoder, firing, presence=presence)
    tables = {
        **evolution.to_frames(),
        "birth_counts": evolution.count_births(untrained),
        "rotation": rotation_per_interval(crosscoder, alive, half_cosines(crosscoder, acts)),
        "cosines": _cosines(crosscoder, alive),
        "directions": _per_feature("cosine", rotation(crosscoder), labels),
        "dimensionality": dimensionality.assign(participation_ratio=doubtful["participation_ratio"]),
        "feature_dimensionality": _per_feature("dimensionality", dimensions, labels),
        "encoder": _per_feature("share", shares, labels),
        "doubtful": doubtful,
        "replacements": replacements(crosscoder, acts, by_norm),
        "splits": splits(crosscoder, alive, presence=presence),
        "agreement": top_agreement(crosscoder, acts),
    }
    if penalises_decoder(crosscoder):
        tables["scaling"] = latent_scaling(crosscoder, acts).to_frame(labels)
    return tables


def study_dynamics(
    crosscoder: Crosscoder,
    acts: Activations,
    counts: NgramCounts | None = None,
    *,
    evolution: Evolution | None = None,
    doubtful: pd.DataFrame | None = None,
    snapshots: Snapshots | None = None,
    accuracy: pd.DataFrame | None = None,
    n_proposed: int = 5,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Measure how predictions and features change together, and propose snapshots.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; predictions are measured on the held-out tokens, and where these are
            fewer than 30,000 on the last of those for training too.
        counts: unigrams and bigrams of the pretraining corpus, by `count_ngrams`; of the crosscoder's training tokens
            if None. With few tokens the bigram entropy is too small, the bigram KL too large, and the loss falls below
            the entropy too late, so count as much text as possible.
        evolution: the result of `evolve(crosscoder, acts)`, which says when features are present; read here if None.
        doubtful: the result of `doubtful_snapshots`; what it names is not proposed. Computed here if None, without
            encoder shares.
        snapshots: snapshots whose predictions are measured, those of `acts` among them: with the untrained model, which
            crosscoders do without, the fall of the bigram KL begins at 0. Those of `acts` if None.
        accuracy: the result of `Task.accuracy`, for the proposal of snapshots; concatenate the tables of several tasks.
        n_proposed: number of snapshots to propose, at most all.
        seed: seed for the intervals and the random directions.

    Returns:
        The tables dynamics (of `dynamics_table`), phases (of `find_phases`), similarity (of `snapshot_similarity`) and
        selection (of `propose_snapshots`).

    Raises:
        UserError: one snapshot only, counts of another tokenizer, activations of other snapshots.
    """
    evolution = evolve(crosscoder, acts, seed=seed) if evolution is None else evolution
    counts = count_ngrams(acts.train_tokens(), acts.snapshots.tokenizer) if counts is None else counts
    # averages over contexts need many; the crosscoder's training does not touch the models' predictions
    T = acts.tokens.shape[1]
    tokens = acts.tokens[-max(len(acts.held_out_tokens()), -(-_PREDICTED // T)) :]
    measured = measure_dynamics(snapshots or acts.snapshots, counts, tokens, seed=seed, settings=acts.settings)
    similarity = snapshot_similarity(acts)
    doubtful = doubtful_snapshots(acts) if doubtful is None else doubtful
    return {
        "dynamics": dynamics_table(measured, crosscoder, evolution, seed=seed),
        "phases": find_phases(measured, crosscoder, evolution, seed=seed),
        "similarity": similarity,
        "selection": propose_snapshots(similarity, n_proposed, accuracy, steps=acts.snapshots.steps, doubtful=doubtful),
    }


def study_probes(
    crosscoder: Crosscoder,
    acts: Activations,
    evolution: Evolution | None = None,
    *,
    n_features: int = 50,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Probe some features at every snapshot.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots.
        evolution: the result of `evolve(crosscoder, acts)`; computed here if None.
        n_features: features to probe, drawn from those that are active often enough.
        seed: seed for the draws.

    Returns:
        The tables probe (of `probe`), probe_presence (the errors against every measure of presence) and probe_parts.

    Raises:
        UserError: as `probe`.
    """
    evolution = evolve(crosscoder, acts, seed=seed) if evolution is None else evolution
    probes = probe(crosscoder, acts, firing=evolution.firing, n_features=n_features, seed=seed)
    return {
        "probe": probes,
        "probe_presence": probe_presence(probes, evolution.table, seed=seed),
        "probe_parts": probe_parts(probes, seed=seed),
    }


def _per_feature(name: str, values: Float[Tensor, "F S"], labels: list[str]) -> pd.DataFrame:
    columns = {f"{name}/{label}": values[:, s].numpy() for s, label in enumerate(labels)}
    return pd.DataFrame({"feature": np.arange(len(values)), **columns})


def _cosines(crosscoder: Crosscoder, alive: Bool[Tensor, " F"]) -> pd.DataFrame:
    """Mean and quartiles over live features of the cosine between snapshots, for every pair."""
    found = decoder_cosines(crosscoder, alive.nonzero().flatten()).double().numpy()
    snapshots, S = snapshot_columns(crosscoder), crosscoder.n_snapshots
    one, other = (index.flatten() for index in np.indices((S, S)))
    table = pd.DataFrame({"snapshot": one, "other": other})
    table["label"], table["other_label"] = snapshots["label"].array[one], snapshots["label"].array[other]
    table["step"], table["other_step"] = snapshots["step"].array[one], snapshots["step"].array[other]
    known = [found[~np.isnan(found[:, s, t]), s, t] for s, t in zip(one, other, strict=True)]
    table["n"] = [len(values) for values in known]
    table["mean"] = [values.mean() if len(values) else np.nan for values in known]
    for name, share in (("low", 0.25), ("median", 0.5), ("high", 0.75)):
        table[name] = [np.quantile(values, share) if len(values) else np.nan for values in known]
    return table
