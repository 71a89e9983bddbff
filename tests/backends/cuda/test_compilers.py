"""nvcc and NVRTC make the kernels for every architecture, within a budget that they report.

Every kernel for sm_90, and of each macro a part for each other architecture, in which every kernel
is once: the sources ask at most whether there is sm_80, and the registers that one type takes are
those of its relatives but for a few.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.backends.cuda import devices
from unilogit_kernels.backends.cuda import driver, sources
from unilogit_kernels.backends.cuda.geometry import RESIDENT_THREADS, TYPES
from unilogit_kernels.backends.cuda.loader import Target
from unilogit_kernels.backends.cuda.sources import Kernel

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
WHOLE = 90
PARTS = tuple(arch for arch in ARCHITECTURES if arch != WHOLE)

MOST_REGISTERS = 65_536 // RESIDENT_THREADS
"""So that as many threads live on a multiprocessor as the launches count on."""

MOST_SHARED_BYTES = 1024
"""Of a block. A part of each warp and a gradient row; far from limiting anything."""


def every_kernel() -> Iterator[Kernel]:
    """What the launch functions may ask for."""
    names = TYPES.values()
    for macro in (
        "MERGE_PARTS",
        "RUNNER_UP_MERGE",
        "GENERAL_MERGE",
        "DIVERGENCE_UPDATE",
        "MERGE_PAIRS",
        "DIVERGENCE_GRADIENT",
    ):
        yield Kernel(macro)
    for name in names:
        yield Kernel("SCALE", (name,))
    for name, cap in itertools.product(names, ("plain", "capped")):
        for macro in ("LOG_ODDS_UPDATE", "RUNNER_UP_UPDATE", "GENERAL_UPDATE"):
            yield Kernel(macro, (name, cap))
    for arguments in itertools.product(names, names, ("plain", "capped")):
        for macro in (
            "LOG_ODDS_GRADIENT",
            "RUNNER_UP_GRADIENT",
            "GENERAL_GRADIENT",
            "LOG_ODDS_SWEEP",
        ):
            yield Kernel(macro, arguments)


def kernels_for(arch: int) -> list[Kernel]:
    """What is compiled for an architecture here."""
    if arch == WHOLE:
        return list(every_kernel())
    by_macro: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in every_kernel():
        by_macro[kernel.macro].append(kernel)
    found: list[Kernel] = []
    for shift, kernels in enumerate(by_macro.values()):
        first = (PARTS.index(arch) + shift) % len(PARTS)
        found += kernels if len(kernels) == 1 else kernels[first :: len(PARTS)]
    return found


def write_source(arch: int, folder: Path) -> Path:
    """The source of these kernels: the one that fatbins are built from, where it is all of them."""
    if arch == WHOLE:
        return sources.directory() / "kernels.cu"
    text = dict.fromkeys(
        line for kernel in kernels_for(arch) for line in kernel.source.splitlines()
    )
    path = folder / f"sm_{arch}.cu"
    path.write_text("\n".join([*text, ""]))
    return path


class Usage(NamedTuple):
    """What ptxas says of a kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def parse_usage(log: str) -> dict[str, Usage]:
    """By kernel, from the output of `ptxas -v`."""
    found: dict[str, Usage] = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        assert spills, part
        assert registers, part
        shared = re.search(r"(\d+) bytes smem", part)
        found[part.split("'")[0]] = Usage(
            int(registers[1]), int(spills[1]) + int(spills[2]), int(shared[1]) if shared else 0
        )
    return found


def assert_within_budget(found: dict[str, Usage], arch: int) -> None:
    assert found.keys() == {kernel.name for kernel in kernels_for(arch)}
    for name, usage in found.items():
        assert usage.spilled_bytes == 0, name
        assert usage.registers <= MOST_REGISTERS, name
        assert usage.shared_bytes <= MOST_SHARED_BYTES, name


def nvcc_log(arch: int, output: Path) -> str:
    assert devices.NVCC is not None
    command = [
        devices.NVCC,
        "--cubin",
        f"-std={sources.STANDARD}",
        f"-arch=sm_{arch}",
        "-Xptxas=-v",
        f"-I{sources.directory()}",
    ]
    command += [str(write_source(arch, output)), "-o", str(output / f"sm_{arch}.cubin")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
    return result.stderr


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC)
def test_nvcc(tmp_path: Path) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = pool.map(lambda arch: nvcc_log(arch, tmp_path), ARCHITECTURES)
        for log, arch in zip(logs, ARCHITECTURES, strict=True):
            assert_within_budget(parse_usage(log), arch)


NVRTC_CODE = """
import io, sys
from pathlib import Path
from cuda.core import Program, ProgramOptions
source, folder, arch, standard = sys.argv[1:]
options = ProgramOptions(std=standard, arch=arch, include_path=[folder], ptxas_options="-v")
log = io.StringIO()
Program(Path(source).read_text(), "c++", options).compile("cubin", logs=log)
print(log.getvalue())
"""

WITHOUT_NVRTC = driver.missing_bindings() or driver.missing_compiler()
NVRTC_ARCHITECTURES = ARCHITECTURES if devices.NVCC is None else (75, 80)
"""nvcc shows what fits each architecture. That NVRTC takes the source, whose branches ask at most
whether there is sm_80, and makes code as small of it, two of them show."""


def nvrtc_log(arch: int, output: Path) -> str:
    source = write_source(arch, output)
    arguments = [str(source), str(sources.directory()), f"sm_{arch}", sources.STANDARD]
    command = [sys.executable, "-c", NVRTC_CODE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.prove
@pytest.mark.timeout(600)
@pytest.mark.skipif(WITHOUT_NVRTC is not None, reason=str(WITHOUT_NVRTC))
def test_nvrtc(tmp_path: Path) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = pool.map(lambda arch: nvrtc_log(arch, tmp_path), NVRTC_ARCHITECTURES)
        for log, arch in zip(logs, NVRTC_ARCHITECTURES, strict=True):
            assert_within_budget(parse_usage(log), arch)


def test_the_parts_are_the_whole() -> None:
    kernels = [kernel for arch in PARTS for kernel in kernels_for(arch)]
    assert set(kernels) == set(every_kernel()) == set(kernels_for(WHOLE))
    macros = {kernel.macro for kernel in every_kernel()} - {"SCALE"}
    assert all(macros <= {kernel.macro for kernel in kernels_for(arch)} for arch in PARTS)


@pytest.mark.skipif(WITHOUT_NVRTC is not None, reason=str(WITHOUT_NVRTC))
def test_a_single_kernel_as_the_loader_compiles_it() -> None:
    kernel, cuda = Kernel("MERGE_PARTS"), driver.CudaDriver()
    assert set(ARCHITECTURES) <= set(cuda.compiler_architectures())
    cubin = cuda.compile(kernel.source, sources.directory(), Target("cubin", "sm_90"))
    assert cubin.startswith(b"\x7fELF")
    assert b"merge_parts" in cubin
