"""Models, tokenizers and rows that belong together, whole or not at all."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unilogit_kernels.unlearning.data import Encoding, Example, Row, padding_id
from unilogit_kernels.unlearning.errors import RunError, reading
from unilogit_kernels.unlearning.evaluation import token_log_probabilities

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes the weights may be trained in."""

_NAMED = 3
"""Weights that a message names; it counts the others."""


def load_encoding(
    model: str,
    max_length: int,
    chat_template: bool | None,
    template_arguments: dict[str, Any],
    block_stride: int | None = None,
) -> Encoding:
    """A model's tokenizer, and how it is to encode rows.

    Args:
        model: directory or Hub id.
        max_length: see `Encoding`.
        chat_template: see `Encoding`.
        template_arguments: see `Encoding`.
        block_stride: see `Encoding`.

    Raises:
        RunError: there is no tokenizer, it cannot be read, or it has no chat template to use.
    """
    _check_exists(model)
    with reading(f"no tokenizer could be loaded from {model!r}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
        tokenizer("a")
    encoding = Encoding(
        tokenizer,
        max_length,
        chat_template,
        template_arguments=template_arguments,
        block_stride=block_stride,
    )
    if encoding.uses_chat_template:
        if tokenizer.chat_template is None:
            raise RunError(
                f"the tokenizer of {model!r} has no chat template: leave out --chat-template"
            )
        with reading(f"the tokenizer of {model!r} has no chat template to use"):
            tokenizer.get_chat_template()
    return encoding


def load_model(
    model: str,
    dtype: str,
    *,
    device: torch.device | None = None,
    allow_missing: bool = False,
    note: Callable[[str], None] = print,
) -> PreTrainedModel:
    """A causal LM, whose every weight comes from where it is loaded from, and is finite.

    Args:
        model: directory or Hub id.
        dtype: a key of `DTYPES`.
        device: where to; the accelerator where there is one, if None.
        allow_missing: accept weights that the model has and its files have not, which are then
            random, and weights that the files have and the model has not.
        note: is told of these.

    Raises:
        RunError: it cannot be loaded, weights are missing, left over, of another shape or not
            finite, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise RunError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    _check_exists(model)
    # What is missing is drawn at random: in every process and on every day the same.
    with reading(f"no causal LM could be loaded from {model!r}"), torch.random.fork_rng():
        torch.manual_seed(0)
        load: Any = AutoModelForCausalLM.from_pretrained
        with _without_load_report():
            loaded, found = load(
                model, dtype=DTYPES[dtype], output_loading_info=True, ignore_mismatched_sizes=True
            )
        _check_weights(model, loaded, found, allow_missing, note)
        if device is None:
            device = torch.accelerator.current_accelerator() or torch.device("cpu")
        loaded = loaded.to(device)
        not_finite = [name for name, w in loaded.named_parameters() if not _is_finite(w)]
        if not_finite:
            raise RunError(f"weights of {model!r} are NaN or infinite: {listed(not_finite)}")
    result: PreTrainedModel = loaded
    return result


def _check_exists(model: str) -> None:
    """See that what can only be a folder is one: transformers would look for it on the Hub."""
    # No name is too long for this question, unlike that of `Path`.
    if os.path.isdir(model):  # noqa: PTH112
        return
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise RunError(
            f"model {model!r}: there is no such folder, and no model on the Hub has such a name"
        ) from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """What transformers prints as a table of many lines, `_check_weights` says in one."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def _is_finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or weight.numel() == 0:
        return True
    if weight.itemsize == 1:
        weight = weight.float()  # torch finds no minimum of float8.
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(weight.detach()))


def _check_weights(
    model: str,
    loaded: nn.Module,
    found: dict[str, Any],
    allow_missing: bool,
    note: Callable[[str], None],
) -> None:
    """What was found, of tied weights and buffers as transformers knows them, is all there is."""
    mismatched = [
        f"{name} {list(saved)} instead of {list(expected)}"
        for name, saved, expected in found["mismatched_keys"]
    ]
    if mismatched:
        raise RunError(
            f"weights of {model!r} have not the shapes that its config.json says: "
            f"{listed(mismatched)}"
        )
    if found["error_msgs"]:
        raise RunError(f"weights of {model!r} cannot be read: {listed(found['error_msgs'])}")
    for kind, meaning in (
        ("missing", "are random then"),
        ("unexpected", "its config.json has no use for"),
    ):
        names = found[f"{kind}_keys"]
        if names and not allow_missing:
            raise RunError(
                f"{kind} weights of {model!r}, which {meaning}: {listed(names)}; "
                "--allow-missing-weights takes the model as it is"
            )
        if names:
            note(f"{kind} weights of {model!r}, which {meaning}: {listed(names)}")


def listed(names: Collection[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(sorted(names)[:_NAMED])
    more = len(names) - _NAMED
    return f"{shown} and {more} more ({len(names)} in all)" if more > 0 else shown


def encode(encoding: Encoding, rows: Sequence[Row]) -> list[Example]:
    """Every row as an example, and every text that is too long for one as several.

    Raises:
        RunError: the tokenizer or its chat template fails on one; the message names it.
        DataError: see `Encoding.example`.
    """
    examples: list[Example] = []
    for row in rows:
        with reading(f"{row.source}: the tokenizer or its chat template fails on this row"):
            examples += encoding.blocks(row)
    return examples


def check_fits(
    model: PreTrainedModel, encoding: Encoding, sets: Sequence[Sequence[Example]]
) -> None:
    """See that a model takes the rows, and makes numbers of the longest of each set.

    Args:
        model: loaded.
        encoding: of the rows.
        sets: encoded rows; empty sets are passed over.

    Raises:
        RunError: a token has no embedding, a row is longer than the model's positions, or the
            model fails on a row or makes NaN of it.
        UnsupportedHeadError: see `fused_loss`.
    """
    examples = [example for each in sets for example in each]
    pad_id = padding_id(encoding.tokenizer)
    weight: Any = model.get_input_embeddings().weight
    embeddings = weight.shape[0]
    largest = max(pad_id, *(max(example.input_ids) for example in examples))
    if largest >= embeddings:
        raise RunError(
            f"the tokenizer makes token {largest} of these rows, but the model has embeddings for "
            f"{embeddings} tokens: they do not belong together"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = max(len(example.input_ids) for example in examples)
    if isinstance(positions, int) and length > positions:
        raise RunError(
            f"rows have up to {length} tokens, and the model positions for {positions}: pass "
            f"--max-length {positions}"
        )
    for each in filter(None, sets):
        with reading("the model fails on these rows"):
            longest = max(each, key=lambda example: len(example.input_ids))
            (log_p,) = token_log_probabilities(
                model, [longest.features()], pad_id=pad_id, batch_size=1
            )
            if not bool(log_p.isfinite().all()):
                raise RunError("the model's probabilities of these rows are not finite")
