"""The operators on hidden states and an lm_head, which never hold all of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilogit_kernels.fused_linear.compaction import (
    compacted_gradient,
    compacted_loss,
    compacted_values,
)
from unilogit_kernels.fused_linear.gemm import GemmDtypes, Needs
from unilogit_kernels.maths.row_state import has_runner_up
from unilogit_kernels.ops.registration import (
    NEEDS,
    OPTIONS,
    ROWS,
    VALUES,
    WEIGHTED,
    check_twice_differentiable,
    differentiable,
    fake,
    grad_of_some,
    gradient_outputs,
    gradient_shapes,
    linear_inputs,
    literal_objective,
    literal_values,
    losses_of,
    operator,
    row_problem,
    scalar_of,
    scaled,
    values_of,
    values_outputs,
    weighted_objective,
)
from unilogit_kernels.rows.objective import ObjectiveLoss

# ---- log-odds of a fused linear ----------------------------------------------------------------

_LINEAR = "Tensor hidden, Tensor weight, Tensor? bias"


@operator(
    f"linear_log_odds({_LINEAR}, Tensor active, {ROWS}, {OPTIONS}, bool needs_grad, "
    f"bool runner_up) -> ({VALUES}, Tensor kept)"
)
def _linear_log_odds(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    rows = row_problem(*args[:5], runner_up=args[10])
    inputs = linear_inputs(hidden, weight, bias, *args[5:9])
    kept = inputs.new_kept(rows.vocab_size, needs_grad=args[9])
    values, state = compacted_values(inputs, active, rows, kept)
    return *values_outputs(values, state, rows.labels), *kept


@fake("linear_log_odds")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    inputs = linear_inputs(hidden, weight, bias, *args[5:9])
    kept = inputs.new_kept(args[3], needs_grad=args[9])
    return *values_of(hidden, runner_up=args[10]), *kept


@operator(
    f"linear_log_odds_backward({_LINEAR}, Tensor active, {ROWS}, {OPTIONS}, Tensor state, "
    f"Tensor kept, Tensor slope, {NEEDS}) "
    "-> (Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_log_odds_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    state, kept, slope, *needs = args[9:]
    rows = row_problem(*args[:5], runner_up=has_runner_up(state))
    inputs = linear_inputs(hidden, weight, bias, *args[5:9])
    gradients = compacted_gradient(inputs, active, rows, Needs(*needs), state, slope, [kept])
    return gradient_outputs(gradients, hidden, weight, finished=True)


@fake("linear_log_odds_backward")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_shapes(args[-3:], hidden, weight)


def _linear_log_odds_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, active, labels, *ctx.settings = inputs[:9]
    ctx.options = inputs[9:13]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, weight, bias, active, labels, *output[2:])
    ctx.set_materialize_grads(False)


def _linear_log_odds_grad(ctx: Any, slope: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, active, labels, state, kept = ctx.saved_tensors
    if slope is None:
        return None, None, None
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        logits = torch.nn.functional.linear(hidden, weight, bias)
        runner_up = has_runner_up(state)
        values, valid = literal_values(logits, labels, *ctx.settings, runner_up=runner_up)
        return tuple(grad_of_some((hidden, weight, bias), needs, values, slope[..., valid]))
    gradients: tuple[Tensor, ...] = torch.ops.unilogit_kernels.linear_log_odds_backward(
        hidden,
        weight,
        bias,
        active,
        labels,
        *ctx.settings,
        *ctx.options,
        state,
        kept,
        slope,
        *needs,
    )
    return gradients


differentiable("linear_log_odds", _linear_log_odds_grad, _linear_log_odds_context)


# ---- objectives of a fused linear --------------------------------------------------------------


@operator(
    f"linear_objective_loss({_LINEAR}, {ROWS}, {WEIGHTED}, {OPTIONS}, {NEEDS}) "
    "-> (Tensor loss, Tensor losses, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_objective_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    described = args[:-3]
    weighted = weighted_objective(*described[5:-4])
    rows = row_problem(*described[:5], runner_up=weighted.objective.needs_runner_up)
    inputs = linear_inputs(hidden, weight, bias, *described[-4:])
    losses, gradients = compacted_loss(inputs, ObjectiveLoss(rows, weighted), Needs(*args[-3:]))
    return (
        weighted.factor * losses.sum(),
        losses,
        *gradient_outputs(gradients, hidden, weight),
    )


@fake("linear_objective_loss")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    return (
        scalar_of(hidden),
        losses_of(hidden),
        *gradient_shapes(args[-3:], hidden, weight, dtypes),
    )


def _linear_objective_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    hidden, weight, bias, labels, *ctx.settings = inputs[:8]
    row_weight, factor, *ctx.objective, tensors = inputs[8:-7]
    literal = (hidden, weight, bias, labels, row_weight, *tensors)
    if ctx.settings[-1] != "eager":
        literal = (None,) * len(literal)
    ctx.dtype = hidden.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(factor, *output[2:], *literal)
    ctx.set_materialize_grads(False)


def _linear_objective_grad(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # asked for once, as activation checkpointing wants it
    factor, *gradients = saved[:4]
    hidden, weight, bias, labels, row_weight, *tensors = saved[4:]
    if upstream is None:
        return None, None, None
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        logits = torch.nn.functional.linear(hidden, weight, bias)
        objective = (*ctx.objective, tensors)
        loss = literal_objective(logits, labels, row_weight, factor, objective, ctx.settings)
        return tuple(grad_of_some((hidden, weight, bias), needs, loss, upstream))
    return tuple(
        scaled(gradient, upstream, ctx.dtype, ctx.settings[-1]) if need else None
        for gradient, need in zip(gradients, needs, strict=True)
    )


differentiable("linear_objective_loss", _linear_objective_grad, _linear_objective_context)
