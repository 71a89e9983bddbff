"""CUDA C++ on the CPU: nvcc makes PTX of it, which is executed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from ptxsim.arguments import ArgumentBlock, ReadOnly, merge_overlapping, region_of
from ptxsim.build import cache_directory
from ptxsim.counters import Launch
from ptxsim.errors import PtxError, UnsupportedPtxError
from ptxsim.launch import Dimensions, PtxModule, Region, Schedule
from ptxsim.ptx_types import is_signed, size_of
from ptxsim.syntax import Parameter

_MOST_MESSAGE = 3000


def compile_cuda(source: Path, arch: int = 80, options: Sequence[str] = ()) -> PtxModule:
    """Compile a CUDA source by `nvcc --ptx`.

    Args:
        source: The file.
        arch: Compute capability times ten.
        options: More of nvcc's options, as `-DNAME=1`.

    Raises:
        PtxError: nvcc is missing, or refuses the source.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise PtxError("executing CUDA sources needs nvcc on PATH, and there is none")
    command = [nvcc, "--ptx", "-lineinfo", f"-arch=compute_{arch}", *options, str(source)]
    # Headers are not looked at: what is included may change without notice, so nothing is reused.
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:20]
    folder = cache_directory()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / f"{key}.ptx"
        result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
        if result.returncode:
            raise PtxError(f"nvcc failed on {source.name}:\n{result.stderr[:_MOST_MESSAGE]}")
        return PtxModule(output.read_text())


def launch_cuda(
    module: PtxModule,
    name: str,
    grid: Dimensions,
    block: Dimensions,
    arguments: Sequence[torch.Tensor | float | None],
    *,
    shared_bytes: int = 0,
    schedule: Schedule | None = None,
    read_only: Collection[str | torch.Tensor] = (),
) -> Launch:
    """Launch an `extern "C"` kernel.

    Args:
        module: Where it is.
        name: Of the kernel.
        grid: Blocks along x, y, z.
        block: Threads along x, y, z.
        arguments: Tensors for pointers (None for a null pointer), numbers for numbers.
        shared_bytes: Dynamic shared memory.
        schedule: Order of execution; sequential by default.
        read_only: Tensors that must not be written to, or names as in the PTX (`name_param_0`).

    Raises:
        UnsupportedPtxError: The arguments do not fit the kernel's parameters.
    """
    parameters = list(module.kernels[name].kernel.parameters.values())
    if len(parameters) != len(arguments):
        raise UnsupportedPtxError(f"{name} takes {len(parameters)} arguments, got {len(arguments)}")
    protected = ReadOnly(read_only)
    packed = ArgumentBlock()
    regions: list[Region] = []
    for parameter, argument in zip(parameters, arguments, strict=True):
        if isinstance(argument, torch.Tensor):
            writable = not protected.covers(parameter.name, argument)
            words = module.uses_compare_and_swap
            regions.append(
                region_of(argument, parameter.name, writable=writable, whole_words=words)
            )
            packed.append_pointer(argument.data_ptr())
        else:
            _append_number(packed, parameter, argument)
    protected.check_all_seen()
    return module.launch(
        name,
        grid,
        block,
        bytes(packed),
        merge_overlapping(regions),
        shared_bytes=shared_bytes,
        schedule=schedule,
    )


def _append_number(packed: ArgumentBlock, parameter: Parameter, value: float | None) -> None:
    if parameter.type in ("f32", "f64"):
        packed.append("f" if parameter.type == "f32" else "d", value or 0.0)
        return
    if parameter.size != size_of(parameter.type) or parameter.type.startswith(("f", "b8")):
        raise UnsupportedPtxError(f"parameter {parameter.name} is no number that can be packed")
    # PTX declares signed C++ integers unsigned: a negative number is its bit pattern.
    bits = int(value or 0)
    signed = bits < 0 or is_signed(parameter.type)
    packed.append_bytes(bits.to_bytes(parameter.size, "little", signed=signed))
