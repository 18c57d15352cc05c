"""The environment of `loraplex serve`: what Kubernetes sets, what is misspelt; and a log that is JSON as a whole."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from typer.testing import CliRunner

import serving
from loraplex.cli.options import settings_options
from loraplex.config import EngineConfig, ServerConfig, resolve
from loraplex.environment import LINK, drop_links, settings_in, unread, variable

# All that Kubernetes sets for a service named loraplex with a port named http, and for another named loraplex-api.
SERVICE_LINKS = {
    "LORAPLEX_SERVICE_HOST": "10.43.1.39",
    "LORAPLEX_SERVICE_PORT": "8000",
    "LORAPLEX_SERVICE_PORT_HTTP": "8000",
    "LORAPLEX_PORT": "tcp://10.43.1.39:8000",
    "LORAPLEX_PORT_8000_TCP": "tcp://10.43.1.39:8000",
    "LORAPLEX_PORT_8000_TCP_PROTO": "tcp",
    "LORAPLEX_PORT_8000_TCP_PORT": "8000",
    "LORAPLEX_PORT_8000_TCP_ADDR": "10.43.1.39",
    "LORAPLEX_API_SERVICE_HOST": "fd00::1",
    "LORAPLEX_API_SERVICE_PORT": "53",
    "LORAPLEX_API_PORT": "udp://[fd00::1]:53",
    "LORAPLEX_API_PORT_53_UDP": "udp://[fd00::1]:53",
    "LORAPLEX_API_PORT_53_UDP_ADDR": "fd00::1",
}
NOT_READ = "the environment has variables that are not read"


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def warnings_of(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "WARNING" in line and "cli.serve" in line]


def bundle_with(bundle: Path, folder: Path, **server: Any) -> Path:
    """The bundle with a `loraplex.yaml` of its own, in a new folder."""
    folder.mkdir()
    for one in bundle.iterdir():
        (folder / one.name).symlink_to(one)
    (folder / "loraplex.yaml").write_text(json.dumps({"server": server}))
    return folder


def test_a_service_of_this_name_does_not_end_the_start(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its other variables are no mistakes. Nothing is ignored here, because the command line gives a port."""
    log = tmp_path / "log"
    with serving.serve(tiny_bundle, "--preload", "none", log=str(log), **SERVICE_LINKS) as server:
        assert server.process.poll() is None
    assert warnings_of(log) == []


def test_the_setting_of_a_service_link_is_ignored_with_one_warning(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's port counts. It is taken here, so that the server does not run on."""
    set_environment(monkeypatch, **SERVICE_LINKS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = serving.loraplex("serve", bundle_with(tiny_bundle, tmp_path / "bundle", port=port))
    assert run.returncode == 1 and f"--port {port}: cannot be bound" in run.stderr
    [warning] = [line for line in run.stderr.splitlines() if "WARNING" in line]
    assert "LORAPLEX_PORT=tcp://10.43.1.39:8000 is ignored" in warning
    assert "--port" in warning and "enableServiceLinks: false" in warning


@pytest.mark.parametrize("value", ["22a", "tcp://", "tcp://host", "http://10.0.0.1:80", "10.0.0.1:8000", " "])
def test_what_a_user_meant_is_still_told(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LORAPLEX_PORT", value)
    run = serving.loraplex("serve", tiny_bundle)
    assert run.returncode == 1 and f"LORAPLEX_PORT={value}" in run.stderr and "a whole number" in run.stderr


def test_a_link_on_the_command_line_is_a_mistake() -> None:
    settings: dict[str, Any] = {"port": "tcp://10.43.1.39:8000", "host": None}
    assert drop_links(settings, {"port": "--port "}) == [] and settings["port"]
    assert len(drop_links(settings, {"port": "LORAPLEX_PORT="})) == 1 and settings == {"port": None, "host": None}


def test_what_kubernetes_sets_is_never_called_unread() -> None:
    assert unread(SERVICE_LINKS, ["LORAPLEX_PORT"]) is None
    assert all(LINK.fullmatch(value) for value in SERVICE_LINKS.values() if "://" in value)


@pytest.mark.parametrize("model", [EngineConfig, ServerConfig])
def test_variables_mean_the_same_without_the_command(model: type[BaseModel]) -> None:
    """SageMaker's handlers read them themselves."""
    values = {
        "backend": "PEFT",
        "vllm_arg": " a=1  b=2 ",
        "served_model_name": "one two",
        "max_queue": "7",
        "cuda_graphs": "Yes",
        "state_dir": "",
        "insecure": "on",
        "public": "docs metrics",
        "require_all": "FALSE",
        "idle_timeout": "2.5",
    }
    environment = {variable(name): value for name, value in values.items()}
    read = {}
    app = typer.Typer()

    @app.command()
    @settings_options(model)
    def command(**settings: Any) -> None:
        read.update({name: value for name, value in settings.items() if value not in (None, [])})

    assert CliRunner().invoke(app, env=environment).exit_code == 0
    given = settings_in(environment, model)
    assert given.keys() == read.keys() and len(given) >= 4
    assert resolve(model, {}, given) == resolve(model, {}, read)


def test_a_misspelt_variable_is_named_with_the_likely_one() -> None:
    environment = {
        "LORAPLEX_PROT": "secret-1",
        "LORAPLEX_KVCACHE": "secret-2",
        "LORAPLEX_ZZZ": "secret-3",
        "LORAPLEX_PORT": "8000",
        "LORAPLEX_API_KEY": "secret-4",
        "LORAPLEX_API_KEYS": "",
        "LORAPLEX_URL": "",
        "loraplex_port": "",
        "OTHER": "",
    }
    warning = unread(environment, ["LORAPLEX_PORT", "LORAPLEX_KV_CACHE"])
    assert warning is not None and warning.startswith(
        f"{NOT_READ}: 'LORAPLEX_KVCACHE', 'LORAPLEX_PROT', 'LORAPLEX_ZZZ'"
    )
    assert "did you mean LORAPLEX_PORT for LORAPLEX_PROT?" in warning
    assert "did you mean LORAPLEX_KV_CACHE for LORAPLEX_KVCACHE?" in warning
    assert "for LORAPLEX_ZZZ" not in warning and "secret" not in warning


def test_the_start_says_so_once(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    variables = {"LORAPLEX_API_KEY": "x", "LORAPLEX_PRELOAD": "none", "LORAPLEX_MAX_BODYBYTES": "1"}
    with serving.serve(tiny_bundle, log=str(log), **variables):
        pass
    [warning] = warnings_of(log)
    assert f"{NOT_READ}: 'LORAPLEX_MAX_BODYBYTES'; did you mean LORAPLEX_MAX_BODY_BYTES" in warning


# ------------------------------------------------------------------------------------------- JSON from the first line


@pytest.mark.parametrize(
    "arguments",
    [
        ("--device", "tpu"),
        ("--api-key-file", "/no-such-file"),
        ("--host", "0.0.0.0"),
        ("--preload", "nobody"),
        ("--state-dir", "/no-such-folder/state"),
        ("--adapter", "mine=/no-such-folder"),
    ],
)
def test_an_error_at_the_start_is_json_too(tiny_bundle: Path, arguments: tuple[str, ...]) -> None:
    run = serving.loraplex("serve", tiny_bundle, "--port", 0, "--log-format", "JSON", *arguments)
    assert run.returncode == 1
    line = [json.loads(text) for text in run.stderr.splitlines()][-1]  # others may say what is fetched
    assert (
        line["level"] == "critical"
        and line["error"].endswith("_error")
        and arguments[1].split("=")[-1] in line["message"]
    )


def test_warnings_of_the_start_are_json_too(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_environment(monkeypatch, LORAPLEX_PORT="tcp://10.0.0.1:1", LORAPLEX_LOG_FORMAT="json", LORAPLEX_PRTO="1")
    options = ("--state-dir", tmp_path / "state", "--host", "0.0.0.0")
    run = serving.loraplex("serve", tiny_bundle, *options)
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    levels = [line["level"] for line in lines]
    assert levels.count("warning") == 2 and levels[-1] == "critical" and "info" in levels  # the new database
    bundle = bundle_with(tiny_bundle, tmp_path / "bundle", log_format="json", host="0.0.0.0")
    monkeypatch.delenv("LORAPLEX_LOG_FORMAT")
    assert [json.loads(line) for line in serving.loraplex("serve", bundle).stderr.splitlines()]


def test_nothing_but_json_until_the_end(tiny_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving.serve(tiny_bundle, "--log-format", "json", "--state-dir", tmp_path / "state", log=str(log)) as server:
        assert server.stop() == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["message"].endswith("nothing is remembered in it yet") and lines[-1]["message"] == "stopped"


def test_a_level_leaves_out_what_is_less_important(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch, LORAPLEX_PRTO="1", LORAPLEX_LOG_FORMAT="json", LORAPLEX_LOG_LEVEL="ERROR")
    run = serving.loraplex("serve", tiny_bundle, "--host", "0.0.0.0")
    [line] = [json.loads(line) for line in run.stderr.splitlines()]
    assert line["level"] == "critical" and line["error"] == "configuration_error"
