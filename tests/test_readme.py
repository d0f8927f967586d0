"""The code of the README, typed from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import crosslens as cl

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.exhaustive
def test_the_readme_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block but the last, whose models are on the hub, one after the other in one namespace."""
    monkeypatch.chdir(tmp_path)
    *local, hub = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert len(local) == 4 and "pythia" in hub
    names: dict[str, Any] = {}
    for number, code in enumerate(local):
        exec(compile(code, f"README.md, block {number}", "exec"), names)
    assert isinstance(names["cc"], cl.crosscoders.BatchTopKCrosscoder)
    assert (tmp_path / "my-crosscoder" / "cfg.json").is_file()
    assert names["ie"].agreement[-1] > 0.7  # rank correlation with 50 exact effects
