"""How a launch is laid out: where matrices begin, how rows are walked over, by how many programs.

Functions here take tensors as they are, on any device: whether the backend may run on it is the
registry's business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends import gpu
from unilogit_kernels.backends.contract import LogitTransform, RowKernels
from unilogit_kernels.backends.triton.kernels.row_maths import Logits, Needs
from unilogit_kernels.backends.triton.kernels.row_walk import ACCESS_BYTES, Walk
from unilogit_kernels.backends.triton.settings import Device, Settings

_Launch = TypeVar("_Launch", bound=Callable[..., Any])

ACCESS = int(ACCESS_BYTES.value)

TAIL_LANES = 8
"""Elements that a thread holds at once in a tail: the masks take registers too."""


def on_its_device(launch: _Launch) -> _Launch:
    """Triton launches on the current device; make that the one of a method's first argument."""

    @functools.wraps(launch)
    def guarded(kernels: RowKernels, first: Any, *rest: Any, **named: Any) -> Any:
        device = first.device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(kernels, first, *rest, **named)
        with torch.cuda.device(device):
            return launch(kernels, first, *rest, **named)

    return cast(_Launch, guarded)


class Place(NamedTuple):
    """Where a matrix lies, in elements, counted from its base.

    Attributes:
        dtype: Of the matrix.
        aligned: Whether the base is at a 16-byte boundary.
        offset: From the base to the matrix.
        row_stride: From a row to the next.
        column_stride: From a column to the next.
    """

    dtype: torch.dtype
    aligned: bool
    offset: int
    row_stride: int
    column_stride: int

    @staticmethod
    def of(matrix: Tensor) -> tuple[Tensor, Place]:
        """The base of a matrix, and its place.

        The base begins at a 16-byte boundary at or before the matrix, or, where the storage holds
        none, with the matrix.
        """
        row_stride, column_stride = matrix.stride()
        if matrix.shape[0] == 1:
            row_stride = 0  # nobody steps along it, but it would count against alignment
        dtype = matrix.dtype
        beyond = matrix.data_ptr() % ACCESS // dtype.itemsize
        if beyond == 0:
            return matrix, Place(dtype, True, 0, row_stride, column_stride)
        if beyond > matrix.storage_offset():
            return matrix, Place(dtype, False, 0, row_stride, column_stride)
        first = matrix.storage_offset() - beyond
        size = matrix.untyped_storage().nbytes() // dtype.itemsize - first
        base = matrix.as_strided((size,), (1,), first)
        return base, Place(dtype, True, beyond, row_stride, column_stride)

    @property
    def strides(self) -> tuple[int, int, int]:
        """What the kernels take beside the base."""
        return self.offset, self.row_stride, self.column_stride


class Matrices(NamedTuple):
    """The matrices of one launch, which walks over the rows of all of them in the same tiles.

    What is decided of accesses is decided here, of all of them together: the one that leads says
    at which column a body begins, and any of them may forbid that it begins at a boundary.

    Attributes:
        leading: The one whose rows decide where bodies begin: the output, where there is one.
        others: What else is read.
    """

    leading: Place
    others: tuple[Place, ...] = ()

    @property
    def strided(self) -> bool:
        """Whether columns of any of them are apart: then no access is whole."""
        return any(place.column_stride != 1 for place in (self.leading, *self.others))

    def alignment_of(self, place: Place) -> int:
        """Elements that divide the offset, from its base, of the body of each row of a matrix.

        More than 1 only where bodies begin where such offsets of the leading matrix are. Where
        the rows of another one are aligned differently, its accesses are narrower, and coalesced
        still. That a base is at a boundary Triton finds out by itself, for each pointer.

        Args:
            place: Of one of these matrices.
        """
        if self.strided:
            # Bodies begin at column 0: what is peeled off is counted as neighbours in memory.
            return 1
        elements = min(vector_of(place.dtype), vector_of(self.leading.dtype))
        further = place.offset - self.leading.offset
        longer = place.row_stride - self.leading.row_stride
        return 1 if further % elements or longer % elements else elements


def vector_of(dtype: torch.dtype) -> int:
    """Elements in 128 bits."""
    return ACCESS // dtype.itemsize


def logits_of(
    place: Place,
    matrices: Matrices,
    transform: LogitTransform,
    eviction: str,
    chosen: Settings,
    needs: Needs = Needs(),  # noqa: B008 (a tuple)
) -> Logits:
    """What kernels are compiled for of a matrix of logits."""
    capped = transform.softcap != 0.0
    scaled = transform.scale != 1.0 and not capped
    binary = not (scaled or capped or needs.linear or needs.dot)
    return Logits(
        alignment=matrices.alignment_of(place),
        eviction=eviction,
        scaled=scaled,
        capped=capped,
        binary=binary,
        packs=chosen.packs and place.dtype == torch.bfloat16 and not (scaled or capped),
        needs=needs,
    )


def options_of(chosen: Settings, warps: int) -> dict[str, Any]:
    """Launch options."""
    # Said explicitly, since triton 3.10 turns the default around.
    return {"num_warps": warps, "enable_fp_fusion": True, **chosen.options}


def walk_over(v: int, matrices: Matrices, lanes: int, threads: int) -> Walk:
    """The walk of `threads` threads, each with `lanes` elements at once, over rows of `v`."""
    vector = vector_of(matrices.leading.dtype)
    alignment = matrices.alignment_of(matrices.leading)
    unroll = lanes // vector
    block = unroll * threads * vector
    # The body may begin at any of the first `alignment` columns.
    tail = max((v - peeled) % block // vector for peeled in (0, min(alignment - 1, v)))
    in_tail = triton.next_power_of_2(max(1, triton.cdiv(tail, threads)))
    return Walk(
        threads=threads,
        vector=vector,
        unroll=unroll,
        tail_unroll=min(in_tail, max(1, TAIL_LANES // vector)),
        alignment=alignment,
        strided=matrices.strided,
    )


class Shares(NamedTuple):
    """How the rows of a matrix are shared among programs that pass each column once.

    Attributes:
        parts: Programs of a row.
        blocks_per_part: Body tiles of each.
        walk: How each of them walks.
        options: Launch options.
    """

    parts: int
    blocks_per_part: int
    walk: Walk
    options: dict[str, Any]

    @staticmethod
    def of(n: int, v: int, device: Device, matrices: Matrices, lanes: int) -> Shares:
        """One program for each row where that keeps the device busy, else as many as it takes.

        Args:
            n: Rows.
            v: Columns.
            device: What they run on.
            matrices: What is passed over.
            lanes: Elements of the leading matrix that a thread holds at once.
        """
        chosen = device.settings
        resident_warps = device.multiprocessors * chosen.resident_warps

        def walk(warps: int, lanes: int) -> Walk:
            return walk_over(v, matrices, lanes, warps * chosen.warp_threads)

        if gpu.whole_rows_suffice(n, resident_warps // chosen.warps):
            return Shares(1, v, walk(chosen.warps, lanes), options_of(chosen, chosen.warps))
        warps = chosen.split_warps
        vector = vector_of(matrices.leading.dtype)
        threads = warps * chosen.warp_threads
        if n * v < resident_warps // warps * threads * lanes:
            lanes = vector  # too little work to give a thread several vectors
        blocks = max(1, v // (threads * lanes))
        parts = triton.cdiv(blocks, gpu.tiles_of_a_part(n, blocks, resident_warps // warps))
        return Shares(
            parts, triton.cdiv(blocks, parts), walk(warps, lanes), options_of(chosen, warps)
        )
