"""The contract that each backend fulfils: row kernels and nothing else.

GEMMs, chunking, autograd, validation and objectives live above it and are shared. Kernels take
tensors as they are; whether a backend may run on a device is the registry's business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.maths.row_state import PLAIN, RowNeeds


class LogitTransform(NamedTuple):
    """What a model does to the output of its lm_head: `z = softcap * tanh(scale * x / softcap)`.

    The scale comes first and the cap second, as in Gemma 2 (cap), Cohere (scale) and Granite
    (scale is 1 / logits_scaling).

    Attributes:
        scale: Factor on the raw logits.
        softcap: Bound of the tanh cap in logits, or 0.0 for none.
    """

    scale: float = 1.0
    softcap: float = 0.0

    def at_temperature(self, temperature: float) -> LogitTransform:
        """The transform whose result is `z / temperature`.

        No kernel needs a temperature of its own:
        `softcap * tanh(scale * x / softcap) / T` is the transform of `scale / T` and `softcap / T`.
        """
        return LogitTransform(self.scale / temperature, self.softcap / temperature)


class Tile(NamedTuple):
    """Rows of one model's logits, over some columns of the vocabulary.

    Attributes:
        logits: `[n, v]`, any strides.
        labels: int64 `[n]`, contiguous, counted in the whole vocabulary. A label outside these
            columns is simply not among them (it may be in another tile, or be `ignore_index`).
        first_column: Where in the vocabulary these columns begin.
        transform: What the model does to the raw logits.
    """

    logits: Tensor
    labels: Tensor
    first_column: int = 0
    transform: LogitTransform = LogitTransform()

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.logits.device


class TilePair(NamedTuple):
    """Rows of two models' logits over the same columns, to be compared: KL(P_a || P_b) per token.

    `a` is the distribution that weights the sum, `b` the other one; which of them is the student's
    is the caller's business. They may differ in dtype (float32, bfloat16 or float16 each).

    Attributes:
        a: `[n, v]`, any strides.
        b: The same.
        labels: As of a `Tile`; -1 is in no column, so that both rests are the whole rows.
        first_column: As of a `Tile`.
        a_transform: What is done to the raw logits of a.
        b_transform: The same for b.
    """

    a: Tensor
    b: Tensor
    labels: Tensor
    first_column: int = 0
    a_transform: LogitTransform = LogitTransform()
    b_transform: LogitTransform = LogitTransform()

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.a.device


class RowKernels(ABC):
    """What a backend implements; it holds no data.

    Each row of a state, of slopes and of coefficients is contiguous.

    Attributes:
        name: Name of the backend.
        swept_objectives: Names of the objectives that `log_odds_sweep` takes; others take two
            passes.
        scales_in_place: Whether it has `scale_`.
    """

    name: str
    swept_objectives: frozenset[str] = frozenset()
    scales_in_place: bool = False

    @abstractmethod
    def log_odds_update(self, tile: Tile, state: Tensor, needs: RowNeeds = PLAIN) -> None:
        """Fold a tile into `state` (see `row_state`), in place; one read.

        `state` has the rows of `needs`. The runner-up's column is that of the transformed logits,
        counted in the whole vocabulary, in whatever order columns are folded; in a row that is NaN
        it may be any. Rows of a general state that nobody needs stay as they are:

        - `RUNNER_UP` is written where `needs.runner_up` is set, `COUNT` and `LINEAR` where `mean`
          is, `DOT` where `entropy` or `variance` is, and `SQUARE` where `variance` is.
        """

    @abstractmethod
    def log_odds_gradient(self, tile: Tile, state: Tensor, slope: Tensor, out: Tensor) -> None:
        """Write `slope_i * (1[j == y_i] - r_ij) * dz/dx` into `out`; one read, one write.

        `r_ij = exp(z_ij - max_i) / sum_i` comes from the complete `state`: subtracting a rounded
        `rest_lse` instead would cost a digit for every decade of the logits' common offset.
        `out` is `[n, v]`, any strides, of the logits' dtype or another float dtype; it may be the
        tile's logits. A row whose slope is exactly 0 becomes exactly 0, whatever its logits hold.

        With a state of four rows `slope` is `[3, n]` (`statistics.row_slopes`): the slope of the
        rest, and the entries (but for dz/dx) of the label and of the state's column. A row of
        three zeros becomes exactly 0.

        With a state of all rows it is `[5, n]`: `rest, at_label, at_runner_up, tilt, uniform`. With
        `s_j = z_j - max_i`, where a maximum of -inf is taken as 0 and a sum of 0 as 1, the row is

            out_j = (uniform - r_ij (rest + tilt s_j)) dz/dx

        off the label and the state's column, if that is one. The product with `r_ij` is 0 where
        `exp(s_j)` is 0, also where `s_j` is infinite. A row of five zeros becomes exactly 0.
        """

    def log_odds_sweep(
        self,
        tile: Tile,
        row_weight: Tensor,
        objective: str,
        vocab_size: int,
        out: Tensor | None,
        weights: Sequence[float] = (),
    ) -> Tensor:
        """Statistics, objective and gradient of whole rows: their second read is cached.

        Args:
            tile: The whole vocabulary. A label outside of it gives NaN.
            row_weight: `[n]`, contiguous. A row of weight exactly 0 is not read: its value and its
                gradient row are 0.
            objective: One of `swept_objectives`.
            vocab_size: The V of the objective.
            out: `[n, V]`; receives the rows of `log_odds_gradient` for the slopes
                `row_weight * f'(d)`. It may be the tile's logits, or None for the loss alone.
            weights: Of `"weighted_statistics"`, five: with `a, b, c, e, k` its value is
                `a softplus(-d) + b U + c L^2 + e H + k` (`statistics`). A weight of 0 leaves its
                term out, also where that is infinite.

        Returns:
            The unweighted values `f(d)`, float32 `[n]`; `[2, n]` with `c L^2` where there is a
            weight c.
        """
        raise NotImplementedError(f"the {self.name} backend sweeps no objective")

    @abstractmethod
    def divergence_update(self, pair: TilePair, state: Tensor) -> None:
        """Fold a pair into `state` (`[7, n]`, see `pair_state`), in place; one read each."""

    @abstractmethod
    def divergence_gradient(
        self,
        pair: TilePair,
        state: Tensor,
        coefficients: Tensor,
        student: Literal["a", "b"],
        out: Tensor,
    ) -> None:
        """Write the gradient rows of the student's logits into `out`; one read each, one write.

        With `s_j = a_j - a_max`, `t_j = b_j - b_max` from the complete `state` (a maximum of -inf
        is taken as 0) and row i's `alpha, beta, gamma, at_label` (`coefficients`, `[4, n]`):

            out_j = (exp(s_j) (alpha + beta (s_j - t_j)) + gamma exp(t_j)) dz/dx   for j != y
            out_y = at_label dz/dx

        where dz/dx is the derivative of the transform of the row that `student` names. The first
        term is 0 where `exp(s_j)` is 0, and a beta of exactly 0 leaves the difference out, also
        where it is infinite. Both terms are rounded before they are added (no fused multiply-add
        over that sum), so that equal rows with `alpha = -gamma` give exactly 0.

        `out` is `[n, v]`, any strides, any float dtype of the three; it may be the student's logits
        themselves. A row whose four coefficients are exactly 0 becomes exactly 0, whatever its
        logits hold.
        """

    def scale_(self, values: Tensor, factor: Tensor) -> None:
        """`values *= factor` in place, rounded once; nothing is moved where it is exactly 1.

        `values` is contiguous; `factor` is one float on the same device, which alone knows it.
        """
        raise NotImplementedError(f"the {self.name} backend scales nothing in place")
