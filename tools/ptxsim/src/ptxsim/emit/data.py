"""Moves, comparisons and selections."""

from __future__ import annotations

from ptxsim.emit.context import KernelContext, unsupported, vector
from ptxsim.ptx_types import FLOATS, HOST_TYPES, PACKED_HALVES, width_of
from ptxsim.syntax import Instruction

_RELATIONS = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
_UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
"""Comparisons of floats that also hold where an operand is NaN."""

_COMBINATIONS = {"and": "&&", "or": "||", "xor": "!="}

_TESTS = {
    "infinite": "std::isinf",
    "finite": "std::isfinite",
    "number": "!std::isnan",
    "notanumber": "std::isnan",
    "normal": "std::isnormal",
}


def _move(context: KernelContext, instruction: Instruction) -> str:
    destination, source = instruction.operands
    if source.startswith("{"):
        return context.assign(destination, _join(context, vector(source), instruction.type))
    if destination.startswith("{"):
        return _split(context, vector(destination), source, instruction.type)
    return context.assign(destination, context.operand(source, instruction.type))


def _join(context: KernelContext, parts: list[str], ptx_type: str) -> str:
    """Registers side by side in a wider one, the first lowest."""
    width = width_of(ptx_type) // len(parts)
    host = HOST_TYPES[ptx_type]
    shifted = [
        f"{host}({host}(u{width}({context.operand(part)})) << {width * i})"
        for i, part in enumerate(parts)
    ]
    return " | ".join(shifted)


def _split(context: KernelContext, parts: list[str], source: str, ptx_type: str) -> str:
    width = width_of(ptx_type) // len(parts)
    whole = f"{HOST_TYPES[ptx_type]} whole = {context.value(source, ptx_type)};"
    writes = [context.assign(part, f"whole >> {width * i}") for i, part in enumerate(parts)]
    return f"{{ {whole} {' '.join(writes)} }}"


def _compare(context: KernelContext, instruction: Instruction) -> str:
    ptx_type = instruction.type
    if ptx_type in PACKED_HALVES:
        raise unsupported(instruction)
    a, b = context.values(instruction.operands[1:3], ptx_type)
    if instruction.has("ftz"):
        a, b = f"ptx::flush({a})", f"ptx::flush({b})"
    holds = _relation(instruction.parts[1], ptx_type in FLOATS)
    first, _, second = (name.strip() for name in instruction.operands[0].partition("|"))
    combination = instruction.first_of(_COMBINATIONS)
    other = ""
    if combination:
        other = f" {combination} {context.operand(instruction.operands[3], 'pred')}"
    # Both results are of the old operands, so none is written before both are known.
    code = f"const auto a = {a}; const auto b = {b}; const bool holds = {holds};"
    code += f" const bool yes = holds{other}; const bool no = !holds{other};"
    code += " " + context.assign(first, "yes")
    if second:
        code += " " + context.assign(second, "no")
    return f"{{ {code} (void)no; }}"


def _relation(name: str, floats: bool) -> str:
    """A C++ condition on `a` and `b`."""
    if name == "num":
        return "!(a != a || b != b)"
    if name == "nan":
        return "(a != a || b != b)"
    if name in _UNORDERED:
        return f"(a != a || b != b || a {_RELATIONS[_UNORDERED[name]]} b)"
    if name == "ne" and floats:
        return "(a < b || a > b)"  # false for NaN, unlike C++
    return f"(a {_RELATIONS[name]} b)"


def _select(context: KernelContext, instruction: Instruction) -> str:
    destination, a, b, condition = instruction.operands
    ptx_type = instruction.type
    host = HOST_TYPES[ptx_type]
    return context.assign(
        destination,
        f"{context.operand(condition, 'pred')} ? {host}({context.operand(a, ptx_type)})"
        f" : {host}({context.operand(b, ptx_type)})",
    )


def _test(context: KernelContext, instruction: Instruction) -> str:
    test = instruction.first_of(_TESTS)
    value = context.value(instruction.operands[1], instruction.type)
    return context.assign(instruction.operands[0], f"{test}({value})")


EMITTERS = {"mov": _move, "setp": _compare, "selp": _select, "testp": _test}
