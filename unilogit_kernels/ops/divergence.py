"""The operators on two models' rows: schemas, fake kernels, autograd. No maths.

No operator has a gradient for the teacher. Those on logits recompute nothing but the gradient rows
in their backward; `linear_divergence_loss` finishes its gradients in the forward, where both
models' logits are at hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilogit_kernels import reference
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.fused_linear.compaction import (
    HeadInputs,
    LinearInputs,
    compacted_gradient,
    compacted_loss,
    compacted_values,
)
from unilogit_kernels.fused_linear.gemm import GemmDtypes, Needs
from unilogit_kernels.maths.divergence import Direction, Divergence
from unilogit_kernels.maths.rewrites import REWRITES
from unilogit_kernels.ops.registration import (
    NEEDS,
    OPTIONS,
    check_twice_differentiable,
    differentiable,
    fake,
    grad_of_some,
    gradient_outputs,
    gradient_shapes,
    linear_inputs,
    operator,
    scalar_of,
    scaled,
)
from unilogit_kernels.rows.contract import weigh
from unilogit_kernels.rows.divergence import PairLoss, PairProblem
from unilogit_kernels.rows.whole import logits_gradient, logits_state

PAIR = (
    "Tensor? labels, float scale, float softcap, float ref_scale, float ref_softcap, "
    "int vocab_size, str direction, str rewrite, float[] parameters, str backend"
)
"""What describes a pair of rows. Temperature is part of the scales and caps."""

_PAIR_ARGUMENTS = 10
_HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor ref_hidden, Tensor ref_weight, Tensor? ref_bias"
)
_HEAD_ARGUMENTS = 6
_OPTION_ARGUMENTS = 4


def _divergence(direction: Direction, rewrite: str, parameters: list[float]) -> Divergence:
    return Divergence(direction, REWRITES[rewrite](*parameters))


def _pair_problem(
    like: Tensor,
    labels: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    vocab_size: int,
    direction: Direction,
    rewrite: str,
    parameters: list[float],
    backend: str,
) -> PairProblem:
    """The arguments `PAIR` as the layers below take them; `like` has the rows."""
    labelled = labels is not None
    if labels is None:
        labels = like.new_full((like.shape[0],), -1, dtype=torch.int64)
    return PairProblem(
        labels,
        labelled,
        LogitTransform(scale, softcap),
        LogitTransform(ref_scale, ref_softcap),
        vocab_size,
        _divergence(direction, rewrite, parameters),
        registry.load_divergence(backend),
    )


def _literal_values(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None,
    scale: float,
    softcap: float,
    ref_scale: float,
    ref_softcap: float,
    vocab_size: int,
    direction: Direction,
    rewrite: str,
    parameters: list[float],
    backend: str,
) -> Tensor:
    """KL `[n]` by plain autograd; 0 for rows without a label."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = REWRITES[rewrite](*parameters)

    def transformed(x: Tensor, scale: float, softcap: float) -> Tensor:
        return reference.transform_logits(
            x.to(dtype), logit_scale=scale, softcap=softcap or None, vocab_size=vocab_size
        )

    student = transformed(logits, scale, softcap)
    teacher = transformed(ref_logits, ref_scale, ref_softcap)
    if labels is None:
        return reference.kl_divergence(student, teacher, direction=direction)
    valid = (labels >= 0) & (labels < vocab_size)
    values = reference.kl_divergence(
        student[valid], teacher[valid], labels[valid], rewrite=found, direction=direction
    )
    return student.new_zeros(labels.shape[0]).masked_scatter(valid, values)


# ---- logits ------------------------------------------------------------------------------------


@operator(f"divergence(Tensor logits, Tensor ref_logits, {PAIR}) -> (Tensor values, Tensor state)")
def _values(logits: Tensor, ref_logits: Tensor, *pair: Any) -> tuple[Tensor, Tensor]:
    problem = _pair_problem(logits, *pair)
    state = logits_state((logits, ref_logits), problem)
    return problem.values(state), state


@fake("divergence")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _values_of(logits)


def _values_of(like: Tensor) -> tuple[Tensor, Tensor]:
    """What values and states look like to a fake kernel."""
    n, dtype = like.shape[0], torch.promote_types(like.dtype, torch.float32)
    return like.new_empty(n, dtype=dtype), like.new_empty(7, n, dtype=dtype)


@operator(
    f"divergence_backward(Tensor logits, Tensor ref_logits, {PAIR}, Tensor state, Tensor upstream) "
    "-> Tensor logits_grad"
)
def _backward(logits: Tensor, ref_logits: Tensor, *args: Any) -> Tensor:
    *pair, state, upstream = args
    return logits_gradient((logits, ref_logits), _pair_problem(logits, *pair), state, upstream)


@fake("divergence_backward")
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, ref_logits, labels, *ctx.settings = inputs
    ctx.save_for_backward(logits, ref_logits, labels, output[1])
    ctx.set_materialize_grads(False)


def _grad(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    logits, ref_logits, labels, state = ctx.saved_tensors
    if upstream is None:
        return (None,)
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        values = _literal_values(logits, ref_logits, labels, *ctx.settings)
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            values, logits, upstream, create_graph=True
        )
        return found
    gradient = torch.ops.unilogit_kernels.divergence_backward(
        logits, ref_logits, labels, *ctx.settings, state, upstream
    )
    return (gradient,)


differentiable("divergence", _grad, _context)


# ---- fused linear, one value per token ---------------------------------------------------------


def _inputs(heads: tuple[Any, ...], options: tuple[Any, ...]) -> LinearInputs:
    """The arguments `_HEADS` and `OPTIONS` as the layers below take them."""
    hidden, weight, bias, *reference = heads
    inputs = linear_inputs(hidden, weight, bias, *options)
    return inputs._replace(reference=HeadInputs(*reference))


_FIRST_PAIR = _HEAD_ARGUMENTS + 1
_FIRST_OPTION = _FIRST_PAIR + _PAIR_ARGUMENTS
_AFTER_OPTIONS = _FIRST_OPTION + _OPTION_ARGUMENTS
"""Positions of the arguments of the next two operators; `active` is before the pair."""


def _described(args: tuple[Any, ...]) -> tuple[LinearInputs, Tensor, PairProblem]:
    """Their operands, which rows count, and the rows."""
    inputs = _inputs(args[:_HEAD_ARGUMENTS], args[_FIRST_OPTION:_AFTER_OPTIONS])
    problem = _pair_problem(args[0], *args[_FIRST_PAIR:_FIRST_OPTION])
    return inputs, args[_HEAD_ARGUMENTS], problem


@operator(
    f"linear_divergence({_HEADS}, Tensor active, {PAIR}, {OPTIONS}, bool needs_grad) "
    "-> (Tensor values, Tensor state, Tensor kept, Tensor ref_kept)"
)
def _linear_values(*args: Any) -> tuple[Tensor, ...]:
    inputs, active, problem = _described(args)
    kept = inputs.new_kept(problem.vocab_size, needs_grad=args[_AFTER_OPTIONS])
    return *compacted_values(inputs, active, problem, kept), *kept


@fake("linear_divergence")
def _(*args: Any) -> tuple[Tensor, ...]:
    inputs, _, problem = _described(args)
    kept = inputs.new_kept(problem.vocab_size, needs_grad=args[_AFTER_OPTIONS])
    return *_values_of(args[0]), *kept


@operator(
    f"linear_divergence_backward({_HEADS}, Tensor active, {PAIR}, {OPTIONS}, Tensor state, "
    f"Tensor kept, Tensor ref_kept, Tensor upstream, {NEEDS}) "
    "-> (Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = args[:2]
    state, kept, ref_kept, upstream, *needs = args[_AFTER_OPTIONS:]
    gradients = compacted_gradient(
        *_described(args), Needs(*needs), state, upstream, [kept, ref_kept]
    )
    return gradient_outputs(gradients, hidden, weight, finished=True)


@fake("linear_divergence_backward")
def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return gradient_shapes(args[-3:], hidden, weight)


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.settings = inputs[: _FIRST_PAIR + 1], inputs[_FIRST_PAIR + 1 : _FIRST_OPTION]
    ctx.options = inputs[_FIRST_OPTION:_AFTER_OPTIONS]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _linear_grad(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *tensors, state, kept, ref_kept = ctx.saved_tensors
    if upstream is None:
        return None, None, None
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        *heads, active, labels = tensors
        values = _literal_linear_values(heads, labels, ctx.settings)
        upstream = torch.where(active, upstream, 0.0)
        return tuple(grad_of_some(heads[:3], needs, values, upstream))
    gradients: tuple[Tensor, ...] = torch.ops.unilogit_kernels.linear_divergence_backward(
        *tensors,
        *ctx.settings,
        *ctx.options,
        state,
        kept,
        ref_kept,
        upstream.contiguous(),
        *needs,
    )
    return gradients


def _literal_linear_values(
    heads: list[Tensor | None], labels: Tensor | None, settings: tuple[Any, ...]
) -> Tensor:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = heads
    assert hidden is not None
    assert weight is not None
    assert ref_hidden is not None
    assert ref_weight is not None
    logits = torch.nn.functional.linear(hidden, weight, bias)
    ref_logits = torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias)
    return _literal_values(logits, ref_logits, labels, *settings)


differentiable("linear_divergence", _linear_grad, _linear_context)


# ---- fused linear, reduced ---------------------------------------------------------------------


@operator(
    f"linear_divergence_loss({_HEADS}, {PAIR}, Tensor row_weight, Tensor factor, {OPTIONS}, "
    f"{NEEDS}) -> (Tensor loss, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = args[:2]
    *pair, row_weight, factor = args[_HEAD_ARGUMENTS : -_OPTION_ARGUMENTS - 3]
    inputs = _inputs(args[:_HEAD_ARGUMENTS], args[-_OPTION_ARGUMENTS - 3 : -3])
    loss = PairLoss(_pair_problem(hidden, *pair), row_weight, factor)
    losses, gradients = compacted_loss(inputs, loss, Needs(*args[-3:]))
    return (
        factor * losses.sum(),
        *gradient_outputs(gradients, hidden, weight),
    )


@fake("linear_divergence_loss")
def _(hidden: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    return (
        scalar_of(hidden),
        *gradient_shapes(args[-3:], hidden, weight, dtypes),
    )


def _loss_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    heads, (labels, *settings) = inputs[:_HEAD_ARGUMENTS], inputs[_HEAD_ARGUMENTS:]
    ctx.settings = settings[: _PAIR_ARGUMENTS - 1]
    row_weight, factor = settings[_PAIR_ARGUMENTS - 1 : _PAIR_ARGUMENTS + 1]
    literal = (*heads, labels, row_weight, factor)
    if ctx.settings[-1] != "eager":
        literal = (None,) * len(literal)
    ctx.dtype = heads[0].dtype
    ctx.save_for_backward(*literal, *output[1:])
    ctx.set_materialize_grads(False)


def _loss_grad(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    *literal, d_hidden, d_weight, d_bias = ctx.saved_tensors
    if upstream is None:
        return None, None, None
    needs = ctx.needs_input_grad[:3]
    if torch.is_grad_enabled():
        check_twice_differentiable(ctx.settings[-1])
        *heads, labels, row_weight, factor = literal
        values = _literal_linear_values(heads, labels, ctx.settings)
        loss = factor * weigh(row_weight, values).sum()
        return tuple(grad_of_some(heads[:3], needs, loss, upstream))
    return tuple(
        scaled(gradient, upstream, ctx.dtype, ctx.settings[-1]) if need else None
        for gradient, need in zip((d_hidden, d_weight, d_bias), needs, strict=True)
    )


differentiable("linear_divergence_loss", _loss_grad, _loss_context)
