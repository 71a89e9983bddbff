"""Makes Triton's interpreter right about bfloat16; for tests alone.

As it is, it truncates float32 to bfloat16 instead of rounding, and computes with bfloat16 on the
raw bits, silently. The kernels convert at their loads and stores and compute in float32, so
conversion is what is mended here; arithmetic on bfloat16 becomes an error. A fused multiply-add is
rounded once, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle = Any
"""The interpreter's tensor: a numpy array and a triton type; bfloat16 is kept as uint16."""


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Bits of float32 numbers rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    last_kept = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + last_kept) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    chosen = np.where(np.isnan(x), quiet_nan, rounded)
    bits16: np.ndarray = chosen.astype(np.uint16).reshape(np.shape(x))
    return bits16


def float32_of(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers whose bfloat16 bits are given."""
    wide = np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)
    numbers: np.ndarray = wide.view(np.float32).reshape(np.shape(bits))
    return numbers


def _is_bfloat16(handle: _Handle) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def install() -> None:
    """Mend the interpreter. Call it before a module with kernels is imported."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast = builder.cast_impl

    def cast_impl(self: Any, source: _Handle, target: Any) -> _Handle:
        to = target.scalar
        if _is_bfloat16(source) and to != tl.bfloat16:
            wide = handle(float32_of(source.data), tl.float32)
            return wide if to == tl.float32 else cast(self, wide, target)
        if to == tl.bfloat16 and not _is_bfloat16(source):
            return handle(bfloat16_bits(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    convert = builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, source: _Handle, target: Any, rounding: Any) -> _Handle:
        if _is_bfloat16(source) or target.scalar == tl.bfloat16:
            return self.cast_impl(source, target)
        return convert(self, source, target, rounding)

    def get_bf16(self: Any, value: float) -> _Handle:
        return handle(bfloat16_bits(np.array([value], np.float32)), tl.bfloat16)

    def refusing(operation: Callable[..., _Handle]) -> Callable[..., _Handle]:
        def checked(self: Any, *operands: Any) -> _Handle:
            tensors = [x for x in operands if isinstance(x, handle)]
            moves_bits = operands[-1] is np.where
            if not moves_bits and any(map(_is_bfloat16, tensors)):
                raise TypeError("arithmetic on bfloat16: convert to float32 at the load")
            return operation(self, *operands)

        return checked

    def create_fma(self: Any, x: _Handle, y: _Handle, z: _Handle) -> _Handle:
        # The product of two float32 is exact in float64.
        wide = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return handle(wide.astype(x.data.dtype), x.dtype.scalar)

    implicit = interpreter._implicit_cvt

    def _implicit_cvt(argument: Any) -> Any:
        # On a GPU a Python float arrives as a float32.
        if isinstance(argument, float):
            return tl.tensor(handle(np.array([argument], np.float32), tl.float32), tl.float32)
        return implicit(argument)

    first_call = interpreter.InterpretedFunction.__call__
    called: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Each call of a device function patches what it sees of triton.language, which it does not
        # undo; once is enough, and takes half of the time.
        if id(self) in called:
            return self.rewrite()(*args, **kwargs)
        called.add(id(self))
        return first_call(self, *args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.get_bf16 = get_bf16
    builder.create_fma = create_fma
    for name in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, name, refusing(getattr(builder, name)))
    interpreter._implicit_cvt = _implicit_cvt
