"""Rows as token ids and labels, for any tokenizer and chat template.

The ids of a row decode to its prompt and completion, and the end that a template writes; the
labels decode to the completion and the end; a prompt's ids are the same in training and in
generation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unilogit_kernels.unlearning.boundaries import Writer, Written
from unilogit_kernels.unlearning.rows import DataError, Row
from unilogit_kernels.unlearning.thoughts import opens_thought

IGNORED = -100
"""Label of tokens that carry no loss, as Hugging Face models take it."""


Features = dict[str, Tensor]
"""One example, or a batch of them, by the names the model's forward has for its arguments."""

_SENTINEL = "unilogitanswer"


@dataclass(frozen=True)
class Example:
    """One row, encoded.

    Attributes:
        input_ids: token ids.
        labels: of the same length; -100 where a token carries no loss. Not shifted.
        truncated: whether the row was longer than `max_length`.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool

    def features(self) -> Features:
        """What a model is fed."""
        return {
            "input_ids": torch.tensor(self.input_ids),
            "labels": torch.tensor(self.labels),
        }


@dataclass(frozen=True)
class _TurnEnd:
    """What a chat template writes after an answer, to the first token that is no text.

    Without such a token, all but the white space at the end; empty if that is all there is.
    """

    text: str
    token: int | None


@dataclass(frozen=True)
class Encoding:
    """Decides how a row becomes token ids.

    Attributes:
        tokenizer: of the model.
        max_length: rows are cut after so many tokens.
        chat_template: put prompts through the tokenizer's chat template, as one user message.
            None: where there is one. `{"text"}` rows are always taken as they are.
        append_eos: end each row, which then learns its end too: as the chat template ends an
            answer, or with the end-of-sequence token. A row that holds its end gets no other.
        template_arguments: what the chat template is given besides the messages, such as
            `{"enable_thinking": False}`.
        block_stride: tokens from the start of a block to that of the next, where `blocks` cuts a
            text; None: `max_length - 1`, so that no token is without one that predicts it.

    Raises:
        DataError: template arguments without a template that takes them, or a stride that is not
            between 1 and `max_length`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 512
    chat_template: bool | None = None
    append_eos: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    block_stride: int | None = None

    def __post_init__(self) -> None:
        if self.block_stride is not None and not 1 <= self.block_stride <= self.max_length:
            raise DataError(
                f"block_stride must be from 1 to max_length, which is {self.max_length}, got "
                f"{self.block_stride}"
            )
        if not self.template_arguments:
            return
        if not self.uses_chat_template:
            raise DataError("template arguments are given, but no prompt goes through a template")
        template = str(self.tokenizer.chat_template)
        for name in self.template_arguments:
            if re.search(rf"\b{re.escape(name)}\b", template) is None:
                raise DataError(f"the chat template knows no argument {name!r}")

    @property
    def uses_chat_template(self) -> bool:
        """Whether prompts go through the chat template."""
        if self.chat_template is None:
            return self.tokenizer.chat_template is not None
        return self.chat_template

    def prompt_ids(self, row: Row) -> list[int]:
        """The token ids that an answer to the row continues.

        Raises:
            DataError: the chat template fails, or the tokenizer cannot write the prompt.
        """
        return self._prompt(self._as_written(row)).ids

    def example(self, row: Row) -> Example:
        """The row as token ids and labels; labels are -100 but for the completion.

        Raises:
            DataError: no token of the completion is left within `max_length`, the tokenizer cannot
                write the row, or the chat template fails or opens a thought.
        """
        ids, labels = self._whole(row)
        prompt, whole = labels.count(IGNORED), len(ids)
        truncated = whole > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise DataError(
                f"{row.source}: of {whole} tokens, {prompt} of them the prompt's, none "
                f"carries loss within the {self.max_length} of max_length"
            )
        return Example(ids, labels, truncated)

    def blocks(self, row: Row) -> list[Example]:
        """The row, cut into blocks of `max_length` tokens where it is a longer text.

        Each block begins `block_stride` tokens after the one before. Tokens that it shares with
        that one are context and carry no loss, so each token of the text carries loss once, but
        for the first. Where blocks share nothing (`block_stride == max_length`), the first token
        of each has none either: nothing precedes it. A row with a prompt is one example, cut as
        by `example`.

        Raises:
            DataError: see `example`.
        """
        if row.prompt:
            return [self.example(row)]
        ids, labels = self._whole(row)
        stride = self.block_stride or max(1, self.max_length - 1)
        found: list[Example] = []
        seen = 0
        for start in range(0, len(ids), stride):
            if seen >= len(ids):
                break
            end = min(start + self.max_length, len(ids))
            new = max(seen, start + 1) - start
            block = [IGNORED] * new + labels[start + new : end]
            if any(label != IGNORED for label in block):
                found.append(Example(ids[start:end], block, False))
            seen = end
        return found or [self.example(row)]

    def _whole(self, row: Row) -> tuple[list[int], list[int]]:
        """Ids and labels of a row, however long."""
        row = self._as_written(row)
        before = self._prompt(row)
        if opens_thought(self._answer_start(row, before.text), row.completion):
            raise DataError(
                f"{row.source}: the chat template opens a thought that the completion would be "
                'learned as; pass it an argument against that, such as "enable_thinking=false", '
                "close the thought in the completion, or do without the template"
            )
        whole = self._writer.go_on(before, row.completion, row.source)
        if self.append_eos:
            whole = self._ended(whole, row)
        prompt = len(before.ids)
        labels = [IGNORED] * prompt + whole.ids[prompt:]
        if prompt == 0:
            labels[:1] = [IGNORED]  # Nothing precedes the first token, so nothing predicts it.
        return whole.ids, labels

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Every row as an example.

        Raises:
            DataError: see `example`.
        """
        return [self.example(row) for row in rows]

    def answer(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out, after a prompt's."""
        return self._writer.read_on(prompt, ids)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's end of sequence and the template's of turn."""
        ends = (self.tokenizer.eos_token_id, self._turn_end.token)
        return frozenset(token for token in ends if isinstance(token, int))

    @property
    def end_strings(self) -> tuple[str, ...]:
        """Texts that end an answer: the template's end of turn, where that is no token."""
        text, token = self._turn_end.text.strip(), self._turn_end.token
        return (text,) if text and token is None else ()

    def answer_start(self, row: Row) -> str:
        """What the chat template writes between a row's prompt and its answer."""
        row = self._as_written(row)
        return self._answer_start(row, self._prompt_text(row))

    def _answer_start(self, row: Row, text: str) -> str:
        said = row.prompt.strip()
        return text.rpartition(said)[2] if self._through_template(row) and said else ""

    @cached_property
    def _turn_end(self) -> _TurnEnd:
        if not self.uses_chat_template:
            return _TurnEnd("", None)
        answer = {"role": "assistant", "content": _SENTINEL}
        text = self._render([{"role": "user", "content": "?"}, answer], False)
        if _SENTINEL not in text:
            raise DataError("the chat template does not write the answers it is given")
        end = text.rpartition(_SENTINEL)[2]
        found = (
            (end.find(written) + len(written), token)
            for written, token in self._writer.markers.items()
            if written in end
        )
        length, token = min(found, default=(len(end.rstrip()), None))
        return _TurnEnd(end[:length], token)

    @cached_property
    def _writer(self) -> Writer:
        return Writer(self.tokenizer)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    **self.template_arguments,
                )
            )
        except Exception as error:  # A template is a program of somebody else's.
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"the tokenizer's chat template fails ({reason})") from error

    def _through_template(self, row: Row) -> bool:
        return self.uses_chat_template and bool(row.prompt)

    def _as_written(self, row: Row) -> Row:
        """The row with its frame, where no chat template frames it."""
        return row if self._through_template(row) else row.unframed()

    def _prompt_text(self, row: Row) -> str:
        if not self._through_template(row):
            if row.history:
                raise DataError(
                    f"{row.source}: the row has messages before its prompt, which only a chat "
                    "template can write, and there is none in use"
                )
            return row.prompt + row.lead
        turns = [*row.history, ("user", row.prompt)]
        try:
            text = self._render([{"role": role, "content": said} for role, said in turns], True)
        except DataError as error:
            raise DataError(f"{row.source}: {error}") from error
        return text + row.lead

    def _prompt(self, row: Row) -> Written:
        # A template writes the start of a text itself.
        special = not self._through_template(row)
        return self._writer.begin(self._prompt_text(row), row.source, special=special)

    def _ended(self, whole: Written, row: Row) -> Written:
        end = self._turn_end.text if row.prompt else ""
        eos, eos_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        ends = [str(text) for text in (end.strip(), eos) if text]
        if row.completion.rstrip().endswith(tuple(ends)):
            return whole
        if end:
            return self._writer.go_on(whole, end, f"{row.source}, as the template ends it")
        if eos_id is None:
            return whole
        return Written(whole.text, [*whole.ids, eos_id], whole.special)


def parse_template_arguments(given: Sequence[str]) -> dict[str, Any]:
    """What a chat template is given, from `NAME=VALUE`; the value is JSON, or else a string.

    Raises:
        DataError: no name or no `=`, or a name twice.

    Example:
        >>> parse_template_arguments(["enable_thinking=false", "date_string=26 Jul 2024"])
        {'enable_thinking': False, 'date_string': '26 Jul 2024'}
    """
    found: dict[str, Any] = {}
    for item in given:
        name, separator, value = item.partition("=")
        if not separator or not name.isidentifier() or name in found:
            raise DataError(f"a template argument is NAME=VALUE, each name once, got {item!r}")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
