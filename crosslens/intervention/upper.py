"""Run only the part of a model above a hook point, because nothing below it depends on the activation there.

1. A HookedTransformer can start at any block (`start_at_layer`). A TransformerBridge cannot, because the loop over the
   blocks belongs to the transformers model. During a call, its blocks below the hook are therefore patched to return a
   given residual stream; embedding, positions, masks and everything above the hook remain the model's own code. Only
   the last position is unembedded if the model supports that.
2. This fails if a late block reads something that an early one left behind. So every model is tried on one prompt
   first, and if the logits differ from those of the whole model, all blocks are run.

Symbols: B prompts, n rows (edited copies of prompts), T positions, D d_model, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosslens.snapshots.bridge import transformers_model
from crosslens.snapshots.hooks import canonical_hook, hook_layer


class Upper:
    """A model above a hook point.

    Args:
        model: TransformerBridge or HookedTransformer.
        hook_name: as in `Activations`.
        tokens: a prompt on which the logits are compared with those of the whole model.
        widths: those of an earlier `Upper` of the same model and hook point, to skip the comparison.

    Attributes:
        widths: number of outputs of each block that is skipped; None for a bare tensor.
    """

    def __init__(
        self, model: Any, hook_name: str, tokens: Int[Tensor, "B T"], widths: Sequence[int | None] | None = None
    ) -> None:
        self.model, self.point = model, canonical_hook(hook_name)
        inside = transformers_model(model)
        self._starts_anywhere = inside is None
        accepted = {} if inside is None else inspect.signature(inside.forward).parameters
        self._options = {
            name: value for name, value in (("logits_to_keep", 1), ("use_cache", False)) if name in accepted
        }
        # a hook point other than a block's output is inside a block, which has to run
        n = hook_layer(hook_name) - (not self.point.endswith("hook_resid_post"))
        self.widths: list[int | None] = [None] * n if widths is None else list(widths)
        if widths is None and n and not self._is_exact(tokens):
            self.widths = []

    @property
    def skipped(self) -> int:
        """Number of blocks that are skipped."""
        return len(self.widths)

    @property
    def at_output(self) -> bool:
        """Whether the blocks above read nothing but the activation at the hook."""
        return self.skipped == hook_layer(self.point)

    @torch.no_grad()
    def on(self, tokens: Int[Tensor, "B T"]) -> UpperRun:
        """Prepare a batch of prompts; if the hook is inside a block, the blocks before it run once."""
        entry = None
        if self.skipped and not self.at_output:
            name = f"blocks.{self.skipped - 1}.hook_resid_post"
            entry = self.model.run_with_cache(
                tokens, names_filter=name, stop_at_layer=self.skipped, return_cache_object=False
            )[1][name]
        return UpperRun(self, tokens, entry)

    def run(
        self, tokens: Int[Tensor, "n T"], x: Float[Tensor, "n T D"], entry: Float[Tensor, "n T D"] | None
    ) -> Float[Tensor, "n V"]:
        """Logits at the last position when the activation at the hook is `x`.

        Args:
            tokens: tokens of every row.
            x: activation at the hook, at all positions; may carry gradients.
            entry: residual stream into the first block that runs, if it is not `x`.
        """

        def put_in(activation: Tensor, hook: Any) -> Tensor:
            del hook  # TransformerLens passes the hook point by this name
            return x.to(activation.dtype).view_as(activation)  # attn.hook_z has heads

        hooks = [] if self.at_output else [(self.point, put_in)]
        residual = x if self.at_output else entry
        if not self.skipped:
            return self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", **self._options)[:, -1]
        if self._starts_anywhere:
            return self.model.run_with_hooks(
                residual, fwd_hooks=hooks, return_type="logits", start_at_layer=self.skipped
            )[:, -1]
        assert residual is not None
        with _patched(self.model.blocks, residual, self.widths):
            if not hooks:  # setting up hooks takes milliseconds
                return self.model(tokens, return_type="logits", **self._options)[:, -1]
            return self.model.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", **self._options)[:, -1]

    @torch.no_grad()
    def _is_exact(self, tokens: Tensor) -> bool:
        """Whether skipping blocks changes nothing; also records how the skipped blocks wrap their output."""
        seen: list[Tensor] = []

        def capture(activation: Tensor, hook: Any) -> None:
            del hook
            seen.append(activation.flatten(2))

        def learn(place: int) -> Callable[..., None]:
            def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self.widths[place] = len(output) if isinstance(output, tuple) else None

            return note

        handles = [self.model.blocks[i].register_forward_hook(learn(i)) for i in range(self.skipped)]
        try:
            whole = self.model.run_with_hooks(tokens, fwd_hooks=[(self.point, capture)], return_type="logits")[:, -1]
        finally:
            for handle in handles:
                handle.remove()
        short = self.on(tokens).logits(seen[0])
        return bool((short - whole).abs().max() <= torch.finfo(whole.dtype).eps ** 0.5 * whole.abs().max())


@dataclass(frozen=True)
class UpperRun:
    """A batch of prompts for `Upper`.

    Attributes:
        upper: the model above the hook.
        tokens: (B, T).
        entry: (B, T, D) residual stream into the first block that runs, if it is not the activation at the hook.
    """

    upper: Upper
    tokens: Int[Tensor, "B T"]
    entry: Float[Tensor, "B T D"] | None

    def logits(self, x: Float[Tensor, "n T D"], rows: Int[Tensor, " n"] | None = None) -> Float[Tensor, "n V"]:
        """Logits at the last position when the activation at the hook is `x`; `rows` is the prompt of each row."""
        if rows is None:
            return self.upper.run(self.tokens, x, self.entry)
        return self.upper.run(self.tokens[rows], x, None if self.entry is None else self.entry[rows])


@contextmanager
def _patched(blocks: nn.ModuleList, residual: Tensor, widths: list[int | None]) -> Generator[None, None, None]:
    """Patch blocks to return a residual stream; `widths` are the numbers of their outputs, None for a bare tensor."""

    def instead(width: int | None) -> Callable[..., Any]:
        output = residual if width is None else (residual, *[None] * (width - 1))
        return lambda *_inputs, **_options: output

    skipped = [blocks[i] for i in range(len(widths))]
    try:
        for block, width in zip(skipped, widths, strict=True):
            # set on the instance, it hides the method of the class until it is deleted
            block.__dict__["forward"] = instead(width)
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)
