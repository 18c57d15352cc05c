"""A tiny Llama with a byte-level tokenizer as a GGUF file: what llama.cpp's converter would write."""

import json
from array import array
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoConfig

from loraplex.bench import gguf

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}


def write_base(folder: Path, path: Path) -> None:
    """Write the base in `folder`, in float32."""
    config = AutoConfig.from_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text())
    special = {token["id"] for token in saved["added_tokens"]}
    vocabulary = saved["model"]["vocab"] | {token["content"]: token["id"] for token in saved["added_tokens"]}
    metadata: dict[str, gguf.Value] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": array("i", (3 if index in special else 1 for index in range(len(vocabulary)))),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in saved["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "llama.vocab_size": config.vocab_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if key in NAMES:
            tensors[NAMES[key]] = tensor
            continue
        _, _, layer, *module, _ = key.split(".")  # model.layers.0.self_attn.q_proj.weight
        name = (gguf.MODULES | NORMS)[".".join(module)]
        tensors[f"blk.{layer}.{name}.weight"] = gguf.rotated(tensor, heads[name]) if name in heads else tensor
    gguf.write(path, metadata, tensors)
