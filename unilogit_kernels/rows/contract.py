"""What the chunk loops see of rows of logits: of one model here, of two in `rows.divergence`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from unilogit_kernels.rows.ranks import Shard

if TYPE_CHECKING:
    from typing_extensions import Self


class Rows(Protocol):
    """Rows of logits over tiles of columns; the first of each list of tiles is of the student."""

    @property
    def vocab_size(self) -> int:
        """Columns of the whole vocabulary."""

    @property
    def columns(self) -> int:
        """Columns that this process holds: all of them, or those of its shard."""

    @property
    def shard(self) -> Shard | None:
        """Where these columns are, if other ranks hold others."""

    def at(self, tokens: slice | Tensor) -> Self:
        """The same for some of the rows."""

    def empty_state(self, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The running statistics of `n` rows of which no column has been seen, `[k, n]`."""

    def update(self, logits: Sequence[Tensor], first_column: int, state: Tensor) -> None:
        """Fold tiles `[n, v]`, one of each model, into the state.

        `first_column` is counted from the first column that this process holds.
        """

    def complete(self, state: Tensor) -> Tensor:
        """The state of the whole vocabulary, from that of the columns that this process holds.

        The one collective of a call, where ranks share a vocabulary.
        """

    def gradient(
        self,
        logits: Sequence[Tensor],
        first_column: int,
        state: Tensor,
        slope: Tensor,
        out: Tensor,
    ) -> None:
        """Write the gradient rows of the first tile into `out`, for what `slope` returned."""

    def values(self, state: Tensor) -> Tensor:
        """What a complete state says of each row, `[..., n]`."""

    def slope(self, state: Tensor, upstream: Tensor) -> Tensor:
        """What `gradient` takes, `[..., n]`, for `upstream` as gradient of the values."""


class RowLoss(Protocol):
    """Rows with a loss that sees each of them through its own statistics.

    Attributes:
        row_weight: `[n]`; 0 drops a row, whatever it holds.
        factor: 0-d; what the weighted sum of values is multiplied by.
        coupled: Whether a slope takes the statistics of all rows.
        adds_up: Whether gradient rows are sums, over the columns seen so far, of what is known of
            each column before its row is complete: but for factors of the row, the softmax of the
            rest and a constant.
        reports: Whether values are `[2, n]`: the second row is a part of the loss by itself.
    """

    @property
    def rows(self) -> Rows:
        """The rows."""

    @property
    def row_weight(self) -> Tensor:
        """See above."""

    @property
    def factor(self) -> Tensor:
        """See above."""

    @property
    def coupled(self) -> bool:
        """See above."""

    @property
    def adds_up(self) -> bool:
        """See above."""

    @property
    def reports(self) -> bool:
        """See above."""

    def at(self, tokens: slice | Tensor) -> Self:
        """The same for some of the rows."""

    def over(self, scale: Tensor) -> Self:
        """The same loss with its weights divided by `scale` (0-d), and its factor multiplied."""

    def values(self, state: Tensor) -> Tensor:
        """Losses `[n]` before weights; `[2, n]` where it reports."""

    def slope(self, state: Tensor, *, fold_factor: bool) -> Tensor:
        """What `Rows.gradient` takes, for the weighted sum, with or without its factor."""

    def finish(self, logits: Sequence[Tensor], out: Tensor, *, fold_factor: bool) -> Tensor:
        """`values` of rows that hold the whole vocabulary; their gradients into `out`."""

    def sizes(self, gradient_rows: Tensor) -> Tensor | None:
        """Size of each row's slope, `[n]`, 0 for a row of zeros; None where rows do not tell."""


def weigh(row_weight: Tensor, values: Tensor) -> Tensor:
    """`w_i f_i`, `[n]`, and 0 where the weight is 0, whatever the value."""
    return (row_weight * values).masked_fill(row_weight.logical_not(), 0.0)
