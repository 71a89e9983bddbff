"""An lm_head whose vocabulary the ranks of a tensor-parallel plan share: `Shard(0)` DTensors.

Its weight is such a DTensor inside its own forward, whatever FSDP2 does outside, and the losses
take it as it is. What is left to do here: see that its layout is one that they take, give them
hidden states that are whole on each rank, and let what stands in for the logits be sharded as they
would be, so that the plan's own hooks pass it on as they pass logits on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from unilogit_kernels.calls.sharded import first_of
from unilogit_kernels.huggingface.logit_transform import UnsupportedHeadError
from unilogit_kernels.huggingface.sharding import reshard
from unilogit_kernels.huggingface.wrappers import imported


def require_known_layout(name: str, tensor: DTensor) -> None:
    """See that a parameter is cut, inside the forward of its module, as the losses take it.

    Args:
        name: of the parameter, for the message.
        tensor: the parameter, inside the forward.

    Raises:
        UnsupportedHeadError: it is not; the message says what works.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or placements[0] not in (Shard(0), Replicate()):
        raise UnsupportedHeadError(
            f"the lm_head's {name} is a DTensor inside its own forward, placed as "
            f"{list(placements)} on {mesh}, where Shard(0) or Replicate() on a mesh of one "
            'dimension was expected: shard it by parallelize_module(model, mesh["tp"], '
            '{"lm_head": ColwiseParallel(...)}) or a tp_plan, then over the other dimension by '
            "fully_shard, whose own module has to be the one that is called"
        )


def require_one_weight(model: nn.Module, head: nn.Module) -> None:
    """See that an lm_head which is tied to the embedding still is, where it was sharded.

    Args:
        model: the causal LM, not wrapped, outside its forward.
        head: its lm_head.

    Raises:
        UnsupportedHeadError: there are two weights now, which would train apart.
    """
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    reshard(model)  # Gathered, one weight may be two for a while.
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    tied, weight = getattr(embedding, "weight", None), getattr(head, "weight", None)
    if weight is not tied and (isinstance(weight, DTensor) or isinstance(tied, DTensor)):
        raise UnsupportedHeadError(
            "the model's config ties lm_head and input embeddings (tie_word_embeddings), but "
            "sharding has made two weights of them, each of which would get a part of the "
            "gradient: shard both over the vocabulary (lm_head by ColwiseParallel, the embedding "
            "by RowwiseParallel(input_layouts=Replicate())), tie them again by lm_head.weight = "
            "embed_tokens.weight, and give fully_shard both modules as one group"
        )


def whole_hidden(hidden: Tensor, weight: Tensor) -> Tensor:
    """The head's input as a plain tensor of all tokens, where a plan made it a DTensor."""
    if not isinstance(hidden, DTensor) or not isinstance(weight, DTensor):
        return hidden
    whole = [Replicate()] * hidden.device_mesh.ndim
    return hidden.redistribute(hidden.device_mesh, whole).to_local()


def as_logits_of(row: Tensor, weight: Tensor) -> Tensor:
    """A row `[1, 1, rows]`, the same on each rank, placed as logits of `weight` are."""
    if not isinstance(weight, DTensor):
        return row
    row = row.to(weight.to_local().device)
    if weight.placements[0] == Replicate():
        return DTensor.from_local(row, weight.device_mesh, [Replicate()], run_check=False)
    first = first_of(weight, 0)
    own = row[..., first : first + _own_rows(weight)].contiguous()
    return _sharded_row(own, weight)


def whole_row(seen: Tensor, weight: Tensor) -> Tensor:
    """What came out of the model in the place of its logits, with all columns.

    Args:
        seen: as the model returned it: whole, a DTensor, or this rank's columns alone.
        weight: the lm_head's, inside its forward.
    """
    if isinstance(seen, DTensor):
        return seen.full_tensor()
    if not isinstance(weight, DTensor) or seen.dim() == 0:
        return seen
    own = _own_rows(weight)
    if own == weight.shape[0] or seen.shape[-1] != own:
        return seen
    return _sharded_row(seen, weight).full_tensor()


def _own_rows(weight: DTensor) -> int:
    with torch.no_grad():
        return weight.to_local().shape[0]


def _sharded_row(own: Tensor, weight: DTensor) -> DTensor:
    shape = torch.Size((*own.shape[:-1], weight.shape[0]))
    return DTensor.from_local(
        own,
        weight.device_mesh,
        [Shard(own.dim() - 1)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


class TransformersStyle(NamedTuple):
    """What a tensor-parallel plan of transformers does around the forward of a linear layer.

    Attributes:
        style: a `transformers.distributed.tensor_parallel.TensorParallelLayer`.
        mesh: over which it shards.
    """

    style: Any
    mesh: Any

    @staticmethod
    def of(module: nn.Module, forward: Any) -> TransformersStyle | None:
        """That of a forward which the plan has put in the place of the layer's own, or None."""
        kind = imported("transformers.distributed.tensor_parallel", "TensorParallelLayer")
        if kind is None or not inspect.isfunction(forward):
            return None
        around = inspect.getclosurevars(forward).nonlocals
        style, inner = around.get("self"), around.get("original_forward")
        known = isinstance(style, kind) and around.get("module") is module and "mesh" in around
        if not known or getattr(inner, "__func__", None) is not nn.Linear.forward:
            return None
        return TransformersStyle(style, around["mesh"])

    def around(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        """The same around another forward, but for what it does to the weight without gradients.

        It has a layer see its own part of the weight as a plain tensor then.
        """

        def placed(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.style.transform_inputs_pre_forward(module, args, kwargs, self.mesh)
            output = forward(*args, **kwargs)
            return self.style.transform_output_post_forward(module, output, self.mesh)

        return placed
