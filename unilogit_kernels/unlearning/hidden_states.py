"""RMU (Li et al. 2024, arXiv 2403.03218): a loss of a middle layer's hidden states, not of logits.

On forget rows the hidden states `h` of one layer are drawn to a random direction, which the layers
above can make nothing of; on retain rows they are kept where the starting model has them:

    forget_loss = mean over tokens of mean((h - steering * u)^2)
    retain_loss = mean over tokens of mean((h - h_start)^2)

with one unit vector `u` for the whole training, of uniform entries. Tokens that carry loss count,
each by the hidden state at its own position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unilogit_kernels.huggingface.head import (
    HeadCall,
    run_head,
    run_head_with_auxiliary_loss,
)
from unilogit_kernels.huggingface.two_heads import Reference, running
from unilogit_kernels.huggingface.wrappers import unwrapped
from unilogit_kernels.unlearning.encoding import IGNORED
from unilogit_kernels.unlearning.layers import decoder_layers


def steered_layer(model: nn.Module, parameters: Mapping[str, float]) -> int:
    """The layer whose hidden states RMU moves, 0 the first.

    Args:
        model: a Hugging Face causal LM, or one that peft wraps.
        parameters: of the method: `layer`; a quarter of the way up by default, which is the
            paper's 7 of 32.

    Raises:
        ValueError: the model has no such layer.
    """
    depth = len(decoder_layers(model))
    layer = parameters.get("layer", max(depth // 4 - 1, 0))
    if not float(layer).is_integer() or layer >= depth:
        raise ValueError(
            f"layer of method 'rmu' must be an integer below the {depth} layers of the model, got "
            f"{layer:g}"
        )
    return int(layer)


@dataclass(frozen=True)
class Rmu:
    """The loss of a batch.

    Attributes:
        layer: whose hidden states it sees.
        target: float32 `[H]`, where those of forget rows are drawn to.
        forget_weight: factor of the forget loss.
        teacher: the starting model, or None where no retain rows are kept in place.
    """

    layer: int
    target: Tensor
    forget_weight: float
    teacher: Reference | None

    @staticmethod
    def of(
        model: nn.Module,
        teacher: Reference | None,
        parameters: Mapping[str, float],
        forget_weight: float,
        seed: int,
    ) -> Rmu:
        """The loss with a random direction, which is the same in every process and after a resume.

        Args:
            model: not wrapped for several processes.
            teacher: see `Rmu`.
            parameters: of the method: `layer`, and `steering`, the length of the direction.
            forget_weight: see `Rmu`.
            seed: of the direction.

        Raises:
            ValueError: see `steered_layer`.
        """
        config: Any = model.config
        size = config.get_text_config().hidden_size
        draw = torch.Generator().manual_seed(seed)
        direction = torch.rand(size, generator=draw, dtype=torch.float32, device="cpu")
        target = direction / direction.norm() * parameters["steering"]
        return Rmu(steered_layer(model, parameters), target, forget_weight, teacher)

    def __call__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        labels: Tensor,
        forget_rows: int,
        counts: Tensor | None,
        retain_weight: float,
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, the forget rows' and the retain rows', `[3]`, the first one differentiable.

        Args:
            model: as accelerate wrapped it.
            inputs: of its forward: forget rows, then retain rows.
            labels: int64 `[B, T]`, not shifted.
            forget_rows: how many of the rows come first.
            counts: `[2]`, what the means are over; None for the batch's own tokens.
            retain_weight: factor of the retain loss.

        Returns:
            The losses, and the model's own auxiliary loss or None.
        """
        counted = labels != IGNORED
        counted[:, 0] = False  # Nothing predicts a first token, so it carries no loss anywhere.
        items = (None, None) if counts is None else counts.unbind()
        before = None
        if self.teacher is not None:
            rest = {name: value[forget_rows:] for name, value in inputs.items()}
            with running(self.teacher, model) as start, self._recording(start) as seen:
                run_head(start, lambda head: head.hidden.new_zeros(()), **rest)
            before = seen[-1]

        def compute(head: HeadCall) -> Tensor:
            hidden = seen[-1]
            self._check(hidden)
            away = hidden[:forget_rows] - self.target.to(hidden.device)
            dropped = _mean_square(away, counted[:forget_rows], items[0])
            kept = hidden.new_zeros(())
            if before is not None:
                moved = hidden[forget_rows:] - before.to(hidden.device)
                kept = _mean_square(moved, counted[forget_rows:], items[1])
            loss = self.forget_weight * dropped + retain_weight * kept
            return torch.stack([loss, dropped, kept])

        with self._recording(model) as seen:
            return run_head_with_auxiliary_loss(model, compute, **inputs)

    @contextmanager
    def _recording(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """The layer's outputs, float32 `[B, T, H]`, of each forward in turn."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            seen.append((output[0] if isinstance(output, tuple) else output).float())

        layer = decoder_layers(unwrapped(model))[self.layer]
        handle = layer.register_forward_hook(keep)
        try:
            yield seen
        finally:
            # Before the backward, in which a layer whose activations are recomputed runs again.
            handle.remove()

    def _check(self, hidden: Tensor) -> None:
        if torch.is_grad_enabled() and not hidden.requires_grad:
            raise ValueError(
                f"no gradient reaches the hidden states of layer {self.layer}: method 'rmu' needs "
                "trainable weights in it or below, and gradient checkpointing with "
                "use_reentrant=False"
            )


def _mean_square(difference: Tensor, counted: Tensor, items: Tensor | None) -> Tensor:
    """Over the hidden size, and then over the tokens that count."""
    squares = difference.square().mean(-1).masked_fill(~counted, 0.0)
    return squares.sum() / (counted.sum() if items is None else items).clamp(min=1)
