"""Rows in a batch mean what they mean alone, and rows without labels nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import FORGET, RETAIN, encoded, make_model, one_thread
from tests.unlearning.tiny_trainer import REFUSALS, arguments, logged, make_trainer
from unilogit_kernels.unlearning.data import DataError, collate
from unilogit_kernels.unlearning.evaluation import token_log_probabilities, token_probabilities

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def without_labels(example: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**example, "labels": torch.full_like(example["labels"], -100)}


def padded_on_the_left(example: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones_like(example["labels"])
    fill = {"input_ids": 9, "labels": -100, "attention_mask": 0}
    columns = {**example, "attention_mask": mask}
    return {
        name: torch.cat([torch.full((4,), fill[name]), values]) for name, values in columns.items()
    }


def packed(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Two texts in one row: positions begin again with the second."""
    row = {name: torch.cat([e[name] for e in examples]) for name in ("input_ids", "labels")}
    row["labels"][len(examples[0]["labels"])] = -100
    row["position_ids"] = torch.cat([torch.arange(len(e["labels"])) for e in examples])
    return row


def test_padding_on_the_left_stays_masked() -> None:
    model, rows = make_model(), encoded(FORGET)
    expected = token_probabilities(model, rows, pad_id=0, batch_size=1)
    rows[1] = padded_on_the_left(rows[1])
    found = token_probabilities(model, rows, pad_id=0, batch_size=3)
    assert torch.allclose(found, expected, rtol=1e-5)


def test_packed_texts_do_not_see_each_other() -> None:
    model, rows = make_model(), encoded(FORGET)
    alone = token_log_probabilities(model, rows, pad_id=0, batch_size=1)
    both = packed(rows[:2])
    longer = {
        **both,
        **{k: torch.cat([v, v[-1:] + (k == "position_ids")]) for k, v in both.items()},
    }
    found = token_log_probabilities(model, [both, longer], pad_id=0, batch_size=2)
    for row in found:
        assert torch.allclose(row[: len(both["labels"])], torch.cat(alone[:2]), rtol=1e-4, atol=0)


def test_columns_of_a_batch() -> None:
    ids, mask = torch.tensor([5, 6]), torch.tensor([False, True])
    short = {"input_ids": ids[:1], "labels": ids[:1], "token_type_ids": ids[:1]}
    long = {"input_ids": ids, "labels": ids, "token_type_ids": ids, "attention_mask": mask}
    batch = collate([short, long], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 3], [5, 6]]
    assert batch["token_type_ids"].tolist() == [[5, 0], [5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 0], [0, 1]]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"token_type_ids": None}, "example 1 has the columns input_ids, labels where the first"),
        ({"labels": None}, "example 1 has no labels, only input_ids, token_type_ids"),
        ({"input_ids": ids[:1]}, r"input_ids must be a tensor .* each of the 2 labels, got \[1\]"),
        ({"input_ids": [5, 6]}, "input_ids must be a tensor .* got list"),
    ]
    for change, message in changes:
        changed = {k: v for k, v in {**long, **change}.items() if v is not None}
        with pytest.raises(DataError, match=message):
            collate([short, changed], pad_id=0)


def test_columns_of_two_sets_are_compared_before_training(tmp_path: Path) -> None:
    retain = [{**row, "token_type_ids": torch.zeros_like(row["labels"])} for row in encoded(RETAIN)]
    with pytest.raises(DataError, match=r"retain examples have the columns .* the forget examples"):
        make_trainer(make_model(), arguments(tmp_path), retain=retain)


@pytest.mark.parametrize("name", ["forget", "retain", "refusals"])
def test_a_set_without_labels_is_refused(tmp_path: Path, name: str) -> None:
    method = "dpo" if name == "refusals" else "unilogit"
    rows = {"forget": FORGET, "retain": RETAIN, "refusals": REFUSALS}[name]
    with pytest.raises(DataError, match=rf"no {name[:6]}.* example has a label that carries loss"):
        make_trainer(
            make_model(),
            arguments(tmp_path, method=method),
            **{name: [without_labels(row) for row in encoded(rows)]},
        )


@pytest.mark.parametrize("method", ["unilogit", "npo", "undial"])
def test_a_row_without_labels_adds_nothing(tmp_path: Path, method: str) -> None:
    """Neither to the losses, nor to the probability, also where a whole step has no other row."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "method": method,
        "stop_at": "probability=1e-9",
        "check_steps": 1,
        "retain_per_forget": 2,
    }
    seen: list[dict[str, Any]] = []
    for unlabelled, accumulated in [(False, 2), (True, 3), (True, 1)]:
        forget = encoded(FORGET)
        forget[2] = without_labels(forget[2])
        # One retain row, so that the rows a step takes do not hang on the order.
        retain = encoded(RETAIN[:1])
        args = arguments(tmp_path, **{**options, "gradient_accumulation_steps": accumulated})
        if unlabelled:
            with pytest.warns(UserWarning, match="1 forget examples have no label"):
                trainer = make_trainer(make_model(), args, forget=forget, retain=retain)
        else:
            trainer = make_trainer(make_model(), args, forget=forget[:2], retain=retain)
        trainer.train()
        seen.append({n: logged(trainer, n) for n in ("forget_loss", "forget_probability")})
    for name, values in seen[0].items():
        assert len(values) == (2 if name == "forget_probability" else 1)  # That of the start.
        assert seen[1][name] == pytest.approx(values, rel=1e-4), name
    assert 0.0 in seen[2]["forget_loss"]
    assert all(torch.tensor([v for values in seen[2].values() for v in values]).isfinite())


@pytest.mark.parametrize("method", ["unilogit", "idk_dpo"])
@pytest.mark.parametrize("retain_per_forget", [1, 2])
def test_rows_of_about_one_length_share_a_batch(
    tmp_path: Path, method: str, retain_per_forget: int
) -> None:
    """Each row is taken as often as without, in batches with less padding, the same each time."""

    def rows(count: int, name: str) -> list[dict[str, Tensor]]:
        return encoded([{"prompt": name, "completion": "x" * (1 + i % 37)} for i in range(count)])

    def padding(**options: Any) -> tuple[list[int], list[list[int]], list[Any]]:
        """Of each batch, and how often each row was in one."""
        args = arguments(
            tmp_path,
            method=method,
            per_device_train_batch_size=4,
            retain_per_forget=retain_per_forget,
            **options,
        )
        refusals = rows(96, "no")[::-1] if method == "idk_dpo" else ()
        sets = {"forget": rows(96, "f"), "retain": rows(50, "r"), "refusals": refusals}
        trainer = make_trainer(make_model(), args, **sets)
        sampler = trainer._get_train_sampler()
        drawn = list(sampler)
        sampler.set_epoch(1)
        drawn += list(sampler)
        empty = [
            int((batch["attention_mask"] == 0).sum()) for batch in trainer.get_train_dataloader()
        ]
        taken = [[f for f, _ in drawn], [r for _, some in drawn for r in some]]
        counts = [[each.count(i) for i in range(max(each) + 1)] for each in taken]
        return empty, counts, drawn

    plain, sorted_, again = (
        padding(**({"train_sampling_strategy": s} if s else {}))
        for s in ("", "group_by_length", "group_by_length")
    )
    assert sorted_ == again
    assert sorted_[1] == plain[1]
    assert sorted_[2] != plain[2]
    assert len(sorted_[0]) == len(plain[0]) == 24
    assert sum(sorted_[0]) < sum(plain[0]) / 2
