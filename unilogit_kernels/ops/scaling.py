"""Finished gradients, scaled by what the backward brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends import registry
from unilogit_kernels.ops.arguments import Saved, exact_dtype
from unilogit_kernels.ops.derivatives import is_of_numbers
from unilogit_kernels.ops.registration import operator

ROWS_AT_A_TIME = 1 << 20
"""Elements whose float32 copies exist at a time where rows are scaled one by one: 4 MiB."""


class Scaling(NamedTuple):
    """A finished gradient, what it is multiplied by, and the loss that it belongs to."""

    gradient: Tensor
    factor: Tensor
    loss: Tensor
    dtype: torch.dtype | None


class Scaled(NamedTuple):
    """A gradient as a backward returns it."""

    scaled: Tensor


@operator("scaled_gradient", Scaling, gives=Scaled)
def scaled_gradient(scaling: Scaling) -> Scaled:
    """The gradient where its graph is kept: by the loss it has no derivative, which is an error."""
    return Scaled(_product(scaling.gradient, scaling.factor, scaling.dtype))


@scaled_gradient.fake
def _(scaling: Scaling) -> Scaled:
    return Scaled(torch.empty_like(scaling.gradient, dtype=scaling.dtype))


scaled_gradient.differentiable_no_more()


def scaled_gradients(
    gradients: Sequence[Tensor],
    needs: Sequence[bool],
    upstream: Tensor,
    saved: Saved,
    row_scale: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """A loss's gradients times `upstream`, in the operands' dtype.

    Args:
        gradients: Of the loss, as the forward finished them.
        needs: Which of them are wanted.
        upstream: The loss's gradient.
        saved: What the forward saved beside them; a dtype for each of them.
        row_scale: `[n]`, of float16 rows that lack it; None for rows that don't.
    """
    factor = upstream if row_scale is None else (row_scale * upstream)[:, None]

    def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
        if torch.is_grad_enabled():
            return scaled_gradient(Scaling(gradient, factor, saved.loss, dtype)).scaled
        return _scaled(gradient, factor, dtype, saved.backend)

    return tuple(
        scaled(gradient, dtype) if need else None
        for gradient, dtype, need in zip(gradients, saved.dtypes, needs, strict=True)
    )


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """`factor * gradient` in `dtype`, at no cost where the factor is exactly 1.

    The saved gradient is handed on itself, scaled in place where the backend can, but only if this
    backward frees the graph: a graph that is kept will want it again, as it was.
    """
    in_place = (
        gradient.dtype == dtype
        and _has_values(gradient, factor)
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    )
    if not in_place:
        return _product(gradient, factor, dtype)
    if factor.dim():
        return _scale_rows(gradient, factor)
    kernels = registry.load(backend)
    if kernels.scales_in_place:
        kernels.scale_(gradient, factor)
        return gradient
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return gradient
    return _product(gradient, factor, dtype)


def _product(gradient: Tensor, factor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rounded once: a factor in float32 is no number of a 16-bit dtype yet."""
    return (gradient.to(exact_dtype(gradient)) * factor).to(dtype or gradient.dtype)


def _scale_rows(gradient: Tensor, factor: Tensor) -> Tensor:
    """Scale each row in place; each number is rounded once."""
    rows = max(1, ROWS_AT_A_TIME // max(1, gradient.shape[1]))
    for part, by in zip(gradient.split(rows), factor.split(rows), strict=True):
        part.copy_(part.to(by.dtype) * by)
    return gradient


def _has_values(gradient: Tensor, factor: Tensor) -> bool:
    """Whether these are of numbers, and nobody traces or transforms what is done to them."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    if not (is_of_numbers(gradient) and is_of_numbers(factor)):
        return False
    return not torch.compiler.is_compiling()
