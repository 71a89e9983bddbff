"""The operators on hidden states and an lm_head, which never hold all of the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from unilogit_kernels.fused_linear.compaction import (
    compacted_gradient,
    compacted_loss,
    compacted_values,
)
from unilogit_kernels.fused_linear.gemm import GemmDtypes
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.ops.arguments import (
    LossArguments,
    NeedsGradient,
    RowArguments,
    Saved,
    TokenRows,
    WeightedObjective,
    exact_dtype,
    loss_like,
    losses_like,
    total_of,
)
from unilogit_kernels.ops.fragments import Fragment, rebuilt
from unilogit_kernels.ops.heads import (
    HEAD,
    Head,
    HeadGradients,
    NeedsGradients,
    dtypes_of,
    linear_inputs,
)
from unilogit_kernels.ops.literal import gradients_of
from unilogit_kernels.ops.logits import has_literal, of_unit_slopes, wants_literal
from unilogit_kernels.ops.registration import Operator, operator
from unilogit_kernels.ops.scaling import scaled_gradients

H = TypeVar("H", bound=Fragment)
R = TypeVar("R", bound=RowArguments)
L = TypeVar("L", bound=LossArguments[Any])


class Active(NamedTuple):
    """Which rows count, bool `[n]`."""

    active: Tensor


class LinearValues(NamedTuple):
    """`Values`, and the logits of each model that are saved for the backward, 1-d."""

    values: Tensor
    column: Tensor
    state: Tensor
    saved: Tensor
    ref_kept: Tensor


class LinearUpstream(NamedTuple):
    """`Upstream`, and the logits that the forward saved."""

    state: Tensor
    slope: Tensor
    saved: Tensor
    ref_kept: Tensor


class _Forward(NamedTuple):
    state: Tensor
    saved: Tensor
    ref_kept: Tensor


# ---- values of rows ----------------------------------------------------------------------------


def linear_values_operator(
    name: str, heads: type[H], rows: type[R]
) -> Operator[[H, Active, R, LinearOptions, NeedsGradient], LinearValues]:
    """Define the operator of the values of rows, and the one of their gradients.

    Args:
        name: Of the first; the other one's is `<name>_backward`.
        heads: The operands of each model, first of the student.
        rows: What describes the rows.
    """

    @operator(
        f"{name}_backward",
        *(heads, Active, rows, LinearOptions, LinearUpstream, NeedsGradients),
        gives=HeadGradients,
    )
    def backward(
        heads: H,
        active: Active,
        rows: R,
        options: LinearOptions,
        upstream: LinearUpstream,
        needs: NeedsGradients,
    ) -> HeadGradients:
        models = list(heads)
        inputs = linear_inputs(models, options)
        saved = [upstream.saved, upstream.ref_kept][: len(models) // HEAD]
        gradients = compacted_gradient(
            inputs,
            active.active,
            rows.problem(inputs.hidden),
            needs.needs(),
            upstream.state,
            upstream.slope.contiguous(),
            saved,
        )
        return HeadGradients.of(gradients, models).finished(models)

    @backward.fake
    def _(
        heads: H,
        active: Active,
        rows: R,
        options: LinearOptions,
        upstream: LinearUpstream,
        needs: NeedsGradients,
    ) -> HeadGradients:
        return HeadGradients.like(needs, list(heads))

    backward.differentiable_no_more()

    @operator(name, heads, Active, rows, LinearOptions, NeedsGradient, gives=LinearValues)
    def values(
        heads: H, active: Active, rows: R, options: LinearOptions, needs: NeedsGradient
    ) -> LinearValues:
        rows.check_labels()
        inputs = linear_inputs(list(heads), options)
        problem = rows.problem(inputs.hidden)
        saved = inputs.new_saved(rows.columns, needs_grad=needs.needs_grad)
        found, state = compacted_values(inputs, active.active, problem, saved)
        return LinearValues(found, rows.column(state), state, *_pair(saved))

    @values.fake
    def _(
        heads: H, active: Active, rows: R, options: LinearOptions, needs: NeedsGradient
    ) -> LinearValues:
        inputs = linear_inputs(list(heads), options)
        saved = inputs.new_saved(rows.columns, needs_grad=needs.needs_grad)
        return LinearValues(*rows.values_like(inputs.hidden), *_pair(saved))

    class _Derivatives:
        operands: ClassVar[int] = HEAD

        @staticmethod
        def save(
            result: LinearValues,
            heads: H,
            active: Active,
            rows: R,
            options: LinearOptions,
            needs: NeedsGradient,
        ) -> Iterable[Fragment]:
            return heads, active, rows, options, _Forward(*result[2:])

        @staticmethod
        def backward(
            needs: Sequence[bool],
            slope: Tensor,
            heads: H,
            active: Active,
            rows: R,
            options: LinearOptions,
            saved: _Forward,
        ) -> Sequence[Tensor | None]:
            if wants_literal(rows):
                slope = torch.where(active.active, slope, 0.0)
                own, others = _own_and_others(heads)
                return gradients_of(
                    lambda *student: _literal([*student, *others], rows), own, needs, slope
                )
            upstream = LinearUpstream(saved.state, slope, saved.saved, saved.ref_kept)
            return tuple(
                backward(heads, active, rows, options, upstream, NeedsGradients.of_needs(needs))
            )

        @staticmethod
        def jvp(
            tangents: Sequence[Tensor | None],
            result: LinearValues,
            heads: H,
            active: Active,
            rows: R,
            options: LinearOptions,
            needs: NeedsGradient,
        ) -> Tensor | None:
            wider = _Wider(heads, tangents)
            wide = rebuilt(type(heads), wider.heads)
            nothing = result.saved.new_empty(0)

            def along(slope: Tensor) -> Tensor:
                upstream = LinearUpstream(result.state, slope, nothing, nothing)
                of_tokens = NeedsGradients.of_needs((True, False, False, True, False))
                found = backward(wide, active, rows, options, upstream, of_tokens)
                return wider.tangent(found)

            return of_unit_slopes(along, result.values)

    values.differentiable(_Derivatives)
    return values


class _Wider:
    """An lm_head whose hidden states' gradient also holds what a tangent of its weights needs.

    With hidden states `[h, 0]` and weights `[W, W']` the logits are the same, and the gradient of
    the added zeros is that of the logits times `W'`; likewise for the bias, and a low-rank term.
    """

    def __init__(self, heads: Fragment, tangents: Sequence[Tensor | None]) -> None:
        hidden, weight, bias, inner, up, *others = heads
        t_hidden, t_weight, t_bias, t_inner, t_up = tangents
        self._wide = _WiderFactor(hidden, weight, t_hidden, t_weight, t_bias)
        self._thin = None if inner is None else _WiderFactor(inner, up, t_inner, t_up)
        thin = (inner, up) if self._thin is None else self._thin.factors
        self.heads: list[Any] = [*self._wide.factors, bias, *thin, *others]

    def tangent(self, gradients: HeadGradients) -> Tensor:
        """The tangent of what the gradients of a token's operands belong to, `[n]`."""
        found = self._wide.tangent(gradients.hidden_grad)
        return found if self._thin is None else found + self._thin.tangent(gradients.inner_grad)


class _WiderFactor:
    """One product of a `_Wider` head: rows `[n, k]` and a weight `[V, k]`, and their tangents."""

    def __init__(
        self,
        rows: Tensor,
        weight: Tensor,
        t_rows: Tensor | None,
        t_weight: Tensor | None,
        t_bias: Tensor | None = None,
    ) -> None:
        self._rows, self._t_rows = rows, t_rows
        self._of_weight, self._of_bias = t_weight is not None, t_bias is not None
        more = [] if t_weight is None else [t_weight]
        if t_bias is not None:
            more.append(t_bias[:, None])
        if more:
            weight = torch.cat([weight, *more], 1)
            width = weight.shape[1] - rows.shape[1]
            rows = torch.cat([rows, rows.new_zeros(rows.shape[0], width)], 1)
        self.factors = rows, weight

    def tangent(self, gradient: Tensor) -> Tensor:
        """The tangent of what `gradient`, `[n, k']`, belongs to, `[n]`."""
        exact, k = exact_dtype(gradient), self._rows.shape[1]
        gradient = gradient.to(exact)
        found = gradient.new_zeros(gradient.shape[0])
        if self._t_rows is not None:
            found = found + (gradient[:, :k] * self._t_rows).sum(1)
        if self._of_weight:
            found = found + (gradient[:, k : 2 * k] * self._rows).sum(1)
        return found + gradient[:, -1] if self._of_bias else found


def _pair(saved: list[Tensor]) -> list[Tensor]:
    """What is saved of one model or of two as two tensors."""
    return saved if len(saved) > 1 else [*saved, saved[0].new_empty(0)]


def _own_and_others(heads: Fragment) -> tuple[list[Any], list[Any]]:
    """The operands of the student, and those of another one."""
    models = list(heads)
    return models[:HEAD], models[HEAD:]


def _literal(models: Sequence[Tensor | None], rows: RowArguments) -> Tensor:
    logits = []
    for i in range(0, len(models), HEAD):
        hidden, weight, bias, inner, up = models[i : i + HEAD]
        assert hidden is not None
        assert weight is not None
        z = torch.nn.functional.linear(hidden, weight, bias)
        if inner is not None and up is not None:
            z = z + torch.nn.functional.linear(inner, up)
        logits.append(z)
    return rows.literal(logits)


linear_log_odds = linear_values_operator("linear_log_odds", Head, TokenRows)


# ---- losses ------------------------------------------------------------------------------------


class LossOfHead(NamedTuple):
    """A reduced loss with its gradients.

    Attributes:
        loss: 0-d.
        losses: `[n]`, weighted; `[2, n]` where a part of them is reported.
        hidden_grad: See `HeadGradients`; as are the others.
        weight_grad: See there.
        bias_grad: See there.
        inner_grad: See there.
        up_grad: See there.
    """

    loss: Tensor
    losses: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    bias_grad: Tensor
    inner_grad: Tensor
    up_grad: Tensor


def linear_loss_operator(
    name: str, heads: type[H], rows: type[R], loss: type[L]
) -> Operator[[H, R, L, LinearOptions, NeedsGradients], LossOfHead]:
    """Define the operator of a reduced loss of rows, which finishes its gradients at once."""

    @operator(name, heads, rows, loss, LinearOptions, NeedsGradients, gives=LossOfHead)
    def reduced(
        heads: H, rows: R, loss: L, options: LinearOptions, needs: NeedsGradients
    ) -> LossOfHead:
        rows.check_labels()
        models = list(heads)
        inputs = linear_inputs(models, options)
        row_loss = loss.loss(rows.problem(inputs.hidden))
        losses, gradients = compacted_loss(inputs, row_loss, needs.needs())
        total = loss.factor * total_of(losses)
        return LossOfHead(total, losses, *HeadGradients.of(gradients, models))

    @reduced.fake
    def _(heads: H, rows: R, loss: L, options: LinearOptions, needs: NeedsGradients) -> LossOfHead:
        models = list(heads)
        hidden = models[0]
        dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
        gradients = HeadGradients.like(needs, models, dtypes)
        losses = losses_like(hidden, reports=loss.reports)
        return LossOfHead(loss_like(hidden), losses, *gradients)

    class _Derivatives:
        operands: ClassVar[int] = HEAD

        @staticmethod
        def save(
            result: LossOfHead,
            heads: H,
            rows: R,
            loss: L,
            options: LinearOptions,
            needs: NeedsGradients,
        ) -> Iterable[Fragment]:
            finished = HeadGradients(*result[2:])
            saved = Saved(result.loss, dtypes_of(list(heads)), rows.backend)
            return (
                finished,
                saved,
                *((heads, rows, loss) if has_literal(rows) else ()),
            )

        @staticmethod
        def backward(
            needs: Sequence[bool],
            upstream: Tensor,
            finished: HeadGradients,
            saved: Saved,
            *literal: Any,
        ) -> Sequence[Tensor | None]:
            if literal and torch.is_grad_enabled():
                heads, rows, loss = literal
                own, others = _own_and_others(heads)

                def total(*student: Tensor | None) -> Tensor:
                    values = _literal([*student, *others], rows)
                    found: Tensor = loss.literal(values, rows.vocab_size)
                    return found

                return gradients_of(total, own, needs, upstream)
            return scaled_gradients(finished, needs, upstream, saved)

        @staticmethod
        def jvp(tangents: Sequence[Tensor | None], result: Any, *fragments: Any) -> Tensor | None:
            return None  # `calls` takes the values of rows instead

    reduced.differentiable(_Derivatives)
    return reduced


linear_objective_loss = linear_loss_operator(
    "linear_objective_loss", Head, TokenRows, WeightedObjective
)
