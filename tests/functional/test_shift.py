"""`shift=True` is `shift_labels` on everything that belongs to tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import unilogit_kernels
from unilogit_kernels import functional, objectives, shift_labels

N, T, V, H = 2, 5, 11, 4
MOVED = ("labels", "token_weights", "segments")


def taking_labels() -> list[str]:
    return sorted(
        name
        for name in functional.__all__
        if inspect.isfunction(getattr(functional, name))
        and "labels" in inspect.signature(getattr(functional, name)).parameters
        and name not in ("shift_labels", "count_ignored_positions")
    )


def given_for(name: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    every: dict[str, Any] = {
        "logits": normal(N, T, V),
        "ref_logits": normal(N, T, V),
        "hidden": normal(N, T, H),
        "weight": normal(V, H),
        "ref_hidden": normal(N, T, H),
        "ref_weight": normal(V, H),
        "labels": torch.randint(V, (N, T), generator=generator),
        "token_weights": normal(N, T),
        "segments": torch.randint(2, (N, T), generator=generator),
        "objective": objectives.TNPO(reference=-normal(N, T).abs()),
        "parts": [objectives.TNPO(reference=-normal(N, T).abs()), "cross_entropy"],
    }
    taken = inspect.signature(getattr(functional, name)).parameters
    given = {key: value for key, value in every.items() if key in taken}
    given["labels"][0, 2] = -100
    return given


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


@pytest.mark.parametrize("name", taking_labels())
def test_shift_moves_what_belongs_to_tokens(name: str) -> None:
    function: Callable[..., Any] = getattr(functional, name)
    given = given_for(name)

    def moved(objective: Any) -> Any:
        if isinstance(objective, str):
            return objective
        return objective.map_tokens(lambda tensor: shift_labels(tensor, 0))

    by_hand = {
        key: shift_labels(value, -100 if key == "labels" else 0) if key in MOVED else value
        for key, value in given.items()
    }
    if "objective" in given:
        by_hand["objective"] = moved(given["objective"])
    if "parts" in given:
        by_hand["parts"] = [moved(part) for part in given["parts"]]
    found, expected = function(**given, shift=True), function(**by_hand)
    unmoved = function(**given)
    for seen, right in zip(tensors(found), tensors(expected), strict=True):
        assert seen.equal(right)
    assert not all(a.equal(b) for a, b in zip(tensors(found), tensors(unmoved), strict=True))


def test_modules_shift() -> None:
    given = given_for("unilogit_loss")
    del given["token_weights"]
    loss = unilogit_kernels.UnilogitLoss(shift=True)
    assert loss(**given).equal(unilogit_kernels.unilogit_loss(**given, shift=True))


def test_there_must_be_labels_to_shift() -> None:
    logits = torch.randn(N, T, V)
    with pytest.raises(ValueError, match="shift=True moves labels, and there are none"):
        unilogit_kernels.kl_loss(logits, logits, shift=True)
