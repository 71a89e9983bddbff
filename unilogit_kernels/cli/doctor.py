"""What this machine and this installation can do."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from unilogit_kernels import available_backends

_PACKAGES = (
    "unilogit-kernels",
    "torch",
    "triton",
    "cuda-core",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
)


def diagnose() -> dict[str, Any]:
    """Versions, devices and backends, as plain data.

    Returns:
        `versions`: package to version, or None where it is not installed; `devices`: one entry
        each; `backends`: name to None where it can run here, else to the reason why not.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: package_version(name) for name in _PACKAGES},
        "devices": [_cpu(), *(_cuda(index) for index in range(torch.cuda.device_count()))],
        "backends": dict(available_backends()),
    }


def package_version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    return {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cuda(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
