"""How the names, literals and addresses of one kernel are spelled in C++."""

from __future__ import annotations

import re

from ptxsim.errors import UnsupportedPtxError
from ptxsim.ptx_types import FLOATS, HOST_TYPES
from ptxsim.syntax import Instruction, Kernel

_AXES = ("x", "y", "z")
_SPECIAL_REGISTERS = {
    **{f"%tid.{axis}": f"ptx::block.thread_index().{axis}" for axis in _AXES},
    **{f"%ctaid.{axis}": f"ptx::block.index.{axis}" for axis in _AXES},
    **{f"%ntid.{axis}": f"ptx::block.block_size.{axis}" for axis in _AXES},
    **{f"%nctaid.{axis}": f"ptx::block.grid_size.{axis}" for axis in _AXES},
    "%laneid": "ptx::block.lane()",
    "%warpid": "ptx::block.warp_index()",
    "%lanemask_eq": "(1u << ptx::block.lane())",
    "%lanemask_lt": "((1u << ptx::block.lane()) - 1)",
    "%lanemask_le": "((2u << ptx::block.lane()) - 1)",
    "%lanemask_gt": "(~((2u << ptx::block.lane()) - 1))",
    "%lanemask_ge": "(~((1u << ptx::block.lane()) - 1))",
    # One processor, no clusters, and time stands still.
    "%clock": "0u",
    "%clock64": "0ull",
    "%globaltimer": "0ull",
    "%smid": "0u",
    "%nsmid": "1u",
    "%cluster_ctaid.x": "0u",
    "%cluster_ctarank": "0u",
    "WARP_SZ": "32",
}

_FLOAT_LITERAL = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_DOUBLE_LITERAL = re.compile(r"0[dD]([0-9a-fA-F]{16})")
_INTEGER_LITERAL = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?")
_SUM = re.compile(r"(.+?)\s*\+\s*(-?\w+)")


def identifier(name: str) -> str:
    """A C++ identifier for a PTX name; different names stay different.

    Example:
        >>> identifier("%rd1"), identifier("$L__BB0_1")
        ('rd1', 'd_L__BB0_1')
    """
    return name.removeprefix("%").replace("$", "d_").replace("%", "p_").replace(".", "_")


def literal(text: str, ptx_type: str) -> str:
    """A constant as a bit pattern.

    Raises:
        UnsupportedPtxError: It is no constant.
    """
    if match := _FLOAT_LITERAL.fullmatch(text):
        bits = f"0x{match[1]}u"
        return f"ptx::to_f64(ptx::f32({bits}))" if ptx_type == "f64" else bits
    if match := _DOUBLE_LITERAL.fullmatch(text):
        bits = f"0x{match[1]}ull"
        return f"ptx::to_f32(float(ptx::f64({bits})))" if ptx_type == "f32" else bits
    if match := _INTEGER_LITERAL.fullmatch(text):
        # Decimal literals are signed, as C++ would have them, hexadecimal ones are patterns.
        suffix = "ll" if match[2].isdigit() else "ull"
        return f"({match[1]}{match[2]}{suffix})"
    raise UnsupportedPtxError(f"operand `{text}` is not supported")


class KernelContext:
    """Translates operands, and numbers what has to be told apart at run time.

    Args:
        kernel: The kernel whose instructions are translated.
        shared: Offset in shared memory of each variable there.
        variables: C++ name of each global and constant variable.

    Attributes:
        sites: How many instructions that touch global memory there are so far.
    """

    def __init__(self, kernel: Kernel, shared: dict[str, int], variables: dict[str, str]) -> None:
        self.kernel = kernel
        self.shared = shared
        self.variables = variables
        self.locals = {v.name for v in kernel.variables if v.space == "local"}
        self.line = 0
        self.sites = 0
        self.barriers = 0
        self._uses_site = False

    def begin(self, instruction: Instruction) -> None:
        """Turn to the next instruction."""
        self.line = instruction.line
        self._uses_site = False

    def site(self) -> str:
        """The `ptx::Site` of this instruction."""
        if not self._uses_site:
            self._uses_site = True
            self.sites += 1
        return f"ptx::Site{{{self.sites}, turn_{self.sites}, {self.line}}}"

    def count_turn(self) -> str:
        """A statement before the guard: lanes that are predicated off keep step."""
        return f"turn_{self.sites}++; " if self._uses_site else ""

    def barrier_name(self) -> str:
        """A name that tells this barrier from the kernel's others."""
        self.barriers += 1
        return f'"bar.sync #{self.barriers}"'

    def register(self, name: str) -> str:
        """The C++ variable of a register.

        Raises:
            UnsupportedPtxError: The kernel declares no such register.
        """
        if name not in self.kernel.registers:
            raise UnsupportedPtxError(f"register {name} is not supported")
        return f"r_{identifier(name)}"

    def operand(self, text: str, ptx_type: str = "b32") -> str:
        """An operand's bits."""
        if text.startswith("!"):
            return f"(!{self.operand(text[1:], ptx_type)})"
        if text in self.kernel.registers:
            return self.register(text)
        if text in _SPECIAL_REGISTERS:
            return _SPECIAL_REGISTERS[text]
        if text in self.locals:
            return f"reinterpret_cast<u64>(local_{identifier(text)})"
        if text in self.shared:
            return f"{self.shared[text]}u"
        if text in self.variables:
            return f"reinterpret_cast<u64>({self.variables[text]})"
        if text in self.kernel.parameters:
            return f"{self.kernel.parameters[text].offset}u"
        if match := _SUM.fullmatch(text):
            return f"({self.operand(match[1], ptx_type)} + {literal(match[2], 's64')})"
        return literal(text, ptx_type)

    def value(self, text: str, ptx_type: str) -> str:
        """An operand as a value of its type, ready for C++ arithmetic."""
        bits = self.operand(text, ptx_type)
        if ptx_type in FLOATS:
            return f"{FLOATS[ptx_type].read}({bits})"
        return f"{HOST_TYPES[ptx_type]}({bits})"

    def values(self, operands: tuple[str, ...], ptx_type: str) -> list[str]:
        """Several operands of one type as values."""
        return [self.value(operand, ptx_type) for operand in operands]

    def address(self, text: str) -> str:
        """The address that `[base + offset]` names."""
        return f"u64({self.operand(text.strip('[]').strip(), 'b64')})"

    def assign(self, destination: str, expression: str) -> str:
        """A statement that writes a register; `_` is the one that nobody reads."""
        if destination == "_":
            return f"(void)({expression});"
        ptx_type = self.kernel.registers.get(destination, "")
        variable = self.register(destination)
        return f"{variable} = {HOST_TYPES[ptx_type]}({expression});"

    def assign_all(self, destinations: list[str], array: str) -> str:
        """Write consecutive elements of a C++ array into registers."""
        writes = [self.assign(name, f"{array}[{i}]") for i, name in enumerate(destinations)]
        return " ".join(writes)


def vector(text: str) -> list[str]:
    """The elements of `{a, b}`, or the one operand that it is."""
    return [element.strip() for element in text.strip("{} ").split(",")]


def unsupported(instruction: Instruction) -> UnsupportedPtxError:
    """The error for an instruction in a form that has no translation."""
    return UnsupportedPtxError(f"instruction `{instruction.opcode}` is not supported")
