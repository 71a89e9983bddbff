"""Compiles Triton kernels for any GPU through the project's own launch code, with no GPU.

    with compiling_for("cuda:90") as launches:
        unilogit_loss(logits_on_cpu, labels).backward()
    print(resources(launches[0]))

A triton driver is put in place whose launches do nothing. So signatures, divisibility, constants,
launch options and out-of-resource errors are those of the real launch.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import CompiledKernel
from triton.runtime.cache import get_cache_manager

TARGETS = (
    "cuda:80",
    "cuda:86",
    "cuda:89",
    "cuda:90",
    "cuda:100",
    "cuda:103",
    "cuda:120",
    "hip:gfx90a",
    "hip:gfx942",
    "hip:gfx950",
    "hip:gfx1100",
    "hip:gfx1201",
)
"""What every triton from 3.6 to 3.9 compiles for."""


class Limits(NamedTuple):
    """Published sizes of an NVIDIA multiprocessor (CUDA C++ Programming Guide).

    Attributes:
        block_shared: Most bytes of shared memory in a block.
        shared: Bytes of shared memory.
        warps: Most resident warps.
        blocks: Most resident blocks.
    """

    block_shared: int
    shared: int
    warps: int
    blocks: int


REGISTERS = 65536
BLOCK_RESERVED_SHARED = 1024
LIMITS = {
    80: Limits(166912, 167936, 64, 32),
    86: Limits(101376, 102400, 48, 16),
    89: Limits(101376, 102400, 48, 24),
    90: Limits(232448, 233472, 64, 32),
    100: Limits(232448, 233472, 64, 32),
    103: Limits(232448, 233472, 64, 32),
    120: Limits(101376, 102400, 48, 24),
}
LOCAL_MEMORY = {"gfx950": 163840}
OTHER_LOCAL_MEMORY = 65536

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A launch that was compiled and not run.

    Attributes:
        name: Of the kernel.
        kernel: What triton compiled; `asm` holds every stage.
        grid: Programs in each direction.
        constants: Values of constexpr arguments, and of those specialised to constants.
    """

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    constants: dict[Any, Any]

    @property
    def target(self) -> GPUTarget:
        """What it was compiled for."""
        return self.kernel.metadata.target


class Driver(DriverBase):  # type: ignore[misc]
    """The driver of a GPU that is not there; triton's public extension point."""

    _devices = itertools.count(7000)

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
        # Triton caches compiled kernels by device: each target is a device of its own.
        self._device = next(self._devices)
        self._kernels: dict[str, Any] = {}
        self.launches: list[Launch] = []
        self.utils = self
        self.launcher_cls = self._launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        major, minor = divmod(self._target.arch, 10)
        return major, minor

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be tuned without running it")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def get_device_properties(self, device: int | None = None) -> dict[str, int]:
        if self._target.backend == "cuda":
            shared = LIMITS[self._target.arch].block_shared
        else:
            shared = LOCAL_MEMORY.get(self._target.arch, OTHER_LOCAL_MEMORY)
        return {
            "max_shared_mem": shared,
            "max_num_regs": REGISTERS,
            "multiprocessor_count": 1,
            "warpSize": self._target.warp_size,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> Any:
        """No module and no function; registers and spills are read elsewhere; threads a block."""
        return None, None, 0, 0, 1024

    def unload_module(self, module: None) -> None:
        pass

    def _launcher(self, source: Any, metadata: Any) -> Any:
        # Without a module, triton asks for a launcher at every launch of the same kernel.
        kernel = self._kernels.get(metadata.hash)
        if kernel is None:
            group = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json")
            kernel = self._kernels[metadata.hash] = CompiledKernel(source, group, metadata.hash)

        def launch(x: int, y: int, z: int, *_: Any) -> None:
            self.launches.append(Launch(metadata.name, kernel, (x, y, z), dict(source.constants)))

        return launch


@contextmanager
def compiling_for(target: str) -> Iterator[list[Launch]]:
    """Compile every kernel launch inside for one of `TARGETS`; the list collects them."""
    backend, _, name = target.partition(":")
    architecture: int | str = int(name) if backend == "cuda" else name
    wide = backend == "hip" and name.startswith("gfx9")
    driver = Driver(GPUTarget(backend, architecture, 64 if wide else 32))
    config = triton.runtime.driver
    before = config._active
    config.set_active(driver)
    try:
        yield driver.launches
    finally:
        config._active = before


# ---- what the compiler made of it --------------------------------------------------------------


class Turn(NamedTuple):
    """What the shortest way once around a loop executes: in ours, a tile without the label.

    Attributes:
        instructions: Machine instructions.
        special: Those of the special function units.
        loads: Global loads of 128 bits.
    """

    instructions: int
    special: int
    loads: int


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes of its GPU.

    Attributes:
        registers: For each thread (on AMD: vector registers).
        spilled: Bytes stored to and loaded from local memory for want of registers (on AMD:
            registers spilled).
        shared: Bytes of shared memory of a program.
        occupancy: Share of the warps that could be resident.
        instructions: Machine instructions, in the binary, not executed.
        loop_accesses: Global loads and stores in loops, by their width in bits, single ones as 0.
        turns: Of each loop that loads 128 bits at a time, what one turn of it takes.
    """

    registers: int
    spilled: int
    shared: int
    occupancy: float
    instructions: int
    loop_accesses: dict[int, int]
    turns: list[Turn]


def resources(launch: Launch) -> Resources:
    """Read them out of the compiled kernel."""
    return _nvidia(launch) if launch.target.backend == "cuda" else _amd(launch)


def _nvidia(launch: Launch) -> Resources:
    architecture, metadata = launch.target.arch, launch.kernel.metadata
    registers, spilled = _assemble(launch.kernel.asm["ptx"], architecture)
    limits = LIMITS[architecture]
    warps = metadata.num_warps
    allocated = -(-max(registers, 1) // 8) * 8 * 32 * warps
    blocks = min(
        REGISTERS // allocated,
        limits.warps // warps,
        limits.shared // (metadata.shared + BLOCK_RESERVED_SHARED),
        limits.blocks,
    )
    lines = machine_code(launch)
    return Resources(
        registers=registers,
        spilled=spilled,
        shared=metadata.shared,
        occupancy=blocks * warps / limits.warps,
        instructions=sum(isinstance(line, Instruction) for line in lines),
        loop_accesses=loop_accesses(lines),
        turns=turns_of(lines),
    )


@functools.lru_cache(64)
def _assemble(ptx: str, architecture: int) -> tuple[int, int]:
    """Registers and spilled bytes by `ptxas -v`, with the flags that triton itself gives it."""
    from triton.backends.nvidia import compiler

    make_cubin = inspect.getsource(compiler.CUDABackend.make_cubin)
    flags = ["--regAllocOptLevel=2"] if "regAllocOptLevel" in make_cubin else []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
        command = [compiler.get_ptxas(architecture).path, "-v", "-lineinfo", *flags]
        command += [f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    numbers = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    assert numbers is not None, log
    assert used is not None, log
    return int(used[1]), int(numbers[1]) + int(numbers[2])


class Instruction(NamedTuple):
    """A machine instruction.

    Attributes:
        operation: With modifiers.
        target: The label it jumps to, if any.
        goes_on: Whether the next instruction may follow it.
    """

    operation: str
    target: str | None
    goes_on: bool


def machine_code(launch: Launch) -> list[Instruction | str]:
    """The SASS: instructions, and labels as strings."""
    return _disassemble(bytes(launch.kernel.asm["cubin"]))


@functools.lru_cache(64)
def _disassemble(cubin: bytes) -> list[Instruction | str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "nvdisasm"), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines: list[Instruction | str] = []
    for line in text.splitlines():
        label = re.match(r"(\.L_\w+):", line)
        if label:
            lines.append(label[1])
        match = re.search(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P[T\d]+\s+)?(\S+)(.*);", line)
        if match:
            guard, operation, operands = match.groups()
            jump = re.search(r"`\((\.L_\w+)\)", operands)
            # `BRA P0, label` and `BRA.DIV` have their condition behind the operation.
            always = operation == "BRA" and re.match(r"\s*`", operands)
            ends = guard is None and (always or re.match(r"(EXIT|RET)\b", operation))
            lines.append(Instruction(operation, jump[1] if jump else None, not ends))
    return lines


def loop_accesses(lines: list[Instruction | str]) -> dict[int, int]:
    """Global accesses that may be executed again, by width.

    A jump back alone makes no loop: compilers put rare blocks behind the end and jump back from
    there. What counts is whether the way leads there again.
    """
    after = _followers(lines)
    before: list[list[int]] = [[] for _ in lines]
    for i, following_i in enumerate(after):
        for following in following_i:
            before[following].append(i)
    inside: set[int] = set()
    for i, following_i in enumerate(after):
        for first in following_i:
            if first <= i:  # every loop has such a jump
                inside |= _reachable(first, after) & _reachable(i, before)
    found: dict[int, int] = {}
    for i in inside:
        line = lines[i]
        bits = _width(line.operation) if isinstance(line, Instruction) else None
        if bits is not None:
            found[bits] = found.get(bits, 0) + 1
    return found


def _followers(lines: list[Instruction | str]) -> list[list[int]]:
    """Which lines may come after each."""
    labels = {line: i for i, line in enumerate(lines) if isinstance(line, str)}
    after: list[list[int]] = []
    for i, line in enumerate(lines):
        goes_on = isinstance(line, str) or line.goes_on
        after.append([i + 1] if goes_on and i + 1 < len(lines) else [])
        if isinstance(line, Instruction) and line.target is not None:
            after[i].append(labels[line.target])
    return after


def turns_of(lines: list[Instruction | str]) -> list[Turn]:
    """One turn of each loop that loads 128 bits at a time, by the shortest way around it."""
    after, found = _followers(lines), []
    for last, following in enumerate(after):
        for first in (line for line in following if line <= last):
            way = [lines[i] for i in _shortest_way(first, last, lines, after)]
            operations = [line.operation for line in way if isinstance(line, Instruction)]
            loads = sum(_width(x) == 128 and "ST" not in x and "store" not in x for x in operations)
            special = sum(bool(re.match(_SPECIAL, x)) for x in operations)
            if loads:
                found.append(Turn(len(operations), special, loads))
    return found


_SPECIAL = r"MUFU|v_(exp|log|rcp|rsq|sqrt)_"


def _shortest_way(
    first: int, last: int, lines: list[Instruction | str], after: list[list[int]]
) -> list[int]:
    """The lines of a way with the fewest instructions; none where there is no way."""
    taken, came_from, waiting = {first: 0}, {first: first}, [(0, first)]
    while waiting:
        so_far, here = heapq.heappop(waiting)
        if here == last:
            break
        for there in after[here]:
            length = so_far + isinstance(lines[there], Instruction)
            if length < taken.get(there, len(lines) + 1):
                taken[there], came_from[there] = length, here
                heapq.heappush(waiting, (length, there))
    else:
        return []
    way = [last]
    while way[-1] != first:
        way.append(came_from[way[-1]])
    return way


def _reachable(start: int, edges: list[list[int]]) -> set[int]:
    """Where the edges lead from `start`, itself included."""
    found, open_ends = {start}, [start]
    while open_ends:
        new = set(edges[open_ends.pop()]) - found
        found |= new
        open_ends += new
    return found


def _width(operation: str) -> int | None:
    """Bits of a global access, 0 if fewer than 64; None for another operation."""
    if not re.match(r"(LDG|STG)\.|(global|buffer|flat)_(load|store)_", operation):
        return None
    if re.search(r"\.128\b|dwordx4|b128", operation):
        return 128
    return 64 if re.search(r"\.64\b|dwordx2|b64", operation) else 0


def _amd(launch: Launch) -> Resources:
    text = launch.kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        match = re.search(pattern, text)
        assert match is not None, pattern
        return int(match[1])

    lines: list[Instruction | str] = []
    for line in text.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        if label:
            lines.append(label[1])
        match = re.match(r"\s+([sv]_\w+|(?:global|buffer|scratch|flat|ds)_\w+)(.*)", line)
        if match:
            jump = re.search(r"(\.LBB\w+)", match[2]) if "branch" in match[1] else None
            goes_on = match[1] not in ("s_branch", "s_endpgm")
            lines.append(Instruction(match[1], jump[1] if jump else None, goes_on))
    return Resources(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        spilled=number(r"\.vgpr_spill_count:\s+(\d+)"),
        shared=launch.kernel.metadata.shared,
        occupancy=number(r"Occupancy:\s*(\d+)") / (8 if launch.target.warp_size == 64 else 16),
        instructions=sum(isinstance(line, Instruction) for line in lines),
        loop_accesses=loop_accesses(lines),
        turns=turns_of(lines),
    )
