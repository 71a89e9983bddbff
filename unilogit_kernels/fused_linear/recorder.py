"""Records what code does with tensors: launches with operations and bytes, and the memory alive."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CACHED_SHARE = 0.7
"""What was written, or moved since, up to this share of the last cache is read from there."""

_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1}
"""Matrix products, and where their first factor stands among the arguments."""

_LOOKUPS = ("aten::gather", "aten::index", "aten::index_select")
"""Read as much of their first argument as they return."""

_SCATTER = "aten::scatter_"
"""Writes as much as its last argument holds."""

_NO_LAUNCH = ("aten::empty", "aten::new_empty")


class Read(NamedTuple):
    """Something that a launch reads.

    Attributes:
        bytes: How much.
        distance: Bytes moved since it began to be written; infinite if nobody wrote it.
    """

    bytes: int
    distance: float


class Launch(NamedTuple):
    """One kernel.

    Attributes:
        name: Of the operator or row kernel.
        flops: Of a matrix product, else 0.
        written: Bytes.
        reads: What is read.
    """

    name: str
    flops: int
    written: int
    reads: tuple[Read, ...]

    def moved(self, cache_bytes: int = 0) -> int:
        """Bytes to and from memory; what a cache of that size still holds is read from there.

        It holds no part of what is larger than itself once that was passed from end to end.
        """
        held = CACHED_SHARE * cache_bytes
        reads = [read for read in self.reads if max(read.distance, read.bytes) > held]
        return self.written + sum(read.bytes for read in reads)


class LiveMemory:
    """The tensors that have been allocated since it exists, by their storages.

    Attributes:
        largest: Elements of the largest one.
        peak_bytes: Most bytes that were alive at a time.
    """

    def __init__(self) -> None:
        self.largest = 0
        self.peak_bytes = 0
        self._live: dict[int, int] = {}
        self._total = 0

    def follow(self, results: Any, given: set[int]) -> list[Tensor]:
        """Take in what an operator returned; returns the tensors whose memory is new.

        Args:
            results: Of the operator.
            given: `storages_of` its arguments, before it ran: it may have given one another.
        """
        new = []
        for tensor in tensors_in(results):
            storage = tensor.untyped_storage()
            if id(storage) not in given and id(storage) not in self._live:
                new.append(tensor)
                self.largest = max(self.largest, elements_of(storage, tensor))
                self._add(storage)
        return new

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._live[id(storage)] = storage.nbytes()
        self._total += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._total)
        weakref.finalize(storage, self._drop, id(storage)).atexit = False

    def _drop(self, key: int) -> None:
        self._total -= self._live.pop(key)


class Recorder(TorchDispatchMode):
    """Records every launch inside a `with` block, of torch's operators and of row kernels.

    Tensors may be without data (device `"meta"`): sizes are all it looks at.

    Attributes:
        launches: In order.
        memory: What was allocated inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.memory = LiveMemory()
        self._moved = 0
        self._written_at: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = storages_of(args, kwargs)
        result = func(*args, **kwargs)
        new = {id(tensor) for tensor in self.memory.follow(result, given)}
        schema = func._schema
        returned = [r.alias_info for r in schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        if is_view or schema.name.startswith(_NO_LAUNCH):
            return result
        outputs = [t for t in tensors_in(result) if id(t) in new or _writes(schema)]
        written = {id(t) for t in outputs}
        reads = [t for t in tensors_in((args, kwargs)) if id(t) not in written]
        if schema.name in _PRODUCTS:
            a, b = args[_PRODUCTS[schema.name] :][:2]
            reads = [a, b]
            if schema.name == "aten::addmm" and args[0].numel() >= result.numel():
                reads.append(args[0])
            self.add(schema.name, reads, [result], flops=2 * a.shape[0] * a.shape[1] * b.shape[1])
        elif outputs:
            part = result if schema.name in _LOOKUPS else None
            if schema.name == _SCATTER:
                part = args[-1]
            self.add(schema.name, reads, outputs, part=part)
        return result

    def add(
        self,
        name: str,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        *,
        flops: int = 0,
        part: Tensor | None = None,
    ) -> None:
        """Record one launch; `part` is as large as what it moves of a tensor that is larger."""

        def moved(tensor: Tensor) -> int:
            return tensor.nbytes if part is None else min(tensor.nbytes, part.nbytes)

        found = tuple(Read(moved(tensor), self._distance(tensor)) for tensor in reads)
        start = self._moved
        self.launches.append(Launch(name, flops, sum(map(moved, writes)), found))
        self._moved += self.launches[-1].moved()
        for tensor in writes:
            self._written_at[id(tensor.untyped_storage())] = start + sum(r.bytes for r in found)

    def _distance(self, tensor: Tensor) -> float:
        written_at = self._written_at.get(id(tensor.untyped_storage()))
        return math.inf if written_at is None else self._moved - written_at


def storages_of(*trees: Any) -> set[int]:
    """What tells the storages of every tensor in nested arguments apart."""
    return {id(tensor.untyped_storage()) for tensor in tensors_in(*trees)}


def elements_of(storage: torch.UntypedStorage, tensor: Tensor) -> int:
    """How many of a tensor's elements its storage holds."""
    return storage.nbytes() // tensor.element_size()


def tensors_in(*trees: Any) -> Iterator[Tensor]:
    """Every tensor in nested arguments or results."""
    for tree in trees:
        if isinstance(tree, Tensor):
            yield tree
        elif isinstance(tree, (tuple, list)):
            yield from tensors_in(*tree)
        elif isinstance(tree, dict):
            yield from tensors_in(*tree.values())


def _writes(schema: Any) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
