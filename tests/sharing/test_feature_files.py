"""Features of a run as files: against `export_features`, which runs the models, and the schema of SAEDashboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution import evolve
from crosslens.features.tables import export_features, feature_tables
from crosslens.rundir import RunDir
from crosslens.sharing import feature_files
from crosslens.sharing.feature_files import write_features, write_neuronpedia
from crosslens.snapshots.collection import Snapshots
from tests.intervention.test_view import make_crosscoder

F, S, D = 24, 3, 16
HOOK = "blocks.1.hook_resid_post"

# sae-dashboard 0.8.0, sae_dashboard/neuronpedia/neuronpedia_dashboard.py: the keys of `to_dict`, and the types in the
# signatures of `__init__`; a suffix None is allowed, and the three dfa_* of an activation are left out if they are None
BATCH = {"model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": str, "features": dict}
FEATURE = {
    "feature_index": int,
    "neuron_alignment_indices": [int],
    "neuron_alignment_values": [float],
    "neuron_alignment_l1": [float],
    "correlated_neurons_indices": [int],
    "correlated_neurons_l1": [float],
    "correlated_neurons_pearson": [float],
    "correlated_features_indices": [int],
    "correlated_features_l1": [float],
    "correlated_features_pearson": [float],
    "neg_str": [str],
    "neg_values": [float],
    "pos_str": [str],
    "pos_values": [float],
    "frac_nonzero": float,
    "freq_hist_data_bar_values": [float],
    "freq_hist_data_bar_heights": [float],
    "logits_hist_data_bar_heights": [float],
    "logits_hist_data_bar_values": [float],
    "n_prompts_total": int,
    "n_tokens_in_prompt": int,
    "dataset": str,
    "decoder_weights_dist": [float],
    "activations": [dict],
    "vector": [float],
}
ACTIVATION = {
    "bin_min": float,
    "bin_max": float,
    "bin_contains": float,
    "tokens": [str],
    "values": [float],
    "qualifying_token_index": int,
}


@pytest.fixture(scope="module")
def acts(tiny_snapshots: Path, tiny_text: list[str]) -> Activations:
    return Activations(Snapshots.local(tiny_snapshots), HOOK, Dataset(tiny_text, 3000, 16, 500))


@pytest.fixture(scope="module", params=["batchtopk_crosscoder", "jumprelu_crosscoder"])
def crosscoder(request: pytest.FixtureRequest, acts: Activations) -> Crosscoder:
    made = make_crosscoder(request.param)
    made.activation_scale.copy_(D**0.5 / torch.cat(list(acts.held_out())).norm(dim=-1).mean(0))
    return made


@pytest.fixture(scope="module")
def run(crosscoder: Crosscoder, acts: Activations, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("run"))
    architecture = {"architecture": crosscoder.cfg.architecture(), "d_in": S * D, "d_sae": F}
    run.write_json({"identity": {**acts.metadata(), "architecture": architecture}})
    run.save_tables(evolve(crosscoder, acts).tables())
    run.save_tables(feature_tables(crosscoder, acts))
    return run


def check(value: Any, schema: dict[str, Any]) -> None:
    assert set(value) == set(schema)
    for name, kind in schema.items():
        if isinstance(kind, list):
            assert isinstance(value[name], list) and all(type(each) is kind[0] for each in value[name]), name
        elif name != "features":
            assert type(value[name]) is kind, name


def test_features_are_those_of_the_models(
    crosscoder: Crosscoder, acts: Activations, run: RunDir, tmp_path: Path
) -> None:
    wanted = json.loads(export_features(crosscoder, acts, tmp_path / "a.json", n_examples=8, n_logits=8).read_text())
    found = json.loads(write_features(run, tmp_path / "b" / "b.json").read_text())
    assert found["data"].pop("tokens") is None and wanted["data"].pop("tokens") > 0
    assert {name: found[name] for name in found if name != "features"} == {
        name: wanted[name] for name in wanted if name != "features"
    }
    lifecycles = run.table("lifecycles")
    assert lifecycles is not None and [each["feature"] for each in found["features"]] == list(range(F))
    for ours, theirs in zip(found["features"], wanted["features"], strict=True):
        assert ours.pop("label") is None
        for measure, cycle in ours.pop("lifecycle").items():
            (row,) = lifecycles[
                (lifecycles["measure"] == measure) & (lifecycles["feature"] == ours["feature"])
            ].to_dict("records")
            labels = {s: str(s) for s in range(S)}  # of the crosscoder
            assert [cycle["birth"], cycle["peak"]] == [labels.get(row[name]) for name in ("birth", "peak")]
            assert cycle["origin"] == (row["origin"] if isinstance(row["origin"], str) else None)
        assert ours == theirs


def test_labels_are_included(run: RunDir, tmp_path: Path) -> None:
    import pandas as pd

    run.save_table("labels", pd.DataFrame({"feature": [3, 1], "label": ["plural nouns", None]}))
    found = json.loads(write_features(run, tmp_path / "x.json").read_text())["features"]
    (run.path / "labels.parquet").unlink()
    assert [each["label"] for each in found[:5]] == [None, None, None, "plural nouns", None]


def test_the_batches_of_saedashboard(
    crosscoder: Crosscoder, acts: Activations, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_files, "PER_BATCH", 10)
    (tmp_path / "batch-7.json").write_text("of an earlier export")
    files = write_neuronpedia(run, tmp_path, "1", n_prompts=31)
    assert sorted(tmp_path.iterdir()) == files == [tmp_path / f"batch-{n}.json" for n in range(3)]
    batches = [json.loads(path.read_text()) for path in files]
    for batch in batches:
        check(batch, BATCH)
        assert (batch["layer"], batch["sae_id_suffix"], batch["sae_set"]) == (1, "1", "crosslens")
    features = [feature for batch in batches for feature in batch["features"]]
    assert [feature["feature_index"] for feature in features] == list(range(F))
    x = torch.cat(list(acts.held_out()))
    value = crosscoder.snapshot_acts(crosscoder.encode(x), 1)
    rate = (value != 0).double().mean(0)
    n_shown = 0
    for i, feature in enumerate(features):
        check(feature, FEATURE)
        assert (feature["n_prompts_total"], feature["n_tokens_in_prompt"]) == (31, 16)
        assert feature["frac_nonzero"] == pytest.approx(float(rate[i]), abs=1e-6)
        assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
        assert feature["neg_values"] == sorted(feature["neg_values"])
        for activation in feature["activations"]:
            check(activation, ACTIVATION)
            values, peak = activation["values"], activation["qualifying_token_index"]
            assert len(values) == len(activation["tokens"]) and values[peak] > 0
            assert (activation["bin_min"], activation["bin_contains"]) == (-1, -1)
            assert activation["bin_max"] == max(max(each["values"]) for each in feature["activations"])
            # each is a value of the feature at this snapshot
            assert float((value[:, i] - values[peak]).abs().min()) < 1e-3
        n_shown += len(feature["activations"])
        if not rate[i]:
            assert not feature["activations"]
    assert n_shown > F


def test_mistakes(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no snapshot has the label 'step7': there are 3 snapshots, 0, 1, 2"):
        write_neuronpedia(run, tmp_path, "step7", 1)
    with pytest.raises(UserError, match=r"snapshot 3 is not in \[-3, 2\]: there are 3 snapshots"):
        write_neuronpedia(run, tmp_path, 3, 1)
    empty = RunDir(tmp_path / "empty")
    empty.write_json({})
    with pytest.raises(UserError, match="has no table evolution: run `crosslens evolve"):
        write_features(empty, tmp_path / "x.json")
