"""A run over 32 snapshots from end to end, from harvesting to the table of features, with memory and disk bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM

import crosslens as cl
from crosslens.activations import cache
from crosslens.snapshots.families import find_model
from crosslens.snapshots.snapshot import Snapshot

HOOK, T = "blocks.1.hook_resid_post", 16


@pytest.fixture(scope="module")
def folder(tiny_snapshots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 32 steps of Ge et al.: the tiny model on its way from the first of its snapshots to the last."""
    root = tmp_path_factory.mktemp("many")
    first, last = (GPTNeoXForCausalLM.from_pretrained(tiny_snapshots / f"step{n}") for n in (0, 20))
    start, way = first.state_dict(), last.state_dict()
    model = GPTNeoXForCausalLM(first.config)
    for i, row in enumerate(find_model("pythia", "160m").revisions("paper")):
        model.load_state_dict({name: torch.lerp(start[name], way[name], i / 31) for name in start})
        model.save_pretrained(root / f"step{row.step}")
    (root / "tokenizer").symlink_to(tiny_snapshots / "tokenizer")
    return root


@pytest.mark.exhaustive
def test_32_snapshots_end_to_end(
    folder: Path, tiny_text: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "FILE_BYTES", 40 * T * 32)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_text))
    snaps = cl.Snapshots.local(folder)
    assert len(snaps) == 32 and snaps.steps[:3] == [0, 2, 4] and snaps.steps[-1] == 143_000
    acts = cl.Activations(snaps, HOOK, cl.activations.Dataset(text, 1500, T, 300))
    plan = acts.plan(training_tokens=4500)
    assert plan.recommendation[0] == "cached" and plan.n_snapshots == 32

    loaded: list[int | None] = []
    load = Snapshot.load

    def noted(snapshot: Snapshot, *args: Any, **options: Any) -> Any:
        loaded.append(snapshot.step)
        assert args[3] == 2 or options["n_blocks"] == 2
        return load(snapshot, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Snapshot, "load", noted)
        cached = acts.cache(tmp_path / "cache")
    assert loaded == snaps.steps  # each once, one after the other
    assert not snaps._models  # pyright: ignore[reportPrivateUsage] (and none is kept)

    cc = cl.train(
        cached,
        cl.BatchTopKCrosscoderTrainingConfig(d_sae=48, k=8),
        cl.TrainConfig(run_dir=tmp_path / "run", training_tokens=4500, batch_size=250, lr=1e-2, evaluate=False),
    )
    assert cc.decoder_norms.shape == (48, 32)
    table = cl.evolve(cc, cached).lifecycles("norm")
    assert len(table) == 48 and table["peak"].between(0, 31).all()
    x = next(cached.held_out(256))
    assert x.shape[1:] == (32, 16)
    error = (cc.decode(cc.encode(x)) - x).square().sum((0, 2))
    assert bool((error < 0.5 * (x - x.mean(0)).square().sum((0, 2))).all())
    assert torch.equal(cl.load(tmp_path / "run" / "crosscoder").encode(x), cc.encode(x))
