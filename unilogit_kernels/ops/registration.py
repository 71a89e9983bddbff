"""How an operator is registered, and what the operators' arguments mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unilogit_kernels import objectives, reference
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.fused_linear.budget import LinearOptions
from unilogit_kernels.fused_linear.compaction import LinearInputs
from unilogit_kernels.fused_linear.gemm import GemmDtypes
from unilogit_kernels.fused_linear.tiles import Gradients
from unilogit_kernels.maths import row_state
from unilogit_kernels.maths.row_state import Statistics
from unilogit_kernels.rows.contract import weigh
from unilogit_kernels.rows.objective import RowProblem, Weighted

LIBRARY = torch.library.Library("unilogit_kernels", "DEF")

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The Python function behind each operator, so that `testing` can watch what it allocates."""

ROWS = "Tensor labels, float scale, float softcap, int vocab_size, str backend"
WEIGHTED = "Tensor row_weight, Tensor factor, str objective, float[] parameters, Tensor[] tensors"
OPTIONS = "int memory_budget, float skip_below, bool compact, ScalarType? logits_dtype"
VALUES = "Tensor log_odds, Tensor column, Tensor state"
NEEDS = "bool needs_hidden, bool needs_weight, bool needs_bias"


def operator(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator `schema`, for every device."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        LIBRARY.define(schema)

        def run(*args: Any) -> Any:
            # A GEMM in here has chosen its dtypes; autocast would change them.
            with torch.autocast(_device_type(args), enabled=False):
                return function(*args)

        key = "CompositeExplicitAutograd"
        LIBRARY.impl(name, run, key)
        IMPLEMENTATIONS[f"unilogit_kernels::{name}"] = run
        return function

    return decorate


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as what the operator returns for tensors without data."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"unilogit_kernels::{name}", function, lib=LIBRARY)
        return function

    return decorate


def differentiable(
    name: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Give an operator a gradient, as `torch.library.register_autograd` does in more host time.

    torch's own walks the arguments of an operator with a list of tensors as a tree, several times
    a step; on a few rows that takes as long as the kernels.

    Args:
        name: The operator.
        backward: From the context and the results' gradients to those of the first arguments, of
            which those that are not wanted are dropped; the others have none.
        setup_context: From the context, the arguments and the results; saves what backward needs.
    """
    overload = getattr(torch.ops.unilogit_kernels, name).default

    def forward(ctx: Any, *args: Any) -> Any:
        *flat, sizes = args
        inputs = _nested(flat, sizes)
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*inputs)
        ctx.arguments = len(args)
        setup_context(ctx, inputs, output)
        return output

    def backward_all(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        first = backward(ctx, *gradients)
        wanted = (g if n else None for g, n in zip(first, ctx.needs_input_grad, strict=False))
        return *wanted, *(None,) * (ctx.arguments - len(first))

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_all)}
    function: Any = type(f"{name}_function", (torch.autograd.Function,), functions)

    def run(*args: Any) -> Any:
        flat, sizes = _flat(args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in flat):
            return function.apply(*flat, sizes)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    LIBRARY.impl(name, run, "Autograd")


def _flat(args: tuple[Any, ...]) -> tuple[list[Any], list[int]]:
    """The arguments with lists of tensors spread out, and each one's length, -1 for no list."""
    flat: list[Any] = []
    sizes: list[int] = []
    for argument in args:
        if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
            flat += argument
            sizes.append(len(argument))
        else:
            flat.append(argument)
            sizes.append(-1)
    return flat, sizes


def _nested(flat: list[Any], sizes: list[int]) -> tuple[Any, ...]:
    """The inverse of `_flat`."""
    rest = iter(flat)
    return tuple(next(rest) if n < 0 else [next(rest) for _ in range(n)] for n in sizes)


def _device_type(args: tuple[Any, ...]) -> str:
    return next(a.device.type for a in args if isinstance(a, Tensor))


def row_problem(
    labels: Tensor,
    scale: float,
    softcap: float,
    vocab_size: int,
    backend: str,
    *,
    runner_up: bool = False,
) -> RowProblem:
    """The arguments `ROWS` as the layers below take them."""
    transform = LogitTransform(scale, softcap)
    return RowProblem(labels, transform, vocab_size, registry.load(backend), runner_up)


def weighted_objective(row_weight: Tensor, factor: Tensor, *packed: Any) -> Weighted:
    """The arguments `WEIGHTED` as the layers below take them."""
    return Weighted(objectives.unpack(*packed), row_weight, factor)


def linear_inputs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    memory_budget: int,
    skip_below: float,
    compact: bool,
    logits_dtype: torch.dtype | None,
) -> LinearInputs:
    """Operands and the arguments `OPTIONS` as the layers below take them."""
    options = LinearOptions(memory_budget, skip_below, compact)
    return LinearInputs(hidden, weight, bias, logits_dtype, options)


def or_empty(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Operators return tensors; an unwanted gradient is an empty one."""
    return like.new_empty(0) if gradient is None else gradient


def shape_of(gradient_wanted: bool, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What a gradient looks like to a fake kernel: empty if it is not wanted."""
    return torch.empty(
        like.shape if gradient_wanted else (0,), dtype=dtype or like.dtype, device=like.device
    )


def grad_of_some(
    inputs: Sequence[Tensor | None], needs: Sequence[bool], output: Tensor, upstream: Tensor
) -> list[Tensor | None]:
    """Differentiable gradients of `output` for the inputs that want one, None for the others."""
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
    found = iter(torch.autograd.grad(output, wanted, upstream, create_graph=True))
    return [next(found) if need else None for need in needs]


def gradient_outputs(
    gradients: Gradients, hidden: Tensor, weight: Tensor, *, finished: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of an lm_head's operands as an operator returns them.

    Args:
        gradients: Those that are wanted.
        hidden: `[n, h]`.
        weight: `[V, h]`.
        finished: Whether they leave in the operands' dtypes; else in those they were added up in.
    """
    found = [or_empty(g, x) for g, x in zip(gradients, (hidden, weight, weight), strict=True)]
    if finished:
        found = [g.to(x.dtype) for g, x in zip(found, (hidden, weight, weight), strict=True)]
    return found[0], found[1], found[2]


def gradient_shapes(
    needs: Sequence[bool], hidden: Tensor, weight: Tensor, dtypes: GemmDtypes | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `gradient_outputs` looks like to a fake kernel; `dtypes` where it is not finished."""
    return (
        shape_of(needs[0], hidden, dtypes and dtypes.results),
        shape_of(needs[1], weight, dtypes and dtypes.results),
        shape_of(needs[2], weight[:, 0], dtypes and dtypes.exact),
    )


def scalar_of(like: Tensor) -> Tensor:
    """What a loss looks like to a fake kernel."""
    return like.new_empty((), dtype=torch.promote_types(like.dtype, torch.float32))


def losses_of(like: Tensor) -> Tensor:
    """What the losses of the rows of `like` look like to a fake kernel."""
    return like.new_empty(like.shape[0], dtype=torch.promote_types(like.dtype, torch.float32))


def values_outputs(values: Tensor, state: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs `VALUES`.

    Log-odds are `[n]`, and there is no column. With the runner-up its `log p` is a second row,
    `[2, n]`, and its column int64 `[n]`.
    """
    if not row_state.has_runner_up(state):
        return values, labels.new_empty(0), state
    return values, row_state.runner_up(state, labels), state


def values_of(like: Tensor, *, runner_up: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What these look like to a fake kernel, for the rows of `like`."""
    n, dtype = like.shape[0], torch.promote_types(like.dtype, torch.float32)
    return (
        like.new_empty((2, n) if runner_up else (n,), dtype=dtype),
        like.new_empty(n if runner_up else 0, dtype=torch.int64),
        like.new_empty(4 if runner_up else 3, n, dtype=dtype),
    )


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """`upstream * gradient` in `dtype`, at no cost where the upstream gradient is exactly 1.

    The saved gradient is handed on itself, scaled in place where the backend can, but only if this
    backward frees the graph: a graph that is kept will want it again, as it was.
    """
    if (
        not torch.compiler.is_compiling()
        and gradient.dtype == dtype
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        kernels = registry.scale_kernels(registry.load(backend))
        if kernels is not None:
            kernels.scale_(gradient, upstream)
            return gradient
        if upstream.device.type == "cpu" and upstream.item() == 1.0:
            return gradient
    return (gradient * upstream).to(dtype)


# ---- the literal definition, for the eager backend's double backward ---------------------------


def check_twice_differentiable(backend: str) -> None:
    """Raise unless the backend is the one that runs the literal definition."""
    if backend != "eager":
        raise RuntimeError(
            f"backend {backend!r} computes first derivatives only; for a double backward "
            "(create_graph=True) pass backend='eager'"
        )


def literal_values(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float,
    vocab_size: int,
    backend: str,
    *,
    runner_up: bool,
) -> tuple[Tensor, Tensor]:
    """The values of the rows with a label by plain autograd, and which rows these are."""
    valid = (labels >= 0) & (labels < vocab_size)
    logits = logits[valid].to(torch.promote_types(logits.dtype, torch.float32))
    transform: dict[str, Any] = {
        "softcap": softcap or None,
        "logit_scale": scale,
        "vocab_size": vocab_size,
    }
    values = reference.target_log_odds(logits, labels[valid], **transform)
    if runner_up:
        log_prob = reference.runner_up_log_prob(logits, labels[valid], **transform)
        values = torch.stack((values, log_prob))
    return values, valid


def literal_objective(
    logits: Tensor,
    labels: Tensor,
    row_weight: Tensor,
    factor: Tensor,
    objective: tuple[str, list[float], Sequence[Tensor]],
    settings: tuple[Any, ...],
) -> Tensor:
    """The loss of logits by plain autograd."""
    function = objectives.unpack(*objective)
    values, valid = literal_values(logits, labels, *settings, runner_up=function.needs_runner_up)
    losses = function.at(valid).of_rows(Statistics.of(values), settings[2])
    return factor * weigh(row_weight[valid], losses).sum()
