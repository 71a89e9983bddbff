"""What this package's tests are made of, public so that you can test your own set-up with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    "assert_sum_within_budget",
    "assert_tensors_within_budget",
    "assert_within_budget",
    "force_backend",
    "hard_rows",
]


TYPICAL_FACTOR, LARGEST_FACTOR = 2.0, 4.0
"""How much larger than plain torch's own errors may be: over all that is compared, and in any part.

The 2-norm of all errors averages over them. Two computations that are equally accurate then differ
by less than a half, and factor 2 is out of chance's reach. The largest of the errors, or the norm
of one small tensor among many, hangs on a few of them, in plain torch's computation too, and a
factor of 2 there is a lottery ticket. Where a 3 times larger error is no accident, the norm shows
it; what the norm dilutes, one wrong entry or row or small tensor, the wider factor shows.
"""

FLOAT32_ROUNDINGS = 3.0
"""Of what is computed in float32 (a row's maximum, sum, and log), whatever it is stored in.

Where plain torch is right to the last bit by luck, this is what twice its error leaves."""


@dataclass(frozen=True)
class ErrorBudget:
    """A comparison against float64 beside plain torch's error in the same dtype.

    Attributes:
        error: The 2-norm of all errors, relative to that of the exact entries.
        allowed: `TYPICAL_FACTOR` times plain torch's by the same measure, plus the roundings that
            no computation is without: one of the dtype, `FLOAT32_ROUNDINGS` of float32.
        largest: Error of the worst entry, relative to the largest exact entry of its row.
        largest_allowed: `LARGEST_FACTOR` times plain torch's by that measure, plus the same
            roundings: an entry that is wrong shows here, however many right ones surround it.
    """

    error: float
    allowed: float
    largest: float
    largest_allowed: float

    @property
    def is_kept(self) -> bool:
        """Whether both errors are within what is allowed."""
        return self.error <= self.allowed and self.largest <= self.largest_allowed

    @staticmethod
    def of(
        actual: Tensor,
        exact: Tensor,
        plain: Tensor,
        smallest_scale: float = 0.0,
        independent: int | None = None,
    ) -> ErrorBudget:
        """Measure `actual` and `plain`, of one dtype, against `exact` in float64.

        The largest error is sought among rows (the last dimension) that are measured relative to
        their own largest exact entry, so that a row with a small gradient counts as much as one
        with a large one. A vector is one row. What is below `smallest_scale`, the entries' root
        mean square or the largest of a row, is measured relative to that. `independent` is how many
        independent errors decide all others, if few, see `assert_within_budget`.

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
            return ErrorBudget(0.0, 0.0, 0.0, 0.0)
        exact = exact.detach().reshape(-1, exact.shape[-1] if exact.dim() else 1)
        row_scale = exact.abs().amax(1).clamp(min=smallest_scale)
        ours, theirs = (_errors(x, exact) for x in (actual, plain))
        # torch may lose a row altogether (NaN, infinite error); that is no licence to be more than
        # 100 % off.
        theirs = theirs.minimum(row_scale[:, None] / 2)
        whole = max(_rms(exact), smallest_scale)
        chance = _chance(independent) if independent else 0.0
        roundings = _roundings(actual.dtype, row_scale)
        return ErrorBudget(
            error=_relative(_rms(ours), whole),
            allowed=max(TYPICAL_FACTOR, chance) * _relative(_rms(theirs), whole)
            + _roundings(actual.dtype, exact.new_tensor(whole)).item(),
            largest=_largest(ours, row_scale),
            largest_allowed=min(max(LARGEST_FACTOR, chance) * _largest(theirs, row_scale), 1.0)
            + float(roundings.max()),
        )


def _errors(values: Tensor, exact: Tensor) -> Tensor:
    """NaN is an infinite error."""
    difference = values.detach().double().reshape(exact.shape) - exact
    return difference.abs().nan_to_num(math.inf, posinf=math.inf)


def _rms(values: Tensor) -> float:
    """Root mean square; of entries whose squares may be too small or large for float64."""
    largest = float(values.abs().max())
    if largest == 0 or math.isinf(largest):
        return largest
    return largest * float((values / largest).square().mean().sqrt())


def _chance(independent: int) -> float:
    """What the norms of so many errors each, of equal size, differ by in few of 1000 draws.

    The logarithm of their ratio is about normal, with variance `1 / independent`; its tails are
    heavier for very few, 5 draws of 1000 for 2 of them, 2 for 4, less than 1 from 6 on.
    """
    return math.exp(3.7 / math.sqrt(independent))


def _relative(error: float, scale: float) -> float:
    """What is exactly 0 admits no error at all."""
    return error / scale if scale else (math.inf if error else 0.0)


def _largest(errors: Tensor, row_scale: Tensor) -> float:
    return float(torch.where(errors == 0, 0.0, errors / row_scale[:, None]).max())


def _roundings(dtype: torch.dtype, scale: Tensor) -> Tensor:
    """What values of this size may be off by rounding alone, relative to it.

    To store one costs a rounding of its dtype, which is a fixed amount where the value is
    subnormal, as a gradient in float16 often is.
    """
    stored, computed = (torch.finfo(d) for d in (dtype, torch.promote_types(dtype, torch.float32)))
    subnormal = torch.where(scale == 0, 0.0, stored.smallest_normal * stored.eps / scale)
    return stored.eps + FLOAT32_ROUNDINGS * computed.eps + subnormal


def assert_within_budget(
    actual: Tensor,
    exact: Tensor,
    plain: Tensor,
    what: str = "",
    *,
    smallest_scale: float = 0.0,
    independent: int | None = None,
) -> None:
    """Assert: as accurate as plain torch in the same dtype, chance and rounding apart.

    The 2-norm of all errors must be at most twice plain torch's, and the largest error at most four
    times plain torch's largest, plus a few roundings each: see `ErrorBudget`.

    Args:
        actual: What is judged.
        exact: The float64 oracle of the same shape.
        plain: The same computation by plain torch, in the dtype of `actual`.
        what: Named in the message.
        smallest_scale: Below this, errors are absolute; 0 for none. A loss of a few nats is a sum
            of terms of order 1, so 1.0 is its natural scale.
        independent: How many independent errors decide those of all entries, if they are few: in
            the gradient of a loss of 4 sequences, every entry has the error of one of 4 slopes. The
            factors then widen to what chance makes of so few, 6.4 for 4.

    Raises:
        AssertionError: The error is larger, or NaN where the oracle is not.

    Example:
        >>> import torch
        >>> x = torch.rand(8)
        >>> assert_within_budget(x.exp(), x.double().exp(), x.exp())
    """
    budget = ErrorBudget.of(actual, exact, plain, smallest_scale, independent)
    assert budget.is_kept, f"{what or 'value'}: {budget}"


def assert_sum_within_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, what: str = "", *, smallest_scale: float = 1.0
) -> None:
    """Assert that a scalar, the sum of terms, is as accurate as plain torch's terms are.

    The error of one sum is one draw, and plain torch's may be 0 where its terms' errors cancel. So
    it is the terms that are measured: twice the sum of their absolute errors, plus a few roundings
    of the terms.

    Args:
        actual: The sum, a scalar.
        exact: The terms in float64, `[n]`.
        plain: The terms by plain torch, `[n]`, in the dtype that the sum should have.
        what: Named in the message.
        smallest_scale: Natural size of a term before it is divided by `n`, see
            `assert_within_budget`: a mean of losses has terms of `loss / n`.

    Raises:
        AssertionError: The error is larger, or NaN where the oracle is not.
        ValueError: A shape or dtype is not as above.

    Example:
        >>> import torch
        >>> x = torch.rand(8)
        >>> assert_sum_within_budget(x.exp().mean(), x.double().exp() / 8, x.exp() / 8)
    """
    if actual.dim() or exact.dim() != 1 or exact.shape != plain.shape:
        raise ValueError(
            "actual must be a scalar, exact and plain vectors of one shape, got "
            f"{list(actual.shape)}, {list(exact.shape)} and {list(plain.shape)}"
        )
    if exact.dtype != torch.float64 or actual.dtype != plain.dtype:
        raise ValueError(
            "exact must be float64, actual and plain of one dtype, got "
            f"{exact.dtype}, {actual.dtype} and {plain.dtype}"
        )
    exact, eps = exact.detach(), torch.finfo(actual.dtype).eps
    size = exact.abs().clamp(min=smallest_scale / max(len(exact), 1))
    lost = (plain.detach().double() - exact).abs().nan_to_num(math.inf).minimum(size / 2)
    roundings = (1 + FLOAT32_ROUNDINGS) * eps * size.sum()
    allowed = float(TYPICAL_FACTOR * lost.sum() + roundings)
    error = abs(float(actual.detach()) - float(exact.sum()))
    assert error <= allowed, f"{what or 'sum'}: error {error:.3e} exceeds {allowed:.3e}"


def assert_tensors_within_budget(
    actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> None:
    """Assert that a model's tensors, parameters or gradients, are as accurate as plain torch's.

    Each is measured as a whole: the rows of a parameter are no units of their own. Over all of
    them, relative to its own size each, the errors must be at most twice plain torch's; in any
    one, as in any entry, at most four times: an error in a small tensor shows among large ones.

    Args:
        actual: What is judged, by name.
        exact: The float64 oracle.
        plain: By plain torch, in the dtypes of `actual`.

    Raises:
        AssertionError: An error is larger, or a name is missing.

    Example:
        >>> import torch
        >>> x = torch.rand(8)
        >>> assert_tensors_within_budget({"x": x}, {"x": x.double()}, {"x": x})
    """
    assert actual.keys() == exact.keys() == plain.keys(), "other tensors are there"
    budgets = {
        name: ErrorBudget.of(actual[name].flatten(), exact[name].flatten(), plain[name].flatten())
        for name in actual
    }
    for name, budget in budgets.items():
        spread = LARGEST_FACTOR / TYPICAL_FACTOR
        kept = budget.error <= spread * budget.allowed and budget.largest <= budget.largest_allowed
        assert kept, f"{name}: {budget}"
    error, allowed = (
        _rms(torch.tensor(x, dtype=torch.float64))
        for x in zip(*((b.error, b.allowed) for b in budgets.values()), strict=True)
    )
    assert error <= allowed, f"all tensors: error {error:.3e} exceeds {allowed:.3e}"


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
        >>> [row.name for row in hard_rows()[:2]]
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
