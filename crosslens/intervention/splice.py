"""Splicing: the block output of one snapshot, rewritten through the crosscoder, with the gates of the clean run.

For a batch of tokens the features come once from the clean activations of *all* snapshots (`clean_run`) and are frozen.
For snapshot s the block output becomes

    with the error node      a_s + (f'_s - f_s) W_dec[:, s] / c_s      (nothing edited: the clean activation)
    without it               (f'_s W_dec[:, s] + b_dec[s]) / c_s

where f_s are the clean features as snapshot s gates them, and f'_s the edited ones. Edits act on f_s through the linear
decoder, never through a gate computed anew. Positions that training leaves out (BOS, padding) keep their clean
activation in every splice. The splice is this project's own. Letters: B prompts, T positions, S snapshots, D d_model,
F features, V tokens of the vocabulary.

    run = CleanRun.of(crosscoder, snapshots, tokens)
    splice = Splice(crosscoder, run, s, [Edit([3, 5]), Edit([8], factor=2.0, positions=[-1])])
    with splice.on(model):
        model(tokens)
    model.run_with_hooks(tokens, fwd_hooks=splice.fwd_hooks)     # the same
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosslens.activations.harvesting import harvest
from crosslens.activations.tokens import special_positions
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook
from crosslens.snapshots.settings import ModelSettings


@dataclass(frozen=True)
class CleanRun:
    """One batch of tokens as all snapshots see it.

    Attributes:
        tokens: (B, T).
        acts: (B, T, S, D) raw activations at the hook.
        features: (B, T, F), zero at positions that are left out.
        keep: (B, T) positions that are spliced.
    """

    tokens: Int[Tensor, "B T"]
    acts: Float[Tensor, "B T S D"]
    features: Float[Tensor, "B T F"]
    keep: Bool[Tensor, "B T"]

    @classmethod
    def of(
        cls,
        crosscoder: Crosscoder,
        snapshots: Snapshots,
        tokens: Int[Tensor, "B T"],
        *,
        device: str = "cpu",
        backend: str = "bridge",
    ) -> CleanRun:
        """Run all snapshots on tokens without padding, up to the crosscoder's hook.

        Args:
            crosscoder: trained on these snapshots.
            snapshots: the models.
            tokens: prompts of one length, with BOS where the models are given one.
            device: where the models run; what they give goes to the crosscoder's device.
            backend: "bridge" or "hooked_transformer".

        Raises:
            UserError: a crosscoder of other snapshots, or tokens that are longer than the models' context.
        """
        check_snapshots(crosscoder, snapshots)
        if not 1 <= tokens.shape[1] <= snapshots.n_ctx:
            raise UserError(
                f"prompts of {tokens.shape[1]} tokens do not fit the models, which take 1 to {snapshots.n_ctx}: "
                "shorten them"
            )
        metadata = crosscoder.cfg.metadata
        keep = torch.ones_like(tokens, dtype=torch.bool)
        if not metadata.keep_special:
            keep = ~special_positions(tokens, snapshots.tokenizer)
        acts = harvest(snapshots, tokens, metadata.hook_name, ModelSettings(device, backend=backend))
        place = crosscoder.device
        return clean_run(crosscoder, tokens.to(place), acts.to(place), keep.to(place))

    def snapshot_acts(self, crosscoder: Crosscoder, snapshot: int) -> Float[Tensor, "B T F"]:
        """`f_is` of the clean run at the index `snapshot`, as `crosscoder` gates it."""
        return crosscoder.snapshot_acts(self.features, snapshot)


@torch.no_grad()
def clean_run(
    crosscoder: Crosscoder,
    tokens: Int[Tensor, "B T"],
    acts: Float[Tensor, "B T S D"],
    keep: Bool[Tensor, "B T"],
) -> CleanRun:
    """Encode clean activations of all snapshots; features of positions that are left out are zero."""
    if isinstance(crosscoder, CrosscoderTrainingSAE):
        crosscoder = crosscoder.to_inference()  # in training the gate may depend on the batch
    return CleanRun(tokens, acts, crosscoder.encode(acts) * keep[..., None], keep)


def check_snapshots(crosscoder: Crosscoder, snapshots: Snapshots) -> None:
    """Refuse a crosscoder that was trained on other snapshots.

    Raises:
        UserError: another number of snapshots, or the first one whose weights differ.
    """
    recorded: list[dict[str, Any]] = crosscoder.cfg.metadata.snapshots or []
    if len(snapshots) != crosscoder.n_snapshots:
        raise UserError(
            f"the crosscoder was trained on {crosscoder.n_snapshots} snapshots, {len(snapshots)} are given; "
            "give the ones of its metadata.snapshots"
        )
    for trained, given in zip(recorded, snapshots, strict=False):
        if trained.get("fingerprint") not in (None, given.fingerprint):
            raise UserError(
                f"the crosscoder was trained on other weights: its snapshot {trained.get('label')} is not the given "
                f"{given.label}; load the snapshots it was trained on"
            )


@dataclass(frozen=True)
class Edit:
    """Some features of one snapshot become `factor * f_is + value`, at some positions.

        Edit([3, 5])                          zero
        Edit([3, 5], value=mean)              their mean; (F,) numbers, such as `PromptRuns.mean_features(s)`
        Edit([3, 5], value=other)             patched from another clean run of as many prompts and positions
        Edit([3, 5], factor=2.0)              scaled
        Edit([3, 5], factor=1.0, value=4.0)   steered: 4 is added

    Attributes:
        features: their ids; None is all.
        value: one number, one per feature (F,), per prompt, position and feature (B, T, F), or a `CleanRun`.
        factor: what the clean value is multiplied with.
        positions: from the left, or negative from the right; or a mask (B, T); None is all. Positions that training
            leaves out are never edited.
    """

    features: Sequence[int] | Int[Tensor, " n"] | None
    value: float | Float[Tensor, " F"] | Float[Tensor, "B T F"] | CleanRun = 0.0
    factor: float = 0.0
    positions: Sequence[int] | Bool[Tensor, "B T"] | None = None


class Splice:
    """What the block puts out at one snapshot, for one batch.

    Args:
        crosscoder: the crosscoder.
        run: its clean features of the batch; a model must be given the same tokens.
        snapshot: index of the snapshot whose model is spliced.
        edits: applied in order; each an `Edit`, or a function from the features of this snapshot (B, T, F) to as many.
        error: keep the error node, the part of the clean activation that the crosscoder does not reconstruct.

    Attributes:
        hook_name: where it is spliced in.
        features: (B, T, F) the edited features f'_s.
        replacement: (B, T, D) the new block output, raw.
        fwd_hooks: for `run_with_hooks`.

    Raises:
        UserError: a snapshot, feature or position out of range, or values of another shape.
    """

    def __init__(
        self,
        crosscoder: Crosscoder,
        run: CleanRun,
        snapshot: int,
        edits: Sequence[Edit | Callable[[Tensor], Tensor]] = (),
        *,
        error: bool = True,
    ) -> None:
        s = check_snapshot(crosscoder, snapshot)
        clean = run.snapshot_acts(crosscoder, s)
        self.run, self.features = run, clean
        for edit in edits:
            edited = _edited(self.features, edit, crosscoder, s) if isinstance(edit, Edit) else edit(self.features)
            if edited.shape != clean.shape:
                raise UserError(
                    f"an edit made features of shape {tuple(edited.shape)} of {tuple(clean.shape)}: return as many"
                )
            self.features = edited
        if error:
            change = crosscoder.decode_snapshot(self.features - clean, s, bias=False)
            self.replacement = run.acts[:, :, s] + change
        else:
            self.replacement = crosscoder.decode_snapshot(self.features, s)
        self.hook_name = canonical_hook(crosscoder.cfg.metadata.hook_name)
        self.fwd_hooks = [(self.hook_name, replace_at(self.replacement, run.keep))]

    @contextmanager
    def on(self, model: Any) -> Generator[Any, None, None]:
        """While it lasts, `model` (a TransformerBridge or HookedTransformer) is spliced.

        Raises:
            UserError: at its end, when nothing passed the hook.
        """
        with _passing(model, self.hook_name, self.replacement, self.run.keep) as hooks, model.hooks(fwd_hooks=hooks):
            yield model

    def logits(self, model: Any) -> Float[Tensor, "B T V"]:
        """Logits of `model`, spliced, on the batch.

        Raises:
            UserError: the model lacks the hook point, or puts out another shape there.
        """
        return spliced_logits(model, self.run.tokens, self.hook_name, self.replacement, self.run.keep)


def check_snapshot(crosscoder: Crosscoder, snapshot: int) -> int:
    """A snapshot's index from the left.

    Raises:
        UserError: there is no such snapshot.
    """
    S = crosscoder.n_snapshots
    if not -S <= snapshot < S:
        raise UserError(f"snapshot {snapshot} is not in [0, {S - 1}]: the crosscoder has {S} snapshots")
    return snapshot % S


def _edited(
    features: Float[Tensor, "B T F"], edit: Edit, crosscoder: Crosscoder, snapshot: int
) -> Float[Tensor, "B T F"]:
    B, T, F = features.shape
    value = edit.value
    if isinstance(value, CleanRun):
        value = value.snapshot_acts(crosscoder, snapshot)
    value = torch.as_tensor(value, dtype=features.dtype, device=features.device)
    if value.shape not in ((), (F,), (B, T, F)):
        raise UserError(
            f"an edit has values of shape {tuple(value.shape)}: give one number, ({F},) for each feature, or "
            f"({B}, {T}, {F}), as of a clean run of as many prompts and positions"
        )
    chosen = torch.ones(F, dtype=torch.bool, device=features.device)
    if edit.features is not None:
        chosen = _chosen(edit.features, F, "feature", 0).to(features.device)
    where = torch.ones(B, T, dtype=torch.bool, device=features.device)
    if isinstance(edit.positions, Tensor) and edit.positions.dtype == torch.bool:
        if edit.positions.shape != (B, T):
            raise UserError(f"a mask of shape {tuple(edit.positions.shape)} has positions of another batch: ({B}, {T})")
        where = edit.positions.to(features.device)
    elif edit.positions is not None:
        where = _chosen(edit.positions, T, "position", -T).to(features.device).expand(B, T)
    return torch.where(where[..., None] & chosen, edit.factor * features + value, features)


def _chosen(ids: Sequence[int] | Tensor, n: int, what: str, least: int) -> Bool[Tensor, " n"]:
    """Mask of the ids, which lie in [least, n)."""
    listed = [int(i) for i in ids]
    for i in listed:
        if not least <= i < n:
            raise UserError(f"{what} {i} is not in [{least}, {n - 1}]: give {what}s of this batch and crosscoder")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[listed] = True
    return mask


def replace_at(replacement: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]) -> Callable[[Tensor, Any], Tensor]:
    """A hook function that puts `replacement` at the kept positions and leaves the others clean.

    It raises `UserError` when the model runs a batch of another shape.
    """

    def hook(activation: Tensor, hook: Any) -> Tensor:
        del hook  # TransformerLens passes the hook point by this name
        if activation.shape != replacement.shape:
            raise UserError(
                f"the splice is of a batch of shape {tuple(replacement.shape)}, the model runs one of "
                f"{tuple(activation.shape)}: give the tokens that the features were made from"
            )
        return torch.where(keep[..., None].to(activation.device), replacement.to(activation), activation)

    return hook


def spliced_logits(
    model: Any,
    tokens: Int[Tensor, "B T"],
    hook_name: str,
    replacement: Float[Tensor, "B T D"],
    keep: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T V"]:
    """Logits of a model whose activation at the hook is replaced at the kept positions.

    Args:
        model: TransformerBridge or HookedTransformer.
        tokens: the batch.
        hook_name: as in `Activations`.
        replacement: what the block puts out instead, raw; may carry gradients.
        keep: positions that are replaced.

    Raises:
        UserError: the model has no such hook point.
    """
    with _passing(model, canonical_hook(hook_name), replacement, keep) as hooks:
        return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")


@contextmanager
def _passing(
    model: Any, hook_name: str, replacement: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]
) -> Generator[list[tuple[str, Callable[[Tensor, Any], Tensor]]], None, None]:
    """The hook of a splice; an error at the end when it was never called, for some models ignore names they lack."""
    replace, calls = replace_at(replacement, keep), 0

    def counted(activation: Tensor, hook: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return replace(activation, hook)

    yield [(hook_name, counted)]
    if not calls:
        raise UserError(
            f"nothing passed {hook_name} of {type(model).__name__}, so nothing was spliced: run a model of "
            "`Snapshots.model`, or another that has this hook point"
        )
