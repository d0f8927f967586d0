"""Lifecycles: every definition in plain loops, dead features, dates, rotation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from crosslens.activations.loader import Activations
from crosslens.crosscoders import (
    BatchTopKCrosscoderTrainingConfig,
    BatchTopKCrosscoderTrainingSAE,
    JumpReLUCrosscoder,
    JumpReLUCrosscoderConfig,
)
from crosslens.errors import UserError
from crosslens.evolution.births import date_births
from crosslens.evolution.firing import measure_firing
from crosslens.evolution.geometry import rotation
from crosslens.evolution.held_out import check_activations
from crosslens.evolution.history import Evolution, evolve
from crosslens.evolution.lifecycles import classify_lifecycles, relative_norms
from crosslens.evolution.presence import measure_decodability
from crosslens.snapshots.collection import Snapshots
from tests.given import Held, Read, of_norms, snapshots_at

COLUMNS = [
    "feature", "alive", "kind", "token_share", "firing_rate",
    "origin", "fate", "birth", "birth_step", "birth_tokens", "peak", "peak_step",
    "peak_tokens", "death", "death_step", "death_tokens", "lifetime", "lifetime_step", "lifetime_tokens",
]  # fmt: skip
CURVES = ["norm", "strength", "reldec", "r2", "within", "firing_rate", "mean_activation"]


# ---- the definitions


def slow_lifecycle(norms: list[float], presence: float, min_run: int) -> dict[str, Any] | None:
    """The lifecycle of one feature."""
    if max(norms) == 0:
        return None
    there = [n / max(norms) >= presence for n in norms]
    S = len(norms)
    births = [
        s for s in range(S)
        if all(there[s:]) or (s + min_run <= S and all(there[s : s + min_run]))
    ]  # fmt: skip
    life: dict[str, Any] = {"birth": None, "death": None, "lifetime": there.count(True)}
    life["peak"] = norms.index(max(norms))
    if there[0]:
        life |= {"origin": "initial", "birth": 0}
    elif births:
        life |= {"origin": "emergent", "birth": births[0]}
    else:
        life |= {"origin": "never"}
    deaths = [s for s in range(1, S) if there[s - 1] and not any(there[s:])]
    if deaths:
        life |= {"fate": "transient", "death": deaths[0]}
    else:
        life |= {"fate": "persistent"}
    return life


def curve(evolution: Evolution, name: str) -> np.ndarray:
    """One quantity, (F, S)."""
    return evolution.wide(name).to_numpy()


levels = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), st.floats(0, 8, width=32))


@given(
    st.integers(2, 7).flatmap(lambda S: st.lists(st.lists(levels, min_size=S, max_size=S), min_size=1, max_size=5)),
    st.sampled_from([0.01, 0.25, 0.5, 0.9, 1.0]),
    st.integers(1, 4),
)
@example([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], 0.5, 2)
@example([[0.0, 1.0, 0.0, 1.0, 1.0, 0.4]], 0.5, 2)
def test_lifecycles_match_the_definition_in_loops(norms: list[list[float]], presence: float, min_run: int) -> None:
    table = classify_lifecycles(torch.tensor(norms, dtype=torch.float64), presence, min_run=min_run)
    assert len(table) == len(norms)
    for row, record in zip(norms, table.to_dict("records"), strict=True):
        found = {key: None if value is None or value is pd.NA else value for key, value in record.items()}
        assert found == (slow_lifecycle(row, presence, min_run) or dict.fromkeys(table))


def test_lifecycles_by_hand() -> None:
    norms = [[8, 8, 8, 8], [1, 9, 9, 1], [1, 1, 10, 4], [1, 1, 10, 3.9], [9, 1, 1, 9], [1, 9, 1, 1]]
    table = classify_lifecycles(torch.tensor(norms))
    assert table["origin"].tolist() == ["initial", "emergent", "emergent", "never", "initial", "never"]
    assert table["fate"].tolist() == ["persistent", "transient", "persistent", "transient", "persistent", "transient"]
    assert table["birth"].tolist() == [0, 1, 2, pd.NA, 0, pd.NA]
    assert table["death"].tolist() == [pd.NA, 3, pd.NA, 3, pd.NA, 2]
    assert table["peak"].tolist() == [0, 1, 2, 2, 0, 1]
    assert table["lifetime"].tolist() == [4, 2, 2, 1, 2, 1]


@given(st.floats(1e-3, 1e3))
def test_the_scale_of_a_feature_does_not_matter(scale: float) -> None:
    norms = torch.rand(20, 6, generator=torch.Generator().manual_seed(1)).double()
    norms = torch.where((norms / norms.amax(1, keepdim=True) - 0.5).abs() < 1e-6, 0.0, norms)
    pd.testing.assert_frame_equal(classify_lifecycles(norms), classify_lifecycles(norms * scale))


def test_errors_come_before_activations_are_read() -> None:
    good = torch.ones(3, 2)
    for arguments, options, message in (
        ((torch.ones(3, 1),), {}, "evolution needs at least 2 snapshots, this crosscoder has 1: train on more"),
        ((good, 0.0), {}, r"presence=0.0 is not in \(0, 1\]"),
        ((good, 1.5), {}, "presence=1.5 is not in"),
        ((good,), {"min_run": 0}, "min_run=0 must be 1 or more"),
        ((torch.tensor([[1.0, 1.0], [math.nan, 1.0]]),), {}, r"norms of feature 1 are \[nan, 1.0\]"),
        ((-good,), {}, "norms of feature 0 are"),
    ):
        with pytest.raises(UserError, match=message):
            classify_lifecycles(*arguments, **options)

    class Never(Held):
        def held_out(self, batch_size: int = 0) -> Any:
            raise AssertionError(f"{batch_size} read before the check")

    for cc, options, message in (
        (of_norms(torch.ones(3, 1)), {}, "at least 2 snapshots"),
        (of_norms(good), {"presence": 2.0}, "presence=2.0"),
        (of_norms(good), {"min_firing_rate": 1.0}, r"min_firing_rate=1.0 is not in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            evolve(cc, Never(good), **options)


# ---- the table


def test_columns_and_dates() -> None:
    metadata = [{"label": f"step{10**s}", "step": 10**s, "tokens": 3 * 10 ** (s + 11)} for s in range(4)]
    norms = [[1, 1, 5, 4], [2, 1, 1, 1], [0, 3, 0, 0], [0, 0, 0, 0]]
    found = evolve(of_norms(norms, metadata))
    assert list(found.table) == ["feature", "snapshot", "label", "step", "tokens", *CURVES]
    assert found.table["label"].tolist() == ["step1", "step10", "step100", "step1000"] * 4
    assert found.measures == ["norm"] and list(found.wide("norm")) == ["step1", "step10", "step100", "step1000"]
    table = found.lifecycles()
    assert list(table) == COLUMNS
    assert table["feature"].tolist() == [0, 1, 2, 3]
    assert table["alive"].dtype == bool and table["alive"].tolist() == [True, True, True, False]
    assert table["firing_rate"].isna().all()
    assert table["birth_step"].tolist() == [100, 1, pd.NA, pd.NA]
    assert table["birth_tokens"].tolist() == [3 * 10**13, 3 * 10**11, pd.NA, pd.NA]
    assert table["peak_step"].tolist() == [100, 1, 10, pd.NA]
    assert table["peak_tokens"].tolist() == [3 * 10**13, 3 * 10**11, 3 * 10**12, pd.NA]
    assert table["death_step"].tolist() == [pd.NA, pd.NA, 100, pd.NA]
    assert table["death_tokens"].tolist() == [pd.NA, pd.NA, 3 * 10**13, pd.NA]
    assert table["lifetime"].tolist() == [2, 4, 1, pd.NA]
    # present at steps 100 and 1000; from 1 to 1000; from 10 to 100
    assert table["lifetime_step"].tolist() == [900, 999, 90, pd.NA]
    assert table["lifetime_tokens"].tolist() == [27 * 10**13, 3 * 10**14 - 3 * 10**11, 27 * 10**12, pd.NA]
    assert curve(found, "norm") == pytest.approx(np.array(norms))
    assert curve(found, "strength")[:3] == pytest.approx(
        np.array([[0.2, 0.2, 1, 0.8], [1, 0.5, 0.5, 0.5], [0, 1, 0, 0]])
    )
    assert curve(found, "reldec")[:3] == pytest.approx(
        np.array([[1 / 11, 1 / 11, 5 / 11, 4 / 11], [0.4, 0.2, 0.2, 0.2], [0, 1, 0, 0]])
    )
    assert np.isnan(curve(found, "strength")[3]).all() and np.isnan(curve(found, "reldec")[3]).all()
    assert all(np.isnan(curve(found, name)).all() for name in CURVES[3:])
    assert found.present().tolist() == [
        [False, False, True, True], [True] * 4, [False, True, False, False], [False] * 4,
    ]  # fmt: skip
    higher = evolve(of_norms(norms, metadata), presence=0.9, min_run=1)
    lives = higher.lifecycles()
    assert lives["lifetime"].tolist() == [1, 1, 1, pd.NA] and lives["birth"].tolist() == [2, 0, 1, pd.NA]
    assert higher.present()[1].tolist() == [True, False, False, False]


def test_lifetime_steps_add_up_over_interruptions() -> None:
    metadata = [{"label": str(s), "step": 10**s, "tokens": None} for s in range(4)]
    table = evolve(of_norms([[1, 0, 1, 1], [1, 0, 0, 1]], metadata)).lifecycles()
    assert table["lifetime_step"].tolist() == [9 + 900, 9]
    assert table["lifetime_tokens"].isna().all() and table["birth_tokens"].isna().all()


def test_without_metadata_labels_are_indices(tmp_path: Path) -> None:
    found = evolve(of_norms([[1, 1, 4], [0, 0, 0]]))
    assert list(found.wide("norm")) == ["0", "1", "2"]
    table = found.lifecycles()
    assert table["birth"].tolist() == [2, pd.NA] and table["birth_step"].isna().all()
    assert table["lifetime"].tolist() == [1, pd.NA] and table["lifetime_step"].isna().all()
    table.to_parquet(tmp_path / "evolution.parquet")
    again = pd.read_parquet(tmp_path / "evolution.parquet")
    words = ["kind", "origin", "fate"]  # the dtype of text depends on the version of pandas
    pd.testing.assert_frame_equal(again.drop(columns=words), table.drop(columns=words))
    assert again["origin"].tolist()[0] == "emergent" and again[words].isna().all(axis=1).tolist() == [False, True]
    assert again["kind"].isna().all()


def test_features_that_never_fire_are_dead() -> None:
    cc = of_norms(torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) + 0.1)
    cc.b_enc.data = torch.linspace(-9, 1, 40)
    x = torch.randn(33, 3, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        fired = [float(sum(cc.encode(token)[i] > 0 for token in x)) / 33 for i in range(40)]
    assert 0 < sum(rate == 0 for rate in fired) < 40
    held = Held(x)
    rates = measure_firing(cc, held).rate
    assert rates.tolist() == pytest.approx(fired)
    found, all_found = evolve(cc, measure_firing(cc, held)), evolve(cc)
    table, all_alive = found.lifecycles(), all_found.lifecycles()
    assert table["firing_rate"].tolist() == pytest.approx(fired)
    assert table["alive"].tolist() == [rate > 0 for rate in fired]
    life = COLUMNS[COLUMNS.index("origin") :]
    dead = ~table["alive"]
    assert table.loc[dead, life].isna().all(axis=None) and table.loc[~dead, ["origin", "peak"]].notna().all(axis=None)
    pd.testing.assert_frame_equal(table.loc[~dead, life], all_alive.loc[~dead, life])
    for name in ("norm", "strength", "reldec"):
        assert np.array_equal(curve(found, name), curve(all_found, name))
    assert not found.present()[dead].any() and found.present()[~dead].any()
    few = evolve(cc, measure_firing(cc, held), min_firing_rate=0.3)
    assert few.lifecycles()["alive"].tolist() == [rate > 0.3 for rate in fired]
    with pytest.raises(UserError, match="no activations are held out"):
        measure_firing(cc, Held(x[:0]))
    with pytest.raises(UserError, match="0 tokens are held out"):
        evolve(cc, Read(x[:0, None], torch.ones(0, 1, dtype=torch.long)))


def test_a_jumprelu_feature_is_alive_if_any_gate_opens() -> None:
    cc = JumpReLUCrosscoder(JumpReLUCrosscoderConfig(d_in=8, d_sae=2, n_snapshots=2))
    cc.W_dec.data = torch.tensor([[0.0, 0, 0, 0, 2, 0, 0, 0], [0.01, 0, 0, 0, 0.01, 0, 0, 0]])
    cc.b_enc.data = torch.ones(2)
    held = Held(torch.zeros(7, 2, 4))
    assert measure_firing(cc, held).rate.tolist() == [1.0, 0.0]


def slow_firing(cc: Any, x: torch.Tensor) -> dict[str, np.ndarray]:
    """All firing statistics, one token and one feature at a time."""
    F, S = cc.decoder_norms.shape
    rate, square, counts, sums = np.zeros(F), np.zeros(F), np.zeros((F, S)), np.zeros((F, S))
    for token in x:
        f = cc.encode(token)
        for i in range(F):
            value = float(f[i])
            rate[i] += value > 0
            square[i] += value**2
            for s in range(S):
                size = float(cc.W_dec_by_snapshot[i, s].norm())
                gated = value if not isinstance(cc, JumpReLUCrosscoder) or value * size > float(cc.threshold[i]) else 0
                counts[i, s] += gated > 0
                sums[i, s] += gated
    with np.errstate(invalid="ignore"):
        return {
            "rate": rate / len(x), "rms": np.sqrt(square / len(x)), "snapshot_rate": counts / len(x),
            "mean": sums / counts,
        }  # fmt: skip


@pytest.mark.parametrize("kind", ["shared gate", "gates per snapshot"])
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_firing_matches_plain_loops(kind: str, seed: int) -> None:
    norms = torch.rand(11, 3, generator=torch.Generator().manual_seed(seed)) + 0.1
    cc = of_norms(norms, seed=seed)
    if kind == "gates per snapshot":
        cc = of_norms(norms, seed=seed, jumprelu=True)
        cc.log_threshold.data = torch.linspace(-3, 1, 11)
    cc.b_enc.data[0] = -9
    x = torch.randn(23, 3, 4, generator=torch.Generator().manual_seed(seed + 9))
    firing, slow = measure_firing(cc, Held(x)), slow_firing(cc, x)
    assert firing.n_tokens == 23
    for name, values in slow.items():
        assert getattr(firing, name).numpy() == pytest.approx(values, rel=1e-5, nan_ok=True), name
    shared = (firing.snapshot_rate == firing.rate[:, None]).all()
    assert bool(shared) == (kind == "shared gate")
    assert firing.rate[0] == 0 and firing.mean[0].isnan().all()
    found = evolve(cc, firing)
    assert found.firing is firing
    assert curve(found, "firing_rate") == pytest.approx(slow["snapshot_rate"])
    assert curve(found, "mean_activation") == pytest.approx(slow["mean"] * norms.numpy(), rel=1e-4, nan_ok=True)
    assert measure_firing(cc, firing) is firing


def test_a_training_crosscoder_uses_its_inference_gate() -> None:
    sae = BatchTopKCrosscoderTrainingSAE(BatchTopKCrosscoderTrainingConfig(d_in=12, d_sae=9, n_snapshots=3, k=2))
    sae.threshold.fill_(0.05)
    held = Held(torch.randn(20, 3, 4, generator=torch.Generator().manual_seed(0)))
    assert measure_firing(sae.train(), held).rate.tolist() == measure_firing(sae.to_inference(), held).rate.tolist()


def test_a_crosscoder_with_only_dead_features_has_a_table() -> None:
    cc = of_norms(torch.ones(5, 3))
    cc.b_enc.data.fill_(-99)
    x = torch.randn(9, 20, 3, 4, generator=torch.Generator().manual_seed(1))
    found = evolve(cc, Read(x, torch.ones(9, 20, dtype=torch.long)))
    for measure in ("r2", "within", "norm"):
        table = found.lifecycles(measure)
        assert not table["alive"].any() and table["origin"].isna().all() and table["lifetime"].isna().all()
        assert not found.present(measure).any()
    assert (curve(found, "norm") > 0).all() and np.isnan(curve(found, "r2")).all()
    assert found.describe()[0].startswith("0 live features of 5 at 3 snapshots, 0 to 2")


def test_activations_of_other_snapshots_or_hook_points_are_refused(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", tiny_text, 500, 16)
    trained = acts.metadata()

    def recording(**changes: Any) -> Any:
        cc = of_norms(torch.ones(8, 3), copy.deepcopy({**trained, **changes}["snapshots"]), D=16)
        cc.cfg.metadata.hook_name = {**trained, **changes}["hook_name"]
        return cc

    check_activations(recording(), acts)
    same = Activations(acts.snapshots, "blocks.2.hook_resid_pre", tiny_text, 500, 16)
    check_activations(recording(), same)  # the same activation by another name
    check_activations(of_norms(torch.ones(8, 5)), acts)  # nothing is recorded
    other = [{**row, "fingerprint": "0" * 64} if row["step"] == 10 else row for row in trained["snapshots"]]
    for wrong, message in (
        (
            recording(hook_name="blocks.0.hook_resid_post"),
            "trained on blocks.0.hook_resid_post, the activations are from",
        ),
        (recording(snapshots=other), "its snapshot step10 does not match the given step10"),
        (recording(snapshots=trained["snapshots"][::-1]), "its snapshot step20 does not match the given step0"),
    ):
        for analysis in (evolve, measure_firing, check_activations):
            with pytest.raises(UserError, match=message):
                analysis(wrong, acts)
    two = of_norms(torch.ones(8, 2), trained["snapshots"][:2], D=16)
    with pytest.raises(UserError, match="trained on 2 snapshots, but 3 were given"):
        evolve(two, acts)


def test_real_activations(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", tiny_text, 500, 16)
    cc = of_norms(torch.rand(8, 3, generator=torch.Generator().manual_seed(4)), acts.metadata()["snapshots"], D=16)
    found = evolve(cc, acts)
    assert list(found.wide("r2")) == ["step0", "step10", "step20"]
    table = found.lifecycles()
    x = torch.cat(list(acts.held_out()))
    assert table["firing_rate"].tolist() == pytest.approx((cc.encode(x) > 0).double().mean(0).tolist())
    assert set(table["peak_step"].dropna()) <= {0, 10, 20}


@pytest.mark.parametrize(("F", "S", "seed"), [(12, 4, 0), (5, 2, 1), (30, 7, 2)])
def test_every_measure_has_its_own_lifecycles(F: int, S: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 5, (40, 10), generator=draw)
    x = torch.randn(5, S, 6, generator=draw)[tokens] + torch.randn(40, 10, S, 6, generator=draw)
    cc = of_norms(torch.rand(F, S, generator=draw), snapshots_at(*range(1, S + 1)), D=6, seed=seed)
    held = Read(x, tokens)
    found, read = evolve(cc, held, presence=0.7, min_run=1, seed=3), measure_decodability(cc, held)
    assert found.measures == ["r2", "within", "norm"]
    alive = (cc.encode(held.x) > 0).any(0).numpy()
    contextual, varies = read.between <= 0.5, read.between <= 0.95
    for measure, values in (("r2", read.r2), ("within", read.within), ("norm", cc.decoder_norms.numpy())):
        assert curve(found, measure) == pytest.approx(values, rel=1e-6, nan_ok=True)
        kept = alive & (varies if measure == "within" else True)
        kept = kept & (measure == "norm" or np.nan_to_num(values).max(1) >= 0.05)
        table = found.lifecycles(measure)
        assert table["origin"].notna().tolist() == kept.tolist() and table["alive"].tolist() == alive.tolist()
        assert (table["kind"] == "contextual").tolist() == contextual.tolist()
        for i in np.flatnonzero(kept):
            expected = slow_lifecycle(np.nan_to_num(values[i]).clip(0).tolist(), 0.7, 1)
            assert expected is not None
            row = table.loc[i].to_dict()
            for name, value in expected.items():
                assert row[name] == value or (pd.isna(row[name]) and value is None), (measure, i, name)
            assert found.present(measure)[i].sum() == expected["lifetime"]
        if measure != "norm":
            dates = date_births(read, measure, kept, presence=0.7, min_run=1, seed=3)
            pd.testing.assert_frame_equal(table[list(dates)], dates)
    pd.testing.assert_frame_equal(found.lifecycles(), found.lifecycles("r2"))
    frames = found.tables()
    assert frames["lifecycles"]["measure"].tolist() == ["r2"] * F + ["within"] * F + ["norm"] * F
    counts = found.count_births().query("measure == 'r2' and kind == 'all' and threshold == 0.7").iloc[0]
    assert counts["born"] == (found.lifecycles()["origin"] == "emergent").sum()
    lines = found.describe()
    assert lines[0] == f"{alive.sum()} live features of {F} at {S} snapshots, step1 to step{S}"
    assert [line.split(":")[0] for line in lines[1:]] == ["by R2", "by within-token R2", "by decoder norm"]
    assert repr(found) == "\n".join(lines)


def test_what_an_evolution_does_not_have_is_named() -> None:
    found = evolve(of_norms(torch.ones(3, 2)))
    assert "give activations" in found.describe()[-1]
    with pytest.raises(UserError, match="measure='r2' was not read: use 'norm'; the others need activations"):
        found.lifecycles("r2")
    with pytest.raises(UserError, match="column='present' is unknown: use one of norm, strength"):
        found.wide("present")
    assert found.count_births()["measure"].unique().tolist() == ["norm"]


# ---- rotation


def test_rotation_is_the_cosine_where_both_rows_have_a_direction() -> None:
    norms = torch.rand(30, 4, generator=torch.Generator().manual_seed(5))
    norms[0], norms[1] = torch.tensor([0.04, 1, 1, 1]), torch.tensor([1, 1, 1, 0.04])
    norms[2], norms[3] = torch.tensor([0.06, 1, 1, 0.06]), torch.zeros(4)
    cc = of_norms(norms)
    rows = cc.W_dec.detach().numpy().reshape(30, 4, 4).astype(float)
    for reference in (-1, 0, 2):
        found = rotation(cc, reference)
        assert found.shape == (30, 4)
        for i in range(30):
            size = [np.sqrt((rows[i, s] ** 2).sum()) for s in range(4)]
            for s in range(4):
                value = float(found[i, s])
                if max(size) == 0 or min(size[s], size[reference]) < 0.05 * max(size):
                    assert math.isnan(value)
                else:
                    dot = float(rows[i, s] @ rows[i, reference])
                    assert value == pytest.approx(dot / (size[s] * size[reference]), abs=1e-5)
    assert rotation(cc)[0].isnan().tolist() == [True, False, False, False]
    assert rotation(cc)[1].isnan().all() and not rotation(cc)[2].isnan().any() and rotation(cc)[3].isnan().all()
    assert not rotation(cc, min_norm=0.01)[:3].isnan().any()
    assert torch.allclose(rotation(cc)[4:, -1].nan_to_num(1.0), torch.ones(26))
    with pytest.raises(UserError, match="reference=4 is out of range: give a snapshot index from -4 to 3"):
        rotation(cc, 4)


def test_relative_norms() -> None:
    v = relative_norms(torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
    assert v[0].tolist() == [0.25, 1.0] and v[1].isnan().all()
