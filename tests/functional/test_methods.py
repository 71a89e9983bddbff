"""Every method against its paper's formula in float64, on every backend, through both entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support import literal
from unilogit_kernels import (
    linear_mixed_loss,
    linear_objective_loss,
    linear_sequence_log_probs,
    mixed_loss,
    objective_loss,
    objectives,
    sequence_log_probs,
)
from unilogit_kernels.objectives import TNPO, Objective
from unilogit_kernels.testing import (
    AllocationGuard,
    assert_sum_within_budget,
    assert_within_budget,
)

B, T, V, H = 4, 7, 301, 24
Compute = Callable[[Tensor], Tensor]
"""From logits `[B, T, V]` to a loss, or to the terms of which a scalar loss is the sum."""


def labels_of_sequences() -> Tensor:
    """Answers of unequal length; ignored positions at both ends and one within."""
    labels = torch.randint(0, V, (B, T))
    labels[:, :2] = -100
    labels[1, -2:] = -100
    labels[2, 4] = -100
    return labels


class Inputs:
    """Logits, or hidden states and an lm_head, in one dtype; `known` tokens have a likely label."""

    def __init__(self, linear: bool, dtype: torch.dtype, known: Tensor | None = None) -> None:
        likely = torch.zeros(B, T, V) if known is None else F.one_hot(known.clamp(min=0), V).float()
        if linear:
            weight = 3 / H**0.5 * torch.randn(V, H)
            operands = [torch.randn(B, T, H) + likely @ weight, weight]
        else:
            operands = [3 * torch.randn(B, T, V) + 9 * likely]
        self.linear = linear
        self.operands = [x.to(dtype) for x in operands]

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [x.detach().to(dtype or x.dtype).requires_grad_() for x in self.operands]

    def plain(self, compute: Compute, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        """A loss of logits by plain torch, and the gradients."""
        leaves = self.leaves(dtype)
        logits = F.linear(*leaves) if self.linear else leaves[0]
        loss = compute(logits.to(torch.promote_types(dtype, torch.float32)))
        return loss, torch.autograd.grad(loss.sum(), leaves)

    def check(
        self,
        ours: Tensor,
        leaves: list[Tensor],
        compute: Compute,
        scale: float = 1.0,
        independent: int | None = None,
    ) -> None:
        """Loss and gradients within the error budget of the literal `compute`.

        `independent` is the number of slopes, where those of sequences are few.
        """
        exact, exact_gradients = self.plain(compute, torch.float64)
        plain, plain_gradients = self.plain(compute, self.operands[0].dtype)
        if ours.dim():
            assert_within_budget(ours, exact, plain, "loss", smallest_scale=scale)
        else:
            terms = exact.flatten(), plain.flatten()
            assert_sum_within_budget(ours, *terms, "loss", smallest_scale=scale)
        gradients = torch.autograd.grad(ours.sum(), leaves)
        for got, right, other in zip(gradients, exact_gradients, plain_gradients, strict=True):
            assert got.dtype == other.dtype
            assert_within_budget(
                got.flatten(),
                right.flatten(),
                other.flatten(),
                "gradient",
                independent=independent,
            )


@pytest.fixture(params=["logits", "linear"])
def inputs(request: pytest.FixtureRequest, dtype: torch.dtype) -> Inputs:
    return Inputs(request.param == "linear", dtype)


def ours(
    inputs: Inputs, labels: Tensor, objective: str | Objective, backend: str, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    leaves = inputs.leaves()
    return call(inputs, *leaves, labels, objective, backend=backend, **options), leaves


def call(inputs: Inputs, *arguments: Any, **options: Any) -> Tensor:
    """The objective's loss through the entry of the inputs."""
    function: Any = linear_objective_loss if inputs.linear else objective_loss
    result: Tensor = function(*arguments, **options)
    return result


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(literal.TOKEN))
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
def test_tokens(linear: bool, dtype: torch.dtype, backend: str, name: str, reduction: str) -> None:
    labels = labels_of_sequences()
    inputs, valid = Inputs(linear, dtype, known=labels), labels != -100

    def compute(logits: Tensor) -> Tensor:
        losses = literal.TOKEN[name](logits[valid], labels[valid])
        if reduction == "mean":
            return losses / len(losses)
        return torch.zeros(B, T, dtype=losses.dtype).masked_scatter(valid, losses)

    loss, leaves = ours(inputs, labels, name, backend, reduction=reduction)
    inputs.check(loss, leaves, compute)


# ---- tokens with a reference ---------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tnpo(inputs: Inputs, backend: str, alpha: float, reduction: str) -> None:
    labels, start = labels_of_sequences(), -8 * torch.rand(B, T)
    valid = labels != -100
    objective = TNPO(reference=start, beta=0.5, alpha=alpha)

    def compute(logits: Tensor) -> Tensor:
        losses = literal.tnpo(start[valid], 0.5, alpha)(logits[valid], labels[valid])
        if reduction == "mean":
            return losses / len(losses)
        return torch.zeros(B, T, dtype=losses.dtype).masked_scatter(valid, losses)

    loss, leaves = ours(inputs, labels, objective, backend, reduction=reduction)
    inputs.check(loss, leaves, compute)


# ---- sequences -----------------------------------------------------------------------------------


def sequence_case(name: str) -> tuple[Objective, Callable[[Tensor, Tensor], Tensor]]:
    """An objective, and its paper's losses from logits and labels."""
    start = -30 * torch.rand(B)

    def ratios(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (literal.sequence_log_p(z, y) - start.to(z.dtype)).chunk(2)

    def probabilities(z: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        counted = y != -100
        p = torch.softmax(z, -1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
        return (torch.where(counted, p, 0.0).sum(-1) / counted.sum(-1)).chunk(2)

    if name == "npo":
        return objectives.NPO(reference=start), lambda z, y: literal.npo(
            literal.sequence_log_p(z, y), start.to(z.dtype)
        )
    if name == "simnpo":
        return objectives.SimNPO(beta=2.5, delta=0.4), lambda z, y: literal.simnpo(
            literal.sequence_log_p(z, y), (y != -100).sum(-1), 2.5, 2.5 * 0.4
        )
    if name == "dpo":
        return objectives.DPO(reference=start, beta=0.2), lambda z, y: literal.dpo(
            ratios(z, y), 0.2
        )
    if name == "idk_dpo":
        return objectives.IdkDPO(
            reference=start
        ), lambda z, y: 2 / 0.1 * literal.dpo(ratios(z, y), 0.1)
    return objectives.by_name(name), lambda z, y: literal.flat(name, *probabilities(z, y))


SEQUENCE_METHODS = ["npo", "simnpo", "dpo", "idk_dpo", "flat", "flat_kl", "flat_js", "flat_pearson"]


PAIRED = {"dpo", "idk_dpo", "flat", "flat_kl", "flat_js", "flat_pearson"}
"""Methods with a loss for each pair of sequences."""


def test_every_sequence_method_is_here() -> None:
    assert {
        name
        for name, cls in objectives.REGISTRY.items()
        if issubclass(cls, objectives.SequenceObjective)
    } == set(SEQUENCE_METHODS)


@pytest.mark.parametrize("name", SEQUENCE_METHODS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sequence_losses(inputs: Inputs, backend: str, name: str, reduction: str) -> None:
    labels = labels_of_sequences()
    objective, losses = sequence_case(name)
    loss, leaves = ours(inputs, labels, objective, backend, reduction=reduction)

    def compute(logits: Tensor) -> Tensor:
        each = losses(logits, labels)
        return each / len(each) if reduction == "mean" else each

    slopes = B // 2 if name in PAIRED else B
    inputs.check(loss, leaves, compute, independent=slopes)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_operand_of_a_sequence_loss(backend: str, frozen: str) -> None:
    """A frozen lm_head must not be cut by tokens: their slopes take the statistics of all."""
    inputs, labels = Inputs(linear=True, dtype=torch.float32), labels_of_sequences()
    objective, losses = sequence_case("npo")
    leaves = inputs.leaves()
    trained = leaves[0] if frozen == "weight" else leaves[1]
    leaves[1 if frozen == "weight" else 0].requires_grad_(False)
    loss = call(inputs, *leaves, labels, objective, backend=backend)
    (gradient,) = torch.autograd.grad(loss, trained)
    index = 0 if frozen == "weight" else 1
    exact = inputs.plain(lambda z: losses(z, labels).mean(), torch.float64)[1][index]
    plain = inputs.plain(lambda z: losses(z, labels).mean(), torch.float32)[1][index]
    assert_within_budget(gradient.flatten(), exact.flatten(), plain.flatten(), independent=B)


@pytest.mark.parametrize("average", [False, True])
def test_sequence_log_probs(inputs: Inputs, backend: str, average: bool) -> None:
    labels, leaves = labels_of_sequences(), inputs.leaves()
    labels[3] = -100
    function: Any = linear_sequence_log_probs if inputs.linear else sequence_log_probs
    sums = function(*leaves, labels, average=average, backend=backend)
    assert sums.shape == (B,)
    assert sums[3] == 0

    def compute(logits: Tensor) -> Tensor:
        total = literal.sequence_log_p(logits, labels)
        return total / (labels != -100).sum(-1).clamp(min=1) if average else total

    inputs.check(sums, leaves, compute)


def test_sequences_without_a_token_do_not_count(backend: str) -> None:
    logits, labels = torch.randn(B, T, V, requires_grad=True), labels_of_sequences()
    labels[3] = -100
    objective, losses = sequence_case("npo")
    loss = objective_loss(logits, labels, objective, backend=backend)
    exact, plain = (losses(z, labels)[:3] / 3 for z in (logits.double(), logits))
    assert_sum_within_budget(loss, exact, plain)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[3] == 0).all()
    none = objective_loss(logits, labels, objective, reduction="none", backend=backend)
    assert none[3] == 0
    nothing = objective_loss(
        logits, torch.full_like(labels, -100), objective, reduction="mean", backend=backend
    )
    assert nothing == 0
    assert (torch.autograd.grad(nothing, logits)[0] == 0).all()


def test_sequences_over_steps_of_accumulation(backend: str) -> None:
    logits, labels = torch.randn(B, T, V), labels_of_sequences()
    start = torch.randn(B) - 20
    whole = objective_loss(logits, labels, objectives.NPO(reference=start), backend=backend)
    halves = [
        objective_loss(
            logits[rows],
            labels[rows],
            objectives.NPO(reference=start[rows]),
            num_items_in_batch=B,
            backend=backend,
        )
        for rows in (slice(0, 1), slice(1, None))
    ]
    exact, plain = (
        literal.npo(literal.sequence_log_p(z, labels), start.to(z.dtype)) / B
        for z in (logits.double(), logits)
    )
    for loss in (whole, torch.stack(halves).sum()):
        assert_sum_within_budget(loss, exact, plain)


def test_sequence_losses_go_twice_on_eager() -> None:
    logits = torch.randn(2, 3, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    start = torch.tensor([-5.0, -7.0])

    def loss(z: Tensor) -> Tensor:
        return objective_loss(z, labels, objectives.NPO(reference=start, beta=0.7), backend="eager")

    assert torch.autograd.gradgradcheck(loss, (logits,))


def test_sequence_losses_hold_no_logits(backend: str) -> None:
    n, v = 96, 4000
    hidden, weight = torch.randn(4, n // 4, 16), torch.randn(v, 16, requires_grad=True)
    labels = torch.randint(0, v, (4, n // 4))
    with AllocationGuard(forbidden_elements=n * v):
        loss = linear_objective_loss(hidden, weight, labels, "simnpo", backend=backend)
        loss.backward()


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (objectives.NPO(reference=torch.zeros(3)), {}, r"reference must hold one number .* \[4\]"),
        ("simnpo", {"token_weights": torch.ones(B, T)}, "takes no token_weights"),
        (TNPO(reference=torch.zeros(B)), {}, "must have the labels' shape"),
        ("npo", {}, "objective 'npo' needs tensors"),
    ],
)
def test_sequence_calls_that_do_not_fit(
    objective: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        objective_loss(torch.randn(B, T, V), labels_of_sequences(), objective, **options)


def test_an_odd_number_of_pairs() -> None:
    with pytest.raises(ValueError, match="2 equally large parts of the batch, got 3 sequences"):
        objective_loss(torch.randn(3, T, V), labels_of_sequences()[:3], "flat")


# ---- mixed batches -------------------------------------------------------------------------------


def mixed(
    inputs: Inputs, labels: Tensor, parts: Any, segments: Tensor, backend: str, **options: Any
) -> tuple[Any, list[Tensor]]:
    leaves = inputs.leaves()
    function: Any = linear_mixed_loss if inputs.linear else mixed_loss
    return function(*leaves, labels, parts, segments, backend=backend, **options), leaves


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mixed_tokens(inputs: Inputs, backend: str, reduction: str) -> None:
    """Segments that interleave, with weights per token and per part."""
    labels, segments = labels_of_sequences(), torch.randint(0, 3, (B, T))
    names, weights = ["unilogit", "cross_entropy", "wga"], [0.3, 1.0, -2.0]
    token_weights = torch.rand(B, T) + 0.5

    def parts_of(logits: Tensor) -> Tensor:
        parts = []
        for k, name in enumerate(names):
            mine = (segments == k) & (labels != -100)
            losses = literal.TOKEN[name](logits[mine], labels[mine])
            losses = losses * token_weights[mine].to(losses.dtype)
            parts.append(losses.sum() / (mine.sum() if reduction == "mean" else 1))
        return torch.stack(parts)

    result, leaves = mixed(
        inputs,
        labels,
        names,
        segments,
        backend,
        weights=weights,
        reduction=reduction,
        token_weights=token_weights,
    )
    scale = 1.0 if reduction == "mean" else float(B * T)
    inputs.check(
        result.loss,
        leaves,
        lambda z: parts_of(z) * z.new_tensor(weights),
        scale=scale,
    )
    exact, plain = (inputs.plain(parts_of, d)[0] for d in (torch.float64, inputs.operands[0].dtype))
    assert_within_budget(result.parts, exact, plain, "parts", smallest_scale=scale)


def test_mixed_sequences_and_tokens(inputs: Inputs, backend: str) -> None:
    """Forget rows by NPO, retain rows by cross-entropy: what a trainer does."""
    labels, start = labels_of_sequences(), -30 * torch.rand(B)
    segments = torch.tensor([0, 0, 1, 1])[:, None].expand(B, T)

    def compute(logits: Tensor) -> Tensor:
        npo = literal.npo(literal.sequence_log_p(logits, labels), start.to(logits.dtype))[:2]
        mine = (segments == 1) & (labels != -100)
        retain = F.cross_entropy(logits[mine], labels[mine], reduction="none")
        return torch.cat((0.1 * npo, retain / len(retain)))

    parts = [objectives.NPO(reference=start), "cross_entropy"]
    result, leaves = mixed(inputs, labels, parts, segments, backend, weights=[0.2, 1.0])
    inputs.check(result.loss, leaves, compute, independent=B)


def test_mixed_equals_one_call_each(inputs: Inputs, backend: str) -> None:
    labels = labels_of_sequences()
    segments = torch.tensor([0, 0, 1, 1])[:, None].expand(B, T)
    items = [9, 14]
    result, leaves = mixed(
        inputs,
        labels,
        ["unilogit", "cross_entropy"],
        segments,
        backend,
        num_items_in_batch=torch.tensor(items),
    )

    def parts_of(logits: Tensor) -> Tensor:
        mine = [(segments == k) & (labels != -100) for k in range(2)]
        return torch.stack(
            [
                literal.TOKEN[name](logits[mine[k]], labels[mine[k]]).sum() / items[k]
                for k, name in enumerate(["unilogit", "cross_entropy"])
            ]
        )

    inputs.check(result.loss, leaves, parts_of)
    leaves = inputs.leaves()
    losses = [
        call(
            inputs,
            *leaves,
            torch.where(segments == k, labels, -100),
            name,
            num_items_in_batch=items[k],
            backend=backend,
        )
        for k, name in enumerate(["unilogit", "cross_entropy"])
    ]
    inputs.check(torch.stack(losses).sum(), leaves, parts_of)
    exact, plain = (inputs.plain(parts_of, d)[0] for d in (torch.float64, inputs.operands[0].dtype))
    for parts in (result.parts, torch.stack(losses)):
        assert_within_budget(parts, exact, plain, "parts", smallest_scale=1.0)


def test_a_part_of_weight_0_costs_nothing_and_spoils_nothing(backend: str) -> None:
    logits, labels = torch.randn(4, 50), torch.arange(4)
    logits[0] = torch.nan
    logits.requires_grad_()
    segments = torch.tensor([0, 1, 1, 1])
    result = mixed_loss(
        logits, labels, ["unilogit", "ceu"], segments, weights=[0.0, 1.0], backend=backend
    )
    assert result.loss.isfinite()
    assert result.parts[0] == 0
    (gradient,) = torch.autograd.grad(result.loss, logits)
    assert (gradient[0] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parts": "unilogit"}, ValueError, "parts must be a sequence of objectives"),
        ({"parts": [torch.sigmoid, "ceu"]}, TypeError, "name of a registered objective"),
        ({"segments": torch.zeros(3)}, TypeError, "segments must be an int64 or int32 tensor"),
        ({"segments": torch.zeros(3, dtype=torch.int64)}, ValueError, "segments must have the lab"),
        ({"weights": [1.0]}, ValueError, "weights must be 2 numbers, one per part, got 1"),
        ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum, got 'none'"),
        ({"num_items_in_batch": [1]}, ValueError, "num_items_in_batch must hold 2 numbers"),
    ],
)
def test_mixed_calls_that_do_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "parts": ["unilogit", "ceu"],
        "segments": torch.zeros(4, dtype=torch.int64),
        **change,
    }
    with pytest.raises(error, match=message):
        mixed_loss(torch.randn(4, 50), torch.arange(4), **arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens_at_all(shape: tuple[int, int], reduction: str) -> None:
    """Sequences of length 0, and no sequences: loss 0, attached to the graph."""
    labels = torch.zeros(shape, dtype=torch.int64)
    logits, weight = torch.zeros(*shape, 9, requires_grad=True), torch.randn(9, 4)
    hidden = torch.zeros(*shape, 4, requires_grad=True)
    npo = objectives.NPO(reference=torch.zeros(shape[0]))
    of_logits = objective_loss(logits, labels, npo, reduction=reduction)
    of_hidden = linear_objective_loss(hidden, weight, labels, npo, reduction=reduction)
    for loss, x in ((of_logits, logits), (of_hidden, hidden)):
        assert loss.shape == (shape[:1] if reduction == "none" else ())
        assert (loss == 0).all()
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.shape == x.shape
