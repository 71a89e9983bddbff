"""Pairs of rows: what describes them. The student's logits come first, then the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform, RowKernels, TilePair
from unilogit_kernels.maths import pair_state
from unilogit_kernels.maths.divergence import Divergence
from unilogit_kernels.rows import ranks
from unilogit_kernels.rows.ranks import Shard
from unilogit_kernels.rows.whole import logits_state


class PairProblem(NamedTuple):
    """`rows.Rows` of two models: what the kernels need beside their logits.

    Attributes:
        labels: int64 `[n]`; -1 everywhere if there are none.
        labelled: Whether there are.
        student_transform: What the student does to its raw logits, the temperature included.
        teacher_transform: The same for the teacher.
        vocab_size: Size of the whole vocabulary.
        divergence: Which divergence.
        kernels: The backend.
        shard: The part of the vocabulary that this process holds; None for all of it.
    """

    labels: Tensor
    labelled: bool
    student_transform: LogitTransform
    teacher_transform: LogitTransform
    vocab_size: int
    divergence: Divergence
    kernels: RowKernels
    shard: Shard | None = None

    @property
    def columns(self) -> int:
        """See `Rows.columns`."""
        return self.vocab_size if self.shard is None else self.shard.columns

    def at(self, tokens: slice | Tensor) -> PairProblem:
        """See `Rows.at`."""
        shard = self.shard if self.shard is None else self.shard.at(tokens)
        return self._replace(labels=self.labels[tokens], shard=shard)

    def empty_state(self, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Rows.empty_state`; `[7, n]`."""
        return pair_state.empty_state(n, device, dtype)

    def update(self, logits: Sequence[Tensor], first_column: int, state: Tensor) -> None:
        """See `Rows.update`."""
        self.kernels.divergence_update(self._pair(logits, first_column), state)

    def complete(self, state: Tensor) -> Tensor:
        """See `Rows.complete`."""
        return ranks.merged(self.shard, state, self.vocab_size, pair_state.merge_parts)

    def gradient(
        self,
        logits: Sequence[Tensor],
        first_column: int,
        state: Tensor,
        slope: Tensor,
        out: Tensor,
    ) -> None:
        """See `Rows.gradient`; `slope` are the coefficients."""
        self.kernels.divergence_gradient(
            self._pair(logits, first_column), state, slope, self.divergence.student, out
        )

    def values(self, state: Tensor) -> Tensor:
        """KL per row, `[n]`, of complete states."""
        labels = self.labels if self.labelled else None
        return self.divergence.values(state, labels, self.vocab_size)

    def slope(self, state: Tensor, upstream: Tensor) -> Tensor:
        """The coefficients of `gradient`, `[4, n]`, for `upstream` times the values."""
        labels = self.labels if self.labelled else None
        return self.divergence.coefficients(state, labels, self.vocab_size, upstream)

    def _pair(self, logits: Sequence[Tensor], first_column: int) -> TilePair:
        (student, teacher), labels = logits, self.labels
        if self.shard is not None:
            first_column += self.shard.first_column
        by_student, by_teacher = self.student_transform, self.teacher_transform
        if self.divergence.student == "a":
            return TilePair(student, teacher, labels, first_column, by_student, by_teacher)
        return TilePair(teacher, student, labels, first_column, by_teacher, by_student)


class PairLoss(NamedTuple):
    """`rows.RowLoss` of two models' rows.

    Attributes:
        rows: The rows.
        row_weight: See `RowLoss`.
        factor: See `RowLoss`.
    """

    rows: PairProblem
    row_weight: Tensor
    factor: Tensor

    @property
    def coupled(self) -> bool:
        """See `RowLoss`."""
        return False

    @property
    def adds_up(self) -> bool:
        """See `RowLoss`: its rows are a sum of two softmaxes, whose shares come last."""
        return False

    @property
    def reports(self) -> bool:
        """See `RowLoss`."""
        return False

    def at(self, tokens: slice | Tensor) -> PairLoss:
        """See `RowLoss.at`."""
        return PairLoss(self.rows.at(tokens), self.row_weight[tokens], self.factor)

    def over(self, scale: Tensor) -> PairLoss:
        """See `RowLoss.over`."""
        return self._replace(row_weight=self.row_weight / scale, factor=self.factor * scale)

    def values(self, state: Tensor) -> Tensor:
        """See `RowLoss.values`."""
        return self.rows.values(state)

    def slope(self, state: Tensor, *, fold_factor: bool) -> Tensor:
        """See `RowLoss.slope`."""
        return self.rows.slope(
            state, self.row_weight * self.factor if fold_factor else self.row_weight
        )

    def finish(self, logits: Sequence[Tensor], out: Tensor, *, fold_factor: bool) -> Tensor:
        """See `RowLoss.finish`."""
        state = logits_state(logits, self.rows)
        self.rows.gradient(logits, 0, state, self.slope(state, fold_factor=fold_factor), out)
        return self.values(state)

    def sizes(self, gradient_rows: Tensor) -> Tensor | None:
        """No entry of a row tells how large the others are."""
        return None
