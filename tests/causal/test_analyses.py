"""A study of a task against its analyses, each on its split of the prompts."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from crosslens.causal.ablation import Controls, ablate
from crosslens.causal.analyses import METHODS, Study, study
from crosslens.causal.attribution import SIGNIFICANT_GROUPS, attribute
from crosslens.causal.languages import split_languages
from crosslens.causal.relative import significant
from crosslens.causal.timeline import follow_features
from crosslens.causal.transfer import transfer_matrix
from crosslens.causal.validation import validate
from crosslens.config import StudySizes
from crosslens.crosscoders import Crosscoder
from crosslens.errors import UserError
from crosslens.intervention.prompt_runs import PromptRuns
from crosslens.rundir import RunDir
from crosslens.snapshots.collection import Snapshots
from crosslens.stats import sign_flip_p
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, make_crosscoder, slow_runs

K = 4
SIZES = StudySizes(
    ablate_k=(1, K, 10_000), keep_k=(K,), k=K, n_draws=2, n_draws_last=5, n_exact=6, n_pairs=5, n_bootstrap=20,
    n_read_out=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def task() -> Task:
    """42 items in two languages, alike enough for significant effects."""
    items = [
        {
            **ITEMS[0],
            "prefix": f"{article} {noun} {place} {ITEMS[0]['prefix']}",
            "patch_prefix": f"{article} {noun} {place} {ITEMS[0]['patch_prefix']}",
            "language": language,
        }
        for language, article in (("en", "the"), ("fr", "a"))
        for noun in ("bread", "house", "fish", "king", "cat", "dog", "child")
        for place in ("near", "near the fish near", "near a house near")
    ]
    return Task.from_items("tiny", items)


@pytest.fixture(scope="module")
def crosscoder(snaps: Snapshots) -> Crosscoder:
    return make_crosscoder(snaps, "jumprelu_crosscoder")


@pytest.fixture(scope="module")
def found(crosscoder: Crosscoder, snaps: Snapshots, task: Task) -> Study:
    return study(
        crosscoder, snaps, task, seed=3, sizes=SIZES,
        encoder_share=torch.full((F, 3), 1 / 3), decodability=torch.linspace(0, 1, 3 * F).view(F, 3),
    )  # fmt: skip


def test_tables_equal_single_analyses(crosscoder: Crosscoder, snaps: Snapshots, task: Task, found: Study) -> None:
    selection, held_out = task.split(3)
    ie = attribute(crosscoder, snaps, selection, baseline="patch", n_exact=6, n_bootstrap=20)
    assert ie.estimator.method == "removal" and significant(ie).any()
    runs = PromptRuns(crosscoder, snaps, held_out, paired=True)
    same, tables = pd.testing.assert_frame_equal, found.tables
    same(tables["attribution/tiny"], ie.to_frame(crosscoder.decoder_norms, torch.full((F, 3), 1 / 3)))
    same(tables["attribution/tiny.snapshots"], ie.snapshot_frame().assign(split="selection"))
    ig = attribute(crosscoder, snaps, selection, "ig", baseline="patch").snapshot_frame()
    same(tables["completeness/tiny"], ig.assign(split="selection"))
    checked = validate(runs, ie, baseline="patch", decodability=torch.linspace(0, 1, 3 * F).view(F, 3), seed=3)
    same(tables["validation/tiny"], checked.effects)
    same(tables["validation/tiny.summary"], checked.summary)
    pd.testing.assert_frame_equal(found.tables["transfer/tiny"], transfer_matrix(runs, ie, K, baseline="patch"))
    pd.testing.assert_frame_equal(
        found.tables["timeline/tiny"], follow_features(crosscoder, snaps, selection, ie, 5), check_dtype=False
    )
    controls = Controls(n_draws=5, seed=3, allow_fewer=True)
    last = ablate(runs, ie, [K], baseline="patch", at=[len(snaps) - 1], controls=controls)
    last = last.assign(split="held-out")
    got = found.tables["ablation/tiny"]
    row = got[(got["snapshot"] == 2) & (got["mode"] == "ablate") & (got["features"] == "random") & (got["k"] == K)]
    pd.testing.assert_frame_equal(
        row.reset_index(drop=True), last[last["features"] == "random"].reset_index(drop=True), check_dtype=False
    )
    assert int(row["n_draws"].iloc[0]) == 5
    zeroed = ablate(runs, ie, [K], baseline="zero", controls=Controls(n_draws=2, seed=3, allow_fewer=True))
    same(tables["zeroing/tiny"], zeroed.assign(split="held-out"))
    assert set(zeroed["baseline"]) == {"zero"} and set(got["baseline"]) == {"patch"}
    assert not got.duplicated(["snapshot", "mode", "features", "k"]).any()
    assert set(got.loc[got["mode"] == "ablate", "k"]) == {1, K}, "no size exceeds the active features"


def test_single_features(crosscoder: Crosscoder, snaps: Snapshots, task: Task, found: Study) -> None:
    """Removed from the clean run, and added to the paired one by splices of one prompt at a time."""
    selection = task.split(3)[0]
    largest = found.exact["feature"].tolist()
    assert largest == found.ie.top(6, 2, by="magnitude").tolist()
    singles = attribute(crosscoder, snaps, selection, "exact", baseline="patch", features=largest)
    assert set(found.exact["baseline"]) == {"patch"}
    assert found.exact["removed"].to_numpy() == pytest.approx(singles.effects[largest, 2].numpy(), abs=1e-5)
    items = [{"prefix": i.prefix, "correct": i.correct, "wrong": i.wrong} for i in selection.items]
    clean = slow_runs(snaps, crosscoder, items=items)
    paired = slow_runs(
        snaps,
        crosscoder,
        items=[{**row, "prefix": i.patch_prefix} for row, i in zip(items, selection.items, strict=True)],
    )
    for feature, added in list(zip(largest, found.exact["added"], strict=True))[:3]:
        gains: list[float] = []
        for run, base in zip(clean, paired, strict=True):
            f = base.f[2].clone()
            f[1:, feature] = run.f[2][1:, feature]
            before, after = (base.metric(2, base.decode(each, 2) + base.error(2)) for each in (base.f[2], f))
            gains.append(float(after - before))
        assert added == pytest.approx(np.mean(gains), abs=1e-4)
    for method in METHODS:
        effects = attribute(crosscoder, snaps, selection, method, baseline="patch").effects
        assert found.exact[method].tolist() == effects[largest, 2].tolist()
        both = (found.exact["removed"] + found.exact["added"]) / 2
        assert found.rank_agreement(method) == pytest.approx(spearmanr(found.exact[method], found.exact["removed"])[0])
        assert found.rank_agreement(method, "both") == pytest.approx(spearmanr(found.exact[method], both)[0])
    with pytest.raises(UserError, match="method='exact' must be"):
        found.rank_agreement("exact")
    with pytest.raises(UserError, match="end='start' must be"):
        found.rank_agreement(end="start")


def test_languages(task: Task, found: Study, tmp_path: Path) -> None:
    parts = split_languages(task)
    assert {name: part.items for name, part in parts.items()} == {"en": task.items[:21], "fr": task.items[21:]}
    assert [part.name for part in parts.values()] == ["tiny-en", "tiny-fr"]
    assert set(found.tables["languages/tiny"]["language"]) == {"en"}
    silent = replace(task, items=(*task.items[:-1], replace(task.items[-1], info={})))
    assert split_languages(silent) == {}
    RunDir(tmp_path).save_tables(found.tables)
    for name, table in found.tables.items():
        read = RunDir(tmp_path).table(name)
        assert read is not None
        pd.testing.assert_frame_equal(read, table, check_dtype=False)


def test_a_task_of_two_prompts_is_refused(crosscoder: Crosscoder, snaps: Snapshots, task: Task) -> None:
    two = Task.from_items("two", task.items[:2])
    with pytest.raises(UserError, match="one prompt of task 'two' is usable in this half, and"):
        study(crosscoder, snaps, two)
    with pytest.warns(UserWarning, match="no effect, whatever its size, can be significant"):
        attribute(crosscoder, snaps, two)
    n = SIGNIFICANT_GROUPS
    fewer, enough = (sign_flip_p(*np.array([[groups], [groups]], dtype=float)) for groups in (n - 1, n))
    assert fewer > 0.05 > enough


def test_items_without_a_pair(crosscoder: Crosscoder, snaps: Snapshots, task: Task) -> None:
    unpaired = replace(task, items=tuple(replace(item, patch_prefix=None, info={}) for item in task.items))
    with pytest.raises(UserError, match="patch"):
        study(crosscoder, snaps, unpaired, baseline="patch")
    sizes = StudySizes(ablate_k=(1,), keep_k=(1,), k=3, n_draws=2, n_draws_last=2, n_exact=3, n_pairs=3, n_read_out=1)
    plain = study(crosscoder, snaps, unpaired, sizes=sizes)
    assert plain.ie.estimator.baseline == "zero"
    assert "languages/tiny" not in plain.tables
    assert -1 <= plain.rank_agreement(end="added") <= 1
    longer = replace(task, items=tuple(replace(item, patch_prefix=f"the {item.prefix}") for item in task.items))
    why = r"tiny: baseline zero, because only 0 of .* paired prompt \(the paired prompt has a different number of"
    with pytest.warns(UserWarning, match=why):
        assert study(crosscoder, snaps, longer, sizes=sizes).ie.estimator.baseline == "zero"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "tiny: baseline zero")
        attribute(crosscoder, snaps, longer, baseline="zero")  # it was asked for


def test_dates_follow_what_has_come_since(crosscoder: Crosscoder, snaps: Snapshots, task: Task, found: Study) -> None:
    """A study before `evolve`, and again after it: only the dates are made again."""
    saved: list[str] = []
    accuracy = task.accuracy(snaps)
    births = pd.DataFrame({"feature": range(F), "birth": 1, "birth_low": 0, "birth_high": 2})
    again = study(
        crosscoder, snaps, task, seed=3, sizes=SIZES, known=found.tables, save=lambda tables: saved.extend(tables),
        accuracy=accuracy, births=births,
    )  # fmt: skip
    assert saved == ["dates/tiny"] and found.tables["dates/tiny"]["context"].isna().all()
    assert (again.tables["dates/tiny"]["context"] == 1).all()
    succeeds = again.tables["dates/tiny"]["succeeds"]
    assert succeeds.notna().all() == bool(accuracy["accuracy"].iloc[-1] >= 0.75)


def test_a_study_continues(crosscoder: Crosscoder, snaps: Snapshots, task: Task, found: Study) -> None:
    """Effects that are there are built on, and tables that are there are not made again."""
    left = {name: table for name, table in found.tables.items() if not name.startswith(("ablation", "timeline"))}
    saved: list[str] = []
    again = study(
        crosscoder, snaps, task, seed=3, sizes=SIZES, known=left, save=lambda tables: saved.extend(tables),
        decodability=torch.linspace(0, 1, 3 * F).view(F, 3),
    )  # fmt: skip
    assert saved == ["ablation/tiny", "timeline/tiny"]
    for name in saved:
        pd.testing.assert_frame_equal(again.tables[name], found.tables[name])
    assert again.tables.keys() == found.tables.keys()
    assert again.rank_agreement("ig") == found.rank_agreement("ig")
    of_ig = dict(left)
    of_ig["attribution/tiny.snapshots"] = left["attribution/tiny.snapshots"].assign(
        method="ig", rule="gauss_legendre", n_nodes=20
    )
    with pytest.raises(UserError, match="ranks features by removal"):
        study(crosscoder, snaps, task, seed=3, sizes=SIZES, known=of_ig)
    with pytest.raises(UserError, match="baseline zero: remove"):
        study(crosscoder, snaps, task, seed=3, sizes=SIZES, known=left, baseline="zero")
