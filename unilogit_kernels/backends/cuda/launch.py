"""Launches of the CUDA kernels: grids, and how a row is shared among blocks.

Functions here take tensors as they are, on any device: whether the backend may run on it is the
registry's business. None of the numbers has been measured on a GPU yet (docs/gpu.md).
"""

from __future__ import annotations

import math
from ctypes import c_float, c_int32, c_int64
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import pair_state, row_state
from unilogit_kernels.backends import LogitTransform
from unilogit_kernels.backends.cpu import OBJECTIVE_IDS
from unilogit_kernels.backends.cuda.launcher import Launcher, current
from unilogit_kernels.backends.cuda.sources import Kernel

TYPES = {torch.float32: "Float32", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}
"""Names of `csrc/cuda/platform.h`."""

RESIDENT_THREADS = 1024
"""Of a multiprocessor: 65,536 registers, of which the kernels take at most 64 a thread."""

ROW_THREADS = 128
"""Threads of a block that owns a whole row: few, so that rows end and begin independently."""

SPLIT_THREADS = 64
"""Threads of a block that owns a part of a row: a single row of 128k columns gives every
multiprocessor something to do."""

MOST_PARTS = 4096
"""Blocks of a row. A multiple of what any GPU runs at a time, and far below CUDA's own limit."""

MOST_COLUMNS = 2**30
"""Columns are counted in 32 bits, a few tiles beyond the last one included."""

_FLIGHT_BYTES, _CAPPED_FLIGHT_BYTES = 64, 32
"""`kFlightBytes` and `kCappedFlightBytes` of `csrc/cuda/row_walk.h`."""

_PAIR_COLUMNS = 16
"""`kPairVector * kPairVectors` of `csrc/cuda/pair_kernels.h`."""

_TYPE_IDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""`Type` of `csrc/cuda/pair_kernels.h`."""

_NO_OBJECTIVE = -1


# ---- arguments ---------------------------------------------------------------------------------


def _check(logits: Tensor, *others: Tensor) -> None:
    for tensor in (logits, *others):
        if tensor.dtype not in TYPES:
            raise TypeError(
                f"the CUDA kernels take {', '.join(map(str, TYPES))}, got {tensor.dtype} "
                "(float64 belongs to the eager backend)"
            )
    if logits.shape[1] > MOST_COLUMNS:
        raise ValueError(
            f"the CUDA kernels take at most {MOST_COLUMNS} columns, got {logits.shape[1]}"
        )


def _is_capped(transform: LogitTransform) -> bool:
    return transform.softcap != 0.0


def _cap(transform: LogitTransform) -> str:
    return "capped" if _is_capped(transform) else "plain"


def _factors(transform: LogitTransform) -> tuple[c_float, c_float]:
    """`scale` and `softcap` as the kernels take them: the cap's division goes into the scale."""
    if _is_capped(transform):
        return c_float(transform.scale / transform.softcap), c_float(transform.softcap)
    return c_float(transform.scale), c_float(0.0)


def _strides(matrix: Tensor) -> tuple[c_int64, c_int64]:
    return c_int64(matrix.stride(0)), c_int64(matrix.stride(1))


def _vocabulary(vocab_size: int) -> tuple[c_float, c_float, c_float]:
    """What `ObjectiveTerms` of `csrc/cuda/row_math.h` says of the vocabulary."""
    return (
        c_float(-math.log(vocab_size - 1)),
        c_float(math.log1p(1 / (vocab_size - 1))),
        c_float(1 / vocab_size),
    )


# ---- shares of a row ---------------------------------------------------------------------------


class Shares(NamedTuple):
    """How rows are shared among blocks: so many for each, of so many threads."""

    parts: int
    threads: int


def _shares(matrix: Tensor, thread_columns: int, launcher: Launcher) -> Shares:
    """One block for each row where that keeps the device busy, else as many as it takes.

    Args:
        matrix: The logits.
        thread_columns: How many a thread has in flight.
        launcher: Knows the device.
    """
    n, v = matrix.shape
    threads = launcher.multiprocessors(matrix) * RESIDENT_THREADS
    if n * ROW_THREADS >= threads:
        return Shares(1, ROW_THREADS)
    wanted = threads // SPLIT_THREADS // n
    tiles = v // (thread_columns * SPLIT_THREADS)
    return Shares(max(1, min(wanted, tiles, MOST_PARTS)), SPLIT_THREADS)


def _thread_columns(logits: Tensor, transform: LogitTransform) -> int:
    flight_bytes = _CAPPED_FLIGHT_BYTES if _is_capped(transform) else _FLIGHT_BYTES
    return flight_bytes // logits.element_size()


def sweep_threads(row_bytes: int, multiprocessors: int, cache_bytes: int) -> int:
    """Threads of a block that visits its row twice.

    The fewer rows are in flight, the more of them stay in the cache between the two visits; so
    blocks are as large as it takes to keep all rows in flight within three quarters of it.
    """
    threads = ROW_THREADS
    while threads < RESIDENT_THREADS:
        in_flight = multiprocessors * (RESIDENT_THREADS // threads)
        if 4 * in_flight * row_bytes <= 3 * cache_bytes:
            break
        threads *= 2
    return threads


# ---- launches ----------------------------------------------------------------------------------


class Finish(NamedTuple):
    """What the merge of parts computes beside the state.

    Attributes:
        objective: One of `OBJECTIVE_IDS`.
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
    launcher = current()
    n, v = logits.shape
    shares = _shares(logits, _thread_columns(logits, transform), launcher)
    parts = None
    if shares.parts > 1 or finish is not None:
        parts = torch.empty(2, n, shares.parts, device=logits.device)
    row_weight = None if finish is None else finish.row_weight
    launcher.launch(
        Kernel("LOG_ODDS_UPDATE", (TYPES[logits.dtype], _cap(transform))),
        (n, shares.parts),
        shares.threads,
        [
            logits,
            labels,
            row_weight,
            state,
            parts,
            *_strides(logits),
            c_int64(state.stride(0)),
            c_int64(first_column),
            c_int32(v),
            *_factors(transform),
        ],
        logits,
    )
    if parts is None:
        return
    launcher.launch(
        Kernel("MERGE_PARTS"),
        (n, 1),
        ROW_THREADS,
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
            c_int32(_NO_OBJECTIVE if finish is None else OBJECTIVE_IDS[finish.objective]),
            *_vocabulary(2 if finish is None else finish.vocab_size),
        ],
        logits,
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
    launcher = current()
    n, v = logits.shape
    shares = _shares(logits, _thread_columns(logits, transform), launcher)
    launcher.launch(
        Kernel("LOG_ODDS_GRADIENT", (TYPES[logits.dtype], TYPES[out.dtype], _cap(transform))),
        (n, shares.parts),
        shares.threads,
        [
            logits,
            labels,
            state,
            slope,
            out,
            *_strides(logits),
            *_strides(out),
            c_int64(state.stride(0)),
            c_int64(first_column),
            c_int32(v),
            *_factors(transform),
            c_float(transform.scale),
        ],
        logits,
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
    launcher = current()
    n, v = logits.shape
    values = torch.empty(n, device=logits.device)
    multiprocessors = launcher.multiprocessors(logits)
    row_bytes = v * logits.element_size()
    threads = sweep_threads(row_bytes, multiprocessors, launcher.cache_bytes(logits))
    if n * threads < multiprocessors * RESIDENT_THREADS:
        # Whole rows would leave multiprocessors idle; rows so few fit into the cache all together.
        state = row_state.empty_state(n, logits.device)
        slopes = torch.empty_like(values)
        finish = Finish(objective, vocab_size, row_weight, values, slopes)
        _update(logits, labels, 0, state, transform, finish)
        if out is not None:
            _gradient(logits, labels, 0, state, slopes, out, transform)
        return values
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
            *_strides(logits),
            *_strides(logits if out is None else out),
            c_int32(v),
            c_int32(OBJECTIVE_IDS[objective]),
            *_factors(transform),
            c_float(transform.scale),
            *_vocabulary(vocab_size),
        ],
        logits,
    )
    return values


def _divergence_update(
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    first_column: int,
    state: Tensor,
    a_transform: LogitTransform,
    b_transform: LogitTransform,
) -> None:
    launcher = current()
    n, v = a.shape
    shares = _shares(a, _PAIR_COLUMNS, launcher)
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
            *_strides(a),
            *_strides(b),
            c_int64(state.stride(0)),
            c_int64(first_column),
            c_int32(v),
            c_int32(_TYPE_IDS[a.dtype]),
            c_int32(_TYPE_IDS[b.dtype]),
            *_factors(a_transform),
            *_factors(b_transform),
        ],
        a,
    )
    if parts is not None:
        launcher.launch(
            Kernel("MERGE_PAIRS"),
            (n, 1),
            ROW_THREADS,
            [parts, state, c_int64(state.stride(0)), c_int32(shares.parts)],
            a,
        )


def _divergence_gradient(
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
    launcher = current()
    n, v = a.shape
    shares = _shares(a, _PAIR_COLUMNS, launcher)
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
            *_strides(a),
            *_strides(b),
            *_strides(out),
            c_int64(state.stride(0)),
            c_int64(coefficients.stride(0)),
            c_int64(first_column),
            c_int32(v),
            c_int32(_TYPE_IDS[a.dtype]),
            c_int32(_TYPE_IDS[b.dtype]),
            c_int32(_TYPE_IDS[out.dtype]),
            c_int32(student == "a"),
            *_factors(a_transform),
            c_float(a_transform.scale),
            *_factors(b_transform),
            c_float(b_transform.scale),
        ],
        a,
    )


def scale_(values: Tensor, factor: Tensor) -> None:
    """`values *= factor` in place and in float32, without a host synchronisation.

    Where the factor is exactly 1, the kernel reads that one number and returns.

    Args:
        values: A contiguous tensor of float32, bfloat16 or float16.
        factor: One float32 number on the same device.
    """
    if values.numel() == 0:
        return
    _check(values.view(1, -1)[:, :0])
    launcher = current()
    vectors = -(-values.nbytes // 16)
    blocks = launcher.multiprocessors(values) * RESIDENT_THREADS // ROW_THREADS
    launcher.launch(
        Kernel("SCALE", (TYPES[values.dtype],)),
        (max(1, min(blocks, vectors // ROW_THREADS)), 1),
        ROW_THREADS,
        [values, factor, c_int64(values.numel())],
        values,
    )


class CudaKernels:
    """`SweepKernels`, `ScaleKernels` and `DivergenceKernels` in CUDA C++.

    Attributes:
        name: Name of the backend.
        swept_objectives: Names of the objectives that `log_odds_sweep` takes.
    """

    name = "cuda"
    swept_objectives = frozenset(OBJECTIVE_IDS)

    def log_odds_update(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        transform: LogitTransform,
    ) -> None:
        """See `RowKernels.log_odds_update`. Each row of `state` must be contiguous."""
        _check(logits)
        if logits.numel():
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
        _check(logits, out)
        if logits.numel():
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
        _check(logits, *([] if out is None else [out]))
        if logits.shape[0] == 0:
            return row_weight.new_empty(0)
        return _sweep(logits, labels, row_weight, objective, vocab_size, out, transform)

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """See `ScaleKernels.scale_`."""
        scale_(values, factor)

    def divergence_update(
        self,
        a: Tensor,
        b: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        a_transform: LogitTransform,
        b_transform: LogitTransform,
    ) -> None:
        """See `DivergenceKernels.divergence_update`. Rows of `state` must be contiguous."""
        _check(a, b)
        if a.numel():
            _divergence_update(a, b, labels, first_column, state, a_transform, b_transform)

    def divergence_gradient(
        self,
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
        """See `DivergenceKernels.divergence_gradient`.

        Rows of `state` and `coefficients` must be contiguous.
        """
        _check(a, b, out)
        if a.numel():
            _divergence_gradient(
                a,
                b,
                labels,
                first_column,
                state,
                coefficients,
                student,
                out,
                a_transform,
                b_transform,
            )
