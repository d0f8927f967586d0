"""CLAMS evaluation sets (Mueller et al. 2020): lines of `True` or `False`, a tab and a sentence, in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from crosslens.errors import UserError, did_you_mean, shortened
from crosslens.tasks.corpora import GROUP, Row, divide, existing, make_pair, read_pairs, read_text
from crosslens.tasks.declaration import Format, Spelling, check_file
from crosslens.tasks.items import Source, check_answers


def read(
    language_or_path: str | Path,
    case: str | None = None,
    folder: str | Path | None = None,
    answers: str | None = None,
    capitalise: bool = False,
    end: str = "",
) -> Source:
    """A task from a set; see `Task.clams`."""
    check_answers(answers or "single")
    path = Path(language_or_path)
    info: dict[str, str] = {}
    if path.suffix != ".txt":
        path = _file(str(language_or_path), case, folder)
        info = {"language": str(language_or_path), "case": path.stem}
    rows = _rows(path, capitalise, end, info)
    name = "-".join(("clams", *info.values())) if info else path.stem
    if answers is None:
        prefixes = (make_pair(row, "good", "bad", "single").prefix for row in rows)
        answers = "single" if all(prefixes) else "multi"
    return read_pairs(name, rows, "good", "bad", answers)


def _rows(path: Path, capitalise: bool, end: str, info: Mapping[str, str]) -> list[Row]:
    """Rows of `good` and `bad` from a raw CLAMS file: lines of `True|False<TAB>sentence`, in pairs.

    Sentences are capitalised on request and get `end` appended; rows also have the columns of `info`.

    Raises:
        UserError: the file cannot be read, a line has another format, or both lines of a pair are right or wrong.
    """
    lines = [(i, line.strip()) for i, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    sentences: list[tuple[int, str, str]] = []
    for number, line in lines:
        verdict, _, sentence = line.partition("\t")
        if verdict not in ("True", "False") or not sentence.strip():
            raise UserError(
                f"{path}, line {number}: {shortened(repr(line))} is not 'True' or 'False', a tab, and a sentence"
            )
        sentence = sentence.strip() + end
        sentences.append((number, verdict, sentence[0].upper() + sentence[1:] if capitalise else sentence))
    if len(sentences) % 2:
        raise UserError(
            f"{path} has {len(sentences)} sentences, an odd number: give pairs of a correct and a wrong one"
        )
    rows: list[Row] = []
    for (number, verdict, sentence), (other_number, *other) in zip(sentences[::2], sentences[1::2], strict=True):
        found = {verdict: sentence, other[0]: other[1]}
        if len(found) == 1:
            raise UserError(f"{path}, lines {number} and {other_number} are both {verdict}: pairs must be adjacent")
        values = {"good": found["True"], "bad": found["False"], GROUP: _head(found["True"], found["False"], path.stem)}
        rows.append(Row(f"{path}, line {number}", {**values, **info}))
    return rows


def _head(good: str, bad: str, case: str) -> str:
    """The head noun with its determiner: the first two words or, within a relative clause, those before the verb."""
    words = divide(good, bad, "single")[0].split()[-2:] if "within" in case else good.split()[:2]
    return " ".join(words).lower()


def _file(language: str, case: str | None, folder: str | Path | None) -> Path:
    """Path of a CLAMS evaluation set: `<folder>/<language>_evalset/<case>.txt`.

    Raises:
        UserError: it does not exist.
    """
    if folder is None or case is None:
        raise UserError(
            f"CLAMS {language!r}, {case!r}: the evaluation sets are not on the hub: clone "
            "github.com/aaronmueller/clams and give a language, a case and the folder, such as "
            "clams('fr', 'simple_agrmt', 'clams'), or a .txt file"
        )
    cases = Path(folder) / f"{language}_evalset"
    if not cases.is_dir():
        present = [each.name.removesuffix("_evalset") for each in sorted(Path(folder).glob("*_evalset"))]
        raise UserError(
            f"{folder} has no {cases.name}: give one of its languages {present}{did_you_mean(language, present)}"
        )
    return existing(cases / f"{case}.txt", case, (each.stem for each in cases.glob("*.txt")))


FORMAT = Format(
    kind="clams",
    title="CLAMS",
    spellings=(
        Spelling(
            text="clams:FILE",
            python='Task.clams("FILE")',
            reads="no columns: lines of `True` or `False`, a tab and a sentence, in pairs",
        ),
    ),
    read=read,
    check=lambda path, where: read(check_file(path, where, (".txt",))),
)
