"""A prompt through time: what the model says next at every snapshot, and which features are behind it.

1. The metric m is logit(correct) - logit(wrong) at the last position, as in every causal analysis. Where no answers are
   given they are the two most probable next tokens of the last snapshot; for a pair of prompts, the most probable token
   after each of the two.
2. Predictions are those of the models alone.
3. Effects are those of `attribution.attribute` by "removal", of this one prompt: the drop of m when a feature is set to
   zero, or, for a pair of prompts, to its value on the other one. They are kept for each position, and add up to the
   feature's effect.
4. A feature *matters* from the first snapshot from which its |effect| is a tenth of its largest, for two in a row or
   until the end, as in `dates`. It is *readable* from its birth by R2 over text, where `evolve` has made it.

One prompt has no error bars: an effect here is a size, and nothing about it is significant. What holds for a kind of
prompt is asked with a task (`attribute`, `study`).

Symbols: P prompts, B of a batch, T positions, S snapshots, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from crosslens.causal.attribution import Estimator, baseline_activation, mean_gradient, metrics
from crosslens.causal.dates import MATTERS, RUN
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError, check_characters, shortened
from crosslens.evolution.lifecycles import birth_index
from crosslens.intervention.prompt_runs import BatchAt, Pairs, PromptRuns, begins_with_bos
from crosslens.printing import as_html, as_text, plot
from crosslens.progress import tqdm
from crosslens.snapshots.bridge import last_position
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.tasks.items import Item
from crosslens.tasks.prompts import Prompt, Prompts, bos_tokens, encode
from crosslens.tasks.task import Task

NEXT = 5  # next tokens that are kept of every snapshot
MOSTLY = 0.5  # share of an activation that is read from later snapshots, above which an effect is marked
NO_ERROR_BARS = "sizes of effects in one prompt, which has no error bars: nothing here is significant"


class Asked(NamedTuple):
    """A prompt, before a tokenizer reads it."""

    text: str
    """The prompt."""
    paired: str | None = None
    """The prompt that it is compared with."""
    answers: tuple[str, str] | None = None
    """The correct and the wrong continuation; None takes those that the last snapshot finds most probable."""


@dataclass(frozen=True, repr=False)
class Trace:
    """Prompts through time. Prompts are numbered in the order given, positions from 0, the BOS token included.

    Attributes:
        labels: S snapshot labels.
        prompts: a row per prompt and snapshot: prompt, snapshot, label, step, text, paired (the other prompt of a pair,
            or missing), correct, wrong, given (whether the answers were), metric (logit(correct) - logit(wrong)),
            correct_probability, wrong_probability, paired_metric (missing where there is no pair), features_effect (sum
            of the effects of all features), metric_baseline (the metric with all features at what they are set to).
        predictions: a row per prompt, snapshot and rank: prompt, snapshot, label, step, paired (whether it is after the
            other prompt of the pair), rank, token, probability.
        features: a row per prompt, feature that fires on it or on the other of the pair, and snapshot: prompt, feature,
            snapshot, label, step, effect (logits), activation and paired_activation (the largest over positions),
            position and token (where that is, of a pair on either prompt), matters and readable (index of a snapshot,
            or missing); with encoder shares read_later (the part of the activation that is read from later snapshots)
            and mostly_later.
        tokens: a row per prompt, position, feature that fires there, and snapshot: prompt, position, token, feature,
            snapshot, activation, paired_activation, effect.
        texts: the tokens of every prompt as text.
    """

    labels: list[str]
    prompts: pd.DataFrame
    predictions: pd.DataFrame
    features: pd.DataFrame
    tokens: pd.DataFrame
    texts: list[list[str]]

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.texts)

    def top(self, prompt: int = 0, n: int = 20) -> pd.DataFrame:
        """The features with the largest effects on a prompt, by the first snapshot of effect.

        Args:
            prompt: number of the prompt.
            n: number of features.

        Returns:
            A row per feature: the columns of `features` that do not depend on the snapshot, and `effects`, an array by
            snapshot.

        Raises:
            UserError: no such prompt.
        """
        if not 0 <= prompt < len(self):
            raise UserError(f"prompt {prompt} is not in [0, {len(self) - 1}]: give the number of a traced prompt")
        return top_features(pd.DataFrame(self.features[self.features["prompt"] == prompt]), n)

    def __repr__(self) -> str:
        return as_text(*self._summary())

    def _repr_html_(self) -> str:
        return as_html(*self._summary())

    def plot(self) -> Any:
        """The prompts as on the report's page Prompts, in a notebook: words, next tokens and effects, with a slider."""
        names = ("traces", "trace_predictions", "trace_features", "trace_tokens")
        return plot(
            dict(zip(names, (self.prompts, self.predictions, self.features, self.tokens), strict=True)), "traced"
        )

    def _summary(self) -> tuple[str, pd.DataFrame, str]:
        """What is printed: the metric and the most probable token at every snapshot."""
        first: Any = self.predictions[(self.predictions["rank"] == 0) & ~self.predictions["paired"]]
        shown = self.prompts.merge(first[["prompt", "snapshot", "token", "probability"]], on=["prompt", "snapshot"])
        columns = ["text", "label", "token", "probability", "correct", "wrong", "metric"]
        n = self.features["feature"].nunique()
        title = f"{len(self)} traced prompt{'s' * (len(self) != 1)}; {n:,} features fire on them"
        return title, pd.DataFrame(shown[columns]), f"metric: logit of correct minus that of wrong; {NO_ERROR_BARS}"


def top_features(features: pd.DataFrame, n: int) -> pd.DataFrame:
    """The n features with the largest |effect| at any snapshot, of one prompt, by the first snapshot of effect.

    Args:
        features: rows of `Trace.features`.
        n: number of features.

    Returns:
        The columns of the features but snapshot, label and step, a row per feature, and the effects by snapshot as an
        array in `effects`; those that never matter for two snapshots in a row come last.
    """
    rows = features.sort_values(["feature", "snapshot"])
    effects = rows.pivot(index="feature", columns="snapshot", values="effect")
    found: Any = (
        rows.drop_duplicates("feature").drop(columns=["snapshot", "label", "step", "effect"]).set_index("feature")
    )
    found["effects"] = list(effects.to_numpy())
    found["size"] = effects.abs().max(axis=1)
    largest = found[found["size"] > 0].nlargest(n, "size")
    order = largest.assign(first=largest["matters"].fillna(effects.shape[1]), size=-largest["size"])
    return largest.loc[order.sort_values(["first", "size"], kind="stable").index].reset_index()


def trace(
    crosscoder: Crosscoder,
    snapshots: Snapshots,
    prompts: str | Sequence[str | tuple[str, str] | Item | Asked],
    answers: tuple[str, str] | None = None,
    *,
    lifecycles: pd.DataFrame | None = None,
    encoder_share: Float[Tensor, "F S"] | None = None,
    settings: ModelSettings | None = None,
) -> Trace:
    """Trace prompts through all snapshots.

    Args:
        crosscoder: trained on these snapshots.
        snapshots: the models.
        prompts: a prompt, or several: texts, pairs of texts that are compared, or `Item`s with answers of their own.
        answers: the correct and the wrong continuation of texts and pairs, such as `("are", "is")`; of a pair the
            second is correct after the second prompt. None takes what the last snapshot finds most probable.
        lifecycles: of `evolve`, for when features became readable.
        encoder_share: as from `evolution.encoder_share`, to mark what is mostly read from later snapshots.
        settings: how the models run; None runs them on the crosscoder's device.

    Raises:
        UserError: no prompts, an empty one, one longer than the models' context, answers that do not differ in one
            token, a pair of different lengths; a crosscoder of other snapshots or on another device.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    if not listed:
        raise UserError("no prompts are given: give one or more texts")
    asked = [_ask(one, answers) for one in listed]
    settings = settings or ModelSettings(device=str(crosscoder.device))
    encoded = _encode(crosscoder, snapshots, asked, settings)
    items = [_item(snapshots.tokenizer, one, prompt) for one, prompt in zip(asked, encoded, strict=True)]
    found = _Found()
    kinds = [[p for p in encoded if (p.patch is None) == single] for single in (True, False)]
    runs = [
        # one by one, so that rounding does not depend on the other prompts
        PromptRuns(crosscoder, snapshots, _Tokenised.of(items, kind), paired=paired, batch_size=1, settings=settings)
        for kind, paired in zip(kinds, (False, True), strict=True)
        if kind
    ]
    for s in tqdm(range(len(snapshots)), desc="Tracing", unit="snapshot", leave=False):
        model: Any = snapshots.model(s, settings)
        for each in runs:
            for part in each.at(s):
                found.add(s, part, each, model)
    return _assemble(found, snapshots, asked, items, encoded, lifecycles, encoder_share)


@dataclass(frozen=True)
class _Tokenised(Task):
    """A task whose prompts are tokens already."""

    encoded: Prompts = field(default_factory=lambda: Prompts([]), repr=False, compare=False)

    @classmethod
    def of(cls, items: Sequence[Item], prompts: Sequence[Prompt]) -> _Tokenised:
        encoded = Prompts(items)
        encoded.usable += prompts
        return cls("trace", tuple(items), encoded=encoded)

    def prompts(self, tokenizer: Any, prepend_bos: bool = True, max_length: int | None = None) -> Prompts:
        del tokenizer, prepend_bos, max_length
        return self.encoded


def _ask(one: Any, answers: tuple[str, str] | None) -> Asked:
    if isinstance(one, Asked):
        return one
    if isinstance(one, Item):
        return Asked(one.prefix, one.patch_prefix, (one.correct, one.wrong))
    if answers is not None and (isinstance(answers, str) or len(answers) != 2 or not all(map(str.strip, answers))):
        raise UserError(f'answers={answers!r} must be two texts, the correct and the wrong one, such as ("are", "is")')
    if isinstance(one, str):
        return Asked(one, None, answers)
    if isinstance(one, tuple) and len(one) == 2 and all(isinstance(text, str) for text in one):
        return Asked(one[0], one[1], answers)
    raise UserError(f"{shortened(repr(one))} is not a prompt: give a text, a pair of texts, or an Item")


def _encode(
    crosscoder: Crosscoder, snapshots: Snapshots, asked: Sequence[Asked], settings: ModelSettings
) -> list[Prompt]:
    """Every prompt in tokens; answers that are not given are read from the last model."""
    tokenizer, longest = snapshots.tokenizer, snapshots.n_ctx
    with_bos = begins_with_bos(crosscoder)
    bos = bos_tokens(tokenizer, with_bos)
    found: list[Prompt] = []
    for i, (text, paired, answers) in enumerate(asked):
        name = shortened(repr(text))
        for one in (text, paired or ""):
            check_characters(one, "the prompt")
        if answers is not None:
            item = Item(text, *answers, patch_prefix=paired)
            prompts = encode(tokenizer, [item], with_bos, longest)
            reasons = [*prompts.skipped, *prompts.unpaired]
            if reasons:
                raise UserError(
                    f"the prompt {name} cannot be traced with the answers {answers[0]!r} and {answers[1]!r}: "
                    f"{reasons[0]}"
                )
            found.append(prompts.usable[0]._replace(item=i))
            continue
        sides = [
            bos + tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, paired) if one is not None
        ]
        if any(len(side) == len(bos) for side in sides):
            raise UserError(f"the prompt {name} is empty: give at least one word")
        if any(len(side) > longest for side in sides):
            raise UserError(f"the prompt {name} is longer than {longest} tokens, the models' context: shorten it")
        if len({len(side) for side in sides}) > 1:
            raise UserError(
                f"the pair {name} and {shortened(repr(paired))} has {len(sides[0])} and {len(sides[1])} tokens: give "
                "prompts of as many tokens, which are compared position by position"
            )
        first, second = _most_probable(snapshots, sides, settings)
        found.append(Prompt(i, sides[0], first, second, sides[1] if paired is not None else None))
    return found


@torch.no_grad()
def _most_probable(snapshots: Snapshots, sides: Sequence[list[int]], settings: ModelSettings) -> tuple[int, int]:
    """The last model's next token after each of a pair; its first two where these are equal, or for one prompt."""
    model: Any = snapshots.model(len(snapshots) - 1, settings)
    tokens = torch.tensor(sides, device=settings.device)
    logits = model(tokens, return_type="logits", **last_position(model))[:, -1]
    first, second = logits[0].topk(2).indices.tolist()
    other = int(logits[-1].argmax())
    return first, second if other == first else other


def _item(tokenizer: Any, asked: Asked, prompt: Prompt) -> Item:
    """The prompt as an item; its answers are the tokens that are compared."""
    correct, wrong = (_text(tokenizer, token) for token in (prompt.correct, prompt.wrong))
    return Item(asked.text, correct, wrong, asked.paired)


def _text(tokenizer: Any, token: int) -> str:
    text = tokenizer.decode([token])
    return text if text.strip() else repr(text)[1:-1] or "''"


class _Found:
    """Rows of the tables of a `Trace`, as they are computed."""

    def __init__(self) -> None:
        self.prompts: list[dict[str, Any]] = []
        self.next: list[dict[str, Any]] = []
        self.tokens: list[pd.DataFrame] = []

    @torch.no_grad()
    def add(self, s: int, part: BatchAt, runs: PromptRuns, model: Any) -> None:
        """Add a batch at a snapshot."""
        batch, estimator = part.prompts, Estimator(baseline="patch" if runs.paired else "zero")
        start = baseline_activation(part, estimator, None)
        clean, baseline = (m.double().cpu() for m in metrics(part, part.clean, start).chunk(2))
        table = _effects(part, runs, mean_gradient(part, start, *estimator.nodes()))
        self.tokens.append(table.assign(snapshot=s))
        total: Any = table.groupby("prompt")["effect"].sum()
        device = next(model.parameters()).device
        sides = [batch.tokens] if batch.patch is None or not runs.paired else [batch.tokens, batch.patch]
        options = last_position(model)
        logits = [model(side.to(device), return_type="logits", **options)[:, -1].double().cpu() for side in sides]
        for row, prompt in enumerate(batch.index.tolist()):
            known = [side[row].softmax(-1) for side in logits]
            correct, wrong = int(batch.correct[row]), int(batch.wrong[row])
            self.prompts.append(
                {
                    "prompt": prompt, "snapshot": s, "metric": float(clean[row]),
                    "correct_probability": float(known[0][correct]), "wrong_probability": float(known[0][wrong]),
                    "paired_metric": float(logits[1][row, correct] - logits[1][row, wrong]) if len(sides) > 1 else None,
                    "features_effect": float(total.get(prompt, 0.0)), "metric_baseline": float(baseline[row]),
                }
            )  # fmt: skip
            for paired, probabilities in enumerate(known):
                values, tokens = probabilities.topk(min(NEXT, len(probabilities)))
                for rank, (value, token) in enumerate(zip(values.tolist(), tokens.tolist(), strict=True)):
                    self.next.append(
                        {"prompt": prompt, "snapshot": s, "paired": bool(paired), "rank": rank, "token": token,
                         "probability": value}
                    )  # fmt: skip


def _effects(part: BatchAt, runs: PromptRuns, gradient: Float[Tensor, "B T D"]) -> pd.DataFrame:
    """Effects at one snapshot: prompt, position, feature, activation, paired_activation, effect."""
    T, pairs, before = part.keep.shape[1], part.pairs, part.patch_values
    change = pairs.values if before is None else pairs.values - before
    effect = part.along(Pairs(pairs.tokens, pairs.features, change), gradient)
    columns = {
        "prompt": part.prompts.index[pairs.tokens.cpu() // T],
        "position": pairs.tokens.cpu() % T,
        "feature": runs.features[pairs.features.cpu()],
        "activation": pairs.values,
        "paired_activation": torch.full_like(pairs.values, torch.nan) if before is None else before,
        "effect": effect.double(),
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})


def _assemble(
    found: _Found,
    snapshots: Snapshots,
    asked: Sequence[Asked],
    items: Sequence[Item],
    encoded: Sequence[Prompt],
    lifecycles: pd.DataFrame | None,
    encoder_share: Float[Tensor, "F S"] | None,
) -> Trace:
    tokenizer = snapshots.tokenizer
    texts = [tokenizer.batch_decode([[token] for token in prompt.tokens]) for prompt in encoded]

    def dated(table: pd.DataFrame) -> pd.DataFrame:
        """With the columns label and step after snapshot."""
        place = list(table).index("snapshot") + 1
        for name, values in (("step", pd.array(snapshots.steps, dtype="Int64")), ("label", np.array(snapshots.labels))):
            table.insert(place, name, values.take(table["snapshot"].to_numpy()))  # pyright: ignore
        return table

    prompts: Any = pd.DataFrame(found.prompts).sort_values(["prompt", "snapshot"], ignore_index=True)
    of = {
        "text": [one.text for one in asked],
        "paired": [one.paired for one in asked],
        "correct": [item.correct for item in items],
        "wrong": [item.wrong for item in items],
        "given": [one.answers is not None for one in asked],
    }
    for place, (name, values) in enumerate(of.items(), start=2):
        prompts.insert(place, name, [values[i] for i in prompts["prompt"]])
    prompts["paired_metric"] = prompts["paired_metric"].astype(float)
    following: Any = pd.DataFrame(found.next).sort_values(["prompt", "snapshot", "paired", "rank"], ignore_index=True)
    following["token"] = tokenizer.batch_decode([[token] for token in following["token"]])
    keys = ["prompt", "position", "feature", "snapshot"]
    tokens: Any = pd.concat(found.tokens).sort_values(keys, ignore_index=True)
    tokens.insert(2, "token", [texts[p][t] for p, t in zip(tokens["prompt"], tokens["position"], strict=True)])
    tokens = tokens[["prompt", "position", "token", "feature", "snapshot", "activation", "paired_activation", "effect"]]
    others = [tokenizer.batch_decode([[token] for token in prompt.patch or ()]) for prompt in encoded]
    features = _of_features(tokens, others, lifecycles, encoder_share)
    return Trace(snapshots.labels, dated(prompts), dated(following), dated(features), tokens, texts)


def _of_features(
    tokens: Any,
    others: Sequence[Sequence[str]],
    lifecycles: pd.DataFrame | None,
    encoder_share: Float[Tensor, "F S"] | None,
) -> pd.DataFrame:
    """`Trace.features`; `others` are the tokens of the other prompts of pairs, as text."""
    keys = ["prompt", "feature", "snapshot"]
    groups = tokens.groupby(keys, sort=True)
    features: Any = (
        groups[["activation", "paired_activation"]].max().assign(effect=groups["effect"].sum()).reset_index()
    )
    largest = tokens.assign(size=tokens[["activation", "paired_activation"]].max(axis=1))
    where = largest.sort_values("size", kind="stable").drop_duplicates(["prompt", "feature"], keep="last")
    of_other = where["paired_activation"] > where["activation"]
    there = [others[p][t] if other else token for p, t, token, other in
             zip(where["prompt"], where["position"], where["token"], of_other, strict=True)]  # fmt: skip
    where = where.assign(token=there)
    features = features.merge(where[["prompt", "feature", "position", "token"]], on=["prompt", "feature"], how="left")
    S = features["snapshot"].max() + 1 if len(features) else 0
    size = features["effect"].abs().to_numpy().reshape(-1, max(S, 1))
    first = birth_index((size >= MATTERS * size.max(1, keepdims=True)) & (size > 0), RUN)
    features["matters"] = pd.array(first.repeat(max(S, 1)), dtype="Int64")
    features.loc[features["matters"] == S, "matters"] = pd.NA
    features["readable"] = pd.array([pd.NA] * len(features), dtype="Int64")
    if lifecycles is not None:
        by_r2 = lifecycles[lifecycles["measure"] == "r2"] if "measure" in lifecycles else lifecycles
        births = by_r2.set_index("feature")["birth"].astype("Int64")
        features["readable"] = births.reindex(features["feature"]).array
    if encoder_share is not None:
        share = encoder_share.double().cpu()
        later = (share.sum(-1, keepdim=True) - share.cumsum(-1)).numpy()
        features["read_later"] = later[features["feature"], features["snapshot"]]
        features["mostly_later"] = features["read_later"] > MOSTLY
    columns = [*keys, "effect", "activation", "paired_activation", "position", "token", "matters", "readable"]
    return features[[*columns, *(name for name in ("read_later", "mostly_later") if name in features)]]
