"""`model(..., labels=)` with a fused loss and without logits, for any trainer that calls it so."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from unilogit_kernels import objectives
from unilogit_kernels.functional import ObjectiveLike, objective_loss, shift_labels
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.huggingface.auxiliary_loss import OwnLoss
from unilogit_kernels.huggingface.head import HeadCall, add_auxiliary_loss, replace_head
from unilogit_kernels.huggingface.stand_in import (
    containers_of_head,
    is_stood_in_for,
    plain_head,
)
from unilogit_kernels.objectives import Objective, SequenceObjective

_Model = TypeVar("_Model", bound=nn.Module)
_FORWARD = "forward"
_IGNORED = -100


def patch(
    model: _Model,
    objective: ObjectiveLike = "cross_entropy",
    *,
    logits_in_eval: bool = False,
    backend: str | None = None,
    options: LinearOptions | None = None,
) -> _Model:
    """Have a causal LM compute a fused loss wherever it is called with labels.

    From then on `model(..., labels=labels)` gives `loss`, what else the model returns, and no
    `logits`, which are never computed. Calls without labels, and so generation, are the model's
    own. With the default objective the loss is the model's own: the mean over the labelled tokens,
    or their sum divided by `num_items_in_batch` where the caller gives it, as Hugging Face's
    Trainer does; and a router's auxiliary loss where the model adds one.

    A deep copy of the model is patched as well. Saved, pickled and loaded models are not.

    Args:
        model: a Hugging Face causal LM, or a peft model of one. Wrap it (DDP, FSDP2, accelerate)
            afterwards. Patch what TRL's SFTTrainer trains after the trainer is made
            (`patch(trainer.model)`), as the trainer puts a forward of its own in this place.
        objective: `"unilogit"`, `"cross_entropy"`, any other name from `objectives.REGISTRY`, an
            `Objective`, or a differentiable function of the log-odds.
        logits_in_eval: in eval mode, also return the logits, as a Trainer's `compute_metrics`
            needs them. They take the memory that they always take.
        backend: name of a backend, or None for the best available.
        options: how the loss may run: memory, dtype of the logits, skipped rows.

    Returns:
        The same model.

    Raises:
        UnsupportedHeadError: the lm_head is not a plain linear layer; in a call, see `fused_loss`.
        ValueError: the model is patched already, or there is no such objective. In a call: an
            objective of sequences is given `num_items_in_batch`, which counts tokens.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = patch(transformers.LlamaForCausalLM(config), "unilogit")
        >>> ids = torch.randint(50, (2, 7))
        >>> output = model(input_ids=ids, labels=ids)
        >>> output.loss.shape, output.logits
        (torch.Size([]), None)
        >>> unpatch(model)(input_ids=ids, labels=ids).logits.shape
        torch.Size([2, 7, 50])
    """
    if isinstance(vars(model).get(_FORWARD), _FusedForward):
        raise ValueError(f"this {type(model).__name__} is patched already: unpatch it first")
    plain_head(model)
    resolved = objectives.resolve(objective)
    model.forward = _FusedForward(model, resolved, logits_in_eval, backend, options)
    return model


def unpatch(model: _Model) -> _Model:
    """Give a patched model its own forward back.

    Args:
        model: as `patch` was given it.

    Returns:
        The same model.

    Raises:
        ValueError: it is not patched, or its forward was replaced once more since.
    """
    fused = vars(model).get(_FORWARD)
    if not isinstance(fused, _FusedForward):
        replaced = (
            "" if fused is None else ", or its forward has been replaced since: undo that first"
        )
        raise ValueError(f"this {type(model).__name__} is not patched{replaced}")
    if fused.replaced is None:
        del model.forward
    else:
        model.forward = fused.replaced
    return model


@dataclasses.dataclass
class FusedOutput(ModelOutput):
    """What a patched model gives TRL's SFTTrainer, which takes its loss from it itself.

    Attributes:
        log_probs: float32 `[B, T - 1]`: minus the objective's loss of each next token, which is
            its log-probability if the objective is cross-entropy; 0 where there is no label.
        entropy: float32 `[B, T - 1]`, of the model's prediction; 0 where there is no label.
        is_top1: bool `[B, T - 1]`, whether the label is the likeliest token.
        label_mask: bool `[B, T - 1]`, where there is a label.
        aux_loss: a router's auxiliary loss, without its coefficient, where the model computes one.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


class _FusedForward:
    """Stands in a model's `forward`.

    Attributes:
        replaced: what stood there in the model's `__dict__` before, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective | Callable[..., Tensor],
        logits_in_eval: bool,
        backend: str | None,
        options: LinearOptions | None,
    ) -> None:
        self.replaced = vars(model).get(_FORWARD)
        self._model, self._forward = model, model.forward
        self._objective, self._logits_in_eval = objective, logits_in_eval
        self._backend, self._options = backend, options
        # Trainers read there which columns of a batch the model takes, and how it divides its loss.
        self.__signature__ = inspect.signature(model.forward)

    def __reduce__(self) -> tuple[Any, ...]:
        """In a pickle the model's own forward stands in this place."""
        if self.replaced is None:
            return getattr, (self._model, _FORWARD)
        return _the_same, (self.replaced,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FusedForward:
        """Of the copy of the model, which is in `memo` while the model is being copied."""
        copied = object.__new__(_FusedForward)
        memo[id(self)] = copied
        of_model = ("replaced", "_model", "_forward")
        vars(copied).update(vars(self), **{x: copy.deepcopy(vars(self)[x], memo) for x in of_model})
        return copied

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward where there are no labels, or somebody else replaces the head."""
        given = dict(kwargs)
        for_trl = given.pop("fused_lm_head", False)
        items = given.pop("num_items_in_batch", None)
        inputs = self._named(args, given)
        labels = inputs.pop("labels", None)
        if labels is None or is_stood_in_for(self._model):
            return self._forward(*args, **kwargs)
        if inputs.pop("shift_labels", None) is not None:
            raise ValueError(
                "shift_labels cannot be used with a patched model, whose labels are shifted where "
                "the loss is computed: pass labels alone"
            )
        self._check(items, for_trl)
        if for_trl:
            return self._for_trl(inputs, labels)
        if self._logits_in_eval and not self._model.training:
            return self._with_logits(inputs, labels, items)
        return self._without_logits(inputs, labels, items)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self.__signature__.bind(*args, **kwargs)
        inputs: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.__signature__.parameters[name].kind
            inputs.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
        return inputs

    def _check(self, items: int | Tensor | None, for_trl: bool) -> None:
        if not isinstance(self._objective, SequenceObjective):
            return
        if items is not None or for_trl:
            raise ValueError(
                f"objective {self._objective.name!r} is a mean over sequences, and this caller "
                "divides by its number of labelled tokens: use unlearning.trainer.UnlearningTrainer"
            )

    def _without_logits(
        self, inputs: dict[str, Any], labels: Tensor, items: int | Tensor | None
    ) -> Any:
        def compute(head: HeadCall) -> Tensor:
            return head.objective_loss(
                labels.to(head.hidden.device),
                self._objective,
                num_items_in_batch=items,
                backend=self._backend,
                options=self._options,
            )

        as_tuple = not self._returns_dict(inputs)
        done = replace_head(
            self._model,
            compute,
            {**inputs, "return_dict": True},
            auxiliary=True,
            call=self._forward,
        )
        loss = add_auxiliary_loss(done.result, done.auxiliary_loss)
        return _with_loss(done.output, loss, None, as_tuple=as_tuple)

    def _with_logits(
        self, inputs: dict[str, Any], labels: Tensor, items: int | Tensor | None
    ) -> Any:
        as_tuple = not self._returns_dict(inputs)
        inputs = {"use_cache": False, **inputs, "return_dict": True}
        own_loss = OwnLoss(containers_of_head(self._model, plain_head(self._model)), inputs)
        output = own_loss.run(self._forward, inputs)
        logits = output.logits
        # A learned prompt has no labels; its last position predicts the first token.
        virtual = logits.shape[1] - labels.shape[1]
        of_positions = nn.functional.pad(labels.to(logits.device), (virtual, 0), value=_IGNORED)
        loss = objective_loss(
            logits,
            shift_labels(of_positions),
            self._objective,
            num_items_in_batch=items,
            backend=self._backend,
        )
        loss = add_auxiliary_loss(loss, own_loss.value(output))
        return _with_loss(output, loss, logits, as_tuple=as_tuple)

    def _for_trl(self, inputs: dict[str, Any], labels: Tensor) -> FusedOutput:
        seen: dict[str, Tensor] = {}

        def compute(head: HeadCall) -> Tensor:
            here = labels.to(head.hidden.device)
            found = head.token_statistics(
                here, fields=("entropy", "is_argmax"), backend=self._backend, options=self._options
            )
            assert found.entropy is not None
            assert found.is_argmax is not None
            seen["entropy"], seen["is_top1"] = found.entropy.detach(), found.is_argmax
            return head.objective_loss(
                here,
                self._objective,
                reduction="none",
                backend=self._backend,
                options=self._options,
            )

        done = replace_head(
            self._model, compute, {**inputs, "return_dict": True}, call=self._forward
        )
        mask = labels[:, 1:].to(done.result.device) != _IGNORED
        return FusedOutput(
            log_probs=-done.result[:, :-1],
            entropy=seen["entropy"][:, :-1].masked_fill(~mask, 0.0),
            is_top1=seen["is_top1"][:, :-1] & mask,
            label_mask=mask,
            aux_loss=getattr(done.output, "aux_loss", None),
        )

    def _returns_dict(self, inputs: dict[str, Any]) -> bool:
        asked = inputs.get("return_dict")
        config = getattr(self._model, "config", None)
        return bool(getattr(config, "return_dict", True)) if asked is None else bool(asked)


def _the_same(value: Any) -> Any:
    return value


def _with_loss(output: Any, loss: Tensor, logits: Tensor | None, *, as_tuple: bool) -> Any:
    """A model's output with a loss and these logits in the place of its own."""
    if isinstance(output, tuple):  # Of a model that gives nothing else.
        return (loss, *(() if logits is None else (logits,)), *output[1:])
    changed = dataclasses.replace(output, loss=loss, logits=logits)
    return changed.to_tuple() if as_tuple else changed
