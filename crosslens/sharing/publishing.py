"""Publish a crosscoder on the hub, in SAELens's layout, with a model card.

1. Save the crosscoder to a temporary folder. Local paths are stripped from its metadata, and anything that looks like
   a token is refused.
2. Write a model card from the crosscoder and, for a run directory, its tables.
3. Upload all files in one commit, so a failed upload leaves the repository unchanged.

`huggingface_hub` finds the token and the endpoint (`hf auth login`, HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import save_file

from crosslens.crosscoders import Crosscoder, load
from crosslens.crosscoders.checksums import CONFIG, WEIGHTS, with_checksum
from crosslens.errors import UserError, check_inside
from crosslens.rundir import RunDir
from crosslens.sharing.cards import check_public, evolution_picture, make_card, without_paths
from crosslens.sharing.repositories import check_repository, explained

PICTURE = "evolution.svg"


@dataclass(frozen=True)
class Push:
    """What was published, or would be.

    Attributes:
        repo_id: the repository.
        sae_id: the folder in it.
        files: size of each file in bytes, by its path in the repository.
        card: the model card.
        url: URL of the commit; None for a dry run.
    """

    repo_id: str
    sae_id: str
    files: dict[str, int]
    card: str
    url: str | None = None

    def __str__(self) -> str:
        done = f"published at {self.url}" if self.url else "nothing was sent (dry run)"
        lines = [f"{self.repo_id}, id {self.sae_id}: {done}"]
        return "\n".join([*lines, *(f"{size:>14,}  {name}" for name, size in self.files.items())])


def push_to_hub(
    crosscoder: Crosscoder | str | Path,
    repo_id: str,
    sae_id: str | None = None,
    *,
    private: bool = False,
    dry_run: bool = False,
    licence: str | None = None,
) -> Push:
    """Publish a crosscoder for `from_pretrained(repo_id, sae_id)`, ours and SAELens's.

    Args:
        crosscoder: a crosscoder, a folder written by `save`, or a run directory, whose tables go into the card.
        repo_id: repository such as "someone/name"; created if missing.
        sae_id: folder in the repository; None uses the hook point.
        private: create a private repository; an existing public one is refused.
        dry_run: only report what would be uploaded, without a network connection.
        licence: licence of the weights in the hub's spelling, such as "mit".

    Raises:
        UserError: no crosscoder, an invalid name, a token in the metadata, or a refusal by the hub. Nothing is
            uploaded then, though an empty repository may have been created.
    """
    check_repository(repo_id)
    run = RunDir(crosscoder) if isinstance(crosscoder, (str, Path)) and RunDir(crosscoder).exists() else None
    if isinstance(crosscoder, (str, Path)):
        crosscoder = load(run.crosscoder if run else crosscoder)
    sae_id = check_inside(sae_id or crosscoder.cfg.metadata.hook_name or "crosscoder", "id")
    with tempfile.TemporaryDirectory() as temporary:
        files = _write(Path(temporary), crosscoder, repo_id, sae_id, licence, run)
        card = files["README.md"].read_text(encoding="utf-8")
        sizes = {name: path.stat().st_size for name, path in files.items()}
        url = None if dry_run else _commit(repo_id, sae_id, private, files)
    return Push(repo_id, sae_id, sizes, card, url)


def _write(
    folder: Path, crosscoder: Crosscoder, repo_id: str, sae_id: str, licence: str | None, run: RunDir | None
) -> dict[str, Path]:
    """Write the files to `folder`; returns them by their path in the repository."""
    names = {f"{sae_id}/{CONFIG}": CONFIG, f"{sae_id}/{WEIGHTS}": WEIGHTS, f"{sae_id}/{PICTURE}": PICTURE}
    state = crosscoder.state_dict()
    crosscoder.process_state_dict_for_saving(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    config = with_checksum(without_paths({**crosscoder.cfg.to_dict(), "device": "cpu"}))
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    labels = [str(label) for label in without_paths(crosscoder.cfg.snapshot_labels)]
    (folder / PICTURE).write_text(evolution_picture(crosscoder.decoder_norms, labels), encoding="utf-8")
    # from the published files, so the card holds nothing that was stripped from them
    card = make_card(
        load(folder),
        repo_id,
        sae_id,
        licence=licence,
        evaluation=run.table("evaluation") if run else None,
        run=without_paths(run.read_json()) if run else None,
        picture=f"{sae_id}/{PICTURE}",
    )
    check_public(card)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return {**{there: folder / here for there, here in names.items()}, "README.md": folder / "README.md"}


def _commit(repo_id: str, sae_id: str, private: bool, files: dict[str, Path]) -> str:
    api = HfApi()
    with explained(repo_id, writing=True):
        api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise UserError(f"{repo_id} exists and is public: make it private on the hub, or choose another name")
        # never replace an existing card: it may describe other crosscoders
        has_card = any(sibling.rfilename == "README.md" for sibling in info.siblings or [])
        if has_card:
            card = files.pop("README.md")
            text = card.read_text(encoding="utf-8").replace(f"({sae_id}/{PICTURE})", f"({PICTURE})")
            card.write_text(text, encoding="utf-8")
            files[f"{sae_id}/README.md"] = card
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            commit_message=f"Add crosscoder {sae_id}",
        )
    return str(commit.commit_url)
