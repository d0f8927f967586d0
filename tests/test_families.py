"""The table of families against figures written out by hand, and its errors word for word."""

from __future__ import annotations

import pytest

from crosslens.errors import UserError
from crosslens.families import FAMILIES, pythia_revisions, repository, revisions

PAPER = """0 2 4 8 16 32 64 128 256 512 1000 2000 3000 4000 5000 6000 7000 8000 9000 10000
14000 20000 27000 34000 47000 60000 74000 87000 100000 114000 127000 143000"""


def test_pythia_has_the_154_checkpoints_that_transformer_lens_lists() -> None:
    from transformer_lens.loading_from_pretrained import PYTHIA_CHECKPOINTS

    rows = pythia_revisions("14m", "all")
    assert len(rows) == 154
    assert [row.step for row in rows] == list(PYTHIA_CHECKPOINTS)


def test_the_papers_32_steps() -> None:
    rows = pythia_revisions("160m", "paper")
    assert [row.step for row in rows] == [int(step) for step in PAPER.split()]
    assert len(rows) == 32
    assert pythia_revisions("160m") == rows


def test_a_row_is_label_revision_step_tokens() -> None:
    assert pythia_revisions("1.4b-deduped", [143_000, 1]) == [
        ("step1", "step1", 1, 2_097_152),
        ("step143000", "step143000", 143_000, 299_892_736_000),
    ]


def test_every_named_set_of_every_family_exists() -> None:
    for name, family in FAMILIES.items():
        assert family.name == name
        assert list(family.steps) == sorted(set(family.steps))
        for steps in family.step_sets:
            assert revisions(name, family.sizes[0], steps)
    assert len(FAMILIES["pythia"].sizes) == 20


def test_repository() -> None:
    assert repository("pythia", "6.9b-deduped") == "EleutherAI/pythia-6.9b-deduped"


@pytest.mark.parametrize(
    ("size", "steps", "message"),
    [
        ("160M", "paper", "pythia has no size '160M'.*14m, 31m.*12b-deduped; did you mean '160m'"),
        ("14m", [1500], r"at step 1500: the nearest are 1000 and 2000 \(0, 1, 2, 4, ..., 512, then every"),
        ("14m", [0, 144_000], "no checkpoint at step 144000: the nearest are 143000 "),
        ("14m", [-1], "no checkpoint at step -1: the nearest are 0 "),
        ("14m", "papers", "no step set 'papers': choose one of paper, all.*did you mean 'paper'"),
        ("14m", [], "steps is empty"),
        ("14m", [0, 8, 8], "step 8 is given more than once"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest_that_does(
    size: str, steps: str | list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pythia_revisions(size, steps)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match="unknown family 'pithia': choose one of pythia; did you mean 'pythia'"):
        repository("pithia", "14m")
