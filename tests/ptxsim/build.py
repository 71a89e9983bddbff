"""Compiles C++ for the host into a cache outside of the source tree."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
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
    arguments = [*_RUNTIME_FLAGS, *map(str, sources)]
    library = compile_cached("runtime", arguments, sorted(_RUNTIME.iterdir()))
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def load_kernels(source: str) -> ctypes.CDLL:
    """Compile a translated module and load it."""
    runtime()
    folder = cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".cpp", dir=folder) as text:
        text.write(source)
        text.flush()
        arguments = [*_KERNEL_FLAGS, f"-I{_RUNTIME}"]
        inputs = sorted(_RUNTIME.glob("*.h"))
        library = compile_cached("kernels", arguments, inputs, source=Path(text.name))
    return ctypes.CDLL(str(library))


def compile_cached(
    name: str,
    arguments: Sequence[str],
    inputs: Sequence[Path],
    *,
    source: Path | None = None,
    suffix: str = ".so",
) -> Path:
    """Run g++, unless the same was compiled before.

    Args:
        name: First part of the name of the result.
        arguments: Of g++, without the output.
        inputs: Files that the result depends on, beside `source`.
        source: A file to compile whose name does not matter.
        suffix: Last part of the name of the result.

    Returns:
        The result.

    Raises:
        PtxError: g++ is missing or fails.
    """
    files = [*inputs, *([source] if source else [])]
    texts = (*arguments, *(path.read_text() for path in files), _compiler_version())
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]
    result = cache_directory() / f"{name}-{digest}{suffix}"
    if result.exists():
        return result
    result.parent.mkdir(parents=True, exist_ok=True)
    # Others may be compiling the same: what is there under its own name is complete.
    with tempfile.TemporaryDirectory(dir=result.parent) as folder:
        output = Path(folder) / result.name
        command = [_compiler(), *arguments, *([str(source)] if source else []), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise PtxError(f"g++ failed on {name}:\n{done.stderr[:_MOST_MESSAGE]}")
        output.replace(result)
    return result


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
