"""Launches that are remembered: when they may be used again, and when a kernel is another one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.backends.triton.aot import compiling_for
from unilogit_kernels.backends.contract import Tile
from unilogit_kernels.backends.triton.kernels.scale import scale_kernel
from unilogit_kernels.backends.triton.launch import TritonKernels
from unilogit_kernels.maths import row_state

KERNELS = TritonKernels()


def scaled_by(target: str, *tensors: Tensor) -> list[object]:
    """The compiled kernels that scale each of some tensors in turn."""
    with compiling_for(target) as launches:
        for values in tensors:
            KERNELS.scale_(values, torch.ones(()))
    assert len(launches) == len(tensors)
    return [launch.kernel for launch in launches]


def test_a_launch_goes_straight_to_its_kernel_from_the_second_time_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values, through_triton = torch.zeros(5000), []
    run = scale_kernel.run

    def counted(*args: Any, **kwargs: Any) -> Any:
        through_triton.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(scale_kernel, "run", counted)
    first, *others = scaled_by("cuda:90", values, values, torch.zeros(5000))
    assert len(through_triton) == 1
    assert all(kernel is first for kernel in others)


def test_what_is_aligned_otherwise_is_another_kernel() -> None:
    memory = torch.zeros(5001)
    aligned, unaligned, again = scaled_by("cuda:90", memory[:5000], memory[1:], memory[:5000])
    assert aligned is again
    assert aligned is not unaligned


def test_another_dtype_of_a_pointer_is_another_kernel() -> None:
    values = torch.zeros(5000)
    with compiling_for("cuda:90") as launches:
        for factor in (torch.ones(()), torch.ones((), dtype=torch.float64), torch.ones(())):
            KERNELS.scale_(values, factor)
    kernels = [launch.kernel for launch in launches]
    assert kernels[0] is kernels[2]
    assert kernels[0] is not kernels[1]


@pytest.mark.parametrize(("target", "others"), [("hip:gfx942", True), ("cuda:90", False)])
def test_far_memory_is_another_kernel_on_amd(target: str, others: bool) -> None:
    """Where Triton addresses up to 2 GiB in 32 bits. Nobody touches the pages."""
    far = torch.empty(2**31 + 4096, dtype=torch.uint8).view(torch.float32)[:5000]
    near, beyond = scaled_by(target, torch.zeros(5000), far)
    assert (near is not beyond) == others


def test_each_device_has_kernels_of_its_own() -> None:
    values = torch.zeros(5000)
    assert scaled_by("cuda:80", values)[0] is not scaled_by("cuda:90", values)[0]


def test_numbers_are_those_of_each_call() -> None:
    """Columns counted from another one are another launch of the same kernel."""
    logits, labels = torch.zeros(3, 700), torch.zeros(3, dtype=torch.int64)
    state = row_state.empty_state(3, logits.device)
    with compiling_for("cuda:90") as launches:
        for first_column in (0, 700, 0):
            KERNELS.log_odds_update(Tile(logits, labels, first_column), state)
    updates = [launch for launch in launches if launch.name == "log_odds_update_kernel"]
    assert len(updates) == 3
    assert len({id(launch.kernel) for launch in updates}) == 1
