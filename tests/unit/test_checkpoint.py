"""The adapter reader takes what it computes exactly, and names the file and the key or tensor of anything else."""

import dataclasses
import json
import math
import resource
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapter_files import read_adapter
from loraplex.adapters import checkpoint
from loraplex.adapters.checkpoint import read_unidentified
from loraplex.adapters.peft_config import MAX_CONFIG_BYTES, REFUSED_KEYS
from loraplex.adapters.weights import BaseLayers
from loraplex.errors import AdapterError

SHAPES = {f"model.layers.{i}.self_attn.{name}": (8, 6) for i in range(3) for name in ("q_proj", "v_proj")}
BASE = BaseLayers(
    linear=SHAPES,
    embeddings={"model.embed_tokens": (10, 6), "model.wpe": (4, 6)},
    output="lm_head",
    output_shape=(10, 6),
    biases=frozenset({"model.layers.0.self_attn.q_proj"}),
    other_biases=frozenset({"model.norm"}),
    hidden_size=6,
)
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
    assert adapter.num_bytes == 4 * adapter.num_parameters
    assert all(lora.scaling == 2.0 for lora in adapter.modules.values())
    assert not adapter.changes_prefix


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


def test_the_tensors_outlive_the_file_and_do_not_change_with_it(tmp_path: Path) -> None:
    """A new version written over the file must not reach an adapter that answers."""
    adapter = read_adapter(save(tmp_path), SHAPES)
    path = tmp_path / "adapter_model.safetensors"
    before = [tensor.clone() for tensor in adapter.tensors()]
    with path.open("r+b") as file:
        file.seek(-2000, 2)
        file.write(b"\0" * 2000)
    assert all(torch.equal(a, b) for a, b in zip(adapter.tensors(), before, strict=True))


def test_the_hash_is_of_contents_and_of_what_changes_them(tmp_path: Path) -> None:
    first = read_adapter(save(tmp_path), SHAPES).kv_id
    inert: dict[str, Any] = {
        "lora_dropout": 0.5,
        "base_model_name_or_path": "x",
        "inference_mode": True,
        "peft_version": "1",
    }
    assert read_adapter(save(tmp_path, **inert), SHAPES).kv_id == first
    assert read_adapter(save(tmp_path, alpha_pattern={"nothing": 3}, target_modules=".*_proj"), SHAPES).kv_id == first
    assert read_adapter(save(tmp_path, lora_alpha=8), SHAPES).kv_id != first
    assert read_adapter(save(tmp_path, use_rslora=True), SHAPES).kv_id != first
    assert read_adapter(save(tmp_path, alora_invocation_tokens=[3]), SHAPES).kv_id != first
    assert read_adapter(save(tmp_path, alora_invocation_tokens=[]), SHAPES).kv_id == first, "plain LoRA in PEFT too"
    changed = tensors()
    next(iter(changed.values()))[0, 0] += 1
    assert read_adapter(save(tmp_path, changed), SHAPES).kv_id != first
    magnitudes = {f"base_model.model.{path}.lora_magnitude_vector": torch.ones(8) for path in SHAPES}
    dora = read_adapter(save(tmp_path, tensors() | magnitudes, use_dora=True), SHAPES)
    assert dora.kv_id != first
    renamed = {f"{name}.weight": tensor for name, tensor in magnitudes.items()}
    assert read_adapter(save(tmp_path, tensors() | renamed, use_dora=True), SHAPES).kv_id == dora.kv_id


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(AdapterError, match=key) as caught:
        read_adapter(save(tmp_path, None, **{key: {"x": 1}}), SHAPES)
    assert "adapter_config.json" in caught.value.message
    assert read_adapter(save(tmp_path, None, **{key: None}), SHAPES)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "IA3"}, r"'IA3' is another method than LORA.*train the adapter with PEFT's LoraConfig"),
        ({"task_type": "IMAGE_CLS"}, "IMAGE_CLS"),
        ({"task_type": "SEQ_CLS"}, "0 classification heads"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "LoftQ"}, "LoftQ"),
        ({"a_new_key": True}, "a_new_key"),
        ({"r": 0}, "'r'"),
        ({"r": 3}, r"lora_A\.weight' has shape \[2, 6\], expected \[3, 6\]"),
        ({"rank_pattern": {"q_proj": 5}}, r"expected \[5, 6\]"),
        ({"r": 0.5}, "'r'"),
        ({"r": True}, "'r'"),
        ({"r": float("nan")}, "'r'"),
        ({"r": None}, "'r'"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"lora_alpha": 1e300}, r"lora_B\.weight' holds .* when scaled by 5e\+299"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"layers_to_transform": [0], "layers_pattern": ["("]}, "layers_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"alpha_pattern": {"x" * 10_001: 1}}, "longer than 10000"),
        ({"target_modules": 3}, "target_modules"),
        ({"target_modules": [3]}, "target_modules"),
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": None}, "target_modules.*null"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["k_proj"]}, "target_modules"),
        ({"modules_to_save": ["("]}, "modules_to_save"),
        ({"modules_to_save": [""]}, "modules_to_save"),
        (
            {"modules_to_save": ["norm"]},
            "'norm' may not be trained in full; only model.embed_tokens, .*, lm_head, score, classifier may",
        ),
        ({"modules_to_save": ["v_proj", "head"]}, "'v_proj'"),
        ({"layers_to_transform": "x"}, "layers_to_transform"),
        ({"bias": "some"}, "bias"),
        ({"bias": "all"}, "trains the bias of model.norm"),
        ({"trainable_token_indices": [1, 1]}, "twice"),
        ({"trainable_token_indices": {"embed_tokens": [1], "tokens": [2]}}, "twice"),
        ({"trainable_token_indices": {"v_proj": [1]}}, "'v_proj' is not the name"),
        ({"trainable_token_indices": {}}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3, 10]}, "has no token 10"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path: Path, config: Mapping[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        read_adapter(save(tmp_path, **config), BASE)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def drop_b(made: Tensors) -> None:
    del made[f"{FIRST}.lora_B.weight"]


def drop_layer(made: Tensors) -> None:
    del made[f"{FIRST}.lora_A.weight"], made[f"{FIRST}.lora_B.weight"]


def wrong_shape(made: Tensors) -> None:
    made[f"{FIRST}.lora_A.weight"] = torch.ones(2, 5)


def nan(made: Tensors) -> None:
    made[f"{FIRST}.lora_A.weight"][0, 0] = float("nan")


def minus_infinity(made: Tensors) -> None:
    made[f"{FIRST}.lora_B.weight"][0, 0] = -float("inf")


def integers(made: Tensors) -> None:
    made[f"{FIRST}.lora_A.weight"] = torch.ones(2, 6, dtype=torch.int32)


def other_prefix(made: Tensors) -> None:
    made["model.lora_A.weight"] = torch.ones(2, 6)


def twice(made: Tensors) -> None:
    made |= {f"{FIRST}.lora_magnitude_vector{end}": torch.ones(8) for end in ("", ".weight")}


def add(name: str, *shape: int) -> Callable[[Tensors], None]:
    def change(made: Tensors) -> None:
        made[f"base_model.model.{name}"] = torch.ones(shape)

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (drop_b, r"q_proj\.lora_B\.weight' is missing \(1 in all\): .*targets model\.layers\.0\.self_attn\.q_proj"),
        (drop_layer, r"lora_A\.weight' is missing \(2 in all\)"),
        (wrong_shape, r"lora_A\.weight' has shape \[2, 5\], expected \[2, 6\]"),
        (nan, "lora_A.weight' holds NaN"),
        (minus_infinity, "lora_B.weight' holds NaN or infinity"),
        (integers, "I32"),
        (other_prefix, r"'model\.lora_A\.weight' is not named as PEFT does"),
        (twice, "lora_magnitude_vector' twice"),
        (Tensors.clear, "no tensors"),
        (add("other.lora_A.weight", 2, 6), "no layer 'other'"),
        (add("lm_head.lora_A.weight", 2, 6), "does not target that layer"),
        (add("model.layers.0.self_attn.q_proj.lora_magnitude_vector", 8), "does not say use_dora"),
        (add("model.layers.0.self_attn.q_proj.lora_B.bias", 8), "does not say lora_bias"),
        (add("model.layers.0.self_attn.q_proj.lora_embedding_A", 2, 6), "another kind of layer"),
        (add("model.layers.0.self_attn.q_proj.base_layer.bias", 8), "has bias 'none'"),
        (add("model.layers.1.self_attn.q_proj.base_layer.bias", 8), "the base's layer has no bias"),
        (add("model.norm.bias", 8), "only the biases of linear layers"),
        (add("model.layers.0.self_attn.q_proj.lora_diag", 2), "may change the answers"),
        (add("model.layers.0.self_attn.q_proj.lora_velora_embed", 2), "may change the answers"),
        (add("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 6), "in trainable_token_indices"),
        (add("model.layers.0.mlp.weight", 2, 6), "may be trained in full"),
        (add("qa_outputs.weight", 2, 6), "may be trained in full"),
        (add("model.wpe.weight", 4, 6), "may be trained in full"),
        (add("lm_head.weight", 12, 6), "was resized"),
        (add("lm_head.weight", 10, 5), r"expected \[10, 6\]"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, change: Callable[[Tensors], None], match: str) -> None:
    made = tensors()
    change(made)
    with pytest.raises(AdapterError, match=match) as caught:
        read_adapter(save(tmp_path, made), BASE)
    assert "adapter_model.safetensors" in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize("heads", [{"score": (2, 5)}, {"score": (0, 6)}, {"score": (2, 6), "classifier": (2, 6)}])
def test_a_wrong_classification_head_is_refused(tmp_path: Path, heads: Mapping[str, tuple[int, int]]) -> None:
    made = tensors() | {f"base_model.model.{name}.weight": torch.ones(shape) for name, shape in heads.items()}
    with pytest.raises(AdapterError, match=r"classification heads|score\.weight"):
        read_adapter(save(tmp_path, made, task_type="SEQ_CLS"), BASE)


@pytest.mark.parametrize("name", ["score", "classifier"])
def test_a_classification_head_is_read(tmp_path: Path, name: str) -> None:
    made = tensors() | {
        f"base_model.model.{name}.weight": torch.ones(3, 6),
        f"base_model.model.{name}.bias": torch.ones(3),
    }
    adapter = read_adapter(save(tmp_path, made, task_type="SEQ_CLS"), BASE)
    assert adapter.score is not None and adapter.score.weight.shape == (3, 6) and adapter.score.bias is not None
    made |= {"base_model.model.lm_head.weight": torch.ones(10, 6)}
    with pytest.raises(AdapterError, match="lm_head"):  # a classifier has none
        read_adapter(save(tmp_path, made, task_type="SEQ_CLS"), BASE)


@pytest.mark.parametrize(
    ("config", "complete"),
    [
        ({"target_modules": ["q_proj"]}, False),
        ({"target_modules": r".*\.[12]\..*q_proj"}, True),
        ({"target_modules": r".*q_proj"}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"}, True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["0.self_attn.q_proj"]}, True),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*|.*v_proj"}, True),
        ({"target_modules": "all-linear"}, False),
        ({"target_modules": ["1.self_attn.q_proj"]}, False),  # and what is not targeted must have none
    ],
)
def test_the_layers_targeted_are_those_with_tensors(tmp_path: Path, config: Mapping[str, Any], complete: bool) -> None:
    """The file has q_proj in layers 1 and 2."""
    made = {key: tensor for key, tensor in tensors().items() if "q_proj" in key and "layers.0" not in key}
    if complete:
        assert len(read_adapter(save(tmp_path, made, **config), SHAPES).modules) == 2
    else:
        with pytest.raises(AdapterError, match=r"is missing|is not expected"):
            read_adapter(save(tmp_path, made, **config), SHAPES)


def test_patterns_and_flags_may_be_null(tmp_path: Path) -> None:
    null: dict[str, Any] = dict.fromkeys(("rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "modules_to_save"))
    assert read_adapter(save(tmp_path, **null), SHAPES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = read_adapter(save(tmp_path, {name: tensor.to(dtype) for name, tensor in tensors().items()}), SHAPES)
    assert {tensor.dtype for tensor in adapter.tensors()} == {dtype}


def test_a_wrong_fan_in_fan_out_is_warned_of(tmp_path: Path) -> None:
    """PEFT goes by the layer's type, with a warning, and so do we: the tensors are the same."""
    conv1d = dataclasses.replace(BASE, conv1d=frozenset(SHAPES))
    for layers, given, warned in [(BASE, False, 0), (BASE, True, 1), (conv1d, True, 0), (conv1d, False, 1)]:
        warnings = read_unidentified(save(tmp_path, fan_in_fan_out=given), layers).warnings
        assert len([warning for warning in warnings if "fan_in_fan_out" in warning]) == warned


# ------------------------------------------------------------------------------- files that are not what they say


def test_a_config_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (save(tmp_path) / "adapter_config.json").write_text('{"a":' * 100_000)
    with pytest.raises(AdapterError, match="not readable as JSON"):
        read_adapter(tmp_path, SHAPES)


def test_a_config_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (save(tmp_path) / "adapter_config.json").write_text(" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(AdapterError, match="bytes large"):
        read_adapter(tmp_path, SHAPES)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    (save(tmp_path) / name).unlink()
    with pytest.raises(AdapterError, match=name):
        read_adapter(tmp_path, SHAPES)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}", struct.pack("<Q", 2**33) + b"{}" * 9])
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (save(tmp_path) / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match="not readable as safetensors"):
        read_adapter(tmp_path, SHAPES)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AdapterError, match="not readable as safetensors"):
        read_adapter(tmp_path, SHAPES)


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_TENSORS", 11)
    with pytest.raises(AdapterError, match="12 tensors, over 11"):
        read_adapter(save(tmp_path), SHAPES)


@pytest.mark.parametrize("num_bytes", [2**42, 0])
def test_a_header_that_claims_a_huge_tensor_allocates_nothing(tmp_path: Path, num_bytes: int) -> None:
    path = save(tmp_path) / "adapter_model.safetensors"
    tensor = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, num_bytes]}
    header = json.dumps({f"{FIRST}.lora_A.weight": tensor}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match="not readable as safetensors"):
        read_adapter(tmp_path, SHAPES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, "KiB"


def test_a_tensor_that_does_not_fit_the_base_is_not_read(tmp_path: Path) -> None:
    """Only the header is: the file is sparse."""
    path = save(tmp_path) / "adapter_model.safetensors"
    tensor = {"dtype": "F32", "shape": [2**15, 2**15], "data_offsets": [0, 2**32]}
    header = json.dumps({f"{FIRST}.lora_A.weight": tensor}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2**32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError, match=r"has shape \[32768, 32768\], expected \[2, 6\]"):
        read_adapter(tmp_path, SHAPES)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, "KiB"
