"""DTensors as operands: a sharded lm_head is known by itself, gradients keep their layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.distributed.vocabularies import recorded
from tests.support.divergence_pairs import Pair
from tests.support.problems import Problem
from tests.support.processes import run_ranks
from unilogit_kernels import (
    VocabParallel,
    kl_loss,
    linear_kl_loss,
    linear_unilogit_loss,
    unilogit_loss,
)
from unilogit_kernels.testing import assert_within_budget

B, T, H, V = 2, 5, 16, 101
COUNTED = B * T - 1
"""Tokens with a label that carries loss."""


def operands() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    labels = torch.randint(0, V, (B, T))
    labels[1, 2] = -100
    return hidden, weight, torch.randn(V), labels


def sharded_head(layout: str) -> dict[str, Any]:
    """Loss and gradients through a ColwiseParallel lm_head, with hidden states in a layout."""
    hidden, weight, bias, labels = operands()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    head = nn.Linear(H, V)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    parallelize_module(head, mesh, ColwiseParallel())
    assert isinstance(head.weight, DTensor)
    hidden.requires_grad_()
    given = hidden
    if layout != "plain":
        placement = {"replicated": Replicate(), "sequence": Shard(1), "batch": Shard(0)}[layout]
        given = distribute_tensor(hidden.detach(), mesh, [placement]).requires_grad_()
    with recorded() as sent:
        loss = linear_unilogit_loss(given, head.weight, labels, bias=head.bias)
        loss.backward()
    found = {"hidden": given.grad, "weight": head.weight.grad, "bias": head.bias.grad}
    for name, x in (("hidden", given), ("weight", head.weight), ("bias", head.bias)):
        gradient = found[name]
        assert type(gradient) is type(x.detach())
        if isinstance(x, DTensor):
            assert isinstance(gradient, DTensor)
            assert gradient.placements == x.placements
            found[name] = gradient.full_tensor()
    return {"loss": loss.detach(), "sent": sent, **found}


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [("plain", 2), ("replicated", 2), ("sequence", 2), ("sequence", 4), ("batch", 2)],
)
def test_a_colwise_head(layout: str, ranks: int) -> None:
    """Of 5 tokens, 4 ranks have 2, 2, 1 and none."""
    hidden, weight, bias, labels = operands()
    found = run_ranks(sharded_head, layout, ranks=ranks)
    # The parts' sizes, the states, and the gradient of hidden states.
    collectives = ["gather", "gather", "sum"]
    if layout in ("sequence", "batch"):
        collectives = ["gather", "gather", "gather", "scatter"]
    exact, plain = (of_one(hidden, weight, bias, labels, d) for d in (torch.float64, torch.float32))
    for each in found:
        assert [sent.what for sent in each["sent"]] == collectives
        assert each["sent"][-1].bytes == COUNTED * H * 4
        for name, value in exact.items():
            assert_within_budget(each[name], value, plain[name], name)


def of_one(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """One process by plain torch."""
    operands = tuple(x.to(dtype) for x in (hidden.reshape(-1, H), weight, bias))
    terms, gradients = Problem(operands, labels.reshape(-1)).plain(dtype)
    named = dict(zip(("hidden", "weight", "bias"), gradients, strict=True))
    named["hidden"] = named["hidden"].reshape(hidden.shape)
    return {"loss": terms.sum(), **named}


def sharded_logits() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias, labels = operands()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    z = nn.functional.linear(hidden, weight, bias)
    logits = distribute_tensor(z, mesh, [Shard(2)]).requires_grad_()
    loss = unilogit_loss(logits, labels, vocab_size=V - 2)
    loss.backward()
    assert isinstance(logits.grad, DTensor)
    assert logits.grad.placements == (Shard(2),)
    teacher = distribute_tensor(z.flip(-1), mesh, [Shard(2)])
    return loss.detach(), logits.grad.full_tensor(), kl_loss(logits, teacher, labels).detach()


def test_sharded_logits() -> None:
    hidden, weight, bias, labels = operands()
    z = nn.functional.linear(hidden, weight, bias).reshape(-1, V)
    pair = Pair((z,), (z.flip(-1),), labels.reshape(-1))
    for loss, gradient, divergence in run_ranks(sharded_logits, ranks=4):
        exact, plain = (reference_of(z, labels, d) for d in (torch.float64, torch.float32))
        assert_within_budget(loss, exact[0], plain[0])
        assert_within_budget(gradient.reshape(-1, V), exact[1], plain[1])
        exact_kl, plain_kl = pair.plain(torch.float64)[0], pair.plain(torch.float32)[0]
        assert_within_budget(divergence, exact_kl.sum() / COUNTED, plain_kl.sum() / COUNTED)


def reference_of(z: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    options = {"vocab_size": V - 2}
    terms, (gradient,) = Problem((z.to(dtype),), labels.reshape(-1), options=options).plain(dtype)
    return terms.sum(), gradient


def two_heads(teacher_is: str) -> Tensor:
    hidden, weight, _, labels = operands()
    mesh = init_device_mesh("cpu", (2,))
    student = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    teacher = weight.flip(0)
    if teacher_is != "plain":
        placement = {"sharded": Shard(0), "replicated": Replicate()}[teacher_is]
        teacher = distribute_tensor(teacher, mesh, [placement])
    loss = linear_kl_loss(hidden, student, hidden, teacher, labels)
    loss.backward()
    assert isinstance(student.grad, DTensor)
    return loss.detach()


@pytest.mark.parametrize("teacher_is", ["sharded", "replicated", "plain"])
def test_a_teacher_beside_a_sharded_head(teacher_is: str) -> None:
    """Which each rank may have whole: it takes the rows that it has of the student."""
    hidden, weight, _, labels = operands()
    flat = hidden.reshape(-1, H)
    pair = Pair((flat, weight), (flat, weight.flip(0)), labels.reshape(-1))
    exact, plain = pair.plain(torch.float64)[0], pair.plain(torch.float32)[0]
    for loss in run_ranks(two_heads, teacher_is):
        assert_within_budget(loss, exact.sum() / COUNTED, plain.sum() / COUNTED)


def refused() -> list[str]:
    """Layouts that the losses do not run on."""
    hidden, weight, bias, labels = operands()
    mesh = init_device_mesh("cpu", (2,))
    square = init_device_mesh("cpu", (1, 2))
    by_rows = distribute_tensor(weight, mesh, [Shard(0)])
    wrong: list[dict[str, Any]] = [
        {"weight": distribute_tensor(weight, mesh, [Shard(1)])},
        {"weight": distribute_tensor(weight, square, [Replicate(), Shard(0)])},
        {"weight": by_rows, "bias": bias},
        {"weight": weight, "bias": distribute_tensor(bias, mesh, [Shard(0)])},
        {"weight": by_rows, "hidden": distribute_tensor(hidden, mesh, [Shard(2)])},
        {"weight": by_rows, "vocab_parallel": VocabParallel(first_column=3)},
    ]
    found = []
    for each in wrong:
        try:
            linear_unilogit_loss(**{"hidden": hidden, "labels": labels} | each)
        except ValueError as error:
            found.append(str(error))
    return found


def test_other_layouts_are_refused_by_name() -> None:
    found = run_ranks(refused)[0]
    begins = [
        "weight is a DTensor of placements (Shard(dim=1),)",
        "weight is a DTensor of placements (Replicate(), Shard(dim=0))",
        "bias is a plain tensor and weight a DTensor",
        "bias is a DTensor and weight is none",
        "hidden is a DTensor of placements (Shard(dim=2),)",
        "vocab_parallel is",
    ]
    assert len(found) == len(begins)
    for text, begin in zip(found, begins, strict=True):
        assert text.startswith(begin)
    assert "Shard(0)" in found[0]


def _wrong_label() -> str:
    hidden, weight, _, labels = operands()
    shard = distribute_tensor(weight, init_device_mesh("cpu", (2,)), [Shard(0)])
    linear_unilogit_loss(hidden, shard, labels)  # the ranks know each other's sizes
    if dist.get_rank() == 1:
        labels = labels.clone()
        labels[0, 0] = V
    with pytest.raises(IndexError) as caught:
        linear_unilogit_loss(hidden, shard, labels)
    assert linear_unilogit_loss(hidden, shard, labels.clamp(max=V - 1)).isfinite()
    return str(caught.value)


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    found = run_ranks(_wrong_label)
    assert found[0] == found[1]
    assert str(V) in found[0]
