"""The operators on two models' rows: what describes these, for the families of operators.

No operator has a gradient for the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.maths.divergence import Direction, Divergence
from unilogit_kernels.maths.rewrites import REWRITES
from unilogit_kernels.ops import literal
from unilogit_kernels.ops.arguments import (
    Values,
    exact_dtype,
    no_column,
    shard_of,
)
from unilogit_kernels.ops.label_range import check_label_range
from unilogit_kernels.ops.linear import linear_loss_operator, linear_values_operator
from unilogit_kernels.ops.logits import values_operator
from unilogit_kernels.rows.contract import weigh
from unilogit_kernels.rows.divergence import PairLoss, PairProblem


class LogitsPair(NamedTuple):
    """`[n, V]`, of the student and of the teacher."""

    logits: Tensor
    ref_logits: Tensor


class HeadPair(NamedTuple):
    """The operands of the student's lm_head and of the teacher's; see `heads.Head`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    inner: Tensor | None
    up: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    ref_inner: Tensor | None
    ref_up: Tensor | None


class PairRows(NamedTuple):
    """Rows of two models' logits. Temperature is part of the scales and caps.

    Attributes:
        labels: int64 `[n]`, or None.
        ignore_index: Label of rows that do not count.
        scale: See `LogitTransform`: the student's.
        softcap: The student's.
        ref_scale: The teacher's.
        ref_softcap: The teacher's.
        vocab_size: Size of the whole vocabulary.
        first_column: See `Shard`; 0 for a process that holds all columns.
        columns: How many it holds, of both models.
        group: See `Shard`; empty for a process that holds all columns.
        owners: See `Shard`.
        direction: See `Divergence`.
        rewrite: Name of the teacher's rewrite.
        parameters: Its fields.
        backend: Name of the one that runs the row kernels.
    """

    labels: Tensor | None
    ignore_index: int
    scale: float
    softcap: float
    ref_scale: float
    ref_softcap: float
    vocab_size: int
    first_column: int
    columns: int
    group: str
    owners: Tensor | None
    direction: str
    rewrite: str
    parameters: list[float]
    backend: str

    def check_labels(self) -> None:
        """See `RowArguments`."""
        if self.labels is not None:
            check_label_range(self.labels, self.ignore_index, self.vocab_size)

    def problem(self, like: Tensor) -> PairProblem:
        """See `RowArguments`."""
        labels = self.labels
        if labels is None:
            labels = like.new_full((like.shape[0],), -1, dtype=torch.int64)
        return PairProblem(
            labels,
            self.labels is not None,
            *self._transforms(),
            self.vocab_size,
            self._divergence(),
            registry.load(self.backend),
            shard_of(self),
        )

    def column(self, state: Tensor) -> Tensor:
        """See `RowArguments`."""
        return no_column(state)

    def values_like(self, like: Tensor) -> Values:
        """See `RowArguments`."""
        n, dtype = like.shape[0], exact_dtype(like)
        return Values(
            like.new_empty(n, dtype=dtype),
            no_column(like),
            like.new_empty(7, n, dtype=dtype),
        )

    def literal(self, logits: Sequence[Tensor]) -> Tensor:
        """See `RowArguments`."""
        return literal.divergences(
            logits, self.labels, self._transforms(), self.vocab_size, self._divergence()
        )

    def _transforms(self) -> tuple[LogitTransform, LogitTransform]:
        """The student's and the teacher's."""
        return (
            LogitTransform(self.scale, self.softcap),
            LogitTransform(self.ref_scale, self.ref_softcap),
        )

    def _divergence(self) -> Divergence:
        rewrite = REWRITES[self.rewrite](*self.parameters)
        return Divergence(cast(Direction, self.direction), rewrite)


class Weights(NamedTuple):
    """How the divergences of rows make a loss.

    Attributes:
        row_weight: `[n]`; 0 drops a row, whatever it holds.
        factor: 0-d; what the weighted sum is multiplied by.
    """

    row_weight: Tensor
    factor: Tensor

    def loss(self, problem: PairProblem) -> PairLoss:
        """See `LossArguments`."""
        return PairLoss(problem, *self)

    @property
    def reports(self) -> bool:
        """See `LossArguments`."""
        return False

    def literal(self, values: Tensor, vocab_size: int) -> Tensor:
        """See `LossArguments`."""
        return self.factor * weigh(self.row_weight, values).sum()


divergence = values_operator("divergence", LogitsPair, PairRows)
linear_divergence = linear_values_operator("linear_divergence", HeadPair, PairRows)
linear_divergence_loss = linear_loss_operator("linear_divergence_loss", HeadPair, PairRows, Weights)
