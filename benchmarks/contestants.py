"""What the training benchmarks compare: crosslens, and the same losses in dense autograd. `peers` has other libraries.

A contestant is built from a `Setting`, takes whole training steps (forward, backward, clipping, Adam, firing counts),
and encodes and decodes for the evaluation. Contestants without snapshots take flat activations (B, S * D).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import measure
import torch
from torch import Tensor, nn

from crosslens.crosscoders import (
    TRAINING_ARCHITECTURES,
    BatchTopKCrosscoderTrainingConfig,
    CrosscoderTrainingConfig,
    CrosscoderTrainingSAE,
    JumpReLUCrosscoderTrainingConfig,
    StandardCrosscoderTrainingConfig,
    TopKCrosscoderTrainingConfig,
)
from crosslens.distributed.devices import Precision
from crosslens.training.config import TrainConfig
from crosslens.training.initialisation import search_decoder_norm
from crosslens.training.trainer import CrosscoderTrainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.crosscoders.reference import dense_forward_pass

SEARCH_TOKENS = 64  # for the decoder norm of a fresh JumpReLU, which is searched on (64, S, F) tensors
THRESHOLD_PACE = 0.02  # weight of the newest batch in the moving average of every BatchTopK threshold
LOOK_TOKENS = 256  # for setting thresholds and biases


@dataclass(frozen=True)
class Setting:
    """What is the same for all contestants of a comparison.

    Attributes:
        architecture: "batchtopk", "topk", "jumprelu" or "standard".
        S, D, F, B: snapshots, width, features, activations per step.
        k: features kept per token; for JumpReLU and L1 the L0 that biases are set for.
        lr: learning rate.
        steps: steps of the whole run; the learning rate falls linearly over the last `lr_decay` of them.
        lr_decay: a fraction of the steps.
        dead_tokens: activations without firing after which a feature is dead.
        device: of model and data.
        seed: of the weights.
    """

    architecture: str
    S: int
    D: int
    F: int
    B: int
    k: int = 48
    lr: float = 1e-7
    steps: int = 1_000_000
    lr_decay: float = 0.0
    dead_tokens: int = 10_000_000
    device: str = "cpu"
    seed: int = 0


class Contestant(ABC):
    """A trainer.

    Attributes:
        name: in the tables.
        flat: takes scaled, concatenated activations (B, S * D); otherwise raw ones (B, S, D).
        has_threshold: learns a threshold, so that it can select features of single tokens.
        precision: of its large products; a step's time is related to the encoder's product in it.
    """

    name: str
    flat = True
    has_threshold = True
    precision: Precision = "float32"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The model."""

    @abstractmethod
    def step(self, x: Tensor) -> Any:
        """One whole training step."""

    @property
    @abstractmethod
    def encoder(self) -> Tensor:
        """View (S * D, F) of the encoder's weights."""

    @abstractmethod
    def mark_dead(self, dead: Tensor) -> None:
        """Before a step: let exactly these features (F,) count as dead."""

    @torch.no_grad()
    def silence(self, dead: Tensor) -> None:
        """Make features (F,) too weak to be selected, with pre-activations as often positive as before."""
        self.encoder[:, dead] *= 0.1

    @abstractmethod
    def hidden_pre(self, x: Tensor) -> Tensor:
        """Pre-activations (B, F)."""

    @property
    def kept_bytes(self) -> int:
        """Memory, other than parameters and Adam's moments, that is kept between steps."""
        return 0

    def set_l0(self, x: Tensor) -> None:
        """Move thresholds or biases so that `k` features are active per token."""
        del x

    def encode(self, x: Tensor, own_threshold: bool) -> Tensor:
        """Features (B, F), selected as in training or by the learnt threshold."""
        raise NotImplementedError

    def decode(self, features: Tensor) -> Tensor:
        """Reconstruction (B, S * D) in the scaled space."""
        raise NotImplementedError


class Crosslens(Contestant):
    """`CrosscoderTrainer.step` on raw activations (B, S, D)."""

    name = "crosslens"
    flat = False
    adam_moments: Literal["float32", "bfloat16"] = "float32"

    def __init__(self, setting: Setting, sae: CrosscoderTrainingSAE | None = None) -> None:
        super().__init__(setting)
        self.sae = sae if sae is not None else fresh(setting)
        config = TrainConfig(
            batch_size=setting.B,
            lr=setting.lr,
            lr_decay=setting.lr_decay,
            dead_tokens=max(setting.dead_tokens, setting.B),
            device=setting.device,
            precision=self.precision,
            adam_moments=self.adam_moments,
        )
        self.trainer = CrosscoderTrainer(config, self.sae, iter(()), setting.steps * setting.B)

    @property
    def module(self) -> nn.Module:
        return self.sae

    @property
    def encoder(self) -> Tensor:
        return self.sae.W_enc

    def step(self, x: Tensor) -> Any:
        output = self.trainer.step(x)
        self.trainer.n_training_steps += 1
        return output

    @property
    def kept_bytes(self) -> int:
        memory = self.trainer.gradient_memory
        return 0 if memory is None else memory.nbytes

    def mark_dead(self, dead: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired.zero_().masked_fill_(dead, 1e9)

    @torch.no_grad()
    def hidden_pre(self, x: Tensor) -> Tensor:
        return self.sae.hidden_pre(self.sae.process_sae_in(x))

    @torch.no_grad()
    def set_l0(self, x: Tensor) -> None:
        h = self.hidden_pre(x[:LOOK_TOKENS])
        if self.setting.architecture == "standard":
            self.sae.b_enc.sub_(exceeded_by(h, self.setting.k / self.setting.F))

    @torch.no_grad()
    def set_gates(self, x: Tensor, window: float) -> None:
        """Set up a JumpReLU as after training: `k` features open, and a fraction `window` of all pairs in the window.

        Thresholds hardly move in training (the learning rate of their logarithm is a tenth); features become sparse
        because pre-activations become negative. So thresholds stay, norms are spread over the snapshots (factors of .5
        to 1.6), and gain and biases of the encoder are set so that a fraction `window` of the pairs is positive, and
        k / F of them exceed the threshold at some snapshot.
        """
        spread = torch.rand(
            self.setting.F, self.setting.S, 1, generator=torch.Generator().manual_seed(self.setting.seed)
        )
        self.sae.W_dec_by_snapshot.mul_((0.5 + 1.1 * spread).to(x.device))
        h = self.hidden_pre(x[:LOOK_TOKENS])
        zero = exceeded_by(h, window)
        largest = self.sae.decoder_norms.amax(-1)
        gain = self.sae.threshold[0] / exceeded_by((h - zero) * largest, self.setting.k / self.setting.F)
        self.sae.W_enc.mul_(gain)
        self.sae.b_enc.sub_(zero).mul_(gain)

    @torch.no_grad()
    def gate_fractions(self, x: Tensor) -> dict[str, float]:
        """Of all (token, feature, snapshot): the fractions with an open gate, and inside the threshold's window."""
        assert isinstance(self.sae.cfg, JumpReLUCrosscoderTrainingConfig)
        h, threshold = self.hidden_pre(x), self.sae.threshold
        half = self.sae.cfg.jumprelu_window / 2
        opened, inside = 0.0, 0.0
        for norm in self.sae.decoder_norms.unbind(1):
            score = h * norm
            opened += float((score > threshold).float().mean())
            inside += float((((score - threshold).abs() < half) & (score > 0)).float().mean())
        return {"open_fraction": opened / self.setting.S, "window_fraction": inside / self.setting.S}

    @torch.no_grad()
    def encode(self, x: Tensor, own_threshold: bool) -> Tensor:
        self.sae.train(not own_threshold)
        return self.sae.encode(x)

    @torch.no_grad()
    def decode(self, features: Tensor) -> Tensor:
        return self.sae.decode_flat(features)


class CrosslensBfloat16(Crosslens):
    """With large products in bfloat16."""

    name = "crosslens, bfloat16"
    precision = "bfloat16"


class CrosslensPartition(Crosslens):
    """Half of the features shared, an eighth dedicated to the last snapshot."""

    name = "crosslens, shared and dedicated"

    def __init__(self, setting: Setting) -> None:
        part = {"n_shared": setting.F // 2, "shared_penalty": 1.5, "dedicated": {str(setting.S - 1): setting.F // 8}}
        super().__init__(setting, fresh(setting, **part))


class CrosslensDelta(Crosslens):
    """With the loss of the changes between snapshots."""

    name = "crosslens, delta"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, fresh(setting, delta_coefficient=1.0))


class CrosslensTF32(Crosslens):
    """With large products in tf32, on CUDA."""

    name = "crosslens, tf32"
    precision = "tf32"


class CrosslensTF32Moments(CrosslensTF32):
    """The same, with Adam's moments in bfloat16."""

    name = "crosslens, tf32, bfloat16 moments"
    adam_moments = "bfloat16"


class CrosslensMoments(Crosslens):
    """With Adam's moments in bfloat16."""

    name = "crosslens, bfloat16 moments"
    adam_moments = "bfloat16"


class Dense(Crosslens):
    """The same trainer and crosscoder, with forward and backward in plain dense autograd."""

    name = "dense"
    has_threshold = False

    def __init__(self, setting: Setting, sae: CrosscoderTrainingSAE | None = None) -> None:
        super().__init__(setting, sae)
        self.sae.training_forward_pass = partial(dense_forward_pass, self.sae)  # type: ignore[method-assign]
        self.trainer.gradient_memory = None


class DenseTF32(Dense):
    """The dense reference with the library's products in tf32, on CUDA."""

    name = "dense, tf32"
    precision = "tf32"

    def step(self, x: Tensor) -> Any:
        return measure.with_tf32(super().step, x)


def fresh(setting: Setting, **options: Any) -> CrosscoderTrainingSAE:
    """A crosscoder initialised as by `train` on activations with mean zero and scale one; `options` of its config."""
    shape: dict[str, Any] = {
        "d_sae": setting.F,
        "n_snapshots": setting.S,
        "d_in": setting.S * setting.D,
        "device": setting.device,
        "decoder_init": "shared",  # at the paper's shape, drawing independent rows takes a minute
        **options,
    }
    architectures: dict[str, CrosscoderTrainingConfig] = {
        "batchtopk": BatchTopKCrosscoderTrainingConfig(k=setting.k, topk_threshold_lr=THRESHOLD_PACE, **shape),
        "topk": TopKCrosscoderTrainingConfig(k=setting.k, **shape),
        "jumprelu": JumpReLUCrosscoderTrainingConfig(decoder_init_norm=1.0, **shape),
        "standard": StandardCrosscoderTrainingConfig(**shape),
    }
    config = architectures[setting.architecture]
    with torch.random.fork_rng():
        torch.manual_seed(setting.seed)
        sae_class: Any = TRAINING_ARCHITECTURES[config.architecture()][0]
        sae: CrosscoderTrainingSAE = sae_class(config)
        if setting.architecture == "jumprelu":
            search_decoder_norm(sae, torch.randn(SEARCH_TOKENS, setting.S, setting.D, device=setting.device))
    return sae


def exceeded_by(values: Tensor, fraction: float) -> Tensor:
    """The value that this fraction of the entries exceeds."""
    flat = values.flatten()
    return flat.topk(max(1, round(fraction * flat.numel())), sorted=False).values.amin()


def mean_l0(output: Any) -> float:
    """Active features per token of a SAELens `TrainStepOutput`."""
    acts = output.feature_acts
    if acts.is_sparse:
        return float((acts.coalesce().values() > 0).sum()) / len(acts)
    return float(acts.count_nonzero()) / len(acts)
