"""More of a row than its log-odds: sums, moments and general gradient rows, on every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.support.roundings import assert_rounded
from tests.support.row_statistics import found_statistics, literal_statistics, transformed
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, Tile
from unilogit_kernels.maths import row_state, statistics
from unilogit_kernels.maths.row_state import RowNeeds
from unilogit_kernels.testing import assert_within_budget

PLAIN = LogitTransform()
TRANSFORMS = {
    "plain": PLAIN,
    "scale": LogitTransform(scale=0.25),
    "negative scale": LogitTransform(scale=-1.5),
    "softcap": LogitTransform(scale=1.5, softcap=5.0),
}
EVERYTHING = RowNeeds(*[True] * len(RowNeeds._fields))
NEEDS = {
    "runner-up": RowNeeds(runner_up=True),
    "logsumexp": RowNeeds(logsumexp=True),
    "mean": RowNeeds(mean=True),
    "entropy": RowNeeds(entropy=True),
    "mean and entropy": RowNeeds(mean=True, entropy=True),
    "runner-up and mean": RowNeeds(runner_up=True, mean=True),
    "variance": RowNeeds(entropy=True, variance=True),
    "everything": EVERYTHING,
}
INF = math.inf
V = 503


@pytest.fixture
def kernels(backend: str) -> RowKernels:
    return registry.load(backend)


def cut(v: int, *at: int) -> list[slice]:
    return [slice(a, b) for a, b in itertools.pairwise((0, *at, v))]


def fold(
    kernels: RowKernels,
    logits: Tensor,
    labels: Tensor,
    needs: RowNeeds = EVERYTHING,
    chunks: list[slice] | None = None,
    transform: LogitTransform = PLAIN,
) -> Tensor:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    state = row_state.empty_state(logits.shape[0], logits.device, dtype, needs)
    for chunk in chunks or [slice(0, logits.shape[1])]:
        tile = Tile(logits[:, chunk], labels, chunk.start, transform)
        kernels.log_odds_update(tile, state, needs)
    return state


def check(
    state: Tensor,
    logits: Tensor,
    labels: Tensor,
    needs: RowNeeds,
    transform: LogitTransform = PLAIN,
) -> None:
    z = {t: transformed(logits, transform, t) for t in (torch.float64, state.dtype)}
    exact, plain = (literal_statistics(each, labels) for each in z.values())
    # A mean is found from the largest logit, whose size is that of its rounding.
    scales = {"mean_logit": max(1.0, float(z[torch.float64].abs().max()))}
    for name, value in found_statistics(state, labels, logits.shape[1], needs).items():
        scale = scales.get(name, 1.0)
        assert_within_budget(value, exact[name], plain[name], name, smallest_scale=scale)


# ---- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "transform"),
    [
        *((needs, "plain") for needs in NEEDS),
        *((needs, "softcap") for needs in ("mean", "entropy", "everything")),
        *(("everything", scale) for scale in ("scale", "negative scale")),
    ],
)
@pytest.mark.parametrize("at", [(), (1, 100, 480)], ids=str)
def test_statistics(
    kernels: RowKernels, dtype: torch.dtype, needs: str, transform: str, at: tuple[int, ...]
) -> None:
    logits, labels = (3 * torch.randn(32, V)).to(dtype), torch.randint(0, V, (32,))
    asked, how = NEEDS[needs], TRANSFORMS[transform]
    state = fold(kernels, logits, labels, asked, cut(V, *at), how)
    check(state, logits, labels, asked, how)


@pytest.mark.parametrize(("n", "v"), [(1, 2), (3, 7), (5, 501), (2, 4099), (9, 128), (2, 50_257)])
def test_odd_sizes(kernels: RowKernels, dtype: torch.dtype, n: int, v: int) -> None:
    logits, labels = (3 * torch.randn(n, v)).to(dtype), torch.randint(0, v, (n,))
    check(fold(kernels, logits, labels), logits, labels, EVERYTHING)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_what_nobody_needs_stays(kernels: RowKernels, needs: RowNeeds) -> None:
    logits, labels = torch.randn(4, V), torch.randint(0, V, (4,))
    state, empty = fold(kernels, logits, labels, needs), row_state.empty_state(4, logits.device)
    kernels.log_odds_update(Tile(logits, labels), empty)
    for row in (row_state.ROW_MAX, row_state.TARGET):
        assert torch.equal(state[row], empty[row])
    # Kernels that take moments may round the exponents of the sum otherwise.
    eager = registry.load("eager")
    exact, plain = (fold(eager, x, labels, row_state.PLAIN) for x in (logits.double(), logits))
    found, of_exact, of_plain = (x[row_state.ROW_SUM] for x in (state, exact, plain))
    assert_within_budget(found, of_exact, of_plain)
    untouched = row_state.empty_state(4, logits.device, needs=needs)
    of_moments = needs.entropy or needs.variance
    asked = [True] * 3 + [needs.runner_up, needs.mean, needs.mean, of_moments, needs.variance]
    for i, row in enumerate(state.view(torch.int32)):
        assert torch.equal(row, untouched[i].view(torch.int32)) != asked[i]


def test_shards_merge(kernels: RowKernels, dtype: torch.dtype) -> None:
    """Ranks with columns of their own, of which one has none but -inf, and one the label alone."""
    logits, labels = (3 * torch.randn(24, V)).to(dtype), torch.full((24,), 100)
    logits[:, 300:400] = -INF
    chunks = cut(V, 100, 101, 300, 400)
    labels[:12] = torch.randint(0, 300, (12,))
    parts = [fold(kernels, logits, labels, EVERYTHING, [chunk]) for chunk in chunks]
    whole, of_two = row_state.merge_parts(torch.stack(parts)), parts[-1]
    for part in parts[:-1]:
        of_two = row_state.merge(part, of_two)
    for state in (whole, of_two):
        for name, value in found_statistics(state, labels, V, EVERYTHING).items():
            if name in ("uniform_cross_entropy", "mean_logit"):
                assert (value.abs() == INF).all(), name
                continue
            exact, plain = (
                literal_statistics(logits.to(t), labels)[name] for t in (torch.float64, value.dtype)
            )
            assert_within_budget(value, exact, plain, name, smallest_scale=1.0)


@pytest.mark.parametrize("offset", [1e4, -1e6, 1e8])
def test_common_offsets(kernels: RowKernels, offset: float) -> None:
    """The rounding of the logits is all that an offset changes; what depends on it has its size."""
    logits, labels = 20 * torch.randn(16, V) + offset, torch.randint(0, V, (16,))
    state = fold(kernels, logits, labels, chunks=cut(V, 100, 333))
    check(state, logits, labels, EVERYTHING)


@pytest.mark.parametrize("gap", [5.0, 15.0, 30.0, 50.0, 80.0])
def test_memorised_tokens(kernels: RowKernels, gap: float) -> None:
    """Entropy and variance at p -> 1 are as small as they are, not noise."""
    logits, labels = torch.randn(24, V), torch.randint(0, V, (24,))
    logits.scatter_(1, labels[:, None], logits.logsumexp(1)[:, None] + gap)
    state = fold(kernels, logits, labels, chunks=cut(V, 250))
    d, q = (logits.double().scatter(1, labels[:, None], -INF) for _ in range(2))
    d = logits.double().gather(1, labels[:, None])[:, 0] - d.logsumexp(1)
    q = torch.sigmoid(-d)
    r = logits.double().scatter(1, labels[:, None], -INF).log_softmax(1)
    rest = -(r.exp() * r.clamp(min=-1e9)).sum(1)
    entropy = q * (rest + d) + torch.log1p(torch.exp(-d))
    within = (r.exp() * (r.clamp(min=-1e9) + rest[:, None]).square()).sum(1)
    variance = q * within + torch.sigmoid(d) * q * (d + rest).square()
    found = found_statistics(state, labels, V, EVERYTHING)
    for value, exact in ((found["entropy"], entropy), (found["variance"], variance)):
        # q = e^-d has the rounding of d, which plain torch would have too if it kept any digit.
        rounded = exact * (1 + d * torch.finfo(torch.float32).eps)
        assert_within_budget(value, exact, rounded.float(), smallest_scale=1e-45)


def test_columns_of_one_size(kernels: RowKernels, dtype: torch.dtype) -> None:
    """The softmax is uniform: entropy log V, variance 0."""
    for v in (2, 64, V, 5000):
        logits, labels = torch.full((3, v), 2.5).to(dtype), torch.tensor([0, v // 2, v - 1])
        found = found_statistics(fold(kernels, logits, labels), labels, v, EVERYTHING)
        assert found["variance"].abs().max() <= 1e-12
        uniform = torch.full((3,), math.log(v), dtype=torch.float64)
        for name in ("entropy", "uniform_cross_entropy"):
            assert_within_budget(found[name], uniform, uniform.float(), name)
        assert (found["mean_logit"] == 2.5).all()


@pytest.mark.parametrize("peak", [5.0, 12.0])
def test_variance_below_one_peak(kernels: RowKernels, peak: float) -> None:
    """One logit far above all others, which are nearly equal: the squares about 0 would cancel."""
    logits, labels = 1e-3 * torch.randn(16, 4099), torch.randint(0, 2000, (16,))
    logits[:, 3000] = peak
    state = fold(kernels, logits, labels, chunks=cut(4099, 1000, 2990))
    check(state, logits, labels, EVERYTHING)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # Triton's interpreter, at NaN
@pytest.mark.parametrize("at", [(), (100, 300)], ids=str)
def test_hard_rows(kernels: RowKernels, at: tuple[int, ...]) -> None:
    logits, labels = torch.randn(8, V), torch.randint(0, V, (8,))
    logits[0, ::2] = -INF  # has no share of an entropy
    logits[0, labels[0]] = 1.0
    logits[1, labels[1]] = -INF
    logits[2], logits[2, labels[2]] = -INF, 0.7  # a rest of nothing
    logits[3] = -INF
    logits[4, 17], logits[5, 333] = math.nan, INF
    labels[6] = 5
    logits[6], logits[6, 7] = -INF, 3.0  # a rest of one
    labels[7] = -100
    found = found_statistics(
        fold(kernels, logits, labels, chunks=cut(V, *at)), labels, V, EVERYTHING
    )
    exact, plain = (
        literal_statistics(logits.to(t), labels.clamp(min=0))
        for t in (torch.float64, torch.float32)
    )
    for name, value in found.items():
        assert value[4:6].isnan().all(), name
        assert value[7].isnan(), name
        if name in ("uniform_cross_entropy", "mean_logit"):
            assert (value[[0, 1, 2, 6]].abs() == INF).all(), name
        elif name == "log_odds":
            assert value[1] == -INF
        elif name != "runner_up_log_prob":
            for i in (0, 1):
                assert_within_budget(value[i], exact[name][i], plain[name][i], name)
    for i in (2, 6):
        assert found["entropy"][i] == found["variance"][i] == 0
    largest = logits[[2, 6]].amax(1)
    assert_rounded(found["logsumexp"][[2, 6]], largest.double(), "logsumexp")
    assert found["log_odds"][3].isnan()


# ---- gradient rows -----------------------------------------------------------------------------


def literal_gradient(
    logits: Tensor,
    labels: Tensor,
    column: Tensor,
    slope: Tensor,
    transform: LogitTransform,
    dtype: torch.dtype,
) -> Tensor:
    """`uniform - r (rest + tilt s)` but at the label and `column`, by plain torch."""
    x = logits.to(dtype).requires_grad_()
    z = transformed(x, transform, dtype)
    where = torch.arange(logits.shape[1])
    rest_z = z.detach().masked_fill(where == labels[:, None], -INF)
    s = z.detach() - rest_z.amax(1, keepdim=True)
    rest, at_label, at_runner_up, tilt, uniform = slope.to(dtype)[:, :, None]
    r = rest_z.softmax(1)
    row = uniform - torch.where(r == 0, 0.0, r * (rest + tilt * s))
    row = torch.where(where == column[:, None], at_runner_up, row)
    row = torch.where(where == labels[:, None], at_label, row)
    return torch.autograd.grad(z, x, row)[0]


def check_gradient(
    kernels: RowKernels,
    logits: Tensor,
    labels: Tensor,
    needs: RowNeeds = EVERYTHING,
    at: tuple[int, ...] = (),
    transform: LogitTransform = PLAIN,
    out: Tensor | None = None,
) -> None:
    state = fold(kernels, logits, labels, needs, transform=transform)
    slope = torch.randn(5, logits.shape[0])
    slope[4] /= 10
    column = torch.full_like(labels, -1)
    if needs.runner_up:
        column = row_state.runner_up(state, labels)
    exact, plain = (
        literal_gradient(logits, labels, column, slope, transform, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    given = logits.clone()
    out = given if out is None else out
    for chunk in cut(logits.shape[1], *at):
        tile = Tile(given[:, chunk], labels, chunk.start, transform)
        kernels.log_odds_gradient(tile, state, slope, out[:, chunk])
    assert_within_budget(out, exact, plain.to(out.dtype))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("needs", [EVERYTHING, RowNeeds(logsumexp=True)], ids=["all", "lse"])
@pytest.mark.parametrize("at", [(), (1, 100, 480)], ids=str)
def test_gradient_in_place(
    kernels: RowKernels,
    dtype: torch.dtype,
    transform: LogitTransform,
    needs: RowNeeds,
    at: tuple[int, ...],
) -> None:
    logits, labels = (3 * torch.randn(9, V)).to(dtype), torch.randint(0, V, (9,))
    check_gradient(kernels, logits, labels, needs, at, transform)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_into_another_tensor(
    kernels: RowKernels, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    logits, labels = (3 * torch.randn(5, 2 * V)).to(dtype), torch.randint(0, V, (5,))
    for view in (logits[:, :V], logits[:, ::2], logits[:, 1 : V + 1]):
        for memory in (torch.full((5, 2 * V), math.nan), torch.full((2 * V, 5), math.nan).t()):
            out = memory.to(out_dtype)[:, 3 : V + 3]
            check_gradient(kernels, view, labels, at=(200,), out=out)


@pytest.mark.parametrize(("n", "v"), [(1, 2), (3, 7), (2, 4099), (9, 128), (2, 50_257)])
def test_gradient_of_odd_sizes(kernels: RowKernels, dtype: torch.dtype, n: int, v: int) -> None:
    check_gradient(kernels, (3 * torch.randn(n, v)).to(dtype), torch.randint(0, v, (n,)))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # Triton's interpreter, at NaN
def test_gradient_of_hard_rows(kernels: RowKernels) -> None:
    """Five zeros are a row of zeros; a column of -inf gets `uniform`, however steep the tilt."""
    logits, labels = torch.randn(4, V), torch.tensor([3, 4, 5, -100])
    logits[0] = math.nan
    logits[1, 100:] = -INF
    logits[2], logits[2, 5] = -INF, 1.0
    state = fold(kernels, logits, labels)
    slope = torch.tensor([[0.0, 0, 0, 0, 0], [1, 2, 3, 4, 0.5], [0, 2, 3, 0, 0.5], [0, 0, 0, 0, 0]])
    for at in ((), (64, 101)):
        out = torch.full_like(logits, math.nan)
        for chunk in cut(V, *at):
            tile = Tile(logits[:, chunk], labels, chunk.start)
            kernels.log_odds_gradient(tile, state, slope.t().contiguous(), out[:, chunk])
        assert (out[[0, 3]] == 0).all()
        assert (out[1, 100:] == 0.5).all()
        assert out[1].isfinite().all()
        assert out[1, 4] == out[2, 5] == 2
        assert (out[2, :5] == 0.5).all()
        assert (out[2, 6:] == 0.5).all()


def test_derivatives(kernels: RowKernels, dtype: torch.dtype) -> None:
    """Of any weighted sum of the statistics, from the state to the row."""
    logits, labels = (3 * torch.randn(16, V)).to(dtype), torch.randint(0, V, (16,))
    state = fold(kernels, logits, labels)
    weights = torch.randn(5, 16)
    d = row_state.log_odds(state, labels, V)
    slope = statistics.row_slopes(state, d, statistics.Statistics(*weights), V)
    out = torch.empty(16, V)
    kernels.log_odds_gradient(Tile(logits, labels), state, slope, out)
    names = statistics.Statistics._fields
    found = []
    for t in (torch.float64, torch.float32):
        x = logits.to(t).requires_grad_()
        seen = literal_statistics(x, labels)
        total = sum((w.to(t) * seen[name]).sum() for w, name in zip(weights, names, strict=True))
        found.append(torch.autograd.grad(total, x)[0])
    assert_within_budget(out, found[0], found[1])
