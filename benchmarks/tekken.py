"""Mistral's tokenizer of 131,072 tokens, from the wheel of `mistral-common`.

    pip install --no-deps mistral-common==1.8.8

The wheel is data here and is not imported, so its requirements are not needed, and transformers
leaves this version alone. A newer one it would import wherever it loads a tokenizer, and fail
without them.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import MistralConverter

_PACKAGE, _FILE = "mistral_common", "tekken_240911.json"

# As `mistral-common` names those that the file only counts, up to the one for padding.
_CONTROL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>"),
)


class MissingTokenizerError(RuntimeError):
    """The wheel that holds the tokenizer is not installed."""


def save_tekken(folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer as `AutoTokenizer.from_pretrained` takes it, and return it.

    Args:
        folder: made where it is not there.

    Raises:
        MissingTokenizerError: `mistral-common` is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingTokenizerError(
            "the tokenizer is not installed; run: pip install --no-deps mistral-common==1.8.8"
        )
    source = Path(spec.submodule_search_locations[0]) / "data" / _FILE
    described = json.loads(source.read_text(encoding="utf-8"))
    described.setdefault(
        "special_tokens",
        [{"rank": rank, "token_str": name} for rank, name in enumerate(_CONTROL)],
    )
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / "tekken-source.json"
    complete.write_text(json.dumps(described), encoding="utf-8")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=MistralConverter(str(complete)).converted(),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    complete.unlink()
    tokenizer.save_pretrained(folder)
    return tokenizer
