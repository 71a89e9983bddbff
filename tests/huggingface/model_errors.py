"""The error of a whole model's loss and gradients beside plain torch's, against float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# One call's loss is one number, which plain torch may hit by chance: a few roundings are no error.
_FLOOR = 4


def assert_same_loss(found: Tensor, exact: Tensor, plain: Tensor) -> None:
    """A scalar: at most twice plain torch's error, plus a few roundings."""
    assert_same_losses(found[None], exact[None], plain[None])


def assert_same_losses(found: Tensor, exact: Tensor, plain: Tensor) -> None:
    """Losses of tokens as one vector: the same, with a rounding of each."""
    right = exact.double()
    # A loss comes in float32, and is one of the order of 1.
    floor = _FLOOR * torch.finfo(torch.float32).eps * float(right.abs().clamp(min=1).norm())
    errors = [float((losses.double() - right).norm()) for losses in (found, plain)]
    allowed = 2 * errors[1] + floor
    assert errors[0] <= allowed, f"error of the losses {errors[0]:.3e} exceeds {allowed:.3e}"


def assert_same_gradients(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> None:
    """Of all parameters as one vector: at most twice plain torch's error, plus one rounding."""
    error, allowed = gradient_error(found, exact, plain)
    assert error <= allowed, f"relative error of the gradients {error:.3e} exceeds {allowed:.3e}"


def gradient_error(
    found: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor]
) -> tuple[float, float]:
    """The relative error of all gradients as one vector, and the one that is allowed.

    Single tensors of a small model are a lottery: an error of one rounding is twice another's.
    """
    assert found.keys() == exact.keys() == plain.keys()
    size = _norm([exact[key] for key in exact])
    errors = [_norm([of[key].double() - exact[key] for key in exact]) for of in (found, plain)]
    eps = max(torch.finfo(tensor.dtype).eps for tensor in found.values())
    return errors[0] / size, 2 * errors[1] / size + eps


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())
