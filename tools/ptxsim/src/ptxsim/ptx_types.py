"""The types of PTX: their sizes, and the C++ types that hold them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FloatFormat:
    """How C++ reads and writes a float whose bits lie in an integer register.

    Attributes:
        read: Function from bits to value.
        write: Function from value to bits.
        host: The C++ type in which its arithmetic is done.
    """

    read: str
    write: str
    host: str


FLOATS = {
    "f16": FloatFormat("ptx::f16", "ptx::to_f16", "float"),
    "bf16": FloatFormat("ptx::bf16", "ptx::to_bf16", "float"),
    "f32": FloatFormat("ptx::f32", "ptx::to_f32", "float"),
    "f64": FloatFormat("ptx::f64", "ptx::to_f64", "double"),
}

PACKED_HALVES = {"f16x2": "f16", "bf16x2": "bf16"}
"""Two 16-bit floats in one 32-bit register."""

HOST_TYPES = {
    "pred": "bool",
    **{f"b{bits}": f"u{bits}" for bits in (8, 16, 32, 64, 128)},
    **{f"{sign}{bits}": f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)},
    "f16": "u16",
    "bf16": "u16",
    "f16x2": "u32",
    "bf16x2": "u32",
    "f32": "u32",
    "tf32": "u32",
    "f64": "u64",
    "f32x2": "u64",
}
"""The C++ type of a register. Floats are kept as bit patterns, so that moves keep every NaN."""

TYPE_NAMES = frozenset(HOST_TYPES) | {"u16x2", "s16x2"}


def width_of(ptx_type: str) -> int:
    """Bits of a type.

    Example:
        >>> width_of("bf16x2"), width_of("s64"), width_of("pred")
        (32, 64, 1)
    """
    host = HOST_TYPES[ptx_type]
    return 1 if host == "bool" else int(host[1:])


def size_of(ptx_type: str) -> int:
    """Bytes of a type in memory."""
    return max(width_of(ptx_type) // 8, 1)


def is_signed(ptx_type: str) -> bool:
    """Whether a type is a signed integer."""
    return ptx_type.startswith("s")
