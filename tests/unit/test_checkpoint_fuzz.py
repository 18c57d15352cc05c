"""Whatever a folder holds, the reader gives an adapter or an error that names the file, in little memory."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adapter_files import read_adapter
from loraplex.adapters.peft_config import INERT_KEYS, REFUSED_KEYS, PeftConfig
from loraplex.adapters.weights import AdapterWeights, BaseLayers
from loraplex.errors import ConfigurationError

BASE = BaseLayers(
    linear={f"model.layers.{i}.q_proj": (8, 6) for i in range(2)},
    embeddings={"model.embed_tokens": (10, 6)},
    output="lm_head",
    output_shape=(10, 6),
    tied=True,
    biases=frozenset({"model.layers.0.q_proj"}),
    hidden_size=6,
)
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "lm_head"],
    "bias": "lora_only",
    "trainable_token_indices": {"embed_tokens": [1, 4]},
}
KEYS = sorted(INERT_KEYS | REFUSED_KEYS.keys() | PeftConfig.model_fields.keys())
NAMES = ["q_proj", "embed_tokens", "lm_head", "score", ".*", "all-linear", "(", "[[a]", "(?i)x", "x" * 20_000, ""]
PARTS = [
    "lora_A.weight",
    "lora_B.bias",
    "lora_magnitude_vector",
    "lora_embedding_A",
    "weight",
    "base_layer.weight",
    "x",
]
SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([*NAMES, "CAUSAL_LM", "SEQ_CLS", "all", "lora_only", "mica", "eva", "pissa", "\ud800"])
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
)


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"model.layers.0.q_proj": (8, 6), "model.layers.1.q_proj": (8, 6), "lm_head": (10, 6)}
    made = {"model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 6)}
    for path, (rows, columns) in shapes.items():
        made[f"{path}.lora_A.weight"], made[f"{path}.lora_B.weight"] = torch.randn(2, columns), torch.randn(rows, 2)
    made["model.layers.0.q_proj.base_layer.bias"] = torch.randn(8)
    return {f"base_model.model.{name}": tensor for name, tensor in made.items()}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("valid") / "adapter_model.safetensors"
    save_file(tensors(), path)
    return path.read_bytes()


def read(folder: Path, content: bytes, config: str | None = None) -> AdapterWeights | None:
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG) if config is None else config, encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(content)
    try:
        return read_adapter(folder, BASE)
    except ConfigurationError as exc:
        assert "adapter_" in exc.message and exc.remedy
        assert len(exc.message) < 100_000
        return None


def test_what_is_mutated_is_sound(tmp_path: Path, valid: bytes) -> None:
    adapter = read(tmp_path, valid)
    assert adapter is not None and adapter.output is not None
    assert set(adapter.token_rows) == {"model.embed_tokens", "lm_head"}


@SETTINGS
@given(data=st.data())
def test_mutated_bytes(tmp_path: Path, valid: bytes, data: st.DataObject) -> None:
    content = bytearray(valid[: data.draw(st.integers(0, len(valid)))] if data.draw(st.booleans()) else valid)
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        place = data.draw(st.integers(0, min(len(content) - 1, 1200)) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content += data.draw(st.binary(max_size=8))
    read(tmp_path, bytes(content))


@SETTINGS
@given(data=st.data())
def test_mutated_headers(tmp_path: Path, valid: bytes, data: st.DataObject) -> None:
    """Headers that parse, with claims that the rest of the file may not keep."""
    (size,) = struct.unpack("<Q", valid[:8])
    header = json.loads(valid[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    entry = header.pop(name)
    what = data.draw(st.sampled_from(["shape", "dtype", "data_offsets", "name", "drop"]))
    number = st.integers(0, 2**66) | st.integers(0, 64)
    if what == "shape":
        entry["shape"] = data.draw(st.lists(number, max_size=4))
    elif what == "dtype":
        entry["dtype"] = data.draw(st.sampled_from(["F64", "F32", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "F4", "X"]))
    elif what == "data_offsets":
        entry["data_offsets"] = data.draw(st.lists(number, max_size=3))
    elif what == "name":
        path = data.draw(st.sampled_from([*BASE.linear, "lm_head", "model.embed_tokens", "score", "x" * 5000, ""]))
        name = f"base_model.model.{path}.{data.draw(st.sampled_from(PARTS))}"
    if what != "drop":
        header[name] = entry
    made = json.dumps(header).encode()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read(tmp_path, struct.pack("<Q", len(made)) + made + valid[8 + size :])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, "KiB"


@SETTINGS
@given(changed=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), values, min_size=1, max_size=3))
def test_mutated_configs(tmp_path: Path, valid: bytes, changed: dict[str, Any]) -> None:
    read(tmp_path, valid, json.dumps(CONFIG | changed))


@SETTINGS
@given(data=st.data())
def test_mutated_config_texts(tmp_path: Path, valid: bytes, data: st.DataObject) -> None:
    text = json.dumps(CONFIG)
    place = data.draw(st.integers(0, len(text)))
    read(tmp_path, valid, text[:place] + data.draw(st.text('{}[]",:01eE-.nultrfas \\', max_size=4)) + text[place:])


@pytest.mark.parametrize("depth", [50, 400, 900, 5000])
@pytest.mark.parametrize("key", ["velora_config", "loftq_config", "rank_pattern", "target_modules", "arrow_config"])
def test_deeply_nested_configs(tmp_path: Path, valid: bytes, key: str, depth: int) -> None:
    config = json.dumps(CONFIG | {key: "HERE"}).replace('"HERE"', '{"a":' * depth + "1" + "}" * depth)
    read(tmp_path, valid, config)
