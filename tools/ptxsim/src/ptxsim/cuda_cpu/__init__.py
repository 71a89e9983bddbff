"""CUDA C++ as C++ for the CPU, plain or under a sanitizer: see `cuda_cpu.h`.

This checks the source, thread by thread, where `ptxsim.cuda_source` checks what nvcc makes of it.
Sources must not include headers of CUDA; nvcc is not needed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ptxsim.build import compile_cached
from ptxsim.errors import PtxError

Sanitizer = Literal["none", "address", "thread"]

_HERE = Path(__file__).parent
_RUNTIME = _HERE.parent / "runtime"
_RUNTIME_SOURCES = (_HERE / "cuda_cpu.cpp", _RUNTIME / "block.cpp", _RUNTIME / "fiber.cpp")
_COMMON = ("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-fPIC", "-pthread")
_INCLUDES = (f"-I{_HERE}", f"-I{_RUNTIME}")
_RUNTIME_DEFINES: dict[Sanitizer, tuple[str, ...]] = {
    "none": (),
    "address": ("-DPTX_ASAN",),
    # Loops must not become calls of memset or memcpy, which ThreadSanitizer watches.
    "thread": ("-DPTX_TSAN", "-fno-tree-loop-distribute-patterns"),
}
_KERNEL_FLAGS: dict[Sanitizer, tuple[str, ...]] = {
    "none": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "thread": ("-fsanitize=thread",),
}
# The stacks of fibers are not searched for pointers, so everything there would look leaked.
_ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}


def build(
    source: Path,
    output: Path,
    *,
    sanitizer: Sanitizer = "none",
    options: Sequence[str] = (),
) -> None:
    """Compile a C++ file that includes kernels and launches them by `cuda_cpu::launch`.

    Args:
        source: The file; with a `main`, unless `options` has `-shared`.
        output: The program or library to write.
        sanitizer: `address` (with undefined behaviour), `thread`, or `none`.
        options: More of g++'s options, as `-Icsrc/cuda` or `-shared`.

    Raises:
        PtxError: g++ is missing or refuses the source.
    """
    inputs = [*_RUNTIME_SOURCES, *_RUNTIME.glob("*.h"), *_HERE.glob("*.h")]
    objects = [
        compile_cached(
            f"cuda-cpu-{path.stem}",
            ["-x", "c++", "-c", *_COMMON, *_RUNTIME_DEFINES[sanitizer], *_INCLUDES, str(path)],
            inputs,
            suffix=".o",
        )
        for path in _RUNTIME_SOURCES
    ]
    command = ["g++", *_COMMON, *_KERNEL_FLAGS[sanitizer], *_INCLUDES, *options]
    command += ["-include", "cuda_cpu.h", "-x", "c++", str(source)]
    command += ["-x", "none", *map(str, objects)]
    result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if result.returncode:
        raise PtxError(f"g++ failed on {source.name}:\n{result.stderr[:3000]}")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run what `build` made; its output, with what a sanitizer found, is captured as text."""
    environment = {**os.environ, **_ENVIRONMENT}
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, env=environment, check=False
    )
