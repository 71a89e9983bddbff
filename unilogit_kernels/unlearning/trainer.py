"""The Hugging Face Trainer, with forget and retain rows in each step and no logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from unilogit_kernels.unlearning.data import (
    IGNORED,
    Features,
    PairedDataset,
    PairSampler,
    collate,
)
from unilogit_kernels.unlearning.evaluation import token_probabilities
from unilogit_kernels.unlearning.head import HeadCall, run_head


@dataclass
class UnlearningArguments(TrainingArguments):
    """`TrainingArguments`, and what unlearning adds.

    `per_device_train_batch_size` counts forget rows; the retain rows come on top.

    Attributes:
        objective: loss of the forget rows, a name from `unilogit_kernels.objectives`.
        forget_weight: factor of that loss. Unilogit's slope starts 15 to 25 times as steep as
            cross-entropy's where a token is memorised, so 1 is too strong against a retain weight
            of 1.
        retain_weight: factor of the cross-entropy of the retain rows.
        retain_per_forget: retain rows for each forget row.
        stop_at_probability: stop once the mean probability of a forget token has fallen to this.
        probability_steps: check that every so many steps.
    """

    objective: str = field(default="unilogit")
    forget_weight: float = field(default=0.1)
    retain_weight: float = field(default=1.0)
    retain_per_forget: int = field(default=1)
    stop_at_probability: float | None = field(default=None)
    probability_steps: int = field(default=5)

    def __post_init__(self) -> None:
        """Check the values."""
        # The columns of a batch are for compute_loss, which knows them all.
        self.remove_unused_columns = False
        super().__post_init__()
        if self.retain_per_forget < 1:
            raise ValueError(f"retain_per_forget must be at least 1, got {self.retain_per_forget}")
        if self.stop_at_probability is not None and not 0 < self.stop_at_probability < 1:
            raise ValueError(
                f"stop_at_probability must be between 0 and 1, got {self.stop_at_probability}"
            )


class UnlearningTrainer(Trainer):
    """A Trainer whose loss is `forget_weight * objective + retain_weight * cross-entropy`.

    Each step runs the model once over forget and retain rows together. Both losses are means over
    tokens of the whole optimizer step, also under gradient accumulation and on several devices.

    Args:
        model: a Hugging Face causal LM.
        args: the settings.
        forget: examples to forget: `input_ids` (or `inputs_embeds`) and `labels`, `[T]` each.
        retain: examples whose loss keeps the rest of the model in place.
        pad_id: the token to pad with.
        tokenizer: saved with the model.
        options: passed on to `Trainer`, such as `callbacks` or `optimizers`.

    Raises:
        DataError: a set is empty.
        ValueError: several GPUs in one process.

    Example:
        A complete script is in docs/unlearning.md.
    """

    args: UnlearningArguments
    # compute_loss divides by the tokens of the whole step, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: UnlearningArguments,
        *,
        forget: Sequence[Features],
        retain: Sequence[Features],
        pad_id: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                "one process with several GPUs would copy the model at every step (DataParallel), "
                "and the copies have no lm_head to replace: start with `accelerate launch` or "
                "`torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        self._pairs = PairedDataset(forget, retain)
        self._sums: dict[str, Tensor] = {}
        self._logged_step = 0
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._pairs,
            data_collator=partial(_collate_pairs, pad_id=pad_id),
            processing_class=tokenizer,
            **options,
        )
        if args.stop_at_probability is not None:
            self.add_callback(_StopAtProbability(self, forget, pad_id))

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        return PairSampler(self._pairs, self.args.retain_per_forget, self.args.seed)

    def _forget_rows(self, labels: Tensor) -> int:
        """How many rows of a batch are forget rows; they come first."""
        return len(labels) // (1 + self.args.retain_per_forget)

    def _get_num_items_in_batch(
        self, batch_samples: list[Features], device: torch.device
    ) -> Tensor | None:
        """Tokens with loss in the whole step: `[forget, retain]`, over all devices."""
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batch_samples:
            # The first token of a row is not predicted.
            each = (batch["labels"][:, 1:] != IGNORED).sum(-1)
            forget_rows = self._forget_rows(each)
            counts += torch.stack([each[:forget_rows].sum(), each[forget_rows:].sum()]).cpu()
        counts = counts.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts

    def compute_loss(  # type: ignore[override]  # this class counts the items itself
        self,
        model: nn.Module,
        inputs: Features,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """One forward over forget and retain rows, without logits.

        Args:
            model: the model, as accelerate wrapped it.
            inputs: a batch: forget rows first, then `retain_per_forget` times as many retain rows.
            return_outputs: not supported, since there are no logits to return.
            num_items_in_batch: `[forget, retain]` tokens of the step; those of the batch if None.

        Returns:
            The loss of the batch as a share of its step's.

        Raises:
            ValueError: `return_outputs` is set.
        """
        if return_outputs:
            raise ValueError("the fused loss has no logits to return; use evaluate_rows instead")
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        forget_rows = self._forget_rows(labels)
        counts = (None, None) if num_items_in_batch is None else num_items_in_batch.unbind()

        def both(head: HeadCall) -> Tensor:
            forget, retain = slice(None, forget_rows), slice(forget_rows, None)
            return torch.stack(
                [
                    head.objective_loss(
                        labels[forget],
                        self.args.objective,
                        rows=forget,
                        num_items_in_batch=counts[0],
                    ),
                    head.objective_loss(
                        labels[retain],
                        "cross_entropy",
                        rows=retain,
                        num_items_in_batch=counts[1],
                    ),
                ]
            )

        losses = run_head(model, both, **inputs)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The counts are of all devices, whose gradients are then averaged.
            losses = losses * self.accelerator.num_processes
        self._add("forget_loss", losses[0])
        self._add("retain_loss", losses[1])
        return self.args.forget_weight * losses[0] + self.args.retain_weight * losses[1]

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the two losses, as means over the steps since they were last logged."""
        steps = self.state.global_step - self._logged_step
        if "loss" in logs and steps > 0:
            logs.update({name: float(total) / steps for name, total in self._sums.items()})
            self._sums.clear()
            self._logged_step = self.state.global_step
        super().log(logs, start_time)


def _collate_pairs(pairs: Sequence[tuple[Features, list[Features]]], pad_id: int) -> Features:
    """Forget rows first, retain rows after them."""
    rows = [forget for forget, _ in pairs]
    rows += [example for _, retain in pairs for example in retain]
    return collate(rows, pad_id)


class _StopAtProbability(TrainerCallback):
    """Ends the training once the forget set is forgotten far enough."""

    def __init__(self, trainer: UnlearningTrainer, forget: Sequence[Features], pad_id: int) -> None:
        self.trainer, self.forget, self.pad_id = trainer, forget, pad_id

    def on_step_end(  # type: ignore[override]  # only ever called with this class's arguments
        self,
        args: UnlearningArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if state.global_step % args.probability_steps or args.stop_at_probability is None:
            return
        probability = float(
            token_probabilities(
                self.trainer.model_wrapped,
                self.forget,
                pad_id=self.pad_id,
                batch_size=args.per_device_train_batch_size,
            ).mean()
        )
        self.trainer.log({"forget_probability": probability})
        if probability <= args.stop_at_probability:
            control.should_training_stop = True


def train_only_top_layers(model: PreTrainedModel, layers: int) -> list[str]:
    """Freeze everything but the last decoder layers.

    Args:
        model: a Hugging Face causal LM.
        layers: how many of its layers stay trainable.

    Returns:
        The names of the parameters that stay trainable.

    Raises:
        ValueError: the model does not have so many layers, or they cannot be found.
    """
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(stacks) != 1:
        raise ValueError(f"{type(model).__name__} has no single stack of {depth} decoder layers")
    if not 1 <= layers <= depth:
        raise ValueError(f"the model has {depth} layers; cannot train the top {layers}")
    model.requires_grad_(False)
    for layer in stacks[0][depth - layers :]:
        layer.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
