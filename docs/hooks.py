"""Hooks of mkdocs: formulas, links of the tutorials, literal tags, and the tables of a run.

Formulas, `$...$` and `$$...$$` on pages and in tutorials, become MathML, which browsers draw without a network.
Tutorials link to each other and to these pages as files of the repository. Docstrings are written for the terminal and
hold no HTML: `<label>` in them is text. The page "Tables of a run" ends with what `crosslens.tables` declares, the page
"Snapshots and data" with the families of models, and tables of options say what `--help` says.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown

from crosslens.cli.app import app
from crosslens.snapshots.families import read_table
from crosslens.tables import render_markdown

FORMULA = r"\$\$(?P<block>.+?)\$\$|\$(?P<line>[^$\s](?:[^$\n]*[^$\s])?)\$"
MARKDOWN_CODE = r"^```.*?^```|`[^`]*`"
TABLES = "<!-- the declarations in crosslens/tables.py follow -->"
FAMILIES = "<!-- the table in crosslens/snapshots/families.json follows -->"
OPTIONS = r"^\| option \|(?P<rest>.*)\n\|---\|"
HTML_CODE = r"<(?P<tag>pre|code|style|script)\b.*?</(?P=tag)>"


class LiteralTags(Extension):
    """Markdown in which tags are text; what code blocks and other extensions make stays as it is."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.deregister("html")
        md.preprocessors.deregister("html_block")


def on_config(config: Any) -> Any:
    """Add the extension: mkdocs calls this once, before any page."""
    config.markdown_extensions.append(LiteralTags())
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Add the tables of a run, and hide formulas from Markdown, which would read `_` and backslashes in them."""
    if page.file.src_uri.endswith(".ipynb"):
        return markdown
    markdown = explain_options(markdown.replace(TABLES, render_markdown()).replace(FAMILIES, list_families()))

    def hide(found: re.Match[str]) -> str:
        return f"\ue000{found[0].encode().hex()}\ue001" if found["block"] or found["line"] else found[0]

    return re.sub(f"{MARKDOWN_CODE}|{FORMULA}", hide, markdown, flags=re.M | re.S)


def list_families() -> str:
    """A table of the families that are known by name."""
    rows = [
        f"| `{name}` | {', '.join(f'`{size}`' for size in entry['sizes'])} | {_cell(entry['about'])} |"
        for name, entry in read_table().items()
    ]
    return "\n".join(["| family | sizes | snapshots, and where that is from |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    """Text such as `<|endoftext|>` in a table, where a bar would end the cell."""
    return html.escape(text).replace("|", "&#124;")


def explain_options(markdown: str) -> str:
    """Add a column to tables of options of `crosslens train`: what they do, from the classes in `crosslens.config`."""
    if not re.search(OPTIONS, markdown, re.M):
        return markdown
    found = app["train"].assemble_argument_collection(parse_docstring=True)
    told = {name: " ".join(str(each.parameter.help).split()) for each in found for name in each.names}

    def explain(row: re.Match[str]) -> str:
        about = " ".join(told[name] for name in re.findall(r"`(--[\w-]+)`", row[1]))
        return f"| {row[1]} | {html.escape(about, quote=False).replace('|', '&#124;')} |"

    markdown = re.sub(OPTIONS, "| option | what it does |\\g<rest>\n|---|---|", markdown, flags=re.M)
    return re.sub(r"^\| (`--.*?) \|", explain, markdown, flags=re.M)


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Draw formulas, and turn links between files into links between pages."""
    content = re.sub("\ue000([0-9a-f]+)\ue001", lambda found: html.escape(bytes.fromhex(found[1]).decode()), content)
    content = re.sub(f"{HTML_CODE}|{FORMULA}", draw, content, flags=re.S)
    if page.file.src_uri.startswith("tutorials/"):
        content = re.sub(r'href="([\w.-]+)\.ipynb', r'href="\1.html', content)
        content = re.sub(r'href="\.\./docs/([\w./-]+)\.md', r'href="../\1.html', content)
    return content


def draw(found: re.Match[str]) -> str:
    block, line = found["block"], found["line"]
    if not (block or line):
        return found[0]
    drawn = convert(html.unescape(block or line), display="block" if block else "inline")
    if re.search(r">[^<]*\\[a-zA-Z]", drawn):
        raise ValueError(f"a command that latex2mathml does not know, in {found[0]}")
    return drawn
