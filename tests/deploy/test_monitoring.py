"""A real Prometheus with our settings scrapes a real server that runs as compose.yaml starts it: `make test-deploy`."""

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import deployment
import serving

TEXT = "Customer: hello, I would like to book a table for two, is it done?"
WAIT_S = 20.0

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not deployment.TOOLS.is_dir(), reason="needs .deploy-tools: make test-deploy"),
]


@dataclass
class Prometheus:
    http: httpx.Client

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self.http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Return labels -> value."""
        result = self.ask("query", query=expression)["result"]
        return {tuple(sorted(one["metric"].items())): float(one["value"][1]) for one in result}

    def value(self, expression: str) -> float:
        return next(iter(self.query(expression).values()), math.nan)


def wait_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends, "it does not come true"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that docs/deploy.md makes."""
    folder = tmp_path_factory.mktemp("secrets")
    made = serving.loraplex("keys", "new", "--name", "prometheus", "--scope", "infer")
    (folder / "keys.txt").write_text(made.stdout)
    (folder / "prometheus.key").write_text(made.stderr.partition(": ")[2])
    return folder


@pytest.fixture(scope="module")
def server(tiny_bundle: Path, secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[serving.Server]:
    """Three classifiers, and one whose weights are cut short."""
    folder = tmp_path_factory.mktemp("served")
    bundle = shutil.copytree(tiny_bundle, folder / "bundle")
    shutil.copytree(bundle / "task2", bundle / "broken")
    os.truncate(bundle / "broken/adapter_model.safetensors", 100)
    arguments = deployment.here(
        deployment.commands()["compose"],
        path=bundle,
        host="127.0.0.1",
        port=0,
        api_key_file=secrets / "keys.txt",
        state_dir=folder / "state",
    )
    with serving.serve(*arguments, log=str(folder / "log"), LORAPLEX_DTYPE="float32") as server:
        yield server


@pytest.fixture(scope="module")
def prometheus(server: serving.Server, secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after it has scraped traffic of many kinds."""
    folder = tmp_path_factory.mktemp("prometheus")
    conf = deployment.read("prometheus.yml")
    for ours, here in (
        ("/run/secrets/prometheus_key", str(secrets / "prometheus.key")),
        ("loraplex:8000", server.url.removeprefix("http://")),
        ("15s", "1s"),
    ):
        assert ours in conf
        conf = conf.replace(ours, here)
    (folder / "prometheus.yml").write_text(conf)
    (folder / "alerts.yml").write_text(deployment.read("alerts.yml"))
    checked = subprocess.run([deployment.program("promtool"), "check", "config", folder / "prometheus.yml"])
    assert checked.returncode == 0
    port = deployment.free_port()
    command = [
        deployment.program("prometheus"),
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(command, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        client.headers["X-API-Key"] = (secrets / "prometheus.key").read_text().strip()
        found = Prometheus(http)
        try:
            wait_for(lambda: is_there(http) and found.value('up{job="loraplex"}') == 1)
            traffic(client)  # makes the series; a rate needs a value before and one after
            before = time.time()
            wait_for(lambda: scraped(found) > before)
            traffic(client)
            before = time.time()
            wait_for(lambda: scraped(found) > before)
            yield found
        finally:
            process.terminate()


def is_there(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.ConnectError:
        return False


def scraped(prometheus: Prometheus) -> float:
    """When the newest scrape was."""
    return prometheus.value("timestamp(loraplex_steps_total)")


def traffic(http: httpx.Client) -> None:
    asked: dict[str, Any] = {"input": TEXT, "classifiers": ["task0", "task1", "nope", "broken"]}
    streamed = {"model": "verbatim", "prompt": "hello", "max_tokens": 4, "stream": True}
    statuses = [
        http.post(path, **request).status_code
        for path, request in (
            ("/v1/classify", {"json": asked | {"conversation_id": "x"}}),
            ("/v1/classify", {"json": {"inputs": [TEXT, TEXT], "classifiers": "task2"}}),
            ("/v1/classify", {"json": asked | {"classifiers": "nope"}}),
            ("/v1/classify", {"content": b"{", "headers": {"Content-Type": "application/json"}}),
            ("/v1/classify", {"json": asked, "headers": {"X-API-Key": "wrong"}}),
            ("/v1/completions", {"json": streamed}),
        )
    ]
    assert statuses == [200, 200, 404, 400, 401, 200]


def filled(expression: str) -> str:
    """A query as Grafana sends it when all servers and classifiers are chosen."""
    return re.sub(r"\$(instance|classifier)", ".*", expression).replace("$__rate_interval", "5m")


@pytest.mark.parametrize("place", deployment.queries())
def test_a_panels_query_has_an_answer(prometheus: Prometheus, place: str) -> None:
    expression, legend = deployment.queries()[place]
    found = prometheus.query(filled(expression))
    assert found and not all(map(math.isnan, found.values())), expression
    for labels in found:
        assert set(re.findall(r"{{(\w+)}}", legend)) == set(dict(labels)), f"{legend} does not tell {found} apart"


def test_the_panels_show_the_traffic(prometheus: Prometheus) -> None:
    def shown(place: str, *labels: str) -> float:
        found = prometheus.query(filled(deployment.queries()[place][0]))
        [value] = [one for names, one in found.items() if {name for _, name in names} == set(labels)]
        return value

    for place, labels in {
        "Servers that are ready, A": (),
        "Failed adapters, A": (),
        "Adapters by state, A": ("failed",),
    }.items():
        assert shown(place, *labels) == 1
    assert shown("Adapters by state, A", "ready") == 4
    for place, labels in {
        "Requests per second, A": (),
        "Requests per second, B": (),
        "Errors by code, A": ("unauthorized",),
        "Latency, C": (),
        "P95 latency by phase, A": ("compute",),
        "Verdicts by classifier, A": ("(unknown)",),
        "Verdicts without an answer, A": ("broken", "adapter_error"),
        "Tokens per second, A": ("cached",),
        "Texts per second, A": ("verbatim", "ok"),
    }.items():
        assert shown(place, *labels) > 0, place
    assert shown("Verdicts with a warning, A", "task0", "low_label_mass") == pytest.approx(1, rel=0.01)
    assert 1 <= shown("What a forward pass holds, B") < shown("What a forward pass holds, A")
    assert 0 < shown("Engine busy, A") < 1


def test_the_dashboards_choices_are_found(prometheus: Prometheus) -> None:
    chosen = {one["name"]: one.get("definition", "") for one in deployment.dashboard()["templating"]["list"]}
    values = {}
    for name, definition in chosen.items():
        if found := re.fullmatch(r"label_values\((.*), (\w+)\)", definition):
            values[name] = prometheus.ask(f"label/{found[2]}/values", **{"match[]": found[1]})
    assert len(values["instance"]) == 1
    assert values["classifier"] == ["(unknown)", "broken", "task0", "task1", "task2", "verbatim"]


def test_the_rules_are_evaluated(prometheus: Prometheus) -> None:
    wait_for(lambda: all(rule["health"] == "ok" for rule in evaluated(prometheus)))
    states = {rule["name"]: rule["state"] for rule in evaluated(prometheus)}
    assert set(states) == {rule["alert"] for rule in deployment.rules()}
    assert states["LoraplexAdapterFailed"] == "pending" and states["LoraplexNotReady"] == "inactive"


def evaluated(prometheus: Prometheus) -> list[dict[str, Any]]:
    [group] = prometheus.ask("rules")["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def test_the_alerts_fire_when_they_should() -> None:
    for command in (
        ("check", "rules", deployment.DEPLOY / "alerts.yml"),
        ("test", "rules", Path(__file__).parent / "alerts_test.yml"),
    ):
        done = subprocess.run([deployment.program("promtool"), *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_has_nothing_to_say_about_the_metrics(server: serving.Server, secrets: Path) -> None:
    key = (secrets / "prometheus.key").read_text().strip()
    metrics = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": key})
    done = subprocess.run(
        [deployment.program("promtool"), "check", "metrics"], input=metrics.text, capture_output=True, text=True
    )
    complaints = (done.stdout + done.stderr).splitlines()
    # vLLM's own names, which routers look for, have a colon.
    assert {one.split()[0] for one in complaints} == {
        "vllm:lora_requests_info",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
    }
