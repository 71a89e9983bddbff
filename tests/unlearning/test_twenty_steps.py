"""Twenty steps are a literal loop's: by every kind of method, with adapters, after a resume."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import literal
from tests.support.tiny_models import FORGET, encoded, one_thread
from tests.unlearning.test_trainer import InterruptAt
from tests.unlearning.tiny_adapters import ADAPTERS, learning, with_adapter
from tests.unlearning.tiny_trainer import REFUSALS, arguments, logged, make_trainer
from unilogit_kernels.huggingface import WithoutAdapters
from unilogit_kernels.testing import assert_tensors_within_budget, assert_within_budget
from unilogit_kernels.unlearning.arguments import UnlearningArguments
from unilogit_kernels.unlearning.trainer import UnlearningTrainer

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

GAMMA, BETA, LAYER, STEERING, SCALE = 3.0, 0.1, 1, 3.0, 0.7
SEED = 5
"""Of the order of the rows, and of RMU's direction."""
STEPS, ROWS = 20, 6
"""Of six forget rows, an epoch has two steps, the second of which may be incomplete."""
BREAK = 11
"""Steps before a run is broken off, in the middle of an epoch."""


class Rows:
    """Some rows of a batch, which each model reads once."""

    def __init__(self, batch: dict[str, Tensor], rows: slice, read: dict[nn.Module, Any]) -> None:
        self.labels = batch["labels"][rows, 1:]
        self._batch, self._rows, self._read = batch, rows, read

    def _output(self, model: nn.Module) -> Any:
        if model not in self._read:
            inputs = {name: self._batch[name] for name in ("input_ids", "attention_mask")}
            learns = any(parameter.requires_grad for parameter in model.parameters())
            with torch.set_grad_enabled(learns):
                self._read[model] = model(**inputs, output_hidden_states=True)
        return self._read[model]

    def logits(self, model: nn.Module) -> Tensor:
        """Those that predict the labels."""
        logits: Tensor = self._output(model).logits
        return logits[self._rows, :-1]

    def log_p(self, model: nn.Module) -> Tensor:
        """Of each sequence."""
        return literal.sequence_log_p(self.logits(model), self.labels)

    def labelled(self, *models: nn.Module) -> list[Tensor]:
        """Logits of the labelled tokens of each model, and the labels."""
        counted = self.labels != -100
        return [*(self.logits(model)[counted] for model in models), self.labels[counted]]

    def hidden(self, model: nn.Module) -> Tensor:
        """States of the labelled tokens themselves, `[n, H]`."""
        states: Tensor = self._output(model).hidden_states[LAYER + 1]
        return states[self._rows, 1:][self.labels != -100]


# ---- the definitions -----------------------------------------------------------------------------


def of_tokens(loss: literal.Literal) -> Callable[..., Tensor]:
    return lambda model, start, forget, other: loss(*forget.labelled(model))


def npo(model: nn.Module, start: nn.Module, forget: Rows, other: Rows) -> Tensor:
    return literal.npo(forget.log_p(model), forget.log_p(start), BETA)


def undial(model: nn.Module, start: nn.Module, forget: Rows, other: Rows) -> Tensor:
    return literal.undial(GAMMA)(*forget.labelled(model, start))


def idk_dpo(model: nn.Module, start: nn.Module, forget: Rows, other: Rows) -> Tensor:
    ratios = tuple(rows.log_p(model) - rows.log_p(start) for rows in (other, forget))
    return 2 / BETA * literal.dpo(ratios, BETA)


def rmu(model: nn.Module, start: nn.Module, forget: Rows, other: Rows) -> Tensor:
    states = forget.hidden(model)
    direction = torch.rand(32, generator=torch.Generator().manual_seed(SEED))
    target = (direction / direction.norm() * STEERING).to(states.dtype)
    squares: Tensor = (states - target).square()
    return squares.mean(-1)


METHODS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "unilogit": (of_tokens(literal.TOKEN["unilogit"]), {}),
    "npo": (npo, {"method_parameters": {"beta": BETA}}),
    "undial": (undial, {"method_parameters": {"gamma": GAMMA}, "retain_loss": "kl"}),
    "idk_dpo": (idk_dpo, {}),
    "rmu": (rmu, {"method_parameters": {"layer": LAYER, "steering": STEERING}}),
    # With rows of its own in the place of refusals.
    "altpo": (idk_dpo, {"method_parameters": {"beta": BETA}}),
    "task_vector": (
        of_tokens(literal.TOKEN["cross_entropy"]),
        {"method_parameters": {"scale": SCALE}},
    ),
    "ceu": (of_tokens(literal.TOKEN["ceu"]), {"retain_loss": "none"}),
}
EVERYWHERE = ("unilogit", "npo", "undial", "idk_dpo", "rmu")
"""Methods that are tried with every adapter."""


def cross_entropy(model: nn.Module, start: nn.Module, rows: Rows) -> Tensor:
    z, y = rows.labelled(model)
    return F.cross_entropy(z, y, reduction="none")


def kl(model: nn.Module, start: nn.Module, rows: Rows) -> Tensor:
    return literal.kl_to_teacher(*rows.labelled(model, start))


def hidden_states(model: nn.Module, start: nn.Module, rows: Rows) -> Tensor:
    return (rows.hidden(model) - rows.hidden(start)).square().mean(-1)


KEPT = {each.__name__: each for each in (cross_entropy, kl, hidden_states)}
"""By the name of the retain loss; there is one more, that of no rows."""

Window = Sequence[dict[str, Tensor]]
"""The batches of one step."""


def literal_losses(
    model: nn.Module, start: nn.Module, window: Window, args: UnlearningArguments
) -> list[Tensor]:
    """The forget loss of a step, and the retain loss if there is one."""
    parts: list[list[Tensor]] = [[], []]
    members = 2 if args.method in ("idk_dpo", "altpo") else 1
    for batch in window:
        n, read = len(batch["labels"]) // (members + args.retain_rows), dict[nn.Module, Any]()
        groups = [slice(n * at, n * (at + 1)) for at in range(members + args.retain_rows)]
        other, forget, retain = (
            Rows(batch, groups[at], read) for at in (0, members - 1, len(groups) - 1)
        )
        parts[0].append(METHODS[args.method][0](model, start, forget, other))
        if args.retain_loss in KEPT:
            parts[1].append(KEPT[args.retain_loss](model, start, retain))
    return [torch.cat(each).mean() for each in parts if each]


def literal_loop(model: nn.Module, windows: Sequence[Window], args: UnlearningArguments) -> Tensor:
    """Steps of SGD over whole logits or hidden states; each step's losses, `[steps, 1 or 2]`."""
    base: nn.Module = with_adapter("none", num_hidden_layers=3)
    start = base.to(next(model.parameters()).dtype).requires_grad_(False)
    seen = []
    for window in windows:
        model.zero_grad()
        losses = literal_losses(model, start, window, args)
        weights = (args.forget_weight, args.retain_weight)
        sum(w * x for w, x in zip(weights, losses, strict=False)).backward()  # type: ignore[union-attr]
        seen.append(torch.stack(losses).detach())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(args.learning_rate * parameter.grad)
    if args.method == "task_vector":
        with torch.no_grad():
            for parameter, before in zip(model.parameters(), start.parameters(), strict=True):
                parameter.copy_(before - SCALE * (parameter - before))
    return torch.stack(seen)


# ---- the Trainer ---------------------------------------------------------------------------------


def trainer_of(
    model: nn.Module, args: UnlearningArguments, windows: dict[int, list[dict[str, Tensor]]]
) -> UnlearningTrainer:
    """One that notes the batches of each step."""
    refusals = encoded([*REFUSALS, *REFUSALS]) if args.resolved_method().needs_refusals else ()
    trainer = make_trainer(model, args, forget=encoded([*FORGET, *FORGET]), refusals=refusals)
    compute = trainer.compute_loss

    def noted(model: nn.Module, inputs: dict[str, Tensor], *more: Any, **others: Any) -> Tensor:
        batch = {name: value.clone() for name, value in inputs.items()}
        windows[trainer.state.global_step].append(batch)
        return compute(model, inputs, *more, **others)

    trainer.compute_loss = noted  # type: ignore[method-assign]
    return trainer


def reached(name: str, method: str) -> bool:
    """Whether a parameter gets a gradient: RMU sees nothing above its layer."""
    below = ("embed_tokens", *(f"layers.{layer}." for layer in range(LAYER + 1)))
    return method != "rmu" or any(each in name for each in below)


CASES = [
    (method, kind, accumulation, resumed)
    for method, kind, accumulation, resumed in itertools.product(
        METHODS, ADAPTERS, (1, 4), (False, True)
    )
    if kind == "none" or method in EVERYWHERE
]


@pytest.mark.parametrize(("method", "kind", "accumulation", "resumed"), CASES)
def test_twenty_steps_are_the_literal_loop(
    tmp_path: Path, method: str, kind: str, accumulation: int, resumed: bool
) -> None:
    """Windows of four batches and of what is left of an epoch, of unequal numbers of tokens."""
    size = 1 if accumulation > 1 else 3
    args = arguments(
        tmp_path,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=STEPS // 2,
        method=method,
        learning_rate=0.01,
        data_seed=SEED,
        save_strategy="steps",
        save_steps=BREAK,
        **literal.STEP,
        **METHODS[method][1],
    )
    model = with_adapter(kind, num_hidden_layers=3)
    start = {name: value.clone() for name, value in learning(model).items()}
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    windows = defaultdict[int, list[dict[str, Tensor]]](list)
    trainer = trainer_of(model, args, windows)
    if kind != "none" and method == "undial":
        assert isinstance(trainer._teacher, WithoutAdapters)
    if resumed:
        trainer.add_callback(InterruptAt(BREAK + 1))
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        windows[BREAK].clear()  # which is taken once more
        model = with_adapter(kind, num_hidden_layers=3)
        trainer = trainer_of(model, args, windows)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{BREAK}"))
    else:
        trainer.train()
    assert trainer.state.global_step == STEPS
    taken = [windows[step] for step in range(STEPS)]
    sizes = [1, 1] if accumulation == 1 else [4, 2]
    assert [len(window) for window in taken] == STEPS // 2 * sizes
    theirs, right = (literal_loop(each, taken, args) for each in (plain, exact))
    names = ("forget_loss", "retain_loss")[: right.shape[1]]
    ours = torch.tensor([logged(trainer, name) for name in names]).T
    # The errors of a course are those of its first steps, grown since: few are independent.
    assert_within_budget(ours, right, theirs, smallest_scale=1.0, independent=4)
    assert (logged(trainer, "retain_loss") == []) == (args.retain_loss == "none")
    found = learning(model)
    assert len(found) >= 6
    for name, value in found.items():
        moved = not torch.equal(value, start[name])
        # A starts with the gradient that B has made by then, which may round to nothing.
        assert moved == reached(name, method) or (not moved and "lora_A" in name), name
    assert_tensors_within_budget(found, learning(exact), learning(plain))
