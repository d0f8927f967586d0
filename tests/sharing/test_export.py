"""A snapshot as a plain SAE: its fit against least squares, its calibration, its figures, and SAELens's own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, JumpReLUSAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.activations.tokens import Dataset
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.sharing.export import calibrate, export_sae, fit_encoder
from crosslens.snapshots.collection import Snapshots
from tests.intervention.test_view import make_crosscoder

F, S, D = 24, 3, 16


@pytest.fixture(scope="module")
def acts(tiny_snapshots: Path, tiny_text: list[str]) -> Activations:
    snapshots = Snapshots.local(tiny_snapshots)
    return Activations(snapshots, "blocks.1.hook_resid_post", Dataset(tiny_text, 3000, 16, 500))


@pytest.fixture(scope="module", params=["batchtopk_crosscoder", "jumprelu_crosscoder"])
def crosscoder(request: pytest.FixtureRequest, acts: Activations) -> Crosscoder:
    made = make_crosscoder(request.param)
    norms = torch.cat(list(acts.held_out())).norm(dim=-1).mean(0)
    made.activation_scale.copy_(D**0.5 / norms)
    return made


def rows(acts: Activations) -> Tensor:
    return torch.cat(list(acts.batches(500, epochs=1)))


def test_the_encoder_is_the_ridge_regression(crosscoder: Crosscoder, acts: Activations) -> None:
    x = rows(acts)
    h = crosscoder.hidden_pre(crosscoder.process_sae_in(x)).double().numpy()
    a = x[:, 1].double().numpy()
    for ridge in (0.0, 0.3):
        weight, bias = fit_encoder(crosscoder, iter(x.split(700)), 1, ridge)
        # as rows to the data: one of sqrt(penalty) for every input, whose target is 0
        centred = a - a.mean(0)
        penalty = ridge * np.mean(centred.var(0)) * len(a)
        stacked = np.vstack([centred, np.sqrt(penalty) * np.eye(D)])
        wanted = np.linalg.lstsq(stacked, np.vstack([h - h.mean(0), np.zeros((D, F))]), rcond=None)[0]
        np.testing.assert_allclose(weight.numpy(), wanted, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(bias.numpy(), h.mean(0) - a.mean(0) @ wanted, rtol=1e-6, atol=1e-8)


def test_features_are_as_frequent_and_as_large_as_the_crosscoders(crosscoder: Crosscoder, acts: Activations) -> None:
    x = rows(acts)
    weight, bias = fit_encoder(crosscoder, iter([x]), 2, 1e-6)
    threshold, gain = calibrate(crosscoder, iter(x.split(900)), 2, weight, bias)
    guess = (x[:, 2].double() @ weight + bias).float().double()
    value = crosscoder.snapshot_acts(crosscoder.encode(x), 2).double()
    for i in range(F):
        passed = torch.where(guess[:, i] > threshold[i], guess[:, i], 0.0)
        wanted, found = int((value[:, i] != 0).sum()), int((passed != 0).sum())
        assert threshold[i] >= 0
        if threshold[i] > 0:  # between two estimates, or equal to some that are equal
            assert found <= wanted <= int((guess[:, i] >= threshold[i]).sum())
            around = guess[:, i].sort(descending=True).values[max(wanted - 1, 0) : wanted + 1]
            assert not 0 < wanted < len(x) or float(threshold[i]) == pytest.approx(float(around.mean()), rel=1e-5)
        else:  # an estimate that is not positive cannot be active
            assert found <= wanted
        if found:
            best = np.linalg.lstsq(passed[:, None].numpy(), value[:, i].numpy(), rcond=None)[0][0]
            assert float(gain[i]) == pytest.approx(best if best > 0 else 1.0, rel=1e-4)


def test_what_is_exported_is_a_plain_sae_that_says_how_good_it_is(
    crosscoder: Crosscoder, acts: Activations, tmp_path: Path
) -> None:
    sae = export_sae(crosscoder, acts, "2")  # the label of the last
    sae.save_model(tmp_path)
    loaded: Any = SAE.load_from_disk(tmp_path)
    assert type(loaded) is JumpReLUSAE and loaded.cfg.d_in == D and loaded.cfg.d_sae == F
    metadata = loaded.cfg.metadata
    assert metadata.snapshot == "2" and metadata.hook_name == "blocks.1.hook_resid_post"

    x = torch.cat(list(acts.held_out()))
    a, value = x[:, 2].double(), crosscoder.snapshot_acts(crosscoder.encode(x), 2).double()
    guess = loaded.encode(x[:, 2]).detach().double()
    variance = (a - a.mean(0)).square().sum()
    assert metadata.explained_variance == pytest.approx(
        1 - float((a - loaded.decode(guess.float()).detach()).square().sum() / variance), abs=1e-4
    )
    own = crosscoder.decode_snapshot(value.float(), 2)
    assert metadata.crosscoder_explained_variance == pytest.approx(
        1 - float((a - own).square().sum() / variance), abs=1e-4
    )
    assert metadata.l0 == pytest.approx(float((guess != 0).double().sum(-1).mean()))
    assert metadata.crosscoder_l0 == pytest.approx(float((value != 0).double().sum(-1).mean()))
    scores = []
    for i in range(F):
        here, there = value[:, i] != 0, guess[:, i] != 0
        if not here.any():
            assert metadata.feature_f1[i] is None
            continue
        hits = int((here & there).sum())
        scores.append(2 * hits / (2 * hits + int((here & ~there).sum()) + int((there & ~here).sum())))
        assert metadata.feature_f1[i] == pytest.approx(scores[-1], abs=1e-4)
        if metadata.feature_correlation[i] is not None:
            assert metadata.feature_correlation[i] == pytest.approx(
                np.corrcoef(value[:, i], guess[:, i])[0, 1], abs=1e-3
            )
    assert metadata.feature_agreement == pytest.approx(np.mean(scores), abs=1e-4) and metadata.feature_agreement > 0.5
    assert f"{metadata.explained_variance:.3f} of the variance" in metadata.approximation

    # it attaches as any SAE does
    model: Any = SAETransformerBridge.boot_transformers(acts.snapshots[2].name, device="cpu")
    tokens = acts.held_out_tokens()[:2].long()
    with model.saes(saes=[loaded], use_error_term=True):
        torch.testing.assert_close(model(tokens), model.original_model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_snapshot_that_decides_alone_is_exported_exactly(acts: Activations) -> None:
    """Where the encoder reads one snapshot only, regression on that snapshot loses nothing."""
    crosscoder = make_crosscoder("standard_crosscoder")
    crosscoder.W_enc_by_snapshot[[0, 2]] = 0
    metadata = export_sae(crosscoder, acts, 1, ridge=0).cfg.metadata
    assert metadata.feature_agreement > 0.99
    assert metadata.explained_variance == pytest.approx(metadata.crosscoder_explained_variance, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snapshot": 3}, r"snapshot 3 is not in \[-3, 2\]: there are 3 snapshots"),
        ({"snapshot": "step600"}, "no snapshot has the label 'step600': there are 3 snapshots, 0, 1, 2"),
        ({"n_tokens": 10}, "n_tokens=10 must be more than d_model=16"),
        ({"ridge": -1.0}, "ridge=-1.0 must be a finite number"),
    ],
)
def test_mistakes(acts: Activations, options: dict[str, Any], message: str) -> None:
    crosscoder = make_crosscoder("standard_crosscoder")
    with pytest.raises(UserError, match=message):
        export_sae(crosscoder, acts, **{"snapshot": 0, **options})
    with pytest.raises(UserError, match="activations of 2 snapshots of width 16 do not fit this crosscoder"):
        export_sae(crosscoder, Activations(acts.snapshots[:2], acts.hook_name, acts.dataset.source, 500, 16), 0)
