"""A hook of mkdocs: `<label>` in a docstring is text. Docstrings are written for the terminal, and hold no HTML."""

from __future__ import annotations

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
