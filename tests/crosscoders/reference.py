"""Losses in plain dense autograd: what the training step on active pairs must equal."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor

from crosslens.crosscoders import CrosscoderTrainingSAE
from crosslens.crosscoders.architectures.topk import annealed_k, batch_variance, keep_top, unexplained

KNOWN = ["standard_crosscoder", "topk_crosscoder", "batchtopk_crosscoder", "jumprelu_crosscoder"]
"""The architectures whose loss is here; another one's reference stands in its own test."""


class SnapshotJumpReLU(torch.autograd.Function):
    """`f_is = h_i 1[h_i n_is > t_i]` for every snapshot, (B, F) -> (B, S, F), with the straight-through threshold."""

    @staticmethod
    def forward(ctx: Any, hidden_pre: Tensor, norms: Tensor, threshold: Tensor, window: float) -> Tensor:
        """`hidden_pre` (B, F), `norms` (F, S), `threshold` (F,)."""
        scores = hidden_pre[:, None, :] * norms.T
        ctx.save_for_backward(scores, norms, threshold)
        ctx.window = window
        return hidden_pre[:, None, :] * (scores > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:  # type: ignore[override]
        """Gradients for `hidden_pre` (B, F) and `threshold` (F,); none for the norms."""
        scores, norms, threshold = ctx.saved_tensors
        near = ((scores - threshold).abs() < ctx.window / 2) & (scores > 0)
        # where n_is is 0 no score is positive, so nothing is divided by it
        slope = -threshold / (ctx.window * norms.T)
        grad_threshold = torch.where(near, slope * grad, torch.zeros_like(grad)).sum((0, 1))
        return (grad * (scores > threshold)).sum(1), None, grad_threshold, None


class Step(torch.autograd.Function):
    """`1[score > t]` of scores (B, S, F), whose derivative by the threshold (F,) is a rectangle of the given width."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, threshold: Tensor, window: float) -> Tensor:
        """`scores` (B, S, F), `threshold` (F,)."""
        ctx.save_for_backward(scores, threshold)
        ctx.window = window
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        """Gradient for `threshold` (F,)."""
        scores, threshold = ctx.saved_tensors
        near = ((scores - threshold).abs() < ctx.window / 2) & (scores > 0)
        return None, -(near * grad).sum((0, 1)) / ctx.window, None


def dense_forward_pass(crosscoder: CrosscoderTrainingSAE, step_input: TrainStepInput) -> TrainStepOutput:
    """The training step of a crosscoder that holds all features, on raw activations (B, S, D) or (B, S D)."""
    sae: Any = crosscoder
    name, cfg = sae.cfg.architecture(), sae.cfg
    flat = sae.process_sae_in(step_input.sae_in)
    hidden_pre = sae.hidden_pre(flat)
    if "topk" in name:
        sae.current_k = annealed_k(cfg, step_input.n_training_steps)
    acts = by_snapshot = sae.gate(hidden_pre)
    if name == "jumprelu_crosscoder":
        by_snapshot = SnapshotJumpReLU.apply(hidden_pre, sae.decoder_norms.detach(), sae.threshold, cfg.jumprelu_window)
        acts = by_snapshot.amax(1)  # every open gate passes the same positive h_i
        decoded = torch.einsum("bsf,fsd->bsd", by_snapshot, sae.W_dec_by_snapshot)
        decoded = rearrange(decoded, "b s d -> b (s d)")
    else:
        decoded = acts @ sae.W_dec
    sae_out = sae.relative(decoded)
    losses = {"mse_loss": sae.reconstruction_loss(sae_out, flat)}
    coefficients = step_input.coefficients
    factors = [(cfg.shared_penalty or 1.0) if i < cfg.n_shared else 1.0 for i in range(cfg.d_sae)]
    factors = torch.tensor(factors, dtype=flat.dtype, device=flat.device)
    if name == "standard_crosscoder":
        losses["l1_loss"] = coefficients["l1"] * (acts * factors * sae.decoder_norms.sum(-1)).sum(-1).mean()
    elif name == "jumprelu_crosscoder":
        phi = (cfg.tanh_stretch * by_snapshot * sae.decoder_norms.T).tanh().mean((0, 1))
        losses["sparsity_loss"] = coefficients["sparsity"] * (factors * phi * (1 + phi / cfg.frequency_scale)).sum()
        scores = hidden_pre[:, None] * sae.decoder_norms.detach().T
        if cfg.l0_coefficient is not None:
            l0 = Step.apply(scores.detach(), sae.threshold, cfg.jumprelu_window).sum(-1).mean()
            losses["l0_loss"] = cfg.l0_coefficient * (l0 / cfg.target_l0 - 1) ** 2
        if cfg.pre_act_loss_coefficient is not None:
            dead = torch.zeros(cfg.d_sae) if step_input.dead_neuron_mask is None else step_input.dead_neuron_mask
            short = (sae.threshold - hidden_pre * sae.decoder_norms.detach().amax(1)).relu() * dead
            losses["pre_act_loss"] = cfg.pre_act_loss_coefficient * short.sum(-1).mean()
    else:
        share = auxiliary_loss(
            (flat - sae_out).detach(), hidden_pre, sae.W_dec, sae.decoder_norms.detach(), step_input.dead_neuron_mask
        )
        losses["auxiliary_reconstruction_loss"] = cfg.aux_loss_coefficient * batch_variance(flat) * share
    if cfg.delta_coefficient:
        x, x_hat = (each.unflatten(-1, (cfg.n_snapshots, -1)) for each in (flat, sae_out))
        changes = [(x_hat[:, s + 1] - x_hat[:, s]) - (x[:, s + 1] - x[:, s]) for s in range(cfg.n_snapshots - 1)]
        delta = sum(((change**2).sum(-1).mean() for change in changes), flat.new_zeros(()))
        over = cfg.n_snapshots if name == "jumprelu_crosscoder" else 1
        losses["delta_loss"] = cfg.delta_coefficient * delta / over
    return TrainStepOutput(
        sae_in=flat,
        sae_out=sae_out,
        feature_acts=acts,
        hidden_pre=hidden_pre,
        loss=torch.stack(list(losses.values())).sum(),
        losses=losses,
    )


def auxiliary_loss(
    residual: Float[Tensor, "B SD"],
    hidden_pre: Float[Tensor, "B F"],
    W_dec: Float[Tensor, "F SD"],
    decoder_norms: Float[Tensor, "F S"],
    dead: Tensor | None,
) -> Tensor:
    """Fraction of the residual's variance that the strongest dead features leave unexplained; 0 without dead features.

    Args:
        residual: x - x_hat, detached.
        hidden_pre: pre-activations h of the batch.
        W_dec: flat decoder.
        decoder_norms: detached; they rank the dead features.
        dead: (F,) boolean mask of features that have not fired for the dead-feature window.
    """
    n_dead = 0 if dead is None else int(dead.sum())
    if n_dead == 0:
        return residual.new_zeros(())
    d_model = W_dec.shape[1] // decoder_norms.shape[1]
    with torch.no_grad():
        ranking = (hidden_pre.relu() * decoder_norms.sum(-1)).masked_fill(~dead, -torch.inf)
    acts = keep_top(hidden_pre, ranking, max(1, min(d_model // 2, n_dead)))
    return unexplained(residual, acts @ W_dec)
