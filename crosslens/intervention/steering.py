"""Steering: edit features of a model while it runs on any text, and while it writes.

`Splice` edits one batch of tokens whose clean run is known beforehand. Here the tokens are what the model is given, or
what it writes, so the clean run is made on the way:

1. Hooks on the model record its tokens in every forward pass, with what a cache of keys and values already holds.
2. At the hook point the parts of all snapshots below it run on these tokens, without edits, and their activations are
   encoded: the features f_s of the new positions are those that `CleanRun` has on the same text.
3. The activation x of the steered snapshot becomes

       x + (f'_s - f_s) W_dec[:, s] / c_s

   which is the splice with its error node. Positions that training leaves out keep theirs, and where no feature changes
   x is returned as it is.

What a cache holds above the hook comes from steered positions, as in one pass over the whole text, so the result is the
same with and without it. Where features are only added to (`Edit(factor=1.0, value=...)`), f'_s - f_s does not depend
on f_s, and no other snapshot is run. Otherwise every forward pass costs one through the lower part of all snapshots, on
the text so far.

Symbols: B prompts, T positions so far, n new positions, S snapshots, D d_model, F features.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosslens.activations.harvesting import harvest
from crosslens.activations.tokens import kept_positions
from crosslens.crosscoders import Crosscoder, CrosscoderTrainingSAE
from crosslens.errors import UserError
from crosslens.intervention.splice import Edit, apply_edit, clean_run
from crosslens.snapshots.bridge import transformers_model
from crosslens.snapshots.checks import check_snapshots
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook
from crosslens.snapshots.lookup import find_snapshot
from crosslens.snapshots.settings import ModelSettings
from crosslens.snapshots.snapshot import LanguageModel

_APART = 0.1  # of the norm; a cache or another dtype changes an activation by far less, another token by more


@contextmanager
def steer(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    snapshot: SupportsIndex | str,
    edits: Mapping[int, float] | Edit | Sequence[Edit],
    *,
    settings: ModelSettings | None = None,
) -> Generator[LanguageModel, None, None]:
    """Steer the model of a snapshot within the context.

        with cl.steer(crosscoder, snapshots, "step640", {217: 3.0}) as model:
            model.generate("The keys to the cabinet", max_new_tokens=20)

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        snapshot: index or label of the one that is steered.
        edits: a factor for each feature: 0 ablates it, 1 changes nothing; or `Edit`s, applied in order, which can also
            set features (`Edit([217], value=4.0)`) and add to them (`Edit([217], factor=1.0, value=4.0)`).
        settings: how the models run; None runs them on the crosscoder's device.

    Yields:
        The model, a TransformerBridge or HookedTransformer: call it, `generate`, `run_with_hooks`, `run_with_cache`,
        with or without a cache of keys and values. It is the one that `Snapshots.model` gives; it is not steered any
        more afterwards. Prompts of a batch need one length.

    Raises:
        UserError: a crosscoder of other snapshots or on another device, no such snapshot or feature, an edit of some
            positions or with other values than numbers; within the context padded prompts, or a cache that the model
            filled before, or whose rows were moved, as in a beam search.
    """
    check_snapshots(crosscoder, snapshots)
    s = find_snapshot(snapshots.labels, snapshot, snapshots.steps)
    settings = settings or ModelSettings(device=str(crosscoder.device))
    if torch.device(settings.device).type != torch.device(crosscoder.device).type:
        raise UserError(
            f"the crosscoder is on {crosscoder.device} and the models would run on {settings.device}: move it with "
            f"crosscoder.to({settings.device!r})"
        )
    if isinstance(crosscoder, CrosscoderTrainingSAE):
        crosscoder = crosscoder.to_inference()  # in training the gate may depend on the batch
    steering = _Steering(crosscoder, snapshots, s, _parse(edits, crosscoder), settings)
    model: Any = snapshots.model(s, settings)
    with steering.following(model), model.hooks(fwd_hooks=[(steering.hook_name, steering.hook)]):
        yield model


def _parse(edits: Mapping[int, float] | Edit | Sequence[Edit], crosscoder: Crosscoder) -> list[Edit]:
    """The edits; each has passed the checks of a batch of one token."""
    if isinstance(edits, Mapping):
        edits = [Edit([feature], factor=factor) for feature, factor in edits.items()]
    found = [edits] if isinstance(edits, Edit) else list(edits)
    if not found:
        raise UserError("no edits are given: give a factor for each feature, such as {217: 3.0}")
    F = crosscoder.cfg.d_sae
    for edit in found:
        shape = tuple(torch.as_tensor(edit.value).shape) if isinstance(edit.value, float | int | Tensor) else None
        if edit.positions is not None or shape not in ((), (F,)):
            raise UserError(
                "steering edits every position of a text that is not known yet: give an Edit without positions, with "
                f"one number or ({F},) numbers; for a batch of known tokens use Splice"
            )
        apply_edit(torch.zeros(1, 1, F, device=crosscoder.device), edit, crosscoder, 0)
    return found


class _Steering:
    """What the hooks of a steered model share: the text so far, and which of its positions are new."""

    def __init__(
        self,
        crosscoder: Crosscoder,
        snapshots: Snapshots,
        snapshot: int,
        edits: Sequence[Edit],
        settings: ModelSettings,
    ) -> None:
        self.crosscoder, self.snapshots, self.snapshot = crosscoder, snapshots, snapshot
        self.edits, self.settings = edits, settings
        metadata = crosscoder.cfg.metadata
        self.hook_name = canonical_hook(metadata.hook_name)
        self._kept = metadata.keep_special, metadata.separator, metadata.drop_positions
        self._reads = any(edit.factor != 1 for edit in edits)
        self._given: Tensor | None = None  # the tokens that were embedded last
        self._text: Tensor | None = None  # (B, T)

    @contextmanager
    def following(self, model: Any) -> Generator[None, None, None]:
        """Record the tokens of every forward pass of `model`."""
        if (inside := transformers_model(model)) is not None:
            handles = [inside.register_forward_pre_hook(self._bridge_begins, with_kwargs=True)]
        else:  # its `generate` embeds tokens itself, one at a time, and passes on their embeddings
            handles = [
                model.embed.register_forward_pre_hook(self._embeds),
                model.blocks[0].register_forward_pre_hook(self._hooked_begins, with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _bridge_begins(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        given = args[0] if args else kwargs.get("input_ids")
        if given is None:
            raise UserError("a steered model was given embeddings: give tokens or text, whose features can be read")
        self._given = given
        cache = kwargs.get("past_key_values")
        self._begin(0 if cache is None else int(cache.get_seq_length()), given.shape[1], kwargs.get("attention_mask"))

    def _embeds(self, _module: nn.Module, args: Any) -> None:
        self._given = args[0]

    def _hooked_begins(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        cache = kwargs.get("past_kv_cache_entry")
        past = 0 if cache is None else int(cache.past_keys.shape[1])
        self._begin(past, args[0].shape[1], kwargs.get("attention_mask"))

    def _begin(self, past: int, n: int, mask: Tensor | None) -> None:
        """A forward pass over n positions after `past` in the cache; the last of them were embedded for it."""
        if mask is not None and mask.ndim == 2 and not bool(mask.all()):
            raise UserError(
                "a steered model was given padded prompts: give prompts of one length, or one prompt after the other"
            )
        assert self._given is not None
        given, before = self._given, past + n - self._given.shape[1]
        known = 0 if self._text is None or len(self._text) != len(given) else self._text.shape[1]
        if not 0 <= before <= known:
            raise UserError(
                f"a steered model continues a text of {before} tokens that it did not read while it was steered: begin "
                "with an empty cache, and with tokens"
            )
        self._text = given if not before or self._text is None else torch.cat([self._text[:, :before], given], 1)

    def hook(self, activation: Tensor, hook: Any) -> Tensor:
        """x + (f'_s - f_s) W_dec[:, s] / c_s at the new positions."""
        del hook  # TransformerLens passes the hook point by this name
        flat = activation.flatten(2)  # the heads of attn.hook_z side by side
        change = self._change(flat)
        return torch.where(change.any(-1, keepdim=True), flat + change.to(flat), flat).view_as(activation)

    @torch.no_grad()
    def _change(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        assert self._text is not None
        text, crosscoder, n = self._text, self.crosscoder, x.shape[1]
        keep = kept_positions(text, self.snapshots.tokenizer, *self._kept)[:, -n:].to(crosscoder.device)
        clean = torch.zeros(*x.shape[:2], crosscoder.cfg.d_sae, dtype=crosscoder.dtype, device=crosscoder.device)
        if self._reads:
            clean = self._features(text, x, keep)
        features = clean
        for edit in self.edits:
            features = apply_edit(features, edit, crosscoder, self.snapshot)
        change = crosscoder.decode_snapshot(features - clean, self.snapshot, bias=False)
        return torch.where(keep[..., None], change, 0.0)

    def _features(self, text: Int[Tensor, "B T"], x: Float[Tensor, "B n D"], keep: Tensor) -> Float[Tensor, "B n F"]:
        """f_s of the clean run at the last n positions of the text."""
        crosscoder, n = self.crosscoder, x.shape[1]
        # models of their own, cut above the hook: the steered one is in the middle of a forward pass
        acts = harvest(self.snapshots, text, crosscoder.cfg.metadata.hook_name, self.settings, cut=True)
        acts = acts[:, -n:].to(crosscoder.device)
        expected = acts[:, :, self.snapshot]
        apart = (x - expected).norm(dim=-1) / expected.norm(dim=-1)
        if bool((apart > _APART).any()):
            raise UserError(
                f"the activation at {self.hook_name} is not that of the text (it differs by {float(apart.max()):.0%}): "
                "a steered model takes no edits below this hook, and no cache with moved rows, as in a beam search"
            )
        run = clean_run(crosscoder, text[:, -n:].to(crosscoder.device), acts, keep)
        return run.snapshot_acts(crosscoder, self.snapshot)
