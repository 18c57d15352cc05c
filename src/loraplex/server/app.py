"""Builds the ASGI app: a router behind HTTP routes and middlewares."""

import time
from collections.abc import Sequence

from fastapi import FastAPI

import loraplex
from loraplex.config import ServerConfig
from loraplex.errors import ConfigurationError
from loraplex.metrics import Metrics
from loraplex.server import (
    admin,
    classification,
    classifiers,
    console,
    decisions,
    openai,
    routes,
    sagemaker,
    systemone,
    tokenize,
    traffic,
)
from loraplex.server.answers import AnswerErrors, add_handlers
from loraplex.server.keys import ApiKey
from loraplex.server.lifecycle import Gate, LastAnswer, Lifecycle
from loraplex.server.limits import BodyLimit
from loraplex.server.logs import RequestLog
from loraplex.server.paths import Paths
from loraplex.server.proxies import Cors, RootPath, TrustedProxies
from loraplex.server.schemas import COMMON
from loraplex.server.security import Access


def create_app(config: ServerConfig, keys: Sequence[ApiKey], lifecycle: Lifecycle) -> FastAPI:
    """Return an ASGI app that serves the router of `lifecycle`. Until the router is ready, the app answers only probes.
    Without `keys` it answers everyone. Raises ConfigurationError if --root-path is one of the server's own paths."""
    app = FastAPI(
        title="Loraplex",
        summary="Many LoRA classifiers from one base model, in one call",
        version=loraplex.__version__,
        redirect_slashes=False,
        responses=COMMON,
    )
    app.state.metrics = Metrics(
        lambda: lifecycle.router.service.stats(),
        lambda name: name in lifecycle.router.service.base_names or lifecycle.router.knows(name),
        lambda: lifecycle.router.num_shadows_shed(),
    )
    app.state.created = int(time.time())
    app.state.lifecycle = lifecycle
    app.state.config = config
    declared = list(app.routes)  # the documentation's
    parts = [classification, classifiers, decisions, systemone, routes, sagemaker, admin, traffic, openai, tokenize]
    for part in parts if config.no_console else [*parts, console]:
        app.include_router(part.router)
        declared += part.router.routes
    app.state.paths = paths = Paths(declared)
    add_handlers(app)
    # Innermost first: a request passes the last one first.
    app.add_middleware(sagemaker.JsonByDefault)
    app.add_middleware(sagemaker.Sessions)
    app.add_middleware(BodyLimit, max_body_bytes=config.max_body_bytes, body_timeout=config.body_timeout)
    app.add_middleware(Gate, lifecycle=lifecycle, always=() if config.no_console else console.PATHS)
    if keys:
        public = config.public if config.no_console else {*config.public, "console"}
        app.add_middleware(Access, keys=keys, public=public, key_concurrency=config.key_concurrency, paths=paths)
    app.add_middleware(AnswerErrors, log_inputs=config.log_inputs)
    if config.cors_origin:
        app.add_middleware(Cors, origins=config.cors_origin)
    app.add_middleware(LastAnswer, lifecycle=lifecycle)
    app.add_middleware(RequestLog, log_inputs=config.log_inputs, paths=paths)
    app.add_middleware(sagemaker.RuntimeApi)  # around all others, so that every refusal has AWS's shape
    if config.trusted_proxy:
        app.add_middleware(TrustedProxies, trusted=config.trusted_proxy)
    if config.root_path:
        if paths.begin_with(config.root_path):
            raise ConfigurationError(
                f"--root-path {config.root_path}",
                "is the beginning of paths that the server has itself",
                remedy="give a prefix of the proxy's, such as /llm, or leave it out if the proxy adds none",
            )
        app.add_middleware(RootPath, root_path=config.root_path)
    return app
