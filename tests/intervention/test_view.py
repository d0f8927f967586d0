"""A snapshot's view attached with SAELens's own bridge, against our splices and the clean model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from torch import Tensor

from crosslens import crosscoders
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.splice import CleanRun, Edit, Splice
from crosslens.intervention.view import snapshot_view
from crosslens.snapshots.collection import Snapshots
from tests.plain_model import F, draw_crosscoder

S, D = 3, 16


def make_crosscoder(architecture: str, hook_name: str = "blocks.1.hook_resid_post") -> Crosscoder:
    sae = draw_crosscoder(architecture, S, D)
    sae.cfg.metadata.hook_name = hook_name
    return sae.to_inference()


@pytest.fixture(scope="module")
def tokens(snaps: Snapshots) -> Tensor:
    texts = ["the cat near the house", "a child finds the fish"]
    return torch.tensor([[0, *snaps.tokenizer(text)["input_ids"]] for text in texts])


@pytest.fixture(scope="module")
def model(snaps: Snapshots) -> SAETransformerBridge:
    return SAETransformerBridge.boot_transformers(snaps[2].name, device="cpu")


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("architecture", crosscoders.ARCHITECTURES)
def test_the_view_in_saelens_equals_our_splice(
    snaps: Snapshots, tokens: Tensor, model: SAETransformerBridge, architecture: str, whole: bool
) -> None:
    """`whole`: features of every position are given; otherwise a clean run, which leaves out the BOS."""
    cc = make_crosscoder(architecture)
    cc.cfg.metadata.keep_special = whole
    run = CleanRun.of(cc, snaps, tokens)
    view = snapshot_view(cc, 2, run.features if whole else run)
    assert isinstance(view, SAE) and run.keep.all() == whole
    clean = model(tokens)
    with model.saes(saes=[view], use_error_term=True):
        torch.testing.assert_close(model(tokens), clean, atol=1e-5, rtol=0)
    alone = Splice(cc, run, 2, error=False).logits(snaps.model(2))
    assert (alone - clean).abs().max() > 0.1
    with model.saes(saes=view):
        torch.testing.assert_close(model(tokens), alone, atol=1e-5, rtol=0)
        logits, cache = model.run_with_cache(tokens)
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)
        assert torch.equal(cache[model.get_sae_hook_name(view)], run.snapshot_acts(cc, 2))
        resolved = model.get_sae_hook_name(view).removesuffix(".hook_sae_acts_post")
        expected = torch.where(run.keep[..., None], cc.decode_snapshot(run.snapshot_acts(cc, 2), 2), run.acts[:, :, 2])
        torch.testing.assert_close(cache[f"{resolved}.hook_sae_recons"], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(cache[f"{resolved}.hook_sae_input"], run.acts[:, :, 2], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(tokens), clean, atol=0, rtol=0)


@pytest.mark.parametrize("error", [True, False])
def test_saelens_hooks_edit_features(
    snaps: Snapshots, tokens: Tensor, model: SAETransformerBridge, error: bool
) -> None:
    """Edits act on the frozen features: scaled below its threshold, a feature is still decoded."""
    cc = make_crosscoder("jumprelu_crosscoder")
    run = CleanRun.of(cc, snaps, tokens)
    view = snapshot_view(cc, 2, run)

    def edit(acts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.cat([1e-2 * acts[..., :8], acts[..., 8:]], -1)

    expected = Splice(cc, run, 2, [Edit(range(8), factor=1e-2)], error=error).logits(snaps.model(2))
    with model.saes(saes=[view], use_error_term=error):
        found = model.run_with_hooks(tokens, fwd_hooks=[(model.get_sae_hook_name(view), edit)])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (expected - Splice(cc, run, 2, error=error).logits(snaps.model(2))).abs().max() > 1e-2


def test_other_hook_points(snaps: Snapshots, tokens: Tensor, model: SAETransformerBridge) -> None:
    clean = model(tokens)
    for hook in ("blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.0.hook_attn_out"):
        cc = make_crosscoder("topk_crosscoder", hook)
        run = CleanRun.of(cc, snaps, tokens)
        view = snapshot_view(cc, -1, run)
        with model.saes(saes=[view], use_error_term=True):
            torch.testing.assert_close(model(tokens), clean, atol=1e-5, rtol=0)
        with model.saes(saes=[view]):
            torch.testing.assert_close(
                model(tokens), Splice(cc, run, 2, error=False).logits(snaps.model(2)), atol=1e-5, rtol=0
            )


def test_a_view_has_raw_copies_and_metadata(snaps: Snapshots, tokens: Tensor) -> None:
    cc = make_crosscoder("topk_crosscoder")  # its features are shared, so a view could alias them
    cc.cfg.metadata.snapshots = [{"label": s.label, "fingerprint": s.fingerprint} for s in snaps]
    run = CleanRun.of(cc, snaps, tokens)
    view = snapshot_view(cc, 1, run.features)
    torch.testing.assert_close(view.W_dec, cc.W_dec_by_snapshot[:, 1] / cc.activation_scale[1])
    torch.testing.assert_close(view.b_dec, cc.b_dec_by_snapshot[1] / cc.activation_scale[1])
    assert (view.cfg.d_in, view.cfg.d_sae) == (D, F) and view.cfg.architecture() == "snapshot_view"
    assert view.cfg.metadata.hook_name == "blocks.1.hook_resid_post" and view.cfg.metadata.snapshot == "step10"
    assert not any(parameter.requires_grad for parameter in view.parameters()) and not view.training
    x = torch.randn(*tokens.shape, D)
    assert torch.equal(view.encode(x), run.snapshot_acts(cc, 1))
    torch.testing.assert_close(view(x), cc.decode_snapshot(run.snapshot_acts(cc, 1), 1))
    before = cc.W_dec.clone(), run.features.clone()
    view.W_dec.mul_(2)
    view.features.zero_()
    assert torch.equal(cc.W_dec, before[0]) and torch.equal(run.features, before[1])
    half = snapshot_view(cc, 1, run).to(dtype=torch.float64)
    assert half.features.dtype == half.W_dec.dtype == torch.float64 and half(x.double()).dtype == torch.float64


def test_errors_are_one_line(snaps: Snapshots, tokens: Tensor, model: SAETransformerBridge) -> None:
    cc = make_crosscoder("standard_crosscoder")
    run = CleanRun.of(cc, snaps, tokens)
    view = snapshot_view(cc, 2, run)
    for make, message in (
        (
            lambda: view.encode(torch.zeros(1, 6, D)),
            r"activations of shape \(1, 6, 16\) do not match this view's batch, which has shape \(2, 6, 16\): run the "
            "model on its tokens, or make a view of the new batch",
        ),
        (lambda: model.run_with_saes(tokens[:1], saes=[view]), r"shape \(1, 6, 16\) do not match this view"),
        (lambda: snapshot_view(cc, 3, run), r"snapshot 3 is not in \[-3, 2\]"),
        (lambda: snapshot_view(cc, 0, run.features[..., :5]), r"shape \(2, 6, 5\) do not fit .* give \(B, T, 24\)"),
        (lambda: view.save_model("somewhere"), "a view of one batch cannot be saved to somewhere"),
        (lambda: view.fold_W_dec_norm(), "fold_W_dec_norm is not available"),
        (lambda: view.fold_and_get_W_dec_norm(), "fold_and_get_W_dec_norm is not available"),
        (lambda: view.fold_activation_norm_scaling_factor(2.0), "fold_activation_norm_scaling_factor is not"),
        (lambda: view.fold_activation_whitening(tokens, tokens, tokens), "fold_activation_whitening is not"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    model.reset_saes()
