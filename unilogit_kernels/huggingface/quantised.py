"""4-bit layers of bitsandbytes on CPUs, which an evaluation may leave without a gradient.

On processors with bfloat16 instructions such a layer repacks its weight for inference, once and for
all, in its first forward in eval mode without gradients; what it returns from then on has no graph.
The layers below would go on untrained, and nothing would say so.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from unilogit_kernels.huggingface.logit_transform import UnsupportedHeadError
from unilogit_kernels.huggingface.wrappers import imported


def packs_in_eval(module: nn.Module) -> bool:
    """Whether it may repack its weight in eval mode, which makes no other difference to it."""
    kind = imported("bitsandbytes.nn.modules", "Linear4bit")
    return kind is not None and isinstance(module, kind)


def require_gradients(model: nn.Module) -> None:
    """See that no layer has lost its gradient so.

    Raises:
        UnsupportedHeadError: one has.
    """
    if imported("bitsandbytes.nn.modules", "Linear4bit") is None:
        return
    for name, module in model.named_modules():
        if not packs_in_eval(module):
            continue
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedHeadError(
                f"the 4-bit layer {name} was repacked for inference by a forward in eval mode on "
                "this CPU, after which bitsandbytes gives it no gradient: load the model anew, and "
                "train it before it is evaluated"
            )
