"""What cannot be served packed is refused by name; large bases load within their own size."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MistralConfig

import tiny
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sequence import lone_sequence
from loraplex.engine.step import Step
from loraplex.errors import EngineError, UnsupportedModelError
from loraplex.model import loader
from loraplex.model.loader import (
    build_skeleton,
    default_step_tokens,
    load_model,
    read_config,
    resolve_device,
    resolve_dtype,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_length_dependent_rope_is_refused(tmp_path: Path, rope_type: str) -> None:
    config = json.loads(tiny.FAMILIES["llama"].to_json_string(use_diff=False))
    config["rope_parameters"] = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=rope_type):
        read_config(tmp_path)


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        build_skeleton(read_config(tmp_path), tmp_path)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}, "architectures": ["Mine"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        read_config(tmp_path)


def test_learned_positions_are_served(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, GPT2Config(vocab_size=tiny.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    ModelRunner(load_model(read_config(tmp_path), tmp_path, torch.float32, CPU)).verify_packing()


@pytest.mark.parametrize(("dtype", "gain"), [(torch.float32, 1.0), (torch.float32, 0.01), (torch.bfloat16, 0.1)])
def test_a_layer_that_looks_across_texts_is_found(tmp_path: Path, dtype: torch.dtype, gain: float) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    model: Any = load_model(read_config(tmp_path), tmp_path, dtype, CPU)
    down_proj = model.layers[1].down_proj
    plus = down_proj.plus
    runner = ModelRunner(model)
    runner.verify_packing()
    down_proj.plus = lambda *args: (out := plus(*args)) + gain * out.roll(1, dims=0)
    with pytest.raises(UnsupportedModelError, match="across packed texts"):
        runner.verify_packing()


def test_a_base_that_computes_no_numbers_is_refused_and_a_sequence_of_it_carries_an_error(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(read_config(tmp_path), tmp_path, torch.float32, CPU)
    runner = ModelRunner(model)
    with pytest.raises(UnsupportedModelError, match="NaN"):
        runner.verify_packing()
    [(_, outcome)] = runner.run(Step.of([lone_sequence([1, 2])]))
    assert isinstance(outcome, EngineError) and "NaN" in outcome.message


def test_missing_weights_are_named(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_model(read_config(tmp_path), tmp_path, torch.float32, CPU)


def test_a_truncated_base_is_refused(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors: .* was cut short"):
        load_model(read_config(tmp_path), tmp_path, torch.float32, CPU)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized .bitsandbytes"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"num_attention_heads": 0}, r"config\.json"),
        ({"hidden_size": -1}, r"config\.json"),
        ({"hidden_size": "x"}, r"config\.json"),
        ({"hidden_act": "nothing"}, r"config\.json"),
        ({"model_type": ["llama"]}, r"config\.json"),
        ({"rope_parameters": {"rope_type": "nothing"}}, r"config\.json"),
    ],
)
def test_a_broken_config_is_refused(tmp_path: Path, changed: dict[str, object], match: str) -> None:
    config = json.loads(tiny.FAMILIES["llama"].to_json_string(use_diff=False)) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=match):
        build_skeleton(read_config(tmp_path), tmp_path)


def test_an_absent_cuda_device_is_refused() -> None:
    for name in ("cuda:99", "cuda:999", "cuda:99999999999"):
        with pytest.raises(UnsupportedModelError, match="CUDA"):
            resolve_device(name)
    assert resolve_dtype("float32", CPU) == torch.float32


MEASURE = """
import resource, sys, torch
from pathlib import Path
from typing import Any
from loraplex.model.loader import load_model, read_config
folder = Path(sys.argv[1])
config = read_config(folder)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_model(config, folder, torch.bfloat16, torch.device("cpu"))
print(peak() - before, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
"""


@pytest.mark.slow
def test_a_sharded_base_loads_within_1_2_times_its_weights(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8
    )
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    out = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    peak, weights = map(int, out.stdout.split())
    assert weights > 300e6
    assert peak <= 1.2 * weights, f"{peak / weights:.2f} times the weights"


@pytest.mark.parametrize(
    ("dtype", "free_gib", "expected"),
    [(torch.bfloat16, 60, 8192), (torch.float32, 60, 4096), (torch.bfloat16, 4, 2048), (torch.bfloat16, 0, 256)],
)
def test_a_steps_tokens_fit_the_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, free_gib: int, expected: int
) -> None:
    monkeypatch.setattr(loader, "free_bytes", lambda device: free_gib << 30)
    config = MistralConfig()  # 7B
    assert default_step_tokens(torch.device("cuda"), dtype, config) == expected
    assert default_step_tokens(CPU, torch.bfloat16, config) == 2048


def test_a_gpu_that_emulates_bfloat16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """T4 and V100 emulate bfloat16, and FlashAttention refuses them."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_dtype("auto", torch.device("cuda")) == torch.float32
