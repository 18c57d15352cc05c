"""Tiny bases, tokenizers and adapters, built from configs: random weights, scaled so that answers are peaked and an
adapter changes them."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from loraplex.model.loader import model_class

HAS_VLLM = find_spec("vllm") is not None  # in an environment of its own, where tests are about it
VOCAB_SIZE = 320
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|ask|>"]
CORPUS = [
    "Customer: hello, I would like to book a table for two\nAgent: at what time?\nCustomer: at seven, thanks",
    "Customer: is my payment done? yes or no\nAgent: yes, it is done\nCustomer: no, it is not",
] * 20

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
    tie_word_embeddings=False,
)

FAMILIES: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_COMMON),
    "mistral": MistralConfig(**_COMMON, sliding_window=None),
    "mistral-window": MistralConfig(**_COMMON, sliding_window=8),
    "qwen2": Qwen2Config(**_COMMON),
    "qwen3": Qwen3Config(**_COMMON, head_dim=8),
    "gemma2": Gemma2Config(
        **_COMMON,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=30.0,
    ),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": Phi3Config(**_COMMON, sliding_window=None),
}


def fitted(config: PreTrainedConfig) -> PreTrainedConfig:
    """As all backends that are installed can serve it: for vLLM with heads of 32, the least that it computes on a CPU,
    and the output head tied where it knows the family only so."""
    if not HAS_VLLM:
        return config
    values = config.to_dict()
    if config.model_type == "gpt2":
        values |= {"n_embd": 64, "n_head": 2}
    else:
        values |= {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    if config.model_type == "gemma2":
        values |= {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}
    return type(config)(**values)


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it, without a BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer)


def metaspace_tokenizer(prepend_scheme: str = "first", *, strips: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have it: a space mark, byte fallback and a BOS by the post-processor. strips: the
    space that a text's first word is given is taken off again when it is decoded, as Llama 2 does."""
    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend_scheme)
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    tokenizer.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS + [f"<0x{byte:02X}>" for byte in range(256)],
        initial_alphabet=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved = json.loads(tokenizer.to_str())  # the trainer takes the bytes as special tokens only, which they are not
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in SPECIAL_TOKENS]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return _wrap(tokenizer)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|ask|>"],
        clean_up_tokenization_spaces=False,
    )


def save_base(
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A random base in `folder`, with weights large enough for peaked answers."""
    torch.manual_seed(seed)
    model: Any = model_class(config).from_config(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            gain = 6.0 if "lm_head" in name else 1.5
            torch.nn.init.normal_(parameter, std=gain / parameter.shape[1] ** 0.5)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=0.0 if "gemma" in config.model_type else 1.0, std=0.1)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(dtype).save_pretrained(folder)
    (tokenizer or byte_level_tokenizer()).save_pretrained(folder)


def save_adapter(
    base: Path,
    folder: Path,
    *,
    contract: Mapping[str, Any] | None = None,
    seed: int = 1,
    gain: float = 1.0,
    **config: Any,
) -> None:
    """A PEFT adapter with random A and B (PEFT starts B at zero), and its contract."""
    torch.manual_seed(seed)
    model = model_class(AutoConfig.from_pretrained(base)).from_pretrained(base)
    settings: dict[str, Any] = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM") | config
    lora = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in lora.named_parameters():
        if "lora_" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=gain / parameter.shape[1] ** 0.5)
    lora.save_pretrained(str(folder))
    if contract is not None:
        (folder / "classifier.yaml").write_text(yaml.safe_dump(dict(contract)))


CONTRACT: Mapping[str, Any] = {
    "question": "Is it done?",
    "template": "{conversation}<|ask|>{question}\n",
    "labels": ["yes", "no"],
}


def save_shared_bundle(folder: Path, config: PreTrainedConfig | None = None, *, is_activated: bool = True) -> Path:
    """Three activated adapters, one of them with a label of several tokens, a plain one, and `verbatim`, which is
    activated and has no contract. Not is_activated: the same, all of them plain."""
    save_base(folder, fitted(config or FAMILIES["mistral"]))
    invocation = [SPECIAL_TOKENS.index("<|ask|>")] if is_activated else None
    for index, labels in enumerate((["yes", "no"], ["no", "yes"], ["yes", "not at all", "no idea"])):
        contract = {**CONTRACT, "question": f"Is it done {index}?", "labels": labels}
        save_adapter(
            folder,
            folder / f"active{index}",
            contract=contract,
            seed=index + 1,
            r=2 + 3 * index,
            alora_invocation_tokens=invocation,
        )
    save_adapter(folder, folder / "plain", contract=CONTRACT, seed=50)
    save_adapter(folder, folder / "verbatim", seed=99, alora_invocation_tokens=invocation)
    return folder


def save_bundle(folder: Path, adapters: int = 3, config: PreTrainedConfig | None = None) -> Path:
    """A Mistral base and a few adapters of different ranks with contracts, and `verbatim`, which has none."""
    save_base(folder, fitted(config or FAMILIES["mistral"]))
    for index in range(adapters):
        save_adapter(folder, folder / f"task{index}", contract=CONTRACT, seed=index + 1, r=2 + 3 * index)
    save_adapter(folder, folder / "verbatim", seed=99)
    return folder
