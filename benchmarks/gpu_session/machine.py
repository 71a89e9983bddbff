"""What the machine is: the GPU, the versions, the tools; and that each kernel launches there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu_session import kernels
from benchmarks.gpu_session.cases import Case, Missing
from benchmarks.gpu_session.target import Target

MODULES = {
    "triton": "triton",
    "numpy": "numpy",
    "cuda.core": "cuda-core",
    "cuda.bindings": "cuda-bindings",
    "pytest": "pytest",
    "matplotlib": "matplotlib",
    "liger_kernel": "liger-kernel",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels",
    "cutlass": "nvidia-cutlass-dsl",
}
"""By name in Python, the package on PyPI: what is used where it is there."""
TOOLS = ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "nsys")


def cases(target: Target) -> list[Case]:
    """What it is, then launches."""
    launches, *_ = kernels.cases(target)
    return [Case("what it is", lambda report: _facts(target)), *launches]


def _facts(target: Target) -> dict[str, Any]:
    missing = target.missing()
    if missing is not None:
        raise Missing(missing)
    return {
        **target.timer().facts(),
        "backends": target.backends(),
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name, package) for name, package in MODULES.items()},
        "tools": {name: _tool(name) for name in TOOLS},
    }


def _version(module: str, package: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
    except ImportError:
        return None


def _tool(name: str) -> str | None:
    path = shutil.which(name)
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path}: {error}"
    lines = (said.stdout or said.stderr).strip().splitlines()
    return lines[-1] if lines else path
