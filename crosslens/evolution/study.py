"""All that is asked of the features of one crosscoder, in one call: their lives, directions, room, and controls.

The parts are `evolve`, `decoder_cosines`, `turning`, `rotation`, `total_dimensionality`, `latent_scaling`,
`encoder_share`, `successions` and `partings`; what fires how often is measured once. `study_dynamics` sets predictions
beside them. Letters: S snapshots, F features.
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
from crosslens.evolution.controls import encoder_share, latent_scaling
from crosslens.evolution.dynamics import dynamics_table, measure_dynamics
from crosslens.evolution.geometry import decoder_cosines, feature_dimensionality, total_dimensionality, turning
from crosslens.evolution.lifecycles import evolve, measure_firing, rotation, snapshot_columns
from crosslens.evolution.ngrams import NgramCounts, count_ngrams
from crosslens.evolution.phases import find_phases
from crosslens.evolution.probes import probe, probe_parts
from crosslens.evolution.selection import propose_snapshots, snapshot_similarity
from crosslens.evolution.splitting import partings, successions


def study_evolution(
    crosscoder: Crosscoder,
    acts: Activations,
    *,
    presence: float = 0.5,
    min_run: int = 2,
    min_firing_rate: float = 0.0,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """Everything about features over time that needs no task.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; the held-out ones are used.
        presence: share of a feature's largest norm from which it counts as present.
        min_run: snapshots in a row from which presence counts as a birth.
        min_firing_rate: features that fire on no larger share of the held-out tokens are dead.
        seed: of the random directions beside the dimensionality.

    Returns:
        Tables, by the name under which a run directory keeps them. Per feature: evolution (of `evolve`), room
        (dimensionality/<label>), directions (cosine/<label>, to the row at the last snapshot), scaling (coefficients of
        `latent_scaling`), encoder (share/<label>, of `encoder_share`). Per pair of features: successions, partings. Per
        snapshot: dimensionality (of `total_dimensionality`). Per pair of snapshots: turning (neighbours), cosines
        (snapshot, other, n, and mean and quartiles of the cosines of live features). Per feature and pair of
        neighbours: agreement (of `top_agreement`).

    Raises:
        UserError: one snapshot only, a threshold out of range, activations of other snapshots or another hook point.
    """
    firing = measure_firing(crosscoder, acts)
    lives = evolve(crosscoder, firing, presence=presence, min_run=min_run, min_firing_rate=min_firing_rate)
    alive = torch.tensor(lives["alive"].to_numpy(dtype=bool))
    labels = snapshot_columns(crosscoder)["label"].tolist()
    return {
        "evolution": lives,
        "turning": turning(crosscoder, alive),
        "cosines": _cosines(crosscoder, alive),
        "directions": _per_feature("cosine", rotation(crosscoder), labels),
        "dimensionality": total_dimensionality(crosscoder, firing, presence=presence, seed=seed),
        "room": _per_feature("dimensionality", feature_dimensionality(crosscoder, firing, presence=presence), labels),
        "scaling": latent_scaling(crosscoder, acts).to_frame(labels),
        "encoder": _per_feature("share", encoder_share(crosscoder, acts), labels),
        "successions": successions(
            crosscoder, acts, firing=firing, presence=presence, min_run=min_run, min_firing_rate=min_firing_rate
        ),
        "partings": partings(crosscoder, alive, presence=presence),
        "agreement": top_agreement(crosscoder, acts),
    }  # fmt: skip


def study_dynamics(
    crosscoder: Crosscoder,
    acts: Activations,
    counts: NgramCounts | None = None,
    *,
    accuracy: pd.DataFrame | None = None,
    n_proposed: int = 5,
    presence: float = 0.5,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """How predictions and features move together, and which snapshots tell it best.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots; predictions are measured on the held-out tokens.
        counts: unigrams and bigrams of the corpus that the model was pretrained on, by `count_ngrams`; of the tokens
            that the crosscoder is trained on when None. Few tokens make the entropy of bigrams too small, their KL too
            large, and a loss below that entropy too late: count as much text as there is.
        accuracy: of `Task.accuracy`, of one task or several, for the proposal of snapshots.
        n_proposed: snapshots to propose, fewer where there are not so many.
        presence: share of a feature's largest norm from which it counts as present.
        seed: of intervals and random directions.

    Returns:
        The tables dynamics (of `dynamics_table`), phases (of `find_phases`), similarity (of `snapshot_similarity`) and
        selection (of `propose_snapshots`).

    Raises:
        UserError: one snapshot only, counts of another tokenizer, activations of other snapshots.
    """
    snapshots, firing = acts.snapshots, measure_firing(crosscoder, acts)
    counts = count_ngrams(acts.train_tokens(), snapshots.tokenizer) if counts is None else counts
    measured = measure_dynamics(snapshots, counts, acts.held_out_tokens(), device=acts.device, backend=acts.backend)
    similarity = snapshot_similarity(acts)
    chosen = min(n_proposed, len(snapshots))
    return {
        "dynamics": dynamics_table(measured, crosscoder, firing, presence=presence, seed=seed),
        "phases": find_phases(measured, crosscoder, firing, presence=presence, seed=seed),
        "similarity": similarity,
        "selection": propose_snapshots(similarity, chosen, accuracy, steps=snapshots.steps),
    }


def study_probes(
    crosscoder: Crosscoder, acts: Activations, *, n_features: int = 50, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Linear probes of some features at every snapshot: the tables probe (of `probe`) and probe_parts.

    Args:
        crosscoder: trained on two snapshots or more.
        acts: activations of the same snapshots.
        n_features: features to probe, drawn from those that are active often enough.
        seed: of the draws.

    Raises:
        UserError: as `probe`.
    """
    probes = probe(crosscoder, acts, n_features=n_features, seed=seed)
    return {"probe": probes, "probe_parts": probe_parts(probes, seed=seed)}


def _per_feature(name: str, values: Float[Tensor, "F S"], labels: list[str]) -> pd.DataFrame:
    columns = {f"{name}/{label}": values[:, s].numpy() for s, label in enumerate(labels)}
    return pd.DataFrame({"feature": np.arange(len(values)), **columns})


def _cosines(crosscoder: Crosscoder, alive: Bool[Tensor, " F"]) -> pd.DataFrame:
    """Mean and quartiles over live features of the cosine between two snapshots, for every two."""
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
