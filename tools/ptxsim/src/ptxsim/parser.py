"""Reads PTX text into `syntax`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ptxsim.errors import UnsupportedPtxError
from ptxsim.ptx_types import HOST_TYPES, size_of
from ptxsim.syntax import Instruction, Kernel, Label, Module, Parameter, Statement, Variable

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|^\s*\.file\b[^\n]*", re.S | re.M)
_BODY = re.compile(
    r"\.entry\s+(?P<entry>[\w$]+)\s*\((?P<parameters>[^)]*)\)[^{;]*\{"
    r"|\.func\b[^{;]*\{"
    r"|\.section\b[^{;]*\{"
)
_VARIABLE = re.compile(
    r"\.(?P<space>shared|global|const|local)\s+"
    r"(?:\.attribute\([^)]*\)\s*)?(?:\.align\s+(?P<alignment>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$%]+)\s*(?P<array>\[(?P<count>\d*)\])?\s*"
    r"(?:=\s*(?P<initial>\{[^}]*\}|[^;]+))?$",
    re.S,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(?P<alignment>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+(?:\d+\s+)?)*)?(?P<name>[\w$]+)\s*(?:\[(?P<count>\d+)\])?$",
    re.S,
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.S)
_REGISTER_RANGE = re.compile(r"(%?[\w$]+)<(\d+)>")
_CALL_SLOT = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.\w+\s+([\w$]+)")
_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+(.*)", re.S)
_LABEL = re.compile(r"([\w$]+):(?!:)")
_NAME = re.compile(r"%?[A-Za-z_$][\w$]*")
_LOCATION = re.compile(r"\.loc\s+\d+\s+(\d+)[^\n]*")
_IGNORED_DIRECTIVES = (".pragma",)
_DEFAULT_ALIGNMENT = 4


def parse(text: str) -> Module:
    """Read a PTX file.

    Functions that are not entry points are left out; a call of one is refused where it is met.

    Raises:
        UnsupportedPtxError: Something in it is not understood.
    """
    text = _COMMENT.sub(lambda match: "\n" * match[0].count("\n"), text)
    kernels = []
    outside = ""
    end = 0
    for match in _BODY.finditer(text):
        if match.start() < end:
            continue
        outside += text[end : match.start()]
        end = _closing_brace(text, match.end()) + 1
        if match["entry"]:
            reader = _KernelReader(match["entry"], match["parameters"])
            kernels.append(reader.read(text[match.end() : end - 1]))
    return Module(list(_module_variables(outside + text[end:])), kernels)


def split_operands(text: str) -> tuple[str, ...]:
    """Split at the commas that no bracket encloses.

    Example:
        >>> split_operands("{%r1, %r2}, [%rd1+8], 0")
        ('{%r1, %r2}', '[%rd1+8]', '0')
    """
    operands, depth, current = [], 0, ""
    for character in text:
        depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        operands.append(current.strip())
    return tuple(operands)


def _closing_brace(text: str, start: int) -> int:
    """Where the block ends that begins before `start`."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise UnsupportedPtxError("a block of the PTX has no end")


def _module_variables(text: str) -> Iterator[Variable]:
    for statement in text.split(";"):
        match = re.search(r"\.(?:shared|global|const)\b.*$", statement, re.S)
        if match:
            yield _variable(match[0].strip())


def _variable(text: str) -> Variable:
    match = _VARIABLE.match(text)
    if not match:
        raise UnsupportedPtxError(f"declaration `{text}` is not supported")
    ptx_type = _known_type(match["type"])
    initial = (match["initial"] or "").strip().strip("{}")
    count = 1
    if match["array"]:
        count = int(match["count"]) if match["count"] else 0
    return Variable(
        name=match["name"],
        space=match["space"],
        type=ptx_type,
        alignment=int(match["alignment"] or max(_DEFAULT_ALIGNMENT, size_of(ptx_type))),
        count=count or None,
        initial=split_operands(initial),
    )


def _known_type(name: str) -> str:
    if name not in HOST_TYPES:
        raise UnsupportedPtxError(f"type .{name} is not supported")
    return name


def _parameters(text: str) -> dict[str, Parameter]:
    parameters: dict[str, Parameter] = {}
    end = 0
    for declaration in split_operands(text):
        match = _PARAMETER.match(declaration)
        if not match:
            raise UnsupportedPtxError(f"parameter `{declaration}` is not supported")
        element = size_of(_known_type(match["type"]))
        alignment = int(match["alignment"] or element)
        offset = -(-end // alignment) * alignment
        size = element * int(match["count"] or 1)
        parameters[match["name"]] = Parameter(match["name"], match["type"], offset, size)
        end = offset + size
    return parameters


class _KernelReader:
    """Reads the body of one kernel, statement by statement."""

    def __init__(self, name: str, parameters: str) -> None:
        self.kernel = Kernel(name, _parameters(parameters))
        # Inline assembly declares registers in blocks of its own: they get names of their own.
        self.scopes: list[dict[str, str]] = []
        self.scopes_opened = 0
        self.line = 0

    def read(self, body: str) -> Kernel:
        position, end = 0, len(body)
        while position < end:
            if body[position].isspace():
                position += 1
            elif match := _LOCATION.match(body, position):
                self.line = int(match[1])
                position = match.end()
            elif body[position] == "{":
                self.scopes.append({})
                self.scopes_opened += 1
                position += 1
            elif body[position] == "}":
                self.scopes.pop()
                position += 1
            elif match := _LABEL.match(body, position):
                self.kernel.statements.append(Label(match[1]))
                position = match.end()
            else:
                stop = body.find(";", position)
                stop = end if stop < 0 else stop
                self._statement(body[position:stop].strip())
                position = stop + 1
        self._check_labels()
        return self.kernel

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".param"):
            match = _CALL_SLOT.match(text)
            self.kernel.call_slots.update([match[1]] if match else [])
        elif text.startswith((".local", ".shared")):
            self.kernel.variables.append(_variable(text))
        elif text.startswith("."):
            if not text.startswith(_IGNORED_DIRECTIVES):
                raise UnsupportedPtxError(f"directive `{text}` is not supported")
        elif text:
            self.kernel.statements.append(self._instruction(text))

    def _registers(self, text: str) -> None:
        match = _REGISTERS.match(text)
        if not match:
            raise UnsupportedPtxError(f"declaration `{text}` is not supported")
        ptx_type = _known_type(match[1])
        for item in split_operands(match[2]):
            numbered = _REGISTER_RANGE.fullmatch(item)
            names = [f"{numbered[1]}{i}" for i in range(int(numbered[2]))] if numbered else [item]
            for name in names:
                unique = name
                if self.scopes:
                    unique = f"{name}$scope{self.scopes_opened}"
                    self.scopes[-1][name] = unique
                self.kernel.registers[unique] = ptx_type

    def _instruction(self, text: str) -> Statement:
        guard = None
        negated = False
        if match := _GUARD.match(text):
            negated, guard, text = match[1] == "!", self._resolve(match[2]), match[3]
        opcode, *rest = text.split(None, 1)
        operands = _NAME.sub(lambda name: self._resolve(name[0]), rest[0]) if rest else ""
        return Instruction(opcode, split_operands(operands), guard, negated, self.line)

    def _resolve(self, name: str) -> str:
        """The unique name of a register, seen from the innermost block."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _check_labels(self) -> None:
        labels = [x.name for x in self.kernel.statements if isinstance(x, Label)]
        for label in labels:
            if labels.count(label) > 1:
                raise UnsupportedPtxError(f"label {label} is defined twice")
