"""A PTX module as one C++ file: a function for each kernel, which one CUDA thread executes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from ptxsim.classes import InstructionClass, classify, special_function_operations
from ptxsim.emit import emit
from ptxsim.emit.context import KernelContext, identifier, literal
from ptxsim.errors import UnsupportedPtxError
from ptxsim.ptx_types import HOST_TYPES, size_of
from ptxsim.syntax import Instruction, Kernel, Label, Module, Statement, Variable

_SHARED_ALIGNMENT = 16
_REGISTER_NAME = re.compile(r"\br_\w+")


@dataclass
class BasicBlock:
    """Instructions that a thread executes all of, once it enters.

    Those under a guard that is false are counted too: hardware issues them all the same.
    """

    classes: Counter[InstructionClass] = field(default_factory=Counter)
    special_function_operations: int = 0

    def add(self, instruction: Instruction) -> None:
        """Append an instruction."""
        self.classes[classify(instruction)] += 1
        self.special_function_operations += special_function_operations(instruction)


@dataclass(frozen=True)
class TranslatedKernel:
    """What is to be known of a kernel beside its C++."""

    kernel: Kernel
    blocks: list[BasicBlock]


@dataclass(frozen=True)
class TranslatedModule:
    """A module in C++.

    Attributes:
        kernels: By name.
        static_shared_bytes: Shared memory that the module itself declares; what a launch asks for
            comes behind it.
        variables: Names of the global and constant variables.
    """

    source: str
    kernels: dict[str, TranslatedKernel]
    static_shared_bytes: int
    variables: list[str]


def translate(module: Module) -> TranslatedModule:
    """Translate a module.

    Raises:
        UnsupportedPtxError: Naming what has no translation.
    """
    memory = _Memory(module)
    kernels: dict[str, TranslatedKernel] = {}
    functions = []
    for kernel in module.kernels:
        writer = _KernelWriter(kernel, memory)
        functions.append(writer.write())
        kernels[kernel.name] = TranslatedKernel(kernel, writer.blocks)
    source = "\n".join(
        ['#include "kernel.h"', *memory.declarations, *functions, memory.region_table()]
    )
    return TranslatedModule(source, kernels, memory.static_shared_bytes, [*memory.variables])


class _Memory:
    """Where the variables of a module are."""

    def __init__(self, module: Module) -> None:
        self.shared: dict[str, int] = {}
        self.variables: dict[str, str] = {}
        self.declarations: list[str] = []
        end = 0
        dynamic = []
        for variable in _all_variables(module):
            if variable.space == "shared" and variable.count is None:
                dynamic.append(variable.name)
            elif variable.space == "shared":
                offset = -(-end // variable.alignment) * variable.alignment
                self.shared[variable.name] = offset
                end = offset + size_of(variable.type) * (variable.count or 0)
            elif variable.space in ("global", "const"):
                self._declare(variable)
        self.static_shared_bytes = -(-end // _SHARED_ALIGNMENT) * _SHARED_ALIGNMENT
        self.shared.update(dict.fromkeys(dynamic, self.static_shared_bytes))

    def _declare(self, variable: Variable) -> None:
        name = f"variable_{identifier(variable.name)}"
        host = HOST_TYPES[variable.type]
        values = ", ".join(literal(text, variable.type) for text in variable.initial)
        alignment = max(variable.alignment, size_of(variable.type))
        count = variable.count or len(variable.initial)
        initial = f" = {{{values}}}" if values else ""
        self.declarations.append(f"alignas({alignment}) static {host} {name}[{count}]{initial};")
        self.variables[variable.name] = name

    def region_table(self) -> str:
        """A function through which the launcher learns where the module's variables are."""
        entries = [
            f"  begins[{i}] = reinterpret_cast<u64>({name}); "
            f"ends[{i}] = begins[{i}] + sizeof {name};"
            for i, name in enumerate(self.variables.values())
        ]
        lines = [
            'extern "C" void module_variables(u64* begins, u64* ends) {',
            "  (void)begins; (void)ends;",
            *entries,
            "}",
        ]
        return "\n".join(lines)


def _all_variables(module: Module) -> Iterable[Variable]:
    yield from module.variables
    for kernel in module.kernels:
        yield from kernel.variables


class _KernelWriter:
    """Writes one kernel, and divides it into basic blocks."""

    def __init__(self, kernel: Kernel, memory: _Memory) -> None:
        self.kernel = kernel
        self.context = KernelContext(kernel, memory.shared, memory.variables)
        self.blocks: list[BasicBlock] = []

    def write(self) -> str:
        body = [self._enter_block(self.kernel.statements[:1])]
        for i, statement in enumerate(self.kernel.statements):
            following = self.kernel.statements[i + 1 : i + 2]
            if isinstance(statement, Label):
                body.append(f"label_{identifier(statement.name)}: {self._enter_block(following)}")
                continue
            self.blocks[-1].add(statement)
            body.append(emit(self.context, statement))
            if statement.name in ("bra", "ret", "exit"):
                body.append(self._enter_block(following))
        lines = [
            # A name of its own: kernels of several modules live in one process.
            f'extern "C" void kernel_{identifier(self.kernel.name)}(const u8* parameters) {{',
            "  (void)parameters;",
            "  u32 carry = 0; (void)carry;",
            *self._locals(),
            *self._turns(),
            *self._registers(body),
            *(f"  {line}" for line in body),
            "}",
        ]
        return "\n".join(lines)

    def _enter_block(self, following: list[Statement]) -> str:
        self.blocks.append(BasicBlock())
        line = next((s.line for s in following if isinstance(s, Instruction)), 0)
        return f"ptx::enter({len(self.blocks) - 1}, {line});"

    def _locals(self) -> Iterable[str]:
        for variable in self.kernel.variables:
            if variable.space == "local":
                name = f"local_{identifier(variable.name)}"
                size = size_of(variable.type) * (variable.count or 0)
                yield f"  alignas(16) u8 {name}[{size}];"
                yield f"  std::memset({name}, int(ptx::kPoison & 0xff), sizeof {name});"

    def _turns(self) -> Iterable[str]:
        """How often this thread has come to each access: see `ptx::Site`."""
        return (f"  u32 turn_{i} = 0;" for i in range(1, self.context.sites + 1))

    def _registers(self, body: list[str]) -> Iterable[str]:
        """The registers that are used, each poisoned until it is written."""
        used = set(_REGISTER_NAME.findall("\n".join(body)))
        declared: dict[str, str] = {}
        for name, ptx_type in self.kernel.registers.items():
            variable = self.context.register(name)
            if variable in declared:
                raise UnsupportedPtxError(f"registers {declared[variable]} and {name} collide")
            declared[variable] = name
            if variable in used:
                host = HOST_TYPES[ptx_type]
                yield f"  {host} {variable} = {host}(ptx::kPoison);"
