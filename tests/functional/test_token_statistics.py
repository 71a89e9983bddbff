"""Losses and statistics that see the whole row, through both entries, on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import literal
from tests.support.problems import TRANSFORMS
from unilogit_kernels import (
    LinearOptions,
    cross_entropy_loss,
    linear_cross_entropy_loss,
    linear_objective_loss,
    linear_token_statistics,
    mixed_loss,
    objective_loss,
    reference,
    token_statistics,
)
from unilogit_kernels.functional.token_statistics import FIELDS
from unilogit_kernels.objectives import CrossEntropy, Entropy, MaxEntropy, of_statistics
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_sum_within_budget,
    assert_within_budget,
)

N, V, H = 48, 503, 24
INF = math.inf
REGULARISED = {
    "smoothing": {"label_smoothing": 0.1},
    "only smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-4},
    "entropy": {"entropy": -0.3},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-3, "entropy": 0.5},
}
DIFFERENTIABLE = FIELDS[:5]


class Case:
    """Operands of one call, ours and plain torch's."""

    def __init__(self, dtype: torch.dtype, *, linear: bool, frozen: bool = False) -> None:
        hidden, weight = torch.randn(N, H), 3 / H**0.5 * torch.randn(V, H)
        # The largest logit is that of one token by far, so that no rounding decides which it is;
        # and so is the smallest, for scales below 0.
        hidden[:, 0], weight[:, 0] = 2.0, 0.0
        weight[7, 0], weight[11, 0] = 10.0, -10.0
        self.linear, self.frozen = linear, frozen
        operands = [hidden, weight] if linear else [hidden @ weight.t()]
        self.operands = [x.to(dtype) for x in operands]
        self.labels = torch.randint(0, 480, (N,))
        self.labels[3::5] = -100

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.operands]
        if self.frozen:
            leaves[1].requires_grad_(False)
        return leaves

    def logits(self, leaves: list[Tensor], **options: Any) -> Tensor:
        """Of the rows that count."""
        z = F.linear(*leaves) if self.linear else leaves[0]
        z = z[self.labels != -100]
        return reference.transform_logits(
            z.to(torch.promote_types(z.dtype, torch.float32)), **options
        )

    def plain(self, loss: literal.Literal, dtype: torch.dtype, **options: Any) -> Any:
        leaves = self.leaves(dtype)
        terms = loss(self.logits(leaves, **options), self.labels[self.labels != -100])
        wanted = [x for x in leaves if x.requires_grad]
        return terms, torch.autograd.grad(terms.mean(), wanted)

    def check_loss(
        self, objective: Any, loss: literal.Literal, backend: str, **options: Any
    ) -> None:
        dtype = self.operands[0].dtype
        leaves = self.leaves(dtype)
        function: Any = linear_objective_loss if self.linear else objective_loss
        found = function(*leaves, self.labels, objective, backend=backend, **options)
        transform = {k: v for k, v in options.items() if k != "options"}
        (exact, right), (plain, other) = (
            self.plain(loss, t, **transform) for t in (torch.float64, dtype)
        )
        n = len(exact)
        assert_sum_within_budget(found, exact / n, plain / n, "loss")
        gradients = torch.autograd.grad(found, [x for x in leaves if x.requires_grad])
        for got, a, b in zip(gradients, right, other, strict=True):
            assert_within_budget(got, a, b, "gradient")


@pytest.fixture(params=["logits", "trained", "frozen"])
def case(request: pytest.FixtureRequest, dtype: torch.dtype) -> Case:
    return Case(dtype, linear=request.param != "logits", frozen=request.param == "frozen")


# ---- losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "transform"),
    [*((name, "plain") for name in REGULARISED), *(("all", t) for t in TRANSFORMS if t != "plain")],
)
def test_regularised_cross_entropy(case: Case, backend: str, name: str, transform: str) -> None:
    parameters = dict(REGULARISED[name])
    objective = CrossEntropy(**parameters)
    weight = parameters.pop("entropy", 0.0)
    plain = literal.cross_entropy(weight=weight, **parameters)
    case.check_loss(objective, plain, backend, **TRANSFORMS[transform])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_z_loss_apart(case: Case, backend: str, reduction: str) -> None:
    function: Any = linear_cross_entropy_loss if case.linear else cross_entropy_loss
    leaves, valid = case.leaves(case.operands[0].dtype), case.labels != -100
    parameters = {"label_smoothing": 0.1, "z_loss": 1e-2}
    more: dict[str, Any] = {"reduction": reduction, "backend": backend}
    loss, z_loss = function(*leaves, case.labels, **parameters, **more)
    whole: Any = linear_objective_loss if case.linear else objective_loss
    assert torch.equal(loss, whole(*leaves, case.labels, CrossEntropy(**parameters), **more))
    assert not z_loss.requires_grad
    exact, plain = (
        1e-2 * case.logits(case.leaves(t)).detach().logsumexp(-1).square()
        for t in (torch.float64, case.operands[0].dtype)
    )
    if reduction == "none":
        assert (z_loss[~valid] == 0).all()
        assert_within_budget(z_loss[valid], exact, plain)
        return
    n = len(exact) if reduction == "mean" else 1
    assert_sum_within_budget(z_loss, exact / n, plain / n)
    assert function(*leaves, torch.full_like(case.labels, -100), **parameters, **more).z_loss == 0
    without = function(*leaves, case.labels, **more)
    assert without.z_loss == 0
    assert torch.equal(without.loss, whole(*leaves, case.labels, "cross_entropy", **more))


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("max_entropy", "plain"),
        ("entropy", "plain"),
        ("max_entropy", "softcap"),
        ("entropy", "softcap and scale"),
        *(("pdu", transform) for transform in TRANSFORMS),
    ],
)
def test_methods(case: Case, backend: str, name: str, transform: str) -> None:
    case.check_loss(name, literal.TOKEN[name], backend, **TRANSFORMS[transform])


@pytest.mark.parametrize("budget", [1 << 20, 4 << 20])
@pytest.mark.parametrize("skip_below", [0.0, 1e-12])
@pytest.mark.parametrize("frozen", [False, True])
def test_orders_of_chunks(backend: str, budget: int, skip_below: float, frozen: bool) -> None:
    case = Case(torch.float32, linear=True, frozen=frozen)
    case.labels[7] = 0
    objective = CrossEntropy(label_smoothing=0.1, z_loss=1e-3, entropy=-0.1)
    case.check_loss(
        objective,
        literal.cross_entropy(0.1, 1e-3, -0.1),
        backend,
        options=LinearOptions(budget, skip_below=skip_below),
    )


def test_no_logits_are_held(backend: str) -> None:
    n, v = 64, 5000
    weight, labels = torch.randn(v, 8), torch.arange(n)
    objective = CrossEntropy(label_smoothing=0.1, z_loss=1e-3, entropy=-0.1)
    for trained in (False, True):
        hidden = torch.randn(n, 8, requires_grad=True)
        head = weight.clone().requires_grad_(trained)
        with AllocationGuard(forbidden_elements=n * v):
            linear_objective_loss(hidden, head, labels, objective, backend=backend).backward()
            seen = linear_token_statistics(hidden, head, labels, backend=backend)
            assert seen.log_prob is not None
            seen.log_prob.sum().backward()


def test_columns_without_probability(backend: str) -> None:
    """Smoothing of a token of probability 0 is infinite, as torch's is; its gradient is finite."""
    logits, labels = torch.randn(3, 40), torch.tensor([1, 2, 3])
    logits[0, 7] = -INF
    for reduction in ("none", "mean"):
        x, y = (logits.clone().requires_grad_() for _ in range(2))
        ours = objective_loss(
            x, labels, CrossEntropy(label_smoothing=0.1), reduction=reduction, backend=backend
        )
        torchs = F.cross_entropy(y, labels, label_smoothing=0.1, reduction=reduction)
        assert torch.equal(ours.isinf(), torchs.isinf())
        gradients = [torch.autograd.grad(loss.sum(), z)[0] for loss, z in ((ours, x), (torchs, y))]
        exact = y.detach().double().softmax(1)
        exact = exact - 0.9 * F.one_hot(labels, 40) - 0.1 / 40
        exact = exact / (1 if reduction == "none" else 3)
        assert_within_budget(gradients[0], exact, gradients[1])
    without = objective_loss(logits, labels, CrossEntropy(z_loss=0.1, entropy=0.1), backend=backend)
    assert without.isfinite()


def test_what_the_label_does_not_decide(backend: str) -> None:
    """ME and the entropy are the same whatever the label is, also where its logit is -inf."""
    v = 30
    logits = torch.randn(v).expand(v, v).clone()
    impossible = logits.scatter(1, torch.full((v, 1), 4), -INF)
    for objective in (MaxEntropy(), Entropy()):
        for z in (logits, impossible):
            losses = objective_loss(
                z, torch.arange(v), objective, reduction="none", backend=backend
            )
            if z is impossible and objective.name == "max_entropy":
                assert (losses == INF).all()
                continue
            exact, plain = (
                literal.TOKEN[objective.name](z.to(t), torch.arange(v))
                for t in (torch.float64, torch.float32)
            )
            assert_within_budget(losses, exact, plain, objective.name, smallest_scale=1.0)


def test_mixed(backend: str, dtype: torch.dtype) -> None:
    case = Case(dtype, linear=False)
    segments, valid = torch.arange(N) % 3, case.labels != -100
    parts: list[Any] = [CrossEntropy(label_smoothing=0.1), "unilogit", "pdu"]
    losses = [literal.cross_entropy(0.1), literal.TOKEN["unilogit"], literal.TOKEN["pdu"]]

    def plain(to: torch.dtype) -> tuple[Tensor, Tensor]:
        leaves = case.leaves(to)
        z, y, which = case.logits(leaves), case.labels[valid], segments[valid]
        means = [loss(z[which == k], y[which == k]).mean() for k, loss in enumerate(losses)]
        return torch.stack(means), torch.autograd.grad(torch.stack(means).sum(), leaves)[0]

    (x,) = case.leaves(dtype)
    result = mixed_loss(x, case.labels, parts, segments, backend=backend)
    (exact, right), (other, by_torch) = plain(torch.float64), plain(dtype)
    assert_within_budget(result.parts, exact, other, "parts", smallest_scale=1.0)
    assert_within_budget(torch.autograd.grad(result.loss, x)[0], right, by_torch, "gradient")


# ---- statistics --------------------------------------------------------------------------------


def literal_statistics(z: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {
        "log_prob": literal.log_p(z, y),
        "log_odds": literal.logit(z, y),
        "logsumexp": z.logsumexp(-1),
        "entropy": literal.entropy(z),
        "runner_up_log_prob": literal.log_runner_up(z, y),
        "log_prob_variance": reference.log_prob_variance(z),
        "mean_logit": z.mean(-1),
    }


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_token_statistics(case: Case, backend: str, options: dict[str, Any]) -> None:
    dtype = case.operands[0].dtype
    leaves, valid = case.leaves(dtype), case.labels != -100
    function: Any = linear_token_statistics if case.linear else token_statistics
    seen = function(*leaves, case.labels, backend=backend, **options)
    exact, plain = (
        literal_statistics(case.logits(case.leaves(t), **options), case.labels[valid])
        for t in (torch.float64, dtype)
    )
    largest = float(case.logits(case.leaves(torch.float64), **options).detach().abs().max())
    for name, value in seen._asdict().items():
        assert value.shape == (N,)
        if name in exact:
            assert (value[~valid] == 0).all()
            scale = largest if name == "mean_logit" else 1.0
            assert_within_budget(value[valid], exact[name], plain[name], name, smallest_scale=scale)
    assert (seen.argmax[~valid] == -100).all()
    assert not seen.is_argmax[~valid].any()
    z = case.logits(case.leaves(torch.float64), **options)
    sure = z.topk(2).values.diff()[:, 0].abs() > 0.1  # the GEMM of 16-bit numbers rounds
    assert torch.equal(seen.argmax[valid][sure], z.argmax(-1)[sure])
    assert torch.equal(seen.is_argmax, seen.argmax.eq(case.labels) & valid)


COMBINATIONS = [c for r in (1, 2) for c in itertools.combinations(DIFFERENTIABLE, r)]


@pytest.mark.parametrize("fields", COMBINATIONS, ids=" and ".join)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_gradients_of_any_combination(backend: str, linear: bool, fields: tuple[str, ...]) -> None:
    case = Case(torch.float32, linear=linear)
    upstream = list(torch.randn(len(fields), N))
    leaves = case.leaves(torch.float32)
    function: Any = linear_token_statistics if linear else token_statistics
    seen = function(*leaves, case.labels, fields=fields, backend=backend)
    known = [name for name, value in seen._asdict().items() if value is not None]
    assert sorted(known) == sorted(fields)
    gradients = torch.autograd.grad([getattr(seen, f) for f in fields], leaves, upstream)

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        own, valid = case.leaves(dtype), case.labels != -100
        every = literal_statistics(case.logits(own), case.labels[valid])
        weights = [w[valid].to(dtype) for w in upstream]
        return torch.autograd.grad([every[name] for name in fields], own, weights)

    for got, exact, other in zip(
        gradients, plain(torch.float64), plain(torch.float32), strict=True
    ):
        assert_within_budget(got, exact, other, str(fields))


def test_of_equal_ones_the_lowest_is_the_argmax(backend: str) -> None:
    logits = torch.randint(-2, 3, (200, 37)).float()
    labels = torch.randint(0, 37, (200,))
    seen = token_statistics(logits, labels, fields=("argmax", "is_argmax"), backend=backend)
    assert seen.argmax is not None
    assert seen.is_argmax is not None
    assert torch.equal(seen.argmax, logits.argmax(1))
    assert torch.equal(seen.is_argmax, logits.argmax(1) == labels)


def test_a_memorised_token(backend: str) -> None:
    """Its entropy is 1e-20, not noise; what float64 sees of it by a softmax is noise itself."""
    logits = torch.linspace(-1, 1, V)[None].clone()
    logits[0, 9] = 55.0
    x = logits.requires_grad_()
    seen = token_statistics(x, torch.tensor([9]), backend=backend)
    rest = torch.cat((logits[0, :9], logits[0, 10:])).detach().double()
    d = 55 - rest.logsumexp(0)
    q, h = torch.sigmoid(-d), -(rest.softmax(0) * rest.log_softmax(0)).sum()
    assert seen.entropy is not None
    exact = (q * (h + d) + q)[None]
    assert exact < 1e-19
    assert_within_budget(seen.entropy, exact, (exact * (1 + 2**-18)).float(), smallest_scale=1e-30)
    (gradient,) = torch.autograd.grad(seen.entropy, x)
    assert gradient.isfinite().all()
    assert gradient[0, 9] < 0 < gradient[0, 8]


def test_policy_gradient_in_three_lines(backend: str) -> None:
    """With a temperature and an entropy bonus, as in docs/methods.md."""
    case = Case(torch.float32, linear=True)
    actions, advantages = case.labels.clamp(min=0), torch.randn(N)
    hidden, weight = case.leaves(torch.float32)
    seen = linear_token_statistics(
        hidden,
        weight,
        actions,
        fields=("log_prob", "entropy"),
        logit_scale=1 / 0.7,
        backend=backend,
    )
    assert seen.log_prob is not None
    assert seen.entropy is not None
    loss = -(advantages * seen.log_prob + 0.01 * seen.entropy).mean()

    def plain(dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = case.leaves(dtype)
        z = F.linear(*leaves) / 0.7
        terms = -(advantages.to(dtype) * literal.log_p(z, actions) + 0.01 * literal.entropy(z))
        return terms / N, torch.autograd.grad(terms.mean(), leaves)

    (exact, right), (other, by_torch) = plain(torch.float64), plain(torch.float32)
    assert_sum_within_budget(loss, exact, other)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    for got, a, b in zip(gradients, right, by_torch, strict=True):
        assert_within_budget(got, a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_function_of_statistics(case: Case, backend: str, reduction: str) -> None:
    @of_statistics("entropy", "logsumexp", "uniform_cross_entropy", "runner_up_log_prob")
    def ours(seen: Any) -> Tensor:
        margin = seen.log_prob - seen.runner_up_log_prob
        whole = 0.1 * seen.entropy + 0.01 * seen.logsumexp + 0.1 * seen.uniform_cross_entropy
        total: Tensor = torch.tanh(margin) + whole
        return total

    def plain(z: Tensor, y: Tensor) -> Tensor:
        margin = literal.log_p(z, y) - literal.log_runner_up(z, y)
        whole = 0.1 * literal.entropy(z) + 0.01 * z.logsumexp(-1)
        return torch.tanh(margin) + whole - 0.1 * torch.log_softmax(z, -1).mean(-1)

    case.check_loss(ours, plain, backend)


def test_unknown_statistics() -> None:
    with pytest.raises(ValueError, match="a row has no statistic 'median'; it has log_odds"):
        of_statistics("median")
    with pytest.raises(ValueError, match="fields must be names of TokenStatistics, got 'median'"):
        token_statistics(torch.randn(1, 3), torch.zeros(1, dtype=torch.int64), fields=("median",))
    with pytest.raises(TypeError, match="also sees: mean"):
        CrossEntropy(label_smoothing=0.1)(torch.zeros(3), 10)
    for bad in ({"label_smoothing": 1.1}, {"label_smoothing": -0.1}, {"z_loss": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            CrossEntropy(**bad)


def test_twice_differentiable_on_eager() -> None:
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 5])
    objective = CrossEntropy(label_smoothing=0.1, z_loss=0.1, entropy=0.3)

    def every(z: Tensor) -> Any:
        seen = token_statistics(z, labels, backend="eager", softcap=4.0)
        loss = objective_loss(z, labels, objective, backend="eager")
        return *(getattr(seen, name) for name in DIFFERENTIABLE), loss

    assert torch.autograd.gradcheck(every, (logits,))
    assert torch.autograd.gradgradcheck(every, (logits,))


def test_forward_mode(backend: str) -> None:
    logits, labels = torch.randn(4, 50), torch.tensor([1, 2, -100, 4])
    objective = CrossEntropy(label_smoothing=0.1, z_loss=0.1, entropy=0.3)
    tangent = torch.randn(4, 50)

    def loss(z: Tensor) -> Tensor:
        return objective_loss(z, labels, objective, backend=backend)

    along = torch.func.jvp(loss, (logits,), (tangent,))[1]
    x = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x), x)
    exact = (gradient.double() * tangent.double()).flatten()
    assert_sum_within_budget(along, exact, exact.float())


def test_compiles_into_one_graph() -> None:
    weight, labels = torch.randn(200, 8), torch.tensor([1, -100, 5])
    objective = CrossEntropy(label_smoothing=0.1, z_loss=0.1)

    def loss(hidden: Tensor) -> Tensor:
        seen = linear_token_statistics(hidden, weight, labels, fields=("log_prob", "entropy"))
        assert seen.log_prob is not None
        assert seen.entropy is not None
        regularised = linear_objective_loss(hidden, weight, labels, objective)
        return (seen.log_prob + seen.entropy).sum() + regularised

    hidden = torch.randn(3, 8, requires_grad=True)
    expected = loss(hidden)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    one, two = (torch.autograd.grad(x, hidden)[0] for x in (compiled, expected))
    assert torch.equal(compiled, expected)
    assert torch.equal(one, two)
