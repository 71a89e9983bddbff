"""The operators on logits: values of rows, and objectives finished in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from unilogit_kernels.ops.arguments import (
    Logits,
    LogitsGradient,
    NeedsGradient,
    RowArguments,
    Saved,
    TokenRows,
    Values,
    WeightedObjective,
    exact_dtype,
    gradient_like,
    loss_like,
    losses_like,
    total_of,
)
from unilogit_kernels.ops.fragments import Fragment, rebuilt
from unilogit_kernels.ops.literal import gradients_of
from unilogit_kernels.ops.registration import Operator, operator
from unilogit_kernels.ops.scaling import scaled_gradients
from unilogit_kernels.rows.objective import logits_objective
from unilogit_kernels.rows.whole import logits_gradient, logits_state

M = TypeVar("M", bound=Fragment)
R = TypeVar("R", bound=RowArguments)


class Upstream(NamedTuple):
    """What the gradient of `Values` takes: complete states, and the gradient of the values."""

    state: Tensor
    slope: Tensor


def has_literal(rows: RowArguments) -> bool:
    """Whether a backward that is differentiated itself may take the literal definition.

    Not where ranks share a vocabulary: none of them has the logits that the definition is of.
    """
    return rows.backend == "eager" and not rows.group


def wants_literal(rows: RowArguments) -> bool:
    """Whether this backward may be differentiated itself, by the literal definition."""
    return has_literal(rows) and torch.is_grad_enabled()


def values_operator(name: str, matrices: type[M], rows: type[R]) -> Operator[[M, R], Values]:
    """Define the operator of the values of rows, and the one of their gradient.

    Args:
        name: Of the first; the other one's is `<name>_backward`.
        matrices: Logits `[n, V]` of each model, first of the student.
        rows: What describes the rows.
    """

    @operator(f"{name}_backward", matrices, rows, Upstream, gives=LogitsGradient)
    def backward(logits: M, rows: R, upstream: Upstream) -> LogitsGradient:
        models = list(logits)
        return LogitsGradient(logits_gradient(models, rows.problem(models[0]), *upstream))

    @backward.fake
    def _(logits: M, rows: R, upstream: Upstream) -> LogitsGradient:
        student = next(iter(logits))
        return LogitsGradient(torch.empty_like(student, memory_format=torch.contiguous_format))

    backward.differentiable_no_more()

    @operator(name, matrices, rows, gives=Values)
    def values(logits: M, rows: R) -> Values:
        rows.check_labels()
        models = list(logits)
        problem = rows.problem(models[0])
        state = logits_state(models, problem)
        return Values(problem.values(state), rows.column(state), state)

    @values.fake
    def _(logits: M, rows: R) -> Values:
        return rows.values_like(next(iter(logits)))

    class _Derivatives:
        operands: ClassVar[int] = 1

        @staticmethod
        def save(result: Values, logits: M, rows: R) -> Iterable[Fragment]:
            return logits, rows, _State(result.state)

        @staticmethod
        def backward(
            needs: Sequence[bool], slope: Tensor, logits: M, rows: R, saved: _State
        ) -> Sequence[Tensor | None]:
            if wants_literal(rows):
                student, *others = logits
                return gradients_of(lambda z: rows.literal([z, *others]), [student], needs, slope)
            return backward(logits, rows, Upstream(saved.state, slope))

        @staticmethod
        def jvp(
            tangents: Sequence[Tensor | None], result: Values, logits: M, rows: R
        ) -> Tensor | None:
            (tangent,) = tangents
            assert tangent is not None
            student, *others = logits
            wide = rebuilt(matrices, [student.to(exact_dtype(student)), *others])

            def along(slope: Tensor) -> Tensor:
                gradient = backward(wide, rows, Upstream(result.state, slope)).logits_grad
                return (gradient * tangent).sum(-1)

            return of_unit_slopes(along, result.values)

    values.differentiable(_Derivatives)
    return values


class _State(NamedTuple):
    state: Tensor


def of_unit_slopes(along: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """The tangent of values, `[n]` or `[2, n]`, one value of a row at a time.

    Args:
        along: From an upstream gradient of the values to the tangent of what it selects, `[n]`.
        values: Of the forward.
    """
    if values.dim() == 1:
        return along(torch.ones_like(values))
    slopes = torch.eye(values.shape[0], dtype=values.dtype, device=values.device)
    return torch.stack([along(s[:, None].expand_as(values).contiguous()) for s in slopes])


log_odds = values_operator("log_odds", Logits, TokenRows)


# ---- objectives --------------------------------------------------------------------------------


class ObjectiveOfLogits(NamedTuple):
    """An objective's loss with its gradient.

    Attributes:
        loss: 0-d.
        losses: `[n]`, weighted; `[2, n]` where the objective reports.
        logits_grad: `[n, V]`, empty if it is not wanted.
        row_scale: `[n]`, by which float16 rows are still to be multiplied; empty for other dtypes.
    """

    loss: Tensor
    losses: Tensor
    logits_grad: Tensor
    row_scale: Tensor


@operator(
    "objective_loss", Logits, TokenRows, WeightedObjective, NeedsGradient, gives=ObjectiveOfLogits
)
def objective_loss(
    operand: Logits, rows: TokenRows, loss: WeightedObjective, needs: NeedsGradient
) -> ObjectiveOfLogits:
    """Losses and the gradient of logits, both in one pass over them."""
    rows.check_labels()
    logits, weighted = operand.logits, loss.weighted()
    found = logits_objective(
        logits, rows.problem(logits), weighted, needs_gradient=needs.needs_grad
    )
    return ObjectiveOfLogits(
        loss.factor * total_of(found.losses),
        found.losses,
        logits.new_empty(0) if found.gradient is None else found.gradient,
        loss.row_weight.new_empty(0) if found.row_scale is None else found.row_scale,
    )


@objective_loss.fake
def _(
    operand: Logits, rows: TokenRows, loss: WeightedObjective, needs: NeedsGradient
) -> ObjectiveOfLogits:
    logits = operand.logits
    scaled_later = logits.dtype == torch.float16 and needs.needs_grad
    return ObjectiveOfLogits(
        loss_like(logits),
        losses_like(logits, reports=loss.reports),
        gradient_like(needs.needs_grad, logits),
        gradient_like(scaled_later, losses_like(logits)),
    )


class _Finished(NamedTuple):
    gradient: Tensor
    row_scale: Tensor


class _ObjectiveDerivatives:
    operands: ClassVar[int] = 1

    @staticmethod
    def save(
        result: ObjectiveOfLogits,
        operand: Logits,
        rows: TokenRows,
        loss: WeightedObjective,
        needs: NeedsGradient,
    ) -> Iterable[Fragment]:
        finished = _Finished(result.logits_grad, result.row_scale)
        saved = Saved(result.loss, (operand.logits.dtype,), rows.backend)
        return (
            finished,
            saved,
            *((operand, rows, loss) if has_literal(rows) else ()),
        )

    @staticmethod
    def backward(
        needs: Sequence[bool], upstream: Tensor, finished: _Finished, saved: Saved, *literal: Any
    ) -> Sequence[Tensor | None]:
        if literal and torch.is_grad_enabled():
            operand, rows, loss = literal
            return gradients_of(
                lambda z: loss.literal(rows.literal([z]), rows.vocab_size), operand, needs, upstream
            )
        row_scale = finished.row_scale if saved.dtypes[0] == torch.float16 else None
        return scaled_gradients([finished.gradient], needs, upstream, saved, row_scale)

    @staticmethod
    def jvp(tangents: Sequence[Tensor | None], result: Any, *fragments: Any) -> Tensor | None:
        return None  # `calls` takes the values of rows instead


objective_loss.differentiable(_ObjectiveDerivatives)
