"""`loraplex serve`"""

import asyncio
import logging
import os
import shlex
import sys
from typing import Annotated

import typer

from loraplex.cli.options import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    PathArgument,
    errors_to_exit,
    named_adapters,
    quiet_libraries,
    stderr,
)

EXAMPLE = (
    '{"input": "Customer: My order never came.\\nAgent: I sent a new one.\\nCustomer: Great, thank you, bye!", '
    '"classifiers": "*"}'
)


def serve(
    path: PathArgument,
    adapter: AdapterOption = None,
    host: Annotated[str | None, typer.Option(envvar="LORAPLEX_HOST", help="Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(envvar="LORAPLEX_PORT", help="Default 8000; 0 takes a free one.")] = None,
    backend: Annotated[str | None, typer.Option(envvar="LORAPLEX_BACKEND", help="native (the default).")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    max_queue: Annotated[
        int | None,
        typer.Option(envvar="LORAPLEX_MAX_QUEUE", help="Sequences that may wait; over it 429. Default 4096."),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            envvar="LORAPLEX_KV_CACHE",
            help="Memory for K/V that is kept between calls: a share of what is free (20%, the default), 2GiB, or 0.",
        ),
    ] = None,
    preload: Annotated[
        str | None,
        typer.Option(
            envvar="LORAPLEX_PRELOAD",
            help="Read and proven at start: all (the default), none, or names with commas, which are pinned.",
        ),
    ] = None,
    max_adapters: Annotated[
        int | None,
        typer.Option(envvar="LORAPLEX_MAX_ADAPTERS", help="Adapters on the device at once. Default 1024."),
    ] = None,
    adapter_memory: Annotated[
        str | None,
        typer.Option(envvar="LORAPLEX_ADAPTER_MEMORY", help="Memory for them: 20% of what is free (default), or 2GiB."),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            envvar="LORAPLEX_HOST_MEMORY", help="Host memory for adapters that wait there: 10% (default), or 2GiB."
        ),
    ] = None,
    adapter_root: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter-root",
            metavar="DIR",
            envvar="LORAPLEX_ADAPTER_ROOT",
            help="Adapters may be loaded at run time from below it, and from below the bundle. Repeatable.",
        ),
    ] = None,
    state_dir: Annotated[
        str | None,
        typer.Option(
            envvar="LORAPLEX_STATE_DIR", metavar="DIR", help="Remembers what was loaded, unloaded and pinned."
        ),
    ] = None,
    max_step_tokens: Annotated[
        int | None,
        typer.Option(
            envvar="LORAPLEX_MAX_STEP_TOKENS",
            help="Tokens in one forward pass. Default 8192 on CUDA; on CPU 2048, or 1024 in float32.",
        ),
    ] = None,
    max_step_sequences: Annotated[
        int | None,
        typer.Option(envvar="LORAPLEX_MAX_STEP_SEQUENCES", help="Sequences in one forward pass. Default 512."),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(envvar="LORAPLEX_MAX_BODY_BYTES", help="A larger request is refused with 413. Default 2 MiB."),
    ] = None,
    drain_timeout: Annotated[
        int | None,
        typer.Option(envvar="LORAPLEX_DRAIN_TIMEOUT", help="Seconds for requests in flight at SIGTERM. Default 25."),
    ] = None,
) -> None:
    """Serve a bundle over HTTP.

    Example: [bold]loraplex serve examples/support_desk/bundle --port 8000[/]

    Example: [bold]loraplex serve path/to/base --adapter isFraud=path/to/adapter[/]

    Each option but --adapter can also stand in the environment (LORAPLEX_PORT=8000) and in the bundle's loraplex.yaml,
    under [bold]engine:[/] or [bold]server:[/]. Options win over the environment, the environment over the file.
    """
    adapters = named_adapters(adapter)
    with errors_to_exit():
        from loraplex.bundle import open_bundle
        from loraplex.config import EngineConfig, ServerConfig, resolve

        bundle = open_bundle(path, adapters)
        engine_config = resolve(
            EngineConfig,
            bundle.settings.engine,
            {
                "backend": backend,
                "device": device,
                "dtype": dtype,
                "max_queue": max_queue,
                "kv_cache": kv_cache,
                "preload": preload,
                "max_adapters": max_adapters,
                "adapter_memory": adapter_memory,
                "host_memory": host_memory,
                "adapter_root": tuple(adapter_root) if adapter_root else None,
                "state_dir": state_dir,
                "max_step_tokens": max_step_tokens,
                "max_step_sequences": max_step_sequences,
            },
        )
        server_config = resolve(
            ServerConfig,
            bundle.settings.server,
            {"host": host, "port": port, "max_body_bytes": max_body_bytes, "drain_timeout": drain_timeout},
        )
        from loraplex.backends.native import NativeBackend
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

            asyncio.run(app.serve(NativeBackend(bundle, engine_config), server_config, sock, announce))
            stderr.print("stopped")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # all is answered and closed; a download that hangs in a thread must not keep the process
