"""The adapter reader takes what it computes exactly, and names the file and the key of anything else."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from loraplex.adapters.checkpoint import REFUSED_KEYS, read_adapter
from loraplex.errors import AdapterError

SHAPES = {f"model.layers.{i}.self_attn.{name}": (8, 6) for i in range(3) for name in ("q_proj", "v_proj")}
Tensors = dict[str, torch.Tensor]


def tensors(rank: int = 2) -> Tensors:
    torch.manual_seed(0)
    made = {}
    for module in SHAPES:
        made[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, 6)
        made[f"base_model.model.{module}.lora_B.weight"] = torch.randn(8, rank)
    return made


def save(folder: Path, made: Tensors | None = None, **config: Any) -> Path:
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
    settings |= {"target_modules": ["q_proj", "v_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors() if made is None else made, folder / "adapter_model.safetensors")
    return folder


def test_reads_tensors_ranks_and_scaling(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path), SHAPES)
    assert set(adapter.modules) == set(SHAPES)
    assert adapter.rank == 2
    assert adapter.num_parameters == 6 * 2 * (6 + 8)
    assert all(lora.scaling == 2.0 for lora in adapter.modules.values())


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"use_rslora": True}, 4 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 6}}, 3.0),
        ({"alpha_pattern": {r"layers\.[01]\..*": 6, "q_proj": 8}}, 3.0),  # the first match wins
        ({"alpha_pattern": {"proj": 6}}, 2.0),  # only whole parts of the path match
    ],
)
def test_scaling_follows_pefts_rules(tmp_path: Path, config: Mapping[str, Any], scaling: float) -> None:
    adapter = read_adapter(save(tmp_path, **config), SHAPES)
    assert adapter.modules["model.layers.0.self_attn.q_proj"].scaling == pytest.approx(scaling)


def test_the_hash_is_of_contents_and_of_what_changes_them(tmp_path: Path) -> None:
    first = read_adapter(save(tmp_path), SHAPES).kv_id
    assert read_adapter(save(tmp_path, lora_dropout=0.5, base_model_name_or_path="x"), SHAPES).kv_id == first
    assert read_adapter(save(tmp_path, lora_alpha=8), SHAPES).kv_id != first
    changed = tensors()
    next(iter(changed.values()))[0, 0] += 1
    assert read_adapter(save(tmp_path, changed), SHAPES).kv_id != first


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(AdapterError, match=key) as caught:
        read_adapter(save(tmp_path, None, **{key: "all" if key == "bias" else {"x": 1}}), SHAPES)
    assert "adapter_config.json" in caught.value.message
    assert read_adapter(save(tmp_path, None, **{key: "none" if key == "bias" else None}), SHAPES)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"task_type": "SEQ_CLS"}, "SEQ_CLS"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"a_new_key": True}, "a_new_key"),
        ({"r": 0}, "'r'"),
        ({"r": 3}, "has rank 2, but adapter_config.json says 3"),
        ({"rank_pattern": {"q_proj": 5}}, "says 5"),
        ({"r": 0.5}, "'r'"),
        ({"r": True}, "'r'"),
        ({"r": float("nan")}, "'r'"),
        ({"r": None}, "'r'"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_B holds .* when scaled by 5e\\+299"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"layers_pattern": ["("]}, "layers_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"target_modules": "("}, "target_modules"),
        ({"layers_to_transform": "x"}, "layers_to_transform"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, config: Mapping[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        read_adapter(save(tmp_path, **config), SHAPES)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def drop_b(made: Tensors) -> None:
    del made[f"{FIRST}.lora_B.weight"]


def drop_layer(made: Tensors) -> None:
    del made[f"{FIRST}.lora_A.weight"], made[f"{FIRST}.lora_B.weight"]


def add_magnitude(made: Tensors) -> None:
    made[f"{FIRST}.lora_magnitude_vector"] = torch.ones(8)


def add_unknown_layer(made: Tensors) -> None:
    made["base_model.model.other.lora_A.weight"] = torch.ones(2, 6)


def wrong_shape(made: Tensors) -> None:
    made[f"{FIRST}.lora_A.weight"] = torch.ones(2, 5)


def nan(made: Tensors) -> None:
    made[f"{FIRST}.lora_A.weight"][0, 0] = float("nan")


def integers(made: Tensors) -> None:
    made[f"{FIRST}.lora_A.weight"] = torch.ones(2, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop_b, "has no lora_B"),
        (drop_layer, r"targets model\.layers\.0\.self_attn\.q_proj, which has no tensors"),
        (add_magnitude, "lora_magnitude_vector"),
        (add_unknown_layer, "no linear layer 'other'"),
        (wrong_shape, r"lora_A \[2, 5\].*8 x 6"),
        (nan, "NaN"),
        (integers, "I32"),
        (Tensors.clear, "no tensors"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, change: Callable[[Tensors], None], match: str) -> None:
    made = tensors()
    change(made)
    with pytest.raises(AdapterError, match=match) as caught:
        read_adapter(save(tmp_path, made), SHAPES)
    assert "adapter_model.safetensors" in caught.value.message


@pytest.mark.parametrize(
    ("config", "complete"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": r".*\.1\..*q_proj"}, True),
        ({"target_modules": r".*\.0\..*q_proj"}, False),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 2]}, True),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 0}, False),
        ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, True),
        ({"target_modules": ["v_proj", "q_proj"], "exclude_modules": ["0.self_attn.v_proj"]}, True),
        ({"target_modules": "all-linear"}, True),
    ],
)
def test_every_targeted_layer_must_have_its_tensors(tmp_path: Path, config: Mapping[str, Any], complete: bool) -> None:
    """The file lacks layers.0.self_attn.v_proj, and layers.0.self_attn.q_proj too where the targets say layers 1, 2."""
    made = {key: tensor for key, tensor in tensors().items() if "layers.0.self_attn.v_proj" not in key}
    if "layers_to_transform" in config or isinstance(config["target_modules"], str):
        drop_layer(made)
    if complete:
        assert read_adapter(save(tmp_path, made, **config), SHAPES)
    else:
        with pytest.raises(AdapterError, match="which has no tensors"):
            read_adapter(save(tmp_path, made, **config), SHAPES)


def test_patterns_may_be_null(tmp_path: Path) -> None:
    assert read_adapter(save(tmp_path, rank_pattern=None, alpha_pattern=None), SHAPES)


def test_a_config_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (save(tmp_path) / "adapter_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(AdapterError, match="not readable as JSON"):
        read_adapter(tmp_path, SHAPES)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}"])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (save(tmp_path) / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="not readable as safetensors"):
        read_adapter(tmp_path, SHAPES)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AdapterError, match="not readable as safetensors"):
        read_adapter(tmp_path, SHAPES)
