"""Validation: each user-facing error is raised here, before anything is computed.

A call is checked once and described by one `LossCall`, which the layers below trust.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.calls.vocab_parallel import place_of
from unilogit_kernels.fused_linear.options import LinearOptions, budget_in_bytes
from unilogit_kernels.ops.derivatives import any_tangent
from unilogit_kernels.rows.ranks import Shard

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
MIN_MEMORY_BUDGET = 1 << 20
"""Bytes: with less, a chunk is a few rows or columns of any real lm_head."""


_DEFAULT = LinearOptions()


class LossCall(NamedTuple):
    """A validated call.

    Attributes:
        shape: Leading shape `[...]` of logits, hidden states and labels.
        labels: int64 `[n]`, contiguous; None where every position counts and no label is seen. The
            operators check their range: only they may look at numbers.
        ignore_index: Label of positions that do not count.
        row_weight: `[n]`, the token weights with 0 at ignored positions, in `statistics_dtype`.
        factor: 0-d, what the weighted sum is multiplied by: 1 / denominator, or 1.
        reduction: `"mean"`, `"sum"` or `"none"`.
        weighted: Whether `token_weights` were given.
        items_given: Whether `num_items_in_batch` was.
        transform: What the model does to the raw logits.
        vocab_size: Number of tokens that carry probability.
        shard: Which of their columns the operands hold; all of them, of no group, for a process
            that shares the vocabulary with nobody.
        backend: Name of the backend that runs the row kernels.
        linear: How a fused linear call may run.
    """

    shape: torch.Size
    labels: Tensor | None
    ignore_index: int
    row_weight: Tensor
    factor: Tensor
    reduction: str
    weighted: bool
    items_given: bool
    transform: LogitTransform
    vocab_size: int
    shard: Shard
    backend: str
    linear: LinearOptions = _DEFAULT


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics, slopes and losses: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe_logits(
    logits: Tensor,
    labels: Tensor | None,
    options: CallOptions,
) -> LossCall:
    """Validate a call on logits `[..., V]`; without labels every position counts.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A shape, device or option is wrong.
        RuntimeError: The requested backend cannot run here.
    """
    check_float("logits", logits)
    if logits.dim() < 1:
        raise ValueError("logits must have shape [..., V], got a scalar")
    return _describe(
        ("logits", logits),
        labels,
        columns=logits.shape[-1],
        columns_of="logits' last dimension",
        options=options,
    )


def describe_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    options: CallOptions,
    linear: LinearOptions,
) -> LossCall:
    """Validate a call on hidden states `[..., H]` and an lm_head `[V, H]`.

    Raises:
        TypeError: A dtype is wrong, or dtypes are mixed outside autocast.
        ValueError: A shape, device or option is wrong.
        RuntimeError: The requested backend cannot run here.
    """
    check_head(hidden, weight, bias)
    linear = check_linear_options(linear, hidden.dtype)
    call = _describe(
        ("hidden", hidden),
        labels,
        columns=weight.shape[0],
        columns_of="weight's rows",
        options=options,
    )
    return call._replace(linear=linear)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "") -> None:
    """Check an lm_head and the hidden states that enter it; `prefix` is part of their names.

    Raises:
        TypeError: A dtype is wrong, or dtypes are mixed.
        ValueError: A shape or device is wrong.
    """
    names = [f"{prefix}{name}" for name in ("hidden", "weight", "bias")]
    check_float(names[0], hidden)
    check_float(names[1], weight)
    fits = weight.dim() == 2 and hidden.dim() >= 1 and hidden.shape[-1] == weight.shape[1]
    if not fits and weight.dim() == 2 and hidden.dim() and hidden.shape[-1] == weight.shape[0]:
        raise ValueError(
            f"{names[0]} must have shape [..., H] and {names[1]} [V, H], got {names[0]} "
            f"{list(hidden.shape)} and {names[1]} {list(weight.shape)}: {names[0]} has as many "
            "columns as the vocabulary, as logits have; did you mean `unilogit_loss`, or another "
            "function without `linear_`, which take logits?"
        )
    if not fits or weight.shape[1] == 0:
        raise ValueError(
            f"{names[0]} must have shape [..., H] and {names[1]} [V, H] of one H >= 1, the same H, "
            f"got {names[0]} {list(hidden.shape)} and {names[1]} {list(weight.shape)}"
        )
    operands = [(names[1], weight)]
    if bias is not None:
        check_float(names[2], bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]} must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}"
            )
        operands.append((names[2], bias))
    for name, tensor in operands:
        if tensor.dtype != hidden.dtype:
            raise TypeError(
                f"{name} must have {names[0]}'s dtype {hidden.dtype} outside torch.autocast, "
                f"got {tensor.dtype}"
            )
        check_device(name, tensor, names[0], hidden)


# Asked here, since torch 2.10 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "hpu", "xla"))
)


def cast_for_autocast(operand: Tensor) -> Tensor:
    """Under autocast, what a GEMM would do: cast its operand, differentiably; else no change.

    float64 is left alone, as autocast leaves it.
    """
    if (
        not isinstance(operand, Tensor)
        or operand.dtype not in FLOAT_DTYPES[:3]
        or operand.device.type not in _WITH_AUTOCAST
        or not torch.is_autocast_enabled(operand.device.type)
    ):
        return operand
    return operand.to(torch.get_autocast_dtype(operand.device.type))


def as_rows(tensor: Tensor) -> Tensor:
    """Logits or hidden states `[..., m]` as `[n, m]`."""
    if tensor.dim() == 2:
        return tensor  # A view would be one more step of a backward.
    m = tensor.shape[-1]
    return tensor.reshape(-1, m) if m else tensor.reshape(math.prod(tensor.shape[:-1]), 0)


def _describe(
    operand: tuple[str, Tensor],
    labels: Tensor | None,
    *,
    columns: int,
    columns_of: str,
    options: CallOptions,
) -> LossCall:
    name, tensor = operand
    shape = tensor.shape[:-1]
    _check_ignore_index(options.ignore_index)
    if labels is not None:
        _check_labels(labels, name, tensor)
    if options.reduction not in REDUCTIONS:
        raise ValueError(
            f"options.reduction must be one of {', '.join(REDUCTIONS)}, got {options.reduction!r}"
        )
    if options.vocab_parallel is None:
        vocab_size = _check_vocab_size(options.vocab_size, columns, columns_of)
        shard = Shard(0, vocab_size, "")
    else:
        shard, vocab_size = place_of(
            options.vocab_parallel, columns, options.vocab_size, labels, tensor
        )
        shard = shard._replace(owners=options.owners)
    transform = check_transform(options.softcap, options.logit_scale)
    chosen = registry.choose(options.backend, tensor.device.type, tensor.dtype)
    if labels is None:
        valid = torch.ones(math.prod(shape), dtype=torch.bool, device=tensor.device)
    else:
        if labels.dim() != 1 or labels.dtype != torch.int64 or not labels.is_contiguous():
            labels = labels.reshape(-1).to(torch.int64).contiguous()
        valid = labels != options.ignore_index
    dtype = statistics_dtype(tensor.dtype)
    row_weight = counted = valid.to(dtype)
    if options.token_weights is not None:
        weights = _check_token_weights(options.token_weights, shape, name, tensor)
        row_weight = torch.where(valid, weights.reshape(-1).to(dtype), 0.0)
    return LossCall(
        shape=shape,
        labels=labels,
        ignore_index=int(options.ignore_index),
        row_weight=row_weight,
        factor=_factor(options.reduction, options.num_items_in_batch, counted),
        reduction=options.reduction,
        weighted=options.token_weights is not None,
        items_given=options.num_items_in_batch is not None,
        transform=transform,
        vocab_size=vocab_size,
        shard=shard,
        backend=chosen,
    )


def _check_ignore_index(ignore_index: object) -> None:
    if not isinstance(ignore_index, numbers.Integral):
        raise TypeError(
            "ignore_index must be an int, the label of positions that do not count (-100 by "
            f"default), got {ignore_index!r}"
        )


def _check_labels(labels: Tensor, name: str, tensor: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be an int64 or int32 tensor, got {given}")
    if labels.shape != tensor.shape[:-1]:
        raise ValueError(
            f"labels must have {name}'s leading shape {list(tensor.shape[:-1])}, "
            f"got {list(labels.shape)} for {name} {list(tensor.shape)}"
        )
    check_device("labels", labels, name, tensor)


def check_float(name: str, tensor: Tensor) -> None:
    """Check that an operand is a local tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
            + ("; dequantise it first" if not tensor.dtype.is_floating_point else "")
        )


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Check that two operands are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}"
        )


def _check_vocab_size(vocab_size: int | None, columns: int, columns_of: str) -> int:
    if vocab_size is None:
        vocab_size = columns
    if not 2 <= vocab_size <= columns:
        raise ValueError(
            f"vocab_size must be between 2 and {columns_of} ({columns}), got {vocab_size}; "
            "with a single token every probability is 1 and log(V-1) does not exist"
        )
    return vocab_size


def check_transform(
    softcap: float | None, logit_scale: float | None, *, prefix: str = ""
) -> LogitTransform:
    """Check what a model does to its logits; `prefix` is part of the options' names."""
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{prefix}softcap must be a positive finite number or None, got {softcap}")
    if logit_scale is not None and (logit_scale == 0.0 or not math.isfinite(logit_scale)):
        raise ValueError(f"{prefix}logit_scale must be a non-zero finite number, got {logit_scale}")
    return LogitTransform(
        1.0 if logit_scale is None else float(logit_scale),
        0.0 if softcap is None else float(softcap),
    )


def check_linear_options(options: LinearOptions, dtype: torch.dtype) -> LinearOptions:
    """Check how a fused linear call of operands in `dtype` may run.

    Returns:
        The same with its budget in bytes.

    Raises:
        ValueError: A number is out of range.
        TypeError: It is no `LinearOptions`, or `logits_dtype` does not go with `dtype`.
    """
    if not isinstance(options, LinearOptions):
        raise TypeError(f"options must be LinearOptions or None, got {options!r}")
    given, budget = options.memory_budget, budget_in_bytes(options)
    if given is not None and (not isinstance(budget, int) or budget < MIN_MEMORY_BUDGET):
        raise ValueError(
            f"memory_budget is in bytes, at least {MIN_MEMORY_BUDGET}, or a text such as '64MiB', "
            f"or None for the default of the device, got {given!r}"
        )
    if not 0.0 <= options.skip_below < 1.0:
        raise ValueError(f"skip_below must be in [0, 1), got {options.skip_below}")
    if options.logits_dtype not in (None, dtype, statistics_dtype(dtype)):
        raise TypeError(
            f"logits_dtype must be the operands' dtype {dtype}, {statistics_dtype(dtype)} or None, "
            f"got {options.logits_dtype}"
        )
    return options if budget is given else options._replace(memory_budget=budget)


def _check_token_weights(
    token_weights: Tensor, shape: Sequence[int], name: str, tensor: Tensor
) -> Tensor:
    if not isinstance(token_weights, Tensor) or not (
        token_weights.dtype.is_floating_point or token_weights.dtype == torch.bool
    ):
        given = getattr(token_weights, "dtype", type(token_weights).__name__)
        raise TypeError(f"token_weights must be a float or bool tensor, got {given}")
    if token_weights.shape != torch.Size(shape):
        raise ValueError(
            f"token_weights must have the labels' shape {list(shape)}, "
            f"got {list(token_weights.shape)}"
        )
    check_device("token_weights", token_weights, name, tensor)
    if token_weights.requires_grad or any_tangent([token_weights]):
        raise ValueError(
            "token_weights requires grad, but no gradient flows to it: pass "
            "token_weights.detach(), or use reduction='none' and weight the losses yourself"
        )
    return token_weights


def _factor(reduction: str, num_items_in_batch: int | Tensor | None, counted: Tensor) -> Tensor:
    """What the weighted sum is multiplied by; `counted` is 1 where a row counts, else 0."""
    if num_items_in_batch is not None:
        if reduction != "mean":
            raise ValueError(
                "num_items_in_batch is the denominator of reduction='mean', "
                f"got reduction={reduction!r}"
            )
        if isinstance(num_items_in_batch, Tensor):
            if num_items_in_batch.numel() != 1:
                raise ValueError(
                    "num_items_in_batch must hold one number, "
                    f"got shape {list(num_items_in_batch.shape)}"
                )
            items = num_items_in_batch.detach().reshape(()).to(counted.device, counted.dtype)
            return items.clamp(min=1).reciprocal()
        if num_items_in_batch < 0:
            raise ValueError(f"num_items_in_batch must be >= 0, got {num_items_in_batch}")
        return counted.new_full((), 1 / max(num_items_in_batch, 1))
    if reduction != "mean":
        return counted.new_ones(())
    return counted.sum().clamp_(min=1).reciprocal_()
