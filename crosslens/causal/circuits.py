"""Edges between the features of two hook points: which lower features make an upper one fire, at every snapshot.

The pre-activation of an upper feature j is a sum over snapshots of what its encoder reads from each. At snapshot s and
position t' that part is

    h_js(t') = c_s <x_s(t'), W_enc[s, :, j]>,

and it depends on the lower activation y_s of the same snapshot's model through the blocks between the two hook points.
The edge from the lower feature i is the part of h_js that goes when f_is is set to zero, to first order:

    e_ijs = sum over t, t' of f_is(t) <W_dec[i, s] / c_s, d h_js(t') / d y_s(t)>,

summed over the positions t' at which j fires on the clean run and averaged over prompts. It is gradient times
activation, as in `attribution` with the method "gradient", whose metric is here an upper feature; the lower error node
and the lower bias carry the rest. An edge says what the model computes on these prompts, not what j means, and an early
snapshot's edge is of features that all snapshots activate together.

Symbols: B prompts of a batch, T positions, D d_model, G groups of prompts, A lower features active on any prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosslens.causal.attribution import clustered_error
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import BatchAt, PromptRuns, check_features
from crosslens.printing import Result
from crosslens.progress import tqdm
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.hooks import canonical_hook, hook_layer
from crosslens.snapshots.settings import ModelSettings
from crosslens.tasks.task import Task


def connect_features(
    lower: Crosscoder,
    upper: Crosscoder,
    snapshots: Snapshots,
    task: Task,
    features: Sequence[int],
    *,
    n: int = 10,
    settings: ModelSettings | None = None,
) -> pd.DataFrame:
    """Find the lower features that make upper ones fire on the prompts of a task, at every snapshot.

    Args:
        lower: a crosscoder at the earlier hook point.
        upper: one of the same snapshots at a later hook point.
        snapshots: the models.
        task: the prompts; their answers are not used.
        features: ids of upper features, such as those with the largest effects.
        n: edges of each that are kept: those of the n lower features with the largest |edge| at any snapshot.
        settings: how the models run; None runs them on the lower crosscoder's device.

    Returns:
        A row per upper feature, lower feature and snapshot: snapshot, label, step, feature, from_feature, edge (mean
        over prompts, in units of the upper pre-activation), edge_se (standard error over groups of prompts; missing
        with a single group), part (mean of what the upper feature reads from this snapshot where it fires), n_prompts,
        n_groups, from_hook. `table.to_json(path, orient="records")` writes it for other programs.

    Raises:
        UserError: hook points in the wrong order, crosscoders of other snapshots or with other positions, no such
            feature, n below 1, a task without usable prompts.
    """
    points = [canonical_hook(str(each.cfg.metadata.hook_name)) for each in (lower, upper)]
    first, last = (hook_layer(point) for point in points)
    if first > last or points[0] == points[1]:
        raise UserError(
            f"the lower crosscoder reads {points[0]} and the upper one {points[1]}: give the one at the earlier hook "
            "point first"
        )
    if n < 1:
        raise UserError(f"n={n} must be at least 1; 10 is usual")
    ids = check_features(features, upper.cfg.d_sae)
    runs = PromptRuns(lower, snapshots, task, paired=False, settings=settings)
    above = PromptRuns(upper, snapshots, task, paired=False, settings=settings)
    pairs = list(zip(runs.batches, above.batches, strict=True))
    if any(not torch.equal(a.tokens, b.tokens) or not torch.equal(*(r.keep(a.tokens) for r in (runs, above)))
           for a, b in pairs):  # fmt: skip
        raise UserError("the two crosscoders were trained on other positions of text: train both with one Dataset")
    fires = [clean.features[..., ids.to(clean.features.device)] != 0 for _, clean, _ in above.clean()]
    sizes = torch.bincount(runs.groups, minlength=runs.n_groups)
    edges, errors, parts = [], [], list[Tensor]()
    for s in tqdm(range(len(snapshots)), desc="Connecting", unit="snapshot", leave=False):
        reads = upper.W_enc_by_snapshot[s][:, ids].detach().float() * upper.activation_scale[s]
        sums = torch.zeros(runs.n_groups, len(ids), len(runs.features), dtype=torch.float64)
        read = torch.zeros(len(ids), dtype=torch.float64)
        model: Any = snapshots.model(s, runs.settings)
        for part, where in zip(runs.at(s), fires, strict=True):
            found, total = _edges(model, part, points, last, reads, where)
            group = runs.groups[part.first : part.first + len(part)]
            sums.index_add_(0, group, found)
            read += total
        edges.append(sums.sum(0) / len(runs))
        errors.append(clustered_error(sums, sizes.double()))
        parts.append(read / len(runs))
    return _table(snapshots, ids, runs, *(torch.stack(each, -1) for each in (edges, errors, parts)), n=n)


def _edges(
    model: Any,
    part: BatchAt,
    points: Sequence[str],
    last: int,
    reads: Float[Tensor, "D n"],
    where: Bool[Tensor, "B T n"],
) -> tuple[Float[Tensor, "B n A"], Float[Tensor, " n"]]:
    """Edges into n upper features in every prompt, and what these read, summed over prompts."""
    seen: list[Tensor] = []
    tokens = part.prompts.tokens.to(part.upper.tokens.device)
    x = part.clean.clone().requires_grad_()

    def put_in(activation: Tensor, hook: Any) -> Tensor:
        del hook  # TransformerLens passes the hook point by this name
        return x.to(activation.dtype).view_as(activation)  # attn.hook_z has heads

    def see(activation: Tensor, hook: Any) -> None:
        del hook
        seen.append(activation.flatten(2))

    with torch.enable_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(points[0], put_in), (points[1], see)], stop_at_layer=last + 1)
        read = (seen[0].float() @ reads * where).sum(1)
        B, A = len(part), len(part.directions)
        found = torch.zeros(B, reads.shape[1], A, dtype=torch.float64)
        for j in range(reads.shape[1]):
            (gradient,) = torch.autograd.grad(read[:, j].sum(), x, retain_graph=True)
            values = part.along(part.pairs, gradient).double().cpu()
            prompt, feature = part.pairs.tokens.cpu() // part.keep.shape[1], part.pairs.features.cpu()
            found[:, j].index_put_((prompt, feature), values, accumulate=True)
    return found, read.detach().double().cpu().sum(0)


def _table(
    snapshots: Snapshots,
    ids: Tensor,
    runs: PromptRuns,
    edges: Float[Tensor, "n A S"],
    errors: Float[Tensor, "n A S"],
    parts: Float[Tensor, "n S"],
    *,
    n: int,
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for j, upper in enumerate(ids.tolist()):
        size = edges[j].abs().amax(-1)
        for a in size.topk(min(n, len(size))).indices.tolist():
            if size[a] == 0:
                break
            rows += [
                {
                    "snapshot": s, "label": label, "step": step,
                    "feature": upper, "from_feature": int(runs.features[a]),
                    "edge": float(edges[j, a, s]), "edge_se": float(errors[j, a, s]), "part": float(parts[j, s]),
                    "n_prompts": len(runs), "n_groups": runs.n_groups,
                }
                for s, (label, step) in enumerate(zip(snapshots.labels, snapshots.steps, strict=True))
            ]  # fmt: skip
    columns = [
        "snapshot",
        "label",
        "step",
        "feature",
        "from_feature",
        "edge",
        "edge_se",
        "part",
        "n_prompts",
        "n_groups",
    ]
    table = pd.DataFrame(rows, columns=columns).astype({"step": "Int64"}).assign(from_hook=runs.hook_name)
    return Result.of(
        table,
        f"{runs.task.name}: the {n} largest edges into each of {len(ids)} upper features, on {len(runs)} prompts in "
        f"{runs.n_groups} groups",
        ["label", "feature", "from_feature", "edge", "edge_se", "part"],
        "what the upper feature reads less when the lower one is set to zero, to first order; part: what it reads",
    )
