"""`benchmarks/english` at toy size: pretraining, files of tasks, the study, the summary."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crosslens.cli.config_file import parse_toml
from crosslens.errors import UserError

ROOT = Path(__file__).parent.parent
NOUNS = shlex.split("dog cat bird king boy girl car boat doctor friend queen horse")
VERBS = (("runs", "run"), ("sees", "see"), ("sings", "sing"))
NEAR = ("near", "behind")


def command(*arguments: str | Path) -> str:
    """Run a program of the repository, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def sentence(rng: random.Random) -> str:
    many, verb = rng.randrange(2), rng.choice(VERBS)
    between = f" {rng.choice(NEAR)} the {rng.choice(NOUNS)}" if rng.random() < 0.3 else ""
    return f"the {rng.choice(NOUNS)}{'s' * many}{between} {verb[many]} ."


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def agreement(between: str = "") -> list[dict[str, Any]]:
    """Items in the format of feature-circuits."""
    return [
        {"clean_prefix": f"the {noun}s{between}", "patch_prefix": f"the {noun}{between}", "clean_answer": f" {many}",
         "patch_answer": f" {one}"}
        for noun in NOUNS for one, many in VERBS
    ]  # fmt: skip


def paradigm() -> list[dict[str, Any]]:
    """Pairs of sentences in the format of BLiMP."""
    return [
        {"sentence_good": f"the {noun}s {many} .", "sentence_bad": f"the {noun}s {one} .", "one_prefix_method": True}
        for noun in NOUNS for one, many in VERBS
    ]  # fmt: skip


def test_the_page_says_what_the_summary_has() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks" / "english"))
    import page  # pyright: ignore[reportMissingImports]
    from summary import CLAIMS  # pyright: ignore[reportMissingImports]

    summary = json.loads((page.FOLDER / "summary.json").read_text())
    claims, verdicts = summary["study"]["claims"], dict(parse_toml(page.FOLDER / "verdicts.toml"))
    rows = page.render(claims, verdicts)
    assert rows in page.PAGE.read_text(), "run benchmarks/english/page.py"
    assert claims.keys() == CLAIMS.keys() and len(verdicts) >= 15
    borne_out = [name for name, each in verdicts.items() if each["verdict"] in ("replicated", "in part")]
    for name in borne_out:
        shown = [reading for reading in claims[name]["readings"] if reading["what"] in verdicts[name]["show"]]
        assert any(reading["null"] is not None or reading["low"] is not None for reading in shown), name
    wrong = {**verdicts, "births": {"verdict": "replicated", "show": ["births of unicorns"]}}
    with pytest.raises(UserError, match="births has no reading 'births of unicorns'"):
        page.render(claims, wrong)


@pytest.mark.exhaustive
def test_the_study_runs_as_its_page_says(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks" / "english"))
    from prepare import PARADIGMS, WHOLE  # pyright: ignore[reportMissingImports]

    rng = random.Random(0)
    text, blimp, snapshots = tmp_path / "text.txt", tmp_path / "blimp", tmp_path / "seed0"
    text.write_text("\n\n".join("\n".join(sentence(rng) for _ in range(8)) for _ in range(1_500)))
    blimp.mkdir()
    for name in (*PARADIGMS, *WHOLE):
        write_rows(blimp / f"{name}.jsonl", paradigm())
    for name, rows in {"simple": agreement(), "nounpp": agreement(" near the cat"), "ioi": agreement()}.items():
        write_rows(tmp_path / f"{name}.json", rows)

    toy = shlex.split(
        "--layers 2 --d-model 32 --heads 2 --vocab-size 320 --context-size 32 --batch-size 16 --eval-rows 16 "
        "--steps 200 --snapshots log:8"
    )
    command("scripts/pretrain_english.py", "--text", text, "--out", snapshots, *toy)
    data = tmp_path / "data"
    files = [argument for name in ("simple", "nounpp", "ioi") for argument in (f"--{name}", tmp_path / f"{name}.json")]
    command(
        "benchmarks/english/prepare.py",
        "--text",
        text,
        "--blimp",
        blimp,
        *files,
        "--snapshots",
        snapshots,
        "--out",
        data,
    )

    config = dict(parse_toml(ROOT / "benchmarks" / "english" / "english.toml"))
    sweep = parse_toml(ROOT / "benchmarks" / "english" / "sweep.toml")
    data_options = ("snapshots", "steps", "hook", "dataset", "sample_by", "context_size", "n_tokens", "cache")
    assert all(sweep[name] == config["train"][name] for name in data_options), "the sweep reads the same activations"
    assert len(config["train"]["steps"].split(",")) >= 16 and config["train"]["d_sae"] >= 4096
    tasks = [task.replace("runs/english/data", str(data)) for task in config["study"]["task"]]
    assert all(Path(task.rpartition(":")[2]).is_file() for task in tasks)
    steps = json.loads((snapshots / "snapshots.json").read_text())["snapshots"]
    small: dict[str, Any] = {
        "train": config["train"] | {
            "snapshots": str(snapshots), "steps": ",".join(str(row["step"]) for row in steps[3:]), "d_sae": 64, "k": 8,
            "hook": "blocks.0.hook_resid_post", "dataset": str(data / "prose.txt"), "cache": str(tmp_path / "cache"),
            "context_size": 32, "n_tokens": 6_000, "training_tokens": 18_000, "batch_size": 256, "dead_tokens": 2_000,
            "seeds": 2,
        },
        "evolve": {"n_probes": 3},
        "study": {"task": [task for task in tasks if "simple" in task or "induction" in task or "adjective_1" in task],
                  "n_draws": 2, "n_draws_last": 3, "n_exact": 5, "n_validated": 5, "n_bootstrap": 20, "n_pairs": 5},
        "label": config["label"],
        "report": config["report"],
    }  # fmt: skip
    lines = [f'run_dir = "{tmp_path / "run"}"']
    for verb, options in small.items():
        lines += [f"[{verb}]", *(f"{name} = {json.dumps(value)}" for name, value in options.items())]
    (tmp_path / "toy.toml").write_text("\n".join(lines))
    command("-m", "crosslens", "run", tmp_path / "toy.toml")
    accuracy = command("-m", "crosslens", "accuracy", "--snapshots", snapshots, "--task", tasks[0], "--json")
    (tmp_path / "accuracy.json").write_text(accuracy)

    command(
        "benchmarks/english/summary.py", tmp_path / "run", "--pretraining", snapshots / "pretraining.json",
        "--accuracy", tmp_path / "accuracy.json", "--out", tmp_path / "summary.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "summary.json").read_text())
    claims = found["run"]["claims"]
    without = {"complexity", "dates_of_births"}  # a language model rates the one, and nothing is born here
    assert {name for name, claim in claims.items() if "missing" in claim} == {"complexity"}
    assert len(claims) >= 15 and all(claim["readings"] for name, claim in claims.items() if name not in without)
    for claim in claims.values():
        for reading in claim.get("readings", ()):
            assert None in (reading["low"], reading["high"]) or reading["low"] <= reading["high"], reading
    assert found["pretraining"]["curve"][-1]["held_out"] < found["pretraining"]["curve"][0]["held_out"] - 2
    assert [row["accuracy"] for row in found["accuracy"]["tasks"]["simple"]][-1] > 0.5
