"""The Triton backend: checks, the device guard, and the launches that do the work."""

from __future__ import annotations

from typing import Literal

import triton
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.backends.gpu import check_matrices, check_scaled
from unilogit_kernels.backends.ids import OBJECTIVE_IDS
from unilogit_kernels.backends.triton import divergence, log_odds, settings
from unilogit_kernels.backends.triton.geometry import device_guard, options_of
from unilogit_kernels.backends.triton.kernels.scale import scale_kernel

SCALE_BLOCK = 4096
"""Elements of a tile of `scale_`: 64 or 128 bytes in flight for each of 128 threads."""


class TritonKernels:
    """`SweepKernels`, `DivergenceKernels` and `ScaleKernels` in Triton.

    Attributes:
        name: Name of the backend.
        swept_objectives: Names of the objectives that `log_odds_sweep` takes.
    """

    name = "triton"
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
        check_matrices("Triton", logits)
        if logits.numel():
            with device_guard(logits):
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
        check_matrices("Triton", logits, out)
        if logits.numel():
            with device_guard(logits):
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
        check_matrices("Triton", logits, *([] if out is None else [out]))
        if logits.shape[0] == 0:
            return row_weight.new_empty(0)
        with device_guard(logits):
            return log_odds.sweep(logits, labels, row_weight, objective, vocab_size, out, transform)

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
        check_matrices("Triton", a, b)
        if a.numel():
            with device_guard(a):
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
        """See `DivergenceKernels.divergence_gradient`. Rows of `state` must be contiguous."""
        check_matrices("Triton", a, b, out)
        if a.numel():
            with device_guard(a):
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

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """See `ScaleKernels.scale_`."""
        check_scaled("Triton", values)
        if values.numel() == 0:
            return
        chosen = settings.current_settings()
        multiprocessors, _ = settings.sizes(values, chosen)
        programs = multiprocessors * chosen.resident_warps // chosen.warps
        with device_guard(values):
            scale_kernel[(min(triton.cdiv(values.numel(), SCALE_BLOCK), programs),)](
                values,
                factor,
                values.numel(),
                BLOCK=SCALE_BLOCK,
                **options_of(chosen, chosen.warps),
            )
