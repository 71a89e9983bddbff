"""What a call on two models refuses, and how it says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from unilogit_kernels import Mask, Shift, kl_loss, linear_kl_loss


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewrite": Shift(1.0)}, ValueError, "labels must be given"),
        ({"rewrite": Mask(), "labels": True, "direction": "reverse"}, ValueError, "infinite"),
        ({"rewrite": "uniform", "labels": True}, TypeError, "rewrite must be None, Shift"),
        ({"rewrite": Shift(math.inf), "labels": True}, ValueError, "finite parameters"),
        ({"direction": "backward"}, ValueError, "direction must be 'forward' or 'reverse'"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive finite number"),
        ({"ref_softcap": -1.0}, ValueError, "ref_softcap must be a positive"),
        ({"ref_logit_scale": 0.0}, ValueError, "ref_logit_scale must be a non-zero"),
        ({"ref_logits": torch.randn(3, 9)}, ValueError, "ref_logits must have logits's leading"),
        ({"ref_logits": torch.randn(4, 11)}, ValueError, "pass the number of real ones"),
        (
            {"ref_logits": torch.randn(4, 7), "vocab_size": 8},
            ValueError,
            "vocab_size must be at most",
        ),
        ({"ref_logits": torch.randn(4, 9).double()}, TypeError, "must both be float64 or neither"),
        ({"ref_logits": None}, TypeError, "ref_logits must be a tensor"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"logits": torch.randn(4, 9), "ref_logits": torch.randn(4, 9), **change}
    if options.pop("labels", False):
        options["labels"] = torch.arange(4)
    with pytest.raises(error, match=message):
        kl_loss(**options)


def test_errors_of_a_head() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    with pytest.raises(ValueError, match="ref_hidden must have shape"):
        linear_kl_loss(hidden, weight, torch.randn(4, 7), weight)
    with pytest.raises(ValueError, match="ref_bias must have shape"):
        linear_kl_loss(hidden, weight, hidden, weight, ref_bias=torch.randn(3))
    with pytest.raises(IndexError, match="got 9 at flat position 1"):
        linear_kl_loss(hidden, weight, hidden, weight, torch.tensor([0, 9, 1, 2]))
