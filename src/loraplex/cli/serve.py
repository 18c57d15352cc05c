"""`loraplex serve`"""

import asyncio
import logging
import os
import shlex
import sys
from typing import Any

import typer
from pydantic import BaseModel

from loraplex.cli.options import (
    AdapterOption,
    PathArgument,
    errors_to_exit,
    named_adapters,
    quiet_libraries,
    settings_options,
    stderr,
)
from loraplex.config import EngineConfig, ServerConfig, resolve

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
    with errors_to_exit():
        from loraplex.bundle import open_bundle

        bundle = open_bundle(path, adapters)
        engine_config = resolve(EngineConfig, bundle.settings.engine, _of(EngineConfig, settings))
        server_config = resolve(ServerConfig, bundle.settings.server, _of(ServerConfig, settings))
        from loraplex.backends.native import NativeBackend
        from loraplex.routing.router import open_router
        from loraplex.server import app

        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        quiet_libraries()
        sock = app.bind(server_config)
        with sock:
            url = app.url_of(server_config, sock)
            stderr.print(f"loading {bundle.base} with {len(bundle.adapters)} adapters …", markup=False)

            def announce() -> None:
                stderr.print(f"ready: {url} (docs: {url}/docs). Try:", markup=False)
                typer.echo(f"curl -s {url}/v1/classify -H 'Content-Type: application/json' -d {shlex.quote(EXAMPLE)}")

            backend = NativeBackend(bundle, engine_config)
            router = open_router(
                backend,
                bundle.settings.routes,
                state_dir=engine_config.state_dir,
                num_kept=server_config.keep_verdicts,
            )
            asyncio.run(app.serve(router, server_config, sock, announce))
            stderr.print("stopped")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # all is answered and closed; a download that hangs in a thread must not keep the process


def _of(model: type[BaseModel], settings: dict[str, Any]) -> dict[str, Any]:
    """Those of its fields that were given; a list that was not given is empty."""
    return {
        name: settings[name] or None if isinstance(settings[name], list) else settings[name]
        for name in model.model_fields
    }
