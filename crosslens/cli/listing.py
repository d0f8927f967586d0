"""`crosslens ls`: model families, the snapshots of a model, releases of crosscoders, and formats of tasks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from crosslens.cli.display import Column, Output, counted, number
from crosslens.pipeline.opening import find_snapshots, parse_steps
from crosslens.tasks.formats import spellings

if TYPE_CHECKING:
    from crosslens.sharing.registry import Release


def list_snapshots(out: Output, what: str, steps: str | None) -> None:
    """Print families, releases, a release, formats of tasks, or the snapshots of a model."""
    from crosslens.sharing.registry import find_release, list_releases
    from crosslens.snapshots import families
    from crosslens.snapshots.folders import list_model, parse_place

    if not what:
        known = families.read_table()
        columns = [Column("family", left=True), Column("sizes", left=True), Column("snapshots", left=True)]
        # the rest of `about`, on how documents end, would fill the terminal
        rows = [(name, _sizes([*entry["sizes"]]), entry["about"].split(". ")[0]) for name, entry in known.items()]
        out.table(
            columns,
            rows,
            note="crosslens ls FAMILY-SIZE lists snapshots, crosslens ls releases crosscoders, crosslens ls tasks how "
            "tasks are written",
        )
        out.end(families={name: {"sizes": [*entry["sizes"]], "about": entry["about"]} for name, entry in known.items()})
        return
    is_folder = Path(what).is_dir()
    if not is_folder and (what == "releases" or what in list_releases()):
        chosen = None if what == "releases" else what
        found = [find_release(chosen)] if chosen else [*list_releases().values()]
        (_show_release if chosen else _show_releases)(out, *found)
        out.end(releases=found)
        return
    if not is_folder and what == "tasks":
        columns = [Column("--task", left=True), Column("reads", left=True)]
        out.table(columns, [(each.text, each.reads.replace("`", "")) for each in spellings()])
        out.end(tasks=spellings())
        return
    model = None
    if not is_folder:
        model = families.pattern_model(what) if "{step" in what else families.match_model(what)
    if model is None:
        rows = [
            (families.Revision(each.label, each.revision or "", each.step, each.tokens), each.is_on_disk())
            for each in find_snapshots(what, steps)()
        ]
    else:
        revisions = model.revisions(parse_steps(steps or "all"), lambda: list_model(model))
        rows = [(row, parse_place(model.where.format(row.revision)).is_on_disk()) for row in revisions]
    revised = any(row.revision for row, _ in rows)
    columns = [Column("snapshot"), *[Column("revision", drop=2)] * revised, Column("trained on")]
    columns.append(Column("on this disk", left=True, drop=1))
    cells = [
        (
            row.label,
            *[row.revision] * revised,
            "" if row.tokens is None else f"{row.tokens:,} tokens",
            "on this disk" if on_disk else "not on this disk",
        )
        for row, on_disk in rows
    ]
    held = sum(on_disk for _, on_disk in rows)
    out.table(columns, cells, note=f"{counted(len(rows), 'snapshot')}, {held:,} on this disk", bare=True)
    out.end(snapshots=[{**row._asdict(), "on_disk": on_disk} for row, on_disk in rows])


def _sizes(sizes: list[str]) -> str:
    """Sizes of a family; those that all exist deduplicated as well, and seeds, are listed once."""
    plain = [one for one in sizes if not one.endswith("-deduped")]
    if len(plain) < len(sizes) and all(f"{one}-deduped" in sizes for one in plain):
        return f"{', '.join(plain)}; each also as SIZE-deduped"
    seeds: dict[str, list[str]] = {}
    for one in sizes:
        found = re.fullmatch(r"(.*(?:gpt2-\w+-|seed))(\d+)", one)
        seeds.setdefault(found[1] if found else one, []).append(found[2] if found else "")
    alike: dict[str, list[str]] = {}  # the same seeds of several sizes
    for name, numbers in seeds.items():
        run = numbers == [str(i + 1) for i in range(len(numbers))]
        size, dash, rest = name.partition("-") if numbers != [""] else (name, "", "")
        alike.setdefault(f"{dash}{rest}{f'1-{len(numbers)}' if run else '/'.join(numbers)}", []).append(size)
    return ", ".join(f"{'/'.join(names)}{rest}" if rest else ", ".join(names) for rest, names in alike.items())


def _show_releases(out: Output, *releases: Release) -> None:
    release, model, place = (Column(name, left=True) for name in ("release", "model", "place"))
    rows = [(each.name, each.model, f"{len(each.entries):,}", each.place) for each in releases]
    out.table([release, model, Column("crosscoders"), place], rows, note="crosslens ls RELEASE lists its crosscoders")


def _show_release(out: Output, release: Release) -> None:
    columns = [Column("id", left=True), Column("hook", left=True), Column("settings", left=True)]
    rows = [
        (
            entry.id, entry.hook_name or "-", ", ".join(f"{key} {value}" for key, value in entry.config.items()),
            number(entry.variance_explained), number(entry.l0, 1),
        )
        for entry in release.entries.values()
    ]  # fmt: skip
    about = (("licence", release.licence), ("data", release.dataset))
    out.table(
        [*columns, Column("EV"), Column("L0")],
        rows,
        title=f"{release.name}: {release.model}, {release.place}",
        note="; ".join(f"{what}: {said}" for what, said in about if said),
    )
