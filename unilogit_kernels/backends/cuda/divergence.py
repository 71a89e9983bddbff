"""Launches of the two-row kernels."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int32, c_int64
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, TilePair
from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.geometry import Shares, factors
from unilogit_kernels.backends.cuda.prepared import (
    CudaLaunches,
    Matrix,
    Prepared,
    Update,
)
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.backends.ids import DTYPE_IDS
from unilogit_kernels.maths import pair_state

_PAIR_COLUMNS = 16
"""`kPairVector * kPairVectors` of `csrc/cuda/pair_kernels.h`."""


@functools.lru_cache(gpu.GEOMETRIES)
def _update(
    n: int,
    v: int,
    a: Matrix,
    b: Matrix,
    first_column: int,
    a_transform: LogitTransform,
    b_transform: LogitTransform,
    state_stride: int,
    multiprocessors: int,
) -> Update | None:
    """None where there is nothing to launch for."""
    gpu.check_matrices(CudaLaunches.language, v, a.dtype, b.dtype)
    if n * v == 0:
        return None
    shares = Shares.of(n, v, _PAIR_COLUMNS, multiprocessors)
    numbers = (
        *a.strides,
        *b.strides,
        c_int64(state_stride),
        c_int64(first_column),
        c_int32(v),
        c_int32(DTYPE_IDS[a.dtype]),
        c_int32(DTYPE_IDS[b.dtype]),
        *factors(a_transform),
        *factors(b_transform),
    )
    fold = Prepared(Kernel("DIVERGENCE_UPDATE"), (n, shares.parts), shares.threads, numbers)
    if shares.parts == 1:
        return Update(fold)
    merge = Prepared(
        Kernel("MERGE_PAIRS"),
        (n, 1),
        geometry.ROW_THREADS,
        (c_int64(state_stride), c_int32(shares.parts)),
    )
    return Update(fold, (pair_state.B_SUM + 1, shares.parts), merge)


@functools.lru_cache(gpu.GEOMETRIES)
def _gradient(
    n: int,
    v: int,
    a: Matrix,
    b: Matrix,
    out: Matrix,
    first_column: int,
    a_transform: LogitTransform,
    b_transform: LogitTransform,
    state_stride: int,
    coefficient_stride: int,
    student: str,
    multiprocessors: int,
) -> Prepared | None:
    """None where there is nothing to launch for."""
    gpu.check_matrices(CudaLaunches.language, v, a.dtype, b.dtype, out.dtype)
    if n * v == 0:
        return None
    shares = Shares.of(n, v, _PAIR_COLUMNS, multiprocessors)
    numbers = (
        *a.strides,
        *b.strides,
        *out.strides,
        c_int64(state_stride),
        c_int64(coefficient_stride),
        c_int64(first_column),
        c_int32(v),
        c_int32(DTYPE_IDS[a.dtype]),
        c_int32(DTYPE_IDS[b.dtype]),
        c_int32(DTYPE_IDS[out.dtype]),
        c_int32(student == "a"),
        *factors(a_transform),
        c_float(a_transform.scale),
        *factors(b_transform),
        c_float(b_transform.scale),
    )
    return Prepared(Kernel("DIVERGENCE_GRADIENT"), (n, shares.parts), shares.threads, numbers)


class DivergenceLaunches(CudaLaunches):
    """Launches of the two-row kernels."""

    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        """See `RowKernels`; in one stage or two."""
        a, b, labels, first_column, a_transform, b_transform = pair
        launcher = self._launcher
        n, v = a.shape
        update = _update(
            n,
            v,
            Matrix.of(a),
            Matrix.of(b),
            first_column,
            a_transform,
            b_transform,
            state.stride(0),
            launcher.multiprocessors(a),
        )
        if update is None:
            return
        parts = None
        if update.parts is not None:
            planes, count = update.parts
            parts = torch.empty(planes, n, count, device=a.device)
        update.fold.through(launcher, a, a, b, labels, state, parts)
        if update.merge is not None:
            update.merge.through(launcher, a, parts, state)

    def divergence_gradient(
        self,
        pair: TilePair,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
    ) -> None:
        """See `RowKernels`."""
        a, b, labels, first_column, a_transform, b_transform = pair
        launcher = self._launcher
        launch = _gradient(
            *a.shape,
            Matrix.of(a),
            Matrix.of(b),
            Matrix.of(out),
            first_column,
            a_transform,
            b_transform,
            state.stride(0),
            coefficients.stride(0),
            student,
            launcher.multiprocessors(a),
        )
        if launch is not None:
            launch.through(launcher, a, a, b, labels, state, coefficients, out)
