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
from unilogit_kernels.unlearning.evaluation import token_log_probabilities, token_probabilities
from unilogit_kernels.unlearning.head import HeadCall, run_head_with_auxiliary_loss
from unilogit_kernels.unlearning.methods import RETAIN_LOSSES, Method, MethodError
from unilogit_kernels.unlearning.reference_model import (
    frozen_copy,
    heads_kl_loss,
    run_two_heads_with_auxiliary_loss,
)

_REFERENCE = "reference_log_probs"
"""The column of a batch that holds `log p` of each label under the starting model."""


@dataclass
class UnlearningArguments(TrainingArguments):
    """`TrainingArguments`, and what unlearning adds.

    `per_device_train_batch_size` counts forget rows; the retain rows come on top.

    Attributes:
        method: loss of the forget rows, a name from `methods.method_names()`.
        method_parameters: the method's float parameters, where they differ from its defaults.
        forget_weight: factor of that loss. Unilogit's slope starts 15 to 25 times as steep as
            cross-entropy's where a token is memorised, so 1 is too strong against a retain weight
            of 1.
        retain_loss: loss of the retain rows: `"cross_entropy"`, or `"kl"` for the divergence
            KL(starting model || model), as in KL minimisation and NPO-KL.
        retain_weight: factor of that loss.
        retain_per_forget: retain rows for each forget row.
        stop_at_probability: stop once the mean probability of a forget token has fallen to this.
        probability_steps: check that every so many steps.
    """

    method: str = field(default="unilogit")
    method_parameters: dict[str, float] = field(default_factory=dict)
    forget_weight: float = field(default=0.1)
    retain_loss: str = field(default="cross_entropy")
    retain_weight: float = field(default=1.0)
    retain_per_forget: int = field(default=1)
    stop_at_probability: float | None = field(default=None)
    probability_steps: int = field(default=5)

    def __post_init__(self) -> None:
        """Check the values."""
        # The columns of a batch are for compute_loss, which knows them all.
        self.remove_unused_columns = False
        super().__post_init__()
        self.resolved_method()
        if self.retain_loss not in RETAIN_LOSSES:
            known = ", ".join(RETAIN_LOSSES)
            raise ValueError(f"retain_loss must be one of {known}, got {self.retain_loss!r}")
        if self.retain_per_forget < 1:
            raise ValueError(f"retain_per_forget must be at least 1, got {self.retain_per_forget}")
        if self.stop_at_probability is not None and not 0 < self.stop_at_probability < 1:
            raise ValueError(
                f"stop_at_probability must be between 0 and 1, got {self.stop_at_probability}"
            )

    def resolved_method(self) -> Method:
        """The method with its parameters.

        Raises:
            MethodError: there is none of that name, or with such parameters.
        """
        return Method(self.method, self.method_parameters)


class UnlearningTrainer(Trainer):
    """A Trainer whose loss is `forget_weight * method + retain_weight * retain loss`.

    Each step runs the model once over forget and retain rows together, and its lm_head once, too,
    unless the method compares two answers. Both losses are means over tokens, or over sequences
    where the method is one of sequences, of the whole optimizer step, also under gradient
    accumulation and on several devices.

    A method that needs the starting model (NPO, DPO, TNPO) needs no second model: the Trainer asks
    the model it is given for the log-probabilities of the forget rows before the first step. One
    that compares whole distributions with the starting model's (UnDIAL, `retain_loss="kl"`) runs a
    teacher beside the model, frozen and in eval mode, whose logits are never held either.

    Args:
        model: a Hugging Face causal LM.
        args: the settings.
        forget: examples to forget: `input_ids` (or `inputs_embeds`) and `labels`, `[T]` each.
        retain: examples whose loss keeps the rest of the model in place.
        refusals: for methods that take them (DPO, FLAT): what the model should say instead of each
            forget example, in their order.
        teacher: the model to compare with, where one is needed: any causal LM with the same
            tokenizer. Default: a copy of the model as it is given, whole on each device.
        pad_id: the token to pad with.
        tokenizer: saved with the model.
        options: passed on to `Trainer`, such as `callbacks` or `optimizers`.

    Raises:
        DataError: a set is empty, or there is not one refusal for each forget example.
        MethodError: the method needs refusals or a teacher, or has no use for them.
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
        refusals: Sequence[Features] = (),
        teacher: nn.Module | None = None,
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
        self._method = args.resolved_method()
        if self._method.needs_refusals != bool(refusals):
            takes = "needs refusals, one for each" if not refusals else "takes no refusals of the"
            raise MethodError(f"method {args.method!r} {takes} forget example")
        self._pairs = PairedDataset(forget, retain, refusals)
        if self._method.needs_reference:
            self._pairs = _with_reference(
                model, self._pairs, pad_id, args.per_device_train_batch_size
            )
        needs_teacher = self._method.needs_teacher or args.retain_loss == "kl"
        if teacher is None and needs_teacher:
            teacher = frozen_copy(model)
        if teacher is not None and not needs_teacher:
            raise MethodError(
                f"method {args.method!r} with retain_loss {args.retain_loss!r} takes no teacher"
            )
        self._teacher = teacher
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
        if self._teacher is not None:
            self._teacher.to(args.device)
        if args.stop_at_probability is not None:
            self.add_callback(_StopAtProbability(self, forget, pad_id))

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        return PairSampler(self._pairs, self.args.retain_per_forget, self.args.seed)

    def _forget_rows(self, labels: Tensor) -> int:
        """How many rows of a batch are forget rows, or refusals; they come first."""
        members = 2 if self._method.needs_refusals else 1
        return len(labels) * members // (members + self.args.retain_per_forget)

    def _get_num_items_in_batch(
        self, batch_samples: list[Features], device: torch.device
    ) -> Tensor | None:
        """What the means of the whole step are over: `[forget, retain]`, over all devices."""
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batch_samples:
            # The first token of a row is not predicted.
            counted = batch["labels"][:, 1:] != IGNORED
            forget_rows = self._forget_rows(counted)
            forget = self._method.items(counted[:forget_rows])
            counts += torch.stack([forget, counted[forget_rows:].sum()]).cpu()
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
            inputs: a batch: refusals, if the method takes them, then forget rows, then
                `retain_per_forget` times as many retain rows.
            return_outputs: not supported, since there are no logits to return.
            num_items_in_batch: `[forget, retain]`, what the step's means are over; those of
                the batch if None.

        Returns:
            The loss of the batch as a share of its step's, with the model's own auxiliary loss,
            where it computes one (`output_router_logits`).

        Raises:
            ValueError: `return_outputs` is set.
        """
        if return_outputs:
            raise ValueError("the fused loss has no logits to return; use evaluate_rows instead")
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        reference = inputs.pop(_REFERENCE, None)

        def compute(head: HeadCall, teacher: HeadCall | None = None) -> Tensor:
            if self._method.needs_refusals or teacher is not None:
                return self._apart(head, teacher, labels, reference, num_items_in_batch)
            return self._together(head, labels, reference, num_items_in_batch)

        if self._teacher is None:
            losses, auxiliary = run_head_with_auxiliary_loss(model, compute, **inputs)
        else:
            losses, auxiliary = run_two_heads_with_auxiliary_loss(
                model, self._teacher, compute, **inputs
            )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The counts are of all devices, whose gradients are then averaged.
            losses = losses * self.accelerator.num_processes
        self._add("forget_loss", losses[1])
        self._add("retain_loss", losses[2])
        if auxiliary is None:
            return losses[0]
        if num_items_in_batch is not None:
            # It is of all tokens of this batch: a mean over the batches of the step.
            auxiliary = auxiliary / self.current_gradient_accumulation_steps
        self._add("auxiliary_loss", auxiliary)
        return losses[0] + auxiliary

    def _together(
        self, head: HeadCall, labels: Tensor, reference: Tensor | None, counts: Tensor | None
    ) -> Tensor:
        """The loss, the forget rows' and the retain rows', from one call of the lm_head."""
        retain = torch.arange(len(labels), device=labels.device) >= self._forget_rows(labels)
        mixed = head.mixed_loss(
            labels,
            [self._method.objective(reference), "cross_entropy"],
            retain.long(),
            weights=(self.args.forget_weight, self.args.retain_weight),
            num_items_in_batch=counts,
        )
        return torch.cat([mixed.loss[None], mixed.parts])

    def _apart(
        self,
        head: HeadCall,
        teacher: HeadCall | None,
        labels: Tensor,
        reference: Tensor | None,
        counts: Tensor | None,
    ) -> Tensor:
        """The same from a call each.

        Refusals and answers are two halves of one call, in which retain rows have no other half;
        and a loss against a teacher is another one than a loss of the label alone.
        """
        forget, retain = (
            slice(None, self._forget_rows(labels)),
            slice(self._forget_rows(labels), None),
        )
        items = (None, None) if counts is None else counts.unbind()
        if teacher is not None and self._method.needs_teacher:
            options = {"num_items_in_batch": items[0], **self._method.divergence()}
            dropped = heads_kl_loss(head, teacher, labels[forget], rows=forget, **options)
        else:
            objective = self._method.objective(None if reference is None else reference[forget])
            dropped = head.objective_loss(
                labels[forget], objective, rows=forget, num_items_in_batch=items[0]
            )
        if teacher is not None and self.args.retain_loss == "kl":
            kept = heads_kl_loss(
                head, teacher, labels[retain], rows=retain, num_items_in_batch=items[1]
            )
        else:
            kept = head.objective_loss(
                labels[retain], "cross_entropy", rows=retain, num_items_in_batch=items[1]
            )
        loss = self.args.forget_weight * dropped + self.args.retain_weight * kept
        return torch.stack([loss, dropped, kept])

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


def _with_reference(
    model: nn.Module, pairs: PairedDataset, pad_id: int, batch_size: int
) -> PairedDataset:
    """The same examples, with `log p` of each label under the model as it is now."""

    def scored(examples: Sequence[Features]) -> list[Features]:
        found = token_log_probabilities(model, examples, pad_id=pad_id, batch_size=batch_size)
        return [
            {**example, _REFERENCE: log_p} for example, log_p in zip(examples, found, strict=True)
        ]

    # Retain rows are collated with the others; nobody reads theirs.
    retain = [
        {**example, _REFERENCE: torch.zeros(len(example["labels"]), dtype=torch.float64)}
        for example in pairs.retain
    ]
    return PairedDataset(scored(pairs.forget), retain, scored(pairs.refusals))


def _collate_pairs(pairs: Sequence[tuple[list[Features], list[Features]]], pad_id: int) -> Features:
    """Refusals first, if there are any, then forget rows, then retain rows."""
    rows = [example for members in zip(*(f for f, _ in pairs), strict=True) for example in members]
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
