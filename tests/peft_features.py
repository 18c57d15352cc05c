"""What becomes of each PEFT feature, here and in vLLM: the table of docs/adapters.md."""

from typing import NamedTuple

from loraplex.adapters.peft_config import BASE_MUTATING_INITS, INERT_INITS, INERT_KEYS, REFUSED_KEYS

UNKNOWN = "not checked"


class Feature(NamedTuple):
    """`vllm` says what is known of vLLM 0.32."""

    name: str
    native: str
    vllm: str = UNKNOWN


SUPPORTED = (
    Feature("LoRA on linear layers (`r`, `lora_alpha`)", "yes", "yes"),
    Feature("Conv1D layers (GPT-2), `fan_in_fan_out`", "yes; the layer's type decides, as in PEFT"),
    Feature("rsLoRA (`use_rslora`)", "yes", "yes"),
    Feature("`rank_pattern`, `alpha_pattern`", "yes, by PEFT's rule"),
    Feature("`target_modules` (list, regular expression, `all-linear`), `exclude_modules`", "yes, checked"),
    Feature("`layers_to_transform`, `layers_pattern`", "yes, checked"),
    Feature("DoRA (`use_dora`), on embeddings and the head too", "yes", "refused"),
    Feature("aLoRA (`alora_invocation_tokens`)", "yes, with a shared prefix", "refused"),
    Feature("`lora_bias`", "yes", "refused"),
    Feature("`bias`: `lora_only`, `all`", "yes; `all` refused where norms have biases (GPT-2)", "refused"),
    Feature("LoRA on an embedding or the output head", "yes"),
    Feature("`trainable_token_indices`", "yes"),
    Feature("`modules_to_save`: embeddings, output head", "yes", "refused"),
    Feature("`modules_to_save`: `score`, `classifier` (`SEQ_CLS`)", "yes", "yes"),
    Feature("`ensure_weight_tying`", "yes"),
    Feature("embeddings that PEFT saves beside LoRA on them", "yes"),
    Feature(f"initialisations: {', '.join(INERT_INITS)}", "yes"),
    Feature("VeLoRA, MonteCLoRA", "yes: plain LoRA once trained"),
    Feature("LoRA on the vision part of a vision-language base", "dropped with a warning: no text passes through it"),
    Feature(f"keys that change no answer: {', '.join(f'`{key}`' for key in sorted(INERT_KEYS))}", "ignored"),
)
REFUSED_BY_VLLM = ("layer_replication", "use_bdlora", "use_qalora")
REFUSED = (
    Feature("`modules_to_save`: anything else", "refused", "refused"),
    Feature("a resized vocabulary", "refused"),
    Feature(f"initialisations that change the base: {', '.join(BASE_MUTATING_INITS)}", "refused", "refused"),
    *(
        Feature(f"{what.rstrip(',')} (`{key}`)", "refused", "refused" if key in REFUSED_BY_VLLM else UNKNOWN)
        for key, what in REFUSED_KEYS.items()
    ),
    Feature("a key or tensor that is not known", "refused", "keys ignored without a word"),
)


def feature_table() -> str:
    rows = [Feature("PEFT feature", "Loraplex native", "vLLM 0.32"), *SUPPORTED, *REFUSED]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])
