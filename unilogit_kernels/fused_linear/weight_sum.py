"""The weight's gradient while it adds up over token chunks."""

from __future__ import annotations

from torch import Tensor

from unilogit_kernels.backends.memory import allocate
from unilogit_kernels.fused_linear.gemm import GemmDtypes

FIRST_SHARE = 64
"""1 / this of the sums in the gradient's own memory is narrowed through a copy, at the end: the
others move to where a part of them was, in one step for each doubling."""


class WeightSum:
    """Sums `[V, h]` in float32, as many as fit of them in the memory of the gradient itself.

    A gradient of 16-bit numbers holds the sums of half of its rows: so no more than the other half
    lies beside it.

    Args:
        gradient: `[V, h]`, contiguous, in `dtypes.results`; holds the gradient after `finish`.
        dtypes: Of the GEMMs.
    """

    def __init__(self, gradient: Tensor, dtypes: GemmDtypes) -> None:
        self._gradient, self._dtypes = gradient, dtypes
        v, h = gradient.shape
        exact = dtypes.exact
        inside = rows_inside(v, dtypes)
        memory = gradient.view(-1)[: inside * h * exact.itemsize // gradient.element_size()]
        self._parts = [(slice(0, inside), memory.view(exact).view(inside, h))]
        if inside < v:
            beside = allocate((v - inside, h), exact, gradient.device)
            self._parts.append((slice(inside, v), beside))

    def add(self, rows: Tensor, hidden: Tensor, *, first: bool) -> None:
        """Add `rows.T @ hidden`, of gradient rows `[tokens, V]`; the first ones begin the sums."""
        for columns, part in self._parts:
            if part.shape[0]:
                self._dtypes.multiply(rows[:, columns].t(), hidden, part, accumulate=not first)

    def finish(self) -> None:
        """Narrow the sums to the gradient, in which a part of them lies."""
        (_, inside), *beside = self._parts
        if inside.dtype == self._gradient.dtype:
            return
        count = inside.shape[0]
        done = -(-count // FIRST_SHARE)
        if count:
            self._gradient[:done] = inside[:done].to(self._gradient.dtype)
        while done < count:
            # Row i of the gradient lies where row i / 2 of the sums was.
            more = min(2 * done, count)
            self._gradient[done:more].copy_(inside[done:more])
            done = more
        for columns, part in beside:
            self._gradient[columns].copy_(part)


def rows_inside(v: int, dtypes: GemmDtypes) -> int:
    """How many rows' sums fit into a gradient of `v` rows."""
    return v * dtypes.results.itemsize // dtypes.exact.itemsize
