"""Measure the report of a large run: seconds, memory, bytes on disk, and the time until its pages can be read.

    python benchmarks/report.py [--features 16384] [--snapshots 32] [--tasks 3] [--keep FOLDER]

Makes a run directory with random tables of realistic size, and builds its report in a separate process. If playwright
and Chromium are installed, opens pages from disk, each in a new browser profile.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from crosslens.rundir import RunDir

VOCABULARY = 50_000
EXAMPLES, SAMPLES, WINDOW, CONTEXT, LOGITS, NEAREST = 8, 12, 8, 24, 8, 8
PROMPTS, POSITIONS = 16, 12
VISITS = 5


def make_run(folder: Path, F: int, S: int, n_tasks: int, seed: int = 0) -> RunDir:
    """A run directory of F features and S snapshots."""
    import torch  # not at the top: the process that builds the report must not load it

    from crosslens.evolution.lifecycles import classify_lifecycles

    rng = np.random.default_rng(seed)
    steps = [0, *np.unique(np.geomspace(1, 143_000, S - 1).round().astype(int) + np.arange(S - 1)).tolist()]
    labels = [f"step{step}" for step in steps]
    common = pd.DataFrame(
        {"snapshot": range(S), "label": labels, "step": steps, "tokens": [step * 2_097_152 for step in steps]}
    )
    run = RunDir(folder)
    run.write_json(
        {"model": "synthetic", "hook_name": "blocks.6.hook_resid_post", "d_sae": F, "architecture": "synthetic",
         "snapshots": common.to_dict("records")}
    )  # fmt: skip
    grown = np.linspace(0, 1, S)
    tasks = [f"task_{i}" for i in range(n_tasks)]
    run.save_table(
        "accuracy",
        pd.concat([common.assign(task=task, accuracy=0.5 + grown / 2, accuracy_low=0.45 + grown / 2,
                                 accuracy_high=0.55 + grown / 2, metric=grown, n=200) for task in tasks]),
    )  # fmt: skip
    run.save_table(
        "evaluation",
        common.assign(explained_variance=0.9, explained_variance_per_token=0.89, l0=64.0, ce_clean=4 - grown, kl=0.1,
                      ce_spliced=4.1 - grown, ce_zero=9.0, ce_recovered=0.98, dead_fraction=0.05),
    )  # fmt: skip
    birth = rng.integers(0, S, F)[:, None]
    there = np.arange(S) >= birth
    norms = np.where(there, 1.0, 0.05) * np.exp(-0.05 * np.abs(np.arange(S) - birth - 2)) * rng.uniform(0.5, 2, (F, 1))
    alive = rng.random(F) > 0.05
    life = classify_lifecycles(torch.from_numpy(norms))
    life.loc[~alive] = pd.NA
    r2 = 0.5 * norms / norms.max(1, keepdims=True)
    long = pd.DataFrame({"feature": np.repeat(np.arange(F), S), "snapshot": np.tile(np.arange(S), F)})
    long["label"] = labels * F
    for name, values in (("norm", norms), ("r2", r2)):
        long[name] = values.astype(np.float32).flatten()
    run.save_table("evolution", long)
    rates = rng.uniform(0, 0.02, F) * alive
    shares = rng.dirichlet(np.ones(S), F).astype(np.float32)
    run.save_table(
        "encoder",
        pd.DataFrame(shares, columns=pd.Index([f"share/{label}" for label in labels])).assign(feature=range(F)),
    )
    first = pd.DataFrame({"feature": np.arange(F), "alive": alive, "kind": "contextual", "firing_rate": rates})
    lives = pd.concat([first, life], axis=1)
    lifecycles = [lives.assign(measure=measure) for measure in ("r2", "norm")]
    run.save_table("lifecycles", pd.concat(lifecycles, ignore_index=True))
    for task in tasks:
        _save_task(run, task, common, np.flatnonzero(alive), rng)
    _save_features(run, labels, np.flatnonzero(alive), F, rng)
    return run


def _save_task(run: RunDir, task: str, common: pd.DataFrame, features: np.ndarray, rng: np.random.Generator) -> None:
    S, n = len(common), len(features)
    ie = (rng.standard_t(2, (n, S)) * 0.01).astype(np.float32)
    table = {
        "feature": np.repeat(features, S), "snapshot": np.tile(np.arange(S), n),
        "label": np.tile(common["label"], n), "step": np.tile(common["step"], n), "ie": ie.flatten(),
        "ie_se": np.abs(ie).flatten() / 4, "relie": (np.abs(ie) / np.abs(ie).sum(1, keepdims=True)).flatten(),
    }  # fmt: skip
    table["share_relie"], table["reldec"] = table["relie"], np.full(n * S, 1 / S)
    run.save_table(f"attribution/{task}", pd.DataFrame(table))
    run.save_table(
        f"attribution/{task}.snapshots",
        common[["snapshot", "label", "step"]].assign(
            metric_clean=1.0, metric_baseline=0.1, error_effect=0.1, completeness_error=1e-4, n=150, method="removal"
        ),
    )
    places = pd.DataFrame(
        {"prompt": np.repeat(range(PROMPTS), POSITIONS), "position": np.tile(range(POSITIONS), PROMPTS)}
    )
    places["token"] = [f" word{i}" for i in rng.integers(0, 999, len(places))]
    prompts = places.merge(common[["snapshot", "label", "step"]], how="cross")
    effect = rng.normal(size=len(prompts))
    prompts = prompts.assign(effect=effect, feature=rng.choice(features, len(prompts)), feature_effect=effect)
    run.save_table(f"prompts/{task}", prompts)


def _save_features(run: RunDir, labels: list[str], alive: np.ndarray, F: int, rng: np.random.Generator) -> None:
    S, n = len(labels), len(alive) * EXAMPLES
    vocabulary = pd.Index([f" token{i}" for i in range(VOCABULARY)], dtype=object)

    def tokens(size: int) -> pd.Categorical:
        # a few tokens make up most of the text
        return pd.Categorical.from_codes((VOCABULARY * rng.random(size) ** 3).astype(np.int32), vocabulary)

    feature, rank = (
        np.repeat(alive, EXAMPLES).astype(np.int32),
        np.tile(np.arange(EXAMPLES, dtype=np.int16), len(alive)),
    )
    position = rng.integers(CONTEXT, 1000, n).astype(np.int32)
    reads = {f"read/{label}": rng.normal(size=n).astype(np.float32) for label in labels}
    run.save_table(
        "examples",
        pd.DataFrame({"feature": feature, "rank": rank, "sequence": rng.integers(0, 100, n), "position": position,
                      "activation": np.full(n, 3, np.float32), "threshold": np.zeros(n, np.float32), **reads}),
    )  # fmt: skip

    def around(table: pd.DataFrame, places: np.ndarray) -> pd.DataFrame:
        W, n = len(places), len(table)
        active = rng.uniform(0, 3, n * W) * (rng.random(n * W) < 0.2)
        return pd.DataFrame(
            {
                "feature": np.repeat(table["feature"], W), "rank": np.repeat(table["rank"], W), "token": tokens(n * W),
                "position": np.repeat(table["position"], W) + np.tile(places, n).astype(np.int32),
                "activation": np.where(np.tile(places == 0, n), 3, active).astype(np.float32),
            }
        ).reset_index(drop=True)  # fmt: skip

    near, far = np.arange(-WINDOW, WINDOW + 1), np.arange(-CONTEXT, CONTEXT + 1)
    found = pd.DataFrame({"feature": feature, "rank": rank, "position": position})
    run.save_table("example_tokens", around(found, near))
    run.save_table("example_contexts", around(found, far[np.abs(far) > WINDOW]))
    n = len(alive) * SAMPLES
    samples = pd.DataFrame(
        {"feature": np.repeat(alive, SAMPLES).astype(np.int32),
         "rank": np.tile(np.arange(SAMPLES, dtype=np.int16), len(alive)),
         "sequence": rng.integers(0, 100, n), "position": rng.integers(CONTEXT, 1000, n).astype(np.int32),
         "activation": np.full(n, 3, np.float32), "threshold": np.zeros(n, np.float32)}
    )  # fmt: skip
    run.save_table("samples", samples)
    run.save_table("sample_tokens", around(samples, far))
    bins = pd.DataFrame({"feature": np.repeat(alive, 20).astype(np.int32), "bin": np.tile(range(-10, 10), len(alive))})
    run.save_table("activations", bins.assign(count=rng.integers(1, 1000, len(bins))))
    size = F * S * LOGITS
    lens: dict[str, Any] = {
        "feature": np.repeat(np.arange(F, dtype=np.int32), S * LOGITS),
        "snapshot": np.tile(np.repeat(np.arange(S, dtype=np.int16), LOGITS), F),
        "rank": np.tile(np.arange(LOGITS, dtype=np.int16), F * S),
    }
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        lens[name] = tokens(size)
        lens[f"{name}_logit"] = (sign * rng.uniform(0.1, 2, size)).astype(np.float32)
    run.save_table("lens", pd.DataFrame(lens))
    nearest = {
        "feature": np.repeat(np.arange(F, dtype=np.int32), NEAREST),
        "rank": np.tile(np.arange(NEAREST, dtype=np.int16), F),
        "other": rng.integers(0, F, F * NEAREST).astype(np.int32),
        "cosine": rng.uniform(-0.1, 1, F * NEAREST).astype(np.float32),
    }
    run.save_table("nearest", pd.DataFrame(nearest))


def _peak() -> int:
    """Peak memory of this process in KiB; `ru_maxrss` would include that of its parent before the fork."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def build(folder: Path) -> None:
    """Build the report of a run directory, and print the seconds and peak memory it took as JSON."""
    started = time.perf_counter()
    from crosslens.report import write_report

    imported = time.perf_counter()
    before = _peak()
    write_report(folder)
    ended = time.perf_counter()
    peak = _peak()
    print(json.dumps({"imports": imported - started, "seconds": ended - imported, "before": before, "peak": peak}))


def visit(report: Path, features: list[int]) -> dict[str, list[list[float]]]:
    """Seconds until a page can be read and until its first figure is drawn, by page; empty without a browser."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return {}
    found: dict[str, list[list[float]]] = {}
    ready = {
        "index": "#accuracy", "evolution": "#evolution", "causal": "#tasks", "task-task_0": "#effects",
        "features": "#finder:not([hidden]) tbody tr", "feature": "#lens tbody tr",
    }  # fmt: skip
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for number in features:
            for name, selector in ready.items():
                context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
                page = context.new_page()
                began = time.perf_counter()
                part = f"#{number}" if name == "feature" else ""
                page.goto((report / f"{name}.html").as_uri() + part, wait_until="commit")
                page.wait_for_selector(selector, state="attached")
                readable = time.perf_counter() - began
                if name not in ("features", "causal"):  # tables alone
                    page.wait_for_selector(".plot .main-svg", state="attached")
                found.setdefault(name, []).append([readable, time.perf_counter() - began])
                context.close()
        browser.close()
    return found


def main() -> None:
    """Make a run, build its report, visit its pages, print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=16_384)
    parser.add_argument("--snapshots", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="write the run to this folder and keep it")
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.build:
        build(asked.build)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary) / "run"
        run = make_run(folder, asked.features, asked.snapshots, asked.tasks)
        tables = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        command = [sys.executable, __file__, "--build", str(folder)]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        files = [path for path in run.report.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        largest = max((path.stat().st_size for path in run.report.glob("data/features-*.js")), default=0)
        print(
            f"{asked.features:,} features x {asked.snapshots} snapshots, {asked.tasks} tasks; "
            f"tables {tables / 2**20:,.0f} MiB"
        )
        print(f"built in {measured['seconds']:.1f} s, plus {measured['imports']:.1f} s of imports")
        print(
            f"peak memory {measured['peak'] / 2**10:,.0f} MiB, {measured['before'] / 2**10:,.0f} MiB before the start"
        )
        print(
            f"on disk {size / 2**20:,.0f} MiB in {len(files)} files; largest feature script {largest / 2**20:.2f} MiB"
        )
        step = max(1, asked.features // VISITS)
        visits = visit(run.report, list(range(0, asked.features, step))[:VISITS])
        if not visits:
            print("pages were not opened: playwright or Chromium is missing")
        for name, times in visits.items():
            readable, drawn = ([row[k] for row in times] for k in (0, 1))
            print(
                f"{name}.html: readable after {statistics.median(readable):.2f} s, first figure after "
                f"{statistics.median(drawn):.2f} s (medians of {len(times)}, maxima {max(readable):.2f} and "
                f"{max(drawn):.2f})"
            )


if __name__ == "__main__":
    main()
