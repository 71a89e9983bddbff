"""Ranks that share a vocabulary, against one process in float64: results, collectives, errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard as TokenShard
from torch.distributed.tensor import distribute_tensor

from tests.distributed.vocabularies import (
    COLUMNS,
    CUTS,
    DIFFERENTIABLE,
    FUNCTIONS,
    VOCAB_SIZE,
    Result,
    Sent,
    gradients_of,
    literal_function,
    of_frozen_problems,
    of_functions,
    of_problems,
    recorded,
)
from tests.support.divergence_pairs import DIVERGENCES, Pair
from tests.support.literal import TOKEN
from tests.support.problems import (
    TRANSFORMS,
    Problem,
    linear_problem,
    logits_problem,
)
from tests.support.processes import run_ranks
from unilogit_kernels import VocabParallel, explain_plan, linear_unilogit_loss, reference
from unilogit_kernels.testing import assert_sum_within_budget, assert_within_budget

N, H = 12, 24
SPREADS = [
    (2, "uneven", torch.float32),
    (2, "label apart", torch.bfloat16),
    (2, "padding", torch.float32),
    (4, "uneven", torch.bfloat16),
    (4, "empty", torch.float32),
]
EVERY = pytest.mark.parametrize(("size", "cut", "dtype"), SPREADS)


def together(results: Sequence[Result], whole: Sequence[int] = (0,)) -> Result:
    """What the ranks found as one process would have: each part of a gradient from its rank.

    The loss and the gradients `whole`, of hidden states first, are those of every rank, bitwise.
    """
    first = results[0]
    for other in results[1:]:
        assert torch.equal(other.loss, first.loss)
        assert other.sent == first.sent
    gradients = [x.gradients for x in results]
    if len(gradients[0]) == 1:
        return first._replace(gradients=[torch.cat([x[0] for x in gradients], 1)])
    for each in gradients[1:]:
        for i in whole:
            assert torch.equal(each[i], gradients[0][i])
    parts = [torch.cat(own) for own in zip(*gradients, strict=True)]
    for i in whole:
        parts[i] = first.gradients[i]
    return first._replace(gradients=parts)


def check(result: Result, problem: Problem | Pair) -> None:
    dtype = (problem.student if isinstance(problem, Pair) else problem.operands)[0].dtype
    exact_terms, exact_gradients = problem.plain(torch.float64)
    plain_terms, plain_gradients = problem.plain(dtype)
    if isinstance(problem, Pair):
        exact_terms, plain_terms = (x / len(x) for x in (exact_terms, plain_terms))
    assert_sum_within_budget(result.loss, exact_terms, plain_terms, "loss")
    what = "" if isinstance(problem, Pair) else f"{problem.objective}, {problem.options}"
    # Of a frozen head there is but the first.
    gradients = zip(result.gradients, exact_gradients, plain_gradients, strict=False)
    for i, each in enumerate(gradients):
        # A column's gradient is a sum of few rows, whose roundings may be all that is left of it.
        whole = i > 0 and dtype != torch.float32
        ours, exact, plain = (x.flatten() if whole else x for x in each)
        assert_within_budget(ours, exact, plain, what)


def state_bytes(rows: int, n: int) -> int:
    """What a rank sends of its states: where its columns are, and the rows of each token."""
    return 4 * (2 + rows * n)


@EVERY
@pytest.mark.parametrize("entry", ["logits", "linear"])
def test_objectives(size: int, cut: str, dtype: torch.dtype, entry: str) -> None:
    """Every objective and transform through one launch of the ranks."""
    problems: list[Problem | Pair] = []
    transforms = itertools.cycle(TRANSFORMS.values())
    for objective in TOKEN:
        options = {"vocab_size": VOCAB_SIZE} | next(transforms)
        options["vocab_size"] = max(options["vocab_size"], 800)
        if entry == "logits":
            problems.append(logits_problem(N, COLUMNS, dtype, objective, **options))
        else:
            problems.append(linear_problem(N, H, COLUMNS, dtype, objective, bias=True, **options))
        apart_from_others(problems[-1], dtype)
    found = run_ranks(of_problems, problems, CUTS[size][cut], ranks=size)
    for problem, results in zip(problems, zip(*found, strict=True), strict=True):
        check(together(results), problem)


@EVERY
def test_a_low_rank_term(size: int, cut: str, dtype: torch.dtype) -> None:
    """Every rank has A, and its own rows of B; A's gradient is that of the whole vocabulary."""
    problems: list[Problem | Pair] = [
        linear_problem(N, H, COLUMNS, dtype, objective, bias=True, rank=3, vocab_size=VOCAB_SIZE)
        for objective in ("unilogit", "cross_entropy")
    ]
    found = run_ranks(of_problems, problems, CUTS[size][cut], ranks=size)
    for problem, results in zip(problems, zip(*found, strict=True), strict=True):
        check(together(results, whole=(0, 3)), problem)


@EVERY
def test_frozen_heads(size: int, cut: str, dtype: torch.dtype) -> None:
    """Sums over each rank's own columns, to which the shares in the whole come last."""
    transforms = itertools.cycle(TRANSFORMS.values())
    problems: list[Problem] = []
    for objective in TOKEN:
        options = {"vocab_size": VOCAB_SIZE} | next(transforms)
        options["vocab_size"] = max(options["vocab_size"], 800)
        problem = linear_problem(N, H, COLUMNS, dtype, objective, bias=True, **options)
        apart_from_others(problem, dtype)
        problems.append(problem)
    found = run_ranks(of_frozen_problems, problems, CUTS[size][cut], ranks=size)
    for problem, results in zip(problems, zip(*found, strict=True), strict=True):
        for other in results[1:]:
            assert torch.equal(other.loss, results[0].loss)
            assert torch.equal(other.gradients[0], results[0].gradients[0])
        check(results[0], problem)
        assert [sent.what for sent in results[0].sent[-2:]] == ["gather", "sum"]


def apart_from_others(problem: Problem | Pair, dtype: torch.dtype) -> None:
    """Lift one token far above the others where a loss hangs on which is the largest.

    A rounded GEMM may otherwise move it.
    """
    if isinstance(problem, Problem) and problem.objective in ("pdu", "loku"):
        above = math.copysign(40.0, problem.options.get("logit_scale", 1.0))
        if problem.linear:
            problem.operands[2][7] = above
        else:
            problem.operands[0][:, 7] = above


def head_of(h: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    operands = torch.randn(N, h), 3 / h**0.5 * torch.randn(COLUMNS, h), torch.randn(COLUMNS)
    return tuple(x.to(dtype) for x in operands)


@EVERY
def test_divergences(size: int, cut: str, dtype: torch.dtype) -> None:
    pairs: list[Problem | Pair] = []
    for i, options in enumerate(DIVERGENCES.values()):
        labels = torch.randint(0, VOCAB_SIZE, (N,))
        more = {"vocab_size": VOCAB_SIZE, **options}
        if i % 2:
            students = (torch.randn(N, COLUMNS) * 3).to(dtype), (torch.randn(N, COLUMNS) * 3)
            pairs.append(Pair((students[0],), (students[1].to(dtype),), labels, more))
            continue
        heads = [head_of(h, dtype) for h in (H, 2 * H)]
        pairs.append(Pair(heads[0], heads[1], labels, more))
    found = run_ranks(of_problems, pairs, CUTS[size][cut], ranks=size)
    for pair, results in zip(pairs, zip(*found, strict=True), strict=True):
        result = together(results)
        check(result, pair)
        sums = [] if len(result.gradients) == 1 else [Sent("sum", 4 * N * H)]
        assert result.sent[-1 - len(sums) :] == [Sent("gather", state_bytes(7, N)), *sums]


@EVERY
@pytest.mark.parametrize("entry", ["logits", "linear"])
def test_functions(size: int, cut: str, dtype: torch.dtype, entry: str) -> None:
    """Log-odds, runner-up, statistics, sequences, mixtures: values and gradients."""
    labels = torch.randint(0, VOCAB_SIZE, (N,))
    if entry == "logits":
        operands: tuple[Tensor, ...] = ((3 * torch.randn(N, COLUMNS)).to(dtype),)
    else:
        operands = (
            torch.randn(N, H).to(dtype),
            (3 / H**0.5 * torch.randn(COLUMNS, H)).to(dtype),
        )
    found = run_ranks(of_functions, operands, labels, CUTS[size][cut], ranks=size)
    for name in FUNCTIONS:
        result = together([each[name] for each in found])
        exact, plain = (literally(name, operands, labels, d) for d in (torch.float64, dtype))
        whole = DIFFERENTIABLE.get(name)
        assert_within_budget(result.loss[:whole], exact[0][:whole], plain[0][:whole], name)
        for ours, wanted, by_torch in zip(result.gradients, exact[1], plain[1], strict=True):
            assert_within_budget(ours, wanted, by_torch, name)
        # One gather for the statistics, and one sum where hidden states have a gradient.
        kinds = ["gather"] if entry == "logits" else ["gather", "sum"]
        assert [sent.what for sent in result.sent[-len(kinds) :]] == kinds
        assert len(result.sent) <= len(kinds) + 1, "besides, the ranks ask for sizes once"


def literally(
    name: str, operands: tuple[Tensor, ...], labels: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    inputs = [x.detach().to(dtype).requires_grad_() for x in operands]
    logits = F.linear(*inputs) if len(inputs) > 1 else inputs[0]
    z = reference.transform_logits(
        logits.to(torch.promote_types(dtype, torch.float32)), vocab_size=VOCAB_SIZE
    )
    values = literal_function(name, z, labels)
    return values.detach(), gradients_of(name, values, inputs)


def counted(
    shape: tuple[int, int, int], trains: bool, reduction: str, sequence_parallel: bool
) -> list[Sent]:
    n, h, v = shape
    hidden, weight = torch.randn(n, h), torch.randn(v // 2, h)
    if sequence_parallel:
        mesh = init_device_mesh("cpu", (2,))
        hidden = distribute_tensor(hidden, mesh, [TokenShard(0)])
    with recorded() as sent:
        loss = linear_unilogit_loss(
            hidden.requires_grad_(),
            weight.requires_grad_(trains),
            torch.arange(n),
            reduction=reduction,
            vocab_parallel=VocabParallel(),
        )
        loss.sum().backward()
    return sent


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_explained_collectives_are_those_of_a_call(
    trains: bool, reduction: str, sequence_parallel: bool
) -> None:
    shape = (N, H, 1002)
    report = explain_plan(
        *shape,
        dtype=torch.float32,
        device="cpu",
        train_weight=trains,
        reduction=reduction,
        vocab_parallel=2,
        sequence_parallel=sequence_parallel,
    )
    sent = run_ranks(counted, shape, trains, reduction, sequence_parallel)[0]
    # Hidden states of all tokens come before anything that looks at them.
    sizes = sent.pop(1 if sequence_parallel else 0)
    assert sizes == Sent("gather", 3 * 8), "each rank's columns and rows, asked once"
    assert sent == [Sent(each.what, each.bytes) for each in report.collectives]
    assert {each.ranks for each in report.collectives} == {2}
    assert report.collectives[-1].what == ("scatter" if sequence_parallel else "sum")
    assert report.collectives[-1].received == (4 if sequence_parallel else 8) * N * H // 2
    if reduction == "mean":
        assert report.gemms == 2 + trains, "in units of this rank's columns"
    assert "12 tokens x 24 x 501" in str(report)


def test_a_frozen_shard_takes_two_gemms_on_gpus() -> None:
    report = explain_plan(8192, 4096, 128_256, train_weight=False, vocab_parallel=8)
    assert report.gemms == 2
    assert report.plan.order == "online"
