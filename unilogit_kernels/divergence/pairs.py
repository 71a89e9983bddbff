"""Pairs of rows: what describes them, and the divergence of logits that exist as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import pair_state
from unilogit_kernels.backends import DivergenceKernels, LogitTransform
from unilogit_kernels.divergence.closed_form import Divergence
from unilogit_kernels.memory import allocate


class PairProblem(NamedTuple):
    """What the kernels need beside the two models' logits.

    Attributes:
        labels: int64 `[n]`; -1 everywhere if there are none.
        labelled: Whether there are.
        student_transform: What the student does to its raw logits, the temperature included.
        teacher_transform: The same for the teacher.
        vocab_size: Size of the whole vocabulary.
        divergence: Which divergence.
        kernels: The backend.
    """

    labels: Tensor
    labelled: bool
    student_transform: LogitTransform
    teacher_transform: LogitTransform
    vocab_size: int
    divergence: Divergence
    kernels: DivergenceKernels

    def at(self, tokens: slice | Tensor) -> PairProblem:
        """The same for some of the rows."""
        return self._replace(labels=self.labels[tokens])

    def update(self, student: Tensor, teacher: Tensor, first_column: int, state: Tensor) -> None:
        """Fold these columns of the two models into `state`."""
        pair = (student, teacher) if self._student_first else (teacher, student)
        self.kernels.divergence_update(*pair, self.labels, first_column, state, *self._transforms)

    def gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        first_column: int,
        state: Tensor,
        coefficients: Tensor,
        out: Tensor,
    ) -> None:
        """Write the student's gradient rows into `out`."""
        pair = (student, teacher) if self._student_first else (teacher, student)
        self.kernels.divergence_gradient(
            *pair,
            self.labels,
            first_column,
            state,
            coefficients,
            self.divergence.student,
            out,
            *self._transforms,
        )

    def values(self, state: Tensor) -> Tensor:
        """KL per row, `[n]`, of complete states."""
        labels = self.labels if self.labelled else None
        return self.divergence.values(state, labels, self.vocab_size)

    def coefficients(self, state: Tensor, weight: Tensor) -> Tensor:
        """What `gradient` takes, `[4, n]`, for `weight` times the values."""
        labels = self.labels if self.labelled else None
        return self.divergence.coefficients(state, labels, self.vocab_size, weight)

    @property
    def _student_first(self) -> bool:
        return self.divergence.student == "a"

    @property
    def _transforms(self) -> tuple[LogitTransform, LogitTransform]:
        transforms = (self.student_transform, self.teacher_transform)
        return transforms if self._student_first else transforms[::-1]


def statistics_dtype(student: Tensor) -> torch.dtype:
    """The dtype of states and values: at least float32."""
    return torch.promote_types(student.dtype, torch.float32)


def logits_state(student: Tensor, teacher: Tensor, pair: PairProblem) -> Tensor:
    """The complete state `[7, n]` of logits `[n, V]`."""
    state = pair_state.empty_state(student.shape[0], student.device, statistics_dtype(student))
    real = slice(0, pair.vocab_size)
    pair.update(student[:, real], teacher[:, real], 0, state)
    return state


def logits_gradient(
    student: Tensor, teacher: Tensor, pair: PairProblem, state: Tensor, weight: Tensor
) -> Tensor:
    """The gradient `[n, V]` of `sum_i weight_i KL_i`, in the student's dtype; padding gets 0."""
    out = allocate(student.shape, student.dtype, student.device)
    out[:, pair.vocab_size :] = 0
    real = slice(0, pair.vocab_size)
    coefficients = pair.coefficients(state, weight)
    pair.gradient(student[:, real], teacher[:, real], 0, state, coefficients, out[:, real])
    return out
