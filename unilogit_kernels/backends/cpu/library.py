"""Row kernels for CPUs in C++ (`csrc/cpu`): a shared library, called through ctypes.

The library is loaded at the first call. It is built when the package is installed, where a C++
compiler is there; where not, `unavailable_reason` says so and the eager backend takes its place.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

LIBRARY_VARIABLE = "UNILOGIT_KERNELS_CPU_LIBRARY"
"""Environment variable that names another build of the library, for tests only."""

INSTRUCTION_SET_VARIABLE = "UNILOGIT_KERNELS_CPU_ISA"
"""Environment variable that forces one of `INSTRUCTION_SETS`, for tests only."""

INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "baseline")
"""What the library is compiled for, best first."""

OUT_OF_MEMORY, _UNSUPPORTED = 1, 2
"""Of `UnilogitStatus` of `csrc/cpu/api.h`."""


class Matrix(ctypes.Structure):
    """`UnilogitMatrix` of `csrc/cpu/api.h`."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
        ("type", c_int32),
    )


class Transform(ctypes.Structure):
    """`UnilogitTransform` of `csrc/cpu/api.h`."""

    _fields_ = (("scale", c_float), ("softcap", c_float))


_INTERFACE = 2
"""`UNILOGIT_INTERFACE` of `csrc/cpu/api.h`: the signatures below are those of this number."""

_MATRIX, _TRANSFORM = POINTER(Matrix), POINTER(Transform)
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
            *(_MATRIX, _ARRAY, c_int64, _ARRAY, c_int64, _ARRAY, c_int64, c_int32),
            *(_MATRIX, _TRANSFORM, c_int32),
        ],
    ),
    "unilogit_log_odds_sweep": (
        c_int32,
        [
            *(_MATRIX, _ARRAY, _ARRAY, c_int32, _ARRAY, c_int64),
            *(_MATRIX, _ARRAY, _TRANSFORM, c_int32),
        ],
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
