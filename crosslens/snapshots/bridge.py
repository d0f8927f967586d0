"""TransformerLens: all that imports it, and all that is used of its classes beyond running them.

Other modules run a model by `run_with_hooks`, `run_with_cache` (with `stop_at_layer`, and for a HookedTransformer
`start_at_layer`), `generate` and the call itself. They read `cfg.n_heads`, `cfg.d_vocab`, `cfg.normalization_type`,
`ln_final.w`, `unembed.W_U` and `unembed.b_U`, attach hooks of torch to `blocks` and `embed`, replace the `forward` of
`blocks` and `unembed` during a call, and ask here for the rest. `tests/snapshots/test_bridge.py` is the contract, which
`make test-bridge` runs with TransformerLens 4.
"""

from __future__ import annotations

import functools
import inspect
from importlib.metadata import version
from typing import Any

from crosslens.errors import UserError

BRIDGE, HOOKED = "TransformerBridge", "HookedTransformer"


def boot(model: Any, name: str, tokenizer: Any, device: str, dtype: Any, attention: str, trust: bool) -> Any:
    """A raw TransformerBridge of a model of transformers: no compatibility mode, which would centre the weights.

    Args:
        model: of transformers, on the device, with eager attention.
        name: of its repository or folder.
        tokenizer: its tokenizer.
        device: a torch device.
        dtype: of its parameters.
        attention: "eager", or another implementation of transformers; hooks inside attention are then silent.
        trust: whether code that the repository brings may run.
    """
    from transformer_lens.model_bridge import TransformerBridge  # slow imports
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]  # which TransformerLens looks up
    found: Any = TransformerBridge.boot_transformers(
        name, hf_model=model, tokenizer=tokenizer, device=device, dtype=dtype, trust_remote_code=trust
    )
    if attention != "eager":
        model.set_attn_implementation(attention)  # booting sets some families to eager
        # the bridges of most families compute scores themselves, so that hooks see them; their base class calls the
        # attention of transformers, in which hooks at its input, output and heads (z) remain
        for block in found.blocks:
            block.attn.__dict__["forward"] = functools.partial(AttentionBridge.forward, block.attn)
    for block in found.blocks:
        block.attn.register_forward_hook(_drop_pattern)
    return found


def _drop_pattern(attention: Any, *_: Any) -> None:
    """Bridges of some families keep (B, heads, T, T) of every block after the forward pass, and read it nowhere."""
    if getattr(attention, "_pattern", None) is not None:
        attention._pattern = None


def boot_hooked(
    model: Any, name: str, commit: str, tokenizer: Any, device: str, dtype: Any, n_blocks: int | None, trust: bool
) -> Any:
    """A HookedTransformer without weight processing; arguments as in `boot`, and the commit of its configuration.

    TransformerLens has its own list of sizes for some families, and raises errors of many kinds for others.
    """
    from transformer_lens import HookedTransformer

    # checkpoint_value= would download weights of its own; revision= only selects the config
    return HookedTransformer.from_pretrained_no_processing(
        name,
        hf_model=model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        revision=commit,
        first_n_layers=n_blocks,
        trust_remote_code=trust,
    )


def official_name(repository: str) -> tuple[str, bool] | None:
    """TransformerLens's own name of a repository for `boot_hooked`, and whether it runs code from the hub for it."""
    from transformer_lens.loading_from_pretrained import NEED_REMOTE_CODE_MODELS, get_official_model_name

    try:
        known = get_official_model_name(repository)
    except ValueError:
        return None
    return known, known.startswith(NEED_REMOTE_CODE_MODELS)


def kind_of(model: Any) -> str | None:
    """`BRIDGE` or `HOOKED`; None if it is of neither class."""
    from transformer_lens.model_bridge import TransformerBridge

    if isinstance(model, TransformerBridge):
        return BRIDGE
    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # TransformerLens 4 has none
        return None
    return HOOKED if isinstance(model, HookedTransformer) else None


def transformers_model(model: Any) -> Any | None:
    """The model of transformers that a bridge runs; None of a HookedTransformer, which runs its own code."""
    return getattr(model, "original_model", None)


def last_position(model: Any) -> dict[str, Any]:
    """Options of a call by which a model unembeds the last position alone and keeps no cache, if it has them."""
    inside = transformers_model(model)
    known = {} if inside is None else inspect.signature(inside.forward).parameters
    return {name: value for name, value in (("logits_to_keep", 1), ("use_cache", False)) if name in known}


def check_architecture(config: Any) -> None:
    """Refuse a configuration of transformers that TransformerLens has no bridge for; reads no weights.

    Raises:
        UserError: names the architecture and the installed release.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    known = [mapping[type(config)].__name__] if type(config) in mapping else []
    names = [*(config.architectures or ()), *known]
    if names and not {*names} & {*SUPPORTED_ARCHITECTURES}:
        raise UserError(
            f"TransformerLens {version('transformer-lens')} has no TransformerBridge for {names[0]}, so its "
            "activations cannot be read: choose a model of another architecture"
        )
