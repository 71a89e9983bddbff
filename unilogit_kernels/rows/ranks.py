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

from unilogit_kernels.rows.collectives import Work, enter

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
        owners: Where these ranks share the tokens, too: which of them each row of hidden states
            belongs to, int64 `[n]`, by which alone its gradient is wanted. None: by all.
    """

    first_column: int
    columns: int
    group: str
    owners: Tensor | None = None

    def at(self, tokens: slice | Tensor) -> Shard:
        """The same for some of the rows."""
        return self if self.owners is None else self._replace(owners=self.owners[tokens])


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

    def start_scatter(self, rows: Tensor, owners: Tensor) -> Pending:
        """Begin to sum rows `[n, h]` over the ranks, in place, each for its owner `[n]` alone.

        What other ranks then hold in its place is undefined.
        """


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


def start_sum(shard: Shard, rows: Tensor) -> Pending:
    """Begin to sum rows `[n, h]` over the ranks that share the vocabulary, in place.

    Where rows have owners, each is summed for its own, and undefined elsewhere.
    """
    if shard.owners is None:
        return ranks_of(shard.group).start_sum(rows)
    return ranks_of(shard.group).start_scatter(rows, shard.owners)


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
        return _start(self._group, "sum", tensor, [tensor])

    def start_scatter(self, rows: Tensor, owners: Tensor) -> Pending:
        order: Tensor | None = owners.argsort(stable=True)
        in_order = (owners.diff() >= 0).all()
        # One look at the device, for both.
        *counts, sorted_already = torch.cat(
            (owners.bincount(minlength=self.size), in_order[None].long())
        ).tolist()
        by_owner = rows
        if sorted_already:
            order = None
        else:
            by_owner = rows[order]
        parts = list(by_owner.split(counts))
        pending = _start(self._group, "scatter", by_owner, parts)
        if order is None:
            return pending
        rank = self._group.rank()
        return _Placed(pending, parts[rank], order.split(counts)[rank], rows)


def _start(
    group: dist.ProcessGroup, what: str, part: Tensor, out: Tensor | list[Tensor]
) -> Pending:
    """Start a collective of a group, as its next one; see `enter`."""
    number = _ENTERED.get(group, 0)
    _ENTERED[group] = number + 1
    parts = [part] if isinstance(out, Tensor) else out
    work = enter(group, what, part, out)
    if part.device.type != "cpu":
        return _OnDevice(work)
    sizes = ",".join(str(each.numel()) for each in parts)
    return _Watched(work, group, number, f"{what} {sizes} {str(part.dtype)[6:]}")


_ENTERED: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
"""How many collectives each group has entered here: the same number on every rank."""


class _OnDevice:
    """A collective in a device's stream, where the device waits for it and the host does not."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait()


class _Placed:
    """A scatter of rows that are a copy, in another order than those of the caller."""

    def __init__(self, pending: Pending, own: Tensor, places: Tensor, rows: Tensor) -> None:
        self._pending, self._own, self._places, self._rows = pending, own, places, rows

    def wait(self) -> None:
        self._pending.wait()
        self._rows[self._places] = self._own


class _Watched:
    """A collective on CPUs, which ends when another rank says that it will not come."""

    def __init__(self, work: Work, group: dist.ProcessGroup, number: int, what: str) -> None:
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
        what, listed, dtype = asked.split()
        sizes = [int(each) for each in listed.split(",")]
        part = torch.zeros(sum(sizes), dtype=getattr(torch, dtype))
        out: Tensor | list[Tensor] = list(part.split(sizes))
        if what == "gather":
            out = part.new_empty(self._group.size(), part.numel())
        with contextlib.suppress(RuntimeError):
            enter(self._group, what, part, out).wait(datetime.timedelta(seconds=FAREWELL))
