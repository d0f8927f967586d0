"""A training that starts from another crosscoder: at its function, with more snapshots, with more features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import (
    BatchTopKCrosscoderTrainingConfig,
    Crosscoder,
    CrosscoderTrainingConfig,
    JumpReLUCrosscoderTrainingConfig,
    StandardCrosscoderTrainingConfig,
    TopKCrosscoderTrainingConfig,
)
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.training.config import TrainConfig
from crosslens.training.initialisation import initialise
from crosslens.training.run import complete, train

ALL: dict[str, Callable[..., CrosscoderTrainingConfig]] = {
    "standard": lambda **options: StandardCrosscoderTrainingConfig(**{"d_sae": 32, "l1_coefficient": 0.5, **options}),
    "topk": lambda **options: TopKCrosscoderTrainingConfig(**{"d_sae": 32, "k": 4, **options}),
    "batchtopk": lambda **options: BatchTopKCrosscoderTrainingConfig(**{"d_sae": 32, "k": 4, **options}),
    "jumprelu": lambda **options: JumpReLUCrosscoderTrainingConfig(**{"d_sae": 32, **options}),
}


def config(**options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "batch_size": 64, "training_tokens": 64 * 40, "lr": 3e-3, "scale_tokens": 500, "evaluate": False,
        "device": "cpu", "dead_tokens": 500,
    }  # fmt: skip
    return TrainConfig(**{**defaults, **options})


@pytest.fixture(scope="module")
def pair(tiny_snapshots: Path, tiny_text: list[str]) -> Activations:
    """Two of the three snapshots, the same tokens."""
    snaps = Snapshots.local(tiny_snapshots)[[0, 2]]
    return Activations(snaps, "blocks.1.hook_resid_post", Dataset(tiny_text, 1000, 16, 200))


@pytest.fixture(scope="module")
def trained(pair: Activations) -> dict[str, Crosscoder]:
    return {name: train(pair, make(), config()) for name, make in ALL.items()}


def started(source: Crosscoder, acts: Activations, architecture: CrosscoderTrainingConfig) -> Crosscoder:
    """What a training from `source` begins with, gated as at inference."""
    whole = complete(architecture, acts, "cpu")
    return initialise(whole, acts, batch_size=64, scale_tokens=500, seed=0, source=source).to_inference()


def held_out(acts: Activations) -> Tensor:
    return torch.cat(list(acts.held_out(256)))


def explained(crosscoder: Crosscoder, x: Tensor) -> Tensor:
    """EV of every snapshot, plainly."""
    error = (crosscoder.decode(crosscoder.encode(x)) - x).square().sum((0, 2))
    return 1 - error / (x - x.mean(0)).square().sum((0, 2))


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_it_starts_as_the_function_that_it_continues(
    name: str, moves: bool, pair: Activations, trained: dict[str, Crosscoder]
) -> None:
    source, x = trained[name], held_out(pair)
    again = started(source, pair, ALL[name](apply_b_dec_to_input=moves))
    assert again.cfg.apply_b_dec_to_input == moves and source.cfg.apply_b_dec_to_input
    torch.testing.assert_close(again.encode(x), source.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.decode(again.encode(x)), source.decode(source.encode(x)), rtol=1e-4, atol=1e-5)


def test_thresholds_go_on_directly(pair: Activations, trained: dict[str, Crosscoder]) -> None:
    source, x = trained["jumprelu"], held_out(pair)
    again = started(source, pair, ALL["jumprelu"](direct_thresholds=True))
    torch.testing.assert_close(again.encode(x), source.encode(x), rtol=1e-4, atol=1e-5)
    done = train(pair, ALL["jumprelu"](direct_thresholds=True), config(training_tokens=64 * 5), init_from=source)
    assert not torch.equal(done.state_dict()["log_threshold"], source.state_dict()["log_threshold"])


def test_a_crosscoder_without_the_deviation_is_continued_with_it(pair: Activations) -> None:
    source = train(pair, ALL["batchtopk"](apply_b_dec_to_input=False), config())
    x = held_out(pair)
    again = started(source, pair, ALL["batchtopk"]())
    torch.testing.assert_close(again.encode(x), source.encode(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_a_new_snapshot_starts_from_the_nearest(
    name: str, acts: Activations, pair: Activations, trained: dict[str, Crosscoder]
) -> None:
    source = trained[name]
    again = started(source, acts, ALL[name]())
    assert again.cfg.snapshot_labels == ["step0", "step10", "step20"]
    # step10 is as far from step0 as from step20; the first counts
    assert torch.equal(again.W_dec_by_snapshot[:, 1], source.W_dec_by_snapshot[:, 0])
    assert torch.equal(again.W_dec_by_snapshot[:, [0, 2]], source.W_dec_by_snapshot)
    encoder, before = again.W_enc.unflatten(0, (3, -1)), source.W_enc.unflatten(0, (2, -1))
    torch.testing.assert_close(encoder[0] + encoder[1], before[0])
    torch.testing.assert_close(encoder[2], before[1])
    # where the new snapshot is a copy of the nearest, every feature has the value that it had
    x = held_out(pair)
    ratio = again.activation_scale[1] / again.activation_scale[0]
    shift = again.b_dec_by_snapshot[1] - again.b_dec_by_snapshot[0]
    copied = (x[:, 0] * again.activation_scale[0] + shift) / again.activation_scale[1]
    torch.testing.assert_close(
        again.hidden_pre(again.process_sae_in(torch.stack([x[:, 0], copied, x[:, 1]], 1))),
        source.hidden_pre(source.process_sae_in(x)),
        rtol=1e-4,
        atol=1e-5,
    )
    assert ratio > 0


def test_more_features(pair: Activations, trained: dict[str, Crosscoder]) -> None:
    source, x = trained["batchtopk"], held_out(pair)
    again = started(source, pair, ALL["batchtopk"](d_sae=48, decoder_init_norm=None))
    assert torch.equal(again.W_dec[:32], source.W_dec) and again.decoder_norms[32:].amax() < 0.11
    torch.testing.assert_close(again.encode(x)[:, :32], source.encode(x), rtol=1e-4, atol=1e-5)
    assert float((explained(again, x) - explained(source, x)).abs().max()) < 0.02


def test_training_goes_on_from_there(acts: Activations, trained: dict[str, Crosscoder], tmp_path: Path) -> None:
    source, x = trained["batchtopk"], held_out(acts)
    few = config(training_tokens=64 * 10)
    place = source.save(tmp_path / "source")
    continued = train(acts, ALL["batchtopk"](), dataclasses.replace(few, run_dir=tmp_path / "run"), init_from=place)
    scratch = train(acts, ALL["batchtopk"](), few)
    assert float(explained(continued, x).min()) > float(explained(scratch, x).min()) + 0.05
    # the run directory is that of this source
    other = trained["standard"]
    with pytest.raises(UserError, match="init_from"):
        train(acts, ALL["batchtopk"](), dataclasses.replace(few, run_dir=tmp_path / "run"), init_from=other)
    with pytest.raises(UserError, match="init_from"):
        train(acts, ALL["batchtopk"](), dataclasses.replace(few, run_dir=tmp_path / "run"))
    # a run directory is a source, too
    train(acts, ALL["batchtopk"](), few, init_from=tmp_path / "run")


def test_what_cannot_be_continued(
    pair: Activations, trained: dict[str, Crosscoder], tiny_snapshots: Path, tiny_text: list[str]
) -> None:
    source = trained["batchtopk"]
    with pytest.raises(UserError, match=r"d_sae=16 is less than the 32 features of init_from"):
        train(pair, ALL["batchtopk"](d_sae=16), config(), init_from=source)
    elsewhere = Activations(pair.snapshots, "blocks.0.hook_resid_post", Dataset(tiny_text, 1000, 16, 200))
    with pytest.raises(UserError, match=r"trained at blocks.1.hook_resid_post, the activations are of blocks.0"):
        train(elsewhere, ALL["batchtopk"](), config(), init_from=source)
    fewer = Activations(
        Snapshots.local(tiny_snapshots)[[1, 2]], "blocks.1.hook_resid_post", Dataset(tiny_text, 1000, 16, 200)
    )
    with pytest.raises(UserError, match=r"init_from has the snapshots step0, which the activations lack"):
        train(fewer, ALL["batchtopk"](), config(), init_from=source)
    with pytest.raises(UserError, match="holds no crosscoder"):
        train(pair, ALL["batchtopk"](), config(), init_from="nowhere")


def test_snapshots_without_a_common_label_are_matched_by_position(
    pair: Activations, trained: dict[str, Crosscoder]
) -> None:
    source = trained["batchtopk"]
    rows = source.cfg.metadata.snapshots
    try:
        source.cfg.metadata.snapshots = [{**row, "label": str(i)} for i, row in enumerate(rows)]
        x = held_out(pair)
        torch.testing.assert_close(
            started(source, pair, ALL["batchtopk"]()).encode(x), source.encode(x), rtol=1e-4, atol=1e-5
        )
    finally:
        source.cfg.metadata.snapshots = rows
