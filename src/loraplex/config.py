"""Settings: frozen, validated once, unknown keys refused. Flags win over environment, environment over file."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from loraplex.errors import BundleError, ConfigurationError

Settings = TypeVar("Settings", bound=BaseModel)


BUDGET = r"^(\d+(\.\d+)?%|\d+(\.\d+)?[KMG]iB|0)$"


class EngineConfig(BaseModel):
    """How the model runs, and which adapters it has at hand."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Literal["native", "vllm", "peft"] = Field(
        "native", description="what computes: native, vllm, or peft, which is what native is measured against"
    )
    vllm_arg: tuple[str, ...] = Field(
        (), description="with --backend vllm: KEY=VALUE, one of its engine arguments, such as max_model_len=4096"
    )
    peft_batching: Literal["sequential", "mixed"] = Field(
        "sequential", description="with --backend peft: sequential, or mixed, which is PEFT's adapter_names"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto, float32 or bfloat16")
    kv_cache: str = Field(
        "20%",
        pattern=BUDGET,
        description="memory for K/V that is kept between calls: a share of what is free, or 2GiB, or 0",
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in one forward pass; 8192 on CUDA, on a CPU 2048 in bfloat16 and 1024 in float32",
    )
    max_step_sequences: int = Field(512, ge=1, description="sequences in one forward pass")
    max_queue: int = Field(4096, ge=1, description="classifier evaluations that wait or run; over it 429")
    max_queue_tokens: int | None = Field(
        None, ge=1, description="tokens to compute that may wait; over it 429; 32 steps' worth by default"
    )
    cuda_graphs: bool = Field(
        False, description="on CUDA: capture steps of few tokens that come again, and replay them; not measured yet"
    )
    preload: str = Field(
        "all", description="read and proven at start: all, none, or names with commas, which are pinned"
    )
    max_adapters: int = Field(1024, ge=1, description="adapters on the device at once")
    adapter_memory: str = Field("20%", pattern=BUDGET, description="memory for them: a share of what is free, or 2GiB")
    host_memory: str = Field(
        "10%", pattern=BUDGET, description="host memory for adapters that wait there: a share of what is free, or 2GiB"
    )
    adapter_root: tuple[str, ...] = Field(
        (), description="adapters may be loaded at run time from below this folder, and from below the bundle"
    )
    state_dir: str | None = Field(
        None, description="folder that remembers adapters, routes and verdicts across restarts"
    )


class ServerConfig(BaseModel):
    """Where the server listens, to whom it answers, and what it takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; keys are needed for others than loopback")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    api_key_file: str | None = Field(
        None, description="hashes of the keys, as `loraplex keys new` prints them; or give keys in LORAPLEX_API_KEYS"
    )
    insecure: bool = Field(False, description="listen beyond loopback without keys")
    public: tuple[Literal["metrics", "docs"], ...] = Field((), description="needs no key: metrics, docs")
    key_concurrency: int | None = Field(None, ge=1, description="requests in flight for one key; over it 429")
    max_body_bytes: int = Field(2 * 2**20, ge=1024, description="a larger request is refused with 413")
    body_timeout: float = Field(30, gt=0, description="seconds in which a request must have come whole; over it 408")
    idle_timeout: float = Field(65, gt=0, description="seconds after which a connection without a request is closed")
    drain_timeout: int = Field(25, ge=0, description="seconds that requests in flight get at SIGTERM")
    log_format: Literal["text", "json"] = Field("text", description="text or json")
    log_inputs: bool = Field(False, description="log the conversations, too")
    keep_verdicts: int = Field(
        200_000, ge=0, description="newest verdicts that statistics and feedback know; 0 keeps none"
    )


class RouteSettings(BaseModel):
    """Where a route leads: to one of its targets by weight, and to all of its shadows, whose answers are recorded and
    never returned. In `loraplex.yaml` an adapter's name alone is an alias for it."""

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
            raise ValueError("the weights add up to nothing, or to more than there is")
        return targets


class BundleSettings(BaseModel):
    """`loraplex.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    server: dict[str, Any] = Field(default_factory=dict)
    routes: dict[str, RouteSettings] = Field(default_factory=dict)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key given twice, which YAML would otherwise settle in silence."""

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
    """A YAML mapping, or `error` naming the file and the line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except Exception as exc:  # besides YAMLError the constructors raise what Python does on `2024-13-45` or `!!int x`
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise error(path, f"not readable as YAML: {reason}", remedy="mend the file") from None
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
    """Build `model` from `values`; the first thing wrong becomes an `error` that names source, key and remedy."""
    try:
        made = model.model_validate(values)
    except ValidationError as exc:
        first = exc.errors()[0]
        key = error_place(first, values) or "(top level)"
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            raise error(source, f"unknown key {key!r}", remedy=f"remove or correct it; known keys: {known}") from None
        problem = first["msg"].removeprefix("Value error, ")
        given = "" if first["type"] in ("missing", "value_error") else f" (got {first['input']!r})"
        raise error(source, f"key {key!r}: {problem}{given}", remedy=f"correct {key!r}") from None
    try:
        made.model_dump_json()
    except ValueError as exc:  # half a surrogate pair, which YAML and JSON can spell and UTF-8 cannot
        raise error(source, f"holds what is no Unicode text: {exc}", remedy="correct the file's text") from None
    return made


def error_place(error: Any, value: Any) -> str:
    """Where in `value` a pydantic error is, dotted, without the names of the union members that pydantic tried."""
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
    """`loraplex.yaml`; its `engine:` and `server:` parts are checked here too, so that the error names the file."""
    settings = validate(BundleSettings, read_yaml(path, BundleError), path, BundleError)
    validate(EngineConfig, settings.engine, f"{path}, engine", BundleError)
    validate(ServerConfig, settings.server, f"{path}, server", BundleError)
    return settings


def resolve(model: type[Settings], file: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """File values overridden by what flags or environment gave (None: not given)."""
    return validate(model, {**file, **{key: value for key, value in given.items() if value is not None}}, "options")
