"""`loraplex serve`: runs the HTTP server."""

import asyncio
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from pydantic import BaseModel
from typer.core import TyperCommand

from loraplex.cli.options import (
    AdapterOption,
    PathArgument,
    errors_to_exit,
    named_adapters,
    origins,
    print_error,
    quiet_libraries,
    settings_options,
    stderr,
)
from loraplex.config import EngineConfig, ServerConfig, resolve
from loraplex.environment import drop_links, unread
from loraplex.errors import LoraplexError
from loraplex.exhaustion import exhaustion

if TYPE_CHECKING:
    from loraplex.planning.start_plan import StartPlan
    from loraplex.service.service import Service

logger = logging.getLogger(__name__)

NAMES = "--served-model-name"
CONVERSATION = "Customer: My order never came.\nAgent: I sent a new one.\nCustomer: Great, thank you, bye!"


class ServeCommand(TyperCommand):
    """Takes several names after one --served-model-name, as vLLM does, if PATH comes first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _repeated(args) if args and not args[0].startswith("-") else args)


def _repeated(args: list[str]) -> list[str]:
    """Return the arguments with NAMES before each further name that follows the option NAMES."""
    repeated, is_naming = [], False
    for index, one in enumerate(args):
        is_naming = one == NAMES if one.startswith("-") else is_naming
        is_further = is_naming and one != NAMES and args[index - 1] != NAMES
        repeated += [NAMES, one] if is_further else [one]
    return repeated


@settings_options(EngineConfig, ServerConfig)
def serve(context: typer.Context, path: PathArgument, adapter: AdapterOption = None, **settings: Any) -> None:
    """Serve a bundle over HTTP.

    Example: [bold]loraplex serve examples/support_desk/bundle --port 8000[/]

    Example: [bold]loraplex serve path/to/base --adapter isFraud=path/to/adapter --adapter isDone=org/name[/]

    Each option except --adapter can also be set in the environment (LORAPLEX_PORT=8000), or in the bundle's
    loraplex.yaml under [bold]engine:[/] or [bold]server:[/]. Options win over the environment; the environment wins
    over the file.
    """
    adapters = named_adapters(adapter)
    # Until the server handles SIGTERM: a container's PID 1 ignores signals that have no handler.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    as_json = (settings["log_format"] or "").lower() == "json"  # as far as is known before the bundle's file is read
    with errors_to_exit(lambda error: _report(error, as_json)):
        from loraplex.bundle import open_bundle
        from loraplex.server import keys, logs, process

        logs.configure("json" if as_json else "text")
        written = origins(context)
        warnings = drop_links(settings, written)
        bundle = open_bundle(path, require_all=False)
        engine_config = resolve(EngineConfig, bundle.settings.engine, _of(EngineConfig, settings), written)
        server_config = resolve(ServerConfig, bundle.settings.server, _of(ServerConfig, settings), written)
        as_json = server_config.log_format == "json"
        logs.configure(server_config.log_format, server_config.log_level)
        read = [one.envvar for one in context.command.params if isinstance(one.envvar, str)]
        for warning in (*warnings, unread(os.environ, read)):
            if warning is not None:
                logger.warning("%s", warning)
        from loraplex.routing.router import Router
        from loraplex.routing.start import open_stores, start_router
        from loraplex.service.named_adapters import add_adapters
        from loraplex.service.preparation import check_effects, prepare

        # Whatever can be wrong is told before PyTorch is imported, which can take a minute.
        api_keys = keys.read_keys(server_config.api_key_file, os.environ.get(keys.ENVIRONMENT, ""))
        check_effects(engine_config, written)
        bundle = add_adapters(bundle, adapters, engine_config, lambda line: _say(line, as_json))
        bundle = replace(bundle, require_all=server_config.require_all)
        preparation = prepare(bundle, engine_config)
        stores = open_stores(
            engine_config.state_dir,
            max_verdicts=server_config.keep_verdicts,
            keep_inputs=server_config.keep_inputs,
            max_input_bytes=server_config.keep_inputs_bytes,
        )
        sock = process.listen(server_config, api_keys)
        _say(f"loading {bundle.base} with {len(bundle.adapters)} adapters …", as_json)
        from loraplex.service.start import open_executor, start

        quiet_libraries()
        executor = open_executor(engine_config)
        logs.configure(server_config.log_format, server_config.log_level)  # again: these imports have added handlers
    url = process.url_of(server_config, sock)

    async def open_router() -> Router:
        service = await start(bundle, engine_config, executor, preparation, lambda plan: _tell_plan(plan, as_json))
        return await start_router(service, bundle.settings.routes, *stores, gates=bundle.settings.gates)

    def announce(router: Router) -> None:
        console = "" if server_config.no_console else f"console: {url}/, "
        _say(f"ready: {url} ({console}docs: {url}/docs)" + ("" if as_json else ". Try:"), as_json)
        path, body = example_request(router.service)
        key = ' -H "Authorization: Bearer $LORAPLEX_API_KEY"' if api_keys else ""
        with suppress(OSError):
            typer.echo(
                f"curl -s {url}{path}{key} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
            )

    asyncio.run(_serve_to_end(process.serve(open_router, server_config, api_keys, sock, announce), as_json))


def example_request(service: "Service") -> tuple[str, dict[str, Any]]:
    """Return the path and body of a request that the service answers without loading every adapter."""
    names = service.names()
    if not names:
        return "/v1/completions", {"model": service.base_name, "prompt": CONVERSATION, "max_tokens": 8}
    loaded = [one.name for one in service.adapters() if one.on_device]
    classifiers = "*" if set(names) <= set(loaded) else (*loaded, *names)[0]
    return "/v1/classify", {"input": CONVERSATION, "classifiers": classifiers}


async def _serve_to_end(serving: Coroutine[Any, Any, None], as_json: bool) -> NoReturn:
    """Serve, then end the process with os._exit. A load or a download that hangs in a thread would otherwise keep the
    process alive."""
    code = 1
    try:
        await serving
        _say("stopped", as_json)
        code = 0
    except BaseException as exc:
        error = exc if isinstance(exc, LoraplexError) else exhaustion(exc)
        if error is None:
            logger.critical("the server failed", exc_info=True)
        else:
            _report(error, as_json)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)


def _report(error: LoraplexError, as_json: bool) -> None:
    if as_json:
        logger.critical("%s", error, extra={"fields": {"error": error.code}})
    else:
        print_error(error)


def _say(message: str, as_json: bool) -> None:
    if as_json:
        logger.info("%s", message)
    else:
        with suppress(OSError):  # output that cannot be written, as on a full disk, must not end the server
            stderr.print(message, markup=False)


def _tell_plan(plan: "StartPlan", as_json: bool) -> None:
    if as_json:
        logger.info("%s", plan.lines()[0], extra={"fields": plan.fields()})
    else:
        _say("\n".join(plan.lines()), as_json)


def _of(model: type[BaseModel], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are fields of `model`. A list that was not given is empty, and becomes None."""
    return {
        name: settings[name] or None if isinstance(settings[name], list) else settings[name]
        for name in model.model_fields
    }
