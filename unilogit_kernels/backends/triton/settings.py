"""How the kernels are launched: one table, keyed by architecture and dtype.

None of it has been measured on a GPU yet (docs/gpu.md); each number follows from sizes that the
vendors publish, and from what the compiler makes of it (`python -m benchmarks.static`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from unilogit_kernels.backends.triton import triton_version

_IS_INTERPRETED: bool = triton.knobs.runtime.interpret
"""Decided when kernels are decorated, which is when this is imported."""

_PACKS = not _IS_INTERPRETED and triton_version() < (3, 9)
"""From 3.9 on the sweep of rows of an odd length would spill on sm_90."""


# Compared by identity: a launch that follows from them is remembered with them as its key.
@dataclass(frozen=True, eq=False)
class Settings:
    """Launch settings of an architecture.

    Attributes:
        warp_threads: Threads of a warp (a wavefront on AMD).
        resident_warps: Warps that a multiprocessor runs at a time under `options`.
        lanes: Elements that a thread holds at once. More of them put more loads in flight and
            rescale the running sum more rarely; they live in registers.
        capped_lanes: The same where a softcap needs registers for its tanh.
        warps: Warps of a program that owns a whole row, or a part of one: few, so that rows end
            and begin independently of each other.
        split_warps: Warps of a program where few rows are split into many parts: as few as there
            are, so that a single row of 128k columns gives every multiprocessor something to do.
        multiprocessors: Of the largest product; used where no device can be asked.
        cache_bytes: The same for the last cache that all multiprocessors share.
        options: Compiler options.
        packs: Whether kernels take maxima of bfloat16 two at a time, by an instruction of PTX,
            which the interpreter does not know.
    """

    warp_threads: int
    resident_warps: int
    lanes: int
    capped_lanes: int
    warps: int
    split_warps: int
    multiprocessors: int
    cache_bytes: int
    options: dict[str, Any]
    packs: bool = False


# 64 registers a thread let 1024 of the 65,536 / 64 threads live on a multiprocessor, which is half
# of what sm_80, 90 and 100 can hold and two thirds on sm_86, 89 and 120; with 64 bytes in flight
# each that is 64 KiB, above the 20 KiB that an H100's bandwidth times latency asks for.
_NVIDIA: dict[str, Any] = {
    "warp_threads": 32,
    "resident_warps": 32,
    "lanes": 32,
    "capped_lanes": 16,
    "warps": 4,
    "split_warps": 2,
    "options": {"maxnreg": 64},
    "packs": _PACKS,
}
# Wavefronts of 64 threads: half as many for as many threads. The compiler of AMD's targets balances
# registers itself.
_CDNA: dict[str, Any] = {
    "warp_threads": 64,
    "resident_warps": 16,
    "lanes": 32,
    "capped_lanes": 16,
    "warps": 2,
    "split_warps": 1,
    "options": {},
}
_RDNA: dict[str, Any] = {**_CDNA, "warp_threads": 32, "resident_warps": 32, "warps": 4}

# With 32 lanes triton 3.9 spills on sm_80.
_SM_80: dict[str, Any] = {**_NVIDIA, "lanes": 16}

# They take the maximum of three float32 at a time, which is as good; words beside it would spill.
_BLACKWELL: dict[str, Any] = {**_NVIDIA, "packs": False}

TABLE: dict[str, Settings] = {
    "cuda:80": Settings(**_SM_80, multiprocessors=108, cache_bytes=40 << 20),  # A100
    "cuda:86": Settings(**_NVIDIA, multiprocessors=84, cache_bytes=6 << 20),  # RTX 3090, A40
    "cuda:89": Settings(**_NVIDIA, multiprocessors=142, cache_bytes=96 << 20),  # L40S
    "cuda:90": Settings(**_NVIDIA, multiprocessors=132, cache_bytes=50 << 20),  # H100
    "cuda:100": Settings(**_BLACKWELL, multiprocessors=148, cache_bytes=126 << 20),  # B200
    "cuda:103": Settings(**_BLACKWELL, multiprocessors=148, cache_bytes=126 << 20),  # B300
    "cuda:120": Settings(**_BLACKWELL, multiprocessors=170, cache_bytes=96 << 20),  # RTX 5090
    "hip:gfx90a": Settings(**_CDNA, multiprocessors=104, cache_bytes=8 << 20),  # MI250X, a die
    "hip:gfx942": Settings(**_CDNA, multiprocessors=304, cache_bytes=256 << 20),  # MI300X
    "hip:gfx950": Settings(**_CDNA, multiprocessors=256, cache_bytes=256 << 20),  # MI355X
    "hip:gfx1100": Settings(**_RDNA, multiprocessors=96, cache_bytes=96 << 20),  # RX 7900 XTX
    "hip:gfx1201": Settings(**_RDNA, multiprocessors=64, cache_bytes=64 << 20),  # RX 9070 XT
}
"""What is known of each architecture; others take the settings of their nearest relative."""

_INTERPRETED = "cuda:90"


class Device(NamedTuple):
    """What launches are laid out for.

    Attributes:
        settings: Of its architecture.
        multiprocessors: How many it has.
        cache_bytes: Of the last cache that they share.
    """

    settings: Settings
    multiprocessors: int
    cache_bytes: int


@functools.cache
def settings_of(target: str) -> Settings:
    """The settings of an architecture, by a name as in `TABLE`, or of its nearest relative."""
    if target in TABLE:
        return TABLE[target]
    backend, _, architecture = target.partition(":")
    if backend == "cuda":
        older = [known for known in TABLE if known.startswith("cuda:")]
        not_newer = [known for known in older if int(known[5:]) <= int(architecture)]
        return TABLE[not_newer[-1] if not_newer else older[0]]
    return TABLE["hip:gfx942" if architecture.startswith("gfx9") else "hip:gfx1100"]


def current_settings() -> Settings:
    """The settings of the device that triton launches on now."""
    if _IS_INTERPRETED:
        return TABLE[_INTERPRETED]
    driver = triton.runtime.driver.active
    return _settings_on(driver, driver.get_current_device())


@functools.cache
def _settings_on(driver: Any, device: int) -> Settings:
    target = driver.get_current_target()
    return settings_of(f"{target.backend}:{target.arch}")


@functools.cache
def _sizes(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


def sizes(tensor: Tensor, settings: Settings) -> tuple[int, int]:
    """Multiprocessors, and bytes of the last cache: the device's own numbers where there is one."""
    if not tensor.is_cuda:
        return settings.multiprocessors, settings.cache_bytes
    multiprocessors, cache_bytes = _sizes(tensor.device)
    # On AMD torch reports the L2, behind which some products have a larger last cache.
    return multiprocessors, max(cache_bytes, settings.cache_bytes if torch.version.hip else 0)


def device_of(tensor: Tensor) -> Device:
    """What launches on a tensor are laid out for."""
    chosen = current_settings()
    return Device(chosen, *sizes(tensor, chosen))
