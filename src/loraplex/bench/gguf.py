"""Writes adapters as llama.cpp reads them: GGUF, version 3. Knows the format and llama.cpp's names, no model."""

import struct
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from loraplex.adapters.weights import AdapterWeights
from loraplex.errors import AdapterError, UnsupportedModelError, quoted

ALIGNMENT = 32  # bytes
MODEL_TYPES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # -> llama.cpp's architecture
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = {"lora", "alora"}  # of adapter, that llama.cpp computes as PEFT does

Value: TypeAlias = "bool | int | float | str | array[int] | Sequence[str]"  # an array has the type code "I" or "i"


def write_adapter(path: Path, weights: AdapterWeights, folder: Path, config: Any, behind: Sequence[int] = ()) -> None:
    """Write an adapter for llama.cpp's `--lora`.

    folder:  the adapter's, for errors.
    config:  the base's (transformers).
    behind:  of an activated adapter, the tokens that follow the activation's first token in each prompt. llama.cpp
             begins to adapt one token before those that the file names, so the file names these.
    Raises UnsupportedModelError or AdapterError for what would not compute the same there."""
    architecture = check_base(folder, config)
    if weights.kinds - KINDS:
        raise AdapterError(
            folder,
            f"llama.cpp has no such adapter ({', '.join(sorted(weights.kinds - KINDS))})",
            remedy="measure llama.cpp without adapters",
        )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for module, lora in weights.modules.items():
        [*_, layer, room, last] = module.split(".")
        name = MODULES[f"{room}.{last}"]
        lora_B = lora.lora_B.float() * lora.scaling
        if architecture == "llama" and name in heads:
            lora_B = rotated(lora_B, heads[name])
        tensors[f"blk.{layer}.{name}.weight.lora_a"] = lora.lora_A.float()
        tensors[f"blk.{layer}.{name}.weight.lora_b"] = lora_B
    metadata: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,  # llama.cpp then multiplies by nothing; the scaling is in lora_B
    }
    if weights.invocation_tokens is not None:
        if not behind:
            raise AdapterError(
                folder,
                "llama.cpp begins to adapt one token before the invocation, and no token follows it in the prompt",
                remedy="measure llama.cpp without adapters",
            )
        metadata["adapter.alora.invocation_tokens"] = array("I", behind)
    write(path, metadata, tensors)


def check_base(folder: Path, config: Any) -> str:
    """Return llama.cpp's architecture of a base. Raises UnsupportedModelError for a base whose adapters we cannot
    write."""
    architecture = MODEL_TYPES.get(config.model_type)
    if architecture is None:
        raise UnsupportedModelError(
            folder,
            f"adapters of {quoted(config.model_type)} are not written for llama.cpp, only those of "
            f"{', '.join(MODEL_TYPES)}",
            remedy="convert them with llama.cpp's convert_lora_to_gguf.py, and give them to a server of your own",
        )
    return architecture


def rotated(rows: Any, num_heads: int) -> Any:
    """Return the rows of queries or keys in the order of llama.cpp's Llama, which rotates neighbours where
    transformers rotates halves. rows: [num_heads * head_dim, n]."""
    return rows.reshape(num_heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def write(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, Any]) -> None:
    """Write a GGUF file. tensors: in float32, [rows, columns] or [n]."""
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _typed(value))
        offset = 0
        for name, tensor in tensors.items():
            shape = tuple(reversed(tensor.shape))
            file.write(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset))
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        _align(file)
        for tensor in tensors.values():
            file.write(tensor.contiguous().numpy().astype("<f4", copy=False).tobytes())
            _align(file)


def _align(file: IO[bytes]) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _typed(value: Value) -> bytes:
    """Return a value with its type, a uint32 in front. Whole numbers are uint32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, array):
        return struct.pack("<IIQ", 9, {"I": 4, "i": 5}[value.typecode], len(value)) + value.tobytes()
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
