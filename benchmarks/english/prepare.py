"""Put what `english.toml` names into one folder: the text, and the files of the tasks.

    python benchmarks/english/prepare.py --text english_prose.txt.gz --blimp blimp.tar.xz \
        --simple simple_train.json --nounpp nounpp_test.json --ioi ioi.jsonl --snapshots runs/english/seed0

The text is that of `scripts/pretrain_english.py`. BLiMP is the authors' archive, or a folder of its files; agreement
with and without another noun in between are files of feature-circuits. Items of induction are generated from the words
that are one token of the snapshots' tokenizer. The folder `study` in it has some items of each task whose answers
differ in one token, drawn at random from as many groups (head nouns, or prompts) as there are: accuracy is measured on
all items, effects on these.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import crosslens as cl
from crosslens.errors import UserError
from crosslens.pipeline.opening import parse_tasks
from crosslens.tasks.items import Item, groups
from crosslens.tasks.prompts import encode

PARADIGMS = (
    "regular_plural_subject_verb_agreement_1",
    "distractor_agreement_relational_noun",
    "distractor_agreement_relative_clause",
    "determiner_noun_agreement_1",
    "determiner_noun_agreement_with_adjective_1",
    "determiner_noun_agreement_with_adj_irregular_1",
    "anaphor_gender_agreement",
    "irregular_past_participle_verbs",
)
"""Those that compare one word, which effects need."""
WHOLE = (
    "regular_plural_subject_verb_agreement_2",
    "determiner_noun_agreement_2",
    "determiner_noun_agreement_with_adj_2",
    "determiner_noun_agreement_with_adj_irregular_2",
    "irregular_past_participle_adjectives",
)
"""Those that compare sentences, of which only accuracy is measured."""


def copy_paradigms(source: Path, folder: Path) -> None:
    """Copy the paradigms from a folder of .jsonl files, or from an archive with one.

    Raises:
        UserError: one is missing.
    """
    wanted = {f"{name}.jsonl" for name in (*PARADIGMS, *WHOLE)}
    if source.is_dir():
        found = {path.name: path.read_bytes() for path in source.glob("*.jsonl") if path.name in wanted}
    else:
        with tarfile.open(source) as archive:
            members = [member for member in archive if member.isfile() and Path(member.name).name in wanted]
            files = {Path(member.name).name: archive.extractfile(member) for member in members}
            found = {name: file.read() for name, file in files.items() if file is not None}
    if missing := sorted(wanted - found.keys()):
        raise UserError(f"{source} has no {', '.join(missing)}: give BLiMP's archive, or the folder of its files")
    for name, contents in found.items():
        (folder / name).write_bytes(contents)


def write_items(items: Iterable[Item], path: Path) -> None:
    """Write items as a file of a task."""
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            row = {name: getattr(item, name) for name in ("prefix", "correct", "wrong", "patch_prefix", "group")}
            file.write(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")


def draw_items(task: cl.Task, tokenizer: Any, n: int) -> list[Item]:
    """n items of a task that effects can be measured on, in its order; all where it has fewer.

    None is the second of its group before every group has one.
    """
    usable = [task.items[each.item] for each in encode(tokenizer, task.items).usable]
    random.Random(task.name).shuffle(usable)
    seen: Counter[int] = Counter()
    turns: list[int] = []
    for group in groups(usable):
        turns.append(seen[group])
        seen[group] += 1
    by_turn = sorted(range(len(usable)), key=turns.__getitem__)
    chosen = {usable[i] for i in by_turn[:n]}
    return [item for item in task.items if item in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="documents, separated by blank lines; .txt or .txt.gz")
    parser.add_argument("--blimp", type=Path, required=True, help="archive, or folder of .jsonl files")
    parser.add_argument("--simple", type=Path, required=True, help="agreement, as sva:FILE reads it")
    parser.add_argument("--nounpp", type=Path, required=True, help="the same across a phrase with another noun")
    parser.add_argument("--ioi", type=Path, required=True, help="indirect objects, in the same columns")
    parser.add_argument("--snapshots", type=Path, required=True, help="of the pretraining, for their tokenizer")
    parser.add_argument("--n-induction", type=int, default=400, help="items of induction")
    parser.add_argument("--n-items", type=int, default=150, help="items of each task in the folder study, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/english/data"))
    args = parser.parse_args()

    study = args.out / "study"
    study.mkdir(parents=True, exist_ok=True)
    suffix = ".txt.gz" if args.text.suffix == ".gz" else ".txt"
    shutil.copyfile(args.text, args.out / f"prose{suffix}")
    for name in ("simple", "nounpp", "ioi"):
        shutil.copyfile(getattr(args, name), args.out / f"{name}.json")
    copy_paradigms(args.blimp, args.out)
    tokenizer = cl.Snapshots.local(args.snapshots).tokenizer
    write_items(cl.Task.induction(tokenizer, args.n_induction).items, args.out / "induction.jsonl")
    formats = {"simple.json": "sva:", "nounpp.json": "sva:", "ioi.json": "ioi:", "induction.jsonl": ""}
    formats |= {f"{name}.jsonl": "blimp:" for name in PARADIGMS}
    for name, prefix in formats.items():
        [task] = parse_tasks([f"{prefix}{args.out / name}"])
        write_items(draw_items(task, tokenizer, args.n_items), study / f"{task.name}.jsonl")


if __name__ == "__main__":
    main()
