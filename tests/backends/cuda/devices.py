"""What runs the CUDA kernels where there is no GPU: two implementations of `Launcher`."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ptxsim import PtxModule, Schedule
from ptxsim.build import cache_directory
from ptxsim.cuda_source import launch_cuda
from tests.support.caches import forget_layouts
from unilogit_kernels.backends import gpu, registry
from unilogit_kernels.backends.cuda import geometry, sources
from unilogit_kernels.backends.cuda.driver import launching_through
from unilogit_kernels.backends.cuda.launcher import Argument
from unilogit_kernels.backends.cuda.sources import Kernel

NVCC = shutil.which("nvcc")
WITHOUT_NVCC = "needs nvcc on PATH to compile the CUDA kernels, and there is none"

READ_ONLY = {
    "LOG_ODDS_UPDATE": (0, 1, 2),
    "MERGE_PARTS": (0, 1, 2),
    "LOG_ODDS_GRADIENT": (1, 2, 3),
    "LOG_ODDS_SWEEP": (1, 2),
    "RUNNER_UP_UPDATE": (0, 1),
    "RUNNER_UP_MERGE": (0,),
    "RUNNER_UP_GRADIENT": (1, 2, 3),
    "GENERAL_UPDATE": (0, 1),
    "GENERAL_MERGE": (0,),
    "GENERAL_GRADIENT": (1, 2, 3),
    "SCALE": (1,),
    "DIVERGENCE_UPDATE": (0, 1, 2),
    "MERGE_PAIRS": (0,),
    "DIVERGENCE_GRADIENT": (2, 3, 4),
}
"""Arguments of each kernel that it must never write to, whatever else may share their memory."""


def compile_ptx(
    source: str, arch: int, headers: Path | None = None, defines: Sequence[str] = ()
) -> str:
    """PTX by nvcc of a source that includes the package's headers; kept in the executor's cache."""
    assert NVCC is not None, WITHOUT_NVCC
    headers = headers or sources.directory()
    text = b"".join(path.read_bytes() for path in sorted(headers.iterdir()))
    flags = [f"-std={sources.STANDARD}", "--ptx", f"-arch=compute_{arch}", "-lineinfo", *defines]
    parts = (text, source.encode(), str((NVCC, *flags)).encode())
    path = cache_directory() / f"ptx-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.ptx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unit, output = Path(folder) / "unit.cu", Path(folder) / "unit.ptx"
            unit.write_text(source)
            command = [NVCC, *flags, f"-I{headers}", str(unit), "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            output.replace(path)
    return path.read_text()


@functools.cache
def _module(kernel: Kernel, arch: int, headers: Path | None, defines: tuple[str, ...]) -> PtxModule:
    return PtxModule(compile_ptx(kernel.source, arch, headers, defines))


@dataclass
class PtxLauncher:
    """Executes what nvcc compiles, instruction by instruction, with every check.

    Attributes:
        arch: Compute capability times ten.
        schedule: Order of blocks and threads.
        sms: Multiprocessors that the launch functions are told of.
        l2_bytes: Cache that they are told of.
        headers: Other sources than the package's.
        defines: Options for nvcc.
        launched: What was launched.
    """

    arch: int = 80
    schedule: Schedule = field(default_factory=Schedule)
    sms: int = 1
    l2_bytes: int = 40 << 20
    headers: Path | None = None
    defines: tuple[str, ...] = ()
    launched: list[Kernel] = field(default_factory=list)

    def multiprocessors(self, tensor: Tensor) -> int:
        return self.sms

    def cache_bytes(self, tensor: Tensor) -> int:
        return self.l2_bytes

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        device_of: Tensor,
    ) -> None:
        read_only = [f"{kernel.name}_param_{i}" for i in READ_ONLY[kernel.macro]]
        present = [
            name
            for name, i in zip(read_only, READ_ONLY[kernel.macro], strict=True)
            if arguments[i] is not None
        ]
        with _disable_current_modes():  # the executor's own memory is none of a test's business
            launch_cuda(
                _module(kernel, self.arch, self.headers, self.defines),
                kernel.name,
                (*grid, 1),
                (threads, 1, 1),
                [_plain(argument) for argument in arguments],
                schedule=self.schedule,
                read_only=present,
            )
        self.launched.append(kernel)


def _plain(argument: Argument) -> Tensor | float | None:
    return argument if argument is None or isinstance(argument, Tensor) else argument.value


SHARES = {"whole rows": 1, "split rows": 64}
"""Multiprocessors of the imagined device that make its launches share rows so."""

_SMALL_THREADS = 32
_SMALL_RESIDENCE = 64


@contextmanager
def block_sizes(row: int, split: int, resident: int) -> Iterator[None]:
    """Launch blocks of other sizes; the innermost of such contexts counts.

    Args:
        row: Threads of a block that owns a whole row.
        split: Threads of a block that owns a part of one.
        resident: Threads that live on a multiprocessor.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "ROW_THREADS", row)
        patch.setattr(geometry, "SPLIT_THREADS", split)
        patch.setattr(geometry, "RESIDENT_THREADS", resident)
        forget_layouts()
        yield
    forget_layouts()


@contextmanager
def small_problems(share: str) -> Iterator[PtxLauncher]:
    """Let small problems on CPU tensors take every path of the kernels, under `backend="cuda"`.

    Blocks are made small, so that short rows have tiles and single vectors and ends.
    """
    device = PtxLauncher(sms=SHARES[share])
    with (
        pytest.MonkeyPatch.context() as patch,
        launching_through(device),
        block_sizes(_SMALL_THREADS, _SMALL_THREADS, _SMALL_RESIDENCE),
    ):
        if share == "whole rows":
            patch.setattr(gpu, "WAVES", 1)
            forget_layouts()
        patch.setitem(registry._DEVICES, "cuda", "cpu")
        patch.setattr(registry, "unavailable_reason", lambda name: None)
        yield device
