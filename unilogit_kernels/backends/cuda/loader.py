"""From a kernel's description to something that can be launched."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from unilogit_kernels.backends.cuda import cache, sources
from unilogit_kernels.backends.cuda.sources import Kernel

_KEY_CHARACTERS = 24


class Target(NamedTuple):
    """What a kernel is compiled to.

    Attributes:
        kind: `cubin`, or `ptx` which the driver compiles further.
        architecture: As `sm_90`, or `compute_90` for PTX.
    """

    kind: str
    architecture: str


class Driver(Protocol):
    """What the loader needs of CUDA, all of it; `driver.CudaDriver` is the real one."""

    def compiler_version(self) -> str:
        """NVRTC's.

        Raises:
            RuntimeError: There is none.
        """

    def compiler_architectures(self) -> Sequence[int]:
        """What NVRTC compiles for, ascending: compute capabilities times ten."""

    def compile(self, source: str, headers: Path, target: Target) -> bytes:
        """Compile by NVRTC; needs no GPU."""

    def load(self, binary: bytes, kind: str, name: str) -> Any:
        """The function `name` of a binary, whose kind is a target's or `fatbin`.

        Raises:
            RuntimeError: The driver refuses the binary.
        """


def target_for(capability: int, supported: Sequence[int]) -> Target:
    """What to compile for a GPU: its own architecture, else PTX of the newest older one.

    Args:
        capability: Compute capability times ten.
        supported: Architectures that the compiler knows.

    Raises:
        RuntimeError: The compiler knows newer ones only.

    Example:
        >>> target_for(90, [75, 80, 90])
        Target(kind='cubin', architecture='sm_90')
        >>> target_for(121, [75, 80, 90])
        Target(kind='ptx', architecture='compute_90')
    """
    if capability in supported:
        return Target("cubin", f"sm_{capability}")
    older = [known for known in supported if known < capability]
    if not older:
        raise RuntimeError(
            f"NVRTC compiles for sm_{min(supported)} and newer, and the GPU is sm_{capability}"
        )
    return Target("ptx", f"compute_{max(older)}")


class Loader:
    """Finds each kernel once for each kind of GPU: in the fatbin, in the cache, or by compiling.

    Args:
        driver: What compiles and loads.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._functions: dict[tuple[Kernel, int], Any] = {}
        self._fatbin: bytes | None = None
        self._fatbin_refused = False

    def function(self, kernel: Kernel, capability: int) -> Any:
        """What the driver launches.

        Raises:
            RuntimeError: There is neither a fatbin that the driver takes nor a compiler.
        """
        key = (kernel, capability)
        found = self._functions.get(key)
        if found is None:
            with self._lock:
                if key not in self._functions:
                    self._functions[key] = self._find(kernel, capability)
                found = self._functions[key]
        return found

    def _find(self, kernel: Kernel, capability: int) -> Any:
        path = sources.fatbin()
        if path is None or self._fatbin_refused:
            return self._compiled(kernel, capability)
        if self._fatbin is None:
            self._fatbin = path.read_bytes()
        try:
            return self._driver.load(self._fatbin, "fatbin", kernel.name)
        except RuntimeError as error:
            self._fatbin_refused = True
            warnings.warn(
                f"the driver does not take {path.name} ({error}): NVRTC compiles the CUDA kernels",
                stacklevel=4,
            )
            return self._compiled(kernel, capability)

    def _compiled(self, kernel: Kernel, capability: int) -> Any:
        target = target_for(capability, self._driver.compiler_architectures())
        key = self._key(kernel, target)
        binary = cache.read(key)
        if binary is not None:
            try:
                return self._driver.load(binary, target.kind, kernel.name)
            except RuntimeError:
                pass  # what is in the cache is of no use: made anew, it works or says why not
        binary = self._driver.compile(kernel.source, sources.directory(), target)
        cache.write(key, binary)
        return self._driver.load(binary, target.kind, kernel.name)

    def _key(self, kernel: Kernel, target: Target) -> str:
        parts = (sources.digest(), kernel.source, *target, self._driver.compiler_version())
        unique = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_KEY_CHARACTERS]
        return f"{kernel.name}-{target.architecture}-{unique}.{target.kind}"
