"""What the README and the documentation tell people to type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import crosslens as cl
from crosslens.cli import app as cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)


@pytest.mark.slow
def test_the_readme_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block but the last, whose models are on the hub, typed as it stands, one after the other."""
    monkeypatch.chdir(tmp_path)
    *local, hub = blocks(ROOT / "README.md", "python")
    assert len(local) == 4 and "pythia" in hub and len(local[1].strip().splitlines()) <= 26
    names: dict[str, Any] = {}
    for number, code in enumerate(local):
        exec(compile(code, f"README.md, block {number}", "exec"), names)
    assert (
        isinstance(names["cc"], cl.crosscoders.BatchTopKCrosscoder)
        and (tmp_path / "my-crosscoder" / "cfg.json").is_file()
    )
    assert names["ie"].completeness.max() < 0.01
    assert {"turning", "evolution"} <= set(names["history"]) and "transfer/pp" in names["study"].tables


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_command_and_option_exists(path: Path) -> None:
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for block in blocks(path, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "crosslens" not in words or words[0] in ("pip", "git"):
                continue
            verb, *rest = words[words.index("crosslens") + 1 :]
            assert verb in verbs, line
            known = {option for parameter in verbs[verb].params for option in parameter.opts}
            assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, line


def test_code_names_what_exists() -> None:
    """`cl.name` in any block of code or line of prose is a public name."""
    for path in PAGES:
        for name in re.findall(r"\bcl\.(\w+)", path.read_text(encoding="utf-8")):
            assert hasattr(cl, name), f"{path.name}: cl.{name}"
