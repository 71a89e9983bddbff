"""Losses of two models inside autograd's machinery: who gets a gradient, twice, compiled, cast."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.library import opcheck
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.support.divergence_pairs import DIVERGENCES, Pair, linear_pair, logits_pair
from tests.support.problems import assert_equal_steps
from unilogit_kernels import Shift, kl_loss, linear_kl_loss
from unilogit_kernels.testing import assert_tensors_within_budget


def test_one_head_for_both_models(backend: str) -> None:
    """A tied or frozen-and-shared lm_head: the teacher's use of it adds no gradient."""
    weight = torch.randn(90, 8, requires_grad=True)
    hidden, ref_hidden = (
        torch.randn(6, 8, requires_grad=True),
        torch.randn(6, 8, requires_grad=True),
    )
    loss = linear_kl_loss(hidden, weight, ref_hidden, weight, backend=backend)
    loss.backward()
    copy = weight.detach().clone().requires_grad_()
    apart = linear_kl_loss(hidden, copy, ref_hidden, weight.detach(), backend=backend)
    (expected,) = torch.autograd.grad(apart, copy)
    assert ref_hidden.grad is None
    assert weight.grad is not None
    assert torch.equal(weight.grad, expected)


def test_the_teacher_never_gets_a_gradient(backend: str) -> None:
    logits, ref_logits = (
        torch.randn(4, 50, requires_grad=True),
        torch.randn(4, 50, requires_grad=True),
    )
    kl_loss(logits, ref_logits, backend=backend).backward()
    assert ref_logits.grad is None
    assert logits.grad is not None
    assert not kl_loss(logits.detach(), ref_logits, backend=backend).requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_double_backward_in_float64(divergence: dict[str, Any]) -> None:
    for pair in (
        logits_pair(4, 6, torch.float64, **divergence),
        linear_pair(4, 2, 6, torch.float64, **divergence),
    ):
        inputs = tuple(x.requires_grad_() for x in pair.student)
        for reduction in ("mean", "none"):

            def loss(*x: Tensor, pair: Pair = pair, reduction: str = reduction) -> Tensor:
                return pair.loss(x, "eager", reduction=reduction)

            assert torch.autograd.gradcheck(loss, inputs)
            assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


def test_repeatable_and_backward_twice(backend: str) -> None:
    pair = linear_pair(40, 16, 500, torch.bfloat16, rewrite=Shift(1.0))
    first, second = pair.ours(backend), pair.ours(backend)
    assert torch.equal(first[0], second[0])
    assert all(map(torch.equal, first[1], second[1]))
    inputs = tuple(x.detach().requires_grad_() for x in pair.student)
    loss = pair.loss(inputs, backend)
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, once, again))


def test_inputs_are_never_written_to(backend: str) -> None:
    for pair in (logits_pair(9, 99, torch.float32), linear_pair(9, 24, 99, torch.float32)):
        operands = (*pair.student, *pair.teacher)
        before = [x.clone() for x in operands]
        pair.ours(backend)
        assert all(map(torch.equal, before, operands))


def test_double_backward_elsewhere_says_so(backend: str) -> None:
    if backend == "eager":
        pytest.skip("which supports it")
    for pair in (logits_pair(3, 9, torch.float32), linear_pair(3, 4, 9, torch.float32)):
        inputs = tuple(x.requires_grad_() for x in pair.student)
        loss = pair.loss(inputs, backend)
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        for gradient in gradients:
            with pytest.raises(RuntimeError, match="first derivatives only"):
                torch.autograd.grad(gradient.sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_graph_breaks(backend: str, reduction: str) -> None:
    torch._dynamo.reset()  # each backend compiles the same function again, and there is a limit
    for pair in (logits_pair(9, 99, torch.float32), linear_pair(9, 8, 99, torch.float32)):
        weighted = replace(pair, options={"reduction": reduction, "rewrite": Shift(2.0)})

        def step(*inputs: Tensor, pair: Pair = weighted) -> Tensor:
            return pair.loss(inputs, backend).sum()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        inputs = tuple(x.detach().requires_grad_() for x in pair.student)
        expected = torch.autograd.grad(step(*inputs), inputs)
        found = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_one_graph_serves_any_number_of_tokens(backend: str, linear: bool) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    heads = torch.randn(99, 8, requires_grad=True), torch.randn(99, 6)

    def loss(x: Tensor, ref_x: Tensor, labels: Tensor) -> Tensor:
        if linear:
            return linear_kl_loss(x, heads[0], ref_x, heads[1], labels, backend=backend)
        return kl_loss(x, ref_x, labels, backend=backend)

    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    sizes = (8, 6) if linear else (99, 99)
    graphs = []
    for n in (5, 9, 33):
        labels = torch.randint(0, 99, (n,))
        labels[1] = -100
        x, ref_x = torch.randn(n, sizes[0], requires_grad=True), torch.randn(n, sizes[1])
        trained = (x, heads[0]) if linear else (x,)
        values = [f(x, ref_x, labels) for f in (compiled, loss)]
        assert_equal_steps(values, trained)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[-1]
    torch._dynamo.reset()


def test_operators_are_registered_correctly(monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory for logits to keep is not all written, and two runs would differ there.
    monkeypatch.setattr("unilogit_kernels.fused_linear.compaction.saved_capacity", lambda *_: 0)
    logits, ref_logits = torch.randn(3, 9, requires_grad=True), torch.randn(3, 9)
    shard = (9, 0, 9, "", None)  # the whole vocabulary
    rewrite = ("forward", "shift", [2.0])
    pair = (torch.arange(3), -100, 1.0, 0.0, 1.0, 0.0, *shard, *rewrite, "eager")
    options = (None, None, 0.0, True)
    opcheck(torch.ops.unilogit_kernels.divergence, (logits, ref_logits, *pair))
    heads = (
        torch.randn(3, 4, requires_grad=True),
        torch.randn(9, 4, requires_grad=True),
        None,
        None,
        None,
    )
    teacher = (
        torch.randn(3, 5),
        torch.randn(9, 5),
        torch.randn(9),
        torch.randn(3, 2),
        torch.randn(9, 2),
    )
    opcheck(
        torch.ops.unilogit_kernels.linear_divergence,
        (*heads, *teacher, torch.tensor([True, False, True]), *pair, *options, True),
    )
    opcheck(
        torch.ops.unilogit_kernels.linear_divergence_loss,
        (
            *heads,
            *teacher,
            *pair,
            torch.rand(3),
            torch.ones(()),
            *options,
            True,
            True,
            *(False,) * 3,
        ),
    )


def test_autocast(backend: str) -> None:
    """Each operand's gradient returns in its own dtype; the teacher is cast like the student."""
    hidden = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    ref_hidden, ref_weight = torch.randn(6, 8), torch.randn(50, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_kl_loss(hidden, weight, ref_hidden, ref_weight, backend=backend)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.float32)
    with pytest.raises(TypeError, match="ref_weight must have ref_hidden's dtype"):
        linear_kl_loss(hidden, weight.bfloat16(), ref_hidden, ref_weight, backend=backend)


# ---- two processes -------------------------------------------------------------------------------

N, H, V = 12, 16, 300


class Student(nn.Module):
    """A body and an lm_head whose loss runs inside `forward`, against operands of a teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.lm_head = nn.Linear(H, H), nn.Linear(H, V)

    def forward(self, x: Tensor, teacher: Student, labels: Tensor) -> Tensor:
        with torch.no_grad():
            ref_hidden = torch.tanh(teacher.body(x))
        return linear_kl_loss(
            torch.tanh(self.body(x)),
            self.lm_head.weight,
            ref_hidden,
            teacher.lm_head.weight,
            labels,
            bias=self.lm_head.bias,
            ref_bias=teacher.lm_head.bias,
            rewrite=Shift(3.0),
            num_items_in_batch=N,
        )


def _models() -> tuple[Student, Student]:
    torch.manual_seed(0)
    return Student(), Student().requires_grad_(False)


def _batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(N, H, generator=generator)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[rank::3] = -100
    return x, labels


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _worker(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    student, teacher = _models()
    before = [value.clone() for value in teacher.state_dict().values()]
    model = DistributedDataParallel(student)
    x, labels = _batch(rank)
    model(x, teacher, labels).backward()
    # DDP averages over the ranks, and so does one process over both batches.
    gradients = [_gradients(student)]
    for dtype in (torch.float64, torch.float32):
        alone, its_teacher = (each.to(dtype) for each in _models())
        batches = [(x.to(dtype), labels) for x, labels in map(_batch, range(2))]
        torch.stack([alone(x, its_teacher, labels) for x, labels in batches]).mean().backward()
        gradients.append(_gradients(alone))
    assert all(bool(gradient.any()) for gradient in gradients[1].values())
    assert_tensors_within_budget(*gradients)
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(map(torch.equal, before, teacher.state_dict().values()))
    dist.barrier()
    # Nothing is torn down: torch 2.13 may wait for ever there, when DDP's reducer, holding the
    # interpreter's lock, joins gloo's thread, which waits for that lock.
    os._exit(0)


def test_two_processes(tmp_path: Path) -> None:
    """Each with the same frozen teacher: DDP's gradients are those of one process on both batches.

    An assertion in a worker ends the test, since `spawn` raises what it raised.
    """
    spawn(_worker, args=(str(tmp_path / "rendezvous"),), nprocs=2, join=True)
