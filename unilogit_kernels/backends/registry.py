"""The registry of backends, and the contract that each of them fulfils.

A backend is a set of row kernels and nothing else: GEMMs, chunking, autograd, validation and
objectives live above it and are shared. Kernels take tensors as they are; whether a backend may
run on a device is decided here.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from unilogit_kernels.backends.contract import RowKernels
from unilogit_kernels.backends.ids import DTYPE_IDS
from unilogit_kernels.backends.imagined import ImaginedGpu

_PACKAGE = __name__.partition(".")[0]

BACKENDS = ("eager", "cpu", "triton", "cuda")
"""Every backend there is, whether it can run here or not."""


@cache
def load(name: str) -> RowKernels:
    """The row kernels of a backend, whether or not this machine has the device they are for.

    Raises:
        ImportError: What the kernels are written in is not installed.
        RuntimeError: Their library cannot be loaded.
    """
    if name == "cpu":
        from unilogit_kernels.backends.cpu.kernels import CpuKernels

        return CpuKernels()
    if name == "triton":
        from unilogit_kernels.backends.triton.launch import TritonKernels

        return TritonKernels()
    if name == "cuda":
        from unilogit_kernels.backends.cuda.launch import CudaKernels

        return CudaKernels()
    from unilogit_kernels.backends.eager import EagerKernels

    return EagerKernels()


def imagine(gpu: ImaginedGpu) -> RowKernels:
    """The row kernels that a GPU gets by default, whose launches are noted and not made.

    Those in CUDA C++ stand for Triton's where triton is not installed.
    """
    try:
        from unilogit_kernels.backends.triton.launch import TritonKernels
    except ImportError:
        from unilogit_kernels.backends.cuda.launch import CudaKernels

        return CudaKernels(gpu)
    return TritonKernels(gpu)


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None if it can."""
    if name == "cpu":
        from unilogit_kernels.backends.cpu import library

        return library.unavailable_reason()
    if name == "triton":
        from unilogit_kernels.backends import triton

        return triton.unavailable_reason()
    if name == "cuda":
        from unilogit_kernels.backends import cuda

        return cuda.unavailable_reason()
    return None


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None if it can run here, else the reason why it cannot.

    Example:
        >>> available_backends()["eager"] is None
        True
    """
    return {name: unavailable_reason(name) for name in BACKENDS}


_forced: list[str] = []


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Send every call to one backend, whatever the tensors' device and the `backend` argument."""
    _check_exists(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


_DTYPES = {
    "eager": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    **dict.fromkeys(("cpu", "triton", "cuda"), tuple(DTYPE_IDS)),
}
_DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}
_PREFERRED = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
"""The fused backends of each device type, best first; to torch, AMD's GPUs are of type "cuda"."""


def choose(requested: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that a call runs on.

    float64 always runs on the eager backend. Otherwise the device's best fused backend is the
    default; where it cannot run, the next one takes over, the eager backend at last, and one
    warning says why.

    Raises:
        ValueError: The requested backend does not exist, or does not run on this device.
        TypeError: The requested backend does not take this dtype.
        RuntimeError: The requested backend cannot run here.
    """
    if _forced:
        return _forced[-1]
    if requested is not None:
        _check_exists(requested)
        reason = unavailable_reason(requested)
        if reason is not None:
            raise RuntimeError(f"backend {requested!r} is not available: {reason}")
        if _DEVICES.get(requested, device_type) != device_type:
            raise ValueError(
                f"backend {requested!r} runs on {_DEVICES[requested]} tensors, got {device_type}"
            )
        if dtype not in _DTYPES[requested]:
            raise TypeError(
                f"backend {requested!r} takes {', '.join(map(str, _DTYPES[requested]))}, "
                f"got {dtype}; backend='eager' takes every float dtype"
            )
        return requested
    if dtype == torch.float64:
        return "eager"
    missing: list[str] = []
    for name in _PREFERRED.get(device_type, ()):
        reason = unavailable_reason(name)
        if reason is None:
            if missing:
                _warn_once(name, "; ".join(missing))
            return name
        missing.append(f"the {name!r} kernels are not available: {reason}")
    what = "; ".join(missing) or f"no fused kernels for device type {device_type!r}"
    _warn_once("eager", what)
    return "eager"


# What torch.compiler.assume_constant_result does, which would import the whole compiler to do it.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_exists(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")


@cache
def _warn_once(name: str, what: str) -> None:
    slower = "slower " if name == "eager" else ""
    warnings.warn(
        f"unilogit_kernels runs its {slower}{name} backend, since {what}. "
        f"Pass backend={name!r} to choose it knowingly.",
        stacklevel=level_of_caller(),
    )


def level_of_caller() -> int:
    """The `stacklevel`, for the function that asks, of the first frame outside this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
