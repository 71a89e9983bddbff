"""The gradient of hidden states while it adds up, over columns and over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from unilogit_kernels.fused_linear.gemm import GemmDtypes
from unilogit_kernels.rows.ranks import Pending, Shard, start_sum


class HiddenSum:
    """Sums `[n, h]` in float32, and one sum over ranks that starts when the last part is queued.

    Where rows have owners (`Shard.owners`), a row is the sum on its own rank alone.

    Args:
        gradient: `[n, h]`, in `dtypes.results`; holds the gradient after `finish`.
        dtypes: Of the GEMMs.
        shard: Of the vocabulary, if other ranks hold other columns.

    Attributes:
        memory: Where the GEMMs write.
    """

    def __init__(self, gradient: Tensor, dtypes: GemmDtypes, shard: Shard | None) -> None:
        self._gradient, self._shard = gradient, shard
        self._pending: Pending | None = None
        self.memory = gradient
        if gradient.dtype != dtypes.exact:
            self.memory = torch.empty_like(gradient, dtype=dtypes.exact)

    def complete(self) -> None:
        """Say that nothing more will be written: ranks may begin to add theirs up."""
        if self._shard is not None and self.memory.numel():
            self._pending = start_sum(self._shard, self.memory)

    def finish(self) -> None:
        """Wait for the other ranks, and narrow the sums."""
        if self._pending is not None:
            self._pending.wait()
        if self.memory is not self._gradient:
            self._gradient.copy_(self.memory)
