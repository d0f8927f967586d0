"""Studies return the tables of their parts, and the report's figures show these tables."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import BatchTopKCrosscoder, BatchTopKCrosscoderConfig
from crosslens.errors import UserError
from crosslens.evolution.agreement import top_agreement
from crosslens.evolution.controls import encoder_share, latent_scaling
from crosslens.evolution.dynamics import dynamics_table, measure_predictions
from crosslens.evolution.geometry import (
    decoder_cosines,
    feature_dimensionality,
    half_cosines,
    linear_maps,
    rotation,
    rotation_per_interval,
    total_dimensionality,
)
from crosslens.evolution.history import evolve
from crosslens.evolution.ngrams import count_ngrams
from crosslens.evolution.phases import find_phases, measure_dynamics
from crosslens.evolution.presence import measure_decodability
from crosslens.evolution.probes import probe, probe_errors, probe_parts, probe_presence
from crosslens.evolution.selection import doubtful_snapshots, propose_snapshots, snapshot_similarity
from crosslens.evolution.splitting import JointActivity, replacements, split_counts, splits
from crosslens.report.figures import probes as probes_figures
from crosslens.report.figures import rotation as rotation_figures
from crosslens.report.figures import structure as structure_figures
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from tests.given import Held, Read, of_norms, snapshots_at
from tests.plain_model import make_crosscoder

LABELS = ["step0", "step8", "step64", "step512"]


class Dated(Read):
    """Activations of snapshots with labels and steps."""

    def __init__(self, x: torch.Tensor, tokens: torch.Tensor) -> None:
        super().__init__(x, tokens)
        self.snapshots = SimpleNamespace(labels=LABELS, steps=[0, 8, 64, 512])


@pytest.fixture(scope="module")
def crosscoder() -> Any:
    norms = torch.rand(24, 4, generator=torch.Generator().manual_seed(1)) + 0.05
    norms[3:9, :2] *= 0.1  # born at the third snapshot
    norms[9:12, 2:] *= 0.1
    return of_norms(norms, snapshots_at(0, 8, 64, 512), D=5, seed=2)


@pytest.fixture(scope="module")
def acts() -> Read:
    draw = torch.Generator().manual_seed(3)
    return Dated(torch.randn(20, 15, 4, 5, generator=draw), torch.randint(1, 6, (20, 15), generator=draw))


@pytest.fixture(scope="module")
def found(crosscoder: Any, acts: Read) -> dict[str, pd.DataFrame]:
    return evolve(crosscoder, acts, presence=0.4, seed=5).tables()


def test_the_tables_are_those_of_the_analyses_alone(
    crosscoder: Any, acts: Read, found: dict[str, pd.DataFrame]
) -> None:
    tables = found
    evolution = evolve(crosscoder, acts, presence=0.4, seed=5)
    lifecycles = evolution.lifecycles("norm")
    alive = torch.tensor(lifecycles["alive"].to_numpy())
    doubtful = doubtful_snapshots(acts, encoder_share(crosscoder, acts))
    dimensionality = total_dimensionality(crosscoder, acts, presence=0.4, seed=5)
    joint = JointActivity(crosscoder, acts, lifecycles)
    lexical = measure_decodability(crosscoder, acts).lexical
    counts = [*split_counts(crosscoder, alive, presence=0.4, lexical=lexical, seed=5)[1], *joint.counts(lexical, 5)]
    expected = {
        "evolution": evolution.table,
        "lifecycles": pd.concat([evolution.lifecycles(m).assign(measure=m) for m in ("r2", "within", "norm")]),
        "birth_counts": evolution.count_births(),
        "doubtful": doubtful,
        "rotation": rotation_per_interval(
            crosscoder, alive, half_cosines(crosscoder, acts), linear_maps(crosscoder, acts)
        ),
        "dimensionality": dimensionality.assign(participation_ratio=doubtful["participation_ratio"]),
        "scaling": latent_scaling(crosscoder, acts).to_frame(LABELS),
        "replacements": replacements(crosscoder, acts, lifecycles),
        "splits": splits(crosscoder, alive, presence=0.4),
        "split_counts": pd.DataFrame(counts),
        "agreement": top_agreement(crosscoder, acts),
    }
    for name, table in expected.items():
        pd.testing.assert_frame_equal(tables[name], table[list(tables[name])].reset_index(drop=True))
    per_feature = {
        "directions": ("cosine", rotation(crosscoder)),
        "feature_dimensionality": ("dimensionality", feature_dimensionality(crosscoder, acts, presence=0.4)),
        "encoder": ("share", encoder_share(crosscoder, acts)),
    }
    for name, (column, values) in per_feature.items():
        assert list(tables[name]) == ["feature", *(f"{column}/{label}" for label in LABELS)]
        np.testing.assert_array_equal(tables[name].iloc[:, 1:].to_numpy(), values.numpy())
    assert set(tables) == {*expected, *per_feature, "cosines"}


def test_cosines_are_of_live_features(crosscoder: Any, found: dict[str, pd.DataFrame]) -> None:
    alive = found["lifecycles"].query("measure == 'norm' and alive")["feature"].tolist()
    rows = decoder_cosines(crosscoder)
    for row in found["cosines"].to_dict("records"):
        values = [float(rows[i, row["snapshot"], row["other"]]) for i in alive]
        values = sorted(value for value in values if value == value)
        assert row["n"] == len(values)
        assert row["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)
        assert row["median"] == pytest.approx(np.median(values), abs=1e-6)
        assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
        assert row["label"] == LABELS[row["snapshot"]] and row["other_step"] == [0, 8, 64, 512][row["other"]]


def test_figures_show_the_tables(found: dict[str, pd.DataFrame], tmp_path: Path) -> None:
    RunDir(tmp_path).save_tables(found)
    tables: dict[str, Any] = {name: RunDir(tmp_path).table(name) for name in found}
    snapshots = pd.DataFrame({"snapshot": range(4), "label": LABELS, "step": [0, 8, 64, 512]})
    bars = rotation_figures.rotation(tables["rotation"]).figure.data[0]
    assert list(bars.y) == tables["rotation"]["rotated"].tolist()
    square = rotation_figures.cosines(tables["cosines"]).figure.data[0]
    assert square.z[1][3] == pytest.approx(
        float(tables["cosines"].query("snapshot == 1 and other == 3")["median"].iloc[0])
    )
    lines = structure_figures.dimensionality(tables["dimensionality"]).figure.data
    assert list(lines[0].y) == pytest.approx(tables["dimensionality"]["share"].tolist())
    assert list(lines[1].y) == pytest.approx(tables["dimensionality"]["random_share"].tolist())
    assert list(lines[2].y) == pytest.approx(tables["dimensionality"]["elhage_share"].tolist())
    assert list(lines[4].y) == pytest.approx((tables["dimensionality"]["participation_ratio"] / 5).tolist())
    rates = {(trace.name, trace.yaxis): list(trace.y) for trace in rotation_figures.rotation_rate(
        tables["rotation"]).figure.data}  # fmt: skip
    for name, column in (("decoder vectors", "angle"), ("null: the same snapshot, different halves", "null")):
        per_interval = "null_angle" if column == "null" else column
        assert rates[(name, "y")] == pytest.approx(tables["rotation"][per_interval].tolist())
        per_doubling = tables["rotation"][f"{column}_per_doubling"].tolist()
        assert np.isnan(per_doubling[0]) and rates[(name, "y2")][1:] == pytest.approx(per_doubling[1:])
    points = structure_figures.scaling(tables["scaling"], tables["evolution"], tables["lifecycles"]).data
    norms = tables["evolution"].pivot(index="feature", columns="snapshot", values="norm").to_numpy()
    for row in points.sample(20, random_state=0).to_dict("records"):
        top = norms[row["feature"]].max()
        assert row["strength"] == pytest.approx(norms[row["feature"], LABELS.index(row["label"])] / top)
        beta = tables["scaling"].loc[row["feature"], f"peak/{row['label']}"]
        assert row["scaling"] == pytest.approx(beta / top)
    drawn = structure_figures.encoder(tables["encoder"], tables["lifecycles"])
    at = int(tables["lifecycles"].query("measure == 'r2'")["birth"].max())
    born = tables["lifecycles"].query("measure == 'r2' and alive and birth == @at")["feature"]
    shares = tables["encoder"].loc[born, "share/step64"].dropna()
    place = drawn.data["born"].tolist().index(at)
    assert drawn.figure.data[0].z[place][2] == pytest.approx(shares.median())
    counts = pd.DataFrame({"kind": ["split", "merger"], "n": [1, 1], "by_chance": [0.25, 0], "most_by_chance": [2, 0]})
    changes = pd.DataFrame({"kind": ["split", "merger"], "at": [2, 3]})
    counted = structure_figures.splits_and_replacements(counts, snapshots, changes, pd.DataFrame({"birth": [1, 1, 3]}))
    assert counted.note == (
        "1 split (by chance 0.2, in 95% of draws at most 2); 1 merger (by chance 0.0, in 95% of draws at most 0)."
    )
    assert [list(bar.y) for bar in counted.figure.data] == [[0, 2, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]
    no_replacement = structure_figures.splits_and_replacements(counts, snapshots, changes)
    assert [list(bar.y) for bar in no_replacement.figure.data] == [[0] * 4, [0, 0, 1, 0], [0, 0, 0, 1]]


def test_measure_dynamics_matches_its_parts(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    snaps = Snapshots.local(tiny_snapshots)
    acts = Activations(snaps, "blocks.1.hook_resid_post", Dataset(tiny_text, 2000, 16, 300))
    cc = make_crosscoder(snaps, "standard_crosscoder")
    own = count_ngrams(acts.train_tokens(), snaps.tokenizer)
    found = measure_dynamics(cc, acts, seed=4)
    measured = measure_predictions(snaps, own, acts.tokens, seed=4)  # fewer than 30,000
    evolution = evolve(cc, acts, seed=4)
    pd.testing.assert_frame_equal(found["dynamics"], dynamics_table(measured, cc, evolution, seed=4))
    assert found["dynamics"]["present"].tolist() == evolution.present("r2").sum(0).tolist()
    assert found["dynamics"]["measure"].unique().tolist() == ["r2"]
    pd.testing.assert_frame_equal(found["phases"], find_phases(measured, cc, evolution, seed=4))
    doubtful = doubtful_snapshots(acts)
    pd.testing.assert_frame_equal(
        found["selection"], propose_snapshots(snapshot_similarity(acts), 3, steps=snaps.steps, doubtful=doubtful)
    )
    again = measure_dynamics(cc, acts, evolution=evolution, seed=4)
    pd.testing.assert_frame_equal(again["phases"], found["phases"])
    pd.testing.assert_frame_equal(again["selection"], found["selection"])
    # a crosscoder of the trained snapshots, beside the predictions of all
    later = Activations(snaps[1:], "blocks.1.hook_resid_post", Dataset(tiny_text, 2000, 16, 300))
    without = measure_dynamics(make_crosscoder(later.snapshots, "standard_crosscoder"), later, snapshots=snaps, seed=4)
    assert without["dynamics"]["kl2"].tolist() == found["dynamics"]["kl2"].tolist()
    assert without["dynamics"]["present"].isna().tolist() == [True, False, False]
    assert len(without["similarity"]) < len(found["similarity"]) and len(without["selection"]) == 2
    other = measure_dynamics(cc, acts, count_ngrams(acts.held_out_tokens(), snaps.tokenizer), seed=4)
    assert (other["dynamics"]["kl1"] != found["dynamics"]["kl1"]).all()
    strange = deepcopy(snaps.tokenizer)
    strange.add_tokens(["another"])
    with pytest.raises(UserError, match="tokenizer"):
        measure_dynamics(cc, acts, count_ngrams(acts.train_tokens(), strange))


def test_probe_matches_its_parts(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", tiny_text, 2000, 16)
    cc = make_crosscoder(acts.snapshots, "standard_crosscoder")
    found = probe(cc, acts, n_features=3, seed=2)
    probes = probe_errors(cc, acts, n_features=3, seed=2)
    pd.testing.assert_frame_equal(found["probe"], probes)
    pd.testing.assert_frame_equal(found["probe_parts"], probe_parts(probes, seed=2))
    evolution = evolve(cc, acts, seed=2)
    pd.testing.assert_frame_equal(found["probe_presence"], probe_presence(probes, evolution.table, seed=2))
    chart = probes_figures.probe_presence(found["probe_presence"])
    assert not isinstance(chart, str)
    known = found["probe_presence"].dropna(subset=["spearman"])
    within = known.query("part == 'within_features'")["spearman"].tolist()
    assert list(chart.figure.data[0].x)[: len(within)] == pytest.approx(within)
    points = probes_figures.probe(probes, evolution.table)
    assert not isinstance(points, str)
    assert [trace.xaxis for trace in points.figure.data] == ["x", "x2"]
    r2 = [evolution.wide("r2").iloc[i, s] for i, s in zip(probes["feature"], probes["snapshot"], strict=True)]
    assert list(points.figure.data[0].x) == pytest.approx([value for value in r2 if value == value])
    assert list(points.figure.data[1].x) == pytest.approx(probes["norm"].tolist())
    alone = probes_figures.probe(probes, evolution.table.assign(r2=np.nan))
    assert not isinstance(alone, str) and len(alone.figure.data) == 1


def test_figures_without_data(found: dict[str, pd.DataFrame]) -> None:
    tables = found
    dead = tables["lifecycles"].assign(alive=False, birth=None)
    assert "No feature is born" in structure_figures.encoder(tables["encoder"], dead)
    assert "No feature fires" in structure_figures.scaling(tables["scaling"], tables["evolution"], dead)
    assert "No feature changes" in rotation_figures.rotation(tables["rotation"].assign(rotated=0))
    assert "No feature has a decoder vector long enough" in rotation_figures.cosines(tables["cosines"].assign(n=0))
    snapshots = pd.DataFrame({"snapshot": [0, 1], "label": ["a", "b"], "step": [0, 1]})
    assert "No feature splits" in structure_figures.splits_and_replacements(tables["split_counts"], snapshots)


def test_topk_crosscoders_have_no_latent_scaling(acts: Read) -> None:
    made = BatchTopKCrosscoder(BatchTopKCrosscoderConfig(d_in=20, d_sae=6, n_snapshots=4))
    made.W_dec.data = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    made.W_enc.data = made.W_dec.data.T.clone()
    assert "scaling" not in evolve(made.requires_grad_(False), acts).tables()
    with pytest.raises(UserError, match="latent_scaling is meaningless for batchtopk_crosscoder"):
        latent_scaling(made, acts)


def test_one_snapshot_is_refused() -> None:
    with pytest.raises(UserError, match="snapshot"):
        evolve(of_norms(torch.rand(4, 1), D=5), Held(torch.randn(9, 1, 5)))


def test_without_activations_there_are_the_tables_of_the_decoder(crosscoder: Any, acts: Read) -> None:
    evolution = evolve(crosscoder)
    tables = evolution.tables()
    assert set(tables) == {
        "evolution",
        "lifecycles",
        "birth_counts",
        "rotation",
        "cosines",
        "directions",
        "splits",
        "split_counts",
    }
    assert tables["rotation"]["null_angle"].isna().all()
    with pytest.raises(UserError, match="read without activations"):
        evolution.dimensionality  # noqa: B018
    with pytest.raises(UserError, match="read without activations"):
        measure_dynamics(crosscoder, acts, evolution=evolution)


def test_one_pass_encodes_every_block_once(crosscoder: Any, acts: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    encode = type(crosscoder).encode
    monkeypatch.setattr(type(crosscoder), "encode", lambda self, x: encoded.append(len(x)) or encode(self, x))
    evolve(crosscoder, acts).tables()
    assert sum(encoded) == len(acts.x) and len(encoded) == -(-len(acts.x) // 5)
