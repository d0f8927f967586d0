"""What stands on the pages Overview and Evolution, in order: figures with their titles and definitions, and words for
when one is missing.
"""

from __future__ import annotations

from crosslens.report import figures, lives
from crosslens.report import phases as phase_figures
from crosslens.report.complexity import complexity
from crosslens.report.entries import Entry, Section

_ACCURACY = "No task has been measured: crosslens attribute RUN_DIR --task TASK measures its accuracy too."
_EVALUATE = "Nothing has been evaluated: crosslens train RUN_DIR writes evaluation.parquet when it ends."
_EVOLVE = "No evolution has been computed: crosslens evolve RUN_DIR."
_PROBE = "No probes have been fitted: crosslens evolve RUN_DIR fits some of them."

OVERVIEW: tuple[Section, ...] = (
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
                "dead",
                "Dead features",
                "Share of features that are active on no held-out token, in percent. Snapshots differ only where the "
                "gate is per snapshot.",
                figures.dead,
                ("evaluation",),
                optional=True,
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
        "phases",
        "Phases",
        "What the predictions learn first, when the features settle, and which snapshots show it.",
        _EVOLVE,
        (
            Entry(
                "dynamics",
                "Statistics first, features later?",
                "KL divergence from unigram and bigram shares of the corpus to the predictions, and loss, in nats per "
                "token; below, shares: fall of the bigram KL done, features settled (cosine to the final direction at "
                "least .5 from here on), present, and total dimensionality / d_model.",
                phase_figures.dynamics,
                ("dynamics", "phases"),
                wide=True,
                optional=True,
            ),
            Entry(
                "selection",
                "Which snapshots tell it best",
                "The snapshots that leave the least distance, in accuracy and activation similarity, to those that "
                "they stand for.",
                phase_figures.proposal,
                ("selection",),
                wide=True,
                optional=True,
            ),
        ),
    ),
)

EVOLUTION: tuple[Section, ...] = (
    Section(
        "evolution",
        "Lives of features",
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
            Entry(
                "complexity",
                "Are later features more complex?",
                "Mean complexity, from 1 (a single token) to 5 (diverse contexts with one theme), that a language "
                "model gave the features born, and those strongest, at a snapshot. Bands are two standard errors "
                "either way; correlations have 95 % bootstrap intervals over features.",
                complexity,
                ("labels", "evolution", "snapshots"),
                optional=True,
            ),
        ),
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
                phase_figures.probe_parts,
                ("probe_parts",),
                optional=True,
            ),
            Entry(
                "agreement",
                "Do neighbouring snapshots agree?",
                "Share of the 20 held-out tokens on which a feature is strongest that two neighbouring snapshots have "
                "in common, each read from that snapshot alone.",
                phase_figures.agreement,
                ("agreement",),
                optional=True,
            ),
        ),
    ),
)
