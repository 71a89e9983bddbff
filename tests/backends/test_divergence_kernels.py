"""The two-row kernels of every backend that has them, against the sums written out in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.support.roundings import assert_rounded
from tests.support.row_statistics import transformed
from unilogit_kernels.backends import registry
from unilogit_kernels.backends.contract import LogitTransform, RowKernels, TilePair
from unilogit_kernels.maths import pair_state
from unilogit_kernels.testing import assert_within_budget

PLAIN = LogitTransform()
TRANSFORMS = {
    "plain": (PLAIN, PLAIN),
    "scales": (LogitTransform(scale=0.25), LogitTransform(scale=-1.5)),
    "softcap of a": (LogitTransform(softcap=3.0), PLAIN),
    "softcap of b": (PLAIN, LogitTransform(scale=2.0, softcap=5.0)),
    "temperature": (LogitTransform(1.5, 6.0).at_temperature(3.0), PLAIN.at_temperature(3.0)),
}
Student = Literal["a", "b"]


@pytest.fixture
def kernels(backend: str) -> RowKernels:
    return registry.load(backend)


def literal_state(a: Tensor, b: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Rest divergence and both log-odds, `[3, n]`, from two softmaxes over the masked rows."""
    is_label = torch.arange(a.shape[1]) == labels[:, None]
    rests = [z.to(dtype).masked_fill(is_label, -math.inf) for z in (a, b)]
    log_a, log_b = (torch.log_softmax(z, -1) for z in rests)
    terms = torch.where(log_a == -math.inf, 0.0, log_a.exp() * (log_a - log_b))
    targets = [torch.where(is_label, z.to(dtype), -math.inf).amax(1) for z in (a, b)]
    log_odds = [y - z.logsumexp(1) for y, z in zip(targets, rests, strict=True)]
    return torch.stack((terms.sum(1), *log_odds))


def found_state(state: Tensor, v: int, labels: Tensor | None) -> Tensor:
    return torch.stack((pair_state.rest_divergence(state), *pair_state.log_odds(state, labels, v)))


def fold(
    kernels: RowKernels,
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    cuts: tuple[int, ...] = (),
    transforms: tuple[LogitTransform, LogitTransform] = (PLAIN, PLAIN),
) -> Tensor:
    """The state after the columns between these cuts, one chunk after the other."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    state = pair_state.empty_state(a.shape[0], a.device, dtype)
    for first, last in zip((0, *cuts), (*cuts, a.shape[1]), strict=True):
        part = slice(first, last)
        kernels.divergence_update(
            TilePair(a[:, part], b[:, part], labels, first, *transforms), state
        )
    return state


def rows(
    n: int, v: int, dtype: torch.dtype, b_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    a = torch.randn(n, v) * 3
    b = a + torch.randn(n, v)
    return a.to(dtype), b.to(b_dtype or dtype), torch.randint(0, v, (n,))


def check_state(
    kernels: RowKernels,
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    cuts: tuple[int, ...] = (),
    transforms: tuple[LogitTransform, LogitTransform] = (PLAIN, PLAIN),
) -> None:
    state = fold(kernels, a, b, labels, cuts, transforms)
    found = found_state(state, a.shape[1], labels)
    exact, plain = (
        literal_state(
            transformed(a, transforms[0], dtype),
            transformed(b, transforms[1], dtype),
            labels,
            dtype,
        )
        for dtype in (torch.float64, found.dtype)
    )
    for i, what in enumerate(("rest divergence", "d_a", "d_b")):
        assert_within_budget(found[i], exact[i], plain[i], what, smallest_scale=1.0)


@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("cuts", [(), (1, 100, 480)])
def test_state(
    kernels: RowKernels,
    dtype: torch.dtype,
    transforms: tuple[LogitTransform, LogitTransform],
    cuts: tuple[int, ...],
) -> None:
    check_state(kernels, *rows(7, 503, dtype), cuts=cuts, transforms=transforms)


@pytest.mark.parametrize(("n", "v"), [(1, 2), (3, 7), (5, 501), (2, 4099), (9, 128), (2, 50_257)])
def test_state_of_odd_sizes(kernels: RowKernels, dtype: torch.dtype, n: int, v: int) -> None:
    check_state(kernels, *rows(n, v, dtype))


@pytest.mark.parametrize("b_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_of_two_dtypes(kernels: RowKernels, dtype: torch.dtype, b_dtype: torch.dtype) -> None:
    # Enough rows that plain torch's largest error is not small by luck.
    check_state(kernels, *rows(64, 333, dtype, b_dtype))


def test_rows_at_a_distance_of_zero(kernels: RowKernels) -> None:
    """test_layouts.py has every other layout, of all matrices."""
    a, b, labels = rows(5, 200, torch.float32)
    same = a[:1].expand(5, -1)
    students: tuple[Student, Student] = ("a", "b")
    for operands in ((same, b), (b, same)):
        check_state(kernels, *operands, labels)
        for student in students:
            check_gradient(kernels, *operands, labels, student)


def test_without_a_label_the_rests_are_the_rows(kernels: RowKernels, dtype: torch.dtype) -> None:
    a, b, _ = rows(4, 300, dtype)
    labels = torch.full((4,), -1)
    found = found_state(fold(kernels, a, b, labels, (128,)), 300, None)
    exact, plain = (literal_state(a, b, labels, t) for t in (torch.float64, torch.float32))
    assert_within_budget(found[0], exact[0], plain[0], smallest_scale=1.0)
    assert (found[1:] == -math.inf).all()


@pytest.mark.parametrize("offsets", [(1e4, 0.0), (0.0, -1e4), (1e6, 1e6), (1e8, -1e8)])
def test_common_offsets(kernels: RowKernels, offsets: tuple[float, float]) -> None:
    """Offsets of either row change the result by the rounding of the inputs alone."""
    a, b, labels = rows(4, 700, torch.float32)
    check_state(kernels, a + offsets[0], b + offsets[1], labels, (300,))


def test_equal_rows_have_no_divergence_and_no_gradient(
    kernels: RowKernels, dtype: torch.dtype
) -> None:
    a, _, labels = rows(6, 1000, dtype)
    state = fold(kernels, a, a.clone(), labels, (412,))
    assert (pair_state.rest_divergence(state) == 0).all()
    w = torch.rand(6)
    opposite = torch.stack((-w, torch.zeros(6), w, torch.zeros(6)))
    relative = torch.stack((torch.zeros(6), w, torch.zeros(6), torch.zeros(6)))
    for coefficients in (opposite, relative):
        out = torch.full_like(a, math.nan)
        kernels.divergence_gradient(TilePair(a, a.clone(), labels), state, coefficients, "a", out)
        assert (out == 0).all()


def literal_gradient(
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    student: Student,
    transforms: tuple[LogitTransform, LogitTransform],
    dtype: torch.dtype,
) -> Tensor:
    is_label = torch.arange(a.shape[1]) == labels[:, None]
    x = (a if student == "a" else b).to(dtype).requires_grad_()
    z_a = transformed(x if student == "a" else a, transforms[0], dtype)
    z_b = transformed(x if student == "b" else b, transforms[1], dtype)
    rests = [z.detach().masked_fill(is_label, -math.inf) for z in (z_a, z_b)]
    s, t = (
        z.detach() - rest.amax(1, keepdim=True) for z, rest in zip((z_a, z_b), rests, strict=True)
    )
    alpha, beta, gamma, at_label = coefficients.to(dtype)[:, :, None]
    row = s.exp() * (alpha + beta * (s - t)) + gamma * t.exp()
    row = torch.where(is_label, at_label, row)
    return torch.autograd.grad(z_a if student == "a" else z_b, x, row)[0]


def check_gradient(
    kernels: RowKernels,
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    student: Student,
    cuts: tuple[int, ...] = (),
    transforms: tuple[LogitTransform, LogitTransform] = (PLAIN, PLAIN),
    *,
    in_place: bool = False,
) -> None:
    state = fold(kernels, a, b, labels, cuts, transforms)
    coefficients = torch.randn(4, a.shape[0])
    exact, plain = (
        literal_gradient(a, b, labels, coefficients, student, transforms, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    logits = {"a": a, "b": b}
    out = torch.full_like(logits[student], math.nan, memory_format=torch.contiguous_format)
    if in_place:
        out = logits[student] = logits[student].clone()
    for first, last in zip((0, *cuts), (*cuts, a.shape[1]), strict=True):
        part = slice(first, last)
        kernels.divergence_gradient(
            TilePair(logits["a"][:, part], logits["b"][:, part], labels, first, *transforms),
            state,
            coefficients,
            student,
            out[:, part],
        )
    assert_within_budget(out, exact, plain.to(out.dtype), f"gradient of {student}")


@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("student", ["a", "b"])
@pytest.mark.parametrize("in_place", [False, True])
def test_gradient(
    kernels: RowKernels,
    dtype: torch.dtype,
    student: Student,
    transforms: tuple[LogitTransform, LogitTransform],
    in_place: bool,
) -> None:
    problem = rows(7, 503, dtype)
    for cuts in ((), (1, 100, 480)):
        check_gradient(
            kernels, *problem, student=student, cuts=cuts, transforms=transforms, in_place=in_place
        )


@pytest.mark.parametrize("b_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("student", ["a", "b"])
def test_gradient_of_two_dtypes(
    kernels: RowKernels, dtype: torch.dtype, b_dtype: torch.dtype, student: Student
) -> None:
    check_gradient(kernels, *rows(4, 333, dtype, b_dtype), student=student, in_place=True)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_into_another_dtype(kernels: RowKernels, out_dtype: torch.dtype) -> None:
    a, b, labels = rows(4, 333, torch.float32)
    state, coefficients = fold(kernels, a, b, labels), torch.randn(4, 4)
    out = torch.empty(4, 333, dtype=out_dtype)
    kernels.divergence_gradient(TilePair(a, b, labels), state, coefficients, "b", out)
    exact, plain = (
        literal_gradient(a, b, labels, coefficients, "b", (PLAIN, PLAIN), dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_budget(out, exact, plain.to(out_dtype))


def test_rows_without_coefficients_become_zero(kernels: RowKernels) -> None:
    a, b, labels = rows(4, 90, torch.float32)
    a[1] = math.nan
    b[2] = math.inf
    state = fold(kernels, a, b, labels)
    coefficients = torch.randn(4, 4)
    coefficients[:, 1:3] = 0
    out = torch.full_like(a, math.nan)
    kernels.divergence_gradient(TilePair(a, b, labels), state, coefficients, "b", out)
    assert (out[1:3] == 0).all()
    assert (out[[0, 3]] != 0).all()


def hard_pairs() -> Iterator[tuple[str, dict[int, float], dict[int, float], float]]:
    """Entries that replace those of two zero rows with label 5, and the rest divergence."""
    inf, nan = math.inf, math.nan
    yield "token impossible in both", {2: -inf}, {2: -inf}, 0.0
    yield "token impossible in a", {2: -inf}, {}, math.log(36 / 35)
    yield "token impossible in b", {}, {2: -inf}, inf
    yield "token impossible in b, without weight in a", {2: -1e4}, {2: -inf}, 0.0
    yield "label impossible in both", {5: -inf}, {5: -inf}, 0.0
    yield "NaN in a", {2: nan}, {}, nan
    yield "NaN in b", {}, {2: nan}, nan
    yield "+inf in a", {2: inf}, {}, nan
    yield "+inf in b", {}, {2: inf}, nan
    yield "NaN in b, where a is impossible", {2: -inf}, {2: nan}, nan
    yield (
        "everything but the label impossible in a",
        dict.fromkeys(set(range(37)) - {5}, -inf),
        {},
        nan,
    )
    yield (
        "everything but the label impossible in b",
        {},
        dict.fromkeys(set(range(37)) - {5}, -inf),
        inf,
    )


@pytest.mark.parametrize(("name", "a_entries", "b_entries", "divergence"), list(hard_pairs()))
@pytest.mark.parametrize("cuts", [(), (2, 3), (5, 6), tuple(range(1, 37))], ids=str)
def test_hard_rows(
    kernels: RowKernels,
    name: str,
    a_entries: dict[int, float],
    b_entries: dict[int, float],
    divergence: float,
    cuts: tuple[int, ...],
) -> None:
    """Between two ordinary rows, which they must not disturb, and at any cut into chunks."""
    a, b, labels = rows(3, 37, torch.float32)
    labels[1] = 5
    before = found_state(fold(kernels, a, b, labels, cuts), 37, labels)
    a[1] = b[1] = 0.0
    for entries, x in ((a_entries, a), (b_entries, b)):
        for column, value in entries.items():
            x[1, column] = value
    found = found_state(fold(kernels, a, b, labels, cuts), 37, labels)
    exact = torch.tensor([divergence], dtype=torch.float64)
    assert_rounded(found[0, 1:2], exact, name, smallest_scale=1.0)
    assert torch.equal(found[:, [0, 2]], before[:, [0, 2]])


@pytest.mark.parametrize("student", ["a", "b"])
@pytest.mark.parametrize("cuts", [(), (2, 7)], ids=str)
def test_gradient_of_forbidden_tokens(
    kernels: RowKernels, dtype: torch.dtype, student: Student, cuts: tuple[int, ...]
) -> None:
    """Without a weight on the difference, its infinities are nothing: 0 * inf is not meant."""
    a, b, labels = rows(4, 37, dtype)
    labels[:] = 5
    b[0, 9] = a[1, 9] = -math.inf
    a[2, 9] = b[2, 9] = -math.inf
    state = fold(kernels, a, b, labels, cuts)
    alpha, gamma, at_label = torch.randn(3, 4)
    coefficients = torch.stack((alpha, torch.zeros(4), gamma, at_label))
    out = torch.full_like(a, math.nan)
    for first, last in zip((0, *cuts), (*cuts, 37), strict=True):
        part = slice(first, last)
        kernels.divergence_gradient(
            TilePair(a[:, part], b[:, part], labels, first),
            state,
            coefficients,
            student,
            out[:, part],
        )
    is_label = torch.arange(37) == labels[:, None]
    expected = []
    for to in (torch.float64, torch.float32):
        rests = [z.to(to).masked_fill(is_label, -math.inf) for z in (a, b)]
        s, t = (rest - rest.amax(1, keepdim=True) for rest in rests)
        row = s.exp() * alpha.to(to)[:, None] + t.exp() * gamma.to(to)[:, None]
        expected.append(torch.where(is_label, at_label.to(to)[:, None], row))
    assert_within_budget(out, expected[0], expected[1].to(dtype))


class TestMerge:
    def test_merge_is_what_one_pass_gives(self) -> None:
        a, b, labels = (
            x.double() if x.is_floating_point() else x for x in rows(3, 90, torch.float32)
        )
        a, b = a * 10, b * 10
        eager = registry.load("eager")

        def state(first: int, last: int) -> Tensor:
            part = pair_state.empty_state(3, a.device, torch.float64)
            columns = slice(first, last)
            eager.divergence_update(TilePair(a[:, columns], b[:, columns], labels, first), part)
            return part

        whole = found_state(state(0, 90), 90, labels)
        parts = [state(0, 41), state(41, 41), state(41, 60), state(60, 90)]
        left = pair_state.merge(pair_state.merge(parts[0], parts[1]), parts[2])
        for merged in (
            pair_state.merge(left, parts[3]),
            pair_state.merge(parts[3], left),
            pair_state.merge_parts(torch.stack(parts)),
        ):
            assert torch.allclose(found_state(merged, 90, labels), whole, rtol=1e-12)

    def test_empty_is_neutral(self) -> None:
        state = torch.tensor([1.0, 2.0, -0.5, 4.0, 3.0, -2.0, 7.0])[:, None]
        empty = pair_state.empty_state(1, torch.device("cpu"))
        assert torch.equal(pair_state.merge(state, empty), state)
        assert torch.equal(pair_state.merge(empty, state), state)
        assert torch.equal(pair_state.merge(empty, empty), empty)


def test_temperature_folds_into_the_transform() -> None:
    """`softcap * tanh(scale x / softcap) / T` needs no field of its own."""
    x = torch.randn(50, dtype=torch.float64) * 10
    transform = LogitTransform(0.7, 4.0)
    expected = transformed(x, transform, torch.float64) / 2.5
    found = transformed(x, transform.at_temperature(2.5), torch.float64)
    assert torch.allclose(found, expected, rtol=1e-14)
