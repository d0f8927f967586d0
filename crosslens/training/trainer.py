"""SAELens's trainer with a faster step, parameter groups, a guard against non-finite losses, and complete checkpoints.

One step:

1. Forward and backward on active pairs; average gradients and losses over the processes that split the tokens.
2. Compute the global gradient norm, without the parameters that are not clipped (thresholds).
3. Adam divides the gradients by the clipping divisor, or changes nothing if the loss or a gradient is not finite.
4. Step the schedules, and count which features fired.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from crosslens.crosscoders import CrosscoderTrainingSAE
from crosslens.crosscoders.base import explained_variance, n_active
from crosslens.distributed.devices import choose_precision
from crosslens.distributed.parallel import ALONE, Parallel
from crosslens.progress import say
from crosslens.rundir import RunDir
from crosslens.training.adam import MOMENTS, BFloat16Adam, moment_dtype
from crosslens.training.checkpoints import DamagedCheckpointError, read_state, save_checkpoint, set_aside
from crosslens.training.config import TrainConfig, lr_factor
from crosslens.training.progress import Bar, Measured


class CrosscoderTrainer(SAETrainer[Any, Any]):
    """SAELens's trainer with its own `fit`, `step`, `optimizer`, `lr_scheduler` and `save_checkpoint`.

    SAELens's own step always clips at 1.0, and its schedulers end at zero; the recipes of both papers differ. Its loop
    shows losses every hundred steps.

    Args:
        config: how to train.
        sae: initialised, with `parallel` as its strategy if there are several processes.
        data_provider: whole batches of raw activations (B, S, D).
        total: activations to train on.
        evaluator: called with the SAE for held-out metrics.
        run: directory of the checkpoints; None writes none.
        parallel: the processes that train this crosscoder.
    """

    def __init__(
        self,
        config: TrainConfig,
        sae: CrosscoderTrainingSAE,
        data_provider: Iterator[Tensor],
        total: int,
        evaluator: Any = None,
        run: RunDir | None = None,
        parallel: Parallel = ALONE,
    ) -> None:
        logger = LoggingConfig(
            log_to_wandb=config.wandb_project is not None,
            log_weights_to_wandb=False,
            wandb_project=config.wandb_project or "",
            run_name=config.wandb_run_name,
            wandb_log_frequency=config.wandb_log_frequency,
            eval_every_n_wandb_logs=config.wandb_eval_frequency,
        )
        sae.to(config.device)
        sae.precision = choose_precision(config.precision, config.device)
        super().__init__(
            SAETrainerConfig(
                total_training_samples=total // config.batch_size * config.batch_size,
                train_batch_size_samples=config.batch_size,
                lr=config.lr,
                lr_end=config.lr,
                device=config.device,
                dead_feature_window=max(1, config.dead_tokens // config.batch_size),
                n_checkpoints=config.n_checkpoints if run is not None else 0,
                checkpoint_path=None if run is None else str(run.checkpoints),
                logger=logger,
            ),
            sae,
            data_provider,
            evaluator,
        )
        self.config = config
        self.run = run
        self.parallel = parallel
        self.stop = False
        self._stop_of_any: Tensor | None = None  # `stop` of any process, as of the last step
        self._busy = False
        self._saved = -1  # activations seen at the last checkpoint
        self.last_measured: Measured | None = None
        """How good the crosscoder is on the last batch of `fit`."""
        self._counts: Tensor | None = None  # of active pairs and dead features in all processes, at the last step
        self.act_freq_scores = torch.zeros(sae.n_own, device=config.device)
        self.n_forward_passes_since_fired = torch.zeros(sae.n_own, device=config.device)
        self._n_dead = 0
        self.n_active = torch.zeros((), dtype=torch.long, device=config.device)
        """Active (token, feature) pairs of the last step: of all tokens, and of the features of this process."""
        self.check_late = sae.device.type != "cpu"
        self._unchecked: tuple[TrainStepOutput, Tensor, Tensor] | None = None
        unclipped = {name: p for name, p in sae.named_parameters() if name in sae.unclipped}
        self.unclipped = list(unclipped.values())
        # fused Adam needs contiguous parameters: a view of the encoder with one row per feature
        self.encoder_rows = nn.Parameter(sae.W_enc.detach().T)
        on_cpu = sae.device.type == "cpu"
        self.gradient_memory = sae.W_dec.detach().new_empty(2, *sae.W_dec.shape) if on_cpu else None
        """What the crosscoder uses as its `gradient_memory` during a step."""
        others = {name: p for name, p in sae.named_parameters() if name not in ("W_enc", *unclipped)}
        self.clipped = [self.encoder_rows, *others.values()]
        self.trained = {"W_enc": self.encoder_rows, **others, **unclipped}
        """The optimiser's parameters by name, in its order; the encoder as (F, S D)."""
        factors = sae.lr_factors
        groups = [{"params": [p], "lr": config.lr * factors.get(name, 1.0)} for name, p in self.trained.items()]
        betas = (config.adam_beta1, config.adam_beta2)
        if config.adam_moments == "bfloat16":
            # processes with the same features round alike, so their copies stay equal
            self.optimizer = BFloat16Adam(groups, config.lr, betas, seed=(config.seed, parallel.feature_rank))
        else:
            self.optimizer = Adam(groups, config.lr, betas, fused=True)
        self.lr_scheduler = LambdaLR(
            self.optimizer, partial(lr_factor, config=config, total_steps=self.cfg.total_training_steps)
        )

    @override
    def fit(self) -> CrosscoderTrainingSAE:
        """Train until all activations are seen: SAELens's loop, by the methods that it documents for other loops.

        A progress bar shows explained variance (mean over snapshots), L0 and dead features of the last batch.
        """
        output: TrainStepOutput | None = None
        bar = Bar(self.cfg.total_training_samples, self.n_training_samples, hidden=self.parallel.rank > 0)
        with closing(bar):
            while self.n_training_samples < self.cfg.total_training_samples:
                output = None  # it would stay in memory during the next step
                self._log(self.maybe_reset_sparsity())
                output = self.step(next(self.data_provider))
                self._log_step(output)
                if self.checkpoint_thresholds and self.n_training_samples > self.checkpoint_thresholds[0]:
                    self.save_checkpoint(str(self.n_training_samples))
                    self.checkpoint_thresholds.pop(0)
                self.n_training_steps += 1
                bar.advance(self.n_training_samples, partial(self.measure, output))
            if output is not None:
                self.last_measured = self.measure(output)
                bar.draw(self.n_training_samples, self.last_measured)
        self._log(self.full_sparsity_window_log())
        self.set_final_sae_metadata()
        return self.sae

    @torch.no_grad()
    def measure(self, output: TrainStepOutput) -> Measured:
        """Explained variance, L0 and dead features of the last batch; the host waits once for a GPU.

        A feature is dead if it has not fired for `dead_tokens`, or for half of the training so far if that is shorter:
        short runs never reach the default of `dead_tokens`. With several processes the counts are those
        of all of them; explained variance is that of the tokens of this process.
        """
        S = self.sae.cfg.n_snapshots
        counts = self._count(self.n_active) if self._counts is None else self._counts
        explained = explained_variance(output.sae_in, output.sae_out, S)
        *explained, active, dead = torch.cat([explained.double(), counts]).tolist()
        return Measured(
            explained, active / self.config.batch_size, dead / self.parallel.n_data_ranks / self.sae.cfg.d_sae
        )

    @torch.no_grad()
    def _count(self, active: Tensor) -> Tensor:
        """The number of active pairs and of dead features in this process, (2,)."""
        window = min(self.cfg.dead_feature_window, self.n_training_steps // 2)
        dead = (self.n_forward_passes_since_fired > window).sum()
        return torch.stack([active, dead]).double()

    def _log(self, entries: dict[str, Any]) -> None:
        if entries and self.cfg.logger.log_to_wandb:
            import wandb

            wandb.log(entries, step=self.n_training_steps)

    def _log_step(self, output: TrainStepOutput) -> None:
        """Log the losses and metrics of a step, and the held-out metrics, when it is their turn."""
        logger = self.cfg.logger
        if not self._is_logged():
            return
        self._log(self.build_train_step_log_dict(output, self.n_training_samples))
        if (self.n_training_steps + 1) % (logger.wandb_log_frequency * logger.eval_every_n_wandb_logs) == 0:
            import wandb

            self._log({name: wandb.Histogram(values) for name, values in self.sae.log_histograms().items()})
            if self.evaluator is not None:
                self.sae.eval()
                self._log(self.evaluator(self.sae, self.data_provider, self.activation_scaler))
                self.sae.train()

    def _is_logged(self) -> bool:
        """Whether the metrics of the step after `n_training_steps` are logged."""
        logger = self.cfg.logger
        return logger.log_to_wandb and (self.n_training_steps + 1) % logger.wandb_log_frequency == 0

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        """One step on raw activations (B, S, D).

        No (B, F) tensor outlives it: `hidden_pre` of the output is empty, and so is `feature_acts` if it was dense and
        the step is not logged. `n_active` counts the active (token, feature) pairs of every step.

        With several processes, each receives the whole batch and uses its share of the tokens, or receives this share.

        Raises:
            FloatingPointError: the loss is not finite; no parameter has changed.
            StoppedError: `stop` was set in any process.
        """
        self._check()
        self._busy, self.sae.gradient_memory, self.sae.n_dead = True, self.gradient_memory, self._n_dead
        try:
            output = self._step(batch)
        finally:
            self._busy, self.sae.gradient_memory, self.sae.n_dead = False, None, None
        if not self.check_late:
            self._check()
        return output

    def _check(self) -> None:
        # one wait for both numbers
        n_dead = self.dead_neurons.sum()
        not_finite = torch.zeros_like(n_dead) if self._unchecked is None else self._unchecked[2]
        self._n_dead, failed = torch.stack([n_dead, not_finite]).tolist()
        if failed:
            self.check_finite()
        self._unchecked = None
        if bool(self._stop_of_any) if self._stop_of_any is not None else self.stop:
            raise StoppedError

    def _step(self, batch: Tensor) -> TrainStepOutput:
        self.sae.train()
        if self.parallel.n_data_ranks > 1 and len(batch) == self.config.batch_size:
            batch = batch[self.parallel.tokens(len(batch))]
        self.n_training_samples += len(batch) * self.parallel.n_data_ranks
        logged = self._is_logged()
        output = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=batch.to(self.sae.device),
                dead_neuron_mask=self.dead_neurons,
                coefficients=self.get_coefficients(),
                n_training_steps=self.n_training_steps,
                is_logging_step=logged,
            )
        )
        # nothing reads this (B, F) tensor
        output.hidden_pre = output.hidden_pre.new_empty(0, self.sae.cfg.d_sae)
        output.loss.backward()
        # without the graph, which holds what the backward pass needed
        output.loss, output.sae_out = output.loss.detach(), output.sae_out.detach()
        output.losses = {name: value.detach() for name, value in output.losses.items()}
        self.sae.constrain_gradients_()
        assert self.sae.W_enc.grad is not None
        self.encoder_rows.grad, self.sae.W_enc.grad = self.sae.W_enc.grad.T, None
        self._mean_gradients(output)
        norm = self._grad_norm()
        not_finite = ~torch.isfinite(output.loss.detach())
        not_finite |= ~torch.isfinite(norm)
        divisor = ((norm + 1e-6) / (self.config.max_grad_norm or math.inf)).clamp_min(1.0)
        for parameter in self.unclipped:
            if parameter.grad is not None:
                parameter.grad.mul_(divisor)  # cancels the division
                not_finite |= ~torch.isfinite(parameter.grad.sum())
        if not self.parallel.alone:
            # all processes skip the step, and stop, if one of them does
            flags = torch.stack([not_finite, torch.full_like(not_finite, self.stop)]).double()
            flags = self.parallel.sum_(torch.cat([flags, self._count(n_active(output.feature_acts))]))
            not_finite, self._stop_of_any = flags[:2] > 0
            self._counts = flags[2:]
        guarded_step(self.optimizer, divisor, not_finite)
        self.sae.constrain_()  # rounding may differ between copies of a row
        self.optimizer.zero_grad()
        self.lr_scheduler.step()
        for scheduler in self.coefficient_schedulers.values():
            scheduler.step()
        self._count_firings(output.feature_acts)
        if not (output.feature_acts.is_sparse or logged):
            output.feature_acts = output.feature_acts.new_empty(0, self.sae.n_own)
        self._unchecked = output, batch, not_finite
        return output

    def check_finite(self) -> None:
        """Raise if the loss or a gradient of the last step was not finite; that step changed no parameter.

        Reading the loss makes the host wait for a GPU, so there (`check_late`) the check comes one step later.

        Raises:
            FloatingPointError: names the step, the losses and the snapshots with non-finite activations.
        """
        if self._unchecked is None:
            return
        output, batch, not_finite = self._unchecked
        self._unchecked = None
        if not_finite:
            raise FloatingPointError(_non_finite(output, batch, self))

    def request_stop(self, *_: Any) -> None:
        """Signal handler: end the training after the current step or checkpoint.

        Raises:
            StoppedError: now, if this process is waiting for data; otherwise the next `step` raises it, in all
                processes.
        """
        self.stop = True
        if self.parallel.alone and not self._busy:
            raise StoppedError

    @torch.no_grad()
    def _grad_norm(self) -> Tensor:
        """Norm of all gradients that are clipped, over the features of all processes."""
        if self.parallel.n_feature_ranks == 1:
            return torch.nn.utils.get_total_norm([p.grad for p in self.clipped if p.grad is not None], foreach=True)
        # all processes hold the same b_dec
        own = [p.grad for p in self.clipped if p.grad is not None and p is not self.sae.b_dec]
        assert self.sae.b_dec.grad is not None
        square = self.parallel.sum_features_(torch.nn.utils.get_total_norm(own, foreach=True).square())
        return (square + self.sae.b_dec.grad.square().sum()).sqrt()

    @torch.no_grad()
    def _mean_gradients(self, output: TrainStepOutput) -> None:
        """Average gradients and losses over the processes that split the tokens."""
        if self.parallel.n_data_ranks == 1:
            return
        for parameter in self.trained.values():
            if parameter.grad is not None:
                self.parallel.sum_data_(parameter.grad).div_(self.parallel.n_data_ranks)
        output.losses = {name: self.parallel.mean_data(value.detach()) for name, value in output.losses.items()}
        output.loss = torch.stack(list(output.losses.values())).sum()

    @torch.no_grad()
    def _count_firings(self, feature_acts: Tensor) -> None:
        if feature_acts.is_sparse:
            active = (feature_acts.values() > 0).long()
            fired = active.new_zeros(feature_acts.shape[1]).index_add_(0, feature_acts.indices()[1], active)
        else:
            fired = feature_acts.count_nonzero(0)
        self.parallel.sum_data_(fired)
        self.n_active = fired.sum()
        self.n_forward_passes_since_fired += 1
        self.n_forward_passes_since_fired.masked_fill_(fired > 0, 0)
        self.act_freq_scores += fired
        self.n_frac_active_samples += len(feature_acts) * self.parallel.n_data_ranks

    @property
    @override
    def feature_sparsity(self) -> Tensor:
        return self.parallel.gather_features(super().feature_sparsity).flatten()

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        logged = super().maybe_reset_sparsity()
        if logged:  # SAELens allocates all features
            self.act_freq_scores = self.act_freq_scores.new_zeros(self.sae.n_own)
        return logged

    @override
    def set_final_sae_metadata(self) -> None:
        super().set_final_sae_metadata()
        self.sae.cfg.metadata.num_dead_features = int(self.parallel.sum_features_(self.dead_neurons.sum()))

    @override
    @torch.no_grad()
    def build_train_step_log_dict(self, output: TrainStepOutput, n_training_samples: int) -> dict[str, Any]:
        logged = super().build_train_step_log_dict(output, n_training_samples)
        own = torch.tensor(
            [logged["metrics/l0"], logged["sparsity/dead_features"], logged["sparsity/mean_passes_since_fired"]],
            dtype=torch.float64,
            device=self.sae.device,
        )
        l0, dead, silent = self.parallel.sum_features_(own).tolist()
        return {
            **logged,
            "metrics/l0": l0,
            "sparsity/dead_features": int(dead),
            "sparsity/mean_passes_since_fired": silent / self.parallel.n_feature_ranks,
        }

    @override
    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        """Write a checkpoint, then delete the previous one."""
        self.check_finite()
        if self.run is None:
            super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
            return
        if self._saved == self.n_training_samples:
            return  # nothing has changed since, and the checkpoint is complete
        self._busy = True
        try:
            self._save(self.run.checkpoints)
        finally:
            self._busy = False
        self._saved = self.n_training_samples

    def _save(self, folder: Path) -> None:
        adam = {name: self.optimizer.state[p] for name, p in self.trained.items()}
        numbers = {
            "n_training_samples": self.n_training_samples,
            "n_frac_active_samples": self.n_frac_active_samples,
            "adam_steps": float(adam["b_dec"]["step"]),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "decoder_init_norm": self.sae.cfg.decoder_init_norm,
        }
        save_checkpoint(folder, self.n_training_samples, *self._tensors(adam), numbers, self.parallel)

    def resume(self) -> bool:
        """Continue from the last complete checkpoint of the run directory; return whether there is one.

        A checkpoint that cannot be read is kept under another name until the next one is written, with a warning. The
        crosscoder may then hold parts of it, and has to be initialised again.
        """
        assert self.run is not None
        while samples := self._last_checkpoint():
            folder = self.run.checkpoints / f"tokens-{samples}"
            try:
                self._load(folder)
                break
            except DamagedCheckpointError as error:
                with self.parallel.first() as first:
                    if first:
                        set_aside(folder)
                        warnings.warn(f"the checkpoint {folder} is damaged ({error}) and is not used", stacklevel=3)
        if not samples:
            return False
        self._saved = samples
        # SAELens writes a checkpoint before it counts the step that it has just made
        self.n_training_steps = self.n_training_samples // self.config.batch_size
        self.checkpoint_thresholds = [t for t in self.checkpoint_thresholds if t >= self.n_training_samples]
        for scheduler in self.coefficient_schedulers.values():
            for _ in range(self.n_training_steps):
                scheduler.step()
        if self.parallel.rank == 0:
            say(f"resuming from the checkpoint at {samples:,} of {self.cfg.total_training_samples:,} tokens")
        return True

    def _last_checkpoint(self) -> int:
        """Activations seen at the last complete checkpoint, 0 if there is none."""
        assert self.run is not None
        found = self.run.last_checkpoint() if self.parallel.rank == 0 else None
        # rank 0 decides: on a network file system, others may see an older state of the folder
        return self.parallel.count(0 if found is None else int(found.name.removeprefix("tokens-")))

    def _load(self, folder: Path) -> None:
        adam: dict[str, dict[str, Tensor]] = {}
        for name, p in self.trained.items():
            dtype = moment_dtype(p, self.config.adam_moments)
            adam[name] = {moment: torch.empty_like(p, dtype=dtype, requires_grad=False) for moment in MOMENTS}
        rows, copies = self._tensors(adam)
        numbers = read_state(folder, rows, copies, self.parallel)
        for name, buffer in self.sae.named_buffers():
            buffer.copy_(copies[name].view_as(buffer))
        torch.set_rng_state(copies["rng"])
        self.n_training_samples = numbers["n_training_samples"]
        self.n_frac_active_samples = numbers["n_frac_active_samples"]
        self.sae.cfg.decoder_init_norm = numbers["decoder_init_norm"]
        steps = torch.tensor(float(numbers["adam_steps"]), device=self.sae.device)
        for name, p in self.trained.items():  # `load_state_dict` would convert the moments to float32
            self.optimizer.state[p] = {"step": steps.clone(), **adam[name]}
        if isinstance(self.optimizer, BFloat16Adam):
            self.optimizer.n_steps = int(numbers["adam_steps"])
        self.lr_scheduler.load_state_dict(numbers["lr_scheduler"])
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _tensors(self, adam: Mapping[str, Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The tensors of a checkpoint: those with a row per feature, and those that all processes hold alike."""
        rows = {"since_fired": self.n_forward_passes_since_fired, "fired": self.act_freq_scores}
        copies = {"rng": torch.get_rng_state()}
        copies |= {name: buffer.detach().clone().view(-1) for name, buffer in self.sae.named_buffers()}
        for name, parameter in self.trained.items():
            kind = copies if name == "b_dec" else rows
            kind[name] = parameter.detach()
            for moment in MOMENTS:
                kind[f"{name}.{moment}"] = adam[name][moment]
        return rows, copies


class StoppedError(Exception):
    """The training was asked to stop; the trainer has completed its last step."""


def guarded_step(optimizer: Adam, divisor: Tensor, skip: Tensor) -> None:
    """A step of fused Adam on gradients divided by `divisor`, or no step at all where `skip` is true.

    `grad_scale` and `found_inf` are the attributes through which torch.amp.GradScaler drives fused optimisers. The
    public alternatives are slower: `if skip` makes the host wait for the GPU in every step, and dividing the gradients
    first is another pass over all of them.
    """
    optimizer.grad_scale = divisor.float()  # type: ignore[attr-defined]
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()


def _non_finite(output: TrainStepOutput, batch: Tensor, trainer: CrosscoderTrainer) -> str:
    bad = (~torch.isfinite(batch)).flatten(2).any(-1).any(0).nonzero().flatten().tolist()
    labels = trainer.sae.cfg.snapshot_labels
    cause = f"non-finite activations of {', '.join(labels[s] for s in bad)}" if bad else "finite activations"
    losses = ", ".join(f"{name} {value.item():.4g}" for name, value in output.losses.items())
    what = "gradient" if torch.isfinite(output.loss) else "loss"
    return (
        f"the {what} is not finite at step {trainer.n_training_steps} ({losses}; {cause}); training stopped before the "
        "parameters changed, and the last checkpoint is intact: lower lr, or leave the snapshot out"
    )
