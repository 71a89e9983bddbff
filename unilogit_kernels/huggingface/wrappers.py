"""What models are wrapped in, and which of them are of transformers, without importing either.

A wrapper or base class whose module nobody has imported wraps nothing and is nobody's base. So the
fused head needs neither accelerate nor transformers itself.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

_WRAPPERS = (
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch.nn.parallel.data_parallel", "DataParallel"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
    ("deepspeed.runtime.engine", "DeepSpeedEngine"),
)


def imported(module: str, name: str) -> Any:
    """What a module holds by that name, or None if it was never imported or has none."""
    return getattr(sys.modules.get(module), name, None)


def unwrapped(model: nn.Module) -> Any:
    """The model itself: out of DDP, FSDP and DeepSpeed; one that is compiled stays so."""
    wrappers = tuple(kind for each in _WRAPPERS if (kind := imported(*each)) is not None)
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(compiled, wrappers):
            model = compiled
        else:
            return model


def is_pretrained(module: nn.Module) -> bool:
    """Whether it is a `transformers.PreTrainedModel`."""
    base = imported("transformers.modeling_utils", "PreTrainedModel")
    return base is not None and isinstance(module, base)
