"""Exchanges between the lanes of a warp, and matrix fragments."""

from __future__ import annotations

import re

from ptxsim.emit.context import KernelContext, unsupported, vector
from ptxsim.ptx_types import is_signed
from ptxsim.syntax import Instruction

_SHUFFLES = {"up": "up", "down": "down", "bfly": "butterfly", "idx": "index"}
_VOTES = {"ballot": "ballot", "all": "all", "any": "any", "uni": "uniform"}
_REDUCTIONS = {"add": "add", "and": "and_", "or": "or_", "xor": "xor_", "min": "min", "max": "max"}
_ELEMENTS = {name: name for name in ("f16", "bf16", "tf32", "s8", "u8")}
_FRAGMENT_WORDS = 4


def _shuffle(context: KernelContext, instruction: Instruction) -> str:
    results, *sources = instruction.operands
    mode = f"ptx::Shuffle::{instruction.first_of(_SHUFFLES)}"
    arguments = ", ".join(context.operand(source) for source in sources)
    code = f"const auto got = ptx::shuffle({mode}, {arguments}, {context.line});"
    value, _, in_range = (name.strip() for name in results.partition("|"))
    code += " " + context.assign(value, "got.value")
    if in_range:
        code += " " + context.assign(in_range, "got.in_range")
    return f"{{ {code} }}"


def _vote(context: KernelContext, instruction: Instruction) -> str:
    destination, predicate, members = instruction.operands
    mode = f"ptx::Vote::{instruction.first_of(_VOTES)}"
    arguments = f"{context.operand(predicate, 'pred')}, {context.operand(members)}"
    return context.assign(destination, f"ptx::vote({mode}, {arguments}, {context.line})")


def _active_mask(context: KernelContext, instruction: Instruction) -> str:
    return context.assign(instruction.operands[0], "ptx::block.live_lanes()")


def _reduce(context: KernelContext, instruction: Instruction) -> str:
    destination, source, members = instruction.operands
    operands = f"{context.operand(source)}, {context.operand(members)}, {context.line}"
    if instruction.type == "f32":
        flags = (instruction.has(name) for name in ("max", "abs", "NaN"))
        operation = ", ".join(str(flag).lower() for flag in flags)
        return context.assign(
            destination, f"ptx::reduce_float(ptx::FloatReduction{{{operation}}}, {operands})"
        )
    operation = instruction.first_of(_REDUCTIONS) or ""
    if operation in ("min", "max"):
        operation += "_signed" if is_signed(instruction.type) else "_unsigned"
    return context.assign(destination, f"ptx::reduce(ptx::Reduction::{operation}, {operands})")


def _matrix_count(instruction: Instruction) -> int:
    return int(instruction.first_of({"x1": "1", "x2": "2", "x4": "4"}) or 0)


def _load_matrices(context: KernelContext, instruction: Instruction) -> str:
    registers, address = instruction.operands
    transposed = str(instruction.has("trans")).lower()
    arguments = f"{_matrix_count(instruction)}, {transposed}, {context.address(address)}"
    return (
        f"{{ u32 words[{_FRAGMENT_WORDS}]; "
        f"ptx::load_matrices(words, {arguments}, {context.line}); "
        f"{context.assign_all(vector(registers), 'words')} }}"
    )


def _store_matrices(context: KernelContext, instruction: Instruction) -> str:
    address, registers = instruction.operands
    words = ", ".join(f"u32({context.operand(r)})" for r in vector(registers))
    transposed = str(instruction.has("trans")).lower()
    arguments = f"{_matrix_count(instruction)}, {transposed}, {context.address(address)}"
    return (
        f"{{ const u32 words[] = {{{words}}}; "
        f"ptx::store_matrices(words, {arguments}, {context.line}); }}"
    )


def _multiply(context: KernelContext, instruction: Instruction) -> str:
    shape = re.fullmatch(r"m16n8k(\d+)", instruction.parts[3])
    result_type, element, other_element, addend_type = instruction.parts[-4:]
    if not shape or element not in _ELEMENTS or other_element != element:
        raise unsupported(instruction)
    if addend_type != result_type or result_type not in ("f32", "f16", "s32"):
        raise unsupported(instruction)
    accumulator = "saturating_s32" if instruction.has("satfinite") else result_type
    fragments = [vector(operand) for operand in instruction.operands]
    code = f"u32 d[{_FRAGMENT_WORDS}] = {{0}};"
    arguments = "d"
    for name, registers in zip("abc", fragments[1:], strict=True):
        words = ", ".join(f"u32({context.operand(r)})" for r in registers)
        code += f" const u32 {name}[] = {{{words}}};"
        arguments += f", ptx::Fragment{{{name}, {len(registers)}}}"
    kinds = f"ptx::Element::{element}, ptx::Accumulator::{accumulator}"
    code += f" ptx::multiply_matrices({shape[1]}, {kinds}, {arguments}, {context.line});"
    return f"{{ {code} {context.assign_all(fragments[0], 'd')} }}"


EMITTERS = {
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _active_mask,
    "redux": _reduce,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
    "mma": _multiply,
}
