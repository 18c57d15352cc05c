"""A PEFT folder -> validated AdapterWeights with a content hash. Knows the format, not the model that runs it."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open

from loraplex.adapters.weights import AdapterWeights, LoRAWeights
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from loraplex.config import validate
from loraplex.errors import AdapterError

Number = TypeVar("Number", int, float)

# Keys of LoraConfig that do not change what a trained adapter computes.
INERT_KEYS = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode loftq_config lora_dropout "
    "lora_ga_config megatron_config megatron_core peft_version qalora_group_size revision runtime_config "
    "velora_config".split()
)
# Keys that change the computation in a way that is not implemented: accepted only at their inert default.
REFUSED_KEYS = {
    "arrow_config": "Arrow routing",
    "bias": "trained base biases",
    "ensure_weight_tying": "tied adapters",
    "fan_in_fan_out": "transposed (Conv1D) layers",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "fully trained modules",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
}
# These initialisations change the base's own weights, which an adapter file alone cannot say.
BASE_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

PREFIX = "base_model.model."
TENSOR = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
DTYPES = ("F16", "BF16", "F32", "F64")
LARGEST = torch.finfo(torch.bfloat16).max  # of the types that a base computes in, the smallest


def _is_regex(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as exc:
        raise ValueError(f"not a regular expression: {exc}") from None
    return pattern


Regex = Annotated[str, AfterValidator(_is_regex)]
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class PeftConfig(BaseModel):
    """The keys of `adapter_config.json` that are read, as PEFT's LoraConfig means them."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"] | None = None
    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[Regex, Rank] | None = None
    alpha_pattern: dict[Regex, Alpha] | None = None
    use_rslora: bool = False
    target_modules: Regex | list[str] | None = None
    exclude_modules: Regex | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: Regex | list[Regex] | None = None
    init_lora_weights: bool | str | None = True
    alora_invocation_tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    def rank_and_scaling(self, module: str) -> tuple[int, float]:
        """The first pattern that matches the path's end wins, else r and lora_alpha."""

        def pick(patterns: Mapping[str, Number] | None, default: Number) -> Number:
            for pattern, value in (patterns or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            return default

        rank = pick(self.rank_pattern, self.r)
        alpha = pick(self.alpha_pattern, self.lora_alpha)
        return rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, module: str) -> bool:
        """Whether the config says that this layer is updated; False where only the tensors say it."""

        def named(names: str | list[str]) -> bool:
            if isinstance(names, str):
                return re.fullmatch(names, module) is not None
            return any(module == name or module.endswith(f".{name}") for name in names)

        if self.target_modules in (None, "all-linear"):  # the model type's own list, which PEFT resolves
            return False
        if self.exclude_modules and named(self.exclude_modules):
            return False
        if not named(self.target_modules):
            return False
        if self.layers_to_transform is None or isinstance(self.target_modules, str):
            return True
        patterns, layers = self.layers_pattern or r"[^.]*", self.layers_to_transform
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = re.match(rf".*\.{pattern}\.(\d+)\.", module)
            if match:
                return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
        return False


def read_adapter(folder: Path, linear_shapes: Mapping[str, tuple[int, int]]) -> AdapterWeights:
    """Read the adapter in `folder` for a base whose linear layers are `linear_shapes` (path -> (out, in)).

    Every tensor is used and every layer that the config targets has its tensors, else AdapterError names the file and
    the tensor or key. Shapes are checked against the header before anything is allocated.
    """
    config_path, weights_path = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    config = _read_config(config_path)
    try:
        with safe_open(weights_path, framework="pt") as file:
            sides = _checked_header(file, weights_path, linear_shapes)
            modules = {}
            for module in sorted(sides):
                rank = sides[module]["A"][0]
                expected, scaling = config.rank_and_scaling(module)
                if rank != expected:
                    raise AdapterError(
                        weights_path,
                        f"{module} has rank {rank}, but {ADAPTER_CONFIG} says {expected}",
                        remedy="save the adapter again, config and weights together",
                    )
                lora_A, lora_B = (file.get_tensor(f"{PREFIX}{module}.lora_{side}.weight") for side in "AB")
                for side, tensor, factor in (("A", lora_A, 1.0), ("B", lora_B, scaling)):
                    if not tensor.abs().max().item() * factor <= LARGEST:
                        raise AdapterError(
                            weights_path,
                            f"{module}.lora_{side} holds NaN, infinity or what becomes it when scaled by {factor:g}",
                            remedy="train the adapter again",
                        )
                modules[module] = LoRAWeights(lora_A=lora_A, lora_B=lora_B, scaling=scaling)
    except (SafetensorError, OSError) as exc:
        raise AdapterError(
            weights_path, f"not readable as safetensors: {exc}", remedy="save or copy the file again"
        ) from None
    missing = [module for module in linear_shapes if config.targets(module) and module not in modules]
    if missing:
        raise AdapterError(
            weights_path,
            f"{ADAPTER_CONFIG} targets {missing[0]}, which has no tensors here ({len(missing)} such layers)",
            remedy="save the adapter again; the file is not complete, or it belongs to another base",
        )
    invocation = None if config.alora_invocation_tokens is None else tuple(config.alora_invocation_tokens)
    return AdapterWeights(modules=modules, kv_id=_content_hash(modules, invocation), invocation_tokens=invocation)


def _read_config(path: Path) -> PeftConfig:
    """Every key is read, inert or refused by name."""
    raw = read_json(path, AdapterError)
    config = validate(PeftConfig, raw, path, AdapterError)

    def refuse(key: str, message: str, remedy: str) -> AdapterError:
        return AdapterError(f"{path}, key {key!r}", message, remedy=remedy)

    for key, value in raw.items():
        if key in REFUSED_KEYS:
            if value and value != "none":
                raise refuse(key, f"{REFUSED_KEYS[key]} is not supported", "train the adapter without it")
        elif key not in INERT_KEYS and key not in PeftConfig.model_fields:
            raise refuse(key, f"unknown, and it may change the answers (value {value!r})", "remove it if it is inert")
    if config.alora_invocation_tokens is not None and config.task_type != "CAUSAL_LM":
        raise refuse("task_type", "activated LoRA needs 'CAUSAL_LM'", "save the adapter with that task_type")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_MUTATING_INITS):
        raise refuse(
            "init_lora_weights",
            f"{init!r} changes the base's weights",
            "convert the adapter: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    return config


def _checked_header(
    file: Any, path: Path, linear_shapes: Mapping[str, tuple[int, int]]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """module -> {"A": shape, "B": shape}; every tensor of the file is accounted for and fits the base."""
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for key in file.keys():
        match = TENSOR.fullmatch(key)
        if match is None:
            raise AdapterError(
                path,
                f"tensor {key!r} is not a LoRA weight that is supported",
                remedy="train the adapter as plain LoRA on linear layers",
            )
        header = file.get_slice(key)
        if header.get_dtype() not in DTYPES:
            raise AdapterError(
                path,
                f"tensor {key!r} is {header.get_dtype()}",
                remedy="save it as float16, bfloat16 or float32",
            )
        sides.setdefault(match["module"], {})[match["side"]] = tuple(header.get_shape())
    if not sides:
        raise AdapterError(path, "holds no tensors", remedy="save the adapter again")
    for module, shapes in sides.items():
        if module not in linear_shapes:
            raise AdapterError(
                path,
                f"the base has no linear layer {module!r}",
                remedy="serve the adapter on the base it was trained on",
            )
        if set(shapes) != {"A", "B"}:
            raise AdapterError(
                path, f"{module} has no lora_{'B' if 'A' in shapes else 'A'}", remedy="save the adapter again"
            )
        out_features, in_features = linear_shapes[module]
        lora_A, lora_B = shapes["A"], shapes["B"]
        rank = lora_A[0] if len(lora_A) == 2 else 0
        if lora_A != (rank, in_features) or lora_B != (out_features, rank) or rank < 1:
            raise AdapterError(
                path,
                f"{module} has lora_A {list(lora_A)} and lora_B {list(lora_B)}, "
                f"but the base's layer is {out_features} x {in_features}",
                remedy="serve the adapter on the base it was trained on",
            )
    return sides


def _content_hash(modules: Mapping[str, LoRAWeights], invocation: tuple[int, ...] | None) -> str:
    digest = hashlib.sha256(json.dumps(invocation).encode())
    for module, weights in sorted(modules.items()):
        for tensor in (weights.lora_A, weights.lora_B):
            digest.update(json.dumps([module, str(tensor.dtype), list(tensor.shape), weights.scaling]).encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
