"""The collectives of torch.distributed that the losses take, as each device has them."""

from __future__ import annotations

import datetime
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Work(Protocol):
    """Of `dist.Work`, what is asked for here."""

    def wait(self, timeout: datetime.timedelta = ...) -> object:
        """Return when it is done; a RuntimeError where time is over first."""

    def is_completed(self) -> bool:
        """Whether it is done, or has failed."""


class _Works:
    """Several collectives as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self, timeout: datetime.timedelta = datetime.timedelta()) -> None:
        for work in self._works:
            work.wait(timeout)

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._works)


def enter(group: dist.ProcessGroup, what: str, part: Tensor, out: Tensor | list[Tensor]) -> Work:
    """Start a collective.

    Args:
        group: Who takes part.
        what: `"gather"` of parts into `out`; `"sum"` of a tensor in place; `"scatter"`, sums of
            the parts of a tensor, in place and for one rank each.
        part: What this rank gives.
        out: What is written: of `"scatter"` the parts of all ranks, of which this one's is, and the
            others are undefined then.
    """
    work: dist.Work
    if isinstance(out, Tensor):
        work = _all_gather(out.view(-1), part, group=group, async_op=True)
    elif what == "sum":
        work = dist.all_reduce(out[0], group=group, async_op=True)
    elif part.device.type == "cpu":
        # gloo scatters by a sum for all, and waits for it beyond any timeout.
        return _Works(
            [
                dist.reduce(each, group_dst=rank, group=group, async_op=True)
                for rank, each in enumerate(out)
                if each.numel()
            ]
        )
    else:
        own = out[group.rank()]
        if all(each.shape == own.shape for each in out):
            work = _reduce_scatter(own, part, group=group, async_op=True)
        else:
            work = dist.reduce_scatter(own, out, group=group, async_op=True)
    return work


_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
"""Their newer names where there are any: the older ones warn there."""
