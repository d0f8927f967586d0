"""Execute the tutorials and store their outputs, with a picture of every figure.

    python scripts/run_tutorials.py [first_crosscoder three_seeds ...]

Each notebook runs offline from top to bottom, with two threads, in a new kernel and an empty folder. A figure is stored
as a PNG only: GitHub and the site draw no Plotly JSON, and its digits change with every execution. What depends on the
machine is left out: progress bars, whatever is written to stderr, the path of the folder, and timings. Pictures need
kaleido, and Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import base64
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kaleido
import nbformat
from nbclient import NotebookClient

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
ENVIRONMENT = {
    "COLUMNS": "120",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PLOTLY_RENDERER": "plotly_mimetype",
    "TQDM_DISABLE": "1",
    "WANDB_MODE": "offline",
}
PLOTLY = "application/vnd.plotly.v1+json"


def clean(output: Any, folder: str) -> Any:
    """What is stored of an output: None, or the output without what depends on the machine."""
    if output.output_type == "stream":
        if output.name == "stderr":
            sys.stderr.write(output.text)
            return None
        output.text = plain(output.text, folder)
        return output
    output.metadata = {}
    figure = output.data.get(PLOTLY)
    if figure:
        size = {name: figure["layout"].get(name, default) for name, default in (("width", 800), ("height", 400))}
        drawn = {"data": figure["data"], "layout": figure["layout"]}
        picture = kaleido.calc_fig_sync(drawn, opts={"format": "png", **size})
        output.data = {"image/png": base64.b64encode(picture).decode()}
    for kind in ("text/plain", "text/html"):
        if kind in output.data:
            output.data[kind] = plain(output.data[kind], folder)
    return output


def plain(text: str, folder: str) -> str:
    """Text without the path of the folder, lines that a terminal rewrites, durations, and what the machine has left."""
    text = re.sub(r"^.*\r(?!\n)", "", text.replace("\r\n", "\n"), flags=re.M).replace(folder, ".")
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # bold and faint
    text = re.sub(r"[\d,.]+( tokens/s\b| s\b(?! ago))", r"…\1", text)
    return re.sub(r"[\d,]+ ([KMG]iB) (free|allowed)", r"… \1 \2", text)


def merge_streams(outputs: list[Any]) -> list[Any]:
    """One output for what was printed in several pieces."""
    merged: list[Any] = []
    for output in outputs:
        if merged and output.output_type == merged[-1].output_type == "stream":
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def execute(path: Path) -> tuple[float, float]:
    """Run a notebook and store it; returns the seconds that it took, and those of CPU time, without the pictures."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=600,
            startup_timeout=180,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        began, used = time.perf_counter(), cpu_seconds()
        client.execute()
        took = time.perf_counter() - began, cpu_seconds() - used
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = merge_streams([kept for output in cell.outputs if (kept := clean(output, folder))])
    notebook.metadata = METADATA
    nbformat.write(notebook, path)
    return took


def cpu_seconds() -> float:
    """CPU time of the processes that were started and have ended: kernels, and what they ran."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="tutorials, all by default")
    names = parser.parse_args().names or sorted(path.stem for path in TUTORIALS.glob("*.ipynb"))
    os.environ.update(ENVIRONMENT)
    kaleido.start_sync_server()
    try:
        for name in names:
            took, used = execute(TUTORIALS / f"{name}.ipynb")
            sys.stdout.write(f"{name}: {took:.0f} s, {used:.0f} s of CPU time\n")
            sys.stdout.flush()
    finally:
        kaleido.stop_sync_server()


if __name__ == "__main__":
    main()
