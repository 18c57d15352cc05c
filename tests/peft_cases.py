"""Adapters of every kind as PEFT writes them, on tiny bases, and what is to come of each."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

import tiny

TOKEN_IDS = [3, 8, 21, 13, 5, 34]
COMMON: Mapping[str, Any] = {**tiny._COMMON, "num_hidden_layers": 2}
TIED = {**COMMON, "tie_word_embeddings": True}
BASES: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**COMMON),
    "llama-tied": LlamaConfig(**TIED),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2-tied": Qwen2Config(**TIED),
    "gemma3": tiny.FAMILIES["gemma3"],
    "gpt2": GPT2Config(
        vocab_size=tiny.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    ),
    "phi": PhiConfig(**COMMON),
}
Q = ["q_proj"]


@dataclass(frozen=True)
class Case:
    """A kind of adapter: what PEFT is told, and the parts of AdapterWeights that must come of it."""

    base: str
    parts: frozenset[str]
    config: Mapping[str, Any]
    save: Mapping[str, Any]
    copies: frozenset[str] = frozenset()  # parts that only repeat the base

    @property
    def is_classifier(self) -> bool:
        return "score" in self.parts


def case(base: str, parts: str, *, copies: str = "", save: Mapping[str, Any] | None = None, **config: Any) -> Case:
    return Case(
        base, frozenset(parts.split()), {"target_modules": Q} | config, save or {}, frozenset((copies or "").split())
    )


SEQ: Mapping[str, Any] = {"task_type": "SEQ_CLS"}
EMBEDDING, HEAD, GPT2 = [*Q, "embed_tokens"], [*Q, "lm_head"], ["c_attn", "c_proj"]
WITH_EMBEDDINGS = {"save_embedding_layers": True}
CASES: Mapping[str, Case] = {
    "lora": case("llama", "modules"),
    "rslora": case("llama", "modules", use_rslora=True),
    "patterns": case("llama", "modules", rank_pattern={"1.self_attn.q_proj": 5}, alpha_pattern={r"layers\.0.*": 9}),
    "regex": case("llama", "modules", target_modules=r".*\.1\.mlp\.(up|down)_proj"),
    "all-linear": case("qwen2", "modules", target_modules="all-linear", exclude_modules=["v_proj"]),
    "layers": case("llama", "modules", layers_to_transform=[1], layers_pattern="layers"),
    "alora": case("llama", "modules", alora_invocation_tokens=TOKEN_IDS[:2]),
    "alora-empty": case("llama", "modules", alora_invocation_tokens=[]),
    "alora-lora-bias": case("llama", "modules lora_bias", alora_invocation_tokens=[3], lora_bias=True),
    "dora": case("llama", "modules magnitude", use_dora=True, use_rslora=True),
    "dora-bias": case("qwen2", "modules magnitude biases", use_dora=True, bias="lora_only"),
    "lora-bias": case("qwen2", "modules lora_bias", lora_bias=True, target_modules=["q_proj", "o_proj"]),
    "bias-all": case("qwen2", "modules biases", bias="all"),
    "bias-all-head": case("llama", "modules", bias="all"),  # it has none
    "mica": case("llama", "modules", init_lora_weights="mica"),
    "gaussian": case("llama", "modules", init_lora_weights="gaussian"),
    "velora": case("llama", "modules", velora_config=VeloraConfig(num_groups=2)),
    "monteclora": case("llama", "modules", monteclora_config=MontecloraConfig()),
    "conv1d": case("gpt2", "modules", target_modules=GPT2),
    "conv1d-dora": case("gpt2", "modules magnitude", target_modules=GPT2, use_dora=True, fan_in_fan_out=True),
    "conv1d-bias": case("gpt2", "modules biases", target_modules=GPT2, bias="lora_only"),
    "conv1d-embedding": case(
        "gpt2", "modules embeddings output", target_modules=["c_attn", "wte", "lm_head"], copies="saved"
    ),
    "embedding-of-places": case("gpt2", "modules embeddings", target_modules=["c_attn", "wpe"]),
    "embedding": case("llama", "modules embeddings", target_modules=EMBEDDING, copies="saved"),
    "embedding-dora": case(
        "llama", "modules embeddings magnitude", target_modules=EMBEDDING, use_dora=True, copies="saved"
    ),
    "embedding-scaled": case("gemma3", "modules embeddings", target_modules=EMBEDDING, copies="saved"),
    "embedding-dora-scaled": case(
        "gemma3", "modules embeddings magnitude", target_modules=EMBEDDING, use_dora=True, copies="saved"
    ),
    "embedding-tied": case("llama-tied", "modules embeddings", target_modules=EMBEDDING, copies="saved"),
    "head": case("llama", "modules output", target_modules=HEAD, copies="saved"),
    "head-dora": case("llama", "modules output magnitude", target_modules=HEAD, use_dora=True, copies="saved"),
    "head-alora": case("llama", "modules output", target_modules=HEAD, alora_invocation_tokens=[3], copies="saved"),
    "head-tied": case("llama-tied", "modules output", target_modules=HEAD, copies="saved"),
    "head-bias": case("phi", "modules output", target_modules=HEAD, copies="saved biases"),
    "head-bias-all": case("phi", "modules biases", bias="lora_only"),
    "tie-lora": case(
        "llama-tied",
        "modules embeddings output",
        target_modules=EMBEDDING,
        ensure_weight_tying=True,
        rank_pattern={"embed_tokens": 3},
        copies="saved",
    ),
    "tie-lora-head": case("llama-tied", "modules embeddings output", target_modules=HEAD, ensure_weight_tying=True),
    "tie-lora-regex": case(
        "llama-tied",
        "modules embeddings output magnitude",
        target_modules=".*(q_proj|lm_head)",
        ensure_weight_tying=True,
        use_dora=True,
        copies="saved",
    ),
    "save-embedding": case("llama", "modules saved", modules_to_save=["embed_tokens"]),
    "save-places": case("gpt2", "modules saved", target_modules=GPT2, modules_to_save=["wpe"]),
    "save-head": case("llama", "modules saved", modules_to_save=["lm_head"]),
    "save-head-bias": case("phi", "modules saved", modules_to_save=["lm_head"]),
    "save-both": case("llama", "modules saved", modules_to_save=["embed_tokens", "lm_head"]),
    "save-embedding-tied": case("llama-tied", "modules saved", modules_to_save=["embed_tokens"]),
    "save-head-tied": case("llama-tied", "modules saved", modules_to_save=["lm_head"]),
    "save-head-lora-embedding": case(
        "llama-tied", "modules embeddings saved", target_modules=EMBEDDING, modules_to_save=["lm_head"]
    ),
    "tie-saved": case("llama-tied", "modules saved", modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tie-saved-gpt2": case(
        "gpt2", "modules saved", target_modules=GPT2, modules_to_save=["wte", "lm_head"], ensure_weight_tying=True
    ),
    "copied": case("llama", "modules", save=WITH_EMBEDDINGS, copies="saved"),
    "copied-tied": case("llama-tied", "modules", save=WITH_EMBEDDINGS, copies="saved"),
    "copied-saved": case("llama-tied", "modules saved", modules_to_save=["embed_tokens"], save=WITH_EMBEDDINGS),
    "copied-tokens": case(
        "llama", "modules token_rows", trainable_token_indices=[8], save=WITH_EMBEDDINGS, copies="saved"
    ),
    "copied-tokens-tied": case(
        "llama-tied", "modules token_rows", trainable_token_indices=[8], save=WITH_EMBEDDINGS, copies="saved"
    ),
    "tokens": case("llama", "modules token_rows", trainable_token_indices=[21, 8]),
    "tokens-scaled": case("gemma3", "modules token_rows", trainable_token_indices=[21, 8]),
    "tokens-tied": case("llama-tied", "modules token_rows", trainable_token_indices=[21, 8]),
    "tokens-gpt2": case("gpt2", "modules token_rows", target_modules=GPT2, trainable_token_indices=[21, 8]),
    "token-places": case("gpt2", "modules token_rows", target_modules=GPT2, trainable_token_indices={"wpe": [2, 1]}),
    "tokens-dict": case("llama", "modules token_rows", trainable_token_indices={"embed_tokens": [8], "lm_head": [5]}),
    "tokens-head-tied": case("llama-tied", "modules token_rows", trainable_token_indices={"lm_head": [21, 8]}),
    "tokens-dict-tied": case(
        "llama-tied", "modules token_rows", trainable_token_indices={"embed_tokens": [8], "lm_head": [5]}
    ),
    "tokens-dict-same": case(
        "llama-tied",
        "modules token_rows",
        trainable_token_indices={"embed_tokens": [8, 5], "lm_head": [8, 5]},
        ensure_weight_tying=True,
    ),
    "tokens-lora-head": case(
        "llama-tied", "modules output token_rows", target_modules=HEAD, trainable_token_indices=[21, 8]
    ),
    "alora-all": case(
        "qwen2",
        "modules biases token_rows saved",
        alora_invocation_tokens=[3],
        bias="all",
        trainable_token_indices=[8],
        modules_to_save=["lm_head"],
    ),
    "seq": case("llama", "modules score", **SEQ),
    "seq-dora": case("qwen2-tied", "modules magnitude score", target_modules="all-linear", use_dora=True, **SEQ),
    "seq-embedding": case(
        "llama-tied",
        "modules embeddings score",
        target_modules=EMBEDDING,
        ensure_weight_tying=True,
        copies="saved",
        **SEQ,
    ),
    "seq-tokens": case("llama-tied", "modules token_rows score", trainable_token_indices=[8], **SEQ),
    "seq-bias": case("gpt2", "modules biases score", target_modules=GPT2, bias="lora_only", **SEQ),
    "seq-untold": case("llama", "modules score", task_type=None, modules_to_save=["score"]),
}


class Bases:
    """Fresh models, read from disk once each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._loaded: dict[tuple[str, bool], Any] = {}

    def folder(self, name: str) -> Path:
        folder = self.root / name
        if not folder.exists():
            tiny.save_base(folder, BASES[name] if name in BASES else tiny.FAMILIES[name])
        return folder

    def load(self, name: str, classify: bool = False) -> Any:
        """A causal language model, or a classifier of three labels with a head that was never trained."""
        if (name, classify) not in self._loaded:
            kind: Any = AutoModelForSequenceClassification if classify else AutoModelForCausalLM
            labels = {"num_labels": 3} if classify else {}
            torch.manual_seed(5)
            model = kind.from_pretrained(self.folder(name), attn_implementation="eager", **labels)
            model.config.pad_token_id = 2
            self._loaded[name, classify] = model
        return copy.deepcopy(self._loaded[name, classify])


def write(bases: Bases, folder: Path, case: Case) -> Path:
    """As a training run with PEFT leaves it, with random values for all that it would train."""
    config: dict[str, Any] = {"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"} | dict(case.config)
    peft = get_peft_model(bases.load(case.base, case.is_classifier), LoraConfig(**config))
    torch.manual_seed(1)
    seen = set()
    for name, parameter in peft.named_parameters():
        if (parameter.requires_grad or "lora_B" in name) and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())  # a tied one once
            with torch.no_grad():
                scale = 1.0 if "lora" in name or "trainable" in name else 0.3
                parameter.add_(scale * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    peft.save_pretrained(str(folder), **case.save)
    return folder


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([TOKEN_IDS])).logits
    return found
