"""Fused trainers for OpenUnlearning's registry.

They take its data, its configs and the names of its arguments, and do the steps that its own
trainers do, with one forward where those take two and without logits. They run with transformers
4.51 as well as 5, and with the torch that goes with it. In OpenUnlearning's
`src/trainer/__init__.py`, at the end:

    from unilogit_kernels.integrations.open_unlearning import fused_trainers

    for trainer in fused_trainers(GradDiff).values():
        _register_trainer(trainer)

and in `configs/trainer/Unilogit.yaml`, or with any other name of `METHODS`:

    defaults: [finetune]
    handler: Unilogit
    method_args: {gamma: 0.1, alpha: 1.0, retain_loss_type: NLL}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer
from transformers.modeling_outputs import CausalLMOutput

from unilogit_kernels.functional.kl import count_ignored_positions
from unilogit_kernels.huggingface.head import (
    HeadCall,
    add_auxiliary_loss,
    fused_log_odds,
    run_head_with_auxiliary_loss,
)
from unilogit_kernels.huggingface.two_heads import heads_kl_loss, run_two_heads_with_auxiliary_loss
from unilogit_kernels.maths.rewrites import Shift
from unilogit_kernels.objectives import (
    NPO,
    WGA,
    GradientAscent,
    IdkDPO,
    Objective,
    SatImp,
    SimNPO,
    UnilogitForward,
    UnilogitReverse,
)

_COLUMNS = ("input_ids", "attention_mask", "labels")
_IGNORED = -100
Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and `labels`, `[B, T]` each."""


@dataclasses.dataclass(frozen=True)
class Method:
    """The forget loss of a trainer.

    Attributes:
        objective: from its parameters by our names to the loss; None for UnDIAL, a divergence.
        arguments: of the trainer: OpenUnlearning's name, then ours and OpenUnlearning's default.
        needs_reference: whether it takes log-probabilities under the starting model.
        needs_alternates: whether it compares each answer with an alternate.
    """

    objective: Callable[..., Objective] | None
    arguments: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    needs_reference: bool = False
    needs_alternates: bool = False


METHODS: Mapping[str, Method] = {
    "Unilogit": Method(UnilogitReverse),
    "UnilogitForward": Method(UnilogitForward),
    "FusedGradDiff": Method(GradientAscent),
    "FusedNPO": Method(NPO, {"beta": ("beta", 1.0)}, needs_reference=True),
    "FusedDPO": Method(
        IdkDPO, {"beta": ("beta", 1.0)}, needs_reference=True, needs_alternates=True
    ),
    "FusedSimNPO": Method(SimNPO, {"beta": ("beta", 1.0), "delta": ("delta", 0.0)}),
    "FusedUNDIAL": Method(None, {"beta": ("gamma", 1.0)}),
    # What it calls beta is the exponent of the probability, our alpha.
    "FusedWGA": Method(WGA, {"beta": ("alpha", 1.0)}),
    "FusedSatImp": Method(SatImp, {"beta1": ("beta1", 5.0), "beta2": ("beta2", 1.0)}),
}
"""The trainers by the names that they register under."""


def fused_trainers(grad_diff: type[Any]) -> dict[str, type[Any]]:
    """The trainers of `METHODS`, each a subclass of OpenUnlearning's `GradDiff`.

    Their losses and gradients are those of its trainers, conventions included: means over a
    micro-batch, divided by the number of them in a step; KL of the retain rows over every position,
    and UnDIAL over prompt and padding, whose label -100 lowers the teacher's token `V - 100`. The
    method argument `labelled_only: true` has both count the labelled tokens alone. `FusedUNDIAL`
    reports a divergence, which is less than UNDIAL's loss by the entropy of its target, a constant.
    A router's auxiliary loss is added once. Rows of `retain` cost nothing where `alpha` is 0.

    Args:
        grad_diff: `trainer.unlearn.grad_diff.GradDiff`.

    Returns:
        The classes by their names. They take the arguments of `GradDiff` and those of their method.
    """
    return {
        name: type(name, (FusedTrainer, grad_diff), {"method": method})
        for name, method in METHODS.items()
    }


class FusedTrainer(Trainer):
    """What `fused_trainers` puts before OpenUnlearning's `GradDiff`.

    Args:
        labelled_only: see `fused_trainers`.
        arguments: those of `GradDiff` and of the method.

    Raises:
        ValueError: a method argument is out of its range, or there is no such `retain_loss_type`.
    """

    method: ClassVar[Method]
    gamma: float
    alpha: float
    retain_loss_type: str
    ref_model: nn.Module | None

    def __init__(self, *args: Any, labelled_only: bool = False, **arguments: Any) -> None:
        self._parameters = {
            ours: float(arguments.pop(name, default))
            for name, (ours, default) in self.method.arguments.items()
        }
        self._labelled_only = labelled_only
        super().__init__(*args, **arguments)
        if self.retain_loss_type not in ("NLL", "KL"):
            raise ValueError(f"retain_loss_type must be NLL or KL, got {self.retain_loss_type!r}")
        needs_model = self.method.needs_reference or self.method.objective is None
        if self.ref_model is None and needs_model:
            self.ref_model = self._prepare_ref_model(self.model)
        # A mean over a batch, which the Trainer has to divide by the number of batches in a step.
        self.model_accepts_loss_kwargs = False

    def _prepare_ref_model(self, model: Any) -> nn.Module:
        prepared: nn.Module = super()._prepare_ref_model(model)  # type: ignore[misc]
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """The loss of one batch, or the model's own of a batch that is not of forget rows.

        Args:
            model: as accelerate wrapped it.
            inputs: `forget`, a batch, or `original` and `alternate` batches; and `retain`, a batch,
                where there are retain rows.
            return_outputs: also return the model's outputs, which are the loss alone.
            num_items_in_batch: not used: means are over the batch, as in OpenUnlearning.
        """
        if "forget" not in inputs:
            return Trainer.compute_loss(self, model, dict(inputs), return_outputs)
        forget: Any = inputs["forget"]
        if self.method.needs_alternates:
            forget_parts = [forget["alternate"], forget["original"]]
        else:
            forget_parts = [forget]
        parts = [*forget_parts, *([inputs["retain"]] if self._keeps(inputs) else [])]
        joined = _join(parts)
        labels = joined.pop("labels")
        count = sum(len(part["labels"]) for part in forget_parts)
        forget_length = max(part["labels"].shape[1] for part in forget_parts)
        forget_labels = labels[:count, :forget_length]
        objective = self._objective(forget_parts)

        def compute(head: HeadCall, teacher: HeadCall | None = None) -> Tensor:
            dropped = self._forget_loss(head, teacher, forget_labels, objective)
            if not self._keeps(inputs):
                return self.gamma * dropped
            kept = self._retain_loss(head, teacher, labels[count:], parts[-1]["labels"].shape[1])
            return self.gamma * dropped + self.alpha * kept

        compares = self.retain_loss_type == "KL" and self._keeps(inputs)
        if objective is None or compares:
            assert self.ref_model is not None
            found = run_two_heads_with_auxiliary_loss(model, self.ref_model, compute, **joined)
        else:
            found = run_head_with_auxiliary_loss(model, compute, **joined)
        loss = add_auxiliary_loss(*found)
        return (loss, CausalLMOutput(loss=loss)) if return_outputs else loss

    def _keeps(self, inputs: Mapping[str, Any]) -> bool:
        return "retain" in inputs and self.alpha != 0

    def _objective(self, forget: Sequence[Batch]) -> Objective | None:
        if self.method.objective is None:
            return None
        if not self.method.needs_reference:
            return self.method.objective(**self._parameters)
        assert self.ref_model is not None
        joined = _join(forget)
        labels = joined.pop("labels")
        with torch.no_grad():
            log_odds = fused_log_odds(self.ref_model, labels=labels, **joined)[:, :-1]
        log_p = F.logsigmoid(log_odds).masked_fill(labels[:, 1:] == _IGNORED, 0.0)
        return self.method.objective(reference=log_p.sum(-1), **self._parameters)

    def _forget_loss(
        self,
        head: HeadCall,
        teacher: HeadCall | None,
        labels: Tensor,
        objective: Objective | None,
    ) -> Tensor:
        count, length = labels.shape
        head = _positions(head, slice(count), length)
        if objective is not None:
            return head.objective_loss(labels, objective)
        assert teacher is not None
        if not self._labelled_only:
            labels = count_ignored_positions(labels, head.transform.vocab_size)
        rewrite = Shift(**self._parameters)
        return heads_kl_loss(
            head, _positions(teacher, slice(count), length), labels, rewrite=rewrite
        )

    def _retain_loss(
        self, head: HeadCall, teacher: HeadCall | None, labels: Tensor, length: int
    ) -> Tensor:
        rows = slice(-len(labels), None)
        head, labels = _positions(head, rows, length), labels[:, :length]
        if self.retain_loss_type == "NLL":
            return head.objective_loss(labels, "cross_entropy")
        assert teacher is not None
        return heads_kl_loss(
            head, _positions(teacher, rows, length), labels if self._labelled_only else None
        )


def _positions(head: HeadCall, rows: slice, length: int) -> HeadCall:
    """The head of some sequences, without the padding that longer ones beside them need."""
    return dataclasses.replace(head, hidden=head.hidden[rows, :length])


def _join(parts: Sequence[Batch]) -> dict[str, Any]:
    """Batches one after the other, padded on the right to one length."""
    length = max(part["labels"].shape[1] for part in parts)
    fill = {"labels": _IGNORED}

    def padded(tensor: Tensor, name: str) -> Tensor:
        return F.pad(tensor, (0, length - tensor.shape[1]), value=fill.get(name, 0))

    return {name: torch.cat([padded(part[name], name) for part in parts]) for name in _COLUMNS}
