"""Launches of the two-row kernels."""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.backends.gpu import factors_of
from unilogit_kernels.backends.triton import settings
from unilogit_kernels.backends.triton.geometry import (
    Matrices,
    Place,
    Shares,
    logits_of,
    options_of,
)
from unilogit_kernels.backends.triton.kernels.divergence import (
    Pair,
    divergence_gradient_kernel,
    divergence_update_kernel,
    merge_pair_parts_kernel,
)


def _lanes(a_transform: LogitTransform, b_transform: LogitTransform) -> int:
    """Elements of each row that a thread holds at once: half as many as of a single row."""
    chosen = settings.current_settings()
    capped = a_transform.softcap or b_transform.softcap
    return (chosen.capped_lanes if capped else chosen.lanes) // 2


def update(
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    first_column: int,
    state: Tensor,
    a_transform: LogitTransform,
    b_transform: LogitTransform,
) -> None:
    """Fold columns into `state`, in one stage or two; see `DivergenceKernels.divergence_update`."""
    n, v = a.shape
    a_place, b_place = Place.of(a), Place.of(b)
    # The narrower rows lead: their 128 bits are two vectors of the wider ones.
    b_leads = b.element_size() < a.element_size()
    matrices = Matrices(b_place, (a_place,)) if b_leads else Matrices(a_place, (b_place,))
    shares = Shares.of(a, matrices, lanes=_lanes(a_transform, b_transform))
    parts = torch.empty(5, n, shares.parts, device=a.device) if shares.parts > 1 else None
    pair = Pair(
        logits_of(a_place, matrices, a_transform, ""),
        logits_of(b_place, matrices, b_transform, ""),
        student_is_a=False,
    )
    factors = (*factors_of(a_transform), *factors_of(b_transform))
    divergence_update_kernel[(n, shares.parts)](
        a_place.base,
        b_place.base,
        labels,
        state,
        parts,
        *a_place.strides,
        *b_place.strides,
        state.stride(0),
        first_column,
        v,
        shares.blocks_per_part,
        *factors,
        B_LEADS=b_leads,
        PAIR=pair,
        WALK=shares.walk,
        **shares.options,
    )
    if parts is None:
        return
    merge_pair_parts_kernel[(n,)](
        parts,
        a_place.base,
        b_place.base,
        labels,
        state,
        shares.parts,
        *a_place.strides,
        *b_place.strides,
        state.stride(0),
        first_column,
        v,
        *factors,
        MOST_PARTS=triton.next_power_of_2(shares.parts),
        PAIR=pair,
        STRIDED=shares.walk.strided,
        **options_of(settings.current_settings(), warps=1),
    )


def gradient(
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
    """Write gradient rows; see `DivergenceKernels.divergence_gradient`."""
    n, v = a.shape
    a_place, b_place, out_place = Place.of(a), Place.of(b), Place.of(out)
    matrices = Matrices(out_place, (a_place, b_place))
    shares = Shares.of(a, matrices, lanes=_lanes(a_transform, b_transform))
    divergence_gradient_kernel[(n, shares.parts)](
        a_place.base,
        b_place.base,
        labels,
        state,
        coefficients,
        out_place.base,
        *a_place.strides,
        *b_place.strides,
        *out_place.strides,
        state.stride(0),
        coefficients.stride(0),
        first_column,
        v,
        shares.blocks_per_part,
        *factors_of(a_transform),
        *factors_of(b_transform),
        (a_transform if student == "a" else b_transform).scale,
        PAIR=Pair(
            logits_of(a_place, matrices, a_transform, ""),
            logits_of(b_place, matrices, b_transform, ""),
            student_is_a=student == "a",
        ),
        WALK=shares.walk,
        # Equal rows give exactly 0 only where both terms are rounded before they are added.
        **{**shares.options, "enable_fp_fusion": False},
    )
