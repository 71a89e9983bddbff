"""Logic, shifts and bit fields."""

from __future__ import annotations

from ptxsim.emit.context import KernelContext
from ptxsim.ptx_types import HOST_TYPES, is_signed, width_of
from ptxsim.syntax import Instruction

_LOGIC = {"and": "&", "or": "|", "xor": "^"}


def _logic(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    a, b = context.values(tuple(sources), instruction.type)
    return context.assign(destination, f"{a} {_LOGIC[instruction.name]} {b}")


def _not(context: KernelContext, instruction: Instruction) -> str:
    destination, source = instruction.operands
    sign = "!" if instruction.type == "pred" else "~"
    return context.assign(destination, f"{sign}{context.value(source, instruction.type)}")


def _shift(context: KernelContext, instruction: Instruction) -> str:
    destination, source, count = instruction.operands
    width = width_of(instruction.type)
    signed = instruction.name == "shr" and is_signed(instruction.type)
    host = f"{'s' if signed else 'u'}{width}"
    function = {"shl": "shift_left", "shr": "shift_right"}[instruction.name]
    shifted = f"ptx::{function}<{host}>({context.operand(source)}, {context.operand(count)})"
    return context.assign(destination, shifted)


def _funnel_shift(context: KernelContext, instruction: Instruction) -> str:
    destination, low, high, count = instruction.operands
    amount = context.value(count, "u32")
    amount = f"({amount} & 31)" if instruction.has("wrap") else f"std::min({amount}, 32u)"
    function = "funnel_left" if instruction.has("l") else "funnel_right"
    arguments = f"{context.operand(low)}, {context.operand(high)}, {amount}"
    return context.assign(destination, f"ptx::{function}({arguments})")


def _logic3(context: KernelContext, instruction: Instruction) -> str:
    destination, a, b, c, table = instruction.operands
    arguments = ", ".join(context.operand(x) for x in (a, b, c, table))
    return context.assign(destination, f"ptx::logic3({arguments})")


def _permute(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    low, high, selector = (context.operand(x) for x in sources)
    return context.assign(destination, f"ptx::permute_bytes({low}, {high}, {selector})")


def _extract(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    value, position, length = (context.operand(x) for x in sources)
    host = HOST_TYPES[instruction.type]
    return context.assign(destination, f"ptx::extract_bits<{host}>({value}, {position}, {length})")


def _insert(context: KernelContext, instruction: Instruction) -> str:
    destination, *sources = instruction.operands
    arguments = ", ".join(context.operand(x) for x in sources)
    host = HOST_TYPES[instruction.type]
    return context.assign(destination, f"ptx::insert_bits<{host}>({arguments})")


def _count_ones(context: KernelContext, instruction: Instruction) -> str:
    destination, source = instruction.operands
    bits = context.value(source, instruction.type)
    return context.assign(destination, f"__builtin_popcountll({bits})")


_UNARY = {"clz": "leading_zeros", "brev": "reverse_bits", "bfind": "highest_bit"}


def _unary(context: KernelContext, instruction: Instruction) -> str:
    destination, source = instruction.operands
    host = HOST_TYPES[instruction.type]
    function = f"ptx::{_UNARY[instruction.name]}<{host}>"
    return context.assign(destination, f"{function}({context.operand(source)})")


EMITTERS = {
    **dict.fromkeys(_LOGIC, _logic),
    **dict.fromkeys(_UNARY, _unary),
    "not": _not,
    "shl": _shift,
    "shr": _shift,
    "shf": _funnel_shift,
    "lop3": _logic3,
    "prmt": _permute,
    "bfe": _extract,
    "bfi": _insert,
    "popc": _count_ones,
}
