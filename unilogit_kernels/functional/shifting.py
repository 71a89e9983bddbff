"""Labels of the next token: for whoever passes `labels = input_ids`, as Hugging Face does."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from unilogit_kernels.objectives import Objective

_Function = TypeVar("_Function", bound=Callable[..., Any])


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels for the positions that predict them: `out[..., t] = labels[..., t + 1]`.

    Args:
        labels: `[..., T]`, usually the input ids with prompt and padding set to `ignore_index`.
        ignore_index: What the last position, which predicts nothing, gets.

    Returns:
        `[..., T]`, same dtype.

    Raises:
        ValueError: `labels` is a scalar.

    Example:
        >>> import torch
        >>> shift_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    if labels.dim() == 0:
        raise ValueError("labels must have shape [..., T], got a scalar")
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def shifting(function: _Function) -> _Function:
    """Decorator of functions that take `shift`: move what belongs to tokens to its predictor.

    That is `labels`, and with them `token_weights`, `segments` and the per-token tensors of
    objectives, all along their last dimension.
    """
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def shifted(*args: Any, shift: bool = False, **options: Any) -> Any:
        if not shift:
            return function(*args, **options)
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | options
        if given.get("labels") is None:
            raise ValueError("shift=True moves labels, and there are none")
        for name, fill in (
            ("labels", given.get("ignore_index", -100)),
            ("token_weights", 0),
            ("segments", 0),
        ):
            if isinstance(given.get(name), Tensor):
                given[name] = shift_labels(given[name], fill)
        if "objective" in given:
            given["objective"] = _moved(given["objective"])
        if "parts" in given:
            given["parts"] = [_moved(part) for part in given["parts"]]
        return function(**given)

    return shifted  # type: ignore[return-value]  # of the same signature


def _moved(objective: Any) -> Any:
    """An objective whose tensors of tokens are where its labels are."""
    if not isinstance(objective, Objective):
        return objective
    return objective.map_tokens(lambda tensor: shift_labels(tensor, 0))
