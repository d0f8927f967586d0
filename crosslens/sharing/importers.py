"""Convert crosscoders of other projects (`crosslens.sharing.layouts`).

Activation scales stay separate and are never folded into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from crosslens.crosscoders import ARCHITECTURES, Crosscoder
from crosslens.crosscoders.inspection import check_scale
from crosslens.errors import UserError, did_you_mean
from crosslens.sharing.layouts import LAYOUTS


def import_crosscoder(
    path: str | Path,
    layout: str | None = None,
    *,
    activation_scale: Sequence[float] | None = None,
    model_name: str | None = None,
    hook_name: str | None = None,
) -> Crosscoder:
    """Load a crosscoder trained by another project; `save` it to load it faster next time.

    Args:
        path: folder with the files; for crosscoding_through_time the folder and file number, such as `version_3/20`;
            for dictionary_learning also the file.
        layout: "crosscoding_through_time", "ckkissane", "openmoss" or "dictionary_learning"; None recognises it by the
            files.
        activation_scale: scale of each snapshot, instead of those in the files.
        model_name: recorded if the files do not name the model.
        hook_name: recorded if the files do not name the hook point.

    Returns:
        A standard, BatchTopK or JumpReLU crosscoder for inference, in float32.

    Raises:
        UserError: files are missing, damaged, contradict each other, or need an architecture that does not exist here.
    """
    place = Path(path).expanduser()
    layout = layout or _recognise(place)
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown: use one of {', '.join(LAYOUTS)}{did_you_mean(layout, LAYOUTS)}")
    architecture, state, metadata = LAYOUTS[layout].read(place)
    if activation_scale is not None:
        if len(activation_scale) != len(state["activation_scale"]):
            raise UserError(
                f"{len(activation_scale)} values of activation_scale for {len(state['activation_scale'])} snapshots: "
                "give one per snapshot"
            )
        state["activation_scale"] = torch.tensor(activation_scale, dtype=torch.float32)
    check_scale(str(path), state["activation_scale"])
    given = {"model_name": model_name, "hook_name": hook_name}
    metadata = {**metadata, "imported_from": layout, **{k: v for k, v in given.items() if not metadata.get(k) and v}}
    return _make(architecture, state, metadata)


def _recognise(place: Path) -> str:
    for name, layout in LAYOUTS.items():
        if layout.holds(place):
            return name
    known = ", ".join(layout.description for layout in LAYOUTS.values())
    raise UserError(f"{place} holds no crosscoder of a known layout: give {known}")


def _make(architecture: str, state: dict[str, Tensor], metadata: Mapping[str, Any]) -> Crosscoder:
    sae_class, config_class = ARCHITECTURES[architecture]
    (d_in, d_sae), S = state["W_enc"].shape, len(state["activation_scale"])
    cfg = config_class(d_in=d_in, d_sae=d_sae, n_snapshots=S, device="meta", metadata=SAEMetadata(**metadata))
    crosscoder = sae_class(cfg)
    crosscoder.process_state_dict_for_loading(state)
    crosscoder.load_state_dict(state, assign=True)
    return crosscoder.to(device="cpu", dtype=torch.float32).eval().requires_grad_(False)
