"""README, documentation and tutorials mention only what exists: names, arguments, files, commands and options."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import crosslens as cl
from crosslens.cli import app as cli

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING")),
    *sorted((ROOT / "docs").glob("*.md")),
    *TUTORIALS,
]
every_page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


def read(path: Path) -> str:
    """A page as Markdown; cells of code become blocks, and lines for the shell blocks of their own."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    parts: list[str] = []
    for cell in json.loads(text)["cells"]:
        source = re.sub("^( +)%pip .*$", r"\1pass", "".join(cell["source"]), flags=re.M)
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        shell = re.compile(r"^!((?:.*\\\n)*.*)$", re.M)
        parts += [f"```bash\n{line}\n```" for line in shell.findall(source.replace("{crosslens}", "crosslens"))]
        parts.append(f"```python\n{shell.sub('', source)}\n```")
    return "\n\n".join(parts)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(path), flags=re.M | re.S)


def lookup(dotted: str) -> Any:
    """What `cl.a.b` stands for; AttributeError where there is no such name."""
    found: Any = cl
    for name in dotted.split(".")[1:]:
        found = getattr(found, name)
    return found


@every_page
def test_names_exist(path: Path) -> None:
    """`cl.name` and `cl.package.name` in code or prose, and what code imports."""
    for dotted in set(re.findall(r"\bcl\.[A-Za-z]\w*(?:\.[A-Za-z]\w*)*", read(path))):
        lookup(dotted)
    for node in (node for code in blocks(path, "python") for node in ast.walk(ast.parse(code))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("crosslens"):
            module = importlib.import_module(node.module)
            assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]


@every_page
def test_arguments_exist(path: Path) -> None:
    """Keyword arguments of calls of `cl.name(...)`."""
    nodes = (node for code in blocks(path, "python") for node in ast.walk(ast.parse(code)))
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        if not re.fullmatch(r"cl(\.\w+)+", ast.unparse(call.func)):
            continue
        parameters = inspect.signature(lookup(ast.unparse(call.func))).parameters
        if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
            continue
        assert {word.arg for word in call.keywords if word.arg} <= set(parameters), ast.unparse(call)


@every_page
def test_commands_and_options_exist(path: Path) -> None:
    verbs = {name: each for each in cli.app.subapps for name in each.name}
    for line in (line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()):
        words = shlex.split(line, comments=True)
        if "crosslens" not in words or words[0] in ("pip", "git"):
            continue
        verb, *rest = words[words.index("crosslens") + 1 :]
        assert verb in verbs, line
        known = {name for each in verbs[verb].assemble_argument_collection() for name in each.names}
        asked = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert asked <= known | {"--help", "--help-all"}, line


@every_page
def test_files_exist(path: Path) -> None:
    """Paths of this repository in backticks, and the targets of relative links."""
    text = read(path)
    named = re.findall(r"`((?:crosslens|tests|benchmarks|docs|tutorials)/[\w./-]+)`", text)
    assert not [each for each in named if not (ROOT / each).exists()]
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    assert not [each for each in links if not (path.parent / each).exists()]


def test_pictures_are_small_and_shown() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert f"(pictures/{picture.name})" in text and picture.stat().st_size < 150_000, picture.name


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r": ([\w/]+\.md)$", nav, re.M))


def test_the_map_has_every_package_and_only_files_that_exist() -> None:
    text = read(ROOT / "docs" / "contributing.md")
    listed: list[str] = []
    for packages, _, files in (row.strip("|").split("|") for row in text.splitlines() if row.startswith("| `")):
        homes = [ROOT / "crosslens" / name for name in re.findall(r"`(\w+)`", packages)]
        listed += [home.name for home in homes]
        for file in re.findall(r"`([\w/]+(?:\.py|/))`", files):
            assert any((home / file).exists() for home in homes), file
    assert sorted(listed) == sorted(path.parent.name for path in (ROOT / "crosslens").glob("*/__init__.py"))


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: crosslens\.(?:\w+\.)*(\w+)$", text, re.M))
    assert set(cl.__all__) <= shown | {"recipes"}
