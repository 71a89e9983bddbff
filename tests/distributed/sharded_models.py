"""Causal LMs copied or sharded over the ranks of a group, and the collectives of their steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

BFLOAT16 = MixedPrecisionPolicy(
    param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.bfloat16
)


def _root(model: Any, **policy: Any) -> nn.Module:
    sharded: nn.Module = fully_shard(model, **policy)
    return sharded


def shard_modules(model: Any, **policy: Any) -> nn.Module:
    """Layers and lm_head, each a module of its own; a tied head is in one with the embedding."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, **policy)
    if inner.config.tie_word_embeddings:
        fully_shard([inner.model.embed_tokens, inner.lm_head], **policy)
    else:
        fully_shard(inner.lm_head, **policy)
    return _root(model, **policy)


def _tail(model: Any) -> nn.Module:
    """As accelerate does: last norm, tied embedding and lm_head in one group that stays whole."""
    for layer in model.model.layers:
        fully_shard(layer)
    tied = [model.model.embed_tokens] if model.config.tie_word_embeddings else []
    fully_shard([model.model.norm, *tied, model.lm_head], reshard_after_forward=False)
    return _root(model)


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "ddp": DistributedDataParallel,
    "fsdp root": _root,
    "fsdp modules": shard_modules,
    "fsdp tail": _tail,
    "fsdp bfloat16": lambda model: shard_modules(model, mp_policy=BFLOAT16),
    "fsdp offloaded": lambda model: shard_modules(
        model, offload_policy=CPUOffloadPolicy(pin_memory=False)
    ),
}
"""What makes a model one of several processes."""


class Collectives(NamedTuple):
    """Of a piece of work.

    Attributes:
        gathers: of weights.
        reductions: of gradients.
    """

    gathers: int
    reductions: int


class Counting(TorchDispatchMode):
    """Counts the collectives that are started while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(("c10d.", "c10d::")):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Counting:
        super().__enter__()
        return self

    def total(self) -> Collectives:
        """Until now."""
        kinds = ("gather", "reduce")
        return Collectives(*(sum(n for k, n in self.seen.items() if kind in k) for kind in kinds))


def whole(tensor: Tensor) -> Tensor:
    """All of it, from all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole, in float32, by the names of the model before it was wrapped; 0 where there is none."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        name: (torch.zeros(p.shape) if p.grad is None else whole(p.grad)).float()
        for name, p in inner.named_parameters()
        if p.requires_grad
    }


def share(rows: list[Any]) -> list[Any]:
    """This rank's."""
    return rows[dist.get_rank() :: dist.get_world_size()]


class Partitioned:
    """Has a model's weights gathered by hooks of the modules that own them, as ZeRO-3 does.

    What DeepSpeed's engine does, without it: outside of its module's forward and backward a
    parameter is empty and has a `ds_shape`; each rank keeps a part.

    Attributes:
        gathers: of each module by name, since the list was last emptied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.parts: dict[nn.Parameter, Tensor] = {}
        self.gathers: list[str] = []
        for name, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            for parameter in own:
                self._partition(parameter)
            if own:
                gather = partial(self._gather, name, own)
                module.register_forward_pre_hook(lambda *_, gather=gather: gather())
                module.register_forward_hook(partial(self._after, own, gather))

    def _partition(self, parameter: Any) -> None:
        if parameter not in self.parts:
            parameter.ds_shape = parameter.shape
            flat = parameter.detach().flatten()
            flat = torch.cat([flat, flat.new_zeros(-len(flat) % dist.get_world_size())])
            self.parts[parameter] = flat.chunk(dist.get_world_size())[dist.get_rank()].clone()
            parameter.data = parameter.new_empty(0)

    def _gather(self, name: str, own: list[Any]) -> None:
        self.gathers.append(name)
        for parameter in own:
            parts = [torch.empty_like(self.parts[parameter]) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, self.parts[parameter])
            numbers = torch.cat(parts)[: parameter.ds_shape.numel()]
            parameter.data = numbers.view(parameter.ds_shape)

    def _after(
        self, own: list[Any], gather: Callable[[], None], module: nn.Module, _: Any, output: Tensor
    ) -> Tensor:
        free(own)
        regathered: Tensor = _BeforeBackward.apply(gather, output)
        return regathered


def free(parameters: Iterable[nn.Parameter]) -> None:
    """Leave nothing of them but their parts."""
    for parameter in parameters:
        parameter.data = parameter.new_empty(0)


class _BeforeBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gather: Callable[[], None], output: Tensor) -> Tensor:
        ctx.gather = gather
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        ctx.gather()
        return None, grad
