"""The handlers that AWS's Hugging Face images call: `model_fn`, `input_fn`, `predict_fn` and `output_fn`.

They ask the HTTP server's own app in this process. So requests, answers and errors are those of `/invocations`."""

import atexit
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from loraplex.bundle import open_bundle
from loraplex.config import EngineConfig, ServerConfig, resolve
from loraplex.environment import drop_links, settings_in, unread, variable
from loraplex.errors import BadInputError, ConfigurationError, InvalidRequestError, LoraplexError, error_answered
from loraplex.inprocess import Loraplex
from loraplex.server.answers import unexpected
from loraplex.server.app import create_app
from loraplex.server.json_body import media_type, parse
from loraplex.server.lifecycle import Lifecycle
from loraplex.server.schemas import error_json
from loraplex.service.preparation import check_effects, prepare

logger = logging.getLogger(__name__)

JSON = "application/json"
WORKERS = "SAGEMAKER_MODEL_SERVER_WORKERS"
# As in pyproject.toml. pip checks it where it installs Loraplex, which an artifact only holds as a folder.
OLDEST = {"torch": (2, 11), "transformers": (5, 10)}


@dataclass(frozen=True, slots=True)
class Body:
    """A request's body as it came. content_type: None if the client named none."""

    content: bytes
    content_type: str | None


class Model:
    """A bundle that is served in this process, and the app that answers for it."""

    def __init__(self, loraplex: Loraplex, config: ServerConfig) -> None:
        self.loraplex = loraplex
        app = create_app(config, (), Lifecycle(loraplex.router))
        self._http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://loraplex")

    @property
    def is_alive(self) -> bool:
        return self.loraplex.service.alive

    def ask(self, body: Body, headers: Mapping[str, str]) -> httpx.Response:
        """Return the answer of `/invocations`, an error's as well. Threads that ask at the same time share batches."""
        given = {} if body.content_type is None else {"Content-Type": body.content_type}
        return self.loraplex.run(self._http.post("/invocations", content=body.content, headers={**headers, **given}))


class Unloaded:
    """Stands for a bundle that could not be loaded: answers every request with the reason."""

    is_alive = True

    def __init__(self, error: LoraplexError) -> None:
        self._error = error

    def ask(self, body: Body, headers: Mapping[str, str]) -> httpx.Response:
        error = self._error
        return httpx.Response(error.status, json=error_json(error.code, error.message, error.remedy))


def model_fn(model_dir: str | Path, context: Any = None) -> Model | Unloaded:
    """Load the bundle, or the base, in `model_dir`, and all its adapters.

    Settings come from the environment, as for `loraplex serve` (LORAPLEX_BACKEND=vllm), and from `loraplex.yaml`.
    Raises ConfigurationError. Under a model server (`context`) the model that it returns answers with the error."""
    workers = os.environ.get(WORKERS)
    if workers != "1" and (workers or context is not None):
        logger.warning(
            "%s is %s; set it to 1, because each worker loads a base of its own", WORKERS, workers or "not set"
        )
    if context is not None:
        logging.getLogger("httpx").setLevel(logging.WARNING)  # the app writes a line for each request already
    try:
        return _load(Path(model_dir))
    except Exception as exc:
        if context is None:
            raise
        # The toolkit would answer 400, and load again for each request. Its /ping answers 200 in any case.
        logger.critical("the model cannot be loaded", exc_info=True)
        return Unloaded(exc if isinstance(exc, LoraplexError) else unexpected(exc))


def _load(path: Path) -> Model:
    engine, server = settings_in(os.environ, EngineConfig), settings_in(os.environ, ServerConfig)
    origins = {name: f"{variable(name)}=" for name in (*engine, *server)}
    warnings = drop_links(server, origins)
    bundle = open_bundle(path, require_all=False)
    engine_config = resolve(EngineConfig, bundle.settings.engine, engine, origins)
    server_config = resolve(ServerConfig, bundle.settings.server, server, origins)
    read = [variable(name) for name in (*EngineConfig.model_fields, *ServerConfig.model_fields)]
    for warning in (*warnings, unread(os.environ, read)):
        if warning is not None:
            logger.warning("%s", warning)
    check_effects(engine_config, engine)
    _check_versions(engine_config.backend)
    bundle = replace(bundle, require_all=server_config.require_all)
    loraplex = Loraplex.start(bundle, engine_config, prepare(bundle, engine_config))
    atexit.register(loraplex.close)  # the article's handlers have no place for it
    return Model(loraplex, server_config)


def _check_versions(backend: str) -> None:
    """Raise ConfigurationError where the image's libraries are too old. PEFT alone computes with an older PyTorch."""
    for library, oldest in OLDEST.items():
        found = version(library)
        numbers = re.match(r"(\d+)\.(\d+)", found)
        if numbers and tuple(map(int, numbers.groups())) < oldest and (library, backend) != ("torch", "peft"):
            needed = f"{library}>={'.'.join(map(str, oldest))}"
            remedy = f"add {needed} to code/requirements.txt, or take an image that has it"
            raise ConfigurationError(f"{library} {found}", "is too old for Loraplex", remedy=remedy)


def input_fn(data: str | bytes | bytearray | None, content_type: str | None = JSON, context: Any = None) -> Any:
    """Return what a JSON body says. Another body, and one that cannot be read, is returned as a `Body`; `predict_fn`
    says what is wrong with it."""
    content = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else bytes(data or b"")
    if media_type(content_type or JSON) == JSON:
        try:
            return parse(content)
        except BadInputError:
            pass
    return Body(content, content_type)


def predict_fn(inputs: Any, model: Model | Unloaded, context: Any = None) -> Any:
    """Return the answer to what `input_fn` returned: what its JSON says, such as
    `[{"confidence_score", "predicted_text"}]`, or bytes if it is CSV or JSON lines.

    Raises LoraplexError. Under a model server (`context`) it returns the error and sets the answer's status instead."""
    if context is not None and not model.is_alive:
        logger.critical("the engine died; the model server starts another worker")
        raise SystemExit(1)
    response = model.ask(inputs if isinstance(inputs, Body) else _json(inputs), _passed_on(context))
    is_json = media_type(response.headers.get("Content-Type", "")) == JSON
    answer: Any = response.json() if is_json else response.content
    if context is not None:
        context.set_response_status(response.status_code, response.reason_phrase)
        for name, value in response.headers.items():
            if name == "retry-after" or name.startswith("x-"):
                context.set_response_header(0, name, value)
    elif response.is_error:
        error = answer["error"]
        raise error_answered(error["code"], error["message"], remedy=error["remedy"], status=response.status_code)
    return answer


def output_fn(output: Any, accept: str = JSON, context: Any = None) -> str | bytes:
    """Return the answer as JSON, or as it is if it is bytes."""
    return output if isinstance(output, bytes) else json.dumps(output)


def _json(inputs: Any) -> Body:
    try:
        return Body(json.dumps(inputs, ensure_ascii=False).encode("utf-8", "surrogatepass"), JSON)
    except (TypeError, ValueError, RecursionError) as exc:
        raise InvalidRequestError(
            f"the request cannot be written as JSON: {exc}", remedy="give dicts, lists, texts and numbers"
        ) from None


def _passed_on(context: Any) -> dict[str, str]:
    """Return the headers of the model server's request that the app reads besides its type, such as SageMaker's."""
    given = {} if context is None else context.get_all_request_header(0)
    names = [name for name in given if name.lower() == "accept" or name.lower().startswith("x-")]
    return {name: given[name] for name in names}
