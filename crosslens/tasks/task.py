"""Tasks: minimal pairs, a prefix with a correct and a wrong answer.

1. A source gives items: prefix, correct answer, wrong answer, and an optional paired prefix.
2. `crosslens.tasks.prompts` tokenises them, with one rule for every tokenizer.
3. With `answers="single"` the answers differ in one token, and the metric is logit(correct) - logit(wrong) at the last
   position of the prompt, which attribution needs (Bayazit et al., arXiv 2509.05291, use the opposite sign). With
   `answers="multi"` it is the difference of the answers' summed log-probabilities, for words of several tokens and for
   full sentences (as in BLiMP, Warstadt et al. 2020). For single-token answers at the end of a sentence, both are the
   same number.
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

from crosslens.errors import UserError, check_file_name
from crosslens.printing import as_html
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.tasks import corpora, formats
from crosslens.tasks.accuracy import accuracy_table, list_counts
from crosslens.tasks.formats import blimp, clams, demo, ioi, multiblimp, plain, sva
from crosslens.tasks.induction import induction_items
from crosslens.tasks.items import Item, Source, check_answers
from crosslens.tasks.prompts import Answers, Prompts, encode, encode_answers


@dataclass(frozen=True)
class Task:
    """A named list of minimal pairs without exact duplicates; use one of the class methods to make it.

    Raises:
        UserError: a name that cannot be part of a file name, or unknown `answers`.
    """

    name: str
    """Name of its tables and files."""
    items: tuple[Item, ...] = field(repr=False)
    """The pairs in words."""
    duplicates: int = 0
    """Duplicates that were merged: they add no evidence and would make standard errors too small."""
    answers: str = "single"
    """"single": the answers differ in one token; "multi": their summed log-probabilities are compared."""
    same_prompt: int = 0
    """How many of the duplicates come from different sentences, which differ only in words after the answers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", check_file_name(self.name, "task name"))
        check_answers(self.answers)

    def __len__(self) -> int:
        return len(self.items)

    def _repr_html_(self) -> str:
        n = sum(self.merged.values())
        merged = f"; {n} duplicates were merged ({list_counts(self.merged)})" if n else ""
        rows = [[item.prefix, item.correct, item.wrong, item.patch_prefix or ""] for item in self.items[:3]]
        title = f"task {self.name}: {len(self):,} items, {self.answers} answers{merged}"
        table = pd.DataFrame(rows, columns=["prompt", "correct", "wrong", "paired prompt"])
        return as_html(title, table, f"the first {len(rows)} of {len(self):,}")

    @classmethod
    def from_items(cls, name: str, items: Iterable[Item | Mapping[str, Any]], answers: str = "single") -> Task:
        """A task called `name`, with `answers` as in `Task`; `items` are `Item`s or dictionaries with `prefix`,
        `correct`, `wrong` and, optionally, `patch_prefix`.

        Raises:
            UserError: no items, or an item that lacks a key or has an empty answer.
        """
        made = [
            item
            if isinstance(item, Item)
            else corpora.make_item(corpora.Row(f"task {name!r}, item {i}", item), corpora.PLAIN)
            for i, item in enumerate(items)
        ]
        if not made:
            raise UserError(f"task {name!r} has no items: give at least one")
        kept = tuple(dict.fromkeys(made))
        return cls(name, kept, len(made) - len(kept), answers)

    @classmethod
    def parse(cls, spec: str) -> Task:
        """A task as it is written on the command line; see `crosslens.tasks.formats`.

        Args:
            spec: such as "sva:FILE" or "demo:simple".

        Raises:
            UserError: it cannot be read.
        """
        return cls.from_source(formats.read(spec))

    @classmethod
    def from_source(cls, source: Source) -> Task:
        """A task from what a format has read; counts what merges different sentences.

        Args:
            source: name, items and answers, and the number of sentences that they were made from.

        Raises:
            UserError: it has no items.
        """
        task = cls.from_items(source.name, source.items, source.answers)
        if source.n_sentences is None:
            return task
        return replace(task, same_prompt=source.n_sentences - len(task))

    @property
    def merged(self) -> dict[str, int]:
        """Number of merged items by reason."""
        counts = {
            "the same item": self.duplicates - self.same_prompt,
            "the same prompt and answers, other words after them": self.same_prompt,
        }
        return {reason: n for reason, n in counts.items() if n}

    @classmethod
    def from_sentences(
        cls,
        name: str,
        rows: Iterable[Mapping[str, Any]],
        good: str = "sentence_good",
        bad: str = "sentence_bad",
        answers: str = "multi",
    ) -> Task:
        """A task from pairs of sentences, compared as a whole or, with `answers="single"`, at the word that differs.

        Args:
            name: name of the task.
            rows: dictionaries with a correct and a wrong sentence; other keys become the item's `info`.
            good: key of the correct sentences.
            bad: key of the wrong sentences.
            answers: "multi" or "single".

        Raises:
            UserError: no rows, a row that lacks a key or has an empty sentence, or unknown `answers`.
        """
        check_answers(answers)
        numbered = [corpora.Row(f"task {name!r}, row {i}", row) for i, row in enumerate(rows)]
        return cls.from_source(corpora.read_pairs(name, numbered, good, bad, answers))

    @classmethod
    def sva(cls, path: str | Path, name: str | None = None, answers: str = "single") -> Task:
        """Pairs in the format of feature-circuits (Marks et al., arXiv 2403.19647): JSON lines with `clean_prefix`,
        `clean_answer`, `patch_answer` and, optionally, `patch_prefix`; arguments and errors as in `local`.

        The task files of Bayazit et al. (arXiv 2509.05291), such as `clams_data/*.jsonl`, have no `patch_prefix`.
        """
        return cls.from_source(sva.read(path, name, answers))

    @classmethod
    def blimp(cls, uid_or_path: str | Path, folder: str | Path | None = None, answers: str | None = None) -> Task:
        """A BLiMP paradigm (Warstadt et al. 2020).

        Paradigms of the one-prefix method are compared at the first word that differs, the others as full sentences.

        Args:
            uid_or_path: a file, or a paradigm such as "regular_plural_subject_verb_agreement_1".
            folder: folder with `<uid>.jsonl`; None downloads the paradigm from the hub dataset nyu-mll/blimp.
            answers: "multi" compares full sentences in any paradigm; None uses the method that the paradigm is made
                for.

        Raises:
            UserError: no such file or paradigm, or "single" for a paradigm without the one-prefix method.
        """
        return cls.from_source(blimp.read(uid_or_path, folder, answers))

    @classmethod
    def clams(
        cls,
        language_or_path: str | Path,
        case: str | None = None,
        folder: str | Path | None = None,
        answers: str | None = None,
        capitalise: bool = False,
        end: str = "",
    ) -> Task:
        """A CLAMS evaluation set (Mueller et al. 2020): lines of `True|False`, a tab and a sentence, in pairs.

        Args:
            language_or_path: a .txt file, or a language such as "fr".
            case: such as "simple_agrmt".
            folder: a clone of github.com/aaronmueller/clams, with `<language>_evalset/<case>.txt`.
            answers: "single" compares the word that differs, "multi" full sentences; None is "single", or "multi" where
                sentences differ in their first word, as in `simple_npi_anim`: no prompt stands before it, and what
                makes it right or wrong comes later.
            capitalise: capitalise sentences; the sets are in lower case.
            end: text to append to every sentence, such as "."; the sets have no full stop, and a full sentence that is
                the beginning of the other is skipped without it.

        Raises:
            UserError: no such file, or lines that do not pair up.
        """
        return cls.from_source(clams.read(language_or_path, case, folder, answers, capitalise, end))

    @classmethod
    def multiblimp(
        cls,
        language: str,
        phenomenon: str | None = None,
        path: str | Path | None = None,
        answers: str = "single",
    ) -> Task:
        """Agreement in one language of MultiBLiMP (Jumelet et al., arXiv 2504.02768).

        The word that differs need not be the last; with `answers="single"` the words after it are ignored.

        Args:
            language: ISO 639-3, such as "fra".
            phenomenon: such as "SV-#"; all when None.
            path: a folder with `<language>/data.tsv`, or a file with the columns `sen` and `wrong_sen` and, if it has
                several languages, `language`; None downloads the hub dataset jumelet/multiblimp.
            answers: "single" compares the word that differs, "multi" full sentences.

        Raises:
            UserError: no such file, language or phenomenon, or a row that lacks a key.
        """
        return cls.from_source(multiblimp.read(language, phenomenon, path, answers))

    @classmethod
    def ioi(cls, path: str | Path | None = None, n: int = 200, seed: int = 0) -> Task:
        """Indirect-object identification (Wang et al., arXiv 2211.00593), paired by who gives.

        Args:
            path: a file with the keys of `sva`; None generates items.
            n: number of generated items.
            seed: seed for the draw.

        Raises:
            UserError: the file cannot be read, or n exceeds the possible items.
        """
        return cls.from_source(ioi.read(path, n, seed))

    @classmethod
    def induction(cls, tokenizer: Any, n: int = 200, length: int = 8, seed: int = 0) -> Task:
        """Induction: random single-token words, repeated; the repetition stops, and must continue like the original.

        Args:
            tokenizer: the models' tokenizer, such as `snapshots.tokenizer`.
            n: number of items.
            length: number of words in the sequence.
            seed: seed for the draw.

        Raises:
            UserError: n or length out of range, or a tokenizer with too few single-token words.
        """
        return cls.from_items("induction", induction_items(tokenizer, n, length, seed))

    @classmethod
    def local(
        cls,
        path: str | Path,
        columns: Mapping[str, str] | None = None,
        *,
        name: str | None = None,
        answers: str = "single",
    ) -> Task:
        """A task from a file: JSON lines, a JSON array, csv or tsv with a header, parquet.

        Args:
            path: .jsonl, .json, .ndjson, .csv, .tsv or .parquet.
            columns: keys or columns of "prefix", "correct", "wrong" and "patch_prefix" that have other names, such as
                `{"correct": "verb"}`. By default "patch_prefix" is read from the rows that have it.
            name: name of the task; that of the file by default.
            answers: "single" or "multi", see `Task`.

        Raises:
            UserError: the file cannot be read, a row lacks a key, or `columns` has an unknown part.
        """
        return cls.from_source(plain.read(path, columns, name, answers))

    @classmethod
    def hub(
        cls,
        repository: str,
        config: str | None = None,
        split: str = "train",
        columns: Mapping[str, str] | None = None,
        *,
        name: str | None = None,
        answers: str = "single",
    ) -> Task:
        """A task from a dataset of the Hugging Face hub; other arguments as in `local`.

        Args:
            repository: such as "user/dataset".
            config: its configuration, if it has several.
            split: its split.
            name: name of the task; that of the configuration or repository by default.

        Raises:
            UserError: no such dataset, configuration or split, no connection, or a missing column.
        """
        columns = plain.complete_columns(columns)
        rows = corpora.read_hub(repository, config, split)
        items = [corpora.make_item(row, columns) for row in rows]
        return cls.from_items(name or config or repository.rpartition("/")[2], items, answers)

    @classmethod
    def demo(cls, construction: str, language: str | None = None, n: int = 200, seed: int = 0) -> Task:
        """Agreement in the demo's language (`crosslens.synthetic.grammar`), paired by the number of the head noun.

        Args:
            construction: "simple", "pp", "subj_rel", "obj_rel" or "within_rc".
            language: "en" or "fr"; None pools both.
            n: items per language.
            seed: seed for the draw.

        Raises:
            UserError: an unknown construction or language, or n exceeds the possible items.
        """
        return cls.from_source(demo.read(construction, language, n, seed))

    def prompts(self, tokenizer: Any, prepend_bos: bool = True, max_length: int | None = None) -> Prompts:
        """Tokenise the items by the rule of `crosslens.tasks.prompts`; arguments as in `prompts.encode`.

        Raises:
            UserError: no item is usable, or the task's answers are "multi".
        """
        if self.answers != "single":
            raise UserError(
                f"task {self.name!r} compares answers of several tokens (answers='multi'), which attribution does not "
                "support: use Task.accuracy, or a task whose answers differ in one token"
            )
        prompts = encode(tokenizer, self.items, prepend_bos, max_length)
        self._check_usable(prompts, "whose answers differ in one token of this tokenizer")
        return prompts

    def strings(self, tokenizer: Any, prepend_bos: bool = True, max_length: int | None = None) -> Answers:
        """Prompts with both answers, of any number of tokens; arguments as in `crosslens.tasks.prompts.encode_answers`.

        Raises:
            UserError: no item is usable.
        """
        answers = encode_answers(tokenizer, self.items, prepend_bos, max_length)
        self._check_usable(answers, "with two answers that this tokenizer tells apart")
        return answers

    def _check_usable(self, prompts: Prompts | Answers, wanted: str) -> None:
        if not len(prompts):
            reasons = list_counts(prompts.skipped, prompts.examples)
            raise UserError(
                f"task {self.name!r}: none of its {len(self)} items is usable ({reasons}): give items {wanted}, with "
                "prompts that fit the model's context"
            )

    def accuracy(
        self,
        snapshots: Snapshots,
        *,
        batch_size: int = 256,
        prepend_bos: bool = True,
        settings: ModelSettings | None = None,
    ) -> pd.DataFrame:
        """How often the correct answer is preferred: a row per snapshot; a tie counts as half.

        Args:
            snapshots: the models; prompts longer than their context are skipped.
            batch_size: prompts per forward pass.
            prepend_bos: begin prompts with the BOS token.
            settings: how the models run; None is `ModelSettings()`.

        Returns:
            task, snapshot, label, step, tokens, accuracy, low and high (Wilson's 95 % interval), at_chance (whether
            that covers .5), metric (mean difference of the logits, or of the summed log-probabilities), n (items), few
            (n is below 20), skipped (unusable items) and reasons (why, with counts), merged (duplicates) and
            merged_reasons.

        Raises:
            UserError: no usable item, or a snapshot with non-finite logits.
        """
        encode_items = self.prompts if self.answers == "single" else self.strings
        prompts = encode_items(snapshots.tokenizer, prepend_bos, snapshots.n_ctx)
        return accuracy_table(self.name, snapshots, prompts, batch_size, settings or ModelSettings(), self.merged)

    def split(self, seed: int = 0) -> tuple[Task, Task]:
        """Split at random, by `seed`, into two halves that share no prefix, paired prefixes included.

        Raises:
            UserError: all items are connected by shared prefixes.
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
            raise UserError(f"task {self.name!r} cannot be split: shared prefixes link all items; add unrelated ones")
        random.Random(f"split {seed}").shuffle(drawn)
        halves: tuple[list[int], list[int]] = ([], [])
        for group in drawn:
            min(halves, key=len).extend(group)
        one, other = (
            replace(self, items=tuple(self.items[i] for i in sorted(half)), duplicates=0, same_prompt=0)
            for half in halves
        )
        return one, other
