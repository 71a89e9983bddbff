"""What a launch did, counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from ptxsim.classes import InstructionClass


@dataclass(frozen=True)
class Counters:
    """Work and traffic of one launch.

    Attributes:
        global_bytes_loaded: Bytes that the threads asked for, duplicates included.
        global_bytes_stored: The same for stores. An atomic counts as both.
        distinct_bytes_loaded: The same, but a byte that several lanes of a warp ask for in one
            access counts once, as hardware serves it. (All threads of a program load a scalar.)
        distinct_bytes_stored: The same for stores.
        sectors_loaded: Distinct 32-byte sectors of each warp's access, summed over the accesses:
            what leaves the first-level cache if nothing stays in it.
        sectors_stored: The same for stores.
        instructions: How many instructions of each class the threads issued, one a thread. An
            instruction whose guard is false is issued too.
        special_function_operations: Results of exp2, log2, reciprocals, roots, sines and tanh.
    """

    global_bytes_loaded: int
    global_bytes_stored: int
    distinct_bytes_loaded: int
    distinct_bytes_stored: int
    sectors_loaded: int
    sectors_stored: int
    instructions: Mapping[InstructionClass, int]
    special_function_operations: int

    @property
    def global_bytes(self) -> int:
        """Bytes loaded and stored."""
        return self.global_bytes_loaded + self.global_bytes_stored

    @property
    def distinct_bytes(self) -> int:
        """Bytes loaded and stored, each once for each warp's access."""
        return self.distinct_bytes_loaded + self.distinct_bytes_stored

    @property
    def total_instructions(self) -> int:
        """Instructions of all classes."""
        return sum(self.instructions.values())


@dataclass(frozen=True)
class Launch:
    """One launch that ran to its end.

    Attributes:
        name: Of the kernel, as in the PTX.
        grid: Blocks along x, y, z.
        block: Threads along x, y, z.
        shared_bytes: Shared memory of a block, static and dynamic.
        seconds: Wall time on this machine; says nothing about a GPU.
    """

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    counters: Counters
    seconds: float


_collectors: list[list[Launch]] = []


@contextmanager
def collect() -> Iterator[list[Launch]]:
    """Collect every launch made inside the block, in their order.

    Example:
        >>> with collect() as launches:
        ...     pass
        >>> launches
        []
    """
    launches: list[Launch] = []
    _collectors.append(launches)
    try:
        yield launches
    finally:
        # By identity: two collectors that saw the same launches are equal lists.
        _collectors[:] = [other for other in _collectors if other is not launches]


def report(launch: Launch) -> None:
    """Give a finished launch to everybody who collects."""
    for launches in _collectors:
        launches.append(launch)
