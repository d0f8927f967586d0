"""Tutorials, run as notebooks from top to bottom in a kernel of their own, offline. Cells hold the assertions."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_every_cell_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel "python3" is that of the interpreter that runs the tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a busy machine has no cores for threads that spin
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, kernel_name="python3", resources=where, timeout=600, startup_timeout=180).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert sum(bool(cell.outputs) for cell in cells) > 3
    texts = [output.text for cell in cells for output in cell.outputs if output.output_type == "stream"]
    # of progress bars without widgets
    assert not [text for text in texts if "Warning" in text and "TqdmWarning" not in text]
