"""The hub when it works, when it fails, and when it is given back what was fetched: a server on 127.0.0.1.

What needs a Hugging Face home and an endpoint of its own runs in a second process: this file as a program.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import time
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
from crosslens.snapshots import hub
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.families import pattern_model
from tests.hub_server import commit_of, revision_folder, run_program, serve
from tests.snapshots.test_family_models import write_tokenizer

REPO = "EleutherAI/pythia-14m"
STEPS = ("step0", "step1000", "step3000")
TOKENS = torch.randint(2, 18, (40, 8), generator=torch.Generator().manual_seed(0))


# repositories by the fault of their weights: one that passes, and one that does not
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
    """What the server serves: three steps of a tiny model, main, which is the last of them, and copies that fail."""
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
    last = revision_folder(folder, REPO, STEPS[-1])
    for repo in (REPO, *(f"passing/{name}" for name in PASSING), *(f"lasting/{name}" for name in LASTING)):
        shutil.copytree(last, revision_folder(folder, repo, "main"))
    return folder


def in_process(origin: Path, home: Path, mode: str) -> list[str]:
    """Run a part of this file against a server that fails as its repositories say; what it was asked for."""
    home.mkdir()
    with serve(origin, fault) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = run_program([__file__, mode], home, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == "fine", done.stdout
    return [line for line in asked if line.startswith("GET") and line.endswith("model.safetensors")]


@pytest.mark.slow
def test_what_passes_is_tried_again_and_what_lasts_is_one_clear_line(origin: Path, tmp_path: Path) -> None:
    asked = in_process(origin, tmp_path / "home", "faults")
    for name in PASSING:
        assert sum(f"/passing/{name}/" in line for line in asked) > (name != "head")
    kept = [path.parts for path in (tmp_path / "home").rglob("model.safetensors")]
    assert len(kept) == len(PASSING) and not any("lasting" in part for parts in kept for part in parts)


@pytest.mark.slow
def test_downloads_are_given_back_and_only_ours(origin: Path, tmp_path: Path) -> None:
    asked = in_process(origin, tmp_path / "home", "evict")
    assert len(asked) == 3  # every file once; nothing is fetched again when the cache is read


@pytest.mark.slow
def test_revisions_are_resolved_against_the_hubs_own_list(origin: Path, tmp_path: Path) -> None:
    in_process(origin, tmp_path / "home", "resolve")


@pytest.mark.slow
def test_a_hub_out_of_reach_leaves_the_revisions_in_the_cache(tmp_path: Path) -> None:
    for revision in STEPS:
        revision_folder(tmp_path / "hub", REPO, revision)
    with socket.create_server(("127.0.0.1", 0)) as server:  # a port that nobody else answers at
        closed = f"http://127.0.0.1:{server.getsockname()[1]}"
    for environment in ({"HF_ENDPOINT": closed, "HF_HUB_OFFLINE": "0"}, {"HF_HUB_OFFLINE": "1"}):
        done = run_program([__file__, "unreachable"], tmp_path, **environment)
        assert done.stdout.strip() == "fine", done.stdout + done.stderr


@pytest.mark.parametrize("error", [json.JSONDecodeError("no JSON", "<html>", 0), ConnectionResetError("cut")])
def test_a_list_that_does_not_come_is_no_error_and_a_wrong_program_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing: Exception = error

    def fail(_: str) -> None:
        raise failing

    monkeypatch.setattr(huggingface_hub, "list_repo_refs", fail)
    assert hub.list_revisions.__wrapped__("nobody/nothing") == ()
    failing = AttributeError("a mistake of ours")
    with pytest.raises(AttributeError, match="a mistake of ours"):
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
def test_the_nearest_revisions(revision: str, expected: list[str]) -> None:
    listed = ["main", "step0", "step1000", "step3000"]
    if revision.startswith("stage"):
        listed = ["stage2-ingredient1-step900", "stage1-step1000-tokens3B", "main"]
        assert hub.nearest_revisions(revision, listed)[0] in listed
        return
    assert hub.nearest_revisions(revision, listed)[: len(expected)] == expected


def weights(home: Path, revision: str) -> Path:
    base = home / "hub" / f"models--{REPO.replace('/', '--')}"
    return base / "snapshots" / commit_of(revision) / "model.safetensors"


def check_faults() -> None:
    hub.PAUSES = (0.01, 0.02)
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.05))  # those of the hub's client, a minute in all
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
            assert "\n" not in message and "model.safetensors could not be fetched in 3 attempts (" in message, message
            assert f"lasting/{name}@" in message and "run the same command again" in message, message
        else:
            raise AssertionError(f"{name}: a hub that fails for good was not noticed")
        assert not snaps[0].is_on_disk()


def check_evict() -> None:
    home = Path.cwd()
    # main has the weights of step3000, and the cache holds them once
    by_the_user = [
        Path(hub.huggingface_hub.hf_hub_download(REPO, "model.safetensors", revision=revision))
        for revision in ("step0", "main")
    ]
    snaps = Snapshots.pythia("14m", [0, 1000, 3000])
    acts = Activations(snaps, "blocks.0.hook_resid_post", Dataset(TOKENS, 150, held_out_tokens=20, prepend_bos=False))
    plan = acts.plan()
    assert plan.n_downloads == 2 and plan.seconds > 0
    cached = acts.cache("cache", "float32", evict=True)
    first = next(cached.batches(50))
    assert all(path.is_file() for path in by_the_user)
    assert not weights(home, "step1000").exists() and not weights(home, "step3000").exists()
    blobs = list((home / "hub").rglob("blobs/*"))
    assert sum(blob.stat().st_size > 10_000 for blob in blobs) == 2, blobs
    # the cache is opened and read without them
    hub.hub_folder.cache_clear()
    again = Activations(
        Snapshots.pythia("14m", [0, 1000, 3000]), "blocks.0.hook_resid_post", acts.dataset,
    ).cache("cache", "float32")  # fmt: skip
    assert torch.equal(next(again.batches(50)), first)
    assert again.metadata() == acts.metadata()


def check_resolve() -> None:
    model = pattern_model(REPO, "step{step}", 10)
    snaps = Snapshots.from_model(model)
    assert snaps.labels == list(STEPS) and snaps.tokens == [0, 10_000, 30_000]
    assert Snapshots.from_model(model, "linear:2").labels == ["step0", "step3000"]
    refused(lambda: Snapshots.from_model(model, [2000]), "no checkpoint at step 2000: the nearest are 1000 and 3000")
    wrong = Snapshots.from_hub(REPO, ["step2000"])
    refused(wrong.check, f"{REPO} has no revision 'step2000': the nearest are step1000 and step3000")
    snaps = Snapshots.from_hub(REPO, ["step3000", "main"])
    refused(snaps.check, "'step3000' and 'main' have equal weights")


def check_unreachable() -> None:
    assert hub.list_revisions(REPO) == STEPS
    assert hub.list_revisions("nobody/nothing") == hub.list_revisions("no//name") == ()


def refused(attempt: Any, message: str) -> None:
    try:
        attempt()
    except UserError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"nothing was refused: {message}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"faults": check_faults, "evict": check_evict, "resolve": check_resolve, "unreachable": check_unreachable}[
        sys.argv[1]
    ]()
    sys.stdout.write("fine\n")
