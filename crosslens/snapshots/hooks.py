"""Hook points by their TransformerLens names: which are supported, at which layer, and whether a model has them.

`canonical_hook` and `hook_layer` belong together: run `hook_layer(name)` blocks and read the activation under
`canonical_hook(name)`.
"""

from __future__ import annotations

import re
from typing import Any

from crosslens.errors import UserError

_HOOK = re.compile(r"blocks\.(0|[1-9]\d*)\.(hook_resid_pre|hook_resid_mid|hook_resid_post|hook_attn_out|hook_mlp_out)")
# attention and MLP of these blocks read the same residual stream, so there is no middle
_PARALLEL = ("codegen", "cohere", "cohere2", "gptj", "phi")


def hook_layer(hook_name: str) -> int:
    """Number of blocks to run to reach `canonical_hook(hook_name)`: the value for `stop_at_layer`.

    Raises:
        UserError: not one of the supported hook points.
    """
    layer, point = _parse_hook(hook_name)
    return layer if point == "hook_resid_pre" and layer else layer + 1


def canonical_hook(hook_name: str) -> str:
    """`blocks.L.hook_resid_pre` with L > 0 as `blocks.{L-1}.hook_resid_post`; any other name unchanged.

    They are the same activation, but the first cannot be read when the model stops before block L.
    """
    match = _HOOK.fullmatch(hook_name)
    if match and match[2] == "hook_resid_pre" and int(match[1]):
        return f"blocks.{int(match[1]) - 1}.hook_resid_post"
    return hook_name


def _parse_hook(hook_name: str) -> tuple[int, str]:
    match = _HOOK.fullmatch(hook_name)
    if not match:
        raise UserError(
            f"hook_name={hook_name!r} is not supported: choose hook_resid_pre, hook_resid_mid, hook_resid_post, "
            "hook_attn_out or hook_mlp_out of a block, such as 'blocks.1.hook_resid_post'"
        )
    return int(match[1]), match[2]


def check_hook(hook_name: str, config: Any) -> None:
    """Refuse a hook point that a model with this transformers configuration does not have.

    Raises:
        UserError: not supported, a block beyond the last, or a point that blocks of this kind lack.
    """
    layer, point = _parse_hook(hook_name)
    n_layers = int(config.num_hidden_layers)
    if layer >= n_layers:
        raise UserError(
            f"hook_name={hook_name!r} does not exist: the model has {n_layers} blocks, 0 to {n_layers - 1}, so choose "
            f"for instance 'blocks.{min(1, n_layers - 1)}.hook_resid_post'"
        )
    parallel = getattr(config, "use_parallel_residual", False) or getattr(config, "parallel_attn", False)
    if point == "hook_resid_mid" and (parallel or config.model_type in _PARALLEL):
        raise UserError(
            f"hook_name={hook_name!r} does not exist: attention and MLP of these blocks run in parallel, so choose "
            f"'blocks.{layer}.hook_resid_pre' or 'blocks.{layer}.hook_resid_post'"
        )
