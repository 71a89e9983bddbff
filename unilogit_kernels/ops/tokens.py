"""The gather of hidden states whose tokens are shared among ranks, inside autograd."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from unilogit_kernels.rows.tokens import TokenParts


def gather_tokens(own: Tensor, parts: TokenParts) -> Tensor:
    """The hidden states of all tokens; a gradient that comes back is that of this rank's own.

    The operators sum it over the ranks, for its owner alone (`Shard.owners`).
    """
    return cast(Tensor, _Gathered.apply(own, parts))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, parts: TokenParts) -> Tensor:
        ctx.parts = parts
        return parts.gathered(own)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own: slice = ctx.parts.own
        return grad.narrow(ctx.parts.dim, own.start, own.stop - own.start), None
