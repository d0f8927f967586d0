"""The documentation: every public name stands in the reference."""

from __future__ import annotations

import re
from pathlib import Path

import crosslens as cl

PAGES = Path(__file__).parent.parent / "docs" / "api"


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    names = set(cl.__all__) - {"recipes"}
    assert len(names) > 80
    assert not [name for name in sorted(names) if not re.search(rf"^::: crosslens\.[\w.]+\.{name}$", text, re.M)]
