"""What PEFT writes is read as PEFT means it: merged into the base by the definition of each part, an adapter gives
PEFT's logits, and without any one of its parts it does not. What PEFT rejects is refused."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from adapter_files import read_adapter
from loraplex.adapters.weights import AdapterWeights, LoRAWeights, SavedModule
from loraplex.errors import AdapterError
from loraplex.model.loader import base_layers
from peft_cases import CASES, EMBEDDING, GPT2, HEAD, SEQ, Bases, Case, Q, logits, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of embeddings, ties and what else it thinks unwise

TOLERANCE = 1e-5  # of the largest logit


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models are tiny: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


def merge(model: Any, adapter: AdapterWeights) -> Any:
    """The definition of AdapterWeights, on the whole prompt."""
    head = model.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())  # no longer tied
    model.requires_grad_(False)
    saved = dict(adapter.saved) | ({} if adapter.score is None else {"score": adapter.score})
    for path, module in saved.items():
        layer = model.get_submodule(path)
        assert layer.weight.shape == module.weight.shape
        layer.weight.copy_(module.weight)
        if module.bias is not None:
            layer.bias.copy_(module.bias)
    for path, bias in adapter.biases.items():
        model.get_submodule(path).bias.copy_(bias)
    for path, (ids, rows) in adapter.token_rows.items():
        model.get_submodule(path).weight[list(ids)] = rows
    loras = {**adapter.modules, **adapter.embeddings}
    if adapter.output is not None:
        loras[adapter.output_path or ""] = adapter.output
    for path, lora in loras.items():
        layer = model.get_submodule(path)
        is_transposed = isinstance(layer, Conv1D | nn.Embedding)
        weight = layer.weight.T if is_transposed else layer.weight  # [out, in]
        merged = weight + lora.scaling * lora.lora_B @ lora.lora_A
        if lora.magnitude is not None:
            merged = merged * (lora.magnitude / merged.norm(dim=1))[:, None]
        layer.weight.copy_(merged.T if is_transposed else merged)
        if lora.lora_bias is not None:
            base = 0 if layer.bias is None else layer.bias
            layer.bias = nn.Parameter(base + lora.scaling * lora.lora_bias, requires_grad=False)
    return model


def without_parts(adapter: AdapterWeights) -> Iterator[tuple[str, AdapterWeights]]:
    """Each part that is there, switched off."""
    for part in ("modules", "embeddings", "saved", "biases", "token_rows"):
        for path in list(getattr(adapter, part))[-2:]:
            rest: Any = {other: value for other, value in getattr(adapter, part).items() if other != path}
            yield part, dataclasses.replace(adapter, **{part: rest})
    if adapter.output is not None:
        yield "output", dataclasses.replace(adapter, output=None)
    if adapter.score is not None:
        zero = SavedModule(weight=torch.zeros_like(adapter.score.weight))
        yield "score", dataclasses.replace(adapter, score=zero)
    nothing: Any = None
    for kind in ("modules", "embeddings"):
        for part in ("lora_bias", "magnitude"):
            found: Mapping[str, LoRAWeights] = getattr(adapter, kind)
            without: Any = {path: dataclasses.replace(lora, **{part: nothing}) for path, lora in found.items()}
            if any(getattr(lora, part) is not None for lora in found.values()):
                yield part, dataclasses.replace(adapter, **{kind: without})


def differ(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_merged_into_the_base_gives_pefts_logits(name: str, bases: Bases, tmp_path: Path) -> None:
    case = CASES[name]
    write(bases, tmp_path, case)
    expected = logits(PeftModel.from_pretrained(bases.load(case.base, case.is_classifier), tmp_path))
    causal = bases.load(case.base)
    read = read_adapter(tmp_path, base_layers(causal))

    def difference(adapter: AdapterWeights) -> float:
        return differ(logits(merge(bases.load(case.base, case.is_classifier), adapter)), expected)

    assert difference(read) <= TOLERANCE

    adapter = read.without_base_copies(causal.state_dict().get).with_content_id()
    assert difference(adapter) <= TOLERANCE
    parts = set()
    for part, without in without_parts(adapter):
        parts.add(part)
        assert difference(without) > 100 * TOLERANCE, f"{part} may be missing"
    assert parts == case.parts
    copied = {part for part in ("saved", "biases") if getattr(read, part) and not getattr(adapter, part)}
    assert copied == case.copies
    assert (read.kv_id != adapter.kv_id) == bool(copied or len(read.saved) != len(adapter.saved))
    assert not adapter.is_zero
    assert adapter.rank == max(case.config.get("rank_pattern", {"": 2}).values())


# A case, a part of its tensors' names, another name for the part, and whether PEFT reads it.
NAMES: list[tuple[str, str, str, bool]] = [
    ("lora", "lora_A.weight", "lora_A.default.weight", True),
    ("lora", "lora_B.weight", "lora_B.default.weight", True),
    ("lora", "lora_A.weight", "lora_A.other.weight", False),
    ("lora", "lora_A.weight", "default.lora_A.weight", False),
    ("lora-bias", "lora_B.bias", "lora_B.default.bias", True),
    ("dora", "lora_magnitude_vector", "lora_magnitude_vector.weight", True),
    ("dora", "lora_magnitude_vector", "lora_magnitude_vector.default.weight", True),
    ("dora", "lora_magnitude_vector", "lora_magnitude_vector.default", False),
    ("embedding", "lora_embedding_A", "lora_embedding_A.default", True),
    ("embedding", "lora_embedding_B", "lora_embedding_B.default", True),
    ("embedding", "lora_embedding_A", "lora_embedding_A.weight", False),
    ("save-embedding", "embed_tokens.weight", "embed_tokens.modules_to_save.default.weight", False),
    ("save-embedding", "embed_tokens.weight", "embed_tokens.modules_to_save.weight", False),
    ("seq", "score.weight", "score.modules_to_save.default.weight", False),
    ("tokens", "trainable_tokens_delta", "trainable_tokens_delta.default", False),
]


@pytest.mark.parametrize(("name", "part", "other", "is_read"), NAMES, ids=str)
def test_a_tensor_is_read_under_each_name_that_peft_reads(
    name: str, part: str, other: str, is_read: bool, bases: Bases, tmp_path: Path
) -> None:
    case = CASES[name]
    write(bases, tmp_path, case)
    layers, path = base_layers(bases.load(case.base)), tmp_path / "adapter_model.safetensors"
    expected = logits(PeftModel.from_pretrained(bases.load(case.base, case.is_classifier), tmp_path))
    kv_id, tensors = read_adapter(tmp_path, layers).kv_id, load_file(path)
    assert any(part in key for key in tensors)
    save_file({key.replace(part, other): tensor for key, tensor in tensors.items()}, path)
    try:
        found = logits(PeftModel.from_pretrained(bases.load(case.base, case.is_classifier), tmp_path))
        assert is_read == (differ(found, expected) <= TOLERANCE)
    except KeyError:
        assert not is_read
    if is_read:
        assert read_adapter(tmp_path, layers).kv_id == kv_id
    else:
        with pytest.raises(AdapterError):
            read_adapter(tmp_path, layers)


# ------------------------------------------------------------------------------- what PEFT rejects or gets wrong


@pytest.fixture(scope="module")
def plain(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write(bases, folder, CASES["lora"])
    return folder


def with_config(plain: Path, folder: Path, **config: Any) -> Path:
    """The plain adapter with other keys in its config."""
    written = json.loads((plain / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    shutil.copy(plain / "adapter_model.safetensors", folder)
    return folder


@pytest.mark.parametrize(
    ("base", "config", "key"),
    [
        ("llama", {"use_dora": True, "alora_invocation_tokens": [3]}, "use_dora"),
        ("llama", {"init_lora_weights": "mica", "alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ("llama", {"velora_config": {"num_groups": 2}, "use_dora": True}, "use_dora"),
        ("llama", {"target_modules": EMBEDDING, "alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ("llama", {"target_modules": EMBEDDING, "velora_config": {"num_groups": 2}}, "velora_config"),
        ("llama", {"target_modules": EMBEDDING, "lora_bias": True}, "lora_bias"),
        ("llama", {"lora_bias": True, "use_dora": True}, "lora_bias"),
        ("llama", {"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias"),
        ("llama", {"init_lora_weights": "sideways"}, "init_lora_weights"),
        ("llama", {"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform"),
        ("llama", {"layers_pattern": "layers"}, "layers_pattern"),
        ("llama", {"exclude_modules": ["q_proj"]}, "target_modules"),
        ("llama", {"rank_pattern": {"(?i)q_proj": 2}}, "rank_pattern"),
        ("llama", {"target_modules": EMBEDDING, "trainable_token_indices": [3]}, "trainable_token_indices"),
        ("llama", {"trainable_token_indices": [999]}, "trainable_token_indices"),
        ("llama", {"trainable_token_indices": [-1]}, "trainable_token_indices"),
        ("llama", {"trainable_token_indices": []}, "trainable_token_indices"),
        ("llama", {"trainable_token_indices": {"nothing": [3]}}, "trainable_token_indices"),
        (
            "llama",
            {"modules_to_save": ["embed_tokens"], "trainable_token_indices": [3]},
            "trainable_token_indices",
        ),
        ("llama-tied", {"modules_to_save": ["lm_head"], "trainable_token_indices": [3]}, "trainable_token_indices"),
        (
            "llama-tied",
            {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}, "ensure_weight_tying": True},
            "trainable_token_indices",
        ),
        (
            "llama-tied",
            {"target_modules": HEAD, "use_dora": True, "trainable_token_indices": [3]},
            "trainable_token_indices",
        ),
    ],
)
def test_what_peft_rejects_is_refused(
    base: str, config: Mapping[str, Any], key: str, bases: Bases, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=f"adapter_config.json.* key '{key}") as caught:
        read_adapter(with_config(plain, tmp_path, **config), base_layers(bases.load(base)))
    assert caught.value.remedy
    with pytest.raises(Exception) as rejected:  # what it happens to run into
        given: dict[str, Any] = {"target_modules": Q, "task_type": "CAUSAL_LM", **config}
        logits(get_peft_model(bases.load(base), LoraConfig(**given)))
    assert not isinstance(rejected.value, AdapterError)


def test_activated_lora_that_peft_would_not_activate_is_refused(bases: Bases, tmp_path: Path) -> None:
    """It answers from the base, where it was trained on the base alone."""
    case = Case("llama", frozenset({"score"}), {"target_modules": Q, "alora_invocation_tokens": [3], **SEQ}, {})
    write(bases, tmp_path, case)
    peft = PeftModel.from_pretrained(bases.load("llama", True), tmp_path)
    saved = SavedModule(weight=load_file(tmp_path / "adapter_model.safetensors")["base_model.model.score.weight"])
    base = merge(bases.load("llama", True), AdapterWeights(modules={}, kv_id="", score=saved))
    assert differ(logits(peft), logits(base)) <= TOLERANCE
    with pytest.raises(AdapterError, match="'task_type'"):
        read_adapter(tmp_path, base_layers(bases.load("llama")))


def test_a_head_whose_bias_peft_drops_is_refused(bases: Bases, tmp_path: Path) -> None:
    case = Case("phi", frozenset(), {"target_modules": Q, "trainable_token_indices": {"lm_head": [3]}}, {})
    write(bases, tmp_path, case)
    untouched = logits(PeftModel.from_pretrained(bases.load("phi"), tmp_path))[..., 4:]
    base = bases.load("phi")
    without_rows = load_file(tmp_path / "adapter_model.safetensors")
    assert (untouched + base.lm_head.bias[4:] - untouched).abs().max() > 0.1, "the bias does matter"
    modules = {
        path: LoRAWeights(
            lora_A=without_rows[f"base_model.model.{path}.lora_A.weight"],
            lora_B=without_rows[f"base_model.model.{path}.lora_B.weight"],
            scaling=1.5,
        )
        for path in base_layers(base).linear
        if path.endswith("q_proj")
    }
    merged = logits(merge(bases.load("phi"), AdapterWeights(modules=modules, kv_id="")))[..., 4:]
    assert differ(merged - base.lm_head.bias[4:], untouched) <= TOLERANCE
    with pytest.raises(AdapterError, match="drops the bias of lm_head"):
        read_adapter(tmp_path, base_layers(base))


def test_a_trained_norm_is_refused(bases: Bases, tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("gpt2", {"target_modules": GPT2, "bias": "all"}, "key 'bias'.*transformer.h.0.ln_1"),
        ("llama", {"target_modules": Q, "modules_to_save": ["norm"]}, "key 'modules_to_save'.*'norm'"),
        ("llama", {"target_modules": Q, "modules_to_save": ["o_proj"]}, "key 'modules_to_save'.*'o_proj'"),
    ]
    for base, config, match in refused:
        write(bases, tmp_path, Case(base, frozenset(), config, {}))
        with pytest.raises(AdapterError, match=match):
            read_adapter(tmp_path, base_layers(bases.load(base)))


def test_a_resized_embedding_is_refused(bases: Bases, tmp_path: Path) -> None:
    peft = bases.load("llama")
    peft.resize_token_embeddings(tiny.VOCAB_SIZE + 8)
    get_peft_model(peft, LoraConfig(target_modules=Q, modules_to_save=["embed_tokens"])).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"has shape \[328, 32\], expected \[320, 32\]: the embedding was resized"):
        read_adapter(tmp_path, base_layers(bases.load("llama")))


@pytest.mark.parametrize("name", ["head", "head-tied", "head-bias", "embedding", "embedding-tied", "copied-tied"])
def test_a_copy_that_is_not_the_bases_replaces_it(name: str, bases: Bases, tmp_path: Path) -> None:
    """In PEFT both of a tied pair, whichever is there."""
    case = CASES[name]
    write(bases, tmp_path, case)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    copied = [name for name in tensors if name.endswith(("base_layer.weight", "base_layer.bias"))]
    copied = copied or [name for name in tensors if "lora" not in name]
    assert copied
    for key in copied:
        tensors[key] += 0.5
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    expected = logits(PeftModel.from_pretrained(bases.load(case.base), tmp_path))
    adapter = read_adapter(tmp_path, base_layers(bases.load(case.base)))
    assert differ(logits(merge(bases.load(case.base), adapter)), expected) <= TOLERANCE
    without = dataclasses.replace(adapter, saved={}, biases={})
    assert differ(logits(merge(bases.load(case.base), without)), expected) > 100 * TOLERANCE


def test_a_tied_head_must_be_there_too(bases: Bases, tmp_path: Path) -> None:
    for name, part in (("tie-saved", "lm_head.weight"), ("tie-lora-head", "lm_head.lora_A.weight")):
        write(bases, tmp_path, CASES[name])
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        del tensors[f"base_model.model.{part}"]
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=f"{part}' is missing"):
            read_adapter(tmp_path, base_layers(bases.load("llama-tied")))


@pytest.mark.parametrize(
    ("name", "tensor"), [("tie-lora", "lm_head.lora_A.weight"), ("tie-saved", "lm_head.weight"), ("copied-tied", "")]
)
def test_tied_tensors_that_differ_are_refused(name: str, tensor: str, bases: Bases, tmp_path: Path) -> None:
    """PEFT would load one over the other."""
    write(bases, tmp_path, CASES[name])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors[f"base_model.model.{tensor or 'lm_head.weight'}"] += 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"model\.embed_tokens and lm_head are tied but differ"):
        read_adapter(tmp_path, base_layers(bases.load("llama-tied")))


def test_lora_that_peft_itself_does_not_read_back_is_refused(bases: Bases, tmp_path: Path) -> None:
    """It ties GPT-2's head when it trains but, for want of a known name, not when it loads."""
    config = {"target_modules": ["c_attn", "lm_head"], "ensure_weight_tying": True}
    write(bases, tmp_path, Case("gpt2", frozenset(), config, {}))
    with pytest.raises(AdapterError, match=r"lm_head\.lora_A.*does not target that layer"):
        read_adapter(tmp_path, base_layers(bases.load("gpt2")))


def test_untrained_adapters_are_zero(bases: Bases, tmp_path: Path) -> None:
    for init in (True, "mica"):
        config = LoraConfig(target_modules=HEAD, init_lora_weights=init)
        get_peft_model(bases.load("llama"), config).save_pretrained(str(tmp_path))
        adapter = read_adapter(tmp_path, base_layers(bases.load("llama")))
        assert not adapter.is_zero, "it replaces the head, for all that it says"
        assert adapter.without_base_copies(bases.load("llama").state_dict().get).is_zero
