"""What launches on GPUs have in common, whatever language the kernels are written in.

How rows are shared among programs (Triton's word; blocks in CUDA), and what kernels take of a
transform and of a vocabulary. Nothing here has been measured on a GPU yet (docs/gpu.md).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile
from unilogit_kernels.backends.ids import DTYPE_IDS, GPU_OBJECTIVES
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds

MOST_COLUMNS = 2**30
"""Columns are counted in 32 bits, a few tiles beyond the last one included."""

WAVES = 4
"""Programs that share the work evenly come in at least so many waves: the last, partial one then
leaves a GPU idle for a fifth of the time at most."""

LEAST_EFFICIENCY = 2 / 3
"""A sweep moves two thirds of the bytes of two passes: it pays while no more of the device idles
in the last wave of rows."""


# ---- arguments ---------------------------------------------------------------------------------


class Finish(NamedTuple):
    """What a merge of parts computes beside the state.

    Attributes:
        objective: Name of the objective, one that the kernels know.
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


NO_FINISH = (None, 2, None, None, None)
"""A `Finish` of nothing."""


def factors_of(transform: LogitTransform) -> tuple[float, float]:
    """`scale` and `softcap` as the kernels take them: the cap's division goes into the scale."""
    if transform.softcap:
        return transform.scale / transform.softcap, transform.softcap
    return transform.scale, 0.0


def vocabulary_terms(vocab_size: int) -> tuple[float, float, float]:
    """What objectives know of the vocabulary: `u = -log(V - 1)`, `log(1 + exp(u))`, `1 / V`."""
    return -math.log(vocab_size - 1), math.log1p(1 / (vocab_size - 1)), 1 / vocab_size


# ---- what both backends do ---------------------------------------------------------------------


GEOMETRIES = 2048
"""Of each kind of launch so many are remembered: those of a call's chunks, for many sizes."""


class GpuKernels(RowKernels):
    """What both backends for GPUs do: a sweep where one launch of whole rows is slower.

    Attributes:
        language: What the kernels are written in, as messages name it.
    """

    language: str
    swept_objectives = GPU_OBJECTIVES
    scales_in_place = True

    @abstractmethod
    def log_odds_update(
        self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN, finish: Finish | None = None
    ) -> None:
        """See `RowKernels`; `finish` says what to compute beside, of a tile of whole rows."""

    def sweep_in_two_passes(self, tile: Tile, finish: Finish, out: Tensor | None) -> Tensor:
        """See `RowKernels.log_odds_sweep`: the merge of the parts tells each row's slope."""
        state = row_state.empty_state(tile.logits.shape[0], tile.device)
        self.log_odds_update(tile, state, finish=finish)
        if out is not None:
            self.log_odds_gradient(tile, state, finish.slopes, out)
        return finish.values


def check_matrices(language: str, v: int, *dtypes: torch.dtype) -> None:
    """Whether kernels take such logits and gradients, of `v` columns each.

    Args:
        language: What the kernels are written in.
        v: Columns.
        dtypes: Of all of them.

    Raises:
        TypeError: A dtype is not one of `DTYPE_IDS`.
        ValueError: There are more than `MOST_COLUMNS` columns.
    """
    for dtype in dtypes:
        if dtype not in DTYPE_IDS:
            raise TypeError(
                f"the {language} kernels take {', '.join(map(str, DTYPE_IDS))}, "
                f"got {dtype} (float64 belongs to the eager backend)"
            )
    if v > MOST_COLUMNS:
        raise ValueError(f"the {language} kernels take at most {MOST_COLUMNS} columns, got {v}")


def check_scaled(language: str, values: Tensor) -> None:
    """Whether kernels scale a tensor in place.

    Raises:
        TypeError: The dtype is not one of `DTYPE_IDS`.
        ValueError: The tensor is not contiguous.
    """
    check_matrices(language, 1, values.dtype)
    if not values.is_contiguous():
        raise ValueError(
            f"the {language} kernels scale contiguous tensors, got shape "
            f"{list(values.shape)} with strides {list(values.stride())}"
        )


# ---- how rows are shared among programs --------------------------------------------------------


def whole_rows_suffice(n: int, at_a_time: int) -> bool:
    """Whether a program for each row keeps the device busy to the end.

    Args:
        n: Rows.
        at_a_time: Programs of whole rows that run at once.
    """
    return n >= WAVES * at_a_time


def tiles_of_a_part(n: int, tiles: int, at_a_time: int) -> int:
    """Tiles that each of the programs takes that share a row.

    Args:
        n: Rows.
        tiles: Of a row.
        at_a_time: Programs that run at once.
    """
    return max(1, n * tiles // (WAVES * at_a_time))


def sweep_pays(n: int, at_a_time: int) -> bool:
    """Whether two passes of whole rows by one program beat parts of rows that are read twice.

    Too few rows would leave multiprocessors idle, and nearly all of them fit into the cache.

    Args:
        n: Rows.
        at_a_time: Programs of whole rows that run at once.
    """
    waves = -(-n // at_a_time)
    return n >= LEAST_EFFICIENCY * waves * at_a_time


def sweep_size(
    row_bytes: int, multiprocessors: int, cache_bytes: int, *, smallest: int, resident: int
) -> int:
    """Size of a program that passes its row twice, in warps or in threads.

    The fewer rows are in flight, the more of them stay in the cache between the two passes; so
    programs are as large as it takes to keep all rows in flight within three quarters of it.

    Args:
        row_bytes: Of the logits of a row.
        multiprocessors: Of the device.
        cache_bytes: Of the last cache that they share.
        smallest: Size of a program that there is no reason to make larger.
        resident: What a multiprocessor runs at once, in the same unit; a power of 2 times
            `smallest`.
    """
    size = smallest
    while size < resident:
        in_flight = multiprocessors * (resident // size)
        if 4 * in_flight * row_bytes <= 3 * cache_bytes:
            break
        size *= 2
    return size
