"""The table of families against numbers written by hand, and its error messages."""

from __future__ import annotations

import math
import random
import re
import warnings
from typing import Any

import pytest

from crosslens.errors import UserError
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.families import (
    Model,
    Revision,
    find_model,
    match_model,
    pattern_model,
    read_table,
    spaced,
)

PAPER = """0 2 4 8 16 32 64 128 256 512 1000 2000 3000 4000 5000 6000 7000 8000 9000 10000
14000 20000 27000 34000 47000 60000 74000 87000 100000 114000 127000 143000"""
OLMO = ["main", "step0-tokens0B", *(f"step{n}000-tokens{2 * n}B" for n in range(1, 31)), "step1454000-tokens3048B"]
OLMO2 = [
    *("stage1-step1000-tokens5B", "stage1-step928646-tokens3896B", "main", "stage1-step0-tokens0B"),
    *("stage2-ingredient1-step11931-tokens50B", "stage2-ingredient2-step1000-tokens5B"),
    "stage2-ingredient1-step1000-tokens5B",
]


def revisions(family: str, size: str, *choice: Any) -> list[Revision]:
    return find_model(family, size).revisions(*choice)


def test_pythia_has_the_154_steps_that_transformer_lens_lists() -> None:
    from transformer_lens.loading_from_pretrained import PYTHIA_CHECKPOINTS

    rows = revisions("pythia", "14m", "all")
    assert len(rows) == 154
    assert [row.step for row in rows] == list(PYTHIA_CHECKPOINTS)


def test_the_papers_32_steps() -> None:
    rows = revisions("pythia", "160m", "paper")
    assert [row.step for row in rows] == [int(step) for step in PAPER.split()]
    assert len(rows) == 32
    assert revisions("pythia", "160m", "paper") == rows


def test_a_row_is_label_revision_step_tokens() -> None:
    assert revisions("pythia", "1.4b-deduped", [143_000, 1]) == [
        ("step1", "step1", 1, 2_097_152),
        ("step143000", "step143000", 143_000, 299_892_736_000),
    ]


def test_every_named_set_of_every_model_exists() -> None:
    table = read_table()
    assert {"pythia", "olmo", "olmo2", "bloom"} <= set(table)
    assert len(table["pythia"]["sizes"]) == 20
    for family, entry in table.items():
        for size in entry["sizes"]:
            model = find_model(family, size)
            assert "{" not in model.repository and model.repository.count("/") == 1
            assert match_model(f"{family}-{size}") == model
            if model.steps is not None:
                assert list(model.steps) == sorted(set(model.steps))
            for name in model.sets:
                assert model.revisions(name)


@pytest.mark.parametrize(
    ("family", "size", "expected"),
    [
        ("pythia", "1b", ["step512", "step2000", "step143000"]),
        ("olmo", "1b-0724", ["step2000-tokens4B", "step16000-tokens33B", "step1454000-tokens3048B"]),
        ("bloom", "1b1", ["global_step10000", "global_step100000", "main"]),
    ],
)
def test_the_triplets_of_crosscoding_through_time(family: str, size: str, expected: list[str]) -> None:
    rows = revisions(family, size, "triplet")
    assert [row.revision for row in rows] == expected
    tokens = [row.tokens or 0 for row in rows]
    assert tokens == sorted(tokens) and tokens[0] > 0
    last = {"pythia": 299.9e9, "olmo": 3048e9, "bloom": 341e9}[family]
    assert tokens[-1] == pytest.approx(last, rel=1e-3)


def test_repositories() -> None:
    assert find_model("pythia", "6.9b-deduped").repository == "EleutherAI/pythia-6.9b-deduped"
    assert find_model("olmo", "7b-0724").repository == "allenai/OLMo-7B-0724-hf"
    assert find_model("olmo2", "1b").repository == "allenai/OLMo-2-0425-1B"
    bloom = find_model("bloom", "560m")
    assert (bloom.repository, bloom.tokenizer) == ("bigscience/bloom-560m-intermediate", "bigscience/bloom-560m")
    assert match_model("gpt2") is None and match_model("some-model") is None


def test_revisions_are_read_as_they_are_spelt() -> None:
    olmo = find_model("olmo", "1b-0724")
    assert olmo.parse("step16000-tokens33B") == ("step16000", "step16000-tokens33B", 16_000, 16_000 * 2_097_152)
    olmo2 = find_model("olmo2", "7b")
    assert olmo2.parse("stage1-step150-tokens1B").label == "step150"
    second = olmo2.parse("stage2-ingredient2-step11931-tokens50B")
    assert second.label == "stage2-ingredient2-step11931" and second.step == 928_646 + 11_931
    assert second.tokens == pytest.approx(3_945e9, rel=1e-3)
    assert find_model("bloom", "1b1").parse("global_step1000") == ("step1000", "global_step1000", 1000, 524_288_000)
    assert find_model("bloom", "1b1").parse("main") == ("main", "main", None, 341_000_000_000)
    for wrong in ("step16000", "step16000-tokens33", "xstep16000-tokens33B", "step16000-tokens33Bx", "step-tokens3B"):
        with pytest.raises(UserError, match="olmo-1b-0724 has no revision .*spelt step{step}-tokens{billions}B, or m"):
            olmo.parse(wrong)


def test_revisions_outside_the_table_come_from_the_hubs_list() -> None:
    olmo = find_model("olmo", "1b-0724")
    rows = olmo.revisions("all", lambda: OLMO)
    assert [row.step for row in rows] == [0, *range(1000, 31_000, 1000), 1_454_000]
    assert [r.revision for r in olmo.revisions([3000, 0], lambda: OLMO)] == ["step0-tokens0B", "step3000-tokens6B"]
    # sorted by training order, and without the hub's list
    named = olmo.revisions(["step1454000-tokens3048B", "main", "step16000-tokens33B"], lambda: pytest.fail("asked"))
    assert [row.label for row in named] == ["step16000", "step1454000", "main"]
    with pytest.raises(UserError, match="no snapshot at step 3500: the nearest are 3000 and 4000$"):
        olmo.revisions([3500], lambda: OLMO)
    with pytest.raises(UserError, match="not in the table, and the hub's list .* such as 'step2000-tokens4B'$"):
        olmo.revisions([3000])
    olmo2 = find_model("olmo2", "7b")
    assert [row.step for row in olmo2.revisions("all", lambda: OLMO2)] == [0, 1000, 928_646]
    second = olmo2.revisions("stage2-ingredient1", lambda: OLMO2)
    assert [row.label for row in second] == ["stage2-ingredient1-step1000", "stage2-ingredient1-step11931"]


def test_a_users_pattern() -> None:
    model = pattern_model("me/model@checkpoint-{step}", tokens_per_step=10)
    assert model.revisions([200, 100]) == [
        Revision("step100", "checkpoint-100", 100, 1000),
        Revision("step200", "checkpoint-200", 200, 2000),
    ]
    listed = ["main", "checkpoint-5", "checkpoint-50", "other-7"]
    assert [row.step for row in model.revisions("all", lambda: listed)] == [5, 50]
    with pytest.raises(UserError, match="step 6: the nearest are 5 and 50"):
        model.revisions([6], lambda: listed)
    assert pattern_model("me/model@s{step}-{billions}B").parse("s5-12B").tokens == 12 * 10**9
    assert pattern_model("me/model@s{step}").parse("s5").tokens is None
    for wrong in ("me/model@checkpoint", "me/model@a{step}-{size}", "me/model-{step}@s{step}"):
        with pytest.raises(UserError, match="must contain {step} once, may contain {billions}, and nothing else"):
            pattern_model(wrong)


@pytest.mark.parametrize(
    ("place", "where", "pattern", "name"),
    [
        ("me/model@s{step}", "me/model@{}", "s{step}", "model"),
        ("me/model/ckpt/step{step}", "me/model/ckpt/{}", "step{step}", "ckpt"),
        ("me/model/ckpt/step{step}/hf@v2", "me/model/ckpt/{}@v2", "step{step}/hf", "ckpt"),
        ("me/model/ckpt@s{step}", "me/model/ckpt@{}", "s{step}", "ckpt"),
        ("me/model-{step}-{billions}b", "{}", "me/model-{step}-{billions}b", "model"),
        ("me/model-{step}/hf@v2", "{}/hf@v2", "me/model-{step}", "model"),
        ("me/base@v1+me/lora/checkpoint-{step}", "me/base@v1+me/lora/{}", "checkpoint-{step}", "base"),
        ("me/base+me/lora@s{step}", "me/base+me/lora@{}", "s{step}", "base"),
        ("me/base+me/lora-{step}", "me/base+{}", "me/lora-{step}", "base"),
        ("me/model@s{step}+me/lora", "me/model@{}+me/lora", "s{step}", "model"),
    ],
)
def test_the_step_may_stand_anywhere_in_a_place(place: str, where: str, pattern: str, name: str) -> None:
    model = pattern_model(place)
    assert (model.where, [*model.patterns.values()]) == (where, [pattern])
    spelt = pattern.format(step=70, billions=3)
    assert model.parse(spelt)[:3] == ("step70", spelt, 70)
    assert model.where.format(spelt) == place.format(step=70, billions=3)
    assert model.name == name


def test_every_family_says_where_its_facts_are_from() -> None:
    """And a size beyond those of the table is refused with the nearest."""
    for family, entry in read_table().items():
        assert re.search(r"arXiv \d{4}\.\d{5}|github\.com/|huggingface\.co/", entry["about"]), family
        assert entry.get("tokens_per_step") or "tokens" in entry["about"] or any(
            "tokens_per_step" in size for size in entry["sizes"].values()
        ) or entry.get("counts") == "checkpoints", family  # fmt: skip
    with pytest.raises(UserError, match="stanford has no size 'gpt2-small-22'.*did you mean 'gpt2-small-21'"):
        find_model("stanford", "gpt2-small-22")


def test_the_newer_families() -> None:
    from transformer_lens.loading_from_pretrained import STANFORD_CRFM_CHECKPOINTS
    from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

    gpt2 = find_model("stanford", "gpt2-medium-343")
    assert [row.step for row in gpt2.revisions("all")] == STANFORD_CRFM_CHECKPOINTS
    for size in read_table()["stanford"]["sizes"]:
        assert find_model("stanford", size).repository in OFFICIAL_MODEL_NAMES
    assert gpt2.parse("checkpoint-400000").tokens == 400_000 * 512 * 1024
    assert len(read_table()["polypythias"]["sizes"]) == 51
    assert find_model("polypythias", "160m-data-seed2").repository == "EleutherAI/pythia-160m-data-seed2"
    assert find_model("polypythias", "14m-seed9").steps == find_model("pythia", "14m").steps
    smollm = find_model("smollm3", "3b")
    listed = ["main", "stage1-step-80000", "stage2-step-3480000", "stage1-step-40000", "lc-4k-to-32k-step-4000"]
    assert smollm.revisions("all", lambda: listed) == [
        ("step40000", "stage1-step-40000", 40_000, 94_371_840_000),  # the card says 94.4B
        ("step80000", "stage1-step-80000", 80_000, 188_743_680_000),
    ]
    assert smollm.revisions("stage2", lambda: listed)[0][:3] == ("stage2-step3480000", "stage2-step-3480000", 3_480_000)
    olmoe = find_model("olmoe", "1b-7b")
    assert olmoe.parse("step1220000-tokens5117B").tokens == 5117 * 10**9
    seven = find_model("olmo3", "7b").parse("stage1-step1413814")
    assert seven.tokens == pytest.approx(5.93e12, rel=1e-3)  # the model card
    assert find_model("olmo3", "32b").parse("stage1-step656000").tokens == pytest.approx(5.50e12, rel=1e-3)


def test_checkpoints_that_are_numbered_without_steps() -> None:
    amber = find_model("amber", "7b")
    rows = amber.revisions([358, 7])
    assert [row[:2] for row in rows] == [("ckpt_007", "ckpt_007"), ("ckpt_358", "ckpt_358")]
    assert [row.tokens for row in rows] == [None, None] and len(amber.revisions("all")) == 359
    snaps = Snapshots.from_model(amber, [7, 358, "main"])
    assert (snaps.labels, snaps.steps) == (["ckpt_007", "ckpt_358", "main"], [None, None, None])
    with pytest.raises(UserError, match="no snapshot at step 359: the nearest are 358"):
        amber.revisions([359])


def test_series_by_name_and_by_place() -> None:
    assert Snapshots.series("stanford-gpt2-small-21", [0, 400_000]).labels == ["step0", "step400000"]
    assert Snapshots.series("pythia-14m", "paper") == Snapshots.pythia("14m")
    assert Snapshots.series("me/model@s{step}", [1, 2]).steps == [1, 2]
    for wrong in ("gpt2", "me/model"):
        with pytest.raises(UserError, match="is neither a model of pythia, .*, such as pythia-160m, nor a place with"):
            Snapshots.series(wrong)


def test_pythia_and_polypythias_are_told_apart() -> None:
    places = {"a": "EleutherAI/pythia-70m@step1000", "b": "EleutherAI/pythia-70m-seed1@step1000"}
    with pytest.warns(UserWarning, match="Pythia and PolyPythias differ in lineage: .*issues 142 and 203"):
        Snapshots.of(places)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Snapshots.of({**places, "a": "EleutherAI/pythia-70m-seed2@step1000"})
        Snapshots.of({"a": places["a"], "c": "someone/else"})


def test_even_spacing() -> None:
    pythia = [row.step or 0 for row in revisions("pythia", "14m", "all")]
    assert spaced(pythia, 154, "log") == spaced(pythia, 154, "linear") == pythia
    assert spaced(pythia, 2, "log") == [0, 143_000]
    assert [row.step for row in revisions("pythia", "14m", "linear:12")] == [
        *(0, 13_000, 26_000, 39_000, 52_000, 65_000, 78_000, 91_000, 104_000, 117_000, 130_000, 143_000)
    ]
    assert [row.step for row in revisions("pythia", "14m", "log:8")] == [0, 4, 32, 128, 1000, 5000, 26_000, 143_000]
    draw = random.Random(0)
    for _ in range(30):
        steps = sorted(draw.sample(range(10**5), draw.randint(2, 40)))
        n = draw.randint(2, len(steps))
        for scale in ("log", "linear"):
            chosen = spaced(steps, n, scale)
            assert len(chosen) == n and chosen == sorted(set(chosen)) and set(chosen) <= set(steps)
            assert (chosen[0], chosen[-1]) == (steps[0], steps[-1])
    # if every step exists, each chosen one is nearest to its even position
    whole = list(range(10_001))
    marks = [math.log1p(step) for step in spaced(whole, 9, "log")]
    for k, mark in enumerate(marks):
        assert abs(mark - k * math.log1p(10_000) / 8) < 0.2


@pytest.mark.parametrize(
    ("size", "steps", "message"),
    [
        ("160M", "paper", "pythia has no size '160M'.*14m, 31m.*12b-deduped; did you mean '160m'"),
        ("14m", [1500], "pythia-14m has no snapshot at step 1500: the nearest are 1000 and 2000$"),
        ("14m", [0, 144_000], "no snapshot at step 144000: the nearest are 143000$"),
        ("14m", [-1], "no snapshot at step -1: the nearest are 0$"),
        ("14m", "papers", "no step set 'papers': choose one of paper, triplet, all, log:N, .*did you mean 'paper'"),
        ("14m", "log:155", "log:155 asks for 155 of 154 steps: give a number from 2 to 154"),
        ("14m", "linear:1", "linear:1 asks for 1 of 154 steps"),
        ("14m", "log:x", "no step set 'log:x'"),
        ("14m", [], "steps is empty"),
        ("14m", [0, 8, 8], "step 8 is given more than once"),
        ("14m", ["step1", "stpe2"], "no revision 'stpe2': they are spelt step{step}, or main"),
    ],
)
def test_what_does_not_exist_is_refused_with_the_nearest_that_does(
    size: str, steps: str | list[int], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        revisions("pythia", size, steps)
    assert "\n" not in str(caught.value)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match="unknown family 'pithia': choose one of pythia, .*; did you mean 'pythia'"):
        find_model("pithia", "14m")
    assert isinstance(match_model("pythia-14m"), Model)
