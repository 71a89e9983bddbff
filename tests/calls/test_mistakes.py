"""Mistakes that are made by whoever comes from another loss, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unilogit_kernels import (
    LinearOptions,
    explain_plan,
    linear_objective_loss,
    linear_unilogit_loss,
    objective_loss,
)

LOGITS, LABELS = torch.randn(3, 50), torch.arange(3)
HIDDEN, WEIGHT = torch.randn(3, 8), torch.randn(50, 8)


def test_logits_in_the_place_of_hidden_states() -> None:
    with pytest.raises(ValueError, match="did you mean `unilogit_loss`"):
        linear_unilogit_loss(LOGITS, WEIGHT, LABELS)
    with pytest.raises(ValueError, match="the same H") as other:
        linear_unilogit_loss(HIDDEN[:, :7], WEIGHT, LABELS)
    assert "did you mean" not in str(other.value)


@pytest.mark.parametrize(
    "objective", [torch.nn.CrossEntropyLoss(), torch.nn.NLLLoss(), F.cross_entropy, F.kl_div]
)
def test_a_loss_of_logits_as_objective(objective: Any) -> None:
    with pytest.raises(TypeError, match="did you mean objective='cross_entropy'"):
        objective_loss(LOGITS, LABELS, objective)
    with pytest.raises(TypeError, match="did you mean objective='cross_entropy'"):
        linear_objective_loss(HIDDEN, WEIGHT, LABELS, objective)


@pytest.mark.parametrize(
    ("text", "size"), [("64MiB", 64 << 20), ("2 MB", 2_000_000), ("1.5GiB", 3 << 29)]
)
def test_a_budget_with_a_unit(text: str, size: int) -> None:
    as_text = explain_plan(512, 64, 32_000, options=LinearOptions(text))
    assert as_text == explain_plan(512, 64, 32_000, options=LinearOptions(size))
    assert as_text.memory_budget == size
    losses = [
        linear_unilogit_loss(HIDDEN, WEIGHT, LABELS, options=LinearOptions(budget))
        for budget in (text, size)
    ]
    assert losses[0].equal(losses[1])


@pytest.mark.parametrize("budget", ["lots", "64 MiBs", "-1MiB", "1KiB", ""])
def test_a_budget_that_is_none(budget: str) -> None:
    with pytest.raises(ValueError, match=r"memory_budget is in bytes.*64MiB"):
        linear_unilogit_loss(HIDDEN, WEIGHT, LABELS, options=LinearOptions(budget))
