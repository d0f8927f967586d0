"""The verb `crosslens label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crosslens.errors import UserError
from crosslens.specs import parse_numbers


def label_run(
    run_dir: Annotated[Path, typer.Argument(help="Run directory with examples of features.", metavar="RUN")],
    client: Annotated[str, typer.Option("--client", help="openai or anthropic, or a server that talks like one.")],
    model: Annotated[str, typer.Option("--model", help="Its name there.")],
    base_url: Annotated[str | None, typer.Option("--base-url", help="Of another server, such as a local one.")] = None,
    features: Annotated[str | None, typer.Option("--features", help="Ids such as 3,17; all when left out.")] = None,
    n_features: Annotated[int | None, typer.Option("--n-features", help="So many of them, drawn at random.")] = None,
    n_examples: Annotated[int, typer.Option("--n-examples", help="Examples shown of each.")] = 7,
    attempts: Annotated[int, typer.Option("--attempts", help="Times to ask where nothing readable came.")] = 1,
    requests_per_minute: Annotated[float, typer.Option("--requests-per-minute", help="Most of them.")] = 50.0,
    workers: Annotated[int, typer.Option("--workers", help="Requests under way at once.")] = 4,
    prices: Annotated[str | None, typer.Option("--prices", help="Of a million tokens in and out, as 3,15.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and ask nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether to go on.")] = False,
) -> None:
    """Name features by a language model; the key comes from OPENAI_API_KEY or ANTHROPIC_API_KEY."""
    from functools import partial

    from crosslens.interpretation import complexity_correlation, label_features
    from crosslens.raters import Rater, check_client
    from crosslens.rundir import RunDir

    run = RunDir.open(run_dir)
    rater = Rater(client, model, base_url, requests_per_minute=requests_per_minute, workers=workers)
    ask = partial(
        label_features,
        run,
        rater,
        features=None if features is None else parse_numbers(features, "--features"),
        n_features=n_features,
        n_examples=n_examples,
        attempts=attempts,
        prices=None if prices is None else _prices(prices),
        seed=seed,
    )
    estimate = ask(dry_run=True).estimate
    typer.echo(str(estimate))
    if dry_run:
        return
    if estimate.requests:
        check_client(rater)
        if not yes:
            typer.confirm("Send them?", abort=True)
    labels = ask()
    counts = ", ".join(f"{count} {status}" for status, count in labels.table["status"].value_counts().items())
    typer.echo(f"{counts}; {labels.tokens_in:,} tokens in, {labels.tokens_out:,} out")
    evolution, table = run.table("evolution"), run.table("labels")
    if evolution is not None and table is not None:
        for row in complexity_correlation(table, evolution, unit="index").to_dict("records"):
            interval = f"[{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]"
            words = f"Spearman {row['spearman']:+.2f} {interval}, {row['n']} features"
            typer.echo(f"complexity and {row['event']}: {words}")


def _prices(text: str) -> tuple[float, float]:
    try:
        into, out = map(float, text.split(","))
    except ValueError:
        raise UserError(
            f"--prices {text!r} must be two numbers, of a million tokens in and out, such as 3,15"
        ) from None
    return into, out
