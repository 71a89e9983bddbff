"""Launches of the two-row kernels."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, TilePair
from unilogit_kernels.backends.gpu import factors_of
from unilogit_kernels.backends.triton.geometry import (
    Matrices,
    Place,
    Shares,
    logits_of,
    on_its_device,
    options_of,
)
from unilogit_kernels.backends.triton.kernels.divergence import (
    Pair,
    divergence_gradient_kernel,
    divergence_update_kernel,
    merge_pair_parts_kernel,
)
from unilogit_kernels.backends.triton.prepared import Prepared, TritonLaunches, Update
from unilogit_kernels.backends.triton.settings import Device, Settings


def _lanes(chosen: Settings, a_transform: LogitTransform, b_transform: LogitTransform) -> int:
    """Elements of each row that a thread holds at once: half as many as of a single row."""
    capped = a_transform.softcap or b_transform.softcap
    return (chosen.capped_lanes if capped else chosen.lanes) // 2


@functools.lru_cache(gpu.GEOMETRIES)
def _update(
    n: int,
    v: int,
    a_place: Place,
    b_place: Place,
    first_column: int,
    a_transform: LogitTransform,
    b_transform: LogitTransform,
    state_stride: int,
    device: Device,
) -> Update | None:
    """None where there is nothing to launch for."""
    gpu.check_matrices(TritonLaunches.language, v, a_place.dtype, b_place.dtype)
    if n * v == 0:
        return None
    # The narrower rows lead: their 128 bits are two vectors of the wider ones.
    b_leads = b_place.dtype.itemsize < a_place.dtype.itemsize
    matrices = Matrices(b_place, (a_place,)) if b_leads else Matrices(a_place, (b_place,))
    lanes = _lanes(device.settings, a_transform, b_transform)
    shares = Shares.of(n, v, device, matrices, lanes)
    compiled = Pair(
        logits_of(a_place, matrices, a_transform, "", device.settings),
        logits_of(b_place, matrices, b_transform, "", device.settings),
        student_is_a=False,
    )
    strides = (*a_place.strides, *b_place.strides, state_stride, first_column, v)
    factors = (*factors_of(a_transform), *factors_of(b_transform))
    fold = Prepared(
        divergence_update_kernel,
        (n, shares.parts),
        (*strides, shares.blocks_per_part, *factors),
        {"B_LEADS": b_leads, "PAIR": compiled, "WALK": shares.walk},
        shares.options,
    )
    if shares.parts == 1:
        return Update(fold)
    merge = Prepared(
        merge_pair_parts_kernel,
        (n, 1),
        (shares.parts, *strides, *factors),
        {
            "MOST_PARTS": triton.next_power_of_2(shares.parts),
            "PAIR": compiled,
            "STRIDED": shares.walk.strided,
        },
        options_of(device.settings, warps=1),
    )
    return Update(fold, shares.parts, merge)


@functools.lru_cache(gpu.GEOMETRIES)
def _gradient(
    n: int,
    v: int,
    a_place: Place,
    b_place: Place,
    out_place: Place,
    first_column: int,
    a_transform: LogitTransform,
    b_transform: LogitTransform,
    state_stride: int,
    coefficient_stride: int,
    student: str,
    device: Device,
) -> Prepared | None:
    """None where there is nothing to launch for."""
    dtypes = (a_place.dtype, b_place.dtype, out_place.dtype)
    gpu.check_matrices(TritonLaunches.language, v, *dtypes)
    if n * v == 0:
        return None
    matrices = Matrices(out_place, (a_place, b_place))
    lanes = _lanes(device.settings, a_transform, b_transform)
    shares = Shares.of(n, v, device, matrices, lanes)
    return Prepared(
        divergence_gradient_kernel,
        (n, shares.parts),
        (
            *a_place.strides,
            *b_place.strides,
            *out_place.strides,
            state_stride,
            coefficient_stride,
            first_column,
            v,
            shares.blocks_per_part,
            *factors_of(a_transform),
            *factors_of(b_transform),
            (a_transform if student == "a" else b_transform).scale,
        ),
        {
            "PAIR": Pair(
                logits_of(a_place, matrices, a_transform, "", device.settings),
                logits_of(b_place, matrices, b_transform, "", device.settings),
                student_is_a=student == "a",
            ),
            "WALK": shares.walk,
        },
        # Equal rows give exactly 0 only where both terms are rounded before they are added.
        {**shares.options, "enable_fp_fusion": False},
    )


class DivergenceLaunches(TritonLaunches):
    """Launches of the two-row kernels."""

    @on_its_device
    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        """See `RowKernels`; in one stage or two."""
        a, b, labels, first_column, a_transform, b_transform = pair
        (a_base, a_place), (b_base, b_place) = Place.of(a), Place.of(b)
        n, v = a.shape
        update = _update(
            n,
            v,
            a_place,
            b_place,
            first_column,
            a_transform,
            b_transform,
            state.stride(0),
            self._device(a),
        )
        if update is None:
            return
        if update.merge is None:
            self._launch(update.fold, a_base, b_base, labels, state, None)
            return
        parts = torch.empty(5, n, update.parts, device=a.device)
        self._launch(update.fold, a_base, b_base, labels, state, parts)
        self._launch(update.merge, parts, a_base, b_base, labels, state)

    @on_its_device
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
        (a_base, a_place), (b_base, b_place) = Place.of(a), Place.of(b)
        out_base, out_place = Place.of(out)
        launch = _gradient(
            *a.shape,
            a_place,
            b_place,
            out_place,
            first_column,
            a_transform,
            b_transform,
            state.stride(0),
            coefficients.stride(0),
            student,
            self._device(a),
        )
        if launch is not None:
            self._launch(launch, a_base, b_base, labels, state, coefficients, out_base)
