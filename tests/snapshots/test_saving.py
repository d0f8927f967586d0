"""Snapshots saved from training: by a Trainer that is killed and resumed, by two processes, and by a loop."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainingArguments

import crosslens as cl
from crosslens.errors import UserError
from crosslens.snapshots.saving import SaveSnapshots, choose_steps, save

STEPS = [0, 1, 2, 4, 7, 12]  # log:6 of 12


def make_model() -> GPTNeoXForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(vocab_size=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=32, max_position_embeddings=32, bos_token_id=0, eos_token_id=0)
        )  # fmt: skip


def make_trainer(
    folder: Path, tokenizer: Any, out: Path, callbacks: list[Any] | None = None, **options: Any
) -> Trainer:
    rows = torch.randint(0, 16, (64, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        output_dir=str(out), max_steps=12, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_steps=5,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0, learning_rate=1e-2, **options,
    )  # fmt: skip
    save_them = SaveSnapshots(folder, steps="log:6", context_size=8)
    return Trainer(
        make_model(), args, train_dataset=data, processing_class=tokenizer, callbacks=[save_them, *(callbacks or [])]
    )


def check(folder: Path, steps: list[int]) -> cl.Snapshots:
    """All folders are whole, and nothing else is there."""
    found = cl.Snapshots.local(folder)
    assert found.steps == steps and found.labels == [f"step{step}" for step in steps]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["snapshots.json", "tokenizer", *(f"step{step}" for step in steps)]
    )
    found.check()  # loads the weights of all, and refuses equal ones
    for snapshot in found:
        GPTNeoXForCausalLM.from_pretrained(snapshot.name)
    return found


def test_a_trainer_saves_the_steps_that_are_asked_for(snaps: cl.Snapshots, tmp_path: Path) -> None:
    make_trainer(tmp_path / "snapshots", snaps.tokenizer, tmp_path / "out").train()
    found = check(tmp_path / "snapshots", STEPS)
    assert found.tokens == [step * 2 * 2 * 8 for step in STEPS]
    last = GPTNeoXForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-12").state_dict()
    saved = GPTNeoXForCausalLM.from_pretrained(tmp_path / "snapshots" / "step12").state_dict()
    assert all(torch.equal(last[name], saved[name]) for name in last)
    first = GPTNeoXForCausalLM.from_pretrained(tmp_path / "snapshots" / "step0").state_dict()
    assert all(torch.equal(value, first[name]) for name, value in make_model().state_dict().items())


def test_checkpoints_of_a_trainer_are_snapshots(snaps: cl.Snapshots, tmp_path: Path) -> None:
    make_trainer(tmp_path / "snapshots", snaps.tokenizer, tmp_path / "out").train()
    found = cl.Snapshots.local(tmp_path / "out")
    assert found.labels == ["checkpoint-5", "checkpoint-10", "checkpoint-12"] and found.steps == [5, 10, 12]
    found.check()


def test_what_the_trainer_counts_is_recorded(snaps: cl.Snapshots, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "a", snaps.tokenizer, tmp_path / "out", include_num_input_tokens_seen="all")
    trainer.train()
    assert check(tmp_path / "a", STEPS).tokens == [step * 32 for step in STEPS]


KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import AutoTokenizer, TrainerCallback
from tests.snapshots.test_saving import make_trainer

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

folder, tokenizer, out, resume = sys.argv[1:]
callbacks = [] if resume == "yes" else [Kill()]
trainer = make_trainer(Path(folder), AutoTokenizer.from_pretrained(tokenizer), Path(out), callbacks)
trainer.train(resume_from_checkpoint=resume == "yes")
"""


@pytest.mark.exhaustive
def test_a_trainer_that_is_killed_and_resumed(tiny_snapshots: Path, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots"
    place = [str(folder), str(tiny_snapshots / "tokenizer"), str(tmp_path / "out")]
    first = subprocess.run([sys.executable, "-c", KILLED, *place, "no"], capture_output=True, check=False)
    assert first.returncode == -signal.SIGKILL, first.stderr.decode()
    assert cl.Snapshots.local(folder).steps == [0, 1, 2, 4, 7]
    before = {path: path.stat().st_mtime_ns for path in folder.glob("step*/*")}
    (folder / ".step12.partial-1").mkdir()  # of a process that was killed while it wrote
    (folder / ".step12.partial-1" / "config.json").write_text("{")
    subprocess.run([sys.executable, "-c", KILLED, *place, "yes"], capture_output=True, check=True)
    assert check(folder, STEPS).tokens == [step * 32 for step in STEPS]
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())  # each is written once
    last = GPTNeoXForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint-12").state_dict()
    saved = GPTNeoXForCausalLM.from_pretrained(folder / "step12").state_dict()
    assert all(torch.equal(last[name], saved[name]) for name in last)


def test_what_a_resumed_trainer_has_not_loaded_is_named(snaps: cl.Snapshots, tmp_path: Path) -> None:
    make_trainer(tmp_path / "snapshots", snaps.tokenizer, tmp_path / "out").train()
    checkpoint = tmp_path / "out" / "checkpoint-10"
    with pytest.warns(UserWarning, match=r"not loaded lm_head.weight from checkpoint-10.*from_pretrained"):
        make_trainer(tmp_path / "again", snaps.tokenizer, tmp_path / "out").train(str(checkpoint))

    whole = make_trainer(tmp_path / "whole", snaps.tokenizer, tmp_path / "out")
    whole.model = whole.model_wrapped = GPTNeoXForCausalLM.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not loaded")
        whole.train(str(checkpoint))
    ends = [load_file(tmp_path / name / "step12" / "model.safetensors") for name in ("snapshots", "whole", "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["embed_out.weight"], ends[2]["embed_out.weight"])


LOOP = """
import sys
from pathlib import Path
import torch
from tests.snapshots.test_saving import make_model
from transformers import AutoTokenizer
import crosslens as cl

torch.manual_seed(0)
model = make_model()
for step in range(40):
    cl.snapshots.save(model, step, sys.argv[1], tokens=64 * step, tokenizer=AutoTokenizer.from_pretrained(sys.argv[2]))
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    print(step, flush=True)
"""


@pytest.mark.exhaustive
def test_a_loop_that_is_killed_leaves_whole_folders(tiny_snapshots: Path, tmp_path: Path) -> None:
    for attempt in range(3):
        loop = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(tmp_path / "a"), str(tiny_snapshots / "tokenizer")], stdout=subprocess.PIPE
        )
        assert loop.stdout is not None
        for _ in range(4 + 5 * attempt):
            loop.stdout.readline()
        time.sleep(0.003 * attempt)
        os.kill(loop.pid, signal.SIGKILL)
        loop.wait()
        found = cl.Snapshots.local(tmp_path / "a")
        assert len(found) >= 4 + 5 * attempt
        for snapshot in found:
            GPTNeoXForCausalLM.from_pretrained(snapshot.name)


TWO = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from transformers import AutoTokenizer
from tests.snapshots.test_saving import make_trainer
import crosslens.snapshots.saving as saving

wrote, write = [], saving._whole
saving._whole = lambda place, how: (wrote.append(place.name), write(place, how))
folder, tokenizer, out = sys.argv[1:]
make_trainer(Path(folder), AutoTokenizer.from_pretrained(tokenizer), Path(out), ddp_backend="gloo").train()
Path(out, f"wrote-{dist.get_rank()}").write_text(" ".join([str(dist.get_world_size()), *wrote]))
dist.destroy_process_group()
"""


@pytest.mark.exhaustive
def test_two_processes_write_once(tiny_snapshots: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    place = [str(tmp_path / "snapshots"), str(tiny_snapshots / "tokenizer"), str(tmp_path / "out")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([*command, *place], capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    wrote = [(tmp_path / "out" / f"wrote-{rank}").read_text().split() for rank in range(2)]
    assert wrote == [["2", "tokenizer", *(f"step{step}" for step in STEPS)], ["2"]]
    assert check(tmp_path / "snapshots", STEPS).tokens == [step * 2 * 2 * 2 * 8 for step in STEPS]


def test_a_loop_of_ones_own(snaps: cl.Snapshots, tmp_path: Path) -> None:
    model = make_model()
    for step in (3, 0, 10):
        with torch.no_grad():
            model.get_output_embeddings().weight.add_(1.0)
        assert save(model, step, tmp_path / "a", tokens=step * 100, tokenizer=snaps.tokenizer).name == f"step{step}"
    again = save(make_model(), 3, tmp_path / "a")
    assert (again / "config.json").is_file() and check(tmp_path / "a", [0, 3, 10]).tokens == [0, 300, 1000]
    manifest = json.loads((tmp_path / "a" / "snapshots.json").read_text())
    manifest["snapshots"] = manifest["snapshots"][:1]  # killed between the folder and the manifest
    (tmp_path / "a" / "snapshots.json").write_text(json.dumps(manifest))
    save(model, 20, tmp_path / "a")
    assert cl.Snapshots.local(tmp_path / "a").steps == [0, 3, 10, 20]


@pytest.mark.skipif(os.name != "posix", reason="there is no umask")
def test_files_have_the_permissions_of_the_users_umask(snaps: cl.Snapshots, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        place = save(make_model(), 0, tmp_path / "a", tokenizer=snaps.tokenizer)
    finally:
        os.umask(before)
    for path in place.iterdir():
        assert path.stat().st_mode & 0o777 == 0o640, path


def test_steps_are_evenly_spaced() -> None:
    assert choose_steps("log:6", 12) == STEPS
    assert choose_steps("linear:5", 100) == [0, 25, 50, 75, 100]
    assert choose_steps("log:13", 12) == list(range(13))
    assert choose_steps([5, 0, 99, 5], 50) == [0, 5]
    found = choose_steps("log:32", 143_000)
    assert len(found) == 32 and found[0] == 0 and found[-1] == 143_000 and found == sorted(set(found))
    gaps = [math.log1p(b) - math.log1p(a) for a, b in zip(found[12:], found[13:], strict=False)]
    assert max(gaps) - min(gaps) < 0.05


@pytest.mark.parametrize(
    ("steps", "words"),
    [("often", "whole numbers from 0"), ([-1], "whole numbers from 0"), ([], "whole numbers"), ("log:1", "asks for 1")],
)
def test_steps_are_refused(tmp_path: Path, steps: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        SaveSnapshots(tmp_path, steps)


def test_mistakes_come_before_training(snaps: cl.Snapshots, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="snapshots need their tokenizer"):
        make_trainer(tmp_path / "a", None, tmp_path / "out").train()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        make_trainer(tmp_path / "file", snaps.tokenizer, tmp_path / "out").train()
    with pytest.raises(UserError, match="step=-1 must be 0 or more"):
        save(make_model(), -1, tmp_path)
    with pytest.raises(UserError, match="a Linear has no save_pretrained"):
        save(torch.nn.Linear(1, 1), 1, tmp_path)
