"""PTX instructions as C++ statements, one family of instructions a file."""

from __future__ import annotations

from ptxsim.emit import bits, control, conversion, data, floats, integers, memory, warps
from ptxsim.emit.context import KernelContext
from ptxsim.errors import UnsupportedPtxError
from ptxsim.instruction_set import HINTS, check_known
from ptxsim.syntax import Instruction

_EMITTERS = {
    **bits.EMITTERS,
    **control.EMITTERS,
    **conversion.EMITTERS,
    **data.EMITTERS,
    **integers.EMITTERS,
    **floats.EMITTERS,
    **memory.EMITTERS,
    **warps.EMITTERS,
}


def emit(context: KernelContext, instruction: Instruction) -> str:
    """The C++ of one instruction, its guard included.

    Raises:
        UnsupportedPtxError: Naming the instruction that is not understood.
    """
    check_known(instruction)
    context.begin(instruction)
    emitter = control.emit_hint if instruction.name in HINTS else _EMITTERS[instruction.name]
    try:
        code = emitter(context, instruction)
    except (IndexError, KeyError, ValueError, StopIteration) as error:
        operands = ", ".join(instruction.operands)
        raise UnsupportedPtxError(
            f"cannot translate `{instruction.opcode} {operands}`: {error!r}"
        ) from error
    if instruction.guard is not None:
        negation = "!" if instruction.guard_negated else ""
        code = f"if ({negation}{context.register(instruction.guard)}) {{ {code} }}"
    return context.count_turn() + code
