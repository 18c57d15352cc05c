"""What the OpenAPI schema promises holds for whatever schemathesis makes of it, sound and unsound.

Left out is the check that what fits the schema is accepted: a schema cannot say which adapters there are, that a text
is not empty or that weights add up to something, and those are refused with 422.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

import serving


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(tiny_bundle, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def api(server: serving.Server) -> Any:
    """Without the limits that only bodies of many thousand items reach: making those takes minutes."""
    with serving.client(server) as http:
        document = http.get("/openapi.json").json()
    for part in _parts(document):
        if part.get("maxItems", 0) >= 1000:
            del part["maxItems"]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    return schema


def _parts(document: Any) -> Iterator[dict[str, Any]]:
    if isinstance(document, dict):
        yield document
    for part in document.values() if isinstance(document, dict) else document if isinstance(document, list) else ():
        yield from _parts(part)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_every_answer_is_as_the_schema_says(api: Any, mode: GenerationMode) -> None:
    for found in api.get_all_operations():
        operation = found.ok()
        if mode == GenerationMode.NEGATIVE and not operation.body.items:
            continue  # any path and any query is a sound one

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def holds(case: Any) -> None:
            response = case.call_and_validate(excluded_checks=[positive_data_acceptance, not_a_server_error])
            assert response.status_code != 500, response.text  # 503 and 504 are in the schema

        holds()


def test_the_server_still_answers(server: serving.Server) -> None:
    with serving.client(server) as http:
        assert isinstance(http, httpx.Client) and http.get("/ready").status_code == 200
