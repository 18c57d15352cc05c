"""Tiny bases of many families of transformers, dense and mixtures of experts."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import tiny

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
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
    values = {**tiny._COMMON, **HEADS, **EXPERTS, "query_pre_attn_scalar": 8, "n_inner": 64}
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
