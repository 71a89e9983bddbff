"""`fused_loss` and its gradients, for every causal LM class of the installed transformers.

`python -m tests.huggingface.sweep` prints the outcomes as the table of docs/unlearning.md.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import sys
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from tests.huggingface import causal_models
from tests.huggingface.model_errors import (
    assert_same_gradients,
    assert_same_loss,
    assert_same_losses,
)
from unilogit_kernels import reference
from unilogit_kernels.huggingface.head import UnsupportedHeadError, fused_loss, verify_head

Given = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one class.

    Attributes:
        kind: "equal", "refused", "not built" or "wrong".
        reason: why, for all but the first.
    """

    kind: str
    reason: str = ""


def outcome(name: str) -> Outcome:
    """Build the class small, and compare with its own logits in float32 and bfloat16."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = causal_models.build(name)
        except Exception as error:  # whatever a class raises that cannot be built from its config
            return Outcome("not built", _line(error))
        given = batch(model)
        try:
            with torch.no_grad():
                fused_loss(model, **given)
        except UnsupportedHeadError as error:
            return Outcome("refused", _line(error))
        except Exception as error:
            failed = _fails_by_itself(model, given)
            return failed or Outcome("wrong", f"{type(error).__name__}: {_line(error)}")
        try:
            return Outcome("equal", _compare(model, given))
        except Exception as error:  # anything else is what the sweep is looking for
            failed = _fails_by_itself(model, given)
            return failed or Outcome("wrong", f"{type(error).__name__}: {_line(error)}")


def _fails_by_itself(model: nn.Module, given: Given) -> Outcome | None:
    inputs = {name: given[name] for name in given if name != "labels"}
    try:
        model(**inputs, use_cache=False).logits.float().sum().backward()
    except Exception as error:
        return Outcome("not built", f"its own forward or backward fails: {_line(error)}")
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def batch(model: nn.Module) -> Given:
    """Two sequences, the second of them padded if the model takes a mask."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(6, causal_models.VOCAB - 10, (2, 7), generator=draw)
    labels = ids.clone()
    labels[:, :2] = -100
    given: Given = {"input_ids": ids, "labels": labels}
    if "attention_mask" in inspect.signature(type(model).forward).parameters:
        given["attention_mask"] = torch.ones_like(ids)
        given["attention_mask"][1, 5:] = 0
        labels[1, 5:] = -100
    return given


class _InFloat64(TorchFunctionMode):
    """An oracle without the casts to float32 that models have in their code."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        kwargs = {
            key: torch.float64 if value is torch.float32 else value
            for key, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)

    def __enter__(self) -> Self:
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)


def _compare(model: transformers.PreTrainedModel, given: Given) -> str:
    """Raise if anything differs; what could not be compared, else."""
    with torch.no_grad():
        # So that a cap or a factor shows, and no probability underflows.
        logits = _logits(model, given)
        model.get_output_embeddings().weight.mul_(3 / logits.std())
    verify_head(model)
    _compare_own_loss(model, given)
    for dtype in (torch.float32, torch.bfloat16):
        cast: nn.Module = nn.Module.to(copy.deepcopy(model), dtype)
        exact = copy.deepcopy(cast).double()
        try:
            losses = [_unilogit(cast, given)]
        except RuntimeError as error:
            if dtype == torch.float32:
                raise
            return f"in float32; its own forward fails in bfloat16: {_line(error)}"
        wanted = [_gradients(cast, losses[0].mean())]
        with _InFloat64():
            losses.insert(0, _unilogit(exact, given))
        wanted.insert(0, _gradients(exact, losses[0].mean()))
        found = fused_loss(cast, **given, reduction="none")
        found = found[:, :-1][given["labels"][:, 1:] != -100]
        assert_same_losses(found, *losses)
        assert_same_gradients(_gradients(cast, fused_loss(cast, **given)), *wanted)
    return ""


def _logits(model: nn.Module, given: Given, **options: Any) -> Tensor:
    inputs = {name: given[name] for name in given if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False, **options).logits
    return logits


def _unilogit(model: nn.Module, given: Given) -> Tensor:
    """The literal loss of each counted token."""
    labels = given["labels"][:, 1:]
    losses = reference.unilogit_loss(_logits(model, given)[:, :-1], labels, reduction="none")
    return losses.view(labels.shape)[labels != -100]


def _compare_own_loss(model: transformers.PreTrainedModel, given: Given) -> None:
    """The model adds nothing to a cross-entropy, but for a router's loss, which is added."""
    configs = (model.config, model.config.get_text_config())
    with torch.no_grad():
        logits, labels = _logits(model, given), given["labels"]
        shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        fused = fused_loss(model, objective="cross_entropy", **given)
        assert_same_loss(fused, shifted, shifted)
        try:
            own = model(**given, use_cache=False).loss
        except ValueError:
            return  # of a model that takes labels of another shape
        # Decoders of encoders take labels that are shifted already.
        unshifted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        distance = torch.stack([shifted - own, unshifted - own]).abs().min()
        assert_same_loss(own + distance, own, own)
        if not any(hasattr(config, "output_router_logits") for config in configs):
            return
        try:
            own = model(**given, use_cache=False, output_router_logits=True).loss
        except (IndexError, TypeError):
            return  # of a model that only has the option in its config
        fused = fused_loss(model, objective="cross_entropy", output_router_logits=True, **given)
        assert_same_loss(fused, own, own)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def table(outcomes: dict[str, Outcome]) -> str:
    """The outcomes as Markdown: a line for each kind and reason."""
    groups: dict[Outcome, list[str]] = defaultdict(list)
    for name, found in outcomes.items():
        groups[found].append(name)
    lines = ["| outcome | number | classes |", "|---|---|---|"]
    for found in sorted(groups, key=lambda each: (each.kind, each.reason)):
        names = ", ".join(groups[found])
        if len(groups[found]) > 8:
            names = f"<details><summary>all of them</summary>{names}</details>"
        reason = (
            f": {textwrap.shorten(found.reason, 120, placeholder=' ...')}" if found.reason else ""
        )
        lines.append(f"| {found.kind} | {len(groups[found])} | {names}{reason} |".replace("`", ""))
    return "\n".join(lines)


def main(names: Iterable[str]) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(table({name: outcome(name) for name in names or causal_models.names()}))


if __name__ == "__main__":
    main(sys.argv[1:])
