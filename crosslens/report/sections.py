"""What stands on the page, in order: figures with their titles and definitions, and words for when one is missing."""

from __future__ import annotations

from functools import partial

from crosslens.report import checks, effects, figures, lives, phases, timelines
from crosslens.report.entries import Entry, Section

_EVALUATE = "Nothing has been evaluated: crosslens train RUN_DIR writes evaluation.parquet when it ends."
_EVOLVE = "No evolution has been computed: crosslens evolve RUN_DIR."
_ATTRIBUTE = "No attribution has been run: crosslens attribute RUN_DIR --task TASK."
_ABLATE = "No ablation has been run: crosslens ablate RUN_DIR --task TASK, after crosslens attribute."
_ACCURACY = "No task has been measured: crosslens attribute RUN_DIR --task TASK measures its accuracy too."
_PROBE = "No probes have been fitted: crosslens evolve RUN_DIR fits some of them."


SECTIONS: tuple[Section, ...] = (
    Section(
        "accuracy",
        "Accuracy",
        "When the model learns each task, without the crosscoder.",
        _ACCURACY,
        (
            Entry(
                "accuracy",
                "Accuracy per task",
                "Share of items whose correct continuation has a higher logit than the wrong one, at the last "
                "position. The bands are Wilson 95 % intervals over items.",
                figures.accuracy,
                ("accuracy",),
                wide=True,
            ),
        ),
    ),
    Section(
        "reconstruction",
        "Reconstruction",
        "How much of each snapshot the crosscoder keeps, on held-out tokens.",
        _EVALUATE,
        (
            Entry(
                "explained-variance",
                "Explained variance",
                "1 − E‖x̂ − x‖² / E‖x − mean‖² over all tokens, and the mean over tokens of 1 − ‖x̂ − x‖² / ‖x − "
                "mean‖². 1 is a perfect reconstruction.",
                figures.explained_variance,
                ("evaluation",),
            ),
            Entry(
                "l0",
                "L0",
                "Mean number of features that are not zero, per token. "
                "Snapshots differ only where the gate is per snapshot.",
                figures.l0,
                ("evaluation",),
            ),
            Entry(
                "cross-entropy",
                "Cross-entropy",
                "Next-token loss of the clean model, of the model whose hook point holds the reconstruction (spliced), "
                "and of the one whose hook point holds zeros, in nats per token.",
                figures.cross_entropy,
                ("evaluation",),
            ),
            Entry(
                "kl",
                "KL to the clean model",
                "Mean KL divergence from the clean model's next-token distribution to the spliced model's, "
                "in nats per token. 0 means that nothing is lost.",
                figures.kl,
                ("evaluation",),
            ),
        ),
    ),
    Section(
        "evolution",
        "Evolution",
        "A feature is present at a snapshot where its decoder norm is at least half of its largest. It is initial if "
        "present at the first snapshot, else emergent, born at the first snapshot from which it stays; never if it "
        "does not stay anywhere. Transient features are absent for good later on.",
        _EVOLVE,
        (
            Entry(
                "evolution-map",
                "Decoder norms over training",
                "Normalised decoder norm v = norm / largest norm over snapshots (0 to 1), a row per feature, ordered "
                "by origin, then birth, then peak. Snapshots are evenly spaced.",
                figures.evolution_map,
                ("evolution", "snapshots"),
                wide=True,
            ),
            Entry(
                "births",
                "Births",
                "Number of emergent features by the snapshot of their birth, by what becomes of them.",
                figures.births,
                ("evolution", "snapshots"),
            ),
            Entry(
                "origins",
                "Origin and fate",
                "Number of features by origin, and whether they persist to the last snapshot.",
                figures.origins,
                ("evolution",),
            ),
            Entry(
                "dynamics",
                "Statistics first, features later?",
                "KL divergence from unigram and bigram shares of the corpus to the predictions, and loss, in nats per "
                "token; below, shares: fall of the bigram KL done, features settled (cosine to the final direction at "
                "least .5 from here on), present, and total dimensionality / d_model.",
                phases.dynamics,
                ("dynamics", "phases"),
                wide=True,
                optional=True,
            ),
            Entry(
                "selection",
                "Which snapshots tell it best",
                "The snapshots that leave the least distance, in accuracy and activation similarity, to those that "
                "they stand for.",
                phases.proposal,
                ("selection",),
                wide=True,
                optional=True,
            ),
            Entry(
                "turning",
                "Where features turn",
                "Number of features whose decoder row turns more between these two snapshots than between any other "
                "neighbours. Rows below a twentieth of the feature's largest norm have no direction.",
                lives.turning,
                ("turning",),
                optional=True,
            ),
            Entry(
                "cosines",
                "Directions over time",
                "Median over live features of the cosine between their decoder rows at two snapshots. 1 is the same "
                "direction; random ones have 0.",
                lives.cosines,
                ("cosines",),
                optional=True,
            ),
            Entry(
                "dimensionality",
                "Room that features take",
                "Sum over present features of their dimensionality, |w|⁴ / Σ (w · w')², divided by d_model, with "
                "w = rms activation times decoder row; and the same for as many random directions of these lengths.",
                lives.dimensionality,
                ("dimensionality",),
                optional=True,
            ),
            Entry(
                "takeovers",
                "What takes over from what",
                "Pairs of features of one direction, active on the same tokens, of which the second is born when the "
                "first dies; and pairs that share their direction up to a snapshot (part) or from it on (merge).",
                lives.takeovers,
                ("successions", "partings", "snapshots"),
                optional=True,
            ),
            Entry(
                "scaling",
                "Can small norms be believed?",
                "Latent scaling: the least-squares coefficient of the feature's direction at its peak on what the "
                "other features leave unexplained, against the decoder norm, both divided by the largest norm. Above "
                "the line there is more of the direction than the norm says.",
                lives.scaling,
                ("scaling", "evolution"),
                optional=True,
            ),
            Entry(
                "encoder",
                "From which snapshots features are read",
                "Share of every snapshot in what makes a feature active (rise of its part of the pre-activation from "
                "all tokens to those where the feature is active), median by the snapshot of birth.",
                lives.encoder,
                ("encoder", "evolution"),
                optional=True,
            ),
        ),
    ),
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
                "areas",
                "Necessity and sufficiency",
                "Area under the share of the whole change against log(1 + k) / log(1 + active features): necessity "
                "when the k features are ablated, sufficiency when they alone are kept. 1 where the first feature does "
                "what all do, near 0 where only the whole will do.",
                checks.areas,
                ("areas/{task}",),
                optional=True,
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
    Section(
        "probes",
        "Probes",
        "Whether a feature's decoder norm at a snapshot tells how well the feature can be read off that snapshot.",
        _PROBE,
        (
            Entry(
                "probe",
                "Probe error against decoder norm",
                "Share of held-out tokens on which a linear probe on one snapshot's activations is wrong about whether "
                "the feature is active, against the feature's decoder norm there divided by its largest.",
                figures.probe,
                ("probe",),
                wide=True,
            ),
            Entry(
                "probe-parts",
                "What the correlation is made of",
                "Correlation of probe error and relative decoder norm, with 95 % intervals over features: of all "
                "points, without step 0, less the means of each feature, less those of each snapshot, and corrected "
                "for the noise of single probes.",
                phases.probe_parts,
                ("probe_parts",),
                optional=True,
            ),
            Entry(
                "agreement",
                "Do neighbouring snapshots agree?",
                "Share of the 20 held-out tokens on which a feature is strongest that two neighbouring snapshots have "
                "in common, each read from that snapshot alone.",
                phases.agreement,
                ("agreement",),
                optional=True,
            ),
        ),
    ),
)
