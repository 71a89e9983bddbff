"""Labels that were shifted before they came here, and would be shifted twice."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from unilogit_kernels.backends.registry import level_of_caller

_seen_on: set[str] = set()
"""Types of devices, the CPU apart, on which labels have been looked at: it waits for the device."""


def warn_if_shifted(labels: Tensor, inputs: dict[str, Any], ignore_index: int) -> None:
    """Warn where every label that counts is the next input id, and not every one its own.

    On a CPU that is two comparisons of `[B, T]` in each call. Elsewhere the answer has to be waited
    for, so only the first call looks.

    Args:
        labels: `[B, T]`, which are about to be shifted.
        inputs: of the model's forward.
        ignore_index: label of tokens that do not count.
    """
    ids = inputs.get("input_ids")
    kind = labels.device.type
    if (
        not isinstance(ids, Tensor)
        or ids.shape != labels.shape
        or ids.device != labels.device
        or labels.dim() != 2
        or torch.compiler.is_compiling()
        or kind in _seen_on
    ):
        return
    if kind != "cpu":
        _seen_on.add(kind)
    counted = labels != ignore_index
    own = (labels == ids) | ~counted
    following = (labels[:, :-1] == ids[:, 1:]) | ~counted[:, :-1]
    if bool(following.all() & ~own.all() & counted.any()):
        warnings.warn(
            "labels look shifted already: each is the id of the next token. They are shifted here "
            "once more; pass input_ids with prompt and padding set to ignore_index, or shift=False "
            "for labels that were shifted",
            stacklevel=level_of_caller(),
        )
