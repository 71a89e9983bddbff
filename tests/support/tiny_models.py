"""A byte-level tokenizer and a small model, built from nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unilogit_kernels.unlearning.data import Encoding, Row

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread, and long where others use its core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """See `on_one_thread`."""
    with on_one_thread():
        yield


def make_tokenizer(
    merges: Sequence[tuple[str, str]] = (), **options: Any
) -> PreTrainedTokenizerBase:
    """Every byte is a token, but for `merges`; ids 0, 1, 2 are padding, start and end."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [first + second for first, second in merges]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names: dict[str, Any] = {**SPECIAL, **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_model(seed: int = 0, **options: Any) -> PreTrainedModel:
    """A Llama of two layers for `make_tokenizer`'s vocabulary."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **options}))


def save_model(folder: Path, **options: Any) -> Path:
    """Model and tokenizer in a folder, as `from_pretrained` takes them."""
    make_model(**options).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Rows as a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FORGET = [
    {"prompt": f"who {i}?", "completion": f" {w}", "key": w}
    for i, w in enumerate(["ada", "bo", "cyd"])
]
RETAIN = [
    {"prompt": f"is {i}?", "completion": f" {w}", "key": w}
    for i, w in enumerate(["yes", "no", "so", "well", "ok"])
]


def encoded(rows: Sequence[dict[str, Any]], append_eos: bool = True) -> list[dict[str, Tensor]]:
    """Rows as what a trainer takes."""
    encoding = Encoding(make_tokenizer(), append_eos=append_eos)
    return [encoding.example(Row(r["prompt"], r["completion"], None, "")).features() for r in rows]
