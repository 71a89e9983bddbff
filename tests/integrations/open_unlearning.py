"""A stand-in for OpenUnlearning's trainers: their contract and their formulas, on whole logits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer

Batch = Mapping[str, Tensor]


class FinetuneTrainer(Trainer):
    """Takes what its loader passes beside the Trainer's own arguments."""

    def __init__(
        self, evaluators: Any = None, template_args: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)


class UnlearnTrainer(FinetuneTrainer):
    """Evaluates plain batches."""

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, _ = super().compute_loss(model, inputs, return_outputs=True)
        return loss.detach().mean(), None, None


class GradDiff(UnlearnTrainer):
    """As it is for transformers 4.45: `compute_loss` without the number of items."""

    def __init__(
        self,
        gamma: float = 1.0,
        alpha: float = 1.0,
        retain_loss_type: str = "NLL",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gamma, self.alpha, self.retain_loss_type = gamma, alpha, retain_loss_type
        self.ref_model = self._prepare_ref_model(self.model) if retain_loss_type == "KL" else None

    def _get_train_sampler(self, *args: Any) -> Any:
        rows: Any = self.train_dataset
        return SequentialSampler(rows)  # An order that the test knows.

    def _prepare_ref_model(self, model: Any) -> Any:
        reference = copy.deepcopy(model).to(self.accelerator.device)
        reference.eval()
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
        raise AssertionError("a fused trainer computes its loss itself")


class LaterGradDiff(GradDiff):
    """As it is for transformers 4.51."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        raise AssertionError("a fused trainer computes its loss itself")


def nll(model: Any, batch: Batch) -> Tensor:
    """`[B, T - 1]`, 0 where there is no label."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
    )


def logits_of(model: Any, batch: Batch) -> Tensor:
    found: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return found


def labelled(batch: Batch) -> Tensor:
    return batch["labels"][:, 1:] != -100


def preference(model: Any, reference: Any, win: Batch | None, lose: Batch, beta: float) -> Tensor:
    """DPO's loss times 2 / beta; NPO's without what wins."""

    def log_ratio(batch: Batch) -> Tensor:
        with torch.no_grad():
            before = nll(reference, batch).sum(-1)
        return before - nll(model, batch).sum(-1)

    margin = -log_ratio(lose) if win is None else log_ratio(win) - log_ratio(lose)
    return -2 / beta * F.logsigmoid(beta * margin).mean()


def undial(model: Any, reference: Any, batch: Batch, beta: float, labelled_only: bool) -> Tensor:
    """A mean over all positions; a label of -100 indexes the vocabulary from its end."""
    z, labels = logits_of(model, batch)[:, :-1], batch["labels"][:, 1:]
    with torch.no_grad():
        teacher = logits_of(reference, batch)[:, :-1].clone()
    rows, columns = torch.meshgrid(*map(torch.arange, labels.shape), indexing="ij")
    teacher[rows, columns, labels] -= beta
    losses = -(F.softmax(teacher, -1) * F.log_softmax(z, -1)).sum(-1)
    return losses[labelled(batch)].mean() if labelled_only else losses.mean()


def kl(model: Any, reference: Any, batch: Batch, labelled_only: bool) -> Tensor:
    """A mean over all positions, the last one too."""
    with torch.no_grad():
        log_q = F.log_softmax(logits_of(reference, batch), -1)
    log_p = F.log_softmax(logits_of(model, batch), -1)
    losses = (log_q.exp() * (log_q - log_p)).sum(-1)
    return losses[:, :-1][labelled(batch)].mean() if labelled_only else losses.mean()


def unilogit(model: Any, batch: Batch) -> Tensor:
    """Vasilev et al. 2025: KL(p || q), where q gives the label 1/V and no gradient."""
    counted = labelled(batch)
    z, y = logits_of(model, batch)[:, :-1][counted], batch["labels"][:, 1:][counted]
    rest = z.detach().scatter(1, y[:, None], -torch.inf).logsumexp(-1)
    uniform = rest - torch.tensor(z.shape[-1] - 1.0).log().to(z.dtype)
    log_q = F.log_softmax(z.detach().scatter(1, y[:, None], uniform[:, None]), -1)
    log_p = F.log_softmax(z, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def forget_loss(name: str, model: Any, reference: Any, forget: Any, labelled_only: bool) -> Tensor:
    """The literal forget loss of a trainer, with the arguments of `ARGUMENTS`."""
    if name == "FusedDPO":
        return preference(model, reference, forget["alternate"], forget["original"], 0.3)
    if name == "FusedNPO":
        return preference(model, reference, None, forget, 0.3)
    if name == "FusedUNDIAL":
        return undial(model, reference, forget, 2.0, labelled_only)
    if name == "Unilogit":
        return unilogit(model, forget)
    losses, counted = nll(model, forget), labelled(forget)
    if name == "FusedSimNPO":
        per_token = losses.sum(-1) / (forget["labels"] != -100).sum(-1) - 0.1
        return -F.logsigmoid(0.7 * per_token).mean() * 2 / 0.7
    p = (-losses[counted]).exp().detach()
    weights = {"FusedWGA": p**0.5, "FusedSatImp": p**3.0 * (1 - p) ** 2.0}
    weight = weights.get(name, torch.ones_like(p))
    return -(weight * losses[counted]).mean()


ARGUMENTS: dict[str, dict[str, float]] = {
    "Unilogit": {},
    "FusedGradDiff": {},
    "FusedNPO": {"beta": 0.3},
    "FusedDPO": {"beta": 0.3},
    "FusedSimNPO": {"beta": 0.7, "delta": 0.1},
    "FusedUNDIAL": {"beta": 2.0},
    "FusedWGA": {"beta": 0.5},
    "FusedSatImp": {"beta1": 3.0, "beta2": 2.0},
}
