"""Freed pages are used again, and only freed ones."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from unilogit_kernels import linear_unilogit_loss, unilogit_loss
from unilogit_kernels.backends import memory
from unilogit_kernels.testing import AllocationGuard

CPU = torch.device("cpu")
SHAPE = (3, 1 << 20)
BYTES = 3 * 4 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep nothing")


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gc.collect()
    memory.release()
    yield
    memory.release()


def allocate(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return memory.allocate(shape, dtype, CPU)


def test_an_ordinary_tensor() -> None:
    x = allocate((5, 300_000), torch.bfloat16)
    assert (x.shape, x.dtype, x.device) == ((5, 300_000), torch.bfloat16, CPU)
    assert x.is_contiguous()
    assert x.is_leaf
    assert not x._is_view()
    assert x.untyped_storage().nbytes() == x.nbytes
    x.fill_(2.0)
    assert torch.equal(x.clone(), torch.full_like(x, 2.0))


def test_freed_pages_come_back() -> None:
    x = allocate()
    address = x.data_ptr()
    assert memory.kept_bytes() == 0
    del x
    assert memory.kept_bytes() == BYTES
    smaller = allocate((2, 1 << 20))
    assert smaller.data_ptr() == address
    assert memory.kept_bytes() == 0


def test_only_what_can_be_kept_takes_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory._Block, "_advise", lambda block, _: asked.append(block.size))
    monkeypatch.setattr(memory, "MOST_HUGE_BYTES", BYTES)
    x = allocate()
    larger = allocate((4, 1 << 20))
    assert asked == [x.nbytes]
    larger.fill_(1.0)
    assert larger.sum() == larger.numel()


@pytest.mark.parametrize(
    "holder",
    [
        lambda x: x[1:, ::2],
        lambda x: x.t().detach(),
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
        lambda x: torch.utils.dlpack.from_dlpack(x),
        lambda x: memoryview(x.numpy()),
    ],
    ids=["slice", "detached", "numpy", "storage", "dlpack", "memoryview"],
)
def test_pages_in_use_do_not_come_back(holder: Callable[[Tensor], object]) -> None:
    x = allocate()
    address = x.data_ptr()
    held = holder(x)
    del x
    assert memory.kept_bytes() == 0
    assert allocate().data_ptr() != address
    del held
    memory.release()
    assert memory.kept_bytes() == 0


def test_values_survive_while_they_are_held() -> None:
    held = [allocate().fill_(i) for i in range(3)]
    for i in range(3, 6):
        allocate().fill_(i)
    assert [int(x.amin()) for x in held] == [0, 1, 2]
    assert [int(x.amax()) for x in held] == [0, 1, 2]


def test_much_smaller_tensors_get_their_own_pages() -> None:
    address = allocate().data_ptr()
    assert allocate((1, 1 << 20)).data_ptr() != address
    assert memory.kept_bytes() == BYTES + (4 << 20)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.KEPT_VARIABLE, "30")
    tensors = [allocate() for _ in range(4)]
    last = tensors[-1].data_ptr()
    while tensors:
        del tensors[0]
    assert memory.kept_bytes() == 2 * BYTES
    addresses = {allocate().data_ptr(), allocate().data_ptr()}
    assert last in addresses


def test_keeping_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.KEPT_VARIABLE, "0")
    allocate().fill_(1.0)
    assert memory.kept_bytes() == 0


def test_small_tensors_are_left_to_torch() -> None:
    allocate((100,))
    allocate((0, 7))
    assert memory.kept_bytes() == 0


def test_threads_never_share_pages() -> None:
    failures: list[int] = []

    def work(value: int) -> None:
        for _ in range(40):
            x = allocate((1, 1 << 20))
            x[:, ::4096] = value
            if not bool((x[:, ::4096] == value).all()):
                failures.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_gradient_keeps_its_values_over_later_calls() -> None:
    logits = torch.randn(16, 40_000, requires_grad=True)
    labels = torch.randint(0, 40_000, (16,))
    unilogit_loss(logits, labels).backward()
    first = logits.grad
    assert first is not None
    expected = first.clone()
    for _ in range(3):
        logits.grad = None
        unilogit_loss(logits * 2, labels).backward()
    assert torch.equal(first, expected)


def test_the_allocation_guard_sees_new_and_kept_pages() -> None:
    hidden = torch.randn(64, 64, requires_grad=True)
    weight = torch.randn(20_000, 64, requires_grad=True)
    labels = torch.randint(0, 20_000, (64,))
    for _ in range(2):  # the second time in kept memory
        with AllocationGuard() as guard:
            linear_unilogit_loss(hidden, weight, labels).backward()
        assert guard.largest >= weight.numel()
        assert guard.peak_bytes >= weight.nbytes
        weight.grad = None
        gc.collect()
        assert memory.kept_bytes() >= weight.nbytes
