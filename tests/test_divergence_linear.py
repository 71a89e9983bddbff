"""The chunk loops on two lm_heads: what they never hold, their cuts, and options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_pairs import DIVERGENCES, check, check_gradient, linear_pair

from unilogit_kernels import Shift
from unilogit_kernels.plan import MEMORY_BUDGET, Plan
from unilogit_kernels.testing import AllocationGuard


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_never_holds_either_models_logits(
    two_row_backend: str, dtype: torch.dtype, divergence: dict[str, Any], reduction: str
) -> None:
    n, h, v = 64, 16, 3001
    pair = linear_pair(n, h, v, dtype, **divergence)
    for frozen in (False, True):
        inputs = tuple(x.detach().requires_grad_() for x in pair.student)
        inputs[1].requires_grad_(not frozen)
        full = replace(pair, labels=torch.randint(0, v, (n,)))
        with AllocationGuard(forbidden_elements=n * v) as guard:
            full.loss(inputs, two_row_backend, reduction=reduction).sum().backward()
        assert guard.largest > 0


@pytest.mark.parametrize("n_h", [(11, 24), (24, 11)])
def test_any_cut_is_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
    two_row_backend: str,
    dtype: torch.dtype,
    n_h: tuple[int, int],
) -> None:
    n, h = n_h
    v = 130
    pair = linear_pair(n, h, v, dtype, rewrite=Shift(2.0), softcap=4.0)
    assert pair.labels is not None
    active = int((pair.labels != -100).sum())
    plans = [
        Plan("vocabulary_chunks", tokens, columns, kept_tokens=kept)
        for tokens, columns in ((active, v), (active, 31), (7, 100), (3, 7))
        for kept in (0, min(active, h // 2))
    ]
    for plan in plans:
        monkeypatch.setattr(
            "unilogit_kernels.compaction.plan_linear", lambda *_, plan=plan, **__: plan
        )
        check(pair, two_row_backend)
    if dtype == torch.float16:
        return  # cast chunk by chunk on CPU, so never cut by tokens
    _, exact = pair.plain(torch.float64)
    _, plain = pair.plain(dtype)
    hidden, weight, bias = pair.student
    for tokens in (active, 3, 1):
        plan = Plan("token_chunks", tokens, v)
        monkeypatch.setattr(
            "unilogit_kernels.compaction.plan_linear", lambda *_, plan=plan, **__: plan
        )
        for reduction in ("mean", "none"):
            inputs = hidden.detach().requires_grad_(), weight, bias.detach().requires_grad_()
            loss = pair.loss(inputs, two_row_backend, reduction=reduction)
            if reduction == "none":
                loss = loss.sum() / active
            gradients = torch.autograd.grad(loss, (inputs[0], inputs[2]))
            for i, ours in zip((0, 2), gradients, strict=True):
                check_gradient(ours, exact[i], plain[i])


def test_memory_is_flat_in_the_vocabulary(two_row_backend: str) -> None:
    """Beside results and their float32 sums, a call takes its budget of buffers and no more."""
    peaks = []
    for v in (20_000, 80_000):
        n, h = 256, 8
        pair = linear_pair(n, h, v, torch.bfloat16, bias=False)
        hidden, weight = pair.student
        with AllocationGuard() as guard:
            pair.loss((hidden.requires_grad_(), weight), two_row_backend).backward()
        peaks.append(guard.peak_bytes)
    assert max(peaks) <= MEMORY_BUDGET["cpu"] * 1.5
    assert max(peaks) < 2 * 256 * 80_000 * 2
