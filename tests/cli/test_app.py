"""The command line on real files: every verb from end to end, and mistakes found once the data are read."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sae_lens import SAE
from safetensors.torch import load_file

from crosslens.activations.tokens import Dataset, token_sequences
from crosslens.causal import attribute
from crosslens.cli import app as cli
from crosslens.cli import display
from crosslens.crosscoders import load
from crosslens.errors import json_checksum
from crosslens.rundir import RunDir, file_checksum
from crosslens.snapshots import Snapshots
from crosslens.tasks import Task
from tests.hub_server import run_program, serve_datasets

HOOK = "blocks.1.hook_resid_post"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `crosslens ...` in this process: exit code, standard output, and its own lines of standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crosslens", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        told = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("crosslens: ")]
        return int(stop.value.code or 0), out, "\n".join(told)

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_text: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("files")
    (folder / "text.txt").write_text("\n".join(tiny_text))
    nouns = ("cat", "dog", "king", "child")
    rows = [
        {
            "clean_prefix": f"the {noun} near the {other}",
            "patch_prefix": f"the {other} near the {noun}",
            "clean_answer": " sees",
            "patch_answer": " likes",
            "case": "a",
        }
        for noun in nouns
        for other in nouns
        if noun != other
    ]
    (folder / "task.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "broken.json").write_text("\n".join(json.dumps({**row, "clean_answer": None}) for row in rows[:1]))
    (folder / "missing.json").write_text(json.dumps({"clean_prefix": "the cat", "clean_answer": " sees"}))
    return folder


def train_arguments(snapshots: Path, files: Path, run: Path, *more: object) -> list[object]:
    return [
        *("train", "--snapshots", snapshots, "--hook", HOOK, "--dataset", files / "text.txt", "--n-tokens", 2000),
        *("--context-size", 16, "--d-sae", 32, "--k", 4, "--batch-size", 128, "--run-dir", run, *more),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_snapshots: Path, files: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, ["crosslens", *train_arguments(tiny_snapshots, files, run)])))
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert not stop.value.code
    return run


@pytest.fixture(scope="module")
def analysed(trained: Path, files: Path) -> tuple[Path, dict[str, str]]:
    """A run that every verb has been run on, and what they printed."""
    (files / "other.json").write_text((files / "task.json").read_text())
    tasks = ["--task", f"sva:{files / 'task.json'}", "--task", f"sva:{files / 'other.json'}"]
    said: dict[str, str] = {}
    for arguments in (
        ["evolve", trained],
        ["attribute", trained, *tasks, "--n-exact", 3],
        ["ablate", trained, *tasks, "--k", "1,3", "--n-draws", 2],
        ["report", trained],
    ):
        told = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
            patch.setattr(sys, "argv", list(map(str, ["crosslens", *arguments])))
            with pytest.raises(SystemExit) as stop:
                cli.main()
        assert not stop.value.code, arguments
        said[str(arguments[0])] = told.getvalue()
    return trained, said


def test_every_verb(command: Command, analysed: tuple[Path, dict[str, str]], tiny_snapshots: Path, files: Path) -> None:
    trained, said = analysed
    task, other = (f"sva:{files / name}" for name in ("task.json", "other.json"))
    births = RunDir.open(trained).table("birth_counts")
    assert births is not None
    row = births.query("measure == 'r2' and kind == 'all' and threshold == 0.4").iloc[0]
    limits, reversed_limits = (f"{row[f'{it}_low']:.0f} to {row[f'{it}_high']:.0f}" for it in ("born", "born_reversed"))
    assert said["evolve"].startswith(
        f"{row['born']} (95% interval {limits}) of {row['n']} live features are born between step0 and step20: "
    )
    assert (
        f"with the snapshots reversed {row['born_reversed']} ({reversed_limits}) are born (false births were not "
        "measured" in said["evolve"]
    )
    assert said["evolve"].splitlines()[-1].endswith(f"probes: crosslens report {trained}, or --json")
    first, second = said["attribute"].splitlines()[:2]
    assert first.startswith(f"task: {len(Task.sva(files / 'task.json'))} items")
    assert re.match(r"task: the largest effect at step20 is [+-]\d\.\d+ logits, of feature \d+ (“.*” )?\(", second)
    for name in ("task", "other"):
        n = len(Task.sva(files / f"{name}.json"))
        assert f"{name}: {n} items" in said["attribute"] and "fewer than 20, so means over tasks" in said["attribute"]
        assert (
            f"{name}, effects by removal, patch baseline, error node moved too, on the selection half:"
            in said["attribute"]
        )
        assert f"{name}, metric on the held-out half:" in said["ablate"]
    assert "agreement with exact" in said["attribute"] and "accuracy" in said["attribute"]
    assert "completeness" not in said["attribute"]  # these effects need not add up
    code, out, err = command("attribute", trained, "--task", other, "--method", "ig", "--n-nodes", 4, "--n-exact", 0)
    assert (code, err) == (0, "") and "completeness" in out and "agreement with exact" not in out
    assert RunDir.open(trained).table("completeness/other") is not None
    code, out, err = command("attribute", trained, "--task", task, "--task", task)
    assert code == 2 and "--task names 'task' twice: give each task once" in err
    code, out, err = command("remove", trained, "--task", "other")
    assert (code, err) == (0, "") and "completeness/other" in out and "accuracy" in out
    left = RunDir.open(trained)
    assert not [name for name in left.table_names() if "other" in name] and left.tasks("attribution") == ["task"]
    accuracy = left.table("accuracy")
    assert accuracy is not None and set(accuracy["task"]) == {"task"}
    code, out, err = command("remove", trained, "--task", "tsk")
    assert code == 2 and "has no table of task 'tsk': it has task; did you mean 'task'" in err
    run = RunDir.open(trained)
    for table in (
        *("evaluation", "evolution", "lifecycles", "birth_counts", "doubtful", "probe", "probe_presence", "accuracy"),
        *("attribution/task", "ablation/task"),
    ):
        assert run.table(table) is not None, table
    # effects are measured on one half of the prompts, ablations on the other
    halves = Task.sva(files / "task.json").split(0)
    clean = [
        attribute(load(run.crosscoder), Snapshots.local(tiny_snapshots), h, "gradient").metric_clean for h in halves
    ]
    assert clean[0].tolist() != pytest.approx(clean[1].tolist(), rel=1e-3)
    effects, ablated = run.table("attribution/task.snapshots"), run.table("ablation/task")
    assert effects is not None and ablated is not None
    assert effects["metric_clean"].tolist() == pytest.approx(clean[0].tolist(), rel=1e-4)
    assert ablated.groupby("snapshot")["clean"].first().tolist() == pytest.approx(clean[1].tolist(), rel=1e-4)
    page = (trained / "report" / "index.html").read_text()
    assert "step20" in page and "No attribution" not in page
    weights = (trained / "crosscoder" / "sae_weights.safetensors").read_bytes()
    code, out, err = command(*train_arguments(tiny_snapshots, files, trained))
    assert (code, err) == (0, "")
    evaluation = run.table("evaluation")
    assert evaluation is not None
    ev, timings = evaluation["explained_variance"], run.read_json()["timings"]
    title, head, row = out[out.index("BatchTopKCrosscoder with 32 features") :].splitlines()[:3]
    assert title == f"BatchTopKCrosscoder with 32 features saved in {trained}"
    assert head.split()[:4] == ["seed", "mean", "EV", "first"] and head.split()[-2:] == ["speed", "memory"]
    lowest = f"{ev.min():.3f} ({evaluation.loc[ev.idxmin(), 'label']})"
    assert row.split()[:4] == ["0", f"{ev.mean():.3f}", f"{ev.iloc[0]:.3f}", f"{ev.iloc[-1]:.3f}"] and lowest in row
    assert f"{evaluation['l0'].mean():.1f}  {evaluation['dead_fraction'].max():.1%}" in re.sub(" {3,}", "  ", row)
    worst = (evaluation["ce_spliced"] - evaluation["ce_clean"]).max()
    assert f"{worst:+.3f}" in row and f"{timings['train']:,.0f} s" in row and row.endswith("iB")
    assert (trained / "crosscoder" / "sae_weights.safetensors").read_bytes() == weights
    recorded = run.read_json()
    assert recorded["hook_name"] == HOOK
    assert [s["label"] for s in recorded["snapshots"]] == [
        "step0",
        "step10",
        "step20",
    ]


def test_one_object_for_programs(
    command: Command, analysed: tuple[Path, dict[str, str]], tiny_snapshots: Path, files: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(analysed[0], run.path)
    labels = ["step0", "step10", "step20"]

    def ask(*arguments: object) -> dict[str, Any]:
        code, out, err = command(*arguments, "--json")
        assert (code, err) == (0, ""), err
        return json.loads(out, parse_constant=pytest.fail)  # NaN

    assert [row["label"] for row in ask("ls", tiny_snapshots)["snapshots"]] == labels
    assert ask("ls")["families"]["olmo2"]["sizes"] == ["1b", "7b", "13b"]
    assert ask("ls", "crosslens-demo")["releases"][0]["name"] == "crosslens-demo"
    assert {"text": "ioi", "python": "Task.ioi()", "reads": "indirect objects, generated"} in ask("ls", "tasks")[
        "tasks"
    ]
    found = ask(*train_arguments(tiny_snapshots, files, run.path))  # it is finished
    assert [row["label"] for row in found["evaluation"]] == labels and found["features"] == 32
    task = f"sva:{files / 'task.json'}"
    found = ask("attribute", run.path, "--task", task, "--n-exact", 0)["tasks"]["task"]["snapshots"]
    table = run.table("attribution/task.snapshots")
    assert table is not None and [row["metric_clean"] for row in found] == table["metric_clean"].tolist()
    assert found[0]["agreement"] is None and 0 <= found[0]["accuracy"] <= 1  # no effect was computed exactly
    effects = run.table("attribution/task")
    assert effects is not None
    of_last = effects[effects["snapshot"] == 2].set_index("feature")["ie"]
    sure = effects[effects["snapshot"] == 2].set_index("feature")["significant"]
    top = found[2]["top"]
    assert [row["feature"] for row in top] == of_last[of_last != 0].abs().nlargest(5).index.tolist()
    assert all(sure[row["feature"]] == row["significant"] for row in top)
    assert [abs(row["effect"]) for row in top] == sorted((abs(row["effect"]) for row in top), reverse=True)
    assert all(of_last[row["feature"]] == pytest.approx(row["effect"], rel=1e-5) for row in top)
    found = ask("ablate", run.path, "--task", task, "--k", "1,3", "--n-draws", 2)["tasks"]["task"]["curves"]
    table = run.table("ablation/task")
    assert table is not None and [row["metric"] for row in found] == table["metric"].tolist()
    assert [row["metric_sd"] for row in found if row["features"] == "top"] == [None] * (3 * 5)
    assert ask("status", run.path)["next"] == f"crosslens report {run.path}"  # it is older than the effects
    assert ask("remove", run.path, "--task", "task")["removed"]["task"]


def test_a_run_json_given_back(command: Command, trained: Path, tiny_snapshots: Path, files: Path, tmp_path: Path):
    recorded = RunDir.open(trained).read_json()["options"]
    assert recorded == {
        "snapshots": str(tiny_snapshots), "hook": [HOOK], "dataset": str(files / "text.txt"), "n_tokens": 2000,
        "context_size": 16, "d_sae": 32, "k": 4, "batch_size": 128, "run_dir": str(trained),
    }  # fmt: skip
    again = tmp_path / "again"
    assert command("train", "--config", trained / "run.json", "--run-dir", again)[0] == 0
    weights = [(run / "crosscoder" / "sae_weights.safetensors").read_bytes() for run in (trained, again)]
    assert weights[0] == weights[1]
    code, out, _ = command("diff", trained, again, "--json")
    found = json.loads(out)
    assert code == 0 and found["settings"] == [] and found["not_matched"] is None
    assert [found["matched"][key] for key in ("share_a", "variance_b")] == pytest.approx([1, 1])
    assert all(row["feature"] == row["partner"] and row["correlation"] > 0.999 for row in found["pairs"])
    explained = RunDir.open(trained).table("evaluation")
    assert explained is not None
    for run in "ab":
        assert [row[f"explained_variance_{run}"] for row in found["evaluation"]] == pytest.approx(
            explained["explained_variance"].tolist()
        )
    # settings that differ, and snapshots that do
    other = tmp_path / "other"
    arguments = train_arguments(tiny_snapshots, files, other, "--k", 3, "--steps", "0,20")
    assert command(*arguments)[0] == 0
    code, out, _ = command("diff", trained, other)
    assert code == 0 and "features are not matched: they were trained on other snapshots" in out
    rows = {line.split("  ")[0]: line.split()[1:] for line in out.splitlines()}
    assert rows["architecture.k"] == ["4", "3"] and rows["architecture.n_snapshots"] == ["3", "2"]
    (middle,) = [line.split() for line in out.splitlines() if line.strip().startswith("step10 ")]
    assert middle[2::2] == ["-"] * 3  # B does not have it


def test_status(command: Command, analysed: tuple[Path, dict[str, str]], files: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(analysed[0], run.path)
    task = f"sva:{files / 'task.json'}"

    def states() -> tuple[dict[str, str], str]:
        code, out, err = command("status", run.path, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        return {part["name"]: part["state"] for part in found["parts"]}, found["next"]

    found, following = states()
    assert found["crosscoder"] == found["evaluation"] == found["evolution"] == found["task task"] == "ok"
    (run.path / "ablation" / "task.parquet").unlink()
    assert states()[1] == f"crosslens ablate {run.path} --task {task}"
    code, out, _ = command("status", run.path)
    assert code == 0 and out.splitlines()[-1] == f"next: crosslens ablate {run.path} --task {task}"
    lens = run.path / "lens.parquet"
    lens.write_bytes(lens.read_bytes()[:-100])
    found, following = states()
    assert (found["evolution"], following) == ("damaged", f"crosslens evolve {run.path}")
    lens.unlink()
    assert states()[0]["evolution"] == "unfinished"
    evaluation = run.path / "evaluation.parquet"
    whole = evaluation.read_bytes()
    evaluation.write_bytes(whole[:-100])
    found, following = states()
    assert found["evaluation"] == "damaged" and "seeds" not in found
    assert following.startswith("crosslens train --snapshots ")
    evaluation.write_bytes(whole)
    (run.report / "index.html").unlink()
    assert states()[0]["report"] == "missing"
    with RunDir(run.path).writing():
        done = subprocess.run(
            [sys.executable, "-m", "crosslens", "status", str(run.path), "--json"], capture_output=True, text=True
        )
    assert "another process is writing the run" in json.loads(done.stdout)["next"]
    # one bit of one weight
    weights = run.crosscoder / "sae_weights.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-5] ^= 1
    weights.write_bytes(contents)
    found, following = states()
    assert found["crosscoder"] == "damaged" and following.startswith("crosslens train --snapshots ")
    weights.write_bytes(contents[:-8])
    assert states()[0]["crosscoder"] == "damaged"
    shutil.rmtree(run.crosscoder)
    checkpoint = run.checkpoints / "tokens-1024"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard-0.safetensors").write_bytes(b"abc")
    checksums = {"shard-0.safetensors": file_checksum(checkpoint / "shard-0.safetensors")}
    (checkpoint / "checksums-00000.json").write_text(json.dumps(checksums))
    (checkpoint / "state.json").write_text(json.dumps({"n": 1, "checksum": json_checksum({"n": 1})}))
    found, following = states()
    assert (found["crosscoder"], found["checkpoints"]) == ("missing", "unfinished")
    assert following.startswith("crosslens train --snapshots ")
    (checkpoint / "shard-0.safetensors").write_bytes(b"abd")
    assert states()[0]["checkpoints"] == "damaged"
    assert command("status", tmp_path)[0] == 2


def test_status_needs_no_torch(analysed: tuple[Path, dict[str, str]]) -> None:
    program = (
        "import sys\nfrom crosslens.cli.app import app\n"
        f"app(['status', {str(analysed[0])!r}])\n"
        "assert not {'torch', 'sae_lens', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "next: " in done.stdout


def test_exports(command: Command, analysed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(analysed[0], run.path)
    code, out, _ = command("export", run.path, "--format", "sae", "--snapshot", "step10", "--to", tmp_path / "sae")
    assert code == 0 and "a JumpReLU SAE of 32 features at step10" in out
    sae: Any = SAE.load_from_disk(tmp_path / "sae")
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.metadata.snapshot) == (16, 32, "step10")
    code, out, _ = command("export", run.path, "--format", "json", "--json")
    (path,) = json.loads(out)["files"]
    assert code == 0 and len(json.loads(Path(path).read_text())["features"]) == 32
    code, out, _ = command("export", run.path, "--format", "neuronpedia", "--json")
    (path,) = json.loads(out)["files"]
    assert code == 0 and Path(path) == run.path / "exports" / "neuronpedia-step20" / "batch-0.json"
    assert json.loads(Path(path).read_text())["sae_id_suffix"] == "step20"
    for arguments, told in (
        (("--format", "sea"), 'Did you mean "sae"'),
        (("--format", "sae", "--snapshot", "step11"), "use one of step0, step10, step20; did you mean 'step10'"),
        (("--format", "json", "--snapshot", "step10"), "holds all snapshots: leave it out"),
    ):
        code, _, err = command("export", run.path, *arguments)
        assert code == 2 and told in err
    (run.path / "lens.parquet").unlink()
    code, _, err = command("export", run.path, "--format", "json")
    assert code == 2 and f"has no table lens: run `crosslens evolve {run.path}` first" in err


def test_attribute_and_ablate_say_what_they_show(command: Command, trained: Path, files: Path, tmp_path: Path) -> None:
    """Items and why they are left out, why the baseline is not patch, signed effects, paired changes."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained, run.path)
    rows = [json.loads(line) for line in (files / "task.json").read_text().splitlines()]
    short = [{**row, "patch_prefix": row["clean_prefix"].split(" near")[0]} for row in rows]
    whole = {**rows[0], "clean_prefix": "the cat", "patch_prefix": "the dog"}
    longer = {**whole, "clean_answer": " sees the dog"}
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, [*short, short[0], whole, longer])))
    task = f"sva:{tmp_path / 'mine.jsonl'}"
    code, out, err = command("attribute", run.path, "--task", task)
    assert (code, err) == (0, "")
    example = "such as ' sees the dog' / ' likes'"
    items = "mine: 13 of 15 items, 1 merged (the same item), 1 skipped (the answers do not differ in exactly one token"
    assert out.startswith(f"{items}, {example})")
    assert "To keep more: give answers of one token, or answers='multi', which only accuracy reads\n" in out
    assert "removal, zero baseline, error node moved too, on the selection half: " in out
    assert "(fewer than 20: standard errors are rough)" in out
    table = run.table("attribution/mine")
    assert table is not None
    last = table[table["snapshot"] == 2].set_index("feature")
    largest = last.loc[last["ie"].abs().nlargest(5).index]
    shown = [f"{i}:{row['ie']:+.3f}{'*' if row['significant'] else ''}" for i, row in largest.iterrows()]
    assert re.search(rf"^ *step20 .*  {re.escape(', '.join(shown))}$", out, re.M), (shown, out)
    assert ("none significant over features and snapshots" in out) == (not table["significant"].any())
    code, out, err = command("ablate", run.path, "--task", task, "--k", "1,3", "--n-draws", 2)
    assert (code, err) == (0, "")
    table = run.table("ablation/mine")
    assert table is not None
    row = table[(table["snapshot"] == 2) & (table["mode"] == "ablate") & (table["features"] == "top")].iloc[0]
    change = display.measured(row["metric"] - row["clean"], row["change_se"], sign=True)
    metric = re.escape(display.number(row["metric"], sign=True))
    assert re.search(rf"^ablate +top +1 +{metric} .* {re.escape(change)} +1 +-$", out, re.M), out
    assert "(fewer than 20: standard errors are rough)" in out


def test_a_training_from_a_cache_is_repeated(
    command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live activations would come in the order of a buffer that does not hold all tokens."""
    monkeypatch.setattr("crosslens.activations.loader.MIXING_BYTES", 4 * 3 * 16 * 500)
    run, cache = RunDir(tmp_path / "run"), ("--cache", tmp_path / "c")
    for number in (1, 2):
        code, out, err = command(*train_arguments(tiny_snapshots, files, run.path, "--seeds", number, *cache))
        assert (code, err) == (0, ""), number
    assert run.read_json()["identity"]["data_order"] == "shuffled"
    code, _, err = command(*train_arguments(tiny_snapshots, files, run.path))
    assert code == 2 and "it has cache_dtype=bfloat16, this run has cache_dtype=float32" in err
    assert "repeat the command with or without --cache" in err
    recorded = run.read_json()
    run.write_json({**recorded, "identity": {**recorded["identity"], "cache_dtype": "float32"}})
    code, _, err = command(*train_arguments(tiny_snapshots, files, run.path))
    assert code == 2 and "it has data_order=shuffled, this run has data_order=a live buffer of 500 tokens" in err
    assert "repeat the command with or without --cache" in err


@pytest.mark.exhaustive
def test_several_seeds(command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path) -> None:
    run, task = RunDir(tmp_path / "run"), f"sva:{files / 'task.json'}"
    assert command(*train_arguments(tiny_snapshots, files, run.path))[0] == 0
    cache = ("--cache", tmp_path / "c", "--cache-dtype", "float32")  # what live activations are
    code, out, err = command(*train_arguments(tiny_snapshots, files, run.path, "--seeds", 2, *cache))
    assert (code, err) == (0, "") and "found by most of 2 seeds: " in out
    out_of_two = out
    # repeated, it reads what it has found, unless a table is lost
    rotation, made = run.path / "seeds_rotation.parquet", (run.path / "seeds.parquet").stat().st_mtime_ns
    code, out, _ = command(*train_arguments(tiny_snapshots, files, run.path, "--seeds", 2, *cache))
    assert code == 0 and out.count("found by most of 2 seeds: ") == 1
    assert out.partition("found by most")[2].splitlines()[0] == out_of_two.partition("found by most")[2].splitlines()[0]
    assert (run.path / "seeds.parquet").stat().st_mtime_ns == made
    rotation.unlink()
    assert command(*train_arguments(tiny_snapshots, files, run.path, "--seeds", 2, *cache))[0] == 0
    assert rotation.is_file()
    pairs = run.table("seeds")
    assert pairs is not None and pairs[["a", "b"]].to_numpy().tolist() == [["0", "1"]]
    for seed, place in ((0, run), (1, run.other_seed(1))):
        assert place.read_json()["seed"] == seed
        found = place.consensus()
        assert found["crosscoder"].unique().tolist() == [str(seed)] and found["feature"].tolist() == list(range(32))
    marked = run.consensus()
    kept = marked["feature"].isin(marked.loc[marked["alive"], "feature"].iloc[::2])
    run.save_table("consensus", marked.assign(consensus=kept))
    kept = set(marked.loc[kept, "feature"])
    assert command("attribute", run.path, "--task", task, "--n-exact", 0, "--consensus")[0] == 0
    compared = run.table("seeds_births")
    assert compared is not None and compared["kind"].tolist() == ["all", "lexical", "contextual"]
    assert compared["shared"][0] == pytest.approx(pairs["share_a"][0]) and "are born there too (by chance" in out_of_two
    # models whose order means nothing: what their dictionary shares with this one is what the text alone decides
    models = {f"seed{i}": one.name for i, one in enumerate(Snapshots.local(tiny_snapshots))}
    (files / "models.json").write_text(json.dumps(models))
    code, out, _ = command("evolve", run.path, "--json", "--null", files / "models.json")
    unrelated = run.table("unrelated")
    assert unrelated is not None and unrelated["live"].tolist() == compared["live"].tolist()
    assert 0 < unrelated["shared"][0] <= 1
    found, births = json.loads(out, parse_constant=pytest.fail), run.table("birth_counts")
    assert births is not None and [row["born"] for row in found["birth_counts"]] == births["born"].tolist()
    assert code == 0 and found["snapshots"] == ["step0", "step10", "step20"]
    assert [row["features"] for row in found["lifecycles"]] == [32] * 3
    for row in found["lifecycles"]:
        assert row["live"] == row["initial"] + row["emergent"] + row["never"] + row["unknown"]
    effects, lifecycles = run.table("attribution/task"), run.table("lifecycles")
    assert effects is not None and set(effects["feature"]) <= kept and len(effects)
    assert lifecycles is not None and lifecycles["consensus"].tolist() == [i in kept for i in range(32)] * 3
    assert json.loads(command("report", run.path, "--consensus", "--json")[1])["page"] == str(run.report / "index.html")
    assert "Features by number of seeds" in (run.report / "index.html").read_text()
    listed = pd.read_csv(run.report / "data" / "evolution-map.csv")["feature"]
    by_r2 = lifecycles.query("measure == 'r2' and origin.notna()")
    assert set(listed) == set(by_r2["feature"]) & kept


@pytest.mark.exhaustive
def test_a_sweep_before_training(command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    sweep = [
        *("sweep", "--snapshots", tiny_snapshots, "--hook", HOOK, "--dataset", files / "text.txt", "--n-tokens", 2000),
        *("--context-size", 16, "--batch-size", 128, "--run-dir", run.path, "--cache", tmp_path / "cache"),
        *("--drop-positions", 1, "--model-dtype", "bfloat16"),
    ]
    code, out, err = command(*sweep, "--d-sae", "16,32", "--k", "2")
    assert (code, err) == (0, "")
    source = RunDir(run.path / "sweep" / "F16-k2-seed0").read_json()["source"]
    assert source["settings"]["dtype"] == "bfloat16" and source["dataset"]["drop_positions"] == 1
    table = run.table("sweep")
    assert table is not None and len(table) == 2 and out.splitlines()[-1].startswith("F=")
    row = table[table["proposed"]].iloc[0]
    assert out.splitlines()[-1].startswith(f"F={row['d_sae']}, k={row['k']:g}: ")
    trained = sorted(path.name for path in (run.path / "sweep").iterdir())
    assert trained == sorted(f"F{F}-k2-seed{seed}" for F in (16, 32) for seed in (0, 1))
    assert command(*sweep[:4], HOOK.replace("1", "0"), *sweep[5:], "--d-sae", "16", "--k", "2")[0] == 2
    assert command(*train_arguments(tiny_snapshots, files, run.path))[0] == 0
    assert command("report", run.path)[0] == 0
    assert "Choice of F and k" in (run.report / "index.html").read_text()


def test_lists_and_plans(command: Command, tiny_snapshots: Path, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = command("ls", "pythia-14m", "--steps", "0,512,143000")
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [[f"step{n}"] * 2 for n in (0, 512, 143000)]
    assert "299,892,736,000 tokens" in out and out.count("not on this disk") == 3
    assert [line.split()[0] for line in command("ls", "bloom-1b1", "--steps", "triplet")[1].splitlines()] == [
        *("step10000", "step100000", "main")
    ]
    assert "step16000-tokens33B" in command("ls", "olmo-1b-0724", "--steps", "triplet")[1]
    assert len(command("ls", "pythia-160m")[1].splitlines()) == 154
    assert len(command("ls", "pythia-160m", "--steps", "log:9")[1].splitlines()) == 9
    assert all(line.endswith(" on this disk") for line in command("ls", tiny_snapshots)[1].splitlines())
    assert [line.split()[0] for line in command("ls", tiny_snapshots)[1].splitlines()] == ["step0", "step10", "step20"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "2 snapshots, 0 on this disk" in command("ls", "pythia-14m", "--steps", "0,512")[1]
    assert "3 snapshots, 3 on this disk" in command("ls", tiny_snapshots)[1]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    families = command("ls")[1]
    assert re.search(r"^pythia +14m.*^olmo2 +1b, 7b.*^bloom +560m", families, re.M | re.S)
    assert "1b, 1.4b, 2.8b, 6.9b, 12b; each also as SIZE-deduped" in families and "70m-deduped" not in families
    assert max(map(len, families.splitlines())) <= 200
    code, out, _ = command(
        *("plan", "--snapshots", tiny_snapshots, "--hook", HOOK, "--dataset", files / "text.txt"),
        *("--n-tokens", 1000, "--context-size", 16, "--training-tokens", 5000),
    )
    assert code == 0
    assert "snapshots   3 x d_model 16; all are on this disk" in out and "recommended cached: " in out
    assert "training" not in out
    code, out, _ = command(
        *("plan", "--snapshots", tiny_snapshots, "--hook", HOOK, "--dataset", files / "text.txt"),
        *("--context-size", 16, "--d-sae", 4096, "--architecture", "standard", "--processes", 2),
    )
    assert code == 0 and "MiB of memory in each of 2 processes" in out
    for verb in ("harvest", "train", "evolve"):
        assert re.search(rf"^{verb}: about [\d,.]+ min in one process here, [\d.]+ GiB of memory$", out, re.M)
    assert re.search(
        r"^train: [\d,]+ steps of 4,096 tokens take [\d,.]+ min if no feature dies and [\d,.]+ if", out, re.M
    )
    (forwards,) = re.findall(r"forwards +([\d,]+) tokens for one pass", out)
    assert f"evolve --untrained or --null: another training each, live and with nothing on disk: {forwards} tok" in out
    assert "step0: untrained (step 0)\nto leave these out: --steps 10,20" in out


@pytest.mark.exhaustive
def test_predictions_of_more_snapshots(command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path) -> None:
    """The phases of training see snapshots that the crosscoder does without."""
    run = tmp_path / "run"
    assert command(*train_arguments(tiny_snapshots, files, run), "--steps", "10,20")[0] == 0
    code, _, err = command("evolve", run, "--dynamics-steps", "7")
    assert code == 2 and "--dynamics-steps '7': tiny-neox has no snapshot 7; it has step0, step10, step20" in err, err
    assert command("evolve", run)[0] == 0
    before = RunDir.open(run).table("dynamics")
    assert command("evolve", run, "--dynamics-steps", "all")[0] == 0
    after = RunDir.open(run).table("dynamics")
    assert before is not None and before["label"].unique().tolist() == ["step10", "step20"]
    assert after is not None and after["label"].unique().tolist() == ["step0", "step10", "step20"]
    assert after.loc[after["label"] == "step0", "present"].isna().all(), "the crosscoder does not know it"
    known = after[after["label"] != "step0"].reset_index(drop=True)
    assert np.allclose(known["loss"], before["loss"]) and known["present"].tolist() == before["present"].tolist()


def test_two_models_of_any_kind(command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path) -> None:
    """Recorded in the run directory, and found again by the verbs that follow."""
    models = f"base={tiny_snapshots / 'step10'},tuned={tiny_snapshots / 'step20'}"
    assert [line.split()[0] for line in command("ls", models)[1].splitlines()] == ["base", "tuned"]
    run = tmp_path / "run"
    assert command(*train_arguments(Path(models), files, run))[0] == 0
    assert [row["label"] for row in RunDir.open(run).read_json()["snapshots"]] == ["base", "tuned"]
    assert command("evolve", run)[0] == 0
    table = RunDir.open(run).table("evolution")
    assert table is not None and table["label"].tolist()[:2] == ["base", "tuned"] and table["reldec"].notna().any()


def test_harvest_then_train(command: Command, tiny_snapshots: Path, files: Path, trained: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = [
        *("--snapshots", tiny_snapshots, "--hook", HOOK, "--dataset", files / "text.txt", "--n-tokens", 2000),
        *("--context-size", 16, "--cache", cache, "--cache-dtype", "float32"),
    ]
    code, out, err = command("harvest", *data)
    assert (code, err) == (0, "")
    assert f"tokens x 3 snapshots at {HOOK} in {cache}" in out
    written = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) == 1 + 2 + 2 * 3  # training and held-out sequences are in shards of their own
    more = ("--cache", cache, "--cache-dtype", "float32")
    assert command(*train_arguments(tiny_snapshots, files, tmp_path / "run", *more))[0] == 0
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == written
    # training from a float32 cache gives the same weights as without one
    weights = [(run / "crosscoder" / "sae_weights.safetensors").read_bytes() for run in (trained, tmp_path / "run")]
    assert weights[0] == weights[1]
    assert RunDir.open(tmp_path / "run").read_json()["timings"]["waited_for_data"] >= 0
    # several hook points from one pass; training finds the folder of its own
    both = tmp_path / "both"
    asked = [both if part == cache else part for part in data]
    more = ("--hook", "blocks.1.hook_mlp_out", "--drop-positions", 1, "--model-dtype", "bfloat16")
    code, out, err = command("plan", *asked[:-2], *more)
    assert (code, err) == (0, "") and "at 2 hook points, of which a training reads one" in out
    code, out, err = command("harvest", *asked, *more)
    assert (code, err) == (0, "") and f"at {HOOK} and blocks.1.hook_mlp_out in {both}" in out
    written = {path: path.stat().st_mtime_ns for path in both.rglob("*.safetensors")}
    assert {path.parent.name for path in written} == {HOOK, "blocks.1.hook_mlp_out"}
    options = ("--cache", both, "--cache-dtype", "float32", *more[2:])
    assert command(*train_arguments(tiny_snapshots, files, tmp_path / "one", *options))[0] == 0
    assert {path: path.stat().st_mtime_ns for path in both.rglob("*.safetensors")} == written
    source = RunDir.open(tmp_path / "one").read_json()["source"]
    assert source["settings"]["dtype"] == "bfloat16" and source["dataset"]["drop_positions"] == 1
    # the directory of another run is refused before the harvest
    other = train_arguments(tiny_snapshots, files, trained, "--lr", 0.01, "--cache", tmp_path / "new")
    code, _, err = command(*other)
    assert code == 2 and "training.lr=0.0003" in err and not (tmp_path / "new").exists()


def test_all_settings_are_recorded_and_resumed(
    command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings: list[object] = [
        *("--k-start", 8, "--k-anneal", 0.5, "--aux", 0.25, "--scale", "norm", "--lr", 0.01, "--lr-warm-up", 3),
        *("--lr-decay", 0.4, "--dead-tokens", 500, "--precision", "bfloat16"),
    ]
    assert command(*train_arguments(tiny_snapshots, files, run, *settings))[0] == 0
    recorded = RunDir.open(run).read_json()
    architecture, training = recorded["identity"]["architecture"], recorded["identity"]["training"]
    steps = training["training_tokens"] // 128
    assert [architecture[name] for name in ("k", "k_start", "aux_loss_coefficient", "scale")] == [4, 8, 0.25, "norm"]
    assert architecture["k_anneal_steps"] == round(0.5 * steps)
    assert (training["lr_warm_up"], training["lr_warm_up_steps"]) == (0, 3)
    assert [training[name] for name in ("lr", "lr_decay", "dead_tokens", "precision")] == [0.01, 0.4, 500, "bfloat16"]
    written = (run / "crosscoder" / "sae_weights.safetensors").stat().st_mtime_ns
    assert command(*train_arguments(tiny_snapshots, files, run, *settings))[0] == 0
    assert (run / "crosscoder" / "sae_weights.safetensors").stat().st_mtime_ns == written
    for option, value, told in (
        ("--aux", 0.5, "architecture.aux_loss_coefficient=0.25"),
        ("--k-anneal", 0.25, f"architecture.k_anneal_steps={round(0.5 * steps)}"),
        ("--lr-warm-up", 0.1, "training.lr_warm_up="),
        ("--precision", "float32", "training.precision=bfloat16, this run has training.precision=float32"),
    ):
        code, _, err = command(*train_arguments(tiny_snapshots, files, run, *settings, option, value))
        assert code == 2 and told in err, err


def test_a_recipe(command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path) -> None:
    where = ["--snapshots", tiny_snapshots, "--hook", HOOK, "--dataset", files / "text.txt", "--context-size", 16]
    small = ["--recipe", "crosscoding_through_time", "--d-sae", 32, "--training-tokens", 5120, "--batch-size", 128]
    code, out, _ = command("plan", *where, *small)
    assert code == 0 and "MiB of memory" in out
    code, out, err = command("train", *where, *small, "--run-dir", tmp_path / "run")
    assert (code, err) == (0, "") and "StandardCrosscoder with 32 features" in out
    identity = RunDir.open(tmp_path / "run").read_json()["identity"]
    assert (identity["architecture"]["l1_warm_up_steps"], identity["architecture"]["scale"]) == (2, "norm")
    assert (identity["training"]["lr"], identity["training"]["training_tokens"]) == (5e-5, 5120)


@pytest.mark.exhaustive
def test_a_split_of_a_dataset_on_the_hub(tiny_snapshots: Path, tiny_text: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "someone" / "name"
    folder.mkdir(parents=True)
    half = len(tiny_text) // 2
    for split, texts in {"train": tiny_text[:half], "test": tiny_text[half:]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    home = tmp_path / "home"
    home.mkdir()
    with serve_datasets(tmp_path / "hub") as address:

        def harvest(*options: str) -> subprocess.CompletedProcess[str]:
            program = ["-m", "crosslens", "harvest", "--snapshots", str(tiny_snapshots), "--hook", HOOK, *options]
            where = ["--dataset", "someone/name", "--context-size", "16", "--cache", str(home / "cache")]
            return run_program([*program, *where], home, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")

        done = harvest("--split", "test")
        assert done.returncode == 0, done.stderr[-2000:]
        wrong = harvest("--split", "tset")
    tokenizer = Snapshots.local(tiny_snapshots).tokenizer
    expected = token_sequences(Dataset(tiny_text[half:], context_size=16), tokenizer)
    found = load_file(home / "cache" / "tokens-00000.safetensors")["tokens"]
    assert {*map(tuple, found.tolist())} <= {*map(tuple, expected.tolist())}
    assert wrong.returncode == 2 and "(split 'tset') cannot be read from the hub" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["attribute", "{run}", "--task", "sva:{files}/missing.json"], "the key 'patch_answer' is missing"),
        (["attribute", "{run}", "--task", "sva:{files}/broken.json"], "the key 'clean_answer' is None"),
        (["ablate", "{run}", "--task", "demo:simple"], "run `crosslens attribute"),
        (["{train}", "--dataset", "{files}/task.json", "--column", "txt"], "its columns are 'clean_prefix'"),
        (["{train}", "--n-tokens", "1000000"], "text.txt has only .* usable tokens"),
        (["{train}", "--context-size", "64"], r"context_size=64 is not in \[2, 32\]"),
    ],
)
def test_a_mistake_in_the_data_is_one_line_and_leaves_nothing(
    command: Command,
    trained: Path,
    tiny_snapshots: Path,
    files: Path,
    tmp_path: Path,
    arguments: list[str],
    told: str,
) -> None:
    new = tmp_path / "new"
    filled = [a.format(files=files, run=trained, train="{train}") for a in arguments]
    if filled[0] == "{train}":
        filled = [*map(str, train_arguments(tiny_snapshots, files, new)), *filled[1:]]
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    code, _, err = command(*filled)
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert re.search(told, err), err
    assert not new.exists()
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}


def test_train_shows_how_good_the_crosscoder_is(
    trained: Path,
    tiny_snapshots: Path,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A table, and warnings without the line of code that raised them; also when the run is finished."""
    monkeypatch.setattr("crosslens.training.progress.MIN_EXPLAINED_VARIANCE", 1.1)
    monkeypatch.setattr(sys, "argv", ["crosslens", *map(str, train_arguments(tiny_snapshots, files, trained))])
    with pytest.raises(SystemExit):
        cli.main()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    head = next(i for i, line in enumerate(lines) if line.split() == ["snapshot", "EV", "L0", "CE", "recovered"])
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["step0", "step10", "step20"]
    (warning,) = [line for line in lines if "warn" in line.lower()]
    assert warning.startswith("warning: the crosscoder explains less than 110% of the variance of step0 (")


def test_another_run_is_refused(command: Command, trained: Path, tiny_snapshots: Path, files: Path) -> None:
    before = (trained / "run.json").read_bytes()
    code, _, err = command(*train_arguments(tiny_snapshots, files, trained, "--lr", 0.01))
    assert code == 2
    assert "training.lr=0.0003, this run has training.lr=0.01" in err
    assert (trained / "run.json").read_bytes() == before


def test_a_corrupted_snapshot_is_named(command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path) -> None:
    copy = tmp_path / "snapshots"
    shutil.copytree(tiny_snapshots, copy)
    weights = copy / "step10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, _, err = command(*train_arguments(copy, files, tmp_path / "run"))
    assert code == 2
    assert "step10" in err and "model.safetensors" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_help_and_version_of_the_program() -> None:
    verbs = (
        "ls",
        "plan",
        "harvest",
        "train",
        "evolve",
        "attribute",
        "ablate",
        "status",
        "export",
        "diff",
        "remove",
        "label",
        "report",
        "push",
        "demo",
    )
    for option, told in (("--help", verbs), ("--version", ("crosslens 0.",))):
        out = subprocess.run([sys.executable, "-m", "crosslens", option], check=True, capture_output=True, text=True)
        assert all(word in out.stdout for word in told)


def test_every_public_name_exists() -> None:
    import crosslens

    for name in crosslens.__all__:
        assert getattr(crosslens, name) is not None
    with pytest.raises(AttributeError, match="attribute '?nothing"):
        _ = crosslens.nothing


def test_from_snapshots_to_a_report_in_one_command(
    command: Command, tiny_snapshots: Path, files: Path, tmp_path: Path
) -> None:
    """Repeated, it makes what is missing and nothing else."""
    run, config = tmp_path / "run", tmp_path / "run.toml"
    text = f"""
run_dir = "{run}"

[train]
snapshots = "{tiny_snapshots}"
hook = "{HOOK}"
dataset = "{files / "text.txt"}"
n_tokens = 2e3
context_size = 16
d_sae = 32
k = 4
batch-size = 128
seeds = 2

[study]
task = ["sva:{files / "task.json"}"]
ablate_k = [3]
keep_k = [0]
k = 3
n_draws = 1
n_draws_last = 2
n_exact = 3
n_validated = 3
n_bootstrap = 20
n_pairs = 3
n_read_out = 2
"""
    config.write_text(text)
    code, out, err = command("run", config)
    assert not code, err
    assert "task: " in out and "without the top 3 features" in out
    tables = {path.relative_to(run).as_posix(): path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    assert {"probe.parquet", "transfer/task.parquet", "validation/task.parquet", "accuracy.parquet"} <= {
        *tables, "validation/task.parquet"
    }  # fmt: skip
    assert (run / "report" / "index.html").is_file()
    recorded = RunDir.open(run).read_json()
    assert {"train", "evolve", "study", "report"} <= recorded["timings"].keys()
    assert {"train", "evolve", "study", "report"} == recorded["memory"].keys()
    assert all(2**27 < size < 2**34 for size in recorded["memory"].values()), "bytes, of Python with torch at least"
    (run / "timeline" / "task.parquet").unlink()
    (run / "report" / "index.html").unlink()
    code, _, err = command("run", config)
    assert not code, err
    again = {path.relative_to(run).as_posix(): path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    assert again.keys() == tables.keys() and (run / "report" / "index.html").is_file()
    assert [name for name in tables if again[name] != tables[name]] == ["timeline/task.parquet"]
    for wrong, message in (
        (text.replace("d_sae", "d_sea"), "'d_sea' in [train] is no option of `crosslens train`; did you mean 'd-sae'?"),
        (text.replace("[study]", "[stduy]"), "'stduy' is no table of a run"),
        (text.replace("run_dir", "run_dri", 1), "must begin with the run directory"),
        (text.replace("[study]\ntask", "[study]\n# task"), "[study]: --task is missing: A file with the columns"),
        (text.replace("task.json", "no.json"), "there is no file"),
        ("run_dir = 'a'", "has no table [train]"),
    ):
        config.write_text(wrong)
        code, _, err = command("run", config)
        assert code == 2 and message in err, (err, message)
