"""Launches that are laid out once, and then cost the host little.

What Triton does for each launch (binding names, looking at every argument, building a key) takes
longer than the launch itself. So a launch is prepared for its sizes and strides, and remembered: it
goes through Triton once, which compiles, and from then on straight to the compiled kernel, through
`CompiledKernel.__getitem__`, which triton 3.6 to 3.9 have alike and which calls the hooks of
profilers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.compiler.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from unilogit_kernels.backends.gpu import GpuKernels
from unilogit_kernels.backends.imagined import ImaginedGpu
from unilogit_kernels.backends.triton import settings
from unilogit_kernels.backends.triton.settings import Device

_MOST_NEAR = 2**31 - 1
"""Bytes of a tensor up to which Triton addresses it in 32 bits on AMD."""


class Prepared:
    """A launch but for its pointers.

    Pointers that are accessed in vectors are of one alignment in all launches of it: that is what
    `geometry.Place` is a part of the key for. Others may be of any.

    Args:
        kernel: A `triton.jit` function: pointers first, then numbers, then constants.
        grid: Programs along x and y.
        numbers: As the kernel declares them, after its pointers.
        constants: By name, as the kernel declares them, after the numbers.
        options: Launch options.
    """

    __slots__ = ("_constants", "_direct", "_grid", "_kernel", "_numbers", "_rest", "_runs", "name")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int],
        numbers: tuple[float, ...],
        constants: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self.name: str = kernel.__name__
        self._kernel, self._grid, self._numbers = kernel, (*grid, 1), numbers
        self._constants = {**constants, **options}
        self._rest = (*numbers, *constants.values())
        self._runs: dict[Hashable, Callable[..., None]] = {}
        # Triton's interpreter compiles nothing.
        self._direct = isinstance(kernel, JITFunction)
        if self._direct:
            names = kernel.arg_names[-len(constants) :]
            assert names == [*constants], f"{self.name} declares {names}, got {[*constants]}"

    def __call__(self, *pointers: Tensor | None) -> None:
        """Launch on the current device and stream."""
        if not self._direct:
            self._kernel[self._grid](*pointers, *self._numbers, **self._constants)
            return
        driver = triton.runtime.driver.active
        device = driver.get_current_device()
        kinds: list[Any] = [device]
        kinds += [None if pointer is None else pointer.dtype for pointer in pointers]
        if _addresses_near(driver, device):
            kinds += [pointer is None or _is_near(pointer) for pointer in pointers]
        key = tuple(kinds)
        run = self._runs.get(key)
        if run is not None:
            run(*pointers, *self._rest, stream=driver.get_current_stream(device))
            return
        compiled = self._kernel[self._grid](*pointers, *self._numbers, **self._constants)
        if isinstance(compiled, CompiledKernel) and not self._kernel.pre_run_hooks:
            self._runs[key] = compiled[self._grid]


class Update(NamedTuple):
    """Statistics of rows: in one launch, or in parts that another one merges.

    Attributes:
        fold: The first launch.
        parts: Of a row; 0 where the state is updated at once.
        merge: The second launch; None then.
    """

    fold: Prepared
    parts: int = 0
    merge: Prepared | None = None


@functools.cache
def _addresses_near(driver: Any, device: int) -> bool:
    return bool(driver.get_current_target().backend == "hip")


def _is_near(pointer: Tensor) -> bool:
    return pointer.untyped_storage().nbytes() <= _MOST_NEAR


class TritonLaunches(GpuKernels):
    """What launches prepared kernels.

    Args:
        imagined: Notes launches instead of making them, on tensors without data.
    """

    language = "Triton"

    def __init__(self, imagined: ImaginedGpu | None = None) -> None:
        self._imagined, self._imagined_device = imagined, None
        if imagined is not None:
            target, *sizes = imagined.gpu
            self._imagined_device = Device(settings.settings_of(target), *sizes)

    def _device(self, tensor: Tensor) -> Device:
        """What launches on a tensor are laid out for."""
        return self._imagined_device or settings.device_of(tensor)

    def _launch(self, prepared: Prepared, *pointers: Tensor | None) -> None:
        if self._imagined is None:
            prepared(*pointers)
        else:
            self._imagined.launched.append(prepared.name.removesuffix("_kernel"))
