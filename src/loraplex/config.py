"""Settings: frozen, validated once; unknown keys raise. Flags override the environment, which overrides the file."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from loraplex.addresses import valid_network, valid_origin, valid_root_path
from loraplex.amounts import duration_s
from loraplex.cascades import ClassifierSettings, Gate
from loraplex.disk import refuse_pointers
from loraplex.errors import BundleError, ConfigurationError
from loraplex.problems import NumbersAreNoBooleans, Problem, find_problem, wrong

Settings = TypeVar("Settings", bound=BaseModel)

MOST, A_DAY_S = 10**9, 86_400  # limits of numbers and of seconds, so that none overflows later

BUDGET = re.compile(r"(?P<share>\d{1,9}(\.\d{1,9})?)%|\d{1,9}(\.\d{1,9})?[KMG]iB|0")
SERVED_NAME = re.compile(r"[A-Za-z0-9._/:@+-]{1,256}")
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


def _budget(value: str) -> str:
    match = BUDGET.fullmatch(value)
    if match is None:
        raise wrong("is no size", "write 2GiB, 512MiB, 20% or 0")
    if float(match["share"] or 0) > 100:
        raise wrong("is more than all of the free memory", "write 100% at most, or a size such as 2GiB")
    return value


def _duration(value: str) -> str:
    if duration_s(value) is None:
        raise wrong("is no duration", "write 30m, 12h, 7d or 0")
    return value if duration_s(value) else "0"


def valid_device(value: str) -> str:
    """Return a device's name. Raises pydantic's error for any other text."""
    if not DEVICE.fullmatch(value):
        raise wrong("is no device", "write auto, cpu, cuda or cuda:1")
    return value


def _served_name(value: str) -> str:
    if not SERVED_NAME.fullmatch(value):
        raise wrong("cannot name the base", "use letters, digits and any of ._-/:@+, 256 at most")
    return value


# A choice may be written in either case.
EitherCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
AsText = BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value)
Budget = Annotated[str, AfterValidator(_budget), AsText]


class EngineConfig(NumbersAreNoBooleans):
    """How the model runs, how much it may queue, and how much memory adapters get."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backend: Annotated[Literal["native", "vllm", "peft"], EitherCase] = Field(
        "native", description="what runs the model: native, vllm, or peft, the baseline that native is measured against"
    )
    vllm_arg: tuple[str, ...] = Field(
        (), description="with --backend vllm: KEY=VALUE, one of vLLM's engine arguments, such as max_model_len=4096"
    )
    peft_batching: Annotated[Literal["sequential", "mixed"], EitherCase] = Field(
        "sequential", description="with --backend peft: sequential, or mixed, which uses PEFT's adapter_names"
    )
    served_model_name: Annotated[
        tuple[Annotated[str, AfterValidator(_served_name)], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    ] = Field(
        (),
        description="name by which requests ask the base, instead of its folder's name or its hub id; all of several "
        "answer, and the first is shown",
    )
    device: Annotated[str, AfterValidator(valid_device), EitherCase] = Field(
        "auto", description="where to compute: auto, cpu, cuda or cuda:N"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], EitherCase] = Field(
        "auto", description="number format of the weights: auto, float32 or bfloat16"
    )
    kv_cache: Budget = Field(
        "20%", description="memory for K/V cached between calls: a share of free memory, or 2GiB, or 0"
    )
    max_step_tokens: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="maximum tokens in one forward pass; by default up to 8192 on CUDA, on a CPU 2048 in bfloat16 and "
        "1024 in float32",
    )
    max_step_sequences: int = Field(512, ge=1, le=MOST, description="maximum sequences in one forward pass")
    max_queue: int = Field(
        4096, ge=1, le=MOST, description="maximum evaluations that wait or run; above it requests get 429"
    )
    max_queue_tokens: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="maximum tokens that wait to be computed; above it requests get 429; 32 steps' worth by default",
    )
    cuda_graphs: bool = Field(
        False, description="on CUDA: capture small steps that recur, and replay them; not measured yet"
    )
    preload: str = Field(
        "all", description="adapters to load and prove at start: all, none, or names with commas, which are also pinned"
    )
    max_adapters: int = Field(1024, ge=1, le=MOST, description="maximum adapters on the device at the same time")
    adapter_memory: Budget = Field("20%", description="device memory for adapters: a share of free memory, or 2GiB")
    host_memory: Budget = Field("10%", description="host memory that caches adapters: a share of free memory, or 2GiB")
    adapter_root: tuple[str, ...] = Field(
        (), description="folder below which adapters may be loaded at run time, besides the bundle"
    )
    adhoc_questions: bool = Field(
        False,
        description="let requests ask questions that no adapter was trained for: the bare base answers them, zero-shot",
    )
    adhoc_correction: Annotated[Literal["orders", "none"], EitherCase] = Field(
        "orders",
        description="with --adhoc-questions: orders, which asks with the labels in both orders and averages, or none",
    )
    state_dir: str | None = Field(None, description="folder that keeps adapters, routes and verdicts across restarts")


class ServerConfig(NumbersAreNoBooleans):
    """Where the server listens, who may ask it, and which requests it accepts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on; any other than loopback needs API keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key_file: str | None = Field(
        None, description="file with hashes of API keys, as `loraplex keys new` prints them; or set LORAPLEX_API_KEYS"
    )
    insecure: bool = Field(False, description="listen beyond loopback without API keys")
    public: tuple[Annotated[Literal["metrics", "docs"], EitherCase], ...] = Field(
        (), description="endpoints that need no API key: metrics, docs"
    )
    no_console: bool = Field(False, description="leave out the console, the page for people at / and /console")
    key_concurrency: int | None = Field(
        None, ge=1, le=MOST, description="maximum requests in flight for one API key; above it 429"
    )
    root_path: Annotated[str, AfterValidator(valid_root_path)] = Field(
        "", description="path under which a proxy offers this server, such as /llm; the proxy may remove it or not"
    )
    trusted_proxy: tuple[Annotated[str, AfterValidator(valid_network)], ...] = Field(
        (),
        description="address or network of a proxy whose X-Forwarded-For or Forwarded tells the client's address, such "
        "as 10.0.0.0/8",
    )
    cors_origin: tuple[Annotated[str, AfterValidator(valid_origin)], ...] = Field(
        (), description="origin whose web pages may ask this server, such as https://app.example.com, or * for all"
    )
    max_body_bytes: int = Field(
        2 * 2**20,
        ge=1024,
        le=MOST,
        description="maximum bytes of a request body, also after it is decompressed; a larger one gets 413",
    )
    body_timeout: float = Field(
        30, gt=0, le=A_DAY_S, description="seconds within which the whole request must arrive; after that 408"
    )
    idle_timeout: float = Field(65, gt=0, le=A_DAY_S, description="seconds after which an idle connection is closed")
    max_connections: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="maximum open connections; above it 503; by default what the limit on open files leaves, 10000 at "
        "most",
    )
    require_all: bool = Field(
        False,
        description="end the start if any adapter cannot be loaded; otherwise the others are served, and /ready counts "
        "those that failed",
    )
    drain_timeout: int = Field(
        25, ge=0, le=A_DAY_S, description="seconds that requests in flight get to finish at SIGTERM"
    )
    decisions_instructions: Annotated[Literal["warn", "strict"], EitherCase] = Field(
        "warn",
        description="a typed question in other words than its classifier's: warn in the answer, or strict, which gives "
        "422",
    )
    decisions_alias: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("jev-latest", "gpt-6-luna"),
        description="model that clients of /v1/decisions and /v1/systemone name by default; each question's name is "
        "then the classifier's",
    )
    log_format: Annotated[Literal["text", "json"], EitherCase] = Field("text", description="text or json")
    log_level: Annotated[Literal["debug", "info", "warning", "error"], EitherCase] = Field(
        "info", description="least important lines that are logged: debug, info, warning or error; debug shows probes"
    )
    log_inputs: bool = Field(False, description="log the conversations, too")
    keep_verdicts: int = Field(
        200_000,
        ge=0,
        le=MOST,
        description="number of newest verdicts kept for statistics and feedback; 0 keeps none",
    )
    keep_inputs: Annotated[str, AfterValidator(_duration), AsText] = Field(
        "0",
        description="store the texts of all classified requests for so long, such as 7d, for `loraplex routes export`; "
        "0 stores none",
    )
    keep_inputs_bytes: int = Field(
        256 * 2**20, ge=1024, le=MOST, description="maximum bytes of stored texts; beyond it the oldest are erased"
    )

    @model_validator(mode="after")
    def _has_verdicts(self) -> Self:
        if self.keep_inputs != "0" and not self.keep_verdicts:
            raise wrong("'keep_inputs' has no effect without verdicts", "give 'keep_verdicts' a number above 0")
        return self


class RouteSettings(NumbersAreNoBooleans):
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
            raise wrong("has weights whose sum is 0 or infinite", "give one of them a weight such as 1")
        return targets


class BundleSettings(BaseModel):
    """The keys of `loraplex.yaml`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: str | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    server: dict[str, Any] = Field(default_factory=dict)
    routes: dict[str, RouteSettings] = Field(default_factory=dict)
    classifiers: dict[str, ClassifierSettings] = Field(default_factory=dict)

    @property
    def gates(self) -> dict[str, Gate]:
        return {name: one.when for name, one in self.classifiers.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice or is not text. PyYAML alone would silently keep the last value."""

    text_keys = True

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if self.text_keys and not isinstance(key, str):
                written = getattr(key_node, "value", key)
                problem = f"key {written} is read as {key!r} and not as text; quote it: '{written}'"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


class _AnyKeyLoader(_UniqueKeyLoader):
    """Takes keys that are numbers or booleans, too."""

    text_keys = False


def read_yaml(path: Path, error: type[ConfigurationError], *, text_keys: bool = True) -> dict[Any, Any]:
    """Return the YAML mapping in a file. Raises `error`, which names the file and the line. text_keys: refuse keys that
    are not text."""
    refuse_pointers([path], error)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader if text_keys else _AnyKeyLoader)
    except Exception as exc:  # YAMLError, and Python's own errors from constructors on `2024-13-45` or `!!int x`
        reason = " ".join(str(exc).split()).replace('in "<unicode string>", ', "") or type(exc).__name__
        raise error(path, f"not readable as YAML: {reason}", remedy=_yaml_remedy(exc, reason)) from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise error(path, f"holds a {type(content).__name__}, not keys and values", remedy="write `key: value` lines")
    return content


def _yaml_remedy(exc: Exception, reason: str) -> str:
    if isinstance(exc, UnicodeDecodeError):
        return "save the file as UTF-8"
    if "'\\t'" in reason:
        return "indent with spaces, not with tabs"
    if "mapping values are not allowed" in reason:
        return "put quotes around a text that holds a colon and a space, or align the key with the others"
    return "correct the file"


def validate(
    model: type[Settings],
    values: Mapping[str, Any],
    source: object,
    error: type[ConfigurationError] = ConfigurationError,
    *,
    part: str = "",
    origins: Mapping[str, str] | None = None,
) -> Settings:
    """Build `model` from `values`. Raises `error` for the first problem, with the source, the key and the remedy.

    source:   the file that holds the values.
    part:     the key of the file that holds them; the whole file by default.
    origins:  setting -> what stands before its value where the user gave it, such as `--kv-cache `. Messages then name
              this as the source.
    """
    try:
        made = model.model_validate(values)
    except ValidationError as exc:
        written = _as_written(source, part)
        problem = find_problem(exc.errors(), values, model, written=written)
        raise _refused(problem, f"{source}, {part}" if part else str(source), error, origins or {}) from None
    try:
        made.model_dump_json()
    except ValueError as exc:  # a lone surrogate, which YAML and JSON can encode and UTF-8 cannot
        raise error(source, f"holds text that is not valid Unicode: {exc}", remedy="correct the file's text") from None
    return made


def _refused(
    problem: Problem, source: str, error: type[ConfigurationError], origins: Mapping[str, str]
) -> ConfigurationError:
    if origin := origins.get(problem.place.partition(".")[0]):
        given = problem.given.strip("'") or problem.given
        return error(f"{origin}{given}", problem.what, remedy=problem.remedy)
    where = f"{source}, key {problem.place!r}" if problem.place else source
    return error(where, problem.sentence, remedy=problem.remedy)


def _as_written(source: object, part: str) -> Any:
    """Return the values of a YAML file, or of one of its keys, with every scalar as text. None for other sources."""
    if not isinstance(source, Path) or source.suffix != ".yaml":
        return None
    written = yaml.load(source.read_text(encoding="utf-8"), yaml.BaseLoader)
    return written[part] if part else written


def read_bundle_settings(path: Path) -> BundleSettings:
    """Read a `loraplex.yaml`. Its `engine:` and `server:` parts are checked here, so that errors name the file."""
    settings = validate(BundleSettings, read_yaml(path, BundleError), path, BundleError)
    validate(EngineConfig, settings.engine, path, BundleError, part="engine")
    validate(ServerConfig, settings.server, path, BundleError, part="server")
    return settings


def write_bundle_settings(settings: BundleSettings) -> str:
    """Return the text of a `loraplex.yaml` with these settings; empty where all of them are the defaults."""
    content = settings.model_dump(mode="json", exclude_defaults=True)
    content = {key: value for key, value in content.items() if value}
    return yaml.safe_dump(content, allow_unicode=True) if content else ""


def resolve(
    model: type[Settings], file: Mapping[str, Any], given: Mapping[str, Any], origins: Mapping[str, str] | None = None
) -> Settings:
    """Return settings: values of flags or environment (`given`; None: not given) override those of the file. origins:
    see `validate`; by default the settings are named as Python's arguments."""
    given = {key: value for key, value in given.items() if value is not None}
    origins = origins or {key: f"{key}=" for key in given}
    return validate(model, {**file, **given}, "options", origins=origins)
