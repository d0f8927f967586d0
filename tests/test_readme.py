"""The code of the README and of the tour, typed from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import crosslens as cl

ROOT = Path(__file__).parent.parent


def run_page(page: str) -> dict[str, Any]:
    """The names that a page defines: every block but the last, whose models are on the hub, in one namespace."""
    text = (ROOT / page).read_text(encoding="utf-8")
    *local, hub = re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)
    assert local and "pythia" in hub
    names: dict[str, Any] = {}
    for number, code in enumerate(local):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


@pytest.mark.exhaustive
def test_the_readme_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("README.md")
    assert names["ie"].effects.shape == (names["cc"].cfg.d_sae, len(names["snaps"]))


@pytest.mark.exhaustive
def test_the_tour_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("docs/tour.md")
    assert isinstance(names["cc"], cl.crosscoders.BatchTopKCrosscoder)
    assert (tmp_path / "my-crosscoder" / "cfg.json").is_file()
    assert names["ie"].agreement[-1] > 0.7  # rank correlation with 50 exact effects
