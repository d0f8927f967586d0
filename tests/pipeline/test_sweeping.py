"""The grid of F and k against its parts, and the proposal by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from crosslens.activations.loader import Activations
from crosslens.config import CacheOptions, ModelOptions, SourceOptions, SweepOptions, TrainingOptions
from crosslens.crosscoders import BatchTopKCrosscoderTrainingConfig, StandardCrosscoderTrainingConfig
from crosslens.errors import UserError
from crosslens.evolution.seeds import consensus, match, match_shares
from crosslens.pipeline.sweeping import choose, propose, sweep
from crosslens.rundir import RunDir
from crosslens.training import TrainConfig, reconstruction_table, train

pytestmark = pytest.mark.filterwarnings("ignore:the crosscoder explains less")


def test_the_table_matches_its_parts(acts: Activations, tmp_path: Path) -> None:
    config = TrainConfig(
        training_tokens=1000, batch_size=100, scale_tokens=400, lr=3e-3, device="cpu", seed=3, run_dir=tmp_path / "run"
    )
    architecture = BatchTopKCrosscoderTrainingConfig(d_sae=99, k=5)
    found = choose(acts, architecture, config, d_sae=[16, 8], k=[4], n_seeds=3, threshold=0.5)
    table = found.table
    assert table[["d_sae", "k", "seeds"]].to_numpy().tolist() == [[8, 4, 3], [16, 4, 3]]
    for row in table.to_dict("records"):
        ccs = [
            train(
                acts,
                BatchTopKCrosscoderTrainingConfig(d_sae=row["d_sae"], k=4),
                TrainConfig(
                    training_tokens=1000, batch_size=100, scale_tokens=400, lr=3e-3, device="cpu", seed=seed,
                    evaluate=False,
                ),
            )
            for seed in (3, 4, 5)
        ]  # fmt: skip
        tables = [reconstruction_table(cc, acts)["explained_variance"] for cc in ccs]
        assert row["explained_variance"] == pytest.approx(sum(each.mean() for each in tables) / 3)
        assert row["least_explained"] == pytest.approx(sum(each.min() for each in tables) / 3)
        shares = [match_shares(match(a, b, acts), 0.5) for a, b in zip(ccs, [*ccs[1:], ccs[0]], strict=True)]
        agreed = [each[name] for each in shares for name in ("share_a", "share_b")]
        assert row["agreement"] == pytest.approx(sum(agreed) / 6)
        assert (row["agreement_low"], row["agreement_high"]) == pytest.approx((min(agreed), max(agreed)))
        weighted = [each[name] for each in shares for name in ("variance_a", "variance_b")]
        assert row["variance"] == pytest.approx(sum(weighted) / 6)
        several = consensus(ccs, acts, 0.5)
        live = several[several["alive"]]
        assert row["live"] == pytest.approx(len(live) / 3) and row["agreed"] == row["agreement"] * row["live"]
        by = live.groupby("crosscoder")
        assert row["consensus"] == pytest.approx(by["consensus"].mean().mean())
        assert row["consensus_variance"] == pytest.approx(live.loc[live["consensus"], "variance"].sum() / 3)
        for seed in (3, 4, 5):
            assert RunDir(config.run_dir or "").setting(row["d_sae"], 4, seed).read_json()["seed"] == seed
    proposed = table[table["proposed"]]
    assert proposed[["d_sae", "k"]].to_numpy().tolist() == [[found.d_sae, found.k]]
    assert found.reason == propose(table)[1]
    again = choose(acts, architecture, config, d_sae=[16, 8], k=[4], n_seeds=3, threshold=0.5)
    pd.testing.assert_frame_equal(again.table, table)


def test_proposals_by_hand() -> None:
    table = pd.DataFrame(
        [
            (128, 4, 0.960, 0.00, 0.70),  # explains too little
            (128, 8, 0.975, 0.00, 0.60),
            (256, 8, 0.980, 0.05, 0.595),
            (256, 4, 0.971, 0.09, 0.592),
            (512, 8, 0.981, 0.20, 0.90),  # too many dead
            (512, 16, 0.980, 0.10, 0.40),
        ],
        columns=["d_sae", "k", "least_explained", "dead", "agreement"],
    )
    at, reason = propose(table)
    assert at == 3 and "F=256, k=4: 5 of 6 settings explain within 0.01 of the best (0.981)" in reason
    assert "59% of the live features, where the others have 40% to 60% (3 settings are within 0.01 of that" in reason
    assert propose(table, tolerance=0.006)[0] == 1
    assert propose(table, max_dead=0.2)[0] == 4
    assert propose(table.iloc[[2, 5]], tolerance=0.02)[0] == 2
    # where all have too many dead features, the one with the fewest
    assert propose(table, max_dead=-1)[0] == 1
    assert propose(table.assign(dead=[0.5, 0.4, 0.3, 0.2, 0.3, 0.9]))[0] == 3


def test_impossible_grids(acts: Activations) -> None:
    architecture = BatchTopKCrosscoderTrainingConfig(d_sae=8, k=2)
    for given, options, message in (
        (architecture, {"d_sae": [], "k": [1]}, r"d_sae=\[\] and k=\[1\] are an empty grid"),
        (architecture, {"d_sae": [8, 16], "k": [9]}, r"k=9 is not in \(0, 8\], the d_sae of this setting"),
        (architecture, {"d_sae": [8], "k": [1], "n_seeds": 1}, "n_seeds=1 must be 2 or more"),
        (
            StandardCrosscoderTrainingConfig(d_sae=8),
            {"d_sae": [8], "k": [1]},
            "has no k, which `choose` compares",
        ),
    ):
        with pytest.raises(UserError, match=message):
            choose(acts, given, TrainConfig(device="cpu"), **options)


def test_a_cache_that_cannot_be_written_is_found_before_the_sweep(tiny_snapshots: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sees a fish .\n" * 400)
    source = SourceOptions(
        snapshots=str(tiny_snapshots), hook=("blocks.0.hook_resid_post",), dataset=str(text), n_tokens=1000,
        context_size=16,
    )  # fmt: skip
    with pytest.raises(UserError, match="text.txt/acts cannot be a folder: .*text.txt is a file; choose another path"):
        sweep(
            RunDir(tmp_path / "run"), source, SweepOptions(d_sae=(8, 16), k=(2,)), TrainingOptions(batch_size=100),
            models=ModelOptions(device="cpu"), cache=CacheOptions(cache=text / "acts"),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
