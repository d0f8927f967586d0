"""What a user sets: one dataclass per component, a sentence under each field, checks in the class.

The command line, its `--help`, files of options, `run.json`, the functions of `crosslens.pipeline` and the tables of
options in the docs are all read from these classes. Nothing here imports torch, so that a wrong option is refused at
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from crosslens.errors import UserError, did_you_mean

Baseline: TypeAlias = Literal["patch", "zero", "mean"]
Client: TypeAlias = Literal["openai", "anthropic"]
Method: TypeAlias = Literal["removal", "both_ends", "ig", "gradient", "exact"]
Rule: TypeAlias = Literal["gauss_legendre", "midpoint", "left"]


@dataclass(frozen=True, kw_only=True)
class EvolveOptions:
    """When features form, rotate, split and fade (`crosslens evolve`)."""

    untrained: bool = False
    """Also train a crosscoder on as many models that never trained, with the run's settings, and count births there:
    the rate of false births. Takes as long as the run's harvest and training."""
    n_probes: int = 50
    """Features that linear probes are fitted to, drawn from those that are active often enough."""
    seed: int = 0
    """Seed of the random directions, the intervals, and the draw of the features to probe."""


@dataclass(frozen=True, kw_only=True)
class AttributeOptions:
    """The effect of every feature on tasks at every snapshot, on the selection half (`crosslens attribute`)."""

    task: tuple[Any, ...]
    """Tasks: `crosslens.tasks.Task`s, or their spelling on the command line."""
    method: Method = "removal"
    """removal (what is lost without a feature), both_ends (the mean of that and of what adding it gains), ig
    (integrated gradients, whose effects add up), gradient (attribution patching) or exact (ablate features one by
    one)."""
    rule: Rule = "gauss_legendre"
    """Quadrature rule of ig."""
    n_nodes: int = 20
    """Nodes of the rule, each a backward pass."""
    baseline: Baseline | None = None
    """What a feature is set to: zero, its mean over the prompts, or patch, its value on the paired prompt. Default:
    patch if half of the prompts or more are paired, otherwise zero."""
    n_exact: int = 20
    """Ablate this many of the largest effects one by one at every snapshot, to see how far the estimates agree. 0:
    none."""
    consensus: bool = False
    """Only features that most seeds have, after `train --seeds`."""
    seed: int = 0
    """Seed of the split into halves and of the intervals."""


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Ablate the top features, and keep only them, on the held-out half (`crosslens ablate`)."""

    task: tuple[Any, ...]
    """Tasks: `crosslens.tasks.Task`s, or their spelling on the command line."""
    k: tuple[int, ...] = (1, 5, 15, 50)
    """Sizes of the sets of top features."""
    baseline: Baseline | None = None
    """What a feature is set to; default: as in attribute."""
    n_draws: int = 20
    """Sets of random and of matched features to compare with."""
    seed: int = 0
    """Seed of the split into halves and of the draws."""


@dataclass(frozen=True, kw_only=True)
class StudySizes:
    """Numbers of features and draws of a study; those above the features active at some snapshot are reduced."""

    ablate_k: tuple[int, ...] = (1, 5, 15, 50)
    """Sizes of the sets that are ablated."""
    keep_k: tuple[int, ...] = (0, 5, 15, 50, 100)
    """Sizes of the sets that alone are kept."""
    k: int = 15
    """Features of a set in the transfer matrix, features that are paired for additivity, and the size whose controls
    are drawn `n_draws_last` times."""
    n_draws: int = 4
    """Sets drawn per control, random, size-matched and change-matched, at all snapshots."""
    n_draws_last: int = 100
    """Sets of size k drawn per control at the last snapshot."""
    n_exact: int = 100
    """Features with the largest effects that are ablated one by one, at every snapshot."""
    n_validated: int = 200
    """Significant features that are ablated one by one on the held-out half, at every snapshot."""
    n_bootstrap: int = 200
    """Replicates over prompts, for intervals."""
    n_pairs: int = 100
    """Pairs of features ablated together, at the last snapshot."""


@dataclass(frozen=True, kw_only=True)
class StudyOptions(StudySizes):
    """Every causal analysis of tasks (`crosslens study`): effects, ablation with controls, transfer, additivity,
    timeline, validation, languages."""

    task: tuple[Any, ...]
    """Tasks: `crosslens.tasks.Task`s, or their spelling on the command line."""
    baseline: Baseline | None = None
    """What a feature is set to: zero, its mean over the prompts, or patch, its value on the paired prompt. Default:
    patch if half of the prompts or more are paired, otherwise zero."""
    seed: int = 0
    """Seed of the split into halves and of every draw."""


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Labels of features by a language model or by their tokens, and scores (`crosslens label`)."""

    client: Client | None = None
    """API of the server. The key is read from OPENAI_API_KEY or ANTHROPIC_API_KEY."""
    model: str | None = None
    """Name of the language model on the server."""
    local: bool = False
    """Label each feature by the tokens of its examples instead, without a language model."""
    base_url: str | None = None
    """URL of another server with that API, such as a local one."""
    features: tuple[int, ...] | None = None
    """Feature ids. Default: all."""
    n_features: int | None = None
    """Label this many of them, drawn at random."""
    n_examples: int = 7
    """Examples shown per feature."""
    score: bool = True
    """Have complexity rated a second time, and judge every label, and as a control another feature's, on held-out
    passages: six requests per feature instead of one."""
    second_model: str | None = None
    """Model of the second rating. Default: the same, asked once more."""
    attempts: int = 1
    """Requests of each kind until an answer can be parsed."""
    requests_per_minute: float = 50.0
    """Rate limit."""
    workers: int = 4
    """Concurrent requests."""
    prices: tuple[float, float] | None = None
    """Prices of a million tokens in and out."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not self.local and (self.client is None or self.model is None):
            raise UserError("give --client and --model, or --local for labels without a language model")
        clients = get_args(Client)
        if self.client not in (None, *clients):
            raise UserError(
                f"client {self.client!r} is not one of {', '.join(clients)}{did_you_mean(self.client, clients)}"
            )
        if not 0 < self.requests_per_minute < math.inf:
            raise UserError(f"--requests-per-minute {self.requests_per_minute} must be a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The HTML pages of a run (`crosslens report`)."""

    wandb: bool = False
    """Add heat map and tables to the run on W&B."""
    wandb_project: str | None = None
    """W&B project to add them to, for a run trained without W&B."""
    consensus: bool = False
    """Only features that most seeds have, after `train --seeds`."""
    title: str | None = None
    """Heading of the report."""
