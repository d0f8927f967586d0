"""Releases by name: the package's own, users' files, and a one-line error for every mistake in a registry."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformer_lens.model_bridge import TransformerBridge

import crosslens
from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.cli.app import main
from crosslens.errors import UserError
from crosslens.sharing import registry
from crosslens.sharing.pretrained import from_pretrained
from crosslens.sharing.registry import (
    EMBEDDED,
    find_release,
    list_releases,
    load_snapshots,
    read_registry,
    register_release,
)
from crosslens.snapshots.checks import check_snapshots
from crosslens.synthetic import grammar
from crosslens.training.evaluation import evaluate
from tests.given import of_norms

DEMO, HOOK = "crosslens-demo", "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    monkeypatch.delenv(registry.VARIABLE, raising=False)


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "path": "somewhere/a", **changes}


def release(**changes: Any) -> dict[str, Any]:
    made = {"model": "tiny", "folder": "mine", "saes": [entry()], **changes}
    return {key: value for key, value in made.items() if value is not None}


def write(path: Path, releases: Any) -> Path:
    path.write_text(yaml.safe_dump(releases), encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A crosscoder with 5 features and 2 snapshots in `mine/somewhere/a`."""
    return of_norms(torch.rand(5, 2) + 0.1).save(tmp_path / "mine" / "somewhere" / "a")


# ---------------------------------------------------------------------- the embedded release


def test_the_embedded_release_fits_its_snapshots_and_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    crosscoder, snapshots = from_pretrained(DEMO, HOOK), load_snapshots(DEMO)
    check_snapshots(crosscoder, snapshots)  # by the fingerprints of the weights
    assert snapshots.labels == crosscoder.cfg.snapshot_labels and len(snapshots) == 9
    every = load_snapshots(DEMO, every=True)
    assert every.steps[:5] == [0, 8, 16, 24, 32] and every.labels[5:] == snapshots.labels
    assert crosscoder.dtype == torch.float32 and not crosscoder.training
    assert crosscoder.cfg.metadata.l0 == find_release(DEMO).entry(HOOK).l0
    assert sum(path.stat().st_size for path in EMBEDDED.parent.glob("releases/**/*")) < 8 * 2**20
    recorded = (EMBEDDED.parent / "releases" / "demo" / HOOK / "cfg.json").read_text()
    assert "/" not in recorded.replace(f"crosslens.synthetic.grammar, {8000} documents", "")


def test_a_bridge_booted_from_an_embedded_folder_reads_the_same_tokens() -> None:
    """A folder without a tokenizer gives it that of another GPT-NeoX, and a loss that means nothing."""
    every = load_snapshots(DEMO, every=True)
    assert {snapshot.tokenizer_folder for snapshot in every} == {snapshot.name for snapshot in every}
    bridge, loaded = TransformerBridge.boot_transformers(every[-1].name, device="cpu"), every[-1].load("cpu")
    documents = list(grammar.documents(20, seed=77))
    losses = [[float(model(text, return_type="loss")) for text in documents] for model in (bridge, loaded)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert sum(losses[0]) / len(documents) < 4 < math.log(len(every.tokenizer))


@pytest.mark.slow
def test_a_crosscoder_says_what_it_is() -> None:
    cc = from_pretrained("crosslens-demo", "blocks.1.hook_resid_post")
    F, S, D = cc.cfg.d_sae, cc.n_snapshots, cc.d_model
    wanted = f"{F} features, snapshots step48 ... step640 ({S}), d_model {D}, blocks.1.hook_resid_post"
    assert wanted in repr(cc)


def test_the_embedded_release_is_as_good_as_the_registry_says() -> None:
    crosscoder, snapshots = from_pretrained(DEMO, HOOK), load_snapshots(DEMO)
    documents = list(grammar.documents(800, seed=77))  # not those it was trained on
    acts = Activations(snapshots, HOOK, Dataset(documents, 10_000, held_out_tokens=8_000))
    table = evaluate(crosscoder, acts, n_tokens=500)
    said = find_release(DEMO).entry(HOOK)
    assert said.variance_explained is not None and said.l0 is not None
    assert float(table["explained_variance"].mean()) == pytest.approx(said.variance_explained, abs=0.005)
    assert float(table["l0"].mean()) == pytest.approx(said.l0, rel=0.05)
    assert float(table["explained_variance"].min()) > 0.97


# ---------------------------------------------------------------------- users' files


def test_a_file_is_registered_and_loads_from_its_folder(tmp_path: Path, saved: Path) -> None:
    config = {"architecture": "standard_crosscoder", "d_sae": 5}
    path = write(tmp_path / "mine.yaml", {"mine": release(saes=[entry(config=config, l0=3, hook_name=HOOK)])})
    assert register_release(path) == ["mine"]
    assert list(list_releases()) == [DEMO, "mine"]
    loaded = crosslens.from_pretrained("mine", "a", dtype="float64")
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded.W_dec, crosslens.load(saved, dtype="float64").W_dec)
    assert register_release(path) == ["mine"]  # registering the same release twice is allowed
    with pytest.raises(UserError, match="release 'mine' has no 'b': it has a"):
        from_pretrained("mine", "b")
    with pytest.raises(UserError, match="is a folder and has no revision 'v1'"):
        from_pretrained("mine", "a", revision="v1")
    write(path, {"mine": release(model="other")})
    with pytest.raises(UserError, match="has a release 'mine', but a different one has that name already"):
        register_release(path)
    with pytest.raises(UserError, match=f"has a release '{DEMO}', but a different one has that name already"):
        register_release(write(tmp_path / "demo.yaml", {DEMO: release()}))


def test_the_environment_names_files(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write(tmp_path / "1.yaml", {"one": release()}), write(tmp_path / "2.yaml", {"two": release()})
    monkeypatch.setenv(registry.VARIABLE, f"{one}:{two}")
    assert list(list_releases()) == [DEMO, "one", "two"]
    assert from_pretrained("two", "a").cfg.d_sae == 5 and saved.is_dir()
    write(two, {"three": release(model="longer")})
    assert list(list_releases()) == [DEMO, "one", "three"]  # a changed file is read again
    monkeypatch.setenv(registry.VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match=r"CROSSLENS_REGISTRY names .*none.yaml, which does not exist"):
        list_releases()


def test_files_that_contradict_the_release_are_refused(tmp_path: Path, saved: Path) -> None:
    assert saved.is_dir()
    register_release(write(tmp_path / "r.yaml", {"mine": release(saes=[entry(config={"d_sae": 6})])}))
    with pytest.raises(UserError, match="a of release 'mine' has d_sae=5, but the release says 6"):
        from_pretrained("mine", "a")


def test_snapshots_of_a_release(tmp_path: Path, tiny_snapshots: Path) -> None:
    (tmp_path / "weights").symlink_to(tiny_snapshots)
    hub = {"repo_id": "EleutherAI/pythia-14m", "revisions": ["step0", "step512"], "steps": [0, 512]}
    releases = {
        "far": release(snapshots=hub),
        "none": release(),
        "near": release(snapshots={"folder": tiny_snapshots.name}),
        "later": release(snapshots={"folder": tiny_snapshots.name, "trained": ["step10", "step20"]}),
        "late": release(snapshots={**copy.deepcopy(hub), "trained": ["step512"]}),
        "other": release(snapshots={"folder": tiny_snapshots.name, "trained": ["step10", "step30"]}),
    }
    register_release(write(tiny_snapshots.parent / "r.yaml", releases))
    assert load_snapshots("near").labels == ["step0", "step10", "step20"]
    assert load_snapshots("later").labels == ["step10", "step20"] and load_snapshots("late").labels == ["step512"]
    assert load_snapshots("later", every=True) == load_snapshots("near")
    with pytest.raises(UserError, match="'other' was trained on 'step30', which is not among its snapshots step0"):
        load_snapshots("other")
    far = load_snapshots("far")
    assert far.labels == ["step0", "step512"] and far.steps == [0, 512] and far[1].revision == "step512"
    with pytest.raises(UserError, match="release 'none' does not say where its snapshots are"):
        load_snapshots("none")
    with pytest.raises(UserError, match="there is no release 'neat': there are .* did you mean 'near'"):
        load_snapshots("neat")
    # links are followed, and must stay inside
    with pytest.raises(UserError, match="folder 'weights' is not below its folder"):
        read_registry(write(tmp_path / "out.yaml", {"out": release(snapshots={"folder": "weights"})}))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command prints."""

    def command(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["crosslens", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    return command


def test_ls_describes_releases(tmp_path: Path, said: Callable[..., str]) -> None:
    hub = release(folder=None, repo_id="someone/things", revision="v1", licence="MIT", dataset="prose")
    more = [entry(hook_name=HOOK, variance_explained=0.91234, l0=64.19, config={"d_sae": 8}), entry(id="b")]
    register_release(write(tmp_path / "r.yaml", {"far": {**hub, "saes": more}}))
    listed = said("ls", "releases").splitlines()
    assert [line.split() for line in listed[:3]] == [
        ["release", "model", "crosscoders", "place"],
        [DEMO, "crosslens-demo-seed0", "1", "in", "this", "package"],
        ["far", "tiny", "2", "someone/things", "at", "v1"],
    ]
    assert [line.split() for line in said("ls", "far").splitlines()] == [
        ["far:", "tiny,", "someone/things", "at", "v1"],
        ["id", "hook", "settings", "EV", "L0"],
        ["a", HOOK, "d_sae", "8", "0.912", "64.2"],
        ["b", "-", "-", "-"],
        ["licence:", "MIT;", "data:", "prose"],
    ]


@pytest.mark.parametrize(
    ("releases", "message"),
    [
        ([1], "contains a list instead of a mapping"),
        ({"x": 3}, "release 'x' is a int, but must be a mapping"),
        ({"a/b": release()}, "must have a name without '/'"),
        ({7: release()}, "must have a name without"),
        ({"x": release(model=None)}, "release 'x' lacks model"),
        ({"x": release(modle="y")}, "unknown key 'modle'; did you mean 'model'"),
        ({"x": release(model=["y"])}, r"model=\['y'\] has the wrong type \(list\)"),
        ({"x": release(repo_id="a/b")}, "either a repo_id, on the hub, or a folder"),
        ({"x": release(folder=None)}, "either a repo_id, on the hub, or a folder"),
        ({"x": release(folder=None, repo_id="../b")}, "'../b' is not a repository name"),
        ({"x": release(folder=None, repo_id="a/b", revision="a b")}, "revision 'a b' is not a branch"),
        ({"x": release(folder="../mine")}, r"folder '../mine' is not below its folder"),
        ({"x": release(folder="/etc")}, "folder '/etc' is not below its folder"),
        ({"x": release(saes=[])}, "must list at least one crosscoder"),
        ({"x": release(saes=[entry(), entry()])}, "with distinct ids"),
        ({"x": release(saes=["a"])}, "saes is a str, but must be a mapping"),
        ({"x": release(saes=[entry(path="a/../../b")])}, "path 'a/../../b' is not a path inside"),
        ({"x": release(saes=[entry(config={7: 7})])}, "the keys of config must be field names"),
        ({"x": release(saes=[entry(l0=True)])}, r"l0=True has the wrong type \(bool\)"),
        ({"x": release(saes=[entry(l0=float("nan"))])}, "l0=nan is not a finite number"),
        ({"x": release(conversion_func="eval")}, "conversion_func 'eval' is not one of crosscoding_through_time"),
        ({"x": release(snapshots={"repo_id": "a/b"})}, "must have a folder, or a repo_id and revisions"),
        ({"x": release(snapshots={"repo_id": "a/b", "revisions": [1]})}, "revisions must list one str per revision"),
        (
            {"x": release(snapshots={"repo_id": "a/b", "revisions": ["v"], "steps": [1, 2]})},
            "steps must list one int per revision",
        ),
    ],
)
def test_mistakes_in_a_registry_are_named(tmp_path: Path, releases: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_registry(write(tmp_path / "r.yaml", releases))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "is not valid YAML"),
        ("a: &x [1, 2]\nb: *x", r"uses a YAML alias \(\*x\)"),
        ("[" * 30 + "]" * 30, "nested deeper than 12 levels"),
        ("a: 2001-99-99", "is not valid YAML"),
        ("? {a: 1}\n: 2", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("", "contains a NoneType"),
    ],
)
def test_invalid_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_registry(path)
    path.write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_registry(path)
    with pytest.raises(UserError, match="cannot be read as registry"):
        read_registry(tmp_path / "nowhere.yaml")


def test_local_folders_load_by_id_and_no_id_leaves_them(tmp_path: Path, saved: Path) -> None:
    assert from_pretrained(str(tmp_path / "mine"), "somewhere/a").cfg.d_sae == 5 and saved.is_dir()
    for sae_id in ("../mine/somewhere/a", "/etc", "somewhere/../somewhere/a", "", "somewhere//a"):
        with pytest.raises(UserError, match="is not below its folder"):
            from_pretrained(str(tmp_path / "mine"), sae_id)
    with pytest.raises(UserError, match="is a local folder and has no revision 'v1'"):
        from_pretrained(str(tmp_path / "mine"), "somewhere/a", revision="v1")
    with pytest.raises(UserError, match="id '../a' is not a path inside a repository"):
        from_pretrained("someone/things", "../a")
    with pytest.raises(UserError, match="there is no release 'things'"):
        from_pretrained("things", "a")


def test_the_command_line_lists_releases_and_plans_a_push(saved: Path, said: Callable[..., str]) -> None:
    assert DEMO in said("ls", "releases")
    assert said("ls", DEMO).startswith(f"{DEMO}: crosslens-demo-seed0, in this package\n")
    planned = said("push", str(saved), "someone/things", "--id", "x/y", "--dry-run", "--private")
    assert "someone/things, id x/y: nothing was sent (dry run)" in planned and "x/y/sae_weights.safetensors" in planned
