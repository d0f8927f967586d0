"""Start a training from the weights of another crosscoder: over the same snapshots or more, with its features or more.

1. Snapshots are matched by label; where no label is shared and both have as many, by position. A snapshot that the
   other crosscoder does not have starts from the nearest one that it has, in steps where both have them, otherwise in
   position.
2. Decoder rows and biases are those of that snapshot, in its scale: c_s is the scale of the nearest snapshot times the
   ratio of the scales that the data give both, and b_dec[s] moves with the mean of the scaled activations.
3. The n snapshots that start from one share its encoder rows, each 1/n of them. Where their activations are equal, a
   feature then has the pre-activation that it had.
4. Features beyond those of the other crosscoder start as in any training.

Symbols: S snapshots, D d_model, F features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from crosslens.crosscoders import Crosscoder, CrosscoderTrainingConfig, CrosscoderTrainingSAE, load
from crosslens.crosscoders.checksums import tensor_checksum
from crosslens.errors import UserError, json_checksum
from crosslens.rundir import crosscoder_folder
from crosslens.snapshots.hooks import canonical_hook

_SHARED = ("W_enc", "b_enc", "W_dec", "b_dec", "activation_scale")


def open_source(source: Crosscoder | str | Path) -> Crosscoder:
    """The crosscoder to start from.

    Args:
        source: a crosscoder, such as `import_crosscoder` returns; a folder that `save` wrote; or a run directory.

    Raises:
        UserError: no crosscoder is there.
    """
    if isinstance(source, Crosscoder):
        return source
    folder = Path(source).expanduser()
    return load(crosscoder_folder(folder) or folder, device="cpu")


def source_digest(source: Crosscoder) -> str:
    """A digest of the weights of a crosscoder, for the identity of a training that starts from it."""
    return json_checksum({name: tensor_checksum([tensor]) for name, tensor in source.state_dict().items()})


def check_source(source: Crosscoder, architecture: CrosscoderTrainingConfig) -> None:
    """Check that a crosscoder can be continued as another.

    Args:
        source: what is started from.
        architecture: what is trained, with shapes and metadata filled in from the data.

    Raises:
        UserError: another width or hook point, fewer features, or snapshots that the data lack.
    """
    if source.d_model != architecture.d_model:
        raise UserError(
            f"init_from has d_model {source.d_model}, the activations have {architecture.d_model}: give a crosscoder "
            "of models of that width"
        )
    of, to = source.cfg.metadata.hook_name, architecture.metadata.hook_name
    if of and to and canonical_hook(of) != canonical_hook(to):
        raise UserError(f"init_from was trained at {of}, the activations are of {to}: give activations of {of}")
    if architecture.d_sae < source.cfg.d_sae:
        raise UserError(
            f"d_sae={architecture.d_sae} is less than the {source.cfg.d_sae} features of init_from: give that or more"
        )
    for name in ("n_shared", "dedicated"):
        has, wanted = getattr(source.cfg, name), getattr(architecture, name)
        if has != wanted:
            raise UserError(f"init_from has {name}={has}, this training {name}={wanted}: give the same")
    origins(source, architecture)


def origins(source: Crosscoder, architecture: CrosscoderTrainingConfig) -> list[int]:
    """For every snapshot the index of the snapshot of `source` that it starts from.

    Raises:
        UserError: `source` has snapshots that the data lack.
    """
    known, wanted = source.cfg.snapshot_labels, architecture.snapshot_labels
    if not set(known) & set(wanted):
        if len(known) == len(wanted):
            return list(range(len(known)))
        raise UserError(
            f"init_from has the snapshots {', '.join(known)}, none of which is among {', '.join(wanted)}: give its "
            "snapshots and others, or as many as it has, in its order"
        )
    if lost := [label for label in known if label not in wanted]:
        raise UserError(
            f"init_from has the snapshots {', '.join(lost)}, which the activations lack: its features read them, so "
            "give activations of all its snapshots"
        )
    steps_known, steps_wanted = _steps(source.cfg), _steps(architecture)
    found: list[int] = []
    for s, label in enumerate(wanted):
        if label in known:
            found.append(known.index(label))
            continue
        here: Sequence[float] = [wanted.index(name) for name in known]
        at: float = s
        if steps_known is not None and steps_wanted is not None:
            here, at = steps_known, steps_wanted[s]
        found.append(min(range(len(known)), key=lambda i: abs(here[i] - at)))
    return found


def _steps(config: Any) -> list[int] | None:
    steps = [row.get("step") for row in config.metadata.snapshots or []]
    return None if not steps or None in steps else steps


@torch.no_grad()
def start_from(
    sae: CrosscoderTrainingSAE, source: Crosscoder, means: Float[Tensor, "S D"], scale: Float[Tensor, " S"]
) -> None:
    """Give a new crosscoder the weights of another.

    Args:
        sae: as initialised; with several processes it holds some of the features.
        source: what is started from; checked by `check_source`.
        means: raw mean activation of every snapshot.
        scale: c_s that the data give every snapshot.
    """
    S, own = sae.n_snapshots, sae.own
    mine = slice(own.start, min(own.stop, source.cfg.d_sae))
    n = max(0, mine.stop - mine.start)
    origin = origins(source, sae.cfg)
    counts = Counter(origin)
    labels = sae.cfg.snapshot_labels
    # where each snapshot of the source is among those of the data; where no label is shared, in its place
    first = [labels.index(each) if each in labels else i for i, each in enumerate(source.cfg.snapshot_labels)]
    c = source.activation_scale.double().cpu()
    scales = torch.stack([c[i] * (scale[s] / scale[first[i]]).double() for s, i in enumerate(origin)])
    shifts = torch.stack([scales[s] * means[s] - scales[first[i]] * means[first[i]] for s, i in enumerate(origin)])
    b_dec = source.b_dec_by_snapshot.double().cpu()[origin] + shifts
    shares = torch.tensor([1 / counts[i] for i in origin], dtype=torch.float64)
    encoder = rearrange(source.W_enc.double().cpu()[:, mine], "(s d) f -> s d f", d=source.d_model)
    W_enc = encoder[origin] * shares[:, None, None]
    relative = source.b_enc.double().cpu()[mine]  # the bias of features that read deviations from b_dec
    if not source.cfg.apply_b_dec_to_input:
        relative = relative + torch.einsum("sd,sdf->f", source.b_dec_by_snapshot.double().cpu(), encoder)
    b_enc = relative if sae.cfg.apply_b_dec_to_input else relative - torch.einsum("sd,sdf->f", b_dec, W_enc)
    sae.activation_scale.copy_(scales)
    sae.b_dec.copy_(b_dec.flatten())
    sae.W_enc[:, :n].copy_(W_enc.flatten(0, 1))
    sae.W_dec.unflatten(1, (S, -1))[:n].copy_(source.W_dec_by_snapshot[mine][:, origin])
    sae.b_enc[:n].copy_(b_enc)
    sae.constrain_()  # a new snapshot starts from one that features may be dedicated to
    if not sae.cfg.apply_b_dec_to_input:
        sae.b_enc[n:].copy_(-(sae.b_dec @ sae.W_enc[:, n:]))
    mine_now, theirs = dict(sae.named_parameters()) | dict(sae.named_buffers()), sae.trained(source.state_dict())
    for name in sorted((mine_now.keys() & theirs.keys()) - set(_SHARED)):  # of the gate
        if theirs[name].dim():
            mine_now[name][:n].copy_(theirs[name][mine])
        else:  # a threshold of scores, which add up the decoder norms of all snapshots
            norms = source.decoder_norms
            mine_now[name].copy_(theirs[name] * norms[:, origin].sum() / norms.sum())
