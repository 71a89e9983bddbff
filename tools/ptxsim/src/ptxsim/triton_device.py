"""A Triton device on the CPU: `kernel[grid](cpu_tensors)` compiles to PTX, which is executed.

Triton's own launch path is used up to the driver, so signatures, specialisations, launch options
and limits are the real ones, and kernels need no change. Assembling to a binary is left out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

try:
    import triton
except ImportError as error:
    raise ImportError(
        "executing Triton kernels needs triton 3.6 to 3.9: pip install triton"
    ) from error
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from ptxsim.arguments import ArgumentBlock, ReadOnly, merge_overlapping, region_of
from ptxsim.counters import Launch, collect
from ptxsim.errors import UnsupportedPtxError
from ptxsim.launch import MOST_THREADS, PtxModule, Region, Schedule

_SCALAR_FORMATS = {
    "i1": "b",
    "u1": "B",
    "i8": "b",
    "u8": "B",
    "i16": "h",
    "u16": "H",
    "i32": "i",
    "u32": "I",
    "i64": "q",
    "u64": "Q",
    "fp16": "e",
    "fp32": "f",
    "f32": "f",
    "fp64": "d",
}
_SCRATCH_POINTERS = 2  # Triton appends one for scratch memory and one for profiling: both unused
_WARP = 32
_SHARED_LIMITS = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 120: 101376}
_LARGEST_SHARED = 232448  # sm_90, 100 and 103
_FIRST_DEVICE = 1000
"""Triton caches compiled kernels by device number; ours are those of no GPU."""


class _Settings:
    """What the launches of the innermost `triton_device` block are to obey."""

    def __init__(self, schedule: Schedule, read_only: ReadOnly) -> None:
        self.schedule = schedule
        self.read_only = read_only


_settings: list[_Settings] = []


class _Launcher:
    """What Triton calls in place of the function that enqueues a kernel on a stream."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._signature: dict[str, Any] = dict(source.signature)
        self._metadata = metadata

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        module: PtxModule,
        packed_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        settings = _settings[-1]
        block = ArgumentBlock()
        regions: list[Region] = []
        values = zip(self._signature.items(), arguments, strict=True)
        for (name, kind), argument in values:
            for path, leaf_kind, leaf in _leaves(name, kind, argument):
                if not leaf_kind.startswith("*"):
                    _append_scalar(block, path, leaf_kind, leaf)
                    continue
                if isinstance(leaf, torch.Tensor):
                    writable = not settings.read_only.covers(path, leaf)
                    words = module.uses_compare_and_swap
                    regions.append(region_of(leaf, path, writable=writable, whole_words=words))
                block.append_pointer(_address(leaf))
        for _ in range(_SCRATCH_POINTERS):
            block.append_pointer(0)
        module.launch(
            self._metadata.name,
            (grid_x, grid_y, grid_z),
            (self._metadata.num_warps * _WARP, 1, 1),
            bytes(block),
            merge_overlapping(regions),
            shared_bytes=self._metadata.shared,
            schedule=settings.schedule,
        )


def _leaves(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """The arguments that PTX sees: tuples are flattened, constants are gone."""
    if isinstance(kind, tuple):
        for i, (part_kind, part) in enumerate(zip(kind, value, strict=True)):
            yield from _leaves(f"{name}[{i}]", part_kind, part)
    elif kind != "constexpr":
        yield name, kind, value


def _append_scalar(block: ArgumentBlock, name: str, kind: str, value: Any) -> None:
    if kind == "bf16":
        block.append_bytes(struct.pack("<f", value)[2:])
    elif kind in _SCALAR_FORMATS:
        block.append(_SCALAR_FORMATS[kind], value)
    else:
        raise UnsupportedPtxError(f"argument '{name}' of type {kind} is not supported")


def _address(value: Any) -> int:
    if value is None:
        return 0
    return int(value.data_ptr() if hasattr(value, "data_ptr") else value)


class _Utilities:
    """Stands in for the C extension through which Triton loads binaries."""

    def __init__(self, arch: int) -> None:
        self._shared_limit = _SHARED_LIMITS.get(arch, _LARGEST_SHARED)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._shared_limit,
            "max_num_regs": 65536,
            "multiprocessor_count": 108,
            "warpSize": _WARP,
            "sm_clock_rate": 0,
            "mem_clock_rate": 0,
            "mem_bus_width": 0,
        }

    def load_binary(
        self, name: str, ptx: str | bytes, shared: int, device: int
    ) -> tuple[PtxModule, PtxModule, int, int, int]:
        """Module, function, registers, spills, most threads."""
        module = PtxModule(ptx.decode() if isinstance(ptx, bytes) else ptx)
        return module, module, 0, 0, MOST_THREADS

    def unload_module(self, module: PtxModule) -> None:
        """Nothing to give back."""


class _Driver(DriverBase):  # type: ignore[misc]  # triton has no types
    """What Triton asks about the machine."""

    def __init__(self, arch: int) -> None:
        self._arch = arch
        self.utils = _Utilities(arch)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, _WARP)

    def get_current_device(self) -> int:
        return _FIRST_DEVICE + self._arch

    def set_current_device(self, device: int) -> None:
        """There is one."""

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self._arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def benchmark(call: Callable[[], Any], *, quantiles: Any = None, **_: Any) -> list[float]:
            call()
            return [1.0] * len(quantiles or [0])  # all choices are alike: autotuning takes any

        return benchmark

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        return torch.empty(1)

    def clear_cache(self, cache: Any) -> None:
        """There is none."""


def _ptx_backend() -> Any:
    """Triton's NVIDIA backend, one stage shorter: the PTX is the binary."""
    nvidia = backends["nvidia"]

    class PtxBackend(nvidia.compiler):  # type: ignore[misc, name-defined]
        def __init__(self, target: GPUTarget) -> None:
            super().__init__(target)
            self.binary_ext = "ptx"

        def add_stages(self, stages: dict[str, Any], options: Any, *rest: Any) -> None:
            super().add_stages(stages, options, *rest)
            stages.pop("cubin", None)

        def hash(self) -> str:
            # Triton's cache on disk must not hand such a result to a real GPU, nor the reverse.
            return f"{super().hash()}-ptxsim"

    return type(nvidia)(compiler=PtxBackend, driver=nvidia.driver)


@contextmanager
def triton_device(
    arch: int = 80,
    *,
    schedule: Schedule | None = None,
    read_only: Collection[str | torch.Tensor] = (),
) -> Iterator[list[Launch]]:
    """Execute every Triton launch inside the block on CPU tensors.

    Args:
        arch: Compute capability times ten: 80 for sm_80.
        schedule: Order of execution; sequential by default.
        read_only: Arguments that no kernel may write to, by name or as tensors.

    Yields:
        The launches made so far.

    Raises:
        ValueError: On leaving: a name in `read_only` was no kernel's argument.
        RuntimeError: Triton's interpreter is on, so that nothing would be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    protected = ReadOnly(read_only)
    _settings.append(_Settings(schedule or Schedule(), protected))
    active, nvidia = triton.runtime.driver._active, backends["nvidia"]
    backends["nvidia"] = _ptx_backend()
    triton.runtime.driver.set_active(_Driver(arch))
    try:
        with collect() as launches:
            yield launches
    finally:
        triton.runtime.driver._active = active
        backends["nvidia"] = nvidia
        _settings.pop()
    protected.check_all_seen()
