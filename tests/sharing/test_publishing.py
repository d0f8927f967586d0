"""Publishing to a small hub on 127.0.0.1: uploads, model cards and refusals."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from crosslens.errors import UserError
from crosslens.rundir import RunDir
from crosslens.sharing.cards import evolution_picture, make_card, without_paths
from crosslens.sharing.publishing import push_to_hub
from tests.given import of_norms
from tests.upload_server import Hub, Repository, serve

PROGRAM = """
import json, os, sys
import crosslens as cl
import sae_lens

for line in sys.stdin:
    token, steps = json.loads(line)
    os.environ["HF_TOKEN"] = token
    answers = []
    for name, *arguments in steps:
        options = arguments.pop() if arguments and isinstance(arguments[-1], dict) else {}
        load = {"saelens": sae_lens.SAE.from_pretrained, "from_pretrained": cl.from_pretrained}.get(name)
        try:
            if load is None:
                answers.append(str(cl.push_to_hub(*arguments, **options)))
            else:
                found = load(*arguments, **options)
                answers.append([type(found).__name__, found.decoder_norms.double().sum().item()])
        except cl.UserError as error:
            answers.append(f"UserError: {error}")
    print(json.dumps(answers), flush=True)
"""
Ask = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def ask(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Run steps under a token, in one other process: huggingface_hub reads HF_ENDPOINT when it is imported."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    with (home / "stderr").open("w") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
        )

    def run(token: str, *steps: list[Any]) -> list[Any]:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps([token, steps]) + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
        assert line, (home / "stderr").read_text()[-3000:]
        return json.loads(line)

    yield run
    child.communicate()  # closes its standard input, which ends it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A crosscoder of 6 features and 3 snapshots of width 4, saved."""
    crosscoder = of_norms(torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + 0.1)
    crosscoder.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    crosscoder.cfg.metadata.model_name = "tiny"
    crosscoder.cfg.metadata.snapshots = [{"label": f"step{s}", "step": s, "tokens": 7 * s} for s in (0, 10, 2000)]
    return crosscoder.save(tmp_path_factory.mktemp("published") / "crosscoder")


@pytest.mark.slow
def test_published_and_loaded_again_by_name_and_by_revision(hub: Hub, ask: Ask, folder: Path, tmp_path: Path) -> None:
    [first] = ask("writer", ["push", str(folder), "someone/things", {"private": True}])
    assert first.startswith("someone/things, id blocks.1.hook_resid_post: published at http://127.0.0.1")
    repository = hub.repositories["someone/things"]
    assert repository.private
    [pinned] = repository.commits
    names = ("cfg.json", "evolution.svg", "sae_weights.safetensors")
    wanted = {"README.md", *(f"blocks.1.hook_resid_post/{name}" for name in names)}
    assert repository.commits[pinned].keys() == wanted

    # another crosscoder in the same repository: the existing card stays
    second = of_norms(torch.ones(6, 3))
    second.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    second.save(tmp_path / "second")
    answers = ask(
        "writer",
        ["push", str(tmp_path / "second"), "someone/things"],
        ["from_pretrained", "someone/things", "blocks.1.hook_resid_post"],
        ["from_pretrained", "someone/things", "blocks.1.hook_resid_post", {"revision": pinned}],
        ["saelens", "someone/things", "blocks.1.hook_resid_post"],
        ["from_pretrained", "someone/things", "blocks.1.hook_resid_post", {"revision": "v9"}],
        ["from_pretrained", "someone/things", "blocks.2.hook_resid_post"],
        ["from_pretrained", "someone/others", "blocks.1.hook_resid_post"],
    )
    norms = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + 0.1
    assert answers[1][0] == "StandardCrosscoder" and answers[1][1] == pytest.approx(18.0, abs=1e-4)
    assert answers[2][1] == pytest.approx(float(norms.sum()), abs=1e-4)
    assert answers[3] == answers[1]
    assert answers[4] == "UserError: someone/things has no revision 'v9': see its branches and tags on the hub"
    assert answers[5].startswith("UserError: someone/things lacks a file") and "check the id" in answers[5]
    assert answers[6].startswith("UserError: there is no someone/others on the hub")
    last = repository.at("main")
    assert last is not None and last[1]["README.md"] == repository.commits[pinned]["README.md"]
    card = last[1]["blocks.1.hook_resid_post/README.md"].decode()
    assert "](evolution.svg)" in card


@pytest.mark.slow
def test_refusals_change_nothing_and_show_no_token(hub: Hub, ask: Ask, folder: Path) -> None:
    hub.repositories = {"someone/public": Repository()}
    push = ["push", str(folder), "someone/new"]
    [reader] = ask("reader", push)
    assert reader == (
        "UserError: the token has no permission to write to someone/new: use one that has it, or a "
        "repository of your own"
    )
    expired, unread = ask("hf_expired0123456789", push, ["from_pretrained", "someone/public", "x"])
    assert expired == ("UserError: the hub does not accept the token, which may have expired: run `hf auth login`")
    assert "does not accept the token" in unread and "hf_expired" not in expired + unread
    [public] = ask("writer", ["push", str(folder), "someone/public", {"private": True}])
    assert (
        public == "UserError: someone/public exists and is public: make it private on the hub, or choose another name"
    )
    assert hub.repositories.keys() == {"someone/public"} and not hub.repositories["someone/public"].commits
    [none] = ask("", push)
    assert none.startswith("UserError: ") and "hf auth login" in none


@pytest.mark.exhaustive
def test_a_failed_upload_leaves_no_commit(hub: Hub, ask: Ask, folder: Path) -> None:
    hub.repositories, hub.broken = {}, {"someone/refused": "refuse", "someone/cut": "cut"}
    before: dict[str, str] = {}
    for name in (*hub.broken, "someone/whole"):
        hub.repositories[name] = Repository()
        before[name] = hub.repositories[name].commit({"README.md": b"kept"})
    refused, cut, whole = ask("writer", *(["push", str(folder), name] for name in before))
    for told in (refused, cut):
        assert told.startswith("UserError: the upload to someone/") and told.endswith("try again")
        assert "\n" not in told and "nothing was committed" in told
    assert "published at" in whole
    commits = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    assert [len(made) for made in commits.values()] == [1, 1, 2]
    assert all(before[name] in made for name, made in commits.items())


def test_a_dry_run_contacts_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    plan = push_to_hub(folder, "someone/things", dry_run=True, licence="mit")
    assert plan.url is None and "nothing was sent" in str(plan)
    names = ["cfg.json", "sae_weights.safetensors", "evolution.svg"]
    assert list(plan.files) == [*(f"blocks.1.hook_resid_post/{name}" for name in names), "README.md"]
    assert plan.files["README.md"] == len(plan.card.encode())
    assert 'cl.from_pretrained("someone/things", "blocks.1.hook_resid_post")' in plan.card
    assert "\nlicense: mit\n" in plan.card


@pytest.mark.parametrize("name", ["things", "some one/things", "a/b/c", "../things", "https://hub/x"])
def test_invalid_names_are_refused_first(name: str) -> None:
    with pytest.raises(UserError, match="is not a repository name"):
        push_to_hub("nowhere", name, dry_run=True)


def test_a_card_of_a_run_has_its_figures(folder: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.write_json(
        {
            "command": ["crosslens", "train", "/home/somebody/data.txt"],
            "identity": {"n_tokens": 1234, "training": {"seed": 5, "lr": 0.01}},
            "versions": {"crosslens": "0.1.0"},
            "source": {"dataset": "/home/somebody/data.txt"},
        }
    )
    folder.rename(run_dir.crosscoder)
    try:
        table = pd.DataFrame({"explained_variance": [0.5, 0.75, 0.9], "l0": [3.0, 4.0, 5.25], "kl": [0.1, 0.2, None]})
        run_dir.save_table("evaluation", table)
        card = push_to_hub(run_dir.path, "someone/things", dry_run=True).card
    finally:
        run_dir.crosscoder.rename(folder)
    assert "| snapshot | step | tokens | explained variance | L0 | KL |" in card
    assert "| step2000 | 2,000 | 14,000 | 0.900 | 5.2 |  |" in card
    assert "- tokens per epoch: 1234\n- seed: 5\n- lr: 0.01\n- version of crosslens: 0.1.0" in card
    assert "somebody" not in card and "data.txt" not in card


def test_no_path_and_no_token_is_published() -> None:
    crosscoder = of_norms(torch.ones(4, 2))
    metadata = crosscoder.cfg.metadata
    metadata.model_name = "/home/somebody/models/my-model"
    metadata.dataset_path = r"C:\Users\somebody\text.txt"
    metadata.hook_name = "blocks.1.hook_resid_post"
    metadata.note = "see /scratch/somebody/notes.txt, file:///srv/somebody/a and https://example.org/a/b?c=d"
    metadata.snapshots = [
        {"label": "~/runs/somebody/step0", "step": 0},
        {"label": "EleutherAI/pythia@step1", "step": 1},
    ]
    plan = push_to_hub(crosscoder, "someone/things", dry_run=True)
    assert "somebody" not in plan.card and "my-model" in plan.card and "| step0 | 0 |" in plan.card
    cleaned = without_paths(crosscoder.cfg.to_dict()["metadata"])
    assert "somebody" not in json.dumps(cleaned)
    assert cleaned["note"] == "see notes.txt, a and https://example.org/a/b?c=d"
    assert cleaned["snapshots"][1]["label"] == "EleutherAI/pythia@step1"
    assert metadata.model_name.startswith("/home")  # the crosscoder itself is as it was

    for name, secret in (("note", "hf_" + "a" * 34), ("other", {"deep": ["sk-" + "b" * 40]})):
        setattr(metadata, name, secret)
        with pytest.raises(UserError, match=r"a likely token \(") as caught:
            push_to_hub(crosscoder, "someone/things", dry_run=True)
        assert "aaaa" not in str(caught.value) and "bbbb" not in str(caught.value)
        setattr(metadata, name, None)
    metadata.note = f"x{Path.home()}"
    with pytest.raises(UserError, match="home folder"):
        push_to_hub(crosscoder, "someone/things", dry_run=True)


def test_names_in_a_card_are_text() -> None:
    crosscoder = of_norms(torch.ones(4, 2))
    hostile = "<img src=x onerror=alert(1)> | [a](javascript:b)\n# `zq`"
    crosscoder.cfg.metadata.model_name = hostile
    crosscoder.cfg.metadata.snapshots = [{"label": hostile, "step": 0}, {"label": "b", "step": 1}]
    card = make_card(crosscoder, "someone/things", "x", licence=hostile)
    body = card.split("---\n", 2)[2]
    assert "<img" not in re.sub(r"\\.", "", body)
    assert [line for line in body.splitlines() if re.match("#+ .*c", line)][0].startswith("# x: a crosscoder over 2")
    assert not re.search(r"(?<!\\)`zq", body)
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [4, 4, 4]
    picture = evolution_picture(crosscoder.decoder_norms, ["<script>alert(1)</script>", "b"])
    assert "<script" not in picture and "&lt;script" in picture


def test_the_picture_shows_relative_norms_in_the_order_of_their_peaks() -> None:
    norms = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.5, 5.0, 0.5]])
    picture = evolution_picture(norms, ["a", "b", "c"])
    colours = re.findall(r'<rect x="(\d+)" y="(\d+)" .*?fill="(#\w+)"/>', picture)
    low, high = "#eef1f4", "#073763"
    cells = [colour for _, _, colour in sorted(colours, key=lambda c: (int(c[1]), int(c[0])))]
    assert len(cells) == 9  # the feature without a decoder is left out
    assert cells[0] == high and cells[2] == low  # peaks first
    assert cells[4] == high and cells[8] == high
    assert cells[1] == cells[7] == "#6ea8d2"  # a half
    assert "3 features" in picture
