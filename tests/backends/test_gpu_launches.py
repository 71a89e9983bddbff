"""How rows are shared among programs: arithmetic that both backends for GPUs launch by."""

from __future__ import annotations

import pytest
import torch

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.cuda.geometry import (
    RESIDENT_THREADS,
    ROW_THREADS,
    SPLIT_THREADS,
    Shares,
)
from unilogit_kernels.backends.cuda.launch import CudaKernels
from unilogit_kernels.backends.imagined import Gpu, ImaginedGpu
from unilogit_kernels.backends.registry import load
from unilogit_kernels.backends.triton.launch import TritonKernels

H100_MULTIPROCESSORS = 132
H100_CACHE = 50 << 20


THREAD_COLUMNS = 32


def test_rows_in_few_waves_are_split() -> None:
    """Blocks fill the waves that keep a device busy, or there is nothing left to split."""
    most_parts = 128_256 // (THREAD_COLUMNS * SPLIT_THREADS)
    for n in (*range(1, 1000, 7), 4223, 4224, 50_000):
        shares = Shares.of(n, 128_256, THREAD_COLUMNS, H100_MULTIPROCESSORS)
        waves = gpu.WAVES * H100_MULTIPROCESSORS * RESIDENT_THREADS // shares.threads
        busy = n * shares.parts >= waves
        assert busy or shares == (most_parts, SPLIT_THREADS)
        # Nor is a row in more parts than that takes: each of them costs a merge.
        assert shares.parts == 1 or n * (shares.parts - 1) <= 2 * waves
        whole = n >= gpu.WAVES * H100_MULTIPROCESSORS * RESIDENT_THREADS // ROW_THREADS
        assert whole == (shares == (1, ROW_THREADS))


def test_parts_fill_waves() -> None:
    """However many rows there are, programs come in `WAVES` waves, or have one tile each."""
    tiles, at_a_time = 64, 100
    for n in range(1, 1000):
        parts = -(-tiles // gpu.tiles_of_a_part(n, tiles, at_a_time))
        assert parts == tiles or n * parts >= gpu.WAVES * at_a_time


@pytest.mark.parametrize(("smallest", "resident"), [(4, 32), (128, 1024)], ids=["warps", "threads"])
def test_rows_in_flight_fit_into_the_cache(smallest: int, resident: int) -> None:
    """Programs, in a unit of any kind, are the smallest that do, or the largest that there are."""

    def fits(size: int, row_bytes: int) -> bool:
        in_flight = H100_MULTIPROCESSORS * resident // size
        return in_flight * row_bytes <= 0.75 * H100_CACHE

    for v in range(1000, 1_000_000, 997):
        size = gpu.sweep_size(
            2 * v, H100_MULTIPROCESSORS, H100_CACHE, smallest=smallest, resident=resident
        )
        assert smallest <= size <= resident
        assert fits(size, 2 * v) or size == resident
        assert size == smallest or not fits(size // 2, 2 * v)


def test_a_sweep_leaves_little_of_the_device_idle() -> None:
    """It reads and writes once, with the idle part of its last wave; two visits read once more."""
    for n in range(1, 1000):
        slots = H100_MULTIPROCESSORS * -(-n // H100_MULTIPROCESSORS)
        assert gpu.sweep_pays(n, H100_MULTIPROCESSORS) == (2 * slots <= 3 * n)


def test_a_cap_goes_into_the_scale() -> None:
    assert gpu.factors_of(LogitTransform(3.0, 6.0)) == (0.5, 6.0)
    assert gpu.factors_of(LogitTransform(3.0)) == (3.0, 0.0)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_too_many_columns_are_refused(name: str) -> None:
    logits = torch.zeros(1, 1).expand(1, gpu.MOST_COLUMNS + 1)
    labels, state = torch.zeros(1, dtype=torch.int64), torch.zeros(3, 1)
    gpu_there = ImaginedGpu(Gpu("cuda:90", H100_MULTIPROCESSORS, H100_CACHE))
    kernels = {"triton": TritonKernels, "cuda": CudaKernels}[name](gpu_there)
    with pytest.raises(ValueError, match=r"kernels take at most 1073741824 columns"):
        kernels.log_odds_update(Tile(logits, labels), state)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_scale_refuses_what_is_not_contiguous(name: str) -> None:
    kernels, values = load(name), torch.ones(4, 6)[:, ::2]
    with pytest.raises(ValueError, match=r"contiguous.*strides \[6, 2\]"):
        kernels.scale_(values, torch.tensor(2.0))
    assert (values == 1).all()
