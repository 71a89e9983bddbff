"""The Unilogit loss as `torch.nn` modules."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from unilogit_kernels.calls.low_rank import LowRank
from unilogit_kernels.calls.vocab_parallel import VocabParallel
from unilogit_kernels.functional import objective
from unilogit_kernels.fused_linear.options import LinearOptions


class UnilogitLoss(nn.Module):
    """`unilogit_loss` with its options fixed.

    Args:
        direction: `"reverse"` or `"forward"`.
        shift: Whether labels are those of Hugging Face, of each token itself (`unilogit_loss`).
        ignore_index: Label of positions that contribute nothing.
        reduction: `"mean"`, `"sum"` or `"none"`.
        softcap: The model caps its logits as `softcap * tanh(z / softcap)` (Gemma 2).
        logit_scale: The model multiplies its logits by this, before the cap.
        vocab_size: Number of real tokens where the vocabulary is padded.
        vocab_parallel: Ranks that share the vocabulary (`VocabParallel`), or None.
        backend: Name of a backend, or None for the best one of the device.

    Example:
        >>> import torch
        >>> loss = UnilogitLoss()(torch.randn(4, 1000), torch.arange(4))
    """

    def __init__(
        self,
        *,
        direction: str = "reverse",
        shift: bool = False,
        ignore_index: int = -100,
        reduction: str = "mean",
        softcap: float | None = None,
        logit_scale: float | None = None,
        vocab_size: int | None = None,
        vocab_parallel: VocabParallel | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.direction = direction
        self.shift = shift
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.vocab_size = vocab_size
        self.vocab_parallel = vocab_parallel
        self.backend = backend

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """`unilogit_loss(logits [..., V], labels [...])` with this module's options."""
        return objective.unilogit_loss(
            logits,
            labels,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **self._options(),
        )

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Every option with its default, those of base classes first."""
        found: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            if issubclass(base, UnilogitLoss):
                parameters = inspect.signature(base.__init__).parameters.values()
                found |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        return found

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._defaults()}

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        defaults = self._defaults()
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self._options().items()
            if value != defaults[name]
        )


class LinearUnilogitLoss(UnilogitLoss):
    """`linear_unilogit_loss` with its options fixed: those of `UnilogitLoss`, and of the GEMMs.

    Args:
        options: How calls may run (`LinearOptions`).
        loss_options: Those of `UnilogitLoss`.

    Example:
        >>> import torch
        >>> lm_head = torch.nn.Linear(16, 1000, bias=False)
        >>> loss = LinearUnilogitLoss()(torch.randn(4, 16), lm_head.weight, torch.arange(4))
    """

    def __init__(self, *, options: LinearOptions | None = None, **loss_options: Any) -> None:
        super().__init__(**loss_options)
        self.options = options

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        adapter: LowRank | None = None,
        token_weights: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """`linear_unilogit_loss(hidden [..., H], weight [V, H], labels [...])`."""
        return objective.linear_unilogit_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            adapter=adapter,
            token_weights=token_weights,
            num_items_in_batch=num_items_in_batch,
            **self._options(),
        )
