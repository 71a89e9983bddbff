"""cvt: between floats, between integers, and from one to the other."""

from __future__ import annotations

from ptxsim.emit.context import KernelContext, unsupported
from ptxsim.ptx_types import FLOATS, HOST_TYPES, PACKED_HALVES
from ptxsim.syntax import Instruction

_TO_INTEGRAL = {"rni": "nearest", "rzi": "zero", "rmi": "down", "rpi": "up"}


def _convert(context: KernelContext, instruction: Instruction) -> str:
    to, origin = instruction.parts[-2:]
    _check_rounding(instruction, to, origin)
    destination = instruction.operands[0]
    if to in PACKED_HALVES:
        return context.assign(destination, _pack(context, instruction, to))
    source = instruction.operands[1]
    if to == "tf32":
        return context.assign(destination, f"ptx::to_tf32({context.value(source, 'f32')})")
    value = context.value(source, origin)
    if to in FLOATS and origin in FLOATS:
        return context.assign(destination, _between_floats(instruction, to, origin, value))
    if to in FLOATS:
        return context.assign(destination, f"{FLOATS[to].write}({FLOATS[to].host}({value}))")
    host = HOST_TYPES[to]
    if origin in FLOATS:
        mode = instruction.first_of(_TO_INTEGRAL)
        if instruction.has("ftz"):
            value = f"ptx::flush({value})"
        integer = f"ptx::to_integer<{host}>({value}, ptx::Rounding::{mode})"
        return context.assign(destination, integer)
    if instruction.has("sat"):
        return context.assign(destination, f"ptx::saturating_cast<{host}>({value})")
    return context.assign(destination, f"{host}({value})")


def _check_rounding(instruction: Instruction, to: str, origin: str) -> None:
    """Refuse the rounding modes that have no translation."""
    truncates_to_bf16 = to in ("bf16", "bf16x2") and origin == "f32"
    if (
        instruction.has("rm", "rp")
        or (instruction.has("rz") and not truncates_to_bf16)
        or (instruction.has("relu") and to in PACKED_HALVES)
        or (instruction.has("rna") != (to == "tf32"))
    ):
        raise unsupported(instruction)


def _writer(instruction: Instruction, to: str) -> str:
    if to == "bf16" and instruction.has("rz"):
        return "ptx::to_bf16_toward_zero"
    return FLOATS[to].write


def _pack(context: KernelContext, instruction: Instruction, to: str) -> str:
    """Two floats in one register; the first source becomes the upper half."""
    upper, lower = context.values(instruction.operands[1:3], "f32")
    write = _writer(instruction, PACKED_HALVES[to])
    return f"ptx::pack({write}({lower}), {write}({upper}))"


def _between_floats(instruction: Instruction, to: str, origin: str, value: str) -> str:
    if (origin, to) == ("f64", "f16"):
        return f"ptx::to_f16_from_double({value})"  # through float it would round twice
    if instruction.has("ftz") and origin == "f32":
        value = f"ptx::flush({value})"
    mode = instruction.first_of(_TO_INTEGRAL)
    if mode:
        value = f"ptx::round_to_integral({value}, ptx::Rounding::{mode})"
    if instruction.has("sat"):
        value = f"ptx::saturate({value})"
    if instruction.has("relu"):
        value = f"ptx::max_number(0.0f, float({value}))"
    return f"{_writer(instruction, to)}({FLOATS[to].host}({value}))"


EMITTERS = {"cvt": _convert}
