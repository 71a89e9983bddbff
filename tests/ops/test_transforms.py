"""Forward-mode AD, torch.func, and tracing without Dynamo: right, or a clear error (CASES 38)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from unilogit_kernels import (
    LowRank,
    kl_loss,
    linear_kl_loss,
    linear_mixed_loss,
    linear_objective_loss,
    objective_loss,
    objectives,
    target_and_runner_up,
)

Scalar = Callable[[Tensor], Tensor]
N, H, V = 6, 8, 50


def _kl(logits: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(
        logits.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def _pairs(backend: str) -> dict[str, tuple[Scalar, Scalar, Tensor]]:
    """A loss of one operand, the same by plain torch, and the operand."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, -100, 3, 4, 49])
    x, h, w, b = torch.randn(N, V), torch.randn(N, H), torch.randn(V, H), torch.randn(V)
    teacher, ref_h, ref_w = torch.randn(N, V), torch.randn(N, 4), torch.randn(V, 4)
    a, up, other = torch.randn(3, H) / 3, torch.randn(V, 3) / 3, torch.randn(V, 3)
    segments = torch.arange(N) % 2
    ce = "cross_entropy"

    def mixed(q: Tensor) -> Tensor:
        parts = [ce, "gradient_ascent"]
        return linear_mixed_loss(q, w, labels, parts, segments, backend=backend).loss

    def plain_mixed(q: Tensor) -> Tensor:
        of = [torch.where(segments == k, labels, -100) for k in range(2)]
        return F.cross_entropy(q @ w.T, of[0]) - F.cross_entropy(q @ w.T, of[1])

    def sequences(q: Tensor) -> Tensor:
        q, y = q.reshape(2, 3, V), labels.reshape(2, 3)
        return objective_loss(q, y, objectives.SimNPO(), backend=backend)

    def plain_sequences(q: Tensor) -> Tensor:
        log_p = -F.cross_entropy(q, labels, reduction="none").reshape(2, 3)
        mean = log_p.sum(1) / (labels.reshape(2, 3) >= 0).sum(1)
        return (-2 * F.logsigmoid(-mean)).mean()

    return {
        "logits": (
            lambda q: objective_loss(q, labels, ce, backend=backend),
            lambda q: F.cross_entropy(q, labels),
            x,
        ),
        "logits, none": (
            lambda q: objective_loss(q, labels, ce, reduction="none", backend=backend).sum(),
            lambda q: F.cross_entropy(q, labels, reduction="sum"),
            x,
        ),
        "runner-up": (
            lambda q: target_and_runner_up(q, labels, backend=backend).runner_up_log_prob.sum(),
            lambda q: (
                q.log_softmax(-1).scatter(1, labels.clamp(0)[:, None], -99).amax(1) * (labels >= 0)
            ).sum(),
            x,
        ),
        "sequences": (sequences, plain_sequences, x),
        "hidden": (
            lambda q: linear_objective_loss(q, w, labels, ce, bias=b, backend=backend),
            lambda q: F.cross_entropy(F.linear(q, w, b), labels),
            h,
        ),
        "weight": (
            lambda q: linear_objective_loss(h, q, labels, ce, bias=b, backend=backend),
            lambda q: F.cross_entropy(F.linear(h, q, b), labels),
            w,
        ),
        "bias": (
            lambda q: linear_objective_loss(h, w, labels, ce, bias=q, backend=backend),
            lambda q: F.cross_entropy(F.linear(h, w, q), labels),
            b,
        ),
        "low rank: a": (
            lambda q: linear_objective_loss(
                h, w, labels, ce, adapter=LowRank(q, up), backend=backend
            ),
            lambda q: F.cross_entropy(h @ w.T + (h @ q.T) @ up.T, labels),
            a,
        ),
        "low rank: b": (
            lambda q: linear_objective_loss(
                h, w, labels, ce, adapter=LowRank(a, q), backend=backend
            ),
            lambda q: F.cross_entropy(h @ w.T + (h @ a.T) @ q.T, labels),
            up,
        ),
        "low rank: hidden": (
            lambda q: linear_objective_loss(
                q, w, labels, ce, adapter=LowRank(a, up), backend=backend
            ),
            lambda q: F.cross_entropy(q @ w.T + (q @ a.T) @ up.T, labels),
            h,
        ),
        "low rank: pair of heads": (
            lambda q: linear_kl_loss(
                h,
                w,
                ref_h,
                ref_w,
                adapter=LowRank(a, q),
                ref_adapter=LowRank(a[:, :4], other, 2.0),
                backend=backend,
            ),
            lambda q: _kl(
                h @ w.T + (h @ a.T) @ q.T, ref_h @ ref_w.T + 2 * (ref_h @ a[:, :4].T) @ other.T
            ),
            up,
        ),
        "mixed": (mixed, plain_mixed, h),
        "pair of logits": (
            lambda q: kl_loss(q, teacher, backend=backend),
            lambda q: _kl(q, teacher),
            x,
        ),
        "pair of heads": (
            lambda q: linear_kl_loss(h, q, ref_h, ref_w, backend=backend),
            lambda q: _kl(h @ q.T, ref_h @ ref_w.T),
            w,
        ),
    }


ENTRIES = list(_pairs("eager"))
BACKENDS = ["eager", "cpu"]


def _close(ours: Tensor, plain: Tensor) -> bool:
    """Within a few roundings of sums of some hundred numbers, of the largest one."""
    return bool((ours - plain).abs().max() <= 64 * torch.finfo(ours.dtype).eps * plain.abs().max())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_reverse_mode(backend: str, entry: str) -> None:
    ours, plain, x = _pairs(backend)[entry]
    tangent = torch.randn_like(x)
    expected = jvp(plain, (x,), (tangent,))[1]
    assert _close(jvp(ours, (x,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        learning = x.clone().requires_grad_()
        value = ours(forward_ad.make_dual(learning, tangent))
        assert _close(forward_ad.unpack_dual(value).tangent, expected)
    assert _close(torch.autograd.grad(value, learning)[0], grad(plain)(x))
    assert _close(grad(ours)(x), grad(plain)(x))
    factor = torch.tensor(-3.0)
    assert _close(vjp(ours, x)[1](factor)[0], vjp(plain, x)[1](factor)[0])


@pytest.mark.parametrize("entry", ["logits", "logits, none", "weight", "pair of heads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_batched(backend: str, entry: str) -> None:
    ours, plain, x = _pairs(backend)[entry]
    both = torch.stack((x, 2 * x))
    assert _close(vmap(ours)(both), vmap(plain)(both))
    assert _close(vmap(grad(ours))(both), vmap(grad(plain))(both))
    assert _close(jacfwd(ours)(x), grad(plain)(x))
    assert _close(jacrev(ours)(x), grad(plain)(x))
    learning = x.clone().requires_grad_()
    upstream = torch.tensor([1.0, -2.0])
    (found,) = torch.autograd.grad(ours(learning), learning, upstream, is_grads_batched=True)
    assert _close(found, upstream.reshape(2, *[1] * x.dim()) * grad(plain)(x))


@pytest.mark.parametrize(
    "entry", ["logits", "logits, none", "weight", "low rank: a", "low rank: b", "pair of heads"]
)
def test_second_derivatives_are_an_error_or_right(entry: str) -> None:
    ours, plain, x = _pairs("cpu")[entry]
    with pytest.raises(NotImplementedError, match=r"Trying to use forward AD with unilogit_ker"):
        hessian(ours)(x)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad(lambda q: grad(ours)(q).square().sum())(x)
    ours = _pairs("eager")[entry][0]
    twice = [grad(lambda q, f=f: grad(f)(q).square().sum())(x) for f in (ours, plain)]
    assert _close(*twice)


def test_functional_call() -> None:
    head, x, labels = torch.nn.Linear(H, V), torch.randn(N, H), torch.arange(N)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return objective_loss(functional_call(head, parameters, x), labels, "unilogit")

    found = grad(loss)(dict(head.named_parameters()))
    objective_loss(head(x), labels, "unilogit").backward()
    assert head.weight.grad is not None
    assert _close(found["weight"], head.weight.grad)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_traces_without_dynamo(entry: str, mode: Literal["real", "symbolic"]) -> None:
    """Forward and backward become one graph, which computes the same."""
    ours, _, x = _pairs("cpu")[entry]

    def step(q: Tensor) -> Tensor:
        q = q.detach().requires_grad_()
        return torch.autograd.grad(ours(q), q)[0]

    traced = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x)
    assert any("unilogit_kernels" in str(node.target) for node in traced.graph.nodes)
    other = torch.randn_like(x)
    assert torch.equal(traced(other), step(other))


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("without_data", ["fake", "meta"])
def test_tensors_without_data(entry: str, without_data: str) -> None:
    """Memory estimators run forward and backward on them, as they do `F.cross_entropy`."""
    if without_data == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            ours, _, x = _pairs("cpu")[entry]
            x = x.requires_grad_()
            ours(x).backward()
    else:
        with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "manual_seed", lambda _: None)
            ours, _, x = _pairs("eager")[entry]
            x = x.requires_grad_()
            ours(x).backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_and_without_the_dispatcher(backend: str, entry: str) -> None:
    """A call that nobody watches goes past the dispatcher; one that is watched is seen whole."""
    ours, _, x = _pairs(backend)[entry]

    def step() -> tuple[Tensor, Tensor]:
        learning = x.clone().requires_grad_()
        loss = ours(learning)
        return loss.detach(), torch.autograd.grad(loss, learning)[0]

    straight = step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        profiled = step()
    with _Watch() as watch:
        watched = step()
    for found in (profiled, watched):
        assert all(map(torch.equal, straight, found))
    seen = {event.key for event in profile.key_averages() if "unilogit_kernels::" in event.key}
    assert seen == watch.seen
    assert seen


class _Watch(TorchDispatchMode):
    """Writes down which of the package's operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "unilogit_kernels":
            self.seen.add(func._schema.name)
        return func(*args, **(kwargs or {}))
