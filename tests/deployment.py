"""What the tests of `deploy/` share: its files as data, the commands in them, and the programs that read them."""

import json
import re
import shlex
import shutil
import socket
from pathlib import Path
from typing import Any

import yaml

import serving

DEPLOY = serving.ROOT / "deploy"
TOOLS = serving.ROOT / ".deploy-tools"  # what `make test-deploy` fetched
_FOLDERS = f"{TOOLS}/debian/usr/bin:{TOOLS}/debian/usr/sbin:/usr/sbin"


def program(name: str) -> str:
    """Return the path of a program: the machine's own, or the fetched one."""
    found = shutil.which(name) or shutil.which(name, path=_FOLDERS)
    assert found, f"there is no {name}: make test-deploy"
    return found


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((serving.ROOT / "compose.yaml").read_text())
    return found


def manifests() -> dict[str, Any]:
    """Return the objects of kubernetes.yaml by their kinds."""
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def container() -> dict[str, Any]:
    """Return the container of kubernetes.yaml."""
    [found] = manifests()["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def unit() -> dict[str, list[str]]:
    """Return the settings of the systemd unit. A setting may be given several times."""
    settings: dict[str, list[str]] = {}
    text = (DEPLOY / "loraplex.service").read_text().replace("\\\n", " ")
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.M):
        settings.setdefault(name, []).append(value.strip())
    return settings


def commands() -> dict[str, list[str]]:
    """Return the arguments that each way to run Loraplex gives to `loraplex`."""
    [start] = unit()["ExecStart"]
    return {
        "systemd": shlex.split(start)[1:],
        "compose": compose()["services"]["loraplex"]["command"],
        "kubernetes": container()["args"],
    }


def here(arguments: list[str], *, path: Path, **values: object) -> list[str]:
    """Return the arguments after `serve`, with another path and other values of options, named as settings."""
    assert arguments[0] == "serve"
    found = [str(path), *shlex.split(" ".join(arguments[2:]).replace("=", " "))]
    for name, value in values.items():
        found[found.index(f"--{name.replace('_', '-')}") + 1] = str(value)
    return found


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana/loraplex.json").read_text())
    return found


def queries() -> dict[str, tuple[str, str]]:
    """Return each query of the dashboard with its legend, by panel and letter."""
    return {
        f"{panel['title']}, {target['refId']}": (target["expr"], target["legendFormat"])
        for panel in dashboard()["panels"]
        for target in panel["targets"]
    }


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def read(path: Path | str) -> str:
    return (DEPLOY / path).read_text()
