"""What cannot be served packed is refused by name; large bases load within their own size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig

import tiny
from loraplex.engine.runner import ModelRunner, lone_sequence
from loraplex.engine.step import Step
from loraplex.errors import EngineError, UnsupportedModelError
from loraplex.model.loader import build_skeleton, load_base, read_config, resolve_device, resolve_dtype

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
    ModelRunner(load_base(read_config(tmp_path), tmp_path, torch.float32, CPU)).verify_packing()


def test_a_layer_that_looks_across_texts_is_found(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    model = load_base(read_config(tmp_path), tmp_path, torch.float32, CPU)

    def roll(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(1, dims=1)

    runner = ModelRunner(model)
    runner.verify_packing()
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(roll)
    with pytest.raises(UnsupportedModelError, match="across packed texts"):
        runner.verify_packing()


def test_a_base_that_computes_no_numbers_is_refused_and_a_sequence_of_it_carries_an_error(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    model = load_base(read_config(tmp_path), tmp_path, torch.float32, CPU)
    torch.nn.init.constant_(model.get_submodule("model.norm").weight, float("nan"))  # type: ignore[arg-type]
    runner = ModelRunner(model)
    with pytest.raises(UnsupportedModelError, match="NaN"):
        runner.verify_packing()
    [(_, outcome)] = runner.run(Step.of([lone_sequence([1, 2])]))
    assert isinstance(outcome, EngineError) and "NaN" in outcome.message


def test_missing_weights_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load_base(read_config(tmp_path), tmp_path, torch.float32, CPU)


def test_a_truncated_base_is_refused(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnsupportedModelError, match="does not load"):
        load_base(read_config(tmp_path), tmp_path, torch.float32, CPU)


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
from loraplex.model.loader import load_base, read_config
import transformers.models.llama.modeling_llama
folder = Path(sys.argv[1])
config = read_config(folder)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
model = load_base(config, folder, torch.bfloat16, torch.device("cpu"))
print(peak() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


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


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gpt2"])
def test_the_last_layer_computes_the_wanted_tokens_only_where_the_family_allows(tmp_path: Path, family: str) -> None:
    gpt2 = GPT2Config(vocab_size=tiny.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    tiny.save_base(tmp_path, gpt2 if family == "gpt2" else tiny.FAMILIES[family])
    model = load_base(read_config(tmp_path), tmp_path, torch.float32, CPU)
    seen = []
    runner = ModelRunner(model)
    last = "transformer.h.1.mlp.c_proj" if family == "gpt2" else "model.layers.2.mlp.down_proj"
    model.get_submodule(last).register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    runner.run(Step.of([lone_sequence([1, 2, 3])]))
    assert seen == [3 if family == "gpt2" else 1]
