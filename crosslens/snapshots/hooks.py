"""Hook points by their TransformerLens names: which are supported, how deep, how wide, and whether a model has them.

`canonical_hook` and `hook_layer` belong together: run `hook_layer(name)` blocks and read the activation under
`canonical_hook(name)`.

    hook_resid_pre, _mid, _post    the residual stream before, inside and after a block
    hook_attn_out, hook_mlp_out    what attention and MLP add to it
    attn.hook_z                    the heads' outputs before they are mixed, (B, T, n_heads, d_head) as one vector
    ln2.hook_normalized            the MLP's input before the gain and bias of its norm
    mlp.hook_in                    the MLP's input (of a TransformerBridge: a HookedTransformer has no such name)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from crosslens.errors import UserError

_POINTS = (
    *("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"),
    *("attn.hook_z", "ln2.hook_normalized", "mlp.hook_in"),
)
_HOOK = re.compile(rf"blocks\.(0|[1-9]\d*)\.({'|'.join(map(re.escape, _POINTS))})")
# attention and MLP of these blocks read the same residual stream, so there is no middle, and one norm serves both
_PARALLEL = ("codegen", "cohere", "cohere2", "gptj", "phi")
# the second norm of these blocks comes after the MLP
_POST_NORM = ("olmo2", "olmo3")

# names of TransformerLens that cannot be used, with the reason and the remedy
_OTHERS = {
    "hook_mlp_in": "is the residual stream that the MLP's norm reads: choose hook_resid_mid (hook_resid_pre where "
    "attention and MLP run in parallel), or the normalised input, ln2.hook_normalized",
    "hook_attn_in": "is the residual stream, once for each head: choose hook_resid_pre",
    **dict.fromkeys(
        ("attn.hook_pattern", "attn.hook_attn_scores"),
        "has one number for each pair of positions, not a vector for each position: choose attn.hook_z or "
        "hook_attn_out",
    ),
    **dict.fromkeys(
        ("hook_q_input", "hook_k_input", "hook_v_input", "attn.hook_result"),
        "has a vector for each head and position, which is not of shape (B, T, D): choose hook_resid_pre or "
        "hook_attn_out",
    ),
}


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


def hook_width(hook_name: str, config: Any) -> int:
    """Width D of the activation at a hook point, from a transformers configuration: d_model, or n_heads * d_head."""
    if not hook_name.endswith("attn.hook_z"):
        return int(config.hidden_size)
    return int(config.num_attention_heads) * int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _parse_hook(hook_name: str) -> tuple[int, str]:
    match = _HOOK.fullmatch(hook_name)
    if not match:
        _, _, point = hook_name.partition(".")[2].partition(".")
        if point in _OTHERS:
            raise UserError(f"hook_name={hook_name!r} {_OTHERS[point]}")
        raise UserError(
            f"hook_name={hook_name!r} is not supported: choose {', '.join(_POINTS[:-1])} or {_POINTS[-1]} of a block, "
            "such as 'blocks.1.hook_resid_post'"
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
    if point == "ln2.hook_normalized" and config.model_type in (*_PARALLEL, *_POST_NORM):
        raise UserError(
            f"hook_name={hook_name!r} is not the input of the MLP: blocks of {config.model_type} have no norm of their "
            f"own before it, so choose 'blocks.{layer}.mlp.hook_in'"
        )


def check_hooks(hook_names: Sequence[str], backend: str = "bridge") -> None:
    """Refuse an empty list of hook points, one that is given twice, and one that a backend lacks.

    Raises:
        UserError: names the hook point.
    """
    if not hook_names:
        raise UserError("hook_name is an empty list: give one or more, such as 'blocks.1.hook_resid_post'")
    names = [canonical_hook(name) for name in hook_names]
    for hook_name, name in zip(hook_names, names, strict=True):
        if names.count(name) > 1:
            raise UserError(f"hook_name={hook_name!r} is given twice, perhaps by another name: give it once")
        check_backend(hook_name, backend)


def check_backend(hook_name: str, backend: str) -> None:
    """Refuse a hook point that a backend does not have under this name.

    Raises:
        UserError: `mlp.hook_in` of a HookedTransformer.
    """
    layer, point = _parse_hook(hook_name)
    if point == "mlp.hook_in" and backend == "hooked_transformer":
        raise UserError(
            f"hook_name={hook_name!r} is a name of TransformerBridge: use backend='bridge', or the input before gain "
            f"and bias, 'blocks.{layer}.ln2.hook_normalized'"
        )
