"""Write the features of a run to files for other programs, from the tables of `crosslens evolve`; no model is run.

`write_features`: one JSON file with the schema of `crosslens.features.tables`, of which `data.tokens` is null here, and
for every feature two keys more:

    "label"        what `crosslens label` found, or null
    "lifecycle"    {measure: {"origin", "fate", "birth", "birth_low", "birth_high", "peak", "death"}}, where the
                   measures are r2, within and norm, and the last five are labels of snapshots, or null where there
                   is none: a feature that is never born, or does not die

`write_neuronpedia`: the files that SAEDashboard 0.8.0 writes for one SAE, which Neuronpedia's converter reads
(`convert-saedashboard-to-neuronpedia-export.py`). A folder holds `batch-0.json`, `batch-1.json`, ..., each what
`NeuronpediaDashboardBatch.to_dict` in `sae_dashboard/neuronpedia/neuronpedia_dashboard.py` returns. One snapshot of a
crosscoder stands for the SAE:

1. `pos_str` and `neg_str` are the logit lens at that snapshot, `frac_nonzero` the share of tokens the feature fires on.
2. `activations` are the strongest examples, as the group of top activations, for which SAEDashboard sets `bin_min` and
   `bin_contains` to -1 and `bin_max` to the largest activation. Values are the feature's, at that snapshot 0 where its
   gate is closed.
3. Histograms, aligned neurons and correlated features are empty lists, as in SAEDashboard where they are not measured.

SAEDashboard writes the names of tokens in the vocabulary; here they are as the text reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crosslens.errors import UserError
from crosslens.features.tables import FORMAT
from crosslens.progress import tqdm
from crosslens.rundir import RunDir, delete, write_text
from crosslens.snapshots.lookup import find_snapshot

PER_BATCH = 128
"""Features in a file for Neuronpedia, which takes no more at a time."""
_DIGITS = 5
_ORDER = ("feature", "snapshot", "rank", "position")
_PLACE = ("rank", "sequence", "position", "threshold")
_DATES = ("birth", "birth_low", "birth_high", "peak", "death")


def write_features(run: RunDir, path: str | Path) -> Path:
    """Write features as JSON, with the schema in this module's docstring.

    Args:
        run: a run directory that `crosslens evolve` has been run on.
        path: the JSON file.

    Returns:
        The path.

    Raises:
        UserError: a table is missing or damaged.
    """
    info, tables = run.read_json(), _Tables(run)
    labels = tables.labels
    identity = info.get("identity", {})
    architecture = identity.get("architecture", {})
    contents = {
        "format": FORMAT,
        "crosscoder": {
            "architecture": architecture.get("architecture"),
            "d_sae": architecture.get("d_sae"),
            "d_model": architecture["d_in"] // len(labels) if "d_in" in architecture else None,
            "model_name": identity.get("model_name"),
            "hook_name": identity.get("hook_name"),
        },
        "data": {
            "dataset": identity.get("dataset_path"),
            "context_size": identity.get("context_size"),
            "tokens": None,
        },
        "snapshots": [{name: row.get(name) for name in ("label", "step", "tokens")} for row in identity["snapshots"]],
        "features": [_feature(tables, i) for i in tqdm(tables.features, desc="Features", leave=False, delay=2)],
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(contents, allow_nan=False, ensure_ascii=False))
    return target


def write_neuronpedia(
    run: RunDir, folder: str | Path, snapshot: int | str, n_prompts: int, *, source_set: str = "crosslens"
) -> list[Path]:
    """Write the features of one snapshot as SAEDashboard does, for Neuronpedia; see this module's docstring.

    Args:
        run: a run directory that `crosslens evolve` has been run on.
        folder: folder of the batch files; those of an earlier export are replaced.
        snapshot: index or label.
        n_prompts: sequences that examples and densities were measured on.
        source_set: name of the source set on Neuronpedia; the snapshot's label is the suffix of the SAE's id.

    Returns:
        The files.

    Raises:
        UserError: no such snapshot, or a table is missing or damaged.
    """
    tables, identity = _Tables(run), run.read_json().get("identity", {})
    s = find_snapshot(tables.labels, snapshot)
    common = {
        "n_prompts_total": n_prompts,
        "n_tokens_in_prompt": int(identity["context_size"]),
        "dataset": str(identity["dataset_path"]),
    }
    target, written = Path(folder), list[Path]()
    target.mkdir(parents=True, exist_ok=True)
    for old in (path for path in target.glob("batch-*.json") if re.fullmatch(r"batch-\d+\.json", path.name)):
        delete(old, target)
    batches = range(0, len(tables.features), PER_BATCH)
    for n, begin in enumerate(tqdm(batches, desc="Batches", unit="file", leave=False, delay=2)):
        features = [_dashboard(tables, i, s, common) for i in tables.features[begin : begin + PER_BATCH]]
        batch = {
            "model_id": str(identity["model_name"]),
            "layer": int(identity["hook_name"].split(".")[1]),
            "sae_set": source_set,
            "sae_id_suffix": tables.labels[s],
            "features": features,
        }
        written.append(target / f"batch-{n}.json")
        write_text(written[-1], json.dumps(batch, allow_nan=False))
    return written


class _Tables:
    """The tables of a run that say what features are, by feature.

    Raises:
        UserError: one of them is missing or damaged.
    """

    def __init__(self, run: RunDir) -> None:
        found = {
            name: run.table(name)
            for name in ("evolution", "lifecycles", "lens", "examples", "example_tokens", "labels")
        }
        missing = [name for name, table in found.items() if table is None and name != "labels"]
        if missing:
            raise UserError(f"{run.path} has no table {missing[0]}: run `crosslens evolve {run.path}` first")
        self._columns: dict[str, dict[str, np.ndarray]] = {}
        for name, table in found.items():
            if table is not None:
                order = [column for column in _ORDER if column in table]
                ordered = table.sort_values(order, kind="stable")
                self._columns[name] = {str(column): ordered[column].to_numpy() for column in ordered}
        evolution = self._columns["evolution"]
        self.features: list[int] = np.unique(evolution["feature"]).tolist()
        self.labels: list[str] = evolution["label"][: len(np.unique(evolution["snapshot"]))].tolist()

    def of(self, name: str, feature: int) -> dict[str, np.ndarray]:
        """The columns of a table, in the rows of a feature and ordered by snapshot, rank and position."""
        columns = self._columns.get(name, {"feature": np.zeros(0, int)})
        begin, end = np.searchsorted(columns["feature"], [feature, feature + 1])
        return {column: values[begin:end] for column, values in columns.items()}

    def examples(self, feature: int) -> Iterator[tuple[int, int, float, dict[str, Any]]]:
        """Sequence, position and threshold of each example, strongest first, and the tokens around it."""
        rows, around = self.of("examples", feature), self.of("example_tokens", feature)
        for rank, *place in zip(*(rows.get(name, ()) for name in _PLACE), strict=True):
            begin, end = np.searchsorted(around["rank"], [rank, rank + 1])
            window = {name: around[name][begin:end] for name in ("token", "activation", "position")}
            yield int(place[0]), int(place[1]), float(place[2]), window


def _feature(tables: _Tables, i: int) -> dict[str, Any]:
    evolution, named, lifecycles = (tables.of(name, i) for name in ("evolution", "labels", "lifecycles"))
    examples: list[dict[str, Any]] = [
        {
            "sequence": sequence,
            "position": position,
            "tokens": [*map(str, window["token"])],
            "activations": _rounded(window["activation"]),
            "peak": int(position - window["position"][0]),
        }
        for sequence, position, _, window in tables.examples(i)
    ]
    label = next(iter(named.get("label", ())), None)
    return {
        "feature": i,
        "label": label if isinstance(label, str) and label else None,
        "lifecycle": {
            str(measure): _lifecycle({name: values[row] for name, values in lifecycles.items()}, tables.labels)
            for row, measure in enumerate(lifecycles["measure"])
        },
        "density": _rounded(evolution["firing_rate"]),
        "decoder_norm": _rounded(evolution["norm"]),
        "max_activation": max((max(example["activations"]) for example in examples), default=0.0),
        "examples": examples,
        "logit_lens": [
            {side: [list(pair) for pair in zip(*_lens(tables, i, s, side), strict=True)] for side in _SIDES}
            for s in range(len(tables.labels))
        ],
    }


_SIDES = {"positive": "promoted", "negative": "suppressed"}


def _lens(tables: _Tables, i: int, s: int, side: str) -> tuple[list[str], list[float]]:
    """The tokens that a feature promotes or suppresses most at a snapshot, and their logits."""
    rows, name = tables.of("lens", i), _SIDES[side]
    begin, end = np.searchsorted(rows["snapshot"], [s, s + 1])
    return [*map(str, rows[name][begin:end])], _rounded(rows[f"{name}_logit"][begin:end])


def _lifecycle(row: dict[str, Any], labels: Sequence[str]) -> dict[str, str | None]:
    words = {name: row[name] if isinstance(row[name], str) else None for name in ("origin", "fate")}
    dates = {name: row.get(name, pd.NA) for name in _DATES}
    known = {name: s for name, s in dates.items() if pd.notna(s) and s < len(labels)}  # S stands for never
    return {**words, **{name: labels[int(known[name])] if name in known else None for name in _DATES}}


def _dashboard(tables: _Tables, i: int, s: int, common: dict[str, Any]) -> dict[str, Any]:
    """A `NeuronpediaDashboardFeature`."""
    evolution = tables.of("evolution", i)
    activations: list[dict[str, Any]] = []
    for _, position, threshold, window in tables.examples(i):
        values = window["activation"].astype(float)
        if threshold > 0:  # a gate per snapshot
            values = np.where(values * float(evolution["norm"][s]) > threshold, values, 0.0)
        peak = int(position - window["position"][0])
        if values[peak] > 0:
            activations.append(
                {
                    "bin_min": -1.0,
                    "bin_max": 0.0,
                    "bin_contains": -1.0,
                    "tokens": [*map(str, window["token"])],
                    "values": [round(float(value), 3) for value in values],
                    "qualifying_token_index": peak,
                }
            )
    highest = max((max(each["values"]) for each in activations), default=0.0)
    (pos_str, pos_values), (neg_str, neg_values) = (_lens(tables, i, s, side) for side in ("positive", "negative"))
    unmeasured = (
        *("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
        *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
        *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
        *("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
        *("logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "vector"),
    )
    return {
        "feature_index": i,
        **{name: list[Any]() for name in unmeasured},
        "neg_str": neg_str,
        "neg_values": [round(value, 3) for value in neg_values],
        "pos_str": pos_str,
        "pos_values": [round(value, 3) for value in pos_values],
        "frac_nonzero": round(float(evolution["firing_rate"][s]), 8),
        **common,
        "activations": [{**each, "bin_max": highest} for each in activations],
    }


def _rounded(values: Any) -> list[float]:
    return [round(float(value), _DIGITS) for value in values]
