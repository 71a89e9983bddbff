"""What ends a call on ranks that share a vocabulary: an error on one is an error on all."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.support.processes import rank_outcomes, run_ranks
from unilogit_kernels import (
    VocabParallel,
    linear_objective_loss,
    linear_unilogit_loss,
    unilogit_loss,
)
from unilogit_kernels.rows import ranks


def call(**changed: Any) -> torch.Tensor:
    """A call on two ranks of 50 columns each, with something changed on this rank."""
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "hidden": torch.randn(6, 8, requires_grad=True),
        "weight": torch.randn(50, 8, requires_grad=True),
        "labels": torch.arange(6) * 16,
        "vocab_parallel": VocabParallel(),
    } | changed
    loss = linear_unilogit_loss(**given)
    loss.backward()
    return loss.detach()


WRONG: dict[str, dict[str, Any]] = {
    "label": {"labels": torch.tensor([0, 1, 2, 3, 4, 400])},
    "shape": {"labels": torch.arange(5)},
    "dtype": {"weight": torch.randn(50, 8).double()},
    "option": {"softcap": -1.0},
}


def one_is_wrong(name: str) -> tuple[str, str, bool]:
    """One rank's call is wrong, the first or a later one; the next call is as any other."""
    fine = call()
    kind, text = "", ""
    try:
        call(**WRONG[name] if dist.get_rank() == 1 else {})
    except Exception as error:
        kind, text = type(error).__name__, str(error)
    return kind, text, bool(torch.equal(call(), fine))


@pytest.mark.parametrize("name", WRONG)
def test_an_error_on_one_rank_is_raised_on_all(name: str) -> None:
    first, second = run_ranks(one_is_wrong, name, seconds=30)
    assert first == second
    assert first[0] in ("IndexError", "TypeError", "ValueError")
    assert first[2], "the group must stay in step"


def first_call_is_wrong() -> str:
    try:
        call(**WRONG["shape"] if dist.get_rank() == 0 else {})
    except ValueError as error:
        return str(error)
    return ""


def test_an_error_before_the_ranks_know_each_other() -> None:
    first, second = run_ranks(first_call_is_wrong, seconds=30)
    assert first == second != ""


def all_are_wrong() -> float:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="labels must have hidden's leading shape"):
        call(**WRONG["shape"])
    return time.monotonic() - begin


def test_an_error_on_all_ranks_waits_for_nobody() -> None:
    assert max(run_ranks(all_are_wrong, seconds=30)) < ranks.FAREWELL


def out_of_memory_in_the_gradient(tokens: int | None) -> tuple[str, bool]:
    """One rank fails between the gather of the states and the sum of the gradients.

    Args:
        tokens: that the ranks share, or None where each has all of them.
    """
    changed: dict[str, Any] = {}
    if tokens is not None:
        hidden = distribute_tensor(torch.ones(tokens, 8), init_device_mesh("cpu", (2,)), [Shard(0)])
        changed = {"hidden": hidden.requires_grad_(), "labels": torch.arange(tokens)}
    before = call(**changed)
    group = ranks._ProcessGroup
    own = group.start_sum, group.start_scatter
    if dist.get_rank() == 1:

        def fail(*_: Any) -> Any:
            raise torch.OutOfMemoryError("no memory for the sum")

        group.start_sum = group.start_scatter = fail  # type: ignore[method-assign, assignment]
    text = ""
    try:
        call(**changed)
    except RuntimeError as error:
        text = str(error)
    group.start_sum, group.start_scatter = own  # type: ignore[method-assign]
    return text, bool(torch.equal(call(**changed), before))


@pytest.mark.parametrize("tokens", [None, 6, 5])
def test_an_error_between_two_collectives(tokens: int | None) -> None:
    for text, in_step in run_ranks(out_of_memory_in_the_gradient, tokens, seconds=30):
        assert "no memory for the sum" in text
        assert in_step


def one_is_killed() -> str:
    call()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_killed_rank_ends_the_others() -> None:
    survivor, killed = rank_outcomes(one_is_killed, seconds=30)
    assert killed.exit_code == -signal.SIGKILL
    assert "another rank" in survivor.value


def one_is_late(seconds: float) -> torch.Tensor:
    if dist.get_rank() == 1:
        time.sleep(seconds)
    return call()


def test_a_late_rank_is_waited_for() -> None:
    first, second = run_ranks(one_is_late, 5 * ranks.PATIENCE, seconds=30)
    assert torch.equal(first, second)


@pytest.mark.prove
def test_a_rank_that_is_20_seconds_late() -> None:
    first, second = run_ranks(one_is_late, 20.0, seconds=60)
    assert torch.equal(first, second)


def nothing_counts() -> list[torch.Tensor]:
    """All labels ignored, no rows at all, a rank without any label: the same collectives."""
    hidden = torch.randn(6, 8, requires_grad=True)
    ignored = torch.full((6,), -100)
    found = [call(hidden=hidden, labels=ignored), call(labels=torch.arange(6))]
    assert hidden.grad is not None
    assert not hidden.grad.any()
    found.append(call(hidden=torch.randn(0, 8, requires_grad=True), labels=ignored[:0]))
    logits = torch.randn(6, 50, requires_grad=True)
    found.append(unilogit_loss(logits, ignored, vocab_parallel=VocabParallel()).detach())
    found.append(
        unilogit_loss(
            logits[:0], ignored[:0], reduction="sum", vocab_parallel=VocabParallel()
        ).detach()
    )
    return found


def test_nothing_to_count() -> None:
    first, second = run_ranks(nothing_counts, seconds=30)
    assert [float(x) for x in first] == [float(x) for x in second]
    assert [float(first[i]) for i in (0, 2, 3, 4)] == [0.0] * 4


def wrong_shards() -> list[str]:
    found = []
    for wrong in (
        VocabParallel(first_column=0, vocab_size=100),
        VocabParallel(vocab_size=101),
        VocabParallel(first_column=-1),
        VocabParallel(vocab_size=1),
    ):
        try:
            call(vocab_parallel=wrong)
        except ValueError as error:
            found.append(str(error))
    return found


def test_shards_must_cover_the_vocabulary() -> None:
    first, second = run_ranks(wrong_shards, seconds=30)
    assert first == second
    assert "hold each of 100 columns once, got [0, 50), [0, 50)" in first[0]
    assert "hold each of 101 columns once" in first[1]
    assert "first_column must be at least 0" in first[2]
    assert "at least 2" in first[3]


def other_rows() -> str:
    n = 6 if dist.get_rank() == 0 else 5
    try:
        call(hidden=torch.randn(n, 8), labels=torch.arange(n))
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_rows_are_told() -> None:
    found = run_ranks(other_rows, seconds=30)
    assert found[0] == found[1]
    assert "6 tokens whose labels sum to 15, 5 tokens whose labels sum to 10" in found[0]


def compiled() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    shared = VocabParallel(dist.group.WORLD, 50 * dist.get_rank(), 100)
    given = torch.arange(6) * 16

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_unilogit_loss(hidden, weight, given, vocab_parallel=shared)

    losses = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        losses.append(function(hidden, weight))
        losses[-1].backward()
    return losses[0].detach(), losses[1].detach()


def test_a_compiled_call_is_one_graph() -> None:
    first, second = run_ranks(compiled, seconds=120)
    for eager, graph in (first, second):
        assert torch.equal(eager, graph)
        assert torch.equal(eager, first[0])


def twice_differentiated() -> str:
    hidden = torch.randn(4, 8, requires_grad=True)
    loss = linear_objective_loss(
        hidden,
        torch.randn(50, 8),
        torch.arange(4),
        "unilogit",
        vocab_parallel=VocabParallel(),
        backend="eager",
    )
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), hidden)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_double_backward_is_an_error() -> None:
    assert all("first derivatives only" in text for text in run_ranks(twice_differentiated))


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("world", TypeError),
        (VocabParallel(), RuntimeError),
        (VocabParallel("tp"), TypeError),  # type: ignore[arg-type]
    ],
)
def test_without_a_group(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"vocab_parallel|VocabParallel"):
        unilogit_loss(torch.randn(2, 10), torch.tensor([1, 2]), vocab_parallel=given)
