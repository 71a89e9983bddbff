"""Vocabularies that the ranks of a process group share: which columns are whose."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from unilogit_kernels.rows.ranks import Shard, ranks_of, told_to_all


class VocabParallel(NamedTuple):
    """A vocabulary whose columns lie on the ranks of a process group, each one on one rank.

    Every rank passes the same hidden states and labels (counted in the whole vocabulary), and its
    own columns of the logits, or rows of the lm_head's weight and bias. Every rank gets the loss of
    the whole vocabulary, bitwise the same, and the gradient of hidden states in full; logits,
    weight and bias get that of the rank's own columns.

    Attributes:
        group: The process group; None for the default one.
        first_column: Where this rank's columns begin in the vocabulary. None: after those of the
            ranks before it.
        vocab_size: Number of real tokens in the whole vocabulary; columns beyond it, on whichever
            ranks, carry no probability. None for all columns.

    The ranks ask each other for their sizes once for each size that a rank's part has. So where
    parts change between calls, each rank's must change, or none.

    Example:
        >>> import torch, torch.distributed as dist
        >>> from unilogit_kernels import VocabParallel, linear_unilogit_loss
        >>> store = dist.HashStore()
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> hidden, own_rows = torch.randn(4, 16), torch.randn(1000, 16)
        >>> loss = linear_unilogit_loss(
        ...     hidden, own_rows, torch.arange(4), vocab_parallel=VocabParallel()
        ... )
        >>> dist.destroy_process_group()
    """

    group: dist.ProcessGroup | None = None
    first_column: int | None = None
    vocab_size: int | None = None


def process_group(given: VocabParallel) -> dist.ProcessGroup:
    """The group whose ranks share a vocabulary.

    Raises:
        TypeError: It is no `VocabParallel`, or has no process group.
        RuntimeError: There is no default group.
    """
    if not isinstance(given, VocabParallel):
        raise TypeError(
            "vocab_parallel must be a VocabParallel, such as VocabParallel(group), or None, "
            f"got {given!r}"
        )
    if given.group is None:
        if not dist.is_initialized():
            raise RuntimeError(
                "vocab_parallel: VocabParallel() takes the default process group, which there is "
                "not: call torch.distributed.init_process_group first, or pass a group"
            )
        group: dist.ProcessGroup = dist.distributed_c10d._get_default_group()
        return group
    if not isinstance(given.group, dist.ProcessGroup):
        raise TypeError(
            f"VocabParallel.group must be a torch.distributed process group, got {given.group!r}"
        )
    return given.group


_Function = TypeVar("_Function", bound=Callable[..., Any])


def on_all_ranks(function: _Function) -> _Function:
    """Decorator of functions that take `vocab_parallel`: an error on one rank is raised on all.

    So it is where a DTensor among the operands says which ranks share the vocabulary. See
    `ranks.told_to_all`; ranks that are compiled go without.
    """

    @functools.wraps(function)
    def on_each(*args: Any, vocab_parallel: VocabParallel | None = None, **options: Any) -> Any:
        given = options if vocab_parallel is None else {**options, "vocab_parallel": vocab_parallel}
        if torch.compiler.is_compiling():
            return function(*args, **given)
        operands = (*args, *options.values())
        group = _group_of(operands) if vocab_parallel is None else process_group(vocab_parallel)
        if group is None:
            return function(*args, **given)
        on_device = any(isinstance(arg, Tensor) and arg.device.type != "cpu" for arg in operands)
        with told_to_all(group.group_name, "other" if on_device else "cpu"):
            return function(*args, **given)

    return on_each  # type: ignore[return-value]  # of the same signature


def is_dtensor(tensor: object) -> bool:
    """Whether it is one, without importing them: most processes have none."""
    return type(tensor).__name__ == "DTensor" and isinstance(tensor, Tensor)


def any_dtensors(tensors: Iterable[object]) -> bool:
    """Whether there is one among them."""
    # By a loop, which takes a third of the time of `any` of few.
    for each in tensors:  # noqa: SIM110
        if is_dtensor(each):
            return True
    return False


def _group_of(operands: Iterable[Any]) -> dist.ProcessGroup | None:
    """The ranks over which the first DTensor that is cut is cut, or None where there is none."""
    for each in operands:
        if is_dtensor(each) and each.device_mesh.ndim == 1 and each.placements[0].is_shard():
            group: dist.ProcessGroup = each.device_mesh.get_group()
            return group
    return None


class Place(NamedTuple):
    """Where a rank's columns are.

    Attributes:
        shard: These.
        vocab_size: Of the whole vocabulary.
    """

    shard: Shard
    vocab_size: int


def place_of(
    given: VocabParallel,
    columns: int,
    vocab_size: int | None,
    labels: Tensor | None,
    like: Tensor,
) -> Place:
    """Where in the vocabulary a rank's `columns` are.

    Args:
        given: As the user gave it.
        columns: Of this rank, padding included.
        vocab_size: The function's own argument: another way to give the size of the whole one.
        labels: Or None; and
        like: hidden states or logits `[..., h]`: the ranks must have the same rows.

    Raises:
        ValueError: A number does not fit, or the ranks have other rows.
    """
    group = process_group(given)
    if given.vocab_size is not None:
        if vocab_size not in (None, given.vocab_size):
            raise ValueError(
                f"vocab_size is {vocab_size} and VocabParallel.vocab_size {given.vocab_size}: "
                "both are the number of real tokens in the whole vocabulary; pass one of them"
            )
        vocab_size = given.vocab_size
    first = given.first_column
    if first is not None and first < 0:
        raise ValueError(f"VocabParallel.first_column must be at least 0, got {first}")
    sizes = _sizes(group, columns, labels, like)
    if first is None:
        first = sum(sizes[: group.rank()])
    if vocab_size is None:
        vocab_size = sum(sizes)
    if vocab_size < 2:
        raise ValueError(
            f"vocab_size of the whole vocabulary must be at least 2, got {vocab_size}; "
            "with a single token every probability is 1 and log(V-1) does not exist"
        )
    real = min(max(vocab_size - first, 0), columns)
    return Place(Shard(first, real, group.group_name), vocab_size)


_SIZES: WeakKeyDictionary[dist.ProcessGroup, dict[int, list[int]]] = WeakKeyDictionary()
"""Of each group, the sizes of all ranks' shards where this rank's has so many columns."""


def _sizes(
    group: dist.ProcessGroup, columns: int, labels: Tensor | None, like: Tensor
) -> list[int]:
    known = _SIZES.setdefault(group, {})
    if columns not in known:
        tokens = math.prod(like.shape[:-1])
        total = 0 if labels is None else int(labels.to(torch.int64).sum())
        own = torch.tensor([columns, tokens, total], device=like.device)
        found = ranks_of(group.group_name).gather(own).tolist()
        rows = [each[1:] for each in found]
        if rows.count(rows[0]) != len(rows):
            listed = ", ".join(f"{n} tokens whose labels sum to {total}" for n, total in rows)
            raise ValueError(
                "vocab_parallel: all ranks that share a vocabulary must pass the same hidden "
                f"states and labels, got {listed} on ranks 0 to {len(rows) - 1}. (A weight that "
                "FSDP shards is no part of a vocabulary: call the loss where FSDP has gathered it)"
            )
        known[columns] = [each[0] for each in found]
    return known[columns]
