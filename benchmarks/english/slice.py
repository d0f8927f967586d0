"""Make what the tutorial *Real English* reads: two snapshots of a small model, and a crosscoder with few features.

    python benchmarks/english/slice.py --out english-slice

It is the study at a size of two minutes: the same pretraining, the same commands. Without `--text` the English is that
of the manual which Python brings (`pydoc_data.topics`), some 700 kB; files are as for `scripts/pretrain_english.py`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

ROOT = Path(__file__).resolve().parents[2]
STEPS = (40, 400)
"""After single words, and at the end."""
PRETRAINING = shlex.split(
    "--layers 3 --d-model 96 --heads 4 --vocab-size 2048 --context-size 64 --batch-size 32 --eval-rows 64 "
    f"--steps {STEPS[-1]} --snapshots {','.join(map(str, STEPS))} --precision fp32"
)
TRAINING = shlex.split(
    "--hook blocks.1.hook_resid_post --sample-by paragraph --context-size 64 --n-tokens 100_000 --d-sae 384 --k 16 "
    "--training-tokens 500_000 --batch-size 1024 --lr 1.5e-3 --dead-tokens 25_000 --seeds 2"
)


def write_manual(path: Path) -> None:
    """Paragraphs of Python's manual in groups of about 2,000 characters, which blank lines separate."""
    documents, held = list[str](), list[str]()
    for topic in (topics[name] for name in sorted(topics)):
        for paragraph in re.split(r"\n\s*\n", topic):
            held.append(" ".join(paragraph.split()))
            if sum(map(len, held)) > 2000:
                documents.append("\n".join(held))
                held = []
    path.write_text("\n\n".join([*documents, "\n".join(held)]) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, help="documents, separated by blank lines; also .gz")
    parser.add_argument("--out", type=Path, default=Path("english-slice"))
    args = parser.parse_args()

    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    text = args.text
    if text is None:
        text = out / "manual.txt"
        write_manual(text)
    snapshots, run = out / "snapshots", out / "run"
    script = ROOT / "scripts" / "pretrain_english.py"
    commands = (
        [str(script), "--text", str(text), "--out", str(snapshots), *PRETRAINING],
        ["-m", "crosslens", "train", "--snapshots", str(snapshots), "--dataset", str(text), "--run-dir", str(run),
         "--cache", str(out / "cache"), *TRAINING],
        ["-m", "crosslens", "evolve", str(run)],
    )  # fmt: skip
    for command in commands:
        done = subprocess.run([sys.executable, *command])
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
