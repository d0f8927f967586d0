"""Run all analyses of one crosscoder's features in one call.

1. `study_evolution`: lifecycles, directions, dimensionality, splitting and controls. Firing is measured once for all.
2. `study_births`: decodability beside the decoder norm, and births with their uncertainty and controls.
3. `study_dynamics`: the models' predictions next to the features, and a proposal of snapshots.
4. `study_probes`: linear probes of single features.

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
from crosslens.evolution.agreement import top_agreement
from crosslens.evolution.births import beside_untrained, count_births, date_births, presence_curves
from crosslens.evolution.controls import encoder_share, latent_scaling, penalises_decoder
from crosslens.evolution.dynamics import dynamics_table, measure_dynamics
from crosslens.evolution.geometry import (
    decoder_cosines,
    feature_dimensionality,
    rotation_per_interval,
    total_dimensionality,
)
from crosslens.evolution.lifecycles import (
    classify_lifecycles,
    evolve,
    measure_firing,
    relative_norms,
    rotation,
    snapshot_columns,
)
from crosslens.evolution.ngrams import NgramCounts, count_ngrams
from crosslens.evolution.phases import find_phases
from crosslens.evolution.presence import measure_decodability
from crosslens.evolution.probes import probe, probe_parts, probe_presence
from crosslens.evolution.selection import propose_snapshots, snapshot_similarity
from crosslens.evolution.splitting import replacements, splits
from crosslens.snapshots.collection import Snapshots

_PREDICTED = 30_000  # tokens whose predictions `study_dynamics` measures, at least, where the data has as many


def study_evolution(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    presence: float = 0.5,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Run every analysis of features over time that needs no task.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; the held-out ones are used.
        presence: a feature is present where its norm is at least this share of its largest norm.
        min_run: snapshots in a row a feature must be present for to count as born.
        min_firing_rate: features active on this share of the held-out tokens or less are dead.
        seed: seed for the random directions that dimensionality is compared with.

    Returns:
        Tables by name, as a run directory stores them.
        Per feature: evolution (of `evolve`), feature_dimensionality (dimensionality/<label>), directions
        (cosine/<label>, with the row at the last snapshot), encoder (share/<label>, of `encoder_share`), and scaling
        (of `latent_scaling`; not for TopK and BatchTopK).
        Per pair of features: replacements, splits. Per snapshot: dimensionality (of `total_dimensionality`).
        Per pair of snapshots: rotation (of `rotation_per_interval`), cosines (snapshot, other, n, and mean and
        quartiles of the cosines of live features). Per feature and interval: agreement (of `top_agreement`).

    Raises:
        UserError: one snapshot only, a threshold out of range, activations of other snapshots or another hook point.
    """
    firing = measure_firing(crosscoder, acts)
    lifecycles = evolve(crosscoder, firing, presence=presence, min_run=min_run, min_firing_rate=min_firing_rate)
    alive = torch.tensor(lifecycles["alive"].to_numpy(dtype=bool))
    labels = snapshot_columns(crosscoder)["label"].tolist()
    dimensions = feature_dimensionality(crosscoder, firing, presence=presence)
    tables = {
        "evolution": lifecycles,
        "rotation": rotation_per_interval(crosscoder, alive),
        "cosines": _cosines(crosscoder, alive),
        "directions": _per_feature("cosine", rotation(crosscoder), labels),
        "dimensionality": total_dimensionality(crosscoder, firing, presence=presence, seed=seed),
        "feature_dimensionality": _per_feature("dimensionality", dimensions, labels),
        "encoder": _per_feature("share", encoder_share(crosscoder, acts), labels),
        "replacements": replacements(crosscoder, acts, lifecycles),
        "splits": splits(crosscoder, alive, presence=presence),
        "agreement": top_agreement(crosscoder, acts),
    }
    if penalises_decoder(crosscoder):
        tables["scaling"] = latent_scaling(crosscoder, acts).to_frame(labels)
    return tables


def study_births(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    presence: float = 0.5,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
    untrained: pd.DataFrame | None = None,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Read the presence of every feature by three measures, and date and count births by each.

    The measures are the decoder norm, and R2 and within-token R2 as `measure_decodability` defines them.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; the held-out ones are used.
        presence: a feature is present where a measure is at least this share of its largest value.
        min_run: snapshots in a row a feature must be present for to count as born.
        min_firing_rate: features active on this share of the held-out tokens or less are dead.
        untrained: the result of `untrained_births`, to stand beside the counts.
        seed: seed for the intervals.

    Returns:
        The tables
        presence, a row per feature and snapshot: feature, snapshot, label, step, norm, r2, within (missing where there
        is no reading), strength (v, the relative norm), firing_rate (share of tokens with f_is > 0).
        births, a row per measure and feature with a reading: measure, feature, kind (lexical or contextual),
        token_share (of the variance, between token types), firing_rate; the columns of `classify_lifecycles`;
        birth_step; and those of `date_births`, missing by the norm.
        birth_counts, of `count_births`, with untrained (share of the features born in untrained models) if given.

    Raises:
        UserError: one snapshot only, a threshold out of range, too few activations held out, or those of other
            snapshots or of another hook point.
    """
    firing, found = measure_firing(crosscoder, acts), measure_decodability(crosscoder, acts)
    norms = crosscoder.decoder_norms.detach().cpu()
    alive = (firing.rate > min_firing_rate).numpy() & (norms > 0).any(1).numpy()
    curves = presence_curves(norms, found, alive)
    snapshots, (F, S) = snapshot_columns(crosscoder), norms.shape
    long = pd.DataFrame({"feature": np.repeat(np.arange(F), S), "snapshot": np.tile(np.arange(S), F)})
    for name in ("label", "step"):
        long[name] = snapshots[name].take(long["snapshot"]).array
    for name, values in (
        ("norm", norms.numpy()),
        ("r2", found.r2),
        ("within", found.within),
        ("strength", relative_norms(norms).numpy()),
        ("firing_rate", firing.snapshot_rate.numpy()),
    ):
        long[name] = values.astype(np.float32).flatten()
    kinds = np.select([found.between > 0.5, found.between <= 0.5], ["lexical", "contextual"], "")
    parts: list[pd.DataFrame] = []
    for measure, values in curves.items():
        read = values.max(1) > 0
        table = pd.DataFrame({"measure": measure, "feature": np.arange(F), "kind": kinds, "token_share": found.between})
        table["firing_rate"] = firing.rate.numpy()
        lifecycles = classify_lifecycles(torch.from_numpy(values), presence, min_run=min_run)
        lifecycles.insert(
            3, "birth_step", snapshots["step"].reindex(lifecycles["birth"].fillna(-1)).astype("Int64").array
        )
        table = pd.concat([table, lifecycles], axis=1)
        if measure != "norm":
            dates = date_births(found, measure, read, presence=presence, min_run=min_run, seed=seed)
            table = pd.concat([table, dates], axis=1)
        parts.append(table.loc[read])
    counts = count_births(curves, found.lexical, found, min_run=min_run)
    return {
        "presence": long,
        "births": pd.concat(parts, ignore_index=True),
        "birth_counts": counts if untrained is None else beside_untrained(counts, untrained),
    }


def study_dynamics(
    crosscoder: Crosscoder,
    acts: Activations,
    counts: NgramCounts | None = None,
    *,
    snapshots: Snapshots | None = None,
    accuracy: pd.DataFrame | None = None,
    n_proposed: int = 5,
    presence: float = 0.5,
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
        snapshots: snapshots whose predictions are measured, those of `acts` among them: with the untrained model, which
            crosscoders do without, the fall of the bigram KL begins at 0. Those of `acts` if None.
        accuracy: the result of `Task.accuracy`, for the proposal of snapshots; concatenate the tables of several tasks.
        n_proposed: number of snapshots to propose, at most all.
        presence: a feature is present where its norm is at least this share of its largest norm.
        seed: seed for the intervals and the random directions.

    Returns:
        The tables dynamics (of `dynamics_table`), phases (of `find_phases`), similarity (of `snapshot_similarity`) and
        selection (of `propose_snapshots`).

    Raises:
        UserError: one snapshot only, counts of another tokenizer, activations of other snapshots.
    """
    firing = measure_firing(crosscoder, acts)
    counts = count_ngrams(acts.train_tokens(), acts.snapshots.tokenizer) if counts is None else counts
    # averages over contexts need many; the crosscoder's training does not touch the models' predictions
    T = acts.tokens.shape[1]
    tokens = acts.tokens[-max(len(acts.held_out_tokens()), -(-_PREDICTED // T)) :]
    measured = measure_dynamics(snapshots or acts.snapshots, counts, tokens, seed=seed, settings=acts.settings)
    similarity = snapshot_similarity(acts)
    chosen = min(n_proposed, len(acts.snapshots))
    return {
        "dynamics": dynamics_table(measured, crosscoder, firing, presence=presence, seed=seed),
        "phases": find_phases(measured, crosscoder, firing, presence=presence, seed=seed),
        "similarity": similarity,
        "selection": propose_snapshots(similarity, chosen, accuracy, steps=acts.snapshots.steps),
    }


def study_probes(
    crosscoder: Crosscoder,
    acts: Activations,
    presence: pd.DataFrame | None = None,
    *,
    n_features: int = 50,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Probe some features at every snapshot.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots.
        presence: the table "presence" of `study_births`, to compare the errors with every measure of presence.
        n_features: features to probe, drawn from those that are active often enough.
        seed: seed for the draws.

    Returns:
        The tables probe (of `probe`), probe_parts, and with `presence` probe_presence.

    Raises:
        UserError: as `probe`.
    """
    probes = probe(crosscoder, acts, n_features=n_features, seed=seed)
    tables = {"probe": probes, "probe_parts": probe_parts(probes, seed=seed)}
    if presence is not None:
        tables["probe_presence"] = probe_presence(probes, presence, seed=seed)
    return tables


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
