"""Fused linear calls on two models: rows that cannot matter are dropped before the first GEMM."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from unilogit_kernels import pair_state
from unilogit_kernels.divergence.loops import PairLoop, plan_pair
from unilogit_kernels.divergence.pairs import PairProblem
from unilogit_kernels.loops import Gradients
from unilogit_kernels.memory import allocate
from unilogit_kernels.projection import GemmDtypes, LinearHead, Needs
from unilogit_kernels.selection import active_index

_NOTHING = Needs(False, False, False)


class HeadInputs(NamedTuple):
    """A model's operands: hidden states `[n, h]`, lm_head `[V, h]`, bias `[V]` or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def dtypes(self) -> GemmDtypes:
        """The dtypes around its GEMMs."""
        return GemmDtypes.of(self.hidden.dtype, self.hidden.device.type)

    def head(self, index: Tensor | None) -> LinearHead:
        """The lm_head on the rows `index`, or on all of them."""
        hidden = self.hidden if index is None else self.hidden[index]
        return LinearHead(hidden.to(self.dtypes.operands), self.weight, self.bias, self.dtypes)


def linear_values(
    student: HeadInputs, teacher: HeadInputs, active: Tensor, pair: PairProblem
) -> tuple[Tensor, Tensor]:
    """KL `[n]` and states `[7, n]`; rows that are not active get 0 and an empty state."""
    n, device, dtype = student.hidden.shape[0], student.hidden.device, student.dtypes.exact
    values = student.hidden.new_zeros(n, dtype=dtype)
    state = pair_state.empty_state(n, device, dtype)
    index = active_index(active)
    if _is_empty(n, index):
        return values, state
    loop = _loop(student, teacher, pair, index, _NOTHING, visits=1)
    part = loop.statistics()
    if index is None:
        return loop.pair.values(part), part
    state[:, index] = part
    return values.index_copy_(0, index, loop.pair.values(part)), state


def linear_gradients(
    student: HeadInputs,
    teacher: HeadInputs,
    pair: PairProblem,
    needs: Needs,
    state: Tensor,
    weight: Tensor,
) -> Gradients:
    """Gradients of `sum_i weight_i KL_i` from states, for the rows whose weight is not 0."""
    index = active_index(weight != 0)
    gradients = _allocate(student, pair.vocab_size, needs, weight.numel(), index)
    if not _is_empty(weight.numel(), index):
        loop = _loop(student, teacher, pair, index, needs, visits=1)
        if index is not None:
            state, weight = state[:, index], weight[index]
        loop.gradients(state, weight, gradients)
    return _spread(gradients, student, index)


def linear_loss(
    student: HeadInputs,
    teacher: HeadInputs,
    pair: PairProblem,
    needs: Needs,
    row_weight: Tensor,
    factor: Tensor,
) -> tuple[Tensor, Gradients]:
    """`factor * sum_i w_i KL_i` (0-d) and its gradients, from the rows whose weight is not 0."""
    n, index = row_weight.numel(), active_index(row_weight != 0)
    gradients = _allocate(student, pair.vocab_size, needs, n, index)
    if _is_empty(n, index):
        return factor.new_zeros(()), _spread(gradients, student, index)
    loop = _loop(student, teacher, pair, index, needs, visits=2)
    if index is not None:
        row_weight = row_weight[index]
    fold = student.dtypes.rows_hold_factor
    values = loop.finish(row_weight * factor if fold else row_weight, gradients)
    if not fold:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)
    return factor * (row_weight * values).sum(), _spread(gradients, student, index)


def _loop(
    student: HeadInputs,
    teacher: HeadInputs,
    pair: PairProblem,
    index: Tensor | None,
    needs: Needs,
    *,
    visits: int,
) -> PairLoop:
    heads = student.head(index), teacher.head(index)
    plan = plan_pair(*heads, pair.vocab_size, needs, visits=visits)
    return PairLoop(*heads, pair if index is None else pair.at(index), plan)


def _is_empty(n: int, index: Tensor | None) -> bool:
    return n == 0 or (index is not None and index.numel() == 0)


def _allocate(
    student: HeadInputs, vocab_size: int, needs: Needs, n: int, index: Tensor | None
) -> Gradients:
    """Gradients to be written, hidden's for the active rows; zeros if there is none."""
    results, exact = student.dtypes.results, student.dtypes.exact
    device, rows = student.hidden.device, n if index is None else index.numel()
    hidden = weight = bias = None
    if needs.hidden:
        hidden = allocate((rows, student.hidden.shape[1]), results, device)
    if needs.weight:
        weight = allocate(student.weight.shape, results, device)
        weight[0 if _is_empty(n, index) else vocab_size :] = 0
    if needs.bias:
        bias = student.weight.new_zeros(student.weight.shape[0], dtype=exact)
    return Gradients(hidden, weight, bias)


def _spread(gradients: Gradients, student: HeadInputs, index: Tensor | None) -> Gradients:
    if index is None or gradients.hidden is None:
        return gradients
    full = gradients.hidden.new_zeros(student.hidden.shape)
    return gradients._replace(hidden=full.index_copy_(0, index, gradients.hidden))
