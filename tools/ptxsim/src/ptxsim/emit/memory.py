"""Loads, stores, atomics, asynchronous copies and address spaces."""

from __future__ import annotations

import re

from ptxsim.emit.context import KernelContext, unsupported, vector
from ptxsim.errors import UnsupportedPtxError
from ptxsim.ptx_types import FLOATS, HOST_TYPES, PACKED_HALVES
from ptxsim.syntax import Instruction

_SPACES = {
    "param": "param",
    "const": "constant",
    "global": "global",
    "local": "local",
    "shared": "shared",
    "shared::cta": "shared",
}
_ORDERED = ("relaxed", "acquire", "release", "volatile", "mmio")
"""Accesses by which threads talk to each other on purpose: no race among themselves."""


def _space(instruction: Instruction) -> str:
    return instruction.first_of(_SPACES) or "generic"


def _vector_type(instruction: Instruction, registers: list[str]) -> str:
    return f"ptx::Vector<{HOST_TYPES[instruction.type]}, {len(registers)}>"


def _operands(instruction: Instruction) -> tuple[str, ...]:
    """Without the cache policy: it decides how long data stays in the L2, not what is loaded."""
    last = -1 if instruction.has("L2::cache_hint") else None
    return instruction.operands[:last]


def _load(context: KernelContext, instruction: Instruction) -> str:
    destination, source = _operands(instruction)
    registers, space = vector(destination), _space(instruction)
    if space == "param":
        return _load_parameter(context, instruction, registers, source)
    host = _vector_type(instruction, registers)
    address = context.address(source)
    if space == "local":
        loaded = f"ptx::read_bytes<{host}>(ptx::pointer({address}))"
    else:
        loaded = f"ptx::load_{space}<{host}>({_access(context, instruction, address, '')})"
    writes = context.assign_all(registers, "loaded.values")
    return f"{{ const auto loaded = {loaded}; {writes} }}"


def _store(context: KernelContext, instruction: Instruction) -> str:
    destination, source = _operands(instruction)
    registers, space = vector(source), _space(instruction)
    if space == "param":
        return ";"  # the argument of a call, which is refused when it is reached
    host = _vector_type(instruction, registers)
    element = HOST_TYPES[instruction.type]
    values = ", ".join(f"{element}({context.operand(r, instruction.type)})" for r in registers)
    address = context.address(destination)
    if space == "local":
        write = f"ptx::write_bytes(ptx::pointer({address}), stored);"
    else:
        write = f"ptx::store_{space}({_access(context, instruction, address, 'stored')});"
    return f"{{ const {host} stored = {{{{{values}}}}}; {write} }}"


def _access(context: KernelContext, instruction: Instruction, address: str, value: str) -> str:
    """The arguments of a checked access."""
    space = _space(instruction)
    where = str(context.line) if space == "shared" else context.site()
    arguments = [address, *([value] if value else []), where]
    if instruction.has(*_ORDERED) and space != "constant":
        arguments.append("ptx::Access::atomic")
    return ", ".join(arguments)


def _load_parameter(
    context: KernelContext, instruction: Instruction, registers: list[str], source: str
) -> str:
    host = HOST_TYPES[instruction.type]
    base = re.split(r"[+\s]", source.strip("[]").strip())[0]
    if base in context.kernel.call_slots:
        return ";"  # the result of a call, which is refused before
    offset = context.operand(source.strip("[]").strip(), "b64")
    reads = []
    for i, register in enumerate(registers):
        read = f"ptx::read_bytes<{host}>(parameters + {offset} + {i} * sizeof({host}))"
        reads.append(context.assign(register, read))
    return " ".join(reads)


def _convert_address(context: KernelContext, instruction: Instruction) -> str:
    destination, source = instruction.operands
    address = f"u64({context.operand(source, 'b64')})"
    if instruction.has("shared", "shared::cta"):
        to_shared = instruction.has("to")
        function = "generic_to_shared" if to_shared else "shared_to_generic"
        address = f"ptx::{function}({address})"
    return context.assign(destination, address)


def _is_in_space(context: KernelContext, instruction: Instruction) -> str:
    destination, source = instruction.operands
    address = f"u64({context.operand(source, 'b64')})"
    if instruction.has("shared", "shared::cta"):
        return context.assign(destination, f"ptx::is_shared({address})")
    return context.assign(destination, f"!ptx::is_shared({address}) && !ptx::is_local({address})")


def _async_copy(context: KernelContext, instruction: Instruction) -> str:
    operands = _operands(instruction)
    if not instruction.has("async"):
        raise unsupported(instruction)
    if instruction.has("commit_group"):
        return "ptx::commit_async_copies();"
    if instruction.has("wait_group"):
        return f"ptx::wait_async_copies({context.operand(operands[0])});"
    if instruction.has("wait_all"):
        return "ptx::wait_all_async_copies();"
    shared, source = context.address(operands[0]), context.address(operands[1])
    size = context.operand(operands[2])
    filled = context.operand(operands[3]) if len(operands) > 3 else size
    return f"ptx::async_copy({shared}, {source}, {size}, {filled}, {context.site()});"


_UPDATES = {
    "add": "before + {0}",
    "min": "std::min<{host}>(before, {0})",
    "max": "std::max<{host}>(before, {0})",
    "and": "before & {0}",
    "or": "before | {0}",
    "xor": "before ^ {0}",
    "exch": "{0}",
    "cas": "before == {0} ? {1} : before",
    "inc": "before >= {0} ? 0 : before + 1",
    "dec": "before == 0 || before > {0} ? {0} : before - 1",
}
_FLOAT_UPDATES = {
    "add": "{0} + {1}",
    "min": "ptx::min_number({0}, {1})",
    "max": "ptx::max_number({0}, {1})",
}


def _atomic(context: KernelContext, instruction: Instruction) -> str:
    returns = instruction.name == "atom"
    address, *sources = instruction.operands[1:] if returns else instruction.operands
    if address.startswith("{") or sources[0].startswith("{"):
        raise unsupported(instruction)
    host = HOST_TYPES[instruction.type]
    function = "atomic_shared" if _space(instruction) == "shared" else "atomic_generic"
    update = f"[&]({host} before) -> {host} {{ return {_update(context, instruction, sources)}; }}"
    # Evaluated under the guard, but numbered outside of it, as every access is.
    call = f"ptx::{function}<{host}>({context.address(address)}, {update}, {context.site()})"
    return context.assign(instruction.operands[0], call) if returns else f"{call};"


def _update(context: KernelContext, instruction: Instruction, sources: list[str]) -> str:
    """C++ of what replaces `before`."""
    ptx_type = instruction.type
    host = HOST_TYPES[ptx_type]
    operation = next(part for part in instruction.parts[1:] if part in _UPDATES)
    bits = [f"{host}({context.operand(source, ptx_type)})" for source in sources]
    if ptx_type in FLOATS and operation in _FLOAT_UPDATES:
        form = FLOATS[ptx_type]
        values = f"{form.read}(before)", f"{form.read}({bits[0]})"
        return f"{form.write}({_FLOAT_UPDATES[operation].format(*values)})"
    if ptx_type in PACKED_HALVES:
        if operation != "add":
            raise unsupported(instruction)
        form = FLOATS[PACKED_HALVES[ptx_type]]
        sums = [
            f"{form.write}({form.read}(before >> {s}) + {form.read}({bits[0]} >> {s}))"
            for s in (0, 16)
        ]
        return f"ptx::pack({', '.join(sums)})"
    if ptx_type in FLOATS and operation not in ("exch", "cas"):
        raise UnsupportedPtxError(f"instruction `{instruction.opcode}` is not supported")
    return f"{host}({_UPDATES[operation].format(*bits, host=host)})"


EMITTERS = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "cvta": _convert_address,
    "isspacep": _is_in_space,
    "cp": _async_copy,
    "atom": _atomic,
    "red": _atomic,
}
