"""`loraplex serve` as a system that is asked over HTTP: started here, or already running."""

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraplex.bench.http import Http, classify
from loraplex.bench.load import Load, Sample, generate
from loraplex.bench.process import Process
from loraplex.bench.system import SystemEnded, Tell, Transport
from loraplex.errors import ConfigurationError, ServerError, listed

BACKENDS: Mapping[str, Mapping[str, str]] = {  # system -> the options that make it
    "native": {"backend": "native"},
    "peft": {"backend": "peft"},
    "peft-mixed": {"backend": "peft", "peft_batching": "mixed"},
    "vllm": {"backend": "vllm"},
}
LIBRARIES = {"native": "loraplex", "peft": "peft", "peft-mixed": "peft", "vllm": "vllm"}  # what a system needs
SHARING = ("native",)


class Served:
    """A Loraplex server. engine: options of EngineConfig. url: a server that already runs; nothing is started."""

    facts: Mapping[str, Any] = MappingProxyType({})
    transport: Transport = "http"

    def __init__(
        self,
        name: str,
        bundle: str,
        engine: Mapping[str, Any],
        *,
        python: str,
        versions: Mapping[str, str],
        log: Path,
        url: str | None = None,
    ) -> None:
        self.name, self.shares_prefix = name, name in SHARING
        self.versions = dict(versions) if url is None else {}
        self._http = None if url is None else opened(name, url, os.environ.get("LORAPLEX_API_KEY"))
        address = ["--host", "127.0.0.1", "--port", "0", "--log-level", "warning"]
        command = [python, "-m", "loraplex.cli.main", "serve", bundle, *address, *arguments(engine)]
        self._process = Process(command, log) if url is None else None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self, classifiers: Sequence[str]) -> None:
        if self._process is not None:
            try:
                await self._process.start()
                line = await self._process.line()
            except (OSError, SystemEnded) as exc:
                raise cannot_start(self.name, str(exc)) from None
            found = re.search(r"http://[^/ ]+", line)
            if found is None:
                raise cannot_start(self.name, "its server did not tell its address")
            self._http = Http(found[0])
        assert self._http is not None, "the server has an address"
        states = await _adapters(self.name, self._http)
        if states is not None:
            check_served(self.name, states, classifiers)

    async def run(self, load: Load, tell: Tell) -> list[Sample]:
        http = self._http
        assert http is not None, "the system was started"
        running = generate(lambda call: classify(http, call), load, tell)
        return await (running if self._process is None else self._process.while_alive(running))

    async def close(self) -> None:
        if self._http is not None:
            self._http.close()
        if self._process is not None:
            await self._process.close()


def arguments(engine: Mapping[str, Any]) -> list[str]:
    """Return the options of EngineConfig as `loraplex serve` takes them."""
    given: list[str] = []
    for name, value in engine.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            given += [option] if value else []
        else:
            given += [part for one in (value if isinstance(value, tuple) else (value,)) for part in (option, str(one))]
    return given


def cannot_start(name: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"system {name}", f"does not start: {why}", remedy="correct it, or leave the system out of --systems"
    )


def check_served(name: str, states: Mapping[str, str], classifiers: Sequence[str]) -> None:
    """Raise ConfigurationError where a system does not serve all of the classifiers.

    states:  classifier -> why it is not served; empty where it is."""
    missing = [one for one in classifiers if states.get(one, "it is not there")]
    if missing:
        why = states.get(missing[0], "it is not there")
        raise ConfigurationError(
            f"system {name}",
            f"does not serve {listed(missing)}: {why}",
            remedy="ask others with --classifiers, or leave the system out of --systems",
        )


def opened(name: str, url: str, key: str | None = None) -> Http:
    """Return connections to a server that runs. Raises ConfigurationError where `url` is no URL."""
    try:
        return Http(url, {"Authorization": f"Bearer {key}"} if key else None)
    except ValueError:
        raise ConfigurationError(
            f"--url {name}={url}", "is not the URL of a server", remedy="give a URL such as http://127.0.0.1:8000"
        ) from None


async def _adapters(name: str, http: Http) -> dict[str, str] | None:
    """Return classifier -> why it is not served; None where our key may not ask that."""
    try:
        async with asyncio.timeout(30):
            status, content = await http.request("GET", "/v1/adapters")
        if status == 403:
            return None
        if status != 200:
            raise ValueError(f"status {status}")
        found = json.loads(content)["adapters"]
        return {one["name"]: one["error"]["message"] if one["state"] == "failed" else "" for one in found}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as exc:
        raise ServerError(
            "unreachable",
            f"system {name}: GET /v1/adapters is not answered: {str(exc) or type(exc).__name__}",
            remedy="check the URL, the server and LORAPLEX_API_KEY",
        ) from None
