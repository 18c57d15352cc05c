"""The files of `deploy/` agree with the server: its options, limits, errors and metrics. What reads them for real:
tests/deploy."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

import deployment
import loraplex
import serving
from loraplex.cli.main import app
from loraplex.config import ServerConfig
from loraplex.errors import BY_CODE
from loraplex.metrics import Metrics
from loraplex.types import Stats

DEFAULTS = ServerConfig()
GRACE_S = 7  # docs/operations.md


@pytest.mark.parametrize("name", deployment.commands())
def test_the_command_line_has_options_that_exist(name: str) -> None:
    arguments = deployment.commands()[name]
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    context = serve.make_context("serve", arguments[1:])
    assert arguments[0] == "serve" and context.params["path"] in ("/bundle", "/srv/loraplex/bundle")
    assert context.params["api_key_file"] and not context.params["insecure"]


def test_a_stop_has_the_time_that_the_server_takes() -> None:
    needed = DEFAULTS.drain_timeout + GRACE_S
    assert deployment.unit()["TimeoutStopSec"] == [str(needed)]
    assert deployment.compose()["services"]["loraplex"]["stop_grace_period"] == f"{needed}s"
    pod = deployment.manifests()["Deployment"]["spec"]["template"]["spec"]
    waits = int(deployment.container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] == waits + needed


def test_nginx_has_the_servers_limits() -> None:
    conf = deployment.read("nginx.conf")

    def limit(name: str) -> str:
        [value] = re.findall(rf"^ *{name} (.*?);", conf, re.M)
        return str(value)

    assert limit("client_max_body_size") == limit("client_body_buffer_size") == f"{DEFAULTS.max_body_bytes >> 20}m"
    assert limit("client_body_timeout") == f"{DEFAULTS.body_timeout:g}s"
    assert int(limit("keepalive_timeout").removesuffix("s")) < DEFAULTS.idle_timeout
    answered = re.findall(r'return (\d+) \'{"error": {"code": "(\w+)", "message": "[^"]+", "remedy": "[^"]+"}}\'', conf)
    assert len(answered) == conf.count("return ") and len(answered) == conf.count("error_page") + 1
    assert all(BY_CODE[code].status == int(status) for status, code in answered)


def test_compose_builds_this_version_and_opens_loopback_alone() -> None:
    services = deployment.compose()["services"]
    assert services["loraplex"]["image"] == f"loraplex:{loraplex.__version__}"
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["cap_drop"] == ["ALL"] and service["healthcheck"] and service["restart"], name
        for volume in service["volumes"]:
            if volume.startswith("./"):
                assert (serving.ROOT / volume.partition(":")[0]).is_file(), volume


def test_probes_ask_for_paths_that_need_no_key() -> None:
    container = deployment.container()
    [port] = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    probes = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert {kind: (one["path"], one["port"]) for kind, one in probes.items()} == {
        "startup": ("/ready", port["name"]),
        "liveness": ("/health", port["name"]),
        "readiness": ("/ready", port["name"]),
    }


# --------------------------------------------------------------------------------- the dashboard and the alerts


def test_a_panel_says_what_it_shows() -> None:
    board = deployment.dashboard()
    panels = board["panels"]
    assert board["schemaVersion"] >= 39 and board["uid"] == "loraplex" and "id" not in board
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    chosen = {variable["name"] for variable in board["templating"]["list"]}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["description"].endswith(".") and panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(one["datasource"]["uid"] == "${datasource}" for one in (panel, *panel["targets"])), panel["title"]
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert place["x"] + place["w"] <= 24 and not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= chosen and "instance" in used, target["expr"]


def names(expressions: Iterable[str]) -> set[str]:
    return {name for one in expressions for name in re.findall(r"\b(?:loraplex_\w+|up)\b", one)}


def test_queries_ask_for_metrics_that_the_server_exports() -> None:
    zeros: dict[str, Any] = dict.fromkeys(set(Stats.__dataclass_fields__) - {"adapters", "active", "placing"}, 0)
    stats = Stats(adapters={"task0": "ready"}, active=(), placing=(), **zeros)
    metrics = Metrics(lambda: stats, lambda name: True, lambda: 0)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    kinds = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
    exported = {f"{family.name}{end}" for family in families for end in kinds[family.type]}
    shown = names(expression for expression, _ in deployment.queries().values())
    alerts = names(rule["expr"] for rule in deployment.rules())
    assert shown <= exported | {"up"} and alerts <= exported | {"up"}
    not_shown = {family.name for family in families if family.name.startswith("loraplex_")} - {
        re.sub(r"_(total|bucket|count|sum)$", "", name) for name in shown
    }
    assert not not_shown, "metrics that no panel shows"


def test_alerts_know_the_errors_of_their_status() -> None:
    expected = {status: {code for code, error in BY_CODE.items() if error.status == status} for status in (429, 500)}
    by_name = {rule["alert"]: rule["expr"] for rule in deployment.rules()}
    for alert, codes in (
        ("LoraplexFails", expected[500]),
        ("LoraplexClassifierFails", expected[500]),
        ("LoraplexRefuses", expected[429] | {"too_many_connections"}),
    ):
        [found] = re.findall(r'=~"([^"]*)"', by_name[alert].partition(">")[0])
        assert set(found.split("|")) == codes, alert


def test_an_alert_says_what_to_do() -> None:
    for rule in deployment.rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert set(rule["annotations"]) == {"summary", "description"} and rule["annotations"]["description"][-1] == "."
        for panel in re.findall(r'panel "([^"]+)"', rule["annotations"]["description"]):
            assert panel in {one["title"] for one in deployment.dashboard()["panels"]}


def test_the_docs_name_each_alert_and_each_file() -> None:
    page = (serving.ROOT / "docs/deploy.md").read_text()
    assert re.findall(r"^\| `(Loraplex\w+)`", page, re.M) == [rule["alert"] for rule in deployment.rules()]
    named = set(re.findall(r"\]\(\.\./(?:deploy/)?([\w./]+)\)", page)) - {"compose.yaml"}
    provisioning = {"grafana/datasource.yml", "grafana/dashboards.yml"}  # compose.yaml mounts them
    files = {str(path.relative_to(deployment.DEPLOY)) for path in deployment.DEPLOY.rglob("*") if path.is_file()}
    assert files == named | provisioning


def test_a_pod_computes_on_the_cpus_that_it_asks_for() -> None:
    container = deployment.container()
    threads = {one["name"]: one["value"] for one in container["env"]}["OMP_NUM_THREADS"]
    assert threads == container["resources"]["requests"]["cpu"]
