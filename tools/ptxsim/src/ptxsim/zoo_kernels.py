# ruff: noqa: N803 (Triton's compile-time arguments are written in capitals)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# What is under @triton.jit is Triton's language, of which Python's types know nothing.
"""One small Triton kernel for each kind of operation that compilers make PTX of."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.store(out + i, tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside), mask=inside)


@triton.jit
def cross_entropy(logits, labels, losses, lses, v, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    pointer = logits + row * stride
    largest = float("-inf")
    total = 0.0
    for start in range(0, v, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(pointer + column, mask=column < v, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(z - new), 0)
        largest = new
    lse = largest + tl.log(total)
    tl.store(lses + row, lse)
    tl.store(losses + row, lse - tl.load(pointer + tl.load(labels + row)).to(tl.float32))


@triton.jit
def reduce_(x, sums, maxima, argmaxima, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    value = tl.load(x + i[:, None] * N + j[None, :])
    kept = j if AXIS == 0 else i
    tl.store(sums + kept, tl.sum(value, AXIS))
    tl.store(maxima + kept, tl.max(value, AXIS))
    tl.store(argmaxima + kept, tl.argmax(value, AXIS))


@triton.jit
def scan(x, rows, columns, M: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(x + at)
    tl.store(rows + at, tl.cumsum(value, 1, reverse=REVERSE))
    tl.store(columns + at, tl.cumsum(value, 0))


@triton.jit
def sort(x, out, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.sort(tl.load(x + at)))


@triton.jit
def transpose(x, out, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    value = tl.load(x + i[:, None] * N + j[None, :])
    tl.store(out + j[:, None] * M + i[None, :], tl.trans(value))


@triton.jit
def gather(x, index, out, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.gather(tl.load(x + at), tl.load(index + at), 1))


@triton.jit
def histogram(x, out, N: tl.constexpr, BINS: tl.constexpr):
    tl.store(out + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, N)), BINS))


@triton.jit
def atomics(x, sums, maxima, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    tl.atomic_add(sums + i % 7, tl.load(x + i, mask=inside, other=0.0), mask=inside)
    tl.atomic_max(maxima + i % 5, i, mask=inside)


@triton.jit
def mathematics(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside, other=1.0)
    magnitude = tl.abs(value)
    tl.store(out + i, tl.exp(value), mask=inside)
    tl.store(out + n + i, tl.log(magnitude), mask=inside)
    tl.store(out + 2 * n + i, tl.sqrt(magnitude), mask=inside)
    tl.store(out + 3 * n + i, 1.0 / value, mask=inside)
    tl.store(out + 4 * n + i, tl.sin(value), mask=inside)
    tl.store(out + 5 * n + i, tl.erf(value), mask=inside)
    tl.store(out + 6 * n + i, tl.sigmoid(value), mask=inside)
    tl.store(out + 7 * n + i, tl.exp2(value), mask=inside)
    tl.store(out + 8 * n + i, tl.rsqrt(magnitude), mask=inside)
    tl.store(out + 9 * n + i, tl.floor(value), mask=inside)
    tl.store(out + 10 * n + i, libdevice.tanh(value), mask=inside)
    tl.store(out + 11 * n + i, tl.fma(value, value, value), mask=inside)
    tl.store(out + 12 * n + i, tl.log2(magnitude), mask=inside)
    tl.store(out + 13 * n + i, tl.div_rn(value, value * value + 1.37), mask=inside)
    tl.store(out + 14 * n + i, libdevice.log1p(magnitude), mask=inside)


@triton.jit
def integers(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    inside = i < n
    x = tl.load(a + i, mask=inside, other=1)
    y = tl.load(b + i, mask=inside, other=1)
    tl.store(out + i, x // y, mask=inside)
    tl.store(out + n + i, x % y, mask=inside)
    tl.store(out + 2 * n + i, x * y, mask=inside)
    tl.store(out + 3 * n + i, (x >> 3) ^ (y << 2), mask=inside)


@triton.jit
def uniform(out, seed, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.rand(seed, i))


@triton.jit
def casts(x, to_half, to_bfloat, to_int, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(to_half + i, value.to(tl.float16))
    tl.store(to_bfloat + i, value.to(tl.bfloat16))
    tl.store(to_int + i, value.to(tl.int32))


@triton.jit
def matmul(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    k = tl.arange(0, K)
    left = tl.load(a + i[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + j[None, :])
    tl.store(c + i[:, None] * N + j[None, :], tl.dot(left, right, input_precision=PRECISION))


@triton.jit
def pipelined_matmul(a, b, c, k_total, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """A loop of dots, which compiles to asynchronous copies into shared memory."""
    i = tl.arange(0, M)
    j = tl.arange(0, N)
    k = tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, k_total, K):
        inside = start + k < k_total
        left = tl.load(
            a + i[:, None] * k_total + (start + k)[None, :], mask=inside[None, :], other=0.0
        )
        right = tl.load(b + (start + k)[:, None] * N + j[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(left, right, total)
    tl.store(c + i[:, None] * N + j[None, :], total)


@triton.jit
def checked(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.device_assert(tl.load(x + i) > 0, "not positive")
