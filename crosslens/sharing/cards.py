"""Model card of a crosscoder, and a picture of how its features evolve.

A card says what the crosscoder is, how to load it, which snapshots and data it was trained on, how good it is at each
snapshot, and what to cite. Names and labels may come from untrusted files, so they are escaped in Markdown and SVG.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData
from jaxtyping import Float
from torch import Tensor

from crosslens import rundir
from crosslens.crosscoders import DECLARATIONS, Crosscoder
from crosslens.errors import UserError
from crosslens.evolution.lifecycles import relative_norms

if TYPE_CHECKING:
    Frame: TypeAlias = Any  # pandas types everything taken out of a frame as a wide union
else:
    Frame = pd.DataFrame

_COLOURS = ("#eef1f4", "#b9d3e6", "#6ea8d2", "#2372ad", "#073763")
_TOKEN = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|xox[bp]-|AKIA)[A-Za-z0-9_-]{12,}")
_COLUMNS = {
    "explained_variance": ("explained variance", ".3f"),
    "l0": ("L0", ".1f"),
    "ce_clean": ("CE clean", ".3f"),
    "ce_spliced": ("CE spliced", ".3f"),
    "kl": ("KL", ".4f"),
}
_CITATION = """```bibtex
@article{ge2025evolution,
  title = {Evolution of Concepts in Language Model Pre-Training},
  author = {Ge, Xuyang and others},
  journal = {arXiv preprint arXiv:2509.17196},
  year = {2025}
}
@article{bayazit2025crosscoding,
  title = {Crosscoding Through Time: Tracking Emergence and Consolidation of Linguistic Representations Throughout LLM Pretraining},
  author = {Bayazit, Deniz and others},
  journal = {arXiv preprint arXiv:2509.05291},
  year = {2025}
}
```"""  # noqa: E501


def make_card(
    crosscoder: Crosscoder,
    repo_id: str,
    sae_id: str,
    *,
    licence: str | None = None,
    evaluation: Frame | None = None,
    run: dict[str, Any] | None = None,
    picture: str | None = None,
) -> str:
    """Make the model card: Markdown with the hub's front matter.

    Args:
        crosscoder: the crosscoder.
        repo_id: repository it will be published in.
        sae_id: its folder there.
        licence: licence of the weights in the hub's spelling, such as "mit".
        evaluation: table returned by `evaluate`.
        run: contents of run.json: data, training settings, versions.
        picture: path of the picture, relative to the card.
    """
    cfg, metadata, run = crosscoder.cfg, crosscoder.cfg.metadata, run or {}
    what = DECLARATIONS[cfg.architecture()].card
    model, hook = _text(metadata.model_name or "an unnamed model"), _text(metadata.hook_name or "an unnamed hook point")
    data = ModelCardData(
        library_name="saelens",
        license=" ".join(licence.split()) if licence else None,
        tags=["crosscoder", "crosslens", "sparse-autoencoder", "training-dynamics"],
    )
    lines = [
        f"# {_text(sae_id)}: a crosscoder over {cfg.n_snapshots} pretraining snapshots of {model}",
        "",
        f"A {what} with {cfg.d_sae:,} features, trained on the activations of {cfg.n_snapshots} "
        f"snapshots of {model} (width {cfg.d_model:,}) at {hook}. The snapshots share its features; the decoder norm "
        "of a feature at a snapshot says how strongly the dictionary writes it there; what the snapshot itself holds, "
        "`cl.evolve(cc, acts)` measures.",
        "",
        "## Usage",
        "",
        "```python",
        "import crosslens as cl  # pip install crosslens",
        "",
        f"cc = cl.from_pretrained({json.dumps(repo_id)}, {json.dumps(sae_id)})",
        "# the same with SAELens, once crosslens is imported:",
        f"# sae_lens.SAE.from_pretrained({json.dumps(repo_id)}, {json.dumps(sae_id)})",
        "features = cc.encode(x)  # x: (..., n_snapshots, d_model), raw activations of all snapshots",
        "cc.decoder_norms  # (features, snapshots)",
        "```",
        "",
        *_data(crosscoder, run),
        *_snapshot_table(crosscoder, evaluation),
    ]
    if picture is not None:
        lines += ["## Evolution", "", f"![Relative decoder norms of the features over the snapshots]({picture})", ""]
        lines += [
            "Decoder norm of each feature over the snapshots, relative to its maximum; features are ordered by when "
            "they peak, darker is stronger.",
            "",
        ]
    lines += ["## Licence", "", _text(licence) if licence else "Not stated by the uploader.", ""]
    lines += ["## Citation", "", "The method:", "", _CITATION, ""]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def evolution_picture(decoder_norms: Float[Tensor, "F S"], labels: Sequence[str], n_bands: int = 120) -> str:
    """Draw relative decoder norms as SVG: one column per snapshot, one row per band of features, ordered by peak."""
    alive = relative_norms(decoder_norms.detach().cpu().float())
    alive = alive[alive.isfinite().all(-1) & (alive.amax(-1) > 0)]
    S = decoder_norms.shape[1]
    # by peak, then by centre of mass, so neighbouring rows look alike
    centre = (alive * torch.arange(S)).sum(-1) / alive.sum(-1).clamp_min(1e-12)
    order = sorted(range(len(alive)), key=lambda i: (int(alive[i].argmax()), float(centre[i])))
    bands = [alive[rows].mean(0).tolist() for rows in _split(order, n_bands)]
    cell, row, left, top = max(12, min(48, 640 // S)), 4, 8, 24
    width, height = left * 2 + cell * S, top + row * len(bands) + 72
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{left}" y="15" fill="#2b3036">{len(alive):,} features</text>',
    ]
    for b, band in enumerate(bands):
        for s, value in enumerate(band):
            x, y = left + s * cell, top + b * row
            parts.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{row}" fill="{_colour(value)}"/>')
    for s, label in enumerate(labels[:S]):
        x, y = left + s * cell + cell / 2, top + row * len(bands) + 10
        text = html.escape(_short(label))
        parts.append(f'<text x="{x:g}" y="{y}" fill="#2b3036" transform="rotate(60 {x:g} {y})">{text}</text>')
    return "\n".join([*parts, "</svg>"])


def without_paths(value: Any) -> Any:
    """`rundir.without_paths`, which also refuses what looks like a token.

    Raises:
        UserError: a value looks like a token.
    """
    plain = rundir.without_paths(value)
    for text in _texts(plain):
        check_public(text)
    return plain


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
    elif isinstance(value, str):
        yield value


def check_public(text: str) -> None:
    """Refuse text that holds something like a token, or the path of the user's home folder.

    Raises:
        UserError: it does; the message shows only the first characters of a token.
    """
    if found := _TOKEN.search(text):
        raise UserError(f"the metadata contains a likely token ({found[0][:5]}...): remove it before publishing")
    home = str(Path.home())
    if len(home) > 1 and re.search(re.escape(home) + r"\b", text):
        raise UserError("the metadata contains the path of your home folder: remove it before publishing")


def _data(crosscoder: Crosscoder, run: dict[str, Any]) -> list[str]:
    metadata, identity = crosscoder.cfg.metadata, run.get("identity", {})
    facts = {
        "dataset": metadata.dataset_path,
        "context size": metadata.context_size,
        "tokens per epoch": identity.get("n_tokens"),
        "special tokens": {True: "kept", False: "left out"}.get(metadata.keep_special),
        "first tokens of each sequence and document left out": metadata.drop_positions or None,
        "imported from": metadata.imported_from,
        **{key.replace("_", " "): value for key, value in identity.get("training", {}).items()},
        **{f"version of {name}": value for name, value in run.get("versions", {}).items()},
    }
    rows = [f"- {name}: {_text(value)}" for name, value in facts.items() if value is not None]
    return ["## Data and training", "", *(rows or ["Not recorded."]), ""]


def _snapshot_table(crosscoder: Crosscoder, evaluation: Frame | None) -> list[str]:
    recorded = crosscoder.cfg.metadata.snapshots or [{"label": label} for label in crosscoder.cfg.snapshot_labels]
    shown = [name for name in _COLUMNS if evaluation is not None and name in evaluation]
    head = ["snapshot", "step", "tokens", *(_COLUMNS[name][0] for name in shown)]
    lines = ["## Snapshots", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for s, row in enumerate(recorded):
        cells = [_text(row["label"]), *("" if row.get(key) is None else f"{row[key]:,}" for key in ("step", "tokens"))]
        for name in shown:
            value = float(evaluation[name].iloc[s])  # type: ignore[index]
            cells.append(format(value, _COLUMNS[name][1]) if math.isfinite(value) else "")
        lines.append(f"| {' | '.join(cells)} |")
    if shown:
        lines += [
            "",
            "Measured on held-out tokens; CE spliced and KL are those of the model with the reconstruction spliced in.",
        ]
    return [*lines, ""]


def _text(value: object) -> str:
    """A value as one line of Markdown with all markup escaped."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|!])", r"\\\1", line)[:400] if line else "-"


def _short(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= 16 else line[:15] + "…"


def _split(order: Sequence[int], n: int) -> list[list[int]]:
    count = min(n, len(order))
    edges = [round(b * len(order) / count) for b in range(count + 1)] if count else []
    return [list(order[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def _colour(value: float) -> str:
    place = min(max(value, 0.0), 1.0) * (len(_COLOURS) - 1)
    low = min(int(place), len(_COLOURS) - 2)
    ends = [[int(_COLOURS[low + side][i : i + 2], 16) for i in (1, 3, 5)] for side in (0, 1)]
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in zip(*ends, strict=True))
