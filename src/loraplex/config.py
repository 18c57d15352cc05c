"""Settings: frozen, validated once; unknown keys raise. Flags override the environment, which overrides the file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loraplex.disk import refuse_pointers
from loraplex.errors import BundleError, ConfigurationError

Settings = TypeVar("Settings", bound=BaseModel)


BUDGET = r"^(\d+(\.\d+)?%|\d+(\.\d+)?[KMG]iB|0)$"


class EngineConfig(BaseModel):
    """How the model runs, how much it may queue, and how much memory adapters get."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["native", "vllm", "peft"] = Field(
        "native", description="what runs the model: native, vllm, or peft, the baseline that native is measured against"
    )
    vllm_arg: tuple[str, ...] = Field(
        (), description="with --backend vllm: KEY=VALUE, one of vLLM's engine arguments, such as max_model_len=4096"
    )
    peft_batching: Literal["sequential", "mixed"] = Field(
        "sequential", description="with --backend peft: sequential, or mixed, which uses PEFT's adapter_names"
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="where to compute: auto, cpu, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="number format of the weights: auto, float32 or bfloat16"
    )
    kv_cache: str = Field(
        "20%",
        pattern=BUDGET,
        description="memory for K/V cached between calls: a share of free memory, or 2GiB, or 0",
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        description="maximum tokens in one forward pass; by default up to 8192 on CUDA, on a CPU 2048 in bfloat16 and "
        "1024 in float32",
    )
    max_step_sequences: int = Field(512, ge=1, description="maximum sequences in one forward pass")
    max_queue: int = Field(4096, ge=1, description="maximum evaluations that wait or run; above it requests get 429")
    max_queue_tokens: int | None = Field(
        None,
        ge=1,
        description="maximum tokens that wait to be computed; above it requests get 429; 32 steps' worth by default",
    )
    cuda_graphs: bool = Field(
        False, description="on CUDA: capture small steps that recur, and replay them; not measured yet"
    )
    preload: str = Field(
        "all", description="adapters to load and prove at start: all, none, or names with commas, which are also pinned"
    )
    max_adapters: int = Field(1024, ge=1, description="maximum adapters on the device at the same time")
    adapter_memory: str = Field(
        "20%", pattern=BUDGET, description="device memory for adapters: a share of free memory, or 2GiB"
    )
    host_memory: str = Field(
        "10%", pattern=BUDGET, description="host memory that caches adapters: a share of free memory, or 2GiB"
    )
    adapter_root: tuple[str, ...] = Field(
        (), description="folder below which adapters may be loaded at run time, besides the bundle"
    )
    state_dir: str | None = Field(None, description="folder that keeps adapters, routes and verdicts across restarts")


class ServerConfig(BaseModel):
    """Where the server listens, who may ask it, and which requests it accepts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; any other than loopback needs API keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key_file: str | None = Field(
        None, description="file with hashes of API keys, as `loraplex keys new` prints them; or set LORAPLEX_API_KEYS"
    )
    insecure: bool = Field(False, description="listen beyond loopback without API keys")
    public: tuple[Literal["metrics", "docs"], ...] = Field(
        (), description="endpoints that need no API key: metrics, docs"
    )
    key_concurrency: int | None = Field(
        None, ge=1, description="maximum requests in flight for one API key; above it 429"
    )
    max_body_bytes: int = Field(
        2 * 2**20, ge=1024, description="maximum bytes of a request body; a larger one gets 413"
    )
    body_timeout: float = Field(
        30, gt=0, description="seconds within which the whole request must arrive; after that 408"
    )
    idle_timeout: float = Field(65, gt=0, description="seconds after which an idle connection is closed")
    drain_timeout: int = Field(25, ge=0, description="seconds that requests in flight get to finish at SIGTERM")
    log_format: Literal["text", "json"] = Field("text", description="text or json")
    log_inputs: bool = Field(False, description="log the conversations, too")
    keep_verdicts: int = Field(
        200_000, ge=0, description="number of newest verdicts kept for statistics and feedback; 0 keeps none"
    )


class RouteSettings(BaseModel):
    """Where a route leads. In `loraplex.yaml` an adapter's name alone makes the route an alias for the adapter.

    targets:  adapter -> weight; one of them answers, chosen by weight.
    shadows:  adapters that judge, too; their answers are recorded and never returned.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(min_length=1, max_length=100)
    shadows: tuple[str, ...] = Field((), max_length=10)

    @model_validator(mode="before")
    @classmethod
    def _alias(cls, value: Any) -> Any:
        return {"targets": {value: 1}} if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _has_weight(cls, targets: dict[str, float]) -> dict[str, float]:
        if not 0 < sum(targets.values()) < math.inf:
            raise ValueError("the sum of the weights must be finite and above 0")
        return targets


class BundleSettings(BaseModel):
    """The keys of `loraplex.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    server: dict[str, Any] = Field(default_factory=dict)
    routes: dict[str, RouteSettings] = Field(default_factory=dict)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice or is not text. PyYAML alone would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path, error: type[ConfigurationError]) -> dict[str, Any]:
    """Return the YAML mapping in a file. Raises `error`, which names the file and the line."""
    refuse_pointers([path], error)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except Exception as exc:  # YAMLError, and Python's own errors from constructors on `2024-13-45` or `!!int x`
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise error(path, f"not readable as YAML: {reason}", remedy="correct the file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise error(path, f"holds a {type(content).__name__}, not keys and values", remedy="write `key: value` lines")
    return content


def validate(
    model: type[Settings],
    values: Mapping[str, Any],
    source: object,
    error: type[ConfigurationError] = ConfigurationError,
) -> Settings:
    """Build `model` from `values`. Raises `error` for the first problem, with the source, the key and the remedy."""
    try:
        made = model.model_validate(values)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = error_place(first, values) or "(top level)"
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            raise error(source, f"unknown key {key!r}", remedy=f"remove or correct it; known keys: {known}") from None
        is_other = first["type"] == "string_pattern_mismatch"  # pydantic would print the regular expression
        problem = "not a value that it can have" if is_other else first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        field = model.model_fields.get(key)
        meaning = f": {field.description}" if field is not None and field.description else ""
        raise error(source, f"key {key!r}: {problem}{given}", remedy=f"correct {key!r}{meaning}") from None
    try:
        made.model_dump_json()
    except ValueError as exc:  # a lone surrogate, which YAML and JSON can encode and UTF-8 cannot
        raise error(source, f"holds text that is not valid Unicode: {exc}", remedy="correct the file's text") from None
    return made


def error_place(error: Any, value: Any) -> str:
    """Return the dotted path in `value` of a pydantic error, without the union members that pydantic tried."""
    place = []
    for part in error["loc"]:
        known = part in value if isinstance(value, Mapping) else isinstance(value, list) and isinstance(part, int)
        if known:
            place.append(str(part))
            value = value[part]
    if error["type"] == "missing":
        place.append(str(error["loc"][-1]))
    return ".".join(place)


def read_bundle_settings(path: Path) -> BundleSettings:
    """Read a `loraplex.yaml`. Its `engine:` and `server:` parts are checked here, so that errors name the file."""
    settings = validate(BundleSettings, read_yaml(path, BundleError), path, BundleError)
    validate(EngineConfig, settings.engine, f"{path}, engine", BundleError)
    validate(ServerConfig, settings.server, f"{path}, server", BundleError)
    return settings


def resolve(model: type[Settings], file: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Return settings: values of flags or environment (`given`; None: not given) override those of the file."""
    return validate(model, {**file, **{key: value for key, value in given.items() if value is not None}}, "options")
