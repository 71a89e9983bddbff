"""Launches of the Triton kernels: grids, alignment, and how a row is shared among programs.

Functions here take tensors as they are, on any device: whether the backend may run on it is the
registry's business.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.backends import LogitTransform
from unilogit_kernels.backends.triton import kernels
from unilogit_kernels.backends.triton.kernels import Variant
from unilogit_kernels.backends.triton.settings import (
    Settings,
    current_settings,
    sizes,
    sweep_warps,
)

OBJECTIVES = ("unilogit", "unilogit_forward", "cross_entropy", "gradient_ascent")
"""What `kernels.evaluate_objective` knows."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What logits and gradients may be."""

SCALE_BLOCK = 4096
"""Elements of a tile of `scale_`: 64 or 128 bytes in flight for each of 128 threads."""


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; make that the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


# ---- memory ------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a matrix lies, in elements; leading arguments of the kernels.

    Attributes:
        base: A tensor that begins at a 16-byte boundary at or before the matrix.
        offset: From there to the matrix.
        row_stride: From a row to the next.
        column_stride: From a column to the next.
    """

    base: Tensor
    offset: int
    row_stride: int
    column_stride: int

    @staticmethod
    def of(matrix: Tensor) -> Place:
        """Move the base of an unaligned view back, as far as its storage allows."""
        row_stride, column_stride = matrix.stride()
        if matrix.shape[0] == 1:
            row_stride = 0  # nobody steps along it, but it would count against alignment
        beyond = matrix.data_ptr() // matrix.element_size() % _vector(matrix)
        if beyond == 0 or beyond > matrix.storage_offset():
            return Place(matrix, 0, row_stride, column_stride)
        first = matrix.storage_offset() - beyond
        size = matrix.untyped_storage().nbytes() // matrix.element_size() - first
        return Place(matrix.as_strided((size,), (1,), first), beyond, row_stride, column_stride)

    @property
    def strides(self) -> tuple[int, int, int]:
        """What the kernels take beside the base."""
        return self.offset, self.row_stride, self.column_stride


def _vector(tensor: Tensor) -> int:
    """Elements in 128 bits."""
    return int(kernels.ACCESS_BYTES.value) // tensor.element_size()


def _variant(
    logits: Place, out: Place, transform: LogitTransform, settings: Settings, warps: int
) -> Variant:
    """The compiled variant for matrices as they lie in memory.

    The output's rows decide where a body begins, so that stores are whole. Where the rows of the
    logits are aligned differently, loads are narrower, and coalesced still.
    """
    vector = _vector(out.base)
    strided = logits.column_stride != 1 or out.column_stride != 1

    def alignment(place: Place) -> int:
        elements = min(_vector(place.base), vector)
        differs = (
            place.base.data_ptr() % kernels.ACCESS_BYTES.value
            or (place.offset - out.offset) % elements
            or (place.row_stride - out.row_stride) % elements
        )
        return 1 if strided or differs else elements

    capped = transform.softcap != 0.0
    lanes = settings.capped_lanes if capped else settings.lanes
    return Variant(
        threads=warps * settings.warp_threads,
        vector=vector,
        unroll=lanes // vector,
        logits_alignment=alignment(logits),
        out_alignment=alignment(out),
        strided=strided,
        scaled=transform.scale != 1.0 and not capped,
        capped=capped,
    )


def _options(settings: Settings, warps: int) -> dict[str, Any]:
    # Said explicitly, since triton 3.10 turns the default around.
    return {"num_warps": warps, "enable_fp_fusion": True, **settings.options}


def _factors(transform: LogitTransform) -> tuple[float, float]:
    """`scale` and `softcap` as the kernels take them: the cap's division goes into the scale."""
    if transform.softcap:
        return transform.scale / transform.softcap, transform.softcap
    return transform.scale, 0.0


def _vocabulary(vocab_size: int) -> tuple[float, float, float]:
    """The fields of `kernels.Vocabulary`."""
    return -math.log(vocab_size - 1), math.log1p(1 / (vocab_size - 1)), 1 / vocab_size


def _check_dtypes(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"the Triton kernels take {', '.join(map(str, DTYPES))}, got {tensor.dtype} "
                "(float64 belongs to the eager backend)"
            )


# ---- shares of a row ---------------------------------------------------------------------------


class Shares(NamedTuple):
    """How the rows of a matrix are shared among programs that visit each column once.

    Attributes:
        parts: Programs of a row.
        blocks_per_part: Body tiles of each.
        variant: What is compiled.
        options: Launch options.
    """

    parts: int
    blocks_per_part: int
    variant: Variant
    options: dict[str, Any]


def _shares(
    matrix: Tensor, logits: Place, out: Place, transform: LogitTransform, settings: Settings
) -> Shares:
    """One program for each row where that keeps the device busy, else as many as it takes."""
    n, v = matrix.shape
    multiprocessors, _ = sizes(matrix, settings)
    warps = settings.warps
    if n >= multiprocessors * settings.resident_warps // warps:
        variant = _variant(logits, out, transform, settings, warps)
        return Shares(1, v, variant, _options(settings, warps))
    warps = settings.split_warps
    programs = multiprocessors * settings.resident_warps // warps
    variant = _variant(logits, out, transform, settings, warps)
    if n * v < programs * _block(variant):
        variant = variant._replace(unroll=1)  # too little work to give a thread several vectors
    blocks = max(1, v // _block(variant))
    blocks_per_part = max(1, n * blocks // programs)
    parts = triton.cdiv(blocks, blocks_per_part)
    return Shares(parts, blocks_per_part, variant, _options(settings, warps))


def _block(variant: Variant) -> int:
    """Columns of a body tile."""
    return variant.unroll * variant.threads * variant.vector


# ---- launches ----------------------------------------------------------------------------------


class Finish(NamedTuple):
    """What the second stage computes beside the state.

    Attributes:
        objective: One of `OBJECTIVES`.
        vocab_size: The V of the objective.
        row_weight: `[n]`.
        values: `[n]`, receives `f(d)`.
        slopes: `[n]`, receives `row_weight * f'(d)`.
    """

    objective: str
    vocab_size: int
    row_weight: Tensor
    values: Tensor
    slopes: Tensor


def _update(
    logits: Tensor,
    labels: Tensor,
    first_column: int,
    state: Tensor,
    transform: LogitTransform,
    finish: Finish | None = None,
) -> None:
    """Fold columns into `state`, in one stage or two."""
    n, v = logits.shape
    settings = current_settings()
    place = Place.of(logits)
    shares = _shares(logits, place, place, transform, settings)
    two_stages = shares.parts > 1 or finish is not None
    parts = torch.empty(2, n, shares.parts, device=logits.device) if two_stages else None
    row_weight = None if finish is None else finish.row_weight
    scale, softcap = _factors(transform)
    kernels.log_odds_update_kernel[(n, shares.parts)](
        place.base,
        labels,
        row_weight,
        state,
        parts,
        *place.strides,
        state.stride(0),
        first_column,
        v,
        shares.blocks_per_part,
        scale,
        softcap,
        VARIANT=shares.variant,
        **shares.options,
    )
    if parts is None:
        return
    kernels.merge_parts_kernel[(n,)](
        parts,
        place.base,
        labels,
        row_weight,
        state,
        None if finish is None else finish.values,
        None if finish is None else finish.slopes,
        shares.parts,
        *place.strides,
        state.stride(0),
        first_column,
        v,
        scale,
        softcap,
        *_vocabulary(2 if finish is None else finish.vocab_size),
        MOST_PARTS=triton.next_power_of_2(shares.parts + 1),
        OBJECTIVE=None if finish is None else finish.objective,
        VARIANT=shares.variant,
        **_options(settings, settings.warps),
    )


def _gradient(
    logits: Tensor,
    labels: Tensor,
    first_column: int,
    state: Tensor,
    slope: Tensor,
    out: Tensor,
    transform: LogitTransform,
) -> None:
    n, v = logits.shape
    place, out_place = Place.of(logits), Place.of(out)
    shares = _shares(logits, place, out_place, transform, current_settings())
    kernels.log_odds_gradient_kernel[(n, shares.parts)](
        place.base,
        labels,
        state,
        slope,
        out_place.base,
        *place.strides,
        *out_place.strides,
        state.stride(0),
        first_column,
        v,
        shares.blocks_per_part,
        *_factors(transform),
        transform.scale,
        VARIANT=shares.variant,
        **shares.options,
    )


def _sweep(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    objective: str,
    vocab_size: int,
    out: Tensor | None,
    transform: LogitTransform,
) -> Tensor:
    settings = current_settings()
    n, v = logits.shape
    values = torch.empty(n, device=logits.device)
    multiprocessors, cache_bytes = sizes(logits, settings)
    warps = sweep_warps(v * logits.element_size(), multiprocessors, cache_bytes, settings)
    if n < multiprocessors * settings.resident_warps // warps:
        # Whole rows would leave multiprocessors idle; rows so few fit into the cache all together.
        state = row_state.empty_state(n, logits.device)
        slopes = torch.empty_like(values)
        finish = Finish(objective, vocab_size, row_weight, values, slopes)
        _update(logits, labels, 0, state, transform, finish)
        if out is not None:
            _gradient(logits, labels, 0, state, slopes, out, transform)
        return values
    place = Place.of(logits)
    out_place = place if out is None else Place.of(out)
    kernels.log_odds_sweep_kernel[(n,)](
        place.base,
        labels,
        row_weight,
        None if out is None else out_place.base,
        values,
        *place.strides,
        *out_place.strides,
        v,
        *_factors(transform),
        transform.scale,
        *_vocabulary(vocab_size),
        OBJECTIVE=objective,
        VARIANT=_variant(place, out_place, transform, settings, warps),
        **_options(settings, warps),
    )
    return values


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values *= factor` in place and in float32, without a host synchronisation.

    Where the factor is exactly 1, the kernel reads that one number and returns.

    Args:
        values: A contiguous tensor of float32, bfloat16 or float16.
        factor: One number on the same device.
    """
    if values.numel() == 0:
        return
    _check_dtypes(values)
    settings = current_settings()
    multiprocessors, _ = sizes(values, settings)
    programs = multiprocessors * settings.resident_warps // settings.warps
    with device_guard(values):
        kernels.scale_kernel[(min(triton.cdiv(values.numel(), SCALE_BLOCK), programs),)](
            values,
            factor,
            values.numel(),
            BLOCK=SCALE_BLOCK,
            **_options(settings, settings.warps),
        )


class TritonKernels:
    """`SweepKernels` in Triton.

    Attributes:
        name: Name of the backend.
        swept_objectives: Names of the objectives that `log_odds_sweep` takes.
    """

    name = "triton"
    swept_objectives = frozenset(OBJECTIVES)

    def log_odds_update(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        transform: LogitTransform,
    ) -> None:
        """See `RowKernels.log_odds_update`. Each row of `state` must be contiguous."""
        _check_dtypes(logits)
        if logits.numel():
            with device_guard(logits):
                _update(logits, labels, first_column, state, transform)

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
        _check_dtypes(logits, out)
        if logits.numel():
            with device_guard(logits):
                _gradient(logits, labels, first_column, state, slope, out, transform)

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
        _check_dtypes(logits, *([] if out is None else [out]))
        if logits.shape[0] == 0:
            return row_weight.new_empty(0)
        with device_guard(logits):
            return _sweep(logits, labels, row_weight, objective, vocab_size, out, transform)
