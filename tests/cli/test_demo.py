"""The demo at a small size: every stage runs, the summary is complete, and a second run reuses the first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crosslens.cli.demo import DemoConfig, run_demo
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.synthetic.pretraining import PretrainingConfig

SMALL = DemoConfig(
    first_step=1, n_documents=600, n_tokens=8_000, epochs=2, d_sae=128, k=8, batch_size=256, n_prompts=8, n_random=4,
    n_exact=10, n_probes=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def snaps(tmp_path_factory: pytest.TempPathFactory) -> Snapshots:
    recipe = PretrainingConfig(
        d_model=32, d_mlp=64, n_heads=2, n_steps=24, warmup_steps=4, snapshot_steps=(0, 4, 8, 24)
    )
    return Snapshots.demo(0, tmp_path_factory.mktemp("model") / "seed0", config=recipe)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, snaps: Snapshots) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    summary = run_demo(folder, 0, SMALL, snaps)
    assert summary == json.loads((folder / "summary.json").read_text())
    return folder


@pytest.mark.exhaustive
def test_every_stage_runs(out: Path, snaps: Snapshots) -> None:
    summary = json.loads((out / "summary.json").read_text())
    assert summary["snapshots"] == ["step4", "step8", "step24"]
    assert set(summary["accuracy"]) == {"simple", "pp", "subj_rel"} == set(summary["ablation"])
    assert set(summary["phases"]) >= {"dimensionality"}
    assert all(len(curve) == 4 for curve in summary["accuracy"].values())
    assert len(summary["explained_variance"]) == 3
    assert all(0 <= error < 0.05 for error in summary["completeness_error"])
    for figures in summary["ablation"].values():
        assert all(isinstance(value, (int, float)) for value in figures.values())
    for name in ("late_feature", "sign_change"):
        assert len(summary[name]["ie"]) == 3 and 0 <= summary[name]["feature"] < SMALL.d_sae
    assert (out / "report" / "index.html").is_file()
    with pytest.raises(UserError, match="it has seed=0, this run has seed=1"):
        run_demo(out, 1, SMALL, snaps)


@pytest.mark.exhaustive
def test_a_second_run_changes_nothing(out: Path, snaps: Snapshots) -> None:
    summary = json.loads((out / "summary.json").read_text())
    weights = (out / "crosscoder" / "sae_weights.safetensors").read_bytes()
    again = run_demo(out, 0, SMALL, snaps)
    assert (out / "crosscoder" / "sae_weights.safetensors").read_bytes() == weights
    timed = ("seconds", "timings")
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in summary.items() if k not in timed}
