"""Rows of text, read from files and checked.

A row is `{"prompt": ..., "completion": ...}`, where only the completion carries loss, or
`{"text": ...}`, where every token but the first does. `{"question": ..., "answer": ...}` (as in
TOFU), questions of multiple choice, and `{"messages": [...]}` are rows, too. A row may carry a
`"key"`: the part of the completion that an answer must contain to count as recalled (see `recall`).
"""

from __future__ import annotations

import dataclasses
import reprlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilogit_kernels.unlearning.recall import fold
from unilogit_kernels.unlearning.records import (
    DataError,
    Record,
    check_characters,
    read_lines,
    read_records,
)

__all__ = ["DataError", "Row", "read_refusals", "read_rows", "rows_of"]

QUESTION = "Question: {}\nAnswer:"
"""How a question is written where it goes through no chat template: OpenUnlearning's way."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """One line of a data file.

    Attributes:
        prompt: what the completion continues; empty for a `{"text"}` row.
        completion: the text that carries the loss.
        key: what an answer must contain to count as recalled, or None.
        source: file and line, for messages.
        paraphrase: the completion in other words, or None.
        paraphrased_prompt: the prompt in other words, or None.
        wrong: completions of the same kind that are wrong.
        answers: further completions that are right.
        choices: completions to choose from, of a question of multiple choice.
        choice: the position of the right one among them, or None.
        id: names the row within its set; empty where it has no name of its own.
        history: the messages before the prompt, as pairs of role and content; they need a chat
            template.
        frame: how the prompt is written where it goes through no chat template, with `{}` in its
            place; completions then follow after a space. Empty: as it is.
        lead: what an answer is begun with, in training and in generation; it carries no loss.
        alternates: what to answer instead, for method `altpo`.
    """

    prompt: str
    completion: str
    key: str | None
    source: str
    paraphrase: str | None = None
    paraphrased_prompt: str | None = None
    wrong: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    choice: int | None = None
    id: str = ""
    history: tuple[tuple[str, str], ...] = ()
    frame: str = ""
    lead: str = ""
    alternates: tuple[str, ...] = ()

    def unframed(self) -> Row:
        """The row as it is written where it goes through no chat template."""
        if not self.frame or not self.prompt:
            return self
        completion = self.completion if self.completion[:1].isspace() else f" {self.completion}"
        prompt = self.frame.replace("{}", self.prompt)
        return dataclasses.replace(self, prompt=prompt, completion=completion, frame="")


def read_rows(path: str | Path) -> list[Row]:
    """Read a file of rows: JSONL, a JSON array or, with the package `pyarrow`, parquet.

    Args:
        path: of the file, see `records.read_records`.

    Returns:
        The rows, in order; at least one.

    Raises:
        DataError: the file cannot be read, holds no rows, or holds what is no row.
    """
    return rows_of(read_records(path), path)


def rows_of(records: Sequence[Record], path: str | Path) -> list[Row]:
    """Records as rows.

    Args:
        records: by field names, see docs/unlearning.md; a string is a text.
        path: of their file, for messages.

    Raises:
        DataError: there are none, or one is no row.
    """
    rows = [row for record in records for row in _parse(record.value, record.source)]
    if not rows:
        raise DataError(f"{path}: holds no rows")
    return rows


def read_refusals(path: str | Path, forget: Sequence[Row]) -> list[Row]:
    """What to answer instead: a refusal for the prompt of each row to forget, taken in turn.

    Args:
        path: a UTF-8 text file with one refusal a line; blank lines are skipped.
        forget: the rows to forget, all with a prompt.

    Raises:
        DataError: no such file, not UTF-8, no lines, or a row without a prompt.
    """
    refusals = []
    for line, source in read_lines(path):
        check_characters(line, f"{source}: the refusal")
        refusals.append(line.strip())
    if not refusals:
        raise DataError(f"{path}: holds no refusals")
    for row in forget:
        if not row.prompt:
            raise DataError(f"{row.source}: a row without a prompt cannot be refused")
    rows = []
    for number, row in enumerate(forget):
        refusal = refusals[number % len(refusals)]
        # As the answer it stands for: most follow the prompt after a space.
        space = row.completion[: len(row.completion) - len(row.completion.lstrip())]
        given = Row(row.prompt, space + refusal, None, f"{path} for {row.source}")
        same: dict[str, Any] = {"history": row.history, "frame": row.frame, "lead": row.lead}
        rows.append(dataclasses.replace(given, **same))
    return rows


def multiple_choice_prompt(question: str, choices: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """A question of multiple choice with its letters, and the completions to choose from.

    Returns:
        The prompt, as lm-evaluation-harness writes MMLU and WMDP; and `" A"`, `" B"`...

    Raises:
        ValueError: not between 2 and 26 choices.

    Example:
        >>> multiple_choice_prompt("Which is a colour?", ["Red", "Dog"])
        ('Which is a colour?\\nA. Red\\nB. Dog\\nAnswer:', (' A', ' B'))
    """
    letters = string.ascii_uppercase[: len(choices)]
    if not 2 <= len(choices) == len(letters):
        raise ValueError(f"a question offers 2 to 26 choices, got {len(choices)}")
    offered = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    prompt = "\n".join([question.strip(), *offered, "Answer:"])
    return prompt, tuple(f" {letter}" for letter in letters)


def _parse(record: Any, source: str) -> list[Row]:
    if isinstance(record, str):
        record = {"text": record}
    if not isinstance(record, dict):
        raise DataError(f"{source}: expected a JSON object, got {type(record).__name__}")
    fields = _Fields(record, source)
    shapes = [shape for names, shape in _SHAPES.items() if any(name in record for name in names)]
    if len(shapes) != 1:
        raise DataError(
            f'{source}: expected the fields "messages", "question" and "answer", "prompt" and '
            f'"completion", or "text" alone, got {reprlib.repr(sorted(record))}'
        )
    return shapes[0](fields)


class _Fields:
    """The fields of one record, checked as they are taken."""

    def __init__(self, record: Mapping[str, Any], source: str) -> None:
        self.record, self.source = record, source

    def has(self, name: str) -> bool:
        """Whether the record has the field, and not null in it."""
        return self.record.get(name) is not None

    def text(self, name: str, *, may_be_empty: bool = False) -> str:
        """A string that is there."""
        if name not in self.record:
            raise DataError(f'{self.source}: field "{name}" is missing')
        return self._string(self.record[name], f'field "{name}"', may_be_empty)

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings, or one string; none where the field is not there."""
        if not self.has(name):
            return ()
        value = self.record[name]
        values = value if isinstance(value, list) else [value]
        return tuple(
            self._string(item, f'field "{name}", item {number}', False)
            for number, item in enumerate(values, start=1)
        )

    def optional(self, *names: str) -> str | None:
        """The first of the fields that is there."""
        return next((self.text(name) for name in names if self.has(name)), None)

    def position(self, name: str, size: int) -> int:
        """The position of one of `size` things."""
        value = self.record.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise DataError(
                f'{self.source}: field "{name}" must be the position of a choice, from 0 to '
                f"{size - 1}, got {reprlib.repr(value)}"
            )
        return value

    def common(self) -> dict[str, Any]:
        """What every row may have."""
        key = self.optional("key")
        if key is not None and not fold(key):
            raise DataError(f'{self.source}: field "key" has no visible character')
        name = self.record.get("id")
        if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
            kind = type(name).__name__
            raise DataError(f'{self.source}: field "id" must be a string or an integer, got {kind}')
        return {
            "key": key,
            "source": self.source,
            "paraphrase": self.optional("paraphrase", "paraphrased_answer"),
            "paraphrased_prompt": self.optional("paraphrased_prompt", "paraphrased_question"),
            "wrong": self.texts("wrong" if self.has("wrong") else "perturbed_answer"),
            "id": "" if name is None else str(name),
            "alternates": self.texts("alternate"),
        }

    def _string(self, value: Any, what: str, may_be_empty: bool) -> str:
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"{self.source}: {what} must be a string, got {kind}")
        check_characters(value, f"{self.source}: {what}")
        if not may_be_empty and not value.strip():
            raise DataError(f"{self.source}: {what} is empty")
        return value


def _text(fields: _Fields) -> list[Row]:
    return [Row("", fields.text("text"), **fields.common())]


def _prompt_and_completion(fields: _Fields) -> list[Row]:
    prompt = fields.text("prompt", may_be_empty=True)
    completion, choices = fields.text("completion"), fields.texts("choices")
    choice = None
    if choices:
        choice = fields.position("choice", len(choices))
        if choices[choice] != completion:
            raise DataError(
                f'{fields.source}: field "choice" is {choice}, but the completion is another one '
                f"than {reprlib.repr(choices[choice])}"
            )
    more = {"answers": fields.texts("answers"), "choices": choices, "choice": choice}
    lead = fields.optional("lead") or ""
    return [Row(prompt, completion, **{**fields.common(), **more, "lead": lead})]


def _question_and_answer(fields: _Fields) -> list[Row]:
    question = fields.text("question")
    if fields.has("choices"):
        choices = fields.texts("choices")
        choice = fields.position("answer", len(choices))
        try:
            prompt, letters = multiple_choice_prompt(question, choices)
        except ValueError as error:
            raise DataError(f"{fields.source}: {error}") from error
        offered = {"choices": letters, "choice": choice}
        return [Row(prompt, letters[choice], **{**fields.common(), **offered})]
    if "answer" not in fields.record:
        raise DataError(f'{fields.source}: field "answer" is missing')
    answers = fields.texts("answer")
    if not answers:
        raise DataError(f'{fields.source}: field "answer" is empty')
    more = {"answers": answers[1:], "frame": QUESTION}
    return [Row(question, answers[0], **{**fields.common(), **more})]


def _messages(fields: _Fields) -> list[Row]:
    """One row for each of the assistant's messages: it continues those before it."""
    given = fields.record["messages"]
    if not isinstance(given, list):
        kind = type(given).__name__
        raise DataError(f'{fields.source}: field "messages" must be a list, got {kind}')
    turns: list[tuple[str, str]] = []
    for number, message in enumerate(given, start=1):
        source = f"{fields.source}, message {number}"
        if not isinstance(message, dict):
            raise DataError(f"{source}: expected a JSON object, got {type(message).__name__}")
        turn = _Fields(message, source)
        role = turn.text("role")
        if role not in _ROLES:
            raise DataError(f"{source}: the role must be one of {', '.join(_ROLES)}, got {role!r}")
        turns.append((role, turn.text("content")))
    rows = []
    for number, (role, content) in enumerate(turns):
        if role != "assistant":
            continue
        if number == 0 or turns[number - 1][0] != "user":
            raise DataError(
                f"{fields.source}, message {number + 1}: an answer must follow a user's message"
            )
        common = {**fields.common(), "history": tuple(turns[: number - 1])}
        rows.append(Row(turns[number - 1][1], content, **common))
    if not rows:
        raise DataError(f"{fields.source}: no message is the assistant's, so nothing carries loss")
    if len(rows) > 1:  # Each by a name of its own, where they have one.
        named = enumerate(rows, start=1)
        rows = [dataclasses.replace(r, id=f"{r.id}/{n}" if r.id else "") for n, r in named]
    return rows


_SHAPES = {
    ("text",): _text,
    ("prompt", "completion"): _prompt_and_completion,
    ("question",): _question_and_answer,
    ("messages",): _messages,
}
"""How a record is read, by the fields of which it has one: those of one shape, not of two."""
