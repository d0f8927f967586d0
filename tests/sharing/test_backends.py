"""The whole pipeline on hub revisions in a real hub cache, offline, with both TransformerLens backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

PROGRAM = """
import sys
import torch
import crosslens as cl

text = open(sys.argv[1]).read().splitlines()
snaps = cl.Snapshots.pythia("14m", steps=[0, 512, 143_000])
task = cl.Task.from_items("tiny", [
    {"prefix": "the cat near the house", "correct": "sees", "wrong": "likes", "patch_prefix": "the dog near the bread"},
    {"prefix": "the king", "correct": "finds", "wrong": "likes", "patch_prefix": "the child"},
])
found = []
for backend in ("bridge", "hooked_transformer"):
    settings = cl.snapshots.ModelSettings(backend=backend)
    acts = cl.Activations(snaps, "blocks.1.hook_resid_post", text, 1500, 16, settings=settings)
    batch = next(acts.batches(256))
    cc = cl.train(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=32, k=4), cl.TrainConfig(batch_size=128))
    table = cl.evaluate(cc, acts)
    runs = cl.intervention.PromptRuns(cc, snaps, task, paired=True, settings=settings)
    ie = cl.attribute(runs, baseline="patch")
    drop = cl.ablate(runs, ie, [2], baseline="patch", controls=cl.causal.Controls(n_draws=2))
    accuracy = task.accuracy(snaps, settings=settings)
    found.append((batch, cc.W_dec, torch.tensor(table.drop(columns=["label", "step", "tokens"]).to_numpy(float)),
                  ie.effects, torch.tensor(drop["metric"].to_numpy()), torch.tensor(accuracy["metric"].to_numpy())))
for one, other in zip(*found):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    print(f"{float((one - other).nan_to_num().abs().max()):.2e}")
"""


@pytest.mark.exhaustive
def test_both_backends_give_the_same_results(tmp_path: Path, tiny_snapshots: Path, tiny_text: list[str]) -> None:
    repository = tmp_path / "home" / "hub" / "models--EleutherAI--pythia-14m"
    tokenizer = AutoTokenizer.from_pretrained(tiny_snapshots / "tokenizer")
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    for seed, step in enumerate((0, 512, 143_000)):
        commit = f"{seed + 1:040d}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / f"step{step}").write_text(commit)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            GPTNeoXForCausalLM(config).save_pretrained(repository / "snapshots" / commit)
        tokenizer.save_pretrained(repository / "snapshots" / commit)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_text))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(text)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 6
