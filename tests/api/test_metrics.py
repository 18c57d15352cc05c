"""What a scrape shows of the traffic before it, read by Prometheus' own parser."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import serving

TEXT = "Customer: hello, I would like to book a table for two, is it done?"


@pytest.fixture(scope="module")
def http(tiny_bundle: Path) -> Iterator[httpx.Client]:
    with serving.serve(tiny_bundle, "--dtype", "float32", "--preload", "task0") as server:
        with serving.client(server) as client:
            yield client


def scrape(http: httpx.Client) -> dict[tuple[str, tuple[str, ...]], float]:
    """(sample, label values in the order of their names) -> value."""
    response = http.get("/metrics")
    assert response.status_code == 200
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_before_any_traffic_every_adapter_is_there(http: httpx.Client) -> None:
    found = scrape(http)
    assert found["loraplex_classifications_total", ("task1", "task1", "ok")] == 0
    assert found["loraplex_adapter_state", ("task0", "ready")] == 1
    assert found["loraplex_adapter_state", ("task1", "registered")] == 1
    assert found["loraplex_adapters_on_device", ()] == 1 and found["loraplex_adapter_device_bytes", ()] > 0


def test_answers_are_counted_by_classifier_outcome_and_label(http: httpx.Client) -> None:
    before = scrape(http)
    names = ["task0", "task1", "no such thing"]
    answer = http.post("/v1/classify", json={"input": TEXT, "classifiers": names, "conversation_id": "x"}).json()
    again = http.post("/v1/classify", json={"input": TEXT, "classifiers": names, "conversation_id": "x"}).json()
    assert http.post("/v1/classify", json={"input": TEXT, "classifiers": "unheard of"}).status_code == 404
    assert http.post("/invocations", json={"input_text": TEXT, "adapter_name": "task0"}).status_code == 200
    found = scrape(http)

    def grown(name: str, *labels: str) -> float:
        return found[name, labels] - before.get((name, labels), 0.0)

    assert grown("loraplex_classifications_total", "task0", "task0", "ok") == 3
    assert grown("loraplex_classifications_total", "task1", "task1", "ok") == 2
    assert grown("loraplex_classifications_total", "", "(unknown)", "unknown_classifier") == 3
    assert grown("loraplex_request_failures_total", "unknown_classifier") == 1
    label = answer["verdicts"][0]["label"]
    is_positive = "true" if label == "yes" else "false"
    assert grown("loraplex_labels_total", "task0", "task0", is_positive, label) == 3
    assert all(verdict["label_mass"] < 0.05 for verdict in answer["verdicts"][:2]), "nothing to warn of"
    assert grown("loraplex_warnings_total", "task0", "task0", "low_label_mass") == 3
    cached = answer["usage"]["cached_tokens"] + again["usage"]["cached_tokens"]
    assert cached > 0 and grown("loraplex_tokens_total", "cached") == cached
    assert grown("loraplex_request_seconds_count", "compute") == 3
    assert 1 <= grown("loraplex_steps_total") <= grown("loraplex_step_sequences_total")
    assert grown("loraplex_step_tokens_total") >= grown("loraplex_tokens_total", "computed")  # proofs are no requests
    assert 0 < grown("loraplex_step_seconds_total")
    assert 0 < grown("loraplex_request_seconds_sum", "compute") <= grown("loraplex_request_seconds_sum", "total")
    assert found["loraplex_adapter_state", ("task1", "ready")] == 1
    assert not [labels for name, labels in found if "unheard of" in labels or "no such thing" in labels]


def test_what_lora_aware_routers_read(http: httpx.Client) -> None:
    found = scrape(http)
    assert found["vllm:num_requests_waiting", ()] == 0 and found["vllm:num_requests_running", ()] == 0
    [labels] = [labels for name, labels in found if name == "vllm:lora_requests_info"]
    assert labels == ("1024", "", "")
