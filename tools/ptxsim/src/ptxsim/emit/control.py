"""Jumps, barriers, traps, and what has no effect here."""

from __future__ import annotations

import re

from ptxsim.emit.context import KernelContext, identifier, unsupported
from ptxsim.syntax import Instruction


def emit_hint(context: KernelContext, instruction: Instruction) -> str:
    """Nothing happens; a cache policy is any number."""
    if instruction.name == "createpolicy":
        return context.assign(instruction.operands[0], "0")
    return ";"


def _return(context: KernelContext, instruction: Instruction) -> str:
    return "return;"


def _branch(context: KernelContext, instruction: Instruction) -> str:
    return f"goto label_{identifier(instruction.operands[0])};"


def _trap(context: KernelContext, instruction: Instruction) -> str:
    return f'ptx::stop_kernel("trap", {context.line});'


def _breakpoint(context: KernelContext, instruction: Instruction) -> str:
    return ";"


def _call(context: KernelContext, instruction: Instruction) -> str:
    # Reached by a failed assertion, or by a function that was not inlined: the end either way.
    names = re.findall(r"[A-Za-z_$][\w$]*", " ".join(instruction.operands))
    callee = next((name for name in names if name not in context.kernel.call_slots), "?")
    return f'ptx::stop_kernel("call of {callee}", {context.line});'


def _barrier(context: KernelContext, instruction: Instruction) -> str:
    operands = instruction.operands
    if instruction.has("warp"):
        members = context.value(operands[0], "u32")
        return f'ptx::block.meet({members}, "bar.warp.sync", {context.line});'
    if not instruction.has("sync"):
        raise unsupported(instruction)
    number = context.operand(operands[0]) if operands else "0"
    threads = context.operand(operands[1]) if len(operands) > 1 else "0"
    name = context.barrier_name()
    return f"ptx::block.barrier({number}, {threads}, {name}, {context.line});"


EMITTERS = {
    "ret": _return,
    "exit": _return,
    "bra": _branch,
    "trap": _trap,
    "brkpt": _breakpoint,
    "call": _call,
    "bar": _barrier,
    "barrier": _barrier,
}
