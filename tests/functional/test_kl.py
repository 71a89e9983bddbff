"""KL from a reference model: loss and gradients against two literal softmaxes in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.divergence_pairs import (
    DIVERGENCES,
    OPTIONS,
    check,
    check_gradient,
    linear_pair,
    logits_of,
    logits_pair,
    plain_loss,
)
from unilogit_kernels import Shift, Uniform, kl_loss, reference
from unilogit_kernels.maths import pair_state
from unilogit_kernels.testing import assert_sum_within_budget


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
class TestDivergences:
    def test_logits(self, backend: str, dtype: torch.dtype, divergence: dict[str, Any]) -> None:
        check(logits_pair(41, 503, dtype, **divergence), backend)

    def test_linear(self, backend: str, dtype: torch.dtype, divergence: dict[str, Any]) -> None:
        check(linear_pair(41, 24, 503, dtype, **divergence), backend)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options(
        self, backend: str, divergence: dict[str, Any], options: dict[str, Any]
    ) -> None:
        check(logits_pair(41, 503, torch.float32, **divergence, **options), backend)
        check(linear_pair(41, 24, 503, torch.float32, **divergence, **options), backend)

    def test_token_weights(self, backend: str, divergence: dict[str, Any]) -> None:
        weights = torch.randn(41)
        weights[4] = 0
        for pair in (logits_pair(41, 99, torch.float32), linear_pair(41, 24, 99, torch.float32)):
            options = {**divergence, "token_weights": weights}
            check(replace(pair, options=options), backend)

    def test_none_is_the_sum_apart(
        self, backend: str, dtype: torch.dtype, divergence: dict[str, Any]
    ) -> None:
        """One loss per token, under any upstream gradient."""
        upstream = torch.randn(41)
        upstream[2] = 0
        for pair in (logits_pair(41, 99, dtype), linear_pair(41, 24, 99, dtype)):
            inputs = tuple(x.detach().requires_grad_() for x in pair.student)
            losses = pair.loss(inputs, backend, reduction="none", **divergence)
            assert losses.shape == (41,)
            assert (losses[3::5] == 0).all()
            gradients = torch.autograd.grad(losses, inputs, upstream)
            weighted = {**divergence, "token_weights": upstream, "reduction": "sum"}
            _, exact = replace(pair, options=weighted).plain(torch.float64)
            _, plain = replace(pair, options=weighted).plain(dtype)
            for ours, e, p in zip(gradients, exact, plain, strict=True):
                check_gradient(ours, e, p)


@pytest.mark.parametrize(("n", "v"), [(64, 2), (33, 7), (5, 4099), (3, 50_257)])
def test_odd_sizes(backend: str, dtype: torch.dtype, n: int, v: int) -> None:
    check(logits_pair(n, v, dtype, rewrite=Shift(2.0)), backend)
    check(linear_pair(n, 5, v, dtype, direction="reverse"), backend)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_all_tokens(backend: str, dtype: torch.dtype, direction: str) -> None:
    """Without labels every position counts."""
    for pair in (logits_pair(6, 99, dtype), linear_pair(6, 8, 99, dtype)):
        check(replace(pair, labels=None, options={"direction": direction}), backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_labels_every_position_counts(backend: str, reduction: str) -> None:
    """Whatever `ignore_index` is: there is no label that could equal it."""
    for pair in (logits_pair(7, 99, torch.float32), linear_pair(7, 8, 99, torch.float32)):
        unlabelled = replace(pair, labels=None, options={})
        expected = unlabelled.loss(pair.student, backend, reduction=reduction)
        assert (expected > 0).all()
        for ignore_index in (0, -1, 5):
            found = unlabelled.loss(
                pair.student, backend, reduction=reduction, ignore_index=ignore_index
            )
            assert torch.equal(found, expected)
    values = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    loss = kl_loss(*values, ignore_index=0, backend=backend)
    exact, plain = (
        reference.kl_divergence(*(x.to(t) for x in values)) for t in (torch.float64, torch.float32)
    )
    assert_sum_within_budget(loss, exact, plain)


@pytest.mark.parametrize("ref_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_of_two_dtypes(backend: str, dtype: torch.dtype, ref_dtype: torch.dtype) -> None:
    for pair in (logits_pair(7, 99, dtype), linear_pair(7, 8, 99, dtype)):
        teacher = tuple(x.to(ref_dtype) for x in pair.teacher)
        _, gradients = replace(pair, teacher=teacher).ours(backend)
        exact_logits = logits_of(tuple(x.double() for x in teacher))
        # The teacher in its own dtype, as plain torch computes it; the student in its own.
        exact = replace(pair, teacher=(exact_logits,)), replace(pair, teacher=(logits_of(teacher),))
        results = []
        for variant, to in zip(exact, (torch.float64, dtype), strict=True):
            inputs = tuple(x.detach().to(to).requires_grad_() for x in variant.student)
            _, plain = plain_loss(logits_of(inputs), variant.teacher[0], pair.labels)
            results.append((plain, torch.autograd.grad(plain, inputs)))
        for ours, e, p in zip(gradients, results[0][1], results[1][1], strict=True):
            check_gradient(ours, e, p)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_a_student_equal_to_its_teacher(
    backend: str, dtype: torch.dtype, divergence: dict[str, Any]
) -> None:
    """Without a rewrite, loss and gradient are exactly 0, not roundings of it."""
    if "rewrite" in divergence:
        pytest.skip("the rewrite makes them differ")
    pair = linear_pair(12, 16, 300, dtype, **divergence)
    equal = replace(pair, teacher=pair.student)
    loss, gradients = equal.ours(backend)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_unilogit_is_the_reverse_divergence_from_its_own_target(backend: str) -> None:
    logits, labels = torch.randn(9, 200) * 4, torch.arange(9)
    x = logits.clone().requires_grad_()
    ours = kl_loss(x, logits, labels, rewrite=Uniform(), direction="reverse", backend=backend)
    (found,) = torch.autograd.grad(ours, x)

    def literal(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z = logits.to(dtype).requires_grad_()
        terms = reference.unilogit_loss(z, labels, reduction="none") / len(labels)
        return terms, torch.autograd.grad(terms.sum(), z)[0]

    exact, plain = literal(torch.float64), literal(torch.float32)
    assert_sum_within_budget(ours, exact[0], plain[0])
    check_gradient(found, exact[1], plain[1])


def test_evaluates_the_log_odds_once_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    log_odds = pair_state.log_odds

    def watched(state: Tensor, *others: Any) -> Tensor:
        seen.append(state)
        return log_odds(state, *others)

    monkeypatch.setattr(pair_state, "log_odds", watched)
    logits = torch.randn(2, 7, requires_grad=True)
    loss = kl_loss(logits, torch.randn(2, 7))
    assert len(seen) == 1
    loss.backward()
    assert len(seen) == 2
