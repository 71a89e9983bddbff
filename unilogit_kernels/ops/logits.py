"""The operators on logits: the log-odds, and objectives finished in one visit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilogit_kernels.maths.row_state import has_runner_up
from unilogit_kernels.ops.registration import (
    ROWS,
    VALUES,
    WEIGHTED,
    check_twice_differentiable,
    differentiable,
    fake,
    literal_objective,
    literal_values,
    losses_of,
    operator,
    or_empty,
    row_problem,
    scalar_of,
    scaled,
    shape_of,
    values_of,
    values_outputs,
    weighted_objective,
)
from unilogit_kernels.rows.objective import logits_objective
from unilogit_kernels.rows.whole import logits_gradient, logits_state

# ---- log-odds of logits ------------------------------------------------------------------------


@operator(f"log_odds(Tensor logits, {ROWS}, bool runner_up) -> ({VALUES})")
def _log_odds(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *rows, runner_up = args
    problem = row_problem(*rows, runner_up=runner_up)
    state = logits_state([logits], problem)
    return values_outputs(problem.values(state), state, problem.labels)


@fake("log_odds")
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return values_of(logits, runner_up=args[-1])


@operator(
    f"log_odds_backward(Tensor logits, {ROWS}, Tensor state, Tensor slope) -> Tensor logits_grad"
)
def _log_odds_backward(logits: Tensor, *args: Any) -> Tensor:
    *rows, state, slope = args
    problem = row_problem(*rows, runner_up=has_runner_up(state))
    return logits_gradient([logits], problem, state, slope)


@fake("log_odds_backward")
def _(logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _log_odds_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.settings, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, labels, output[2])
    ctx.set_materialize_grads(False)


def _log_odds_grad(ctx: Any, slope: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    logits, labels, state = ctx.saved_tensors
    if slope is None:
        return (None,)
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        runner_up = has_runner_up(state)
        values, valid = literal_values(logits, labels, *ctx.settings, runner_up=runner_up)
        return tuple(torch.autograd.grad(values, logits, slope[..., valid], create_graph=True))
    gradient = torch.ops.unilogit_kernels.log_odds_backward(
        logits, labels, *ctx.settings, state, slope
    )
    return (gradient,)


differentiable("log_odds", _log_odds_grad, _log_odds_context)


# ---- objectives of logits ----------------------------------------------------------------------


@operator(
    f"objective_loss(Tensor logits, {ROWS}, {WEIGHTED}, bool needs_grad) "
    "-> (Tensor loss, Tensor losses, Tensor logits_grad)"
)
def _objective_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *described, needs_gradient = args
    weighted = weighted_objective(*described[5:])
    rows = row_problem(*described[:5], runner_up=weighted.objective.needs_runner_up)
    losses, gradient = logits_objective(logits, rows, weighted, needs_gradient=needs_gradient)
    return weighted.factor * losses.sum(), losses, or_empty(gradient, logits)


@fake("objective_loss")
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return scalar_of(logits), losses_of(logits), shape_of(args[-1], logits)


def _objective_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.settings = inputs[:6]
    row_weight, factor, *ctx.objective, tensors, _ = inputs[6:]
    literal = (logits, labels, row_weight, *tensors)
    if ctx.settings[-1] != "eager":
        literal = (None,) * len(literal)
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(factor, output[2], *literal)
    ctx.set_materialize_grads(False)


def _objective_grad(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    factor, gradient, logits, labels, row_weight, *tensors = ctx.saved_tensors
    if upstream is None:
        return (None,)
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        objective = (*ctx.objective, tensors)
        loss = literal_objective(logits, labels, row_weight, factor, objective, ctx.settings)
        return tuple(torch.autograd.grad(loss, logits, upstream, create_graph=True))
    if ctx.dtype == torch.float16:
        upstream = upstream * factor
    return (scaled(gradient, upstream, ctx.dtype, ctx.settings[-1]),)


differentiable("objective_loss", _objective_grad, _objective_context)
