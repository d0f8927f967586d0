"""Shared and dedicated features: their constraints, gradients, penalties and training, for every architecture."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import crosslens as cl
from crosslens.activations import Activations
from crosslens.crosscoders import TRAINING_ARCHITECTURES, Crosscoder, CrosscoderTrainingSAE
from crosslens.crosscoders.partition import feature_parts
from crosslens.errors import UserError
from crosslens.training.trainer import CrosscoderTrainer
from tests.crosscoders.reference import KNOWN, dense_forward_pass
from tests.crosscoders.test_crosscoders import CONFIGS, EXTRAS, D, F, close, raw, step_input

SHARED = 3
DEDICATED = {"1": 2, "0+2": 1}
"""Features 3 and 4 are of the second snapshot, feature 5 of the first and the third."""
ABSENT = {3: [0, 2], 4: [0, 2], 5: [1]}


def make(architecture: str, seed: int = 0, **options: Any) -> CrosscoderTrainingSAE:
    torch.manual_seed(seed)
    of_all = {"d_in": 3 * D, "d_sae": F, "n_snapshots": 3, "dtype": "float64", "decoder_init_norm": 1.0}
    part = {"n_shared": SHARED, "dedicated": DEDICATED}
    config = CONFIGS[architecture](**{**of_all, **EXTRAS.get(architecture, {}), **part, **options})
    return TRAINING_ARCHITECTURES[architecture][0](config)


def rows(sae: CrosscoderTrainingSAE) -> tuple[Tensor, Tensor]:
    """Decoder and encoder (F, S, D)."""
    return sae.W_dec.detach().unflatten(1, (3, D)), sae.W_enc.detach().T.unflatten(1, (3, D))


def assert_constrained(sae: CrosscoderTrainingSAE) -> None:
    decoder, encoder = rows(sae)
    for s in (1, 2):
        assert torch.equal(decoder[:SHARED, s], decoder[:SHARED, 0])
    for feature in range(F):
        zero = [s for s in range(3) if not decoder[feature, s].any()]
        assert zero == ABSENT.get(feature, []), feature
        assert zero == [s for s in range(3) if not encoder[feature, s].any()], feature
        assert feature < SHARED or feature in ABSENT or not torch.equal(decoder[feature, 0], decoder[feature, 1])


@pytest.mark.parametrize("architecture", KNOWN)
def test_gradients_are_those_of_fewer_parameters(architecture: str):
    """The losses as functions of one row per shared feature, and of the rows that are not zero, by plain autograd."""
    for seed in range(3):
        sae = make(architecture, seed, decoder_init="independent", shared_penalty=0.5, delta_coefficient=0.3)
        x = raw(3, seed)
        assert_constrained(sae)
        sae.training_forward_pass(step_input(x)).loss.backward()
        sae.constrain_gradients_()
        assert sae.W_dec.grad is not None and sae.W_enc.grad is not None
        of_decoder = sae.W_dec.grad.unflatten(1, (3, D)).clone()
        of_encoder = sae.W_enc.grad.T.unflatten(1, (3, D)).clone()

        decoder, encoder = (part.clone() for part in rows(sae))
        shared = decoder[:SHARED, 0].clone().requires_grad_()
        kept = torch.ones(F, 3, 1, dtype=torch.float64)
        for feature, absent in ABSENT.items():
            kept[feature, absent] = 0
        free_decoder, free_encoder = decoder.clone().requires_grad_(), encoder.clone().requires_grad_()
        whole = torch.cat([shared[:, None].expand(-1, 3, -1), (free_decoder * kept)[SHARED:]])
        built = {"W_dec": whole.flatten(1), "W_enc": (free_encoder * kept).flatten(1).T}
        of = torch.func.functional_call(Reference(sae), {f"sae.{name}": each for name, each in built.items()}, (x,))
        of.backward()
        assert shared.grad is not None and free_decoder.grad is not None and free_encoder.grad is not None
        for s in range(3):
            close(3 * of_decoder[:SHARED, s], shared.grad, "shared rows")
        close(of_decoder[SHARED:], free_decoder.grad[SHARED:], "other rows")
        close(of_encoder, free_encoder.grad, "encoder")


class Reference(torch.nn.Module):
    """The loss of a step in plain autograd."""

    def __init__(self, sae: CrosscoderTrainingSAE) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        """Loss of raw activations `x`."""
        return dense_forward_pass(self.sae, step_input(x)).loss


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", KNOWN)
def test_rows_stay_tied_and_zero(architecture: str, moments: Any):
    """Bit for bit over 200 steps, some with dead features, with both kinds of moments."""
    sae = make(architecture, dtype="float32")
    before = sae.W_dec.detach().clone()
    config = cl.TrainConfig(batch_size=16, lr=1e-2, dead_tokens=64, adam_moments=moments, device="cpu")
    batches = (raw(3, seed, n=16).float() for seed in range(200))
    trainer = CrosscoderTrainer(config, sae, batches, total=200 * 16)
    for step in range(200):
        trainer.step(next(trainer.data_provider))
        if step % 20 == 19:
            assert_constrained(sae)
    moved = (sae.W_dec.detach() - before).abs().amax(1)
    assert bool((moved > 1e-3).all())


@pytest.mark.parametrize("architecture", [name for name in KNOWN if "topk" in name])
def test_scores_of_shared_features_are_divided_by_their_penalty(architecture: str):
    sae: Any = make(architecture, shared_penalty=0.25)
    h = sae.hidden_pre(sae.process_sae_in(raw(3)))
    factors = torch.tensor([0.25] * SHARED + [1.0] * (F - SHARED), dtype=torch.float64)
    wanted = h.relu() * sae.decoder_norms.sum(-1) / factors
    close(sae.scores(h), wanted, "scores")
    for crosscoder in (sae.to_inference(), sae):  # the shares of the penalty go with the weights
        close(crosscoder.scores(h), wanted, "scores")
    plain: Any = make(architecture)
    plain.load_state_dict(sae.state_dict())
    more, fewer = (each.train().training_gate(h).count_nonzero(0)[:SHARED].sum() for each in (sae, plain))
    assert more > fewer


def test_what_is_saved_and_loaded_has_its_partition(tmp_path: Path):
    sae = make("batchtopk_crosscoder", dtype="float32", shared_penalty=0.5)
    loaded = cl.load(sae.save(tmp_path), device="cpu")
    assert (loaded.cfg.n_shared, loaded.cfg.shared_penalty, loaded.cfg.dedicated) == (SHARED, 0.5, DEDICATED)
    x = raw(3)
    close(loaded.encode(x), sae.eval().encode(x), "features", rtol=0, atol=0)
    cfg = loaded.cfg
    found = feature_parts(cfg.n_shared, cfg.dedicated, cfg.d_sae)
    assert found == ["shared"] * 3 + ["1"] * 2 + ["0+2"] + ["free"] * (F - 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_shared": -1}, "n_shared=-1 must be 0 or more"),
        ({"n_shared": 10}, "make 13 features, more than d_sae=12"),
        ({"dedicated": {"1": 0}}, "must be 1 or more"),
        ({"dedicated": {"3": 1}}, "'3', which is none of 0, 1, 2"),
        ({"dedicated": {"0+1+2": 1}}, "for all snapshots"),
        ({"n_shared": 0, "shared_penalty": 0.5}, "needs n_shared"),
        ({"shared_penalty": 0.0}, "shared_penalty=0.0 must be positive"),
        ({"delta_coefficient": -1.0}, "delta_coefficient=-1 must be 0 or more"),
    ],
)
def test_partitions_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        make("batchtopk_crosscoder", **options)


@pytest.fixture(scope="module")
def partitioned(acts: Activations) -> Crosscoder:
    """A crosscoder of the tiny models with shared and dedicated features."""
    architecture = cl.BatchTopKCrosscoderTrainingConfig(
        d_sae=32, k=4, n_shared=8, dedicated={acts.snapshots.labels[1]: 4}, shared_penalty=0.8
    )
    config = cl.TrainConfig(batch_size=64, training_tokens=64 * 40, lr=3e-3, dead_tokens=500, evaluate=False)
    return cl.train(acts, architecture, config)


def test_evolve_has_no_reading_by_norms_of_what_training_set(acts: Activations, partitioned: Crosscoder):
    """Decoder norms and directions of shared and dedicated features are no findings; R2 is read of all."""
    evolution = cl.evolve(partitioned, acts)
    norm, r2 = evolution.lifecycles("norm"), evolution.lifecycles("r2")
    label = acts.snapshots.labels[1]
    assert norm["part"].tolist() == ["shared"] * 8 + [label] * 4 + ["free"] * 20
    free = (norm["part"] == "free").to_numpy()
    assert norm.loc[~free, "origin"].isna().all() and norm.loc[free & norm["alive"], "origin"].notna().all()
    assert r2.loc[~free & r2["alive"], "origin"].notna().any()
    tables = evolution.tables()
    every = evolve_all_free(partitioned, acts)
    assert int(tables["rotation"]["n"].max()) < int(every["rotation"]["n"].max())
    assert "part" not in every["lifecycles"]


def evolve_all_free(crosscoder: Crosscoder, acts: Activations) -> dict[str, Any]:
    """The tables of the same weights, as if nothing had been constrained."""
    free = copy.deepcopy(crosscoder)
    free.cfg = dataclasses.replace(crosscoder.cfg, n_shared=0, dedicated={}, shared_penalty=None)
    return cl.evolve(free, acts).tables()


def test_a_partition_is_continued_and_another_one_refused(acts: Activations, partitioned: Crosscoder):
    """On the last two snapshots' features nothing is added; the new first snapshot starts with its zero rows."""
    config = cl.TrainConfig(batch_size=64, training_tokens=64 * 5, lr=3e-3, evaluate=False)
    same = {"n_shared": 8, "dedicated": dict(partitioned.cfg.dedicated), "shared_penalty": 0.8}
    more = cl.train(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=40, k=4, **same), config, init_from=partitioned)
    decoder = more.W_dec_by_snapshot
    assert torch.equal(decoder[:8, 0], decoder[:8, 1])
    assert not decoder[8:12, 0].any() and decoder[8:12, 1].any() and decoder[12:, 0].any()
    with pytest.raises(UserError, match="init_from has n_shared=8, this training n_shared=0"):
        cl.train(acts, cl.BatchTopKCrosscoderTrainingConfig(d_sae=40, k=4), config, init_from=partitioned)
