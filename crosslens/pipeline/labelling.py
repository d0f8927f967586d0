"""`label`: labels of features by a language model or by their tokens, and scores of the labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from crosslens.config import LabelOptions, decisive
from crosslens.features.explainers import Explainer, check_client
from crosslens.features.labels import Estimate, Labels, label_features
from crosslens.rundir import RunDir, check_examples


def label(run: RunDir, options: LabelOptions, *, confirm: Callable[[Estimate], bool] = lambda _: True) -> Labels:
    """Label features of a run, and score the labels; answers that are there already are not asked for again.

    Args:
        run: after `evolve`, which collects the examples.
        options: the language model, or local labels; which features.
        confirm: called with the estimate of the cost before anything is sent; False sends nothing.

    Returns:
        The labels; with nothing but the estimate if `confirm` said no.

    Raises:
        UserError: no examples, an unknown feature, no key or package of the client, or another process is writing.
    """
    check_examples(run)
    explainer = second = None
    if not options.local:
        assert options.client is not None and options.model is not None  # LabelOptions has checked it
        explainer = Explainer(
            options.client,
            options.model,
            options.base_url,
            requests_per_minute=options.requests_per_minute,
            workers=options.workers,
            attempts=options.attempts,
            prices=options.prices,
        )
        second = replace(explainer, model=options.second_model or options.model) if options.score else None
    ask = partial(
        label_features,
        run,
        explainer,
        features=options.features,
        n_features=options.n_features,
        n_examples=options.n_examples,
        second=second,
        n_passages=40 if options.score else 0,
        seed=options.seed,
    )
    planned = ask(dry_run=True)
    if explainer is not None and planned.estimate.requests:
        check_client(explainer)
    if not confirm(planned.estimate):
        return planned
    with run.writing():
        run.note(label=decisive(options), evolved=run.made_with("examples") or None)
        return ask()
