"""`loraplex serve`"""

import asyncio
import logging
import os
import shlex
import signal
import sys
from collections.abc import Coroutine
from typing import Any, NoReturn

import typer
from pydantic import BaseModel

from loraplex.cli.options import (
    AdapterOption,
    PathArgument,
    errors_to_exit,
    named_adapters,
    print_error,
    quiet_libraries,
    settings_options,
    stderr,
)
from loraplex.config import EngineConfig, ServerConfig, resolve
from loraplex.errors import LoraplexError

logger = logging.getLogger(__name__)

EXAMPLE = (
    '{"input": "Customer: My order never came.\\nAgent: I sent a new one.\\nCustomer: Great, thank you, bye!", '
    '"classifiers": "*"}'
)


@settings_options(EngineConfig, ServerConfig)
def serve(path: PathArgument, adapter: AdapterOption = None, **settings: Any) -> None:
    """Serve a bundle over HTTP.

    Example: [bold]loraplex serve examples/support_desk/bundle --port 8000[/]

    Example: [bold]loraplex serve path/to/base --adapter isFraud=path/to/adapter[/]

    Each option but --adapter can also stand in the environment (LORAPLEX_PORT=8000) and in the bundle's loraplex.yaml,
    under [bold]engine:[/] or [bold]server:[/]. Options win over the environment, the environment over the file.
    """
    adapters = named_adapters(adapter)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until the server takes it: a container's PID 1 ignores it
    with errors_to_exit():
        from loraplex.bundle import open_bundle

        bundle = open_bundle(path, adapters)
        engine_config = resolve(EngineConfig, bundle.settings.engine, _of(EngineConfig, settings))
        server_config = resolve(ServerConfig, bundle.settings.server, _of(ServerConfig, settings))
        from loraplex.server import keys, logs, process

        api_keys = keys.read_keys(server_config.api_key_file, os.environ.get(keys.ENVIRONMENT, ""))
        from loraplex.routing.router import Router, open_stores, start_router
        from loraplex.service.start import open_executor, start

        quiet_libraries()
        logs.configure(server_config.log_format)
        executor = open_executor(engine_config)
        stores = open_stores(engine_config.state_dir, max_verdicts=server_config.keep_verdicts)
        as_json = server_config.log_format == "json"
        sock = process.listen(server_config, api_keys)
    url = process.url_of(server_config, sock)
    _say(f"loading {bundle.base} with {len(bundle.adapters)} adapters …", as_json)

    async def open_router() -> Router:
        service = await start(bundle, engine_config, executor)
        return await start_router(service, bundle.settings.routes, *stores)

    def announce() -> None:
        _say(f"ready: {url} (docs: {url}/docs). Try:", as_json)
        typer.echo(f"curl -s {url}/v1/classify -H 'Content-Type: application/json' -d {shlex.quote(EXAMPLE)}")

    asyncio.run(_to_the_end(process.serve(open_router, server_config, api_keys, sock, announce), as_json))


async def _to_the_end(serving: Coroutine[Any, Any, None], as_json: bool) -> NoReturn:
    """Ends the process from within: a load or a download that hangs in a thread would keep the event loop, too."""
    code = 1
    try:
        await serving
        _say("stopped", as_json)
        code = 0
    except LoraplexError as exc:
        if as_json:
            logger.critical("%s", exc, extra={"fields": {"error": exc.code}})
        else:
            print_error(exc)
    except BaseException:
        logger.critical("the server failed", exc_info=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _say(message: str, as_json: bool) -> None:
    if as_json:
        logger.info("%s", message)
    else:
        stderr.print(message, markup=False)


def _of(model: type[BaseModel], settings: dict[str, Any]) -> dict[str, Any]:
    """Those of its fields that were given; a list that was not given is empty."""
    return {
        name: settings[name] or None if isinstance(settings[name], list) else settings[name]
        for name in model.model_fields
    }
