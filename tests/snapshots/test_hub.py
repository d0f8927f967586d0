"""Downloads from a hub that works or fails, and eviction, against a server on 127.0.0.1.

What needs its own Hugging Face home and endpoint is this file run as a program, because the Hugging Face libraries read
their environment when they are imported.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.errors import UserError
from crosslens.snapshots import hub, snapshot
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.families import pattern_model
from crosslens.snapshots.snapshot import Snapshot
from tests.hub_server import commit_of, revision_folder, run_program, serve
from tests.snapshots.test_collection import PYTHIA, check_online, write_hub, write_tokenizer

REPO = "EleutherAI/pythia-31m"
STEPS = ("step0", "step1000", "step3000")
RUN = "some/run"
TOKENS = torch.randint(2, 18, (40, 8), generator=torch.Generator().manual_seed(0))


# repositories named after the fault of their weights, temporary or permanent
PASSING: dict[str, Callable[[str, int], str | None]] = {
    "drop": lambda method, n: "drop" if method == "GET" and n < 2 else None,
    "429": lambda method, n: "429" if method == "GET" and n < 2 else None,
    "503": lambda method, n: "503" if method == "GET" and n < 2 else None,
    "short": lambda method, n: "short" if method == "GET" and n < 1 else None,
    "head": lambda method, n: "500" if method == "HEAD" and n < 2 else None,
}
LASTING = ("cut", "429", "503", "short")


def fault(method: str, repo: str, file: str, n: int) -> str | None:
    owner, name = repo.split("/")
    if file != "model.safetensors" or owner not in ("passing", "lasting"):
        return None
    return PASSING[name](method, n) if owner == "passing" else name if method == "GET" else None


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server serves: three steps of a tiny model, main (equal to the last step), and copies that fail."""
    folder = tmp_path_factory.mktemp("origin")
    config = GPTNeoXConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    with torch.random.fork_rng():
        for seed, revision in enumerate(STEPS):
            torch.manual_seed(seed)
            place = revision_folder(folder, REPO, revision)
            GPTNeoXForCausalLM(config).save_pretrained(place)
            write_tokenizer(place)
        for seed in range(4):
            torch.manual_seed(10 + seed)
            place = revision_folder(folder, RUN, f"s{seed}")
            GPTNeoXForCausalLM(config).save_pretrained(place)
            write_tokenizer(place)
    for copy in ("again", "unseen"):
        shutil.copytree(revision_folder(folder, RUN, "s1"), revision_folder(folder, RUN, copy))
    last = revision_folder(folder, REPO, STEPS[-1])
    for repo in (REPO, *(f"passing/{name}" for name in PASSING), *(f"lasting/{name}" for name in LASTING)):
        shutil.copytree(last, revision_folder(folder, repo, "main"))
    write_hub(folder)
    return folder


@pytest.mark.exhaustive
def test_a_hub_that_fails_eviction_and_revisions(origin: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with serve(origin, fault) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = run_program([__file__], home, **environment)
    assert done.stdout.split() == ["faults", "evict", "one_at_a_time", "resolve", "online"], done.stdout + done.stderr
    everything = [line for line in asked if line.startswith("GET")]
    asked = [line for line in everything if line.endswith("model.safetensors")]
    for name in PASSING:
        assert sum(f"/passing/{name}/" in line for line in asked) > (name != "head")
    kept = [path.parts for path in home.rglob("model.safetensors")]
    assert not any("lasting" in part for parts in kept for part in parts)
    # step3000 has the weights of main; after the eviction nothing is downloaded to read the cache
    ours = Counter(line.split("/resolve/")[1].split("/")[0] for line in asked if REPO in line)
    assert ours == {"step0": 1, "main": 1, commit_of("step1000"): 1}
    own = Counter(line.split("/resolve/")[1].split("/")[0] for line in asked if f"/{RUN}/" in line)
    # "again" never, and s1 twice, because it was evicted
    assert own == {commit_of(name): 1 + (name == "s1") for name in ("s0", "s1", "s2", "s3", "unseen")}
    commit = commit_of("step1000")
    assert asked.count(f"GET /{PYTHIA}/resolve/{commit}/model.safetensors") == 1
    assert not any("pytorch_model" in line and commit in line for line in everything)


HOSTILE = """
from crosslens.errors import UserError
from crosslens.sharing.repositories import fetch
from crosslens.snapshots import hub

try:
    {call}
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "call", ["hub.hub_folder('some/model', 'main')", "fetch('some/model', 'config.json')"], ids=["snapshots", "sharing"]
)
def test_a_hub_whose_checksums_are_paths_is_refused(tmp_path: Path, call: str) -> None:
    """The client writes a file of that name."""
    folder = revision_folder(tmp_path / "hub", "some/model", "main")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    home = tmp_path / "home"
    home.mkdir()
    with serve(tmp_path / "hub", lambda *_: "etag ../../../../../escaped") as (address, _):
        done = run_program(
            ["-c", HOSTILE.format(call=call)], home, HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1"
        )
    assert "gives '../../../../../escaped' as the checksum of config.json, which is none" in done.stdout, done
    assert not [*tmp_path.rglob("escaped*")]


OUT_OF_REACH = f"""
import huggingface_hub
from crosslens.snapshots import hub

assert hub.list_revisions({REPO!r}) == {STEPS!r}
assert hub.list_revisions("nobody/nothing") == hub.list_revisions("no//name") == ()
if not huggingface_hub.constants.HF_HUB_OFFLINE:
    try:
        huggingface_hub.list_repo_refs({REPO!r})
    except hub.HTTP_ERROR:
        print("a failed connection raises HTTP_ERROR")
"""


def test_a_hub_out_of_reach_leaves_the_revisions_in_the_cache(tmp_path: Path) -> None:
    for revision in STEPS:
        revision_folder(tmp_path / "hub", REPO, revision)
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port on which nothing listens afterwards
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    done = run_program(["-c", OUT_OF_REACH], tmp_path, HF_ENDPOINT=closed, HF_HUB_OFFLINE="0")
    assert done.stdout == "a failed connection raises HTTP_ERROR\n", done.stdout + done.stderr
    done = run_program(["-c", OUT_OF_REACH], tmp_path, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("error", [json.JSONDecodeError("no JSON", "<html>", 0), ConnectionResetError("cut")])
def test_a_list_that_cannot_be_downloaded_is_no_error_but_a_bug_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing: Exception = error

    def fail(_: str) -> None:
        raise failing

    monkeypatch.setattr(huggingface_hub, "list_repo_refs", fail)
    assert hub.list_revisions.__wrapped__("nobody/nothing") == ()
    failing = AttributeError("a bug")
    with pytest.raises(AttributeError, match="a bug"):
        hub.list_revisions.__wrapped__("nobody/nothing")


@pytest.mark.parametrize(
    ("revision", "expected"),
    [
        ("step2000", ["step1000", "step3000"]),
        ("step3001", ["step3000", "step1000"]),
        ("stage1-step900", ["stage1-step1000-tokens3B"]),
        ("mian", ["main"]),
    ],
)
def test_the_nearest_names(revision: str, expected: list[str]) -> None:
    listed = ["main", "step0", "step1000", "step3000"]
    if revision.startswith("stage"):
        listed = ["stage2-ingredient1-step900", "stage1-step1000-tokens3B", "main"]
        assert hub.nearest_names(revision, listed)[0] in listed
        return
    assert hub.nearest_names(revision, listed)[: len(expected)] == expected


def weights(home: Path, revision: str) -> Path:
    base = home / "hub" / f"models--{REPO.replace('/', '--')}"
    return base / "snapshots" / commit_of(revision) / "model.safetensors"


def check_faults() -> None:
    hub.PAUSES = (0.01, 0.02)
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.05))  # the hub's client would wait for a minute in all
    for name in PASSING:
        snaps = Snapshots.from_hub(f"passing/{name}", ["main"])
        assert not snaps[0].is_on_disk()
        snaps.check("blocks.0.hook_resid_post")
        assert snaps[0].is_on_disk()
    for name in LASTING:
        snaps = Snapshots.from_hub(f"lasting/{name}", ["main"])
        try:
            snaps.check("blocks.0.hook_resid_post")
        except UserError as error:
            message = str(error)
            assert "\n" not in message and "model.safetensors could not be downloaded in 3 attempts (" in message, (
                message
            )
            assert f"lasting/{name}@" in message and "run the same command again" in message, message
        else:
            raise AssertionError(f"{name}: a permanent failure was not reported")
        assert not snaps[0].is_on_disk()


def check_evict() -> None:
    home = Path.cwd()
    # main has the weights of step3000, and the cache holds them once
    by_the_user = [
        Path(hub.huggingface_hub.hf_hub_download(REPO, "model.safetensors", revision=revision))
        for revision in ("step0", "main")
    ]
    snaps = Snapshots.pythia("31m", [0, 1000, 3000])
    acts = Activations(snaps, "blocks.0.hook_resid_post", Dataset(TOKENS, 150, held_out_tokens=20, prepend_bos=False))
    plan = acts.plan()
    assert plan.n_downloads == 2 and plan.seconds > 0
    cached = acts.cache("cache", "float32", evict=True)
    first = next(cached.batches(50))
    assert all(path.is_file() for path in by_the_user)
    assert not weights(home, "step1000").exists() and not weights(home, "step3000").exists()
    blobs = list((home / "hub" / f"models--{REPO.replace('/', '--')}" / "blobs").iterdir())
    assert sum(blob.stat().st_size > 10_000 for blob in blobs) == 2, blobs
    # the cache is opened and read without the weights
    hub.hub_folder.cache_clear()
    again = Activations(
        Snapshots.pythia("31m", [0, 1000, 3000]), "blocks.0.hook_resid_post", acts.dataset,
    ).cache("cache", "float32")  # fmt: skip
    assert torch.equal(next(again.batches(50)), first)
    assert again.metadata() == acts.metadata()


def check_one_at_a_time() -> None:
    blobs = Path.cwd() / "hub" / f"models--{RUN.replace('/', '--')}" / "blobs"
    there: list[int] = []

    def of_run(*revisions: str) -> Activations:
        data = Dataset(TOKENS, 150, held_out_tokens=20, prepend_bos=False)
        return Activations(Snapshots.from_hub(RUN, revisions), "blocks.0.hook_resid_post", data)

    def on_disk() -> int:
        return sum(blob.stat().st_size > 10_000 for blob in blobs.iterdir())

    def loading(*args: Any, **options: Any) -> Any:
        there.append(on_disk())
        return load(*args, **options)

    load, Snapshot.load = Snapshot.load, loading
    acts = of_run("s0", "s1", "s2", "s3")
    acts.cache("one", "float32", evict=True)
    assert there == [1, 1, 1, 1] and on_disk() == 0
    assert len(set(acts.snapshots.fingerprints)) == 4 and on_disk() == 0  # recorded
    # the hub's checksums say that two are equal, before anything is downloaded
    refused(lambda: of_run("s1", "again").cache("two"), "'s1' and 'again' have equal weights")
    refused(lambda: of_run("again", "s0", "s1").cache("second"), "'again' and 's1' have equal weights")
    assert len(there) == 4 and on_disk() == 0 and not list(Path("two").glob("acts-*"))
    # a hub without checksums: as soon as the second is there
    snapshot.weight_etags = lambda *_: None
    refused(lambda: of_run("s1", "unseen").cache("three", evict=True), "'s1' and 'unseen' have equal weights")
    assert len(there) == 5 and on_disk() == 1
    assert {path.stem[-3:] for path in Path("three").glob("acts-*")} == {"s00"}
    snapshot.weight_etags = hub.weight_etags
    Snapshot.load = load


def check_resolve() -> None:
    model = pattern_model(f"{REPO}@step{{step}}", 10)
    snaps = Snapshots.from_model(model)
    assert snaps.labels == list(STEPS) and snaps.tokens == [0, 10_000, 30_000]
    assert Snapshots.from_model(model, "linear:2").labels == ["step0", "step3000"]
    refused(lambda: Snapshots.from_model(model, [2000]), "no snapshot at step 2000: the nearest are 1000 and 3000")
    wrong = Snapshots.from_hub(REPO, ["step2000"])
    refused(wrong.check, f"{REPO} has no revision 'step2000': the nearest are step1000 and step3000")
    snaps = Snapshots.from_hub(REPO, ["step3000", "main"])
    refused(snaps.check, "'step3000' and 'main' have equal weights")


def refused(attempt: Any, message: str) -> None:
    try:
        attempt()
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was refused: {message}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for check in (check_faults, check_evict, check_one_at_a_time, check_resolve, check_online):
        check()
        sys.stdout.write(f"{check.__name__.removeprefix('check_')}\n")
