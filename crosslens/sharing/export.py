"""Export one snapshot of a crosscoder as a plain SAELens SAE.

A crosscoder encodes the activations of all snapshots, a plain SAE those of one. The SAE's encoder is therefore fitted,
and only estimates the features:

1. Ridge regression of the pre-activations h on the snapshot's raw activations x over training tokens: `h_hat = x A + b`
   minimises `E|h - h_hat|^2 + ridge |A|^2`, with A penalised in units of the mean variance of x.
2. A threshold t per feature, which h_hat exceeds as often as the feature is active, and a least-squares gain g for the
   values above it: `f_hat = g h_hat 1[g h_hat > g t]`, a JumpReLU SAE.
3. The decoder is the crosscoder's at that snapshot, in raw space: `W_dec[:, s] / c_s`, `b_dec[s] / c_s`.

The metadata says how good the estimate is on held-out tokens: explained variance of the SAE and of the crosscoder, and
how well they agree on when each feature is active (F1) and on its value (Pearson). The procedure is new here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from crosslens.activations.loader import Activations
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.held_out import check_activations
from crosslens.progress import tqdm
from crosslens.snapshots.lookup import find_snapshot


@torch.no_grad()
def export_sae(
    crosscoder: Crosscoder,
    acts: Activations,
    snapshot: int | str,
    *,
    n_tokens: int = 100_000,
    ridge: float = 1e-6,
    batch_size: int = 4096,
) -> JumpReLUSAE:
    """Export one snapshot as a plain SAELens SAE; `save_model` writes it, `sae_lens.SAE.load_from_disk` reads it.

    Args:
        crosscoder: the crosscoder.
        acts: activations it was trained on; the encoder is fitted on training tokens, evaluated on held-out ones.
        snapshot: index or label of the snapshot.
        n_tokens: activations to fit on, at most one epoch.
        ridge: weight of the penalty on the encoder, in units of the mean variance of an activation.
        batch_size: activations per batch.

    Returns:
        The SAE, with `metadata.explained_variance`, `metadata.crosscoder_explained_variance`, `metadata.l0`,
        `metadata.crosscoder_l0`, `metadata.feature_agreement` (mean F1 of the features that are active on held-out
        tokens), `metadata.feature_f1` and `metadata.feature_correlation` (per feature; None if it is never active),
        and `metadata.approximation`, a summary in words.

    Raises:
        UserError: no such snapshot, activations of other snapshots, n_tokens or ridge out of range.
    """
    s = find_snapshot(crosscoder.cfg.snapshot_labels, snapshot)
    check_activations(crosscoder, acts)
    if acts.n_snapshots != crosscoder.n_snapshots or acts.d_model != crosscoder.d_model:
        raise UserError(
            f"activations of {acts.n_snapshots} snapshots of width {acts.d_model} do not fit this crosscoder, which "
            f"has {crosscoder.n_snapshots} of width {crosscoder.d_model}: give those it was trained on"
        )
    if n_tokens <= crosscoder.d_model:
        raise UserError(
            f"n_tokens={n_tokens} must be more than d_model={crosscoder.d_model} for the fit to mean anything"
        )
    if not 0 <= ridge < math.inf:
        raise UserError(f"ridge={ridge} must be a finite number of at least 0")
    batch_size = min(batch_size, acts.n_tokens)
    n_batches = min(math.ceil(n_tokens / batch_size), acts.n_tokens // batch_size)

    def batches(purpose: str) -> Iterator[Float[Tensor, "B S D"]]:
        stream = acts.batches(batch_size, epochs=1)
        bar = tqdm(range(n_batches), desc=purpose, unit="batch", leave=False, delay=2)
        return (next(stream).to(crosscoder.device) for _ in bar)

    weight, bias = fit_encoder(crosscoder, batches("Fitting the encoder"), s, ridge)
    threshold, gain = calibrate(crosscoder, batches("Calibrating"), s, weight, bias)
    D, F = crosscoder.d_model, crosscoder.cfg.d_sae
    recorded = crosscoder.cfg.metadata
    label = crosscoder.cfg.snapshot_labels[s]
    metadata = SAEMetadata(
        hook_name=recorded.hook_name,
        model_name=recorded.model_name,
        dataset_path=recorded.dataset_path,
        context_size=recorded.context_size,
        prepend_bos=recorded.prepend_bos,
        snapshot=label,
        exported_from=f"{crosscoder.cfg.architecture()}, snapshot {label} of {crosscoder.n_snapshots}",
    )
    sae = JumpReLUSAE(
        JumpReLUSAEConfig(d_in=D, d_sae=F, device=str(crosscoder.device), apply_b_dec_to_input=False, metadata=metadata)
    )
    sae.W_enc.copy_(weight * gain)
    sae.b_enc.copy_(bias * gain)
    sae.threshold.copy_(threshold * gain)
    sae.W_dec.copy_(crosscoder.W_dec_by_snapshot[:, s] / crosscoder.activation_scale[s])
    sae.b_dec.copy_(crosscoder.b_dec_by_snapshot[s] / crosscoder.activation_scale[s])
    for name, value in measure(crosscoder, sae, acts, s, batch_size).items():
        metadata[name] = value
    metadata.approximation = (
        "The encoder is a regression on this snapshot's activations; the crosscoder encodes all snapshots. On held-out "
        f"tokens the SAE explains {metadata.explained_variance:.3f} of the variance, the crosscoder "
        f"{metadata.crosscoder_explained_variance:.3f}; the mean F1 of when features are active is "
        f"{metadata.feature_agreement:.3f}."
    )
    return sae.eval().requires_grad_(False)


def fit_encoder(
    crosscoder: Crosscoder, batches: Iterator[Float[Tensor, "B S D"]], s: int, ridge: float
) -> tuple[Float[Tensor, "D F"], Float[Tensor, " F"]]:
    """Ridge regression of h on x_s, accumulated over the batches in float64."""
    D, F = crosscoder.d_model, crosscoder.cfg.d_sae
    zeros: dict[str, Any] = {"dtype": torch.float64, "device": crosscoder.device}
    xx, xh = torch.zeros(D, D, **zeros), torch.zeros(D, F, **zeros)
    x_sum, h_sum, n = torch.zeros(D, **zeros), torch.zeros(F, **zeros), 0
    for batch in batches:
        x = batch[:, s].double()
        h = crosscoder.hidden_pre(crosscoder.process_sae_in(batch)).double()
        xx += x.T @ x
        xh += x.T @ h
        x_sum += x.sum(0)
        h_sum += h.sum(0)
        n += len(x)
    x_mean, h_mean = x_sum / n, h_sum / n
    covariance = xx / n - torch.outer(x_mean, x_mean)
    penalty = ridge * covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    weight = torch.linalg.solve(covariance + penalty * torch.eye(D, **zeros), xh / n - torch.outer(x_mean, h_mean))
    return weight, h_mean - x_mean @ weight


def calibrate(
    crosscoder: Crosscoder, batches: Iterator[Float[Tensor, "B S D"]], s: int, weight: Tensor, bias: Tensor
) -> tuple[Float[Tensor, " F"], Float[Tensor, " F"]]:
    """Threshold and gain of each feature; the threshold of a feature that is never active exceeds all values seen."""
    guesses, wanted = [], []
    for batch in batches:
        guesses.append((batch[:, s].double() @ weight + bias).float())
        wanted.append(crosscoder.snapshot_acts(crosscoder.encode(batch), s).float())
    guess, value = torch.cat(guesses), torch.cat(wanted)
    counts = (value != 0).sum(0)
    ordered = guess.sort(dim=0, descending=True).values
    # halfway between the last value that should pass and the first that should not
    inner = ordered.gather(0, (counts - 1).clamp_min(0)[None])[0]
    outer = ordered.gather(0, counts.clamp_max(len(guess) - 1)[None])[0]
    threshold = torch.where(counts > 0, (inner + outer) / 2, ordered[0] + ordered[0].abs() + 1).clamp_min(0)
    passed = guess * (guess > threshold)
    power = passed.square().sum(0)
    gain = torch.where(power > 0, (passed * value).sum(0) / power.clamp_min(1e-30), 1.0)
    return threshold.double(), torch.where(gain > 0, gain, 1.0).double()


def measure(crosscoder: Crosscoder, sae: JumpReLUSAE, acts: Activations, s: int, batch_size: int) -> dict[str, object]:
    """Quality of an exported SAE on held-out tokens, as `export_sae` records it."""
    F, D = crosscoder.cfg.d_sae, crosscoder.d_model
    both, ours, theirs = (torch.zeros(F, dtype=torch.float64) for _ in range(3))
    sums = torch.zeros(5, F, dtype=torch.float64)
    errors, total, squares, n = torch.zeros(2, dtype=torch.float64), torch.zeros(D, dtype=torch.float64), 0.0, 0
    for batch in acts.held_out(batch_size):
        batch = batch.to(crosscoder.device)
        x = batch[:, s]
        value, guess = crosscoder.snapshot_acts(crosscoder.encode(batch), s), sae.encode(x)
        rebuilt = (sae.decode(guess), crosscoder.decode_snapshot(value, s))
        errors += torch.stack([(x - made).double().square().sum().cpu() for made in rebuilt])
        total += x.double().sum(0).cpu()
        squares += float(x.double().square().sum())
        n += len(x)
        a, b = value.double().cpu(), guess.double().cpu()
        both += ((a != 0) & (b != 0)).sum(0)
        ours += (a != 0).sum(0)
        theirs += (b != 0).sum(0)
        sums += torch.stack([a.sum(0), b.sum(0), (a * b).sum(0), (a * a).sum(0), (b * b).sum(0)])
    variance = squares - float(total.square().sum()) / n
    f1 = 2 * both / (ours + theirs)
    mean = sums / n
    spread = ((mean[3] - mean[0] ** 2) * (mean[4] - mean[1] ** 2)).clamp_min(0).sqrt()
    correlation = (mean[2] - mean[0] * mean[1]) / spread
    alive = ours > 0
    return {
        "explained_variance": 1 - float(errors[0]) / variance,
        "crosscoder_explained_variance": 1 - float(errors[1]) / variance,
        "l0": float(theirs.sum()) / n,
        "crosscoder_l0": float(ours.sum()) / n,
        "feature_agreement": float(f1[alive].mean()) if alive.any() else 0.0,
        "feature_f1": _listed(f1, alive),
        "feature_correlation": _listed(correlation, alive & (spread > 0)),
    }


def _listed(values: Float[Tensor, " F"], known: Tensor) -> list[float | None]:
    return [round(v, 4) if k else None for v, k in zip(values.tolist(), known.tolist(), strict=True)]
