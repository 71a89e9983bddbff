"""How a fused linear call may run reaches it from every entry for Hugging Face models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.huggingface.test_head import make_batch, make_model
from tests.support.tiny_models import make_model as make_byte_model
from tests.support.tiny_models import one_thread
from tests.unlearning.tiny_trainer import arguments, make_trainer
from unilogit_kernels import LinearOptions
from unilogit_kernels.fused_linear import compaction
from unilogit_kernels.fused_linear.plan import plan_linear
from unilogit_kernels.huggingface import frozen_copy, fused_kl_loss, fused_log_odds, fused_loss

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
ASKED = LinearOptions(memory_budget=3 << 20, logits_dtype=torch.float32)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[LinearOptions]:
    """The options of every plan."""
    found: list[LinearOptions] = []

    def spy(shape: Any, options: LinearOptions, **more: Any) -> Any:
        found.append(options)
        return plan_linear(shape, options, **more)

    monkeypatch.setattr(compaction, "plan_linear", spy)
    return found


@pytest.mark.parametrize("entry", [fused_loss, fused_log_odds, fused_kl_loss])
def test_of_a_loss(entry: Callable[..., torch.Tensor], seen: list[LinearOptions]) -> None:
    model, batch = make_model("llama"), make_batch()
    models = (model, frozen_copy(model)) if entry is fused_kl_loss else (model,)
    entry(*models, **batch, options=ASKED).sum().backward()
    assert seen
    assert set(seen) == {ASKED}


@pytest.mark.parametrize("method", ["unilogit", "npo", "undial"])
@pytest.mark.parametrize("retain_loss", ["cross_entropy", "kl"])
def test_of_the_trainer(
    method: str, retain_loss: str, tmp_path: Path, seen: list[LinearOptions]
) -> None:
    options: dict[str, Any] = {"memory_budget": 3 << 20, "logits_dtype": "float32"}
    args = arguments(tmp_path, method=method, retain_loss=retain_loss, **options)
    trainer = make_trainer(make_byte_model(), args)
    trainer.train()
    assert ASKED in seen
    assert {each for each in seen if each != LinearOptions()} == {ASKED}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"memory_budget": 64}, "memory_budget must be at least 1048576, got 64"),
        ({"skip_below": 1.0}, "skip_below must be less than 1, got 1.0"),
        ({"logits_dtype": "int8"}, "logits_dtype must be one of float32"),
    ],
)
def test_values_that_make_no_sense(tmp_path: Path, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **option)
