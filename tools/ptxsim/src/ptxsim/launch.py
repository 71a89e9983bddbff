"""Builds a PTX module and runs its kernels on memory of this process."""

from __future__ import annotations

import ctypes
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ptxsim.build import load_kernels, runtime
from ptxsim.classes import InstructionClass
from ptxsim.counters import Counters, Launch, report
from ptxsim.emit.context import identifier
from ptxsim.errors import KernelFaultError, PtxError
from ptxsim.parser import parse
from ptxsim.translate import TranslatedKernel, translate

ORDERS = ("sequential", "reversed", "random")
MOST_THREADS = 1024
"""Of a block, on every GPU."""

PATIENCE = 1.0
"""Seconds of a processor after which a module is compiled once more, into faster code: about as
long as that takes, and what has run so long is likely to run on."""

Dimensions = tuple[int, int, int]


@dataclass(frozen=True)
class Schedule:
    """What a GPU leaves open, decided.

    Attributes:
        order: Of the blocks: `sequential`, `reversed` or `random`. In a random order the threads
            of a block take turns at random too, and asynchronous copies land early or late.
        seed: Of the random order.
        check_races: Whether to look for data races. Costs most of the time and 16 bytes of memory
            for each element.
        early_copies: Whether asynchronous copies land at once instead of when they are waited for.
    """

    order: str = "sequential"
    seed: int = 0
    check_races: bool = True
    early_copies: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")

    def blocks(self, count: int) -> list[int]:
        """Linear indices of the blocks, first to last."""
        indices = list(range(count))
        if self.order == "reversed":
            indices.reverse()
        elif self.order == "random":
            random.Random(self.seed).shuffle(indices)
        return indices


@dataclass(frozen=True)
class Region:
    """Memory that a kernel may touch: the extent of a tensor argument.

    Attributes:
        begin: First address.
        end: The address behind the last byte.
        element_bytes: Races are looked for element by element.
        writable: Whether the kernel may write there.
        name: Used in messages.
    """

    begin: int
    end: int
    element_bytes: int
    writable: bool
    name: str


class _Region(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("shadow", ctypes.c_void_p),
        ("granule_log2", ctypes.c_uint32),
        ("writable", ctypes.c_uint32),
    )


class _Traffic(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "bytes_loaded",
            "bytes_stored",
            "distinct_loaded",
            "distinct_stored",
            "sectors_loaded",
            "sectors_stored",
        )
    )


class _Request(ctypes.Structure):
    """`ptx::LaunchRequest`, field by field."""

    _fields_ = (
        ("body", ctypes.c_void_p),
        ("parameters", ctypes.c_char_p),
        ("regions", ctypes.POINTER(_Region)),
        ("blocks", ctypes.POINTER(ctypes.c_uint32)),
        ("visits", ctypes.POINTER(ctypes.c_uint64)),
        ("shared_bytes", ctypes.c_uint64),
        ("region_count", ctypes.c_uint32),
        ("block_count", ctypes.c_uint32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("check_races", ctypes.c_uint32),
        ("random_threads", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("copy_timing", ctypes.c_uint32),
        ("traffic", _Traffic),
        ("message", ctypes.c_char_p),
        ("message_size", ctypes.c_uint64),
    )


_COPIES_LATE, _COPIES_EARLY, _COPIES_AT_RANDOM = range(3)
_SHADOW_WORDS = 4
_MESSAGE_BYTES = 2000


class PtxModule:
    """Compiled PTX, ready to be launched.

    Args:
        ptx: Text of the module.

    Attributes:
        kernels: What is known of each kernel, by name.
        uses_compare_and_swap: Whether a kernel swaps by comparison, which is how 16-bit atomics
            reach the 32-bit word that they are a part of.

    Raises:
        UnsupportedPtxError: The module uses something that is not modelled.
        PtxError: No compiler is there.
    """

    def __init__(self, ptx: str) -> None:
        translated = translate(parse(ptx))
        self.kernels: dict[str, TranslatedKernel] = translated.kernels
        self.uses_compare_and_swap = ".cas." in ptx
        self._variables = translated.variables
        self._static_shared_bytes = translated.static_shared_bytes
        self._source = translated.source
        self._library = load_kernels(translated.source)
        self._busy_seconds = 0.0
        self._is_fast = False

    def launch(
        self,
        name: str,
        grid: Dimensions,
        block: Dimensions,
        parameters: bytes,
        regions: Sequence[Region],
        *,
        shared_bytes: int = 0,
        schedule: Schedule | None = None,
    ) -> Launch:
        """Run a kernel to its end.

        Args:
            name: Of the kernel.
            grid: Blocks along x, y, z.
            block: Threads along x, y, z.
            parameters: The arguments, laid out as the kernel declares them.
            regions: What the kernel may touch.
            shared_bytes: Dynamic shared memory.
            schedule: Sequential, with every check, by default.

        Raises:
            KernelFaultError: A check failed; the message says which, where and by whom.
        """
        schedule = schedule or Schedule()
        kernel = self.kernels[name]
        if self._busy_seconds > PATIENCE and not self._is_fast:
            self._optimise()
        everything = [r for r in regions if r.end > r.begin] + self._variable_regions()
        shadows = [_shadow(r) if schedule.check_races else None for r in everything]
        visits = (ctypes.c_uint64 * len(kernel.blocks))()
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        blocks = schedule.blocks(grid[0] * grid[1] * grid[2])
        library = runtime()
        if len(blocks) > library.ptx_most_blocks():
            raise PtxError(f"{name}: {len(blocks)} blocks are more than the executor can number")
        threads = block[0] * block[1] * block[2]
        if threads > MOST_THREADS:
            raise PtxError(f"{name}: a block of {threads} threads; at most {MOST_THREADS}")
        shared = self._static_shared_bytes + shared_bytes
        request = _Request(
            body=ctypes.cast(getattr(self._library, f"kernel_{identifier(name)}"), ctypes.c_void_p),
            parameters=parameters.ljust(kernel.kernel.parameter_bytes, b"\0"),
            regions=_region_array(everything, shadows),
            blocks=(ctypes.c_uint32 * len(blocks))(*blocks),
            visits=visits,
            shared_bytes=shared,
            region_count=len(everything),
            block_count=len(blocks),
            grid=grid,
            block=block,
            check_races=schedule.check_races,
            random_threads=schedule.order == "random",
            seed=schedule.seed + 1,
            copy_timing=_copy_timing(schedule),
            message=ctypes.cast(message, ctypes.c_char_p),
            message_size=_MESSAGE_BYTES,
        )
        start, before = time.perf_counter(), time.process_time()
        failed = library.ptx_run(ctypes.byref(request))
        seconds = time.perf_counter() - start
        self._busy_seconds += time.process_time() - before
        if failed:
            raise KernelFaultError(f"{name}: {_name_arguments(message.value.decode(), everything)}")
        counters = _counters(kernel, request.traffic, list(visits))
        launch = Launch(name, grid, block, shared, counters, seconds)
        report(launch)
        return launch

    def _optimise(self) -> None:
        """Go on with faster code, and the variables as they are."""
        before = self._variable_regions()
        self._library = load_kernels(self._source, "fast")
        self._is_fast = True
        for old, new in zip(before, self._variable_regions(), strict=True):
            ctypes.memmove(new.begin, old.begin, old.end - old.begin)

    def _variable_regions(self) -> list[Region]:
        count = len(self._variables)
        begins, ends = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)()
        self._library.module_variables(begins, ends)
        return [
            Region(begin, end, 1, writable=True, name=f"variable {name}")
            for begin, end, name in zip(begins, ends, self._variables, strict=True)
        ]


def _shadow(region: Region) -> torch.Tensor:
    granules = ((region.end - region.begin) >> _granule_log2(region)) + 1
    return torch.zeros(granules * _SHADOW_WORDS, dtype=torch.int32)


def _granule_log2(region: Region) -> int:
    return max(region.element_bytes.bit_length() - 1, 0)


def _region_array(
    regions: Sequence[Region], shadows: Sequence[torch.Tensor | None]
) -> ctypes.Array[_Region]:
    array = (_Region * max(1, len(regions)))()
    for entry, region, shadow in zip(array, regions, shadows, strict=False):
        entry.begin, entry.end, entry.writable = region.begin, region.end, region.writable
        entry.granule_log2 = _granule_log2(region)
        entry.shadow = None if shadow is None else shadow.data_ptr()
    return array


def _copy_timing(schedule: Schedule) -> int:
    if schedule.order == "random":
        return _COPIES_AT_RANDOM
    return _COPIES_EARLY if schedule.early_copies else _COPIES_LATE


def _name_arguments(message: str, regions: Sequence[Region]) -> str:
    return re.sub(r"argument #(\d+)", lambda match: f"'{regions[int(match[1])].name}'", message)


def _counters(kernel: TranslatedKernel, traffic: _Traffic, visits: list[int]) -> Counters:
    """Totals: how often each basic block was entered, times what is in it."""
    instructions: Counter[InstructionClass] = Counter()
    special = 0
    for block, count in zip(kernel.blocks, visits, strict=True):
        special += count * block.special_function_operations
        for kind, number in block.classes.items():
            instructions[kind] += count * number
    return Counters(
        global_bytes_loaded=traffic.bytes_loaded,
        global_bytes_stored=traffic.bytes_stored,
        distinct_bytes_loaded=traffic.distinct_loaded,
        distinct_bytes_stored=traffic.distinct_stored,
        sectors_loaded=traffic.sectors_loaded,
        sectors_stored=traffic.sectors_stored,
        instructions={kind: instructions[kind] for kind in InstructionClass},
        special_function_operations=special,
    )
