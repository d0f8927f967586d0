"""What changes between two commands is refused: the models' config, tokenizer, text and tasks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crosslens.config import (
    AblateOptions,
    AttributeOptions,
    CrosscoderOptions,
    EvolveOptions,
    HarvestOptions,
    ModelOptions,
    SourceOptions,
    SteerOptions,
    TraceOptions,
    TrainingOptions,
)
from crosslens.errors import UserError
from crosslens.pipeline.evolving import evolve
from crosslens.pipeline.harvesting import harvest
from crosslens.pipeline.steering import steer
from crosslens.pipeline.studying import ablate, attribute
from crosslens.pipeline.tracing import trace
from crosslens.pipeline.training import train
from crosslens.rundir import RunDir
from tests.plain_model import ITEMS

CPU = ModelOptions(device="cpu")
# entries of config.json that change what the model computes, with the weights as they are
MENDED: dict[str, Callable[[dict[str, Any]], None]] = {
    "num_attention_heads": lambda config: config.update(num_attention_heads=4),
    "hidden_act": lambda config: config.update(hidden_act="relu"),
    "layer_norm_eps": lambda config: config.update(layer_norm_eps=0.1),
    "use_parallel_residual": lambda config: config.update(use_parallel_residual=False),
    "rope": lambda config: config.update(
        rotary_pct=1.0,
        **(
            {"rope_parameters": {**config["rope_parameters"], "partial_rotary_factor": 1.0, "rope_theta": 100.0}}
            if "rope_parameters" in config
            else {}
        ),
    ),
}


@pytest.fixture(scope="module")
def start(tiny_snapshots: Path, tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, text and tasks in a folder, which tests copy."""
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(tiny_snapshots, folder / "models")
    (folder / "text.txt").write_text("\n".join(tiny_text))
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    return folder


@pytest.fixture(scope="module", params=["cached", pytest.param("live", marks=pytest.mark.exhaustive)])
def trained(request: pytest.FixtureRequest, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "place"
    shutil.copytree(start, folder)
    if request.param == "cached":
        harvest(source(folder), HarvestOptions(cache=folder / "cache"), CPU)
    fit(folder)
    return folder


@pytest.fixture
def place(trained: Path) -> Any:
    """The folder of a trained run, whose inputs are restored afterwards."""
    kept = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.suffix != ".lock"}
    yield trained
    for path in trained.rglob("*"):
        if path.is_file() and path not in kept and path.suffix != ".lock":
            path.unlink()
    for path, contents in kept.items():
        if not path.is_file() or path.read_bytes() != contents:
            path.write_bytes(contents)


def source(folder: Path) -> SourceOptions:
    return SourceOptions(
        snapshots=str(folder / "models"), hook=("blocks.0.hook_resid_post",), dataset=str(folder / "text.txt"),
        n_tokens=1000, context_size=16,
    )  # fmt: skip


def fit(folder: Path) -> None:
    train(
        RunDir(folder / "run"), source(folder), CrosscoderOptions(d_sae=32, k=4),
        TrainingOptions(batch_size=128, lr=1e-2, evaluate=False), models=CPU,
        cache=HarvestOptions(cache=folder / "cache") if (folder / "cache").exists() else None,
    )  # fmt: skip


def effects(folder: Path, **others: Any) -> None:
    options = AttributeOptions(task=(str(folder / "task.jsonl"),), n_exact=0, **others)
    list(attribute(RunDir(folder / "run"), options, device="cpu"))


def mend(folder: Path, name: str) -> None:
    for path in (folder / "models").glob("*/config.json"):
        config = json.loads(path.read_text())
        MENDED[name](config)
        path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", MENDED)
def test_a_config_that_was_mended_is_another_model(place: Path, name: str):
    mend(place, name)
    commands: list[Callable[[], Any]] = [
        lambda: fit(place),
        lambda: evolve(RunDir(place / "run"), device="cpu"),
        lambda: effects(place),
    ]
    if (place / "cache").exists():
        commands.append(lambda: harvest(source(place), HarvestOptions(cache=place / "cache"), CPU))
    for command in commands:
        with pytest.raises(UserError, match=r"config|eps|rot") as caught:
            command()
        assert "\n" not in str(caught.value)


def test_records_of_version_0_2_hold_the_weights_alone_and_are_accepted(place: Path):
    manifest = place / "cache" / "manifest.json"
    if manifest.exists():
        contents = json.loads(manifest.read_text())
        del contents["config"], contents["checksum"]
        manifest.write_text(json.dumps(contents))
    run = RunDir(place / "run")
    recorded = run.read_json()
    for name in ("config", "tokenizer"):
        del recorded["identity"][name]
    run.write_json(recorded)
    config = json.loads((run.crosscoder / "cfg.json").read_text())
    for name in ("config", "tokenizer", "checksums"):
        del config["metadata"][name]
    (run.crosscoder / "cfg.json").write_text(json.dumps(config))
    fit(place)
    effects(place)


def change_text(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text(text.read_text().replace("king", "child"))


def change_tokenizer(folder: Path) -> None:
    path = folder / "models" / "tokenizer" / "tokenizer.json"
    contents = json.loads(path.read_text())
    vocabulary = contents["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize(("change", "what"), [(change_text, "dataset"), (change_tokenizer, "tokenizer")])
def test_changed_data_are_refused_or_recorded(place: Path, change: Callable[[Path], None], what: str):
    change(place)
    run = RunDir(place / "run")
    with pytest.raises(UserError, match=f"the {what} changed since .* was trained: .*--allow-changed-data"):
        evolve(run, device="cpu")
    with pytest.raises(UserError, match=f"the {what} changed since .* was trained: .*--allow-changed-data"):
        effects(place)
    assert not run.table_names()
    effects(place, allow_changed_data=True)
    assert run.made_with("attribution/task")["changed_data"] == [what]
    assert run.made_with("accuracy")["changed_data"] == [what]


def test_text_that_was_not_read_may_change(place: Path):
    text = place / "text.txt"
    text.write_text(text.read_text() + "\nthe king sees a fish near the house .")
    effects(place)
    assert "changed_data" not in RunDir(place / "run").made_with("attribution/task")


def test_a_cache_that_is_gone_is_told_and_recorded(place: Path, capsys: pytest.CaptureFixture[str]):
    run = RunDir(place / "run")
    cached = (place / "cache").exists()
    if cached:
        (place / "cache" / "manifest.json").unlink()
    effects(place)
    assert ("is gone, and the models run instead" in capsys.readouterr().err) == cached
    assert run.made_with("attribution/task")["activations"] == "live"


def test_a_table_names_what_it_was_made_with(place: Path):
    effects(place, seed=3)
    run = RunDir(place / "run")
    made = run.made_with("attribution/task")
    assert made["attribute"]["seed"] == 3 and made["attribute"]["method"] == "removal"
    assert made["split"]["seed"] == 3 and set(made["split"]) == {"seed", "items", "groups"}
    assert run.made_with("evaluation") == run.made_with("no such table") == {}


def steered(folder: Path, text: str, **others: Any) -> list[dict[str, Any]]:
    options = SteerOptions(feature=(1,), factor=2.0, length=6, loss_tokens=0, **others)
    return list(steer(RunDir(folder / "run"), [text], options, device="cpu"))


def test_what_steered_models_write_is_a_function_of_what_its_rows_name(place: Path):
    written = {}
    for seed in (0, 1, 2):
        (row,) = steered(place, "the cat", temperature=3.0, seed=seed)
        (again,) = steered(place, "the cat", temperature=3.0, seed=seed)
        assert again == row and (row["seed"], row["temperature"], row["length"]) == (seed, 3.0, 6)
        written[seed] = row["plain"]
    assert len(set(written.values())) > 1
    steered(place, "the dog")
    run = RunDir(place / "run")
    table: Any = run.table("steered")
    # the prompt of the earlier call was drawn with another seed than the table's last call
    assert table["text"].tolist() == ["the cat", "the dog"]
    assert table["seed"].tolist() == [2, 0] and table["temperature"].tolist() == [3.0, 0.0]
    assert [run.made_with("steered")["steer"]["seed"], *(
        made["steer"]["seed"] for made in run.made_with("steered")["earlier"])] == [0, 2]  # fmt: skip


def test_steered_rows_of_before_their_seeds_were_recorded_are_kept(place: Path):
    steered(place, "the cat")
    run = RunDir(place / "run")
    table: Any = run.table("steered")
    run.save_table("steered", table.drop(columns=["seed", "temperature", "length"]))
    steered(place, "the dog", seed=4)
    table = run.table("steered")
    assert table["text"].tolist() == ["the cat", "the dog"]
    assert table["seed"].isna().tolist() == [True, False] and table["seed"].iloc[1] == 4


@pytest.mark.parametrize("verb", ["trace", "steer", "accuracy"])
def test_rows_of_a_call_on_changed_data_keep_their_mark(place: Path, verb: str):
    kept = (place / "models" / "tokenizer" / "tokenizer.json").read_bytes()
    other = place / "other.jsonl"
    shutil.copy(place / "task.jsonl", other)
    run = RunDir(place / "run")

    def call(name: str, allow: bool) -> str:
        if verb == "trace":
            trace(run, [f"the {name}"], TraceOptions(answers="sees,likes", allow_changed_data=allow), device="cpu")
            return "trace_features"
        if verb == "steer":
            steered(place, f"the {name}", allow_changed_data=allow)
            return "steered"
        path = place / ("task.jsonl" if name == "cat" else "other.jsonl")
        options = AttributeOptions(task=(str(path),), n_exact=0, allow_changed_data=allow)
        list(attribute(run, options, device="cpu"))
        return "accuracy"

    change_tokenizer(place)
    table = call("cat", allow=True)
    assert run.made_with(table)["changed_data"] == ["tokenizer"] and "earlier" not in run.made_with(table)
    (place / "models" / "tokenizer" / "tokenizer.json").write_bytes(kept)
    for _ in range(2):  # a repetition adds nothing
        call("king", allow=False)
        made = run.made_with(table)
        assert "changed_data" not in made
        assert [one.get("changed_data") for one in made["earlier"]] == [["tokenizer"]]
    if verb == "accuracy":
        run.remove_task("other")
        assert ["tokenizer"] in [one.get("changed_data") for one in run.made_with(table)["earlier"]]
        effects(place)  # no row of before is left
        assert "earlier" not in run.made_with(table)


def test_tables_name_the_options_of_the_commands_that_they_rest_on(place: Path):
    run = RunDir(place / "run")
    evolve(run, EvolveOptions(seed=3, n_probes=2), device="cpu")
    trace(run, ["the cat"], device="cpu")
    assert run.made_with("trace_features")["evolved"]["evolve"]["seed"] == 3
    assert "trace" not in run.made_with("lifecycles")
    effects(place, seed=5, baseline="zero")
    assert run.made_with("attribution/task")["evolved"]["evolve"]["seed"] == 3
    list(ablate(run, AblateOptions(task=(str(place / "task.jsonl"),), k=(1,), n_draws=1, seed=5), device="cpu"))
    made = run.made_with("ablation/task")
    assert made["effects"]["baseline"] == "zero" and "attribute" not in made and "trace" not in made
