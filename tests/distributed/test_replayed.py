"""GPU kernels on their part of a vocabulary: compiled, executed, on columns that begin anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ptxsim.triton_device import triton_device
from tests.backends.cuda import devices
from tests.backends.triton import small_problems as triton_problems
from tests.support.problems import Problem, linear_problem, logits_problem
from tests.support.replayed_ranks import on_shards
from unilogit_kernels import objectives
from unilogit_kernels.calls import dispatch, validation
from unilogit_kernels.calls.options import CallOptions
from unilogit_kernels.fused_linear.options import LinearOptions
from unilogit_kernels.ops.arguments import Logits
from unilogit_kernels.ops.heads import Head
from unilogit_kernels.rows.ranks import Shard
from unilogit_kernels.testing import (
    assert_sum_within_budget,
    assert_within_budget,
    force_backend,
)

V, CUT = 1203, [0, 513, 514, 514, 1203]
"""One shard is a single column, and one is empty."""


@contextmanager
def executed(backend: str) -> Iterator[None]:
    """Kernels of a backend, compiled for a GPU and executed."""
    if backend == "triton":
        with (
            triton_problems.small_problems("whole rows"),
            triton_device(90),
            force_backend(backend),
        ):
            yield
    elif backend == "cuda":
        with devices.small_problems("whole rows"), force_backend(backend):
            yield
    else:
        yield


def on_shard(problem: Problem, shard: Shard) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a shard, below the functions that ask for a process group."""
    own = slice(shard.first_column, shard.first_column + shard.columns)
    options = CallOptions(reduction="mean", **problem.options)
    if problem.linear:
        hidden, *others = problem.operands
        inputs = [hidden.clone(), *(x[own].clone() for x in others)]
        whole = validation.describe_linear(
            hidden, others[0], None, problem.labels, options, LinearOptions()
        )
    else:
        inputs = [problem.operands[0][:, own].clone()]
        whole = validation.describe_logits(problem.operands[0], problem.labels, options)
    inputs = [x.requires_grad_() for x in inputs]
    operands = Head(inputs[0], inputs[1], None, None, None) if problem.linear else Logits(inputs[0])
    loss = dispatch.objective_of(
        operands, whole._replace(shard=shard), objectives.by_name(problem.objective)
    )
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize(
    "backend",
    [
        "cpu",
        "triton",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(devices.NVCC is None, reason=devices.WITHOUT_NVCC)
        ),
    ],
)
@pytest.mark.parametrize("objective", ["unilogit", "loku", "max_entropy"])
@pytest.mark.parametrize("entry", ["logits", "linear"])
def test_kernels_on_shards(backend: str, objective: str, entry: str) -> None:
    dtype = torch.bfloat16 if entry == "logits" else torch.float32
    if entry == "logits":
        problem = logits_problem(5, V, dtype, objective, vocab_size=V - 3)
    else:
        problem = linear_problem(5, 8, V, dtype, objective)
    problem.labels[0], problem.labels[1] = 513, 513 + 1  # at the borders of shards
    with executed(backend):
        loss, gradients = on_shards(
            lambda shard: on_shard(problem, clipped(shard, problem)), CUT, linear=entry == "linear"
        )
    exact_terms, exact = problem.plain(torch.float64)
    plain_terms, plain = problem.plain(dtype)
    assert_sum_within_budget(loss, exact_terms, plain_terms)
    for ours, wanted, literal in zip(gradients, exact, plain, strict=True):
        # Of logits without the padding.
        real = ours.shape[-1]
        assert_within_budget(ours, wanted[..., :real], literal[..., :real])


def clipped(shard: Shard, problem: Problem) -> Shard:
    """A shard of real columns; what is beyond them is padding."""
    real = problem.options.get("vocab_size", V)
    return shard._replace(columns=min(shard.columns, max(0, real - shard.first_column)))
