"""The row kernels of `csrc/cpu` as a backend."""

from __future__ import annotations

from ctypes import byref
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.backends.cpu.library import OUT_OF_MEMORY, Matrix, Transform, load_library
from unilogit_kernels.backends.ids import DTYPE_IDS, OBJECTIVE_IDS
from unilogit_kernels.maths import row_state

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


def _check(status: int) -> None:
    if status == OUT_OF_MEMORY:
        raise MemoryError("the CPU kernels could not allocate their scratch memory")


class CpuKernels:
    """`RowKernels`, the sweep that finishes whole rows at once, and `DivergenceKernels`, in C++.

    Attributes:
        name: Name of the backend.
        swept_objectives: Names of the objectives that `log_odds_sweep` takes.
    """

    name = "cpu"
    swept_objectives = frozenset(OBJECTIVE_IDS)

    def log_odds_update(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        transform: LogitTransform,
    ) -> None:
        """See `RowKernels.log_odds_update`. Each row of `state` must be contiguous."""
        status = load_library().unilogit_log_odds_update(
            byref(_matrix(logits, "logits")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            row_state.has_runner_up(state),
            byref(Transform(*transform)),
            torch.get_num_threads(),
        )
        _check(status)

    def log_odds_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        slope: Tensor,
        out: Tensor,
        transform: LogitTransform,
    ) -> None:
        """See `RowKernels.log_odds_gradient`. Rows of `state` and `slope` must be contiguous."""
        status = load_library().unilogit_log_odds_gradient(
            byref(_matrix(logits, "logits")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            slope.data_ptr(),
            slope.stride(0) if row_state.has_runner_up(state) else 0,
            byref(_matrix(out, "out")),
            byref(Transform(*transform)),
            torch.get_num_threads(),
        )
        _check(status)

    def log_odds_sweep(
        self,
        logits: Tensor,
        labels: Tensor,
        row_weight: Tensor,
        objective: str,
        vocab_size: int,
        out: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        """Statistics, objective and gradient of whole rows, each row while it is in the cache.

        Args:
            logits: `[n, V]`, float32, bfloat16 or float16, any strides.
            labels: int64 `[n]`, contiguous. A label outside `[0, V)` gives NaN.
            row_weight: float32 `[n]`, contiguous: factor of each row's gradient. A row of weight
                exactly 0 is not read; it gets loss 0 and a zero gradient.
            objective: One of `swept_objectives`.
            vocab_size: The V of the objective.
            out: Receives `row_weight * f'(d) * dd/dlogits`, `[n, V]`, any strides and float dtype
                of the logits' three, may be `logits`; None for the loss alone.
            transform: Scale and cap of the logits.

        Returns:
            The unweighted losses `f(d)`, float32 `[n]`.
        """
        loss = torch.empty(logits.shape[0], dtype=torch.float32)
        status = load_library().unilogit_log_odds_sweep(
            byref(_matrix(logits, "logits")),
            labels.data_ptr(),
            row_weight.data_ptr(),
            OBJECTIVE_IDS[objective],
            vocab_size,
            None if out is None else byref(_matrix(out, "out")),
            loss.data_ptr(),
            byref(Transform(*transform)),
            torch.get_num_threads(),
        )
        _check(status)
        return loss

    def divergence_update(
        self,
        a: Tensor,
        b: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        a_transform: LogitTransform,
        b_transform: LogitTransform,
    ) -> None:
        """See `DivergenceKernels.divergence_update`. Rows of `state` must be contiguous."""
        status = load_library().unilogit_divergence_update(
            byref(_matrix(a, "a")),
            byref(_matrix(b, "b")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            byref(Transform(*a_transform)),
            byref(Transform(*b_transform)),
            torch.get_num_threads(),
        )
        _check(status)

    def divergence_gradient(
        self,
        a: Tensor,
        b: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
        a_transform: LogitTransform,
        b_transform: LogitTransform,
    ) -> None:
        """See `DivergenceKernels.divergence_gradient`.

        Rows of `state` and `coefficients` must be contiguous.
        """
        status = load_library().unilogit_divergence_gradient(
            byref(_matrix(a, "a")),
            byref(_matrix(b, "b")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            coefficients.data_ptr(),
            coefficients.stride(0),
            _STUDENT_IDS[student],
            byref(_matrix(out, "out")),
            byref(Transform(*a_transform)),
            byref(Transform(*b_transform)),
            torch.get_num_threads(),
        )
        _check(status)
