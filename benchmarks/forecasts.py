"""What `crosslens plan` forecasts, beside what is measured: time, memory and disk of harvest, train and evolve.

    python benchmarks/forecasts.py run.toml [--report]

The file is one of `crosslens train`, or of `crosslens run` with a table [train]; it names a cache and a run directory,
both of which do not exist yet. Every command is a process of its own, with one thread: seconds are CPU seconds of user
and system, which other programs hardly change; memory is the kernel's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measure

from crosslens.cli.config_file import parse_toml

VERBS = ("harvest", "train", "evolve")


def call(*arguments: str | Path) -> tuple[str, float, int]:
    """Run a command of crosslens; what it printed on stdout, its CPU seconds, and its peak memory in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "crosslens", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"crosslens {arguments[0]} failed, see above")
    return out, used.ru_utime + used.ru_stime, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare(path: Path) -> tuple[str, list[Any]]:
    """The sizes of the run in words, and a row per command."""
    contents = dict(parse_toml(path))
    train = contents.get("train", contents)
    run_dir = train.get("run_dir", contents.get("run_dir"))
    planned = json.loads(call("plan", "--config", path, "--json")[0])
    commands = {"evolve": ("evolve", run_dir)}
    rows: list[Any] = []
    for verb in VERBS:
        _, seconds, memory = call(*commands.get(verb, (verb, "--config", path)))
        forecast = planned["forecasts"][verb]
        rows.append({"verb": verb, "time": (forecast["seconds"], seconds), "memory": (forecast["memory"], memory)})
    files = (file for file in Path(train["cache"]).rglob("*") if file.is_file())
    rows[0]["disk"] = planned["plan"]["cache_bytes"], sum(file.stat().st_size for file in files)
    plan, steps = planned["plan"], planned["steps"]
    sizes = (
        f"S = {plan['n_snapshots']}, D = {plan['d_model']}, F = {train['d_sae']:,}, k = {train.get('k', '-')}; "
        f"{plan['n_tokens']:,} tokens and {plan['n_held_out']:,} held out; {steps['n']:,} steps of {steps['tokens']:,}."
    )
    return sizes, rows


def table(rows: list[Any]) -> str:
    """Forecast, measured, and the ratio of the two."""

    def pair(key: str, unit: float, form: str) -> Any:
        def show(row: Any) -> str:
            if key not in row:
                return "-"
            forecast, found = row[key]
            return f"{forecast / unit:{form}} / {found / unit:{form}} = {forecast / found:.2f}"

        return show

    return measure.markdown(
        rows,
        {
            "command": lambda row: row["verb"],
            "CPU seconds: forecast / measured": pair("time", 1, ".0f"),
            "memory, GB": pair("memory", 1e9, ".2f"),
            "disk, GB": pair("disk", 1e9, ".3f"),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="options of a run, a .toml")
    parser.add_argument("--report", action="store_true", help="write benchmarks/reports/<date>-forecasts-…")
    arguments = parser.parse_args()
    sizes, rows = compare(arguments.config)
    body = f"{sizes}\n\n{table(rows)}"
    print(body)
    if arguments.report:
        packages = ("crosslens", "torch", "transformer-lens", "scipy", "scikit-learn")
        name = f"forecasts-{arguments.config.stem}"
        print(measure.write_report(name, "Forecasts beside measurements", body, "cpu", 1, packages))


if __name__ == "__main__":
    main()
