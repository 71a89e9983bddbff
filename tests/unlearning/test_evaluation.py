"""Figures of an evaluation, against the model's own logits and generations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.support.tiny_models import (
    FORGET,
    RETAIN,
    TEMPLATE,
    encoded,
    make_model,
    make_tokenizer,
    one_thread,
)
from tests.unlearning.tiny_tokenizers import metaspace
from unilogit_kernels.huggingface.head import fused_loss, observe_logit_transform
from unilogit_kernels.testing import AllocationGuard
from unilogit_kernels.unlearning.data import Encoding, Row, collate
from unilogit_kernels.unlearning.evaluation import (
    evaluate_rows,
    token_probabilities,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

ROWS = [Row(r["prompt"], r["completion"], r["key"], "") for r in [*FORGET, *RETAIN]]


def sharp_model() -> PreTrainedModel:
    """Untrained, but with a preference, so that probabilities differ visibly."""
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
    return model


def trained_model(
    rows: list[Row], encoding: Encoding | None = None, steps: int = 60, **sizes: Any
) -> PreTrainedModel:
    """A model that has learned the rows by heart."""
    model, encoding = make_model(**sizes), encoding or Encoding(make_tokenizer())
    batch: dict[str, Any] = collate([encoding.example(row).features() for row in rows], 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        fused_loss(model, **batch, objective="cross_entropy").backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model


def test_probabilities_are_those_of_the_logits() -> None:
    model, encoding = sharp_model(), Encoding(make_tokenizer())
    geometric, plain = [], []
    for row in ROWS:
        example = encoding.example(row)
        with torch.no_grad():
            logits = model(torch.tensor([example.input_ids])).logits[0, :-1].double()
        labels = torch.tensor(example.labels)[1:]
        log_p = logits.log_softmax(-1)[labels != -100, labels[labels != -100]]
        geometric.append(float(log_p.mean().exp()))
        plain.append(float(log_p.sum().exp()))
    report = evaluate_rows(model, ROWS, encoding, batch_size=3, generate=False)
    expected = torch.tensor([sum(geometric) / len(ROWS), sum(plain) / len(ROWS)])
    seen = torch.tensor([report.probability, report.sequence_probability])
    torch.testing.assert_close(seen, expected)
    assert report.rows == len(ROWS)
    assert report.rouge_l is None
    assert report.key_recall is None
    each = token_probabilities(model, encoded([*FORGET, *RETAIN]), pad_id=0, batch_size=3)
    torch.testing.assert_close(each, torch.tensor(geometric, dtype=torch.float64))


def test_answers_are_greedy_generations_whatever_the_batch() -> None:
    model, encoding = sharp_model(), Encoding(make_tokenizer())
    together = evaluate_rows(model, ROWS, encoding, batch_size=8)
    longest = max(len(encoding.example(row).input_ids) for row in ROWS)
    for row, answer in zip(ROWS, together.answers, strict=True):
        ids = encoding.prompt_ids(row)
        tokens: list[int] = []
        for _ in range(longest):
            with torch.no_grad():
                token = int(model(torch.tensor([ids + tokens])).logits[0, -1].argmax())
            if token == 2:
                break
            tokens.append(token)
        # Runs of the same byte may decode differently where a character is cut at the end.
        expected = encoding.tokenizer.decode(tokens)
        assert answer.generated[:4] == expected[:4], row
        assert answer.prompt == row.prompt


def test_what_is_known_by_heart_scores_one() -> None:
    model, encoding = trained_model(ROWS), Encoding(make_tokenizer())
    report = evaluate_rows(model, ROWS, encoding)
    assert report.key_recall == 1.0
    assert report.rouge_l == 1.0
    assert report.probability > 0.9
    assert [a.generated for a in report.answers] == [row.completion for row in ROWS]
    # With the answers swapped, the same model knows nothing.
    others = [Row(r.prompt, s.completion, s.key, "") for r, s in zip(ROWS, ROWS[::-1], strict=True)]
    wrong = evaluate_rows(model, others, encoding)
    assert wrong.key_recall == 0.0
    assert wrong.rouge_l == 0.0
    assert wrong.probability < 0.5


def test_rows_without_prompt_or_key() -> None:
    model, encoding = sharp_model(), Encoding(make_tokenizer())
    report = evaluate_rows(model, [Row("", "abc", None, ""), Row("a", "b", None, "")], encoding)
    assert len(report.answers) == 1
    assert report.rouge_l is not None
    assert report.key_recall is None
    assert report.answers[0].recalled is None


def ask(model: PreTrainedModel, prompt: str, completion: str, key: str, **options: Any) -> Any:
    rows = [Row(prompt, completion, key, "")]
    return evaluate_rows(model, rows, Encoding(make_tokenizer()), **options)


def test_answers_end_where_model_template_or_caller_says() -> None:
    learned = {
        "a?": " Hi!~zzzzzz",
        "b?": " Bo\n\nQuestion: c? Ada",
        "c?": "<think>no, no, no</think> Eve",
    }
    model = trained_model([Row(p, c, None, "") for p, c in learned.items()], steps=100)
    tilde = make_tokenizer().convert_tokens_to_ids("~")

    assert ask(model, "a?", " Hi!", "Hi").answers[0].generated == learned["a?"]
    assert model.generation_config is not None
    model.generation_config.update(eos_token_id=[2, tilde], repetition_penalty=5.0, num_beams=2)
    ended = ask(model, "a?", " Hi!", "Hi")
    assert ended.answers[0].generated == " Hi!"
    assert (ended.rouge_l, ended.unfinished) == (1.0, 0)

    assert ask(model, "b?", " Bo", "Ada", max_new_tokens=30).key_recall == 1.0
    stopped = ask(model, "b?", " Bo", "Ada", max_new_tokens=30, stop=["\n\n\n", "\n\nQuestion:"])
    assert stopped.key_recall == 0.0
    assert (stopped.answers[0].generated, stopped.unfinished) == (" Bo", 0)
    model.generation_config.update(stop_strings=["\nQ"])
    assert ask(model, "b?", " Bo", "Bo").answers[0].generated == " Bo\n"
    model.generation_config.update(stop_strings=None)

    # A thought that does not end in time is no answer: neither forgotten nor wrong.
    cut = ask(model, "c?", " Eve", "Eve")
    assert (cut.key_recall, cut.rouge_l, cut.unfinished) == (None, None, 1)
    assert ask(model, "c?", " no", "no").key_recall == 1.0
    whole = ask(model, "c?", " Eve", "Eve", max_new_tokens=40)
    assert (whole.key_recall, whole.rouge_l, whole.unfinished) == (1.0, 1.0, 0)


def test_a_token_that_ends_the_turns_of_a_template_ends_an_answer() -> None:
    template = TEMPLATE.replace("{% endfor %}", "{{ '~' }}{% endfor %}")
    tokenizer = make_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["~"]})
    encoding, rows = Encoding(tokenizer), [Row("a?", "Hi!", "Hi", "")]
    model = trained_model(rows, encoding)
    answer = evaluate_rows(model, rows, encoding, max_new_tokens=30).answers[0]
    assert (answer.generated, answer.finished) == ("Hi!", True)


def test_what_a_template_writes_before_an_answer_is_no_part_of_it() -> None:
    """Its header is in every answer, so that no wrong one would be all wrong."""
    template = TEMPLATE.replace("[answer]", "[the assistant says]")
    encoding = Encoding(make_tokenizer(chat_template=template))
    model = trained_model([Row("a?", "Ada", None, "")], encoding)
    (right, wrong) = evaluate_rows(
        model, [Row("a?", "Ada", None, ""), Row("a?", "Bo", None, "")], encoding
    ).answers
    assert (right.rouge_l, wrong.rouge_l) == (1.0, 0.0)


def test_an_answer_keeps_the_space_that_its_tokenizer_hides() -> None:
    encoding = Encoding(metaspace("always"))
    rows = [Row("a:", " b", "b", ""), Row("b:", "a", "a", "")]
    model = trained_model(rows, encoding, vocab_size=len(encoding.tokenizer))
    assert [a.generated for a in evaluate_rows(model, rows, encoding).answers] == [" b", "a"]


@pytest.mark.parametrize("wrong", [{"stop": [""]}, {"max_new_tokens": 0}])
def test_ends_that_end_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"empty|at least 1, got 0"):
        ask(make_model(), "a", "b", "b", **wrong)


def test_modes_and_random_state_stay() -> None:
    model, encoding = make_model(attention_dropout=0.1).train(), Encoding(make_tokenizer())
    state = torch.get_rng_state()
    first = evaluate_rows(model, ROWS, encoding)
    assert first == evaluate_rows(model, ROWS, encoding)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_need_no_logits() -> None:
    model = make_model(vocab_size=5003)
    observe_logit_transform(model)
    # Of 16 rows, only the labelled tokens and their vocabulary would make a tensor this large.
    examples = encoded([*FORGET, *RETAIN]) * 8
    tokens = sum(int((example["labels"] != -100).sum()) for example in examples)
    with AllocationGuard(forbidden_elements=tokens * 5003):
        token_probabilities(model, examples, pad_id=0, batch_size=len(examples))
