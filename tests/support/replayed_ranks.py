"""Ranks that share a vocabulary, one after the other in one process: for kernels in an executor.

Each rank runs twice: first until it has said what it knows of its columns, then with what all of
them said. What it would have summed over the ranks is summed in the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unilogit_kernels.rows.ranks import Shard, recording

GROUP = "replayed"


class _HasSpokenError(Exception):
    """A rank has said what it knows."""


class _Ranks:
    """See `Ranks`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.said: list[Tensor] = []

    def gather(self, part: Tensor) -> Tensor:
        if len(self.said) < self.size:
            self.said.append(part.clone())
            raise _HasSpokenError
        return torch.stack(self.said)

    def start_sum(self, tensor: Tensor) -> _Ranks:
        return self

    def start_scatter(self, rows: Tensor, owners: Tensor) -> _Ranks:
        raise NotImplementedError

    def wait(self) -> None:
        """See `Pending`."""


def on_shards(
    call: Callable[[Shard], tuple[Tensor, list[Tensor]]], cut: Sequence[int], *, linear: bool
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and whole gradients, of a call on each shard of the columns `cut` in turn.

    Args:
        call: Returns a loss and this shard's gradients: of logits, or of hidden states and more.
        cut: Where each rank's columns begin, and where the last one's end.
        linear: Whether the first gradient is of hidden states, which is a sum over ranks.
    """
    shards = [Shard(first, last - first, GROUP) for first, last in itertools.pairwise(cut)]
    ranks = _Ranks(len(shards))
    with recording(GROUP, ranks):
        for shard in shards:
            try:
                call(shard)
            except _HasSpokenError:
                continue
            raise AssertionError("a rank asked nobody")
        found = [call(shard) for shard in shards]
    losses = [loss for loss, _ in found]
    for loss in losses[1:]:
        assert torch.equal(loss, losses[0])
    gradients = list(zip(*(each for _, each in found), strict=True))
    if not linear:
        return losses[0], [torch.cat(gradients[0], 1)]
    hidden = torch.stack([x.float() for x in gradients[0]]).sum(0)
    return losses[0], [hidden.to(gradients[0][0].dtype), *(torch.cat(x) for x in gradients[1:])]
