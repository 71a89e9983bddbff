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
from typing import Literal, NamedTuple, Protocol, runtime_checkable

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

    def at_temperature(self, temperature: float) -> LogitTransform:
        """The transform whose result is `z / temperature`.

        No kernel needs a temperature of its own:
        `softcap * tanh(scale * x / softcap) / T` is the transform of `scale / T` and `softcap / T`.
        """
        return LogitTransform(self.scale / temperature, self.softcap / temperature)


class RowKernels(Protocol):
    """What a backend implements.

    Shapes: `logits` is `[n, v]` with any strides, the columns `first_column ..
    first_column + v` of the vocabulary; `labels` is int64 `[n]`, contiguous, counted in the whole
    vocabulary. A label outside the given columns is simply not among them (it may be in another
    chunk, or be `ignore_index`).
    """

    name: str

    def __hash__(self) -> int:
        """Kernels hold no data: each set is itself."""

    def log_odds_update(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        transform: LogitTransform,
    ) -> None:
        """Fold these columns into `state` (see `row_state`), in place; one read.

        `state` is `[3, n]`, or `[4, n]` where the column of the largest logit of the rest is asked
        for: of the transformed logits, the lowest column of equal ones, counted in the whole
        vocabulary, in whatever order columns are folded. In a row that is NaN it may be any.
        """

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

        With a state of four rows `slope` is `[3, n]`, rows contiguous (`row_state.row_slopes`): the
        slope of the rest, and the entries (but for dz/dx) of the label and of the state's column. A
        row of three zeros becomes exactly 0.
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


@runtime_checkable
class ScaleKernels(Protocol):
    """A backend that scales where only the device knows the factor, without asking for it."""

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """`values *= factor` in place, rounded once; nothing is moved where it is exactly 1.

        `values` is contiguous; `factor` is one float on the same device.
        """


@runtime_checkable
class DivergenceKernels(Protocol):
    """A backend that can also compare two rows over the same columns: KL(P_a || P_b) per token.

    `a` is the distribution that weights the sum, `b` the other one; which of them is the model that
    learns is the caller's business. Both are `[n, v]` with any strides and may differ in dtype
    (float32, bfloat16 or float16 each). Labels are as for `RowKernels`; a label of -1 is in no
    column, so that both rests are the whole rows.
    """

    name: str

    def divergence_update(
        self,
        a: Tensor,
        b: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        a_transform: LogitTransform,
        b_transform: LogitTransform,
    ) -> None:
        """Fold these columns into `state` (`[7, n]`, see `pair_state`), in place; one read each."""

    def divergence_gradient(
        self,
        a: Tensor,
        b: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
        a_transform: LogitTransform,
        b_transform: LogitTransform,
    ) -> None:
        """Write the gradient rows of the student's logits into `out`; one read each, one write.

        With `s_j = a_j - a_max`, `t_j = b_j - b_max` from the complete `state` (a maximum of -inf
        is taken as 0) and row i's `alpha, beta, gamma, at_label` (`coefficients`, `[4, n]`, rows
        contiguous):

            out_j = (exp(s_j) (alpha + beta (s_j - t_j)) + gamma exp(t_j)) dz/dx   for j != y
            out_y = at_label dz/dx

        where dz/dx is the derivative of the transform of the row that `student` names. The first
        term is 0 where `exp(s_j)` is 0, and a beta of exactly 0 leaves the difference out, also
        where it is infinite. Both terms are rounded before they are added (no fused multiply-add
        over that sum), so that equal rows with `alpha = -gamma` give exactly 0.

        `out` is `[n, v]`, any strides, any float dtype of the three; it may be the student's logits
        themselves. A row whose four coefficients are exactly 0 becomes exactly 0, whatever its
        logits hold.
        """


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
        from unilogit_kernels.backends.cpu import CpuKernels

        return CpuKernels()
    if name == "triton":
        from unilogit_kernels.backends.triton.launch import TritonKernels

        return TritonKernels()
    if name == "cuda":
        from unilogit_kernels.backends.cuda.launch import CudaKernels

        return CudaKernels()
    from unilogit_kernels.backends.eager import EagerKernels

    return EagerKernels()


@cache
def sweep_kernels(kernels: RowKernels) -> SweepKernels | None:
    """The kernels as ones that finish whole rows at once, if they do; looked up once."""
    return kernels if isinstance(kernels, SweepKernels) else None


@cache
def scale_kernels(kernels: RowKernels) -> ScaleKernels | None:
    """The kernels as ones that scale in place, if they do; looked up once."""
    return kernels if isinstance(kernels, ScaleKernels) else None


@cache
def divergence_kernels(kernels: RowKernels) -> DivergenceKernels | None:
    """The kernels as ones that compare two rows, if they do; looked up once."""
    return kernels if isinstance(kernels, DivergenceKernels) else None


def load_divergence(name: str) -> DivergenceKernels:
    """The two-row kernels of a backend; eager's, with one warning, where it has none yet.

    Raises:
        ImportError: As `load`.
        RuntimeError: As `load`.
    """
    kernels = divergence_kernels(load(name))
    if kernels is not None:
        return kernels
    _warn_once("eager", f"the {name!r} kernels do not compare two models' rows")
    eager = divergence_kernels(load("eager"))
    assert eager is not None
    return eager


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None if it can."""
    if name == "cpu":
        from unilogit_kernels.backends import cpu

        return cpu.unavailable_reason()
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
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
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
        stacklevel=4,
    )
