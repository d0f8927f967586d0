"""Work that is divided among processes gives every process what one process computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crosslens.distributed.together import each, from_first, gathered, in_rounds, rank_and_size, shares, together
from tests.ranks import run_ranks


def test_alone_nothing_is_divided() -> None:
    with together("cpu"):
        assert each(str, range(3)) == list(in_rounds(str, range(3))) == ["0", "1", "2"]
        assert shares(range(5)) == [range(5)] and gathered("x") == ["x"] and rank_and_size() == (0, 1)
        assert from_first(os.getpid) == os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_every_process_gets_the_results_of_all(tmp_path: Path, n: int) -> None:
    def body(rank: int) -> list[object]:
        calls: list[int] = []

        def square(i: int) -> Tensor:
            calls.append(i)
            return torch.full((2,), float(i * i))

        with together("cpu"):
            for divide in (each, in_rounds):
                calls.clear()
                found = [int(x[0]) for x in divide(square, range(n))]
                assert found == [i * i for i in range(n)]
                # one item is for all of them; of several each does its own
                assert calls == ([0] if n == 1 else list(range(rank, n, 3)))
            parts = shares(range(n))
            assert [i for part in parts for i in part] == list(range(n)) and len(parts) == max(1, min(n, 3))
            assert gathered(rank) == [0, 1, 2] and rank_and_size() == (rank, 3)
            first = from_first(os.getpid)
        assert each(square, range(n)) is not None and calls[-n:] == list(range(n))[-n:]  # all, outside of the block
        return [first]

    assert len({one for (one,) in run_ranks(3, tmp_path, body)}) == 1


@pytest.mark.slow
def test_what_is_called_for_one_of_several_items_works_alone(tmp_path: Path) -> None:
    def body(rank: int) -> list[int]:
        def inner(i: int) -> int:
            assert rank_and_size() == (0, 1) and len(shares(range(4))) == 1
            return sum(each(lambda j: i * j, range(3)))

        def single(i: int) -> int:
            assert rank_and_size() == (rank, 2) and len(shares(range(4))) == 2
            return sum(each(lambda j: i + j, range(3)))

        with together("cpu"):
            return [*each(inner, range(4)), *each(single, [5])]

    assert run_ranks(2, tmp_path, body) == [[0, 3, 6, 9, 18]] * 2
