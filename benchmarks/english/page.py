"""Write the table of claims into the page, from the summary and from what was made of it.

    python benchmarks/english/page.py

`summary.json` has the numbers, `verdicts.toml` for each claim the readings that are shown and the verdict; a test holds
that nobody changed the table in `docs/english.md` by hand. With `--draw` the picture of the loss and of the accuracy is
made again, too; it needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from crosslens.cli.config_file import parse_toml
from crosslens.errors import UserError
from crosslens.rundir import write_text

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "english.md"
HEAD = "| claim | where from | seen here | verdict |"
VERDICTS = ("replicated", "in part", "not at this scale", "contradicted", "not measured")


def number(value: Any) -> str:
    """A number with as many digits as are read."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if float(value).is_integer() and abs(value) >= 1 or value == 0:
        return f"{value:,.0f}"
    if abs(value) < 0.1:
        return f"{value:.2g}" if abs(value) >= 0.0005 else "0.000"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def describe(reading: dict[str, Any]) -> str:
    """A reading with its interval and its null."""
    text = f"{reading['what']}: **{number(reading['value'])}**"
    if reading["low"] is not None:
        text += f" [{number(reading['low'])}, {number(reading['high'])}]"
    return text if reading["null"] is None else f"{text}, null {number(reading['null'])}"


def render(claims: dict[str, Any], verdicts: dict[str, Any]) -> str:
    """The table, a row per claim.

    Raises:
        UserError: a verdict of no claim, or none of a claim, or a reading that the summary does not have.
    """
    if other := claims.keys() ^ verdicts.keys():
        raise UserError(f"{sorted(other)[0]!r} is in one of summary.json and verdicts.toml only: run summary.py again")
    lines = [HEAD, "|---|---|---|---|"]
    for name, chosen in verdicts.items():
        if chosen["verdict"] not in VERDICTS:
            raise UserError(f"{name}: {chosen['verdict']!r} is none of {', '.join(VERDICTS)}")
        readings = {reading["what"]: reading for reading in claims[name].get("readings", [])}
        if unknown := [what for what in chosen["show"] if what not in readings]:
            raise UserError(f"{name} has no reading {unknown[0]!r}; it has {'; '.join(readings)}")
        seen = "; ".join(describe(readings[what]) for what in chosen["show"])
        note = chosen.get("note", "")
        text = ". ".join(part for part in (seen, note) if part)
        lines.append(f"| {claims[name]['claim']} | {claims[name]['source']} | {text} | **{chosen['verdict']}** |")
    return "\n".join(lines)


def put(page: str, rows: str) -> str:
    """The page with these rows in the place of its table."""
    before, _, rest = page.partition(HEAD)
    after = rest.partition("\n\n")[2]
    return f"{before}{rows}\n\n{after}"


def draw(summary: dict[str, Any], path: Path) -> None:
    """The loss and the accuracy over pretraining, one above the other."""
    import matplotlib.pyplot as plt

    figure, (loss, accuracy) = plt.subplots(2, 1, figsize=(8, 7), sharex=True)
    curve = summary["pretraining"]["curve"]
    for part, words in (("train", "training text"), ("held_out", "held-out documents")):
        loss.plot([1 + row["step"] for row in curve], [row[part] for row in curve], label=words)
    loss.set(ylabel="loss (nats per token)", xscale="log")
    loss.legend(frameon=False)
    for i, (name, rows) in enumerate(summary["accuracy"]["tasks"].items()):
        rows = sorted(rows, key=lambda row: row["step"])
        steps = [1 + row["step"] for row in rows]
        style, words = "-" if i < 10 else "--", name.replace("_", " ")  # there are ten colours
        (line,) = accuracy.plot(steps, [row["accuracy"] for row in rows], style, label=words)
        ends = ([row[f"accuracy_{end}"] for row in rows] for end in ("low", "high"))
        accuracy.fill_between(steps, *ends, color=line.get_color(), alpha=0.12, linewidth=0)
    accuracy.axhline(0.5, color="grey", linestyle=":")
    accuracy.set(xlabel="1 + step", ylabel="accuracy (dotted: chance)", xscale="log", ylim=(0, 1))
    accuracy.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draw", action="store_true", help="make docs/pictures/english.png, too")
    args = parser.parse_args()
    summary = json.loads((FOLDER / "summary.json").read_text(encoding="utf-8"))
    rows = render(summary["study"]["claims"], dict(parse_toml(FOLDER / "verdicts.toml")))
    write_text(PAGE, put(PAGE.read_text(encoding="utf-8"), rows))
    if args.draw:
        draw(summary, PAGE.parent / "pictures" / "english.png")


if __name__ == "__main__":
    main()
