"""The registry of backends, and the contract that each of them fulfils.

A backend is a set of row kernels and nothing else: GEMMs, chunking, autograd, validation and
objectives live above it and are shared. Kernels take tensors as they are; whether a backend may
run on a device is decided here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """What a model does to the output of its lm_head: `z = softcap * tanh(scale * x / softcap)`.

    The scale comes first and the cap second, as in Gemma 2 (cap), Cohere (scale) and Granite
    (scale is 1 / logits_scaling).

    Attributes:
        scale: Factor on the raw logits.
        softcap: Bound of the tanh cap in logits, or 0.0 for none.
    """

    scale: float = 1.0
    softcap: float = 0.0


class RowKernels(Protocol):
    """What a backend implements.

    Shapes: `logits` is `[n, v]` with any strides, the columns `first_column ..
    first_column + v` of the vocabulary; `labels` is int64 `[n]`, contiguous, counted in the whole
    vocabulary. A label outside the given columns is simply not among them (it may be in another
    chunk, or be `ignore_index`).
    """

    name: str

    def log_odds_update(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        transform: LogitTransform,
    ) -> None:
        """Fold these columns into `state` (`[3, n]`, see `row_state`), in place; one read."""

    def log_odds_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        slope: Tensor,
        out: Tensor,
        transform: LogitTransform,
    ) -> None:
        """Write `slope_i * (1[j == y_i] - r_ij) * dz/dx` into `out`; one read, one write.

        `r_ij = exp(z_ij - max_i) / sum_i` comes from the complete `state`: subtracting a rounded
        `rest_lse` instead would cost a digit for every decade of the logits' common offset.
        `out` is `[n, v]`, any strides, of the logits' dtype or another float dtype; it may be
        `logits` itself. A row whose slope is exactly 0 becomes exactly 0, whatever its logits hold.
        """


@runtime_checkable
class SweepKernels(RowKernels, Protocol):
    """A backend that can also finish a whole row in one visit: its second read is cached."""

    swept_objectives: frozenset[str]
    """Names of the objectives that the sweep knows; others take two visits."""

    def log_odds_sweep(
        self,
        logits: Tensor,
        labels: Tensor,
        row_weight: Tensor,
        objective: str,
        vocab_size: int,
        out: Tensor | None,
        transform: LogitTransform,
    ) -> Tensor:
        """Return `f(d_i)` (`[n]`, float32, unweighted) and write the gradient rows into `out`.

        `logits` holds the whole vocabulary. The row of `out` is `log_odds_gradient`'s for the slope
        `row_weight_i * f'(d_i)`; `out` may be `logits`, or None for the loss alone. A row with
        weight 0 is not read: its value and its gradient row are 0.
        """


BACKENDS = ("eager", "cpu", "triton")
"""Every backend there is, whether it can run here or not."""


@cache
def load(name: str) -> RowKernels:
    """The row kernels of a backend, whether or not this machine has the device they are for.

    Raises:
        ImportError: What the kernels are written in is not installed.
        RuntimeError: Their library cannot be loaded.
    """
    if name == "cpu":
        from unilogit_kernels.backends.cpu import CpuKernels

        return CpuKernels()
    if name == "triton":
        from unilogit_kernels.backends.triton.launch import TritonKernels

        return TritonKernels()
    from unilogit_kernels.backends.eager import EagerKernels

    return EagerKernels()


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None if it can."""
    if name == "cpu":
        from unilogit_kernels.backends import cpu

        return cpu.unavailable_reason()
    if name == "triton":
        from unilogit_kernels.backends import triton

        return triton.unavailable_reason()
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
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}
_DEVICES = {"cpu": "cpu", "triton": "cuda"}
_PREFERRED = {"cpu": "cpu", "cuda": "triton"}
"""The fused backend of each device type; to torch, AMD's GPUs are of type "cuda" too."""


def choose(requested: str | None, device_type: str, dtype: torch.dtype) -> str:
    """The name of the backend that a call runs on.

    float64 always runs on the eager backend. Otherwise the device's fused backend is the default;
    where it cannot run, the eager backend takes over and one warning says why.

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
    preferred = _PREFERRED.get(device_type)
    if dtype == torch.float64:
        return "eager"
    if preferred is None:
        _warn_once(f"no fused kernels for device type {device_type!r}")
        return "eager"
    reason = unavailable_reason(preferred)
    if reason is not None:
        _warn_once(f"the {preferred!r} kernels are not available: {reason}")
        return "eager"
    return preferred


# What torch.compiler.assume_constant_result does, which would import the whole compiler to do it.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check_exists(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")


@cache
def _warn_once(what: str) -> None:
    warnings.warn(
        f"unilogit_kernels runs its slower eager backend, since {what}. "
        "Pass backend='eager' to choose it knowingly.",
        stacklevel=4,
    )
