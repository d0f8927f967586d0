"""Clean runs, and their features stored as pairs, against dense features."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from crosslens import crosscoders
from crosslens.errors import UserError
from crosslens.intervention import prompt_runs
from crosslens.intervention.prompt_runs import OnRuns, PromptRuns, check_features, on_runs
from crosslens.intervention.splice import CleanRun
from crosslens.snapshots.collection import Snapshots
from crosslens.snapshots.settings import ModelSettings
from crosslens.tasks.task import Task
from tests.plain_model import ITEMS, F, make_crosscoder, slow_runs

UNPAIRED = [*ITEMS, {"prefix": "the king near the dog", "correct": "sees", "wrong": "finds"}]


def dense(tokens: Tensor, features: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Pairs as a matrix; a repeated pair would count twice."""
    return torch.zeros(shape, dtype=values.dtype).index_put_((tokens, features), values, accumulate=True)


@pytest.mark.parametrize("architecture", crosscoders.ARCHITECTURES)
def test_clean_runs_equal_single_batches(snaps: Snapshots, task: Task, architecture: str) -> None:
    cc = make_crosscoder(snaps, architecture)
    runs = PromptRuns(cc, snaps, task, batch_size=2, paired=True)
    assert len(runs) == 4
    seen = torch.zeros(2, F, 3, dtype=torch.bool)
    for batch, run, patch in runs.clean():
        assert patch is not None and batch.patch is not None
        for which, (tokens, found) in enumerate(((batch.tokens, run), (batch.patch, patch))):
            expected = CleanRun.of(cc, snaps, tokens)
            torch.testing.assert_close(found.acts, expected.acts, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.keep, expected.keep) and not found.keep[:, 0].any()
            for s in range(3):
                f = expected.snapshot_acts(cc, s)
                torch.testing.assert_close(found.snapshot_acts(cc, s), f, rtol=1e-4, atol=1e-5)
                seen[which, :, s] |= (f != 0).any(0).any(0)
    assert torch.equal(runs.active, seen[0]) and torch.equal(runs.active_paired, seen[1])
    assert runs.features.tolist() == seen.any(0).any(-1).nonzero().flatten().tolist()
    order = [item for batch in runs.batches for item in batch.index.tolist()]
    again = PromptRuns(cc, snaps, task, batch_size=3, paired=True)
    assert [item for batch in again.batches for item in batch.index.tolist()] == order


@pytest.mark.parametrize("architecture", ["jumprelu_crosscoder", "topk_crosscoder"])
@pytest.mark.parametrize("baseline", ["zero", "mean", "patch"])
def test_changes_and_their_effect_on_the_activation(
    snaps: Snapshots, task: Task, architecture: str, baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_runs, "_MEAN_ENTRIES", F)  # one prompt at a time
    cc = make_crosscoder(snaps, architecture)
    slow, paired = slow_runs(snaps, cc), slow_runs(snaps, cc, "patch_prefix")
    runs = PromptRuns(cc, snaps, task, paired=True)
    for s in range(3):
        mean = torch.cat([run.f[s][1:] for run in slow]).mean(0)
        torch.testing.assert_close(runs.mean_features(s), mean, rtol=1e-4, atol=1e-6)
        n = 0
        for part in runs.at(s):
            assert part.first == n
            n += len(part)
            B, T = part.keep.shape
            expected: list[Tensor] = []
            for item in part.prompts.index.tolist():
                f0 = {"zero": 0 * mean, "mean": mean, "patch": paired[item].f[s]}[baseline]
                expected.append((slow[item].f[s] - f0) * (torch.arange(T) > 0)[:, None])
            chunks = list(part.changes(baseline, runs.mean(s)))
            assert len(chunks) == (B if baseline == "mean" else 1)
            found = torch.zeros(B * T, len(runs.features))
            moved = torch.zeros(B, T, snaps.d_model)
            gradient = torch.randn(B, T, snaps.d_model, generator=torch.Generator().manual_seed(0))
            along = torch.zeros(B * T, len(runs.features))
            for pairs in chunks:
                assert (pairs.tokens.diff() >= 0).all() and pairs.values.all() | (baseline == "mean")
                found += dense(pairs.tokens, pairs.features, pairs.values, found.shape)
                along += dense(pairs.tokens, pairs.features, part.along(pairs, gradient), found.shape)
                moved += part.moved(pairs)
            torch.testing.assert_close(
                found.view(B, T, -1), torch.stack(expected)[..., runs.features], rtol=1e-4, atol=1e-5
            )
            W = torch.stack([cc.decode_snapshot(row, s, bias=False) for row in torch.eye(F)])[runs.features]
            torch.testing.assert_close(part.directions, W)
            torch.testing.assert_close(part.bias, cc.decode_snapshot(torch.zeros(F), s))
            torch.testing.assert_close(moved.flatten(0, 1), found @ W, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(along, found * (gradient.flatten(0, 1) @ W.T), rtol=1e-4, atol=1e-5)
            clean = torch.stack([slow[item].metric(s) for item in part.prompts.index.tolist()])
            torch.testing.assert_close(part.metric(part.clean), clean, rtol=1e-4, atol=1e-5)
            rows = torch.tensor([B - 1, 0, 0])
            torch.testing.assert_close(part.metric(part.clean[rows], rows), clean[rows], rtol=1e-4, atol=1e-5)
        assert n == 4


def test_only_a_block_of_tokens_is_dense(snaps: Snapshots, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for architecture in crosscoders.ARCHITECTURES:
        cc = make_crosscoder(snaps, architecture)
        whole = [run.features for _, run, _ in PromptRuns(cc, snaps, task, paired=False).clean()]
        monkeypatch.setattr(prompt_runs, "_DENSE_ENTRIES", 3 * F)
        blocks = [run.features for _, run, _ in PromptRuns(cc, snaps, task, paired=False).clean()]
        monkeypatch.undo()
        torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-6)


def test_activations_on_disk(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "jumprelu_crosscoder")
    memory, disk = (
        PromptRuns(cc, snaps, task, batch_size=2, paired=True, on_disk=on_disk) for on_disk in (False, True)
    )
    for ours, theirs in zip(memory.clean(), disk.clean(), strict=True):
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert a is not None and b is not None
            assert torch.equal(a.acts, b.acts) and torch.equal(a.features, b.features)


def test_features_are_stored_as_pairs(snaps: Snapshots, task: Task) -> None:
    """One value if all snapshots share it, one per snapshot if gates differ; nothing of size d_sae."""
    shared = PromptRuns(make_crosscoder(snaps, "topk_crosscoder"), snaps, task, paired=True)
    gated = PromptRuns(make_crosscoder(snaps, "jumprelu_crosscoder"), snaps, task, paired=True)
    for found in shared._clean.found:
        assert found.values.untyped_storage().nbytes() == 4 * len(found.tokens)
    assert any(found.values.stride(1) for found in gated._clean.found)
    kept = sum(batch.tokens.numel() - len(batch.tokens) for batch in shared.batches)
    assert sum(len(found.tokens) for found in shared._clean.found) <= 2 * 8 * kept


def test_paired_runs_leave_out_prompts_without_a_pair(snaps: Snapshots) -> None:
    cc = make_crosscoder(snaps, "standard_crosscoder")
    some = Task.from_items("some", UNPAIRED)
    assert len(PromptRuns(cc, snaps, some, paired=False)) == 5
    assert len(PromptRuns(cc, snaps, some, paired=True)) == 4


def test_special_tokens_are_spliced_if_training_kept_them(
    snaps: Snapshots, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_runs, "_MEAN_ENTRIES", F)
    cc = make_crosscoder(snaps, "standard_crosscoder")
    cc.cfg.metadata.keep_special = True
    runs = PromptRuns(cc, snaps, task, paired=False)
    clean = [run for _, run, _ in runs.clean()]
    mean = torch.cat([run.features.flatten(0, 1) for run in clean]).mean(0)
    for part, run in zip(runs.at(0), clean, strict=True):
        assert run.keep.all() and run.features[:, 0].any() and part.keep.all()
        found = torch.zeros(part.keep.numel(), len(runs.features))
        for pairs in part.changes("mean", runs.mean(0)):
            found += dense(pairs.tokens, pairs.features, pairs.values, found.shape)
        expected = (run.features.flatten(0, 1) - mean)[:, runs.features]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_models_run_at_first_use(snaps: Snapshots, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = PromptRuns(make_crosscoder(snaps, "topk_crosscoder"), snaps, task, paired=False)
    with monkeypatch.context() as patch:
        patch.setattr(prompt_runs, "harvest", None)
        assert len(runs) == 4
        with pytest.raises(TypeError):
            runs.mean(0)
    assert runs.mean(0).shape == runs.features.shape


def test_prompts_are_paired_if_half_of_them_can_be(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")
    n = len(PromptRuns(cc, snaps, task))
    for n_alone, paired in ((0, True), (n // 2, True), (n // 2 + 1, False), (n, False)):
        items = (replace(item, patch_prefix=None) if i < n_alone else item for i, item in enumerate(task.items))
        runs = PromptRuns(cc, snaps, replace(task, items=tuple(items)))
        assert (runs.paired, len(runs)) == (paired, n - n_alone if paired else n)
    assert not PromptRuns(cc, snaps, task, paired=False).paired


def test_analyses_take_crosscoder_snapshots_and_task_in_place_of_runs(snaps: Snapshots, task: Task) -> None:
    cc = make_crosscoder(snaps, "topk_crosscoder")

    @dataclass
    class Method:
        baseline: str

    @on_runs
    def analyse(runs: PromptRuns, k: int = 1, *, method: str | Method = "ig", baseline: str | None = None) -> Any:
        """Analyse."""
        return runs, k, method, baseline

    runs = PromptRuns(cc, snaps, task, paired=False)
    assert analyse(runs, 3, baseline="zero") == (runs, 3, "ig", "zero")
    for options, paired in (
        ({}, True),  # the task is paired
        ({"baseline": "mean"}, False),
        ({"baseline": "patch"}, True),
        ({"method": Method("patch")}, True),
        ({"method": Method("patch"), "baseline": "zero"}, False),
        ({"method": Method("zero"), "baseline": "patch"}, True),
    ):
        made, k, method, baseline = analyse(cc, snaps, task, 2, **options)
        assert (made.crosscoder, made.snapshots, made.task, made.paired) == (cc, snaps, task, paired)
        assert (k, method, baseline) == (2, options.get("method", "ig"), options.get("baseline"))
    assert isinstance(analyse, OnRuns) and analyse.__doc__ == "Analyse."
    assert list(inspect.signature(analyse).parameters) == ["runs", "k", "method", "baseline"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'n'"):
        analyse(cc, snaps, task, n=1)


def test_errors_are_one_line(snaps: Snapshots, task: Task) -> None:
    assert check_features(torch.tensor([3, 0]), 4).tolist() == [3, 0]
    for wrong, message in (
        ([4], r"feature 4 is not in \[0, 3\]"),
        ([0, -1], r"feature -1 is not in \[0, 3\]"),
        ([], "no features are given"),
        ([1, 1], "a feature is given twice"),
    ):
        with pytest.raises(UserError, match=message):
            check_features(wrong, 4)
    cc = make_crosscoder(snaps, "standard_crosscoder")
    with pytest.raises(UserError, match="trained on 3 snapshots, but 1 were given"):
        PromptRuns(cc, snaps[[0]], task, paired=False)
    with pytest.raises(UserError, match=r"the crosscoder is on cpu and the models would run on meta: .*to\('meta'\)"):
        PromptRuns(cc, snaps, task, settings=ModelSettings(device="meta"), paired=False)
    with pytest.raises(UserError, match="which the 'patch' baseline needs; use 'zero' or 'mean'"):
        PromptRuns(cc, snaps, Task.from_items("one", UNPAIRED[-1:]), paired=True)
    with pytest.raises(UserError, match=r"longer than 32 tokens\)"):
        PromptRuns(
            cc,
            snaps,
            Task.from_items("long", [{"prefix": "the cat " * 20, "correct": "sees", "wrong": "a"}]),
            paired=False,
        )
    with pytest.raises(UserError, match="answers='multi'"):
        PromptRuns(cc, snaps, Task.from_items("multi", ITEMS, answers="multi"), paired=False)
