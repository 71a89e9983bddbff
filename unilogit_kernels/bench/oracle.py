"""What a problem's losses and gradients are in float64, in blocks, and how far others are off."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from unilogit_kernels import objectives
from unilogit_kernels.bench.problems import Problem

_BLOCK_ELEMENTS = 1 << 21
"""float64 elements of a temporary: 16 MiB, which the C library gives again without new pages."""
_WEIGHT_ELEMENTS = 1 << 28
"""float64 elements of weight gradients that are held, for all losses: 2 GiB."""
LOSSES = ("unilogit", "cross_entropy")


class Oracle:
    """Exact means of the losses and their gradients.

    With `d` the log-odds of the label, every gradient is `f'(d) * dd/dx`, so both losses share
    `dd/dhidden`. Where the weight's gradient is too large for two of them in float64, a fixed
    sample of its rows is compared: those of the labels, which carry most of the norm, and others
    at even distances.

    Args:
        problem: Whose results these are.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        shape = problem.shape
        self._softcap = shape.softcap
        self._rest, self._label_logits = self._statistics()
        log_odds = self._label_logits - self._rest
        self.losses: dict[str, float] = {}
        self._slopes: dict[str, Tensor] = {}
        for name in LOSSES:
            objective = objectives.REGISTRY[name]()
            self.losses[name] = objective.value(log_odds, shape.vocab_size).mean().item()
            self._slopes[name] = objective.slope(log_odds, shape.vocab_size) / shape.n

    def loss_error(self, name: str, loss: float) -> float:
        """Relative error of a mean loss."""
        return abs(loss - self.losses[name]) / abs(self.losses[name])

    @torch.no_grad()
    def gradient_error(self, name: str, gradients: list[Tensor]) -> float:
        """Largest relative error, in Frobenius norm, of the gradients of the trained operands."""
        if self._problem.shape.h is None:
            return self._logits_error(self._slopes[name], gradients[0])
        d_hidden, d_weight = self._linear[0] * self._slopes[name][:, None], self._linear[1][name]
        errors = [_relative(gradients[0].double() - d_hidden, d_hidden)]
        if d_weight is not None:
            difference = norm = 0.0
            size = max(1, _BLOCK_ELEMENTS // d_weight.shape[1])
            for rows, exact in zip(self.weight_rows.split(size), d_weight.split(size), strict=True):
                difference += (gradients[1][rows].double() - exact).square().sum().item()
                norm += exact.square().sum().item()
            errors.append(float((difference / norm) ** 0.5))
        return max(errors)

    @cached_property
    def weight_rows(self) -> Tensor:
        """The rows of the weight's gradient that are compared, in ascending order."""
        shape, labels = self._problem.shape, self._problem.labels
        held = _WEIGHT_ELEMENTS // (len(LOSSES) * (shape.h or 1))
        if held >= shape.vocab_size:
            return torch.arange(shape.vocab_size, device=labels.device)
        stride = -(-shape.vocab_size // max(1, held - shape.n))
        spread = torch.arange(0, shape.vocab_size, stride, device=labels.device)
        rows: Tensor = torch.cat([labels, spread]).unique()
        return rows

    # ---- blocks of float64 logits ------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Tokens, columns and logits `[tokens, columns]` after the cap."""
        shape = self._problem.shape
        if shape.h is None:
            size = max(1, _BLOCK_ELEMENTS // shape.vocab_size)
            for start in range(0, shape.n, size):
                tokens = slice(start, min(start + size, shape.n))
                logits = self._problem.operands[0].detach()[tokens].double()
                yield tokens, slice(0, shape.vocab_size), self._cap(logits)
            return
        hidden = self._problem.operands[0].detach().double()
        size = max(1, _BLOCK_ELEMENTS // max(shape.n, shape.h))
        for start in range(0, shape.vocab_size, size):
            columns = slice(start, min(start + size, shape.vocab_size))
            yield slice(0, shape.n), columns, self._cap(hidden @ self._weight(columns).t())

    def _weight(self, columns: slice) -> Tensor:
        return self._problem.operands[1].detach()[columns].double()

    def _cap(self, logits: Tensor) -> Tensor:
        return logits if self._softcap is None else (logits / self._softcap).tanh() * self._softcap

    def _labels_in(self, tokens: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Rows and columns, within a block, of the labels that lie in it."""
        labels = self._problem.labels[tokens]
        rows = ((labels >= columns.start) & (labels < columns.stop)).nonzero()[:, 0]
        return rows, labels[rows] - columns.start

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """`log sum_{j != y} exp z_j` and `z_y` of every token."""
        n, device = self._problem.shape.n, self._problem.labels.device
        rest = torch.full((n,), float("-inf"), dtype=torch.float64, device=device)
        label_logits = torch.empty(n, dtype=torch.float64, device=device)
        for tokens, columns, logits in self._blocks():
            at = self._labels_in(tokens, columns)
            label_logits[tokens][at[0]] = logits[at]
            logits = logits.index_put(at, torch.full_like(at[0], float("-inf"), dtype=rest.dtype))
            rest[tokens] = torch.logaddexp(rest[tokens], logits.logsumexp(-1))
        return rest, label_logits

    def _derivative(self, tokens: slice, columns: slice, logits: Tensor) -> Tensor:
        """`dd/dz` before the cap, of a block of logits after it: `onehot_y - r`, and the chain."""
        at = self._labels_in(tokens, columns)
        result = (logits - self._rest[tokens][:, None]).exp_().neg_()
        result[at] = 1.0
        return result if self._softcap is None else result * (1 - (logits / self._softcap) ** 2)

    @cached_property
    def _linear(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """`dd/dhidden`, and the weight's gradient in `weight_rows` by name of the loss."""
        shape, hidden = self._problem.shape, self._problem.operands[0].detach().double()
        d_hidden, rows = torch.zeros_like(hidden), self.weight_rows
        d_weight: dict[str, Tensor | None] = dict.fromkeys(LOSSES)
        if not shape.frozen_head:
            d_weight = {name: hidden.new_empty(len(rows), hidden.shape[1]) for name in LOSSES}
        for tokens, columns, logits in self._blocks():
            derivative = self._derivative(tokens, columns, logits)
            d_hidden.addmm_(derivative, self._weight(columns))
            held = slice(*torch.searchsorted(rows, rows.new_tensor([columns.start, columns.stop])))
            for name, gradient in d_weight.items():
                if gradient is not None:
                    part = derivative[:, rows[held] - columns.start]
                    gradient[held] = part.t() @ (hidden * self._slopes[name][:, None])
        return d_hidden, d_weight

    def _logits_error(self, slope: Tensor, gradient: Tensor) -> float:
        difference = norm = 0.0
        for tokens, columns, logits in self._blocks():
            exact = self._derivative(tokens, columns, logits) * slope[tokens][:, None]
            norm += exact.square().sum().item()
            difference += (gradient[tokens] - exact).square().sum().item()
        return float((difference / norm) ** 0.5)


def _relative(difference: Tensor, exact: Tensor) -> float:
    return float(difference.norm() / exact.norm())
