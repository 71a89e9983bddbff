"""Allocation of the large tensors that a call fills and hands on, or uses as scratch.

Where Linux is asked for it by `torch.empty`, a large tensor is new memory every time: the kernel
hands out zeroed pages one fault after the other, and gets them back when the tensor is freed. This
costs several times what writing the gradient does (docs/benchmarks.md). So large CPU tensors lie in
blocks of huge pages that are kept for a later call when their tensor is freed. A kept block belongs
to nobody: it comes back only after the last tensor, view or NumPy array that shares its storage is
gone. While it waits, the system may take its pages whenever memory is short (`MADV_FREE`), though
until then they count as resident; it is not told of the first few blocks, `UNMARKED_BYTES`. At most
`kept_limit()` bytes wait, the longest idle go first.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

KEPT_VARIABLE = "UNILOGIT_KERNELS_KEPT_MIB"
"""Environment variable: MiB of freed CPU memory to keep for later calls; 0 keeps nothing."""

DEFAULT_KEPT_MIB = 1024
"""Two gradients of 1,024 float32 rows over 131,072 columns."""

MIN_BYTES = 1 << 20
"""Smaller tensors are left to torch: the C library keeps their pages by itself."""

UNMARKED_BYTES = 64 << 20
"""Up to this much is kept without a word to the system, which costs 70 us for 4 MiB: as much as a
call on a few rows has for it."""

MOST_HUGE_BYTES = 1 << 30
"""Larger blocks, too large to be kept by default, take ordinary pages: gathering huge ones for
2.5 GiB cost a training step 1 s where memory had been in pieces before (docs/benchmarks.md)."""

_HUGE_PAGE = 2 << 20
_MAX_WASTE = 2
"""A kept block serves tensors down to this fraction of its size, as the number of tokens varies."""


class _Block:
    """Huge pages that hold one tensor at a time."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=flags)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self._start = -first % _HUGE_PAGE
        self.size = size
        if size <= MOST_HUGE_BYTES:
            self._advise("MADV_HUGEPAGE")
        # Here, so that importing the package does not import what loads the library.
        from unilogit_kernels.backends.cpu import library

        library.populate(first + self._start, size)

    def view(self, size: int) -> memoryview:
        """The first bytes of the block; when the view is gone, the block is idle."""
        view = memoryview(self._pages)[self._start : self._start + size]
        weakref.finalize(view, _keep, self).atexit = False
        return view

    def mark_free(self) -> None:
        """Let the system take the pages until they are written again."""
        self._advise("MADV_FREE")

    def _advise(self, advice: str) -> None:
        # Where the system does not take the advice, nothing is lost.
        with suppress(AttributeError, OSError):
            self._pages.madvise(getattr(mmap, advice), self._start, self.size)


# Appending, removing and popping are atomic; a finalizer may run inside any of these functions.
_idle: list[_Block] = []


def kept_limit() -> int:
    """How many bytes of freed memory are kept at most."""
    return int(os.environ.get(KEPT_VARIABLE, DEFAULT_KEPT_MIB)) << 20


def kept_bytes() -> int:
    """How many bytes of freed memory are kept now."""
    return sum(block.size for block in list(_idle))


def release(limit: int = 0) -> None:
    """Return kept memory to the system, the longest idle first, until at most `limit` bytes stay.

    Example:
        >>> release()
        >>> kept_bytes()
        0
    """
    while kept_bytes() > limit:
        try:
            _idle.pop(0)
        except IndexError:
            return


def allocate(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, of a large CPU tensor in huge pages that are used again after it is freed.

    Args:
        shape: The tensor's shape.
        dtype: Its dtype.
        device: Its device.

    Returns:
        A contiguous tensor with arbitrary contents. Its storage cannot be resized if it is large.
    """
    elements = 1
    for size in shape:
        elements *= size
    bytes_wanted = elements * dtype.itemsize
    if device.type != "cpu" or bytes_wanted < MIN_BYTES or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device=device)
    size = -(-bytes_wanted // _HUGE_PAGE) * _HUGE_PAGE
    block = _take(size) or _Block(size)
    storage = torch.frombuffer(block.view(bytes_wanted), dtype=torch.uint8).untyped_storage()
    # Unlike a view, an ordinary tensor, and torch's dispatcher sees it come into being.
    tensor = torch.empty(0, dtype=dtype)
    tensor.set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
    return tensor


def _take(size: int) -> _Block | None:
    """The smallest idle block that holds `size` bytes without wasting most of itself."""
    fitting = [b for b in list(_idle) if size <= b.size <= _MAX_WASTE * size]
    for block in sorted(fitting, key=lambda b: b.size):
        try:
            _idle.remove(block)
        except ValueError:
            continue  # another thread was faster
        return block
    return None


def _keep(block: _Block) -> None:
    limit = kept_limit()
    if block.size > limit:
        return
    if kept_bytes() + block.size > UNMARKED_BYTES:
        block.mark_free()
    _idle.append(block)
    release(limit)


def start_resident_peak() -> int:
    """Forget the high-water mark of this process's resident set; returns the bytes in it now.

    Raises:
        OSError: the system does not tell; Linux does.
    """
    Path("/proc/self/clear_refs").write_text("5")
    return told_bytes("/proc/self/status", "VmRSS")


def peak_resident_bytes() -> int:
    """The high-water mark since `start_resident_peak`.

    Raises:
        OSError: see there.
    """
    return told_bytes("/proc/self/status", "VmHWM")


def told_bytes(path: str, name: str) -> int:
    """A field of a file of Linux's `/proc` that is in kB, in bytes.

    Raises:
        OSError: there is no such file.
    """
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
