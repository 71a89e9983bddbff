"""The fragments that operators are made of, and what the layers below make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.maths import row_state, statistics
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.ops import literal
from unilogit_kernels.ops.fragments import Fragment
from unilogit_kernels.ops.label_range import check_label_range
from unilogit_kernels.rows.contract import RowLoss, Rows, weigh
from unilogit_kernels.rows.objective import ObjectiveLoss, RowProblem, Weighted
from unilogit_kernels.rows.ranks import Shard

# ---- operands ----------------------------------------------------------------------------------


class Logits(NamedTuple):
    """`[n, V]`."""

    logits: Tensor


# ---- rows --------------------------------------------------------------------------------------


class RowArguments(Fragment, Protocol):
    """What describes the rows of one model, or of two: a fragment."""

    @property
    def vocab_size(self) -> int:
        """Size of the whole vocabulary."""

    @property
    def first_column(self) -> int:
        """See `Shard`."""

    @property
    def columns(self) -> int:
        """Columns that this process holds: all of them, or those of its shard."""

    @property
    def group(self) -> str:
        """Name of the process group whose ranks hold the other columns; empty if nobody does."""

    @property
    def owners(self) -> Tensor | None:
        """See `Shard`."""

    @property
    def backend(self) -> str:
        """Name of the one that runs the row kernels."""

    def check_labels(self) -> None:
        """Raise an IndexError for a label that is none, where looking costs nothing."""

    def problem(self, like: Tensor) -> Rows:
        """The rows as the layers below take them; `like` has as many."""

    def column(self, state: Tensor) -> Tensor:
        """The runner-up's of complete states, int64 `[n]`; empty where nobody asked for it."""

    def values_like(self, like: Tensor) -> Values:
        """What that looks like to a fake kernel."""

    def literal(self, logits: Sequence[Tensor]) -> Tensor:
        """The values by plain autograd; 0 for a row whose label is none."""


class TokenRows(NamedTuple):
    """Rows of one model's logits.

    Attributes:
        labels: int64 `[n]`.
        ignore_index: Label of rows that do not count.
        scale: See `LogitTransform`.
        softcap: See `LogitTransform`.
        vocab_size: Size of the whole vocabulary.
        first_column: See `Shard`; 0 for a process that holds all columns.
        columns: How many it holds.
        group: See `Shard`; empty for a process that holds all columns.
        owners: See `Shard`.
        needs: The bits of `RowNeeds`.
        backend: Name of the one that runs the row kernels.
    """

    labels: Tensor
    ignore_index: int
    scale: float
    softcap: float
    vocab_size: int
    first_column: int
    columns: int
    group: str
    owners: Tensor | None
    needs: int
    backend: str

    def check_labels(self) -> None:
        """See `RowArguments`."""
        check_label_range(self.labels, self.ignore_index, self.vocab_size)

    def problem(self, like: Tensor) -> RowProblem:
        """See `RowArguments`."""
        transform = LogitTransform(self.scale, self.softcap)
        kernels = registry.load(self.backend)
        return RowProblem(
            self.labels,
            transform,
            self.vocab_size,
            kernels,
            RowNeeds.of_bits(self.needs),
            shard_of(self),
        )

    def column(self, state: Tensor) -> Tensor:
        """See `RowArguments`."""
        if not RowNeeds.of_bits(self.needs).runner_up:
            return no_column(state)
        return row_state.runner_up(state, self.labels)

    def values_like(self, like: Tensor) -> Values:
        """See `RowArguments`."""
        n, dtype, needs = like.shape[0], exact_dtype(like), RowNeeds.of_bits(self.needs)
        found = statistics.count(needs)
        return Values(
            like.new_empty((found, n) if found > 1 else (n,), dtype=dtype),
            like.new_empty(n if needs.runner_up else 0, dtype=torch.int64),
            like.new_empty(needs.state_rows, n, dtype=dtype),
        )

    def literal(self, logits: Sequence[Tensor]) -> Tensor:
        """See `RowArguments`."""
        transform = LogitTransform(self.scale, self.softcap)
        return literal.values(
            logits[0], self.labels, transform, self.vocab_size, RowNeeds.of_bits(self.needs)
        )


def shard_of(rows: RowArguments) -> Shard | None:
    """The part of the vocabulary that this process holds, if it does not hold all of it."""
    if not rows.group:
        return None
    return Shard(rows.first_column, rows.columns, rows.group, rows.owners)


def no_column(like: Tensor) -> Tensor:
    """Of rows whose runner-up nobody asked for."""
    return like.new_empty(0, dtype=torch.int64)


class Values(NamedTuple):
    """What complete rows say.

    Attributes:
        values: `[n]`: log-odds, or divergences. Other statistics are more rows.
        column: The runner-up's, int64 `[n]`; empty where nobody asked for it.
        state: `[k, n]`.
    """

    values: Tensor
    column: Tensor
    state: Tensor


# ---- losses ------------------------------------------------------------------------------------

_RowsT = TypeVar("_RowsT", bound=Rows, contravariant=True)


class LossArguments(Fragment, Protocol[_RowsT]):
    """What makes a loss of rows: a fragment."""

    @property
    def factor(self) -> Tensor:
        """0-d; what the weighted sum of values is multiplied by."""

    @property
    def reports(self) -> bool:
        """See `RowLoss`."""

    def loss(self, problem: _RowsT) -> RowLoss:
        """The loss as the layers below take it."""

    def literal(self, values: Tensor, vocab_size: int) -> Tensor:
        """The reduced loss of `RowArguments.literal`, by plain autograd."""


class WeightedObjective(NamedTuple):
    """`rows.Weighted`, the objective as `objectives.pack` makes it.

    Attributes:
        row_weight: `[n]`; 0 drops a row, whatever it holds.
        factor: 0-d; what the weighted sum is multiplied by.
        objective: Name.
        parameters: Its floats.
        tensors: Its tensors.
    """

    row_weight: Tensor
    factor: Tensor
    objective: str
    parameters: list[float]
    tensors: list[Tensor]

    @property
    def reports(self) -> bool:
        """See `LossArguments`."""
        return objectives.unpack(*self[2:]).reports

    def weighted(self) -> Weighted:
        """The arguments as the layers below take them."""
        return Weighted(objectives.unpack(*self[2:]), self.row_weight, self.factor)

    def loss(self, problem: RowProblem) -> ObjectiveLoss:
        """See `LossArguments`."""
        return ObjectiveLoss(problem, self.weighted())

    def literal(self, values: Tensor, vocab_size: int) -> Tensor:
        """See `LossArguments`."""
        objective = self.weighted().objective
        losses = objective.of_rows(Statistics.of(values, objective.needs), vocab_size)
        return self.factor * weigh(self.row_weight, losses).sum()


# ---- gradients ---------------------------------------------------------------------------------


class LogitsGradient(NamedTuple):
    """`[n, V]`."""

    logits_grad: Tensor


class NeedsGradient(NamedTuple):
    """Whether any operand wants a gradient; autograd switches it on."""

    needs_grad: bool

    @staticmethod
    def of_needs(needs: Sequence[bool]) -> NeedsGradient:
        """From which of the operands do."""
        return NeedsGradient(any(needs))


NO_GRADIENT = NeedsGradient(needs_grad=False)
"""What a caller says: autograd knows better whether one is wanted."""


class Saved(NamedTuple):
    """What a finished loss saves for its backward beside gradients.

    Attributes:
        loss: Its own result, by which a derivative of a gradient would be taken.
        dtypes: Of the operands.
        backend: Name of the backend.
    """

    loss: Tensor
    dtypes: tuple[torch.dtype, ...]
    backend: str


def gradient_like(wanted: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a gradient looks like to a fake kernel: empty if it is not wanted."""
    return like.new_empty(like.shape if wanted else (0,), dtype=dtype or like.dtype)


def exact_dtype(like: Tensor) -> torch.dtype:
    """The dtype of statistics and losses."""
    return torch.promote_types(like.dtype, torch.float32)


def loss_like(like: Tensor) -> Tensor:
    """What a loss looks like to a fake kernel."""
    return like.new_empty((), dtype=exact_dtype(like))


def losses_like(like: Tensor, *, reports: bool = False) -> Tensor:
    """What the losses of the rows of `like` look like to a fake kernel."""
    n = like.shape[0]
    return like.new_empty((2, n) if reports else (n,), dtype=exact_dtype(like))


def total_of(losses: Tensor) -> Tensor:
    """The sum of the losses, `[n]`, or `[2, n]` with a part of them that is in the first row."""
    return losses.sum() if losses.dim() == 1 else losses[0].sum()
