"""The tables of a run directory: what a row is, what each column means and in which unit, and which command writes it.

`RunDir.save_table` refuses tables and columns that are not declared here. The report takes its "run ..." sentences and
the meaning of every column from here, and so does the page "Tables of a run" of the documentation. To add a column,
add it to its table here; a table may also be declared in the file that makes it (`declare`). To save a table of your
own, with any columns, name it `own/<name>`.

Names and columns may hold one placeholder: `attribution/<task>` stands for one table per task, `share/<label>` for one
column per snapshot label. All tables are parquet files, `<name>.parquet` below the run directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from crosslens.errors import UserError, did_you_mean

OWN = "own/"
"""Prefix of the names of tables that are a user's own."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        meaning: one sentence.
        unit: of its numbers; empty for names, counts, shares and other plain numbers.
    """

    meaning: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.meaning} [{self.unit}]" if self.unit else self.meaning


@dataclass(frozen=True)
class Verb:
    """A command that writes tables.

    Attributes:
        command: the whole of it, as one types it.
        missing: what is said where none of its tables exists.
    """

    command: str
    missing: str


@dataclass(frozen=True)
class Table:
    """A table of a run directory.

    Attributes:
        name: such as "evolution" or "attribution/<task>".
        row: what a row is about.
        verb: the command that writes it, a key of `VERBS`.
        columns: by name.
        missing: what is said where the table does not exist; by default that of its command.
    """

    name: str
    row: str
    verb: str
    columns: Mapping[str, Column]
    missing: str = ""

    def column(self, name: str) -> Column | None:
        """The declaration of a column; None if there is none."""
        return self.columns.get(name) or next(
            (column for pattern, column in self.columns.items() if _matches(pattern, name)), None
        )

    def advise(self) -> str:
        """What to say where the table does not exist."""
        return self.missing or VERBS[self.verb].missing


def declare(table: Table) -> Table:
    """Add a table to those of a run; one of the same name is replaced.

    Args:
        table: such as that of a measure, which stands in the file of its measure.

    Returns:
        The table.
    """
    TABLES[:] = [each for each in TABLES if each.name != table.name] + [table]
    return table


def find_table(name: str) -> Table | None:
    """The declaration of a table; None if there is none."""
    found = [table for table in TABLES if table.name == name or _matches(table.name, name)]
    return max(found, key=lambda table: len(table.name), default=None)  # x/<task>.snapshots before x/<task>


def folders() -> set[str]:
    """Folders of a run directory that hold tables, a user's own among them."""
    return {name.partition("/")[0] for name in (OWN, *(table.name for table in TABLES)) if "/" in name}


def check_table(name: str, columns: Iterable[str]) -> None:
    """Check that a table and its columns are declared; those below `own/` may have any columns.

    Raises:
        UserError: the table, or some of its columns, are not declared; they are named.
    """
    if name.startswith(OWN):
        return
    table, remedy = find_table(name), f"name a table of your own {OWN}{name.rpartition('/')[2]}, with any columns"
    if table is None:
        known = [table.name for table in TABLES]
        raise UserError(
            f"{name!r} is not a table of a run (crosslens.tables declares them){did_you_mean(name, known)}; {remedy}"
        )
    if unknown := [str(column) for column in columns if table.column(str(column)) is None]:
        raise UserError(
            f"the table {name!r} has no column {', '.join(map(repr, unknown))}: declare it in crosslens.tables, or "
            f"{remedy}"
        )


def earlier_names(name: str) -> dict[str, str]:
    """The columns of a table that version 0.2 called otherwise, each with its name of today."""
    table = find_table(name)
    return {} if table is None else _RENAMED.get(table.name, {})


def task_of(name: str) -> str | None:
    """The task in the name of a table; None for tables that are not of a task."""
    table = find_table(name)
    before, placeholder, after = ("", "", "") if table is None else table.name.partition("<task>")
    return name[len(before) : len(name) - len(after)] if placeholder else None


def maker(name: str) -> str:
    """The command that writes a table, such as "evolve"; that of an unknown table is "evolve"."""
    table = find_table(name)
    return "evolve" if table is None else table.verb.partition(" ")[0]


def render_markdown() -> str:
    """The declarations as Markdown: for each command, its tables and their columns."""
    lines: list[str] = []
    for verb, about in VERBS.items():
        lines += [f"## Written by `crosslens {verb}`", "", f"`{about.command}`", ""]
        for table in TABLES:
            if table.verb == verb:
                lines += [f"### `{table.name}`", "", f"A row per {table.row}.", "", "| column | meaning | unit |"]
                lines += ["|---|---|---|"]
                lines += [f"| `{name}` | {_cell(each.meaning)} | {each.unit} |" for name, each in table.columns.items()]
                lines += [""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _matches(pattern: str, name: str) -> bool:
    before, placeholder, after = re.fullmatch(r"([^<]*)(<\w+>)?(.*)", pattern).groups()  # type: ignore[union-attr]
    ends = name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
    return placeholder is not None and ends


_RENAMED = {
    "accuracy": {"low": "accuracy_low", "high": "accuracy_high"},
    "cosines": {"low": "lower_quartile", "high": "upper_quartile"},
    "labels": {"local_low": "local_detection_low", "local_high": "local_detection_high"},
    "languages/<task>": {"low": "expected_low", "high": "expected_high"},
    "phases": {"low": "snapshot_low", "high": "snapshot_high", "low_step": "step_low", "high_step": "step_high"},
    "validation/<task>.summary": {"low": "correlation_low", "high": "correlation_high"},
}
_ATTRIBUTE = "crosslens attribute RUN_DIR --task TASK"
_COLLECT = "Not collected yet. Run: crosslens evolve RUN_DIR"
VERBS = {
    "train": Verb(
        "crosslens train", "The crosscoder has not been evaluated. crosslens train does this when training ends."
    ),
    "train --seeds": Verb(
        "crosslens train ... --seeds 3",
        "Only one seed has been trained. To train three, repeat the command of this run, which is under Run details, "
        "with --seeds 3.",
    ),
    "sweep": Verb("crosslens sweep", "No settings have been compared. crosslens sweep compares numbers of features."),
    "evolve": Verb(
        "crosslens evolve RUN_DIR",
        "The evolution of features has not been computed. Run: crosslens evolve RUN_DIR",
    ),
    "attribute": Verb(_ATTRIBUTE, f"No effects on tasks have been computed. Run: {_ATTRIBUTE}"),
    "ablate": Verb(
        "crosslens ablate RUN_DIR --task TASK",
        "No features have been ablated. After crosslens attribute, run: crosslens ablate RUN_DIR --task TASK",
    ),
    "study": Verb(
        "crosslens study RUN_DIR --task TASK",
        "No task has been studied by interventions. Run: crosslens study RUN_DIR --task TASK",
    ),
    "trace": Verb(
        'crosslens trace RUN_DIR "The keys to the cabinet"',
        'No prompts have been traced. Run: crosslens trace RUN_DIR "The keys to the cabinet"',
    ),
    "steer": Verb(
        'crosslens steer RUN_DIR --feature 217 --factor 3 "The keys"',
        'No model has been steered. Run: crosslens steer RUN_DIR --feature 217 --factor 3 "The keys"',
    ),
    "connect": Verb(
        "crosslens connect RUN_DIR --lower LOWER_RUN_DIR --task TASK",
        "No features have been connected. Run: crosslens connect RUN_DIR --lower LOWER_RUN_DIR --task TASK",
    ),
    "label": Verb(
        "crosslens label RUN_DIR",
        "No features have been labelled. Run: crosslens label RUN_DIR --client CLIENT --model MODEL",
    ),
}


def _columns(
    columns: Mapping[str, str | tuple[str, str]],
    shared: str = "",
    *,
    interval: str = "",
    step: str = "",
    tokens: str = "",
) -> dict[str, Column]:
    """Columns by name, in the order in which the docs list them.

    Args:
        columns: meaning, or meaning and unit, of each.
        shared: names of those of `_SHARED` that come first.
        interval: names of columns that are followed by the ends of their intervals, 95% where no column says the level.
        step: names of columns that are dates, as numbers of snapshots, followed by the same in training steps.
        tokens: names of those that are followed by the same in training tokens.
    """
    found = {name: _SHARED[name] for name in shared.split()}
    level = "" if "level" in {*columns, *found} else "95% "
    for name, text in columns.items():
        column = found[name] = Column(*((text,) if isinstance(text, str) else text))
        for unit, dated in (("steps", step), ("tokens", tokens)):
            if name in dated.split():
                end = "step" if unit == "steps" else unit
                found[f"{name}_{end}"] = Column(f"The same in training {unit}.", unit)
        if name in interval.split():
            for end, which in (("low", "Lower"), ("high", "Upper")):
                found[f"{name}_{end}"] = Column(f"{which} end of the {level}interval of {name}.", column.unit)
    return found


_SHARED = {
    name: Column(*text)
    for name, text in {
        "feature": ("Number of the feature, its row of the dictionary.",),
        "snapshot": ("Number of the snapshot in the order of training, from 0.",),
        "label": ("Name of the snapshot.",),
        "step": ("Training step of the snapshot; missing if not recorded.", "steps"),
        "tokens": ("Tokens that the model had seen by then; missing if not recorded.", "tokens"),
        "task": ("Name of the task.",),
        "measure": ("Measure of presence: r2 (R²), within (within-token R²) or norm (decoder norm).",),
        "other": ("Number of the other snapshot.",),
        "other_label": ("Name of the other snapshot.",),
        "other_step": ("Training step of the other snapshot.", "steps"),
        "rank": ("Place in the order, 0 the strongest.",),
        "sequence": ("Number of the held-out sequence.",),
        "position": ("Position in the sequence; the beginning-of-sequence token is 0.",),
        "activation": ("Activation of the feature there.", "scaled activations"),
        "token": ("The token as text.",),
        "n_prompts": ("Prompts that the means are over.",),
        "n_groups": ("Groups of prompts, such as those of one head noun: the units of errors and intervals.",),
        "baseline": ("What a feature is set to: zero, mean (over the prompts) or patch (as on the paired prompt).",),
        "level": ("Confidence level of the intervals.",),
        "split": ("Half of the prompts: selection, where features are chosen, or held-out.",),
        "kind": ("Features counted: all, lexical (most variance lies between token types) or contextual.",),
    }.items()
}  # fmt: skip
_AT = "snapshot label step"
_DATED = f"{_AT} tokens"


def _effect_columns() -> dict[str, Column]:
    """Columns of the effects of a task by snapshot, of `attribution` and `completeness`."""
    return _columns(
        {
            "metric_clean": ("Mean of logit(correct) − logit(wrong) of the model.", "logits"),
            "metric_baseline": ("The same with every feature and the error node at its baseline.", "logits"),
            "features_effect": ("Sum of the effects of all features.", "logits"),
            "error_effect": ("Effect of the error node, what the crosscoder does not reconstruct.", "logits"),
            "completeness_error": "Mean |sum of effects − (clean − baseline)| / mean |clean − baseline| over prompts.",
            "agreement": "Rank correlation of the largest effects with exact ablation.",
            "n_active": "Features that are active on some prompt.",
            "n": "Prompts that the means are over.",
            "method": "How effects are estimated: removal, both_ends, ig, gradient or exact.",
            "rule": "Quadrature rule of integrated gradients.",
            "n_nodes": "Nodes of the rule.",
            "error": "How the error node is treated.",
            "threshold": ("Smallest effect that counts as one.", "logits"),
        },
        f"{_AT} n_groups baseline split",
    )


_BIRTHS = {
    "born": "Features born after the first snapshot; intervals, over groups of documents, are missing by the norm.",
    "born_reversed": "The same with the snapshots in reversed order, a control.",
    "sure": "Births with a q-value up to the limit; missing by the norm.",
    "sure_reversed": "The same in reversed order.",
    "beyond_trend": "Births that exceed the median curve of their kind, with a q-value up to the limit.",
}
_COUNTS = {
    "threshold": "Share of its largest value from which a feature is present.",
    "n": "Features with a reading.",
    **_BIRTHS,
}
_SHARES = {
    "live": "Live features of that kind.",
    "shared": "Share of them with a partner, one to one.",
    "shared_by_chance": "The same with the tokens of the other crosscoder permuted.",
    "shared_variance": "Share of the variance they write that features with a partner write.",
}
_EDITED = {
    "mode": "ablate (the set is edited) or keep (all others are).",
    "error": "Whether the error node is kept.",
    "clean": ("Metric of the model itself.", "logits"),
    "reconstruction_only": ("Metric with nothing edited and no error node.", "logits"),
    "all_edited": ("Metric with every feature edited, error node as in the row.", "logits"),
    "n_active": "Features that are active on some prompt.",
}
_TESTED = "baseline n_prompts n_groups"


def _ablation_columns() -> dict[str, Column]:
    """Columns of metrics with sets of features edited, of `ablation` and `zeroing`."""
    return _columns(
        {
            **_EDITED,
            "features": "The set: top (by effect), random, size_matched or change_matched.",
            "k": "Size of the set asked for.",
            "n_features": "Size of the set.",
            "size": ("Mean activation × decoder norm, summed over the set, mean over draws.", "scaled activations"),
            "moved": ("Norm of the change at the hook, mean over prompts and draws.", "activation"),
            "metric": ("Mean of logit(correct) − logit(wrong) over prompts and draws.", "logits"),
            "metric_se": ("Its standard error over groups of prompts.", "logits"),
            "change_se": ("Standard error over groups of prompts of metric − clean.", "logits"),
            "metric_sd": ("Standard deviation over draws.", "logits"),
            "metric_low": ("Lower end of the interval of the draws.", "logits"),
            "metric_high": ("Upper end of that interval.", "logits"),
            "n_draws": "Random draws of the set.",
        },
        f"{_AT} {_TESTED} split",
    )


TABLES: list[Table] = [
    Table(
        "evaluation",
        "snapshot",
        "train",
        _columns(
            {
                "explained_variance": "1 − E‖x̂ − x‖² / E‖x − mean‖² over all held-out tokens.",
                "explained_variance_per_token": "Mean over tokens of 1 − ‖x̂ − x‖² / ‖x − mean‖².",
                "l0": ("Mean number of active features per token.", "features"),
                "dead_fraction": "Share of the features that are active on no held-out token.",
                "ce_clean": ("Next-token loss of the model.", "nats per token"),
                "ce_spliced": ("Loss with the reconstruction spliced in at the hook point.", "nats per token"),
                "ce_zero": ("Loss with zeros at the hook point.", "nats per token"),
                "ce_recovered": "(ce_zero − ce_spliced) / (ce_zero − ce_clean).",
                "kl": ("KL divergence of the spliced model's predictions from the model's.", "nats per token"),
            },
            _DATED,
        ),
    ),
    Table(
        "consensus",
        "feature, in the run directory of each seed",
        "train --seeds",
        _columns(
            {
                "crosscoder": "Seed of the crosscoder.",
                "alive": "Whether the feature is active on held-out tokens.",
                "firing_rate": "Share of held-out tokens on which the feature is active.",
                "variance": "Share of the variance that the live features write, Var(f) Σ norm².",
                "n_seeds": "Seeds that have the feature, its own included; 0 if dead.",
                "of": "Number of seeds.",
                "consensus": "Whether more than half of the seeds have the feature.",
                "correlation": "Mean over the other seeds of the correlation with the partner there.",
                "partner/<seed>": "The feature's partner in that seed, whatever its correlation.",
                "correlation/<seed>": "Correlation of the activations of the two on held-out tokens.",
            },
            "feature",
        ),
    ),
    Table(
        "seeds",
        "pair of seeds",
        "train --seeds",
        _columns(
            {
                "a": "One seed.",
                "b": "The other seed.",
                **{
                    f"{name}_{side}": f"{text} {side}{rest}"
                    for name, text, rest in (
                        ("live", "Live features of", "."),
                        ("share", "Share of the live features of", " with a partner, one to one."),
                        ("variance", "The same weighted by variance, of", "."),
                        ("nearest", "Share of the features of", " with any such neighbour, not one to one."),
                        ("cosine", "Share of the features of", " with a partner whose decoder has such a cosine."),
                    )
                    for side in "ab"
                },
                "null_a": "Share of the features of a with a partner when the tokens of b are permuted.",
                "median_cosine": "Median cosine of the decoders of partners.",
            }
        ),
    ),
    Table(
        "seeds_births",
        "pair of seeds and kind of feature",
        "train --seeds",
        _columns(
            {
                "a": "One seed.",
                "b": "The other seed.",
                **_SHARES,
                "pairs": "Partners that both have a reading of R².",
                "born": "Of these, features of a that are born after the first snapshot.",
                "born_too": "Share of these whose partner is born after the first snapshot, too.",
                "born_too_by_chance": "Share of all partners that are.",
                "same_birth": "Where both are born, share that is born at the same snapshot.",
                "same_birth_by_chance": "The same with the dates of the partners permuted.",
                "within_1": "Share that is born at most one snapshot apart.",
                "within_1_by_chance": "The same with the dates of the partners permuted.",
            },
            "kind",
        ),
    ),
    Table(
        "unrelated", "kind of feature; partners in a crosscoder over other models", "evolve", _columns(_SHARES, "kind")
    ),
    Table(
        "seeds_rotation",
        "pair of seeds and interval between snapshots",
        "train --seeds",
        _columns(
            {
                "a": "One seed.",
                "b": "The other seed.",
                "before": "Number of the snapshot at the beginning.",
                "after": "Number of the snapshot at the end.",
                "from": "Name of the snapshot at the beginning.",
                "to": "Name of the snapshot at the end.",
                "n": "Pairs of partners with directions at both ends.",
                "angle_a": ("Median angle by which the features of a turn.", "degrees"),
                "angle_b": ("Median angle by which the features of b turn.", "degrees"),
                "spearman": "Rank correlation of the angles of partners.",
                "apart": ("Median angle between the decoder vectors of partners at the end.", "degrees"),
            }
        ),
    ),
    Table(
        "sweep",
        "setting of F and k",
        "sweep",
        _columns(
            {
                "d_sae": "Number of features F.",
                "k": ("Active features per token in training.", "features"),
                "seeds": "Seeds trained with this setting.",
                "explained_variance": "Mean explained variance over snapshots and seeds.",
                "least_explained": "Explained variance of the least explained snapshot, mean over seeds.",
                "l0": ("Mean number of active features per token.", "features"),
                "dead": "Share of dead features.",
                "live": "Live features, mean over seeds.",
                "agreement": "Share of live features with a partner in another seed, mean over pairs and directions.",
                "agreement_low": "The smallest such share.",
                "agreement_high": "The largest such share.",
                "agreed": "Number of live features with a partner.",
                "variance": "agreement weighted by variance.",
                "cosine": "Share of live features with a partner whose decoder has such a cosine.",
                "consensus": "Share of live features that most seeds have.",
                "consensus_variance": "The same weighted by variance.",
                "proposed": "Whether this setting is proposed.",
            }
        ),
    ),
    Table(
        "evolution",
        "feature and snapshot",
        "evolve",
        _columns(
            {
                "norm": ("Norm of the feature's decoder vector.", "scaled activations"),
                "strength": "Decoder norm divided by the feature's largest.",
                "reldec": "Decoder norm divided by the sum of the feature's norms over snapshots.",
                "r2": "How well the activations of the snapshot alone predict the feature on held-out tokens, R².",
                "within": "R² within token types: what the context adds.",
                "firing_rate": "Share of held-out tokens on which the feature is active.",
                "mean_activation": ("Mean activation over the tokens on which it is active.", "scaled activations"),
            },
            f"feature {_DATED}",
        ),
    ),
    Table(
        "lifecycles",
        "measure of presence and feature",
        "evolve",
        _columns(
            {
                "n_seeds": "Seeds that have the feature, after `train --seeds`.",
                "consensus": "Whether more than half of the seeds have it.",
                "alive": "Whether the feature is active on held-out tokens and has a decoder.",
                "part": "free, shared, or the snapshots that the feature is dedicated to, after `train --n-shared`.",
                "kind": "lexical (most of its variance lies between token types) or contextual.",
                "token_share": "Share of its variance between token types.",
                "firing_rate": "Share of held-out tokens on which the feature is active.",
                "origin": "initial (present at the first snapshot), emergent (born later) or never.",
                "fate": "persistent (present at the last snapshot) or transient.",
                "birth": (
                    "First snapshot from which the feature stays; an end of its interval is S where a draw has none.",
                    "snapshots",
                ),
                "peak": ("Snapshot of its largest presence.", "snapshots"),
                "death": ("First snapshot from which it is gone for good.", "snapshots"),
                "lifetime": ("Snapshots at which it is present.", "snapshots"),
                "effect": "How much presence rises at birth.",
                "p": "p-value of that rise.",
                "q": "p-value adjusted for the number of features (Benjamini–Hochberg).",
            },
            "measure feature",
            step="birth peak death lifetime",
            tokens="birth peak death lifetime",
            interval="birth effect",
        ),
    ),
    Table(
        "birth_counts",
        "measure of presence, kind of feature and threshold",
        "evolve",
        _columns(
            {
                **_COUNTS,
                "untrained": "Share of features born in models that never trained.",
                "untrained_n": "Features with a reading there.",
                "exchangeable": "Share of features born in trained models of one step that differ in their seeds.",
                "exchangeable_n": "Features with a reading there.",
            },
            "measure kind",
            interval=" ".join(_BIRTHS),
        ),
    ),
    *(
        Table(
            f"{name}_births",
            f"measure of presence, kind of feature and threshold, in a crosscoder over {name} models",
            "evolve",
            _columns(_COUNTS, "measure kind", interval=" ".join(_BIRTHS)),
        )
        for name in ("untrained", "exchangeable")
    ),
    Table(
        "feature_dimensionality",
        "feature",
        "evolve",
        _columns(
            {"dimensionality/<label>": "|w|⁴ / Σ (w · w')² there, w the decoder vector × RMS activation."}, "feature"
        ),
    ),
    Table(
        "directions",
        "feature",
        "evolve",
        _columns(
            {"cosine/<label>": "Cosine of its decoder vector at the snapshot with that at the last one."}, "feature"
        ),
    ),
    Table(
        "encoder",
        "feature",
        "evolve",
        _columns(
            {
                "share/<label>": "The snapshot's share of the rise of the pre-activation from all tokens to those "
                "on which the feature is active.",
            },
            "feature",
        ),
        _COLLECT,
    ),
    Table(
        "scaling",
        "feature; left out where decoder norms are not penalised and equal it",
        "evolve",
        _columns(
            {
                "own/<label>": (
                    "Least-squares coefficient of the snapshot's decoder vector on what other features leave "
                    "unexplained.",
                    "decoder norms",
                ),
                "peak/<label>": ("The same of the decoder vector where its norm is largest.", "decoder norms"),
            },
            "feature",
        ),
    ),
    Table(
        "replacements",
        "pair of features of which one is born when the other dies",
        "evolve",
        _columns(
            {
                "predecessor": "The feature that dies.",
                "successor": "The feature that is born.",
                "death": "Snapshot at which the predecessor dies.",
                "birth": "Snapshot at which the successor is born.",
                "cosine": "Cosine of their decoder vectors.",
                "overlap": "Share of tokens that they have in common.",
                "successors": "Number of successors of the predecessor.",
                "predecessors": "Number of predecessors of the successor.",
                "kind": "replacement, split (several successors), merger (several predecessors), or both.",
            },
            step="death birth",
        ),
    ),
    Table(
        "splits",
        "pair of features that share a direction at some snapshots",
        "evolve",
        _columns(
            {
                "partner": "The other feature, the larger number.",
                "kind": "split (the direction is shared before) or merger (it is shared from then on).",
                "at": "First snapshot after the change.",
                "cosine_before": "Cosine of the two at the first snapshot where both are present.",
                "cosine_after": "Cosine of the two at the last such snapshot.",
            },
            "feature",
            step="at",
            tokens="at",
        ),
    ),
    Table(
        "split_counts",
        "kind of pair (split, merger or replacement) and of its features",
        "evolve",
        _columns(
            {
                "kind": "split, merger or replacement.",
                "features": "Those of the pair: all, or lexical, contextual, or mixed (one of each).",
                "n": "Pairs found.",
                "by_chance": "Mean number with the snapshots in random orders; of replacements, with births permuted.",
                "most_by_chance": "No more than this in 95% of the orders.",
            }
        ),
    ),
    Table(
        "dimensionality",
        "snapshot",
        "evolve",
        _columns(
            {
                "present": "Features that are present by decoder norm.",
                "total": ("Sum over present features of |w|⁴ / Σ (w · w')², w the decoder vector × RMS.", "dimensions"),
                "share": "total / d_model.",
                "random_total": ("The same for as many random directions of the same lengths.", "dimensions"),
                "random_share": "random_total / d_model.",
                "elhage_total": ("The same with the decoder vector alone, as Elhage et al. wrote it.", "dimensions"),
                "elhage_share": "elhage_total / d_model.",
                "random_elhage_share": "The same for random directions / d_model.",
                "participation_ratio": ("(Σ variances)² / Σ variances² of the activations.", "dimensions"),
            },
            _DATED,
        ),
    ),
    Table(
        "doubtful",
        "snapshot",
        "evolve",
        _columns(
            {
                "participation_ratio": ("Participation ratio of its activations.", "dimensions"),
                "similarity": "Largest CKA to a snapshot before it or to the last one.",
                "encoder_share": "Median over features of its encoder share.",
                "reason": "Why it is doubtful; empty if it is not.",
            },
            _AT,
        ),
    ),
    Table(
        "rotation",
        "interval between neighbouring snapshots",
        "evolve",
        _columns(
            {
                "before": "Number of the snapshot at the beginning.",
                "after": "Number of the snapshot at the end.",
                "from": "Name of the snapshot at the beginning.",
                "to": "Name of the snapshot at the end.",
                "from_step": ("Training step at the beginning.", "steps"),
                "to_step": ("Training step at the end.", "steps"),
                "from_tokens": ("Training tokens at the beginning.", "tokens"),
                "to_tokens": ("Training tokens at the end.", "tokens"),
                "at_edge": "Whether this is the first or the last interval.",
                "n": "Features with a direction at both ends.",
                "median_cosine": "Median cosine of their decoder vectors at both ends.",
                "angle": ("Median angle between these vectors.", "degrees"),
                "halves_angle": ("Median angle between estimates at both ends on different halves.", "degrees"),
                "null_angle": ("The same at one snapshot: what sampling alone makes of no rotation.", "degrees"),
                "beyond_null": "Share of the features whose halves_angle exceeds their null_angle; half by chance.",
                "mapped_angle": (
                    "Median angle left after the linear map from all activations at the beginning to those at the end.",
                    "degrees",
                ),
                "seeds_angle": (
                    "Median angle at the end between the vectors of a feature in two seeds; missing for one seed.",
                    "degrees",
                ),
                "doublings": "Doublings of the training tokens in the interval, of steps where tokens are unknown.",
                "angle_per_doubling": ("angle divided by doublings.", "degrees per doubling"),
                "null_per_doubling": ("null_angle divided by doublings.", "degrees per doubling"),
                "rotated": "Features whose largest rotation is in this interval.",
                "share": "The same as a share of all features that rotate.",
                "largest": "Whether this is the interval in which most features rotate most.",
            }
        ),
    ),
    Table(
        "cosines",
        "pair of snapshots",
        "evolve",
        _columns(
            {
                "n": "Live features with a direction at both.",
                "mean": "Mean cosine of a feature's decoder vectors at the two.",
                "lower_quartile": "Lower quartile of the cosines.",
                "median": "Median of the cosines.",
                "upper_quartile": "Upper quartile of the cosines.",
            },
            "snapshot other label other_label step other_step",
        ),
    ),
    Table(
        "agreement",
        "feature and pair of neighbouring snapshots",
        "evolve",
        _columns(
            {
                "norm": "The smaller of the two decoder norms, divided by the feature's largest.",
                "agreement": "Share of the feature's 20 strongest tokens that the two snapshots have in common.",
                "active": "Share of the strongest tokens of the first on which the feature is active.",
                "other_active": "The same of the second.",
                "chance": "agreement of two random sets of tokens.",
            },
            "feature snapshot other label other_label step other_step",
        ),
    ),
    Table(
        "dynamics",
        "snapshot",
        "evolve",
        _columns(
            {
                "kl1": ("Mean KL divergence of the corpus's unigram statistics from the model's predictions.", "nats"),
                "kl2": ("Mean KL divergence of the corpus's bigram statistics from the model's predictions.", "nats"),
                "loss": ("Mean next-token loss.", "nats"),
                "bigram_progress": "Share of the fall of kl2 that is completed.",
                "h1": ("Entropy of the unigram statistics, the lowest loss with them alone.", "nats"),
                "h2": ("Entropy of the bigram statistics, the lowest loss with them alone.", "nats"),
                "n": "Predictions that the means are over.",
                "known": "Share of them in the mean of kl2.",
                "present": "Features that are present.",
                "born": "Emergent features whose birth is here.",
                "settled": "Features that keep their final direction from here on.",
                "settled_angle": (
                    "Angle to it up to which they keep it: the median angle between seeds, or 60 without other seeds.",
                    "degrees",
                ),
                "alive": "Features that are active on some held-out token.",
                "dimensionality": "Total dimensionality / d_model.",
                "random_dimensionality": "The same for as many random directions.",
            },
            f"{_DATED} measure",
            interval="kl1 kl2 loss",
        ),
    ),
    Table(
        "phases",
        "event of training",
        "evolve",
        _columns(
            {
                "event": "Name of the event, such as turning_point, settling or births.",
                "snapshot": "Snapshot of the event; missing if it never happens.",
                "step": ("Training step of that snapshot; missing if not recorded.", "steps"),
                "at_edge": "Whether it is at the first or the last snapshot, where it means little.",
                "agreement": "Share of bootstrap draws with the same snapshot.",
                "after_turning_point": "Share of draws in which it is later than the turning point.",
                "n": "Features counted, for births and settling.",
                "lead": "By how much one phase is ahead of the other, as a share of both curves.",
                "resolved": "Whether the snapshots are close enough to tell the order of the phases.",
                "jump": "Largest part of a curve that lies in one interval.",
                "jump_of": "Curve of that part: statistics or features.",
                "jump_from": "Name of the snapshot at its beginning.",
                "jump_to": "Name of the snapshot at its end.",
            },
            "label tokens",
            interval="snapshot step lead",
        ),
    ),
    Table(
        "similarity",
        "pair of snapshots",
        "evolve",
        _columns(
            {
                "cosine": "Mean cosine of their activations.",
                "pearson": "Pearson correlation of their activations.",
                "cka": "Linear CKA of their activations, 0 to 1.",
                "n": "Tokens compared.",
            },
            "snapshot other label other_label",
        ),
    ),
    Table(
        "selection",
        "snapshot",
        "evolve",
        _columns(
            {
                "chosen": "Whether the snapshot is proposed.",
                "nearest": "Name of the chosen snapshot that represents it.",
                "distance": "Distance to that snapshot.",
                "stands_for": "Names of the snapshots that it represents.",
                "previous_similarity": "CKA to the snapshot before.",
                "cost": "By how much the distances would rise in sum without it.",
                "accuracy/<task>": "Accuracy on the task.",
                "reason": "Why it is chosen or left out, in words.",
            },
            _AT,
        ),
    ),
    Table(
        "probe",
        "probed feature and snapshot",
        "evolve",
        _columns(
            {
                "norm": "Decoder norm divided by the feature's largest.",
                "probe_error": "Share of held-out tokens on which a linear probe of the snapshot's activations errs.",
                "n": "Tokens that the probe is judged on.",
                "first_error": "The error on one half of the tokens.",
                "second_error": "The error on the other half.",
            },
            f"feature {_AT}",
        ),
        "No probes have been fitted. Run: crosslens evolve RUN_DIR",
    ),
    Table(
        "probe_presence",
        "measure of presence, within or between features",
        "evolve",
        _columns(
            {
                "part": "within_features (over snapshots) or between_features (at one snapshot).",
                "spearman": "Rank correlation of the measure with probe error; its interval is over features.",
                "n": "Points.",
                "n_features": "Features.",
            },
            "measure",
            interval="spearman",
        ),
    ),
    Table(
        "probe_parts",
        "way to compare probe error and decoder norm",
        "evolve",
        _columns(
            {
                "part": "all, trained (without step 0), within_features, within_snapshots, or disattenuated.",
                "spearman": "Rank correlation; its interval is over features.",
                "pearson": "Pearson correlation; its interval is over features.",
                "reliability": "Reliability of the errors of single probes; in the last row only.",
                "sd_norm": "Standard deviation of the norms.",
                "sd_error": "Standard deviation of the errors.",
                "n": "Points.",
                "n_features": "Features.",
            },
            interval="spearman pearson",
        ),
    ),
    Table(
        "examples",
        "feature and held-out token on which it is strongest, at most one per sequence",
        "evolve",
        _columns(
            {
                "threshold": "Active at a snapshot if activation × decoder norm exceeds this; 0 if the gate is shared.",
                "read/<label>": ("Its part of the pre-activation there, minus its mean.", "scaled activations"),
            },
            "feature rank sequence position activation",
        ),
        _COLLECT,
    ),
    Table(
        "example_tokens",
        "token around an example",
        "evolve",
        _columns({}, "feature rank position token activation"),
        _COLLECT,
    ),
    Table(
        "example_contexts",
        "token further away from an example",
        "evolve",
        _columns({}, "feature rank position token activation"),
        _COLLECT,
    ),
    Table(
        "samples",
        "feature and random token on which it is active, strongest first",
        "evolve",
        _columns(
            {"threshold": "As in `examples`."},
            "feature rank sequence position activation",
        ),
        _COLLECT,
    ),
    Table(
        "sample_tokens",
        "token around a sample",
        "evolve",
        _columns({}, "feature rank position token activation"),
        _COLLECT,
    ),
    Table(
        "activations",
        "feature and bin of activation",
        "evolve",
        _columns(
            {
                "bin": ("The bin holds activations from 2^(bin/4) to 2^((bin+1)/4).", "quarters of an octave"),
                "count": ("Held-out tokens in the bin.", "tokens"),
            },
            "feature",
        ),
        _COLLECT,
    ),
    Table(
        "lens",
        "feature, snapshot and rank",
        "evolve",
        _columns(
            {
                "promoted": "Token whose logit the decoder vector raises.",
                "promoted_logit": ("By how much, minus the mean over the vocabulary.", "unscaled logits"),
                "suppressed": "Token whose logit it lowers.",
                "suppressed_logit": ("By how much, minus the mean over the vocabulary.", "unscaled logits"),
            },
            "feature snapshot rank",
        ),
        _COLLECT,
    ),
    Table(
        "nearest",
        "feature and neighbour",
        "evolve",
        _columns(
            {"other": "The other feature.", "cosine": "Cosine of the decoder vectors, concatenated over snapshots."},
            "feature rank",
        ),
        _COLLECT,
    ),
    Table(
        "passages",
        "passage on which the label of a feature is judged",
        "evolve",
        _columns(
            {
                "active": "Whether the feature is active in it.",
                "rank": "Place in a random order.",
                "begin": "First position.",
                "end": "The position after the last.",
                "activation": ("Largest activation in the passage.", "scaled activations"),
                "rate": "Share of held-out tokens on which the feature is active.",
            },
            "feature sequence",
        ),
        _COLLECT,
    ),
    Table(
        "held_out_tokens",
        "token of the sequences with passages",
        "evolve",
        _columns({}, "sequence position token"),
        _COLLECT,
    ),
    Table(
        "accuracy",
        "task and snapshot",
        "attribute",
        _columns(
            {
                "accuracy": "Share of items whose correct continuation has the higher logit, with Wilson's interval.",
                "at_chance": "Whether the interval holds 50%.",
                "metric": ("Mean of logit(correct) − logit(wrong).", "logits"),
                "n": "Items.",
                "few": "Whether there are too few items for means over tasks.",
                "skipped": "Items left out.",
                "reasons": "Why they are left out.",
                "merged": "Items left out because they are the same as others.",
                "merged_reasons": "What makes them the same.",
            },
            f"task {_DATED}",
            interval="accuracy",
        ),
        f"No task accuracy has been measured. Run: {_ATTRIBUTE}",
    ),
    Table(
        "attribution/<task>",
        "feature that is active on the task and snapshot",
        "attribute",
        _columns(
            {
                "ie": ("Indirect effect: mean over prompts of the effect on logit(correct) − logit(wrong).", "logits"),
                "ie_se": ("Its standard error over groups of prompts.", "logits"),
                "p": "p-value of the effect against 0, over groups of prompts.",
                "q": "The same adjusted for the number of features and snapshots (Benjamini–Bogomolov).",
                "significant": "Whether the effect counts as one at a false discovery rate of 5%.",
                "share_relie": "RelIE after dividing each effect by the sum of significant |IE| at its snapshot.",
                "relie": "RelIE: |IE| / sum over snapshots of |IE|, of significant effects; 0 for the others.",
                "reldec": "Decoder norm divided by the sum of the feature's norms over snapshots.",
                "active": "Whether the feature is active on some prompt.",
                "size": ("Mean activation × decoder norm on the prompts.", "scaled activations"),
                "encoder_share": "Share of this snapshot in the feature's encoder input.",
                "read_later": "Share of later snapshots in it.",
                "mostly_later": "Whether that is more than half.",
            },
            f"feature {_AT}",
            interval="ie share_relie relie",
        ),
    ),
    Table("attribution/<task>.snapshots", "snapshot", "attribute", _effect_columns()),
    Table(
        "prompts/<task>",
        "prompt, snapshot and position",
        "attribute",
        _columns(
            {
                "prompt": "Number of the prompt.",
                "effect": ("Effect of all features active on the token.", "logits"),
                "feature": "The feature with the largest effect there; −1 if none has one.",
                "feature_effect": ("Its effect.", "logits"),
                "prefix": "The prompt.",
                "correct": "Its correct continuation.",
                "wrong": "Its wrong continuation.",
                "paired": "The paired prompt; missing if there is none.",
            },
            f"{_AT} position token",
        ),
        "No effects in single prompts were kept. crosslens attribute keeps some, except with --method exact.",
    ),
    Table("ablation/<task>", "snapshot, set of features and its size", "ablate", _ablation_columns()),
    Table(
        "traces",
        "traced prompt and snapshot",
        "trace",
        _columns(
            {
                "prompt": "Number of the prompt.",
                "text": "The prompt.",
                "paired": "The prompt that it is compared with; missing if there is none.",
                "correct": "The correct answer.",
                "wrong": "The wrong answer.",
                "given": "Whether the answers were given; otherwise the last snapshot finds them most probable.",
                "metric": ("logit(correct) − logit(wrong).", "logits"),
                "correct_probability": "Probability of the correct answer.",
                "wrong_probability": "Probability of the wrong answer.",
                "paired_metric": ("logit(correct) − logit(wrong) on the paired prompt.", "logits"),
                "features_effect": ("Sum of the effects of all features.", "logits"),
                "metric_baseline": ("The metric with every feature and the error node at its baseline.", "logits"),
            },
            _AT,
        ),
    ),
    Table(
        "trace_predictions",
        "traced prompt, snapshot and rank",
        "trace",
        _columns(
            {
                "prompt": "Number of the prompt.",
                "paired": "Whether this is after the paired prompt.",
                "probability": "Probability of the token.",
            },
            f"{_AT} rank token",
        ),
    ),
    Table(
        "trace_features",
        "traced prompt, feature that fires on it, and snapshot",
        "trace",
        _columns(
            {
                "prompt": "Number of the prompt.",
                "effect": ("Drop of the metric without the feature, in this prompt: a size, without error.", "logits"),
                "activation": ("Its largest activation in the prompt.", "scaled activations"),
                "paired_activation": ("That in the paired prompt.", "scaled activations"),
                "matters": "First snapshot from which the effect is a tenth of its largest or more; missing if none.",
                "readable": "Snapshot at which it was born by R²; missing if never, or without crosslens evolve.",
                "read_later": "Share of its activation that is read from later snapshots.",
                "mostly_later": "Whether that is above 0.5.",
            },
            f"feature {_AT} position token",
        ),
    ),
    Table(
        "trace_tokens",
        "traced prompt, position, feature that fires there, and snapshot",
        "trace",
        _columns(
            {
                "prompt": "Number of the prompt.",
                "activation": ("Activation of the feature there.", "scaled activations"),
                "paired_activation": ("That at this position of the paired prompt.", "scaled activations"),
                "effect": ("Its part of the feature's effect.", "logits"),
            },
            "position token feature snapshot",
        ),
    ),
    Table(
        "steered",
        "steered prompt and snapshot",
        "steer",
        _columns(
            {
                "text": "The prompt.",
                "features": "The features, separated by commas.",
                "factor": "What their activations are multiplied by; missing if something is added instead.",
                "add": ("What is added to them; missing if they are multiplied.", "scaled activations"),
                "plain": "What the model writes.",
                "steered": "What it writes while it is steered.",
                "prompt_loss": ("Next-token loss on the prompt.", "nats per token"),
                "prompt_loss_change": ("Its change while steered.", "nats per token"),
                "text_loss": ("Next-token loss on held-out text of the run.", "nats per token"),
                "text_loss_change": ("Its change while steered.", "nats per token"),
                "n_tokens": ("Held-out tokens that it is measured on.", "tokens"),
                "length": ("Tokens that are written.", "tokens"),
                "temperature": "Of sampling; 0 takes the most probable token.",
                "seed": "Of sampling.",
            },
            _AT,
        ),
    ),
    Table(
        "zeroing/<task>",
        "snapshot and set of features that is set to zero",
        "study",
        _ablation_columns(),
        "Features were not exchanged with the paired prompt, so ablation/<task> has what setting them to zero does.",
    ),
    Table("completeness/<task>", "snapshot, by integrated gradients", "study", _effect_columns()),
    Table(
        "exact/<task>",
        "feature with one of the largest effects at the last snapshot",
        "study",
        _columns(
            {
                "removal": ("Effect at the last snapshot, by removal.", "logits"),
                "ig": ("The same by integrated gradients.", "logits"),
                "gradient": ("The same by attribution patching.", "logits"),
                "removed": ("What the metric loses when the feature alone is set to its baseline.", "logits"),
                "added": ("What it gains when the feature alone is set to its clean value in the baseline.", "logits"),
            },
            "feature baseline",
        ),
    ),
    Table(
        "transfer/<task>",
        "pair of snapshots",
        "study",
        _columns(
            {
                **{
                    f"{at}_at{end}": (f"{text} the features are {words}.", unit)
                    for end, text, unit in (
                        ("", "Number of the snapshot at which", ""),
                        ("_label", "Name of the snapshot at which", ""),
                        ("_step", "Training step at which", "steps"),
                    )
                    for at, words in (("selected", "chosen"), ("ablated", "ablated"))
                },
                **_EDITED,
                "k": "Size of the set.",
                "k_active": "Features of the set that are active at the snapshot of the ablation.",
                "shared": "Features of the set that are also in that snapshot's own set.",
                "metric": ("Mean of logit(correct) − logit(wrong) over prompts.", "logits"),
                "metric_se": ("Its standard error over groups of prompts.", "logits"),
                "share": "Change as a share of that from ablating all features there.",
            },
            _TESTED,
        ),
    ),
    Table(
        "additivity/<task>",
        "snapshot and pair of features",
        "study",
        _columns(
            {
                "feature_a": "One feature.",
                "feature_b": "The other feature.",
                "effect_a": ("Effect of ablating the one.", "logits"),
                "effect_b": ("Effect of ablating the other.", "logits"),
                "sum": ("Sum of the two effects.", "logits"),
                "joint": ("Effect of ablating both together.", "logits"),
                "deviation": ("joint − sum.", "logits"),
                "interacting": "Whether |joint − sum| is more than half of the smaller effect.",
            },
            f"{_AT} baseline",
        ),
    ),
    Table(
        "additivity/<task>.snapshots",
        "snapshot",
        "study",
        _columns(
            {
                "k": "Features with the largest |IE| of which pairs are drawn.",
                "n_pairs": "Pairs.",
                "interacting": "Share of the pairs that interact.",
                "deviation": "Sum of |joint − sum| / sum of |sum|.",
            },
            f"{_AT} {_TESTED}",
            interval="interacting deviation",
        ),
    ),
    Table(
        "timeline/<task>",
        "feature with a large effect and snapshot",
        "study",
        _columns(
            {
                "order": "Place of the feature, 0 the one that matters first.",
                "norm": ("Norm of the feature's decoder vector.", "scaled activations"),
                "strength": "Decoder norm divided by the feature's largest.",
                "ie": ("Indirect effect, mean over prompts.", "logits"),
                "ie_se": ("Its standard error over groups of prompts.", "logits"),
                "share_relie": "RelIE after dividing each effect by the sum of significant |IE| at its snapshot.",
                "relie": "RelIE: the snapshot's share of the feature's significant effects.",
                "rank": "Place of |IE| at this snapshot, 1 the largest.",
                "top": "Whether the feature is among the snapshot's top ones.",
                "class": "Class by share RelIE, such as emerged or discontinued; small early effects are not seen.",
                "signed_class": "The same by signed effects.",
                "centre_of_mass": ("Centre of mass of share RelIE over snapshots.", "snapshots"),
                "examples": "Prompts on which the feature is strongest, with the token in brackets.",
            },
            f"feature {_AT}",
        ),
    ),
    Table(
        "concepts/<task>",
        "feature that tells the paired prompts of at least eight groups apart, those with most groups first",
        "study",
        _columns(
            {
                "difference": "Sum of (f − f′)² / sum of f² + f′² over pairs: 1 if active on one prompt of each pair.",
                "n_groups": "Groups of prompts in which the two differ.",
                "r2": "Largest R² on paired prompts over snapshots.",
                "peak": ("Where that is.", "snapshot"),
                "birth": ("First snapshot from which the concept is readable; missing below R² = .05.", "snapshot"),
                "readable_q": "q-value that the concept is readable at no snapshot.",
                "q": "q-value that the concept is not born after the first snapshot.",
            },
            "feature",
            step="birth",
            tokens="birth",
            interval="birth",
        ),
        missing="No concept is dated: crosslens study does it for tasks with paired prompts of 8 groups or more.",
    ),
    Table(
        "concepts/<task>.curves",
        "such feature and snapshot",
        "study",
        _columns(
            {
                "r2": "R² of the feature's difference on paired prompts; its interval is over groups of prompts.",
            },
            f"feature {_AT}",
            interval="r2",
        ),
    ),
    Table(
        "read_out/<task>",
        "feature with a large effect (missing for all of them together) and snapshot",
        "study",
        _columns(
            {
                "effect": ("Drop of the metric when the late value of the paired prompt is put in.", "logits"),
                "effect_se": ("Its standard error over groups of prompts.", "logits"),
                "share": "Effect divided by that at the last snapshot; missing where that is not sure.",
                "mapped_share": "The same in the late direction, turned by the map between both snapshots.",
                "random_share": "The same in random directions of equal size, root of the mean square.",
                "read_out": "Whether a share is a tenth or more, above the random one, and surely above 0.",
            },
            f"feature {_AT} n_prompts n_groups",
            interval="share mapped_share",
        ),
        missing="Nothing is put into earlier snapshots: crosslens study does it for tasks with paired prompts.",
    ),
    Table(
        "read_out/<task>.last",
        "snapshot",
        "study",
        _columns(
            {
                "metric": ("Metric of the last snapshot, given this one's activations through a linear map.", "logits"),
                "metric_se": ("Its standard error over groups of prompts.", "logits"),
                "share": "Metric divided by that with its own activations, mapped likewise.",
                "accuracy": "Share of prompts with a positive metric.",
            },
            f"{_AT} n_prompts n_groups",
        ),
    ),
    Table(
        "dates/<task>",
        "feature with a large effect at the last snapshot",
        "study",
        _columns(
            {
                "context": ("Context readable: R² over text reaches .4 of its largest.", "snapshot"),
                "concept": ("Concept readable: R² on paired prompts reaches .7 of its largest.", "snapshot"),
                "read_out": ("Read out: the snapshot acts on the late value once it is put in.", "snapshot"),
                "matters": ("Matters: |IE| reaches a tenth of its largest.", "snapshot"),
                "succeeds": ("Model succeeds: accuracy on the task reaches 75%.", "snapshot"),
                "concept_q": "q-value that the concept is not born after the first snapshot.",
            },
            "feature",
            step="context concept read_out matters succeeds",
            interval="context concept read_out matters succeeds",
        ),
    ),
    Table(
        "edges/<task>",
        "edge from a feature of an earlier hook point, and snapshot",
        "connect",
        _columns(
            {
                "from_feature": "Number of the feature at the earlier hook point, in the lower run.",
                "edge": (
                    "What the upper feature reads less when the lower one is zero, to first order; mean over prompts.",
                    "scaled activations",
                ),
                "edge_se": ("Standard error of the edge over groups of prompts.", "scaled activations"),
                "part": (
                    "What the upper feature reads from the snapshot where it fires; mean over prompts.",
                    "scaled activations",
                ),
                "n_prompts": "Prompts.",
                "n_groups": "Groups of prompts.",
                "from_hook": "The earlier hook point.",
            },
            "feature snapshot label step",
        ),  # fmt: skip
    ),
    Table(
        "validation/<task>",
        "feature with a significant effect and snapshot",
        "study",
        _columns(
            {
                "exact": ("Effect of ablating the feature alone on held-out prompts.", "logits"),
                "ie": ("Indirect effect on the selection half.", "logits"),
                "relie": "RelIE.",
                "share_relie": "Share RelIE.",
                "reldec": "Decoder norm divided by the sum of the feature's norms over snapshots.",
                "decodability": "R² of the feature from the snapshot's activations.",
            },
            f"feature {_AT} baseline",
        ),
    ),
    Table(
        "validation/<task>.summary",
        "kind of correlation, target and measure",
        "study",
        _columns(
            {
                "kind": "within (over the snapshots of a feature) or pairs (over features, of neighbouring snapshots).",
                "target": "What is predicted: effect, or share of all effects at the snapshot.",
                "measure": "What predicts: share_relie, relie, decodability, reldec or snapshot (its index).",
                "correlation": "Rank correlation with exact effects.",
                "partial": "The same beyond the snapshot's index; missing for pairs.",
                "n_features": "Features.",
            },
            "level baseline",
            interval="correlation partial",
        ),
    ),
    Table(
        "languages/<task>",
        "snapshot and pair of languages",
        "study",
        _columns(
            {
                "language": "One language.",
                "other": "The other language.",
                "k": "Size of the sets: features with the largest |IE|.",
                "n": "Features in the set of the one.",
                "n_other": "Features in the set of the other.",
                "shared": "Features in both sets.",
                "same_sign": "Of these, those with effects of one sign.",
                "jaccard": "shared / features in either set.",
                "candidates": "Features active in both languages.",
                "in_candidates": "Of these, those in the set of the one.",
                "other_in_candidates": "Of these, those in the set of the other.",
                "expected": "Mean overlap of random sets of these sizes, with the interval of the overlaps.",
                "p": "Probability of an overlap at least as large by chance.",
                "expected_jaccard": "Mean Jaccard index by chance.",
                "n_draws": "Random draws of sets.",
            },
            f"{_AT} level",
            interval="expected",
        ),
    ),
    Table(
        "labels",
        "feature",
        "label",
        _columns(
            {
                "label": "Description by a language model, or the tokens of its examples.",
                "complexity": "Rating from 1 (a single token) to 5 (diverse contexts with one theme).",
                "status": "answered, refused, cut, malformed, missing (no answer), or local (tokens of the examples).",
                "client": "Client that was asked.",
                "model": "Language model that gave the label.",
                "complexity_2": "Rating by the second model.",
                "model_2": "The second model.",
                "detection": "Balanced accuracy of the label on held-out passages; chance is .5.",
                "detection_n": "Passages judged.",
                "specificity": "Share of inactive passages passed over.",
                **{
                    f"recall_q{quarter}": f"Share of active passages found, in quarter {quarter} of activation."
                    for quarter in range(1, 5)
                },
                "control": "The same passages judged by the label of another feature.",
                "control_n": "Passages judged by that label.",
                "control_feature": "The other feature.",
                "local_label": "The tokens of the examples as a label.",
                "local_detection": "Balanced accuracy of that label, scored without a language model.",
                "local_n": "Passages scored.",
                "local_control": "The same by the tokens of another feature.",
                "local_control_feature": "That feature.",
            },
            "feature",
            interval="detection control local_detection",
        ),
    ),
]
"""All tables, in the order in which the commands write them."""
