"""What stands on the page Causes, in order: what features do for each task, and what becomes of it without them."""

from __future__ import annotations

from functools import partial

from crosslens.report import checks, effects, timelines
from crosslens.report.entries import Entry, Section

_ATTRIBUTE = "No attribution has been run: crosslens attribute RUN_DIR --task TASK."
_ABLATE = "No ablation has been run: crosslens ablate RUN_DIR --task TASK, after crosslens attribute."

CAUSES: tuple[Section, ...] = (
    Section(
        "effects",
        "Effects on tasks",
        "IE is the indirect effect of a feature on logit(correct) − logit(wrong) at the last position, by integrated "
        "gradients from the baseline to the clean features: positive effects support the correct answer. RelIE is a "
        "snapshot's share of a feature's effect, |IE| / sum over snapshots of |IE|; it hides the sign, so signed IE "
        "stands beside it.",
        _ATTRIBUTE,
        (
            Entry(
                "completeness",
                "Completeness error",
                "Mean over prompts of |sum of effects − (clean − baseline metric)|, as a percentage of the mean of "
                "|clean − baseline metric|. 0 means that the effects account for the whole metric.",
                effects.completeness,
                ("attribution/*.snapshots",),
                wide=True,
            ),
        ),
        (
            Entry(
                "relie",
                "Relative effect (RelIE)",
                "Each snapshot's share of a feature's effect, |IE| / sum of |IE|, for features with an effect above "
                "two standard errors somewhere.",
                effects.relative_effects,
                ("attribution/{task}",),
            ),
            Entry(
                "ie",
                "Signed effect (IE)",
                "Mean over prompts of the effect in logits, of the features of largest |IE|. Above zero a feature "
                "supports the correct answer, below it opposes it.",
                effects.signed_effects,
                ("attribution/{task}",),
            ),
            Entry(
                "ie-relie",
                "Signed effect against relative effect",
                "A point per feature and snapshot, coloured by snapshot. On the right is what a feature does at that "
                "snapshot above all, on the left what it does more of elsewhere; above zero it supports the correct "
                "answer.",
                effects.effects_against_shares,
                ("attribution/{task}",),
                wide=True,
            ),
            Entry(
                "budget",
                "What the metric is made of",
                "Clean metric, baseline metric, and the summed effects of all features and of the error node, in "
                "logits. Features + error node + baseline make up the clean metric.",
                effects.effect_budget,
                ("attribution/{task}.snapshots", "attribution/{task}"),
                wide=True,
            ),
            Entry(
                "ie-table",
                "Features of largest effect",
                "IE ± standard error over prompts, in logits, by snapshot. Blue supports the correct answer, orange "
                "opposes it.",
                effects.effect_table,
                ("attribution/{task}",),
                wide=True,
            ),
            Entry(
                "timeline",
                "Features over the snapshots",
                "The features of largest |IE| at any snapshot, a row each: decoder norm, signed effect and share of "
                "the effect (RelIE) at every snapshot. Left of the word is the number of the feature.",
                timelines.feature_timeline,
                ("timeline/{task}",),
                wide=True,
                optional=True,
            ),
            Entry(
                "languages",
                "Features that languages share",
                "Number of features that are among those of largest |IE| in both languages, beside what random sets of "
                "as many features that are active in both would share.",
                timelines.language_overlap,
                ("languages/{task}",),
                wide=True,
                optional=True,
            ),
        ),
        "attribution",
    ),
    Section(
        "ablation",
        "Ablation",
        "The metric when a set of features is removed (ablate), or is all that is kept (keep), measured exactly, at "
        "all positions; removed features are zero unless a mean or a paired prompt was asked for. Shares are 1 + "
        "(metric − clean) / |clean|, which is metric / clean where the clean metric is positive. Random sets are of as"
        " many active features; size-matched ones of about the same activation times decoder norm.",
        _ABLATE,
        per_task=(
            Entry(
                "ablate-size",
                "Ablating k features, last snapshot",
                "Share of the clean metric that is left when k features are removed, the error node kept. "
                "Top features are those of largest signed IE.",
                partial(effects.ablation_by_size, mode="ablate"),
                ("ablation/{task}",),
            ),
            Entry(
                "keep-size",
                "Keeping k features, last snapshot",
                "Share of the clean metric when only k features are kept, without the error node. Top features are "
                "those of largest |IE|; reconstruction alone keeps all.",
                partial(effects.ablation_by_size, mode="keep"),
                ("ablation/{task}",),
            ),
            Entry(
                "ablate-snapshots",
                "Ablating over snapshots",
                "The same at one size of the set; the features are chosen anew at each snapshot.",
                partial(effects.ablation_over_snapshots, mode="ablate"),
                ("ablation/{task}",),
            ),
            Entry(
                "keep-snapshots",
                "Keeping over snapshots",
                "The same at one size of the set; the features are chosen anew at each snapshot.",
                partial(effects.ablation_over_snapshots, mode="keep"),
                ("ablation/{task}",),
            ),
            Entry(
                "additivity",
                "Do effects add up?",
                "Pairs of features ablated together, against the sum of both ablated alone, measured exactly. Where "
                "points leave the line, sums of effects are not the effect of the set.",
                checks.additivity,
                ("additivity/{task}", "additivity/{task}.snapshots"),
                optional=True,
            ),
            Entry(
                "transfer",
                "Features of one snapshot at another",
                "Share of the whole change that ablating the top features of one snapshot (rows) makes at another "
                "(columns). Where a row falls short of the diagonal of the column, other features have come to matter.",
                checks.transfer,
                ("transfer/{task}",),
                wide=True,
                optional=True,
            ),
        ),
        kind="ablation",
    ),
)
