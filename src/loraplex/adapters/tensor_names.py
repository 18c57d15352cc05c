"""The names of tensors in an adapter's file: PEFT's, and those that a wrapper around the trained model changed."""

import re

PREFIX = "base_model.model."
# Wrappers of a model, or of a layer, that write their own attribute into the names of all tensors below.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}
PARALLEL = "module"  # of DataParallel, DistributedDataParallel and DeepSpeed; only before the base's own name
# What PEFT's load_state_dict finds under its own names, because PeftModel.from_pretrained calls the adapter "default".
READ_BY_PEFT = re.compile(
    r"\.(lora_[AB]\.default\.(weight|bias)|lora_embedding_[AB]\.default|lora_magnitude_vector(\.default)?\.weight)$"
)
DEFAULT = re.compile(r"\.(lora_\w+)\.default(?=\.|$)|\.modules_to_save\.default(?=\.)")


def pefts_name(key: str) -> str:
    """Return the name that PEFT's `save_pretrained` gives to a tensor that was saved as `key`."""
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    while name.startswith(f"{PARALLEL}."):
        name = name.removeprefix(f"{PARALLEL}.")
    while name.startswith((f"{PREFIX}{PARALLEL}.", PREFIX * 2)):
        name = PREFIX + name.removeprefix(PREFIX).removeprefix(f"{PARALLEL}.").removeprefix(PREFIX)
    return DEFAULT.sub(lambda match: f".{match[1]}" if match[1] else "", name)


def read_name(key: str) -> str:
    """Return PEFT's own name of a tensor that PEFT also reads as `key`; any other key as it is."""
    if READ_BY_PEFT.search(key) is None:
        return key
    name = DEFAULT.sub(r".\1", key)
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def who_named(key: str) -> str:
    """Return what changed the name of a tensor from `pefts_name(key)` to `key`."""
    for part in key.split("."):
        if part in WRAPPERS:
            return f"{WRAPPERS[part]} added {part!r}"
    if key.startswith(f"{PARALLEL}.") or f"{PREFIX}{PARALLEL}." in key:
        return f"a wrapper for data parallelism added {PARALLEL!r}"
    if PREFIX * 2 in key:
        return f"{PREFIX!r} is doubled, as where a PEFT model was wrapped again"
    return "it holds the adapter's name 'default', as in a state dict that PEFT did not save"
