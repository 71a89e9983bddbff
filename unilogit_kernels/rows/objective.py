"""Rows of logits: what describes them, and the losses of logits that exist as a whole.

`Rows` and `RowLoss` are what the chunk loops see of them: here those of one model's rows, in
`rows.divergence` those of two models' rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile
from unilogit_kernels.maths import row_state, statistics
from unilogit_kernels.maths.row_state import PLAIN, RowNeeds
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.objectives import Objective
from unilogit_kernels.rows import ranks
from unilogit_kernels.rows.contract import weigh
from unilogit_kernels.rows.ranks import Shard
from unilogit_kernels.rows.whole import empty_gradient, logits_state, real_columns


class RowProblem(NamedTuple):
    """What the row kernels need beside the logits.

    Attributes:
        labels: int64 `[n]`.
        transform: What the model does to the raw logits.
        vocab_size: Size of the whole vocabulary, which `log(V - 1)` sees.
        kernels: The backend.
        needs: What is asked of a row beside the label's log-odds.
        shard: The part of the vocabulary that this process holds; None for all of it.
    """

    labels: Tensor
    transform: LogitTransform
    vocab_size: int
    kernels: RowKernels
    needs: RowNeeds = PLAIN
    shard: Shard | None = None

    @property
    def columns(self) -> int:
        """See `Rows.columns`."""
        return self.vocab_size if self.shard is None else self.shard.columns

    def at(self, tokens: slice | Tensor) -> RowProblem:
        """See `Rows.at`."""
        shard = self.shard if self.shard is None else self.shard.at(tokens)
        return self._replace(labels=self.labels[tokens], shard=shard)

    def empty_state(self, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """See `Rows.empty_state`; with as many rows as `needs` asks for."""
        return row_state.empty_state(n, device, dtype, self.needs)

    def tile(self, logits: Tensor, first_column: int = 0) -> Tile:
        """What the kernels take of these rows' logits; `first_column` as of `Rows.update`."""
        if self.shard is not None:
            first_column += self.shard.first_column
        return Tile(logits, self.labels, first_column, self.transform)

    def update(self, logits: Sequence[Tensor], first_column: int, state: Tensor) -> None:
        """See `Rows.update`."""
        self.kernels.log_odds_update(self.tile(logits[0], first_column), state, self.needs)

    def complete(self, state: Tensor) -> Tensor:
        """See `Rows.complete`."""
        return ranks.merged(self.shard, state, self.vocab_size, row_state.merge_parts)

    def gradient(
        self,
        logits: Sequence[Tensor],
        first_column: int,
        state: Tensor,
        slope: Tensor,
        out: Tensor,
    ) -> None:
        """See `Rows.gradient`."""
        self.kernels.log_odds_gradient(self.tile(logits[0], first_column), state, slope, out)

    def values(self, state: Tensor) -> Tensor:
        """The log-odds, `[n]`; with other statistics, `[k, n]` together."""
        return self.statistics(state).values()

    def statistics(self, state: Tensor) -> Statistics:
        """What an objective sees of the rows."""
        return statistics.statistics(state, self.labels, self.vocab_size, self.needs)

    def slope(self, state: Tensor, upstream: Tensor) -> Tensor:
        """The `row_slopes` of an upstream gradient of the values."""
        if not any(self.needs):
            return upstream.contiguous()
        log_odds = row_state.log_odds(state, self.labels, self.vocab_size)
        derivatives = Statistics.of(upstream, self.needs)
        return statistics.row_slopes(state, log_odds, derivatives, self.vocab_size)


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

    def over(self, scale: Tensor) -> Weighted:
        """See `RowLoss.over`."""
        return self._replace(row_weight=self.row_weight / scale, factor=self.factor * scale)

    def slope_weight(self, *, fold_factor: bool) -> Tensor:
        """What `f'(d_i)` is multiplied by to give the slope of row i, `[n]`."""
        return self.row_weight * self.factor if fold_factor else self.row_weight


class ObjectiveLoss(NamedTuple):
    """`RowLoss` of an objective of one model's log-odds.

    Attributes:
        rows: The rows.
        weighted: The objective, with weights.
    """

    rows: RowProblem
    weighted: Weighted

    @property
    def row_weight(self) -> Tensor:
        """See `RowLoss`."""
        return self.weighted.row_weight

    @property
    def factor(self) -> Tensor:
        """See `RowLoss`."""
        return self.weighted.factor

    @property
    def coupled(self) -> bool:
        """See `RowLoss`."""
        return self.weighted.objective.coupled

    @property
    def adds_up(self) -> bool:
        """See `RowLoss`."""
        needs = self.rows.needs
        tilted = needs.entropy or (needs.mean and self.rows.transform.softcap != 0.0)
        return not (needs.runner_up or tilted)

    @property
    def reports(self) -> bool:
        """See `RowLoss`."""
        return self.weighted.objective.reports

    def at(self, tokens: slice | Tensor) -> ObjectiveLoss:
        """See `RowLoss.at`."""
        return ObjectiveLoss(self.rows.at(tokens), self.weighted.at(tokens))

    def over(self, scale: Tensor) -> ObjectiveLoss:
        """See `RowLoss.over`."""
        return self._replace(weighted=self.weighted.over(scale))

    def values(self, state: Tensor) -> Tensor:
        """See `RowLoss.values`."""
        objective, seen = self.weighted.objective, self.rows.statistics(state)
        return objective.evaluate_with_report(seen, self.rows.vocab_size)

    def slope(self, state: Tensor, *, fold_factor: bool) -> Tensor:
        """See `RowLoss.slope`."""
        weight = self.weighted.slope_weight(fold_factor=fold_factor)
        seen = self.rows.statistics(state)
        return weighted_slopes(self.weighted.objective, state, seen, weight, self.rows.vocab_size)

    def finish(self, logits: Sequence[Tensor], out: Tensor, *, fold_factor: bool) -> Tensor:
        """See `RowLoss.finish`."""
        slope_weight = self.weighted.slope_weight(fold_factor=fold_factor)
        return finish_rows(logits[0], self.rows, self.weighted.objective, slope_weight, out).values

    def sizes(self, gradient_rows: Tensor) -> Tensor | None:
        """A row's slope is its gradient at the label's column.

        Unless a softcap is flat there, or the row is no multiple of `onehot_y - r`.
        """
        if self.rows.transform.softcap or any(self.rows.needs):
            return None
        column = self.rows.labels.clamp(0, gradient_rows.shape[1] - 1)[:, None]
        return gradient_rows.gather(1, column)[:, 0].abs().float()


class LogitsObjective(NamedTuple):
    """An objective of logits that exist as a whole.

    Attributes:
        losses: Weighted, `[n]`; `[2, n]` where the objective reports.
        gradient: `[n, V]`, or None if it is not wanted.
        row_scale: `[n]`, by which its rows are still to be multiplied; None for 1.
    """

    losses: Tensor
    gradient: Tensor | None
    row_scale: Tensor | None


def logits_objective(
    logits: Tensor, rows: RowProblem, weighted: Weighted, *, needs_gradient: bool
) -> LogitsObjective:
    """Losses and the gradient of logits `[n, V]`.

    float16 spans twelve decades, fewer than weights and denominators may: its rows are stored at a
    size of about 1, and each one's own scale waits in float32 for the upstream gradient.
    """
    out = empty_gradient(logits, rows.columns) if needs_gradient else None
    scaled_later = needs_gradient and logits.dtype == torch.float16
    slope_weight = weighted.slope_weight(fold_factor=True)
    row_scale = None
    found = finish_rows(
        real_columns(logits, rows.columns),
        rows,
        weighted.objective,
        slope_weight.sign() if scaled_later else slope_weight,
        None if out is None else real_columns(out, rows.columns),
        of_size_1=scaled_later,
    )
    if scaled_later:
        row_scale = slope_weight.abs()
        if found.sizes is not None:
            row_scale = row_scale * found.sizes
    if found.of_unread_is_0:
        losses = weighted.row_weight * found.values
    else:
        losses = weigh(weighted.row_weight, found.values)
    return LogitsObjective(losses, out, row_scale)


class FinishedRows(NamedTuple):
    """What `finish_rows` found beside gradients.

    Attributes:
        values: `f`, `[n]`; `[2, n]` where the objective reports.
        sizes: `[n]`, what gradient rows were divided by; None for 1.
        of_unread_is_0: Whether values are 0 where the weight is, whatever the row holds.
    """

    values: Tensor
    sizes: Tensor | None
    of_unread_is_0: bool


def finish_rows(
    logits: Tensor,
    rows: RowProblem,
    objective: Objective,
    slope_weight: Tensor,
    out: Tensor | None,
    *,
    of_size_1: bool = False,
) -> FinishedRows:
    """Values of rows that hold the whole vocabulary; their gradients into `out`.

    Args:
        logits: `[n, V]`; of a shard, its columns.
        rows: Labels and kernels.
        objective: `f`.
        slope_weight: `[n]`; what `f'` is multiplied by.
        out: `[n, V]`, or None for the values alone.
        of_size_1: Divide gradient rows by their sizes, where these are not of order 1 anyway.
    """
    swept = objective.sweep(rows.vocab_size)
    # A sweep knows a row when it has read it; a shard does when the others have answered.
    if rows.shard is None and swept.name in rows.kernels.swept_objectives:
        values = rows.kernels.log_odds_sweep(
            rows.tile(logits), slope_weight, swept.name, rows.vocab_size, out, swept.weights
        )
        return FinishedRows(values, None, of_unread_is_0=True)
    state = logits_state([logits], rows)
    seen, sizes = rows.statistics(state), None
    if out is not None:
        slope = weighted_slopes(objective, state, seen, slope_weight, rows.vocab_size)
        if of_size_1:
            sizes = finite_size(slope.abs() if slope.dim() == 1 else slope.abs().amax(0))
            slope = slope / sizes
        if rows.columns:
            rows.gradient([logits], 0, state, slope, out)
    values = objective.evaluate_with_report(seen, rows.vocab_size)
    return FinishedRows(values, sizes, of_unread_is_0=False)


LARGEST_IN_FLOAT16 = 1024.0
"""Of slopes that float16 rows hold: leaves as much as 64 below the largest finite number."""


def finite_size(size: Tensor) -> Tensor:
    """Sizes to divide by: 1 for those that are 0 or not finite."""
    return torch.where((size > 0) & (size < float("inf")), size, 1.0)


def float16_scale(slope: Tensor) -> Tensor:
    """0-d; what to divide slopes, or weights of slopes, by, where float16 rows will hold them.

    The largest finite one is then between 1 and `LARGEST_IN_FLOAT16`.
    """
    largest = finite_size(torch.where(slope.isfinite(), slope, 0.0).abs().amax())
    return torch.where(largest < 1, largest, (largest / LARGEST_IN_FLOAT16).clamp(min=1))


def weighted_slopes(
    objective: Objective, state: Tensor, seen: Statistics, slope_weight: Tensor, vocab_size: int
) -> Tensor:
    """The `row_slopes` of `slope_weight * f`, 0 for a row of weight 0, whatever it holds."""
    slope = objective.differentiate(seen, vocab_size)
    others = (None if each is None else weigh(slope_weight, each) for each in slope[1:])
    weighted = Statistics(weigh(slope_weight, slope.log_odds), *others)
    return statistics.row_slopes(state, seen.log_odds, weighted, vocab_size)
