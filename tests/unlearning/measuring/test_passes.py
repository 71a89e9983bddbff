"""The passes against full logits, and the files between them and the metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.tiny_models import make_model, make_tokenizer, one_thread
from tests.unlearning.metrics import literal
from unilogit_kernels.huggingface.head import observe_logit_transform
from unilogit_kernels.testing import AllocationGuard
from unilogit_kernels.unlearning import metrics
from unilogit_kernels.unlearning.data import Encoding, Row
from unilogit_kernels.unlearning.evaluation import Answer
from unilogit_kernels.unlearning.measuring.passes import divergences, token_records
from unilogit_kernels.unlearning.measuring.store import (
    load_answers,
    load_divergences,
    load_records,
    save_answers,
    save_divergences,
    save_records,
)

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

TOLERANCE = 1e-5
"""Asked of float32: what metrics from records and from logits may differ by."""

ROWS = [
    Row("who?", " Ada", None, ""),
    Row("", "a text of its own", None, ""),
    Row("where does she live?", " 東京", None, ""),
    Row("and?", " b", None, ""),
]


def sharp_model(seed: int = 0, **options: Any) -> torch.nn.Module:
    """Untrained, but sure of some tokens, so that there are argmaxes and small variances."""
    model = make_model(seed, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(60)
    return model


def examples_of(rows: list[Row]) -> list[dict[str, torch.Tensor]]:
    return [Encoding(make_tokenizer()).example(row).features() for row in rows]


def literal_predictions(
    model: torch.nn.Module, example: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        logits = model(example["input_ids"][None]).logits[0]
    return literal.predictions(logits, example["labels"])


def test_metrics_of_records_are_those_of_full_logits() -> None:
    model, examples = sharp_model(), examples_of(ROWS)
    # The second half of a row is made of the model's own predictions, so that a suffix is known.
    ids, labels = examples[1]["input_ids"], examples[1]["labels"]
    for place in range(len(ids) // 2, len(ids)):
        with torch.no_grad():
            ids[place] = labels[place] = model(ids[None, :place]).logits[0, -1].argmax()
    records = token_records(model, examples, pad_id=0, batch_size=3)
    losses = []
    for example, seen in zip(examples, records, strict=True):
        log_p, wanted = literal_predictions(model, example)
        assert len(seen) == len(wanted)
        losses.append(literal.loss(log_p, wanted))
        pairs = [
            (metrics.mean_loss(seen.log_prob), losses[-1]),
            (
                metrics.exact_memorization(seen.is_argmax),
                literal.exact_memorization(log_p, wanted),
            ),
            (
                metrics.extraction_strength(seen.is_argmax, least=True),
                literal.extraction_strength(log_p, wanted, least=True),
            ),
            (metrics.min_k_score(seen.log_prob), literal.min_k(log_p, wanted)),
            (
                metrics.min_k_plus_plus_score(seen.log_prob, seen.mean, seen.variance),
                literal.min_k_plus_plus(log_p, wanted),
            ),
        ]
        for found, expected in pairs:
            assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
    seen_losses = [metrics.mean_loss(record.log_prob) for record in records]
    assert metrics.truth_ratio(seen_losses[0], seen_losses[1:]) == pytest.approx(
        literal.truth_ratio(losses[0], losses[1:]), rel=TOLERANCE
    )
    strengths = [metrics.extraction_strength(record.is_argmax) for record in records]
    assert 0.0 in strengths
    assert any(0.0 < strength < 1.0 for strength in strengths)


def test_divergences_are_those_of_full_logits() -> None:
    model, golden, examples = sharp_model(0), sharp_model(1), examples_of(ROWS)
    found = divergences(model, golden, examples, pad_id=0, batch_size=3)
    for example, both in zip(examples, found, strict=True):
        own, _ = literal_predictions(model, example)
        other, _ = literal_predictions(golden, example)
        expected = [literal.kl(other, own), literal.kl(own, other)]
        assert both.tolist() == pytest.approx(expected, rel=TOLERANCE)


def test_a_pass_is_in_order_whatever_the_batch_and_tells_how_far_it_is() -> None:
    model, examples = sharp_model().train(), examples_of(ROWS * 2)
    told: list[int] = []
    whole = token_records(model, examples, pad_id=0, batch_size=8, progress=told.append)
    assert told == [8]
    assert model.training
    told.clear()
    halves = [
        record
        for part in (examples[:3], examples[3:])
        for record in token_records(model, part, pad_id=0, batch_size=2, progress=told.append)
    ]
    assert told == [2, 1, 2, 2, 1]
    for one, other in zip(whole, halves, strict=True):
        np.testing.assert_allclose(one.log_prob, other.log_prob, rtol=1e-4)
        assert np.array_equal(one.is_argmax, other.is_argmax)


def test_no_pass_holds_logits() -> None:
    model, golden = make_model(vocab_size=5003), make_model(1, vocab_size=5003)
    observe_logit_transform(model)
    observe_logit_transform(golden)
    examples = examples_of(ROWS) * 8
    tokens = sum(int((example["labels"] != -100).sum()) for example in examples)
    with AllocationGuard(forbidden_elements=tokens * 5003):
        token_records(model, examples, pad_id=0, batch_size=len(examples))
        divergences(model, golden, examples, pad_id=0, batch_size=len(examples))


def test_what_is_stored_comes_back(tmp_path: Path) -> None:
    records = token_records(sharp_model(), examples_of(ROWS), pad_id=0)
    keys = [("東京", "answer"), ("b", "wrong/0"), ("b", "wrong/1"), ("", "paraphrase")]
    path = tmp_path / "tokens" / "set.safetensors"
    save_records(path, dict(zip(keys, records, strict=True)))
    back = load_records(path)
    assert list(back) == keys
    for before, after in zip(records, back.values(), strict=True):
        for column in ("log_prob", "is_argmax", "mean", "variance"):
            assert np.array_equal(getattr(before, column), getattr(after, column))
    apart = np.array([[1.0, 2.0], [3.0, 4.0]])
    save_divergences(tmp_path / "apart.safetensors", ["a", "b"], apart)
    assert np.array_equal(load_divergences(tmp_path / "apart.safetensors"), apart)
    answer = Answer("p", " e", "<think>x</think> 東京", " 東京", 0.5, None, True)
    save_answers(tmp_path / "answers.json", {"a": answer})
    assert load_answers(tmp_path / "answers.json") == {"a": answer}
    assert not list(tmp_path.rglob("*.part"))
