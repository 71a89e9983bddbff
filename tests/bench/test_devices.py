"""Clocks and memory of a CPU and of a GPU."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unilogit_kernels.bench.devices import Cuda, find_device


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="must be 'cpu' or 'cuda', got 'tpu'"):
        find_device("tpu")
    with pytest.raises(ValueError, match="no GPU is available"):
        find_device("cuda")


def test_cuda_times_events_after_a_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1.25

    class Buffer:
        def zero_(self) -> None:
            log.append("flush")

    properties = SimpleNamespace(
        L2_cache_size=100, name="GPU", major=9, minor=0, multi_processor_count=132, uuid="u-1"
    )
    sizes: list[int] = []

    def empty(size: int, **_: Any) -> Buffer:
        sizes.append(size)
        return Buffer()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", empty)
    device = Cuda()
    assert sizes == [200]
    assert device.time(lambda: log.append("run") or 5) == (1.25, 5)  # type: ignore[func-returns-value]
    assert log == ["flush", "record", "run", "record", "wait"]

    def smi(query: list[str], **_: Any) -> SimpleNamespace:
        assert "--id=GPU-u-1" in query
        return SimpleNamespace(
            stdout="580.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 41\n"
        )

    monkeypatch.setattr(subprocess, "run", smi)
    facts = device.facts()
    assert facts["clocks.sm"] == "1980 MHz"
    assert facts["capability"] == "9.0"

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(subprocess, "run", missing)
    assert "unknown" in device.facts()["clocks"]


def test_cuda_peaks_are_the_allocators(monkeypatch: pytest.MonkeyPatch) -> None:
    device = object.__new__(Cuda)
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 100,
        "max_memory_allocated": 150,
        "memory_reserved": 400,
        "mem_get_info": (1000, 2000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert device.start_peak() == 100
    assert device.peak() == 150
    assert device.free_bytes() == 1300
