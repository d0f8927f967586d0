"""`steer`: what the models of a run write with features turned up or down, beside what they write otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from crosslens.config import SteerOptions, decisive
from crosslens.errors import UserError, check_characters, shortened
from crosslens.intervention.prompt_runs import begins_with_bos
from crosslens.intervention.splice import Edit
from crosslens.intervention.steering import steer as steer_model
from crosslens.pipeline.opening import read_run
from crosslens.rundir import RunDir
from crosslens.snapshots.lookup import find_snapshot
from crosslens.tasks.prompts import bos_tokens


def steer(
    run: RunDir, prompts: Sequence[str], options: SteerOptions, *, device: str | None = None
) -> Iterator[dict[str, Any]]:
    """Continue prompts with and without steering.

    Args:
        run: with a trained crosscoder.
        prompts: texts.
        options: features, snapshots, how far they are turned, what is written.
        device: of models and crosscoder; CUDA if available.

    Yields:
        A row of the table "steered" for every snapshot and prompt. The table is saved at the end, after the rows that
        it had; those of the same prompts, features and snapshots are replaced. A row names what was drawn and how.

    Raises:
        UserError: no prompts, an empty one or one that leaves no space for the continuation, no such feature or
            snapshot.
    """
    if not prompts:
        raise UserError('no prompts are given: write them after the run, such as "The keys to the cabinet"')
    rows: list[dict[str, Any]] = []
    with run.writing():
        reads = options.loss_tokens > 0
        crosscoder, acts = read_run(run, device, reads_text=reads, allow_changed_data=options.allow_changed_data)
        snapshots, settings = acts.snapshots, acts.settings
        wanted = snapshots.labels[-1:] if options.at is None else options.at.split(",")
        chosen = [find_snapshot(snapshots.labels, label.strip()) for label in wanted]
        multiplied = options.factor is not None
        edit = Edit(options.feature, options.add or 0.0, options.factor if options.factor is not None else 1.0)
        tokens = [_tokens(text, snapshots, begins_with_bos(crosscoder), options.length) for text in prompts]
        held_out = _held_out(acts, options.loss_tokens) if reads else None
        for s in chosen:
            found: list[tuple[list[str], list[float | None], float | None]] = []
            model: Any = snapshots.model(s, settings)
            found.append(_run(model, snapshots.tokenizer, tokens, held_out, options))
            with steer_model(crosscoder, snapshots, s, edit, settings=settings) as model:
                found.append(_run(model, snapshots.tokenizer, tokens, held_out, options))
            for i, text in enumerate(prompts):
                before, after = found[0][1][i], found[1][1][i]
                row = {
                    "snapshot": s, "label": snapshots.labels[s], "step": snapshots.steps[s], "text": text,
                    "features": ",".join(map(str, options.feature)),
                    "factor": options.factor if multiplied else None, "add": None if multiplied else options.add,
                    "plain": found[0][0][i], "steered": found[1][0][i], "prompt_loss": before,
                    "prompt_loss_change": None if before is None or after is None else after - before,
                    "text_loss": found[0][2], "text_loss_change": _less(found[1][2], found[0][2]),
                    "n_tokens": 0 if held_out is None else held_out.numel(),
                    "length": options.length, "temperature": options.temperature, "seed": options.seed,
                }  # fmt: skip
                rows.append(row)
                yield row
        run.note(steer=decisive(options))
        table, kept = _together(run.table("steered"), rows)
        run.save_table("steered", table, keeps=kept > 0)


def _tokens(text: str, snapshots: Any, with_bos: bool, length: int) -> Tensor:
    bos = bos_tokens(snapshots.tokenizer, with_bos)
    ids = bos + snapshots.tokenizer(check_characters(text, "the prompt"), add_special_tokens=False)["input_ids"]
    name, longest = shortened(repr(text)), snapshots.n_ctx
    if len(ids) == len(bos):
        raise UserError(f"the prompt {name} is empty: give at least one word")
    if len(ids) + length > longest:
        raise UserError(
            f"the prompt {name} has {len(ids)} tokens, and {length} more exceed the models' context of {longest}: "
            "shorten it, or give a smaller --length"
        )
    return torch.tensor([ids])


def _held_out(acts: Any, n: int) -> Tensor:
    """Held-out sequences with at least n tokens, where there are so many."""
    tokens = acts.held_out_tokens()
    return tokens[: max(1, -(-n // tokens.shape[1]))].long()


@torch.no_grad()
def _run(
    model: Any, tokenizer: Any, prompts: Sequence[Tensor], held_out: Tensor | None, options: SteerOptions
) -> tuple[list[str], list[float | None], float | None]:
    """Continuation and loss of every prompt, and the loss on held-out text."""
    written: list[str] = []
    losses: list[float | None] = []
    how: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        how["temperature"] = options.temperature
    for tokens in prompts:
        device = next(model.parameters()).device
        with torch.random.fork_rng():
            torch.manual_seed(options.seed)
            ids = model.generate(
                tokens.to(device), max_new_tokens=options.length, return_type="tokens", verbose=False, **how
            )
        written.append(tokenizer.decode(ids[0, tokens.shape[1] :].tolist()))
        losses.append(None if tokens.shape[1] < 2 else _loss(model, tokens))
    return written, losses, None if held_out is None else _loss(model, held_out)


def _loss(model: Any, tokens: Tensor) -> float:
    """Mean next-token loss, in nats per token; some sequences at a time."""
    device, total = next(model.parameters()).device, 0.0
    for part in tokens.split(16):
        logits = model(part.to(device), return_type="logits")[:, :-1].flatten(0, 1).float()
        total += float(torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten().to(device), reduction="sum"))
    return total / tokens[:, 1:].numel()


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _together(earlier: Any, rows: Sequence[dict[str, Any]]) -> tuple[pd.DataFrame, int]:
    """The rows of before that are not made again and the new ones, and how many the former are."""
    made: Any = pd.DataFrame(rows)
    made = made.astype({"step": "Int64", "length": "Int64", "seed": "Int64"})
    numbers = ["factor", "add", "prompt_loss", "prompt_loss_change", "text_loss", "text_loss_change"]
    made[numbers] = made[numbers].astype(float)
    if earlier is None:
        return made, 0
    # a table of before these were recorded
    earlier = earlier.reindex(columns=made.columns)
    keys = ["text", "features", "label", "factor", "add"]
    new, old = (table[keys].astype(str).apply(tuple, axis=1) for table in (made, earlier))
    again = old.isin(set(new))
    kept = earlier[~again].astype({"length": "Int64", "seed": "Int64", "temperature": "float64"})
    return pd.concat([kept, made], ignore_index=True) if len(kept) else made, len(kept)
