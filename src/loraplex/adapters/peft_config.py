"""Reads `adapter_config.json`: what PEFT means by each key, which keys are served, and which are refused by name."""

import math
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from loraplex.bundle import ADAPTER_CONFIG, read_json
from loraplex.config import validate
from loraplex.errors import AdapterError, quoted
from loraplex.problems import wrong

Number = TypeVar("Number", int, float)

MAX_CONFIG_BYTES = 4 * 2**20
MAX_PATTERN_CHARS = 10_000

# Keys of LoraConfig that do not change what a trained adapter computes. The field fan_in_fan_out below is inert, too:
# PEFT corrects it by the layer's type, and stores lora_A and lora_B alike in both cases. PEFT 0.1 and 0.2 had
# merge_weights: whether eval() merges the adapter into the base, which gives the same answers.
INERT_KEYS = frozenset(
    "auto_mapping corda_config eva_config inference_mode loftq_config lora_dropout lora_ga_config megatron_config "
    "megatron_core merge_weights peft_version qalora_group_size revision runtime_config".split()
)
# Keys that change the computation in a way that is not implemented. They are accepted only where they are not set.
REFUSED_KEYS = {
    "arrow_config": "Arrow routing",
    "enable_lora": "LoRA on parts of a fused layer, which only PEFT 0.1 and 0.2 had,",
    "kasa_config": "KaSA, which truncates the base's weights,",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters, such as the experts and the router of a mixture,",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
}
# Initialisations that do not change the base: the adapter's tensors hold their whole effect.
INERT_INITS = ("eva", "gaussian", "mica", "orthogonal")
# Initialisations that change the base's own weights. An adapter's file does not hold that change.
BASE_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT's tasks. Without a head of their own, all compute what CAUSAL_LM computes.
TaskType = Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "TOKEN_CLS", "QUESTION_ANS"]
SCORE_HEADS, QA_HEAD = ("score", "classifier"), "qa_outputs"
EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # PEFT ties modules with these names only


def _is_lora(value: str) -> str:
    if value != "LORA":
        raise wrong(
            "is another method than LORA, and only LoRA adapters are served",
            "train the adapter with PEFT's LoraConfig, and save it with save_pretrained",
        )
    return value


def _compiles(pattern: str) -> Callable[[str], str]:
    """Return a validator of the regular expression that PEFT builds from a value; `%s` stands for the value."""

    def check(value: str) -> str:
        if len(value) > MAX_PATTERN_CHARS:
            raise wrong(f"is longer than {MAX_PATTERN_CHARS} characters", "name the modules in a list")
        try:
            re.compile(pattern.replace("%s", value))
        except (re.error, OverflowError, RecursionError, Warning) as exc:
            raise wrong(f"is no regular expression: {exc}", "correct the expression") from None
        return value

    return check


# The expressions that PEFT builds from a key of rank_pattern, from layers_pattern, and from a name in modules_to_save.
PATTERN_KEY, LAYERS, SAVED = r"(.*\.)?(%s)$", r"(?:^|.*?\.)%s\.(?P<idx>\d+)\.", r"(^|.*\.)%s($|\..*)"
PatternKey = Annotated[str, AfterValidator(_compiles("%s")), AfterValidator(_compiles(PATTERN_KEY))]
LayersPattern = Annotated[str, AfterValidator(_compiles(LAYERS))]
SavedName = Annotated[str, Field(min_length=1), AfterValidator(_compiles(SAVED))]
Names = Annotated[str, AfterValidator(_compiles("%s"))] | list[str]  # a regular expression, or ends of paths
Text = Annotated[str | None, BeforeValidator(lambda value: value if isinstance(value, str) else None)]
Flag = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
Rank = Annotated[int, Field(ge=1)]
Alpha = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class PeftConfig(BaseModel):
    """The keys of `adapter_config.json` that are read. They mean what they mean in PEFT's LoraConfig."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    peft_type: Annotated[str, AfterValidator(_is_lora)]
    task_type: TaskType | None = None
    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[PatternKey, Rank] | None = None
    alpha_pattern: dict[PatternKey, Alpha] | None = None
    use_rslora: Flag = False
    use_dora: Flag = False
    lora_bias: Flag = False
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: Flag = False
    target_modules: Names
    exclude_modules: Names | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: LayersPattern | list[LayersPattern] | None = None
    modules_to_save: list[SavedName] | None = None
    trainable_token_indices: TokenIds | Annotated[dict[str, TokenIds], Field(min_length=1)] | None = None
    ensure_weight_tying: Flag = False
    init_lora_weights: bool | str | None = True
    alora_invocation_tokens: list[Annotated[int, Field(ge=0)]] | None = None
    base_model_name_or_path: Text = None
    # These keys change how an adapter is trained; at inference the adapter is plain LoRA.
    velora_config: dict[str, Any] | None = None
    monteclora_config: dict[str, Any] | None = None

    @property
    def invocation_tokens(self) -> tuple[int, ...] | None:
        """The aLoRA invocation tokens. None also for an empty list: PEFT then trains and runs plain LoRA."""
        return tuple(self.alora_invocation_tokens or ()) or None

    @property
    def variants(self) -> list[str]:
        """The variants of LoRA that are switched on. PEFT does not combine two variants."""
        keys = ("use_dora", "alora_invocation_tokens", "velora_config", "monteclora_config")
        active = [key for key in keys if getattr(self, key)]
        return [*active, "init_lora_weights"] if self.init_lora_weights == "mica" else active

    @property
    def is_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def rank_and_scaling(self, path: str) -> tuple[int, float]:
        """Return a layer's rank and scaling. The first pattern that matches the path's end beats r and lora_alpha."""
        rank = _pick(self._ranks, path, self.r)
        alpha = _pick(self._alphas, path, self.lora_alpha)
        return rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, path: str, is_linear: bool) -> bool:
        """Return whether the layer gets LoRA. is_linear: whether "all-linear" includes it; the head is not included."""
        if self.exclude_modules and _is_named(path, self.exclude_modules):
            return False
        if any(pattern.match(path) for pattern in self._saved):
            return False
        if self.is_all_linear:
            return is_linear
        if not _is_named(path, self.target_modules):
            return False
        if isinstance(self.target_modules, str) or path in self.target_modules:
            return True
        return self._is_transformed(path)

    def saves(self, path: str) -> bool:
        """Return whether the module is trained in full. PEFT compares the ends of strings, not whole path parts."""
        return any(path.endswith(name) for name in self.modules_to_save or ())

    @property
    def ties_saved(self) -> bool:
        """Whether a tied head uses the saved embedding. Matters only where the base is tied."""
        names = {name.split(".")[-1] for name in self.modules_to_save or ()}
        return self.ensure_weight_tying and not names.isdisjoint(EMBEDDING_NAMES)

    @property
    def ties_lora(self) -> bool:
        """Whether a tied head gets the embedding's LoRA, transposed."""
        if not self.ensure_weight_tying or self.ties_saved:
            return False
        if isinstance(self.target_modules, str):
            return any(re.fullmatch(self.target_modules, name) for name in EMBEDDING_NAMES)
        return not {name.split(".")[-1] for name in self.target_modules}.isdisjoint(EMBEDDING_NAMES)

    def _is_transformed(self, path: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or layers == []:
            return True
        # Take the first number in the path, not the last, which may be an expert's index.
        match = next((found for pattern in self._layers if (found := pattern.match(path))), None)
        index = match.groupdict().get("idx") if match else None
        return index is not None and int(index) in ([layers] if isinstance(layers, int) else layers)

    # Compiled once: an adapter may have hundreds of patterns, and a base thousands of layers.

    @cached_property
    def _ranks(self) -> list[tuple[re.Pattern[str], int]]:
        return [(re.compile(PATTERN_KEY.replace("%s", key)), rank) for key, rank in (self.rank_pattern or {}).items()]

    @cached_property
    def _alphas(self) -> list[tuple[re.Pattern[str], float]]:
        return [
            (re.compile(PATTERN_KEY.replace("%s", key)), alpha) for key, alpha in (self.alpha_pattern or {}).items()
        ]

    @cached_property
    def _layers(self) -> list[re.Pattern[str]]:
        patterns = self.layers_pattern or []
        if not patterns:
            return [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
        return [
            re.compile(LAYERS.replace("%s", pattern))
            for pattern in ([patterns] if isinstance(patterns, str) else patterns)
        ]

    @cached_property
    def _saved(self) -> list[re.Pattern[str]]:
        return [re.compile(SAVED.replace("%s", name)) for name in self.modules_to_save or ()]


def read_peft_config(folder: Path) -> PeftConfig:
    """Read the config of the adapter in `folder`. Every key is read, known to be inert, or refused by name.

    Raises AdapterError, also for combinations of keys that PEFT rejects or computes wrongly."""
    path = folder / ADAPTER_CONFIG
    try:
        size = path.stat().st_size
    except OSError as exc:
        raise AdapterError(path, f"not readable: {exc}", remedy="save or copy the file again") from None
    if size > MAX_CONFIG_BYTES:
        raise AdapterError(path, f"is {size} bytes large, over {MAX_CONFIG_BYTES}", remedy="save the adapter again")
    raw = read_json(path, AdapterError)
    for key, value in raw.items():
        if key in REFUSED_KEYS:
            if value:
                raise refused(folder, key, f"{REFUSED_KEYS[key]} is not supported", "train the adapter without it")
        elif key not in INERT_KEYS and key not in PeftConfig.model_fields:
            raise refused(
                folder,
                key,
                f"unknown, and it may change the answers (value {quoted(value)})",
                "remove it if it is inert",
            )
    if raw.get("target_modules", ()) is None:
        raise refused(folder, "target_modules", "null, which PEFT fills in by model type", "name the modules")
    config = validate(PeftConfig, raw, path, AdapterError)
    _check_init(folder, config.init_lora_weights)
    _check_combinations(folder, config)
    return config


def refused(folder: Path, key: str, message: str, remedy: str) -> AdapterError:
    return AdapterError(f"{folder / ADAPTER_CONFIG}, key {quoted(key)}", message, remedy=remedy)


def _check_init(folder: Path, init: bool | str | None) -> None:
    if not isinstance(init, str) or init.lower() in INERT_INITS:
        return
    if init.lower().startswith(BASE_MUTATING_INITS):
        raise refused(
            folder,
            "init_lora_weights",
            f"{quoted(init)} changes the base's weights",
            "convert the adapter: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    raise refused(
        folder, "init_lora_weights", f"{quoted(init)} is unknown", "save the adapter with True if it is inert"
    )


def _check_combinations(folder: Path, config: PeftConfig) -> None:
    if len(config.variants) > 1:
        raise refused(
            folder, config.variants[0], f"PEFT does not combine it with {config.variants[1]!r}", "keep one of them"
        )
    if config.invocation_tokens and config.task_type != "CAUSAL_LM":
        raise refused(
            folder,
            "task_type",
            f"PEFT runs activated LoRA under 'CAUSAL_LM' only, and answers from the base under {config.task_type!r}",
            "train the adapter for 'CAUSAL_LM'",
        )
    if config.lora_bias and (config.use_dora or not isinstance(config.init_lora_weights, bool)):
        other = "use_dora" if config.use_dora else "init_lora_weights"
        raise refused(folder, "lora_bias", f"PEFT does not combine it with {other!r}", "keep one of them")
    if isinstance(config.target_modules, str):
        for key in ("layers_to_transform", "layers_pattern"):
            if getattr(config, key) is not None:
                raise refused(folder, key, "PEFT takes it only with a list of target_modules", "remove it")
    if config.layers_pattern and config.layers_to_transform is None:
        raise refused(folder, "layers_pattern", "PEFT takes it only with layers_to_transform", "remove it")
    tokens = config.trainable_token_indices
    for ids in tokens.values() if isinstance(tokens, dict) else [tokens or []]:
        if len(set(ids)) < len(ids):
            raise refused(folder, "trainable_token_indices", "names a token twice", "name each token once")


def _pick(patterns: list[tuple[re.Pattern[str], Number]], path: str, default: Number) -> Number:
    return next((value for pattern, value in patterns if pattern.match(path)), default)


def _is_named(path: str, names: str | list[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or any(path.endswith(f".{name}") for name in names)


def token_targets(config: PeftConfig, embedding: str | None) -> Mapping[str, list[int]]:
    """Return end of a path -> token ids. A bare list applies to the base's token embedding."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, list):
        return {} if embedding is None else {embedding: tokens}
    return tokens or {}
