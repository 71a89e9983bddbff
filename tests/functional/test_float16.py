"""float16 rows, whose numbers span twelve decades: right as long as the result is (CASES 36)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from unilogit_kernels import linear_objective_loss, mixed_loss, objective_loss, objectives
from unilogit_kernels.fused_linear.gemm import GemmDtypes
from unilogit_kernels.objectives import Objective
from unilogit_kernels.testing import assert_within_budget

V = 40


class _Steep(Objective):
    """A loss whose slope alone exceeds the largest float16."""

    name = "steep"

    def value(self, log_odds: Tensor, vocab_size: int) -> Tensor:
        return 1e6 * softplus(-log_odds)


def _mixed(logits: Tensor, labels: Tensor, backend: str | None) -> Tensor:
    segments = torch.ones_like(labels)
    segments[0] = 0
    parts = ["cross_entropy", "unilogit_forward"]
    return mixed_loss(logits, labels, parts, segments, weights=[10.0, 1.0], backend=backend).loss


def _weighted(logits: Tensor, labels: Tensor, backend: str | None) -> Tensor:
    weights = torch.full(labels.shape, 1e6)
    weights[::2] = -2e5
    return objective_loss(
        logits,
        labels,
        "cross_entropy",
        token_weights=weights,
        num_items_in_batch=3_000_000,
        backend=backend,
    )


def _small_weights(logits: Tensor, labels: Tensor, backend: str | None) -> Tensor:
    weights = torch.full(labels.shape, 1e-7)
    return 1e7 * objective_loss(
        logits, labels, "cross_entropy", token_weights=weights, reduction="sum", backend=backend
    )


def _steep(logits: Tensor, labels: Tensor, backend: str | None) -> Tensor:
    return objective_loss(logits, labels, _Steep(), backend=backend) / 1e4


CALLS: dict[str, tuple[int, Callable[[Tensor, Tensor, str | None], Tensor]]] = {
    "mixed": (7001, _mixed),
    "weighted": (9, _weighted),
    "small weights": (9, _small_weights),
    "steep": (9, _steep),
}


@pytest.mark.parametrize("call", CALLS)
def test_logits(backend: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(objectives.REGISTRY, "steep", _Steep)
    n, loss = CALLS[call]
    logits, labels = torch.randn(n, V).half(), torch.randint(0, V, (n,))

    def gradient(dtype: torch.dtype, backend: str | None, *, whole: bool = False) -> Tensor:
        x = logits.to(dtype).requires_grad_()
        # Plain torch: a float32 loss of the logits, whose gradient is rounded once.
        value = loss(x.float() if whole else x, labels, backend)
        return torch.autograd.grad(value, x)[0]

    found, plain = gradient(torch.float16, backend), gradient(torch.float16, "eager", whole=True)
    exact = gradient(torch.float64, None)
    assert found.isfinite().all()
    assert_within_budget(
        found, exact, plain, smallest_scale=torch.finfo(torch.float16).smallest_normal
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_gemms_of_float16_rows(
    reduction: str, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of a GPU: gradient rows are operands in float16, whatever a weight's size is."""
    dtypes = GemmDtypes(torch.float16, torch.float32, torch.float32, wider=False)
    monkeypatch.setattr(GemmDtypes, "of", lambda *_: dtypes)
    hidden, weight = torch.randn(9, 8), torch.randn(V, 8)
    labels, weights = torch.randint(0, V, (9,)), size * (torch.rand(9) + 0.5)

    def gradients(dtype: torch.dtype) -> tuple[Tensor, ...]:
        operands = [x.half().to(dtype).requires_grad_() for x in (hidden, weight)]
        losses = linear_objective_loss(
            *(operands[0], operands[1], labels, "cross_entropy"),
            token_weights=weights,
            reduction=reduction,
            backend="eager",
        )
        return torch.autograd.grad(losses.sum() / size, operands)

    found = gradients(torch.float16)
    monkeypatch.undo()
    for ours, exact in zip(found, gradients(torch.float64), strict=True):
        # float16 operands and products on a CPU: some roundings of the largest entry.
        assert (ours.double() - exact).abs().max() <= 8 * torch.finfo(
            torch.float16
        ).eps * exact.abs().max()


def test_infinite_only_where_the_gradient_is(backend: str) -> None:
    logits = torch.zeros(2, V).half().requires_grad_()
    loss = objective_loss(logits, torch.tensor([0, 1]), "cross_entropy", backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(2.0 * 60000.0))
    assert gradient[0, 0] == -torch.tensor(60000.0 * (1 - 1 / V)).half()
    (gradient,) = torch.autograd.grad(
        objective_loss(logits, torch.tensor([0, 1]), "cross_entropy", backend=backend),
        logits,
        torch.tensor(3.0 * 60000.0),
    )
    assert gradient[0, 0] == -torch.inf
    assert gradient[0, 1:].diff().eq(0).all()
