"""The public functions on each backend, against the eager one in float64: losses and gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import unilogit_kernels as package
from benchmarks.gpu_session.cases import Case, Combination, Missing, Report, in_order_of_value
from benchmarks.gpu_session.cases import name_of as named
from benchmarks.gpu_session.judge import Judge
from benchmarks.gpu_session.target import Target
from unilogit_kernels import LinearOptions, Mask, Shift
from unilogit_kernels.bench.problems import DTYPES

Loss = Callable[..., Tensor]
"""Takes operands (logits, or hidden states and weight), labels, `ref=` and options."""
H, REF_H = 64, 48


def _objective(name: str) -> tuple[Loss, Loss]:
    return (
        partial(_without_ref, package.objective_loss, objective=name),
        partial(_without_ref, package.linear_objective_loss, objective=name),
    )


def _without_ref(
    loss: Callable[..., Any], *operands: Tensor, ref: Sequence[Tensor], **options: Any
) -> Tensor:
    found = loss(*operands, **options)
    value = found if isinstance(found, Tensor) else found.loss
    assert isinstance(value, Tensor)
    return value


def _kl(*operands: Tensor, ref: Sequence[Tensor], **options: Any) -> Tensor:
    *own, labels = operands
    loss: Callable[..., Any] = package.kl_loss if len(own) == 1 else package.linear_kl_loss
    if "softcap" in options:
        options["ref_softcap"] = 2 * options["softcap"]
    if options.get("bias") is not None:
        options["ref_bias"] = options["bias"].detach().flip(0)
    value = loss(*own, *ref, labels, **options)
    assert isinstance(value, Tensor)
    return value


def _kl_entry(**chosen: Any) -> tuple[Loss, Loss]:
    loss = partial(_kl, **chosen)
    return loss, loss


def _statistics(*operands: Tensor, ref: Sequence[Tensor], **options: Any) -> Tensor:
    """A loss that couples tokens, of all statistics that have gradients: two passes, or three."""
    *own, labels = operands
    for unknown in ("token_weights", "reduction"):
        options.pop(unknown, None)
    read: Callable[..., Any] = package.linear_token_statistics
    if len(own) == 1:
        read = package.token_statistics
    fields = ("log_odds", "logsumexp", "entropy", "runner_up_log_prob", "mean_logit")
    found = read(*own, labels, fields=fields, **options)
    valid = labels != -100
    terms = [getattr(found, name)[valid].sigmoid().mean() for name in fields]
    return torch.stack(terms).sum().exp()


def _coupled(*operands: Tensor, ref: Sequence[Tensor], **options: Any) -> Tensor:
    """A loss of the log-odds of all tokens together, as NPO is."""
    *own, labels = operands
    for unknown in ("token_weights", "reduction"):
        options.pop(unknown, None)
    read: Callable[..., Any] = package.linear_target_log_odds
    if len(own) == 1:
        read = package.target_log_odds
    d = read(*own, labels, **options)[labels != -100]
    return torch.nn.functional.softplus(torch.nn.functional.logsigmoid(d).mean())


_REGULARISED: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3, "entropy": 0.1}
ENTRIES: dict[str, tuple[Loss, Loss]] = {
    "unilogit": _objective("unilogit"),
    "cross-entropy": _objective("cross_entropy"),
    "unilogit, forward": _objective("unilogit_forward"),
    "gradient ascent": _objective("gradient_ascent"),
    "cross-entropy, regularised": (
        partial(_without_ref, package.cross_entropy_loss, **_REGULARISED),
        partial(_without_ref, package.linear_cross_entropy_loss, **_REGULARISED),
    ),
    "KL, forward": _kl_entry(direction="forward"),
    "KL, reverse, shift": _kl_entry(direction="reverse", rewrite=Shift(2.0)),
    "KL, forward, mask": _kl_entry(direction="forward", rewrite=Mask()),
    "coupled": (_coupled, _coupled),
    "statistics": (_statistics, _statistics),
}
"""By name: the loss on logits, and the one on hidden states and an lm_head."""
_SCALARS = ("coupled", "statistics")
"""Those that have no loss for each token."""

PARAMETERS: dict[str, Sequence[Hashable]] = {
    "entry": tuple(ENTRIES),
    "dtype": ("bfloat16", "float32", "float16"),
    "head": ("logits", "trained", "frozen", "with bias"),
    "option": ("none", "softcap", "padded", "weights", "small budget", "no compaction"),
    "reduction": ("mean", "sum"),
}


def cases(target: Target) -> list[Case]:
    """Those in which all pairs of values meet, then as many others."""
    first, pairs, _ = in_order_of_value(PARAMETERS)
    return [
        Case(named(backend, **each), partial(_check, target, backend, missing, each))
        for each in [*first, *pairs]
        for backend, missing in target.backends().items()
    ]


def _options(option: Hashable, labels: Tensor, v: int, *, linear: bool) -> dict[str, Any]:
    if option == "softcap":
        return {"softcap": 5.0}
    if option == "padded":
        return {"vocab_size": v - 37}
    if option == "weights":
        return {"token_weights": torch.linspace(-1, 2, len(labels), device=labels.device)}
    if option == "small budget" and linear:
        return {"options": LinearOptions(memory_budget=1 << 20)}
    if option == "no compaction" and linear:
        return {"options": LinearOptions(compact=False)}
    return {}


class _Call:
    """A loss on operands in float32, rounded to a dtype; run in that one or in another."""

    def __init__(self, target: Target, combination: Combination) -> None:
        self.entry, self.head = str(combination["entry"]), str(combination["head"])
        self.dtype = DTYPES[str(combination["dtype"])]
        self.reduction = str(combination["reduction"])
        n, v = (300, 5003) if not target.rehearses else (24, 301)
        device = target.device
        generator = torch.Generator(device).manual_seed(11)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(self.dtype)

        self.labels = torch.randint(0, v - 37, (n,), generator=generator, device=device)
        self.labels[3::5] = -100
        if self.head == "logits":
            self.operands, self.ref = [3 * random(n, v)], [3 * random(n, v)]
        else:
            self.operands = [random(n, H), 0.4 * random(v, H)]
            self.ref = [random(n, REF_H), 0.4 * random(v, REF_H)]
            if self.head == "with bias":
                self.operands.append(random(v))
        linear = self.head != "logits"
        self.options = _options(combination["option"], self.labels, v, linear=linear)

    def loss(self, operands: Sequence[Tensor], backend: str, reduction: str) -> Tensor:
        own, options = list(operands), {**self.options}
        if self.head == "with bias":
            options["bias"] = own.pop()
        ref = [x.to(own[0].dtype) for x in self.ref]
        loss = ENTRIES[self.entry][self.head != "logits"]
        return loss(*own, self.labels, ref=ref, backend=backend, reduction=reduction, **options)

    def run(self, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss, terms and gradients. The terms of what has none are the loss itself."""
        trains = [True, self.head != "frozen", True]
        inputs = [
            x.detach().to(dtype).requires_grad_(train)
            for x, train in zip(self.operands, trains, strict=False)
        ]
        loss = self.loss(inputs, backend, self.reduction)
        gradients = torch.autograd.grad(loss, [x for x in inputs if x.requires_grad])
        loss = loss.detach()
        if self.entry in _SCALARS:
            return loss, loss[None], list(gradients)
        with torch.no_grad():
            terms = self.loss(inputs, backend, "none")[self.labels != -100]
        return loss, terms / (len(terms) if self.reduction == "mean" else 1), list(gradients)


def _check(
    target: Target, backend: str, missing: str | None, combination: Combination, report: Report
) -> dict[str, Any]:
    if missing is not None:
        raise Missing(missing)
    if combination["option"] == "weights" and combination["entry"] in _SCALARS:
        raise Missing("it takes no weights")
    judge, call = Judge(), _Call(target, combination)
    with target.launching(backend, "split rows"):
        loss, terms, gradients = call.run(call.dtype, backend)
        exact_loss, exact_terms, exact = call.run(torch.float64, "eager")
        _, plain_terms, plain = call.run(call.dtype, "eager")
    if terms.shape[0] > 1:
        judge.near(terms, exact_terms, plain_terms, "losses", smallest_scale=1 / len(terms))
    judge.near_sum(loss, exact_terms, plain_terms, "loss")
    assert torch.isfinite(exact_loss), "the oracle is not finite"
    names = ("logits",) if len(call.operands) == 1 else ("hidden", "weight", "bias")
    if call.head == "frozen":
        names = ("hidden",)
    for i, name in enumerate(names[: len(gradients)]):
        # All entries together: p - q cancels, and a row's own error is luck for plain torch too.
        ours, oracle, torchs = (found[i].flatten() for found in (gradients, exact, plain))
        judge.near(ours, oracle, torchs, f"gradient of {name}")
    return judge.found()
