"""Hidden states whose tokens are shared by the ranks of a vocabulary: sequence parallelism."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels.rows.ranks import ranks_of


class TokenParts(NamedTuple):
    """Which rank holds which tokens of hidden states `[..., h]`.

    Attributes:
        group: Name of the process group.
        rank: Of this process in it.
        dim: The dimension that is cut.
        sizes: How long each rank's part is along it.
    """

    group: str
    rank: int
    dim: int
    sizes: list[int]

    @staticmethod
    def of(group: str, rank: int, ranks: int, dim: int, length: int) -> TokenParts:
        """Parts as DTensors cut a dimension of that length: equal ones, and what is left."""
        longest = -(-length // ranks)
        sizes = [max(0, min(longest, length - each * longest)) for each in range(ranks)]
        return TokenParts(group, rank, dim, sizes)

    @property
    def own(self) -> slice:
        """This rank's part."""
        first = sum(self.sizes[: self.rank])
        return slice(first, first + self.sizes[self.rank])

    def gathered(self, own: Tensor) -> Tensor:
        """The hidden states of all tokens, from those of each rank.

        One gather, of parts that are filled up to the longest one.
        """
        dim, missing = self.dim, max(self.sizes) - self.sizes[self.rank]
        full = own
        if missing:
            full = F.pad(own, [0, 0] * (own.dim() - 1 - dim) + [0, missing])
        found = ranks_of(self.group).gather(full.reshape(-1)).view(-1, *full.shape)
        if full.shape[:dim].numel() == 1 and len(set(self.sizes)) == 1:
            # They lie one after the other.
            return found.view(*full.shape[:dim], -1, *full.shape[dim + 1 :])
        pairs = zip(found.unbind(), self.sizes, strict=True)
        return torch.cat([part.narrow(dim, 0, size) for part, size in pairs], dim)

    def owners(self, hidden: Tensor) -> Tensor:
        """The rank that each row of `hidden` `[..., h]` belongs to, int64 `[n]`."""
        ranks = torch.arange(len(self.sizes), device=hidden.device)
        along = ranks.repeat_interleave(
            torch.tensor(self.sizes, device=hidden.device), output_size=hidden.shape[self.dim]
        )
        shape = [1] * (hidden.dim() - 1)
        shape[self.dim] = -1
        return along.view(shape).expand(hidden.shape[:-1]).reshape(-1)
