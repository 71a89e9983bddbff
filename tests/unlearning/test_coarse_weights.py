"""A training whose steps are lost in rounding says so."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from tests.support.tiny_models import make_model, one_thread
from tests.unlearning.tiny_trainer import arguments, make_trainer
from unilogit_kernels.unlearning.coarse_weights import CoarseWeightsWarning

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def cast(dtype: torch.dtype) -> nn.Module:
    return nn.Module.to(make_model(), dtype)


class StopAt(TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize(
    ("dtype", "learning_rate", "advice"),
    [(torch.bfloat16, 1e-5, "--dtype float32 --autocast"), (torch.float32, 1e-12, "higher")],
)
@pytest.mark.parametrize("stop_at", [None, 4])
def test_lost_steps_are_counted(
    tmp_path: Path, dtype: torch.dtype, learning_rate: float, advice: str, stop_at: int | None
) -> None:
    """The figure is the share of all weights that changed, also of a training that stops early."""
    model = cast(dtype)
    args = arguments(
        tmp_path,
        num_train_epochs=6,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
    )
    with pytest.warns(CoarseWeightsWarning, match=advice) as caught:
        make_trainer(model, args, callbacks=[StopAt(stop_at)]).train()
    (message,) = [str(w.message) for w in caught if w.category is CoarseWeightsWarning]
    share, steps = re.findall(r"([\d.]+)% of the weights .* in (\d+) steps", message)[0]
    assert int(steps) == (4 if stop_at else 10)
    assert f"up to {learning_rate:g}" in message
    # Without the embeddings, of which most are of tokens that are in no row, and have no gradient.
    pairs = [
        (ours, start)
        for (name, ours), start in zip(
            model.named_parameters(), cast(dtype).parameters(), strict=True
        )
        if "embed" not in name
    ]
    moved = sum(int((ours != start).sum()) for ours, start in pairs)
    counted = sum(ours.numel() for ours, _ in pairs)
    assert float(share) == pytest.approx(100 * moved / counted, abs=0.5)


@pytest.mark.parametrize(
    ("dtype", "learning_rate"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_steps_that_are_taken_pass(
    tmp_path: Path, dtype: torch.dtype, learning_rate: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoarseWeightsWarning)
        args = arguments(tmp_path, num_train_epochs=5, learning_rate=learning_rate)
        make_trainer(cast(dtype), args).train()


def test_an_optimizer_that_keeps_what_rounding_loses_passes(tmp_path: Path) -> None:
    """As stable_adamw does, by Kahan's sum: its small steps add up."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
    for parameter in model.parameters():
        optimizer.state[parameter]["kahan_comp"] = torch.zeros_like(parameter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoarseWeightsWarning)
        make_trainer(model, arguments(tmp_path), optimizers=(optimizer, None)).train()


def test_the_compensated_optimizer_runs_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("optimi", reason="torch-optimi, of the extra compensated")
    options: dict[str, Any] = {"num_train_epochs": 10, "learning_rate": 1e-5, "use_cpu": True}
    moved = {}
    for optim in ("stable_adamw", "adamw_torch"):
        model, start = cast(torch.bfloat16), cast(torch.bfloat16)
        args = arguments(tmp_path, optim=optim, lr_scheduler_type="constant", **options)
        with warnings.catch_warnings():
            if optim == "stable_adamw":
                warnings.simplefilter("error", CoarseWeightsWarning)
            else:
                warnings.simplefilter("ignore", CoarseWeightsWarning)
            make_trainer(model, args).train()
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        moved[optim] = sum(int((ours != before).sum()) for ours, before in pairs)
    assert moved["stable_adamw"] > 1.5 * moved["adamw_torch"]


def test_a_step_of_no_learning_rate_loses_nothing(tmp_path: Path) -> None:
    """The first step of a warm-up, where a training has no other."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoarseWeightsWarning)
        make_trainer(make_model(), arguments(tmp_path, max_steps=1, warmup_steps=1)).train()
