"""Tiny bases of many families of transformers: dense, mixtures of experts, and with a vision part."""

from collections.abc import Mapping
from typing import Any

from transformers import (
    AutoConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

import tiny

FEW_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS: Mapping[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("num_shared_experts", "n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
}
# Multi-head latent attention: heads of keys and of values have other sizes.
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
DENSE = (
    "apertus bitnet cohere2 exaone4 gemma gemma3n_text glm4 gpt_bigcode gpt_neox granite_swa hunyuan_v1_dense "
    "minicpm3 nanochat nemotron olmo olmo3 opt persimmon phi smollm3 starcoder2"
).split()
MIXTURES = (
    "afmoe deepseek_v2 deepseek_v3 ernie4_5_moe flex_olmo glm4_moe glm4_moe_lite gpt_oss granitemoe granitemoeshared "
    "hunyuan_v1_moe hy_v3 jetmoe laguna longcat_flash mimo_v2_flash minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe"
).split()


def config_of(family: str) -> PreTrainedConfig:
    """Keep what the family's own default has of a kind: windows, kinds of layers, experts."""
    default = AutoConfig.for_model(family)
    values = {**tiny._COMMON, **FEW_HEADS, **EXPERTS, "query_pre_attn_scalar": 8, "n_inner": 64}
    if hasattr(default, "kv_lora_rank"):
        values |= {**LATENT, "num_key_value_heads": 4, "head_dim": 4, "qk_head_dim": 12}
    if getattr(default, "sliding_window", None) is not None:
        values["sliding_window"] = 8
    values |= {"num_layers": 3, "ffn_dim": 64, "word_embed_proj_dim": 32, "hidden_size_per_layer_input": 8}
    values |= {"vocab_size_per_layer_input": tiny.VOCAB_SIZE, "num_kv_shared_layers": 0}
    names = getattr(type(default), "attribute_map", {})
    known = {key: value for key, value in values.items() if hasattr(default, key) and names.get(key) not in values}
    if getattr(default, "layer_types", None):
        kinds = list(dict.fromkeys(default.layer_types))
        known["layer_types"] = [kinds[index % len(kinds)] for index in range(3)]
    return type(default)(**known)


Values = dict[str, Any]
TEXT: Values = {**tiny._COMMON}
HEADS: Values = {**TEXT, "head_dim": 8}
VISION: Values = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION: Values = {"depth": 1, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 32}
IDS: Values = {"image_token_id": 300, "video_token_id": 301, "vision_start_token_id": 302, "vision_end_token_id": 303}
MROPE: Values = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
UNTIED: Values = {"tie_word_embeddings": False}
GEMMA: Values = tiny.FAMILIES["gemma3"].to_dict()
VISION_LANGUAGE: Mapping[str, PreTrainedConfig] = {
    "gemma3": Gemma3Config(text_config=GEMMA, vision_config=VISION, image_token_index=300, **UNTIED),
    "gemma3-tied": Gemma3Config(
        text_config={**GEMMA, "tie_word_embeddings": True}, vision_config=VISION, image_token_index=300
    ),
    "idefics3": Idefics3Config(text_config=LlamaConfig(**TEXT).to_dict(), vision_config=VISION, image_token_id=300),
    "internvl": InternVLConfig(
        text_config=Qwen2Config(**TEXT).to_dict(),
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        image_token_id=300,
        **UNTIED,
    ),
    "llava": LlavaConfig(
        text_config=LlamaConfig(**TEXT).to_dict(),
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_index=300,
        **UNTIED,
    ),
    "mistral3": Mistral3Config(
        text_config=MistralConfig(**HEADS, sliding_window=None).to_dict(),
        vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
        image_token_index=300,
        **UNTIED,
    ),
    "qwen2_vl": Qwen2VLConfig(
        text_config={**TEXT, **MROPE},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        **IDS,
        **UNTIED,
    ),
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config={**TEXT, **MROPE}, vision_config=QWEN_VISION, **IDS, **UNTIED),
    "qwen3_vl": Qwen3VLConfig(
        text_config={**HEADS, **MROPE}, vision_config={**QWEN_VISION, "deepstack_visual_indexes": []}, **IDS, **UNTIED
    ),
    "smolvlm": SmolVLMConfig(text_config=LlamaConfig(**TEXT).to_dict(), vision_config=VISION, image_token_id=300),
}
