"""Row kernels for CPUs in C++ (`csrc/cpu`): a shared library, called through ctypes.

The library is loaded at the first call. It is built when the package is installed, where a C++
compiler is there; where not, `unavailable_reason` says so and the eager backend takes its place.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.backends import LogitTransform
from unilogit_kernels.backends.ids import DTYPE_IDS, OBJECTIVE_IDS

LIBRARY_VARIABLE = "UNILOGIT_KERNELS_CPU_LIBRARY"
"""Environment variable that names another build of the library, for tests only."""

INSTRUCTION_SET_VARIABLE = "UNILOGIT_KERNELS_CPU_ISA"
"""Environment variable that forces one of `INSTRUCTION_SETS`, for tests only."""

INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")
"""What the library is compiled for, best first."""

_OUT_OF_MEMORY, _UNSUPPORTED = 1, 2
"""Of `UnilogitStatus` of `csrc/cpu/api.h`."""

_STUDENT_IDS = {"a": 0, "b": 1}
"""`kUnilogitStudentIsA` of `csrc/cpu/api.h`, or another."""


class _Matrix(ctypes.Structure):
    """`UnilogitMatrix` of `csrc/cpu/api.h`."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
        ("type", c_int32),
    )


class _Transform(ctypes.Structure):
    """`UnilogitTransform` of `csrc/cpu/api.h`."""

    _fields_ = (("scale", c_float), ("softcap", c_float))


_INTERFACE = 1
"""`UNILOGIT_INTERFACE` of `csrc/cpu/api.h`: the signatures below are those of this number."""

_MATRIX, _TRANSFORM = POINTER(_Matrix), POINTER(_Transform)
_ARRAY = c_void_p
_SIGNATURES = {
    "unilogit_interface": (c_int32, []),
    "unilogit_select_instruction_set": (c_int32, [c_char_p]),
    "unilogit_instruction_set": (c_char_p, []),
    "unilogit_log_odds_update": (
        c_int32,
        [_MATRIX, _ARRAY, c_int64, _ARRAY, c_int64, c_int32, _TRANSFORM, c_int32],
    ),
    "unilogit_log_odds_gradient": (
        c_int32,
        [
            *(_MATRIX, _ARRAY, c_int64, _ARRAY, c_int64, _ARRAY, c_int64),
            *(_MATRIX, _TRANSFORM, c_int32),
        ],
    ),
    "unilogit_log_odds_sweep": (
        c_int32,
        [_MATRIX, _ARRAY, _ARRAY, c_int32, c_int64, _MATRIX, _ARRAY, _TRANSFORM, c_int32],
    ),
    "unilogit_divergence_update": (
        c_int32,
        [_MATRIX, _MATRIX, _ARRAY, c_int64, _ARRAY, c_int64, _TRANSFORM, _TRANSFORM, c_int32],
    ),
    "unilogit_divergence_gradient": (
        c_int32,
        [
            *(_MATRIX, _MATRIX, _ARRAY, c_int64, _ARRAY, c_int64, _ARRAY, c_int64, c_int32),
            *(_MATRIX, _TRANSFORM, _TRANSFORM, c_int32),
        ],
    ),
    "unilogit_stream_copy": (None, [_ARRAY, _ARRAY, c_int64, c_int32]),
    "unilogit_populate": (None, [_ARRAY, c_int64, c_int32]),
    "unilogit_exp": (None, [_ARRAY, _ARRAY, c_int64]),
    "unilogit_tanh": (None, [_ARRAY, _ARRAY, _ARRAY, c_int64]),
}


def library_path() -> Path:
    """Where the library is, or would be."""
    override = os.environ.get(LIBRARY_VARIABLE)
    return Path(override) if override else Path(__file__).with_name("_cpu_kernels.so")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The loaded library, with the instruction set that the environment asks for, if it does.

    Raises:
        RuntimeError: The library is missing, cannot be loaded, is not the one of this version, or
            lacks the instruction set.
    """
    path = library_path()
    if not path.is_file():
        raise RuntimeError(
            f"{path} does not exist: the CPU kernels were not built when the package was "
            "installed, which takes a C++17 compiler with OpenMP (such as g++); reinstall with one"
        )
    try:
        # torch is imported, so that the library's OpenMP binds to torch's own thread pool.
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"{path} cannot be loaded: {error}") from error
    found = library.unilogit_interface()
    if found != _INTERFACE:
        raise RuntimeError(
            f"{path} has interface {found} and this version of the package needs {_INTERFACE}: it "
            "was built from other sources; reinstall the package to build it again"
        )
    select_instruction_set(os.environ.get(INSTRUCTION_SET_VARIABLE, ""), library)
    return library


def select_instruction_set(name: str, library: ctypes.CDLL | None = None) -> None:
    """Make the library use one instruction set from now on, for tests.

    Args:
        name: One of `INSTRUCTION_SETS`, or `""` for the best that this machine has.
        library: The library, if it is not the loaded one.

    Raises:
        RuntimeError: This machine does not have the instruction set, or nobody knows it.
    """
    library = load_library() if library is None else library
    if library.unilogit_select_instruction_set(name.encode()) == _UNSUPPORTED:
        raise RuntimeError(
            f"instruction set {name!r} is not one of {', '.join(INSTRUCTION_SETS)}, or this "
            "processor does not have it"
        )


def is_available() -> bool:
    """Whether the library is there and can be loaded."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why the library cannot be used, or None if it can."""
    try:
        load_library()
    except RuntimeError as error:
        return str(error)
    return None


def instruction_set() -> str:
    """The instruction set in use, one of `INSTRUCTION_SETS`."""
    name: bytes = load_library().unilogit_instruction_set()
    return name.decode()


def _matrix(tensor: Tensor, name: str) -> _Matrix:
    type_id = DTYPE_IDS.get(tensor.dtype)
    if type_id is None:
        raise TypeError(
            f"{name} is {tensor.dtype}; the CPU kernels take float32, bfloat16 and float16 "
            "(float64 belongs to the eager backend)"
        )
    rows, columns = tensor.shape
    row_stride, column_stride = tensor.stride()
    return _Matrix(tensor.data_ptr(), rows, columns, row_stride, column_stride, type_id)


def _check(status: int) -> None:
    if status == _OUT_OF_MEMORY:
        raise MemoryError("the CPU kernels could not allocate their scratch memory")


class CpuKernels:
    """`RowKernels`, the sweep that finishes whole rows at once, and `DivergenceKernels`, in C++.

    Attributes:
        name: Name of the backend.
        swept_objectives: Names of the objectives that `log_odds_sweep` takes.
    """

    name = "cpu"
    swept_objectives = frozenset(OBJECTIVE_IDS)

    def log_odds_update(
        self,
        logits: Tensor,
        labels: Tensor,
        first_column: int,
        state: Tensor,
        transform: LogitTransform,
    ) -> None:
        """See `RowKernels.log_odds_update`. Each row of `state` must be contiguous."""
        status = load_library().unilogit_log_odds_update(
            byref(_matrix(logits, "logits")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            row_state.has_runner_up(state),
            byref(_Transform(*transform)),
            torch.get_num_threads(),
        )
        _check(status)

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
        """See `RowKernels.log_odds_gradient`. Rows of `state` and `slope` must be contiguous."""
        status = load_library().unilogit_log_odds_gradient(
            byref(_matrix(logits, "logits")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            slope.data_ptr(),
            slope.stride(0) if row_state.has_runner_up(state) else 0,
            byref(_matrix(out, "out")),
            byref(_Transform(*transform)),
            torch.get_num_threads(),
        )
        _check(status)

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
        """Statistics, objective and gradient of whole rows, each row while it is in the cache.

        Args:
            logits: `[n, V]`, float32, bfloat16 or float16, any strides.
            labels: int64 `[n]`, contiguous. A label outside `[0, V)` gives NaN.
            row_weight: float32 `[n]`, contiguous: factor of each row's gradient. A row of weight
                exactly 0 is not read; it gets loss 0 and a zero gradient.
            objective: One of `swept_objectives`.
            vocab_size: The V of the objective.
            out: Receives `row_weight * f'(d) * dd/dlogits`, `[n, V]`, any strides and float dtype
                of the logits' three, may be `logits`; None for the loss alone.
            transform: Scale and cap of the logits.

        Returns:
            The unweighted losses `f(d)`, float32 `[n]`.
        """
        loss = torch.empty(logits.shape[0], dtype=torch.float32)
        status = load_library().unilogit_log_odds_sweep(
            byref(_matrix(logits, "logits")),
            labels.data_ptr(),
            row_weight.data_ptr(),
            OBJECTIVE_IDS[objective],
            vocab_size,
            None if out is None else byref(_matrix(out, "out")),
            loss.data_ptr(),
            byref(_Transform(*transform)),
            torch.get_num_threads(),
        )
        _check(status)
        return loss

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
        """See `DivergenceKernels.divergence_update`. Rows of `state` must be contiguous."""
        status = load_library().unilogit_divergence_update(
            byref(_matrix(a, "a")),
            byref(_matrix(b, "b")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            byref(_Transform(*a_transform)),
            byref(_Transform(*b_transform)),
            torch.get_num_threads(),
        )
        _check(status)

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
        """See `DivergenceKernels.divergence_gradient`.

        Rows of `state` and `coefficients` must be contiguous.
        """
        status = load_library().unilogit_divergence_gradient(
            byref(_matrix(a, "a")),
            byref(_matrix(b, "b")),
            labels.data_ptr(),
            first_column,
            state.data_ptr(),
            state.stride(0),
            coefficients.data_ptr(),
            coefficients.stride(0),
            _STUDENT_IDS[student],
            byref(_matrix(out, "out")),
            byref(_Transform(*a_transform)),
            byref(_Transform(*b_transform)),
            torch.get_num_threads(),
        )
        _check(status)


def stream_copy(source: Tensor, destination: Tensor) -> None:
    """Copy with one read and one non-temporal write per byte: the floor for times of kernels.

    Args:
        source: Any contiguous CPU tensor.
        destination: A contiguous tensor of as many bytes.
    """
    load_library().unilogit_stream_copy(
        source.data_ptr(), destination.data_ptr(), source.nbytes, torch.get_num_threads()
    )


def populate(address: int, size: int) -> None:
    """Let the system back new memory with pages, on all threads at once, before it is written.

    Threads that meet at the same page wait for each other, and each page costs a fault; this way
    the pages are zeroed side by side. Does nothing without the library, or on another system than
    Linux 5.14 or later.

    Args:
        address: Start of a private mapping, at a multiple of the page size.
        size: Its bytes.
    """
    if is_available():
        load_library().unilogit_populate(address, size, torch.get_num_threads())
