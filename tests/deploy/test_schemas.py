"""What Kubernetes, compose and systemd take, by their own schemas and checkers: `make test-deploy`."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry
from referencing.jsonschema import DRAFT202012

import deployment

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not deployment.TOOLS.is_dir(), reason="needs .deploy-tools: make test-deploy"),
]
SCHEMAS = "kubernetes_validate/kubernetes-json-schema/v{}-local-strict/"
# The oldest and the newest version whose schemas the package has and whose clusters are still run.
VERSIONS = ("1.29.0", "1.37.0")
GROUPS = {"apps/v1": "apps-v1", "v1": "v1", "policy/v1": "policy-v1", "networking.k8s.io/v1": "networking-v1"}


def read_schema(wheel: str, path: str) -> Any:
    [found] = (deployment.TOOLS / "wheels").glob(f"{wheel}-*.whl")
    with zipfile.ZipFile(found) as packed:
        return json.loads(packed.read(path))


def problems(manifest: dict[str, Any], version: str) -> list[str]:
    folder = SCHEMAS.format(version)
    name = f"{manifest['kind'].lower()}-{GROUPS[manifest['apiVersion']]}.json"
    schema = read_schema("kubernetes_validate", folder + name)
    definitions = DRAFT202012.create_resource(read_schema("kubernetes_validate", folder + "_definitions.json"))
    registry = Registry().with_resource("/api/_definitions.json", definitions)
    validator = jsonschema.Draft202012Validator(schema, registry=registry)
    return [f"{'/'.join(map(str, one.path))}: {one.message}" for one in validator.iter_errors(manifest)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", deployment.manifests())
def test_kubernetes_knows_the_manifest(kind: str, version: str) -> None:
    manifest = deployment.manifests()[kind]
    assert not problems(manifest, version)
    assert problems(manifest | {"spec": manifest["spec"] | {"notThere": 1}}, version), "the schema refuses nothing"


def test_what_belongs_together_in_kubernetes_is_named_alike() -> None:
    found = deployment.manifests()
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    monitor = yaml.safe_load(deployment.read("servicemonitor.yaml"))["spec"]
    assert monitor["selector"]["matchLabels"].items() <= found["Service"]["metadata"]["labels"].items()
    [port] = found["Service"]["spec"]["ports"]
    assert monitor["endpoints"][0]["port"] == port["name"] == deployment.container()["ports"][0]["name"]
    mounted = {volume["name"] for volume in deployment.container()["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_compose_knows_the_file() -> None:
    schema = read_schema("check_jsonschema", "check_jsonschema/builtin_schemas/vendor/compose-spec.json")
    validator = jsonschema.Draft202012Validator(schema)
    compose = deployment.compose()
    assert not [f"{list(one.path)}: {one.message}" for one in validator.iter_errors(compose)]
    assert not validator.is_valid(compose | {"services": {"any": {"notThere": 1}}}), "the schema refuses nothing"
    for name, service in compose["services"].items():
        assert set(service["secrets"]) <= set(compose["secrets"]), name
        used = {volume.partition(":")[0] for volume in service["volumes"] if volume[0] not in ".$"}
        assert used <= set(compose["volumes"]), name


def test_the_provisioned_dashboard_is_found() -> None:
    services = deployment.compose()["services"]
    places = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"] if volume.startswith("./"))
    [provider] = yaml.safe_load(deployment.read("grafana/dashboards.yml"))["providers"]
    assert Path(places["./deploy/grafana/loraplex.json"]).parent == Path(provider["options"]["path"])
    [source] = yaml.safe_load(deployment.read("grafana/datasource.yml"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    chosen = {one["name"]: one["current"] for one in deployment.dashboard()["templating"]["list"]}
    assert chosen["datasource"] == {"text": source["name"], "value": source["uid"]}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_knows_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "loraplex.service"
    unit.write_text(deployment.read("loraplex.service").replace("/opt/loraplex/bin/loraplex", sys.executable))
    checked = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    in_tenths = "--threshold=20"  # at most 2.0 of 10
    checked = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", in_tenths, unit], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
