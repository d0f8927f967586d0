"""crosslens watches a language model learn: crosscoders over pretraining snapshots, for SAELens and TransformerLens.

    import crosslens as cl

    snaps = cl.Snapshots.demo(seed=0)
    acts = cl.Activations(snaps, "blocks.1.hook_resid_post", dataset="text.txt", n_tokens=250_000)
    cc = cl.train(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=1024, k=16))
    table = cl.evolve(cc, acts)

Names are loaded when they are first used, for SAELens and TransformerLens take seconds to import. The architectures are
registered with SAELens at that moment, or at once when sae_lens is already imported; `register()` does it by hand.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

_MODULES = {
    "crosslens.ablation": ("ablate", "change_shares", "exact_effects"),
    "crosslens.activations": ("Activations",),
    "crosslens.additivity": ("Additivity", "pair_additivity"),
    "crosslens.alignment": ("top_agreement",),
    "crosslens.areas": ("curve_areas",),
    "crosslens.attribution": ("attribute",),
    "crosslens.circuits": ("connect_features",),
    "crosslens.controls": ("LatentScaling", "encoder_share", "latent_scaling"),
    "crosslens.crosscoders": (
        "Crosscoder",
        *(
            f"{architecture}Crosscoder{suffix}"
            for architecture in ("Standard", "TopK", "BatchTopK", "JumpReLU")
            for suffix in ("", "Config", "TrainingSAE", "TrainingConfig")
        ),
        "register",
    ),
    "crosslens.dynamics": ("Dynamics", "dynamics_table", "measure_dynamics"),
    "crosslens.edges": ("Edges",),
    "crosslens.effects": ("Attribution",),
    "crosslens.errors": ("UserError",),
    "crosslens.evaluation": ("evaluate",),
    "crosslens.evolution": ("evolve", "measure_firing", "rotation"),
    "crosslens.geometry": ("decoder_cosines", "feature_dimensionality", "total_dimensionality", "turning"),
    "crosslens.history": ("History", "study_dynamics", "study_evolution", "study_features", "study_probes"),
    "crosslens.feature_data": ("export_features", "feature_tables"),
    "crosslens.imports": ("import_crosscoder",),
    "crosslens.interpretation": ("complexity_correlation", "label_features"),
    "crosslens.intervention": ("CleanRun", "Edit", "Splice"),
    "crosslens.languages": ("compare_languages", "count_languages", "list_languages", "split_languages"),
    "crosslens.ngrams": ("NgramCounts", "count_ngrams"),
    "crosslens.phases": ("find_phases",),
    "crosslens.pretrained": ("from_pretrained", "load"),
    "crosslens.pretraining": ("PretrainingConfig",),
    "crosslens.probing": ("probe", "probe_correlation", "probe_parts"),
    "crosslens.publishing": ("push_to_hub",),
    "crosslens.raters": ("Rater",),
    "crosslens.registry": ("list_releases", "load_snapshots", "register_release"),
    "crosslens.report": ("log_report", "write_report"),
    "crosslens.runs": ("PromptRuns",),
    "crosslens.selection": ("propose_snapshots", "snapshot_similarity"),
    "crosslens.shares": ("classify", "pairwise_relie", "reldec", "relie", "relie_interval", "sign_changes"),
    "crosslens.snapshots": ("Snapshot", "Snapshots"),
    "crosslens.stability": ("compare_evolutions", "compare_features", "match_features"),
    "crosslens.study": ("Study", "study_task"),
    "crosslens.succession": ("partings", "successions"),
    "crosslens.standalone": ("export_sae",),
    "crosslens.tasks": ("Task",),
    "crosslens.timeline": ("find_examples", "follow_features"),
    "crosslens.trainer": ("TrainConfig",),
    "crosslens.training": ("train",),
    "crosslens.transfer": ("transfer_matrix",),
    "crosslens.views": ("snapshot_view",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = ("recipes",)

__all__ = sorted([*_HOME, *_SUBMODULES])  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from crosslens import recipes as recipes
    from crosslens.ablation import ablate as ablate
    from crosslens.ablation import change_shares as change_shares
    from crosslens.ablation import exact_effects as exact_effects
    from crosslens.activations import Activations as Activations
    from crosslens.additivity import Additivity as Additivity
    from crosslens.additivity import pair_additivity as pair_additivity
    from crosslens.alignment import top_agreement as top_agreement
    from crosslens.areas import curve_areas as curve_areas
    from crosslens.attribution import attribute as attribute
    from crosslens.circuits import connect_features as connect_features
    from crosslens.controls import LatentScaling as LatentScaling
    from crosslens.controls import encoder_share as encoder_share
    from crosslens.controls import latent_scaling as latent_scaling
    from crosslens.crosscoders import *  # noqa: F403
    from crosslens.dynamics import Dynamics as Dynamics
    from crosslens.dynamics import dynamics_table as dynamics_table
    from crosslens.dynamics import measure_dynamics as measure_dynamics
    from crosslens.edges import Edges as Edges
    from crosslens.effects import Attribution as Attribution
    from crosslens.errors import UserError as UserError
    from crosslens.evaluation import evaluate as evaluate
    from crosslens.evolution import evolve as evolve
    from crosslens.evolution import measure_firing as measure_firing
    from crosslens.evolution import rotation as rotation
    from crosslens.feature_data import export_features as export_features
    from crosslens.feature_data import feature_tables as feature_tables
    from crosslens.geometry import decoder_cosines as decoder_cosines
    from crosslens.geometry import feature_dimensionality as feature_dimensionality
    from crosslens.geometry import total_dimensionality as total_dimensionality
    from crosslens.geometry import turning as turning
    from crosslens.history import History as History
    from crosslens.history import study_dynamics as study_dynamics
    from crosslens.history import study_evolution as study_evolution
    from crosslens.history import study_features as study_features
    from crosslens.history import study_probes as study_probes
    from crosslens.imports import import_crosscoder as import_crosscoder
    from crosslens.interpretation import complexity_correlation as complexity_correlation
    from crosslens.interpretation import label_features as label_features
    from crosslens.intervention import CleanRun as CleanRun
    from crosslens.intervention import Edit as Edit
    from crosslens.intervention import Splice as Splice
    from crosslens.languages import compare_languages as compare_languages
    from crosslens.languages import count_languages as count_languages
    from crosslens.languages import list_languages as list_languages
    from crosslens.languages import split_languages as split_languages
    from crosslens.ngrams import NgramCounts as NgramCounts
    from crosslens.ngrams import count_ngrams as count_ngrams
    from crosslens.phases import find_phases as find_phases
    from crosslens.pretrained import from_pretrained as from_pretrained
    from crosslens.pretrained import load as load
    from crosslens.pretraining import PretrainingConfig as PretrainingConfig
    from crosslens.probing import probe as probe
    from crosslens.probing import probe_correlation as probe_correlation
    from crosslens.probing import probe_parts as probe_parts
    from crosslens.publishing import push_to_hub as push_to_hub
    from crosslens.raters import Rater as Rater
    from crosslens.registry import list_releases as list_releases
    from crosslens.registry import load_snapshots as load_snapshots
    from crosslens.registry import register_release as register_release
    from crosslens.report import log_report as log_report
    from crosslens.report import write_report as write_report
    from crosslens.runs import PromptRuns as PromptRuns
    from crosslens.selection import propose_snapshots as propose_snapshots
    from crosslens.selection import snapshot_similarity as snapshot_similarity
    from crosslens.shares import classify as classify
    from crosslens.shares import pairwise_relie as pairwise_relie
    from crosslens.shares import reldec as reldec
    from crosslens.shares import relie as relie
    from crosslens.shares import relie_interval as relie_interval
    from crosslens.shares import sign_changes as sign_changes
    from crosslens.snapshots import Snapshot as Snapshot
    from crosslens.snapshots import Snapshots as Snapshots
    from crosslens.stability import compare_evolutions as compare_evolutions
    from crosslens.stability import compare_features as compare_features
    from crosslens.stability import match_features as match_features
    from crosslens.standalone import export_sae as export_sae
    from crosslens.study import Study as Study
    from crosslens.study import study_task as study_task
    from crosslens.succession import partings as partings
    from crosslens.succession import successions as successions
    from crosslens.tasks import Task as Task
    from crosslens.timeline import find_examples as find_examples
    from crosslens.timeline import follow_features as follow_features
    from crosslens.trainer import TrainConfig as TrainConfig
    from crosslens.training import train as train
    from crosslens.transfer import transfer_matrix as transfer_matrix
    from crosslens.views import snapshot_view as snapshot_view


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"crosslens.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'crosslens' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if "sae_lens" in sys.modules:
    importlib.import_module("crosslens.crosscoders")
