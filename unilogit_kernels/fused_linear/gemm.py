"""The GEMMs of a fused linear call: tiles of logits out of it, gradients of its operands into it.

The GEMMs are the vendor's, through torch. This module decides in which dtype each is taken and
where its result is accumulated, so that the chunk loops need not.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from unilogit_kernels.backends.memory import allocate


class Needs(NamedTuple):
    """Which operands want a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    inner: bool = False
    up: bool = False

    def any(self) -> bool:
        """Whether there is a backward at all."""
        return True in self


EVERYTHING = Needs(*(True,) * len(Needs._fields))
NOTHING = Needs(*(False,) * len(Needs._fields))


class GemmDtypes(NamedTuple):
    """The dtypes around the GEMMs of a fused linear call.

    Attributes:
        operands: What the GEMMs read: hidden states, weight and gradient rows.
        logits: What the logits are stored in: float32 wherever the device's GEMM can write it.
        results: What the finished gradients are stored in until the upstream factor is known.
        wider: Whether a GEMM of 16-bit operands can write float32.
    """

    operands: torch.dtype
    logits: torch.dtype
    results: torch.dtype
    wider: bool = True

    @property
    def exact(self) -> torch.dtype:
        """What partial sums are accumulated in: at least float32."""
        return torch.promote_types(self.operands, torch.float32)

    @property
    def rows_hold_factor(self) -> bool:
        """Whether 1/N may be folded into the gradient rows: they have float32's exponent range."""
        return self.operands != torch.float16

    @staticmethod
    def of(
        dtype: torch.dtype, device_type: str, logits_dtype: torch.dtype | None = None
    ) -> GemmDtypes:
        """Choose them for inputs of `dtype`.

        float16 results wait in float32: with 1/N folded in they would underflow, without it they
        could overflow. On CPU float16 operands are cast too, chunk by chunk, since their GEMM is
        slow and accumulates no better; so are bfloat16 ones where the CPU has no instructions for
        them, which makes the GEMMs faster (docs/benchmarks.md) and leaves their logits in float32.

        Args:
            dtype: Of hidden states and weight.
            device_type: `"cpu"`, `"cuda"`, ...
            logits_dtype: What the caller wants the logits rounded to, or None.
        """
        on_gpu, wider = device_type == "cuda", writes_wider(device_type)
        if dtype == torch.float16:
            operands, logits, results = dtype if on_gpu else torch.float32, *(torch.float32,) * 2
        elif dtype == torch.bfloat16:
            operands = dtype if on_gpu or multiplies_bfloat16() else torch.float32
            logits, results = torch.float32 if on_gpu else operands, dtype
        else:
            operands = logits = results = dtype
        return GemmDtypes(operands, logits_dtype or logits, results, wider)

    def multiply(self, a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool = False) -> None:
        """`out = a @ b`, or `out += a @ b`, in `out`'s dtype.

        `out` may be wider than the factors. Where the device's GEMM can write that, nothing is
        rounded on the way; elsewhere the product is rounded to the factors' dtype, and the sum is
        not.
        """
        if out.dtype == a.dtype:
            if accumulate:
                torch.addmm(out, a, b, out=out)
            else:
                torch.mm(a, b, out=out)
        elif self.wider:
            if accumulate:
                torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
            else:
                torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
        elif accumulate:
            out.add_(torch.mm(a, b))
        else:
            out.copy_(torch.mm(a, b))


_WIDER: dict[torch.device, bool] = {}
"""By device: whether its GEMMs write and add float32; asked once, by a product of a few numbers."""


def writes_wider(device_type: str) -> bool:
    """Whether GEMMs of 16-bit operands can write float32, and add to it.

    `torch.mm(out_dtype=)` and `torch.addmm(out_dtype=)` are for CUDA devices; builds for AMD may
    refuse them, and older ones lack the second. Where there is no GPU (a plan is explained, a graph
    traced) they are taken for granted.
    """
    if device_type != "cuda" or not torch.cuda.is_available():
        return device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device())
    if device not in _WIDER:
        if detect_fake_mode() is not None:
            return True
        _WIDER[device] = gemms_write_float32(device)
    return _WIDER[device]


def gemms_write_float32(device: torch.device) -> bool:
    """Whether both products of bfloat16 numbers come out right in float32 there."""
    a = torch.full((16, 16), 1 + 2**-7, dtype=torch.bfloat16, device=device)
    out = torch.empty(16, 16, device=device)
    try:
        torch.ops.aten.mm.dtype_out(a, a, torch.float32, out=out)
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((out == 32 * (1 + 2**-7) ** 2).all())


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 numbers; unknown ones count so."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Operand:
    """One side of a tile's products: some hidden states, or the weight of some columns.

    Attributes:
        wide: `[rows, h]`.
        thin: `[rows, r]`, its side of the low-rank term, or None.
    """

    wide: Tensor
    thin: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> Operand:
        """Some of the rows."""
        return Operand(self.wide[rows], None if self.thin is None else self.thin[rows])

    @property
    def parts(self) -> list[Tensor]:
        """The thin one first: what it is rounded to on the way is the smaller number's rounding."""
        return [self.wide] if self.thin is None else [self.thin, self.wide]


@dataclass(frozen=True)
class LinearHead:
    """An lm_head applied to some hidden states, of which only tiles of logits are ever computed.

    Its logits are `hidden @ weight.T + inner @ up.T + bias`.

    Attributes:
        hidden: `[n, h]`, in the inputs' dtype.
        weight: `[V, h]`, the rows that carry probability, in the inputs' dtype.
        bias: `[V]` or None.
        dtypes: See `GemmDtypes`.
        inner: `[n, r]`, the hidden states in a low-rank adapter's own space, or None.
        up: `[V, r]`, the adapter's way out of it, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    dtypes: GemmDtypes
    inner: Tensor | None = None
    up: Tensor | None = None

    def at(self, index: Tensor) -> LinearHead:
        """The same on some of the tokens."""
        inner = None if self.inner is None else self.inner[index]
        return replace(self, hidden=self.hidden[index], inner=inner)

    def weight_columns(self, columns: slice) -> Operand:
        """The weight of these vocabulary columns, in the operands' dtype."""
        dtype = self.dtypes.operands
        up = None if self.up is None else self.up[columns].to(dtype)
        return Operand(self.weight[columns].to(dtype), up)

    def project(self, tokens: Operand, columns: slice, weight: Operand, out: Tensor) -> None:
        """Write the logits of a tile into `out`, `[tokens, columns]` in `dtypes.logits`.

        `tokens` are rows of the hidden states and `weight` is `weight_columns(columns)`, both in
        the operands' dtype. Logits are rounded once, to theirs.
        """
        factors = list(zip(tokens.parts, weight.parts, strict=True))
        bias = None if self.bias is None else self.bias[columns]
        dtype, exact, begun = tokens.wide.dtype, self.dtypes.exact, False
        logits = out
        if bias is not None and out.dtype == dtype:
            rows, others = factors.pop(0)
            torch.addmm(bias.to(dtype), rows, others.t(), out=out)
            bias, begun = None, True
        elif out.dtype == exact != dtype and not self.dtypes.wider:
            factors = [(rows.to(exact), others.to(exact)) for rows, others in factors]
        elif out.dtype.itemsize < dtype.itemsize:
            logits = torch.empty_like(out, dtype=dtype)
        for rows, others in factors:
            self.dtypes.multiply(rows, others.t(), logits, accumulate=begun)
            begun = True
        if bias is not None:
            logits.add_(bias)
        if logits is not out:
            out.copy_(logits)


class OperandRows:
    """Rows of the hidden states of several lm_heads in the operands' dtype.

    Where that takes a copy, it lies in a buffer: rows are there until others are asked for.

    Args:
        heads: The lm_heads.
        tokens: How many rows are asked for at most.
    """

    def __init__(self, heads: Sequence[LinearHead], tokens: int) -> None:
        self._heads = heads
        self._copies = [
            (self._room(head, head.hidden, tokens), self._room(head, head.inner, tokens))
            for head in heads
        ]
        self._copied: slice | None = None

    def at(self, tokens: slice) -> list[Operand]:
        """Those of each head."""
        result = []
        for head, (wide, thin) in zip(self._heads, self._copies, strict=True):
            inner = None if head.inner is None else self._rows(head.inner, thin, tokens)
            result.append(Operand(self._rows(head.hidden, wide, tokens), inner))
        self._copied = tokens
        return result

    def _rows(self, given: Tensor, room: Tensor | None, tokens: slice) -> Tensor:
        rows = given[tokens]
        if room is None:
            return rows
        copy = room[: rows.shape[0]]
        return copy if tokens == self._copied else copy.copy_(rows)

    @staticmethod
    def _room(head: LinearHead, given: Tensor | None, tokens: int) -> Tensor | None:
        dtype = head.dtypes.operands
        if given is None or given.dtype == dtype:
            return None
        return allocate((tokens, given.shape[1]), dtype, given.device)
