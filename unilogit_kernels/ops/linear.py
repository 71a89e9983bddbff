"""The operators on hidden states and an lm_head, which never hold all of the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilogit_kernels.compaction import (
    compacted_gradient,
    compacted_log_odds,
    compacted_objective,
)
from unilogit_kernels.ops.registration import (
    LIBRARY,
    NEEDS,
    ROWS,
    WEIGHTED,
    check_twice_differentiable,
    fake,
    literal_log_odds,
    literal_objective,
    operator,
    or_empty,
    row_problem,
    scalar_of,
    scaled,
    shape_of,
    weighted_objective,
)
from unilogit_kernels.projection import GemmDtypes, Needs

# ---- log-odds of a fused linear ----------------------------------------------------------------

_LINEAR = "Tensor hidden, Tensor weight, Tensor? bias"


@operator(f"linear_log_odds({_LINEAR}, Tensor active, {ROWS}) -> (Tensor log_odds, Tensor state)")
def _linear_log_odds(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, *rows: Any
) -> tuple[Tensor, Tensor]:
    problem = row_problem(*rows)
    return compacted_log_odds(hidden, weight, bias, active, problem)


@fake("linear_log_odds")
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n = hidden.shape[0]
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(3, n, dtype=dtype)


@operator(
    f"linear_log_odds_backward({_LINEAR}, {ROWS}, Tensor state, Tensor slope, {NEEDS}) "
    "-> (Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_log_odds_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *rows, state, slope, need_hidden, need_weight, need_bias = args
    needs = Needs(need_hidden, need_weight, need_bias)
    gradients = compacted_gradient(hidden, weight, bias, row_problem(*rows), needs, state, slope)
    return (
        or_empty(gradients.hidden, hidden).to(hidden.dtype),
        or_empty(gradients.weight, weight).to(weight.dtype),
        or_empty(gradients.bias, weight).to(weight.dtype),
    )


@fake("linear_log_odds_backward")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = args[-3:]
    return (
        shape_of(need_hidden, hidden),
        shape_of(need_weight, weight),
        shape_of(need_bias, weight[:, 0]),
    )


def _linear_log_odds_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    hidden, weight, bias, _, labels, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[1])
    ctx.set_materialize_grads(False)


def _linear_log_odds_grad(ctx: Any, slope: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, state = ctx.saved_tensors
    rest = (None,) * 6
    if slope is None:
        return None, None, None, *rest
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        logits = torch.nn.functional.linear(hidden, weight, bias)
        d, valid = literal_log_odds(logits, labels, *ctx.settings)
        return *_grad_of_some((hidden, weight, bias), needs, d, slope[valid]), *rest
    gradients = torch.ops.unilogit_kernels.linear_log_odds_backward(
        hidden, weight, bias, labels, *ctx.settings, state, slope.contiguous(), *needs
    )
    return *_wanted(gradients, needs), *rest


def _wanted(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _grad_of_some(
    inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], output: Tensor, upstream: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients of `output` for the inputs that want one, None for the others."""
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(output, wanted, upstream, create_graph=True))
    return [next(found) if need else None for need in needs]


torch.library.register_autograd(
    "unilogit_kernels::linear_log_odds",
    _linear_log_odds_grad,
    setup_context=_linear_log_odds_context,
    lib=LIBRARY,
)


# ---- objectives of a fused linear --------------------------------------------------------------


@operator(
    f"linear_objective_loss({_LINEAR}, {ROWS}, {WEIGHTED}, {NEEDS}) "
    "-> (Tensor loss, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_objective_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, weighted, needs = row_problem(*args[:5]), weighted_objective(*args[5:9]), Needs(*args[9:])
    loss, gradients = compacted_objective(hidden, weight, bias, rows, needs, weighted)
    return (
        loss,
        or_empty(gradients.hidden, hidden),
        or_empty(gradients.weight, weight),
        or_empty(gradients.bias, weight),
    )


@fake("linear_objective_loss")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = args[-3:]
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    return (
        scalar_of(hidden),
        shape_of(need_hidden, hidden, dtypes.results),
        shape_of(need_weight, weight, dtypes.results),
        shape_of(need_bias, weight[:, 0], dtypes.exact),
    )


def _linear_objective_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    hidden, weight, bias, labels, *ctx.settings = inputs[:8]
    row_weight, factor, *ctx.objective = inputs[8:12]
    literal = (hidden, weight, bias, labels, row_weight)
    if ctx.settings[-1] != "eager":
        literal = (None,) * 5
    ctx.dtype = hidden.dtype
    ctx.save_for_backward(*literal, factor, *output[1:])
    ctx.set_materialize_grads(False)


def _linear_objective_grad(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, row_weight, factor, *gradients = ctx.saved_tensors
    rest = (None,) * 12
    if upstream is None:
        return None, None, None, *rest
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        logits = torch.nn.functional.linear(hidden, weight, bias)
        loss = literal_objective(logits, labels, row_weight, factor, *ctx.objective, *ctx.settings)
        return *_grad_of_some((hidden, weight, bias), needs, loss, upstream), *rest
    results = [
        scaled(gradient, upstream, ctx.dtype, ctx.settings[-1]) if need else None
        for gradient, need in zip(gradients, needs, strict=True)
    ]
    return *results, *rest


torch.library.register_autograd(
    "unilogit_kernels::linear_objective_loss",
    _linear_objective_grad,
    setup_context=_linear_objective_context,
    lib=LIBRARY,
)
