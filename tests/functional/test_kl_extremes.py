"""Two models' rows that break naive implementations, and what each must give."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.divergence_pairs import DIVERGENCES, linear_pair, logits_pair
from tests.support.roundings import assert_rounded
from unilogit_kernels import Mask, Shift, Uniform, kl_loss, reference
from unilogit_kernels.maths.rewrites import Rewrite
from unilogit_kernels.testing import assert_within_budget

LOG_ODDS = [-1e4, -100.0, -30.0, -5.0, 5.0, 13.8, 20.0, 60.0, 1e4]
REF_LOG_ODDS = [-1e4, -30.0, -1.0, 13.8, 60.0, 1e4]


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_extreme_log_odds(backend: str, divergence: dict[str, Any]) -> None:
    """Where a label's probability is 0 or 1 to float32, loss and gradient keep their digits.

    The exact values are literal sums in float64 over log-probabilities that come from the log-odds,
    since 1 - p is 0 there in float64 too. Errors are held to a few roundings of the inputs.
    """
    v, pairs = 300, list(itertools.product(LOG_ODDS, REF_LOG_ODDS))
    logits, ref_logits = (
        torch.linspace(*ends, v).repeat(len(pairs), 1) for ends in ((-1, 1), (2, -1))
    )
    for row, targets in enumerate(pairs):
        for x, target in zip((logits, ref_logits), targets, strict=True):
            x[row, 0] = float(target + torch.logsumexp(x[row, 1:].double(), 0))
    x, labels = logits.clone().requires_grad_(), torch.zeros(len(pairs), dtype=torch.int64)
    options = {"backend": backend, **divergence}
    losses = kl_loss(logits, ref_logits, labels, reduction="none", **options)
    total = kl_loss(x, ref_logits, labels, reduction="sum", **options)
    (gradients,) = torch.autograd.grad(total, x)
    for row, targets in enumerate(pairs):
        here = slice(row, row + 1)
        error, allowed = _extreme_row(
            logits[here], ref_logits[here], losses[row], gradients[here], divergence
        )
        assert (error <= allowed).all(), (targets, error, allowed)


def _extreme_row(
    logits: Tensor,
    ref_logits: Tensor,
    loss: Tensor,
    gradient: Tensor,
    divergence: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Errors of loss and gradient, and what they may be."""
    v = logits.shape[1]
    rewrite = divergence.get("rewrite", Rewrite())
    rests = [z[0, 1:].double() for z in (logits, ref_logits)]
    odds = [
        z[0, :1].double() - r.logsumexp(0) for z, r in zip((logits, ref_logits), rests, strict=True)
    ]
    odds[1] = rewrite.log_odds(odds[1], v)
    log_p, log_q = (
        torch.cat((F.logsigmoid(o), F.logsigmoid(-o) + torch.log_softmax(r, 0)))
        for o, r in zip(odds, rests, strict=True)
    )
    p, q = log_p.exp(), log_q.exp()

    def terms(weight: Tensor, log_ratio: Tensor) -> Tensor:
        return torch.where(weight == 0, 0.0, weight * log_ratio)

    if divergence.get("direction") == "reverse":
        exact = terms(p, log_p - log_q).sum()
        slope = _reverse_gradient(odds[0], odds[1], rests)
    else:
        exact = terms(q, log_q - log_p).sum()
        # p - q at the label, without cancelling near 1
        at_label = torch.where(
            odds[1] > 0, torch.sigmoid(-odds[1]) - torch.sigmoid(-odds[0]), p[0] - q[0]
        )
        slope = torch.cat((at_label, p[1:] - q[1:]))
    finite = [abs(o.item()) for o in odds if math.isfinite(o.item())]
    conditioning = 16 * torch.finfo(torch.float32).eps * (1 + max(finite))
    tiny = torch.finfo(torch.float32).tiny
    # A gradient moves with the log-odds by p (1 - p) where p is about q.
    slopes = [torch.sigmoid(o) * torch.sigmoid(-o) for o in odds]
    largest = torch.cat((slope.abs(), *slopes)).max().item()
    errors = (loss.double() - exact).abs(), (gradient[0].double() - slope).abs().max()
    scales = torch.tensor([max(largest, abs(exact.item())), largest])
    return torch.stack(errors), conditioning * scales.double() + tiny


def _reverse_gradient(d: Tensor, ref_d: Tensor, rests: list[Tensor]) -> Tensor:
    """`p_j (log p_j - log q_j - KL)` with the label's outcome apart, in float64."""
    r, log_ratio = (
        torch.softmax(rests[0], 0),
        torch.log_softmax(rests[0], 0) - torch.log_softmax(rests[1], 0),
    )
    c = (r * log_ratio).sum()
    p, not_p = torch.sigmoid(d), torch.sigmoid(-d)
    return torch.cat(
        (p * not_p * (d - ref_d - c), not_p * r * (log_ratio - c - p * (d - ref_d - c)))
    )


INF, NAN = math.inf, math.nan


def hard_pairs() -> list[tuple[str, dict[int, float], dict[int, float], dict[str, Any], float]]:
    """Entries that replace those of two zero rows (V = 37, label 5), options, and the loss."""
    others = set(range(37)) - {5}
    certain, impossible = dict.fromkeys(others, -INF), {5: -INF}
    return [
        ("certain teacher", {}, certain, {}, math.log(37)),
        ("certain student", certain, {}, {}, INF),
        ("certain student, reverse", certain, {}, {"direction": "reverse"}, math.log(37)),
        ("both certain", certain, certain, {}, 0.0),
        ("both certain, reverse", certain, certain, {"direction": "reverse"}, 0.0),
        ("certain teacher without a rest to rewrite", {}, certain, {"rewrite": Uniform()}, NAN),
        ("certain teacher, shifted", {}, certain, {"rewrite": Shift(3.0)}, math.log(37)),
        ("impossible for both", impossible, impossible, {}, 0.0),
        ("impossible for the teacher", {}, impossible, {}, math.log(37 / 36)),
        ("impossible for the student", impossible, {}, {}, INF),
        (
            "impossible for the student, reverse",
            impossible,
            {},
            {"direction": "reverse"},
            math.log(37 / 36),
        ),
        ("impossible for the student, masked", impossible, {}, {"rewrite": Mask()}, 0.0),
        ("another impossible for the student", {9: -INF}, {}, {}, INF),
        ("another impossible for both", {9: -INF}, {9: -INF}, {}, 0.0),
        ("NaN in the student", {9: NAN}, {}, {}, NAN),
        ("NaN in the teacher", {}, {9: NAN}, {}, NAN),
        ("NaN at the student's label", {5: NAN}, {}, {"rewrite": Mask()}, NAN),
        ("NaN at the teacher's rewritten label", {}, {5: NAN}, {"rewrite": Uniform()}, NAN),
        ("+inf in the student", {9: INF}, {}, {}, NAN),
        ("+inf in the teacher", {}, {9: INF}, {"direction": "reverse"}, NAN),
        ("+inf at the teacher's label", {}, {5: INF}, {}, NAN),
        ("student all -inf", {**certain, **impossible}, {}, {}, NAN),
        ("teacher all -inf", {}, {**certain, **impossible}, {"direction": "reverse"}, NAN),
    ]


@pytest.mark.parametrize(
    ("entries", "ref_entries", "options", "expected"),
    [case[1:] for case in hard_pairs()],
    ids=[case[0] for case in hard_pairs()],
)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_hard_rows(
    backend: str,
    entries: dict[int, float],
    ref_entries: dict[int, float],
    options: dict[str, Any],
    expected: float,
    reduction: str,
) -> None:
    logits, ref_logits = torch.randn(3, 37), torch.randn(3, 37)
    labels = torch.tensor([1, 5, 2])
    alone = logits[[0, 2]].clone().requires_grad_()
    others = kl_loss(
        alone,
        ref_logits[[0, 2]],
        labels[[0, 2]],
        reduction="sum",
        backend=backend,
        **options,
    )
    (others_gradient,) = torch.autograd.grad(others, alone)
    logits[1] = ref_logits[1] = 0.0
    for where, x in ((entries, logits), (ref_entries, ref_logits)):
        for column, value in where.items():
            x[1, column] = value
    x = logits.requires_grad_()
    losses = kl_loss(x, ref_logits, labels, reduction="none", backend=backend, **options)
    exact = torch.tensor([expected], dtype=torch.float64)
    assert_rounded(losses[1:2], exact, "loss", smallest_scale=1.0)
    loss = kl_loss(x, ref_logits, labels, reduction=reduction, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    # Alone, a row may begin at another alignment, and its sums in another order.
    tolerance = 8 * torch.finfo(torch.float32).eps * others_gradient.abs().amax(1, keepdim=True)
    assert ((gradient[[0, 2]] - others_gradient).abs() <= tolerance).all()
    if math.isnan(expected):
        assert gradient[1].isnan().all()
    elif expected < INF:
        assert gradient[1].isfinite().all()
    if expected == 0.0:
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("linear", [False, True])
def test_ignored_rows_contribute_nothing_whatever_they_hold(backend: str, linear: bool) -> None:
    pair = linear_pair(7, 8, 60, torch.float32) if linear else logits_pair(7, 60, torch.float32)
    labels = pair.labels
    assert labels is not None
    ignored = labels == -100
    weights = torch.ones(7)
    weights[0] = 0
    expected = replace(pair, options={"token_weights": weights}).ours(backend)
    for operands in (pair.student, pair.teacher):
        operands[0][ignored] = NAN
        operands[0][0] = INF
    found = replace(pair, options={"token_weights": weights}).ours(backend)
    assert torch.equal(found[0], expected[0])
    for ours, wanted in zip(found[1], expected[1], strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_counts(backend: str, linear: bool, n: int, reduction: str) -> None:
    pair = linear_pair(n, 8, 60, torch.float32) if linear else logits_pair(n, 60, torch.float32)
    none = replace(pair, labels=torch.full((n,), -100), options={"reduction": reduction})
    loss, gradients = none.ours(backend)
    assert (loss == 0).all()
    for gradient, operand in zip(gradients, pair.student, strict=True):
        assert gradient.shape == operand.shape
        assert (gradient == 0).all()


# ---- tokens that a model forbids -----------------------------------------------------------------

FORBIDDEN: dict[str, list[int]] = {
    "nothing": [],
    "the label": [5],
    "another": [9],
    "both": [5, 9],
    "all but the label": [j for j in range(37) if j != 5],
    "all but another": [j for j in range(37) if j != 9],
}
"""Columns of 37 with logits of -inf."""


def literal_row(
    student: Tensor, teacher: Tensor, direction: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Loss and gradient `[n]`, `[n, V]` by their definitions, in `dtype`: 0 log 0 is 0.

    Where the KL is infinite, forward it still has the gradient p - q, which is its limit as the
    forbidden logits fall. The reverse one has none: how fast which of them falls decides it.
    """
    log_p, log_q = (torch.log_softmax(z.to(dtype), -1) for z in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    if direction == "forward":
        return torch.where(q == 0, 0.0, q * (log_q - log_p)).sum(-1), p - q
    loss = torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    gradient = torch.where(p == 0, 0.0, p * (log_p - log_q - loss[:, None]))
    return loss, torch.where(loss.isfinite()[:, None], gradient, NAN)


@pytest.mark.parametrize("by_student", FORBIDDEN)
@pytest.mark.parametrize("by_teacher", FORBIDDEN)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("labelled", [True, False])
def test_forbidden_tokens(
    backend: str, by_student: str, by_teacher: str, direction: str, labelled: bool
) -> None:
    """Every combination, between two rows in which nothing is forbidden."""
    logits, ref_logits = torch.randn(3, 37), torch.randn(3, 37)
    logits[1, FORBIDDEN[by_student]] = ref_logits[1, FORBIDDEN[by_teacher]] = -INF
    x = logits.clone().requires_grad_()
    labels = torch.tensor([1, 5, 2]) if labelled else None
    losses = kl_loss(x, ref_logits, labels, direction=direction, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    found, exact, plain = (
        (losses, gradient),
        literal_row(logits, ref_logits, direction),
        literal_row(logits, ref_logits, direction, torch.float32),
    )
    for got, right, other, what in zip(found, exact, plain, ("loss", "gradient"), strict=True):
        finite = right.isfinite()
        assert torch.equal(got.isnan(), right.isnan())
        assert torch.equal(got.isinf(), right.isinf())
        scale = 1.0 if what == "loss" else 0.0
        assert_within_budget(got[finite], right[finite], other[finite], what, smallest_scale=scale)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("train_weight", [True, False])
def test_a_bias_that_forbids_a_token(
    backend: str, dtype: torch.dtype, direction: str, who: str, train_weight: bool
) -> None:
    """Through the lm_heads: finite where plain torch in float64 is, never a NaN that it has not."""
    pair = linear_pair(6, 8, 60, dtype, direction=direction)
    for operands, name in ((pair.student, "student"), (pair.teacher, "teacher")):
        if who in (name, "both"):
            operands[2][11] = -INF
    hidden, weight, bias = (x.detach().requires_grad_() for x in pair.student)
    weight.requires_grad_(train_weight)
    loss = pair.loss((hidden, weight, bias), backend)
    wanted = [hidden, weight, bias] if train_weight else [hidden, bias]
    gradients = torch.autograd.grad(loss, wanted)
    assert pair.labels is not None
    counted = pair.labels != -100
    z, t = (
        F.linear(*(x.double() for x in operands))[counted]
        for operands in (pair.student, pair.teacher)
    )
    exact, rows = literal_row(z, t, direction)
    assert loss.isinf() == exact.isinf().any()
    assert not loss.isnan()
    for gradient in gradients:
        assert gradient.isnan().any() == rows.isnan().any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_literal_definition_forbids_tokens_alike(direction: str) -> None:
    """What the eager backend differentiates twice."""
    logits, ref_logits = torch.randn(4, 37).double(), torch.randn(4, 37).double()
    logits[1, 9] = logits[2, 9] = ref_logits[2, 9] = -INF
    if direction == "forward":
        ref_logits[3, 9] = -INF
    x = logits.clone().requires_grad_()
    losses = reference.kl_divergence(x, ref_logits, direction=direction)
    (gradient,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    loss, row = literal_row(logits, ref_logits, direction)
    torch.testing.assert_close(losses, loss, rtol=1e-13, atol=0.0, equal_nan=True)
    torch.testing.assert_close(gradient, row, rtol=1e-13, atol=1e-15, equal_nan=True)
    logits[0, 0] = NAN
    assert reference.kl_divergence(logits, ref_logits, direction=direction)[0].isnan()
    assert reference.kl_divergence(ref_logits, logits, direction=direction)[0].isnan()
