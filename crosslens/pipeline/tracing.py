"""`trace`: prompts through all snapshots of a run, kept in its tables for the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from crosslens.causal.tracing import Asked, Trace
from crosslens.causal.tracing import trace as trace_prompts
from crosslens.config import TraceOptions, decisive
from crosslens.errors import UserError, read_text
from crosslens.pipeline.opening import encoder_shares, evolved_table, parse_tasks, read_run
from crosslens.rundir import RunDir

TABLES = {"traces": "prompts", "trace_predictions": "predictions", "trace_features": "features",
          "trace_tokens": "tokens"}  # fmt: skip
"""Tables of a run, each with the attribute of a `Trace` that it is made of."""


def trace(
    run: RunDir, prompts: Sequence[str], options: TraceOptions | None = None, *, device: str | None = None
) -> Trace:
    """Trace prompts through all snapshots, and add them to those that the run has.

    Args:
        run: with a trained crosscoder; after `evolve` it is known when features became readable, and effects of
            features that are read from later snapshots are marked.
        prompts: texts; options.file may name more.
        options: answers, pairs; `TraceOptions()` if None.
        device: of models and crosscoder; CUDA if available.

    Returns:
        The prompts of this call. A prompt that was traced before with the same answers is replaced in the run.

    Raises:
        UserError: as `crosslens.causal.trace`; a file that cannot be read, or a tokenizer that changed since training.
    """
    options = options or TraceOptions()
    asked = list_prompts(prompts, options)
    with run.writing():
        crosscoder, acts = read_run(run, device, reads_text=False, allow_changed_data=options.allow_changed_data)
        labels = acts.snapshots.labels
        found = trace_prompts(
            crosscoder,
            acts.snapshots,
            asked,
            lifecycles=evolved_table(run, "lifecycles"),
            encoder_share=encoder_shares(run, crosscoder.cfg.d_sae, labels),
            settings=acts.settings,
        )
        run.note(trace=decisive(options))
        tables, kept = _together({} if options.fresh else _earlier(run), found)
        run.save_tables(tables, keeps=kept > 0)
    return found


def list_prompts(prompts: Sequence[str], options: TraceOptions) -> list[Asked]:
    """What is traced: the prompts of the command, then those of the file.

    Raises:
        UserError: no prompts, several with one pair, or a file that cannot be read.
    """
    given = None if options.answers is None else tuple(part.strip() for part in options.answers.split(","))
    answers: Any = given
    if options.pair is not None and len(prompts) != 1:
        raise UserError(f"--pair {options.pair!r} is compared with one prompt, and {len(prompts)} are given")
    asked = [Asked(text, options.pair, answers) for text in prompts]
    if options.file is not None:
        if options.file.suffix == ".txt":
            lines = read_text(Path(options.file), "file of prompts").splitlines()
            asked += [Asked(line.strip(), None, answers) for line in lines if line.strip()]
        else:
            (task,) = parse_tasks([str(options.file)])
            asked += [Asked(item.prefix, item.patch_prefix, (item.correct, item.wrong)) for item in task.items]
    if not asked:
        raise UserError('no prompts are given: write them after the run, such as "The keys to the cabinet"')
    return asked


def _earlier(run: RunDir) -> dict[str, pd.DataFrame]:
    found = {name: run.table(name) for name in TABLES}
    return {} if any(table is None for table in found.values()) else {n: t for n, t in found.items() if t is not None}


def _together(earlier: dict[str, Any], found: Trace) -> tuple[dict[str, pd.DataFrame], int]:
    """The tables with the new prompts after those of before, without those that are traced again; how many of those of
    before there are."""
    new: dict[str, Any] = {name: getattr(found, attribute) for name, attribute in TABLES.items()}
    if not earlier:
        return new, 0
    keys = ["text", "paired", "correct", "wrong"]
    asked, before = (table["traces"][keys].fillna("").apply(tuple, axis=1) for table in (new, earlier))
    again = before.isin(set(asked))
    kept = earlier["traces"].loc[~again, "prompt"].unique().tolist()
    number = {prompt: i for i, prompt in enumerate(kept)}
    tables: dict[str, pd.DataFrame] = {}
    for name, table in new.items():
        before = earlier[name][earlier[name]["prompt"].isin(kept)]
        before = before.assign(prompt=before["prompt"].map(number))
        after = table.assign(prompt=table["prompt"] + len(kept))
        tables[name] = pd.concat([each for each in (before, after) if len(each)], ignore_index=True)
    return tables, len(kept)
