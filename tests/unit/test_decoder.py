"""Our decoder against transformers' models of the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

import tiny
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sequence import SequenceOutput, Target, lone_sequence
from loraplex.engine.step import Step
from loraplex.model.base_weights import BaseWeights
from loraplex.model.decoder import FAMILIES, Decoder, decoder_layers, decodes
from loraplex.model.loader import base_layers, build_skeleton, load_model, read_config

CPU = torch.device("cpu")
IDS = [(11 + 7 * i) % tiny.VOCAB_SIZE for i in range(40)]
COMMON: dict[str, Any] = tiny.FAMILIES["llama"].to_dict() | {"rope_parameters": None}
VARIANTS: dict[str, PreTrainedConfig] = {
    **{name: config for name, config in tiny.FAMILIES.items() if config.model_type in FAMILIES},
    "tied": LlamaConfig(**{**COMMON, "tie_word_embeddings": True}),
    "biases": LlamaConfig(**{**COMMON, "attention_bias": True, "mlp_bias": True}),
    "head_dim": LlamaConfig(**{**COMMON, "head_dim": 16}),
    "one_kv_head": LlamaConfig(**{**COMMON, "num_key_value_heads": 1}),
    "qwen2-window": Qwen2Config(
        **{**COMMON, "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    ),
    "qwen3-bias": Qwen3Config(**{**COMMON, "model_type": "qwen3", "head_dim": 8, "attention_bias": True}),
    **{
        f"rope-{kind}": LlamaConfig(**{**COMMON, "rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **more}})
        for kind, more in {
            "linear": {"factor": 4.0},
            "llama3": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        }.items()
    },
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_it_computes_what_transformers_computes(tmp_path: Path, name: str) -> None:
    tiny.save_base(tmp_path, VARIANTS[name])
    config = read_config(tmp_path)
    model = load_model(config, tmp_path, torch.float32, CPU)
    assert isinstance(model, Decoder)
    reference: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    expected = reference(torch.tensor([IDS])).logits[0].log_softmax(-1)
    targets = [Target(position=-1, token_id=i) for i in range(tiny.VOCAB_SIZE)]
    [(_, output)] = ModelRunner(model).run(Step.of([lone_sequence(IDS, *targets)]))
    assert isinstance(output, SequenceOutput)
    torch.testing.assert_close(torch.tensor(output.log_probs), expected[-1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_it_knows_its_layers_without_transformers(tmp_path: Path, name: str) -> None:
    tiny.save_base(tmp_path, VARIANTS[name])
    config = read_config(tmp_path)
    assert decoder_layers(config) == base_layers(build_skeleton(config, tmp_path))


def test_other_bases_are_left_to_transformers(tmp_path: Path) -> None:
    for name, config in {
        **{name: config for name, config in tiny.FAMILIES.items() if config.model_type not in FAMILIES},
        "gelu": LlamaConfig(**{**COMMON, "hidden_act": "gelu"}),
    }.items():
        tiny.save_base(tmp_path / name, config)
        assert not decodes(read_config(tmp_path / name), BaseWeights(tmp_path / name))


def test_the_last_layer_computes_the_wanted_tokens_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    model = load_model(read_config(tmp_path), tmp_path, torch.float32, CPU)
    assert isinstance(model, Decoder)
    seen = {}
    for index in (1, 2):
        layer = model.layers[index].down_proj.base_layer
        layer.register_forward_hook(lambda module, args, output, index=index: seen.update({index: len(output)}))
    ModelRunner(model).run(Step.of([lone_sequence([1, 2, 3])]))
    assert seen == {1: 3, 2: 1}
