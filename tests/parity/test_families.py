"""Bases of many families give PEFT's answers in float32, with adapters side by side, one by one, and in chunks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from adapter_files import read_adapter
from families import DENSE, MIXTURES, config_of
from loraplex import Loraplex
from loraplex.engine.runner import ModelRunner
from loraplex.errors import AdapterError
from loraplex.executors.native import NativeExecutor
from loraplex.executors.peft import PeftOracle
from loraplex.model.loader import load_model, read_config, read_layers
from loraplex.planning.base_shape import shape_of, stored_sizes
from loraplex.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of names that it converts

TOLERANCE = 1e-3  # of log probabilities: random bases give labels little probability
LABELS = ["yes", "no", "at", "hello", "for two", "Agent", "is it"]
CONTRACT = {"template": "{conversation}<|ask|>", "labels": LABELS}
TEXTS = ["Customer: hi", "Customer: is my payment done? yes or no\nAgent: yes, it is done" * 4]
# Mixtures for which PEFT keeps "all-linear" to linear layers. It takes the other mixtures' experts as well.
WITH_LINEAR_EXPERTS = ("jetmoe", "qwen2_moe")
CHUNK = 48  # tokens of a step, fewer than the longer text has


def attention_names(base: Path) -> list[str]:
    """The names of the linear layers that only attention has."""
    layers, _ = read_layers(read_config(base), base)
    names = {path.rpartition(".")[2] for path in layers.linear if "att" in path}
    return sorted(names - {path.rpartition(".")[2] for path in layers.linear if "att" not in path})


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
def test_a_base_of_the_family_equals_peft(family: str, tmp_path: Path) -> None:
    tiny.save_base(tmp_path, config_of(family))
    attention = attention_names(tmp_path)
    flat = [name for name in attention if not name.endswith("_b_proj")]  # PEFT's aLoRA fails on these two's inputs
    adapters: dict[str, dict[str, Any]] = {
        "attention": {"target_modules": attention},
        "other": {"target_modules": attention, "r": 3, "use_rslora": True},
        "activated": {"target_modules": flat, "alora_invocation_tokens": [3]},
    }
    if family in DENSE or family in WITH_LINEAR_EXPERTS:
        adapters["wide"] = {"target_modules": "all-linear", "r": 2}
    for seed, (name, config) in enumerate(adapters.items()):
        tiny.save_adapter(tmp_path, tmp_path / name, contract=CONTRACT, seed=seed, **config)
    tokenizer = Tokenizer(tmp_path)
    prompts = {text: tokenizer.encode(f"{text}<|ask|>") for text in TEXTS}
    assert len(prompts[TEXTS[-1]]) > CHUNK
    labels = [tokenizer.encode(label) for label in LABELS]
    oracles = {name: PeftOracle(tmp_path, tmp_path / name, num_labels=None) for name in adapters}
    alone = [[name] for name in adapters]
    with (
        Loraplex.load(tmp_path, dtype="float32", device="cpu", kv_cache="0") as whole,
        Loraplex.load(tmp_path, dtype="float32", device="cpu", kv_cache="4MiB", max_step_tokens=CHUNK) as chunked,
    ):
        sizes, executor = shape_of(read_config(tmp_path), tmp_path).sizes, whole.service.executor
        assert isinstance(executor, NativeExecutor) and executor.model.kv_bytes == 4 * sizes.num_kv
        assert sizes == stored_sizes(read_config(tmp_path), tmp_path)
        for text, prompt in prompts.items():
            expected = {name: oracle.label_log_probs(prompt, labels) for name, oracle in oracles.items()}
            for loraplex, names in [
                (whole, list(adapters)),
                (chunked, list(adapters)),
                *((whole, one) for one in alone),
            ]:
                for verdict in loraplex.classify(text, names).verdicts:
                    assert verdict.scores is not None and verdict.label_mass is not None, verdict.error
                    found = [math.log(verdict.scores[label] * verdict.label_mass) for label in LABELS]
                    assert found == pytest.approx(expected[verdict.classifier], rel=1e-4, abs=TOLERANCE)


@pytest.mark.parametrize("family", ["flex_olmo", "minicpm3", "qwen3_moe"])
def test_rounding_to_16_bits_is_not_taken_for_another_attention(family: str, tmp_path: Path) -> None:
    """The first two make much of it: transformers' own two attentions differ by 0.3 and 0.7."""
    tiny.save_base(tmp_path, config_of(family))
    model = load_model(read_config(tmp_path), tmp_path, torch.bfloat16, torch.device("cpu"))
    ModelRunner(model).verify_packing()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_lora_on_experts_is_refused_by_name(family: str, tmp_path: Path) -> None:
    tiny.save_base(tmp_path, config_of(family))
    tiny.save_adapter(tmp_path, tmp_path / "wide", target_modules="all-linear")
    layers, _ = read_layers(read_config(tmp_path), tmp_path)
    with pytest.raises(AdapterError, match=r"'target_parameters'.*such as the experts and the router of a mixture"):
        read_adapter(tmp_path / "wide", layers)
