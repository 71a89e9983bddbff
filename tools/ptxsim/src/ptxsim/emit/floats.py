"""Arithmetic on floats, and the special functions."""

from __future__ import annotations

from ptxsim.emit.context import KernelContext, unsupported
from ptxsim.ptx_types import FLOATS, PACKED_HALVES
from ptxsim.syntax import Instruction

FORMULAS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "abs": "std::fabs({0})",
    "copysign": "std::copysign({1}, {0})",
}
"""C++ by name of the instruction; the fused, the extreme and the rounded ones are built below."""

_DIRECTED = {"rz": "zero", "rm": "down", "rp": "up"}
_MAY_BE_DIRECTED = {"add": "add", "sub": "sub", "mul": "mul", "div": "div", "fma": "fma"}

_SPECIAL = {
    "ex2": "std::exp2({0})",
    "lg2": "std::log2({0})",
    "rcp": "1 / {0}",
    "sqrt": "std::sqrt({0})",
    "rsqrt": "1 / std::sqrt({0})",
    "sin": "std::sin({0})",
    "cos": "std::cos({0})",
    "tanh": "std::tanh({0})",
}
"""Computed exactly and rounded once: hardware approximates, by up to a few units."""


def emit_float(context: KernelContext, instruction: Instruction) -> str:
    """Arithmetic on one float, on two packed ones, or with a wider result."""
    if _is_mixed(instruction):
        return _mixed(context, instruction)
    if instruction.type == "f32x2":
        return _packed_singles(context, instruction)
    if instruction.type in PACKED_HALVES:
        return _packed_halves(context, instruction)
    return _scalar(context, instruction)


def _is_mixed(instruction: Instruction) -> bool:
    """Whether 16-bit factors meet a float32 sum, as in `fma.rn.f32.bf16`."""
    return len(instruction.parts) > 2 and instruction.parts[-2] in FLOATS


def _formula(instruction: Instruction, ptx_type: str) -> str:
    """C++ of one result from the operands `{0}`, `{1}`, `{2}`."""
    name = "fma" if instruction.name == "mad" else instruction.name
    directed = instruction.first_of(_DIRECTED)
    if directed:
        if ptx_type not in ("f32", "f64") or name not in _MAY_BE_DIRECTED:
            raise unsupported(instruction)
        third = "{2}" if name == "fma" else "0"
        host = FLOATS[ptx_type].host
        mode = f"ptx::Operation::{name}, ptx::Rounding::{directed}"
        return f"ptx::rounded<{host}>({mode}, {{0}}, {{1}}, {third})"
    if name == "fma":
        wide = ptx_type in ("f32", "f64")
        return f"{'std::fma' if wide else 'ptx::fma_half'}({{0}}, {{1}}, {{2}})"
    if name in ("min", "max"):
        function = f"ptx::{name}_{'nan' if instruction.has('NaN') else 'number'}"
        pair = f"{function}({{0}}, {{1}})"
        return pair if len(instruction.operands) == 3 else f"{function}({pair}, {{2}})"
    if name in _SPECIAL:
        return _SPECIAL[name]
    return FORMULAS[name]


def _evaluate(instruction: Instruction, ptx_type: str, values: list[str]) -> str:
    """The formula with subnormals flushed and the result saturated, as the modifiers say."""
    flushes = instruction.has("ftz") and ptx_type == "f32"
    if flushes:
        values = [f"ptx::flush({value})" for value in values]
    result = _formula(instruction, ptx_type).format(*values)
    if flushes:
        result = f"ptx::flush({result})"
    return f"ptx::saturate({result})" if instruction.has("sat") else result


def _scalar(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    ptx_type = instruction.type
    result = _evaluate(instruction, ptx_type, context.values(tuple(sources), ptx_type))
    return context.assign(destination, f"{FLOATS[ptx_type].write}({result})")


def _mixed(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    if instruction.parts[-2] != "f32" or instruction.has("rz", "rm", "rp", "sat"):
        raise unsupported(instruction)
    narrow = context.values(tuple(sources[:-1]), instruction.type)
    result = _evaluate(instruction, "f32", [*narrow, context.value(sources[-1], "f32")])
    return context.assign(destination, f"ptx::to_f32({result})")


def _packed_halves(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    ptx_type = PACKED_HALVES[instruction.type]
    form = FLOATS[ptx_type]
    halves = []
    for shift in (0, 16):
        values = [f"{form.read}({context.value(x, 'b32')} >> {shift})" for x in sources]
        halves.append(f"{form.write}({_evaluate(instruction, ptx_type, values)})")
    return context.assign(destination, f"ptx::pack({', '.join(halves)})")


def _packed_singles(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    if instruction.has("rz", "rm", "rp", "sat"):
        raise unsupported(instruction)
    halves = []
    for shift in (0, 32):
        values = [f"ptx::f32({context.value(x, 'b64')} >> {shift})" for x in sources]
        halves.append(f"u64(ptx::to_f32({_evaluate(instruction, 'f32', values)}))")
    return context.assign(destination, f"{halves[0]} | {halves[1]} << 32")


EMITTERS = {
    **dict.fromkeys(_SPECIAL, emit_float),
    "fma": emit_float,
    "copysign": emit_float,
}
