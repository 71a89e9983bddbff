"""Compiles C++ for the host into a cache outside of the source tree."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ptxsim.errors import PtxError

CACHE_VARIABLE = "PTXSIM_CACHE"
"""Environment variable that names another folder for what is compiled."""

_RUNTIME = Path(__file__).parent / "runtime"
_COMMON_FLAGS = (
    "-std=c++17",
    "-march=x86-64-v3",  # fma and float16 conversions in hardware, on every machine of a cluster
    "-ffp-contract=off",  # PTX says what is fused
    "-fno-strict-aliasing",
    "-fPIC",
    "-shared",
)
_RUNTIME_FLAGS = (*_COMMON_FLAGS, "-O2", "-Wall", "-Wextra", "-Werror")
_KERNEL_FLAGS = (*_COMMON_FLAGS, "-O1", "-w")  # generated code: seconds of compiling count
_MOST_MESSAGE = 3000


def cache_directory() -> Path:
    """Where compiled code is kept: `$PTXSIM_CACHE`, or the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "unilogit-ptxsim"


@cache
def runtime() -> ctypes.CDLL:
    """The runtime library, loaded so that kernels find its symbols."""
    sources = sorted(_RUNTIME.glob("*.cpp"))
    key = _digest(*(path.read_text() for path in sorted(_RUNTIME.iterdir())), *_RUNTIME_FLAGS)
    library = cache_directory() / f"runtime-{key}.so"
    _compile(library, [*_RUNTIME_FLAGS, *map(str, sources)])
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def load_kernels(source: str) -> ctypes.CDLL:
    """Compile a translated module and load it."""
    runtime()
    headers = (path.read_text() for path in sorted(_RUNTIME.glob("*.h")))
    library = cache_directory() / f"kernels-{_digest(source, *headers, *_KERNEL_FLAGS)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        text = library.with_suffix(".cpp")
        text.write_text(source)
        _compile(library, [*_KERNEL_FLAGS, f"-I{_RUNTIME}", str(text)])
    return ctypes.CDLL(str(library))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join((*texts, _compiler_version())).encode()).hexdigest()[:20]


@cache
def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise PtxError("the PTX executor needs g++ 12 or newer on PATH, and there is none")
    return compiler


@cache
def _compiler_version() -> str:
    result = subprocess.run([_compiler(), "-dumpfullversion"], capture_output=True, text=True)
    return result.stdout.strip()


def _compile(library: Path, arguments: list[str]) -> None:
    """Compile unless the library is there. Others may be doing the same at the same time."""
    if library.exists():
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        output = Path(folder) / "library.so"
        command = [_compiler(), *arguments, "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise PtxError(f"g++ failed on {library.stem}:\n{result.stderr[:_MOST_MESSAGE]}")
        output.replace(library)
