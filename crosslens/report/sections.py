"""What each page shows, in order: its sections with their headings and intros.

The figures of a section are the functions in `crosslens.report.figures` whose decorator names it.
"""

from __future__ import annotations

from dataclasses import dataclass

from crosslens.report.entries import Entry, list_figures


@dataclass(frozen=True)
class Section:
    """Figures under one heading.

    Attributes:
        name: its anchor, which no other section has.
        title: its heading.
        intro: a sentence or two before the figures.
    """

    name: str
    title: str
    intro: str

    @property
    def entries(self) -> list[Entry]:
        """Its figures, in order."""
        return [entry for entry in list_figures() if entry.section == self.name]


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


PAGES = (
    Page(
        "index",
        "Overview",
        "What the model learns when, and how well the crosscoder describes it.",
        (
            Section(
                "accuracy",
                "Accuracy",
                "When the model itself, without the crosscoder, learns each task.",
            ),
            Section(
                "reconstruction",
                "Reconstruction",
                "How well the crosscoder reconstructs each snapshot on held-out tokens.",
            ),
            Section(
                "seeds",
                "Seeds",
                "Which features other trainings on the same data find again, and which depend on the initial weights. "
                "Two features are partners if their activations on the held-out tokens have a correlation of at least "
                "0.7; partners are one to one.",
            ),
            Section(
                "phases",
                "Training phases",
                "What the model predicts first, when its features settle, and which snapshots represent the run.",
            ),
        ),
    ),
    Page(
        "evolution",
        "Evolution",
        "When features appear, how they rotate, split and disappear.",
        (
            Section(
                "evolution",
                "Lifecycles",
                "A feature is present at a snapshot if its R² there is at least 0.4 of its largest: how well the "
                "activations of the snapshot alone predict the feature on held-out tokens. The decoder norm stands "
                "beside it: it says what the dictionary writes, not what the model holds. “Initial” features are "
                "present at the first snapshot; “emergent” ones are born later, at the first snapshot from which they "
                "stay; “never” ones are present too briefly to count as born. “Transient” ones later disappear for "
                "good. Features whose R² is below 0.05 at every snapshot are “unknown”: their presence cannot be told.",
            ),
            Section(
                "probes",
                "Probes",
                "Whether the presence of a feature at a snapshot, by R² or by decoder norm, goes with how well a probe "
                "decodes it from that snapshot's activations.",
            ),
        ),
    ),
    Page(
        "causal",
        "Causal effects",
        "Which features each task depends on, and at which snapshots.",
        (
            Section(
                "tasks",
                "Tasks",
                "Every task has a page of its own: its items, the features with the largest effects, prompts word by "
                "word, and ablations.",
            ),
        ),
    ),
    Page(
        "prompts",
        "Prompts",
        "Single prompts at every snapshot: what the model says next, and which features are behind it.",
        (
            Section(
                "traced",
                "Traced prompts",
                "What holds for a kind of prompt is a question for a task, whose effects have errors.",
            ),
            Section(
                "steered",
                "Steering",
                "Activations of features are multiplied or added to while a snapshot writes.",
            ),
        ),
    ),
)
TASK = Page(
    "task",
    "Task",
    "What one task asks, when it is learnt, and which features it depends on.",
    (
        Section(
            "items",
            "What the task asks",
            "Each item is a prompt with a correct and a wrong continuation. The accuracy is that of the model itself, "
            "without the crosscoder.",
        ),
        Section(
            "effects",
            "Effects of features",
            "The indirect effect (IE) of a feature on logit(correct) − logit(wrong) at the last position, on the "
            "selection half of the prompts. Positive effects support the correct answer. RelIE is a snapshot's share "
            "of a feature's effect, |IE| / sum over snapshots of |IE|, without sign; share RelIE first divides each "
            "effect by the sum over features at its snapshot, because logits grow in training. An effect is "
            "significant at a false discovery rate of 5% over features and snapshots.",
        ),
        Section(
            "dates",
            "When features begin",
            "Five questions that “when” can mean, for the features with the largest effects at the last snapshot. "
            "Context readable: the snapshot's activations predict where the feature fires (R² over text). Concept "
            "readable: they predict what it says about this task (R² on paired prompts, fitted on some groups of "
            "prompts and judged on others). Read out: the snapshot acts on the feature's late value once that is put "
            "in. Matters: its own effect is a tenth of the largest or more. Model succeeds: accuracy is 75% or more.",
        ),
        Section(
            "prompts",
            "Prompts",
            "The effects of features in single prompts of the selection half.",
        ),
        Section(
            "ablation",
            "Ablation",
            "The metric when a set of features is ablated, or when it is all that is kept, measured with forward "
            "passes; on the held-out half of the prompts. Ablated features are set to zero at all positions unless a "
            "mean or paired-prompt baseline was chosen. Shares of the clean metric are 1 + (metric − clean) / |clean|, "
            "which is metric / clean if the clean metric is positive. Random sets hold as many other active features; "
            "size-matched sets also match activation × decoder norm, and change-matched ones hold as many features as "
            "change the activation as much.",
        ),
    ),
)
"""The page of every task."""
