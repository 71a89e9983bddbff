"""The CUDA backend: checks, and the launches that do the work."""

from __future__ import annotations

from ctypes import c_int64
from typing import Literal

from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.backends.cuda import divergence, geometry, log_odds
from unilogit_kernels.backends.cuda.driver import current
from unilogit_kernels.backends.cuda.geometry import TYPES
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.backends.gpu import check_matrices, check_scaled
from unilogit_kernels.backends.ids import OBJECTIVE_IDS


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values *= factor` in place and in float32, without a host synchronisation.

    Where the factor is exactly 1, the kernel reads that one number and returns.

    Args:
        values: A contiguous tensor of float32, bfloat16 or float16.
        factor: One float32 number on the same device.
    """
    check_scaled("CUDA", values)
    if values.numel() == 0:
        return
    launcher = current()
    vectors = -(-values.nbytes // 16)
    blocks = launcher.multiprocessors(values) * geometry.RESIDENT_THREADS // geometry.ROW_THREADS
    launcher.launch(
        Kernel("SCALE", (TYPES[values.dtype],)),
        (max(1, min(blocks, vectors // geometry.ROW_THREADS)), 1),
        geometry.ROW_THREADS,
        [values, factor, c_int64(values.numel())],
        values,
    )


class CudaKernels:
    """`SweepKernels`, `ScaleKernels` and `DivergenceKernels` in CUDA C++.

    Attributes:
        name: Name of the backend.
        swept_objectives: Names of the objectives that `log_odds_sweep` takes.
    """

    name = "cuda"
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
        check_matrices("CUDA", logits)
        if logits.numel():
            log_odds.update(logits, labels, first_column, state, transform)

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
        check_matrices("CUDA", logits, out)
        if logits.numel():
            log_odds.gradient(logits, labels, first_column, state, slope, out, transform)

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
        """See `SweepKernels.log_odds_sweep`. A label outside `[0, V)` gives NaN."""
        check_matrices("CUDA", logits, *([] if out is None else [out]))
        if logits.shape[0] == 0:
            return row_weight.new_empty(0)
        return log_odds.sweep(logits, labels, row_weight, objective, vocab_size, out, transform)

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """See `ScaleKernels.scale_`."""
        scale_(values, factor)

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
        check_matrices("CUDA", a, b)
        if a.numel():
            divergence.update(a, b, labels, first_column, state, a_transform, b_transform)

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
        check_matrices("CUDA", a, b, out)
        if a.numel():
            divergence.gradient(
                a,
                b,
                labels,
                first_column,
                state,
                coefficients,
                student,
                out,
                a_transform,
                b_transform,
            )
