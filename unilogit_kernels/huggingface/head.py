"""A loss in the place of the logits, for any Hugging Face causal LM.

The model's own forward runs, and so does its lm_head's own `__call__`, so that the hooks of FSDP,
accelerate and others fire and the weight is there when it is used. For the length of one call the
head's forward is replaced: it computes a small result from its input and its weight, and returns a
few numbers, the probe, where the logits would have been.

What a model does to its logits after the head (Gemma 2 caps them, Cohere multiplies, Granite
divides) happens to the probe. So nothing is read from the names in a config: the scale, the cap and
the number of real tokens are observed once per model, every later call checks that the probe comes
back as expected, and a transformation the kernels do not know is an error.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unilogit_kernels import reference
from unilogit_kernels.functional import (
    ObjectiveLike,
    linear_objective_loss,
    linear_target_log_odds,
    shift_labels,
)
from unilogit_kernels.functional.mixed import MixedLoss, linear_mixed_loss
from unilogit_kernels.objectives import Objective

# Probe values. The smallest is in the linear part of any cap and shows the scale, the largest is
# far beyond any cap and shows it, and those between show whether it is the tanh the kernels know.
_SMALLEST, _LARGEST = 2.0**-20, 1e30
_PROBE = (_SMALLEST, _LARGEST, 0.5, -1.0, 3.0, -10.0, 30.0, -100.0, 1000.0, -1e30)
# Some models cast logits to float32 before they cap them, so a float64 probe may come back rounded.
_PROBE_TOLERANCE = 8 * torch.finfo(torch.float32).eps


class UnsupportedHeadError(ValueError):
    """The fused losses cannot stand in for this model's head, or for what follows it."""


@dataclasses.dataclass(frozen=True)
class HeadTransform:
    """What a model does to the output of its lm_head: `softcap * tanh(scale * x / softcap)`.

    Attributes:
        logit_scale: factor on the raw logits, or None for 1.
        softcap: the cap, or None.
        vocab_size: number of leading columns the model keeps.
    """

    logit_scale: float | None
    softcap: float | None
    vocab_size: int

    def __call__(self, raw: Tensor) -> Tensor:
        """Transform raw logits `[..., rows of the weight]`; the dtype is kept."""
        return reference.transform_logits(raw, **dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class HeadCall:
    """The inputs of the lm_head during one forward, from which a loss can be computed.

    Attributes:
        hidden: `[B, T, H]`, the last hidden states.
        weight: `[rows, H]`.
        bias: `[rows]` or None.
        transform: what happens to the logits after the head.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    transform: HeadTransform

    def objective_loss(
        self,
        labels: Tensor,
        objective: ObjectiveLike,
        *,
        rows: slice = slice(None),
        **options: Any,
    ) -> Tensor:
        """`linear_objective_loss` of the sequences `rows`.

        Args:
            labels: int64 `[B', T]`, as Hugging Face takes them: not shifted; -100 does not count.
            objective: see `linear_objective_loss`; its per-token tensors are aligned with `labels`.
            rows: which of the B sequences the labels belong to.
            options: `reduction`, `token_weights`, `num_items_in_batch`, `ignore_index`, `backend`.

        Returns:
            A scalar, or `[B', T]` for `reduction="none"`: position t is about token t + 1.
        """
        if options.get("token_weights") is not None:
            # A weight belongs to the token, as its label does, so it moves with it.
            options["token_weights"] = _shifted(options["token_weights"])
        if isinstance(objective, Objective):
            objective = objective.map_tokens(_shifted)
        return linear_objective_loss(
            self.hidden[rows],
            self.weight,
            shift_labels(labels, options.get("ignore_index", -100)),
            objective,
            bias=self.bias,
            **dataclasses.asdict(self.transform),
            **options,
        )

    def mixed_loss(
        self, labels: Tensor, parts: Sequence[str | Objective], rows: Tensor, **options: Any
    ) -> MixedLoss:
        """`linear_mixed_loss`: several objectives in one call, each for its own sequences.

        Args:
            labels: int64 `[B, T]`, as Hugging Face takes them: not shifted; -100 does not count.
            parts: see `mixed_loss`; what they hold per token is aligned with `labels`.
            rows: int64 `[B]`: which of the parts each sequence takes.
            options: `weights`, `reduction`, `num_items_in_batch`, `backend`.

        Returns:
            The loss and its parts.
        """
        return linear_mixed_loss(
            self.hidden,
            self.weight,
            shift_labels(labels),
            [p.map_tokens(_shifted) if isinstance(p, Objective) else p for p in parts],
            rows[:, None].expand(labels.shape),
            bias=self.bias,
            **dataclasses.asdict(self.transform),
            **options,
        )

    def log_odds(self, labels: Tensor, *, backend: str | None = None) -> Tensor:
        """`linear_target_log_odds`: float32 `[B, T]`, position t is about token t + 1."""
        return linear_target_log_odds(
            self.hidden,
            self.weight,
            shift_labels(labels),
            bias=self.bias,
            backend=backend,
            **dataclasses.asdict(self.transform),
        )


def _shifted(values: Tensor) -> Tensor:
    """What belongs to token t + 1, at position t."""
    return nn.functional.pad(values[..., 1:], (0, 1))


def fused_loss(
    model: nn.Module,
    *,
    labels: Tensor,
    objective: ObjectiveLike = "unilogit",
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    backend: str | None = None,
    **inputs: Any,
) -> Tensor:
    """The loss of a causal LM without its `[B, T, V]` logits.

    Args:
        model: a Hugging Face causal LM, also wrapped by DDP, FSDP2, accelerate or peft.
        labels: int64 `[B, T]`, not shifted: usually `input_ids` with prompt and padding set to
            `ignore_index`.
        objective: `"unilogit"`, `"unilogit_forward"`, `"cross_entropy"`, `"gradient_ascent"`, an
            `Objective` or a differentiable function of the log-odds.
        ignore_index: label of tokens that do not count.
        reduction: `"mean"` over the counted tokens, `"sum"` or `"none"`.
        token_weights: `[B, T]`, weight of each token's loss, aligned with `labels`.
        num_items_in_batch: denominator of the mean, where it covers several batches.
        backend: name of a backend, or None for the best available.
        inputs: what the model's forward takes: `input_ids`, `attention_mask`, `inputs_embeds`...

    Returns:
        A scalar, or `[B, T]` for `reduction="none"`, where position t is the loss of token t + 1.

    Raises:
        UnsupportedHeadError: the lm_head is not a plain linear layer (LoRA, quantised, sharded over
            its vocabulary), or the model does to its logits what the kernels cannot.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...     num_attention_heads=2,
        ... )
        >>> model = transformers.LlamaForCausalLM(config)
        >>> ids = torch.randint(50, (2, 7))
        >>> fused_loss(model, input_ids=ids, labels=ids, objective="unilogit").shape
        torch.Size([])
    """

    def compute(head: HeadCall) -> Tensor:
        return head.objective_loss(
            labels,
            objective,
            ignore_index=ignore_index,
            reduction=reduction,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            backend=backend,
        )

    return run_head(model, compute, **inputs)


def fused_log_odds(
    model: nn.Module, *, labels: Tensor, backend: str | None = None, **inputs: Any
) -> Tensor:
    """The log-odds `logit(p_y)` of each label, differentiable, without the logits.

    Args:
        model: see `fused_loss`.
        labels: int64 `[B, T]`, not shifted; -100 does not count.
        backend: name of a backend, or None for the best available.
        inputs: what the model's forward takes.

    Returns:
        float32 `[B, T]`: position t is about token t + 1. `log p = -softplus(-d)`.

    Raises:
        UnsupportedHeadError: see `fused_loss`.
    """
    return run_head(model, lambda head: head.log_odds(labels, backend=backend), **inputs)


def run_head(model: nn.Module, compute: Callable[[HeadCall], Tensor], **inputs: Any) -> Tensor:
    """Run a causal LM and let `compute` stand in for its lm_head.

    For several losses in one forward: `compute` may call the methods of `HeadCall` for different
    rows and stack the results.

    Args:
        model: see `fused_loss`.
        compute: from the inputs of the head to a small tensor.
        inputs: what the model's forward takes. The model is called without labels.

    Returns:
        What `compute` returned, attached to the graph.

    Raises:
        UnsupportedHeadError: see `fused_loss`.
        ValueError: `logits_to_keep` among the inputs.
    """
    if "logits_to_keep" in inputs:
        raise ValueError("logits_to_keep cannot be used here: tokens without a label cost nothing")
    transform = observe_logit_transform(model)

    def compute_with_transform(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return compute(HeadCall(hidden, weight, bias, transform))

    probe = torch.tensor(_PROBE, dtype=torch.float64)
    result, seen = _run(model, compute_with_transform, lambda _: probe, inputs)
    expected = dataclasses.replace(transform, vocab_size=probe.numel())(probe)
    _require_same(seen.detach().cpu().double().flatten(), expected)
    return _attach(result, seen)


_transforms: weakref.WeakKeyDictionary[nn.Module, HeadTransform] = weakref.WeakKeyDictionary()


def observe_logit_transform(model: nn.Module) -> HeadTransform:
    """Find out what a causal LM does to its logits, by one forward over one token.

    The answer is kept with the model; a later call costs nothing.

    Args:
        model: see `fused_loss`.

    Returns:
        The scale, the cap and the size of the vocabulary.

    Raises:
        UnsupportedHeadError: it is not a factor followed by a tanh cap, or the head is not a plain
            linear layer.
    """
    inner = extract_model_from_parallel(model)
    if inner not in _transforms:
        _transforms[inner] = _observe(model)
    return _transforms[inner]


def verify_head(model: nn.Module, tokens: int = 8, seed: int = 0) -> float:
    """Check the fused head of a model against the logits of its own forward, on random tokens.

    Args:
        model: see `fused_loss`.
        tokens: length of the random sequence.
        seed: of the random tokens.

    Returns:
        The largest difference between the fused log-odds and those of `model(...).logits`.

    Raises:
        UnsupportedHeadError: they differ by more than the rounding of the logits explains.
    """
    vocab_size = observe_logit_transform(model).vocab_size
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (1, tokens), generator=draw).to(_device(model))

    def largest_sum(head: HeadCall) -> Tensor:
        hidden, weight = head.hidden.float(), head.weight.float()
        norms: Tensor = hidden.norm(dim=-1).max() * weight.norm(dim=-1).max()
        return norms * math.sqrt(hidden.shape[-1])

    with torch.no_grad(), evaluating(model):
        fused = fused_log_odds(model, labels=ids, input_ids=ids)[0, :-1].double()
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        gemm = run_head(model, largest_sum, input_ids=ids)
    plain = reference.target_log_odds(logits.double(), ids[0, 1:])
    difference = float((fused - plain).abs().max())
    # A logit is off by its own rounding, and by that of the sum behind it.
    rounding = torch.finfo(logits.dtype).eps * float(logits.abs().max())
    rounding += torch.finfo(torch.float32).eps * float(gemm)
    if not difference <= 2 * rounding:
        raise UnsupportedHeadError(
            f"the fused log-odds differ from those of the model's logits by {difference:.3g}, "
            f"where rounding explains {2 * rounding:.3g}"
        )
    return difference


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, so that an extra forward draws no random numbers."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _observe(model: nn.Module) -> HeadTransform:
    def no_result(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return hidden.new_zeros(())

    def full_width_probe(weight: Tensor) -> Tensor:
        # As wide as the logits, because some models cut off the padding of their vocabulary.
        return torch.full((weight.shape[0],), _SMALLEST, dtype=torch.float64)

    def spot_probe(weight: Tensor) -> Tensor:
        return torch.tensor(_PROBE, dtype=torch.float64)

    one_token = {"input_ids": torch.zeros(1, 1, dtype=torch.int64, device=_device(model))}
    with torch.no_grad(), evaluating(model):
        _, row = _run(model, no_result, full_width_probe, one_token)
        _, spots = _run(model, no_result, spot_probe, one_token)
    seen = spots.detach().cpu().double().flatten()
    scale, cap = float(seen[0]) / _SMALLEST, float(seen[1])
    transform = HeadTransform(
        logit_scale=None if abs(scale - 1) <= _PROBE_TOLERANCE else scale,
        softcap=cap if cap < _LARGEST * min(scale, 1) / 2 else None,
        vocab_size=row.shape[-1],
    )
    probe = torch.tensor(_PROBE, dtype=torch.float64)
    _require_same(seen, dataclasses.replace(transform, vocab_size=probe.numel())(probe))
    return transform


def _require_same(seen: Tensor, expected: Tensor) -> None:
    if seen.shape == expected.shape and torch.allclose(
        seen, expected, rtol=_PROBE_TOLERANCE, atol=0.0
    ):
        return
    raise UnsupportedHeadError(
        "the model does to its logits what the fused losses cannot: raw logits "
        f"{list(_PROBE)} came out as {seen.tolist()}, where a scale followed by a tanh cap gives "
        f"{expected.tolist()}; use objective_loss on model(...).logits"
    )


def _run(
    model: nn.Module,
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    make_probe: Callable[[Tensor], Tensor],
    inputs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """One forward with `compute` in the head's place: its result, and the probe as it came out."""
    head = _plain_head(model)
    results: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        if isinstance(head.weight, DTensor):
            raise UnsupportedHeadError(
                "the lm_head's weight is a DTensor inside its own forward, so it is sharded over "
                "the vocabulary: leave lm_head out of the tensor-parallel plan"
            )
        results.append(compute(hidden, head.weight, head.bias))
        return _stand_in(results[-1], make_probe(head.weight))

    # accelerate's hooks have replaced `forward` already and call what it was from within.
    attribute = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
    previous = vars(head).get(attribute)
    setattr(head, attribute, forward)
    try:
        output = model(**{"use_cache": False, **inputs})
    finally:
        if previous is None:
            delattr(head, attribute)
        else:
            setattr(head, attribute, previous)
    if len(results) != 1:
        raise UnsupportedHeadError(f"the lm_head was called {len(results)} times in one forward")
    return results[0], output[0] if isinstance(output, tuple) else output.logits


def _plain_head(model: nn.Module) -> nn.Linear:
    """The lm_head, if its forward is `hidden @ weight.T + bias` and nothing else."""
    inner = extract_model_from_parallel(model)
    find = getattr(inner, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise UnsupportedHeadError(
            f"{type(inner).__name__} has no output embeddings; expected a causal LM"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UnsupportedHeadError(f"{type(inner).__name__} is an encoder-decoder, not a causal LM")
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    if kind.startswith("peft."):
        raise UnsupportedHeadError(
            f"the lm_head is wrapped by peft ({kind}): its adapter would be lost. Leave lm_head "
            "out of target_modules and modules_to_save, or call merge_and_unload() first"
        )
    if (
        not isinstance(head, nn.Linear)
        or type(head).forward is not nn.Linear.forward
        or not head.weight.is_floating_point()
    ):
        raise UnsupportedHeadError(
            f"the lm_head is a {kind}, not a plain torch.nn.Linear. If it is quantised, load the "
            "model with the lm_head left out of the quantisation (llm_int8_skip_modules, "
            "modules_to_not_convert), or dequantise it"
        )
    if "forward" in vars(head) and not hasattr(head, "_hf_hook"):
        raise UnsupportedHeadError(
            "the forward of the lm_head has been replaced on the module, so its effect on the "
            "logits is unknown: undo that first"
        )
    return head


class _StandIn(torch.autograd.Function):
    """Returns the probe, as a function of the result.

    The result thereby depends on the head's output and on the model's, so that hooks which wait
    for their gradients (FSDP gathers weights there) fire before the result's own backward.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, probe: Tensor) -> Tensor:
        ctx.like = (result.shape, result.dtype, result.device)
        return probe.reshape(1, 1, -1).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device), None


class _Attach(torch.autograd.Function):
    """Returns the result, as a function of the model's output too; the other half of `_StandIn`."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, output: Tensor) -> Tensor:
        ctx.like = (output.shape, output.dtype, output.device)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        shape, dtype, device = ctx.like
        return grad, torch.zeros(shape, dtype=dtype, device=device)


def _stand_in(result: Tensor, probe: Tensor) -> Tensor:
    return cast(Tensor, _StandIn.apply(result, probe))


def _attach(result: Tensor, output: Tensor) -> Tensor:
    return cast(Tensor, _Attach.apply(result, output))
