"""A run is continued with the options that it was begun with: all of them are compared, or decide nothing."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from crosslens.config import (
    CacheOptions,
    CrosscoderOptions,
    ModelOptions,
    SeedsOptions,
    SourceOptions,
    TrainingOptions,
    decisive,
)
from crosslens.errors import UserError
from crosslens.pipeline.training import train
from crosslens.rundir import RunDir

CLASSES = {
    "source": SourceOptions,
    "crosscoder": CrosscoderOptions,
    "training": TrainingOptions,
    "models": ModelOptions,
    "cache": CacheOptions,
    "seeds": SeedsOptions,
}
# values that differ from those of `begun`, and decide
OTHERS: dict[str, Any] = {
    "steps": "0,10", "hook": ("blocks.0.hook_resid_post",), "n_tokens": 900, "context_size": 8, "drop_positions": 1,
    "seed": 5, "d_sae": 24, "k": 3, "scale": "norm", "aux": 0.5, "topk_threshold_lr": 0.5,
    "lr": 1e-4, "training_tokens": 512, "batch_size": 64, "dead_tokens": 99, "lr_warm_up": 0.1, "lr_decay": 0.1,
    "lr_end_factor": 0.1, "max_grad_norm": 2.0, "precision": "bfloat16", "adam_moments": "bfloat16",
    "adam_beta1": 0.5, "adam_beta2": 0.5, "scale_tokens": 500,
    "dtype": "bfloat16", "backend": "hooked_transformer", "attention": "sdpa", "batch_tokens": 64,
    "cache_dtype": "int8",
}  # fmt: skip
# decided by their contents, which other tests change, or only together with another option
ELSEWHERE = {
    "snapshots": "test_collection, by fingerprint",
    "dataset": "below",
    "column": "changes the tokens where it changes anything",
    "sample_by": "changes the tokens where it changes anything",
    "split": "of datasets on the hub",
    "trust_remote_code": "test_remote_code",
    **dict.fromkeys(("keep_roles", "drop_roles"), "of conversations, test_chat"),
    "init_from": "test_another_start_is_refused",
    "recipe": "sets the options above",
    **dict.fromkeys(
        ("architecture", "k_start", "k_anneal", "sparsity", "sparsity_warm_up", "target_l0", "l0", "pre_act",
         "direct_thresholds", "l1", "l1_warm_up", "n_shared", "shared_penalty", "dedicated", "delta"),
        "fields of the architecture's config, all of which are compared",
    ),
}  # fmt: skip


Options = dict[str, Any]


@pytest.fixture(scope="module", params=["live", "cached"])
def begun(
    request: pytest.FixtureRequest, tiny_snapshots: Path, tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Options]:
    """A finished run, and its options."""
    folder = tmp_path_factory.mktemp("continuing")
    (folder / "text.txt").write_text("\n".join(tiny_text))
    options: Options = {
        "snapshots": str(tiny_snapshots), "hook": ("blocks.1.hook_resid_post",), "dataset": str(folder / "text.txt"),
        "n_tokens": 1000, "context_size": 16, "d_sae": 32, "k": 4, "batch_size": 128, "evaluate": False,
        "device": "cpu", "cache": folder / "cache" if request.param == "cached" else None,
    }  # fmt: skip
    train(RunDir(folder / "run"), **made(options))
    return RunDir(folder / "run"), options


def made(options: Options) -> dict[str, Any]:
    """The objects that have these options."""
    return {
        name: cls(**{key: value for key, value in options.items() if key in {each.name for each in fields(cls)}})
        for name, cls in CLASSES.items()
    }


def contents(run: RunDir) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_every_option_is_compared_or_decides_nothing(begun: tuple[RunDir, Options]):
    objects = made(begun[1]).values()
    free = {each.name for one in objects for each in fields(one)} - {key for one in objects for key in decisive(one)}
    every = [each.name for one in objects for each in fields(one)]
    assert sorted(every) == sorted([*OTHERS, *ELSEWHERE, *free])


@pytest.mark.parametrize("name", [*OTHERS])
def test_another_value_is_refused(begun: tuple[RunDir, Options], name: str):
    run, options = begun
    before = contents(run)
    if (name == "batch_tokens") == (options["cache"] is not None) and name in ("batch_tokens", "cache_dtype"):
        train(run, **made({**options, name: OTHERS[name]}))  # decides the order of live data, or that of a cache
        return
    with pytest.raises(UserError, match="belongs to another run: it has [^;]*; choose another directory"):
        train(run, **made({**options, name: OTHERS[name]}))
    assert contents(run) == before


def test_options_that_decide_nothing_may_change(begun: tuple[RunDir, Options]):
    run, options = begun
    free = {"n_checkpoints": 9, "evaluate": True, "wandb_log_frequency": 3, "wandb_eval_frequency": 4}
    train(run, **made({**options, **free}))


def test_another_text_of_the_same_name_is_refused(begun: tuple[RunDir, Options]):
    run, options = begun
    text = Path(options["dataset"])
    before = text.read_text()
    text.write_text(before.replace("king", "child"))
    try:
        with pytest.raises(UserError, match="belongs to another run: it has tokens_sha256="):
            train(run, **made(options))
    finally:
        text.write_text(before)


def test_a_run_of_version_0_2_is_continued_and_compared(begun: tuple[RunDir, Options]):
    run, options = begun
    recorded = run.read_json()
    earlier = {key: value for key, value in recorded["identity"].items() if key not in ("models", "cache_dtype")}
    run.write_json({**recorded, "identity": earlier})
    train(run, **made(options))
    with pytest.raises(UserError, match="it has models.dtype=float32, this run has models.dtype=bfloat16"):
        train(run, **made({**options, "dtype": "bfloat16"}))
    run.write_json(recorded)


def test_another_start_is_refused(begun: tuple[RunDir, Options], tmp_path: Path) -> None:
    run, options = begun
    started = {**options, "init_from": run.path, "d_sae": 40}
    found = train(RunDir(tmp_path / "run"), **made(started)).crosscoders[0]
    assert found.cfg.d_sae == 40
    assert str(RunDir(tmp_path / "run").read_json()["options"]["init_from"]) == str(run.path)
    train(RunDir(tmp_path / "run"), **made(started))  # is loaded
    with pytest.raises(UserError, match="belongs to another run: it has init_from="):
        train(RunDir(tmp_path / "run"), **made({**started, "init_from": None}))
    for wrong, told in (
        ({"seeds": 2}, "--seeds 2 differ in their first weights"),
        ({"init_from": tmp_path / "gone"}, "gone holds no crosscoder"),
        ({"d_sae": 8, "k": 4}, "d_sae=8 is less than the 32 features of init_from"),
    ):
        with pytest.raises(UserError, match=told):
            train(RunDir(tmp_path / "other"), **made({**started, **wrong}))
