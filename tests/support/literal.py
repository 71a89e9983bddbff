"""Each method as its paper writes it, over whole rows of logits, in the dtype of the logits.

Nothing here comes from the package, `reference` apart, which is the paper's Unilogit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unilogit_kernels import reference

STEP: dict[str, Any] = {
    "forget_weight": 0.7,
    "retain_weight": 1.3,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
"""Arguments of a Trainer whose step is `parameter -= learning_rate * gradient`, of two losses."""

Literal = Callable[[Tensor, Tensor], Tensor]
"""From logits `[n, V]` and labels `[n]` to losses `[n]`."""


def log_p(logits: Tensor, labels: Tensor) -> Tensor:
    """`log p_y`, by the loss of every language model."""
    return -F.cross_entropy(logits, labels, reduction="none")


def unilogit(direction: str) -> Literal:
    """Vasilev et al. 2025, arXiv 2505.06027."""
    return lambda z, y: reference.unilogit_loss(z, y, direction=direction, reduction="none")


def distillation(rewrite: Callable[[Tensor, Tensor], Tensor]) -> Literal:
    """KL(q || p) for the softmax q of rewritten logits, its gradient stopped."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        log_q = torch.log_softmax(rewrite(z.detach().clone(), y), dim=-1)
        terms = log_q.exp() * (log_q - torch.log_softmax(z, dim=-1))
        return torch.where(log_q == -torch.inf, 0.0, terms).sum(-1)

    return loss


def without_label(z: Tensor, y: Tensor) -> Tensor:
    """Yang 2025 (CE-U), arXiv 2503.01224: the label's logit is -inf."""
    return z.scatter(1, y[:, None], -torch.inf)


def lowered(gamma: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Dong et al. 2024 (UnDIAL), arXiv 2402.10052: the label's logit less gamma."""
    return lambda z, y: z - gamma * F.one_hot(y, z.shape[1])


def kl_to_teacher(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The retain term of KL minimisation (Maini et al., TOFU) and of NPO-KL (Zhang et al.)."""
    log_p, log_q = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def undial(gamma: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """UnDIAL (Dong et al.): cross-entropy to softmax(teacher - gamma at the label).

    Less the entropy of that target, a constant, which makes it a divergence.
    """

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = F.softmax(lowered(gamma)(teacher, labels), -1)
        entropy = -(soft * soft.log()).sum(-1)
        return F.cross_entropy(student, soft, reduction="none") - entropy

    return loss


def unilogit_of_teacher(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Unilogit (Vasilev et al.) with the starting model's target: KL(p || q), q(label) = 1/V."""
    v = teacher.shape[-1]
    at_label = F.one_hot(labels, v).bool()
    rest = teacher.exp().masked_fill(at_label, 0.0).sum(-1, keepdim=True)
    q = F.softmax(torch.where(at_label, rest.log() - math.log(v - 1), teacher), -1)
    p = F.softmax(student, -1)
    return (p * (p.log() - q.log())).sum(-1)


def without_label_of_teacher(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """KL(q || p) for a teacher whose label is masked."""
    q = F.softmax(without_label(teacher, labels), -1)
    losses: Tensor = torch.special.xlogy(q, q) - q * F.log_softmax(student, -1)
    return losses.sum(-1)


def weighted(weight: Callable[[Tensor], Tensor]) -> Literal:
    """Gradient ascent with a detached weight of p."""
    return lambda z, y: weight(log_p(z, y).detach().exp()) * log_p(z, y)


def logit(z: Tensor, y: Tensor) -> Tensor:
    """`log p_y - log(1 - p_y)`, over a softmax without the label."""
    chosen = z.gather(1, y[:, None])[:, 0]
    return chosen - without_label(z, y).logsumexp(-1)


def log_runner_up(z: Tensor, y: Tensor) -> Tensor:
    """The largest `log p_v` of tokens v other than y."""
    return without_label(torch.log_softmax(z, dim=-1), y).amax(-1)


def inverted_hinge(z: Tensor, y: Tensor) -> Tensor:
    """Cha et al. 2024 (LoKU), arXiv 2408.06621: `1 + p(x_t) - max_{v != x_t} p(v)`."""
    p = torch.softmax(z, dim=-1)
    others = p.scatter(1, y[:, None], -1.0)
    return 1 + p.gather(1, y[:, None])[:, 0] - others.amax(-1)


def entropy(z: Tensor) -> Tensor:
    """`-(sum_v p(v) log p(v))`, where a token of probability 0 adds nothing."""
    log_q = torch.log_softmax(z, dim=-1)
    return -(log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0.0)).sum(-1)


def cross_entropy(
    label_smoothing: float = 0.0, z_loss: float = 0.0, weight: float = 0.0
) -> Literal:
    """PyTorch's label smoothing, PaLM's z-loss, and the entropy times `weight`."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        smoothed = F.cross_entropy(z, y, label_smoothing=label_smoothing, reduction="none")
        return smoothed + z_loss * z.logsumexp(-1).square() + weight * entropy(z)

    return loss


def max_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Yuan et al. 2024, arXiv 2410.08109: `KL(uniform || p)`, as the authors' code has it."""
    uniform = torch.full_like(z, 1 / z.shape[-1])
    return F.kl_div(torch.log_softmax(z, dim=-1), uniform, reduction="none").sum(-1)


def flatness(z: Tensor, y: Tensor) -> Tensor:
    """Entesari et al. 2025 (PDU), arXiv 2506.05314."""
    return (z.max(-1).values - z.mean(-1)).square()


TOKEN: dict[str, Literal] = {
    "unilogit": unilogit("reverse"),
    "unilogit_forward": unilogit("forward"),
    "cross_entropy": lambda z, y: -log_p(z, y),
    "gradient_ascent": log_p,
    "probability": lambda z, y: torch.softmax(z, dim=-1).gather(1, y[:, None])[:, 0],
    "ceu": distillation(without_label),
    "self_undial": distillation(lowered(10.0)),
    # Wang et al. 2025, arXiv 2502.19301; Yang et al. 2025, arXiv 2505.11953.
    "wga": weighted(lambda p: p),
    "loku": inverted_hinge,
    "max_entropy": max_entropy,
    "entropy": lambda z, y: -entropy(z),
    "pdu": flatness,
    "satimp": weighted(lambda p: p**5 * (1 - p)),
}
"""Methods of one token, by the package's names, with the default parameters."""


def tnpo(reference_log_p: Tensor, beta: float, alpha: float) -> Literal:
    """Wang et al. 2025, arXiv 2502.19301: TNPO, and WTNPO for alpha > 0."""

    def loss(z: Tensor, y: Tensor) -> Tensor:
        p, start = log_p(z, y).detach().exp(), reference_log_p.to(z.dtype).exp()
        return 2 * p ** (beta + alpha) / (p**beta + start**beta) * log_p(z, y)

    return loss


def sequence_log_p(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """`[B]`, as OpenUnlearning's compute_batch_nll, without its shift and with its sign turned."""
    losses = F.cross_entropy(
        logits.transpose(-1, -2), labels, reduction="none", ignore_index=ignore_index
    )
    return -losses.sum(-1)


def npo(log_ps: Tensor, start: Tensor, beta: float = 0.1) -> Tensor:
    """Zhang et al. 2024, arXiv 2404.05868, equation 3."""
    return 2 / beta * torch.log1p((log_ps - start).exp() ** beta)


def simnpo(log_ps: Tensor, lengths: Tensor, beta: float, gamma: float) -> Tensor:
    """Fan et al. 2024, arXiv 2410.07163, with the margin outside of beta."""
    return -2 / beta * F.logsigmoid(-beta / lengths * log_ps - gamma)


def dpo(ratios: tuple[Tensor, ...], beta: float) -> Tensor:
    """Rafailov et al. 2023, arXiv 2305.18290: log-ratios of model and starting model."""
    chosen, rejected = ratios
    return -F.logsigmoid(beta * chosen - beta * rejected)


def flat(name: str, template: Tensor, forget: Tensor) -> Tensor:
    """Wang et al. 2024, arXiv 2410.11143: g and f* from its table of f-divergences."""
    divergences: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "flat": (lambda v: torch.tanh(v) / 2, lambda u: u),
        "flat_kl": (lambda v: v, lambda u: torch.exp(u - 1)),
        "flat_js": (
            lambda v: torch.log(2 / (1 + torch.exp(-v))),
            lambda u: -torch.log(2 - u.exp()),
        ),
        "flat_pearson": (lambda v: v, lambda u: u**2 / 4 + u),
    }
    g, conjugate = divergences[name]
    return -g(template) + conjugate(g(forget))
