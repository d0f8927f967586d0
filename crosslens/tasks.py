"""Tasks: minimal pairs of a prefix and two answers, one right and one wrong, told apart by the next token.

Every source gives items (prefix, correct, wrong, paired prefix or none); `crosslens.prompts` makes prompts of them, by
one rule for every tokenizer. The metric is logit(correct) - logit(wrong) at the last position of the prompt.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import norm
from tqdm.auto import tqdm

from crosslens import grammar
from crosslens.errors import UserError, did_you_mean, first_line
from crosslens.prompts import Item, Prompts, encode, logit_difference
from crosslens.prompts import PromptBatch as PromptBatch

_COLUMNS = {"prefix": "prefix", "correct": "correct", "wrong": "wrong"}
_SVA = {"prefix": "clean_prefix", "correct": "clean_answer", "wrong": "patch_answer", "patch_prefix": "patch_prefix"}
_BLIMP = {"prefix": "one_prefix_prefix", "correct": "one_prefix_word_good", "wrong": "one_prefix_word_bad"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON = (".jsonl", ".json", ".ndjson")


def wilson_interval(successes: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; `successes` may be fractional, for a tie is half a success."""
    z = float(norm.ppf((1 + level) / 2))
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * ((p * (1 - p) + z * z / (4 * n)) / n) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


@runtime_checkable
class Models(Protocol):
    """What `Task.accuracy` asks of `Snapshots`."""

    @property
    def labels(self) -> list[str]: ...
    @property
    def steps(self) -> list[int | None]: ...
    @property
    def tokens(self) -> list[int | None]: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def n_ctx(self) -> int: ...
    def __len__(self) -> int: ...
    def model(self, i: int, /, *, device: str, backend: str) -> Any: ...


@dataclass(frozen=True)
class Task:
    """A named list of minimal pairs without exact duplicates; made by `sva`, `blimp`, `local`, `demo`, `from_items`.

    Raises:
        UserError: a name that cannot be part of a file name.
    """

    name: str
    items: tuple[Item, ...] = field(repr=False)
    duplicates: int = 0
    """Exact duplicates that were dropped: they are no new evidence, and would make standard errors too small."""

    def __post_init__(self) -> None:
        if not self.name or {"/", "\\"} & set(self.name):
            raise UserError(f"task name {self.name!r} must name a file: give one without '/' and '\\'")

    def __len__(self) -> int:
        return len(self.items)

    # ------------------------------------------------------------------ sources
    @classmethod
    def from_items(cls, name: str, items: Iterable[Item | Mapping[str, Any]]) -> Task:
        """A task from `Item`s, or dictionaries with `prefix`, `correct`, `wrong` and, if there is one, `patch_prefix`.

        Raises:
            UserError: no items, or one that lacks a key or has an empty answer; it is named.
        """
        made = [
            item if isinstance(item, Item) else _item(item, _with_patch(_COLUMNS, item), f"task {name!r}, item {i}")
            for i, item in enumerate(items)
        ]
        if not made:
            raise UserError(f"task {name!r} has no items: give at least one")
        kept = tuple(dict.fromkeys(made))
        return cls(name, kept, len(made) - len(kept))

    @classmethod
    def sva(cls, path: str | Path, name: str | None = None) -> Task:
        """Pairs in the format of feature-circuits (Marks et al., arXiv 2403.19647): JSON lines with `clean_prefix`,
        `patch_prefix`, `clean_answer`, `patch_answer`.

        Raises:
            UserError: the file cannot be read, or a line lacks a key; file, line and key are named.
        """
        return cls.local(path, **_SVA, name=name)

    @classmethod
    def blimp(cls, uid_or_path: str | Path, folder: str | Path | None = None) -> Task:
        """A BLiMP paradigm (Warstadt et al. 2020) of the one-prefix method: the first word that differs decides.

        Args:
            uid_or_path: a JSON-lines file, or a paradigm such as "regular_plural_subject_verb_agreement_1".
            folder: where `<uid>.jsonl` lies; None downloads the paradigm from the hub dataset nyu-mll/blimp.

        Raises:
            UserError: no such file or paradigm, or one that is not judged by the one-prefix method.
        """
        path, uid = Path(uid_or_path), str(uid_or_path)
        if folder is not None:
            path = Path(folder) / f"{uid}.jsonl"
            if not path.is_file():
                hint = did_you_mean(uid, (found.stem for found in Path(folder).glob("*.jsonl")))
                raise UserError(f"{folder} has no {path.name}: give a paradigm that lies there{hint}")
        rows = _read_rows(path) if path.suffix in _JSON else _hub_rows(uid)
        return cls.from_items(path.stem, [_blimp_item(row, where) for where, row in rows])

    @classmethod
    def local(
        cls,
        path: str | Path,
        prefix: str = "prefix",
        correct: str = "correct",
        wrong: str = "wrong",
        patch_prefix: str | None = None,
        name: str | None = None,
    ) -> Task:
        """A task from a file: JSON lines, a JSON array, csv or tsv with a header.

        Args:
            path: .jsonl, .json, .ndjson, .csv or .tsv.
            prefix: key or column of the prefixes.
            correct: key or column of the right answers.
            wrong: key or column of the wrong answers.
            patch_prefix: that of the paired prefixes; None takes "patch_prefix" from the rows that have it.
            name: of the task; that of the file by default.

        Raises:
            UserError: the file cannot be read, or a line lacks a key; file, line and key are named.
        """
        path = Path(path)
        columns = {"prefix": prefix, "correct": correct, "wrong": wrong}
        if patch_prefix is not None:
            columns["patch_prefix"] = patch_prefix
        items = [_item(row, _with_patch(columns, row), where) for where, row in _read_rows(path)]
        return cls.from_items(name or path.stem, items)

    @classmethod
    def demo(cls, construction: str, language: str | None = None, n: int = 200, seed: int = 0) -> Task:
        """Agreement in the demo's language (`crosslens.grammar`), paired by the number of the head noun.

        Args:
            construction: "simple", "pp", "subj_rel", "obj_rel" or "within_rc".
            language: "en" or "fr"; None pools both.
            n: items per language.
            seed: of the draw.

        Raises:
            UserError: unknown construction or language, or more items than there are.
        """
        languages = grammar.LANGUAGES if language is None else (language,)
        rows = [row for each in languages for row in grammar.pairs(construction, each, n, seed)]
        return cls.from_items(construction if language is None else f"{construction}-{language}", rows)

    # ------------------------------------------------------------------ use
    def prompts(self, tokenizer: Any, prepend_bos: bool = True, max_length: int | None = None) -> Prompts:
        """The items as tokens of a Hugging Face tokenizer; see `crosslens.prompts` for the rule and the arguments.

        Raises:
            UserError: no item is usable; the reasons are named.
        """
        prompts = encode(tokenizer, self.items, prepend_bos, max_length)
        if not len(prompts):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in prompts.skipped.most_common())
            raise UserError(
                f"task {self.name!r}: none of its {len(self)} items can be used ({reasons}): give items whose answers "
                "differ in one token of this tokenizer, after prompts that fit the model"
            )
        return prompts

    @torch.no_grad()
    def accuracy(
        self,
        snaps: Models,
        device: str = "cpu",
        batch_size: int = 256,
        *,
        prepend_bos: bool = True,
        backend: str = "bridge",
    ) -> pd.DataFrame:
        """How often the right answer has the larger logit, a row per snapshot; a tie counts as half right.

        Args:
            snaps: the models; prompts longer than their context are skipped.
            device: where they run.
            batch_size: prompts per forward pass.
            prepend_bos: begin prompts with the BOS token.
            backend: "bridge" or "hooked_transformer".

        Returns:
            task, snapshot, label, step, tokens, accuracy, low and high (Wilson's 95 % interval), metric (mean logit
            difference), n (prompts).

        Raises:
            UserError: no usable item, or a snapshot whose logits are not finite.
        """
        prompts = self.prompts(snaps.tokenizer, prepend_bos=prepend_bos, max_length=snaps.n_ctx)
        batches, n = list(prompts.batches(batch_size)), len(prompts)
        rows: list[dict[str, float]] = []
        for s in tqdm(range(len(snaps)), desc=f"Accuracy on {self.name}", unit="snapshot", leave=False):
            model = snaps.model(s, device=device, backend=backend)
            found = [
                logit_difference(model(batch.tokens.to(device), return_type="logits")[:, -1].float(), batch)
                for batch in batches
            ]
            metric = torch.cat(found).double().cpu()
            if not torch.isfinite(metric).all():
                raise UserError(
                    f"snapshot {snaps.labels[s]} has non-finite logits on task {self.name!r}: leave this snapshot out, "
                    "or check its weights"
                )
            right = float((metric > 0).sum() + 0.5 * (metric == 0).sum())
            low, high = wilson_interval(right, n)
            rows.append({"accuracy": right / n, "low": low, "high": high, "metric": float(metric.mean()), "n": n})
        where = {
            "task": [self.name] * len(snaps),
            "snapshot": range(len(snaps)),
            "label": snaps.labels,
            "step": pd.array(snaps.steps, dtype="Int64"),
            "tokens": pd.array(snaps.tokens, dtype="Int64"),
        }
        return pd.concat([pd.DataFrame(where), pd.DataFrame(rows)], axis=1)

    def split(self, seed: int = 0) -> tuple[Task, Task]:
        """Two halves, drawn by `seed`, that share no prefix, paired ones included.

        Raises:
            UserError: all items hang together by their prefixes.
        """
        pairs = [(item.prefix, item.prefix if item.patch_prefix is None else item.patch_prefix) for item in self.items]
        number = {prefix: i for i, prefix in enumerate(dict.fromkeys(p for pair in pairs for p in pair))}
        ends = [[number[pair[side]] for pair in pairs] for side in (0, 1)]
        edges = coo_matrix(([True] * len(pairs), ends), shape=(len(number), len(number)))
        groups: dict[int, list[int]] = {}
        component = connected_components(edges, directed=False)[1]
        for index, prefix in enumerate(ends[0]):
            groups.setdefault(int(component[prefix]), []).append(index)
        drawn = list(groups.values())
        if len(drawn) < 2:
            raise UserError(f"task {self.name!r} cannot be split: its items share one prefix; add items with others")
        random.Random(f"split {seed}").shuffle(drawn)
        halves: tuple[list[int], list[int]] = ([], [])
        for group in drawn:
            min(halves, key=len).extend(group)
        one, other = (replace(self, items=tuple(self.items[i] for i in sorted(half)), duplicates=0) for half in halves)
        return one, other


def _read_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """(file and line, row) of every row of a file; in a JSON array, the entry instead of the line."""
    if path.suffix not in (*_JSON, *_DELIMITERS):
        kinds = ", ".join((*_JSON, *_DELIMITERS))
        raise UserError(f"{path} is of an unknown kind {path.suffix!r}: give one of {kinds}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): give an existing UTF-8 file") from error
    rows: list[tuple[str, Any]]
    if path.suffix in _DELIMITERS:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_DELIMITERS[path.suffix])
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
    elif text.lstrip().startswith("["):
        rows = [(f"{path}, entry {i}", row) for i, row in enumerate(_parsed(text, str(path)), start=1)]
    else:
        lines = [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(where, _parsed(line, where)) for where, line in lines]
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise UserError(f"{where}: {row!r} is no JSON object; give objects with keys such as 'prefix'")
    return rows


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error}); give one JSON object per line") from error


def _with_patch(columns: dict[str, str], row: Mapping[str, Any]) -> dict[str, str]:
    """The columns with that of the paired prefix: optional, unless it was named."""
    return {"patch_prefix": "patch_prefix", **columns} if row.get("patch_prefix") else columns


def _item(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Item:
    for key in columns.values():
        if key not in row:
            present = ", ".join(repr(name) for name in row)
            raise UserError(f"{where}: the key {key!r} is missing; present are {present}{did_you_mean(key, row)}")
        if not isinstance(row[key], str):
            raise UserError(f"{where}: the key {key!r} is {row[key]!r}; give text")
    info = {key: value for key, value in row.items() if key not in columns.values()}
    try:
        return Item(**{role: row[key] for role, key in columns.items()}, info=info)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _hub_rows(uid: str) -> list[tuple[str, Mapping[str, Any]]]:
    import datasets  # takes half a second, and is needed for the hub alone

    try:
        rows: Any = datasets.load_dataset("nyu-mll/blimp", uid, split="train")
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"BLiMP paradigm {uid!r} cannot be read from the hub ({reason}): check its name and the connection, "
            "or give its .jsonl file"
        ) from error
    return [(f"nyu-mll/blimp {uid}, row {i}", row) for i, row in enumerate(rows)]


def _blimp_item(row: Mapping[str, Any], where: str) -> Item:
    if row.get("one_prefix_method") is False:
        raise UserError(
            f"{where}: {row.get('UID', 'this paradigm')!r} is not judged by the one-prefix method; choose a paradigm "
            "whose rows say one_prefix_method: true"
        )
    if _BLIMP["prefix"] in row or not {"sentence_good", "sentence_bad"} <= set(row):
        return _item(row, _BLIMP, where)
    # on the hub the rows have the sentences alone
    good, bad = str(row["sentence_good"]).split(), str(row["sentence_bad"]).split()
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(good, bad, strict=False)))
    shared = max(0, min(shared, len(good) - 1, len(bad) - 1))  # a few rows have the same sentence twice
    answers = ("".join(words[shared : shared + 1]).rstrip(".,?!") for words in (good, bad))
    derived = dict(zip(_BLIMP.values(), (" ".join(good[:shared]), *answers), strict=True))
    return _item({**row, **derived}, _BLIMP, where)
