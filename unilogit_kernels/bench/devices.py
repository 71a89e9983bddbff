"""Where to measure: how a device is timed, what its memory is, what must be stated about it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

import unilogit_kernels
from unilogit_kernels.backends.cpu import library
from unilogit_kernels.backends.memory import (
    peak_resident_bytes,
    start_resident_peak,
    told_bytes,
)

T = TypeVar("T")

_NVIDIA_SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


class Device(Protocol):
    """A device that providers run on."""

    type: str
    """Of its tensors: `"cpu"` or `"cuda"`."""
    peaks_need_a_process: bool
    """Whether a peak of memory can only be told for a process that has done nothing else."""

    def time(self, run: Callable[[], T]) -> tuple[float, T]:
        """Milliseconds that `run` takes, and what it returns."""

    def free_bytes(self) -> int:
        """Memory that can still be allocated."""

    def start_peak(self) -> int:
        """Forget the high-water mark; returns the bytes in use now."""

    def peak(self) -> int:
        """The high-water mark since `start_peak`, in bytes."""

    def facts(self) -> dict[str, Any]:
        """What the numbers were measured on."""


class Cpu:
    """This machine's cores. Linux only where memory is measured."""

    type = "cpu"
    peaks_need_a_process = True

    def time(self, run: Callable[[], T]) -> tuple[float, T]:
        """See `Device.time`."""
        start = time.perf_counter()
        result = run()
        return 1e3 * (time.perf_counter() - start), result

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        return told_bytes("/proc/meminfo", "MemAvailable")

    def start_peak(self) -> int:
        """See `Device.start_peak`; of the resident set of this process."""
        return start_resident_peak()

    def peak(self) -> int:
        """See `Device.peak`."""
        return peak_resident_bytes()

    def facts(self) -> dict[str, Any]:
        """See `Device.facts`."""
        model = platform.processor()
        if Path("/proc/cpuinfo").exists():
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    model = line.split(":", 1)[1].strip()
                    break
        return {
            "processor": model,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": library.instruction_set() if library.is_available() else None,
            "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "load_before": round(os.getloadavg()[0], 2),
            **_versions(),
        }


class Cuda:
    """The current NVIDIA or AMD GPU. Times are those of events, each with a cold L2 cache."""

    type = "cuda"
    peaks_need_a_process = False

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        # Writing twice its size leaves nothing else in the L2 cache.
        self._flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda")

    def time(self, run: Callable[[], T]) -> tuple[float, T]:
        """See `Device.time`."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)), result

    def free_bytes(self) -> int:
        """See `Device.free_bytes`."""
        # What torch's allocator holds in reserve is free to it.
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held

    def start_peak(self) -> int:
        """See `Device.start_peak`; of torch's allocator."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """See `Device.peak`."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def facts(self) -> dict[str, Any]:
        """See `Device.facts`."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "l2": "flushed before every step",
            **_clocks(str(properties.uuid)),
            **_versions(),
        }


def find_device(name: str) -> Device:
    """The device of a name.

    Raises:
        ValueError: There is none of that name, or not here.
    """
    if name == "cpu":
        return Cpu()
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"no GPU is available to torch {torch.__version__}")
        return Cuda()
    raise ValueError(f"must be 'cpu' or 'cuda', got {name!r}")


def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "unilogit_kernels": unilogit_kernels.__version__,
    }


def _clocks(uuid: str) -> dict[str, str]:
    """Clocks and limits as nvidia-smi tells them; times mean little without."""
    fields = f"--query-gpu={','.join(_NVIDIA_SMI_FIELDS)}"
    query = ["nvidia-smi", f"--id=GPU-{uuid}", fields, "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return {"clocks": f"unknown: {error}"}
    return dict(zip(_NVIDIA_SMI_FIELDS, found.stdout.strip().split(", "), strict=True))
