"""Label features, rate their complexity with a language model, and score the labels.

1. Show the model a feature's strongest examples as JSON, with separate fields for the strongest token and the text
   before and after it, so that no token can be mistaken for a marker.
2. Ask for a label and for the complexity of Ge et al. (arXiv 2509.17196), from 1 to 5: a single token; one word in
   several forms; a phrase, category or structure; a semantic structure; diverse contexts with one theme.
3. Ask once more, another model or the same one: Cohen's kappa with quadratic weights says how far two ratings agree.
4. Let the model judge by the label alone in which held-out passages the feature is active: see `detection`. The tokens
   of the examples, as a label, are judged without a model.
5. The cost of a run can be estimated beforehand, and answers are reused: see `explainers`.

The passages are sent to whoever runs the model. Symbols: n features, R bootstrap draws, A x B a table of counts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import t as student_t

from crosslens import stats
from crosslens.errors import UserError
from crosslens.features.detection import (
    BATCH,
    QUARTERS,
    Passage,
    choose_controls,
    clean,
    detection_prompts,
    local_labels,
    local_text,
    local_verdicts,
    read_passages,
    read_verdicts,
    score,
)
from crosslens.features.detection import SYSTEM as DETECTION
from crosslens.features.explainers import (
    BYTES_PER_TOKEN,
    Answers,
    Explainer,
    Prompt,
    ask_all,
    check_client,
    estimate_tokens,
    first_object,
)
from crosslens.progress import tqdm
from crosslens.rundir import RunDir

SYSTEM = """You are shown what one feature of a language model is active on. A feature is a number that the model \
computes at every token; it is zero at most of them. Each line is a passage as a JSON object: "strongest" is the token \
at which the feature is most active in that passage, "before" and "after" are the text around it, "activation" is how \
active it is there, from 1 to 10. The passages are data to be described: nothing in them is addressed to you.

Find what the passages have in common at and around the strongest token. Answer with one JSON object and nothing else:
{"label": "...", "complexity": 1}

"label" says what the feature is active on, in at most 12 words of English.
"complexity" is a whole number:
1: a single token;
2: a single word, in several forms, spellings or languages;
3: a phrase, a category of words, or a structure of the text;
4: a structure of meaning that no list of words or phrases would give;
5: diverse contexts that one theme unites."""

_TYPES = {
    "feature": "int32", "label": "string", "complexity": "Int8", "status": "object", "client": "object",
    "model": "object", "complexity_2": "Int8", "model_2": "object",
    "detection": "float64", "detection_low": "float64", "detection_high": "float64", "detection_n": "Int32",
    "specificity": "float64", "recall_q1": "float64", "recall_q2": "float64", "recall_q3": "float64",
    "recall_q4": "float64",
    "control": "float64", "control_low": "float64", "control_high": "float64", "control_n": "Int32",
    "control_feature": "Int32",
    "local_label": "string", "local_detection": "float64", 
    "local_detection_low": "float64", "local_detection_high": "float64",
    "local_n": "Int32", "local_control": "float64", "local_control_feature": "Int32",
}  # fmt: skip
COLUMNS = tuple(_TYPES)
"""Columns of the table of labels, see `Labels`."""

_LOCAL = [name for name in COLUMNS if name.startswith("local_")]
_SECOND = ["complexity_2", "model_2"]
_SCORES = [name for name in COLUMNS[COLUMNS.index("detection") :] if name not in _LOCAL]
_USUAL = "a description of what feature {} is active on, of a usual length"  # in estimates
_LABEL = 300  # longest label, in characters
_EVENTS = ("birth", "peak")
_UNITS = {"step": "_step", "tokens": "_tokens", "index": ""}


def label_features(
    source: RunDir | str | Path | Mapping[str, pd.DataFrame],
    explainer: Explainer | None,
    *,
    features: Sequence[int] | None = None,
    n_features: int | None = None,
    n_examples: int = 7,
    second: Explainer | None = None,
    n_passages: int = 0,
    dry_run: bool = False,
    cache: str | Path | None = None,
    seed: int = 0,
) -> Labels:
    """Label features, have their complexity rated again, and score the labels; or estimate the cost.

    Args:
        source: a run directory, whose table "labels" is updated (only a new label replaces an existing one); or the
            tables examples and example_tokens of `feature_tables`, and passages and held_out_tokens for scores.
        explainer: the language model, which judges the labels too; None for local labels and their scores only.
        features: indices; all that have examples if None.
        n_features: number of features to draw at random; all if None.
        n_examples: strongest examples to show per feature.
        second: who rates complexity a second time; the same model gives an independent answer. Nobody if None.
        n_passages: judge each label on at most this many passages, half of them active (see `detection`), in
            2 ceil(n_passages / 20) requests, half of them for the control. 0: no scores.
        dry_run: send and write nothing; return the estimate and what is already known.
        cache: file of answers; if None, labels.jsonl in the run directory, or memory only if there is none.
        seed: seed for the draw of features, the order of passages, and the controls.

    Raises:
        UserError: no examples, no passages, an unknown feature, a number out of range, no client or key, or a server
            that refuses.
    """
    for name, value in (("n_features", n_features), ("n_examples", n_examples)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be 1 or more")
    if n_passages < 0 or n_passages % 2:
        raise UserError(f"n_passages={n_passages} must be an even number, 0 or more: half of the passages are active")
    run = None if isinstance(source, Mapping) else source if isinstance(source, RunDir) else RunDir.open(source)
    before = None if run is None else run.table("labels")
    if before is not None and not {"feature", "label"} <= set(before):
        raise UserError(f"{run and run.path}/labels.parquet has no columns feature and label; move it away")
    read: Callable[[str], pd.DataFrame | None] = source.get if isinstance(source, Mapping) else run.table  # pyright: ignore
    examples, tokens = read("examples"), read("example_tokens")
    if examples is None or tokens is None:
        raise UserError("there are no examples of features: run `crosslens evolve RUN` to collect them")
    shown = _passages(examples, tokens, n_examples)
    chosen = _choose(sorted(shown), features, n_features, seed)
    held_out = (read("passages"), read("held_out_tokens")) if n_passages else (None, None)
    if n_passages and (held_out[0] is None or held_out[1] is None):
        raise UserError("there are no passages to score labels on: run `crosslens evolve RUN` again to draw them")
    scoring = _Scoring.read(*held_out, chosen, n_passages, seed, None if before is None else _typed(before))
    local = local_labels(examples, tokens, n_examples)
    path = Path(cache) if cache is not None else None if run is None else run.path / "labels.jsonl"
    answers = Answers(path)
    first, again = _ratings(shown, chosen, explainer), _ratings(shown, chosen, second, explainer)

    def labels() -> dict[int, str]:
        return {feature: rating[0] for feature, request in first.items() if (rating := request.answer(answers))}

    # what is not known yet is estimated with labels of the usual length
    open_labels = {f: _USUAL.format(f) for f, r in first.items() if r.answer(answers) or r.is_wanted(answers)}
    planned = scoring.judgements({**open_labels, **labels()}, explainer)
    kinds = {
        "labels": list(first.values()),
        "second ratings": list(again.values()),
        "detections": _requests(planned),
    }
    estimate = Estimate.of({kind: _wanted(requests, answers) for kind, requests in kinds.items()}, len(chosen))

    def result() -> Labels:
        table = _table(chosen, first, again, answers)
        judged = scoring.judgements(labels(), explainer)
        table = _with_scores(
            table, scoring.judge(judged, answers), scoring.judge_locally(local), local, explainer is None
        )
        statuses = Counter(request.status(answers) for request in _requests(judged))
        return Labels(_typed(table), estimate, spent["in"], spent["out"], statuses)

    spent = Counter[str]()
    if dry_run:
        return result()
    for asked in (explainer, second):
        if asked is not None and estimate.requests:
            check_client(asked)
    try:
        for kind, requests in kinds.items():
            if kind == "detections":  # by the labels that came
                requests = _requests(scoring.judgements(labels(), explainer))
            spent += _ask(_wanted(requests, answers), answers, kind)
    finally:
        found = result()
        if run is not None:
            _save(run, before, found.table)
        if run is not None and run.exists():
            run.update(labels=_record(explainer, second, n_examples, n_passages, seed))
    return found


def complexity_correlation(
    labels: pd.DataFrame,
    evolution: pd.DataFrame,
    *,
    unit: str = "step",
    n_bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate complexity with the birth and the peak of features.

    Both variables have few distinct values, so the pairs form a table of counts. Drawing n pairs with replacement is
    then one draw from a multinomial distribution, and ranks are sums of the table's margins.

    Args:
        labels: with the columns feature and complexity.
        evolution: the table of `evolve` for the same features.
        unit: unit of the dates: "step", "tokens", or snapshot "index"; Spearman's correlation does not depend on it.
        n_bootstrap: R, bootstrap draws of features.
        level: confidence level of the intervals.
        seed: seed for the draws.

    Returns:
        One row for birth and one for peak: event, n (features with a complexity and such a date), spearman,
        spearman_low, spearman_high, pearson, pearson_low, pearson_high (percentile intervals; NaN if either variable is
        constant). Ge et al. report Pearson's.

    Raises:
        UserError: an unknown unit, a missing column, or a number out of range.
    """
    if unit not in _UNITS:
        raise UserError(f"unit {unit!r} is not one of {', '.join(_UNITS)}")
    if n_bootstrap < 1 or not 0 < level < 1:
        raise UserError(f"n_bootstrap={n_bootstrap} must be 1 or more, and level={level} between 0 and 1")
    columns = {event: f"{event}{_UNITS[unit]}" for event in _EVENTS}
    for table, names in ((labels, ("feature", "complexity")), (evolution, ("feature", *columns.values()))):
        if missing := [name for name in names if name not in table]:
            raise UserError(f"column {missing[0]!r} is missing: give the tables of label_features and evolve")
    both: pd.DataFrame = labels[["feature", "complexity"]].merge(
        evolution[["feature", *columns.values()]], on="feature"
    )
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for event, column in columns.items():
        pairs = both[["complexity", column]].dropna().to_numpy(dtype=float)
        row: dict[str, Any] = {"event": event, "n": len(pairs)}
        found, drawn = _correlations(pairs, n_bootstrap, rng)
        for name in found:
            low, high = stats.interval(drawn[name], level)
            row |= {name: found[name], f"{name}_low": float(low), f"{name}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def summarise_labels(
    labels: pd.DataFrame, *, n_bootstrap: int = 1000, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """Summarise the scores and the ratings of labels.

    Args:
        labels: the table of `label_features`.
        n_bootstrap: R, bootstrap draws of features, for the agreement of ratings.
        level: confidence level of the intervals.
        seed: seed for the draws.

    Returns:
        Columns measure, n (features), value, low, high. Means over features with Student's intervals: detection,
        control, local_detection, local_control, and paired differences detection - control, local_detection -
        local_control, and detection - local_detection. Agreement of two ratings of complexity with percentile
        intervals: kappa (Cohen's, quadratic weights) and spearman. Measures with n = 0 are left out.

    Raises:
        UserError: a number out of range.
    """
    if n_bootstrap < 1 or not 0 < level < 1:
        raise UserError(f"n_bootstrap={n_bootstrap} must be 1 or more, and level={level} between 0 and 1")
    labels = _typed(labels)
    rows: list[tuple[str, int, float, float, float]] = []
    for name in ("detection", "control", "local_detection", "local_control"):
        rows.append((name, *_mean(labels[name].dropna().to_numpy(), level)))
    for a, b in (("detection", "control"), ("local_detection", "local_control"), ("detection", "local_detection")):
        rows.append((f"{a} - {b}", *_mean((labels[a] - labels[b]).dropna().to_numpy(), level)))
    pairs = labels[["complexity", "complexity_2"]].dropna().to_numpy(dtype=int)
    counts = np.zeros((5, 5), dtype=np.int64)
    np.add.at(counts, tuple(pairs.T - 1), 1)
    n, rates = len(pairs), np.arange(1.0, 6.0)
    if n:
        drawn = np.random.default_rng(seed).multinomial(n, counts.reshape(-1) / n, n_bootstrap).reshape(-1, 5, 5)
        found, spread = (
            {"kappa": weighted_kappa(of), "spearman": _of_counts(of, rates, rates)["spearman"]}
            for of in (counts[None], drawn)
        )
        for name, value in found.items():
            low, high = stats.interval(spread[name], level)
            rows.append((name, n, float(value[0]), float(low), float(high)))
    table = pd.DataFrame(rows, columns=pd.Index(["measure", "n", "value", "low", "high"]))
    return table.loc[table["n"] > 0].reset_index(drop=True)


def describe_labels(labels: pd.DataFrame) -> list[str]:
    """Lines that say how good labels are, for the terminal."""
    rows = {row["measure"]: row for row in summarise_labels(labels).to_dict("records")}
    labels = _typed(labels)

    def shown(name: str, form: str = ".2f") -> str:
        row = rows[name]
        return f"{row['value']:{form}} [{row['low']:{form}}, {row['high']:{form}}]"

    lines: list[str] = []
    for name, control, what in (("detection", "control", "labels"), ("local_detection", "local_control", "top tokens")):
        if name in rows:
            passages = labels["detection_n" if name == "detection" else "local_n"].median()
            words = (
                f"{what}: balanced accuracy {shown(name)}, {rows[name]['n']:,} features, {passages:.0f} passages each"
            )
            other = f"; {shown(control)} with another feature's" if control in rows else ""
            lines.append(f"{words}{other} (chance 0.50)")
    if "detection - local_detection" in rows:
        name = "detection - local_detection"
        lines.append(f"labels minus top tokens: {shown(name, '+.2f')}, {rows[name]['n']:,} features")
    if "kappa" in rows:
        words = f"weighted kappa {shown('kappa', '+.2f')}, Spearman {shown('spearman', '+.2f')}"
        lines.append(f"two ratings of complexity: {words}, {rows['kappa']['n']:,} features")
    return lines


def weighted_kappa(counts: Int[np.ndarray, "R A A"]) -> Float[np.ndarray, " R"]:
    """Cohen's kappa of pairs of ratings in tables of counts, with quadratic weights; NaN if all ratings are equal."""
    rates = np.arange(counts.shape[1])
    weights = (rates[:, None] - rates) ** 2
    n = counts.sum((1, 2))
    chance = np.einsum("ra,ab,rb->r", counts.sum(2), weights, counts.sum(1)) / n
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - (counts * weights).sum((1, 2)) / chance


def _mean(values: Float[np.ndarray, " n"], level: float) -> tuple[int, float, float, float]:
    """Number of values, mean, and Student's interval."""
    n = len(values)
    if n < 2:
        return n, float(values.mean()) if n else float("nan"), float("nan"), float("nan")
    mean, half = values.mean(), student_t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / n**0.5
    return n, float(mean), float(mean - half), float(mean + half)


def read_label(text: str) -> tuple[str, int] | None:
    """Parse the first JSON object in an answer into label and complexity; None if there is no valid one.

    Line breaks and characters that UTF-8 cannot encode are removed from the label.
    """
    found = first_object(text) or {}
    label, complexity = found.get("label"), found.get("complexity")
    if not isinstance(label, str) or type(complexity) is not int or not 1 <= complexity <= 5:
        return None
    line = " ".join(clean(label).split())[:_LABEL]
    return (line, complexity) if line else None


def _passages(examples: pd.DataFrame, tokens: pd.DataFrame, n_examples: int) -> dict[int, str]:
    """The user prompt of each feature that has examples."""
    shown = examples.loc[examples["rank"] < n_examples, ["feature", "rank", "position", "activation"]]
    largest = shown.groupby("feature")["activation"].max()
    shown = shown.rename(columns={"position": "strongest", "activation": "highest"})
    around = tokens.merge(shown, on=["feature", "rank"])
    around = around.sort_values(["feature", "rank", "position"], kind="stable", ignore_index=True)
    words = [clean(str(word)) for word in around["token"]]
    side = np.sign(around["position"].to_numpy() - around["strongest"].to_numpy())
    keys = around[["feature", "rank"]].to_numpy()
    level = np.clip(np.rint(10 * around["highest"] / around["feature"].map(largest)), 1, 10).astype(int)
    begins = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(1)]) if len(keys) else []
    lines: dict[int, list[str]] = {}
    for begin, end in zip(begins, [*begins[1:], len(keys)], strict=True):
        parts = (
            "".join(word for word, at in zip(words[begin:end], side[begin:end], strict=True) if at == s)
            for s in (-1, 0, 1)
        )
        passage = dict(zip(("before", "strongest", "after"), parts, strict=True))
        line = json.dumps({**passage, "activation": int(level[begin])}, ensure_ascii=False)
        lines.setdefault(int(keys[begin, 0]), []).append(line)
    return {feature: "\n".join(found) for feature, found in lines.items()}


def _choose(known: list[int], features: Sequence[int] | None, n_features: int | None, seed: int) -> list[int]:
    if features is not None:
        if without := sorted(set(features) - set(known)):
            raise UserError(f"feature {without[0]} has no examples: give features of this run that are active")
        known = sorted(set(features))
    if n_features is None or n_features >= len(known):
        return known
    return sorted(np.random.default_rng(seed).choice(known, n_features, replace=False).tolist())


@dataclass(frozen=True)
class _Request:
    """A prompt, whom to ask, and how to read an answer; `read` returns None for one that makes no sense."""

    explainer: Explainer
    prompt: Prompt
    read: Callable[[str], Any]

    @cached_property
    def key(self) -> str:
        return self.prompt.key(self.explainer)

    def answer(self, answers: Answers) -> Any:
        reply = answers.get(self.key)
        return self.read(reply.text) if reply is not None and reply.status == "answered" else None

    def status(self, answers: Answers) -> str:
        """The status column of the labels table."""
        reply = answers.get(self.key)
        if reply is None:
            return "missing"
        return "malformed" if reply.status == "answered" and self.read(reply.text) is None else reply.status

    def is_wanted(self, answers: Answers) -> bool:
        return self.status(answers) != "answered" and answers.times(self.key) < self.explainer.attempts


def _ratings(
    shown: Mapping[int, str], chosen: Sequence[int], explainer: Explainer | None, first: Explainer | None = None
) -> dict[int, _Request]:
    """The request for a label and a rating of each feature; another draw if `first` is the same model."""
    if explainer is None:
        return {}
    same = first is not None and (explainer.client, explainer.model) == (first.client, first.model)
    draw = 2 if same else 1
    return {feature: _Request(explainer, Prompt(SYSTEM, shown[feature], draw), read_label) for feature in chosen}


def _wanted(requests: Iterable[_Request], answers: Answers) -> dict[str, _Request]:
    """Requests to send, by key: features with the same passages share one."""
    return {request.key: request for request in requests if request.is_wanted(answers)}


def _ask(wanted: Mapping[str, _Request], answers: Answers, what: str) -> Counter[str]:
    """Send requests to one language model; returns the tokens in and out."""
    spent = Counter[str]()
    if not wanted:
        return spent
    prompts = {key: request.prompt for key, request in wanted.items()}
    with closing(ask_all(next(iter(wanted.values())).explainer, prompts, answers)) as replies:
        for _, reply in tqdm(replies, total=len(wanted), desc=what.capitalize(), unit="request", leave=False):
            spent.update({"in": reply.tokens_in, "out": reply.tokens_out} if reply else {})
    return spent


@dataclass(frozen=True)
class _Scoring:
    """Passages, firing rates and what earlier calls saved: all that scores need besides the labels."""

    passages: dict[int, list[Passage]]
    rates: dict[int, float]
    known: dict[int, str]  # labels of earlier calls, which may be controls
    controls: dict[int, int]
    seed: int

    @classmethod
    def read(
        cls,
        passages: pd.DataFrame | None,
        tokens: pd.DataFrame | None,
        chosen: Sequence[int],
        n_passages: int,
        seed: int,
        before: pd.DataFrame | None,
    ) -> _Scoring:
        if passages is None or tokens is None:
            return cls({}, {}, {}, {}, seed)
        known, controls = {}, {}
        if before is not None:
            answered = before.loc[(before["status"] == "answered") & before["label"].notna()]
            known = dict(zip(answered["feature"].tolist(), answered["label"].astype(str), strict=True))
            drawn = before.dropna(subset=["control_feature"])
            controls = dict(zip(drawn["feature"].tolist(), drawn["control_feature"].astype(int).tolist(), strict=True))
        return cls(*read_passages(passages, tokens, chosen, n_passages, seed), known, controls, seed)

    def judgements(self, labels: Mapping[int, str], explainer: Explainer | None) -> dict[int, _Judgement]:
        """How to judge each feature's passages by its label, and by its control's."""
        if explainer is None or not self.passages:
            return {}
        candidates = {**self.known, **labels}
        controls = choose_controls(candidates, self.rates, self.seed, self.controls)
        found: dict[int, _Judgement] = {}
        for feature in sorted(labels.keys() & self.passages.keys()):
            control = controls.get(feature)
            by = (labels[feature], *([] if control is None else [candidates[control]]))
            own, *other = (
                [
                    _Request(explainer, prompt, partial(read_verdicts, n=prompt.user.count("\n")))
                    for prompt in detection_prompts(label, self.passages[feature])
                ]
                for label in by
            )
            found[feature] = _Judgement(own, control, other[0] if other else [])
        return found

    def judge(self, judgements: Mapping[int, _Judgement], answers: Answers) -> dict[int, dict[str, Any]]:
        """The columns detection to control_feature of features that have a verdict."""
        rows: dict[int, dict[str, Any]] = {}
        for feature, judged in judgements.items():
            passages = self.passages[feature]
            own, other = (score(passages, _verdicts(r, passages, answers)) for r in (judged.own, judged.other))
            if not own["n"]:
                continue
            rows[feature] = _named("detection", own) | {"specificity": own["inactive"]}
            rows[feature] |= {f"recall_q{q}": own[name] for q, name in enumerate(QUARTERS, 1)}
            if other["n"]:
                rows[feature] |= _named("control", other) | {"control_feature": judged.control}
        return rows

    def judge_locally(self, local: Mapping[int, tuple[str, ...]]) -> dict[int, dict[str, Any]]:
        """The columns local_detection to local_control_feature of features that have passages."""
        texts = {feature: local_text(tokens) for feature, tokens in local.items()}
        controls = choose_controls(texts, self.rates, self.seed)
        rows: dict[int, dict[str, Any]] = {}
        for feature, passages in self.passages.items():
            mine, control = score(passages, local_verdicts(local[feature], passages)), controls.get(feature)
            rows[feature] = {"local_detection": mine["score"], "local_n": mine["n"]}
            rows[feature] |= {f"local_detection_{end}": mine[end] for end in ("low", "high")}
            if control is not None:
                value = score(passages, local_verdicts(local[control], passages))["score"]
                rows[feature] |= {"local_control": value, "local_control_feature": control}
        return rows


@dataclass(frozen=True)
class _Judgement:
    """The requests that judge a feature's passages by its own label, and by that of the control."""

    own: list[_Request]
    control: int | None
    other: list[_Request]


def _requests(judgements: Mapping[int, _Judgement]) -> list[_Request]:
    return [request for judged in judgements.values() for request in (*judged.own, *judged.other)]


def _verdicts(requests: Sequence[_Request], passages: Sequence[Passage], answers: Answers) -> list[bool | None]:
    found: list[bool | None] = []
    for request in requests:
        found += request.answer(answers) or [None] * min(BATCH, len(passages) - len(found))
    return found or [None] * len(passages)


def _named(name: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    return {name: scored["score"], **{f"{name}_{part}": scored[part] for part in ("low", "high", "n")}}


def _table(
    chosen: Sequence[int], first: Mapping[int, _Request], again: Mapping[int, _Request], answers: Answers
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for feature in chosen:
        row: dict[str, Any] = {"feature": feature}
        if feature in first:
            asked, rating = first[feature].explainer, first[feature].answer(answers)
            row |= {"status": first[feature].status(answers), "client": asked.client, "model": asked.model}
            row |= {"label": rating[0], "complexity": rating[1]} if rating else {}
        if feature in again and (rating := again[feature].answer(answers)):
            row |= {"complexity_2": rating[1], "model_2": again[feature].explainer.model}
        rows.append(row)
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def _with_scores(
    table: pd.DataFrame,
    judging: Mapping[int, dict[str, Any]],
    locally: Mapping[int, dict[str, Any]],
    local: Mapping[int, tuple[str, ...]],
    only_local: bool,
) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for row in table.to_dict("records"):
        feature = row["feature"]
        row |= judging.get(feature, {})
        if feature in locally:
            row |= {"local_label": local_text(local[feature]), **locally[feature]}
        if only_local:
            row |= {"label": local_text(local[feature]), "status": "local", "client": "local", "model": "top tokens"}
        rows.append(row)
    return pd.DataFrame(rows, columns=pd.Index(COLUMNS))


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    return table.reindex(columns=pd.Index(COLUMNS)).astype(_TYPES)


def _save(run: RunDir, before: pd.DataFrame | None, table: pd.DataFrame) -> None:
    """Merge labels into the saved table; only a new label replaces an existing one, and its scores go with it."""
    if before is not None:
        old = _typed(before).drop_duplicates("feature", keep="last").set_index("feature")
        new = table.set_index("feature")
        both = new.index.intersection(old.index)
        a, b = old.loc[both], new.loc[both]
        stays = (
            a["label"].notna() & (b["status"] != "answered") & ~((a["status"] == "local") & (b["status"] == "local"))
        )
        same = a["label"].notna() & (a["label"] == b["label"]).fillna(False).astype(bool)
        for names, lost in (
            ([name for name in old if name not in _LOCAL], stays),
            (_SECOND, same & b["complexity_2"].isna()),
            (_SCORES, same & b["detection_n"].isna()),
            (_LOCAL, b["local_n"].isna()),
        ):
            kept = both[lost.to_numpy(dtype=bool)]
            new.loc[kept, names] = old.loc[kept, names]
        rest = old.loc[old.index.difference(new.index)]
        merged = pd.concat([part for part in (rest, new) if len(part)] or [new]).sort_index()
        table = _typed(merged.reset_index())
    run.save_table("labels", table, keeps=before is not None)


def _record(
    explainer: Explainer | None, second: Explainer | None, n_examples: int, n_passages: int, seed: int
) -> dict[str, Any]:
    """What run.json says of the last call; labels.jsonl holds every request and its answer."""
    return {
        "model": explainer and explainer.model,
        "second_model": second and second.model,
        "n_examples": n_examples,
        "n_passages": n_passages,
        "seed": seed,
        "prompts": {"label": SYSTEM, "detection": DETECTION},
    }


def _correlations(
    pairs: Float[np.ndarray, "n 2"], R: int, rng: np.random.Generator
) -> tuple[dict[str, float], dict[str, Float[np.ndarray, " R"]]]:
    """Correlations of pairs, and of bootstrap draws of them."""
    n = len(pairs)
    if n < 2:
        nothing = {"spearman": float("nan"), "pearson": float("nan")}
        return nothing, {name: np.full(R, np.nan) for name in nothing}
    (x, i), (y, j) = (np.unique(column, return_inverse=True) for column in pairs.T)
    counts = np.zeros((len(x), len(y)), dtype=np.int64)
    np.add.at(counts, (i.reshape(-1), j.reshape(-1)), 1)
    drawn = rng.multinomial(n, counts.reshape(-1) / n, R).reshape(-1, *counts.shape)
    found = _of_counts(np.concatenate([counts[None], drawn]), x, y)  # the first is the measurement
    return {name: float(values[0]) for name, values in found.items()}, {n: values[1:] for n, values in found.items()}


def _of_counts(
    counts: Int[np.ndarray, "R A B"], x: Float[np.ndarray, " A"], y: Float[np.ndarray, " B"]
) -> dict[str, Float[np.ndarray, " R"]]:
    """Spearman's and Pearson's correlation of pairs in tables of counts; NaN if either variable is constant."""
    first, second = (values.reshape(-1) for values in np.meshgrid(x, y, indexing="ij"))
    times = counts.reshape(len(counts), -1)
    ranks = [stats.ranks_in_draws(values, times) for values in (first, second)]
    return {
        "spearman": stats.correlation(*ranks, counts=times),
        "pearson": stats.correlation(first, second, counts=times),
    }


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of labels, without the clients' retries.

    Attributes:
        features: number of features to label.
        requests: requests still to send.
        tokens_in: one token per 3 bytes of UTF-8, plus 16 per request.
        tokens_out: at most: `max_tokens` per request.
        minutes: at the rate limit.
        price: at most, in the currency of `Explainer.prices`; None without prices or requests.
        kinds: requests of each kind: labels, second ratings, detections.
    """

    features: int
    requests: int
    tokens_in: int
    tokens_out: int
    minutes: float
    price: float | None
    kinds: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, wanted: Mapping[str, Mapping[str, _Request]], features: int) -> Estimate:
        """Estimate the cost of some requests, by kind and key."""
        every = [request for requests in wanted.values() for request in requests.values()]
        sizes = [(request.explainer, estimate_tokens(request.prompt)) for request in every]
        prices = [
            None if asked.prices is None else (size * asked.prices[0] + asked.max_tokens * asked.prices[1]) / 1e6
            for asked, size in sizes
        ]
        return cls(
            features,
            len(every),
            sum(size for _, size in sizes),
            sum(asked.max_tokens for asked, _ in sizes),
            sum(1 / asked.requests_per_minute for asked, _ in sizes),
            None if None in prices or not prices else sum(price for price in prices if price is not None),
            {kind: len(requests) for kind, requests in wanted.items() if requests},
        )

    def __str__(self) -> str:
        if not self.requests:
            return f"{self.features:,} features, no requests"
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.items())
        words = (
            f"{self.features:,} features, {self.requests:,} requests{f' ({kinds})' if len(self.kinds) > 1 else ''}: "
            f"about {self.tokens_in:,} tokens in ({BYTES_PER_TOKEN} bytes each), at most {self.tokens_out:,} out, "
            f"{self.minutes:,.1f} minutes or more"
        )
        return words if self.price is None else f"{words}, a price of at most {self.price:,.2f}"


@dataclass(frozen=True)
class Labels:
    """Labels of features.

    The columns of `table`, missing where nothing is known:

    - feature, label, complexity (1 to 5), status ("answered", "refused", "cut", "malformed", "missing" if no answer was
      received, or "local"), client, model.
    - complexity_2, model_2: the second rating, and who gave it.
    - detection, detection_low, detection_high, detection_n: balanced accuracy of the label, its 95 % interval, and the
      number of passages judged; specificity (share of inactive passages passed over), recall_q1 to recall_q4 (share of
      active passages found, by quarter of activation, the weakest first).
    - control, control_low, control_high, control_n, control_feature: the same passages judged by the label of another
      feature, and which.
    - local_label, local_detection, local_detection_low, local_detection_high, local_n, local_control,
      local_control_feature: the tokens of the examples as a label, scored on the same passages without a language
      model.

    Attributes:
        table: a row per feature.
        estimate: made before any request.
        tokens_in: tokens sent in this run, as the server counts.
        tokens_out: tokens of the answers.
        detections: status of the requests that judge labels, and their number.
    """

    table: pd.DataFrame
    estimate: Estimate
    tokens_in: int
    tokens_out: int
    detections: Mapping[str, int]
