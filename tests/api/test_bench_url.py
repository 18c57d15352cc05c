"""The benchmark asks a server that runs already."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

import serving
from loraplex.bench.call import Call
from loraplex.bench.load import Job, Load, Sample
from loraplex.bench.served import Served
from loraplex.errors import LoraplexError


def asked(url: str, classifiers: Sequence[str]) -> list[Sample]:
    system = Served("native", "", {}, python="", versions={}, log=Path(), url=url)
    calls = (Call(input="Customer: hello", classifiers=tuple(classifiers)),)
    load = Load(jobs=tuple(Job(index=i, conversation=i, turns=(calls,)) for i in range(3)), concurrency=1)

    async def ask() -> list[Sample]:
        try:
            await system.start(classifiers)
            return await system.run(load, lambda: None)
        finally:
            await system.close()

    assert system.pid is None and not system.versions
    return asyncio.run(ask())


def test_a_server_that_runs_already_is_asked(tiny_server: serving.Server) -> None:
    samples = asked(tiny_server.url, ("task0", "task1"))
    assert [one.reply.status for one in samples] == ["ok"] * 3
    assert samples[0].reply.verdicts.keys() == {"task0", "task1"} and samples[0].reply.prompt_tokens > 0
    assert 0 < (samples[0].reply.engine_ms or 0) < 1000 * samples[0].latency_s


@pytest.mark.parametrize(
    ("url", "classifiers", "told"),
    [
        ("", ("task0", "isFraud"), "does not serve 'isFraud': it is not there"),
        ("http://127.0.0.1:1", ("task0",), "GET /v1/adapters is not answered"),
        ("https://127.0.0.1", ("task0",), "is not the URL of a server"),
    ],
)
def test_what_it_cannot_ask_is_told(
    tiny_server: serving.Server, url: str, classifiers: tuple[str, ...], told: str
) -> None:
    with pytest.raises(LoraplexError) as caught:
        asked(url or tiny_server.url, classifiers)
    assert told in caught.value.message and caught.value.remedy


def test_a_path_that_is_no_loraplex_is_told(tiny_server: serving.Server) -> None:
    with pytest.raises(LoraplexError, match="status 404"):
        asked(f"{tiny_server.url}/elsewhere", ("task0",))
