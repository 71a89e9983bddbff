"""The row kernels of `csrc/cpu` as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, byref, c_float
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import RowKernels, Tile, TilePair
from unilogit_kernels.backends.cpu.library import OUT_OF_MEMORY, Matrix, Transform, load_library
from unilogit_kernels.backends.ids import DTYPE_IDS, OBJECTIVE_IDS
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds

WEIGHTED_STATISTICS = "weighted_statistics"
"""The one objective of `OBJECTIVE_IDS` that takes weights."""

_STUDENT_IDS = {"a": 0, "b": 1}
"""`kUnilogitStudentIsA` of `csrc/cpu/api.h`, or another."""


def _matrix(tensor: Tensor, name: str) -> Matrix:
    type_id = DTYPE_IDS.get(tensor.dtype)
    if type_id is None:
        raise TypeError(
            f"{name} is {tensor.dtype}; the CPU kernels take float32, bfloat16 and float16 "
            "(float64 belongs to the eager backend)"
        )
    rows, columns = tensor.shape
    row_stride, column_stride = tensor.stride()
    return Matrix(tensor.data_ptr(), rows, columns, row_stride, column_stride, type_id)


def _weights(weights: Sequence[float]) -> Array[c_float]:
    a, b, c, e, k = weights
    return (c_float * 5)(a, b, c, e, k)


def _run(function: str, *arguments: object) -> None:
    """Call a function of the library, with as many threads as torch has."""
    status = getattr(load_library(), function)(*arguments, torch.get_num_threads())
    if status == OUT_OF_MEMORY:
        raise MemoryError("the CPU kernels could not allocate their scratch memory")


class CpuKernels(RowKernels):
    """The row kernels in C++."""

    name = "cpu"
    swept_objectives = frozenset(OBJECTIVE_IDS)

    def log_odds_update(self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN) -> None:
        """See `RowKernels`."""
        _run(
            "unilogit_log_odds_update",
            byref(_matrix(tile.logits, "logits")),
            tile.labels.data_ptr(),
            tile.first_column,
            state.data_ptr(),
            state.stride(0),
            needs.bits,
            byref(Transform(*tile.transform)),
        )

    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        """See `RowKernels`."""
        _run(
            "unilogit_log_odds_gradient",
            byref(_matrix(tile.logits, "logits")),
            tile.labels.data_ptr(),
            tile.first_column,
            state.data_ptr(),
            state.stride(0),
            slope.data_ptr(),
            slope.stride(0),
            slope.shape[0] if row_state.has_runner_up(state) else 1,
            byref(_matrix(out, "out")),
            byref(Transform(*tile.transform)),
        )

    def log_odds_sweep(
        self,
        tile: Tile,
        row_weight: Tensor,
        objective: str,
        vocab_size: int,
        out: Tensor | None,
        weights: Sequence[float] = (),
    ) -> Tensor:
        """See `RowKernels`; the second pass of a row finds it in the cache."""
        n = tile.logits.shape[0]
        weighted = _weights(weights) if objective == WEIGHTED_STATISTICS else None
        reports = weighted is not None and weighted[2] != 0
        values = torch.empty((2, n) if reports else (n,), dtype=torch.float32)
        _run(
            "unilogit_log_odds_sweep",
            byref(_matrix(tile.logits, "logits")),
            tile.labels.data_ptr(),
            row_weight.data_ptr(),
            OBJECTIVE_IDS[objective],
            weighted,
            vocab_size,
            None if out is None else byref(_matrix(out, "out")),
            values.data_ptr(),
            byref(Transform(*tile.transform)),
        )
        return values

    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        """See `RowKernels`."""
        _run(
            "unilogit_divergence_update",
            byref(_matrix(pair.a, "a")),
            byref(_matrix(pair.b, "b")),
            pair.labels.data_ptr(),
            pair.first_column,
            state.data_ptr(),
            state.stride(0),
            byref(Transform(*pair.a_transform)),
            byref(Transform(*pair.b_transform)),
        )

    def divergence_gradient(
        self,
        pair: TilePair,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
    ) -> None:
        """See `RowKernels`."""
        _run(
            "unilogit_divergence_gradient",
            byref(_matrix(pair.a, "a")),
            byref(_matrix(pair.b, "b")),
            pair.labels.data_ptr(),
            pair.first_column,
            state.data_ptr(),
            state.stride(0),
            coefficients.data_ptr(),
            coefficients.stride(0),
            _STUDENT_IDS[student],
            byref(_matrix(out, "out")),
            byref(Transform(*pair.a_transform)),
            byref(Transform(*pair.b_transform)),
        )
