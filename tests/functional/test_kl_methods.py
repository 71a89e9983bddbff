"""Each method against a reference model as its paper writes it, in float64, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import literal
from tests.support.divergence_pairs import Pair, check_gradient, linear_pair, logits_of, logits_pair
from unilogit_kernels import Mask, Shift, Uniform, reference
from unilogit_kernels.functional.kl import count_ignored_positions
from unilogit_kernels.testing import assert_sum_within_budget, assert_within_budget

Method = Callable[[Tensor, Tensor, Tensor], Tensor]
METHODS: dict[str, tuple[Method, dict[str, Any]]] = {
    "KL minimisation": (literal.kl_to_teacher, {}),
    "reverse KL": (lambda p, q, y: literal.kl_to_teacher(q, p, y), {"direction": "reverse"}),
    "UnDIAL": (literal.undial(3.0), {"rewrite": Shift(3.0)}),
    "Unilogit": (literal.unilogit_of_teacher, {"rewrite": Uniform(), "direction": "reverse"}),
    "without the label": (literal.without_label_of_teacher, {"rewrite": Mask()}),
}
MODELS: dict[str, dict[str, Any]] = {
    "as they are": {},
    "each its own cap and scale": {
        "softcap": 4.0,
        "ref_softcap": 7.0,
        "logit_scale": 0.5,
        "ref_logit_scale": 1.5,
    },
}


def exact_and_plain(
    method: Method, pair: Pair, dtype: torch.dtype, **options: float
) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Losses of the tokens that count, and gradients of their mean: in float64, and in `dtype`."""
    labels = pair.labels
    counted = torch.ones(len(pair.student[0]), dtype=torch.bool)
    if labels is None:
        labels = torch.zeros(len(counted), dtype=torch.int64)  # which these methods do not look at
    else:
        counted = labels != -100
    results = []
    for to in (torch.float64, dtype):
        student = tuple(x.detach().to(to).requires_grad_() for x in pair.student)
        teacher = tuple(x.to(to) for x in pair.teacher)
        z = reference.transform_logits(
            logits_of(student),
            softcap=options.get("softcap"),
            logit_scale=options.get("logit_scale"),
        )
        t = reference.transform_logits(
            logits_of(teacher),
            softcap=options.get("ref_softcap"),
            logit_scale=options.get("ref_logit_scale"),
        )
        losses = method(z[counted], t[counted], labels[counted])
        results.append((losses.detach(), torch.autograd.grad(losses.mean(), student)))
    return results


def check(method: Method, pair: Pair, backend: str, dtype: torch.dtype, **options: float) -> None:
    (exact_losses, exact), (plain_losses, plain) = exact_and_plain(method, pair, dtype, **options)
    loss, gradients = pair.ours(backend, **options)
    losses = pair.loss(pair.student, backend, reduction="none", **options)
    if pair.labels is not None:
        losses = losses[pair.labels != -100]
    assert_within_budget(losses, exact_losses, plain_losses, "losses", smallest_scale=1.0)
    n = len(losses)
    assert_sum_within_budget(loss, exact_losses / n, plain_losses / n, "loss")
    for i, ours in enumerate(gradients):
        check_gradient(ours, exact[i], plain[i], f"gradient {i}")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("models", MODELS.values(), ids=MODELS)
def test_methods(backend: str, dtype: torch.dtype, name: str, models: dict[str, float]) -> None:
    """On logits, and through heads of different sizes with a bias each."""
    method, options = METHODS[name]
    for pair in (logits_pair(40, 211, dtype), linear_pair(40, 24, 211, dtype)):
        check(method, replace(pair, options=options), backend, dtype, **models)


@pytest.mark.parametrize("name", ["KL minimisation", "reverse KL"])
def test_all_tokens(backend: str, dtype: torch.dtype, name: str) -> None:
    method, options = METHODS[name]
    for pair in (logits_pair(40, 211, dtype), linear_pair(40, 24, 211, dtype)):
        check(method, replace(pair, labels=None, options=options), backend, dtype)


@pytest.mark.parametrize("biased", ["student", "teacher"])
def test_a_bias_of_one_model(backend: str, dtype: torch.dtype, biased: str) -> None:
    method, options = METHODS["UnDIAL"]
    pair = replace(linear_pair(40, 24, 211, dtype), options=options)
    if biased == "student":
        pair = replace(pair, teacher=pair.teacher[:2])
    else:
        pair = replace(pair, student=pair.student[:2])
    check(method, pair, backend, dtype)


@pytest.mark.parametrize("linear", [False, True])
def test_openunlearnings_average_can_be_reproduced(backend: str, linear: bool) -> None:
    """Its UnDIAL counts each position, and -100 indexes the vocabulary from its end."""
    v, dtype = 211, torch.float32
    pair = linear_pair(40, 24, v, dtype) if linear else logits_pair(40, v, dtype)
    assert pair.labels is not None
    labels = pair.labels

    def averaging_ignored_positions(z: Tensor, t: Tensor, _: Tensor) -> Tensor:
        lowered = t.clone()
        for row, label in enumerate(labels.tolist()):
            lowered[row, label] -= 3.0
        soft = lowered.softmax(-1)
        # Less the target's entropy, a constant.
        return (soft * (soft.log() - z.log_softmax(-1))).sum(-1)

    options = {"rewrite": Shift(3.0)}
    everything = replace(pair, labels=count_ignored_positions(labels, v), options=options)
    check(averaging_ignored_positions, everything, backend, dtype)
    # And it is something else than the paper's method.
    _, ours = everything.ours(backend)
    _, papers = replace(pair, options=options).ours(backend)
    assert not torch.allclose(ours[0], papers[0], rtol=1e-2, atol=1e-4)
