"""This package's kernels in TRL's fused head, which SFT, DPO, KTO, GRPO and RLOO train through.

`trl.trainer.utils.add_fused_lm_head` makes a model return log-probabilities instead of logits. What
it does around its kernel (shifting, masks, routers, sharded weights) stays TRL's; the kernel is
replaced, for every trainer of the process.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unilogit_kernels.functional.token_statistics import linear_token_statistics
from unilogit_kernels.fused_linear.options import LinearOptions

_FIELDS = {
    "log_probs": "log_prob",
    "entropy": "entropy",
    "mean_logits": "mean_logit",
    "is_top1": "is_argmax",
}
"""TRL's names of what it asks for, by ours."""
_ORDER = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
_PARAMETERS = (
    *("hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_KERNEL, _COMPACT = "_ChunkedLogProbFunction", "_use_triton"


class _Replaced(NamedTuple):
    """What TRL had before."""

    kernel: Any
    compact: Any


_replaced: list[_Replaced] = []


class _Kernel:
    """In the place of TRL's autograd function."""

    def __init__(self, theirs: Any, backend: str | None, options: LinearOptions | None) -> None:
        self.theirs = theirs
        self.backend = backend
        self.options = options

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _ORDER,
    ) -> tuple[Tensor | None, ...]:
        """The statistics of `_ORDER`, None for those that are not among the outputs."""
        if "log_sum_sq_probs" in outputs:  # WPO's weights: no statistic of these kernels
            return tuple(
                self.theirs.apply(
                    *(hidden, weight, bias, targets, temperature, chunk_size),
                    *(final_logit_softcapping, logit_scale, outputs),
                )
            )
        wanted = [name for name in _ORDER if name == "log_probs" or name in outputs]
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)  # as TRL casts it, for a head in float32
            bias = None if bias is None else bias.to(hidden.dtype)
        cap = final_logit_softcapping
        seen = linear_token_statistics(
            hidden,
            weight,
            targets,
            bias=bias,
            fields=[_FIELDS[name] for name in wanted],
            # The temperature divides what is capped: c tanh(z / c) / t = c/t tanh((z/t) / (c/t)).
            softcap=None if cap is None else cap / temperature,
            logit_scale=logit_scale / temperature,
            backend=self.backend,
            options=self.options,
        )
        found: dict[str, Tensor] = {name: getattr(seen, _FIELDS[name]) for name in wanted}
        if "mean_logits" in found:
            found["mean_logits"] = found["mean_logits"].detach()
        return tuple(found.get(name) for name in _ORDER)


def use_in_trl(*, backend: str | None = None, options: LinearOptions | None = None) -> None:
    """Let every TRL trainer take these kernels, with the entropy and accuracy that it logs.

    Call it before or after a trainer is made; `restore_trl` undoes it. Positions without a label
    are dropped on CPUs too, where TRL scores them. DPO's WPO weights ask for a statistic that these
    kernels have not: such calls stay TRL's.

    Args:
        backend: name of a backend, or None for the best available.
        options: how calls may run: memory, dtype of the logits. `skip_below` has no effect.

    Raises:
        ModuleNotFoundError: trl is not installed.
        RuntimeError: this version of trl has another fused head than the one that is known.

    Example:
        >>> from unilogit_kernels.huggingface import use_in_trl
        >>> use_in_trl()  # doctest: +SKIP
    """
    from trl.trainer import utils

    restore_trl()
    theirs, compact = getattr(utils, _KERNEL, None), getattr(utils, _COMPACT, None)
    taken = tuple(inspect.signature(theirs.forward).parameters)[1:] if theirs else ()
    if taken != _PARAMETERS or compact is None:
        raise RuntimeError(
            f"trl {version('trl')} has not the fused head that this package knows, that of trl "
            f"1.16: expected {_KERNEL} of ({', '.join(_PARAMETERS)}), got ({', '.join(taken)})"
        )
    _replaced.append(_Replaced(theirs, compact))
    setattr(utils, _KERNEL, _Kernel(theirs, backend, options))
    # What it decides there is whether positions without a label are dropped.
    setattr(utils, _COMPACT, lambda device: True)


def restore_trl() -> None:
    """Give TRL its own kernel back; does nothing where it has it."""
    if _replaced:
        from trl.trainer import utils

        before = _replaced.pop()
        setattr(utils, _KERNEL, before.kernel)
        setattr(utils, _COMPACT, before.compact)
