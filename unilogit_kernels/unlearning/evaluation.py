"""How well a model knows a set of rows: probabilities, ROUGE-L, exact recall."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from unilogit_kernels.huggingface.head import evaluating, fused_log_odds
from unilogit_kernels.unlearning.data import (
    IGNORED,
    Encoding,
    Features,
    Row,
    collate,
    padding_id,
)
from unilogit_kernels.unlearning.generation import Generated, generate_greedily
from unilogit_kernels.unlearning.processes import over_rows
from unilogit_kernels.unlearning.recall import holds_key, rouge_l
from unilogit_kernels.unlearning.thoughts import answer_after_thought

# An answer may run on after the expected completion, and is then worse: room to see that.
_EXTRA_TOKENS = 8


@dataclass(frozen=True)
class Answer:
    """A greedy generation.

    Attributes:
        prompt: of the row.
        expected: the row's completion.
        generated: what the model said, up to its end or a stop string.
        said: of that, what follows its thoughts; None where the model was still thinking when its
            tokens ran out.
        rouge_l: F-measure of the longest common subsequence of words with the expected completion;
            None where nothing was said.
        recalled: whether it holds the row's key, in a thought too; None where the row has none, or
            where the model was still thinking and had not said the key.
        finished: whether it ended before its tokens ran out.
    """

    prompt: str
    expected: str
    generated: str
    said: str | None
    rouge_l: float | None
    recalled: bool | None
    finished: bool


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
            An answer that was still a thought when its tokens ran out counts in neither.
        unfinished: answers that did not end before their tokens ran out.
        answers: one for each row with a prompt.
    """

    rows: int
    probability: float
    sequence_probability: float
    rouge_l: float | None
    key_recall: float | None
    unfinished: int
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
    stop: Sequence[str] = (),
    max_new_tokens: int | None = None,
    share_rows: bool = False,
) -> SetReport:
    """Measure what a model knows of some rows.

    Args:
        model: a Hugging Face causal LM.
        rows: at least one.
        encoding: as the model was trained with.
        batch_size: rows in one forward.
        generate: also answer the prompts greedily; without it there is no ROUGE-L and no recall.
        stop: texts that end an answer, such as `"\\nQuestion:"` for a model that goes on with a
            question of its own; what follows is not scored.
        max_new_tokens: of an answer; by default a little more than the longest completion has,
            which is too little for a model that thinks first.
        share_rows: every process of the run calls this with the same rows; each measures its share,
            and all return the same report. Processes that share a model by tensor parallelism take
            the same rows. FSDP has to have left the model whole where answers are generated.

    Returns:
        The measurements. Nothing random is drawn, and the model's modes are left as they were.

    Raises:
        DataError: a row cannot be encoded, see `Encoding.example`.
        RunError, LostProcessError: another process failed, or is gone, see `processes.over_rows`.
        ValueError: an empty stop string, or `max_new_tokens` below 1.
    """
    features = [example.features() for example in encoding.encode(rows)]

    def of_rows(mine: list[Features]) -> list[list[float]]:
        pad_id = padding_id(encoding.tokenizer)
        of_mine = _log_probabilities(model, mine, pad_id=pad_id, batch_size=batch_size)
        return torch.stack(of_mine, dim=1).tolist()

    measured = over_rows(features, of_rows, model) if share_rows else of_rows(features)
    log_probability, lengths = torch.tensor(measured, dtype=torch.float64).T
    answers = []
    if generate:
        answers = answer_rows(
            model,
            rows,
            encoding,
            batch_size=batch_size,
            stop=stop,
            max_new_tokens=max_new_tokens,
            share_rows=share_rows,
        )
    recalled = [answer.recalled for answer in answers if answer.recalled is not None]
    return SetReport(
        rows=len(rows),
        probability=float((log_probability / lengths).exp().mean()),
        sequence_probability=float(log_probability.exp().mean()),
        rouge_l=_mean([answer.rouge_l for answer in answers if answer.rouge_l is not None]),
        key_recall=_mean(recalled),
        unfinished=sum(not answer.finished for answer in answers),
        answers=answers,
    )


def answer_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    encoding: Encoding,
    *,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    max_new_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
    share_rows: bool = False,
) -> list[Answer]:
    """Answer the prompts of some rows greedily.

    Args:
        model: see `evaluate_rows`.
        rows: those without a prompt are passed over.
        encoding: see `evaluate_rows`.
        batch_size: see `evaluate_rows`.
        stop: see `evaluate_rows`.
        max_new_tokens: see `evaluate_rows`.
        progress: is told after each batch how many prompts it held.
        share_rows: see `evaluate_rows`.

    Raises:
        DataError, RunError, LostProcessError, ValueError: see `evaluate_rows`.
    """
    if "" in stop:
        raise ValueError("a stop string must not be empty")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    asked = [row for row in rows if row.prompt]
    if not asked:
        return []
    if max_new_tokens is None:
        labels = [encoding.example(row).labels for row in asked]
        longest = max(sum(label != IGNORED for label in each) for each in labels)
        max_new_tokens = longest + _EXTRA_TOKENS

    def of_rows(mine: list[Row]) -> list[Answer]:
        generated = generate_greedily(
            model,
            [encoding.prompt_ids(row) for row in mine],
            encoding,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            stop=stop,
            progress=progress,
        )
        return [
            _score(row, answer, encoding.answer_start(row))
            for row, answer in zip(mine, generated, strict=True)
        ]

    return over_rows(asked, of_rows, model) if share_rows else of_rows(asked)


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
    found = [torch.zeros(len(example["labels"]), dtype=torch.float64) for example in examples]
    with torch.no_grad(), evaluating(model):
        for chosen, labels, inputs in in_batches(model, examples, pad_id, batch_size):
            log_p = label_log_probabilities(model, labels, inputs).cpu()
            for position, row in zip(chosen, log_p, strict=True):
                found[position][:] = row[: len(found[position])]
    return found


def in_batches(
    model: nn.Module, examples: Sequence[Features], pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor, dict[str, Any]]]:
    """Examples of about one length together, so that a batch holds little padding.

    Args:
        model: on whose device they are to be.
        examples: see `token_log_probabilities`.
        pad_id: the token to pad with.
        batch_size: examples in a batch.

    Yields:
        Positions of the examples, their labels `[B, T]`, and what else the model is given.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda position: len(examples[position]["labels"]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([examples[position] for position in chosen], pad_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        yield chosen, batch.pop("labels"), dict(batch)


def label_log_probabilities(model: nn.Module, labels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """`log p` of each label of a batch, without logits.

    Args:
        model: a Hugging Face causal LM, wrapped or not, as it is: no mode is changed.
        labels: int64 `[B, T]`, not shifted.
        inputs: of the model's forward.

    Returns:
        float64 `[B, T]`, aligned with the labels; 0 where a label does not count.
    """
    log_odds = fused_log_odds(model, labels=labels, **inputs)[:, :-1].double()
    log_p = F.logsigmoid(log_odds).masked_fill(labels[:, 1:].to(log_odds.device) == IGNORED, 0.0)
    return F.pad(log_p, (1, 0))


def _score(row: Row, answer: Generated, before: str) -> Answer:
    """Compare an answer with its row; `before` is what the template has an answer begin with."""
    said = answer_after_thought(before, answer.text)
    expected = answer_after_thought(before, row.completion)
    # A thought that gives the key away is a leak, whether or not an answer follows.
    recalled = None if row.key is None else holds_key(answer.text, row.key)
    return Answer(
        prompt=row.prompt,
        expected=row.completion,
        generated=answer.text,
        said=said,
        rouge_l=None if said is None else rouge_l(expected or row.completion, said),
        recalled=None if said is None and not recalled else recalled,
        finished=answer.finished,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def report_table(title: str, reports: Mapping[str, Mapping[str, SetReport]]) -> Table:
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
            names = escape(name), str(report.rows), escape(model)
            table.add_row(*names, *map(_number, measures))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
