"""Whatever the tokenizer, a row's ids decode to its prompt, its completion and its end."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from tests.support.tiny_models import make_tokenizer
from tests.unlearning.tiny_tokenizers import LOSSLESS, adding, legacy_llama, metaspace, word_pieces
from unilogit_kernels.unlearning.data import DataError, Encoding, Row

PIECES = [*"abc:", " ", "  ", "\n", "\t", "Par", "is", "é", "e\u0301", "東京", "🙂", "</s>", "<s>"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
COMPLETIONS = TEXTS.filter(str.strip)


@cache
def made(name: str) -> PreTrainedTokenizerBase:
    return {**LOSSLESS, "word pieces": word_pieces}[name]()


def row(prompt: str, completion: str) -> Row:
    return Row(prompt, completion, None, "rows.jsonl, line 1")


def written(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def parts(tokenizer: PreTrainedTokenizerBase, given: Row) -> tuple[str, str]:
    """What the ids of a row's prompt, and what its labels say, without what is put before it."""
    encoding = Encoding(tokenizer, append_eos=False)
    prompt, example = encoding.prompt_ids(given), encoding.example(given)
    assert example.input_ids[: len(prompt)] == prompt
    if prompt:
        assert example.labels == [-100] * len(prompt) + example.input_ids[len(prompt) :]
    start = tokenizer.bos_token_id
    added = int(prompt[:1] == [start] and not given.prompt.startswith("<s>"))
    said = written(tokenizer, prompt[added:])
    whole = written(tokenizer, example.input_ids[added:])
    assert whole.startswith(said)
    return said, whole[len(said) :]


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompt=TEXTS, completion=COMPLETIONS)
def test_ids_decode_to_prompt_and_completion(name: str, prompt: str, completion: str) -> None:
    tokenizer = made(name)
    completion += "" if prompt else "ab"  # Of a text, the first token is not learned.
    said, learned = parts(tokenizer, row(prompt, completion))
    assert "".join((said + learned).split()) == "".join((prompt + completion).split())
    first = prompt or completion
    if written(tokenizer, tokenizer(first, add_special_tokens=False)["input_ids"]) == first:
        assert (said, learned) == (prompt, completion)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Answer: ", "Paris"), ("Answer:", " Paris"), ("a", "b"), ("a\n", "b")],
)
def test_no_space_appears_or_goes(name: str, prompt: str, completion: str) -> None:
    assert parts(made(name), row(prompt, completion)) == (prompt, completion)


@pytest.mark.parametrize("pattern", ["<s> $A", "$A </s>", "<s> $A </s>"])
def test_special_tokens_that_a_tokenizer_adds_come_once(pattern: str) -> None:
    tokenizer = adding(make_tokenizer(), pattern)
    start = "<s>" if pattern.startswith("<s>") else ""
    for completion in ("b", "b</s>"):
        for prompt in ("a ", start + "a "):
            example = Encoding(tokenizer).example(row(prompt, completion))
            assert tokenizer.decode(example.input_ids) == f"{start}a b</s>"
            assert tokenizer.decode([i for i in example.labels if i >= 0]) == "b</s>"


def test_a_tokenizer_that_folds_text_is_held_to_what_it_makes_of_the_whole() -> None:
    tokenizer = made("word pieces")
    encoding = Encoding(tokenizer, append_eos=False)
    for prompt, completion in [("Is it:", " Café?"), ("a\n", "b"), ("a", "b"), ("a ", "b")]:
        ids = encoding.example(row(prompt, completion)).input_ids
        assert ids == tokenizer(prompt + completion)["input_ids"]


@pytest.mark.parametrize(("prompt", "completion"), [("a 東:", " b"), ("a:", " 東")])
def test_what_a_tokenizer_has_no_token_for_is_refused(prompt: str, completion: str) -> None:
    with pytest.raises(DataError, match=r"line 1: the tokenizer cannot write this: of .*東.*<unk>"):
        Encoding(made("word pieces")).example(row(prompt, completion))


IM = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role + ':' + m.content + '#end ' }}{% endfor %}"


@pytest.mark.parametrize("completion", ["Yes", "Yes{}"])
@pytest.mark.parametrize(
    ("template", "end"), [(IM, "<|end|>"), (INST, " </s>"), (PLAIN, "#end"), (None, "</s>")]
)
@pytest.mark.parametrize("kind", ["bytes", "metaspace", "legacy Llama"])
def test_rows_learn_the_end_that_the_template_writes(
    kind: str, template: str | None, end: str, completion: str
) -> None:
    make = {
        "bytes": make_tokenizer,
        "metaspace": lambda **names: metaspace("always", **names),
        "legacy Llama": legacy_llama,
    }[kind]
    tokenizer = make(chat_template=template)
    if template == IM:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    encoding = Encoding(tokenizer)
    # An end that the row has already is not written again.
    given = row("hi", completion.format(end.strip()))
    prompt = encoding.prompt_ids(given)
    ids = encoding.example(given).input_ids
    learned = written(tokenizer, ids)[len(written(tokenizer, prompt)) :]
    assert learned == "Yes" + (end.strip() if "{" in completion else end)
    token = tokenizer.convert_tokens_to_ids(end.strip())
    assert encoding.end_ids == {2} if template == PLAIN else encoding.end_ids == {2, token}
    assert encoding.end_strings == (("#end",) if template == PLAIN else ())


THINKS = IM.replace(
    "assistant\n", "assistant\n' + ('<think></think>' if no_thought else '<think>') + '"
)


def test_a_completion_is_not_learned_as_a_thought() -> None:
    tokenizer = make_tokenizer(chat_template=THINKS)
    with pytest.raises(
        DataError, match=r"line 1: the chat template opens a thought.*thinking=false"
    ):
        Encoding(tokenizer).example(row("a <think>?", "b"))
    example = Encoding(tokenizer).example(row("a?", "hm</think>b"))
    assert "assistant\n<think>hm</think>b" in tokenizer.decode(example.input_ids)
    told = Encoding(tokenizer, template_arguments={"no_thought": True})
    assert "<think></think>b<|end|>" in tokenizer.decode(told.example(row("a?", "b")).input_ids)


def test_template_arguments_that_reach_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="knows no argument 'no_tought'"):
        Encoding(make_tokenizer(chat_template=THINKS), template_arguments={"no_tought": True})
    with pytest.raises(DataError, match="no prompt goes through a template"):
        Encoding(make_tokenizer(), template_arguments={"no_thought": True})


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no\nway') }}", "{% for %}", "{{ 1 + 'a' }}"]
)
def test_a_template_that_fails_is_named_in_one_line(template: str) -> None:
    with pytest.raises(
        DataError, match=r"line 1: the tokenizer's chat template fails \(\w+: "
    ) as caught:
        Encoding(make_tokenizer(chat_template=template)).example(row("a", "b"))
    assert "\n" not in str(caught.value)
    mute = "{{ messages[0].content }}"
    with pytest.raises(DataError, match="does not write the answers"):
        Encoding(make_tokenizer(chat_template=mute)).example(row("a", "b"))


def test_a_prompt_of_no_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="line 1: the tokenizer cannot write this"):
        Encoding(made("word pieces")).example(row("\u200b", "b"))
