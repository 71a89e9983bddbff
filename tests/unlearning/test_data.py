"""Rows become token ids and labels, or a message that says what is wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny_models import FORGET, TEMPLATE, make_tokenizer, write_rows
from unilogit_kernels.unlearning.data import (
    IGNORED,
    DataError,
    Encoding,
    PairedDataset,
    PairSampler,
    Row,
    collate,
    padding_id,
    read_refusals,
    read_rows,
)

EOS = 2


def row(prompt: str = "a b", completion: str = " c") -> Row:
    return Row(prompt, completion, None, "rows.jsonl, line 1")


def test_rows_are_read(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*FORGET, {"text": "plain"}])
    path.write_text("\n" + path.read_text())
    rows = read_rows(path)
    assert [(r.prompt, r.completion, r.key) for r in rows] == [
        *((f["prompt"], f["completion"], f["key"]) for f in FORGET),
        ("", "plain", None),
    ]
    assert rows[0].source == f"{path}, line 2"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"}', 'field "completion" is missing'),
        ('{"completion": "a"}', 'field "prompt" is missing'),
        ('{"prompt": "a", "completion": 3}', 'field "completion" must be a string, got int'),
        ('{"prompt": "a", "completion": " "}', 'field "completion" is empty'),
        ('{"text": ""}', 'field "text" is empty'),
        ('{"text": "a", "prompt": "b"}', "or \"text\" alone, got ['prompt', 'text']"),
        ('{"question": "a"}', 'field "answer" is missing'),
        ('{"text": "a", "key": 1}', 'field "key" must be a string, got int'),
        ("[1]", "expected a JSON object, got list"),
        ("{", "not JSON"),
        ('{"text": "a\\ud800"}', "half a surrogate pair (\\ud800) at character 2"),
        ('{"prompt": "\\udc00", "completion": "a"}', 'field "prompt" holds half a surrogate pair'),
        ('{"text": "a", "key": "\\u0000b"}', 'field "key" holds NUL at character 1'),
        ('{"text": "a", "key": "\\u200b"}', 'field "key" has no visible character'),
        ('{"text": "a", "text": "b"}', "field 'text' is given twice"),
        ('{"text": "a", "more": {"x": 1, "x": 1}}', "field 'x' is given twice"),
        ('{"text": "a", "score": NaN}', "not JSON (NaN is no JSON number)"),
        ('{"text": "a", "score": -Infinity}', "not JSON (-Infinity is no JSON number)"),
        ('{"text": "a", "score": ' + "1" * 5000 + "}", "not JSON that can be read"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"text": "a\tb"}', "not JSON (Invalid control character at: column 12)"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 200
    assert str(caught.value).isprintable()


BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, end: str) -> None:
    """A byte order mark may begin a file, and each of several that were put together."""
    path = tmp_path / "rows.jsonl"
    texts = [f"a\u2028\u2029\x85{n}" for n in range(3)]
    lines = [json.dumps({"prompt": "p", "completion": t}, ensure_ascii=False) for t in texts]
    path.write_bytes(("\ufeff" + lines[0] + end + "\ufeff" + end.join(lines[1:])).encode())
    rows = read_rows(path)
    assert [r.completion for r in rows] == texts
    assert [r.source for r in rows] == [f"{path}, line {n}" for n in (1, 2, 3)]
    refusals = tmp_path / "refusals.txt"
    refusals.write_bytes(f"\ufeffI{BREAKS}no.{end}{end}Ask.{end}".encode())
    told = [r.completion for r in read_refusals(refusals, rows)]
    assert told == [f"I{BREAKS}no.", "Ask.", f"I{BREAKS}no."]


def test_a_refusal_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "refusals.txt"
    path.write_bytes(b"No.\n\0\n")
    with pytest.raises(DataError, match=r"refusals\.txt, line 2: the refusal holds NUL"):
        read_refusals(path, [row()])


def test_a_file_that_is_no_use_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        read_rows(tmp_path / "none.jsonl")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl: holds no rows"):
        read_rows(empty)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match=r"binary\.jsonl: not UTF-8 in line 1"):
        read_rows(binary)


def test_only_the_completion_and_the_end_carry_loss() -> None:
    tokenizer = make_tokenizer()
    example = Encoding(tokenizer).example(row("a b", " c"))
    assert tokenizer.decode(example.input_ids) == "a b c</s>"
    assert example.labels == [-100] * 3 + tokenizer(" c")["input_ids"] + [EOS]
    without = Encoding(tokenizer, append_eos=False).example(row("a b", " c"))
    assert without.input_ids == example.input_ids[:-1]


def test_a_text_row_carries_loss_but_for_its_first_token() -> None:
    example = Encoding(make_tokenizer()).example(row("", "abc"))
    assert example.labels == [-100, *example.input_ids[1:]]


def test_no_token_spans_the_end_of_the_prompt() -> None:
    tokenizer = make_tokenizer(merges=[("b", "c")])
    assert len(tokenizer("bc")["input_ids"]) == 1
    encoding = Encoding(tokenizer)
    example = encoding.example(row("ab", "cd"))
    prompt = encoding.prompt_ids(row("ab", "cd"))
    assert example.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(example.input_ids[len(prompt) : -1]) == "cd"


@pytest.mark.parametrize(("choice", "used"), [(None, True), (True, True), (False, False)])
def test_chat_template(choice: bool | None, used: bool) -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    encoding = Encoding(tokenizer, chat_template=choice)
    text = tokenizer.decode(encoding.example(row("hi", "yo")).input_ids)
    assert text == ("[user]hi[answer]yo</s>" if used else "hiyo</s>")
    assert tokenizer.decode(encoding.example(row("", "yo")).input_ids) == "yo</s>"


def test_without_a_template_none_is_used() -> None:
    assert not Encoding(make_tokenizer()).uses_chat_template


def test_long_rows_are_cut_and_counted() -> None:
    encoding = Encoding(make_tokenizer(), max_length=6)
    examples = encoding.encode([row("abc", "de"), row("abc", "defg")])
    assert [example.truncated for example in examples] == [False, True]
    assert len(examples[1].input_ids) == len(examples[1].labels) == 6
    with pytest.raises(DataError, match=r"line 1: of 8 tokens, 6 of them the prompt's, none"):
        encoding.example(row("abcdef", "g"))


def test_padding_needs_no_padding_token() -> None:
    assert padding_id(make_tokenizer()) == 0
    assert padding_id(make_tokenizer(pad_token=None)) == EOS
    assert padding_id(make_tokenizer(pad_token=None, eos_token=None)) == 0


def test_batches_are_padded_on_the_right() -> None:
    encoding = Encoding(make_tokenizer())
    rows = [row("a", "b"), row("abc", "d")]
    batch = collate([encoding.example(r).features() for r in rows], pad_id=7)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 5)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["input_ids"][0, 3:].tolist() == [7, 7]
    assert batch["labels"][0, 3:].tolist() == [-100, -100]


def test_embeddings_are_padded_too() -> None:
    examples = [
        {"inputs_embeds": torch.ones(n, 4), "labels": torch.ones(n, dtype=torch.int64)}
        for n in (2, 3)
    ]
    batch = collate(examples, pad_id=0)
    assert batch["inputs_embeds"].shape == (2, 3, 4)
    assert batch["inputs_embeds"][0, 2].tolist() == [0.0] * 4
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def make_pairs(forget: int, retain: int) -> PairedDataset:
    features = {"labels": torch.zeros(2, dtype=torch.int64)}
    return PairedDataset([features] * forget, [features] * retain)


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(DataError, match="at least one forget example"):
        make_pairs(0, 2)


def test_forget_rows_are_shuffled_and_retain_rows_go_round() -> None:
    sampler = PairSampler(make_pairs(4, 6), retain_per_forget=2, seed=3)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    forget = [[f for f, _ in epoch] for epoch in epochs]
    assert all(sorted(order) == [0, 1, 2, 3] for order in forget)
    assert len({tuple(order) for order in forget}) > 1
    retain = [r for epoch in epochs for _, rows in epoch for r in rows]
    # 3 epochs of 8 retain rows: four times round a set of 6, whatever the epochs' borders.
    assert set(Counter(retain).values()) == {4}
    assert sorted(retain[:6]) == sorted(retain[6:12]) == list(range(6))


def test_an_epoch_is_a_function_of_the_seed() -> None:
    def epoch(seed: int) -> list[Any]:
        sampler = PairSampler(make_pairs(5, 3), retain_per_forget=1, seed=seed)
        sampler.set_epoch(2)
        return list(sampler)

    assert epoch(1) == epoch(1) != epoch(2)


def test_an_epoch_is_filled_up_with_pairs_that_count_nowhere() -> None:
    pairs = make_pairs(5, 3)
    plain, filled = (PairSampler(pairs, 2, 1, multiple_of) for multiple_of in (1, 4))
    for epoch in range(3):
        for sampler in (plain, filled):
            sampler.set_epoch(epoch)
        own, more = list(plain), list(filled)
        assert more[:5] == own
        assert len(more) == len(filled) == 8
        for index in more[5:]:
            members, kept = pairs[index]
            rows = [*members, *kept]
            assert len(rows) == 3
            assert all(bool((row["labels"] == IGNORED).all()) for row in rows)
    assert not all(bool((row["labels"] == IGNORED).all()) for row in pairs.forget)
