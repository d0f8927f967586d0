"""The control on models that never trained: they are what transformers initialises, and the pipeline is the run's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from crosslens.activations.loader import Activations
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig
from crosslens.errors import UserError
from crosslens.evolution.births import count_births, table_of_counts, with_null
from crosslens.evolution.history import evolve
from crosslens.evolution.presence import measure_decodability
from crosslens.pipeline.nulls import null_births, read_models, recorded_training, untrained_snapshots
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from crosslens.training.config import TrainConfig
from crosslens.training.run import train

HOOK = "blocks.1.hook_resid_post"


def test_untrained_models_are_independent_and_of_the_same_shape(tiny_snapshots: Path, tmp_path: Path) -> None:
    trained = Snapshots.local(tiny_snapshots)
    before = torch.random.get_rng_state()
    made = untrained_snapshots(trained, tmp_path / "models")
    assert torch.equal(before, torch.random.get_rng_state())
    assert made.labels == ["seed0", "seed1", "seed2"] and made.steps == [None] * 3
    assert len(set(made.fingerprints)) == 3
    torch.manual_seed(1)
    expected = AutoModelForCausalLM.from_config(trained[0].config()).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "step1").state_dict()
    assert all(torch.equal(found[name], weights) for name, weights in expected.items())
    assert made.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    assert len(untrained_snapshots(trained, tmp_path / "two", 2)) == 2
    with pytest.raises(UserError, match="is not empty"):
        untrained_snapshots(trained, tmp_path / "models")
    with pytest.raises(UserError, match="n_models=1: births need 2 or more"):
        untrained_snapshots(trained, tmp_path / "one", 1)


def test_births_and_their_controls_in_a_run(tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_text))
    acts = Activations(Snapshots.local(tiny_snapshots), HOOK, text, 2000, 16)
    architecture = BatchTopKCrosscoderTrainingConfig(d_sae=24, k=4)
    config = TrainConfig(run_dir=tmp_path / "run", batch_size=128, lr=1e-2, device="cpu", evaluate=False)
    crosscoder = train(acts, architecture, config)
    recorded = recorded_training(RunDir(tmp_path / "run"), "cpu")
    assert recorded[0].d_sae == 24 and recorded[0].k == 4  # type: ignore[attr-defined]
    assert dataclasses.replace(recorded[1], run_dir=config.run_dir, training_tokens=None, evaluate=False) == (
        dataclasses.replace(config, precision="float32")
    )
    control = null_births(acts, *recorded)
    pd.testing.assert_frame_equal(control, null_births(acts, architecture, config))
    assert (control["born"] <= control["n"]).all() and control["n"].max() > 0

    tables = evolve(crosscoder, acts, nulls={"untrained": control}, seed=3).tables()
    found = measure_decodability(crosscoder, acts)
    long = tables["evolution"]
    assert len(long) == 24 * 3 and long["step"].tolist()[:3] == [0, 10, 20]
    for name, values in (("r2", found.r2), ("within", found.within), ("norm", crosscoder.decoder_norms.numpy())):
        np.testing.assert_allclose(long.pivot(index="feature", columns="snapshot", values=name), values, rtol=1e-6)
    lifecycles = tables["lifecycles"].set_index(["measure", "feature"])
    births = lifecycles.dropna(subset=["origin"])
    for i in births.loc["r2"].index:
        row, curve = births.loc[("r2", i)], found.r2[i].clip(0)
        assert row["peak"] == curve.argmax() and curve.max() >= 0.05
        assert (row["origin"] == "initial") == (curve[0] >= 0.4 * curve.max())
        assert row["effect"] == pytest.approx(curve.max() - curve[0])
        assert row["kind"] == ("lexical" if found.between[i] > 0.5 else "contextual")
        if not pd.isna(row["birth"]):
            assert row["birth_step"] == [0, 10, 20][row["birth"]]
    dated = lifecycles.loc["within"].dropna(subset=["origin"]).index
    assert (found.between[dated] <= 0.95).all() and not lifecycles.loc["within"]["origin"].isna().all()
    assert births.loc["norm"]["q"].isna().all() and births.loc["r2"]["q"].notna().all()
    counts = tables["birth_counts"]
    assert (counts["untrained"] * counts["untrained_n"]).fillna(0).round().astype(int).tolist() == (
        control["born"].tolist()
    )
    row = counts.query("measure == 'r2' and kind == 'all' and threshold == 0.4").iloc[0]
    assert row["born"] == (births.loc["r2"]["origin"] == "emergent").sum()
    lines = table_of_counts(counts)
    assert len(lines) == 13 and max(map(len, lines)) <= 130
    beyond = f"all {row['beyond_trend']} of {row['born']}, lexical"
    assert f"R2, births beyond the common trend at 0.4: {beyond}" in lines[-3]
    assert f"{row['born']} / {row['born_reversed']} ({row['untrained'] * row['untrained_n']:.0f} of" in lines[1]
    assert "nan" not in "".join(lines)
    assert "--untrained" in table_of_counts(evolve(crosscoder, acts).count_births())[-1]


def test_controls_are_joined_by_measure_kind_and_threshold() -> None:
    curves = {"norm": np.array([[0.1, 1.0, 1.0], [1.0, 1.0, 0.1]])}
    counts, control = count_births(curves), count_births({"norm": np.array([[0.1, 1.0, 1.0]] * 4)})
    table = with_null(counts, control.sample(frac=1, random_state=0), "untrained")
    assert table["untrained"].tolist() == [1.0] * 4 and table["untrained_n"].tolist() == [4] * 4
    pd.testing.assert_frame_equal(table[list(counts)], counts)
    lines = table_of_counts(with_null(table, control, "exchangeable"))
    assert "1 / 1 (4 of 4) (4 of 4)" in lines[1]
    assert lines[-1].endswith("in models that never trained, then in models of other seeds at one step")


def test_exchangeable_models_come_from_a_file(tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path) -> None:
    places = {f"seed{i}": one.name for i, one in enumerate(Snapshots.local(tiny_snapshots))}
    (tmp_path / "models.json").write_text(json.dumps(places))
    models = read_models(tmp_path / "models.json")
    assert models.labels == list(places)
    acts = Activations(models, HOOK, tiny_text, 2000, 16)
    architecture = BatchTopKCrosscoderTrainingConfig(d_sae=24, k=4)
    found = null_births(acts, architecture, TrainConfig(batch_size=128, lr=1e-2, device="cpu"), models=models[:2])
    assert set(found["kind"]) == {"all", "lexical", "contextual"} and (found["born"] <= found["n"]).all()
    for wrong, message in (
        ("[]", "contains a list"),
        ('{"a": "b"}', "two models or more"),
        ('{"a": 1, "b": 2}', "two models"),
    ):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(UserError, match=message):
            read_models(tmp_path / "wrong.json")
