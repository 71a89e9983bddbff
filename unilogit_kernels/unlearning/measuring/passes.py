"""The passes over a model that all metrics are computed from; none of them holds logits.

Each takes examples and returns what belongs to them in their order, so that the examples can be
split between processes and the results put together again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from unilogit_kernels.huggingface.head import HeadCall, evaluating, fused_token_statistics
from unilogit_kernels.huggingface.two_heads import heads_kl_loss, run_two_heads
from unilogit_kernels.unlearning.data import IGNORED, Features
from unilogit_kernels.unlearning.evaluation import in_batches
from unilogit_kernels.unlearning.metrics.tokens import Floats, TokenRecord

Progress = Callable[[int], None]
"""Is told how many examples have been done since it was last told."""

_FIELDS = ("log_prob", "is_argmax", "entropy", "log_prob_variance")


def token_records(
    model: nn.Module,
    examples: Sequence[Features],
    *,
    pad_id: int,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[TokenRecord]:
    """What a causal LM says of each labelled token, in one forward and without logits.

    Args:
        model: a Hugging Face causal LM, wrapped or not.
        examples: `input_ids` or `inputs_embeds`, and `labels`, of each.
        pad_id: the token to pad with.
        batch_size: examples in one forward.
        progress: see `Progress`.

    Returns:
        For each example its labelled tokens but the first of all tokens, which nothing predicts;
        float32. Nothing random is drawn, and the model's modes are left as they were.

    Raises:
        UnsupportedHeadError: see `fused_loss`.
    """
    found: dict[int, TokenRecord] = {}
    with torch.no_grad(), evaluating(model):
        for positions, labels, inputs in in_batches(model, examples, pad_id, batch_size):
            seen = fused_token_statistics(model, labels=labels, fields=_FIELDS, **inputs)
            columns = [_given(getattr(seen, field))[:, :-1].cpu() for field in _FIELDS]
            counted = (labels[:, 1:] != IGNORED).cpu()
            for row, position in enumerate(positions):
                log_prob, is_argmax, entropy, variance = (
                    column[row][counted[row]].numpy() for column in columns
                )
                found[position] = TokenRecord(log_prob, is_argmax, -entropy, variance)
            if progress is not None:
                progress(len(positions))
    return [found[position] for position in range(len(examples))]


def divergences(
    model: nn.Module,
    golden: nn.Module,
    examples: Sequence[Features],
    *,
    pad_id: int,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Floats:
    """How far a causal LM's predictions are from another's, without the logits of either.

    Args:
        model: a Hugging Face causal LM, wrapped or not.
        golden: the other one, with the same tokenizer; not the same module.
        examples: see `token_records`.
        pad_id: the token to pad with.
        batch_size: examples in one forward of both.
        progress: see `Progress`.

    Returns:
        float64 `[examples, 2]`, in nats: the mean over the labelled tokens of KL(golden || model),
        and that of KL(model || golden).

    Raises:
        UnsupportedHeadError: see `fused_loss`, for either model.
        ValueError: see `fused_kl_loss`.
    """
    found = np.zeros((len(examples), 2))
    with torch.no_grad(), evaluating(model):
        for positions, labels, inputs in in_batches(model, examples, pad_id, batch_size):

            def both(student: HeadCall, teacher: HeadCall, labels: Tensor = labels) -> Tensor:
                return torch.stack(
                    [
                        heads_kl_loss(
                            student, teacher, labels, direction=direction, reduction="none"
                        )
                        for direction in ("forward", "reverse")
                    ]
                )

            seen = run_two_heads(model, golden, both, **inputs)[:, :, :-1].double()
            counted = labels[:, 1:] != IGNORED
            sums = torch.where(counted, seen, 0.0).sum(-1)
            found[positions] = (sums / counted.sum(-1)).T.cpu().numpy()
            if progress is not None:
                progress(len(positions))
    return found


def _given(column: Tensor | None) -> Tensor:
    assert column is not None, "a field that was asked for is given"
    return column
