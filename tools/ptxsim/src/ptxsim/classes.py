"""What an instruction costs: its class, and its operations on the special function units."""

from __future__ import annotations

from enum import Enum

from ptxsim.instruction_set import HINTS
from ptxsim.ptx_types import FLOATS, PACKED_HALVES
from ptxsim.syntax import Instruction


class InstructionClass(Enum):
    """The classes that instructions are counted in."""

    GLOBAL_LOAD = "global load"
    GLOBAL_STORE = "global store"
    ATOMIC = "atomic"
    SHARED = "shared memory"
    LOCAL = "local memory"
    ARITHMETIC = "arithmetic"
    CONVERSION = "conversion"
    SPECIAL_FUNCTION = "special function"
    MATRIX = "matrix multiply"
    WARP = "warp exchange"
    BARRIER = "barrier"
    CONTROL = "control"
    MOVE = "move"
    HINT = "hint"


_SPECIAL_FUNCTIONS = {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"}
_BY_NAME = {
    "cvt": InstructionClass.CONVERSION,
    "atom": InstructionClass.ATOMIC,
    "red": InstructionClass.ATOMIC,
    "ldmatrix": InstructionClass.SHARED,
    "stmatrix": InstructionClass.SHARED,
    "mma": InstructionClass.MATRIX,
    **dict.fromkeys(("shfl", "vote", "redux", "activemask"), InstructionClass.WARP),
    **dict.fromkeys(("bar", "barrier"), InstructionClass.BARRIER),
    **dict.fromkeys(("bra", "ret", "exit", "call", "trap", "brkpt"), InstructionClass.CONTROL),
    **dict.fromkeys(("mov", "cvta", "isspacep"), InstructionClass.MOVE),
    **dict.fromkeys(HINTS, InstructionClass.HINT),
}


def classify(instruction: Instruction) -> InstructionClass:
    """The class of an instruction.

    Loads of kernel arguments and constants are moves: the chip keeps them beside the cores. A
    division of floats is a special function, since hardware takes a reciprocal for it.
    """
    name = instruction.name
    if name in ("ld", "ldu", "st"):
        return _classify_access(instruction)
    if name == "cp":
        copies = "commit_group" not in instruction.parts and not instruction.has(
            "wait_group", "wait_all"
        )
        return InstructionClass.GLOBAL_LOAD if copies else InstructionClass.BARRIER
    if special_function_operations(instruction):
        return InstructionClass.SPECIAL_FUNCTION
    return _BY_NAME.get(name, InstructionClass.ARITHMETIC)


def special_function_operations(instruction: Instruction) -> int:
    """How many results of special functions one thread computes by this instruction."""
    if instruction.name in _SPECIAL_FUNCTIONS:
        return 2 if instruction.type in PACKED_HALVES else 1
    return int(instruction.name == "div" and instruction.type in FLOATS)


def _classify_access(instruction: Instruction) -> InstructionClass:
    if instruction.has("param", "const"):
        return InstructionClass.MOVE
    if instruction.has("local"):
        return InstructionClass.LOCAL
    if instruction.has("shared", "shared::cta"):
        return InstructionClass.SHARED
    # A generic address is taken for a global one, which it mostly is.
    stores = instruction.name == "st"
    return InstructionClass.GLOBAL_STORE if stores else InstructionClass.GLOBAL_LOAD
