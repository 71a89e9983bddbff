"""Thoughts that a model writes before its answer."""

from __future__ import annotations

_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
)


def after_thought(text: str) -> str | None:
    """What follows the last thought; None if that does not end. Without a thought, the text."""
    for begin, end in _TAGS:
        if end in text:
            text = text.rpartition(end)[2]
        if begin in text:
            return None
    return text


def answer_after_thought(before: str, text: str) -> str | None:
    """What a model answers once its thoughts are over; None if they do not end.

    Args:
        before: what the chat template writes between prompt and answer, which may open a thought.
        text: what the model writes after it.

    Example:
        >>> answer_after_thought("<|assistant|><think>", "Hm.</think>Ada")
        'Ada'
        >>> answer_after_thought("<|assistant|>", "Ada")
        'Ada'
    """
    answer = after_thought(before + text)
    # What the template writes is no part of an answer.
    return answer if answer is None or len(answer) <= len(text) else text


def opens_thought(generation_prompt: str, completion: str) -> bool:
    """Whether a generation prompt leaves a thought open that the completion does not close."""
    opened = after_thought(generation_prompt) is None
    return opened and after_thought(generation_prompt + completion) is None
