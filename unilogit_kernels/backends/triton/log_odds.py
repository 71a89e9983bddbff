"""Launches of the log-odds kernels: one stage or two, and whole rows in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.gpu import Finish, factors_of
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
from unilogit_kernels.backends.triton.prepared import Prepared, TritonLaunches, Update
from unilogit_kernels.backends.triton.settings import Device, Settings
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


@functools.lru_cache(gpu.GEOMETRIES)
def _update(
    n: int,
    v: int,
    place: Place,
    first_column: int,
    transform: LogitTransform,
    needs: RowNeeds,
    state_stride: int,
    objective: str | None,
    vocab_size: int,
    device: Device,
) -> Update | None:
    """None where there is nothing to launch for."""
    gpu.check_matrices(TritonLaunches.language, v, place.dtype)
    if n * v == 0:
        return None
    chosen, matrices, computed = device.settings, Matrices(place), Needs.of(needs)
    lanes = _lanes(transform, chosen, computed)
    shares = Shares.of(n, v, device, matrices, lanes)
    factors = factors_of(transform)
    compiled = logits_of(place, matrices, transform, "", chosen, computed)
    fold = Prepared(
        log_odds_update_kernel,
        (n, shares.parts),
        (*place.strides, state_stride, first_column, v, shares.blocks_per_part, *factors),
        {"LOGITS": compiled, "WALK": shares.walk},
        shares.options,
    )
    if shares.parts == 1 and objective is None:
        return Update(fold)
    merging = options_of(chosen, warps=1)
    if needs.general:
        # Rows of many parts are few: what they take of the registers is of no matter.
        merging.pop("maxnreg", None)
    numbers = (shares.parts, *place.strides, state_stride, first_column, v, *factors)
    merge = Prepared(
        merge_parts_kernel,
        (n, 1),
        (*numbers, *gpu.vocabulary_terms(vocab_size)),
        {
            "MOST_PARTS": triton.next_power_of_2(shares.parts + 1),
            "OBJECTIVE": objective,
            "LOGITS": compiled,
            "STRIDED": shares.walk.strided,
        },
        merging,
    )
    return Update(fold, shares.parts, merge)


@functools.lru_cache(gpu.GEOMETRIES)
def _gradient(
    n: int,
    v: int,
    place: Place,
    out_place: Place,
    first_column: int,
    transform: LogitTransform,
    state_stride: int,
    slopes: int,
    slope_stride: int,
    device: Device,
) -> Prepared | None:
    """None where there is nothing to launch for."""
    gpu.check_matrices(TritonLaunches.language, v, place.dtype, out_place.dtype)
    if n * v == 0:
        return None
    matrices = Matrices(out_place, (place,))
    shares = Shares.of(n, v, device, matrices, _lanes(transform, device.settings))
    return Prepared(
        log_odds_gradient_kernel,
        (n, shares.parts),
        (
            *place.strides,
            *out_place.strides,
            state_stride,
            slope_stride,
            first_column,
            v,
            shares.blocks_per_part,
            *factors_of(transform),
            transform.scale,
        ),
        {
            "SLOPES": slopes,
            "LOGITS": logits_of(place, matrices, transform, "", device.settings),
            "WALK": shares.walk,
        },
        shares.options,
    )


class _Sweep(NamedTuple):
    """Whole rows in one pass; `launch` is None where two passes, or nothing, are to be launched."""

    launch: Prepared | None
    is_empty: bool = False


@functools.lru_cache(gpu.GEOMETRIES)
def _sweep(
    n: int,
    v: int,
    place: Place,
    out_place: Place | None,
    transform: LogitTransform,
    objective: str,
    vocab_size: int,
    device: Device,
) -> _Sweep:
    places = (place,) if out_place is None else (place, out_place)
    gpu.check_matrices(TritonLaunches.language, v, *(each.dtype for each in places))
    if n * v == 0:
        return _Sweep(None, is_empty=True)
    chosen = device.settings
    warps = chosen.warps  # without a gradient a row is passed over once
    if out_place is not None:
        warps = gpu.sweep_size(
            v * place.dtype.itemsize,
            device.multiprocessors,
            device.cache_bytes,
            smallest=SWEEP_WARPS,
            resident=chosen.resident_warps,
        )
    if not gpu.sweep_pays(n, device.multiprocessors * (chosen.resident_warps // warps)):
        return _Sweep(None)
    matrices = Matrices(out_place or place, (place,))
    threads = warps * chosen.warp_threads
    lanes = min(_lanes(transform, chosen), LARGEST_TILE // threads)
    # For a gradient the logits are read again, from the cache: they should leave it last.
    eviction = "" if out_place is None else "evict_last"
    launch = Prepared(
        log_odds_sweep_kernel,
        (n, 1),
        (
            *place.strides,
            *(out_place or place).strides,
            v,
            *factors_of(transform),
            transform.scale,
            *gpu.vocabulary_terms(vocab_size),
        ),
        {
            "OBJECTIVE": objective,
            "LOGITS": logits_of(place, matrices, transform, eviction, chosen),
            "WALK": walk_over(v, matrices, lanes, threads),
        },
        options_of(chosen, warps),
    )
    return _Sweep(launch)


class LogOddsLaunches(TritonLaunches):
    """Launches of the log-odds kernels."""

    @on_its_device
    def log_odds_update(
        self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN, finish: Finish | None = None
    ) -> None:
        """See `GpuKernels`; in one stage or two."""
        logits, labels, first_column, transform = tile
        base, place = Place.of(logits)
        n, v = logits.shape
        objective, vocab_size, row_weight, values, slopes = finish or gpu.NO_FINISH
        update = _update(
            n,
            v,
            place,
            first_column,
            transform,
            needs,
            state.stride(0),
            objective,
            vocab_size,
            self._device(logits),
        )
        if update is None:
            return
        if update.merge is None:
            self._launch(update.fold, base, labels, row_weight, state, None)
            return
        parts = torch.empty(state.shape[0], n, update.parts, device=logits.device)
        self._launch(update.fold, base, labels, row_weight, state, parts)
        self._launch(update.merge, parts, base, labels, row_weight, state, values, slopes)

    @on_its_device
    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        """See `RowKernels`."""
        logits, labels, first_column, transform = tile
        (base, place), (out_base, out_place) = Place.of(logits), Place.of(out)
        slopes, slope_stride = (1, 0) if slope.dim() == 1 else (slope.shape[0], slope.stride(0))
        launch = _gradient(
            *logits.shape,
            place,
            out_place,
            first_column,
            transform,
            state.stride(0),
            slopes,
            slope_stride,
            self._device(logits),
        )
        if launch is not None:
            self._launch(launch, base, labels, state, slope, out_base)

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
        values = torch.empty(logits.shape[0], device=logits.device)
        base, place = Place.of(logits)
        out_base, out_place = (None, None) if out is None else Place.of(out)
        device = self._device(logits)
        sweep = _sweep(*logits.shape, place, out_place, transform, objective, vocab_size, device)
        if sweep.launch is not None:
            self._launch(sweep.launch, base, labels, row_weight, out_base, values)
        elif not sweep.is_empty:
            slopes = torch.empty_like(values)
            finish = Finish(objective, vocab_size, row_weight, values, slopes)
            return self.sweep_in_two_passes(tile, finish, out)
        return values
