"""Labels that were shifted before: `shift=False`, and a warning without it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.huggingface.test_head import make_model
from tests.support.tiny_models import one_thread
from unilogit_kernels import shift_labels
from unilogit_kernels.huggingface import (
    frozen_copy,
    fused_kl_loss,
    fused_log_odds,
    fused_loss,
    fused_token_statistics,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :3] = -100
    return ids, labels


def entries() -> dict[str, Callable[..., Any]]:
    model = make_model("llama")
    with torch.no_grad():
        other = frozen_copy(make_model("llama"))
    return {
        "loss": lambda **given: fused_loss(model, **given),
        "log_odds": lambda **given: fused_log_odds(model, **given),
        "statistics": lambda **given: fused_token_statistics(model, **given).log_prob,
        "kl": lambda **given: fused_kl_loss(model, other, **given),
    }


@pytest.mark.parametrize("name", ["loss", "log_odds", "statistics", "kl"])
def test_labels_that_are_shifted(name: str) -> None:
    entry, (ids, labels) = entries()[name], batch()
    right = entry(input_ids=ids, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert entry(input_ids=ids, labels=shift_labels(labels), shift=False).equal(right)
    with pytest.warns(UserWarning, match="labels look shifted already.*shift=False"):
        twice = entry(input_ids=ids, labels=shift_labels(labels))
    assert name == "kl" or not twice.equal(right)


def test_no_warning_without_need() -> None:
    """Nor where both would fit, nor where no label counts."""
    entry, (ids, labels) = entries()["loss"], batch()
    same = torch.full_like(ids, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry(input_ids=ids, labels=labels)
        entry(input_ids=same, labels=same)
        entry(input_ids=ids, labels=torch.full_like(labels, -100))
        entry(input_ids=ids, labels=labels.roll(3, 1))
