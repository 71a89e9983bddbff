"""Rows of logits: what describes them, and the losses of logits that exist as a whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels import row_state
from unilogit_kernels.backends import LogitTransform, RowKernels, sweep_kernels
from unilogit_kernels.memory import allocate
from unilogit_kernels.objectives import Objective


class RowProblem(NamedTuple):
    """What the row kernels need beside the logits.

    Attributes:
        labels: int64 `[n]`.
        transform: What the model does to the raw logits.
        vocab_size: Size of the whole vocabulary, which `log(V - 1)` sees.
        kernels: The backend.
    """

    labels: Tensor
    transform: LogitTransform
    vocab_size: int
    kernels: RowKernels

    def at(self, tokens: slice) -> RowProblem:
        """The same for some of the rows."""
        return self._replace(labels=self.labels[tokens])


class Weighted(NamedTuple):
    """An objective and how its rows are weighted.

    Attributes:
        objective: `f`.
        row_weight: `[n]`; 0 drops a row, whatever it holds.
        factor: 0-d; what the weighted sum of values is multiplied by.
    """

    objective: Objective
    row_weight: Tensor
    factor: Tensor

    def at(self, tokens: slice | Tensor) -> Weighted:
        """The same for some of the rows."""
        return self._replace(
            objective=self.objective.at(tokens), row_weight=self.row_weight[tokens]
        )

    def weigh(self, values: Tensor) -> Tensor:
        """`w_i f_i`, `[n]`, and 0 where the weight is 0."""
        return torch.where(self.row_weight == 0, 0.0, self.row_weight * values)

    def slope_weight(self, *, fold_factor: bool) -> Tensor:
        """What `f'(d_i)` is multiplied by to give the slope of row i, `[n]`."""
        return self.row_weight * self.factor if fold_factor else self.row_weight


def logits_state(logits: Tensor, rows: RowProblem) -> Tensor:
    """The complete state `[3, n]` of logits `[n, V]`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    state = row_state.empty_state(logits.shape[0], logits.device, dtype)
    real = logits[:, : rows.vocab_size]
    rows.kernels.log_odds_update(real, rows.labels, 0, state, rows.transform)
    return state


def logits_gradient(logits: Tensor, rows: RowProblem, state: Tensor, slope: Tensor) -> Tensor:
    """The gradient `[n, V]` for a slope per row, in the logits' dtype; padding columns get 0."""
    out = _empty_gradient(logits, rows.vocab_size)
    real = slice(0, rows.vocab_size)
    rows.kernels.log_odds_gradient(
        logits[:, real], rows.labels, 0, state, slope, out[:, real], rows.transform
    )
    return out


def logits_objective(
    logits: Tensor, rows: RowProblem, weighted: Weighted, *, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Weighted losses `[n]`, and the gradient `[n, V]`: without the factor if that is float16."""
    out = _empty_gradient(logits, rows.vocab_size) if needs_gradient else None
    real = slice(0, rows.vocab_size)
    values = finish_rows(
        logits[:, real],
        rows,
        weighted,
        None if out is None else out[:, real],
        fold_factor=logits.dtype != torch.float16,
    )
    return weighted.weigh(values), out


def _empty_gradient(logits: Tensor, vocab_size: int) -> Tensor:
    out = allocate(logits.shape, logits.dtype, logits.device)
    out[:, vocab_size:] = 0
    return out


def finish_rows(
    logits: Tensor, rows: RowProblem, weighted: Weighted, out: Tensor | None, *, fold_factor: bool
) -> Tensor:
    """Values `f(d)` (`[n]`) of rows that hold the whole vocabulary; their gradients into `out`."""
    kernels, objective = rows.kernels, weighted.objective
    slope_weight = weighted.slope_weight(fold_factor=fold_factor)
    sweep = sweep_kernels(kernels)
    if sweep is not None and objective.name in sweep.swept_objectives:
        return sweep.log_odds_sweep(
            logits, rows.labels, slope_weight, objective.name, rows.vocab_size, out, rows.transform
        )
    state = logits_state(logits, rows)
    log_odds = row_state.log_odds(state, rows.labels, rows.vocab_size)
    if out is not None:
        slope = row_slope(objective, log_odds, slope_weight, rows.vocab_size)
        kernels.log_odds_gradient(logits, rows.labels, 0, state, slope, out, rows.transform)
    return objective.value(log_odds, rows.vocab_size)


def row_slope(
    objective: Objective, log_odds: Tensor, slope_weight: Tensor, vocab_size: int
) -> Tensor:
    """`slope_weight * f'(d)`, and 0 for a row of weight 0, whatever it holds."""
    slope = slope_weight * objective.slope(log_odds, vocab_size)
    return torch.where(slope_weight == 0, 0.0, slope)
