"""The numbers of a study that are looked at first, read off its tables."""

from __future__ import annotations

from typing import Any

import pandas as pd

from crosslens.causal.ablation import CONTROLS
from crosslens.causal.analyses import Study


def summarise_study(study: Study, k: int = 15) -> dict[str, Any]:
    """What a task loses without its top features, how far estimates agree with exact effects, and what was validated.

    Args:
        study: of a task.
        k: number of features; fewer where fewer are active.

    Returns:
        Plain numbers, lists and dictionaries: k; ablation (metrics in logits at the last snapshot: clean, without the
        top k features and each control, and of the largest set that was kept), spearman_ie_exact (by method),
        agreement (by snapshot), validation (by target and measure: correlation and interval; empty without significant
        effects), additivity, transfer_to_last (by snapshot of selection).
    """
    curves = _at_last(study.tables[f"ablation/{study.task}"]).set_index(["mode", "features", "k"]).sort_index()
    k = max(size for size in curves.loc[("ablate", "top")].index if size <= k)
    return {
        "k": k,
        "ablation": _ablation(study, curves, k),
        "spearman_ie_exact": {
            "removal": study.rank_agreement(),
            "gradient": study.rank_agreement("gradient"),
            "ig": study.rank_agreement("ig"),
            "ig_both_ends": study.rank_agreement("ig", "both"),
        },
        "agreement": [round(value, 4) for value in study.ie.agreement.tolist()],
        "validation": _validation(study),
        "additivity": _additivity(study),
        "transfer_to_last": _transfer(study),
    }


def _at_last(table: pd.DataFrame, column: str = "snapshot") -> pd.DataFrame:
    return pd.DataFrame(table[table[column] == table[column].max()])


def _ablation(study: Study, curves: pd.DataFrame, k: int) -> dict[str, float]:
    """Metrics from the curves at the last snapshot, indexed by mode, features and k."""
    kept = min(100, int(curves.loc[("keep", "top")].index.max()))  # fewer features may be active on the prompts
    top = curves.loc[("ablate", "top", k)]
    metrics = {"clean": float(top["clean"]), "top_k": float(top["metric"])}
    for control in CONTROLS:
        drawn = curves.loc[("ablate", control, k)]
        metrics |= {f"{control}_k": float(drawn["metric"]), f"{control}_k_sd": float(drawn["metric_sd"])}
    zeroing = study.tables.get(f"zeroing/{study.task}")
    if zeroing is not None:
        metrics["zeroed_k"] = float(_at_last(zeroing).query("features == 'top'")["metric"].mean())
    return {
        **metrics,
        "keep_k": float(curves.loc[("keep", "top", kept), "metric"]),
        "reconstruction_only": float(top["reconstruction_only"]),
        "n_kept": kept,
        "n_active": int(study.ie.active[:, -1].sum()),
    }


def _validation(study: Study) -> dict[str, dict[str, list[float]]]:
    """Correlation of each measure with exact effects over the snapshots of a feature, and its interval."""
    table = study.tables.get(f"validation/{study.task}.summary")
    if table is None:
        return {}
    numbers = ["correlation", "correlation_low", "correlation_high"]
    return {
        str(target): {
            str(row["measure"]): [round(float(row[name]), 3) for name in numbers]
            for row in pd.DataFrame(rows).to_dict("records")
        }
        for target, rows in table[table["kind"] == "within"].groupby("target")
    }


def _additivity(study: Study) -> dict[str, float]:
    row = study.tables[f"additivity/{study.task}.snapshots"].iloc[-1]
    return {name: float(row[name]) for name in ("interacting", "deviation")}


def _transfer(study: Study) -> list[float]:
    """Share of the effect at the last snapshot of the top features selected at each snapshot."""
    rows = _at_last(study.tables[f"transfer/{study.task}"], "ablated_at")  # in order of `selected_at`
    return [round(float(share), 4) for share in rows["share"]]
