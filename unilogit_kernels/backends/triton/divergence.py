"""Launches of the two-row kernels."""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform, TilePair
from unilogit_kernels.backends.gpu import GpuKernels, factors_of
from unilogit_kernels.backends.triton import settings
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


def _lanes(a_transform: LogitTransform, b_transform: LogitTransform) -> int:
    """Elements of each row that a thread holds at once: half as many as of a single row."""
    chosen = settings.current_settings()
    capped = a_transform.softcap or b_transform.softcap
    return (chosen.capped_lanes if capped else chosen.lanes) // 2


class DivergenceLaunches(GpuKernels):
    """Launches of the two-row kernels."""

    @on_its_device
    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        """See `RowKernels`; in one stage or two."""
        if self.are_empty(pair.a, pair.b):
            return
        a, b, labels, first_column, a_transform, b_transform = pair
        n, v = a.shape
        a_place, b_place = Place.of(a), Place.of(b)
        # The narrower rows lead: their 128 bits are two vectors of the wider ones.
        b_leads = b.element_size() < a.element_size()
        matrices = Matrices(b_place, (a_place,)) if b_leads else Matrices(a_place, (b_place,))
        shares = Shares.of(a, matrices, lanes=_lanes(a_transform, b_transform))
        parts = torch.empty(5, n, shares.parts, device=a.device) if shares.parts > 1 else None
        compiled = Pair(
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
            PAIR=compiled,
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
            PAIR=compiled,
            STRIDED=shares.walk.strided,
            **options_of(settings.current_settings(), warps=1),
        )

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
        if self.are_empty(pair.a, pair.b, out):
            return
        a, b, labels, first_column, a_transform, b_transform = pair
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
