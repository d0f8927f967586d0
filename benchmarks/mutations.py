"""Mutated files: whether the readers refuse them in one line, repair them and say so, or read something else.

One small valid file of every kind that the library reads is made once. Then, n times, a copy is mutated at random and
read in this process by the reader that users call:

    any file    a bit is flipped; a run of bytes is changed, inserted or deleted; the file is cut; a piece is
                duplicated; two pieces change places
    text        also: a value becomes a huge, negative, infinite or other number, or something else; a key or line is
                deleted; a value is nested deeply
    gzip        also: the text in it is mutated, and compressed again

A sealed file, that is one with a checksum, gets one mutation, which does not delete the checksum itself (messages tell
users to do that after an edit that was meant); any other gets one to three.

    same        it is read as the original
    other       it is read as something else: no fault where users write the file and nothing could tell
    told        a `UserError` of one line, or a warning that names the file, which is then repaired or left out
    raw         any other exception, a message of several lines, or more than 1 GB of memory
    silent      a sealed file is read as something else, or repaired, and nothing is said
    hang        ten seconds were not enough

    python benchmarks/mutations.py --n 2000 [--seed 0] [--kinds table,run.json] [--report]

`--cost` measures what checksums cost instead: their share of a training run with eight checkpoints, and of reading an
epoch from a cache for the first and the second time.

    python benchmarks/mutations.py --cost [--steps 300]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # before they are imported

import datasets
import measure
import numpy as np
import pandas as pd
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import crosslens as cl
from crosslens import rundir
from crosslens.activations import Dataset, cache, files, token_sequences
from crosslens.crosscoders import JumpReLUCrosscoder, JumpReLUCrosscoderConfig
from crosslens.crosscoders import checksums as crosscoder_checksums
from crosslens.evolution import NgramCounts, count_ngrams
from crosslens.features.explainers import Answers, Reply
from crosslens.rundir import RunDir
from crosslens.sharing import import_crosscoder
from crosslens.sharing.registry import read_registry
from crosslens.snapshots import Snapshot, hashes
from crosslens.synthetic import grammar
from crosslens.synthetic.pretraining import PretrainingConfig, demo_tokenizer, pretrain_demo
from crosslens.training import CrosscoderTrainer, checkpoints, initialise
from crosslens.training.initialisation import uninitialised
from crosslens.training.run import claim

OUTCOMES = ("same", "other", "told", "raw", "silent", "hang")
PACKAGES = ("crosslens", "torch", "safetensors", "transformers", "datasets", "pyarrow", "xxhash")
SECONDS = 10
MEMORY = 6 << 30  # address space that reading may add
RESIDENT = 1 << 20  # kilobytes by which one reading may raise the peak
HOOK = "blocks.0.hook_resid_post"
MODEL = PretrainingConfig(
    n_layers=1, d_model=16, n_heads=2, d_mlp=32, batch_size=4, n_steps=6, warmup_steps=2, snapshot_steps=(2, 4, 6)
)
WORDS = ("simple", "en", 12, 0)  # arguments of `grammar.pairs`
NUMBERS = (b"-1", b"0", b"1.5", b"NaN", b"-Infinity", b"1e999", b"9" * 18, b"9" * 40, b"9" * 5000, b"2147483648")
VALUES = (b"null", b"true", b'""', b"{}", b"[]", b'"../x"', b'"' + b"x" * 5000 + b'"', b'"\\ud800"', b'"\\u0000"')


# ---------------------------------------------------------------------- mutations
def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def change(data: bytes, rng: random.Random) -> bytes:
    first, last = _piece(data, rng)
    return data[:first] + rng.randbytes(last - first) + data[last:]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]


def delete(data: bytes, rng: random.Random) -> bytes:
    first, last = _piece(data, rng)
    return data[:first] + data[last:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    first, last = _piece(data, rng)
    return data[:last] + data[first:last] + data[last:]


def swap(data: bytes, rng: random.Random) -> bytes:
    first, last = _piece(data, rng)
    size = last - first
    other = rng.randrange(len(data) - size + 1)
    a, b = sorted((first, other))
    if a + size > b:
        return data[:a] + data[b : b + size] + data[a:b] + data[b + size :]
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def _piece(data: bytes, rng: random.Random) -> tuple[int, int]:
    size = min(len(data), rng.choice((1, 2, 8, 64, max(1, len(data) // 4))))
    first = rng.randrange(len(data) - size + 1)
    return first, first + size


def number(data: bytes, rng: random.Random) -> bytes:
    return _replaced(data, rb"-?\d+(?:\.\d+)?", rng.choice(NUMBERS), rng)


def value(data: bytes, rng: random.Random) -> bytes:
    return _replaced(data, rb'"[^"\\\n]*"|-?\d+(?:\.\d+)?', rng.choice((*NUMBERS, *VALUES)), rng)


def nest(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice((20, 2_000, 100_000))
    begin, end = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    return _replaced(data, rb'"[^"\\\n]*"|-?\d+(?:\.\d+)?|\w+', begin * depth + b"1" + end * depth, rng)


def _replaced(data: bytes, pattern: bytes, by: bytes, rng: random.Random) -> bytes:
    found = list(re.finditer(pattern, data))
    if not found:
        return flip(data, rng)
    chosen = rng.choice(found)
    return data[: chosen.start()] + by + data[chosen.end() :]


def forget(data: bytes, rng: random.Random) -> bytes:
    """Delete a key that does not hold the checksum, of the whole or of a line of JSON; or a line of other text."""
    lines = data.splitlines(keepends=True)
    whole = _json(data)
    at = None if whole is not None else rng.randrange(len(lines))
    found = whole if at is None else _json(lines[at])
    places = (
        [] if found is None else [p for p in _places(found) if "checksum" not in json.dumps([p[-1], _at(found, p)])]
    )
    if not places:
        return b"".join(lines[:at] + lines[at + 1 :]) if at is not None else flip(data, rng)
    *path, last = rng.choice(places)
    del _at(found, path)[last]
    text = json.dumps(found).encode()
    return text if at is None else b"".join([*lines[:at], text + b"\n", *lines[at + 1 :]])


def _json(data: bytes) -> Any:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, (dict, list)) else None


def _places(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = found if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _places(found[key], (*path, key))


def _at(found: Any, path: Any) -> Any:
    for key in path:
        found = found[key]
    return found


ANY = (flip, flip, change, insert, delete, truncate, duplicate, swap)
TEXT = (*ANY, number, value, forget, nest)


def mutate(data: bytes, form: str, times: int, rng: random.Random) -> bytes:
    """Another file than the one given."""
    if form == "gzip" and rng.random() < 0.5:
        return gzip.compress(mutate(gzip.decompress(data), "text", times, rng), mtime=0)
    if form == "header" and rng.random() < 0.5:  # that of a safetensors file: 8 bytes with its length, and JSON
        end = 8 + int.from_bytes(data[:8], "little")
        header = mutate(data[8:end], "text", times, rng)
        return len(header).to_bytes(8, "little") + header + data[end:]
    found = data
    while found == data:
        for _ in range(times):
            found = rng.choice(TEXT if form == "text" else ANY)(found or b"0", rng)
    return found


# ---------------------------------------------------------------------- kinds
@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: in the table.
        path: the file.
        read: reads it, and returns what it holds.
        form: "text", "header" (safetensors), "gzip" or "binary": what else is mutated besides bytes.
        sealed: whether it has a checksum.
        folder: what reading may change, restored after every reading.
    """

    name: str
    path: Path
    read: Callable[[], Any]
    form: str = "text"
    sealed: bool = False
    folder: Path | None = None


def plain(found: Any) -> str:
    """What was read, as text to compare."""
    if isinstance(found, Tensor):
        raw = found.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{found.dtype} {tuple(found.shape)} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(found, pd.DataFrame):
        return f"{found.dtypes.to_dict()} {found.to_dict('list')}"
    if isinstance(found, dict):
        return str({key: plain(part) for key, part in found.items()})
    if isinstance(found, (list, tuple)):
        return str([plain(part) for part in found])
    return repr(found)


def make_kinds(work: Path) -> list[Kind]:
    """One valid file of every kind, below a folder."""
    return [*_of_crosscoders(work), *_of_runs(work), *_of_tasks(work), *_of_text(work), *_of_snapshots(work)]


def _snapshots(work: Path) -> cl.Snapshots:
    return cl.Snapshots.local(pretrain_demo(work / "models", 0, config=MODEL, progress=False))


def _of_crosscoders(work: Path) -> Iterator[Kind]:
    """Saved crosscoders, imported ones, and releases."""
    drawn = torch.Generator().manual_seed(0)
    made = JumpReLUCrosscoder(JumpReLUCrosscoderConfig(d_in=12, d_sae=6, n_snapshots=3))
    for name, p in made.named_parameters():
        p.data = torch.rand(p.shape, generator=drawn) + (0.1 if name == "W_dec" else 0)
    made.cfg.metadata.snapshots = [{"label": f"s{i}", "step": i, "tokens": None} for i in range(3)]
    folder = made.save(work / "crosscoder")

    def loaded() -> Any:
        found = cl.load(folder, "cpu")
        x = torch.ones(2, found.n_snapshots, found.d_model, dtype=found.dtype)
        known = [found.cfg.snapshot_labels, found.cfg.d_sae, found.cfg.architecture(), found.dtype]
        return known, found.state_dict(), found.decode(found.encode(x))

    yield Kind("cfg.json", folder / "cfg.json", loaded, "text", sealed=True)
    yield Kind("weights", folder / "sae_weights.safetensors", loaded, "header", sealed=True)

    other = work / "imported"
    other.mkdir()
    config = {"dict_size": 5, "d_in": 4, "n_models": 2, "estimated_act_norm_list": [1.0, 2.0], "revision_list": "a-b"}
    shapes = {"W_enc": (2, 4, 5), "W_dec": (5, 2, 4), "b_enc": (5,), "b_dec": (2, 4)}
    torch.save({name: torch.rand(shape, generator=drawn) for name, shape in shapes.items()}, other / "1.pt")
    (other / "1_cfg.json").write_text(json.dumps(config))
    norms = {f"dataset_average_activation_norm.step{i}": torch.tensor(1.0 + i) for i in range(2)}
    shapes = {"W_E": (2, 4, 6), "b_E": (2, 6), "W_D": (2, 6, 4), "b_D": (2, 4)}
    weights = {name: torch.rand(shape, generator=drawn) for name, shape in shapes.items()}
    (other / "moss").mkdir()
    save_file({**weights, **norms}, other / "moss" / "sae_weights.safetensors")
    config = {"sae_type": "crosscoder", "hook_points": ["step0", "step1"], "d_model": 4, "expansion_factor": 1.5,
              "act_fn": "relu", "norm_activation": "dataset-wise"}  # fmt: skip
    (other / "moss" / "config.json").write_text(json.dumps(config))

    def imported(path: Path, layout: str) -> Callable[[], Any]:
        return lambda: import_crosscoder(path, layout).state_dict()

    yield Kind("imported cfg", other / "1_cfg.json", imported(other / "1", "crosscoding_through_time"))
    yield Kind("imported pt", other / "1.pt", imported(other / "1", "crosscoding_through_time"), "binary")
    yield Kind("imported config", other / "moss" / "config.json", imported(other / "moss", "openmoss"))
    path = other / "moss" / "sae_weights.safetensors"
    yield Kind("imported weights", path, imported(other / "moss", "openmoss"), "header")

    path = work / "releases.yaml"
    entry = {"id": "a", "path": "x/a", "l0": 3.5, "variance_explained": 0.9, "config": {"d_sae": 6}}
    where = {"repo_id": "a/b", "revisions": ["step0", "step1"], "steps": [0, 1]}
    near = {"model": "m", "folder": "here", "saes": [{"id": "b", "path": "b"}], "snapshots": {"folder": "there"}}
    far = {"model": "tiny", "repo_id": "someone/things", "revision": "v1", "snapshots": where, "saes": [entry]}
    path.write_text(yaml.safe_dump({"far": far, "near": near}))
    yield Kind("releases", path, lambda: read_registry(path))


def _of_runs(work: Path) -> Iterator[Kind]:
    """What harvesting, training and the analyses write."""
    stored = _snapshots(work)
    loaded = [stored[i].load("cpu") for i in range(len(stored))]
    snapshots = cl.Snapshots.from_models(loaded, stored.labels)  # a damaged file is harvested again from memory
    text = work / "run.txt"
    text.write_text("\n".join(grammar.documents(60, 1)))
    data = Dataset(text, n_tokens=256, context_size=16, held_out_tokens=32)
    folder = work / "cache"

    def harvested() -> Any:
        """What training and evaluation read."""
        acts = cl.Activations(snapshots, HOOK, data).cache(folder, "float32")
        with contextlib.closing(acts.batches(64)) as batches:
            return [next(batches) for _ in range(4)], list(acts.held_out()), acts.tokens

    harvested()
    for name, file in (
        ("cache manifest", "manifest.json"),
        ("cache tokens", "tokens-00000.safetensors"),
        ("cache activations", "acts-00000-s01.safetensors"),
    ):
        form = "text" if name == "cache manifest" else "header"
        yield Kind(name, folder / file, harvested, form, sealed=True, folder=folder)

    acts = cl.Activations(snapshots, HOOK, data).cache(folder, "float32")
    acts.snapshots = stored  # a run directory records where they are
    config = cl.TrainConfig(run_dir=work / "run", batch_size=32, n_checkpoints=2, evaluate=False, device="cpu")
    architecture, run = claim(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=12, k=3), config)
    assert run is not None
    sae = initialise(architecture, acts, batch_size=32, scale_tokens=64, seed=0)
    with contextlib.closing(acts.batches(32)) as batches:
        CrosscoderTrainer(config, sae, batches, acts.n_tokens, run=run).fit()
    newest = run.last_checkpoint()
    assert newest is not None

    def resumed() -> Any:
        trainer = CrosscoderTrainer(config, uninitialised(architecture), iter(()), acts.n_tokens, run=run)
        found = trainer.resume()
        return found, trainer.n_training_samples, trainer.sae.state_dict(), trainer.optimizer.state_dict()["state"]

    for name, file in (
        ("checkpoint state", "state.json"),
        ("checkpoint checksums", "checksums-00000.json"),
        ("checkpoint tensors", sorted(path.name for path in newest.glob("shard-*"))[-1]),
    ):
        form = "header" if name == "checkpoint tensors" else "text"
        yield Kind(name, newest / file, resumed, form, sealed=True, folder=run.checkpoints)

    drawn = np.random.default_rng(0)
    table = pd.DataFrame({"feature": np.arange(40) // 2, "snapshot": np.arange(40) % 2, "label": ["a", "bc"] * 20})
    table["norm"] = drawn.normal(size=40)
    run.save_table("evolution", table)
    yield Kind("table", run.path / "evolution.parquet", lambda: run.table("evolution"), "binary", sealed=True)

    known = RunDir.open(run.path).read_json()

    def recorded() -> Any:
        found = RunDir.open(run.path).read_json()
        return {key: found.get(key) for key in known}  # nothing reads what else there may be

    yield Kind("run.json", run.path / "run.json", recorded, sealed=True)

    labels = run.path / "labels.jsonl"
    answers = Answers(labels)
    for i in range(6):
        answers.add(f"{i:064x}", Reply("answered", f'{{"label": "words {i}", "complexity": 2}}', 100, 10), model="m")

    given = {f"{i:064x}": answers.get(f"{i:064x}") for i in range(6)}

    def answered() -> Any:
        """All answers; one whose whole line is missing is as if it had not been given yet, and is asked for again."""
        found = Answers(labels)
        return {key: found.get(key) or reply for key, reply in given.items()}

    yield Kind("labels.jsonl", labels, answered, sealed=True)

    counts = count_ngrams(acts.train_tokens(), snapshots.tokenizer).save(work / "ngrams.safetensors")

    def counted() -> Any:
        found = NgramCounts.load(counts)
        found.check(snapshots.tokenizer)
        return [getattr(found, field.name) for field in dataclasses.fields(found)], found.bigram_entropy

    yield Kind("n-gram counts", counts, counted, "header", sealed=True)

    large = work / "large.bin"
    large.write_bytes(bytes(hashes.SMALLEST))
    os.utime(large, (1, 1))
    time.sleep(0.1)
    hashes.remember_hash([large], "0" * 64)
    remembered = next((hashes.cache_folder() / "hashes").iterdir())
    # without a record the checksum is computed again
    yield Kind("remembered hash", remembered, lambda: hashes.remembered_hash([large]) or "0" * 64, sealed=True)


def _of_tasks(work: Path) -> Iterator[Kind]:
    """Files of minimal pairs."""
    folder = work / "tasks"
    folder.mkdir()
    pairs = [dict(row) for row in grammar.pairs(*WORDS)]
    marks = [
        {"clean_prefix": p["prefix"], "clean_answer": p["correct"], "patch_answer": p["wrong"],
         "patch_prefix": p["patch_prefix"], "n": i}
        for i, p in enumerate(pairs)
    ]  # fmt: skip
    texts = [{key: p[key] for key in ("prefix", "correct", "wrong")} for p in pairs]
    whole = [(f"{p['prefix']} {p['correct']} .", f"{p['prefix']} {p['wrong']} .") for p in pairs]
    blimp = [
        {"sentence_good": good, "sentence_bad": bad, "one_prefix_method": True, "one_prefix_prefix": p["prefix"],
         "one_prefix_word_good": p["correct"], "one_prefix_word_bad": p["wrong"], "UID": "agreement", "pairID": str(i)}
        for i, (p, (good, bad)) in enumerate(zip(pairs, whole, strict=True))
    ]  # fmt: skip

    def kind(name: str, file: str, read: Callable[[Path], cl.Task], form: str = "text") -> Kind:
        path = folder / file
        return Kind(name, path, lambda: [read(path).items, read(path).duplicates], form)

    (folder / "sva.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marks))
    yield kind("task jsonl", "sva.jsonl", cl.Task.sva)
    (folder / "local.json").write_text(json.dumps(texts))
    yield kind("task json", "local.json", cl.Task.local)
    pd.DataFrame(texts).to_csv(folder / "local.csv", index=False)
    yield kind("task csv", "local.csv", cl.Task.local)
    pd.DataFrame(texts).to_parquet(folder / "local.parquet")
    yield kind("task parquet", "local.parquet", cl.Task.local, "binary")
    (folder / "blimp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in blimp))
    yield kind("BLiMP jsonl", "blimp.jsonl", cl.Task.blimp)
    (folder / "clams.txt").write_text("".join(f"True\t{good}\nFalse\t{bad}\n" for good, bad in whole))
    yield kind("CLAMS txt", "clams.txt", cl.Task.clams)
    table = pd.DataFrame(
        [{"sen": good, "wrong_sen": bad, "language": "eng", "phenomenon": "SV-#"} for good, bad in whole]
    )
    table.to_csv(folder / "multi.tsv", sep="\t", index=False)
    yield kind("MultiBLiMP tsv", "multi.tsv", lambda path: cl.Task.multiblimp("eng", "SV-#", path))


def _of_text(work: Path) -> Iterator[Kind]:
    """Files of text to harvest."""
    folder = work / "text"
    folder.mkdir()
    tokenizer = _snapshots(work).tokenizer
    rows = pd.DataFrame({"text": list(grammar.documents(30, 2))})
    lines = "\n".join(rows["text"])
    (folder / "text.txt").write_text(lines)
    (folder / "text.txt.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    rows.to_json(folder / "text.jsonl", orient="records", lines=True)
    rows.to_csv(folder / "text.csv", index=False)
    rows.to_parquet(folder / "text.parquet")
    for file, form in (
        ("text.txt", "text"), ("text.txt.gz", "gzip"), ("text.jsonl", "text"), ("text.csv", "text"),
        ("text.parquet", "binary"),
    ):  # fmt: skip
        data = Dataset(folder / file, context_size=8)
        yield Kind(f"data {file[4:]}", folder / file, lambda data=data: token_sequences(data, tokenizer), form)


def _of_snapshots(work: Path) -> Iterator[Kind]:
    """Models in the layout of transformers."""
    root = work / "models"
    own = work / "own"
    shutil.copytree(root, own)
    demo_tokenizer().save_pretrained(own / "tokenizer")  # one for all: a damaged one is not compared with whole ones
    for file in own.glob("step*/tokenizer*"):
        file.unlink()
    (own / "step2").rename(own / "start")
    rows = [{"label": "a", "path": "start", "step": 2, "tokens": 64}, {"label": "b", "path": "step4", "step": 4}]
    (own / "snapshots.json").write_text(json.dumps({"name": "mine", "snapshots": rows}, indent=1))
    listed = own / "snapshots.json"
    yield Kind("snapshots.json", listed, lambda: list(cl.Snapshots.local(own)))

    def model() -> Any:
        """As `Activations` checks and loads it."""
        found = cl.Snapshots.local(own)
        found.check(HOOK, weights=False)
        loaded = found[0].load("cpu", n_blocks=1)
        return list(loaded.original_model.state_dict().values()), found.n_ctx, found.d_model

    yield Kind("config.json", own / "start" / "config.json", model)

    def words() -> Any:
        found = cl.Snapshots.local(own)
        found.check(HOOK, weights=False)
        tokenizer = found.tokenizer
        special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
        return (
            token_sequences(Dataset([*grammar.documents(5, 3)], context_size=8), tokenizer),
            special,
            sorted(tokenizer.get_vocab().items()),
        )

    yield Kind("tokenizer.json", own / "tokenizer" / "tokenizer.json", words)
    yield Kind("tokenizer_config.json", own / "tokenizer" / "tokenizer_config.json", words)

    def weights(folder: Path) -> Callable[[], Any]:
        snapshot = Snapshot("a", 2, 64, str(folder), None, str(own / "tokenizer"))
        return lambda: [snapshot.fingerprint, snapshot.stored_dtype]

    yield Kind("model weights", own / "start" / "model.safetensors", weights(own / "start"), "header")
    older = own / "older"
    shutil.copytree(own / "start", older)
    state = snapshots_state(older / "model.safetensors")
    (older / "model.safetensors").unlink()
    torch.save(state, older / "pytorch_model.bin")
    yield Kind("pickled weights", older / "pytorch_model.bin", weights(older), "binary")
    split = own / "split"
    shutil.copytree(own / "start", split)
    (split / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: state[name] for name in part}, split / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (split / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    yield Kind("index of weights", split / "model.safetensors.index.json", weights(split))


def snapshots_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(path).items()}


# ---------------------------------------------------------------------- one trial
class Hang(BaseException):
    """Reading takes too long."""


@contextlib.contextmanager
def within(seconds: float) -> Generator[None, None, None]:
    """Raise `Hang` after some seconds."""

    def late(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(kind: Kind) -> tuple[str, set[str], BaseException | None]:
    """What is read as text, the warnings that name the file or its folder, and the error."""
    found, error = "", None
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        try:
            with within(SECONDS):
                found = plain(kind.read())
        except KeyboardInterrupt:
            raise
        except BaseException as raised:  # Rust's panics are no `Exception`
            error = raised
    names = {kind.path.name, kind.path.parent.name}
    return found, {str(w.message) for w in caught if any(name in str(w.message) for name in names)}, error


def trial(kind: Kind, expected: str, rng: random.Random) -> tuple[str, str]:
    """Mutate the file and read it; returns the outcome, and for a fault what happened."""
    original = kind.path.read_bytes()
    kept = {} if kind.folder is None else {p: p.read_bytes() for p in kind.folder.rglob("*") if p.is_file()}
    data = mutate(original, kind.form, 1 if kind.sealed else rng.choice((1, 1, 2, 3)), rng)
    kind.path.write_bytes(data)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found, said, error = read(kind)
        repaired = not kind.path.is_file() or kind.path.read_bytes() != data
    finally:
        if kind.folder is not None:
            shutil.rmtree(kind.folder)
        for path, contents in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
        kind.path.write_bytes(original)
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak > RESIDENT:
        return "raw", "more than 1 GB of memory"
    if isinstance(error, Hang):
        return "hang", _place(error)
    if isinstance(error, cl.UserError):
        message = str(error)
        return ("told", "") if "\n" not in message and len(message) < 1500 else ("raw", f"long message: {message}")
    if error is not None:
        return "raw", _place(error)
    if said:
        return "told", ""
    if kind.sealed and (found != expected or repaired):
        return "silent", "repaired" if found == expected else "read as something else"
    return ("same" if found == expected else "other"), ""


def _place(error: BaseException) -> str:
    """The traceback, after a line that says where in the library it comes from."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "crosslens" in Path(f.filename).parts]
    lines = "".join(traceback.format_exception(error))
    return f"{type(error).__name__} at {own[-1] if own else '?'}\n{lines[-2500:]}"


# ---------------------------------------------------------------------- all of them
def limit_memory() -> None:
    """Refuse the address space beyond what this process has and `MEMORY`."""
    if (used := measure.resident("VmSize")) is not None:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def try_kinds(kinds: list[Kind], n: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the table; faults are printed once for every place."""
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for kind in kinds:
        began, counts = time.monotonic(), Counter[str]()
        expected, said, error = read(kind)
        if error is not None or said or read(kind)[0] != expected:
            raise SystemExit(f"{kind.name} is not valid to begin with: {said} {error and _place(error)}")
        for i in range(n):
            outcome, why = trial(kind, expected, random.Random(f"{seed} {kind.name} {i}"))
            counts[outcome] += 1
            place = f"{kind.name} {why.partition(chr(10))[0]}"
            if outcome in ("raw", "silent", "hang") and place not in seen:
                seen.add(place)
                print(f"\n{kind.name} {i} {outcome}: {why}", flush=True)
        rows.append({"kind": kind.name, "tried": n, **{outcome: counts[outcome] for outcome in OUTCOMES}})
        print(f"{rows[-1]} {time.monotonic() - began:.0f} s", flush=True)
    return rows


# ---------------------------------------------------------------------- cost
@contextlib.contextmanager
def timed_checksums() -> Generator[Counter[str], None, None]:
    """CPU seconds spent on checksums, by function."""
    places: list[tuple[Any, str]] = [
        (crosscoder_checksums, "tensor_checksum"), (crosscoder_checksums, "config_checksum"),
        (checkpoints, "file_checksum"), (checkpoints, "json_checksum"), (rundir, "json_checksum"), (rundir, "_seal"),
        (rundir, "file_checksum"),
        (files.ShardFile, "_verify"), (files, "digest"), (files, "json_checksum"), (cache, "digest"),
        (cache, "json_checksum"),
    ]  # fmt: skip
    seconds: Counter[str] = Counter()
    before = [getattr(owner, name) for owner, name in places]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return function(*given, **options)
            finally:
                seconds[name] += time.thread_time() - began  # type: ignore[operator]

        return call

    for (owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, timed(name, function))
    try:
        yield seconds
    finally:
        for (owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def shares(seconds: Counter[str], total: float) -> str:
    parts = ", ".join(f"{name.strip('_')} {part:.3f} s" for name, part in seconds.most_common() if part > 5e-4)
    return f"{sum(seconds.values()):.3f} of {total:.2f} CPU seconds, {sum(seconds.values()) / total:.2%} ({parts})"


def cost(work: Path, steps: int, S: int, rounds: int) -> None:
    """Print the share of checksums in training (F = 4,096, S D = 1,024, B = 1,024), and in reading an epoch."""
    D, F, B = 1024 // S, 4096, 1024
    shape = PretrainingConfig(
        n_layers=1, d_model=D, n_heads=4, d_mlp=64, batch_size=4, n_steps=S, warmup_steps=1,
        snapshot_steps=tuple(range(1, S + 1)),
    )  # fmt: skip
    snapshots = cl.Snapshots.local(pretrain_demo(work / "models", 0, config=shape, progress=False))
    tokens = torch.randint(2, 60, (2400, 48), generator=torch.Generator().manual_seed(0))

    def opened() -> cl.Activations:
        return cl.Activations(snapshots, HOOK, Dataset(tokens, n_tokens=100_000)).cache(work / "cache")

    acts = opened()
    config = cl.TrainConfig(
        run_dir=work / "run", training_tokens=steps * B, batch_size=B, n_checkpoints=8, device="cpu", evaluate=False
    )
    with timed_checksums() as seconds:
        began = time.process_time()
        cl.train(opened(), cl.BatchTopKCrosscoderTrainingConfig(d_sae=F, k=32), config)
        total = time.process_time() - began
    print(f"training, {steps} steps, 8 checkpoints, from a cache: {shares(seconds, total)}", flush=True)

    def epoch(acts: cl.Activations) -> float:
        began = time.process_time()
        with contextlib.closing(acts.batches(B, epochs=1)) as batches:
            n = sum(len(batch) for batch in batches)
        assert n > 90_000
        return time.process_time() - began

    found: dict[str, list[float]] = {"first": [], "second": [], "first, unchecked": []}
    verified: Counter[str] = Counter()
    for i in range(rounds + 1):
        acts = opened()
        with timed_checksums() as seconds:
            first, second = epoch(acts), epoch(acts)
        unchecked = opened()
        for pair in [(shard, s) for shard in range(unchecked.store.n_shards) for s in range(S)]:
            file = unchecked.store._open(pair)
            file.verified[:], file.n_unknown = True, 0
        third = epoch(unchecked)
        if i:  # the first round warms up
            verified += seconds
            for name, value in zip(found, (first, second, third), strict=True):
                found[name].append(value)
    print(f"an epoch read for the first time: {shares(verified, sum(found['first']))}")
    medians = {name: float(np.median(values)) for name, values in found.items()}
    print(", ".join(f"{name} {value:.3f} s" for name, value in medians.items()), f"(medians of {rounds} rounds)")
    print(f"the first epoch takes {medians['first'] / medians['first, unchecked'] - 1:+.1%} longer than unchecked")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="mutations of every kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="names of kinds, separated by commas; default: all")
    parser.add_argument("--report", action="store_true", help="write a dated file under benchmarks/reports")
    parser.add_argument("--cost", action="store_true", help="measure what checksums cost, and nothing else")
    parser.add_argument("--steps", type=int, default=300, help="training steps for --cost")
    parser.add_argument("--snapshots", type=int, default=2, help="S for --cost; D is 1,024 / S")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cost:
        with tempfile.TemporaryDirectory() as temporary:
            cost(Path(temporary), arguments.steps, arguments.snapshots, 5)
        return
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["CROSSLENS_CACHE"] = str(Path(temporary) / "user")
        kinds = make_kinds(Path(temporary))
        if arguments.kinds:
            names = arguments.kinds.split(",")
            if unknown := set(names) - {kind.name for kind in kinds}:
                raise SystemExit(f"unknown kinds {unknown}: there are {', '.join(kind.name for kind in kinds)}")
            kinds = [kind for kind in kinds if kind.name in names]
        limit_memory()
        gc.collect()
        gc.freeze()  # the library collects garbage after every harvest, and what is here so far stays
        rows = try_kinds(kinds, arguments.n, arguments.seed)
        gc.unfreeze()
    rows.append({"kind": "all", **{name: sum(row[name] for row in rows) for name in ("tried", *OUTCOMES)}})
    columns: dict[str, Callable[[Any], str]] = {
        name: (lambda row, name=name: str(row[name])) for name in ("kind", "tried", *OUTCOMES)
    }
    body = f"Seed {arguments.seed}, {arguments.n} mutations of each of {len(rows) - 1} kinds.\n\n"
    body += measure.markdown(rows, columns)
    print(body)
    if arguments.report:
        print(measure.write_report("mutations", "Mutated files", body, "cpu", 1, PACKAGES))


if __name__ == "__main__":
    main()
