"""Tasks: minimal pairs of a prefix and two answers, one right and one wrong.

Every source gives items (prefix, correct, wrong, paired prefix or none); `prompts` makes prompts of them, by
one rule for every tokenizer. With `answers="single"` one token tells the answers apart, and the metric is
logit(correct) - logit(wrong) at the last position of the prompt, which attribution needs (Bayazit et al., arXiv
2509.05291, have the opposite sign). With `answers="multi"` it is the difference of the answers' log-probabilities,
summed over their tokens: for words of several tokens and for full sentences (as BLiMP has them, Warstadt et al. 2020).
Where single-token answers end their sentences the two are the same number.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from crosslens.errors import UserError, did_you_mean
from crosslens.synthetic import grammar
from crosslens.tasks import corpora
from crosslens.tasks import generated as synthetic
from crosslens.tasks.accuracy import Models, accuracy_table
from crosslens.tasks.prompts import Answers, Item, Prompts, encode, encode_answers

_COLUMNS = {"prefix": "prefix", "correct": "correct", "wrong": "wrong"}
_SVA = {"prefix": "clean_prefix", "correct": "clean_answer", "wrong": "patch_answer", "patch_prefix": "patch_prefix"}
ANSWERS = ("single", "multi")


@dataclass(frozen=True)
class Task:
    """A named list of minimal pairs without exact duplicates; made by one of the class methods.

    Raises:
        UserError: a name that cannot be part of a file name, or unknown `answers`.
    """

    name: str
    """Of its tables and files."""
    items: tuple[Item, ...] = field(repr=False)
    """The pairs in words."""
    duplicates: int = 0
    """Exact duplicates that were dropped: they are no new evidence, and would make standard errors too small."""
    answers: str = "single"
    """"single": one token tells the answers apart; "multi": their summed log-probabilities are compared."""

    def __post_init__(self) -> None:
        if not self.name or {"/", "\\"} & set(self.name):
            raise UserError(f"task name {self.name!r} must name a file: give one without '/' and '\\'")
        _check_answers(self.answers)

    def __len__(self) -> int:
        return len(self.items)

    # ------------------------------------------------------------------ sources
    @classmethod
    def from_items(cls, name: str, items: Iterable[Item | Mapping[str, Any]], answers: str = "single") -> Task:
        """A task called `name`, with `answers` as in `Task`, from `items`: `Item`s, or dictionaries with `prefix`,
        `correct`, `wrong` and, if there is one, `patch_prefix`.

        Raises:
            UserError: no items, or one that lacks a key or has an empty answer; it is named.
        """
        made = [
            item if isinstance(item, Item) else _make_item(corpora.Row(f"task {name!r}, item {i}", item), _COLUMNS)
            for i, item in enumerate(items)
        ]
        if not made:
            raise UserError(f"task {name!r} has no items: give at least one")
        kept = tuple(dict.fromkeys(made))
        return cls(name, kept, len(made) - len(kept), answers)

    @classmethod
    def from_sentences(
        cls,
        name: str,
        rows: Iterable[Mapping[str, Any]],
        good: str = "sentence_good",
        bad: str = "sentence_bad",
        answers: str = "multi",
    ) -> Task:
        """A task from pairs of sentences, compared as a whole, or with `answers="single"` at the word that differs.

        Args:
            name: of the task.
            rows: dictionaries with a right and a wrong sentence; what else they hold is the item's `info`.
            good: key of the right sentences.
            bad: key of the wrong sentences.
            answers: "multi" or "single".

        Raises:
            UserError: no rows, one that lacks a key or has an empty sentence, or unknown `answers`.
        """
        _check_answers(answers)
        numbered = (corpora.Row(f"task {name!r}, row {i}", row) for i, row in enumerate(rows))
        return cls.from_items(name, [corpora.make_pair(row, good, bad, answers) for row in numbered], answers)

    @classmethod
    def sva(cls, path: str | Path, name: str | None = None, answers: str = "single") -> Task:
        """Pairs in the format of feature-circuits (Marks et al., arXiv 2403.19647): JSON lines with `clean_prefix`,
        `patch_prefix`, `clean_answer`, `patch_answer`; arguments and errors as in `local`.
        """
        return cls.local(path, **_SVA, name=name, answers=answers)

    @classmethod
    def blimp(cls, uid_or_path: str | Path, folder: str | Path | None = None, answers: str | None = None) -> Task:
        """A BLiMP paradigm (Warstadt et al. 2020).

        Paradigms of the one-prefix method are judged by the first word that differs, the others, whose difference lies
        elsewhere, as full sentences.

        Args:
            uid_or_path: a file, or a paradigm such as "regular_plural_subject_verb_agreement_1".
            folder: where `<uid>.jsonl` lies; None downloads the paradigm from the hub dataset nyu-mll/blimp.
            answers: "multi" compares full sentences in any paradigm; None takes what the paradigm is made for.

        Raises:
            UserError: no such file or paradigm, or "single" where the one-prefix method does not hold.
        """
        _check_answers(answers or "single")
        rows = corpora.blimp_rows(uid_or_path, folder)
        items, answers = corpora.blimp_items(rows, answers)
        path = Path(uid_or_path)
        return cls.from_items(path.stem if path.suffix in corpora.FILES else str(uid_or_path), items, answers)

    @classmethod
    def clams(
        cls,
        language_or_path: str | Path,
        case: str | None = None,
        folder: str | Path | None = None,
        answers: str = "single",
        capitalise: bool = False,
        end: str = "",
    ) -> Task:
        """A CLAMS evaluation set (Mueller et al. 2020): lines of `True|False`, a tab and a sentence, in pairs.

        Args:
            language_or_path: a .txt file, or a language such as "fr".
            case: such as "simple_agrmt".
            folder: a clone of github.com/aaronmueller/clams, where `<language>_evalset/<case>.txt` lies.
            answers: "single" compares the word that differs, "multi" full sentences.
            capitalise: begin sentences with a capital; the sets are in lower case.
            end: such as "."; the sets have none, so a full sentence that begins another is skipped without it.

        Raises:
            UserError: no such file, or lines that are no pairs.
        """
        _check_answers(answers)
        path = Path(language_or_path)
        info: dict[str, str] = {}
        if path.suffix != ".txt":
            path = corpora.clams_file(str(language_or_path), case, folder)
            info = {"language": str(language_or_path), "case": path.stem}
        rows = corpora.read_clams(path, capitalise, end, info)
        items = [corpora.make_pair(row, "good", "bad", answers) for row in rows]
        return cls.from_items("-".join(("clams", *info.values())) if info else path.stem, items, answers)

    @classmethod
    def multiblimp(
        cls,
        language: str,
        phenomenon: str | None = None,
        path: str | Path | None = None,
        answers: str = "single",
    ) -> Task:
        """Agreement in one language of MultiBLiMP (Jumelet et al., arXiv 2504.02768).

        The word that differs need not be the last; with `answers="single"` what follows it plays no part.

        Args:
            language: ISO 639-3, such as "fra".
            phenomenon: such as "SV-#"; None takes all.
            path: a folder of `<language>/data.tsv`, or a file with `sen` and `wrong_sen`, and perhaps several values of
                `language`; None downloads the hub dataset jumelet/multiblimp.
            answers: "single" compares the word that differs, "multi" full sentences.

        Raises:
            UserError: no such file, language or phenomenon, or a row lacks a key.
        """
        _check_answers(answers)
        rows = corpora.multiblimp_rows(language, path)
        if phenomenon is not None:
            rows = corpora.select(rows, "phenomenon", phenomenon)
        name = "-".join(("multiblimp", language, *([] if phenomenon is None else [phenomenon])))
        return cls.from_items(name, [corpora.make_pair(row, "sen", "wrong_sen", answers) for row in rows], answers)

    @classmethod
    def ioi(cls, path: str | Path | None = None, n: int = 200, seed: int = 0) -> Task:
        """Indirect-object identification (Wang et al., arXiv 2211.00593), paired by who gives.

        Args:
            path: a file with the keys of `sva`; None generates items.
            n: items that are generated.
            seed: of the draw.

        Raises:
            UserError: the file cannot be read, or more items than there are.
        """
        return cls.from_items("ioi", synthetic.ioi_items(n, seed)) if path is None else cls.sva(path)

    @classmethod
    def induction(cls, tokenizer: Any, n: int = 200, length: int = 8, seed: int = 0) -> Task:
        """Random words of one token each, said twice; the second time breaks off, and must go on as the first did.

        Args:
            tokenizer: of the models, such as `snapshots.tokenizer`.
            n: items.
            length: words that are repeated.
            seed: of the draw.

        Raises:
            UserError: n or length out of range, or a tokenizer with too few words of one token.
        """
        return cls.from_items("induction", synthetic.induction_items(tokenizer, n, length, seed))

    @classmethod
    def local(
        cls,
        path: str | Path,
        prefix: str = "prefix",
        correct: str = "correct",
        wrong: str = "wrong",
        patch_prefix: str | None = None,
        name: str | None = None,
        answers: str = "single",
    ) -> Task:
        """A task from a file: JSON lines, a JSON array, csv or tsv with a header, parquet.

        Args:
            path: .jsonl, .json, .ndjson, .csv, .tsv or .parquet.
            prefix: key or column of the prefixes.
            correct: key or column of the right answers.
            wrong: key or column of the wrong answers.
            patch_prefix: that of the paired prefixes; None takes "patch_prefix" from the rows that have it.
            name: of the task; that of the file by default.
            answers: "single" or "multi", see `Task`.

        Raises:
            UserError: the file cannot be read, or a line lacks a key; file, line and key are named.
        """
        columns = _columns(prefix, correct, wrong, patch_prefix)
        rows = corpora.read_rows(Path(path))
        return cls.from_items(name or Path(path).stem, [_make_item(row, columns) for row in rows], answers)

    @classmethod
    def hub(
        cls,
        repository: str,
        config: str | None = None,
        split: str = "train",
        prefix: str = "prefix",
        correct: str = "correct",
        wrong: str = "wrong",
        patch_prefix: str | None = None,
        name: str | None = None,
        answers: str = "single",
    ) -> Task:
        """A task from a dataset of the Hugging Face hub; other arguments as in `local`.

        Args:
            repository: such as "user/dataset".
            config: its configuration, where it has several.
            split: its split.
            name: of the task; that of the configuration or repository by default.

        Raises:
            UserError: no such dataset, configuration or split, no connection, or a column that is not there.
        """
        columns = _columns(prefix, correct, wrong, patch_prefix)
        rows = corpora.read_hub(repository, config, split)
        items = [_make_item(row, columns) for row in rows]
        return cls.from_items(name or config or repository.rpartition("/")[2], items, answers)

    @classmethod
    def demo(cls, construction: str, language: str | None = None, n: int = 200, seed: int = 0) -> Task:
        """Agreement in the demo's language (`crosslens.synthetic.grammar`), paired by the number of the head noun.

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
        """The items as tokens, by the rule of `crosslens.tasks.prompts`; arguments as in `prompts.encode`.

        Raises:
            UserError: no item is usable, the reasons are named; or a task whose answers are "multi".
        """
        if self.answers != "single":
            raise UserError(
                f"task {self.name!r} compares answers of many tokens (answers='multi'), so no single position decides "
                "and effects cannot be attributed to it: use accuracy, or make the task with answers='single'"
            )
        prompts = encode(tokenizer, self.items, prepend_bos, max_length)
        self._check_usable(prompts, "whose answers differ in one token of this tokenizer")
        return prompts

    def strings(self, tokenizer: Any, prepend_bos: bool = True, max_length: int | None = None) -> Answers:
        """Prompts with both answers, of any number of tokens; arguments as in `crosslens.tasks.prompts.encode_answers`.

        Raises:
            UserError: no item is usable, the reasons are named.
        """
        answers = encode_answers(tokenizer, self.items, prepend_bos, max_length)
        self._check_usable(answers, "with two answers that this tokenizer tells apart")
        return answers

    def _check_usable(self, prompts: Prompts | Answers, wanted: str) -> None:
        if not len(prompts):
            reasons = ", ".join(f"{reason}: {count}" for reason, count in prompts.skipped.most_common())
            raise UserError(
                f"task {self.name!r}: none of its {len(self)} items can be used ({reasons}): give items {wanted}, "
                "after prompts that fit the model"
            )

    def accuracy(
        self,
        snaps: Models,
        device: str = "cpu",
        batch_size: int = 256,
        *,
        prepend_bos: bool = True,
        backend: str = "bridge",
    ) -> pd.DataFrame:
        """How often the right answer is preferred, a row per snapshot; a tie counts as half right.

        Args:
            snaps: the models; prompts longer than their context are skipped.
            device: where they run.
            batch_size: prompts per forward pass.
            prepend_bos: begin prompts with the BOS token.
            backend: "bridge" or "hooked_transformer".

        Returns:
            task, snapshot, label, step, tokens, accuracy, low and high (Wilson's 95 % interval), metric (mean
            difference of the logits, or of the summed log-probabilities), n (items), skipped (items that cannot be
            used) and reasons (why, with their counts).

        Raises:
            UserError: no usable item, or a snapshot whose logits are not finite.
        """
        make = self.prompts if self.answers == "single" else self.strings
        prompts = make(snaps.tokenizer, prepend_bos, snaps.n_ctx)
        return accuracy_table(self.name, snaps, prompts, device, batch_size, backend)

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


def _check_answers(answers: str) -> None:
    if answers not in ANSWERS:
        raise UserError(f"answers={answers!r} is unknown: use 'single' or 'multi'{did_you_mean(answers, ANSWERS)}")


def _columns(prefix: str, correct: str, wrong: str, patch_prefix: str | None) -> dict[str, str]:
    columns = {"prefix": prefix, "correct": correct, "wrong": wrong}
    return columns if patch_prefix is None else {**columns, "patch_prefix": patch_prefix}


def _make_item(row: corpora.Row, columns: Mapping[str, str]) -> Item:
    """An item, its paired prefix optional unless the columns name one."""
    if row.values.get("patch_prefix"):
        columns = {"patch_prefix": "patch_prefix", **columns}
    return corpora.make_item(row, columns)
