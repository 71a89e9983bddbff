"""Launches of the log-odds kernels: one stage or two, and whole rows in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, Tile
from unilogit_kernels.backends.cuda import geometry
from unilogit_kernels.backends.cuda.driver import current
from unilogit_kernels.backends.cuda.geometry import TYPES, Shares, factors, strides
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.backends.gpu import Finish, GpuKernels
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


def _gradient(state: Tensor) -> str:
    """Macro of the kernel that takes the slopes of such a state."""
    if row_state.is_general(state):
        return "GENERAL_GRADIENT"
    return "RUNNER_UP_GRADIENT" if row_state.has_runner_up(state) else "LOG_ODDS_GRADIENT"


def _cap(transform: LogitTransform) -> str:
    return "capped" if transform.softcap else "plain"


def _thread_columns(logits: Tensor, *, fewer: bool) -> int:
    return (_FEWER_FLIGHT_BYTES if fewer else _FLIGHT_BYTES) // logits.element_size()


def _vocabulary(vocab_size: int) -> tuple[c_float, c_float, c_float]:
    """What `ObjectiveTerms` of `csrc/cuda/row_math.h` says of the vocabulary."""
    uniform, softplus, inverse = gpu.vocabulary_terms(vocab_size)
    return c_float(uniform), c_float(softplus), c_float(inverse)


class LogOddsLaunches(GpuKernels):
    """Launches of the log-odds kernels."""

    def log_odds_update(
        self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN, finish: Finish | None = None
    ) -> None:
        """See `GpuKernels`; in one stage or two."""
        if self.are_empty(tile.logits):
            return
        logits, labels, first_column, transform = tile
        launcher = current()
        n, v = logits.shape
        family = _family(needs)
        columns = _thread_columns(logits, fewer=bool(transform.softcap))
        shares = Shares.of(logits, columns, launcher)
        assert finish is None or family is _PLAIN
        parts = None
        if shares.parts > 1 or finish is not None:
            parts = torch.empty(family.planes, n, shares.parts, device=logits.device)
        row_weight = None if finish is None else finish.row_weight
        needed = [c_int32(needs.bits)] if family.branches else []
        launcher.launch(
            Kernel(family.update, (TYPES[logits.dtype], _cap(transform))),
            (n, shares.parts),
            shares.threads,
            [
                logits,
                labels,
                *([row_weight] if family is _PLAIN else []),
                state,
                parts,
                *strides(logits),
                c_int64(state.stride(0)),
                c_int64(first_column),
                c_int32(v),
                *factors(transform),
                *needed,
            ],
            logits,
        )
        if parts is None:
            return
        if family is not _PLAIN:
            launcher.launch(
                Kernel(family.merge),
                (n, 1),
                geometry.ROW_THREADS,
                [parts, state, c_int64(state.stride(0)), c_int32(shares.parts), *needed],
                logits,
            )
            return
        launcher.launch(
            Kernel(family.merge),
            (n, 1),
            geometry.ROW_THREADS,
            [
                parts,
                labels,
                row_weight,
                state,
                None if finish is None else finish.values,
                None if finish is None else finish.slopes,
                c_int64(state.stride(0)),
                c_int64(0 if finish is None else finish.vocab_size),
                c_int32(shares.parts),
                c_int32(NO_OBJECTIVE if finish is None else OBJECTIVE_IDS[finish.objective]),
                *_vocabulary(2 if finish is None else finish.vocab_size),
            ],
            logits,
        )

    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        """See `RowKernels`."""
        if self.are_empty(tile.logits, out):
            return
        logits, labels, first_column, transform = tile
        launcher = current()
        n, v = logits.shape
        fewer = bool(transform.softcap) or row_state.is_general(state)
        shares = Shares.of(logits, _thread_columns(logits, fewer=fewer), launcher)
        launcher.launch(
            Kernel(_gradient(state), (TYPES[logits.dtype], TYPES[out.dtype], _cap(transform))),
            (n, shares.parts),
            shares.threads,
            [
                logits,
                labels,
                state,
                slope,
                out,
                *strides(logits),
                *strides(out),
                c_int64(state.stride(0)),
                *([c_int64(slope.stride(0))] if row_state.has_runner_up(state) else []),
                c_int64(first_column),
                c_int32(v),
                *factors(transform),
                c_float(transform.scale),
            ],
            logits,
        )

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
        launcher = current()
        n, v = logits.shape
        multiprocessors = launcher.multiprocessors(logits)
        threads = gpu.sweep_size(
            v * logits.element_size(),
            multiprocessors,
            launcher.cache_bytes(logits),
            smallest=geometry.ROW_THREADS,
            resident=geometry.RESIDENT_THREADS,
        )
        if not gpu.sweep_pays(n, multiprocessors * (geometry.RESIDENT_THREADS // threads)):
            slopes = torch.empty_like(values)
            finish = Finish(objective, vocab_size, row_weight, values, slopes)
            return self.sweep_in_two_passes(tile, finish, out)
        out_type = logits.dtype if out is None else out.dtype
        launcher.launch(
            Kernel("LOG_ODDS_SWEEP", (TYPES[logits.dtype], TYPES[out_type], _cap(transform))),
            (n, 1),
            threads,
            [
                logits,
                labels,
                row_weight,
                out,
                values,
                *strides(logits),
                *strides(logits if out is None else out),
                c_int32(v),
                c_int32(OBJECTIVE_IDS[objective]),
                *factors(transform),
                c_float(transform.scale),
                *_vocabulary(vocab_size),
            ],
            logits,
        )
        return values
