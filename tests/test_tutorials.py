"""Tutorials, run as notebooks from top to bottom in a kernel of their own, offline, and compared with what they say.

`tests/tutorials/NAME.py` holds the checks of the tutorial NAME: one cell for each section that `# %% Section` names. It
runs at the end of that section and sees its variables, so that what the prose states is compared with what comes out.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
CHECKS = Path(__file__).parent / "tutorials"
every_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> list[str]:
    """What a cell puts out, apart from stderr and from how figures are encoded."""
    found = [output for output in cell.outputs if output.get("name") != "stderr"]
    names = [output.get("name") or min(set(output.data) - {"text/plain"}, default="text/plain") for output in found]
    figures = {"image/png", "application/vnd.plotly.v1+json"}
    return [name for name, _ in groupby("figure" if name in figures else name for name in names)]


def add_checks(notebook: Any, text: str) -> None:
    """Put a cell of checks at the end of every section that has one."""
    checks = dict(re.findall(r"^# %% (.*)\n((?:(?!# %% ).*\n)*)", text, re.M))
    cells: list[Any] = []
    section = ""
    for cell in notebook.cells:
        headings = re.findall(r"^## (.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []
        if headings:
            if section in checks:
                cells.append(nbformat.v4.new_code_cell(checks.pop(section)))
            section = headings[-1]
        cells.append(cell)
    if section in checks:
        cells.append(nbformat.v4.new_code_cell(checks.pop(section)))
    assert not checks, f"no section is named {list(checks)}"
    notebook.cells = cells


@pytest.mark.exhaustive
@every_tutorial
def test_it_runs_and_says_what_comes_out(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel "python3" is that of the interpreter that runs the tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("PLOTLY_RENDERER", "plotly_mimetype")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a busy machine has no cores for threads that spin
    notebook = nbformat.read(path, as_version=4)
    stored = {cell.id: kinds(cell) for cell in code_cells(notebook)}
    add_checks(notebook, (CHECKS / f"{path.stem}.py").read_text(encoding="utf-8"))
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", resources=where, timeout=600, startup_timeout=180).execute()
    cells = [cell for cell in code_cells(notebook) if cell.id in stored]
    assert {cell.id: kinds(cell) for cell in cells} == stored, "execute scripts/run_tutorials.py"
    texts = [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]
    # of progress bars without widgets
    assert not [text for text in texts if "Warning" in text and "TqdmWarning" not in text]


@every_tutorial
def test_it_is_stored_with_outputs(path: Path) -> None:
    """Pictures and tables, nothing of the machine that made them, and no assertion in a cell that is read."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    cells = code_cells(notebook)
    assert all(cell.execution_count and set(cell.metadata) <= {"tags"} for cell in cells)
    assert not [cell for cell in cells if re.search(r"^\s*assert ", cell.source, re.M)]
    assert "find_spec" in cells[0].source and not cells[0].outputs
    assert sum(bool(cell.outputs) for cell in cells) > 3
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    data = [output.data for output in outputs if "data" in output]
    assert {kind for each in data for kind in each} <= {"image/png", "text/html", "text/plain"}
    assert [each for each in data if "image/png" in each], "no picture"
    texts = [output.get("text", "") for output in outputs] + [each.get("text/plain", "") for each in data]
    assert not [text for text in texts if re.search(r"(?<!\w)/(?:tmp|home|root|work|Users)/|\r|\x1b|it/s\]", text)]


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in TUTORIALS) < 4 * 2**20


def test_each_has_checks() -> None:
    assert [path.stem for path in TUTORIALS] == sorted(path.stem for path in CHECKS.glob("*.py"))
