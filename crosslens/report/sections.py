"""What each page shows, in order: figures with titles and definitions, and what to run when a table is missing.

To add a figure, write a function in `overview_figures`, `evolution_figures` or `causal_figures`, and list it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from crosslens.report import causal_figures, evolution_figures, overview_figures, seed_figures
from crosslens.report.chart import Chart, Grid, Prompts

_ACCURACY = "No task accuracy has been measured. Run: crosslens attribute RUN_DIR --task TASK"
_EVALUATE = "The crosscoder has not been evaluated. crosslens train does this when training ends."
_EVOLVE = "The evolution of features has not been computed. Run: crosslens evolve RUN_DIR"
_SEEDS = (
    "Only one seed has been trained. To train three, repeat the command of this run, which is under Run details, with "
    "--seeds 3."
)
_PROBE = "No probes have been fitted. Run: crosslens evolve RUN_DIR"
_ATTRIBUTE = "No effects on tasks have been computed. Run: crosslens attribute RUN_DIR --task TASK"
_ABLATE = "No features have been ablated. After crosslens attribute, run: crosslens ablate RUN_DIR --task TASK"

Draw = Callable[..., Chart | Grid | Prompts | str]


@dataclass(frozen=True)
class Entry:
    """A figure or table of numbers on a page.

    Attributes:
        name: stem of its anchor and CSV file.
        title: heading.
        definition: one or two sentences: what is shown, in which unit, how it is computed.
        draw: makes a figure from the tables, or returns a sentence that says why there is nothing to draw.
        tables: names of the tables that `draw` takes, in order, as in `Tables`; "{task}" is the task of a task's page.
        wide: full width, even where two figures fit side by side.
        optional: omitted if a table is missing, instead of saying so.
    """

    name: str
    title: str
    definition: str
    draw: Draw
    tables: tuple[str, ...]
    wide: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        name: its anchor.
        title: its heading.
        intro: a sentence or two before the figures.
        empty: shown instead of a figure whose table is missing.
        entries: in order.
    """

    name: str
    title: str
    intro: str
    empty: str
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Page:
    """Sections in one file.

    Attributes:
        name: stem of the file.
        title: its heading, and its name in the navigation.
        intro: a sentence or two at the top.
        sections: in order.
    """

    name: str
    title: str
    intro: str
    sections: tuple[Section, ...]


_OVERVIEW: tuple[Section, ...] = (
    Section(
        "accuracy",
        "Accuracy",
        "When the model itself, without the crosscoder, learns each task.",
        _ACCURACY,
        (
            Entry(
                "accuracy",
                "Accuracy by task",
                "Share of items for which the correct continuation has a higher logit than the wrong one at the last "
                "position. Bands are 95% Wilson intervals over items.",
                overview_figures.accuracy,
                ("accuracy", "tasks"),
                wide=True,
            ),
        ),
    ),
    Section(
        "reconstruction",
        "Reconstruction",
        "How well the crosscoder reconstructs each snapshot on held-out tokens.",
        _EVALUATE,
        (
            Entry(
                "explained-variance",
                "Explained variance",
                "1 − E‖x̂ − x‖² / E‖x − mean‖² over all tokens, and the mean over tokens of 1 − ‖x̂ − x‖² / ‖x − "
                "mean‖². A perfect reconstruction has 1.",
                overview_figures.explained_variance,
                ("evaluation",),
            ),
            Entry(
                "l0",
                "L0",
                "Mean number of active features per token. It differs between snapshots only if each snapshot has its "
                "own gate (JumpReLU).",
                overview_figures.l0,
                ("evaluation",),
            ),
            Entry(
                "dead",
                "Dead features",
                "Percentage of features that are active on no held-out token. It differs between snapshots only if "
                "each snapshot has its own gate (JumpReLU).",
                overview_figures.dead,
                ("evaluation",),
                optional=True,
            ),
            Entry(
                "cross-entropy",
                "Cross-entropy loss",
                "Next-token loss in nats per token: of the clean model, with the reconstruction spliced in at the hook "
                "point, and with zeros there (zero ablation).",
                overview_figures.cross_entropy,
                ("evaluation",),
            ),
            Entry(
                "kl",
                "KL divergence from the clean model",
                "Mean KL divergence from the clean model's next-token distribution to that of the model with the "
                "reconstruction spliced in, in nats per token.",
                overview_figures.kl,
                ("evaluation",),
            ),
        ),
    ),
    Section(
        "seeds",
        "Seeds",
        "Which features other trainings on the same data find again, and which depend on the initial weights. Two "
        "features are partners if their activations on the held-out tokens have a correlation of at least 0.7; "
        "partners are one to one.",
        _SEEDS,
        (
            Entry(
                "seeds",
                "Features by number of seeds",
                "Live features by the number of seeds that have them, this one included, as a share of their number "
                "and of the variance that they write, Var(f) Σ norm². Features that more than half of the seeds have "
                "are consensus features.",
                seed_figures.seeds,
                ("consensus", "seeds"),
                optional=True,
            ),
            Entry(
                "seeds-rate",
                "Consensus by firing rate",
                "Share of the live features that more than half of the seeds have, by the share of held-out tokens on "
                "which the feature is active.",
                seed_figures.seeds_by_rate,
                ("consensus",),
                optional=True,
            ),
            Entry(
                "sweep",
                "Choice of F and k",
                "Share of live features with a partner in another seed, against the explained variance of the least "
                "explained snapshot, for several numbers of features F and of active ones k.",
                seed_figures.sweep,
                ("sweep",),
                wide=True,
                optional=True,
            ),
        ),
    ),
    Section(
        "phases",
        "Training phases",
        "What the model predicts first, when its features settle, and which snapshots represent the run.",
        _EVOLVE,
        (
            Entry(
                "dynamics",
                "N-gram statistics and features",
                "Top: KL divergence of the corpus's unigram and bigram statistics from the model's predictions, "
                "averaged over contexts, and the loss, in nats per token. Bottom, as shares: how much of the bigram "
                "KL's fall is completed; features that have settled (cosine to their final direction at least 0.5 from "
                "here on); features present, by R²; total dimensionality / d_model.",
                overview_figures.dynamics,
                ("dynamics", "phases"),
                wide=True,
                optional=True,
            ),
            Entry(
                "selection",
                "Suggested snapshots",
                "A subset of snapshots chosen so that all others are close to one of them in accuracy and activation "
                "similarity.",
                overview_figures.proposal,
                ("selection",),
                wide=True,
                optional=True,
            ),
        ),
    ),
)

_EVOLUTION: tuple[Section, ...] = (
    Section(
        "evolution",
        "Lifecycles",
        "A feature is present at a snapshot if its R² there is at least half of its largest: how well the activations "
        "of the snapshot alone predict the feature on held-out tokens. The decoder norm stands beside it: it says what "
        "the dictionary writes, not what the model holds. “Initial” features are present at the first snapshot; "
        "“emergent” ones are born later, at the first snapshot from which they stay; “never” ones are present too "
        "briefly to count as born. “Transient” ones later disappear for good. Features whose R² is below 0.05 at every "
        "snapshot are “unknown”: their presence cannot be told.",
        _EVOLVE,
        (
            Entry(
                "evolution-map",
                "Presence over training",
                "v = R² / largest R² over snapshots (0 to 1). Each row is a feature; rows are ordered by origin, "
                "birth and peak, then clustered by their curves. Drag to zoom in; a click opens the feature.",
                evolution_figures.evolution_map,
                ("evolution", "lifecycles", "snapshots", "names"),
                wide=True,
            ),
            Entry(
                "birth-counts",
                "Births with their controls",
                "Share of features that are born after the first snapshot, over the threshold of presence (a share of "
                "the feature's largest value), by decoder norm and by decodability (R²): how well the activations of a "
                "snapshot alone predict the feature on held-out tokens; within-token R² is what the context adds. A "
                "count is believable as far as it exceeds the same count with the snapshots in reversed order, and in "
                "a crosscoder over models that never trained. Lexical features vary mostly between token types.",
                evolution_figures.birth_counts,
                ("birth_counts",),
                wide=True,
                optional=True,
            ),
            Entry(
                "births",
                "Births",
                "Number of emergent features by the snapshot of birth by R², and whether they persist to the last "
                "snapshot; beside it, the number by decoder norm.",
                evolution_figures.births,
                ("lifecycles", "snapshots"),
            ),
            Entry(
                "origins",
                "Origin and fate",
                "Number of features by origin, and whether they persist to the last snapshot, by every measure.",
                evolution_figures.origins,
                ("lifecycles",),
            ),
            Entry(
                "norm-map",
                "Decoder norms over training",
                "The same for decoder norms, the papers' reading: v = norm / largest norm, ordered by the lifecycles "
                "that follow from it. Norms do not know the direction of time: see the births with their controls.",
                partial(evolution_figures.evolution_map, measure="norm"),
                ("evolution", "lifecycles", "snapshots", "names"),
                wide=True,
                optional=True,
            ),
            Entry(
                "rotation-rate",
                "Rotation",
                "Median angle between a feature's decoder vectors at neighbouring snapshots, per interval and per "
                "doubling of the training tokens (of steps where tokens are unknown). The null is the angle between "
                "two estimates of the same vector on different halves of the held-out tokens: what sampling alone "
                "makes of no rotation. Compare it with the angle between such estimates at neighbouring snapshots.",
                evolution_figures.rotation_rate,
                ("rotation",),
                wide=True,
                optional=True,
            ),
            Entry(
                "rotation",
                "Rotation by interval",
                "Number of features whose decoder vector rotates more between these two snapshots than in any other "
                "interval. Intervals that span more of the training leave more room for it: the rate per doubling "
                "allows for that. Vectors shorter than a twentieth of the feature's largest norm are ignored.",
                evolution_figures.rotation,
                ("rotation",),
                optional=True,
            ),
            Entry(
                "cosines",
                "Similarity of directions between snapshots",
                "Median cosine between a live feature's decoder vectors at two snapshots. 1 is the same direction; "
                "random directions have about 0.",
                evolution_figures.cosines,
                ("cosines",),
                optional=True,
            ),
            Entry(
                "dimensionality",
                "Total dimensionality",
                "Sum over present features of |w|⁴ / Σ (w · w')², divided by d_model, where w is the decoder vector "
                "times the feature's RMS activation, or the decoder vector alone, as Elhage et al. wrote it; beside as "
                "many random directions of the same lengths, and the participation ratio of the activations, "
                "(Σ variances)² / Σ variances² over principal directions.",
                evolution_figures.dimensionality,
                ("dimensionality",),
                optional=True,
            ),
            Entry(
                "splits",
                "Feature splitting and replacement",
                "Number of feature pairs by snapshot. Split: two features share a direction before this snapshot but "
                "not from it on. Merger: the reverse. Replacement: a feature is born when another with the same "
                "direction, active on the same tokens, dies.",
                evolution_figures.splits_and_replacements,
                ("splits", "replacements", "snapshots"),
                optional=True,
            ),
            Entry(
                "scaling",
                "Latent scaling",
                "Least-squares coefficient of the feature's direction at its peak on what the other features leave "
                "unexplained, against its decoder norm, both divided by its largest norm. Above the line, the "
                "direction is stronger in the activations than the norm suggests.",
                evolution_figures.scaling,
                ("scaling", "evolution", "lifecycles", "names"),
                optional=True,
            ),
            Entry(
                "encoder",
                "Encoder share by snapshot",
                "Share of each snapshot in a feature's encoder input: how much the snapshot's part of the "
                "pre-activation rises from all tokens to those where the feature is active. Median over the features "
                "born at a snapshot.",
                evolution_figures.encoder,
                ("encoder", "lifecycles"),
                optional=True,
            ),
            Entry(
                "complexity",
                "Complexity",
                "Mean complexity, from 1 (a single token) to 5 (diverse contexts with one theme), as rated by a "
                "language model, of the features born, and of those strongest, at a snapshot. Bands are ± two "
                "standard errors; correlations have 95% bootstrap intervals over features.",
                evolution_figures.complexity,
                ("labels", "lifecycles", "snapshots"),
                optional=True,
            ),
        ),
    ),
    Section(
        "probes",
        "Probes",
        "Whether the presence of a feature at a snapshot, by R² or by decoder norm, goes with how well a probe decodes "
        "it from that snapshot's activations.",
        _PROBE,
        (
            Entry(
                "probe-presence",
                "Probe error and presence, within features",
                "Rank correlation of probe error with each measure of presence, with 95% intervals over features: "
                "within features over snapshots (is a feature easier to decode where the measure is higher?), and "
                "between features at one snapshot, which says nothing about training.",
                evolution_figures.probe_presence,
                ("probe_presence",),
                wide=True,
                optional=True,
            ),
            Entry(
                "probe",
                "Probe error by feature and snapshot",
                "Share of held-out tokens on which a linear probe of one snapshot's activations misclassifies whether "
                "the feature is active, against the feature's R² there, and its decoder norm divided by its largest.",
                evolution_figures.probe,
                ("probe", "evolution", "names"),
                wide=True,
            ),
            Entry(
                "probe-parts",
                "Correlation of probe error and decoder norm by part",
                "With 95% intervals over features: over all points, without step 0 if it is a snapshot, after "
                "subtracting each feature's means, after subtracting each snapshot's means, and corrected for the "
                "noise of single probes.",
                evolution_figures.probe_parts,
                ("probe_parts",),
                optional=True,
            ),
            Entry(
                "agreement",
                "Agreement of neighbouring snapshots",
                "Share of a feature's 20 strongest held-out tokens that two neighbouring snapshots have in common, "
                "when the feature is computed from each snapshot alone.",
                evolution_figures.agreement,
                ("agreement",),
                optional=True,
            ),
        ),
    ),
)

_CAUSAL: tuple[Section, ...] = (
    Section(
        "tasks",
        "Tasks",
        "Every task has a page of its own: its items, the features with the largest effects, prompts word by word, and "
        "ablations.",
        _ATTRIBUTE,
        (
            Entry(
                "tasks",
                "Accuracy by task, last snapshot",
                "Share of items for which the correct continuation has a higher logit than the wrong one at the last "
                "position, with its 95% Wilson interval over items; chance is 50%.",
                overview_figures.task_table,
                ("tasks",),
                wide=True,
            ),
            Entry(
                "completeness",
                "Completeness error",
                "Mean over prompts of |sum of effects − (clean − baseline metric)|, as a percentage of the mean of "
                "|clean − baseline metric|, of integrated gradients. At 0, the effects account for all of that "
                "difference.",
                causal_figures.completeness,
                ("completeness/*", "tasks"),
                wide=True,
                optional=True,
            ),
        ),
    ),
)

_TASK: tuple[Section, ...] = (
    Section(
        "items",
        "What the task asks",
        "Each item is a prompt with a correct and a wrong continuation. The accuracy is that of the model itself, "
        "without the crosscoder.",
        _ACCURACY,
        (
            Entry(
                "accuracy",
                "Accuracy",
                "Share of items for which the correct continuation has a higher logit than the wrong one at the last "
                "position. The band is the 95% Wilson interval over items.",
                partial(overview_figures.accuracy, links=False),
                ("accuracy@{task}", "tasks"),
                wide=True,
            ),
            Entry(
                "items",
                "Examples of items",
                "The model reads the prompt; the metric is logit(correct) − logit(wrong) after its last word. On the "
                "paired prompt, if there is one, the wrong answer is the correct one.",
                overview_figures.item_table,
                ("prompts/{task}",),
                wide=True,
                optional=True,
            ),
        ),
    ),
    Section(
        "effects",
        "Effects of features",
        "The indirect effect (IE) of a feature on logit(correct) − logit(wrong) at the last position, on the "
        "selection half of the prompts. Positive effects support the correct answer. RelIE is a snapshot's share of a "
        "feature's effect, |IE| / sum over snapshots of |IE|, without sign; share RelIE first divides each effect by "
        "the sum over features at its snapshot, because logits grow in training. An effect is significant at a false "
        "discovery rate of 5% over features and snapshots.",
        _ATTRIBUTE,
        (
            Entry(
                "ie-table",
                "Features with the largest effects",
                "IE ± standard error over prompts, in logits, by snapshot, the last one first: features with a "
                "significant effect at some snapshot, largest |IE| first, then, in grey, the largest others. Blue "
                "supports the correct answer, orange opposes it.",
                causal_figures.effect_table,
                ("attribution/{task}", "attribution/{task}.snapshots", "names"),
                wide=True,
            ),
            Entry(
                "share-relie",
                "Relative effect, of shares (share RelIE)",
                "Each snapshot's share of a feature's effect after dividing by the snapshot's total |IE|, for features "
                "with a significant effect at some snapshot.",
                partial(causal_figures.relative_effects, column="share_relie"),
                ("attribution/{task}", "names", "chance@{task}"),
            ),
            Entry(
                "relie",
                "Relative effect (RelIE)",
                "Each snapshot's share of a feature's effect, |IE| / sum of |IE|, for features with a significant "
                "effect at some snapshot.",
                partial(causal_figures.relative_effects, column="relie"),
                ("attribution/{task}", "names"),
            ),
            Entry(
                "ie",
                "Signed effect (IE)",
                "Mean effect over prompts, in logits. Positive values support the correct answer, negative ones oppose "
                "it.",
                causal_figures.signed_effects,
                ("attribution/{task}", "names"),
            ),
            Entry(
                "ie-relie",
                "Signed and relative effects",
                "A point per feature and snapshot, coloured by snapshot. Points on the right belong to features that "
                "act mostly at that snapshot, points on the left to features that act mostly at others.",
                causal_figures.signed_against_relative,
                ("attribution/{task}", "names", "chance@{task}"),
                wide=True,
            ),
            Entry(
                "budget",
                "Decomposition of the metric",
                "Clean metric, baseline metric, and the summed effects of all features and of the error node by "
                "integrated gradients, in logits. Features + error node + baseline add up to the clean metric.",
                causal_figures.effect_budget,
                ("completeness/{task}",),
                wide=True,
                optional=True,
            ),
            Entry(
                "validation",
                "Which measure says when a feature acts",
                "Every feature with a significant effect is ablated alone at every snapshot, on held-out prompts. "
                "Correlation of each measure with these exact effects: over the snapshots of a feature (when it acts), "
                "and over features, of the ratio between neighbouring snapshots (which features grow).",
                causal_figures.validation,
                ("validation/{task}.summary",),
                wide=True,
                optional=True,
            ),
            Entry(
                "timeline",
                "Features over training",
                "Decoder norm, signed effect (IE) and relative effect (share RelIE) by snapshot, a row per feature, "
                "for the features with the largest |IE|. Rows are labelled with the feature's number and the word in "
                "the prompts at which it is most active.",
                causal_figures.feature_timeline,
                ("timeline/{task}", "names", "chance@{task}"),
                wide=True,
                optional=True,
            ),
            Entry(
                "languages",
                "Features shared between languages",
                "Number of features among those with the largest |IE| in both languages, and the number expected if "
                "each feature is replaced by one of about its size, of those active in both.",
                causal_figures.language_overlap,
                ("languages/{task}",),
                wide=True,
                optional=True,
            ),
        ),
    ),
    Section(
        "prompts",
        "Prompts",
        "The effects of features in single prompts of the selection half.",
        "No effects in single prompts were kept. crosslens attribute keeps some, except with --method exact.",
        (
            Entry(
                "words",
                "Effects in single prompts",
                "A word is coloured by the effect of all features active on it at the selected snapshot: blue where "
                "they support the correct answer, orange where they oppose it. A click opens the feature with the "
                "largest effect there.",
                causal_figures.prompt_words,
                ("prompts/{task}", "names"),
                wide=True,
                optional=True,
            ),
        ),
    ),
    Section(
        "ablation",
        "Ablation",
        "The metric when a set of features is ablated, or when it is all that is kept, measured with forward passes; "
        "on the held-out half of the prompts. Ablated features are set to zero at all positions unless a mean or "
        "paired-prompt baseline was chosen. Shares of the clean metric are 1 + (metric − clean) / |clean|, which is "
        "metric / clean if the clean metric is positive. Random sets hold as many other active features; size-matched "
        "sets also match activation × decoder norm.",
        _ABLATE,
        (
            Entry(
                "ablate-size",
                "Ablating the top k features, last snapshot",
                "Share of the clean metric that remains when k features are ablated and the error node is kept. Top "
                "features have the largest signed IE.",
                partial(causal_figures.ablation_by_size, mode="ablate"),
                ("ablation/{task}",),
            ),
            Entry(
                "keep-size",
                "Keeping only the top k features, last snapshot",
                "Share of the clean metric when only k features are kept, without the error node. Top features have "
                "the largest |IE|.",
                partial(causal_figures.ablation_by_size, mode="keep"),
                ("ablation/{task}",),
            ),
            Entry(
                "ablate-snapshots",
                "Ablating the top features, all snapshots",
                "The same at one set size; the top features are selected separately at each snapshot.",
                partial(causal_figures.ablation_over_snapshots, mode="ablate"),
                ("ablation/{task}",),
            ),
            Entry(
                "keep-snapshots",
                "Keeping only the top features, all snapshots",
                "The same at one set size; the top features are selected separately at each snapshot.",
                partial(causal_figures.ablation_over_snapshots, mode="keep"),
                ("ablation/{task}",),
            ),
            Entry(
                "additivity",
                "Additivity of effects",
                "Effect of ablating two features together, against the sum of their single effects. Where points leave "
                "the line, the effect of a set is not the sum of the effects of its features.",
                causal_figures.additivity,
                ("additivity/{task}", "additivity/{task}.snapshots", "names"),
                optional=True,
            ),
            Entry(
                "transfer",
                "Transfer between snapshots",
                "Effect of ablating the top features of one snapshot (row) at another (column), as a share of the "
                "effect of ablating all features there. Where a row is below the column's diagonal, the model uses "
                "other features by then.",
                causal_figures.transfer,
                ("transfer/{task}",),
                wide=True,
                optional=True,
            ),
        ),
    ),
)

PAGES = (
    Page("index", "Overview", "What the model learns when, and how well the crosscoder describes it.", _OVERVIEW),
    Page("evolution", "Evolution", "When features appear, how they rotate, split and disappear.", _EVOLUTION),
    Page("causal", "Causal effects", "Which features each task depends on, and at which snapshots.", _CAUSAL),
)
TASK = Page("task", "Task", "What one task asks, when it is learnt, and which features it depends on.", _TASK)
"""The page of every task."""
