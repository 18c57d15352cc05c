"""A system that is asked in process. Its process is a worker, which runs the loads: here is its other end."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraplex.bench.load import Load, Sample
from loraplex.bench.process import Process
from loraplex.bench.served import SHARING, cannot_start, check_served
from loraplex.bench.system import SystemEnded, Tell, Transport


class InProcess:
    """`Loraplex.load(bundle, **engine)` in a worker."""

    facts: Mapping[str, Any] = MappingProxyType({})
    transport: Transport = "in-process"

    def __init__(
        self,
        name: str,
        bundle: str,
        engine: Mapping[str, Any],
        *,
        python: str,
        versions: Mapping[str, str],
        log: Path,
    ) -> None:
        self.name, self.shares_prefix, self.versions = name, name in SHARING, dict(versions)
        self._job = {"bundle": bundle, "engine": dict(engine)}
        self._process = Process([python, "-m", "loraplex.bench.worker"], log)

    @property
    def pid(self) -> int | None:
        return self._process.pid

    async def start(self, classifiers: Sequence[str]) -> None:
        try:
            await self._process.start()
            await self._process.send(json.dumps(self._job))
            answer = json.loads(await self._process.line())
        except (OSError, SystemEnded) as exc:
            raise cannot_start(self.name, str(exc)) from None
        if "error" in answer:
            raise cannot_start(self.name, answer["error"])
        check_served(self.name, answer["classifiers"], classifiers)

    async def run(self, load: Load, tell: Tell) -> list[Sample]:
        await self._process.send(json.dumps(load.to_json()))
        while "samples" not in (answer := json.loads(await self._process.line())):
            tell()
        return [Sample.from_json(one, load) for one in answer["samples"]]

    async def close(self) -> None:
        await self._process.close()
