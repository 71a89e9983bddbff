"""Derivatives of operators: one level of autograd around a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from unilogit_kernels.ops.fragments import Fragment, save, saved

Fragments = tuple[Fragment, ...]
Below = Callable[[Fragments], Any]
"""An operator below one of its levels of autograd, from its fragments to its result."""


class Derivatives(Protocol):
    """The derivatives of an operator's first result by its first arguments; others have none.

    Attributes:
        operands: How many arguments these are.
    """

    operands: ClassVar[int]

    @staticmethod
    def save(result: Any, *fragments: Any) -> Iterable[Fragment]:
        """What the backward needs, which is handed on to `backward`."""

    @staticmethod
    def backward(needs: Sequence[bool], upstream: Tensor, *saved: Any) -> Sequence[Tensor | None]:
        """The operands' gradients; those that are not wanted are dropped."""

    @staticmethod
    def jvp(tangents: Sequence[Tensor | None], result: Any, *fragments: Any) -> Tensor | None:
        """The first result's tangent of those of the operands; None if that is not supported."""


class Called(Protocol):
    """An operator, as its derivatives need it."""

    name: str

    def needing(self, fragments: Fragments, needs: Sequence[bool]) -> Fragments:
        """With what autograd needs switched on, where the operator is told."""

    def output(self, result: Any) -> Any:
        """What torch expects of an operator that returns `result`: a tensor, or several."""


class Call(NamedTuple):
    """A call of an operator with derivatives, as the autograd function below takes it.

    Attributes:
        operator: Which.
        derivatives: Its.
        fragments: Its arguments.
        below: Calls it at the next level.
        tangents: Whether forward-mode AD carries one of its operands.
        results: Where the result is left, if the output is its first tensor alone: what has no
            gradient needs no autograd, which takes a step for each tensor. None if all of it has
            to pass, as transforms want it.
    """

    operator: Called
    derivatives: type[Derivatives]
    fragments: Fragments
    below: Below
    tangents: bool
    results: list[Any] | None


class _Differentiable(_SingleLevelFunction):
    """One level of autograd, of torch's own or of a transform of `torch.func`.

    It runs behind the dispatcher, which has unwrapped the levels above; hence it is not an
    `autograd.Function`, which would do so itself and can't without a `setup_context`.
    """

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Tensor | None) -> Any:
        operator, derivatives, fragments, below, tangents, results = call
        fragments = operator.needing(fragments, ctx.needs_input_grad[_BESIDE:])
        result = below(fragments)
        ctx.operator, ctx.derivatives = operator, derivatives
        if results is not None:
            results.append(result)
            output = result[0]
        else:
            output = operator.output(result)
            if type(output) is tuple:
                ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        save(ctx, derivatives.save(result, *fragments))
        if tangents:
            ctx.of_jvp = result, fragments
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, upstream = ctx.needs_input_grad[_BESIDE:], gradients[0]
        found: Sequence[Tensor | None] = [None] * len(needs)
        if upstream is not None:
            found = ctx.derivatives.backward(needs, upstream, *saved(ctx))
        wanted = (g if need else None for g, need in zip(found, needs, strict=True))
        return *(None,) * _BESIDE, *wanted

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        result, fragments = ctx.of_jvp
        del ctx.of_jvp
        tangent = ctx.derivatives.jvp(tangents[_BESIDE:], result, *fragments)
        if tangent is None:
            raise _no_forward_ad(ctx.operator.name)
        others = len(list(result)) - 1
        return (tangent, *(None,) * others) if others else tangent


_BESIDE = 1
"""Arguments of `_Differentiable.forward` before the operands."""


class _FirstDerivative(_SingleLevelFunction):
    """A derivative that depends on `anchors`, but can't be differentiated by them."""

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(ctx: Any, compute: Callable[[], Any], name: str, *anchors: Tensor) -> Any:
        ctx.name = name
        return compute()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"unilogit_kernels::{ctx.name} computes first derivatives only; for a double backward "
            "(create_graph=True) pass backend='eager', which knows reverse mode over reverse mode "
            "where no ranks share the vocabulary"
        )

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise _no_forward_ad(ctx.name)


def first_derivatives_only(
    compute: Callable[[], Any], name: str, anchors: Iterable[Tensor | None]
) -> Any:
    """`compute()`, attached to the graph of the `anchors`: to differentiate it again is an error.

    Args:
        compute: Of tensors, what the backward of an operator returns.
        name: Of the operator.
        anchors: What the result depends on.
    """
    return _apply(_FirstDerivative, compute, name, *anchors)


def differentiable(call: Call, operands: Iterable[Tensor | None]) -> Any:
    """The output of a call, attached to the graph of its operands."""
    return _apply(_Differentiable, call, *operands)


def _apply(function: type[_SingleLevelFunction], *args: Any) -> Any:
    apply: Callable[..., Any] = function.apply  # type: ignore[attr-defined]  # of a base in C++
    if not torch._C._are_functorch_transforms_active():
        return apply(*args)
    with enable_single_level_autograd_function():
        return apply(*args)


def any_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD carries a tangent of one of these."""
    level = forward_ad._current_level
    return level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x, level=level).tangent is not None
        for x in tensors
    )


def requires_grad(operands: Sequence[Tensor | None]) -> bool:
    """Whether the graph has to see an operation on these."""
    if torch.is_grad_enabled():
        for x in operands:
            if x is not None and x.requires_grad:
                return True
    return False


def _no_forward_ad(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"Trying to use forward AD with unilogit_kernels::{name} that does not support it because "
        "it has not been implemented yet. Of these losses forward AD knows first derivatives only."
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_of_functorch = torch._C._functorch


def is_of_numbers(tensor: Tensor) -> bool:
    """Whether it lies in memory: it is of no class of somebody's, and no transform wraps it."""
    return (
        type(tensor) in _PLAIN_TYPES
        and (tensor.is_cpu or tensor.is_cuda)
        and not _of_functorch.is_functorch_wrapped_tensor(tensor)
        and not _of_functorch.is_legacy_batchedtensor(tensor)
    )
