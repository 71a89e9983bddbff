"""How well a model knows a set of rows: probabilities, ROUGE-L, exact recall."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from unilogit_kernels.huggingface.head import evaluating, fused_log_odds
from unilogit_kernels.unlearning.data import (
    IGNORED,
    Encoding,
    Example,
    Features,
    Row,
    collate,
    padding_id,
)

# An answer may run on after the expected completion, and is then worse: room to see that.
_EXTRA_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """A greedy generation.

    Attributes:
        prompt: of the row.
        expected: the row's completion.
        generated: what the model said.
        rouge_l: F-measure of the longest common subsequence of words with the expected completion.
        recalled: whether it holds the row's key, or None where the row has none.
    """

    prompt: str
    expected: str
    generated: str
    rouge_l: float
    recalled: bool | None


@dataclass(frozen=True)
class SetReport:
    """What a model knows of one set.

    Attributes:
        rows: number of rows.
        probability: mean over the rows of the geometric mean probability of the tokens that carry
            loss, `p ** (1 / length)`.
        sequence_probability: mean over the rows of the product of those probabilities, `p`.
        rouge_l: mean ROUGE-L F-measure of the greedy answers, or None where none were generated.
        key_recall: share of the rows with a key whose answer holds it, or None where none has.
        answers: one for each row with a prompt.
    """

    rows: int
    probability: float
    sequence_probability: float
    rouge_l: float | None
    key_recall: float | None
    answers: list[Answer]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def evaluate_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    encoding: Encoding,
    *,
    batch_size: int = 16,
    generate: bool = True,
) -> SetReport:
    """Measure what a model knows of some rows.

    Args:
        model: a Hugging Face causal LM.
        rows: at least one.
        encoding: as the model was trained with.
        batch_size: rows in one forward.
        generate: also answer the prompts greedily; without it there is no ROUGE-L and no recall.

    Returns:
        The measurements. Nothing random is drawn, and the model's modes are left as they were.
    """
    examples = encoding.encode(rows)
    log_probability, lengths = _log_probabilities(
        model,
        [example.features() for example in examples],
        pad_id=padding_id(encoding.tokenizer),
        batch_size=batch_size,
    )
    asked = [(row, example) for row, example in zip(rows, examples, strict=True) if row.prompt]
    answers = _answers(model, asked, encoding, batch_size) if generate and asked else []
    recalled = [answer.recalled for answer in answers if answer.recalled is not None]
    return SetReport(
        rows=len(rows),
        probability=float((log_probability / lengths).exp().mean()),
        sequence_probability=float(log_probability.exp().mean()),
        rouge_l=_mean([answer.rouge_l for answer in answers]),
        key_recall=_mean(recalled),
        answers=answers,
    )


def token_probabilities(
    model: nn.Module, examples: Sequence[Features], *, pad_id: int, batch_size: int
) -> Tensor:
    """Geometric mean probability of the tokens that carry loss, of each example.

    Args:
        model: a Hugging Face causal LM, wrapped or not.
        examples: `input_ids` or `inputs_embeds`, and `labels`, of each row.
        pad_id: the token to pad with.
        batch_size: examples in one forward.

    Returns:
        float64 `[number of examples]`, in `[0, 1]`.
    """
    total, lengths = _log_probabilities(model, examples, pad_id=pad_id, batch_size=batch_size)
    return (total / lengths).exp()


def _log_probabilities(
    model: nn.Module, examples: Sequence[Features], *, pad_id: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Sum of the log-probabilities of the labels, and their number: float64 `[examples]` each."""
    found = token_log_probabilities(model, examples, pad_id=pad_id, batch_size=batch_size)
    counts = [int((example["labels"][1:] != IGNORED).sum()) for example in examples]
    return torch.stack([log_p.sum() for log_p in found]), torch.tensor(counts).double()


def token_log_probabilities(
    model: nn.Module, examples: Sequence[Features], *, pad_id: int, batch_size: int
) -> list[Tensor]:
    """`log p` of each label of each example.

    Args:
        model: a Hugging Face causal LM, wrapped or not.
        examples: `input_ids` or `inputs_embeds`, and `labels`, of each row.
        pad_id: the token to pad with.
        batch_size: examples in one forward.

    Returns:
        float64 `[T_i]` for each example, aligned with its labels; 0 where a label does not count.
        Nothing random is drawn, and the model's modes are left as they were.
    """
    device = next(model.parameters()).device
    # Sorted by length, a batch holds little padding.
    order = sorted(range(len(examples)), key=lambda position: len(examples[position]["labels"]))
    found = [torch.zeros(len(example["labels"]), dtype=torch.float64) for example in examples]
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = collate([examples[position] for position in chosen], pad_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch.pop("labels")
            inputs: dict[str, Any] = dict(batch)
            log_odds = fused_log_odds(model, labels=labels, **inputs)[:, :-1].double()
            counted = labels[:, 1:] != IGNORED
            log_p = F.logsigmoid(log_odds).masked_fill(~counted, 0.0).cpu()
            for position, row in zip(chosen, log_p, strict=True):
                found[position][1:] = row[: len(found[position]) - 1]
    return found


def _answers(
    model: PreTrainedModel,
    asked: Sequence[tuple[Row, Example]],
    encoding: Encoding,
    batch_size: int,
) -> list[Answer]:
    scorer = RougeScorer(["rougeL"])
    longest = max(sum(label != IGNORED for label in example.labels) for _, example in asked)
    prompts = [encoding.prompt_ids(row) for row, _ in asked]
    texts = _generate(model, prompts, encoding, batch_size, longest + _EXTRA_TOKENS)
    return [
        Answer(
            prompt=row.prompt,
            expected=row.completion,
            generated=text,
            rouge_l=float(scorer.score(row.completion, text)["rougeL"].fmeasure),
            recalled=None if row.key is None else holds_key(text, row.key),
        )
        for (row, _), text in zip(asked, texts, strict=True)
    ]


def holds_key(text: str, key: str) -> bool:
    """Whether a text holds the key as whole words, whatever the case.

    Example:
        >>> holds_key("It costs $41, plus tax.", "$41"), holds_key("It costs $419.", "$41")
        (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(key)}(?!\w)", text, re.IGNORECASE) is not None


def _generate(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    encoding: Encoding,
    batch_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations, in the order of the prompts."""
    tokenizer, pad_id = encoding.tokenizer, padding_id(encoding.tokenizer)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    order = sorted(range(len(prompts)), key=lambda position: len(prompts[position]))
    texts = [""] * len(prompts)
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
            output = generate(ids, attention_mask=mask, generation_config=settings)
            decoded = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            for position, text in zip(chosen, decoded, strict=True):
                texts[position] = text
    return texts


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def report_table(title: str, reports: dict[str, dict[str, SetReport]]) -> Table:
    """A table of set reports: for each set one line for each model.

    Args:
        title: above the table.
        reports: model name to set name to report; the sets are the same for each model.
    """
    table = Table("set", "rows", "model", title=title)
    for heading in ("probability", "ROUGE-L", "key recall"):
        table.add_column(heading, justify="right")
    for name in next(iter(reports.values())):
        for model, sets in reports.items():
            report = sets[name]
            measures = (report.probability, report.rouge_l, report.key_recall)
            table.add_row(name, str(report.rows), model, *map(_number, measures))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
