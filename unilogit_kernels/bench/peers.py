"""Other people's fused cross-entropies, composed to Unilogit where they return a per-token nll.

Those that only return a mean stay cross-entropy, the lighter job.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels.bench.problems import Problem, Shape
from unilogit_kernels.bench.provider import Job, Loss, Provider, by_autograd, unilogit_from_nll

_HOPPER = (9, 0)
"""What quack's kernels, and Liger's in CuTe, are written for."""


def _needs(
    module: str, *, gpu: bool = False, softcap: bool = True, capability: tuple[int, int] = (0, 0)
) -> Callable[[Shape, str], str | None]:
    """Why a package cannot run a shape.

    Args:
        module: What must be installed.
        gpu: Whether its kernels need a GPU.
        softcap: Whether it knows softcaps.
        capability: CUDA compute capability that it needs at least.
    """

    def unavailable(shape: Shape, device: str) -> str | None:
        if shape.softcap is not None and not softcap:
            return "has no softcap"
        if importlib.util.find_spec(module) is None:
            return f"the package {module} is not installed"
        if gpu and device != "cuda":
            return "its kernels need a GPU"
        if capability > (0, 0) and torch.cuda.get_device_capability() < capability:
            return f"needs compute capability {'.'.join(map(str, capability))}"
        return None

    return unavailable


# ---- torch's own -------------------------------------------------------------------------------


def _torch_chunked(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None,
    through_nll: bool = False,
    **options: Any,
) -> Tensor:
    chosen = torch.nn.LinearCrossEntropyOptions(**options)
    reduction = "none" if through_nll else "mean"
    loss: Tensor = F.linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, options=chosen
    )
    return unilogit_from_nll(loss, weight.shape[0]) if through_nll else loss


def _needs_torch_chunked(shape: Shape, device: str) -> str | None:
    if shape.softcap is not None:
        return "has no softcap"
    return None if hasattr(F, "linear_cross_entropy") else "needs torch >= 2.13"


def _torch_provider(variant: str, computes: str = "cross_entropy", **options: Any) -> Provider:
    return Provider(
        f"F.linear_cross_entropy, {variant}",
        "linear",
        computes,
        by_autograd(partial(_torch_chunked, **options)),
        _needs_torch_chunked,
        logits_copies=1,
    )


# ---- cut_cross_entropy -------------------------------------------------------------------------


def _cut(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None,
    through_nll: bool,
    **options: Any,
) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    reduction = "none" if through_nll else "mean"
    loss: Tensor = linear_cross_entropy(
        hidden, weight, labels, softcap=softcap, reduction=reduction, **options
    )
    return unilogit_from_nll(loss, weight.shape[0]) if through_nll else loss


def _cut_providers(
    variant: str, *, gpu: bool, through_nll: Sequence[bool] = (True, False), **options: Any
) -> list[Provider]:
    common: dict[str, Any] = {"logits_copies": 0 if gpu else 4, "compiles": not gpu}
    unavailable = _needs("cut_cross_entropy", gpu=gpu)
    return [
        Provider(
            f"cut_cross_entropy ({variant}){', through nll' if composed else ''}",
            "linear",
            "unilogit" if composed else "cross_entropy",
            by_autograd(partial(_cut, through_nll=composed, **options)),
            unavailable,
            **common,
        )
        for composed in through_nll
    ]


# ---- Liger -------------------------------------------------------------------------------------


def _liger_on_own_logits(loss: Loss) -> Callable[[Problem], Job]:
    """Liger writes the gradient over the logits, so it gets its own; the first call is exact."""

    def prepare(problem: Problem) -> Job:
        mine = problem.operands[0].detach().clone().requires_grad_()

        def forward() -> Tensor:
            # Not a leaf, as in a model: a leaf that wants a gradient may not be overwritten.
            return loss(mine.view_as(mine), problem.labels, softcap=problem.shape.softcap)

        def backward(value: Tensor | None) -> list[Tensor]:
            assert value is not None
            return list(torch.autograd.grad(value, [mine]))

        return Job(forward, backward)

    return prepare


def _liger(logits: Tensor, labels: Tensor, *, softcap: float | None, through_nll: bool) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy

    reduction = "none" if through_nll else "mean"
    loss: Tensor = liger_cross_entropy(logits, labels, reduction=reduction, softcap=softcap)
    return unilogit_from_nll(loss, logits.shape[-1]) if through_nll else loss


def _liger_linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None,
    through_nll: bool,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        reduction="none" if through_nll else "mean",
        softcap=softcap,
        accum_dtype=accum_dtype,
    )
    return unilogit_from_nll(loss, weight.shape[0]) if through_nll else loss


def _liger_cute(hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None) -> Tensor:
    """Its kernels in CuTe by name, which it may choose by itself too."""
    from liger_kernel.ops.backends._cutedsl import fused_linear_cross_entropy as cute

    loss: Tensor
    loss, *_ = cute.fused_linear_cross_entropy_cutedsl(hidden, weight, labels, softcap=softcap)
    return loss


def _needs_liger_cute(shape: Shape, device: str) -> str | None:
    reason = _needs("liger_kernel", gpu=True)(shape, device)
    return reason or _needs("cutlass", gpu=True, capability=_HOPPER)(shape, device)


def _liger_providers() -> list[Provider]:
    unavailable = _needs("liger_kernel", gpu=True)
    found = []
    for through_nll in (True, False):
        suffix = ", through nll" if through_nll else ""
        computes = "unilogit" if through_nll else "cross_entropy"
        loss = partial(_liger, through_nll=through_nll)
        found.append(
            Provider(
                f"Liger{suffix}",
                "logits",
                computes,
                _liger_on_own_logits(loss),
                unavailable,
                logits_copies=1,
            )
        )
        for variant, dtype in (("", None), (", float32 sums", torch.float32)):
            linear = partial(_liger_linear, through_nll=through_nll, accum_dtype=dtype)
            name = f"Liger fused linear{variant}{suffix}"
            found.append(Provider(name, "linear", computes, by_autograd(linear), unavailable))
    cute = by_autograd(_liger_cute)
    return [
        *found,
        Provider("Liger fused linear, CuTe", "linear", "cross_entropy", cute, _needs_liger_cute),
    ]


# ---- quack -------------------------------------------------------------------------------------


def _quack(logits: Tensor, labels: Tensor, *, softcap: float | None, through_nll: bool) -> Tensor:
    from quack.cross_entropy import cross_entropy

    loss: Tensor = cross_entropy(logits, labels, reduction="none" if through_nll else "mean")
    return unilogit_from_nll(loss, logits.shape[-1]) if through_nll else loss


def _quack_linear(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None
) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    loss: Tensor = chunked_linear_cross_entropy(hidden, weight, labels, reduction="mean")
    return loss


def _quack_providers() -> list[Provider]:
    unavailable = _needs("quack", gpu=True, softcap=False, capability=_HOPPER)
    logits = [
        Provider(
            f"quack{', through nll' if through_nll else ''}",
            "logits",
            "unilogit" if through_nll else "cross_entropy",
            by_autograd(partial(_quack, through_nll=through_nll)),
            unavailable,
            logits_copies=1,
        )
        for through_nll in (True, False)
    ]
    linear = by_autograd(_quack_linear)
    return [*logits, Provider("quack chunked", "linear", "cross_entropy", linear, unavailable)]


# ---- TRL ---------------------------------------------------------------------------------------


def _trl(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None, through_nll: bool
) -> Tensor:
    """The kernel of `trl.trainer.utils.add_fused_lm_head`, as its trainers call it."""
    from trl.trainer import utils

    log_probs: Tensor = utils._ChunkedLogProbFunction.apply(
        *(hidden, weight, None, labels, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE),
        *(softcap, 1.0, ("log_probs",)),
    )[0]
    return unilogit_from_nll(-log_probs, weight.shape[0]) if through_nll else -log_probs.mean()


def _trl_providers() -> list[Provider]:
    return [
        Provider(
            f"TRL fused head{', through nll' if through_nll else ''}",
            "linear",
            "unilogit" if through_nll else "cross_entropy",
            by_autograd(partial(_trl, through_nll=through_nll)),
            _needs("trl"),
            logits_copies=3,  # tiles of 32,768 columns, of all tokens on a CPU
        )
        for through_nll in (True, False)
    ]


PEERS = [
    _torch_provider("auto"),
    _torch_provider("accurate", acc_policy="accurate", chunking_method="aspect_ratio"),
    _torch_provider("auto, through nll", "unilogit", through_nll=True),
    # Its mean is what "compiled F.cross_entropy" is.
    *_cut_providers("torch_compile", gpu=False, impl="torch_compile", through_nll=(True,)),
    *_cut_providers("cce", gpu=True, impl="cce"),
    *_cut_providers("cce, unfiltered", gpu=True, impl="cce", filter_eps=None),
    *_liger_providers(),
    *_quack_providers(),
    *_trl_providers(),
]
