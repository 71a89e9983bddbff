"""How rows are shared among blocks, and what kernels take of matrices and transforms.

None of the numbers has been measured on a GPU yet (docs/gpu.md).
"""

from __future__ import annotations

from ctypes import c_float
from typing import NamedTuple

import torch

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform

TYPES = {torch.float32: "Float32", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}
"""Names of `csrc/cuda/platform.h`."""

RESIDENT_THREADS = 1024
"""Of a multiprocessor: 65,536 registers, of which the kernels take at most 64 a thread."""

ROW_THREADS = 128
"""Threads of a block that owns a whole row: few, so that rows end and begin independently."""

SPLIT_THREADS = 64
"""Threads of a block that owns a part of a row: a single row of 128k columns gives every
multiprocessor something to do."""


def factors(transform: LogitTransform) -> tuple[c_float, c_float]:
    """`scale` and `softcap` as kernels declare them."""
    scale, softcap = gpu.factors_of(transform)
    return c_float(scale), c_float(softcap)


class Shares(NamedTuple):
    """How rows are shared among blocks: so many for each, of so many threads."""

    parts: int
    threads: int

    @staticmethod
    def of(n: int, v: int, thread_columns: int, multiprocessors: int) -> Shares:
        """One block for each row where that keeps the device busy, else as many as it takes.

        Args:
            n: Rows.
            v: Columns.
            thread_columns: How many a thread has in flight.
            multiprocessors: Of the device.
        """
        resident = multiprocessors * RESIDENT_THREADS
        if gpu.whole_rows_suffice(n, resident // ROW_THREADS):
            return Shares(1, ROW_THREADS)
        tiles = max(1, v // (thread_columns * SPLIT_THREADS))
        each = gpu.tiles_of_a_part(n, tiles, resident // SPLIT_THREADS)
        return Shares(-(-tiles // each), SPLIT_THREADS)
