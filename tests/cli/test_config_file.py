"""Options of `crosslens train` from a file, and how they give way to the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from crosslens.cli import app as cli
from crosslens.rundir import RunDir

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command line asked of `train`, which does nothing here."""
    found: dict[str, Any] = {}

    def stop(run: RunDir, source: Any, crosscoder: Any, training: Any, *, models: Any, **_: Any) -> None:
        found.update(**vars(source), **vars(crosscoder), **vars(training), **vars(models), run_dir=run.path)
        raise SystemExit(0)

    monkeypatch.setattr("crosslens.pipeline.training.train", stop)
    return found


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["crosslens", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def write(path: Path, text: str) -> Path:
    (path / "run.toml").write_text(text)
    return path / "run.toml"


def test_options_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> None:
    text = (
        f'snapshots = "demo"\nhook = "{HOOK}"\ndataset = "user/name"\nrun-dir = "{tmp_path / "run"}"\n'
        'd_sae = 32\nlr-warm-up = 0.25\nn_tokens = 2e3\nsteps = [0, 512]\ndevice = "cpu"\nk = 4\n'
    )
    config = write(tmp_path, text)
    assert run(monkeypatch, "--config", config) == 0
    assert (asked["d_sae"], asked["k"], asked["lr_warm_up"], asked["n_tokens"]) == (32, 4, 0.25, 2000)
    assert (asked["steps"], asked["hook"]) == ("0,512", (HOOK,))
    assert asked["run_dir"] == tmp_path / "run" and asked["device"] == "cpu"
    assert run(monkeypatch, "--k", 8, "--config", config, "--lr", 0.01) == 0  # in any order
    assert (asked["k"], asked["lr"], asked["d_sae"]) == (8, 0.01, 32)


def test_sweep_and_harvest_read_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A harvest reads the file of the training that follows: what it does without is left out."""
    found: dict[str, Any] = {}

    def swept(run: RunDir, source: Any, grid: Any, *_: Any, **__: Any) -> None:
        found.update(run_dir=run.path, hook=source.hook, d_sae=grid.d_sae, k=grid.k)
        raise SystemExit(0)

    def harvested(source: Any, options: Any, *_: Any) -> None:
        found.update(hook=source.hook, cache=options.cache)
        raise SystemExit(0)

    monkeypatch.setattr("crosslens.pipeline.sweeping.sweep", swept)
    monkeypatch.setattr("crosslens.pipeline.harvesting.harvest", harvested)

    def called(verb: str, config: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["crosslens", verb, "--config", str(config)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    data = f'snapshots = "demo"\nhook = "{HOOK}"\ndataset = "user/name"\n'
    config = write(tmp_path, f'run_dir = "{tmp_path / "s"}"\n{data}d_sae = [32]\nk = [2, 4]\n')
    assert called("sweep", config) == 0
    assert found == {"run_dir": tmp_path / "s", "hook": (HOOK,), "d_sae": (32,), "k": (2, 4)}
    config = write(tmp_path, f'run_dir = "{tmp_path / "s"}"\n[train]\n{data}d_sae = 32\ncache = "kept"\n')
    assert called("harvest", config) == 0
    assert found["cache"] == Path("kept")
    capsys.readouterr()
    config = write(tmp_path, f"{data}d_sea = 32\ncache = 'kept'\n")
    assert called("harvest", config) == 2 and "'d_sea' is no option of `crosslens train`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("d-sea = 32", "'d-sea' is no option of `crosslens train`; did you mean 'd-sae'?"),
        ("k = 4\n[training]\nlr = 1", "'training' is no option of `crosslens train`"),
        ("d-sae = 32\nd_sae = 64", "'d_sae' is given twice"),
        ("k = {a = 1}", "k = {'a': 1} must be a text"),
        ("k = ", "is not valid TOML"),
        ('config = "other.toml"', "'config' is no option"),
    ],
)
def test_a_wrong_file_is_refused(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--config", write(tmp_path, text)) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_a_wrong_value_is_refused_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = f'snapshots="demo"\nhook="{HOOK}"\ndataset="user/name"\nrun-dir="{tmp_path / "run"}"\n'
    for line, told in (("k = 4.5", "--k 4.5 must be a whole number"), ("k = 0", "--k 0 must be at least 1"),
                       ("k = true", "--k True must be a whole number"),
                       ('lr = "x"', 'unable to convert "x" into float'),
                       ('architecture = "topkk"', 'Did you mean "topk"')):  # fmt: skip
        assert run(monkeypatch, "--config", write(tmp_path, needed + line)) == 2
        assert told in capsys.readouterr().err
    assert run(monkeypatch, "--config", write(tmp_path, "k = 4")) == 2
    assert "--run-dir is missing" in capsys.readouterr().err
    assert run(monkeypatch, "--config", tmp_path / "gone.toml") == 2
    assert run(monkeypatch, "--config", tmp_path / "run.yaml") == 2
    assert "is neither a .toml file nor a run.json" in capsys.readouterr().err


def test_a_run_of_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    RunDir(tmp_path).write_json({"command": ["crosslens", "demo"]})
    assert run(monkeypatch, "--config", tmp_path / "run.json") == 2
    assert "records no options of `crosslens train`: the run was made by 'crosslens demo'" in capsys.readouterr().err


def test_plan_takes_the_file_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def stop(source: Any, crosscoder: Any, *_: Any, **__: Any) -> None:
        asked.update(**vars(source), **vars(crosscoder))
        raise SystemExit(0)

    monkeypatch.setattr("crosslens.pipeline.planning.plan", stop)
    text = f'run_dir = "runs/one"\n[train]\nsnapshots="demo"\nhook="{HOOK}"\ndataset="user/name"\nd_sae=32\nseeds=3\n'
    for content, code in ((text, 0), (text.replace("[train]\n", ""), 0), (text + "kk = 4", 2)):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["crosslens", "plan", "--config", str(write(tmp_path, content)), "--k", "8"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == code
        assert (asked.get("d_sae"), asked.get("k")) == ((32, 8) if code == 0 else (None, None))
    assert "'kk' in [train] is no option of `crosslens train`; did you mean 'k'?" in capsys.readouterr().err
