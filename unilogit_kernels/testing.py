"""What this package's tests are made of, public so that you can test your own set-up with it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unilogit_kernels import ops
from unilogit_kernels.backends.registry import forced as force_backend
from unilogit_kernels.fused_linear.recorder import LiveMemory, elements_of, storages_of

__all__ = [
    "AllocationGuard",
    "ErrorBudget",
    "HardRow",
    "assert_within_budget",
    "force_backend",
    "hard_rows",
]


@dataclass(frozen=True)
class ErrorBudget:
    """A comparison against float64 beside plain torch's error in the same dtype.

    Attributes:
        error: Largest error of what is judged, relative to the largest exact entry of its row.
        allowed: Twice plain torch's error by the same measure, plus one rounding of the dtype.
    """

    error: float
    allowed: float

    @staticmethod
    def of(
        actual: Tensor, exact: Tensor, plain: Tensor, smallest_scale: float = 0.0
    ) -> ErrorBudget:
        """Measure `actual` and `plain`, of one dtype, against `exact` in float64.

        Rows (the last dimension) are measured relative to their own largest exact entry, so that a
        row with a small gradient counts as much as one with a large one. A vector is one row.
        Errors of rows below `smallest_scale` are measured relative to that.

        Raises:
            ValueError: Shapes or dtypes differ, or `exact` is not float64.
        """
        if exact.dtype != torch.float64:
            raise ValueError(f"exact must be float64, got {exact.dtype}")
        if not actual.shape == exact.shape == plain.shape or actual.dtype != plain.dtype:
            raise ValueError(
                "actual and plain must have exact's shape and one dtype, got "
                f"{list(actual.shape)} {actual.dtype}, {list(plain.shape)} {plain.dtype} "
                f"for exact {list(exact.shape)}"
            )
        if exact.numel() == 0:
            return ErrorBudget(0.0, 0.0)
        exact = exact.detach()
        scale = exact.abs().amax(-1, keepdim=True) if exact.dim() else exact.abs()
        scale = scale.clamp(min=smallest_scale)

        def largest(values: Tensor) -> float:
            difference = (values.detach().double() - exact).abs()
            # A row that is exactly 0 admits no error at all.
            relative = torch.where(difference == 0, 0.0, difference / scale)
            return math.inf if relative.isnan().any() else float(relative.max())

        # torch may lose a row altogether (NaN, infinite error); that is no licence to be 100 % off.
        plain_error = min(largest(plain), 0.5)
        return ErrorBudget(largest(actual), 2 * plain_error + torch.finfo(actual.dtype).eps)


def assert_within_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str = "", *, smallest_scale: float = 0.0
) -> None:
    """Assert: error <= 2x what plain torch makes in the same dtype, plus one rounding.

    Args:
        actual: What is judged.
        exact: The float64 oracle of the same shape.
        plain: The same computation by plain torch, in the dtype of `actual`.
        what: Named in the message.
        smallest_scale: Below this, errors are absolute; 0 for none. A loss of a few nats is a sum
            of terms of order 1, so 1.0 is its natural scale.

    Raises:
        AssertionError: The error is larger, or NaN where the oracle is not.

    Example:
        >>> import torch
        >>> x = torch.rand(8)
        >>> assert_within_budget(x.exp(), x.double().exp(), x.exp())
    """
    budget = ErrorBudget.of(actual, exact, plain, smallest_scale)
    assert budget.error <= budget.allowed, (
        f"{what or 'value'}: relative error {budget.error:.3e} exceeds {budget.allowed:.3e}, "
        "twice plain torch's plus one rounding"
    )


class AllocationGuard(TorchDispatchMode):
    """Watches every tensor that torch allocates inside a `with` block, this package's included.

    Args:
        forbidden_elements: Raise as soon as one tensor of at least so many elements is allocated.

    Attributes:
        largest: Elements of the largest tensor allocated.
        peak_bytes: Most bytes that tensors allocated inside were alive at a time.

    Example:
        >>> import torch
        >>> from unilogit_kernels import linear_unilogit_loss
        >>> hidden, weight = torch.randn(64, 8), torch.randn(5000, 8, requires_grad=True)
        >>> with AllocationGuard(forbidden_elements=64 * 5000) as guard:
        ...     linear_unilogit_loss(hidden, weight, torch.arange(64)).backward()
        >>> guard.largest >= weight.numel()
        True
    """

    def __init__(self, forbidden_elements: int | None = None) -> None:
        super().__init__()
        self.forbidden_elements = forbidden_elements
        self._memory = LiveMemory()

    @property
    def largest(self) -> int:
        """See above."""
        return self._memory.largest

    @property
    def peak_bytes(self) -> int:
        """See above."""
        return self._memory.peak_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Inside an operator of ours a mode is off; run its Python function under this one instead.
        implementation = ops.IMPLEMENTATIONS.get(func._schema.name)
        if implementation is not None:
            with self:
                return implementation(*args, **(kwargs or {}))
        given = storages_of(args, kwargs)
        result = func(*args, **(kwargs or {}))
        for tensor in self._memory.follow(result, given):
            elements = elements_of(tensor.untyped_storage(), tensor)
            if self.forbidden_elements is not None and elements >= self.forbidden_elements:
                raise AssertionError(
                    f"a tensor of {elements} elements was allocated, shape {list(tensor.shape)}; "
                    f"{self.forbidden_elements} are forbidden"
                )
        return result


@dataclass(frozen=True)
class HardRow:
    """A row of logits that breaks naive implementations, and what Unilogit must give on it.

    Attributes:
        name: What is hard about it.
        logits: `[V]`, float32.
        label: The label.
        loss: Exact reverse Unilogit loss in nats; NaN where overflow must not be laundered.
        zero_gradient: Whether the gradient row is exactly 0. It is NaN where the loss is NaN.
    """

    name: str
    logits: Tensor
    label: int
    loss: float
    zero_gradient: bool


def hard_rows(vocab_size: int = 37) -> list[HardRow]:
    """Rows whose results follow from the definition without computing.

    Example:
        >>> [row.name for row in hard_rows()][:2]
        ['certain label', 'impossible label']
    """
    label = vocab_size // 3
    at_certainty = math.log(vocab_size)
    at_impossible = math.log(vocab_size / (vocab_size - 1))
    inf, nan = math.inf, math.nan

    def row(
        name: str, loss: float, zero_gradient: bool, fill: float = 0.0, **entries: float
    ) -> HardRow:
        logits = torch.full((vocab_size,), fill)
        for where, value in entries.items():
            logits[label if where == "label" else (label + 1) % vocab_size] = value
        return HardRow(name, logits, label, loss, zero_gradient)

    return [
        row("certain label", at_certainty, True, label=1e4),
        row("impossible label", at_impossible, True, label=-1e4),
        row("uniform row", 0.0, False),
        row("uniform row, large offset", 0.0, False, fill=1e8),
        row("label -inf", at_impossible, True, label=-inf),
        row("label +inf", nan, False, label=inf),
        row("label NaN", nan, False, label=nan),
        row("other +inf", nan, False, other=inf),
        row("other NaN", nan, False, other=nan),
        row("all others -inf", at_certainty, True, fill=-inf, label=3.0),
        row("all -inf but one other", at_impossible, True, fill=-inf, other=3.0),
        row("all -inf", nan, False, fill=-inf),
    ]
