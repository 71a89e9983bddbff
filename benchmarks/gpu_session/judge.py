"""Errors against float64, and how near each came to what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unilogit_kernels.testing import ErrorBudget, assert_sum_within_budget


class Judge:
    """Collects the errors of one case.

    Attributes:
        worst: The largest error of all, as a share of what is allowed; beyond 1 it is too large.
        where: What had it.
    """

    def __init__(self) -> None:
        self.worst, self.where = 0.0, ""

    def near(
        self,
        actual: Tensor,
        exact: Tensor,
        plain: Tensor,
        what: str,
        *,
        smallest_scale: float = 0.0,
    ) -> None:
        """As accurate as plain torch (`testing.assert_within_budget`); infinities must be equal.

        Raises:
            AssertionError: It is not.
        """
        infinite = exact.isinf()
        assert torch.equal(actual[infinite].double(), exact[infinite]), f"{what}: infinities differ"
        actual, exact, plain = (
            x.detach().masked_fill(infinite, 0.0) for x in (actual, exact, plain)
        )
        budget = ErrorBudget.of(actual, exact, plain, smallest_scale)
        shares = (budget.error, budget.allowed), (budget.largest, budget.largest_allowed)
        share = max(error / max(allowed, 1e-300) for error, allowed in shares)
        if share > self.worst:
            self.worst, self.where = share, what
        assert budget.is_kept, f"{what}: {budget}"

    def near_sum(self, actual: Tensor, exact: Tensor, plain: Tensor, what: str) -> None:
        """As accurate a sum as plain torch's terms are (`testing.assert_sum_within_budget`)."""
        assert_sum_within_budget(actual, exact, plain, what)

    def found(self) -> dict[str, Any]:
        """For the record."""
        return {"worst": round(self.worst, 3), "where": self.where}
