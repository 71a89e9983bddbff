"""The term that a model adds to the loss of its logits by itself, such as a router's balance.

Nothing is read from the names of coefficients: the model is called with labels, and with a loss of
its logits that is 0, so that what remains of its own loss is that term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from unilogit_kernels.huggingface.logit_transform import UnsupportedHeadError
from unilogit_kernels.huggingface.wrappers import is_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class OwnLoss:
    """One forward's auxiliary loss.

    Args:
        modules: those that may compute the loss: the model, and what it is wrapped in.
        inputs: of the forward.
    """

    def __init__(self, modules: Sequence[nn.Module], inputs: dict[str, Any]) -> None:
        self._models = [cast("PreTrainedModel", each) for each in modules if is_pretrained(each)]
        asked = inputs.get("output_router_logits")
        self._wanted = any(map(_routes, self._models)) if asked is None else bool(asked)
        self._calls = 0

    def run(self, model: Callable[..., Any], inputs: dict[str, Any]) -> Any:
        """The model's output; with labels, if its router's loss is switched on.

        Raises:
            UnsupportedHeadError: it is, and this transformers is too old to find it.
        """
        if not self._wanted:
            return model(**inputs)
        tokens = inputs.get("input_ids")
        like = inputs["inputs_embeds"][..., 0] if tokens is None else tokens
        if not all(map(_has_loss_function, self._models)):
            raise UnsupportedHeadError(
                "the model's auxiliary loss (output_router_logits is set) can be told from the "
                "loss of its logits with a newer transformers only, where a model's loss_function "
                "can be set; pass output_router_logits=False to leave it out"
            )
        # Nobody reads them; peft wants their shape.
        labels = torch.zeros(like.shape, dtype=torch.int64, device=like.device)
        with _loss_functions(self._models, self._no_loss):
            return model(**{**inputs, "labels": labels, "return_dict": True})

    def _no_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        self._calls += 1
        labels = kwargs.get("labels", args[1] if len(args) > 1 else None)
        return torch.zeros((), device=None if labels is None else labels.device)

    def value(self, output: Any) -> Tensor | None:
        """The auxiliary loss, as the model scales it, or None if it computes none.

        Raises:
            UnsupportedHeadError: there is one that cannot be told from the loss of the logits.
        """
        if getattr(output, "aux_loss", None) is None:
            return None
        loss = getattr(output, "loss", None)
        if self._calls != 1 or not isinstance(loss, Tensor):
            raise UnsupportedHeadError(
                "the model computes an auxiliary loss that cannot be told from the loss of its "
                "logits: pass output_router_logits=False to leave it out"
            )
        return loss


def _routes(model: PreTrainedModel) -> bool:
    configs = (model.config, model.config.get_text_config())
    return any(bool(getattr(config, "output_router_logits", False)) for config in configs)


def _has_loss_function(model: PreTrainedModel) -> bool:
    return getattr(getattr(type(model), "loss_function", None), "fset", None) is not None


@contextmanager
def _loss_functions(
    models: Sequence[PreTrainedModel], function: Callable[..., Tensor]
) -> Iterator[None]:
    previous = [vars(model).get("_loss_function") for model in models]
    for model in models:
        model.loss_function = function
    try:
        yield
    finally:
        for model, before in zip(models, previous, strict=True):
            if before is None:
                del model._loss_function
            else:
                model.loss_function = before
