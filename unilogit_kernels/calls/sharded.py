"""DTensors as operands: whose columns of the vocabulary they hold, and their local tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.vocab_parallel import (
    VocabParallel,
    any_dtensors,
    is_dtensor,
    process_group,
)
from unilogit_kernels.ops.tokens import gather_tokens
from unilogit_kernels.rows.tokens import TokenParts

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_HELP = (
    "What works, on a mesh of one dimension: a vocabulary that is sharded (weight and bias as "
    "Shard(0), logits as Shard(-1)) or replicated, beside hidden states that are replicated or "
    "sharded over tokens"
)


def local_logits(
    logits: Sequence[tuple[str, Tensor]], labels: Any, options: CallOptions
) -> tuple[list[Tensor], Any, CallOptions]:
    """Each model's logits, and labels, as this rank's tensors; options that say whose they are.

    Raises:
        ValueError: Their layout is none that the losses run on.
    """
    given = [z for _, z in logits]
    if not any_dtensors((*given, labels, options.token_weights)):
        return given, labels, options
    local: list[Tensor] = []
    for name, z in logits:
        if is_dtensor(z):
            options = _sharded_by(name, z, z.dim() - 1, options)
            z = z.to_local()  # type: ignore[attr-defined]
        local.append(z)
    return local, _replicated("labels", labels), _with_local_weights(options)


def local_heads(
    heads: Sequence[tuple[str, tuple[Tensor, Tensor, Tensor | None]]],
    labels: Any,
    options: CallOptions,
) -> tuple[list[tuple[Tensor, Tensor, Tensor | None]], Any, CallOptions]:
    """The same of each model's hidden states, weight and bias; names begin with the given prefix.

    Raises:
        ValueError: Their layout is none that the losses run on.
    """
    operands = [x for _, head in heads for x in head]
    if not any_dtensors((*operands, labels, options.token_weights)):
        return [head for _, head in heads], labels, options
    local = []
    cut = next((weight for _, (_, weight, _) in heads if _is_cut(weight)), None)
    for prefix, (hidden, weight, bias) in heads:
        if prefix and cut is not None and not (_is_cut(weight) or _is_cut(bias)):
            weight, bias = _own_rows(weight, cut), _own_rows(bias, cut)
        elif is_dtensor(weight):
            options = _sharded_by(f"{prefix}weight", weight, 0, options)
            if bias is not None and not is_dtensor(bias):
                raise ValueError(
                    f"{prefix}bias is a plain tensor and {prefix}weight a DTensor: shard both"
                )
            weight = weight.to_local()  # type: ignore[attr-defined]
        elif is_dtensor(bias):
            raise ValueError(f"{prefix}bias is a DTensor and {prefix}weight is none: shard both")
        if bias is not None and is_dtensor(bias):
            options = _sharded_by(f"{prefix}bias", bias, 0, options)
            bias = bias.to_local()  # type: ignore[attr-defined]
        whole, owners = _all_tokens(f"{prefix}hidden", hidden, options.vocab_parallel)
        if not prefix:
            options = options._replace(owners=owners)
        local.append((whole, weight, bias))
    return local, _replicated("labels", labels), _with_local_weights(options)


def _is_cut(tensor: Any) -> bool:
    return is_dtensor(tensor) and any(each.is_shard() for each in tensor.placements)


def _own_rows(whole: Any, like: Any) -> Any:
    """Of a teacher's weight or bias that each rank has whole, the rows that `like` has here.

    A teacher gets no gradient, so no other rank misses what this one leaves out.
    """
    if is_dtensor(whole):
        whole = whole.to_local()
    if not isinstance(whole, Tensor):
        return whole
    first = first_of(like, 0)
    return whole[first : first + like.to_local().shape[0]]


def _with_local_weights(options: CallOptions) -> CallOptions:
    return options._replace(token_weights=_replicated("token_weights", options.token_weights))


def _replicated(name: str, tensor: Any) -> Any:
    """A tensor of all tokens on each rank; gradients go back to where its parts lie."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = tensor.device_mesh, tensor.placements
    inner = tensor.dim() - 1 if name.endswith("hidden") else tensor.dim()
    if mesh.ndim != 1 or (isinstance(placements[0], Shard) and placements[0].dim >= inner):
        raise ValueError(f"{name} is a DTensor {_layout(tensor)}. {_HELP}; redistribute it first")
    return tensor.redistribute(mesh, [Replicate()]).to_local()


def _all_tokens(name: str, hidden: Any, shared: VocabParallel | None) -> tuple[Any, Tensor | None]:
    """Hidden states of all tokens, and who wants their gradient, where it is one rank each."""
    if not is_dtensor(hidden) or shared is None or torch.compiler.is_compiling():
        return _replicated(name, hidden), None
    mesh, placement = hidden.device_mesh, hidden.placements[0]
    group = process_group(shared)
    same = mesh.ndim == 1 and _ranks_in(mesh.get_group()) == _ranks_in(group)
    if not same or not placement.is_shard() or not 0 <= placement.dim < hidden.dim() - 1:
        return _replicated(name, hidden), None
    dim = placement.dim
    parts = TokenParts.of(group.group_name, group.rank(), group.size(), dim, hidden.shape[dim])
    whole = gather_tokens(hidden.to_local(), parts)
    return whole, parts.owners(whole)


def _ranks_in(group: dist.ProcessGroup) -> list[int]:
    return dist.get_process_group_ranks(group)


def _sharded_by(name: str, tensor: Tensor, dim: int, options: CallOptions) -> CallOptions:
    """Options that say which columns this rank's part of a DTensor holds."""
    from torch.distributed.tensor import Replicate, Shard

    dtensor: DTensor = tensor  # type: ignore[assignment]
    mesh, placements = dtensor.device_mesh, dtensor.placements
    kinds = (Replicate(), Shard(dim))
    if mesh.ndim != 1 or placements[0] not in kinds:
        raise ValueError(
            f"{name} is a DTensor {_layout(dtensor)}. {_HELP}; redistribute {name} first, or take "
            f"{name}.full_tensor()"
        )
    if placements[0] == Replicate():
        return options
    columns = dtensor.shape[dim]
    vocab_size = columns if options.vocab_size is None else options.vocab_size
    found = VocabParallel(mesh.get_group(), first_of(dtensor, dim), vocab_size)
    given = options.vocab_parallel
    if given is not None and given != found:
        raise ValueError(
            f"vocab_parallel is {given}, but {name} is a DTensor {_layout(dtensor)}: leave "
            "vocab_parallel out, or pass local tensors"
        )
    return options._replace(vocab_parallel=found, vocab_size=vocab_size)


def first_of(tensor: DTensor, dim: int) -> int:
    """Where this rank's part of a DTensor begins along a dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    # An empty shard is said to begin at the end.
    return min(int(offset[dim]), tensor.shape[dim])


def _layout(tensor: Any) -> str:
    return (
        f"of placements {tuple(tensor.placements)} on a mesh of {tuple(tensor.device_mesh.shape)}"
    )
