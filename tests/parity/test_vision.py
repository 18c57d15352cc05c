"""Vision-language bases answer texts as PEFT does on the whole model, in float32, under current and former names."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, PaliGemmaConfig

import tiny
from adapter_files import read_adapter
from families import HEADS, UNTIED, VISION, VISION_LANGUAGE
from loraplex import Loraplex
from loraplex.errors import AdapterError, UnsupportedModelError
from loraplex.executors.peft import PeftOracle
from loraplex.model.loader import read_config, read_layers
from loraplex.text.tokenizer import Tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-3  # of log probabilities
LABELS = ["yes", "no", "at", "hello", "for two", "Agent", "is it"]
CONTRACT = {"template": "{conversation}<|ask|>", "labels": LABELS}
TEXTS = ["Customer: hi", "Customer: is my payment done? yes or no\nAgent: yes, it is done" * 3]
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "wide": {"target_modules": "all-linear", "r": 2},
    "activated": {"target_modules": ["k_proj", "o_proj"], "alora_invocation_tokens": [3]},
}


@pytest.mark.parametrize("family", VISION_LANGUAGE)
def test_a_text_is_answered_as_by_peft_on_the_whole_model(family: str, tmp_path: Path) -> None:
    """Their rotary positions in three directions are one position for a text: the oracle counts them by itself."""
    tiny.save_base(tmp_path, VISION_LANGUAGE[family])
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        tiny.save_adapter(tmp_path, tmp_path / name, contract=CONTRACT, seed=seed, **config)
    tokenizer = Tokenizer(tmp_path)
    labels = [tokenizer.encode(label) for label in LABELS]
    oracles = {name: PeftOracle(tmp_path, tmp_path / name, num_labels=None) for name in ADAPTERS}
    names = list(ADAPTERS)
    with (
        Loraplex.load(tmp_path, dtype="float32", device="cpu", kv_cache="0") as whole,
        Loraplex.load(tmp_path, dtype="float32", device="cpu", kv_cache="4MiB", max_step_tokens=48) as chunked,
    ):
        for text in TEXTS:
            prompt = tokenizer.encode(f"{text}<|ask|>")
            expected = {name: oracle.label_log_probs(prompt, labels) for name, oracle in oracles.items()}
            for loraplex, asked in [(whole, names), (chunked, names), *((whole, [name]) for name in names)]:
                for verdict in loraplex.classify(text, asked).verdicts:
                    assert verdict.scores is not None and verdict.label_mass is not None, verdict.error
                    found = [math.log(verdict.scores[label] * verdict.label_mass) for label in LABELS]
                    assert found == pytest.approx(expected[verdict.classifier], rel=1e-4, abs=TOLERANCE)
        warnings = {one.name: one.warnings for one in whole.adapters()}
    assert any("vision part changes no answer to a text" in line for line in warnings["wide"] or ())


FORMER = {"qwen2_vl": "model.", "qwen2_5_vl": "model."}  # before transformers 4.52; "language_model.model." of others


@pytest.mark.parametrize(
    "family", [family for family in VISION_LANGUAGE if family not in ("idefics3", "smolvlm", "qwen3_vl")]
)
def test_names_of_before_transformers_4_52_are_read(family: str, tmp_path: Path) -> None:
    tiny.save_base(tmp_path, VISION_LANGUAGE[family])
    folder = tmp_path / "x"
    tiny.save_adapter(tmp_path, folder, target_modules=["q_proj", "v_proj"])
    layers, _ = read_layers(read_config(tmp_path), tmp_path)
    expected, path = read_adapter(folder, layers), folder / "adapter_model.safetensors"
    assert expected.modules and not expected.modules.keys() & layers.beside_text
    tensors, former = load_file(path), FORMER.get(family, "language_model.model.")

    def save_under(begin: str) -> None:
        old, new = "base_model.model.model.language_model.", f"base_model.model.{begin}"
        save_file({name.replace(old, new): tensor for name, tensor in tensors.items()}, path)

    prompt, label = [5, 12, 19, 26], [[33], [40]]
    log_probs = PeftOracle(tmp_path, folder, num_labels=None).label_log_probs(prompt, label)
    save_under(former)
    assert read_adapter(folder, layers).kv_id == expected.kv_id
    if family not in FORMER:  # PEFT with transformers 5 no longer reads Qwen's
        again = PeftOracle(tmp_path, folder, num_labels=None).label_log_probs(prompt, label)
        assert again == pytest.approx(log_probs, abs=1e-6)
    save_under("language_model." if family in FORMER else "model.")
    with pytest.raises(AdapterError, match="is not expected"):
        read_adapter(folder, layers)


def test_a_base_that_reads_a_text_in_both_directions_is_refused(tmp_path: Path) -> None:
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**HEADS).to_dict(),
        vision_config={"model_type": "siglip_vision_model", **VISION},
        image_token_index=300,
        projection_dim=32,
        **UNTIED,
    )
    tiny.save_base(tmp_path, config)
    with pytest.raises(UnsupportedModelError, match="attends to later tokens too"):
        Loraplex.load(tmp_path, dtype="float32", device="cpu")
