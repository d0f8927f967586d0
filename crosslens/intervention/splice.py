"""Splicing: replace the block output of one snapshot by the crosscoder's, with the gates of the clean run.

1. `CleanRun.of` runs *all* snapshots on a batch of tokens, and encodes their activations. The features are then frozen.
2. `Edit` changes the features f_s of one snapshot, as that snapshot gates them, to f'_s.
3. `Splice` replaces the block output of snapshot s by

       with the error node      a_s + (f'_s - f_s) W_dec[:, s] / c_s      (nothing edited: the clean activation)
       without it               (f'_s W_dec[:, s] + b_dec[s]) / c_s

Edits act through the linear decoder; gates are never recomputed. Positions that training leaves out (BOS, padding) keep
their clean activation. The splice is new here.

Symbols: B prompts, T positions, S snapshots, D d_model, F features, V tokens of the vocabulary.

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
from crosslens.activations.tokens import kept_positions
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.errors import UserError
from crosslens.snapshots.checks import check_snapshots
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook
from crosslens.snapshots.lookup import find_snapshot
from crosslens.snapshots.settings import ModelSettings


@dataclass(frozen=True)
class CleanRun:
    """Clean activations and features of one batch of tokens.

    Attributes:
        tokens: (B, T).
        acts: (B, T, S, D) raw activations at the hook.
        features: (B, T, F), zero at positions that training leaves out.
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
        settings: ModelSettings | None = None,
    ) -> CleanRun:
        """Run all snapshots on tokens without padding, up to the crosscoder's hook.

        Args:
            crosscoder: trained on these snapshots.
            snapshots: the models.
            tokens: prompts of one length, including the BOS token if the models expect one.
            settings: how the models run; None runs them on the crosscoder's device.

        Raises:
            UserError: a crosscoder of other snapshots, or tokens longer than the models' context.
        """
        check_snapshots(crosscoder, snapshots)
        if not 1 <= tokens.shape[1] <= snapshots.n_ctx:
            raise UserError(
                f"prompts of {tokens.shape[1]} tokens do not fit the models' context of 1 to {snapshots.n_ctx} tokens: "
                "shorten them"
            )
        metadata = crosscoder.cfg.metadata
        options = metadata.keep_special, metadata.separator, metadata.drop_positions
        keep = kept_positions(tokens, snapshots.tokenizer, *options)
        device = crosscoder.device
        acts = harvest(snapshots, tokens, metadata.hook_name, settings or ModelSettings(device=str(device)))
        return clean_run(crosscoder, tokens.to(device), acts.to(device), keep.to(device))

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
    """Encode clean activations of all snapshots; features are zero at positions that training leaves out."""
    if isinstance(crosscoder, CrosscoderTrainingSAE):
        crosscoder = crosscoder.to_inference()  # in training the gate may depend on the batch
    return CleanRun(tokens, acts, crosscoder.encode(acts) * keep[..., None], keep)


@dataclass(frozen=True)
class Edit:
    """Set some features of one snapshot to `factor * f_is + value`, at some positions.

        Edit([3, 5])                          zero ablation
        Edit([3, 5], value=mean)              mean ablation; (F,) numbers, such as `PromptRuns.mean_features(s)`
        Edit([3, 5], value=other)             patching, from another clean run with as many prompts and positions
        Edit([3, 5], factor=2.0)              scaling
        Edit([3, 5], factor=1.0, value=4.0)   steering: adds 4

    Attributes:
        features: ids; all when None.
        value: one number, one per feature (F,), one per prompt, position and feature (B, T, F), or a `CleanRun`.
        factor: number by which the clean value is multiplied.
        positions: from the left, or negative from the right; or a mask (B, T); all when None. Positions that training
            leaves out are never edited.
    """

    features: Sequence[int] | Int[Tensor, " n"] | None
    value: float | Float[Tensor, " F"] | Float[Tensor, "B T F"] | CleanRun = 0.0
    factor: float = 0.0
    positions: Sequence[int] | Bool[Tensor, "B T"] | None = None


class Splice:
    """The edited block output of one snapshot, for one batch.

    Args:
        crosscoder: the crosscoder.
        run: clean run of the batch; the model must get the same tokens.
        snapshot: index of the snapshot whose model is spliced.
        edits: applied in order; each an `Edit`, or a function of the snapshot's features (B, T, F) that returns new
            ones.
        error: keep the error node, the part of the clean activation that the crosscoder does not reconstruct.

    Attributes:
        hook_name: hook point of the splice.
        features: (B, T, F) the edited features f'_s.
        replacement: (B, T, D) the new block output, raw.
        fwd_hooks: for `run_with_hooks`.

    Raises:
        UserError: a snapshot, feature or position out of range, or values of the wrong shape.
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
        s = find_snapshot(crosscoder.cfg.snapshot_labels, snapshot)
        clean = run.snapshot_acts(crosscoder, s)
        self.run, self.features = run, clean
        for edit in edits:
            edited = apply_edit(self.features, edit, crosscoder, s) if isinstance(edit, Edit) else edit(self.features)
            if edited.shape != clean.shape:
                raise UserError(
                    f"an edit returned shape {tuple(edited.shape)}: return {tuple(clean.shape)}, the shape it received"
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
        """Splice `model` (a TransformerBridge or HookedTransformer) within the context.

        Raises:
            UserError: on exit, if the model never reached the hook point.
        """
        with (
            _hooked(model, self.hook_name, self.replacement, self.run.keep) as hooks,
            model.hooks(fwd_hooks=hooks),
        ):
            yield model

    def logits(self, model: Any) -> Float[Tensor, "B T V"]:
        """Logits of the spliced `model` on the batch.

        Raises:
            UserError: the model lacks the hook point, or has another shape there.
        """
        return spliced_logits(model, self.run.tokens, self.hook_name, self.replacement, self.run.keep)


def apply_edit(
    features: Float[Tensor, "B T F"], edit: Edit, crosscoder: Crosscoder, snapshot: int
) -> Float[Tensor, "B T F"]:
    """The features of a snapshot after an edit.

    Args:
        features: f_s.
        edit: what is set.
        crosscoder: the crosscoder.
        snapshot: index of the snapshot.

    Raises:
        UserError: a feature or position out of range, or values of the wrong shape.
    """
    B, T, F = features.shape
    value = edit.value
    if isinstance(value, CleanRun):
        value = value.snapshot_acts(crosscoder, snapshot)
    value = torch.as_tensor(value, dtype=features.dtype, device=features.device)
    if value.shape not in ((), (F,), (B, T, F)):
        raise UserError(
            f"an edit has values of shape {tuple(value.shape)}: give one number, ({F},) for each feature, or "
            f"({B}, {T}, {F}) for each prompt, position and feature"
        )
    selected = torch.ones(F, dtype=torch.bool, device=features.device)
    if edit.features is not None:
        selected = _mask(edit.features, F, "feature", 0).to(features.device)
    where = torch.ones(B, T, dtype=torch.bool, device=features.device)
    if isinstance(edit.positions, Tensor) and edit.positions.dtype == torch.bool:
        if edit.positions.shape != (B, T):
            raise UserError(f"a mask of shape {tuple(edit.positions.shape)} does not fit this batch: use ({B}, {T})")
        where = edit.positions.to(features.device)
    elif edit.positions is not None:
        where = _mask(edit.positions, T, "position", -T).to(features.device).expand(B, T)
    return torch.where(where[..., None] & selected, edit.factor * features + value, features)


def _mask(ids: Sequence[int] | Tensor, n: int, what: str, least: int) -> Bool[Tensor, " n"]:
    """Mask of the ids, which must be in [least, n)."""
    listed = [int(i) for i in ids]
    for i in listed:
        if not least <= i < n:
            raise UserError(f"{what} {i} is not in [{least}, {n - 1}]: give {what}s in that range")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[listed] = True
    return mask


def replace_at(replacement: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]) -> Callable[[Tensor, Any], Tensor]:
    """A hook function that puts `replacement` at the kept positions and leaves the others clean.

    It raises `UserError` if the model runs a batch of another shape.
    """

    def hook(activation: Tensor, hook: Any) -> Tensor:
        del hook  # TransformerLens passes the hook point by this name
        flat = activation.flatten(2)  # the heads of attn.hook_z side by side
        if flat.shape != replacement.shape:
            raise UserError(
                f"the splice has shape {tuple(replacement.shape)}, the model's activation {tuple(activation.shape)}: "
                "run the model on the tokens of the clean run"
            )
        return torch.where(keep[..., None].to(flat.device), replacement.to(flat), flat).view_as(activation)

    return hook


def spliced_logits(
    model: Any,
    tokens: Int[Tensor, "B T"],
    hook_name: str,
    replacement: Float[Tensor, "B T D"],
    keep: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T V"]:
    """Logits of a model with the activation at the hook replaced at the kept positions.

    Args:
        model: TransformerBridge or HookedTransformer.
        tokens: the batch.
        hook_name: as in `Activations`.
        replacement: new block output, raw; may carry gradients.
        keep: positions to replace.

    Raises:
        UserError: the model has no such hook point.
    """
    with _hooked(model, canonical_hook(hook_name), replacement, keep) as hooks:
        return model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits")


@contextmanager
def _hooked(
    model: Any, hook_name: str, replacement: Float[Tensor, "B T D"], keep: Bool[Tensor, "B T"]
) -> Generator[list[tuple[str, Callable[[Tensor, Any], Tensor]]], None, None]:
    """The hook of a splice, with an error on exit if it was never called: some models ignore unknown hook names."""
    replace, calls = replace_at(replacement, keep), 0

    def counted(activation: Tensor, hook: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return replace(activation, hook)

    yield [(hook_name, counted)]
    if not calls:
        raise UserError(
            f"{type(model).__name__} never reached hook point {hook_name}, so nothing was spliced: use a model that "
            "has it, such as one of `Snapshots.model`"
        )
