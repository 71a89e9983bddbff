"""The loss of a batch of forget and retain rows, from what its lm_head is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.huggingface.head import HeadCall
from unilogit_kernels.huggingface.two_heads import heads_kl_loss
from unilogit_kernels.objectives import Objective
from unilogit_kernels.unlearning.arguments import UnlearningArguments
from unilogit_kernels.unlearning.data import IGNORED
from unilogit_kernels.unlearning.methods import Method


class Heads(NamedTuple):
    """The lm_heads of one forward.

    Attributes:
        model: what the model's was given.
        teacher: what the teacher's was, where there is one.
    """

    model: HeadCall
    teacher: HeadCall | None


class Targets(NamedTuple):
    """What a batch is to be measured against.

    Attributes:
        labels: int64 `[B, T]`, not shifted: of refusals, if the method takes them, then of forget
            rows, then of retain rows.
        reference: `[B, T]`, `log p` of each label under the starting model, for methods that need
            it.
        counts: `[2]`, what the means of forget and retain loss are over; None for the batch's own.
    """

    labels: Tensor
    reference: Tensor | None
    counts: Tensor | None


@dataclass(frozen=True)
class BatchLoss:
    """`forget_weight * method + retain_weight * retain loss`.

    Attributes:
        method: loss of the forget rows.
        args: weights, the loss of the retain rows, and how losses may run.
    """

    method: Method
    args: UnlearningArguments

    def forget_rows(self, labels: Tensor) -> int:
        """How many rows of a batch are forget rows, or refusals; they come first."""
        members = 2 if self.method.needs_refusals else 1
        return len(labels) * members // (members + self.args.retain_rows)

    def items(self, labels: Tensor) -> Tensor:
        """What the means of a batch's losses are over: int64 `[forget, retain]`.

        Args:
            labels: int64 `[B, T]`; the first token of a row is not predicted.
        """
        counted = labels[:, 1:] != IGNORED
        rows = self.forget_rows(counted)
        return torch.stack([self.method.items(counted[:rows]), counted[rows:].sum()])

    def __call__(self, heads: Heads, targets: Targets, retain_weight: float) -> Tensor:
        """The loss, the forget rows' and the retain rows', `[3]`; the first is differentiable.

        Args:
            heads: what they were given.
            targets: of the batch.
            retain_weight: that of now.
        """
        # A mixture does not compute what has no weight; a weight that may grow has to see it.
        unseen = retain_weight == 0 and self.args.dual_step_size != 0
        if self.args.retain_rows == 0:
            return self._of_forget_rows(heads, targets)
        if self.method.needs_refusals or heads.teacher is not None or unseen:
            return self._apart(heads, targets, retain_weight)
        return self._together(heads.model, targets, retain_weight)

    def _of_forget_rows(self, heads: Heads, targets: Targets) -> Tensor:
        items = None if targets.counts is None else targets.counts[0]
        every = slice(None)
        dropped = self._of_rows(heads, targets, every, self._forget_loss(targets, every), items)
        return torch.stack([self.args.forget_weight * dropped, dropped, torch.zeros_like(dropped)])

    def _together(self, head: HeadCall, targets: Targets, retain_weight: float) -> Tensor:
        """From one call of the lm_head."""
        labels = targets.labels
        retain = torch.arange(len(labels), device=labels.device) >= self.forget_rows(labels)
        mixed = head.mixed_loss(
            labels,
            [self.method.objective(targets.reference), self.args.retain_objective()],
            retain.long(),
            weights=(self.args.forget_weight, retain_weight),
            num_items_in_batch=targets.counts,
            options=self.args.linear_options(),
        )
        return torch.cat([mixed.loss[None], mixed.parts])

    def _apart(self, heads: Heads, targets: Targets, retain_weight: float) -> Tensor:
        """From a call each.

        Refusals and answers are two halves of one call, in which retain rows have no other half;
        and a loss against a teacher is another one than a loss of the label alone.
        """
        count = self.forget_rows(targets.labels)
        forget, retain = slice(None, count), slice(count, None)
        items = (None, None) if targets.counts is None else targets.counts.unbind()
        losses = self._forget_loss(targets, forget), self._retain_loss()
        dropped = self._of_rows(heads, targets, forget, losses[0], items[0])
        kept = self._of_rows(heads, targets, retain, losses[1], items[1])
        loss = self.args.forget_weight * dropped + retain_weight * kept
        return torch.stack([loss, dropped, kept])

    def _forget_loss(self, targets: Targets, rows: slice) -> Objective | Mapping[str, Any]:
        if self.method.needs_teacher:
            return self.method.divergence()
        reference = targets.reference
        return self.method.objective(None if reference is None else reference[rows])

    def _retain_loss(self) -> Objective | Mapping[str, Any]:
        return {} if self.args.retain_loss == "kl" else self.args.retain_objective()

    def _of_rows(
        self,
        heads: Heads,
        targets: Targets,
        rows: slice,
        loss: Objective | Mapping[str, Any],
        items: Tensor | None,
    ) -> Tensor:
        """The mean of a loss over some rows: an objective, or how to diverge from the teacher."""
        labels, options = targets.labels[rows], self.args.linear_options()
        if isinstance(loss, Objective):
            return heads.model.objective_loss(
                labels, loss, rows=rows, num_items_in_batch=items, options=options
            )
        assert heads.teacher is not None
        return heads_kl_loss(
            heads.model,
            heads.teacher,
            labels,
            rows=rows,
            vocab_size=self.args.vocab_size,
            num_items_in_batch=items,
            # A divergence skips no rows.
            options=options._replace(skip_below=0.0),
            **loss,
        )
