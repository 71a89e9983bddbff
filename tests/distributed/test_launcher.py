"""The launcher of the tests' processes: what ranks return, raise, and what becomes of a hang."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.processes import RankError, rank_outcomes, run_ranks


def _sum(value: float) -> tuple[int, torch.Tensor]:
    total = torch.tensor(value + dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), total


def test_ranks_return_by_rank() -> None:
    found = run_ranks(_sum, 0.5, ranks=3)
    assert [rank for rank, _ in found] == [0, 1, 2]
    assert all(float(total) == 4.5 for _, total in found)


def _one_raises() -> None:
    if dist.get_rank() == 1:
        raise LookupError("no such row")
    dist.barrier()


def _one_is_killed() -> str:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError:
        return "noticed"
    return "missed"


def _one_never_comes() -> None:
    if dist.get_rank() == 0:
        time.sleep(3600)
    dist.barrier()


def test_what_a_rank_raises_is_raised() -> None:
    with pytest.raises(LookupError, match="no such row") as caught:
        run_ranks(_one_raises)
    assert "_one_raises" in str(caught.value.__cause__)


def test_a_killed_rank_is_told() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit code -9"):
        run_ranks(_one_is_killed)
    killed, other = rank_outcomes(_one_is_killed)
    assert killed.exit_code == -signal.SIGKILL
    assert other.value == "noticed"


def test_a_hang_ends_with_its_stack() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)rank 0 was not done within 2 s.*_one_never_comes"):
        run_ranks(_one_never_comes, seconds=2)
