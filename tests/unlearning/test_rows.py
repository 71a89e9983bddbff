"""Rows of every shape that is read, and long texts in blocks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import TEMPLATE, make_tokenizer, write_rows
from unilogit_kernels.unlearning.encoding import IGNORED, Encoding
from unilogit_kernels.unlearning.rows import DataError, Row, read_refusals, read_rows

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada"},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "京都"},
]


def test_fields_by_our_names_and_by_tofu_s(tmp_path: Path) -> None:
    ours = {
        "prompt": "a?",
        "completion": " b",
        "paraphrase": " it is b",
        "paraphrased_prompt": "what is a?",
        "wrong": [" c", " d"],
        "answers": [" B"],
        "id": 7,
    }
    theirs = {
        "question": "a?",
        "answer": "b",
        "paraphrased_answer": "it is b",
        "paraphrased_question": "what is a?",
        "perturbed_answer": ["c", "d"],
    }
    (row,) = read_rows(write_rows(tmp_path / "ours.jsonl", [ours]))
    assert (row.paraphrase, row.paraphrased_prompt) == (" it is b", "what is a?")
    assert (row.wrong, row.answers, row.id) == ((" c", " d"), (" B",), "7")
    (row,) = read_rows(write_rows(tmp_path / "theirs.jsonl", [theirs]))
    assert (row.prompt, row.completion) == ("a?", "b")
    assert (row.paraphrase, row.paraphrased_prompt) == ("it is b", "what is a?")
    assert (row.wrong, row.id) == (("c", "d"), "")


def test_several_right_answers_and_choices(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "who?", "answer": ["Zoë", "Zoe"]},
        {"question": "which?", "choices": ["red", "dog"], "answer": 1},
        {"prompt": "x", "completion": " b", "choices": [" a", " b"], "choice": 1},
    ]
    several, lettered, own = read_rows(write_rows(tmp_path / "rows.jsonl", rows))
    assert (several.completion, several.answers) == ("Zoë", ("Zoe",))
    assert lettered.prompt == "which?\nA. red\nB. dog\nAnswer:"
    assert (lettered.completion, lettered.choices, lettered.choice) == (" B", (" A", " B"), 1)
    assert (own.completion, own.choices, own.choice) == (" b", (" a", " b"), 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "choices": ["b", "c"], "answer": True}, "from 0 to 1, got True"),
        ({"prompt": "a", "completion": "b", "choices": ["b", "c"], "choice": 1}, "another one"),
        ({"prompt": "a", "completion": "b", "wrong": ["c", 3]}, 'field "wrong", item 2 must be'),
        ({"prompt": "a", "completion": "b", "id": 0.5}, 'field "id" must be'),
        ({"question": "a", "answer": []}, 'field "answer" is empty'),
        ({"messages": "hi"}, 'field "messages" must be a list'),
        ({"messages": [{"role": "user", "content": "a"}]}, "no message is the assistant's"),
        ({"messages": TURNS[2:]}, "message 1: an answer must follow a user's message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "message 1: the role must be one of"),
        ({"messages": [{"role": "user"}]}, 'message 1: field "content" is missing'),
        ({"messages": ["a"]}, "message 1: expected a JSON object, got str"),
        ({"messages": TURNS, "text": "a"}, "got ['messages', 'text']"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "good"}, row])
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2")
    assert message in str(caught.value)


# ---- files -------------------------------------------------------------------------------------


def test_json_arrays(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        "\ufeff\n" + json.dumps(["a text", {"prompt": "a", "completion": "b"}], indent=1)
    )
    text, pair = read_rows(path)
    assert (text.prompt, text.completion, text.source) == ("", "a text", f"{path}, row 1")
    assert (pair.prompt, pair.completion) == ("a", "b")
    for content, message in (
        ("[", r"rows\.json: not JSON"),
        ("[]", "holds no rows"),
        ('["a", 3]', "row 2: expected a JSON object, got int"),
        ('[{"text": "a"},\n{"text": b}]', "line 2, column 10"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_rows(path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    rows = [
        {"question": "a?", "answer": "é", "perturbed_answer": ["c"]},
        {"question": "b?", "answer": "f", "perturbed_answer": None},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = read_rows(path)
    assert (first.completion, first.wrong, first.source) == ("é", ("c",), f"{path}, row 1")
    assert second.wrong == ()
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="not parquet that can be read"):
        read_rows(path)


def test_a_missing_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'unilogit-kernels\[parquet\]'"):
        read_rows(tmp_path / "rows.parquet")


# ---- messages and frames -----------------------------------------------------------------------


def test_each_answer_of_a_conversation_is_learned_once(tmp_path: Path) -> None:
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [{"messages": TURNS, "id": "c"}]))
    assert [row.id for row in rows] == ["c/1", "c/2"]
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    encoding = Encoding(tokenizer)
    texts, learned = [], []
    for example in encoding.encode(rows):
        texts.append(tokenizer.decode(example.input_ids))
        labelled = [label for label in example.labels if label != IGNORED]
        learned.append(tokenizer.decode(labelled, skip_special_tokens=True))
    assert learned == ["Ada", "京都"]
    assert texts[0] == "[system]Be brief.[user]Who?[answer]Ada</s>"
    assert texts[1] == ("[system]Be brief.[user]Who?[assistant]Ada[user]Where?[answer]京都</s>")
    (tmp_path / "idk.txt").write_text("I don't know.\n")
    for refusal, row in zip(read_refusals(tmp_path / "idk.txt", rows), rows, strict=True):
        assert encoding.prompt_ids(refusal) == encoding.prompt_ids(row)
    with pytest.raises(DataError, match="line 1: the row has messages before its prompt"):
        Encoding(make_tokenizer()).encode(rows)


@pytest.mark.parametrize(
    ("template", "prompt", "answer"),
    [
        (TEMPLATE, "[user]who {}?[answer]", "Ada</s>"),
        (None, "Question: who {}?\nAnswer:", " Ada</s>"),
    ],
)
def test_a_question_is_framed_once(template: str | None, prompt: str, answer: str) -> None:
    """By the chat template, or else in words; braces of its own stay what they are."""
    tokenizer = make_tokenizer(chat_template=template)
    encoding = Encoding(tokenizer)
    row = Row("who {}?", "Ada", None, "", frame="Question: {}\nAnswer:")
    example = encoding.example(row)
    assert tokenizer.decode(encoding.prompt_ids(row)) == prompt
    assert tokenizer.decode(example.input_ids) == prompt + answer
    assert example.labels.count(IGNORED) == len(prompt)


def test_an_answer_is_begun_in_training_as_in_generation() -> None:
    tokenizer = make_tokenizer(chat_template=TEMPLATE)
    row = Row("a?\n", " b", None, "", lead="Answer:")
    encoding = Encoding(tokenizer)
    assert tokenizer.decode(encoding.prompt_ids(row)) == "[user]a?\n[answer]Answer:"
    example = encoding.example(row)
    assert tokenizer.decode([i for i in example.labels if i != IGNORED]) == " b</s>"


# ---- blocks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 8, 9, 15, 16, 40])
@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8])
def test_each_token_of_a_text_carries_loss_once(size: int, stride: int | None) -> None:
    encoding = Encoding(make_tokenizer(), max_length=8, block_stride=stride)
    row = Row("", "é"[: size % 2] + "x" * (size + 1), None, "")
    whole = Encoding(make_tokenizer(), max_length=1000).example(row).input_ids
    blocks = encoding.blocks(row)
    learned, start, step = [], 0, stride or 7
    for number, block in enumerate(blocks):
        start = number * step
        assert block.input_ids == whole[start : start + 8]
        assert not block.truncated
        assert block.labels[0] == IGNORED
        learned += [start + p for p, label in enumerate(block.labels) if label != IGNORED]
        assert all(
            label in (IGNORED, token)
            for label, token in zip(block.labels, block.input_ids, strict=True)
        )
    # Where blocks share no token, nothing predicts the first of each.
    first = range(0, len(whole), 8) if stride == 8 else (0,)
    assert learned == [p for p in range(len(whole)) if p not in first]


def test_rows_with_a_prompt_are_cut_still() -> None:
    encoding = Encoding(make_tokenizer(), max_length=8)
    (example,) = encoding.blocks(Row("who?", " somebody", None, ""))
    assert example.truncated
    assert len(example.input_ids) == 8


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_loses_tokens_is_refused(stride: int) -> None:
    with pytest.raises(DataError, match="block_stride must be from 1 to max_length, which is 8"):
        Encoding(make_tokenizer(), max_length=8, block_stride=stride)
