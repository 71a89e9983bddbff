"""Launches of the log-odds kernels: one stage or two, and whole rows in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.geometry import TYPES, Shares, factors
from unilogit_kernels.backends.cuda.prepared import (
    CudaLaunches,
    Device,
    Matrix,
    Prepared,
    Update,
)
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.backends.gpu import Finish
from unilogit_kernels.backends.ids import NO_OBJECTIVE, OBJECTIVE_IDS
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds

_FLIGHT_BYTES, _FEWER_FLIGHT_BYTES = 64, 32
"""`kFlightBytes` and `kFewerFlightBytes` of `csrc/cuda/row_walk.h`."""


class _Family(NamedTuple):
    """Kernels that keep the same rows of a state.

    Attributes:
        update: Macro of the kernel that folds a tile into a state.
        merge: Macro of the one that merges what blocks leave.
        planes: How many rows these parts have: those of a state but the label's.
        branches: Whether kernels take what is needed as a number, and branch.
    """

    update: str
    merge: str
    planes: int
    branches: bool = False


_PLAIN = _Family("LOG_ODDS_UPDATE", "MERGE_PARTS", 2)
_RUNNER_UP = _Family("RUNNER_UP_UPDATE", "RUNNER_UP_MERGE", 3)
_GENERAL = _Family("GENERAL_UPDATE", "GENERAL_MERGE", row_state.SQUARE, branches=True)


def _family(needs: RowNeeds) -> _Family:
    """The kernels that do no more than what is needed; a logsumexp is in every state."""
    if needs.mean or needs.entropy or needs.variance:
        return _GENERAL
    return _RUNNER_UP if needs.runner_up else _PLAIN


def _cap(transform: LogitTransform) -> str:
    return "capped" if transform.softcap else "plain"


def _thread_columns(logits: Matrix, *, fewer: bool) -> int:
    return (_FEWER_FLIGHT_BYTES if fewer else _FLIGHT_BYTES) // logits.dtype.itemsize


def _vocabulary(vocab_size: int) -> tuple[c_float, c_float, c_float]:
    """What `ObjectiveTerms` of `csrc/cuda/row_math.h` says of the vocabulary."""
    uniform, softplus, inverse = gpu.vocabulary_terms(vocab_size)
    return c_float(uniform), c_float(softplus), c_float(inverse)


@functools.lru_cache(gpu.GEOMETRIES)
def _update(
    n: int,
    v: int,
    logits: Matrix,
    first_column: int,
    transform: LogitTransform,
    needs: RowNeeds,
    state_stride: int,
    objective: str | None,
    vocab_size: int,
    multiprocessors: int,
) -> Update | None:
    """None where there is nothing to launch for."""
    gpu.check_matrices(CudaLaunches.language, v, logits.dtype)
    if n * v == 0:
        return None
    family = _family(needs)
    assert objective is None or family is _PLAIN
    columns = _thread_columns(logits, fewer=bool(transform.softcap))
    shares = Shares.of(n, v, columns, multiprocessors)
    needed = [c_int32(needs.bits)] if family.branches else []
    fold = Prepared(
        Kernel(family.update, (TYPES[logits.dtype], _cap(transform))),
        (n, shares.parts),
        shares.threads,
        (
            *logits.strides,
            c_int64(state_stride),
            c_int64(first_column),
            c_int32(v),
            *factors(transform),
            *needed,
        ),
    )
    if shares.parts == 1 and objective is None:
        return Update(fold)
    numbers: tuple[c_float | c_int32 | c_int64, ...]
    if family is _PLAIN:
        numbers = (
            c_int64(state_stride),
            c_int64(0 if objective is None else vocab_size),
            c_int32(shares.parts),
            c_int32(NO_OBJECTIVE if objective is None else OBJECTIVE_IDS[objective]),
            *_vocabulary(vocab_size),
        )
    else:
        numbers = (c_int64(state_stride), c_int32(shares.parts), *needed)
    merge = Prepared(Kernel(family.merge), (n, 1), geometry.ROW_THREADS, numbers)
    return Update(fold, (family.planes, shares.parts), merge)


@functools.lru_cache(gpu.GEOMETRIES)
def _gradient(
    n: int,
    v: int,
    logits: Matrix,
    out: Matrix,
    first_column: int,
    transform: LogitTransform,
    state_rows: int,
    state_stride: int,
    slope_stride: int,
    multiprocessors: int,
) -> Prepared | None:
    """None where there is nothing to launch for."""
    gpu.check_matrices(CudaLaunches.language, v, logits.dtype, out.dtype)
    if n * v == 0:
        return None
    is_general, has_runner_up = state_rows > row_state.COUNT, state_rows > row_state.RUNNER_UP
    fewer = bool(transform.softcap) or is_general
    shares = Shares.of(n, v, _thread_columns(logits, fewer=fewer), multiprocessors)
    macro = "RUNNER_UP_GRADIENT" if has_runner_up else "LOG_ODDS_GRADIENT"
    return Prepared(
        Kernel(
            "GENERAL_GRADIENT" if is_general else macro,
            (TYPES[logits.dtype], TYPES[out.dtype], _cap(transform)),
        ),
        (n, shares.parts),
        shares.threads,
        (
            *logits.strides,
            *out.strides,
            c_int64(state_stride),
            *([c_int64(slope_stride)] if has_runner_up else []),
            c_int64(first_column),
            c_int32(v),
            *factors(transform),
            c_float(transform.scale),
        ),
    )


class _Sweep(NamedTuple):
    """Whole rows in one pass; `launch` is None where two passes, or nothing, are to be launched."""

    launch: Prepared | None
    is_empty: bool = False


@functools.lru_cache(gpu.GEOMETRIES)
def _sweep(
    n: int,
    v: int,
    logits: Matrix,
    out: Matrix | None,
    transform: LogitTransform,
    objective: str,
    vocab_size: int,
    device: Device,
) -> _Sweep:
    matrices = (logits,) if out is None else (logits, out)
    gpu.check_matrices(CudaLaunches.language, v, *(each.dtype for each in matrices))
    if n * v == 0:
        return _Sweep(None, is_empty=True)
    threads = gpu.sweep_size(
        v * logits.dtype.itemsize,
        *device,
        smallest=geometry.ROW_THREADS,
        resident=geometry.RESIDENT_THREADS,
    )
    at_a_time = device.multiprocessors * (geometry.RESIDENT_THREADS // threads)
    if not gpu.sweep_pays(n, at_a_time):
        return _Sweep(None)
    written = out or logits
    launch = Prepared(
        Kernel("LOG_ODDS_SWEEP", (TYPES[logits.dtype], TYPES[written.dtype], _cap(transform))),
        (n, 1),
        threads,
        (
            *logits.strides,
            *written.strides,
            c_int32(v),
            c_int32(OBJECTIVE_IDS[objective]),
            *factors(transform),
            c_float(transform.scale),
            *_vocabulary(vocab_size),
        ),
    )
    return _Sweep(launch)


class LogOddsLaunches(CudaLaunches):
    """Launches of the log-odds kernels."""

    def log_odds_update(
        self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN, finish: Finish | None = None
    ) -> None:
        """See `GpuKernels`; in one stage or two."""
        logits, labels, first_column, transform = tile
        launcher = self._launcher
        n, v = logits.shape
        objective, vocab_size, row_weight, values, slopes = finish or gpu.NO_FINISH
        update = _update(
            n,
            v,
            Matrix.of(logits),
            first_column,
            transform,
            needs,
            state.stride(0),
            objective,
            vocab_size,
            launcher.multiprocessors(logits),
        )
        if update is None:
            return
        parts = None
        if update.parts is not None:
            planes, count = update.parts
            parts = torch.empty(planes, n, count, device=logits.device)
        if _family(needs) is not _PLAIN:
            update.fold.through(launcher, logits, logits, labels, state, parts)
            if update.merge is not None:
                update.merge.through(launcher, logits, parts, state)
            return
        update.fold.through(launcher, logits, logits, labels, row_weight, state, parts)
        if update.merge is not None:
            pointers = (parts, labels, row_weight, state, values, slopes)
            update.merge.through(launcher, logits, *pointers)

    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        """See `RowKernels`."""
        logits, labels, first_column, transform = tile
        launcher = self._launcher
        launch = _gradient(
            *logits.shape,
            Matrix.of(logits),
            Matrix.of(out),
            first_column,
            transform,
            *state.shape[:1],
            state.stride(0),
            slope.stride(0),
            launcher.multiprocessors(logits),
        )
        if launch is not None:
            launch.through(launcher, logits, logits, labels, state, slope, out)

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
        launcher = self._launcher
        values = torch.empty(logits.shape[0], device=logits.device)
        sweep = _sweep(
            *logits.shape,
            Matrix.of(logits),
            None if out is None else Matrix.of(out),
            transform,
            objective,
            vocab_size,
            Device.of(launcher, logits),
        )
        if sweep.launch is not None:
            sweep.launch.through(launcher, logits, logits, labels, row_weight, out, values)
        elif not sweep.is_empty:
            slopes = torch.empty_like(values)
            finish = Finish(objective, vocab_size, row_weight, values, slopes)
            return self.sweep_in_two_passes(tile, finish, out)
        return values
