"""The real launcher: NVRTC and the driver through `cuda.core`, on torch's stream and device."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unilogit_kernels.backends.cuda.launcher import Argument, Launcher
from unilogit_kernels.backends.cuda.loader import Loader, Target
from unilogit_kernels.backends.cuda.sources import STANDARD, Kernel

_INSTALL = (
    "install them with pip install 'unilogit-kernels[cuda]', and cuda-bindings of the CUDA version "
    f"that torch is built for ({torch.version.cuda})"
)


def missing_bindings() -> str | None:
    """Why the driver cannot be called from Python, or None if it can."""
    try:
        import cuda.bindings
        import cuda.core  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"cuda-core or cuda-bindings cannot be imported ({error}); {_INSTALL}"
    return None


def missing_compiler() -> str | None:
    """Why NVRTC cannot be called, or None if it can."""
    try:
        CudaDriver().compiler_version()
    except RuntimeError as error:
        return str(error)
    return None


class CudaDriver:
    """`loader.Driver` by `cuda.core`. Compiling needs no GPU; loading does."""

    @functools.cache  # noqa: B019  (the one instance lives as long as the process)
    def compiler_version(self) -> str:
        """See `loader.Driver`."""
        try:
            from cuda.bindings import nvrtc

            status, major, minor = nvrtc.nvrtcVersion()
        except Exception as error:  # a missing library shows in a different way on every platform
            raise RuntimeError(
                "the CUDA kernels were not compiled when the package was built, and NVRTC, which "
                f"would do it now, cannot be loaded ({error}); {_INSTALL}"
            ) from error
        if int(status):
            raise RuntimeError(f"NVRTC does not tell its version: {status}")
        return f"{major}.{minor}"

    def compiler_architectures(self) -> Sequence[int]:
        """See `loader.Driver`."""
        self.compiler_version()
        from cuda.bindings import nvrtc

        error, architectures = nvrtc.nvrtcGetSupportedArchs()
        if int(error):
            raise RuntimeError(f"NVRTC does not tell what it compiles for: {error}")
        return sorted(architectures)

    def compile(self, source: str, headers: Path, target: Target) -> bytes:
        """See `loader.Driver`."""
        from cuda.core import Program, ProgramOptions

        options = ProgramOptions(
            std=STANDARD, arch=target.architecture, include_path=[str(headers)]
        )
        return bytes(Program(source, "c++", options).compile(target.kind).code)

    def load(self, binary: bytes, kind: str, name: str) -> Any:
        """See `loader.Driver`."""
        from cuda.core import ObjectCode

        try:
            return getattr(ObjectCode, f"from_{kind}")(binary).get_kernel(name)
        except Exception as error:  # cuda.core's errors have no common class of their own
            raise RuntimeError(f"{name} cannot be loaded: {error}") from error


class DriverLauncher:
    """`Launcher` on NVIDIA GPUs.

    Args:
        loader: Where kernels come from.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    @staticmethod
    @functools.cache
    def shared() -> DriverLauncher:
        """The one of this process."""
        return DriverLauncher(Loader(CudaDriver()))

    def multiprocessors(self, tensor: Tensor) -> int:
        """See `Launcher`."""
        return int(_properties(tensor.device).multi_processor_count)

    def cache_bytes(self, tensor: Tensor) -> int:
        """See `Launcher`."""
        return int(_properties(tensor.device).L2_cache_size)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        device_of: Tensor,
    ) -> None:
        """See `Launcher`."""
        device = device_of.device
        function = self._loader.function(kernel, _capability(device))
        values = [_value(argument) for argument in arguments]
        enqueue, config = _launch_function(), _config(grid, threads)
        if device.index == torch.cuda.current_device():
            enqueue(torch.cuda.current_stream(device), config, function, *values)
            return
        with torch.cuda.device(device):
            enqueue(torch.cuda.current_stream(device), config, function, *values)


@functools.cache
def _launch_function() -> Any:
    from cuda.core import launch

    return launch


@functools.lru_cache(1024)
def _config(grid: tuple[int, int], threads: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=threads)


_replaced: list[Launcher] = []


def current() -> Launcher:
    """What kernels are launched through now: the driver, unless a test says otherwise."""
    if _replaced:
        return _replaced[-1]
    return DriverLauncher.shared()


@contextmanager
def launching_through(launcher: Launcher) -> Iterator[None]:
    """Send every launch inside the block through another launcher, for tests."""
    _replaced.append(launcher)
    try:
        yield
    finally:
        _replaced.pop()


def _value(argument: Argument) -> Any:
    """An argument as `cuda.core` takes it: a Python integer is a pointer."""
    if argument is None:
        return 0
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


@functools.cache
def _capability(device: torch.device) -> int:
    properties = _properties(device)
    return int(10 * properties.major + properties.minor)
