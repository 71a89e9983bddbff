"""Ranks that share a vocabulary: what they send each other, and how an error on one ends all.

Each rank holds some columns. A call gathers the ranks' states once, and merges them in the order
of the ranks by the one merge that there is, so that every rank has the same bits; the gradient of
hidden states, which every rank has in full, is a sum over them. On CPUs, where a rank waits for the
others, it looks meanwhile whether one of them has failed before it came so far.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

PATIENCE = 0.2
"""Seconds between looks at whether another rank has failed."""

FAREWELL = 5.0
"""Seconds that a rank which failed waits for the others to say which collective they are in: it
enters that, so that the group stays in step."""

_ERRORS: tuple[type[Exception], ...] = (IndexError, TypeError, ValueError, RuntimeError)
"""What is raised elsewhere as what it was; all else becomes a RuntimeError."""


class Shard(NamedTuple):
    """The part of a vocabulary that this process holds.

    Attributes:
        first_column: Where it begins.
        columns: How many columns carry probability; 0 for a shard of padding.
        group: Name of the process group that holds the whole vocabulary.
    """

    first_column: int
    columns: int
    group: str


class Pending(Protocol):
    """A collective that has been started."""

    def wait(self) -> None:
        """Return when its result may be used."""


class Ranks(Protocol):
    """The collectives of a group, which `recording` replaces."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def gather(self, part: Tensor) -> Tensor:
        """The 1-d tensors of all ranks, of one size, in their order: `[size, elements]`."""

    def start_sum(self, tensor: Tensor) -> Pending:
        """Begin to sum a tensor over the ranks, in place."""


def ranks_of(group: str) -> Ranks:
    """The ranks of a group, by its name."""
    substitute = _SUBSTITUTES.get(group)
    if substitute is not None:
        return substitute
    return _ProcessGroup(_by_name(group))


def _by_name(group: str) -> dist.ProcessGroup:
    return _resolve_process_group(group)  # type: ignore[arg-type]  # a str with a name


_SUBSTITUTES: dict[str, Ranks] = {}


@contextlib.contextmanager
def recording(group: str, ranks: Ranks) -> Iterator[None]:
    """Let `ranks` stand for a group of that name, which need not exist: to count, not to send."""
    _SUBSTITUTES[group] = ranks
    try:
        yield
    finally:
        del _SUBSTITUTES[group]


def merged(
    shard: Shard | None, state: Tensor, vocab_size: int, merge_parts: Callable[[Tensor], Tensor]
) -> Tensor:
    """The states `[k, n]` of the whole vocabulary, from those of each rank's columns.

    Args:
        shard: This rank's; None for a process that holds all columns.
        state: Of its columns.
        vocab_size: Of the whole vocabulary.
        merge_parts: The merge of states stacked as `[ranks, k, n]`.

    Raises:
        ValueError: On CPUs, if the shards overlap or leave columns out.
    """
    if shard is None:
        return state
    integers = torch.int32 if state.dtype == torch.float32 else torch.int64
    place = torch.tensor([shard.first_column, shard.columns], dtype=integers, device=state.device)
    sent = torch.cat((place.view(state.dtype), state.reshape(-1)))
    found = ranks_of(shard.group).gather(sent)
    if found.device.type == "cpu":
        _check_cover(found[:, :2].contiguous().view(integers).tolist(), vocab_size)
    return merge_parts(found[:, 2:].reshape(found.shape[0], *state.shape))


def _check_cover(places: list[list[int]], vocab_size: int) -> None:
    column = 0
    for first, columns in sorted(place for place in places if place[1] > 0):
        if first != column:
            break
        column += columns
    else:
        if column == vocab_size:
            return
    listed = ", ".join(f"[{first}, {first + columns})" for first, columns in places)
    raise ValueError(
        f"vocab_parallel: the ranks' shards must hold each of {vocab_size} columns once, got "
        f"{listed} of ranks 0 to {len(places) - 1}"
    )


def start_sum(shard: Shard, tensor: Tensor) -> Pending:
    """Begin to sum a tensor over the ranks that share the vocabulary, in place."""
    return ranks_of(shard.group).start_sum(tensor)


# ---- a process group ---------------------------------------------------------------------------


class _ProcessGroup:
    """`Ranks` of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    @property
    def size(self) -> int:
        return self._group.size()

    def gather(self, part: Tensor) -> Tensor:
        found = part.new_empty(self.size, part.numel())
        _start(self._group, "gather", part, found).wait()
        return found

    def start_sum(self, tensor: Tensor) -> Pending:
        return _start(self._group, "sum", tensor, tensor)


def _start(group: dist.ProcessGroup, what: str, part: Tensor, out: Tensor) -> Pending:
    """Start a collective: `"gather"` of parts, or the `"sum"` of a tensor in place."""
    number = _ENTERED.get(group, 0)
    _ENTERED[group] = number + 1
    work = _enter(group, what, part, out)
    if part.device.type != "cpu":
        return _OnDevice(work)
    return _Watched(work, group, number, f"{what} {part.numel()} {str(part.dtype)[6:]}")


def _enter(group: dist.ProcessGroup, what: str, part: Tensor, out: Tensor) -> dist.Work:
    work: dist.Work
    if what == "sum":
        work = dist.all_reduce(out, group=group, async_op=True)
    else:
        work = _all_gather(out.view(-1), part, group=group, async_op=True)
    return work


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Its newer name where there is one: the older one warns there."""

_ENTERED: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
"""How many collectives each group has entered here: the same number on every rank."""


class _OnDevice:
    """A collective in a device's stream, where the device waits for it and the host does not."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()


class _Watched:
    """A collective on CPUs, which ends when another rank says that it will not come."""

    def __init__(self, work: dist.Work, group: dist.ProcessGroup, number: int, what: str) -> None:
        self._work, self._group, self._number, self._what = work, group, number, what

    def wait(self) -> None:
        while not self._ended(PATIENCE):
            error = _Failure(self._group, self._number).told()
            if error is not None:
                _Failure(self._group, self._number).ask_for(self._what)
                self._ended(FAREWELL)
                raise error

    def _ended(self, seconds: float) -> bool:
        try:
            self._work.wait(datetime.timedelta(seconds=seconds))
        except RuntimeError as error:
            if not self._work.is_completed():
                return False  # in so much time
            gone = RuntimeError(
                f"vocab_parallel: another rank of the group {self._group.group_name!r} is gone "
                f"or did not come: {error}"
            )
            setattr(gone, _TOLD, True)
            raise gone from error
        return True


# ---- errors ------------------------------------------------------------------------------------


@contextlib.contextmanager
def told_to_all(group: str, device_type: str) -> Iterator[None]:
    """Raise what is raised inside on every rank of a group, where ranks wait for each other.

    That is on CPUs. On accelerators no host waits, so that only the launcher can end the others.
    """
    if not group or device_type != "cpu" or group in _SUBSTITUTES:
        yield
        return
    try:
        yield
    except Exception as error:
        if not getattr(error, _TOLD, False):
            process_group = _by_name(group)
            number = _ENTERED.get(process_group, 0)
            _ENTERED[process_group] = number + 1
            _Failure(process_group, number).tell(error)
            with contextlib.suppress(AttributeError):
                setattr(error, _TOLD, True)
        raise


_TOLD = "_unilogit_kernels_told"


class _Failure:
    """What the ranks of a group know of a failure before one of their collectives.

    It lies in the group's store, beside its collectives.
    """

    def __init__(self, group: dist.ProcessGroup, number: int) -> None:
        self._group = group
        self._store = dist.distributed_c10d._world.pg_map[group][1]
        self._key = f"unilogit_kernels/{number}"

    def tell(self, error: Exception) -> None:
        """Say why this rank will not come, and keep the group in step with those who wait."""
        store, key = self._store, self._key
        store.compare_set(f"{key}/error", "", f"{type(error).__name__}\n{error}")
        store.add(f"{key}/failed", 1)
        end = time.monotonic() + FAREWELL
        while time.monotonic() < end:
            if store.check([f"{key}/asked"]):
                self._come(store.get(f"{key}/asked").decode())
                return
            if store.add(f"{key}/failed", 0) == self._group.size():
                return  # nobody waits
            time.sleep(PATIENCE / 10)

    def told(self) -> Exception | None:
        """What another rank failed with, if one has."""
        if not self._store.check([f"{self._key}/error"]):
            return None
        name, _, text = self._store.get(f"{self._key}/error").decode().partition("\n")
        kind = next((each for each in _ERRORS if each.__name__ == name), None)
        error = RuntimeError(f"{name}: {text}") if kind is None else kind(text)
        setattr(error, _TOLD, True)
        return error

    def ask_for(self, what: str) -> None:
        """Say in which collective this rank waits."""
        self._store.set(f"{self._key}/asked", what)

    def _come(self, asked: str) -> None:
        what, elements, dtype = asked.split()
        part = torch.zeros(int(elements), dtype=getattr(torch, dtype))
        out = part if what == "sum" else part.new_empty(self._group.size(), part.numel())
        with contextlib.suppress(RuntimeError):
            _enter(self._group, what, part, out).wait(datetime.timedelta(seconds=FAREWELL))
