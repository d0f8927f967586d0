"""Hooks of mkdocs: what docstrings and notebooks hold that a page of the site does not.

Docstrings are written for the terminal, and hold no HTML: `<label>` in them is text. Tutorials link to each other and to
these pages as files of the repository.
"""

from __future__ import annotations

import re
from typing import Any

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


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Links of a tutorial, made links of the site."""
    if not page.file.src_uri.startswith("tutorials/"):
        return html
    html = re.sub(r'href="([\w.-]+)\.ipynb', r'href="\1.html', html)
    return re.sub(r'href="\.\./docs/([\w./-]+)\.md', r'href="../\1.html', html)
