"""BatchTopK crosscoder: the k * B features of a batch with the largest scores (Bussmann et al., arXiv 2412.06410).

Scores, values and loss are those of TopK (`crosslens.crosscoders.architectures.topk`). Training tracks an exponential
moving average of the smallest selected score; at inference f_i = relu(h_i) * 1[u_i > threshold].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from sae_lens import SAEConfig
from torch import Tensor
from typing_extensions import override

from crosslens.crosscoders.architectures.topk import (
    RankedCrosscoder,
    TopKCrosscoderTrainingConfig,
    TopKCrosscoderTrainingSAE,
    keep_top,
)
from crosslens.crosscoders.base import CrosscoderConfig
from crosslens.crosscoders.declaration import Architecture
from crosslens.crosscoders.kernels.topk import Pairs, batch_top_pairs


@dataclass(kw_only=True)
class BatchTopKCrosscoderConfig(CrosscoderConfig):
    """Configuration of a `BatchTopKCrosscoder`; its threshold is a buffer saved with the weights."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_crosscoder"


class BatchTopKCrosscoder(RankedCrosscoder):
    """Inference crosscoder that keeps the features whose score exceeds the threshold learnt in training.

    Attributes:
        threshold: that score, a scalar.
    """

    cfg: BatchTopKCrosscoderConfig
    threshold: Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=self.device))

    @override
    def gate(self, hidden_pre: Tensor) -> Tensor:
        return hidden_pre.relu() * (self.scores(hidden_pre) > self.threshold)


@dataclass(kw_only=True)
class BatchTopKCrosscoderTrainingConfig(TopKCrosscoderTrainingConfig):
    """Configuration of a `BatchTopKCrosscoderTrainingSAE`.

    Args:
        k: features kept per token on average over the batch; fractions are allowed.
        topk_threshold_lr: weight of the newest batch in the moving average of the threshold.
    """

    k: float = 64  # type: ignore[assignment]
    topk_threshold_lr: float = 0.01
    whole_k: ClassVar[bool] = False

    @override
    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_crosscoder"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return BatchTopKCrosscoderConfig


class BatchTopKCrosscoderTrainingSAE(TopKCrosscoderTrainingSAE):
    """Training of the BatchTopK crosscoder; in `eval()` mode it gates with the learnt threshold.

    Attributes:
        threshold: moving average of the smallest score kept, a scalar; 0 before the first batch.
    """

    cfg: BatchTopKCrosscoderTrainingConfig  # type: ignore[assignment]
    threshold: Tensor

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32, device=self.device))

    @override
    def select(self, hidden_pre: Tensor, ranking: Tensor) -> Tensor:
        if not self.training:
            return hidden_pre.relu() * (self.scores(hidden_pre) > self.threshold)
        kept = max(1, round(self.current_k * ranking.shape[:-1].numel()))
        return keep_top(hidden_pre.flatten(), ranking.flatten(), kept).view_as(hidden_pre)

    @override
    def select_pairs(self, hidden_pre: Tensor, norms: Tensor) -> Pairs:
        pairs, kept = self._kept_pairs(hidden_pre, norms)
        self.update_threshold(kept)
        return pairs

    @override
    def training_gate(self, hidden_pre: Tensor) -> Tensor:
        return self._kept_pairs(hidden_pre, self.score_norms)[0].to_dense()

    def _kept_pairs(self, hidden_pre: Tensor, norms: Tensor) -> tuple[Pairs, Tensor]:
        count = max(1, round(self.current_k * len(hidden_pre) * self.strategy.n_data_ranks))
        return batch_top_pairs(hidden_pre, norms, count, self.strategy)

    @override
    def snapshot_metrics(self, flat: Tensor, sae_out: Tensor, feature_acts: Tensor) -> dict[str, Any]:
        return {**super().snapshot_metrics(flat, sae_out, feature_acts), "threshold": self.threshold.clone()}

    @torch.no_grad()
    def update_threshold(self, kept: Float[Tensor, " n"]) -> None:
        """Move the threshold towards the smallest of `kept`, the (positive) scores selected from a batch."""
        smallest = kept.amin() if len(kept) else kept.new_tensor(torch.inf)
        smallest = self.strategy.smallest(smallest.to(self.threshold.dtype))
        moved = self.threshold.lerp(smallest, self.cfg.topk_threshold_lr)
        first = torch.where(self.threshold > 0, moved, smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), first, self.threshold))


ARCHITECTURE = Architecture(
    title="BatchTopK",
    active="the $k \\cdot B$ largest scores of a batch; at inference, those above a learnt threshold",
    penalty="auxiliary loss for dead features",
    chosen="k, the mean L0",
    use="by default",
    options=("k", "k_start", "k_anneal", "aux", "topk_threshold_lr"),
    default=True,
    card="BatchTopK crosscoder",
    inference=(BatchTopKCrosscoder, BatchTopKCrosscoderConfig),
    training=(BatchTopKCrosscoderTrainingSAE, BatchTopKCrosscoderTrainingConfig),
    batch_tensors=2.0,
    penalises_decoder=False,
    revives_dead=True,
    denser="a larger k",
)
