"""MultiBLiMP (Jumelet et al., arXiv 2504.02768): agreement in many languages."""

from __future__ import annotations

import re
from pathlib import Path

from crosslens.errors import UserError
from crosslens.tasks.corpora import Row, existing, read_hub, read_pairs, read_rows, select
from crosslens.tasks.declaration import Format, Spelling, listed
from crosslens.tasks.items import Source, check_answers


def read(
    language: str, phenomenon: str | None = None, path: str | Path | None = None, answers: str = "single"
) -> Source:
    """Agreement in one language; see `Task.multiblimp`."""
    check_answers(answers)
    rows = _rows(language, path)
    if phenomenon is not None:
        rows = select(rows, "phenomenon", phenomenon)
    name = "-".join(("multiblimp", language, *([] if phenomenon is None else [phenomenon])))
    return read_pairs(name, rows, "sen", "wrong_sen", answers, by_verb=True)


def _rows(language: str, path: str | Path | None) -> list[Row]:
    """Rows of one language of MultiBLiMP: from the hub, a folder with `<language>/data.tsv`, or a file.

    Raises:
        UserError: no such language, or a file that cannot be read.
    """
    if path is None:
        rows = read_hub("jumelet/multiblimp", language)
    elif Path(path).is_dir():
        file = existing(Path(path) / language / "data.tsv", language, (each.name for each in Path(path).glob("*")))
        rows = read_rows(file)
    else:
        rows = read_rows(Path(path))
        column = next((name for name in ("language", "lang") if rows and name in rows[0].values), None)
        rows = rows if column is None else select(rows, column, language)
    return [Row(row.where, {"language": language, **row.values}) for row in rows]


def _read(rest: str) -> Source:
    language, _, phenomenon = rest.partition(":")
    return read(language, phenomenon or None)


def _check(rest: str, where: str) -> None:
    if not re.fullmatch(r"[a-z]{3}(:.+)?", rest):
        raise UserError(f"{where} does not name a language, such as fra: give {listed()}")


FORMAT = Format(
    kind="multiblimp",
    title="MultiBLiMP",
    spellings=(
        Spelling(
            text="multiblimp:LANGUAGE",
            python='Task.multiblimp("LANGUAGE")',
            reads="agreement in one language, such as `fra`, from the hub",
        ),
    ),
    read=_read,
    check=_check,
)
