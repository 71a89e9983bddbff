"""Every causal LM class of the installed transformers, as small as its config allows."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 97
LARGEST = 8_000_000
"""Parameters of a model that counts as small."""

# By the names that configs use. Sizes fit each other: 4 heads of 8 in 32 numbers.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "hidden_dim", "embed_dim", "dim"), 32),
    **dict.fromkeys(("embedding_size", "lru_width", "emb_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_size", "kv_channels", "rotary_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_ff", "dim_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_top_k", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **dict.fromkeys(("index_head_dim",), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    "first_k_dense_replace": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}

# What single configs need beside that.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OWN: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "DbrxFFNConfig": {"moe_top_k": 2},
    "Dots1Config": {"n_shared_experts": 1},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"zero_expert_num": 2, "expert_ffn_hidden_size": 16},
    "Mamba2Config": {"num_heads": 4, "head_dim": 16},
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
    },
    "RoCBertConfig": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "Zamba2Config": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def names() -> list[str]:
    """The classes, each once, in order."""
    found: set[str] = set()
    for classes in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found.update([classes] if isinstance(classes, str) else classes)
    return sorted(found)


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """The model with random weights, in float32 and eval mode.

    Raises:
        Exception: whatever the class raises, if it cannot be built.
        ValueError: it is too large.
    """
    kind = getattr(transformers, name)
    config = small_config(kind)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters, where {LARGEST:,} are small")
    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = kind._from_config(
        config,
        dtype=torch.float32,
        experts_implementation="eager",  # the others take no float64, which the oracle is in
        attn_implementation="eager",
    )
    model.eval()
    return model


def small_config(kind: type[transformers.PreTrainedModel]) -> transformers.PretrainedConfig:
    """The config of a class, with every size as small as it can be."""
    assert kind.config_class is not None
    return _small(kind.config_class)


def _small(kind: type[transformers.PretrainedConfig]) -> transformers.PretrainedConfig:
    options: dict[str, Any] = {}
    fields = dataclasses.fields(kind)
    for field in fields:
        if field.name in _SIZES:
            options[field.name] = _SIZES[field.name]
        elif field.name.endswith("token_id") and isinstance(field.default, int):
            options[field.name] = field.default % VOCAB
    if "kv_lora_rank" in {field.name for field in fields}:
        options["num_key_value_heads"] = 4
    options.update(_OWN.get(kind.__name__, {}))
    for name, part in kind.sub_configs.items():
        if not dataclasses.is_dataclass(part):  # AutoConfig
            part = type(getattr(kind(), name))
        options[name] = _small(part)
    return kind(**options)
