"""The operators that torch sees: schemas, fake kernels, autograd. No maths.

Four forward operators and two backward ones, in the namespace `unilogit_kernels`. An operator that
computes an objective finishes the gradients in its forward, where the logits are at hand; its
backward only scales them. The log-odds operators keep the row state and recompute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unilogit_kernels import backends, chunking, objectives, reference, row_state
from unilogit_kernels.backends import LogitTransform
from unilogit_kernels.chunking import RowProblem, Weighted
from unilogit_kernels.projection import GemmDtypes, Needs

_LIBRARY = torch.library.Library("unilogit_kernels", "DEF")

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The Python function behind each operator, so that `testing` can watch what it allocates."""

_ROWS = "Tensor labels, float scale, float softcap, int vocab_size, str backend"
_WEIGHTED = "Tensor row_weight, Tensor factor, str objective, float[] parameters"
_NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"


def _operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator `schema`, for every device."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        _LIBRARY.define(schema)

        def run(*args: Any) -> Any:
            # A GEMM in here has chosen its dtypes; autocast would change them.
            with torch.autocast(_device_type(args), enabled=False):
                return function(*args)

        key = "CompositeExplicitAutograd"
        _LIBRARY.impl(name, run, key)
        IMPLEMENTATIONS[f"unilogit_kernels::{name}"] = run
        return function

    return decorate


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what the operator returns for tensors without data."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"unilogit_kernels::{name}", function, lib=_LIBRARY)
        return function

    return decorate


def _device_type(args: tuple[Any, ...]) -> str:
    return next(a.device.type for a in args if isinstance(a, Tensor))


def _rows(
    labels: Tensor, scale: float, softcap: float, vocab_size: int, backend: str
) -> RowProblem:
    return RowProblem(labels, LogitTransform(scale, softcap), vocab_size, backends.load(backend))


def _weighted(
    row_weight: Tensor, factor: Tensor, objective: str, parameters: list[float]
) -> Weighted:
    return Weighted(objectives.REGISTRY[objective](*parameters), row_weight, factor)


def _or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors; an unwanted gradient is an empty one."""
    return like.new_empty(0) if gradient is None else gradient


def _shape_of(gradient_wanted: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(
        like.shape if gradient_wanted else (0,), dtype=dtype or like.dtype, device=like.device
    )


# ---- log-odds of logits ------------------------------------------------------------------------


@_operator(f"log_odds(Tensor logits, {_ROWS}) -> (Tensor log_odds, Tensor state)")
def _log_odds(logits: Tensor, *rows: Any) -> tuple[Tensor, Tensor]:
    problem = _rows(*rows)
    state = chunking.logits_state(logits, problem)
    return row_state.log_odds(state, problem.labels, problem.vocab_size), state


@_fake("log_odds")
def _(logits: Tensor, *rows: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    n = logits.shape[0]
    return logits.new_empty(n, dtype=dtype), logits.new_empty(3, n, dtype=dtype)


@_operator(
    f"log_odds_backward(Tensor logits, {_ROWS}, Tensor state, Tensor slope) -> Tensor logits_grad"
)
def _log_odds_backward(logits: Tensor, *args: Any) -> Tensor:
    *rows, state, slope = args
    return chunking.logits_gradient(logits, _rows(*rows), state, slope.contiguous())


@_fake("log_odds_backward")
def _(logits: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _log_odds_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *ctx.settings = inputs
    ctx.save_for_backward(logits, labels, output[1])
    ctx.set_materialize_grads(False)


def _log_odds_grad(ctx: Any, slope: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    logits, labels, state = ctx.saved_tensors
    rest = (None,) * 5
    if slope is None:
        return None, *rest
    if torch.is_grad_enabled():
        _check_twice_differentiable(ctx.settings[-1])
        d, valid = _literal_log_odds(logits, labels, *ctx.settings)
        return *torch.autograd.grad(d, logits, slope[valid], create_graph=True), *rest
    gradient = torch.ops.unilogit_kernels.log_odds_backward(
        logits, labels, *ctx.settings, state, slope
    )
    return gradient, *rest


torch.library.register_autograd(
    "unilogit_kernels::log_odds", _log_odds_grad, setup_context=_log_odds_context, lib=_LIBRARY
)


def _check_twice_differentiable(backend: str) -> None:
    if backend != "eager":
        raise RuntimeError(
            f"backend {backend!r} computes first derivatives only; for a double backward "
            "(create_graph=True) pass backend='eager'"
        )


def _literal_log_odds(
    logits: Tensor, labels: Tensor, scale: float, softcap: float, vocab_size: int, backend: str
) -> tuple[Tensor, Tensor]:
    """The log-odds of the rows with a label by plain autograd, and which rows these are."""
    valid = (labels >= 0) & (labels < vocab_size)
    d = reference.target_log_odds(
        logits[valid].to(torch.promote_types(logits.dtype, torch.float32)),
        labels[valid],
        softcap=softcap or None,
        logit_scale=scale,
        vocab_size=vocab_size,
    )
    return d, valid


# ---- log-odds of a fused linear ----------------------------------------------------------------

_LINEAR = "Tensor hidden, Tensor weight, Tensor? bias"


@_operator(f"linear_log_odds({_LINEAR}, Tensor active, {_ROWS}) -> (Tensor log_odds, Tensor state)")
def _linear_log_odds(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor, *rows: Any
) -> tuple[Tensor, Tensor]:
    problem = _rows(*rows)
    return chunking.compacted_log_odds(hidden, weight, bias, active, problem)


@_fake("linear_log_odds")
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    n = hidden.shape[0]
    return hidden.new_empty(n, dtype=dtype), hidden.new_empty(3, n, dtype=dtype)


@_operator(
    f"linear_log_odds_backward({_LINEAR}, {_ROWS}, Tensor state, Tensor slope, {_NEEDS}) "
    "-> (Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_log_odds_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *rows, state, slope, need_hidden, need_weight, need_bias = args
    needs = Needs(need_hidden, need_weight, need_bias)
    gradients = chunking.compacted_gradient(hidden, weight, bias, _rows(*rows), needs, state, slope)
    return (
        _or_empty(gradients.hidden, hidden).to(hidden.dtype),
        _or_empty(gradients.weight, weight).to(weight.dtype),
        _or_empty(gradients.bias, weight).to(weight.dtype),
    )


@_fake("linear_log_odds_backward")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = args[-3:]
    return (
        _shape_of(need_hidden, hidden),
        _shape_of(need_weight, weight),
        _shape_of(need_bias, weight[:, 0]),
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
        _check_twice_differentiable(ctx.settings[-1])
        logits = torch.nn.functional.linear(hidden, weight, bias)
        d, valid = _literal_log_odds(logits, labels, *ctx.settings)
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
    lib=_LIBRARY,
)


# ---- objectives of logits ----------------------------------------------------------------------


@_operator(
    f"objective_loss(Tensor logits, {_ROWS}, {_WEIGHTED}, bool needs_grad) "
    "-> (Tensor loss, Tensor logits_grad)"
)
def _objective_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    rows, weighted, needs_gradient = _rows(*args[:5]), _weighted(*args[5:9]), args[9]
    loss, gradient = chunking.logits_objective(
        logits, rows, weighted, needs_gradient=needs_gradient
    )
    return loss, _or_empty(gradient, logits)


@_fake("objective_loss")
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _scalar_of(logits), _shape_of(args[-1], logits)


def _scalar_of(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))


def _objective_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *ctx.settings = inputs[:6]
    row_weight, factor, *ctx.objective = inputs[6:10]
    literal = (logits, labels, row_weight) if ctx.settings[-1] == "eager" else (None,) * 3
    ctx.dtype = logits.dtype
    ctx.save_for_backward(*literal, factor, output[1])
    ctx.set_materialize_grads(False)


def _objective_grad(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    logits, labels, row_weight, factor, gradient = ctx.saved_tensors
    rest = (None,) * 10
    if upstream is None:
        return None, *rest
    if torch.is_grad_enabled():
        _check_twice_differentiable(ctx.settings[-1])
        loss = _literal_objective(logits, labels, row_weight, factor, *ctx.objective, *ctx.settings)
        return *torch.autograd.grad(loss, logits, upstream, create_graph=True), *rest
    if ctx.dtype == torch.float16:
        upstream = upstream * factor
    return _scaled(gradient, upstream, ctx.dtype), *rest


def _literal_objective(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    factor: Tensor,
    objective: str,
    parameters: list[float],
    *settings: Any,
) -> Tensor:
    d, valid = _literal_log_odds(logits, labels, *settings)
    function = _weighted(row_weight, factor, objective, parameters).objective
    values: Tensor = function(d, settings[2])
    weight = row_weight[valid]
    return factor * torch.where(weight == 0, 0.0, weight * values).sum()


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """`upstream * gradient` in `dtype`, never in place, so that a second backward is equal.

    Where it costs no synchronisation, an upstream gradient of exactly 1 costs nothing: the saved
    tensor itself is handed on, unless the graph is kept for another backward.
    """
    if (
        not torch.compiler.is_compiling()
        and upstream.device.type == "cpu"
        and gradient.dtype == dtype
        and not torch._C._autograd._get_current_graph_task_keep_graph()
        and upstream.item() == 1.0
    ):
        return gradient
    return (gradient * upstream).to(dtype)


torch.library.register_autograd(
    "unilogit_kernels::objective_loss",
    _objective_grad,
    setup_context=_objective_context,
    lib=_LIBRARY,
)


# ---- objectives of a fused linear --------------------------------------------------------------


@_operator(
    f"linear_objective_loss({_LINEAR}, {_ROWS}, {_WEIGHTED}, {_NEEDS}) "
    "-> (Tensor loss, Tensor hidden_grad, Tensor weight_grad, Tensor bias_grad)"
)
def _linear_objective_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, weighted, needs = _rows(*args[:5]), _weighted(*args[5:9]), Needs(*args[9:])
    loss, gradients = chunking.compacted_objective(hidden, weight, bias, rows, needs, weighted)
    return (
        loss,
        _or_empty(gradients.hidden, hidden),
        _or_empty(gradients.weight, weight),
        _or_empty(gradients.bias, weight),
    )


@_fake("linear_objective_loss")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = args[-3:]
    dtypes = GemmDtypes.of(hidden.dtype, hidden.device.type)
    return (
        _scalar_of(hidden),
        _shape_of(need_hidden, hidden, dtypes.results),
        _shape_of(need_weight, weight, dtypes.results),
        _shape_of(need_bias, weight[:, 0], dtypes.exact),
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
        _check_twice_differentiable(ctx.settings[-1])
        logits = torch.nn.functional.linear(hidden, weight, bias)
        loss = _literal_objective(logits, labels, row_weight, factor, *ctx.objective, *ctx.settings)
        return *_grad_of_some((hidden, weight, bias), needs, loss, upstream), *rest
    scaled = [
        _scaled(gradient, upstream, ctx.dtype) if need else None
        for gradient, need in zip(gradients, needs, strict=True)
    ]
    return *scaled, *rest


torch.library.register_autograd(
    "unilogit_kernels::linear_objective_loss",
    _linear_objective_grad,
    setup_context=_linear_objective_context,
    lib=_LIBRARY,
)
