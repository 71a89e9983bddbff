"""Compiles C++ for the host into a cache outside of the source tree."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

from ptxsim.errors import PtxError

Effort = Literal["quick", "fast"]

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
# Generated code: most of it runs for less time than it takes to compile.
_KERNEL_FLAGS: dict[Effort, tuple[str, ...]] = {
    "quick": (*_COMMON_FLAGS, "-O0", "-w"),
    "fast": (*_COMMON_FLAGS, "-O1", "-w"),
}
_KERNEL_HEADER = _RUNTIME / "kernel.h"
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


def load_kernels(source: str, effort: Effort = "quick") -> ctypes.CDLL:
    """Compile a translated module and load it.

    Args:
        source: C++ that begins with the inclusion of `kernel.h`.
        effort: Whether to be `quick`, or to spend twice as long on code that is five times as
            `fast`.
    """
    runtime()
    folder = cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    flags = _KERNEL_FLAGS[effort]
    with tempfile.NamedTemporaryFile("w", suffix=".cpp", dir=folder) as text:
        text.write(source)
        text.flush()
        arguments = [*flags, f"-I{_precompiled_header(flags).parent}", f"-I{_RUNTIME}"]
        library = compile_cached("kernels", arguments, _headers(), source=Path(text.name))
    return ctypes.CDLL(str(library))


@cache
def _precompiled_header(flags: tuple[str, ...]) -> Path:
    """`kernel.h.gch` in a folder of its own, which g++ finds in the place of `kernel.h`."""
    arguments = [*flags, f"-I{_RUNTIME}", "-x", "c++-header", str(_KERNEL_HEADER)]
    compiled = compile_cached("header", arguments, _headers(), suffix=".gch")
    found = compiled.with_suffix("") / f"{_KERNEL_HEADER.name}.gch"
    found.parent.mkdir(exist_ok=True)
    if not found.exists():
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(compiled, found)
    return found


@cache
def _headers() -> tuple[Path, ...]:
    return tuple(sorted(_RUNTIME.glob("*.h")))


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
