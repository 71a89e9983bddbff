"""Greedy answers, and where they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from unilogit_kernels.huggingface.head import evaluating
from unilogit_kernels.unlearning.data import Encoding, padding_id


@dataclass(frozen=True)
class Generated:
    """What a model said.

    Attributes:
        text: up to an end token or a stop string, special tokens left out.
        finished: whether there was one.
    """

    text: str
    finished: bool


def generate_greedily(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    encoding: Encoding,
    *,
    batch_size: int,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Greedy continuations.

    They end at any end token that the model's generation config, the tokenizer or the chat
    template names, or before a stop string. Whatever else the model's generation config asks for,
    beams or a penalty on repetitions, is left out: the answer is the model's likeliest.

    Args:
        model: a Hugging Face causal LM.
        prompts: token ids, at least one of each.
        encoding: whose tokenizer and template the prompts were made with.
        batch_size: prompts in one forward.
        max_new_tokens: of each answer.
        stop: texts that end an answer.
        progress: is told after each batch how many prompts it held.

    Returns:
        The answers, in the order of the prompts.
    """
    pad_id, ends = padding_id(encoding.tokenizer), end_tokens(model, encoding)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=pad_id,
        eos_token_id=sorted(ends) or None,
    )
    stop = (*stop, *encoding.end_strings, *_listed(model, "stop_strings"))
    order = sorted(range(len(prompts)), key=lambda position: len(prompts[position]))
    answers = [Generated("", False)] * len(prompts)
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[position]) for position in chosen)
            # On the left, so that every answer starts in the same column.
            padding = torch.tensor([width - len(prompts[position]) for position in chosen])
            ids = torch.tensor(
                [[pad_id] * (width - len(prompts[p])) + prompts[p] for p in chosen],
                device=model.device,
            )
            mask = (torch.arange(width) >= padding[:, None]).long().to(model.device)
            output = generate(
                ids,
                attention_mask=mask,
                generation_config=settings,
                tokenizer=encoding.tokenizer,  # for stop strings of the model's own
            )
            for position, tokens in zip(chosen, output[:, width:].tolist(), strict=True):
                answers[position] = _ended(encoding, prompts[position], tokens, ends, stop)
            if progress is not None:
                progress(len(chosen))
    return answers


def end_tokens(model: PreTrainedModel, encoding: Encoding) -> frozenset[int]:
    """Every token that ends an answer: by the model's generation config, tokenizer or template."""
    return encoding.end_ids.union(_listed(model, "eos_token_id"))


def _listed(model: PreTrainedModel, name: str) -> list[Any]:
    """What the model's generation config names, one or several."""
    named = getattr(getattr(model, "generation_config", None), name, None)
    return [] if named is None else [named] if isinstance(named, (int, str)) else list(named)


def _ended(
    encoding: Encoding,
    prompt: Sequence[int],
    tokens: Sequence[int],
    ends: frozenset[int],
    stop: Sequence[str],
) -> Generated:
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    text = encoding.answer(prompt, tokens[:end])
    places = [place for place in map(text.find, stop) if place >= 0]
    return Generated(text[: min(places, default=None)], end is not None or bool(places))
