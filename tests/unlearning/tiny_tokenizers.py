"""Small tokenizers of every kind that causal LMs come with, built from nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.support.tiny_models import SPECIAL, make_tokenizer

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_PIECES = ["▁", *"abcdefghijklmnopqrstuvwxyzAPQ:.?", "▁a", "▁b", "ab", "▁ab", "▁Par", "Par", "is"]
_MERGES = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("P", "a"), ("Pa", "r"), ("i", "s")]


def _fast(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerBase:
    names: dict[str, Any] = {**SPECIAL, "unk_token": "<unk>", **options}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _bpe() -> Tokenizer:
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *_BYTES, *_PIECES, "Pa"]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    return Tokenizer(models.BPE(vocabulary, _MERGES, unk_token="<unk>", byte_fallback=True))


def metaspace(scheme: str, **options: Any) -> PreTrainedTokenizerBase:
    """Sentencepiece's BPE, as it is converted now."""
    backend = _bpe()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    return _fast(backend, **options)


def legacy_llama(**options: Any) -> PreTrainedTokenizerBase:
    """Llama 2's: a space before every text, and before every text after a special token."""
    backend = _bpe()
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _fast(backend, **options)


def unigram() -> PreTrainedTokenizerBase:
    """Sentencepiece's other model."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *_BYTES, *_PIECES]
    scores = [(token, -float(9 - len(token) if token in _PIECES else 20)) for token in tokens]
    backend = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    return _fast(backend)


def word_pieces() -> PreTrainedTokenizerBase:
    """BERT's: lowercased, without accents, white space lost, and no token for what is unknown."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *letters,
        *(f"##{c}" for c in letters),
        ":",
        ".",
        "?",
    ]
    vocabulary = {token: position for position, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return _fast(backend)


def adding(tokenizer: PreTrainedTokenizerBase, pattern: str) -> PreTrainedTokenizerBase:
    """One that puts special tokens around every text by itself."""
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single=pattern, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


LOSSLESS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": lambda: make_tokenizer(merges=[("b", "c"), ("a", "b"), (":", "Ġ"), ("Ġ", "a")]),
    "bytes, started and ended": lambda: adding(make_tokenizer(), "<s> $A </s>"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first, started": lambda: adding(metaspace("first"), "<s> $A"),
    "metaspace never": lambda: metaspace("never"),
    "legacy Llama, started": lambda: adding(legacy_llama(), "<s> $A"),
    "legacy Llama, ended": lambda: adding(legacy_llama(), "$A </s>"),
    "unigram": unigram,
    "slow, ended": ByT5Tokenizer,
}
"""Those that give back most texts as they were."""
