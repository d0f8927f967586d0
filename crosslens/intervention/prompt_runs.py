"""Clean runs of a task's prompts, which every causal analysis works from.

1. `PromptRuns` runs all prompts through every snapshot up to the hook, once, and encodes them. Activations stay in
   memory, N T S D numbers, or in a temporary file; features are kept as (token, feature) pairs. Only one batch at a
   time is dense, or on the device.
2. `PromptRuns.at(s)` yields the batches at snapshot s: the clean activation, the pairs, and the model above the hook.
3. `BatchAt.changes` gives f_s - f0_s as pairs, where the baseline f0_s is zero, the mean over the prompts, or the value
   on the paired prompt. With gates frozen from the clean run, the change moves the activation at the hook by

       sum_i (f_is - f0_is) W_dec[i, s] / c_s

4. `BatchAt.metric` is the metric of the prompts, given an activation at the hook.

`on_runs` lets an analysis of clean runs take crosscoder, snapshots and task in their place.

Symbols: N prompts, B of a batch, T positions, S snapshots, D d_model, F features, A features active on any prompt, n
pairs.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, TypeVar, cast, overload, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from crosslens.activations.harvesting import harvest
from crosslens.activations.tokens import kept_positions
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.crosscoders.kernels.sparse import sampled_product
from crosslens.crosscoders.kernels.topk import row_pointers
from crosslens.distributed.together import each, in_rounds
from crosslens.errors import UserError
from crosslens.intervention.splice import CleanRun
from crosslens.intervention.upper import Shortcuts, Upper, UpperRun
from crosslens.snapshots.checks import check_snapshots
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.tasks.accuracy import list_counts
from crosslens.tasks.items import groups
from crosslens.tasks.prompts import PromptBatch, logit_difference
from crosslens.tasks.task import Task

_DENSE_ENTRIES = 1 << 24  # entries of a dense (token, feature) matrix held at a time
_MEAN_ENTRIES = 1 << 22  # pairs made at a time for the mean baseline

R = TypeVar("R")


@dataclass(frozen=True)
class Pairs:
    """Values of (token, feature) pairs of a batch, sorted by token.

    Attributes:
        tokens: (n,) index b * T + t of the token.
        features: (n,) column among the A features.
        values: (n,).
    """

    tokens: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]

    def to(self, device: str | torch.device) -> Pairs:
        """Move to a device."""
        return Pairs(self.tokens.to(device), self.features.to(device), self.values.to(device))


@dataclass(frozen=True)
class BatchAt:
    """One batch of prompts at one snapshot.

    Attributes:
        prompts: the batch.
        first: number of prompts in the batches before it.
        keep: (B, T) positions that are spliced; BOS and padding keep their clean activation.
        clean: (B, T, D) raw activation at the hook.
        patch: (B, T, D) raw activation of the paired prompts; None if the runs are not paired.
        pairs: features of the clean run, f_is; some may be 0.
        patch_values: (n,) features of the paired prompts, on the same pairs.
        directions: (A, D) decoder rows in raw space, W_dec[i, s] / c_s.
        bias: (D,) decoder output when no feature is active.
        upper: the model above the hook, on these prompts.
    """

    prompts: PromptBatch
    first: int
    keep: Bool[Tensor, "B T"]
    clean: Float[Tensor, "B T D"]
    patch: Float[Tensor, "B T D"] | None
    pairs: Pairs
    patch_values: Float[Tensor, " n"] | None
    directions: Float[Tensor, "A D"]
    bias: Float[Tensor, " D"]
    upper: UpperRun

    def __len__(self) -> int:
        return len(self.clean)

    def changes(self, baseline: str, mean: Float[Tensor, " A"] | None = None) -> Iterator[Pairs]:
        """Pairs of `f_is - f0_is` that are not 0: each pair once, all pairs of a prompt together.

        Args:
            baseline: "zero", "mean" or "patch".
            mean: mean of each feature, for "mean".
        """
        pairs, values = self.pairs, self.pairs.values
        if baseline == "mean":
            assert mean is not None
            yield from self._changes_from(mean)
            return
        if baseline == "patch":
            assert self.patch_values is not None
            values = values - self.patch_values
        kept = values != 0
        yield Pairs(pairs.tokens[kept], pairs.features[kept], values[kept])

    def _changes_from(self, mean: Float[Tensor, " A"]) -> Iterator[Pairs]:
        """With a mean baseline every position changes: dense in the features with a mean, a few prompts at a time."""
        columns, T = mean.nonzero().flatten(), self.keep.shape[1]
        per_chunk = max(1, _MEAN_ENTRIES // max(1, T * len(columns)))
        for start in range(0, len(self), per_chunk):
            keep = self.keep[start : start + per_chunk]
            low, high = start * T, start * T + keep.numel()
            change = -mean.repeat(keep.numel(), 1)
            inside = (self.pairs.tokens >= low) & (self.pairs.tokens < high)
            change[self.pairs.tokens[inside] - low, self.pairs.features[inside]] += self.pairs.values[inside]
            tokens = keep.flatten().nonzero().flatten()
            values = change[tokens][:, columns].flatten()
            yield Pairs((tokens + low).repeat_interleave(len(columns)), columns.repeat(len(tokens)), values)

    def moved(self, pairs: Pairs) -> Float[Tensor, "B T D"]:
        """Change of the activation: `sum_i value W_dec[i, s] / c_s`."""
        starts = row_pointers(pairs.tokens, self.keep.numel())[:-1]
        moved = embedding_bag(pairs.features, self.directions, starts, mode="sum", per_sample_weights=pairs.values)
        return moved.view_as(self.clean)

    def along(self, pairs: Pairs, gradient: Float[Tensor, "B T D"]) -> Float[Tensor, " n"]:
        """Contribution of each pair to a linear function of the activation: `value <W_dec[i, s] / c_s, gradient>`."""
        rows = row_pointers(pairs.tokens, self.keep.numel())
        return pairs.values * sampled_product(rows, pairs.features, gradient.flatten(0, 1), self.directions)

    def metric(self, x: Float[Tensor, "n T D"], rows: Int[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
        """logit(correct) - logit(wrong) when the activation at the hook is `x`.

        Args:
            x: activations at all positions, clean where nothing is spliced; may carry gradients.
            rows: the prompt of the batch that each row belongs to; None for all prompts in order.
        """
        batch = self.prompts if rows is None else self.prompts.select(rows.to(self.prompts.tokens.device))
        return logit_difference(self.upper.logits(x, rows), batch, self.upper.wanted)


class Differences(NamedTuple):
    """A prompt beside its paired prompt, at n positions."""

    prompts: Int[Tensor, " n"]
    """Number of the prompt."""
    acts: Float[Tensor, "n S D"]
    """Raw activation of the prompt less that of the paired one."""
    features: Float[Tensor, "n A"]
    """Features of the prompt, in the order of `PromptRuns.features`."""
    paired_features: Float[Tensor, "n A"]
    """Those of the paired prompt."""


class PromptRuns:
    """Clean activations and features of a task's prompts in all snapshots, computed once, when first needed.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        task: minimal pairs; prompts are tokenised with the snapshots' tokenizer.
        paired: also run the paired prompts, for the baseline "patch"; prompts without one are left out. None runs them
            if half of the prompts or more have one.
        on_disk: keep the activations in a temporary file instead of memory.
        prepend_bos: begin prompts with the BOS token; None does as in the crosscoder's training.
        batch_size: prompts per batch of everything dense.
        settings: how the models run; None runs them on the crosscoder's device.

    Attributes:
        batches: the prompts; the same order whatever the batch size.
        left_out: number of items that are not among the prompts, by reason.
        paired: whether the paired prompts are run.
        n_paired: number of prompts with a usable paired prompt, among all usable prompts of the task.
        unpaired: number of those whose paired prompt is unusable, by reason.

    Raises:
        UserError: a crosscoder of other snapshots or on another device than the models, a task without usable (or
            without paired) prompts.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        snapshots: Snapshots,
        task: Task,
        *,
        paired: bool | None = None,
        on_disk: bool = False,
        prepend_bos: bool | None = None,
        batch_size: int = 256,
        settings: ModelSettings | None = None,
    ) -> None:
        check_snapshots(crosscoder, snapshots)
        self.settings = settings or ModelSettings(device=str(crosscoder.device))
        if torch.device(self.settings.device).type != torch.device(crosscoder.device).type:
            raise UserError(
                f"the crosscoder is on {crosscoder.device} and the models would run on {self.settings.device}: "
                f"move it with crosscoder.to({self.settings.device!r})"
            )
        metadata = crosscoder.cfg.metadata
        if isinstance(crosscoder, CrosscoderTrainingSAE):
            crosscoder = crosscoder.to_inference()  # in training the gate may depend on the batch
        self.crosscoder, self.snapshots, self.task = crosscoder, snapshots, task
        self.hook_name: str = metadata.hook_name
        self._kept_options = metadata.keep_special, metadata.separator, metadata.drop_positions
        prepend_bos = begins_with_bos(crosscoder) if prepend_bos is None else prepend_bos
        prompts = task.prompts(snapshots.tokenizer, prepend_bos=prepend_bos, max_length=snapshots.n_ctx)
        self.left_out = Counter(prompts.skipped)
        self.batches: list[PromptBatch] = list(prompts.batches(batch_size))
        self.n_paired = sum(len(batch) for batch in self.batches if batch.patch is not None)
        self.unpaired = prompts.unpaired
        if paired is None:
            paired = 0 < len(prompts) <= 2 * self.n_paired
            if prompts.unpaired and not paired:
                warnings.warn(
                    f"{task.name}: baseline zero, because only {self.n_paired} of {len(prompts)} prompts have a usable "
                    f"paired prompt ({list_counts(prompts.unpaired)})"
                    + f"; baseline patch would use these {self.n_paired} alone"
                    * bool(self.n_paired),
                    stacklevel=3,
                )
        self.paired = paired
        if paired:
            self.left_out += prompts.unpaired
            alone = len(prompts) - self.n_paired - sum(prompts.unpaired.values())
            self.left_out += Counter({"no paired prompt": alone})  # adding drops a count of 0
            self.batches = [batch for batch in self.batches if batch.patch is not None]
            if not self.batches:
                raise UserError(
                    f"task {task.name!r} has no paired prompts, which the 'patch' baseline needs; use 'zero' or 'mean'"
                )
        self._on_disk = on_disk
        self._shortcuts: dict[int, Shortcuts] = {}

    def __len__(self) -> int:
        """Number of prompts."""
        return sum(len(batch.tokens) for batch in self.batches)

    @cached_property
    def groups(self) -> Int[Tensor, " N"]:
        """Group of every prompt, from 0: prompts of a group are not independent (`crosslens.tasks.items.groups`)."""
        order = torch.cat([batch.index for batch in self.batches]).tolist()
        return torch.tensor(groups([self.task.items[i] for i in order]))

    @property
    def n_groups(self) -> int:
        """Number of `groups`."""
        return int(self.groups.max()) + 1

    @cached_property
    def features(self) -> Int[Tensor, " A"]:
        """Ids of the features that are active on any prompt, or paired prompt, at any snapshot."""
        return self._clean.features

    @cached_property
    def active(self) -> Bool[Tensor, "F S"]:
        """Which features are active on any prompt, at each snapshot."""
        return self._clean.active

    @cached_property
    def active_paired(self) -> Bool[Tensor, "F S"]:
        """Which features are active on any paired prompt, at each snapshot; none if the runs are not paired."""
        return self._clean.active_paired

    @cached_property
    def _clean(self) -> _Clean:
        tokens = [batch.tokens for batch in self.batches] + [_patch(batch) for batch in self.batches if self.paired]
        acts = self._harvest(tokens)
        found = each(lambda i: self._encode(tokens[i], acts[i]), range(len(tokens)))
        features = torch.cat([part.features for part in found]).unique()
        n, S, F = len(self.batches), len(self.snapshots), self.crosscoder.cfg.d_sae
        merged = [_merged(found[i], found[n + i] if self.paired else None, features) for i in range(n)]
        return _Clean(acts, merged, features, _active(found[:n], S, F), _active(found[n:], S, F))

    def _harvest(self, tokens: Sequence[Tensor]) -> list[Float[Tensor, "S B T D"]]:
        """Activations of every batch, one snapshot's model after the other."""
        S, D = len(self.snapshots), self.crosscoder.d_model
        sizes = [S * ids.numel() * D for ids in tokens]
        if self._on_disk:
            with tempfile.TemporaryFile() as file:  # the mapping keeps it after the file is closed
                whole = torch.from_numpy(np.memmap(file, np.float32, "w+", shape=(sum(sizes),)))
        else:
            whole = torch.empty(sum(sizes))
        acts = [part.view(S, *ids.shape, D) for part, ids in zip(whole.split(sizes), tokens, strict=True)]

        def harvest_at(s: int) -> list[Tensor]:
            return [harvest(self.snapshots, ids, self.hook_name, self.settings, only=s)[:, :, 0] for ids in tokens]

        for s, found in enumerate(in_rounds(harvest_at, range(S))):
            for place, one in zip(acts, found, strict=True):
                place[s] = one
        return acts

    def each_snapshot(self, analyse: Callable[[int], R], at: Sequence[int] | None = None, *, desc: str = "") -> list[R]:
        """Results of an analysis at several snapshots, divided among the processes that work together.

        Args:
            analyse: takes the index of a snapshot.
            at: indices; all when None.
            desc: what is done, for a progress bar.
        """
        _ = self._clean  # by all processes, before they part
        where = range(len(self.snapshots)) if at is None else at
        return each(analyse, where, desc and f"{desc} {self.task.name}")

    @torch.no_grad()
    def _encode(self, tokens: Int[Tensor, "B T"], acts: Float[Tensor, "S B T D"]) -> _Found:
        """Features of the kept tokens at every snapshot, as pairs; only a block of tokens at a time is dense."""
        crosscoder = self.crosscoder
        S, F = crosscoder.n_snapshots, crosscoder.cfg.d_sae
        by_token = acts.flatten(1, 2).transpose(0, 1)
        found: list[_Found] = []
        for block in self.keep(tokens).flatten().nonzero().flatten().split(max(1, _DENSE_ENTRIES // F)):
            dense = crosscoder.encode(by_token[block].to(crosscoder.device))
            row, feature = dense.nonzero(as_tuple=True)
            at = [crosscoder.snapshot_acts(dense, s) for s in range(S)]
            if all(each is dense for each in at):
                values = dense[row, feature][:, None].float().cpu().expand(-1, S)  # no extra memory
            else:
                values = torch.stack([each[row, feature] for each in at], -1).float().cpu()
            found.append(_Found(block[row.cpu()], feature.cpu(), values, None))
        if not found:  # no position is kept
            nothing = torch.empty(0, dtype=torch.long)
            return _Found(nothing, nothing, torch.empty(0, S), None)
        if len(found) == 1:
            return found[0]
        tokens, features, values = (torch.cat(parts) for parts in list(zip(*found, strict=True))[:3])
        return _Found(tokens, features, values, None)

    def keep(self, tokens: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Positions whose activations are spliced; BOS and padding keep theirs."""
        return kept_positions(tokens, self.snapshots.tokenizer, *self._kept_options)

    @torch.no_grad()
    def at(self, snapshot: int) -> Iterator[BatchAt]:
        """Yield the batches at the index `snapshot`, with its model above the hook."""
        s, crosscoder = snapshot, self.crosscoder
        device = crosscoder.device
        scale = crosscoder.activation_scale[s]
        directions = crosscoder.W_dec_by_snapshot[self.features.to(device), s].float() / scale
        bias = crosscoder.b_dec_by_snapshot[s].float() / scale
        model = self.snapshots.model(s, self.settings)
        prompt = self.batches[0].tokens[:1].to(self.settings.device)
        upper = Upper(model, self.hook_name, prompt, self._shortcuts.get(s))
        self._shortcuts[s] = upper.shortcuts
        first, n = 0, len(self.batches)
        for i, (batch, found) in enumerate(zip(self.batches, self._clean.found, strict=True)):
            yield BatchAt(
                prompts=batch,
                first=first,
                keep=self.keep(batch.tokens).to(device),
                clean=self._clean.acts[i][s].to(device),
                patch=self._clean.acts[n + i][s].to(device) if self.paired else None,
                pairs=Pairs(found.tokens, found.features, found.values[:, s]).to(device),
                patch_values=None if found.patch_values is None else found.patch_values[:, s].to(device),
                directions=directions,
                bias=bias,
                upper=upper.on(batch.tokens.to(self.settings.device), batch.answers.unique().to(self.settings.device)),
            )
            first += len(batch.tokens)

    def clean_acts(self, snapshot: int) -> list[Float[Tensor, "B T D"]]:
        """Raw activations of every batch at the index `snapshot`, on the CPU."""
        return [acts[snapshot] for acts in self._clean.acts[: len(self.batches)]]

    def differences(self, *, everywhere: bool = False) -> Differences:
        """Differences between each prompt and its paired prompt, of activations and of features.

        Args:
            everywhere: at all kept positions from the first token in which the two differ; otherwise at the last.

        Raises:
            UserError: the paired prompts are not run.
        """
        if not self.paired:
            raise UserError(
                f"task {self.task.name!r} was run without paired prompts, which differences need: use "
                "PromptRuns(paired=True)"
            )
        found: list[Differences] = []
        n, first = len(self.batches), 0
        for i, (batch, pairs) in enumerate(zip(self.batches, self._clean.found, strict=True)):
            B, T = batch.tokens.shape
            chosen = self.keep(batch.tokens)
            if everywhere:
                chosen &= (batch.tokens != _patch(batch)).cummax(1).values
            else:
                chosen[:, :-1] = False
            rows = chosen.flatten().nonzero().flatten()
            place = torch.full((B * T,), -1)
            place[rows] = torch.arange(len(rows))
            inside = place[pairs.tokens] >= 0
            features = torch.zeros(2, len(rows), len(self.features))
            for side, values in enumerate((pairs.values, pairs.patch_values)):
                assert values is not None
                # gates may differ: a feature has its value at the snapshots whose gate is open, and 0 at the others
                features[side, place[pairs.tokens[inside]], pairs.features[inside]] = values[inside].amax(-1)
            acts, other = (each.flatten(1, 2)[:, rows] for each in (self._clean.acts[i], self._clean.acts[n + i]))
            found.append(Differences(first + rows // T, (acts - other).transpose(0, 1), features[0], features[1]))
            first += B
        return Differences(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def mean(self, snapshot: int) -> Float[Tensor, " A"]:
        """Mean of `f_is` of each of `features` over the kept positions of all prompts, at the index `snapshot`."""
        total = torch.zeros(len(self.features), dtype=torch.float64)
        for found in self._clean.found:
            total.index_add_(0, found.features, found.values[:, snapshot].double())
        count = sum(int(self.keep(batch.tokens).sum()) for batch in self.batches)
        return (total / count).float()

    def mean_features(self, snapshot: int) -> Float[Tensor, " F"]:
        """Mean of `f_is` of every feature over the kept positions of all prompts, at the index `snapshot`."""
        mean = torch.zeros(self.crosscoder.cfg.d_sae)
        mean[self.features] = self.mean(snapshot)
        return mean.to(self.crosscoder.device)

    def clean(self) -> Iterator[tuple[PromptBatch, CleanRun, CleanRun | None]]:
        """Yield batches with their clean run and, if paired, that of the paired prompts; features are dense."""
        for i, (batch, found) in enumerate(zip(self.batches, self._clean.found, strict=True)):
            patch = None
            if found.patch_values is not None:
                patch = self._clean_run(
                    _patch(batch), self._clean.acts[len(self.batches) + i], found, found.patch_values
                )
            yield batch, self._clean_run(batch.tokens, self._clean.acts[i], found, found.values), patch

    def _clean_run(self, tokens: Tensor, acts: Tensor, found: _Found, values: Tensor) -> CleanRun:
        device = self.crosscoder.device
        features = torch.zeros(tokens.numel(), self.crosscoder.cfg.d_sae, dtype=values.dtype)
        # gates may differ: a feature has its value at the snapshots whose gate is open, and 0 at the others
        features[found.tokens, self.features[found.features]] = values.amax(-1)
        features = features.view(*tokens.shape, -1).to(device)
        return CleanRun(
            tokens.to(self.settings.device),
            acts.permute(1, 2, 0, 3).to(device),
            features,
            self.keep(tokens).to(device),
        )


P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)


@runtime_checkable
class OnRuns(Protocol[P, R_co]):
    """An analysis of clean runs that also takes crosscoder, snapshots and task in their place."""

    @overload
    def __call__(self, runs: PromptRuns, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(
        self, crosscoder: Crosscoder, snapshots: Snapshots, task: Task, /, *args: P.args, **kwargs: P.kwargs
    ) -> R_co: ...


def begins_with_bos(crosscoder: Crosscoder) -> bool:
    """Whether prompts begin with the BOS token, as the sequences of the crosscoder's training did."""
    recorded = crosscoder.cfg.metadata.prepend_bos
    return True if recorded is None else bool(recorded)


def needs_pairs(baseline: str | None) -> bool | None:
    """`PromptRuns(paired=)` for a baseline; None, for no baseline, lets the prompts decide."""
    return None if baseline is None else baseline == "patch"


def on_runs(analysis: Callable[Concatenate[PromptRuns, P], R_co]) -> OnRuns[P, R_co]:
    """Let an analysis be called with crosscoder, snapshots and task in place of its clean runs.

    The runs are then made with default settings. They are paired for the baseline "patch": of the analysis, of the
    `Estimator` in its `method`, or of its effects `ie`. Without any of them `PromptRuns` decides.
    """
    signature, run = inspect.signature(analysis), cast("Callable[..., R_co]", analysis)

    @wraps(analysis)
    def call(*args: Any, **kwargs: Any) -> R_co:
        if len(args) < 3 or isinstance(args[0], PromptRuns):
            return run(*args, **kwargs)
        crosscoder, snapshots, task, *rest = args
        options = signature.bind(None, *rest, **kwargs)
        options.apply_defaults()
        given = options.arguments
        estimators = given.get("method"), getattr(given.get("ie"), "estimator", None)
        baselines = [given.get("baseline"), *(getattr(each, "baseline", None) for each in estimators)]
        baseline = next(filter(None, baselines), None)
        return run(PromptRuns(crosscoder, snapshots, task, paired=needs_pairs(baseline)), *rest, **kwargs)

    return call


def check_features(features: Sequence[int] | Int[Tensor, " n"], d_sae: int) -> Int[Tensor, " n"]:
    """Feature ids as a tensor.

    Raises:
        UserError: no features, one given twice, or one that the crosscoder does not have.
    """
    ids = torch.as_tensor(features, dtype=torch.long).flatten().cpu()
    if not len(ids):
        raise UserError("no features are given: give one or more ids")
    if outside := ids[(ids < 0) | (ids >= d_sae)].tolist():
        raise UserError(f"feature {outside[0]} is not in [0, {d_sae - 1}]: give features of this crosscoder")
    if len(ids.unique()) < len(ids):
        raise UserError("a feature is given twice: give each once")
    return ids


class _Clean(NamedTuple):
    """What running the models yields: activations (S, B, T, D) and pairs of every batch, and the active features."""

    acts: list[Tensor]
    found: list[_Found]
    features: Int[Tensor, " A"]
    active: Bool[Tensor, "F S"]
    active_paired: Bool[Tensor, "F S"]


class _Found(NamedTuple):
    """Pairs of a batch: token, feature (id at first, then column), values at every snapshot."""

    tokens: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, "n S"]
    patch_values: Float[Tensor, "n S"] | None


def _merged(clean: _Found, patch: _Found | None, features: Int[Tensor, " A"]) -> _Found:
    """Both runs on one list of pairs, features as columns of `features`."""
    A = len(features)
    keys = [
        part.tokens * A + torch.searchsorted(features, part.features) for part in (clean, patch) if part is not None
    ]
    if patch is None:
        return _Found(clean.tokens, keys[0] % max(A, 1), clean.values, None)
    union, place = torch.cat(keys).unique(return_inverse=True)
    own, other = place[: len(clean.tokens)], place[len(clean.tokens) :]
    return _Found(
        union // A, union % A, _spread(clean.values, own, len(union)), _spread(patch.values, other, len(union))
    )


def _spread(values: Float[Tensor, "n S"], place: Int[Tensor, " n"], size: int) -> Float[Tensor, "m S"]:
    S = values.shape[1]
    if values.stride(1) == 0:  # one value that all snapshots share
        return torch.zeros(size, 1, dtype=values.dtype).index_copy_(0, place, values[:, :1]).expand(-1, S)
    return torch.zeros(size, S, dtype=values.dtype).index_copy_(0, place, values)


def _active(found: Sequence[_Found], S: int, F: int) -> Bool[Tensor, "F S"]:
    active = torch.zeros(F, S, dtype=torch.bool)
    for part in found:
        for s in range(S):
            active[part.features[part.values[:, s] != 0], s] = True
    return active


def _patch(batch: PromptBatch) -> Tensor:
    assert batch.patch is not None
    return batch.patch
