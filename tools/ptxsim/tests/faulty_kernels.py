# ruff: noqa: N803 (Triton's compile-time arguments are written in capitals)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels with one bug each, and their twins without."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def writes_one_too_many(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0), mask=i <= n)


@triton.jit
def reads_without_mask(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i), mask=i < n)


@triton.jit
def row_of_narrow_offset(x, out, row, stride, BLOCK: tl.constexpr):
    """Overflows where row * stride exceeds 31 bits."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + row * stride + i))


@triton.jit
def promises_alignment(x, out, offset, BLOCK: tl.constexpr):
    i = tl.max_contiguous(tl.multiple_of(offset + tl.arange(0, BLOCK), 4), 4)
    tl.store(out + tl.arange(0, BLOCK), tl.load(x + i))


@triton.jit
def reverses(x, scratch, out, BLOCK: tl.constexpr, HAS_BARRIER: tl.constexpr):
    """Reads what other threads of the program have stored."""
    i = tl.arange(0, BLOCK)
    tl.store(scratch + i, tl.load(x + i) * 2)
    if HAS_BARRIER:
        tl.debug_barrier()
    tl.store(out + i, tl.load(scratch + (BLOCK - 1 - i)))


@triton.jit
def sums_into_one_cell(x, out, n, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    if ATOMIC:
        tl.atomic_add(out, total)
    else:
        tl.store(out, tl.load(out) + total)


@triton.jit
def shifts_in_place(x, n, BLOCK: tl.constexpr):
    """Each program overwrites what its left neighbour still has to read."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i + 1, mask=i + 1 < n, other=0.0)
    tl.debug_barrier()
    tl.store(x + i, value, mask=i < n)
