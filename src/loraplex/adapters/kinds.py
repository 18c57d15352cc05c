"""The kinds of adapter: what an adapter may need from a backend."""

from collections.abc import Mapping

from loraplex.adapters.peft_config import PeftConfig
from loraplex.adapters.weights import AdapterWeights

# kind -> description, with the key of adapter_config.json that causes it
KINDS: Mapping[str, str] = {
    "lora": "LoRA on linear layers, of any rank, beside each other",
    "alora": "aLoRA (`alora_invocation_tokens`)",
    "lora_bias": "`lora_bias`",
    "embedding": "LoRA on an embedding or the output head",
    "dora": "DoRA (`use_dora`)",
    "saved": "`modules_to_save`: embeddings, output head",
    "other_embedding": "an embedding or head other than the base's, saved beside LoRA",
    "score": "a score head (`SEQ_CLS`), beside adapters that answer with tokens",
    "bias": "`bias`: `lora_only`, `all`",
    "tokens": "`trainable_token_indices`",
    "tying": "`ensure_weight_tying`",
}


def kinds_of(config: PeftConfig, weights: AdapterWeights) -> frozenset[str]:
    """Return the adapter's kinds. Where the config alone changes what PEFT does, the tensors do not matter."""
    has = {
        "lora": bool(weights.modules),
        "alora": config.invocation_tokens is not None,
        "lora_bias": config.lora_bias,
        "embedding": bool(weights.embeddings) or weights.output is not None,
        "dora": config.use_dora,
        "saved": bool(config.modules_to_save) and weights.score is None,
        "other_embedding": not all(config.saves(path) for path in weights.saved),
        "score": weights.score is not None,
        "bias": config.bias != "none",
        "tokens": config.trainable_token_indices is not None,
        "tying": config.ensure_weight_tying,
    }
    assert has.keys() == KINDS.keys(), "a kind without a name"
    return frozenset(kind for kind, is_so in has.items() if is_so)
