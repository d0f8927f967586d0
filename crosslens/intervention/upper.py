"""Run only the part of a model above a hook point, because nothing below it depends on the activation there.

1. A HookedTransformer can start at any block (`start_at_layer`). A TransformerBridge cannot, because the loop over the
   blocks belongs to the transformers model. During a call, its blocks below the hook are therefore patched to return a
   given residual stream; embedding, positions, masks and everything above the hook remain the model's own code. Only
   the last position is unembedded if the model supports that.
2. Where the logits of a few tokens are wanted, such as those of the answers, the unembedding is patched in the same way
   to multiply with their rows alone: in a small model the whole vocabulary is most of the work.
3. Both fail if a late module reads something that an early one left behind, or mixes the logits of all tokens. So every
   model is tried on one prompt first, and what changes its logits is not done.

Symbols: B prompts, n rows (edited copies of prompts), T positions, D d_model, V vocabulary, W tokens whose logits are
wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from crosslens.snapshots.bridge import last_position, transformers_model
from crosslens.snapshots.hooks import canonical_hook, hook_layer


class Shortcuts(NamedTuple):
    """What a model can leave out above a hook point, with the same logits."""

    widths: tuple[int | None, ...]
    """Number of outputs of each block that is skipped; None for a bare tensor."""
    unembeds_some: bool
    """Whether some tokens can be unembedded without the others."""


class Readout(NamedTuple):
    """What the unembedding of some tokens needs."""

    tokens: Int[Tensor, " W"]
    weight: Float[Tensor, "W D"]
    bias: Float[Tensor, " W"]


class Upper:
    """A model above a hook point.

    Args:
        model: TransformerBridge or HookedTransformer.
        hook_name: as in `Activations`.
        tokens: a prompt on which the logits are compared with those of the whole model.
        shortcuts: those of an earlier `Upper` of the same model and hook point, to skip the comparison.

    Attributes:
        shortcuts: what is left out.
    """

    def __init__(
        self, model: Any, hook_name: str, tokens: Int[Tensor, "B T"], shortcuts: Shortcuts | None = None
    ) -> None:
        self.model, self.point = model, canonical_hook(hook_name)
        self._starts_anywhere, self._options = transformers_model(model) is None, last_position(model)
        self.shortcuts = self._tried(tokens) if shortcuts is None else shortcuts

    @property
    def skipped(self) -> int:
        """Number of blocks that are skipped."""
        return len(self.shortcuts.widths)

    @property
    def at_output(self) -> bool:
        """Whether the blocks above read nothing but the activation at the hook."""
        return self.skipped == hook_layer(self.point)

    @torch.no_grad()
    def on(self, tokens: Int[Tensor, "B T"], wanted: Int[Tensor, " W"] | None = None) -> UpperRun:
        """Prepare a batch of prompts; if the hook is inside a block, the blocks before it run once.

        Args:
            tokens: the prompts.
            wanted: tokens whose logits are wanted; all if None.
        """
        entry = None
        if self.skipped and not self.at_output:
            name = f"blocks.{self.skipped - 1}.hook_resid_post"
            entry = self.model.run_with_cache(
                tokens, names_filter=name, stop_at_layer=self.skipped, return_cache_object=False
            )[1][name]
        readout = None if wanted is None or not self.shortcuts.unembeds_some else self._readout(wanted)
        return UpperRun(self, tokens, entry, readout)

    def run(
        self,
        tokens: Int[Tensor, "n T"],
        x: Float[Tensor, "n T D"],
        entry: Float[Tensor, "n T D"] | None,
        readout: Readout | None,
    ) -> Float[Tensor, "n V"]:
        """Logits at the last position when the activation at the hook is `x`.

        Args:
            tokens: tokens of every row.
            x: activation at the hook, at all positions; may carry gradients.
            entry: residual stream into the first block that runs, if it is not `x`.
            readout: of the tokens whose logits are wanted; None for all.
        """

        def put_in(activation: Tensor, hook: Any) -> Tensor:
            del hook  # TransformerLens passes the hook point by this name
            return x.to(activation.dtype).view_as(activation)  # attn.hook_z has heads

        hooks: list[Any] = [] if self.at_output else [(self.point, put_in)]
        residual = x if self.at_output else entry
        given, options = tokens, self._options
        instead: dict[nn.Module, Callable[..., Any]] = {}
        if readout is not None:
            instead[self.model.unembed] = lambda hidden, **_: linear(hidden[:, -1:], readout.weight, readout.bias)
        if self.skipped:
            assert residual is not None
            if self._starts_anywhere:
                given, options = residual, {"start_at_layer": self.skipped}
            else:
                instead |= _returning(residual, self.model.blocks, self.shortcuts.widths)
        with _patched(instead):
            if not hooks:  # setting up hooks takes milliseconds
                return self.model(given, return_type="logits", **options)[:, -1]
            return self.model.run_with_hooks(given, fwd_hooks=hooks, return_type="logits", **options)[:, -1]

    @torch.no_grad()
    def _tried(self, tokens: Tensor) -> Shortcuts:
        """What can be left out without a change of the logits."""
        seen: list[Tensor] = []

        def capture(activation: Tensor, hook: Any) -> None:
            del hook
            seen.append(activation.flatten(2))

        # a hook point other than a block's output is inside a block, which has to run
        n = hook_layer(self.point) - (not self.point.endswith("hook_resid_post"))
        widths: list[int | None] = [None] * n

        def learn(place: int) -> Callable[..., None]:
            def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
                widths[place] = len(output) if isinstance(output, tuple) else None

            return note

        handles = [self.model.blocks[i].register_forward_hook(learn(i)) for i in range(n)]
        try:
            whole = self.model.run_with_hooks(tokens, fwd_hooks=[(self.point, capture)], return_type="logits")[:, -1]
        finally:
            for handle in handles:
                handle.remove()

        def equal(found: Tensor, expected: Tensor) -> bool:
            return bool((found - expected).abs().max() <= torch.finfo(whole.dtype).eps ** 0.5 * whole.abs().max())

        self.shortcuts = Shortcuts(tuple(widths), False)
        run = self.on(tokens)
        if n and not equal(run.logits(seen[0]), whole):
            self.shortcuts = Shortcuts((), False)
            run = self.on(tokens)
        ends = torch.tensor([0, whole.shape[1] - 1], device=whole.device)
        some = replace(run, readout=self._readout(ends))
        return self.shortcuts._replace(unembeds_some=equal(some.logits(seen[0]), whole[:, ends]))

    def _readout(self, wanted: Int[Tensor, " W"]) -> Readout:
        unembed = self.model.unembed
        return Readout(wanted, unembed.W_U.T[wanted], unembed.b_U[wanted])


@dataclass(frozen=True)
class UpperRun:
    """A batch of prompts for `Upper`.

    Attributes:
        upper: the model above the hook.
        tokens: (B, T).
        entry: (B, T, D) residual stream into the first block that runs, if it is not the activation at the hook.
        readout: of the tokens whose logits are wanted; None for all.
    """

    upper: Upper
    tokens: Int[Tensor, "B T"]
    entry: Float[Tensor, "B T D"] | None
    readout: Readout | None

    @property
    def wanted(self) -> Int[Tensor, " W"] | None:
        """Tokens whose logits `logits` returns, in this order; None for the whole vocabulary."""
        return None if self.readout is None else self.readout.tokens

    def logits(self, x: Float[Tensor, "n T D"], rows: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n V"]:
        """Logits at the last position when the activation at the hook is `x`; `rows` is the prompt of each row."""
        if rows is None:
            return self.upper.run(self.tokens, x, self.entry, self.readout)
        entry = None if self.entry is None else self.entry[rows]
        return self.upper.run(self.tokens[rows], x, entry, self.readout)


def _returning(
    residual: Tensor, blocks: nn.ModuleList, widths: tuple[int | None, ...]
) -> dict[nn.Module, Callable[..., Any]]:
    """What the first blocks do to return a residual stream; `widths` are the numbers of their outputs."""

    def instead(width: int | None) -> Callable[..., Any]:
        output = residual if width is None else (residual, *[None] * (width - 1))
        return lambda *_inputs, **_options: output

    return {blocks[i]: instead(width) for i, width in enumerate(widths)}


@contextmanager
def _patched(instead: Mapping[nn.Module, Callable[..., Any]]) -> Generator[None, None, None]:
    """Give modules another forward."""
    try:
        for module, forward in instead.items():
            # set on the instance, it hides the method of the class until it is deleted
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in instead:
            module.__dict__.pop("forward", None)
