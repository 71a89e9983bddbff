"""The largest logit other than the label's: its column, its share of the rest, and gradients."""

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
    linear_objective_loss,
    linear_target_and_runner_up,
    reference,
    target_and_runner_up,
)
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile
from unilogit_kernels.backends.eager import EagerKernels
from unilogit_kernels.maths import row_state, statistics
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.maths.statistics import Statistics
from unilogit_kernels.testing import AllocationGuard, assert_within_budget

PLAIN = LogitTransform()
RUNNER_UP = RowNeeds(runner_up=True)
V = 503


@pytest.fixture
def kernels(backend: str) -> RowKernels:
    return registry.load(backend)


def fold(
    kernels: RowKernels,
    logits: Tensor,
    labels: Tensor,
    chunks: list[slice],
    transform: LogitTransform = PLAIN,
    first_column: int = 0,
) -> Tensor:
    """The state after these chunks of columns, in their order."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    state = row_state.empty_state(logits.shape[0], logits.device, dtype, needs=RUNNER_UP)
    for chunk in chunks:
        tile = Tile(logits[:, chunk], labels, first_column + chunk.start, transform)
        kernels.log_odds_update(tile, state, RUNNER_UP)
    return state


def cut(v: int, *at: int) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise((0, *at, v))]


def slopes_of(state: Tensor, labels: Tensor, v: int, slope: Statistics) -> Tensor:
    return statistics.row_slopes(state, row_state.log_odds(state, labels, v), slope, v)


def first_largest(logits: Tensor, labels: Tensor) -> Tensor:
    """The lowest column of the largest entry but the label's, one entry after the other."""
    found = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        others = [(-z, j) for j, z in enumerate(row) if j != label]
        found.append(min(others)[1])
    return torch.tensor(found)


# ---- the column --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_column(kernels: RowKernels, dtype: torch.dtype, options: dict[str, Any]) -> None:
    logits, labels = (2 * torch.randn(13, V)).to(dtype), torch.randint(0, 480, (13,))
    transform = LogitTransform(options.get("logit_scale", 1.0), options.get("softcap", 0.0))
    z = reference.transform_logits(logits.float(), **options)
    logits = logits[:, : z.shape[1]]
    state = fold(kernels, logits, labels, cut(z.shape[1], 100, 333), transform)
    found = row_state.runner_up(state, labels)
    value = z.gather(1, found[:, None])[:, 0]
    others = z.scatter(1, labels[:, None], -math.inf)
    # Each backend has its own tanh.
    rounding = 4 * torch.finfo(torch.float32).eps if transform.softcap else 0.0
    assert (value >= others.amax(1) * (1 - rounding) - rounding).all()
    assert (found != labels).all()
    if not transform.softcap:
        assert torch.equal(found, first_largest(z, labels))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_of_equal_ones_the_lowest(
    kernels: RowKernels, dtype: torch.dtype, order: tuple[int, ...]
) -> None:
    """Small integers: every row has its maximum many times, in every chunk."""
    for v, at in ((V, (100, 333)), (2100, (11, 2061)), (9, (1, 8))):
        logits = torch.randint(-2, 3, (24, v)).to(dtype)
        labels = logits.argmax(1)
        labels[::3] = torch.randint(0, v, (8,))
        logits[1], labels[1] = 1.0, 0  # all equal, the first one the label
        logits[2], labels[2] = -1.0, v - 1
        chunks = cut(v, *at)
        state = fold(kernels, logits, labels, [chunks[i] for i in order])
        assert torch.equal(row_state.runner_up(state, labels), first_largest(logits, labels))


def test_at_every_column(kernels: RowKernels) -> None:
    """Body, tail and ends, at every alignment; the label beside it is larger."""
    v = 311
    logits = torch.randn(v, v).clamp(max=2).fill_diagonal_(4.0)
    labels = (torch.arange(v) + 1) % v
    logits[torch.arange(v), labels] = 9.0
    for start in range(3):
        memory = torch.empty(v, v + 5)
        view = memory[:, start : start + v].copy_(logits)
        state = fold(kernels, view, labels, [slice(0, v)])
        assert torch.equal(row_state.runner_up(state, labels), torch.arange(v))


def test_columns_of_any_stride(kernels: RowKernels, dtype: torch.dtype) -> None:
    logits, labels = torch.randn(5, 2 * V).to(dtype), torch.randint(0, V, (5,))
    for view in (logits[:, ::2], logits[:, :V].t().contiguous().t()):
        state = fold(kernels, view, labels, cut(V, 200))
        assert torch.equal(row_state.runner_up(state, labels), first_largest(view, labels))


@pytest.mark.parametrize("first_column", [2**24 + 1, 2**31 - 600])
def test_columns_that_float32_cannot_count(kernels: RowKernels, first_column: int) -> None:
    logits, labels = torch.randn(7, V), torch.randint(0, V, (7,)) + first_column
    state = fold(kernels, logits, labels, cut(V, 250), first_column=first_column)
    found = row_state.runner_up(state, labels) - first_column
    assert torch.equal(found, first_largest(logits, labels - first_column))
    other = row_state.empty_state(7, logits.device, needs=RUNNER_UP)
    assert torch.equal(row_state.merge(other, state).view(torch.int32), state.view(torch.int32))


def test_statistics_are_those_of_a_state_without_it(
    kernels: RowKernels, dtype: torch.dtype
) -> None:
    logits, labels = torch.randn(9, V).to(dtype), torch.randint(0, V, (9,))
    plain = row_state.empty_state(9, logits.device)
    kernels.log_odds_update(Tile(logits, labels), plain)
    assert torch.equal(fold(kernels, logits, labels, [slice(0, V)])[:3], plain)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # Triton's interpreter, at NaN
@pytest.mark.parametrize("where", [0, 100, 502])
def test_hard_rows(kernels: RowKernels, where: int) -> None:
    """-inf everywhere but at the label, everywhere, in one chunk; +inf; NaN."""
    logits, labels = torch.full((6, V), -math.inf), torch.tensor([where, where, 7, 0, 1, 2])
    logits[0, where] = 1.0  # a rest of nothing
    logits[2, where] = -1e30  # a rest of one column
    logits[3:] = torch.randn(3, V)
    logits[3, 100:300] = -math.inf
    logits[4, where], logits[5, where] = math.nan, math.inf
    state = fold(kernels, logits, labels, cut(V, 100, 300))
    found, seen = (
        row_state.runner_up(state, labels),
        statistics.statistics(state, labels, V, RUNNER_UP),
    )
    assert seen.runner_up_log_prob is not None
    lowest = [int(label == 0) for label in labels.tolist()]
    assert found[:2].tolist() == lowest[:2]
    assert found[2] == where
    assert found[3] == first_largest(logits[3:4], labels[3:4])[0]
    assert found[4:].tolist() == lowest[4:]
    assert seen.log_odds[0] == math.inf
    assert seen.runner_up_log_prob[0] == -math.inf
    assert seen.runner_up_log_prob[2] == 0
    assert seen.log_odds[1].isnan()
    assert seen.log_odds[4:].isnan().all()


def test_merge_is_a_commutative_monoid() -> None:
    logits, labels = torch.randint(0, 3, (40, 90)).float(), torch.randint(0, 90, (40,))
    logits[:5, :60] = -math.inf
    logits[5, 3] = math.nan
    eager = EagerKernels()
    a, b, c = (fold(eager, logits, labels, [chunk]) for chunk in cut(90, 30, 60))
    whole = fold(eager, logits, labels, [slice(0, 90)])

    exact = fold(eager, logits.double(), labels, [slice(0, 90)])

    def assert_same(x: Tensor) -> None:
        assert torch.equal(row_state.runner_up(x, labels), row_state.runner_up(whole, labels))
        assert torch.equal(x[0].nan_to_num(), whole[0].nan_to_num())
        assert torch.equal(x[2], whole[2])
        known = ~exact[1].isnan()
        assert torch.equal(known, ~x[1].isnan())
        assert_within_budget(x[1, known], exact[1, known], whole[1, known], "sum")

    merge = row_state.merge
    assert_same(merge(merge(a, b), c))
    assert_same(merge(a, merge(b, c)))
    assert_same(merge(c, merge(b, a)))
    empty = row_state.empty_state(40, logits.device, needs=RUNNER_UP)
    assert_same(merge(empty, whole))
    assert_same(merge(whole, empty))


# ---- gradient rows -----------------------------------------------------------------------------


def literal_row(
    logits: Tensor, labels: Tensor, slope: Tensor, other: Tensor, **options: Any
) -> Tensor:
    """The gradient of `sum slope d + other log p_m`, by autograd over whole rows."""
    x = logits.detach().requires_grad_()
    d = reference.target_log_odds(x, labels, **options)
    log_prob = reference.runner_up_log_prob(x, labels, **options)
    upstream = [slope.to(d.dtype), other.to(d.dtype)]
    return torch.autograd.grad([d, log_prob], x, upstream)[0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradient_rows(
    kernels: RowKernels, dtype: torch.dtype, options: dict[str, Any], in_place: bool
) -> None:
    n = 12
    logits, labels = (2 * torch.randn(n, V)).to(dtype), torch.randint(0, 480, (n,))
    transform = LogitTransform(options.get("logit_scale", 1.0), options.get("softcap", 0.0))
    v = options.get("vocab_size", V)
    # Beside the label on either side, in its chunk and in another, and with it at the ends.
    for row, (label, top) in enumerate([(5, 6), (6, 5), (0, v - 1), (v - 1, 0), (99, 100)]):
        labels[row], logits[row, top] = label, math.copysign(9.0, transform.scale)
    slope, other = torch.randn(n), torch.randn(n)
    slope[3], other[4] = 0.0, 0.0
    other[5] = -slope[5]  # a margin: the rest gets nothing
    exact = literal_row(logits.double(), labels, slope, other, **options)[:, :v]
    plain = literal_row(logits.float(), labels, slope, other, **options)[:, :v].to(dtype)
    chunks = cut(v, 100, 333)
    real = logits[:, :v].clone()
    state = fold(kernels, real, labels, chunks, transform)
    slopes = slopes_of(state, labels, v, Statistics(slope, other))
    out = real if in_place else torch.full_like(real, math.nan)
    for chunk in chunks:
        kernels.log_odds_gradient(
            Tile(real[:, chunk], labels, chunk.start, transform), state, slopes, out[:, chunk]
        )
    assert_within_budget(out, exact, plain, "gradient")


def test_rows_without_a_slope_are_zero_whatever_they_hold(kernels: RowKernels) -> None:
    logits, labels = torch.randn(4, V), torch.tensor([1, 2, -100, 4])
    logits[1] = math.nan
    logits[2] = -math.inf
    state = fold(kernels, logits, labels, [slice(0, V)])
    zeros = torch.zeros(4)
    slopes = slopes_of(state, labels, V, Statistics(zeros, zeros))
    kernels.log_odds_gradient(Tile(logits, labels), state, slopes, logits)
    assert logits.count_nonzero() == 0
    assert logits.isfinite().all()


@pytest.mark.parametrize("d", [-60.0, -20.0, 13.8, 34.0, 100.0])
def test_saturated_probabilities(backend: str, d: float) -> None:
    """The label's or the runner-up's probability rounds to 1; the others have not lost a digit."""
    logits = torch.linspace(-1, 1, V)[None].clone()
    logits[0, 0] = d
    labels = torch.tensor([0])
    x, exact_x = logits.clone().requires_grad_(), logits.double().requires_grad_()
    seen = target_and_runner_up(x, labels, backend=backend)
    exact_seen = target_and_runner_up(exact_x, labels)
    eps = torch.finfo(torch.float32).eps
    for i in range(2):
        (gradient,) = torch.autograd.grad(seen[i], x, retain_graph=True)
        (exact,) = torch.autograd.grad(exact_seen[i], exact_x, retain_graph=True)
        allowed = 8 * eps * (1 + abs(d)) * exact.abs()
        assert ((gradient - exact).abs() <= allowed + torch.finfo(torch.float32).tiny).all()
        assert abs(seen[i] - exact_seen[i]) <= 8 * eps * (1 + abs(d))


# ---- public ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_against_a_softmax(
    backend: str, dtype: torch.dtype, linear: bool, options: dict[str, Any]
) -> None:
    """Statistics and a gradient of both, ignored positions included."""
    labels = torch.randint(0, 480, (4, 9))
    labels[1, 3:6] = -100
    valid = labels != -100
    operands = [torch.randn(4, 9, 24), 0.6 * torch.randn(V, 24)]
    operands = operands if linear else [operands[0] @ operands[1].t()]
    operands = [x.to(dtype) for x in operands]
    upstream = torch.tensor([[1.0], [-2.0]])

    def plain(to: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [x.detach().to(to).requires_grad_() for x in operands]
        logits = F.linear(*leaves) if linear else leaves[0]
        z = reference.transform_logits(
            logits[valid].to(torch.promote_types(to, torch.float32)), **options
        )
        y = labels[valid]
        found = torch.stack([literal.logit(z, y), literal.log_runner_up(z, y)])
        return found, torch.autograd.grad(found, leaves, upstream.to(z.dtype).expand_as(found))

    leaves = [x.detach().requires_grad_() for x in operands]
    function: Any = linear_target_and_runner_up if linear else target_and_runner_up
    result = function(*leaves, labels, backend=backend, **options)
    assert (result.runner_up == -100).equal(~valid)
    assert (result.log_odds[~valid] == 0).all()
    assert (result.runner_up_log_prob[~valid] == 0).all()
    found = torch.stack(result[:2])[:, valid]
    (exact, exact_gradients), (other, others) = plain(torch.float64), plain(dtype)
    assert_within_budget(found, exact, other, "statistics", smallest_scale=1.0)
    gradients = torch.autograd.grad(found, leaves, upstream.expand_as(found))
    for got, right, by_torch in zip(gradients, exact_gradients, others, strict=True):
        assert_within_budget(got.flatten(), right.flatten(), by_torch.flatten(), "gradient")


@pytest.mark.parametrize("needed", [0, 1])
def test_gradient_of_one_of_both(backend: str, needed: int) -> None:
    logits, labels = torch.randn(5, V), torch.randint(0, V, (5,))

    def gradient(dtype: torch.dtype, name: str) -> Tensor:
        x = logits.to(dtype).requires_grad_()
        found = target_and_runner_up(x, labels, backend=name)[needed]
        return torch.autograd.grad(found.sum(), x)[0]

    exact, plain = gradient(torch.float64, "eager"), gradient(torch.float32, "eager")
    assert_within_budget(gradient(torch.float32, backend), exact, plain)


@pytest.mark.parametrize("budget", [None, 1 << 20])
@pytest.mark.parametrize("compact", [False, True])
def test_ways_to_run_agree(backend: str, budget: int | None, compact: bool) -> None:
    """Chunks, kept logits and dropped rows change no column and little else."""
    hidden, weight = torch.randn(40, 16), torch.randn(3000, 16)
    labels = torch.randint(0, 3000, (40,))
    labels[::4] = -100
    upstream = torch.randn(2, 40)
    upstream[:, 1::4] = 0
    results = []
    ways: list[dict[str, Any]] = [{}, {"options": LinearOptions(budget, compact=compact)}]
    for options in ways:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        found = linear_target_and_runner_up(
            leaves[0], leaves[1], labels, backend=backend, **options
        )
        gradients = torch.autograd.grad(list(found[:2]), leaves, list(upstream))
        results.append((*found, *gradients))
    first, second = results
    assert torch.equal(first[2], second[2])
    for one, two in zip(first, second, strict=True):
        assert (one - two).abs().max() <= 2e-6 * one.abs().max()


def test_skip_below(backend: str) -> None:
    hidden, weight = torch.randn(16, 8, requires_grad=True), torch.randn(100, 8)
    found = linear_target_and_runner_up(
        hidden, weight, torch.arange(16), options=LinearOptions(skip_below=0.1), backend=backend
    )
    upstream = torch.full((16,), 1e-3)
    upstream[3], upstream[5] = 1.0, -2.0
    margin = found.log_odds - found.runner_up_log_prob
    (gradient,) = torch.autograd.grad(margin, hidden, upstream)
    assert (gradient != 0).any(1).nonzero()[:, 0].tolist() == [3, 5]


def test_no_logits_are_held(backend: str) -> None:
    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(5000, 8)
    with AllocationGuard(forbidden_elements=64 * 5000):
        d, log_prob, _ = linear_target_and_runner_up(
            hidden, weight, torch.arange(64), backend=backend
        )
        (d - log_prob).sum().backward()


def test_all_ignored(backend: str) -> None:
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(50, 8)
    labels = torch.full((3,), -100)
    d, log_prob, token = linear_target_and_runner_up(hidden, weight, labels, backend=backend)
    assert token.tolist() == [-100] * 3
    (gradient,) = torch.autograd.grad((d + log_prob).sum(), hidden)
    assert gradient.count_nonzero() == 0


def test_the_eager_backend_is_differentiable_twice() -> None:
    hidden = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 5])

    def both(h: Tensor, w: Tensor) -> Any:
        return linear_target_and_runner_up(h, w, labels, softcap=4.0)[:2]

    assert torch.autograd.gradcheck(both, (hidden, weight))
    assert torch.autograd.gradgradcheck(both, (hidden, weight))
    x = torch.randn(2, 9, requires_grad=True)
    found = target_and_runner_up(x, torch.tensor([1, 2]), backend="cpu")
    (gradient,) = torch.autograd.grad(found.runner_up_log_prob.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), x)


def test_compiles_into_one_graph() -> None:
    weight = torch.randn(200, 8)
    labels = torch.tensor([1, -100, 5])

    def loss(hidden: Tensor) -> Tensor:
        d, log_prob, token = linear_target_and_runner_up(hidden, weight, labels)
        return (torch.sigmoid(d) - log_prob.exp() + 0 * token).sum()

    hidden = torch.randn(3, 8, requires_grad=True)
    expected = loss(hidden)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(compiled, expected)
    one, two = (torch.autograd.grad(x, hidden)[0] for x in (compiled, expected))
    assert torch.equal(one, two)


@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
def test_loku_with_a_frozen_operand(backend: str, trained: str) -> None:
    """Each order of chunks, and a row whose gradient is only at the runner-up."""
    n, h, v = 70, 12, 900
    hidden, weight, labels = torch.randn(n, h), torch.randn(v, h), torch.randint(0, v, (n,))
    weight[labels[0]] = -40 * hidden[0]  # p_y is 0 in float32
    labels[5:9] = -100

    def gradients(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        leaves = [hidden.to(dtype), weight.to(dtype)]
        wanted = [
            x.requires_grad_()
            for x, name in zip(leaves, ("hidden", "weight"), strict=True)
            if trained in (name, "both")
        ]
        if ours:
            loss = linear_objective_loss(leaves[0], leaves[1], labels, "loku", backend=backend)
        else:
            valid = labels != -100
            loss = literal.inverted_hinge(F.linear(*leaves)[valid], labels[valid]).mean()
        return list(torch.autograd.grad(loss, wanted))

    for got, right, plain in zip(
        gradients(torch.float32, True),
        gradients(torch.float64, False),
        gradients(torch.float32, False),
        strict=True,
    ):
        assert_within_budget(got.flatten(), right.flatten(), plain.flatten())
