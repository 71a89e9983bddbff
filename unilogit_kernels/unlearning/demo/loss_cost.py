"""Peak memory and time of the fused loss and of the literal one, on one batch of real tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from unilogit_kernels import linear_unilogit_loss, reference
from unilogit_kernels.huggingface.head import HeadCall, run_head
from unilogit_kernels.testing import AllocationGuard
from unilogit_kernels.unlearning.data import Features, collate

_TOKENS, _REPEATS = 1024, 3


def compare_losses(
    top: LlamaForCausalLM, examples: Sequence[Features], pad_id: int
) -> dict[str, dict[str, float]]:
    """Loss and gradients for hidden states and weight, fused and literal.

    Args:
        top: the model whose head and hidden states are used.
        examples: rows, of which as many are taken as make 1024 tokens.
        pad_id: the token to pad with.

    Returns:
        `fused` and `literal`: `peak_mib` of the tensors that torch allocated on top of the inputs
        (counted at each allocation by `testing.AllocationGuard`, so it does not vary), `seconds`
        (the median of three runs) and `loss`; and `shape`: the sizes.
    """
    hidden, labels = _real_tokens(top, examples, pad_id)
    weight = top.lm_head.weight.detach().clone().requires_grad_()
    hidden.requires_grad_()

    def fused() -> Tensor:
        return linear_unilogit_loss(hidden, weight, labels)

    def literal() -> Tensor:
        return reference.unilogit_loss(F.linear(hidden, weight), labels)

    result = {
        name: _cost(loss, hidden, weight) for name, loss in (("fused", fused), ("literal", literal))
    }
    tokens, width = hidden.shape
    result["shape"] = {"tokens": tokens, "hidden": width, "vocabulary": weight.shape[0]}
    return result


def _real_tokens(
    top: LlamaForCausalLM, examples: Sequence[Features], pad_id: int
) -> tuple[Tensor, Tensor]:
    """Hidden states before the head, `[1024, H]`, and a label for each."""
    batch: dict[str, Any] = dict(collate(examples, pad_id))
    del batch["labels"]

    def states(head: HeadCall) -> Tensor:
        return head.hidden

    with torch.no_grad():
        hidden = run_head(top, states, **batch)[batch["attention_mask"].bool()][:_TOKENS]
        # What the model itself would say is a token it is sure of: where unlearning works.
        labels = torch.cat(
            [F.linear(part, top.lm_head.weight).argmax(-1) for part in hidden.split(64)]
        )
    return hidden.clone(), labels


def _cost(loss: Callable[[], Tensor], *inputs: Tensor) -> dict[str, float]:
    def run() -> float:
        for tensor in inputs:
            tensor.grad = None
        value = loss()
        value.backward()
        return float(value.detach())

    with AllocationGuard() as guard:
        value = run()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    for tensor in inputs:
        tensor.grad = None
    return {
        "peak_mib": guard.peak_bytes / 2**20,
        "seconds": statistics.median(seconds),
        "loss": value,
    }
