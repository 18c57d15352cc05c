"""More than the queue holds is refused at once, with a time to come back; what was accepted is answered."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import serving

TEXT = "Customer: hello, " + "I would like to book a table for two, " * 12


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[serving.Server]:
    """Room for ten evaluations; a step holds one of these texts."""
    with serving.serve(
        tiny_bundle, "--dtype", "float32", "--max-queue", 10, "--max-step-tokens", 256, "--kv-cache", 0
    ) as server:
        yield server


def flood(server: serving.Server, num: int, classifiers: list[str]) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            bodies = [{"input": f"{i} {TEXT}", "classifiers": classifiers} for i in range(num)]
            return await asyncio.gather(*(client.post("/v1/classify", json=body) for body in bodies))

    return asyncio.run(run())


def gauges(server: serving.Server) -> dict[str, float]:
    with serving.client(server) as http:
        families = text_string_to_metric_families(http.get("/metrics").text)
    return {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}


def test_a_flood_is_answered_or_refused(server: serving.Server) -> None:
    responses = flood(server, 60, ["task0", "task1"])
    statuses = Counter(response.status_code for response in responses)
    assert set(statuses) == {200, 429} and statuses[200] >= 5
    for response in responses:
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "queue_full"
            assert int(response.headers["Retry-After"]) >= 1
            assert response.elapsed.total_seconds() < 30
    found = gauges(server)
    assert found["vllm:num_requests_waiting"] == found["vllm:num_requests_running"] == 0
    assert flood(server, 1, ["task0"])[0].status_code == 200


def test_a_batch_is_answered_as_far_as_there_is_room(server: serving.Server) -> None:
    body = {"inputs": [f"{i} {TEXT}" for i in range(30)], "classifiers": "task0"}
    with serving.client(server) as http:
        batch = http.post("/v1/classify", json=body).json()
    answered = [one for one in batch["results"] if "verdicts" in one]
    refused = [one["error"]["code"] for one in batch["results"] if "error" in one]
    assert len(answered) >= 10 and set(refused) <= {"queue_full"}


def test_tokens_are_bounded_too(tiny_bundle: Path) -> None:
    with serving.serve(
        tiny_bundle, "--dtype", "float32", "--max-queue-tokens", 300, "--max-step-tokens", 256, "--kv-cache", 0
    ) as server:
        responses = flood(server, 40, ["task0"])
        refused = [response.json()["error"]["message"] for response in responses if response.status_code == 429]
        assert refused and all("tokens wait already, of 300 at most" in message for message in refused)
        assert len(refused) < 40
