"""Modules whose weights FSDP2 or DeepSpeed's ZeRO-3 gather for their own forward and backward.

Both do it in hooks of the module, which run, since the lm_head is called as a module; the loss is
computed between them. So a weight is gathered once a forward and once a backward, whatever the
number of chunks. What is left to do here: look behind the classes that FSDP2 makes, know a weight
again whether or not it is gathered, say so where nobody gathered it, and keep FSDP2 from rounding
the numbers that stand in for logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from unilogit_kernels.huggingface.logit_transform import UnsupportedHeadError


def class_of(module: nn.Module) -> type[Any]:
    """A module's class, as it was before `fully_shard` put one of its own in front of it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def kinds_of(head: nn.Module, containers: Sequence[nn.Module]) -> tuple[tuple[Any, ...], ...]:
    """What tells a head's parameters from others in their place, and is the same while gathered.

    Args:
        head: the lm_head.
        containers: the modules that it is inside of.
    """
    # A shard's dtype and device may differ from the gathered weight's.
    changes = any(isinstance(module, FSDPModule) for module in (head, *containers))
    kinds = []
    for name, tensor in head.named_parameters():
        sharded = changes and isinstance(tensor, DTensor)
        kind = nn.Parameter if sharded else type(tensor)
        whole = tuple(getattr(tensor, "ds_shape", tensor.shape))  # of ZeRO-3
        kinds.append((name, kind, whole, None if changes else (tensor.dtype, tensor.device)))
    return tuple(kinds)


def reshard(model: nn.Module) -> None:
    """Have FSDP2 leave each rank its shards alone, as they are before a forward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_partitioned(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds the numbers of a parameter apart, and nobody has gathered them."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape)) != tuple(tensor.shape)


def require_gathered(name: str, tensor: Tensor) -> None:
    """See that a parameter is whole inside the forward of its module.

    Args:
        name: of the parameter, for the message.
        tensor: the parameter, inside the forward.

    Raises:
        UnsupportedHeadError: it is not; the message says what gathers it.
    """
    if is_partitioned(tensor):
        whole: Any = getattr(tensor, "ds_shape", ())
        raise UnsupportedHeadError(
            f"the lm_head's {name} is partitioned by ZeRO-3 and not gathered inside its own "
            f"forward (shape {list(tensor.shape)} of {list(whole)}): call the engine that "
            "deepspeed.initialize returned, or wrap forward and backward in "
            "deepspeed.zero.GatheredParameters"
        )


@contextmanager
def without_output_casts(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """Keep FSDP2 from casting the head's and the model's outputs (`output_dtype`), for one forward.

    A cast rounds logits, of which the losses take none; and what stands in for them would not come
    out as the model's own arithmetic makes it.

    Args:
        model: the causal LM, not wrapped.
        head: its lm_head.
    """
    with ExitStack() as hooks:
        for module in {id(m): m for m in (head, model)}.values():
            if isinstance(module, FSDPModule):
                uncast = _Uncast()
                # FSDP2's hook is between these two; a tensor-parallel plan's is before both.
                hooks.callback(module.register_forward_hook(uncast.before).remove)
                _behind_the_last(module._forward_hooks)
                hooks.callback(module.register_forward_hook(uncast.after).remove)
        yield


def _behind_the_last(hooks: dict[int, Any]) -> None:
    """Have FSDP2's forward hook, and those after it, run after the one that was registered last."""
    order = list(hooks)
    theirs = [_is_of_fsdp(hooks[key]) for key in order]
    first = theirs.index(True) if any(theirs) else 0
    for key in order[first:-1]:
        hooks[key] = hooks.pop(key)


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


class _Uncast:
    """Two hooks around others, which see an output as it was where these only cast it."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None

    def before(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.logits = _logits(output)

    def after(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        before, now = self.logits, _logits(output)
        if before is None or now is None or before.dtype == now.dtype:
            return None
        if before.shape != now.shape or not torch.equal(before.to(now.dtype), now):
            return None
        if isinstance(output, Tensor):
            return before
        if isinstance(output, tuple):
            return (before, *output[1:])
        output["logits"] = before
        return output


def _logits(output: Any) -> Tensor | None:
    if isinstance(output, tuple):
        output = output[0] if output else None
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return found if isinstance(found, Tensor) else None
