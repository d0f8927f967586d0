"""Hooks of mkdocs: what docstrings and notebooks hold that a page of the site does not.

Docstrings are written for the terminal, and hold no HTML: `<label>` in them is text. Tutorials link to each other and
to these pages as files of the repository; their formulas become MathML, which browsers draw without a network.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown


class LiteralTags(Extension):
    """Markdown in which tags are text; what code blocks and other extensions make stays as it is."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.deregister("html")
        md.preprocessors.deregister("html_block")


def on_config(config: Any) -> Any:
    """Add the extension: mkdocs calls this once, before any page."""
    config.markdown_extensions.append(LiteralTags())
    return config


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Links and formulas of a tutorial."""
    if not page.file.src_uri.startswith("tutorials/"):
        return content
    content = re.sub(r'href="([\w.-]+)\.ipynb', r'href="\1.html', content)
    content = re.sub(r'href="\.\./docs/([\w./-]+)\.md', r'href="../\1.html', content)
    # code, styles and scripts may hold a $, too
    parts = re.split(r"(<(pre|code|style|script)\b.*?</\2>)", content, flags=re.S)
    return "".join(part if i % 3 == 1 else _with_formulas(part) for i, part in enumerate(parts) if i % 3 < 2)


def _with_formulas(text: str) -> str:
    blocks = r"\$\$(?P<block>.+?)\$\$|\$(?P<line>[^$\s](?:[^$\n]*[^$\s])?)\$"
    return re.sub(blocks, _formula, text, flags=re.S)


def _formula(found: re.Match[str]) -> str:
    block, line = found.group("block", "line")
    return convert(html.unescape(block or line), display="block" if block else "inline")
