"""Arithmetic whose type decides whether it is on integers or on floats."""

from __future__ import annotations

from ptxsim.emit.context import KernelContext
from ptxsim.emit.floats import emit_float
from ptxsim.ptx_types import FLOATS, HOST_TYPES, PACKED_HALVES, is_signed, width_of
from ptxsim.syntax import Instruction

_CARRY_OPERATORS = {"add": "+", "addc": "+", "sub": "-", "subc": "-"}
_READ_CARRY = ("addc", "subc", "madc")


def _arithmetic(context: KernelContext, instruction: Instruction) -> str:
    ptx_type = instruction.type
    if ptx_type in FLOATS or ptx_type in PACKED_HALVES or ptx_type == "f32x2":
        return emit_float(context, instruction)
    if instruction.name in _READ_CARRY or instruction.has("cc"):
        return _with_carry(context, instruction)
    if instruction.name in ("mul", "mad"):
        return _multiply(context, instruction)
    return _plain(context, instruction)


def _plain(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    host = HOST_TYPES[instruction.type]
    # Wrapping is defined for unsigned integers only.
    unsigned = f"u{width_of(instruction.type)}"
    values = context.values(tuple(sources), instruction.type)
    formula = {
        "add": f"{unsigned}({{0}}) + {unsigned}({{1}})",
        "sub": f"{unsigned}({{0}}) - {unsigned}({{1}})",
        "neg": f"{unsigned}(0) - {unsigned}({{0}})",
        "abs": f"{{0}} < 0 ? {unsigned}(0) - {unsigned}({{0}}) : {unsigned}({{0}})",
        "min": f"std::min<{host}>({{0}}, {{1}})",
        "max": f"std::max<{host}>({{0}}, {{1}})",
        "div": f"ptx::divide<{host}>({{0}}, {{1}})",
        "rem": f"ptx::remainder_of<{host}>({{0}}, {{1}})",
    }[instruction.name]
    return context.assign(destination, formula.format(*values))


def _multiply(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    ptx_type = instruction.type
    width = width_of(ptx_type)
    unsigned, sign = f"u{width}", "s" if is_signed(ptx_type) else "u"
    wide = f"{sign}{2 * width}"
    a, b = context.values(tuple(sources[:2]), ptx_type)
    product = f"{wide}({a}) * {wide}({b})"
    addend = ""
    if instruction.has("wide"):
        if len(sources) > 2:
            addend = f" + {wide}({context.operand(sources[2])})"
        return context.assign(destination, product + addend)
    if len(sources) > 2:
        addend = f" + {unsigned}({context.operand(sources[2])})"
    if instruction.has("hi"):
        return context.assign(destination, f"{unsigned}(({product}) >> {width}){addend}")
    # Multiplied in 64 bits, so that two 16-bit factors do not overflow an int.
    low = f"{unsigned}(u64({a}) * u64({b}))"
    return context.assign(destination, low + addend)


def _with_carry(context: KernelContext, instruction: Instruction) -> str:
    """Arithmetic on more words than one: `.cc` writes the carry, addc, subc and madc read it."""
    destination, *sources = instruction.operands
    width = width_of(instruction.type)
    unsigned, wide = f"u{width}", f"u{2 * width}"
    values = [f"{wide}({unsigned}({context.operand(x)}))" for x in sources]
    carry = "carry" if instruction.name in _READ_CARRY else "0"
    if instruction.name in ("mad", "madc"):
        shift = f" >> {width}" if instruction.has("hi") else ""
        product = f"{wide}({unsigned}({values[0]} * {values[1]}{shift}))"
        total = f"{product} + {values[2]} + {carry}"
    else:
        operator = _CARRY_OPERATORS[instruction.name]
        total = f"{values[0]} {operator} {values[1]} {operator} {carry}"
    code = f"const {wide} total = {total}; {context.assign(destination, 'total')}"
    if instruction.has("cc"):
        code += f" carry = total >> {width} & 1;"
    return f"{{ {code} }}"


_NAMES = ("add", "sub", "mul", "mad", "div", "rem", "min", "max", "abs", "neg")
EMITTERS = dict.fromkeys((*_NAMES, *_READ_CARRY), _arithmetic)
