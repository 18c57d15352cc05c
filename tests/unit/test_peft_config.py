"""Which layers a config means, at which rank and scaling: as PEFT's own code says it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from loraplex.adapters.peft_config import INERT_KEYS, REFUSED_KEYS, PeftConfig, read_peft_config
from loraplex.errors import AdapterError

Q = ["q_proj"]
PATHS = [
    "model.embed_tokens",
    "lm_head",
    "h.1.attn.c_attn",
    "transformer.h.10.attn.c_attn",
    *(f"model.layers.{i}.{name}" for i in (0, 1, 12) for name in ("self_attn.q_proj", "mlp.up_proj")),
    "model.layers.1.mlp.experts.7.up_proj",
    "encoder.layers.0.blocks.3.q_proj",
]
ENDS = sorted({path.split(".", cut)[-1] for path in PATHS for cut in range(6)})
REGEXES = [r".*q_proj", r".*\.layers\.[01]\..*", r"model\.layers\.1.*", r"(.*\.)?up_proj|lm_head", "all-nothing", "h"]
names = st.lists(st.sampled_from([*ENDS, "proj", "attn", "s.1"]), max_size=3)
keys = st.sampled_from([*ENDS, *REGEXES, "proj", r"\.q_proj", "layers", "q_proj|up_proj"])


@given(
    target_modules=st.sampled_from(REGEXES) | names,
    exclude_modules=st.none() | st.sampled_from(REGEXES) | names,
    modules_to_save=st.none() | st.lists(st.sampled_from(["lm_head", "embed_tokens", "mlp", "h.1"]), max_size=2),
    layers_to_transform=st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3),
    layers_pattern=st.none() | st.sampled_from(["", "layers", "h", "blocks", "(layers|h)"]) | st.just(["h", "layers"]),
    rank_pattern=st.dictionaries(keys, st.integers(1, 9), max_size=3),
    alpha_pattern=st.dictionaries(keys, st.integers(1, 9), max_size=3),
)
@example(  # the first number after a list's name is the layer's, not an expert's
    target_modules=["up_proj"],
    exclude_modules=None,
    modules_to_save=None,
    layers_to_transform=[1],
    layers_pattern=None,
    rank_pattern={},
    alpha_pattern={},
)
@settings(max_examples=250, deadline=None)
def test_layers_are_matched_as_peft_matches_them(
    target_modules: str | list[str], rank_pattern: dict[str, int], alpha_pattern: dict[str, float], **keys: Any
) -> None:
    if isinstance(target_modules, str) or keys["layers_to_transform"] is None:
        keys |= {"layers_to_transform": None, "layers_pattern": None}
    given = {"target_modules": target_modules, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, **keys}
    ours = PeftConfig(peft_type="LORA", r=8, lora_alpha=16, **given)
    theirs = LoraConfig(r=8, lora_alpha=16, **given)
    for path in PATHS:
        assert ours.targets(path, True) == bool(check_target_module_exists(theirs, path)), path
        rank = rank_pattern.get(get_pattern_key(list(rank_pattern), path), 8)
        alpha = alpha_pattern.get(get_pattern_key(list(alpha_pattern), path), 16)
        assert ours.rank_and_scaling(path) == (rank, alpha / rank), path


def test_every_key_of_pefts_config_is_known() -> None:
    """One that a new PEFT adds must be thought about, although it is refused until then."""
    known = INERT_KEYS | REFUSED_KEYS.keys() | PeftConfig.model_fields.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= known


# LoraConfig in the wheels on PyPI: the release in which a key came, the key, and the value that PEFT writes by itself.
CAME: dict[str, dict[str, Any]] = {
    "0.1.0": {
        "base_model_name_or_path": None,
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 8,
        "target_modules": Q,
        "task_type": "CAUSAL_LM",
    },
    "0.3.0": {"init_lora_weights": True},
    "0.4.0": {"auto_mapping": None, "layers_pattern": None, "layers_to_transform": None, "revision": None},
    "0.6.2": {"alpha_pattern": {}, "rank_pattern": {}},
    "0.7.1": {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"},
    "0.8.2": {"use_rslora": False},
    "0.9.0": {"use_dora": False},
    "0.10.0": {"layer_replication": None},
    "0.12.0": {"runtime_config": {"ephemeral_gpu_offload": False}},
    "0.14.0": {"eva_config": None, "exclude_modules": None, "lora_bias": False},
    "0.15.2": {"corda_config": None, "trainable_token_indices": None},
    "0.16.0": {"qalora_group_size": 16, "use_qalora": False},
    "0.17.1": {"target_parameters": None},
    "0.18.1": {
        "alora_invocation_tokens": None,
        "arrow_config": None,
        "ensure_weight_tying": False,
        "peft_version": "0.18.1",
    },
    "0.19.1": {"lora_ga_config": None, "use_bdlora": None},
    "0.20.0": {"monteclora_config": None, "velora_config": None},
    "0.21.2": {"kasa_config": None},
}
WENT = {"0.3.0": ("enable_lora", "merge_weights")}


@pytest.mark.parametrize("release", CAME)
def test_what_each_release_of_peft_writes_is_read(release: str, tmp_path: Path) -> None:
    releases = list(CAME)[: list(CAME).index(release) + 1]
    written = {key: value for one in releases for key, value in CAME[one].items()}
    for key in (key for one in releases for key in WENT.get(one, ())):
        del written[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    assert read_peft_config(tmp_path).rank_and_scaling("model.layers.0.self_attn.q_proj") == (8, 1.0)


def test_the_history_ends_with_the_keys_of_the_installed_peft() -> None:
    came = {key for keys in CAME.values() for key in keys} - {key for keys in WENT.values() for key in keys}
    assert came == {field.name for field in dataclasses.fields(LoraConfig)}


def test_keys_that_peft_retired_are_read_where_they_change_nothing(tmp_path: Path) -> None:
    """Both were in LoraConfig until 0.2.0. With enable_lora, lora_B was a convolution."""
    path = tmp_path / "adapter_config.json"
    config = CAME["0.1.0"] | {"merge_weights": True}
    path.write_text(json.dumps(config))
    assert read_peft_config(tmp_path).target_modules == Q
    path.write_text(json.dumps(config | {"enable_lora": [True, False, True]}))
    with pytest.raises(AdapterError, match="key 'enable_lora': LoRA on parts of a fused layer"):
        read_peft_config(tmp_path)


@pytest.mark.parametrize("value", [{"unsloth_fixed": True, "base_model_class": "Gemma3ForConditionalGeneration"}, None])
def test_what_unsloth_notes_in_auto_mapping_is_read(value: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CAME["0.1.0"] | {"auto_mapping": value}))
    read_peft_config(tmp_path)
