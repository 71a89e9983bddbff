"""PTX text as data: a module, its variables, its kernels and their instructions."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Instruction:
    """One instruction, not yet interpreted.

    Attributes:
        opcode: With its modifiers and types, as `ld.global.v4.b32`.
        operands: As written; a vector or an address keeps its brackets.
        guard: The predicate register under which it executes, or None.
        guard_negated: Whether it executes where the predicate is false.
        line: Line of the source, from the last `.loc` before it; 0 if there is none.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str | None = None
    guard_negated: bool = False
    line: int = 0

    @property
    def parts(self) -> list[str]:
        """The opcode's parts: `["ld", "global", "v4", "b32"]`."""
        return self.opcode.split(".")

    @property
    def name(self) -> str:
        """The first part: `ld`."""
        return self.parts[0]

    @property
    def type(self) -> str:
        """The last part, which is the type of most instructions: `b32`."""
        return self.parts[-1]

    def has(self, *modifiers: str) -> bool:
        """Whether any of these modifiers is there."""
        return any(modifier in self.parts[1:] for modifier in modifiers)

    def first_of(self, modifiers: dict[str, str]) -> str | None:
        """What the first modifier maps to that is among the keys, or None."""
        return next((modifiers[part] for part in self.parts[1:] if part in modifiers), None)


@dataclass(frozen=True)
class Label:
    """A place to jump to."""

    name: str


Statement = Instruction | Label


@dataclass(frozen=True)
class Variable:
    """A variable in shared, global, constant or local memory.

    Attributes:
        count: Number of elements; None for an array whose size the launch decides.
        initial: Literals of its first elements.
    """

    name: str
    space: str
    type: str
    alignment: int
    count: int | None = 1
    initial: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """An argument of a kernel, at its place in the block of arguments."""

    name: str
    type: str
    offset: int
    size: int


@dataclass
class Kernel:
    """An entry point.

    Attributes:
        registers: Type by name.
        call_slots: Names of the `.param` variables through which it calls functions.
    """

    name: str
    parameters: dict[str, Parameter]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    call_slots: set[str] = field(default_factory=set)
    statements: list[Statement] = field(default_factory=list)

    @property
    def parameter_bytes(self) -> int:
        """Size of the block of arguments."""
        return max((p.offset + p.size for p in self.parameters.values()), default=0)


@dataclass
class Module:
    """A PTX file."""

    variables: list[Variable]
    kernels: list[Kernel]
