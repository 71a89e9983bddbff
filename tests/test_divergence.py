"""KL from a reference model: loss and gradients against two literal softmaxes in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import Mask, Shift, Uniform, kl_loss, linear_kl_loss, reference, unilogit_loss
from unilogit_kernels.divergence import Rewrite
from unilogit_kernels.plan import MEMORY_BUDGET, Plan
from unilogit_kernels.testing import AllocationGuard, assert_within_budget

DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"direction": "reverse"},
    "forward shift": {"rewrite": Shift(3.0)},
    "reverse shift": {"rewrite": Shift(3.0), "direction": "reverse"},
    "forward uniform": {"rewrite": Uniform()},
    "reverse uniform": {"rewrite": Uniform(), "direction": "reverse"},
    "forward mask": {"rewrite": Mask()},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.5},
    "softcaps": {"softcap": 3.0, "ref_softcap": 5.0, "temperature": 0.7},
    "scales": {"logit_scale": 0.25, "ref_logit_scale": -1.5},
    "padded vocabulary": {"vocab_size": 480},
    "sum": {"reduction": "sum"},
    "items": {"num_items_in_batch": 31},
}


@dataclass(frozen=True)
class Pair:
    """A loss and its operands: both models' logits, or heads as (hidden, weight[, bias])."""

    student: tuple[Tensor, ...]
    teacher: tuple[Tensor, ...]
    labels: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def loss(self, student: tuple[Tensor, ...], backend: str, **more: Any) -> Tensor:
        options: dict[str, Any] = {**self.options, **more, "backend": backend}
        if len(student) == 1:
            return kl_loss(student[0], self.teacher[0], self.labels, **options)
        biases = [
            operands[2] if len(operands) > 2 else None for operands in (student, self.teacher)
        ]
        return linear_kl_loss(
            student[0],
            student[1],
            self.teacher[0],
            self.teacher[1],
            self.labels,
            bias=biases[0],
            ref_bias=biases[1],
            **options,
        )

    def ours(self, backend: str, **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        inputs = tuple(x.detach().requires_grad_() for x in self.student)
        loss = self.loss(inputs, backend, **more)
        return loss, torch.autograd.grad(loss.sum(), inputs)

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Losses per token, and gradients of the reduced loss, by plain torch.

        Operands in `dtype`, logits upcast to at least float32.
        """
        inputs = tuple(x.detach().to(dtype).requires_grad_() for x in self.student)
        teacher = tuple(x.to(dtype) for x in self.teacher)
        losses, loss = plain_loss(
            logits_of(inputs), logits_of(teacher), self.labels, **self.options
        )
        return losses, torch.autograd.grad(loss, inputs)


def logits_of(operands: tuple[Tensor, ...]) -> Tensor:
    logits = F.linear(*operands) if len(operands) > 1 else operands[0]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_loss(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor | None,
    *,
    rewrite: Rewrite | None = None,
    direction: str = "forward",
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | None = None,
    reduction: str = "mean",
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float | None = None,
    ref_logit_scale: float | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted losses per token, and the reduced loss."""
    valid = torch.ones(logits.shape[0], dtype=torch.bool) if labels is None else labels != -100
    losses = reference.kl_divergence(
        reference.transform_logits(
            logits[valid], softcap=softcap, logit_scale=logit_scale, vocab_size=vocab_size
        ),
        reference.transform_logits(
            ref_logits[valid],
            softcap=ref_softcap,
            logit_scale=ref_logit_scale,
            vocab_size=vocab_size,
        ),
        None if labels is None else labels[valid],
        rewrite=rewrite,
        direction=direction,
        temperature=temperature,
    )
    if token_weights is not None:
        losses = losses * token_weights[valid].to(losses.dtype)
    total = losses.sum()
    if reduction != "sum":
        total = total / (num_items_in_batch or int(valid.sum()))
    return torch.zeros(valid.shape, dtype=losses.dtype).masked_scatter(valid, losses), total


def labels_for(n: int, v: int) -> Tensor:
    labels = torch.randint(0, v, (n,))
    labels[3::5] = -100
    return labels


def logits_pair(n: int, v: int, dtype: torch.dtype, **options: Any) -> Pair:
    student = 3 * torch.randn(n, v)
    teacher = student + torch.randn(n, v)
    labels = labels_for(n, options.get("vocab_size") or v)
    return Pair((student.to(dtype),), (teacher.to(dtype),), labels, options)


def linear_pair(
    n: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    *,
    ref_h: int = 13,
    bias: bool = True,
    **options: Any,
) -> Pair:
    def head(h: int) -> tuple[Tensor, ...]:
        operands = [torch.randn(n, h), 3 / h**0.5 * torch.randn(v, h), torch.randn(v)]
        return tuple(x.to(dtype) for x in operands[: 3 if bias else 2])

    labels = labels_for(n, options.get("vocab_size") or v)
    return Pair(head(h), head(ref_h), labels, options)


def check(pair: Pair, backend: str, **more: Any) -> None:
    """Assert that losses and gradients are within the error budget.

    Losses token by token, since the error of a sum may cancel by chance; the reduced loss must be
    the sum of these.
    """
    dtype = pair.student[0].dtype
    loss, gradients = pair.ours(backend, **more)
    exact_losses, exact = pair.plain(torch.float64)
    plain_losses, plain = pair.plain(dtype)
    apart = {"reduction": "none", "num_items_in_batch": None}
    losses = pair.loss(pair.student, backend, **{**more, **apart})
    assert loss.dtype == losses.dtype == torch.promote_types(dtype, torch.float32)
    assert_within_budget(losses, exact_losses, plain_losses, "losses", smallest_scale=1.0)
    valid = len(losses) if pair.labels is None else int((pair.labels != -100).sum())
    items = pair.options.get("num_items_in_batch") or valid
    items = 1 if pair.options.get("reduction") == "sum" else items
    rounding = 4 * torch.finfo(loss.dtype).eps * float(losses.double().abs().sum()) / items
    assert abs(loss.item() - float(losses.double().sum()) / items) <= rounding
    for i, ours in enumerate(gradients):
        assert ours.dtype == dtype
        check_gradient(ours, exact[i], plain[i], f"gradient {i}")


def check_gradient(ours: Tensor, exact: Tensor, plain: Tensor, what: str = "gradient") -> None:
    """At most twice plain torch's error, plus one rounding, by the 2-norm of all entries.

    p - q cancels, so that the largest error among a few rows is a matter of luck for plain torch
    too: over 12 seeds of one problem its own largest varies threefold.
    """
    errors = [(x.double() - exact).norm() for x in (ours, plain)]
    allowed = 2 * errors[1] + torch.finfo(ours.dtype).eps * exact.norm()
    assert errors[0] <= allowed, f"{what}: error {errors[0]:.3e} exceeds {allowed:.3e}"


# ---- values and gradients ----------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
class TestDivergences:
    def test_logits(
        self, two_row_backend: str, dtype: torch.dtype, divergence: dict[str, Any]
    ) -> None:
        check(logits_pair(41, 503, dtype, **divergence), two_row_backend)

    def test_linear(
        self, two_row_backend: str, dtype: torch.dtype, divergence: dict[str, Any]
    ) -> None:
        check(linear_pair(41, 24, 503, dtype, **divergence), two_row_backend)

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_options(
        self, two_row_backend: str, divergence: dict[str, Any], options: dict[str, Any]
    ) -> None:
        check(logits_pair(41, 503, torch.float32, **divergence, **options), two_row_backend)
        check(linear_pair(41, 24, 503, torch.float32, **divergence, **options), two_row_backend)

    def test_token_weights(self, two_row_backend: str, divergence: dict[str, Any]) -> None:
        weights = torch.randn(41)
        weights[4] = 0
        for pair in (logits_pair(41, 99, torch.float32), linear_pair(41, 24, 99, torch.float32)):
            options = {**divergence, "token_weights": weights}
            check(replace(pair, options=options), two_row_backend)

    def test_none_is_the_sum_apart(
        self, two_row_backend: str, dtype: torch.dtype, divergence: dict[str, Any]
    ) -> None:
        """One loss per token, under any upstream gradient."""
        upstream = torch.randn(41)
        upstream[2] = 0
        for pair in (logits_pair(41, 99, dtype), linear_pair(41, 24, 99, dtype)):
            inputs = tuple(x.detach().requires_grad_() for x in pair.student)
            losses = pair.loss(inputs, two_row_backend, reduction="none", **divergence)
            assert losses.shape == (41,)
            assert (losses[3::5] == 0).all()
            gradients = torch.autograd.grad(losses, inputs, upstream)
            weighted = {**divergence, "token_weights": upstream, "reduction": "sum"}
            _, exact = replace(pair, options=weighted).plain(torch.float64)
            _, plain = replace(pair, options=weighted).plain(dtype)
            for ours, e, p in zip(gradients, exact, plain, strict=True):
                check_gradient(ours, e, p)

    def test_double_backward_in_float64(self, divergence: dict[str, Any]) -> None:
        for pair in (
            logits_pair(4, 9, torch.float64, **divergence),
            linear_pair(4, 3, 9, torch.float64, **divergence),
        ):
            inputs = tuple(x.requires_grad_() for x in pair.student)
            for reduction in ("mean", "none"):

                def loss(*x: Tensor, pair: Pair = pair, reduction: str = reduction) -> Tensor:
                    return pair.loss(x, "eager", reduction=reduction)

                assert torch.autograd.gradcheck(loss, inputs)
                assert torch.autograd.gradgradcheck(loss, inputs)

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_never_holds_either_models_logits(
        self, two_row_backend: str, dtype: torch.dtype, divergence: dict[str, Any], reduction: str
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


@pytest.mark.parametrize(("n", "v"), [(64, 2), (33, 7), (5, 4099), (3, 50_257)])
def test_odd_sizes(two_row_backend: str, dtype: torch.dtype, n: int, v: int) -> None:
    check(logits_pair(n, v, dtype, rewrite=Shift(2.0)), two_row_backend)
    check(linear_pair(n, 5, v, dtype, direction="reverse"), two_row_backend)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_all_tokens(two_row_backend: str, dtype: torch.dtype, direction: str) -> None:
    """Without labels every position counts."""
    for pair in (logits_pair(6, 99, dtype), linear_pair(6, 8, 99, dtype)):
        check(replace(pair, labels=None, options={"direction": direction}), two_row_backend)


@pytest.mark.parametrize("ref_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_of_two_dtypes(
    two_row_backend: str, dtype: torch.dtype, ref_dtype: torch.dtype
) -> None:
    for pair in (logits_pair(7, 99, dtype), linear_pair(7, 8, 99, dtype)):
        teacher = tuple(x.to(ref_dtype) for x in pair.teacher)
        _, gradients = replace(pair, teacher=teacher).ours(two_row_backend)
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


def test_one_head_for_both_models(two_row_backend: str) -> None:
    """A tied or frozen-and-shared lm_head: the teacher's use of it adds no gradient."""
    weight = torch.randn(90, 8, requires_grad=True)
    hidden, ref_hidden = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(6, 8, requires_grad=True),
    )
    loss = linear_kl_loss(hidden, weight, ref_hidden, weight, backend=two_row_backend)
    loss.backward()
    copy = weight.detach().clone().requires_grad_()
    apart = linear_kl_loss(hidden, copy, ref_hidden, weight.detach(), backend=two_row_backend)
    (expected,) = torch.autograd.grad(apart, copy)
    assert ref_hidden.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


def test_the_teacher_never_gets_a_gradient(two_row_backend: str) -> None:
    logits, ref_logits = (
        torch.randn(4, 50, requires_grad=True),
        torch.randn(4, 50, requires_grad=True),
    )
    kl_loss(logits, ref_logits, backend=two_row_backend).backward()
    assert ref_logits.grad is None
    assert logits.grad is not None
    assert not kl_loss(logits.detach(), ref_logits, backend=two_row_backend).requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_a_student_equal_to_its_teacher(
    two_row_backend: str, dtype: torch.dtype, divergence: dict[str, Any]
) -> None:
    """Without a rewrite, loss and gradient are exactly 0, not roundings of it."""
    if "rewrite" in divergence:
        pytest.skip("the rewrite makes them differ")
    pair = linear_pair(12, 16, 300, dtype, **divergence)
    equal = replace(pair, teacher=pair.student)
    loss, gradients = equal.ours(two_row_backend)
    assert loss.item() == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_unilogit_is_the_reverse_divergence_from_its_own_target(two_row_backend: str) -> None:
    logits, labels = torch.randn(9, 200) * 4, torch.arange(9)
    x = logits.clone().requires_grad_()
    ours = kl_loss(
        x, logits, labels, rewrite=Uniform(), direction="reverse", backend=two_row_backend
    )
    expected = unilogit_loss(x, labels, backend="eager")
    assert torch.allclose(ours, expected, rtol=1e-5)
    found, wanted = (torch.autograd.grad(loss, x)[0] for loss in (ours, expected))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-8)


# ---- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [-1e4, -100.0, -30.0, -5.0, 5.0, 13.8, 20.0, 60.0, 1e4])
@pytest.mark.parametrize("ref_d", [-1e4, -30.0, -1.0, 13.8, 60.0, 1e4])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_extreme_log_odds(
    two_row_backend: str, d: float, ref_d: float, divergence: dict[str, Any]
) -> None:
    """Where a label's probability is 0 or 1 to float32, loss and gradient keep their digits.

    The exact values are literal sums in float64 over log-probabilities that come from the log-odds,
    since 1 - p is 0 there in float64 too. Errors are held to a few roundings of the inputs.
    """
    v = 300
    logits, ref_logits = (
        torch.linspace(-1, 1, v)[None].clone(),
        torch.linspace(2, -1, v)[None].clone(),
    )
    for x, target in ((logits, d), (ref_logits, ref_d)):
        x[0, 0] = float(target + torch.logsumexp(x[0, 1:].double(), 0))
    x = logits.clone().requires_grad_()
    loss = kl_loss(x, ref_logits, torch.tensor([0]), backend=two_row_backend, **divergence)
    (gradient,) = torch.autograd.grad(loss, x)

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
    assert abs(loss.item() - exact.item()) <= conditioning * max(largest, abs(exact.item())) + tiny
    assert (gradient[0].double() - slope).abs().max().item() <= conditioning * largest + tiny


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
    two_row_backend: str,
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
        backend=two_row_backend,
        **options,
    )
    (others_gradient,) = torch.autograd.grad(others, alone)
    logits[1] = ref_logits[1] = 0.0
    for where, x in ((entries, logits), (ref_entries, ref_logits)):
        for column, value in where.items():
            x[1, column] = value
    x = logits.requires_grad_()
    losses = kl_loss(x, ref_logits, labels, reduction="none", backend=two_row_backend, **options)
    assert torch.allclose(losses[1], torch.tensor(expected), atol=1e-6, equal_nan=True)
    loss = kl_loss(x, ref_logits, labels, reduction=reduction, backend=two_row_backend, **options)
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
def test_ignored_rows_contribute_nothing_whatever_they_hold(
    two_row_backend: str, linear: bool
) -> None:
    pair = linear_pair(7, 8, 60, torch.float32) if linear else logits_pair(7, 60, torch.float32)
    labels = pair.labels
    assert labels is not None
    ignored = labels == -100
    weights = torch.ones(7)
    weights[0] = 0
    expected = replace(pair, options={"token_weights": weights}).ours(two_row_backend)
    for operands in (pair.student, pair.teacher):
        operands[0][ignored] = NAN
        operands[0][0] = INF
    found = replace(pair, options={"token_weights": weights}).ours(two_row_backend)
    assert torch.equal(found[0], expected[0])
    for ours, wanted in zip(found[1], expected[1], strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_counts(two_row_backend: str, linear: bool, n: int, reduction: str) -> None:
    pair = linear_pair(n, 8, 60, torch.float32) if linear else logits_pair(n, 60, torch.float32)
    none = replace(pair, labels=torch.full((n,), -100), options={"reduction": reduction})
    loss, gradients = none.ours(two_row_backend)
    assert (loss == 0).all()
    for gradient, operand in zip(gradients, pair.student, strict=True):
        assert gradient.shape == operand.shape
        assert (gradient == 0).all()


# ---- cuts, systems -----------------------------------------------------------------------------


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


def test_repeatable_and_backward_twice(two_row_backend: str) -> None:
    pair = linear_pair(40, 16, 500, torch.bfloat16, rewrite=Shift(1.0))
    first, second = pair.ours(two_row_backend), pair.ours(two_row_backend)
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))
    inputs = tuple(x.detach().requires_grad_() for x in pair.student)
    loss = pair.loss(inputs, two_row_backend)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, once, again))


def test_inputs_are_never_written_to(two_row_backend: str) -> None:
    for pair in (logits_pair(9, 99, torch.float32), linear_pair(9, 24, 99, torch.float32)):
        operands = (*pair.student, *pair.teacher)
        before = [x.clone() for x in operands]
        pair.ours(two_row_backend)
        assert all(map(torch.equal, before, operands))


def test_double_backward_elsewhere_says_so(two_row_backend: str) -> None:
    if two_row_backend == "eager":
        pytest.skip("which supports it")
    for pair in (logits_pair(3, 9, torch.float32), linear_pair(3, 4, 9, torch.float32)):
        inputs = tuple(x.requires_grad_() for x in pair.student)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(pair.loss(inputs, two_row_backend), inputs, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(two_row_backend: str, reduction: str) -> None:
    torch._dynamo.reset()  # each backend compiles the same function again, and there is a limit
    for pair in (logits_pair(9, 99, torch.float32), linear_pair(9, 8, 99, torch.float32)):
        weighted = replace(pair, options={"reduction": reduction, "rewrite": Shift(2.0)})

        def step(*inputs: Tensor, pair: Pair = weighted) -> Tensor:
            return pair.loss(inputs, two_row_backend).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        inputs = tuple(x.detach().requires_grad_() for x in pair.student)
        expected = torch.autograd.grad(step(*inputs), inputs)
        found = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(map(torch.allclose, found, expected))


def test_operators_are_registered_correctly() -> None:
    logits, ref_logits = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    pair = (torch.arange(3), 1.0, 0.0, 1.0, 0.0, 9, "forward", "shift", [2.0], "eager")
    options = (0, 0.0, True, None)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.unilogit_kernels.divergence, (logits, ref_logits, *pair), test_utils=tests
    )
    heads = (torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True), None)
    teacher = (torch.randn(3, 5), torch.randn(9, 5), torch.randn(9))
    torch.library.opcheck(
        torch.ops.unilogit_kernels.linear_divergence,
        (*heads, *teacher, torch.tensor([True, False, True]), *pair, *options, True),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.unilogit_kernels.linear_divergence_loss,
        (*heads, *teacher, *pair, torch.rand(3), torch.ones(()), *options, True, True, False),
        test_utils=tests,
    )


def test_autocast(two_row_backend: str) -> None:
    """Each operand's gradient returns in its own dtype; the teacher is cast like the student."""
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(6, 8), torch.randn(50, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_kl_loss(hidden, weight, ref_hidden, ref_weight, backend=two_row_backend)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(TypeError, match="ref_weight must have ref_hidden's dtype"):
        linear_kl_loss(hidden, weight.bfloat16(), ref_hidden, ref_weight, backend=two_row_backend)


# ---- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewrite": Shift(1.0)}, ValueError, "labels must be given"),
        ({"rewrite": Mask(), "labels": True, "direction": "reverse"}, ValueError, "infinite"),
        ({"rewrite": "uniform", "labels": True}, TypeError, "rewrite must be None, Shift"),
        ({"rewrite": Shift(math.inf), "labels": True}, ValueError, "finite parameters"),
        ({"direction": "backward"}, ValueError, "direction must be 'forward' or 'reverse'"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive finite number"),
        ({"ref_softcap": -1.0}, ValueError, "ref_softcap must be a positive"),
        ({"ref_logit_scale": 0.0}, ValueError, "ref_logit_scale must be a non-zero"),
        ({"ref_logits": torch.randn(3, 9)}, ValueError, "ref_logits must have logits's leading"),
        ({"ref_logits": torch.randn(4, 11)}, ValueError, "pass the number of real ones"),
        (
            {"ref_logits": torch.randn(4, 7), "vocab_size": 8},
            ValueError,
            "vocab_size must be at most",
        ),
        ({"ref_logits": torch.randn(4, 9).double()}, TypeError, "must both be float64 or neither"),
        ({"ref_logits": None}, TypeError, "ref_logits must be a tensor"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    options = {"logits": torch.randn(4, 9), "ref_logits": torch.randn(4, 9), **change}
    if options.pop("labels", False):
        options["labels"] = torch.arange(4)
    with pytest.raises(error, match=message):
        kl_loss(**options)


def test_errors_of_a_head() -> None:
    hidden, weight = torch.randn(4, 8), torch.randn(9, 8)
    with pytest.raises(ValueError, match="ref_hidden must have shape"):
        linear_kl_loss(hidden, weight, torch.randn(4, 7), weight)
    with pytest.raises(ValueError, match="ref_bias must have shape"):
        linear_kl_loss(hidden, weight, hidden, weight, ref_bias=torch.randn(3))
    with pytest.raises(IndexError, match="got 9 at flat position 1"):
        linear_kl_loss(hidden, weight, hidden, weight, torch.tensor([0, 9, 1, 2]))
