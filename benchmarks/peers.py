"""Other trainers behind the interface of `contestants`: each with its own model, loss and optimiser, on flat input.

- SAELens: its trainer's own step at d_in = S * D.
- dictionary-learning (PyPI): its trainers' own `update`. The package has no crosscoder. `NormalizedDictionaryLearning`
  does what its `trainSAE(normalize_activations=True)` does around it.
- eai-sparsify (PyPI): its trainer cannot be called without a language model, so the calls that `Trainer.fit` makes for
  a batch are made here in the same order, on its own `SparseCoder`, with Adam (its default, a sign-based optimiser, is
  no faster).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import warnings
from typing import Any

import measure
import torch
from contestants import LOOK_TOKENS, THRESHOLD_PACE, Contestant, Setting, exceeded_by
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    SAETrainer,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from torch import Tensor, nn

warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
PACKAGES = {"dictionary-learning": "dictionary_learning", "sparsify": "sparsify"}
INSTALL = "pip install --no-deps -r benchmarks/requirements.txt"
AUX_COEFFICIENT = 1 / 32


class SAELens(Contestant):
    """SAELens's own training SAE and `SAETrainer.step`."""

    name = "saelens"
    sparse_activations = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        common: dict[str, Any] = {"d_in": setting.S * setting.D, "d_sae": setting.F, "device": setting.device}
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            self.sae: Any = {
                "batchtopk": lambda: BatchTopKTrainingSAE(
                    BatchTopKTrainingSAEConfig(k=setting.k, topk_threshold_lr=THRESHOLD_PACE, **common)
                ),
                "topk": lambda: TopKTrainingSAE(
                    TopKTrainingSAEConfig(
                        k=setting.k,
                        use_sparse_activations=self.sparse_activations,
                        rescale_acts_by_decoder_norm=not self.sparse_activations,
                        **common,
                    )
                ),
                "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common)),
                "standard": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**common)),
            }[setting.architecture]()
        self.trainer: Any = SAETrainer(
            SAETrainerConfig(
                total_training_samples=setting.steps * setting.B,
                train_batch_size_samples=setting.B,
                lr=setting.lr,
                lr_end=setting.lr,
                lr_decay_steps=int(setting.lr_decay * setting.steps),
                device=setting.device,
                dead_feature_window=max(1, setting.dead_tokens // setting.B),
            ),
            self.sae,
            iter(()),
        )

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

    def mark_dead(self, dead: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired.zero_().masked_fill_(dead, 1e9)

    @torch.no_grad()
    def hidden_pre(self, x: Tensor) -> Tensor:
        return self.sae.encode_with_hidden_pre(x)[1]

    @torch.no_grad()
    def set_l0(self, x: Tensor) -> None:
        level = exceeded_by(self.hidden_pre(x[:LOOK_TOKENS]), self.setting.k / self.setting.F)
        if self.setting.architecture == "jumprelu":
            self.sae.threshold.fill_(level)
        elif self.setting.architecture == "standard":
            self.sae.b_enc.sub_(level)

    @torch.no_grad()
    def encode(self, x: Tensor, own_threshold: bool) -> Tensor:
        features, hidden_pre = self.sae.encode_with_hidden_pre(x)
        return hidden_pre * (hidden_pre > self.sae.topk_threshold) if own_threshold else features

    @torch.no_grad()
    def decode(self, features: Tensor) -> Tensor:
        return self.sae.decode(features)


class SAELensSparse(SAELens):
    """The same with the sparse activations of its TopK, without rescaling, for which torch has no sparse backward."""

    name = "saelens, sparse activations"
    sparse_activations = True


class SAELensTF32(SAELens):
    """The same with the library's products in tf32, on CUDA, which is a setting of the user's process."""

    name = "saelens, tf32"
    precision = "tf32"

    def step(self, x: Tensor) -> Any:
        return measure.with_tf32(super().step, x)


class DictionaryLearning(Contestant):
    """The `update` of dictionary-learning's trainers."""

    name = "dictionary-learning"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        trainers = importlib.import_module("dictionary_learning.trainers")
        trainer_class, options = {
            "batchtopk": (trainers.BatchTopKTrainer, {"k": setting.k}),
            "topk": (trainers.TopKTrainer, {"k": setting.k}),
            "jumprelu": (trainers.JumpReluTrainer, {"target_l0": float(setting.k), "sparsity_warmup_steps": None}),
        }[setting.architecture]
        if "k" in options:
            # its thresholds start after a thousand steps and move slowly; a short run needs the rate of the others
            options.update(threshold_start_step=0, threshold_beta=1 - THRESHOLD_PACE)
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            self.trainer: Any = trainer_class(
                steps=setting.steps,
                activation_dim=setting.S * setting.D,
                dict_size=setting.F,
                layer=0,
                lm_name="benchmark",
                lr=setting.lr,
                warmup_steps=0,
                decay_start=int((1 - setting.lr_decay) * setting.steps) if setting.lr_decay else None,
                device=setting.device,
                **options,
            )
        self.trainer.dead_feature_threshold = setting.dead_tokens
        self.n_steps = 0

    @property
    def module(self) -> nn.Module:
        return self.trainer.ae

    @property
    def encoder(self) -> Tensor:
        return self.trainer.ae.W_enc if self.setting.architecture == "jumprelu" else self.trainer.ae.encoder.weight.T

    def step(self, x: Tensor) -> Any:
        loss = self.trainer.update(self.n_steps, x)
        self.n_steps += 1
        return loss

    def mark_dead(self, dead: Tensor) -> None:
        self.trainer.num_tokens_since_fired.zero_().masked_fill_(dead, 1 << 40)

    @torch.no_grad()
    def hidden_pre(self, x: Tensor) -> Tensor:
        ae = self.trainer.ae
        return x @ ae.W_enc + ae.b_enc if self.setting.architecture == "jumprelu" else ae.encoder(x - ae.b_dec)

    @torch.no_grad()
    def set_l0(self, x: Tensor) -> None:
        if self.setting.architecture == "jumprelu":
            level = exceeded_by(self.hidden_pre(x[:LOOK_TOKENS]), self.setting.k / self.setting.F)
            self.trainer.ae.threshold.fill_(level)

    @torch.no_grad()
    def encode(self, x: Tensor, own_threshold: bool) -> Tensor:
        return self.trainer.ae.encode(x, use_threshold=own_threshold)

    @torch.no_grad()
    def decode(self, features: Tensor) -> Tensor:
        return self.trainer.ae.decode(features)


class NormalizedDictionaryLearning(DictionaryLearning):
    """The same on input of mean squared norm 1, without which its auxiliary loss is too small by that norm.

    The mean squared norm of centred input that is scaled as in crosslens is S * D.
    """

    @property
    def norm_factor(self) -> float:
        return (self.setting.S * self.setting.D) ** 0.5

    def step(self, x: Tensor) -> Any:
        return super().step(x / self.norm_factor)

    @torch.no_grad()
    def hidden_pre(self, x: Tensor) -> Tensor:
        return super().hidden_pre(x / self.norm_factor)

    @torch.no_grad()
    def encode(self, x: Tensor, own_threshold: bool) -> Tensor:
        return super().encode(x / self.norm_factor, own_threshold)

    @torch.no_grad()
    def decode(self, features: Tensor) -> Tensor:
        return super().decode(features) * self.norm_factor


class Sparsify(Contestant):
    """eai-sparsify's TopK `SparseCoder`, with the calls of its trainer."""

    name = "sparsify"
    has_threshold = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        sparsify = load_sparsify()
        with torch.random.fork_rng():
            torch.manual_seed(setting.seed)
            self.sae: Any = sparsify.SparseCoder(
                setting.S * setting.D,
                sparsify.SparseCoderConfig(num_latents=setting.F, k=setting.k),
                device=setting.device,
                dtype=torch.float32,
            )
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=setting.lr)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.tokens_since_fired = torch.zeros(setting.F, dtype=torch.long, device=setting.device)
        self.fired = torch.zeros(setting.F, dtype=torch.bool, device=setting.device)
        self.started = False

    def _lr_factor(self, step: int) -> float:
        decay = self.setting.lr_decay * self.setting.steps
        return min(1.0, (self.setting.steps - step) / decay) if decay else 1.0

    @property
    def module(self) -> nn.Module:
        return self.sae

    @property
    def encoder(self) -> Tensor:
        return self.sae.encoder.weight.T

    def step(self, x: Tensor) -> Any:
        if not self.started:
            self.sae.b_dec.data = x.mean(0)
            self.started = True
        self.sae.set_decoder_norm_to_unit_norm()
        dead = self.tokens_since_fired > self.setting.dead_tokens
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = self.sae(x=x, y=x, dead_mask=dead, total_variance=total_variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # it adds these up for its log
        float(out.auxk_loss.detach())
        (out.fvu + AUX_COEFFICIENT * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        with torch.no_grad():
            self.tokens_since_fired += len(x)
            self.tokens_since_fired[self.fired] = 0
            self.fired.zero_()

    def mark_dead(self, dead: Tensor) -> None:
        self.tokens_since_fired.zero_().masked_fill_(dead, 1 << 40)

    @torch.no_grad()
    def hidden_pre(self, x: Tensor) -> Tensor:
        return self.sae.encoder(x - self.sae.b_dec)

    @torch.no_grad()
    def encode(self, x: Tensor, own_threshold: bool) -> Tensor:
        del own_threshold  # it always selects k per token
        top_acts, top_indices, pre_acts = self.sae.encode(x)
        return torch.zeros_like(pre_acts).scatter(-1, top_indices, top_acts)

    @torch.no_grad()
    def decode(self, features: Tensor) -> Tensor:
        return features @ self.sae.W_dec + self.sae.b_dec


BY_NAME: dict[str, type[Contestant]] = {
    "saelens": SAELens,
    "dictionary-learning": NormalizedDictionaryLearning,
    "sparsify": Sparsify,
}
"""Those of `training_run`."""


def load_sparsify() -> Any:
    if not torch.cuda.is_available():  # wherever Triton is installed it would decode with a kernel for CUDA
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which kernels it found
        return importlib.import_module("sparsify")


def missing() -> dict[str, str]:
    """Peers from PyPI that cannot be imported, each with the remedy."""
    reasons: dict[str, str] = {}
    for peer in (DictionaryLearning, Sparsify):
        try:
            if peer is Sparsify:
                load_sparsify()
            else:
                importlib.import_module(PACKAGES[peer.name])
        except ImportError as error:
            reasons[peer.name] = f"{peer.name} is left out ({error}): {INSTALL}"
    return reasons
