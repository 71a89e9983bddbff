"""A GPU that is not there: what a backend's own launch functions would launch on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from unilogit_kernels.backends.cuda.launcher import Argument
    from unilogit_kernels.backends.cuda.sources import Kernel


class Gpu(NamedTuple):
    """What decides how row kernels are launched.

    Attributes:
        target: Its architecture as `backends.triton.settings.TABLE` names it: `"cuda:90"`.
        multiprocessors: How many it has.
        cache_bytes: Of the last cache that they share.
    """

    target: str
    multiprocessors: int
    cache_bytes: int


class ImaginedGpu:
    """Takes launches, and notes the kernels' names; `backends.cuda.launcher.Launcher` too.

    Args:
        gpu: What it is.

    Attributes:
        gpu: The same.
        launched: The kernels, in order.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.launched: list[str] = []

    def multiprocessors(self, tensor: Tensor) -> int:
        """See `Launcher`."""
        return self.gpu.multiprocessors

    def cache_bytes(self, tensor: Tensor) -> int:
        """See `Launcher`."""
        return self.gpu.cache_bytes

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, int],
        threads: int,
        arguments: Sequence[Argument],
        device_of: Tensor,
    ) -> None:
        """See `Launcher`."""
        self.launched.append(kernel.macro.lower())
