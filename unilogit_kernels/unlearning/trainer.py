"""The Hugging Face Trainer, with forget and retain rows in each step and no logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unilogit_kernels.huggingface.head import HeadCall, run_head_with_auxiliary_loss
from unilogit_kernels.huggingface.sharding import reshard
from unilogit_kernels.huggingface.two_heads import Reference, run_two_heads_with_auxiliary_loss
from unilogit_kernels.unlearning.adapters import at_the_start, check_adapters, starting_model
from unilogit_kernels.unlearning.arguments import UnlearningArguments, refuse_options
from unilogit_kernels.unlearning.batch_loss import BatchLoss, Heads, Targets
from unilogit_kernels.unlearning.callbacks import Begin, LogAtCheckpoints, Watch
from unilogit_kernels.unlearning.coarse_weights import CompensatingTrainer, WarnOfCoarseWeights
from unilogit_kernels.unlearning.data import (
    IGNORED,
    DataError,
    Features,
    FillerPair,
    PairedDataset,
    PairIndex,
    PairSampler,
    check_sets,
    collate_pairs,
    rows_of_pairs,
)
from unilogit_kernels.unlearning.dual import DualRetainWeight
from unilogit_kernels.unlearning.evaluation import label_log_probabilities, token_log_probabilities
from unilogit_kernels.unlearning.hidden_states import Rmu
from unilogit_kernels.unlearning.methods import HIDDEN_STATES, MethodError
from unilogit_kernels.unlearning.processes import over_rows, ranks_of_one_copy
from unilogit_kernels.unlearning.task_vector import TaskVector

__all__ = ["UnlearningArguments", "UnlearningTrainer"]

_LOGGED = ("forget_loss", "retain_loss", "auxiliary_loss")
"""What is logged beside the loss; the last one where the model has such a loss of its own."""

_RETAIN = slice(1, 2)
"""The retain loss among them."""

_REFERENCE = "reference_log_probs"
"""The column of a batch that holds `log p` of each label under the starting model."""


class UnlearningTrainer(CompensatingTrainer):
    """A Trainer whose loss is `forget_weight * method + retain_weight * retain loss`.

    Each step runs the model once over forget and retain rows together, and its lm_head once, too,
    unless the method compares two answers. Both losses are means over tokens, or over sequences
    where the method is one of sequences, of the whole optimizer step, also under gradient
    accumulation and on several devices.

    A method that needs the starting model (NPO, DPO, TNPO) needs no second model: before the first
    step, and before a checkpoint is loaded, `train` asks the model it was given for the
    log-probabilities of the forget rows, in the precision it trains in. One that compares whole
    distributions with the starting model's (UnDIAL, `retain_loss="kl"`) runs a teacher beside the
    model, frozen and in eval mode, whose logits are never held either.

    `forget_loss`, `retain_loss` and `forget_probability` are logged over all processes, and so is
    `retain_weight` where it follows the retain loss (`dual_step_size`). A
    `CoarseWeightsWarning` says so if the first steps are lost in the rounding of the weights.

    Args:
        model: a Hugging Face causal LM.
        args: the settings.
        forget: examples to forget: `input_ids` (or `inputs_embeds`) and `labels`, `[T]` each.
        retain: examples whose loss keeps the rest of the model in place; none where `retain_loss`
            is `"none"`.
        refusals: for methods that take them (DPO, AltPO, FLAT): what the model should say instead
            of each forget example, in their order.
        teacher: the model to compare with, where one is needed: any causal LM with the same
            tokenizer. Default: a frozen copy, whole on each device; of adapters, the model below.
        pad_id: the token to pad with.
        tokenizer: saved with the model.
        check_rows: by `"forget"` and `"retain"`, what `stop_at` and `max_retain_loss_rise` look at,
            where that is not `forget` and `retain`: the same rows with their ends, for instance.
        options: passed on to `Trainer`: `callbacks`, `optimizers`, `optimizer_cls_and_kwargs`;
            `eval_dataset`, examples or a dict of them by name; and `compute_metrics`, which is
            given the log-probabilities of the labels as `predictions` (see `prediction_step`).

    Raises:
        DataError: see `PairedDataset`.
        MethodError: the method needs refusals or a teacher, or has no use for them.
        TypeError: `Trainer` has no such option.
        ValueError: several GPUs in one process, or an argument or option without effect.

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
        retain: Sequence[Features] = (),
        refusals: Sequence[Features] = (),
        teacher: Reference | None = None,
        pad_id: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
        check_rows: Mapping[str, Sequence[Features]] = MappingProxyType({}),
        **options: Any,
    ) -> None:
        refuse_options(options)
        args.check_run(len(forget), ranks_of_one_copy(model))
        check_adapters(model, args)
        self._method = args.resolved_method()
        if self._method.needs_refusals != bool(refusals):
            takes = "needs refusals, one for each" if not refusals else "takes no refusals of the"
            raise MethodError(f"method {args.method!r} {takes} forget example")
        if bool(retain) != bool(args.retain_rows):
            raise DataError(
                f"retain_loss {args.retain_loss!r} takes "
                + ("no retain examples" if retain else "at least one retain example, or be 'none'")
            )
        self._pairs, self._pad_id = PairedDataset(forget, retain, refusals), pad_id
        check_sets("eval_dataset", options.get("eval_dataset"))
        needs_teacher = self._method.needs_teacher or args.retain_loss in ("kl", HIDDEN_STATES)
        if teacher is None and needs_teacher:
            teacher = starting_model(model)
        for name, given in (("teacher", teacher), ("vocab_size", args.vocab_size)):
            if given is not None and not needs_teacher:
                raise MethodError(
                    f"method {args.method!r} with retain_loss {args.retain_loss!r} takes no {name}"
                )
        self._teacher = teacher
        self._has_reference = False
        self._batch_loss = BatchLoss(self._method, args)
        self._rmu: Rmu | None = None
        if self._method.of_hidden_states:
            parameters = self._method.settled
            self._rmu = Rmu.of(model, teacher, parameters, args.forget_weight, args.rows_seed)
        self._task_vector: TaskVector | None = None
        self._step_losses: Tensor | None = None  # by `_LOGGED`, of the step that is being taken
        self._losses: Tensor | None = None  # the same, summed since they were last logged
        self._logged_step = 0
        self._to_log: dict[str, float] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._pairs,
            data_collator=partial(collate_pairs, pad_id=pad_id),
            processing_class=tokenizer,
            **{name: value for name, value in options.items() if value is not None},
        )
        args.check_devices()
        self._copies = args.world_size // ranks_of_one_copy(model)  # each takes rows of its own
        if isinstance(self._teacher, nn.Module) and not self.is_model_parallel:
            self._teacher.to(args.device)
        # What it smooths, were it asked, would be logits; `BatchLoss` smooths without them.
        self.label_smoother = None
        if args.dual_step_size != 0:
            self.add_callback(DualRetainWeight(args.retain_weight))
        self.add_callback(Begin(self))
        self.add_callback(LogAtCheckpoints())
        self.add_callback(WarnOfCoarseWeights(self))
        watched = {"forget": forget, "retain": retain, **check_rows}
        self.watch = Watch(self, watched["forget"], watched["retain"], pad_id)
        self.add_callback(self.watch)
        for name, empty in self._pairs.without_labels.items():
            if empty and self.is_world_process_zero():
                warnings.warn(
                    f"{empty} {name} examples have no label that carries loss: they take part in "
                    "batches and add nothing",
                    stacklevel=2,
                )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Features,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What an evaluation sees of a batch of `eval_dataset`, without logits.

        Returns:
            The mean of `-log p` of its labels; and, for `compute_metrics`, float32 `[B, T]`, the
            `log p` of each label, 0 where there is none, and the labels.
        """
        inputs = self._prepare_inputs(dict(inputs))
        labels = inputs.pop("labels")
        with torch.no_grad(), self.evaluating_as_in_training():
            log_p = label_log_probabilities(model, labels, inputs)
        count = (labels[:, 1:] != IGNORED).sum().clamp(min=1)
        loss = (-log_p.sum() / count).float()
        return (loss, None, None) if prediction_loss_only else (loss, log_p.float(), labels)

    def _get_train_sampler(self, train_dataset: Any = None) -> PairSampler:
        # A batch for each process, or none: accelerate would have some rows count twice.
        share = self._copies * self._train_batch_size
        fill = share if self._copies > 1 and not self.args.dataloader_drop_last else 1
        span = self.args.sorted_span(len(self._pairs), share)
        return PairSampler(self._pairs, self.args.retain_rows, self.args.rows_seed, fill, span)

    @contextmanager
    def evaluating_as_in_training(self) -> Iterator[nn.Module]:
        """The model as it trains: wrapped, on its device, and in the precision of a step."""
        model = self.model_wrapped
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            yield model
        # No backward follows, after which FSDP2 would do it: parameters are to be shards again.
        reshard(model)

    def begin(self) -> None:
        """Called at the start of each `train`, once the model is as it will train."""
        self._step_losses, self._losses, self._to_log = None, None, {}
        self._logged_step = self.state.global_step
        needs = self._method.needs_reference or self._method.is_negated
        seen = self._has_reference or self._task_vector is not None
        if needs and not seen and self.state.global_step > 0:
            raise ValueError(
                f"method {self._method.name!r} needs the starting model, but the checkpoint was "
                "loaded into it first (as DeepSpeed does): start the run anew"
            )
        self._see_start()

    def end(self) -> None:
        """Called at the end of each `train`, once the best checkpoint is loaded, if it is to be."""
        if self._task_vector is not None and self.model is not None:
            self._task_vector.negate(self.model, self._method.settled["scale"])
            self._task_vector = None

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._see_start()
        super()._load_from_checkpoint(*args, **kwargs)

    def _see_start(self) -> None:
        """Take what the method needs of the starting model, while the model is that one."""
        if self._method.is_negated and self._task_vector is None and self.model is not None:
            self._task_vector = TaskVector(self.model)
        self._add_reference()

    def _add_reference(self) -> None:
        """Have each batch hold `log p` of its labels under the model as it is now.

        The rows go through the model in the batches of the first epoch, so that its first step
        compares the model with itself to the last bit.
        """
        if self._has_reference or not self._method.needs_reference:
            return
        order, size = list(self._get_train_sampler()), self._train_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]

        def of_batches(mine: list[list[PairIndex]]) -> list[dict[int, tuple[Tensor, ...]]]:
            with self.evaluating_as_in_training() as model, at_the_start(model):
                return [self._reference_of(model, batch) for batch in mine]

        found: dict[int, tuple[Tensor, ...]] = {}
        for of_batch in over_rows(batches, of_batches, self.model):
            found |= of_batch
        self._pairs.add_column(_REFERENCE, [found[row] for row in range(len(self._pairs))])
        self._has_reference = True

    def _reference_of(
        self, model: nn.Module, batch: list[PairIndex]
    ) -> dict[int, tuple[Tensor, ...]]:
        """`log p` of the labels of each forget row, after those of its refusal."""
        rows = rows_of_pairs([self._pairs[pair] for pair in batch])
        log_p = token_log_probabilities(model, rows, pad_id=self._pad_id, batch_size=len(rows))
        members = [log_p[: len(batch)], log_p[len(batch) : 2 * len(batch)]]
        of_rows = zip(*members[: 1 + self._method.needs_refusals], strict=True)
        return {
            pair[0]: values
            for pair, values in zip(batch, of_rows, strict=True)
            if not isinstance(pair, FillerPair)
        }

    def _get_num_items_in_batch(
        self, batch_samples: list[Features], device: torch.device
    ) -> Tensor | None:
        """What the means of the whole step are over: `[forget, retain]`, over all devices."""
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batch_samples:
            counts += self._batch_loss.items(batch["labels"]).cpu()
        counts = counts.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
            counts = counts * self._copies // self.args.world_size
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
                `retain_rows` times as many retain rows.
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
        targets = Targets(inputs.pop("labels"), inputs.pop(_REFERENCE, None), num_items_in_batch)

        def compute(head: HeadCall, teacher: HeadCall | None = None) -> Tensor:
            return self._batch_loss(Heads(head, teacher), targets, self.retain_weight)

        # The model's own forward has the Trainer's autocast already; the teacher's has not.
        with self.accelerator.autocast():
            if self._rmu is not None:
                count = self._batch_loss.forget_rows(targets.labels)
                losses, auxiliary = self._rmu(
                    model, inputs, targets.labels, count, num_items_in_batch, self.retain_weight
                )
            elif self._teacher is None:
                losses, auxiliary = run_head_with_auxiliary_loss(model, compute, **inputs)
            else:
                losses, auxiliary = run_two_heads_with_auxiliary_loss(
                    model, self._teacher, compute, **inputs
                )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The counts are of all devices, whose gradients are then averaged.
            losses = losses * self._copies
        loss, parts = losses[0], losses[1:].detach()
        if auxiliary is not None:
            if num_items_in_batch is not None:
                # It is of all tokens of this batch: a mean over the batches of the step.
                auxiliary = auxiliary / self.current_gradient_accumulation_steps
            loss, parts = loss + auxiliary, torch.cat([parts, auxiliary.detach()[None]])
        self._step_losses = parts if self._step_losses is None else self._step_losses + parts
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Every process is here after each step, so here the losses are averaged over them."""
        self._end_step()
        steps = self.state.global_step - self._logged_step
        if self.control.should_log and steps > 0 and self._losses is not None:
            means = self.accelerator.reduce(self._losses / steps, reduction="mean").tolist()
            self._to_log |= dict(zip(_LOGGED, means, strict=False))
            if not self.args.retain_rows:
                del self._to_log["retain_loss"]
            self._losses, self._logged_step = None, self.state.global_step
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _end_step(self) -> None:
        """Take the losses of a step, if one was taken, and have a dual weight follow them."""
        step, self._step_losses = self._step_losses, None
        if step is None:
            return
        self._losses = step if self._losses is None else self._losses + step
        dual = self._dual
        if dual is not None:
            # That which the step was taken with, so that what is logged adds up.
            self._to_log["retain_weight"] = dual.weight
            (retain,) = self.accelerator.reduce(step[_RETAIN], reduction="mean").tolist()
            dual.follow(self.args, self.state.epoch or 0.0, retain)

    @property
    def _dual(self) -> DualRetainWeight | None:
        """Where it is held now: one that is restored from a checkpoint is another object."""
        found = (c for c in self.callback_handler.callbacks if isinstance(c, DualRetainWeight))
        return next(found, None)

    @property
    def retain_weight(self) -> float:
        """The factor of the retain loss, as it is now."""
        dual = self._dual
        return self.args.retain_weight if dual is None else dual.weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the two losses, as means over the steps since they were last logged.

        A retain weight that changes comes with them, as it was in the last of these steps.
        """
        if "loss" in logs:
            logs.update(self._to_log)
            self._to_log = {}
        super().log(logs, start_time)
