"""Launches of the log-odds kernels: one stage or two, and whole rows in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.gpu import Finish, GpuKernels, factors_of
from unilogit_kernels.backends.triton import settings
from unilogit_kernels.backends.triton.geometry import (
    Matrices,
    Place,
    Shares,
    logits_of,
    on_its_device,
    options_of,
    walk_over,
)
from unilogit_kernels.backends.triton.kernels.log_odds import (
    log_odds_gradient_kernel,
    log_odds_sweep_kernel,
    log_odds_update_kernel,
    merge_parts_kernel,
)
from unilogit_kernels.backends.triton.kernels.row_maths import Needs
from unilogit_kernels.backends.triton.settings import Settings
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds

LARGEST_TILE = 16384
"""Columns of a tile in a sweep. What fills no tile of a row is walked over under masks, which at
twice as many costs more instructions than rescaling the sum half as often saves."""

SWEEP_WARPS = 4
"""Least of a program that passes its row twice."""


def _lanes(transform: LogitTransform, chosen: Settings, needs: tuple[bool, ...] = ()) -> int:
    # The columns of the runner-up and what moments are taken of need registers, as a cap does.
    lanes = chosen.capped_lanes if transform.softcap or any(needs) else chosen.lanes
    return lanes // 2 if needs and all(needs) else lanes


class LogOddsLaunches(GpuKernels):
    """Launches of the log-odds kernels."""

    @on_its_device
    def log_odds_update(
        self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN, finish: Finish | None = None
    ) -> None:
        """See `GpuKernels`; in one stage or two."""
        if self.are_empty(tile.logits):
            return
        logits, labels, first_column, transform = tile
        n, v = logits.shape
        chosen = settings.current_settings()
        place = Place.of(logits)
        matrices = Matrices(place)
        computed = Needs.of(needs)
        shares = Shares.of(logits, matrices, lanes=_lanes(transform, chosen, computed))
        two_stages = shares.parts > 1 or finish is not None
        rows = state.shape[0]
        parts = torch.empty(rows, n, shares.parts, device=logits.device) if two_stages else None
        row_weight = None if finish is None else finish.row_weight
        factors = factors_of(transform)
        compiled = logits_of(place, matrices, transform, "", computed)
        log_odds_update_kernel[(n, shares.parts)](
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
            *factors,
            LOGITS=compiled,
            WALK=shares.walk,
            **shares.options,
        )
        if parts is None:
            return
        merging = options_of(chosen, warps=1)
        if needs.general:
            # Rows of many parts are few: what they take of the registers is of no matter.
            merging.pop("maxnreg", None)
        merge_parts_kernel[(n,)](
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
            *factors,
            *gpu.vocabulary_terms(2 if finish is None else finish.vocab_size),
            MOST_PARTS=triton.next_power_of_2(shares.parts + 1),
            OBJECTIVE=None if finish is None else finish.objective,
            LOGITS=compiled,
            STRIDED=shares.walk.strided,
            **merging,
        )

    @on_its_device
    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        """See `RowKernels`."""
        if self.are_empty(tile.logits, out):
            return
        logits, labels, first_column, transform = tile
        n, v = logits.shape
        place, out_place = Place.of(logits), Place.of(out)
        matrices = Matrices(out_place, (place,))
        shares = Shares.of(logits, matrices, lanes=_lanes(transform, settings.current_settings()))
        slopes = 1 if slope.dim() == 1 else slope.shape[0]
        log_odds_gradient_kernel[(n, shares.parts)](
            place.base,
            labels,
            state,
            slope,
            out_place.base,
            *place.strides,
            *out_place.strides,
            state.stride(0),
            0 if slopes == 1 else slope.stride(0),
            first_column,
            v,
            shares.blocks_per_part,
            *factors_of(transform),
            transform.scale,
            SLOPES=slopes,
            LOGITS=logits_of(place, matrices, transform, ""),
            WALK=shares.walk,
            **shares.options,
        )

    @on_its_device
    def log_odds_sweep(
        self,
        tile: Tile,
        row_weight: Tensor,
        objective: str,
        vocab_size: int,
        out: Tensor | None,
        weights: Sequence[float] = (),
    ) -> Tensor:
        """See `RowKernels`."""
        logits, labels, _, transform = tile
        values = torch.empty(logits.shape[0], device=tile.device)
        if self.are_empty(logits, out):
            return values
        chosen = settings.current_settings()
        n, v = logits.shape
        multiprocessors, cache_bytes = settings.sizes(logits, chosen)
        row_bytes = v * logits.element_size()
        warps = chosen.warps  # without a gradient a row is passed over once
        if out is not None:
            warps = gpu.sweep_size(
                row_bytes,
                multiprocessors,
                cache_bytes,
                smallest=SWEEP_WARPS,
                resident=chosen.resident_warps,
            )
        if not gpu.sweep_pays(n, multiprocessors * (chosen.resident_warps // warps)):
            slopes = torch.empty_like(values)
            finish = Finish(objective, vocab_size, row_weight, values, slopes)
            return self.sweep_in_two_passes(tile, finish, out)
        place = Place.of(logits)
        out_place = place if out is None else Place.of(out)
        matrices = Matrices(out_place, (place,))
        threads = warps * chosen.warp_threads
        lanes = min(_lanes(transform, chosen), LARGEST_TILE // threads)
        log_odds_sweep_kernel[(n,)](
            place.base,
            labels,
            row_weight,
            None if out is None else out_place.base,
            values,
            *place.strides,
            *out_place.strides,
            v,
            *factors_of(transform),
            transform.scale,
            *gpu.vocabulary_terms(vocab_size),
            OBJECTIVE=objective,
            # For a gradient the logits are read again, from the cache: they should leave it last.
            LOGITS=logits_of(place, matrices, transform, "" if out is None else "evict_last"),
            WALK=walk_over(v, matrices, lanes, threads),
            **options_of(chosen, warps),
        )
        return values
