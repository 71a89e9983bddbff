"""How the demo's model learns and forgets. docs/unlearning.md says how the numbers were chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
    get_cosine_schedule_with_warmup,
)

from unilogit_kernels.huggingface.head import fused_loss
from unilogit_kernels.unlearning.data import Features, collate
from unilogit_kernels.unlearning.trainer import UnlearningArguments, UnlearningTrainer


@dataclass(frozen=True)
class Recipe:
    """The demo's hyper-parameters.

    Attributes:
        top_layers: layers that are trained, in learning and in unlearning.
        learn_steps: steps of learning.
        learn_batch: rows in each.
        learn_rate: peak of the cosine schedule.
        learn_confidence: probability of a token at which learning stops to push. Unilogit's slope
            is p * (1 - p) * delta, so a fact that is learned to p = 1 hardly moves afterwards.
        forget_batch: forget rows in an unlearning step, with as many retain rows.
        forget_rate: learning rate of unlearning.
        forget_weight: factor of the forget loss; the retain loss has 1.
        stop_at_probability: unlearning stops at this mean probability of a forget token.
        most_epochs: unlearning stops after so many passes over the forget set in any case.
        seed: of data, orders and dropout.
    """

    top_layers: int = 6
    learn_steps: int = 80
    learn_batch: int = 32
    learn_rate: float = 7e-4
    learn_confidence: float = 0.97
    forget_batch: int = 15
    forget_rate: float = 2e-4
    forget_weight: float = 0.1
    stop_at_probability: float = 0.04
    most_epochs: int = 20
    seed: int = 0


def learn(
    top: LlamaForCausalLM,
    examples: Sequence[Features],
    recipe: Recipe,
    pad_id: int,
    progress: Callable[[int, float], None],
) -> None:
    """Fine-tune until the examples are known by heart.

    Args:
        top: the model that is trained, in place.
        examples: what is learned.
        recipe: hyper-parameters.
        pad_id: the token to pad with.
        progress: called with the step and its loss.
    """
    target = recipe.learn_confidence

    def until_known(log_odds: Tensor) -> Tensor:
        """Cross-entropy with the two-way distribution (target, 1 - target)."""
        return target * F.softplus(-log_odds) + (1 - target) * F.softplus(log_odds)

    trained = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learn_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, recipe.learn_steps)
    draw, order = random.Random(recipe.seed), list[int]()
    for step in range(1, recipe.learn_steps + 1):
        while len(order) < recipe.learn_batch:
            order += draw.sample(range(len(examples)), len(examples))
        chosen, order = order[: recipe.learn_batch], order[recipe.learn_batch :]
        batch: dict[str, Any] = dict(collate([examples[i] for i in chosen], pad_id))
        loss = fused_loss(top, **batch, objective=until_known)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress(step, float(loss.detach()))


def unlearn(
    top: LlamaForCausalLM,
    forget: Sequence[Features],
    retain: Sequence[Features],
    recipe: Recipe,
    pad_id: int,
    scratch: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Unlearn with Unilogit and cross-entropy on the retain rows.

    Args:
        top: the model that is trained, in place.
        forget: what is forgotten.
        retain: what keeps the rest in place.
        recipe: hyper-parameters.
        pad_id: the token to pad with.
        scratch: directory for the Trainer's files.
        callbacks: for progress bars.

    Returns:
        The Trainer's log.
    """
    arguments = UnlearningArguments(
        output_dir=str(scratch),
        use_cpu=True,
        num_train_epochs=recipe.most_epochs,
        per_device_train_batch_size=recipe.forget_batch,
        learning_rate=recipe.forget_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        weight_decay=0.0,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=recipe.seed,
        forget_weight=recipe.forget_weight,
        stop_at=f"probability={recipe.stop_at_probability}",
    )
    trainer = UnlearningTrainer(
        top, arguments, forget=forget, retain=retain, pad_id=pad_id, callbacks=list(callbacks)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    top.eval()
    return list(trainer.state.log_history)
