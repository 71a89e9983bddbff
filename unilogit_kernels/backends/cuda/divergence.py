"""Launches of the two-row kernels."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import TilePair
from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.driver import current
from unilogit_kernels.backends.cuda.geometry import Shares, factors, strides
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.backends.gpu import GpuKernels
from unilogit_kernels.backends.ids import DTYPE_IDS
from unilogit_kernels.maths import pair_state

_PAIR_COLUMNS = 16
"""`kPairVector * kPairVectors` of `csrc/cuda/pair_kernels.h`."""


class DivergenceLaunches(GpuKernels):
    """Launches of the two-row kernels."""

    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        """See `RowKernels`; in one stage or two."""
        if self.are_empty(pair.a, pair.b):
            return
        a, b, labels, first_column, a_transform, b_transform = pair
        launcher = current()
        n, v = a.shape
        shares = Shares.of(a, _PAIR_COLUMNS, launcher)
        parts = None
        if shares.parts > 1:
            parts = torch.empty(pair_state.B_SUM + 1, n, shares.parts, device=a.device)
        launcher.launch(
            Kernel("DIVERGENCE_UPDATE"),
            (n, shares.parts),
            shares.threads,
            [
                a,
                b,
                labels,
                state,
                parts,
                *strides(a),
                *strides(b),
                c_int64(state.stride(0)),
                c_int64(first_column),
                c_int32(v),
                c_int32(DTYPE_IDS[a.dtype]),
                c_int32(DTYPE_IDS[b.dtype]),
                *factors(a_transform),
                *factors(b_transform),
            ],
            a,
        )
        if parts is not None:
            launcher.launch(
                Kernel("MERGE_PAIRS"),
                (n, 1),
                geometry.ROW_THREADS,
                [parts, state, c_int64(state.stride(0)), c_int32(shares.parts)],
                a,
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
        if self.are_empty(pair.a, pair.b, out):
            return
        a, b, labels, first_column, a_transform, b_transform = pair
        launcher = current()
        n, v = a.shape
        shares = Shares.of(a, _PAIR_COLUMNS, launcher)
        launcher.launch(
            Kernel("DIVERGENCE_GRADIENT"),
            (n, shares.parts),
            shares.threads,
            [
                a,
                b,
                labels,
                state,
                coefficients,
                out,
                *strides(a),
                *strides(b),
                *strides(out),
                c_int64(state.stride(0)),
                c_int64(coefficients.stride(0)),
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
            ],
            a,
        )
