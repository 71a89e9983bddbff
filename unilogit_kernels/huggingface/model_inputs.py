"""What a model's forward takes, and which of its positions the labels belong to."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple, get_args

from torch import Tensor, nn

from unilogit_kernels.huggingface.logit_transform import UnsupportedHeadError
from unilogit_kernels.huggingface.sharding import class_of
from unilogit_kernels.huggingface.wrappers import imported, is_pretrained, unwrapped

_COMMON = frozenset(
    (
        *("return_dict", "use_cache", "cache_position", "token_type_ids", "mm_token_type_ids"),
        *("adapter_names", "alora_offsets"),  # of peft
    )
)
_TYPED = (
    ("transformers.utils.generic", "TransformersKwargs"),
    ("transformers.utils", "LossKwargs"),  # before 4.54
    ("transformers.modeling_flash_attention_utils", "FlashAttentionKwargs"),
)
_KNOWN = "transformers.", "peft."


class _Names(NamedTuple):
    """The arguments of a forward, and whether it takes any others."""

    arguments: frozenset[str]
    others: bool


def check_inputs(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse inputs that would be swallowed by the `**kwargs` of a transformers or peft model.

    Args:
        model: a Hugging Face causal LM, wrapped or not.
        names: of the inputs.

    Raises:
        TypeError: no forward of the model has an argument of that name.
        ValueError: labels or `logits_to_keep` are among them.
    """
    names = set(names)
    if "labels" in names:
        raise ValueError("labels are not the model's to see here: give them to the loss")
    if names & {"logits_to_keep", "num_logits_to_keep"}:
        raise ValueError("logits_to_keep cannot be used here: tokens without a label cost nothing")
    inner = unwrapped(model)
    models = [inner, *(m for m in inner.modules() if is_pretrained(m))]
    classes: set[Any] = {class_of(module) for module in models}
    # Only these are known to do nothing with what they do not name.
    if any(_names(c).others and not c.__module__.startswith(_KNOWN) for c in classes):
        return
    arguments = frozenset[str]().union(*(_names(c).arguments for c in classes))
    if any(_names(c).others for c in classes):
        arguments |= _common()
    arguments -= {"num_items_in_batch"}  # of the loss, which the model does not compute
    unknown = sorted(n for n in names - arguments if not n.startswith("output_"))
    if unknown:
        raise TypeError(
            f"unexpected keyword {unknown[0]!r}: neither an option of this function nor an input "
            f"of {class_of(inner).__name__}"
        )


def _common() -> frozenset[str]:
    """Names that a forward with `**kwargs` passes on, or takes from there."""
    typed = [getattr(imported(*each), "__annotations__", {}) for each in _TYPED]
    return _COMMON.union(*typed)


@lru_cache(maxsize=256)
def _names(kind: type[Any]) -> _Names:
    parameters = list(inspect.signature(kind.forward).parameters.values())
    arguments = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}
    others = [p.annotation for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    for annotation in others:
        for typed in get_args(annotation):  # Unpack[...]
            arguments |= set(getattr(typed, "__annotations__", ()))
    return _Names(frozenset(arguments) - {"self"}, bool(others))


@dataclasses.dataclass(frozen=True)
class VirtualTokens:
    """What a prompt that is learned, as by peft's prompt tuning, puts in front of each sequence.

    Attributes:
        number: of such tokens.
    """

    number: int = 0

    @staticmethod
    def of(model: nn.Module) -> VirtualTokens:
        """Those of the model's active adapter.

        Raises:
            UnsupportedHeadError: the adapter weights the loss of its own prompt.
        """
        config: Any = getattr(unwrapped(model), "active_peft_config", None)
        if not getattr(config, "is_prompt_learning", False):
            return VirtualTokens()
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind == "CPT":
            raise UnsupportedHeadError(
                "context-aware prompt tuning (CPT) has a loss of its own, over its prompt's "
                "labels; use objective_loss on model(...).logits"
            )
        # These two go before the keys and values, not before the tokens.
        in_cache = kind in ("PREFIX_TUNING", "CARTRIDGE")
        return VirtualTokens(0 if in_cache else int(config.num_virtual_tokens))

    def before(self, labels: Tensor, hidden: Tensor) -> int:
        """How many positions of hidden states `[B, T', H]` come before those of labels `[B, T]`.

        Raises:
            UnsupportedHeadError: the labels do not belong to the other positions.
        """
        more = hidden.shape[1] - labels.shape[-1] if labels.dim() == 2 else -1
        if labels.shape[:1] != hidden.shape[:1] or more not in (0, self.number):
            virtual = f", {self.number} of them virtual" if self.number else ""
            raise UnsupportedHeadError(
                f"labels of shape {list(labels.shape)} do not belong to the {hidden.shape[1]} "
                f"positions{virtual} of {hidden.shape[0]} sequences that the lm_head was called "
                "for: expected a label for each token. A model that inserts or drops tokens by "
                "itself needs inputs and labels of all positions, or objective_loss on "
                "model(...).logits"
            )
        return more
