"""Negation of a task vector (Ilharco et al. 2023, arXiv 2212.04089): forgetting by arithmetic.

Training learns the forget rows; what it changed is the vector. Taken from the starting model
instead of added to it, it makes the model forget them: `w = start - scale * (trained - start)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unilogit_kernels.huggingface.sharding import is_partitioned
from unilogit_kernels.unlearning.errors import RunError


class TaskVector:
    """The trained weights of a model as they were before, in memory of their own.

    Args:
        model: that will train.

    Raises:
        RunError: its weights are partitioned by ZeRO-3, so that they are not here.
    """

    def __init__(self, model: nn.Module) -> None:
        for name, weight in model.named_parameters():
            if weight.requires_grad and is_partitioned(weight):
                raise RunError(
                    "a task vector is taken from the starting weights, but ZeRO-3 has partitioned "
                    f"them ({name} has shape {list(weight.shape)} here): train with FSDP2, or with "
                    "ZeRO stage 2 or below"
                )
        self._start: dict[str, Tensor] = {
            name: weight.detach().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def negate(self, model: nn.Module, scale: float) -> None:
        """Replace the trained weights by those on the other side of the starting model.

        Args:
            model: the same, trained.
            scale: how far, in lengths of the vector. 0 gives the starting model.
        """
        weights = dict(model.named_parameters())
        for name, start in self._start.items():
            # In float32 and with one rounding, however coarse the weights are.
            before, after = start.float(), weights[name].float()
            weights[name].copy_(before - scale * (after - before))
