"""Evolution: every definition against a slow reading of it, dead features, dates, rotation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from crosslens.activations import Activations
from crosslens.crosscoders import (
    JumpReLUCrosscoder,
    JumpReLUCrosscoderConfig,
    StandardCrosscoder,
    StandardCrosscoderConfig,
)
from crosslens.errors import UserError
from crosslens.evolution import classify, evolve, firing_rates, relative_norms, rotation
from crosslens.snapshots import Snapshots

COLUMNS = [
    "feature", "alive", "firing_rate", "origin", "fate", "birth", "birth_step", "birth_tokens", "peak", "peak_step",
    "peak_tokens", "death", "lifetime",
]  # fmt: skip


class Held(Activations):
    """Held-out activations that are given, not harvested."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def held_out(self, batch_size: int = 4096) -> Any:
        return iter(self.x.split(min(batch_size, 5)))


def crosscoder(norms: Any, metadata: Any = None, D: int = 4, seed: int = 0) -> StandardCrosscoder:
    """A crosscoder with random directions and the given decoder norms."""
    norms = torch.as_tensor(norms, dtype=torch.float32)
    F, S = norms.shape
    config = StandardCrosscoderConfig(d_in=S * D, d_sae=F, n_snapshots=S)
    if metadata is not None:
        config.metadata.snapshots = metadata
    made = StandardCrosscoder(config)
    rows = torch.randn(F, S, D, generator=torch.Generator().manual_seed(seed))
    rows *= (norms / rows.norm(dim=-1))[..., None]
    made.W_dec.data = rows.flatten(1)
    made.W_enc.data = rows.flatten(1).T.clone()
    return made


# ---- the definitions


def slow_life(norms: list[float], presence: float, min_run: int) -> dict[str, Any] | None:
    """The life of one feature, word by word."""
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


levels = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]), st.floats(0, 8, width=32))


@given(
    st.integers(2, 7).flatmap(lambda S: st.lists(st.lists(levels, min_size=S, max_size=S), min_size=1, max_size=5)),
    st.sampled_from([0.01, 0.25, 0.5, 0.9, 1.0]),
    st.integers(1, 4),
)
@example([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], 0.5, 2)
@example([[0.0, 1.0, 0.0, 1.0, 1.0, 0.4]], 0.5, 2)
def test_every_life_is_what_the_definition_says(norms: list[list[float]], presence: float, min_run: int) -> None:
    table = classify(torch.tensor(norms, dtype=torch.float64), presence, min_run=min_run)
    assert len(table) == len(norms)
    for row, record in zip(norms, table.to_dict("records"), strict=True):
        found = {key: None if value is None or value is pd.NA else value for key, value in record.items()}
        assert found == (slow_life(row, presence, min_run) or dict.fromkeys(table))


def test_the_four_kinds_of_life_by_hand() -> None:
    norms = [[8, 8, 8, 8], [1, 9, 9, 1], [1, 1, 9, 4.5], [1, 1, 9, 4], [9, 1, 1, 9], [1, 9, 1, 1]]
    table = classify(torch.tensor(norms))
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
    pd.testing.assert_frame_equal(classify(norms), classify(norms * scale))


def test_errors_come_before_anything_is_read() -> None:
    good = torch.ones(3, 2)
    for arguments, options, message in (
        ((torch.ones(3, 1),), {}, "evolution needs at least 2 snapshots, this crosscoder has 1: train on more"),
        ((good, 0.0), {}, r"presence=0.0 is not in \(0, 1\]"),
        ((good, 1.5), {}, "presence=1.5 is not in"),
        ((good,), {"min_run": 0}, "min_run=0 is not possible"),
        ((torch.tensor([[1.0, 1.0], [math.nan, 1.0]]),), {}, r"norms of feature 1 are \[nan, 1.0\]"),
        ((-good,), {}, "norms of feature 0 are"),
    ):
        with pytest.raises(UserError, match=message):
            classify(*arguments, **options)

    class Never(Held):
        def held_out(self, batch_size: int = 0) -> Any:
            raise AssertionError(f"{batch_size} read before the check")

    for cc, options, message in (
        (crosscoder(torch.ones(3, 1)), {}, "at least 2 snapshots"),
        (crosscoder(good), {"presence": 2.0}, "presence=2.0"),
        (crosscoder(good), {"min_firing_rate": 1.0}, r"min_firing_rate=1.0 is not in \[0, 1\)"),
    ):
        with pytest.raises(UserError, match=message):
            evolve(cc, Never(good), **options)


# ---- the table


def test_table_has_the_columns_and_the_dates() -> None:
    metadata = [{"label": f"step{10**s}", "step": 10**s, "tokens": 3 * 10 ** (s + 11)} for s in range(4)]
    norms = [[1, 1, 5, 4], [2, 1, 1, 1], [0, 3, 0, 0], [0, 0, 0, 0]]
    table = evolve(crosscoder(norms, metadata))
    assert list(table) == COLUMNS + [f"norm/step{10**s}" for s in range(4)]
    assert table["feature"].tolist() == [0, 1, 2, 3]
    assert table["alive"].dtype == bool and table["alive"].tolist() == [True, True, True, False]
    assert table["firing_rate"].isna().all()
    assert table["birth_step"].tolist() == [100, 1, pd.NA, pd.NA]
    assert table["birth_tokens"].tolist() == [3 * 10**13, 3 * 10**11, pd.NA, pd.NA]
    assert table["peak_step"].tolist() == [100, 1, 10, pd.NA]
    assert table["peak_tokens"].tolist() == [3 * 10**13, 3 * 10**11, 3 * 10**12, pd.NA]
    assert np.allclose(table[[c for c in table if c.startswith("norm/")]], norms)


def test_without_metadata_snapshots_go_by_their_index(tmp_path: Path) -> None:
    table = evolve(crosscoder([[1, 1, 4], [0, 0, 0]]))
    assert [c for c in table if c.startswith("norm/")] == ["norm/0", "norm/1", "norm/2"]
    assert table["birth"].tolist() == [2, pd.NA] and table["birth_step"].isna().all()
    table.to_parquet(tmp_path / "evolution.parquet")
    again = pd.read_parquet(tmp_path / "evolution.parquet")
    words = ["origin", "fate"]  # the dtype of text depends on the version of pandas
    pd.testing.assert_frame_equal(again.drop(columns=words), table.drop(columns=words))
    assert again["origin"].tolist()[0] == "emergent" and again[words].isna().all(axis=1).tolist() == [False, True]


def test_features_that_do_not_fire_are_out_of_the_statistics() -> None:
    cc = crosscoder(torch.rand(40, 3, generator=torch.Generator().manual_seed(2)) + 0.1)
    cc.b_enc.data = torch.linspace(-9, 1, 40)
    x = torch.randn(33, 3, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        fired = [float(sum(cc.encode(token)[i] > 0 for token in x)) / 33 for i in range(40)]
    assert 0 < sum(rate == 0 for rate in fired) < 40
    held = Held(x)
    rates = firing_rates(cc, held)
    assert rates.tolist() == pytest.approx(fired)
    table, all_alive = evolve(cc, held), evolve(cc)
    assert table["firing_rate"].tolist() == pytest.approx(fired)
    assert table["alive"].tolist() == [rate > 0 for rate in fired]
    life = [c for c in COLUMNS if c not in ("feature", "alive", "firing_rate")]
    dead = ~table["alive"]
    assert table.loc[dead, life].isna().all(axis=None) and table.loc[~dead, ["origin", "peak"]].notna().all(axis=None)
    pd.testing.assert_frame_equal(table.loc[~dead, life], all_alive.loc[~dead, life])
    pd.testing.assert_frame_equal(table.filter(like="norm/"), all_alive.filter(like="norm/"))
    few = evolve(cc, held, min_firing_rate=0.3)
    assert few["alive"].tolist() == [rate > 0.3 for rate in fired]
    with pytest.raises(UserError, match="no activations are held out"):
        evolve(cc, Held(x[:0]))


def test_a_feature_of_per_snapshot_gates_is_alive_when_any_gate_opens() -> None:
    cc = JumpReLUCrosscoder(JumpReLUCrosscoderConfig(d_in=8, d_sae=2, n_snapshots=2))
    cc.W_dec.data = torch.tensor([[0.0, 0, 0, 0, 2, 0, 0, 0], [0.01, 0, 0, 0, 0.01, 0, 0, 0]])
    cc.b_enc.data = torch.ones(2)
    held = Held(torch.zeros(7, 2, 4))
    assert firing_rates(cc, held).tolist() == [1.0, 0.0]


def test_real_activations(tiny_snapshots: Path, tiny_text: list[str]) -> None:
    acts = Activations(Snapshots.local(tiny_snapshots), "blocks.1.hook_resid_post", tiny_text, 500, 16)
    cc = crosscoder(torch.rand(8, 3, generator=torch.Generator().manual_seed(4)), acts.metadata()["snapshots"], D=16)
    table = evolve(cc, acts)
    assert [c for c in table if c.startswith("norm/")] == ["norm/step0", "norm/step10", "norm/step20"]
    x = torch.cat(list(acts.held_out()))
    assert table["firing_rate"].tolist() == pytest.approx((cc.encode(x) > 0).double().mean(0).tolist())
    assert set(table["peak_step"].dropna()) <= {0, 10, 20}


# ---- rotation


def test_rotation_is_the_cosine_where_both_rows_have_a_direction() -> None:
    norms = torch.rand(30, 4, generator=torch.Generator().manual_seed(5))
    norms[0], norms[1] = torch.tensor([0.04, 1, 1, 1]), torch.tensor([1, 1, 1, 0.04])
    norms[2], norms[3] = torch.tensor([0.06, 1, 1, 0.06]), torch.zeros(4)
    cc = crosscoder(norms)
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
    with pytest.raises(UserError, match="reference=4 is no snapshot: give an index from -4 to 3"):
        rotation(cc, 4)


def test_relative_norms() -> None:
    v = relative_norms(torch.tensor([[1.0, 4.0], [0.0, 0.0]]))
    assert v[0].tolist() == [0.25, 1.0] and v[1].isnan().all()
