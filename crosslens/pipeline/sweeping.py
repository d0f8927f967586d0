"""`sweep`: choose the number of features F and of active ones k by what is explained and what another seed finds.

1. Train every F and k of a grid from `n_seeds` seeds on the same activations.
2. Measure each setting on the held-out tokens: explained variance at the least explained snapshot, the share of dead
   features, and the agreement of the seeds, by `match`.
3. Keep the settings whose least explained variance is within `tolerance` of the best and whose dead share is at most
   `max_dead` (if none is, the fewest dead). Of these propose the one with the largest agreement, the share of live
   features with a partner in another seed; among those within .01 of it the smaller k, then the smaller F.

Explained variance always rises with F and k, and agreement does not, so neither chooses alone. The agreement is a
mean over pairs of seeds in both directions; the table has its range, which with few seeds is most of what is known of
its uncertainty. The rule is new here.

Symbols: S snapshots, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from crosslens.config import (
    CacheOptions,
    CrosscoderOptions,
    ModelOptions,
    SourceOptions,
    SweepOptions,
    TrainingOptions,
    architectures_with,
)
from crosslens.errors import UserError
from crosslens.pipeline.opening import find_activations
from crosslens.pipeline.training import check_one_hook, check_training, make_architecture, make_config
from crosslens.rundir import RunDir, check_writable
from crosslens.training.config import TrainConfig

if TYPE_CHECKING:
    import pandas as pd

    from crosslens.activations import Activations
    from crosslens.crosscoders import CrosscoderTrainingConfig

_TIE = 0.01  # agreement that two settings may differ by without a reason to prefer one


class Choice(NamedTuple):
    """The result of `choose`."""

    d_sae: int
    """The proposed number of features."""
    k: float
    """The proposed number of active features per token."""
    reason: str
    """Why, in a sentence."""
    table: pd.DataFrame
    """A row per setting: d_sae, k, seeds, explained_variance and least_explained (mean over seeds of the mean and the
    smallest over snapshots), l0, dead (share of features), live (number), agreement (share of live features with a
    partner in another seed, one to one, over pairs of seeds in both directions) with agreement_low and agreement_high,
    agreed (number: agreement times live), variance (the same share weighted by variance), cosine (share of live
    features whose partner also has this cosine of the decoders), consensus and consensus_variance (of
    `consensus_shares`), proposed."""


def sweep(
    run: RunDir,
    source: SourceOptions,
    grid: SweepOptions,
    training: TrainingOptions | None = None,
    *,
    models: ModelOptions | None = None,
    cache: CacheOptions | None = None,
) -> Choice:
    """Train a grid of F and k in a run directory, save the table "sweep", and propose a setting; repeated, it
    continues.

    Args:
        run: a new directory, or that of the same sweep.
        source: the activations, of one hook point.
        grid: the settings.
        training: how each is trained.
        models: how language models run.
        cache: whether activations are written to disk first.

    Raises:
        UserError: as `pipeline.train` and `choose`.
    """
    training, models, cache = training or TrainingOptions(), models or ModelOptions(), cache or CacheOptions()
    largest = CrosscoderOptions(architecture=grid.architecture, d_sae=max(grid.d_sae), k=max(grid.k))
    run.check_usable()
    check_one_hook(source)
    check_training(None, source, largest, training, models)
    if cache.cache is not None:
        check_writable(cache.cache)
    acts = find_activations(source, models)()
    config = make_config(training, acts.settings.device, run.path, source.seed)
    architecture = make_architecture(largest, config, acts.n_tokens)
    with run.writing():
        run.claim({"hook_name": source.hook[0], "dataset": str(source.dataset)}, part="sweep")
        if cache.cache is not None:
            acts = acts.cache(cache.cache, cache.cache_dtype)
        choice = choose(acts, architecture, config, d_sae=grid.d_sae, k=grid.k, n_seeds=grid.seeds)
        run.save_table("sweep", choice.table)
    return choice


def choose(
    acts: Activations,
    architecture: CrosscoderTrainingConfig,
    config: TrainConfig | None = None,
    *,
    d_sae: Sequence[int],
    k: Sequence[float],
    n_seeds: int = 2,
    threshold: float = 0.7,
    min_rate: float = 0.0,
    tolerance: float = 0.01,
    max_dead: float = 0.1,
) -> Choice:
    """Train a grid of F and k from several seeds, and propose a setting.

    Args:
        acts: activations to train on; cached ones are read instead of computed again for every training.
        architecture: a training config with `k`; its `d_sae` and `k` are replaced.
        config: how to train. With a `run_dir` every training has a run directory inside it, and what is finished is not
            trained again.
        d_sae: numbers of features.
        k: numbers of active features per token.
        n_seeds: trainings per setting, from `config.seed` on.
        threshold: correlation from which a partner counts.
        min_rate: features that fire on this share of the held-out tokens or less are not live.
        tolerance: how much less than the best setting the proposed one may explain at its least explained snapshot.
        max_dead: largest share of dead features of the proposed setting.

    Raises:
        UserError: an architecture without k, an empty or impossible grid, or as `cl.train`.
    """
    import pandas as pd

    from crosslens.evolution.seeds import compare_seeds, consensus_shares
    from crosslens.training.evaluation import reconstruction_table
    from crosslens.training.run import train

    config = config or TrainConfig()
    settings = _grid(architecture, d_sae, k, n_seeds)
    run = None if config.run_dir is None else RunDir(config.run_dir)
    rows: list[dict[str, Any]] = []
    for F, active in settings:
        trained = {
            str(seed): train(
                acts,
                dataclasses.replace(architecture, **{"d_sae": F, "k": active}),
                dataclasses.replace(
                    config,
                    seed=seed,
                    run_dir=None if run is None else run.setting(F, active, seed).path,
                    evaluate=False,
                ),
            )
            for seed in range(config.seed, config.seed + n_seeds)
        }
        evaluated = [reconstruction_table(crosscoder, acts) for crosscoder in trained.values()]
        found = compare_seeds(trained, acts, threshold, min_rate=min_rate)
        pairs, shares = found["seeds"], consensus_shares(found["consensus"])
        agreed = pd.concat([pairs["share_a"], pairs["share_b"]])
        live = float(shares["alive"].mean())
        rows.append(
            {
                "d_sae": F,
                "k": float(active),
                "seeds": n_seeds,
                "explained_variance": _mean(table["explained_variance"].mean() for table in evaluated),
                "least_explained": _mean(table["explained_variance"].min() for table in evaluated),
                "l0": _mean(table["l0"].mean() for table in evaluated),
                "dead": _mean(table["dead_fraction"].mean() for table in evaluated),
                "live": live,
                "agreement": float(agreed.mean()),
                "agreement_low": float(agreed.min()),
                "agreement_high": float(agreed.max()),
                "agreed": float(agreed.mean()) * live,
                "variance": float(pd.concat([pairs["variance_a"], pairs["variance_b"]]).mean()),
                "cosine": float(pd.concat([pairs["cosine_a"], pairs["cosine_b"]]).mean()),
                "consensus": float(shares["consensus"].mean()),
                "consensus_variance": float(shares["consensus_variance"].mean()),
            }
        )
    table = pd.DataFrame(rows)
    at, reason = propose(table, tolerance, max_dead)
    table["proposed"] = table.index == at
    return Choice(int(table.loc[at, "d_sae"]), float(table.loc[at, "k"]), reason, table)


def propose(table: pd.DataFrame, tolerance: float = 0.01, max_dead: float = 0.1) -> tuple[int, str]:
    """Choose a row of the table of `choose`.

    Args:
        table: with d_sae, k, least_explained, dead and agreement.
        tolerance: as in `choose`.
        max_dead: as in `choose`.

    Returns:
        The position of the row, and the reason in a sentence.
    """
    best = table["least_explained"].max()
    enough = table.loc[table["least_explained"] >= best - tolerance]
    alive = enough.loc[enough["dead"] <= max_dead]
    if alive.empty:
        alive = enough.loc[enough["dead"] <= enough["dead"].min()]
    highest = alive["agreement"].max()
    tied = alive.loc[alive["agreement"] >= highest - _TIE].sort_values(["k", "d_sae"], kind="stable")
    at = int(tied.index[0])
    row = table.loc[at]
    reason = (
        f"F={row['d_sae']:.0f}, k={row['k']:g}: {len(enough)} of {len(table)} settings explain within {tolerance:g} of "
        f"the best ({best:.3f}) at their least explained snapshot, and {len(alive)} of them have few enough dead "
        f"features ({alive['dead'].max():.1%} or less). Of these the seeds agree most on this one: "
        f"{row['agreement']:.0%} of the live features, where the others have {alive['agreement'].min():.0%} to "
        f"{highest:.0%}"
    )
    if len(tied) > 1:
        reason += f" ({len(tied)} settings are within {_TIE:g} of that; this one has the smallest k, then F)"
    return at, reason + "."


def _grid(
    architecture: CrosscoderTrainingConfig, d_sae: Sequence[int], k: Sequence[float], n_seeds: int
) -> list[tuple[int, float]]:
    """The settings, smallest first.

    Raises:
        UserError: as `choose`.
    """
    if not hasattr(architecture, "k"):
        raise UserError(
            f"{type(architecture).__name__} has no k, which `choose` compares: use one of "
            f"{', '.join(architectures_with('k'))}, or train seeds with several coefficients and compare them by "
            "compare_seeds"
        )
    if n_seeds < 2:
        raise UserError(f"n_seeds={n_seeds} must be 2 or more: agreement is between seeds")
    settings = sorted({(F, active) for F in d_sae for active in k})
    if not settings:
        raise UserError(f"d_sae={list(d_sae)} and k={list(k)} are an empty grid: give a number of each or more")
    for F, active in settings:
        if not 0 < active <= F:
            raise UserError(f"k={active:g} is not in (0, {F}], the d_sae of this setting: leave one of them out")
    return settings


def _mean(values: Any) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)
