"""Arguments of a launch: the block of bytes that a kernel reads, and the memory it may touch."""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence

import torch

from ptxsim.errors import UnsupportedPtxError
from ptxsim.launch import Region

_WORD_BYTES = 4


class ArgumentBlock:
    """Packs values one after the other, each at a multiple of its size."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def append(self, format_: str, value: float) -> None:
        """Pack one value in a format of `struct`."""
        self.append_bytes(struct.pack(f"<{format_}", value))

    def append_bytes(self, data: bytes) -> None:
        """Pack what is bytes already."""
        self._bytes += b"\0" * (-len(self._bytes) % len(data))
        self._bytes += data

    def append_pointer(self, address: int) -> None:
        """Pack an address."""
        self.append("Q", address)

    def __bytes__(self) -> bytes:
        return bytes(self._bytes)


def region_of(
    tensor: torch.Tensor, name: str, *, writable: bool = True, whole_words: bool = False
) -> Region:
    """The memory between a tensor's first and last element, gaps between its rows included.

    Args:
        tensor: On the CPU.
        name: Of the argument.
        writable: Whether the kernel may write there.
        whole_words: Extend to multiples of four bytes, for 16-bit atomics.

    Raises:
        UnsupportedPtxError: The tensor is on another device.
    """
    if tensor.device.type != "cpu":
        raise UnsupportedPtxError(f"argument '{name}' is on {tensor.device}, the executor on cpu")
    begin = end = tensor.data_ptr()
    if tensor.numel():
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        end += (sum((size - 1) * stride for size, stride in pairs) + 1) * tensor.element_size()
    if whole_words:
        begin, end = begin // _WORD_BYTES * _WORD_BYTES, -(-end // _WORD_BYTES) * _WORD_BYTES
    return Region(begin, end, tensor.element_size(), writable, name)


def merge_overlapping(regions: Sequence[Region]) -> list[Region]:
    """One region where arguments share memory, read-only if one of them is.

    Example:
        >>> a, b = Region(0, 8, 4, True, "a"), Region(4, 16, 2, False, "b")
        >>> merge_overlapping([b, a])
        [Region(begin=0, end=16, element_bytes=2, writable=False, name='a|b')]
    """
    merged: list[Region] = []
    for region in sorted(regions, key=lambda r: (r.begin, r.end)):
        last = merged[-1] if merged else None
        if last is None or region.begin >= last.end:
            merged.append(region)
            continue
        merged[-1] = Region(
            last.begin,
            max(last.end, region.end),
            min(last.element_bytes, region.element_bytes),
            last.writable and region.writable,
            f"{last.name}|{region.name}",
        )
    return merged


class ReadOnly:
    """Which arguments must not be written to.

    Args:
        names_or_tensors: Names of kernel arguments, or tensors whose memory is meant.
    """

    def __init__(self, names_or_tensors: Collection[str | torch.Tensor] = ()) -> None:
        self._names = {x for x in names_or_tensors if isinstance(x, str)}
        self._tensors = [x for x in names_or_tensors if isinstance(x, torch.Tensor)]
        self._unseen = set(self._names)

    def covers(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this argument is meant."""
        self._unseen.discard(name)
        if name in self._names:
            return True
        argument = region_of(tensor, name)
        others = (region_of(other, "") for other in self._tensors)
        return any(x.begin < argument.end and argument.begin < x.end for x in others)

    def check_all_seen(self) -> None:
        """Raise if a name was no kernel's argument: a misspelt name would protect nothing.

        Raises:
            ValueError: Naming it.
        """
        if self._unseen:
            raise ValueError(f"no kernel has an argument named {', '.join(sorted(self._unseen))}")
