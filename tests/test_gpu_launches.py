"""How rows are shared among programs: arithmetic that both backends for GPUs launch by."""

from __future__ import annotations

import pytest
import torch

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, ScaleKernels
from unilogit_kernels.backends.cuda.geometry import Shares
from unilogit_kernels.backends.registry import load

H100_MULTIPROCESSORS = 132
H100_CACHE = 50 << 20


class H100:
    """A launcher that launches nothing."""

    def multiprocessors(self, tensor: torch.Tensor) -> int:
        return H100_MULTIPROCESSORS

    def cache_bytes(self, tensor: torch.Tensor) -> int:
        return H100_CACHE

    def launch(self, *_: object) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("n", "shares"),
    [(1, Shares(62, 64)), (1055, Shares(9, 64)), (4223, Shares(3, 64)), (4224, Shares(1, 128))],
)
def test_rows_in_few_waves_are_split(n: int, shares: Shares) -> None:
    """8 blocks of 128 threads, or 16 of 64, live on a multiprocessor at once."""
    logits = torch.empty(1, dtype=torch.bfloat16).expand(n, 128_256)
    assert Shares.of(logits, 32, H100()) == shares


def test_parts_fill_waves() -> None:
    """However many rows there are, programs come in `WAVES` waves, or have one tile each."""
    tiles, at_a_time = 64, 100
    for n in range(1, 1000):
        parts = -(-tiles // gpu.tiles_of_a_part(n, tiles, at_a_time))
        assert parts == tiles or n * parts >= gpu.WAVES * at_a_time


@pytest.mark.parametrize(("smallest", "resident"), [(4, 32), (128, 1024)], ids=["warps", "threads"])
def test_rows_in_flight_fit_into_the_cache(smallest: int, resident: int) -> None:
    """A program's size in a unit of any kind, as a share of what a multiprocessor runs."""

    def share(v: int) -> float:
        sizes = {"smallest": smallest, "resident": resident}
        return gpu.sweep_size(2 * v, H100_MULTIPROCESSORS, H100_CACHE, **sizes) / resident

    assert share(128_256) == 1  # 34 MB of 50
    assert share(10**6) == 1  # no size would do
    assert share(32_000) == 1 / 4
    assert share(4_000) == smallest / resident


@pytest.mark.parametrize(
    ("n", "pays"), [(1, False), (87, False), (88, True), (132, True), (133, False), (265, True)]
)
def test_a_sweep_leaves_little_of_the_device_idle(n: int, pays: bool) -> None:
    assert gpu.sweep_pays(n, H100_MULTIPROCESSORS) == pays


def test_a_cap_goes_into_the_scale() -> None:
    assert gpu.factors_of(LogitTransform(3.0, 6.0)) == (0.5, 6.0)
    assert gpu.factors_of(LogitTransform(3.0)) == (3.0, 0.0)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_too_many_columns_are_refused(name: str) -> None:
    logits = torch.zeros(1, 1).expand(1, gpu.MOST_COLUMNS + 1)
    labels, state = torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"kernels take at most 1073741824 columns"):
        load(name).log_odds_update(logits, labels, 0, state, LogitTransform())


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_scale_refuses_what_is_not_contiguous(name: str) -> None:
    kernels, values = load(name), torch.ones(4, 6)[:, ::2]
    assert isinstance(kernels, ScaleKernels)
    with pytest.raises(ValueError, match=r"contiguous.*strides \[6, 2\]"):
        kernels.scale_(values, torch.tensor(2.0))
    assert (values == 1).all()
