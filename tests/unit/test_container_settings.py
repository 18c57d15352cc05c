"""What the images' entry point makes of the environment and the model's folder."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loraplex.config import ServerConfig, resolve
from loraplex.errors import BundleError, ConfigurationError
from loraplex.sagemaker import container
from loraplex.sagemaker.artifact.manifest import MANIFEST
from loraplex.sagemaker.container import check_model, variables


def config_of(environment: dict[str, str], file: dict[str, Any]) -> ServerConfig:
    """The settings of the server that the entry point starts."""
    environment = environment | variables(environment, file)
    given = {name: environment.get(f"LORAPLEX_{name.upper()}") or None for name in ServerConfig.model_fields}
    return resolve(ServerConfig, file, given)


def test_sagemakers_contract() -> None:
    config = config_of({}, {})
    assert (config.host, config.port, config.insecure, config.log_format) == ("0.0.0.0", 8080, True, "json")
    assert config.max_body_bytes == 25 * 2**20 and config.log_level == "info"
    assert config.drain_timeout + 7 < 30, "what the server takes at most to end"


def test_the_file_decides_what_sagemaker_leaves_open() -> None:
    file = {"host": "127.0.0.1", "port": 9000, "drain_timeout": 60, "log_format": "text", "max_body_bytes": 5000}
    config = config_of({}, file)
    assert (config.host, config.port, config.drain_timeout) == ("0.0.0.0", 8080, 20)
    assert (config.log_format, config.max_body_bytes) == ("text", 5000)


def test_variables_of_loraplex_win() -> None:
    given = {"HOST": "127.0.0.1", "PORT": "9000", "INSECURE": "false", "DRAIN_TIMEOUT": "5", "LOG_FORMAT": "text"}
    given |= {"MAX_BODY_BYTES": "4096", "LOG_LEVEL": "debug"}
    environment = {f"LORAPLEX_{name}": value for name, value in given.items()}
    sagemaker = {"SAGEMAKER_MAX_PAYLOAD_IN_MB": "6", "SAGEMAKER_CONTAINER_LOG_LEVEL": "40"}
    assert variables(environment | sagemaker, {}) == {}
    assert variables(environment | {"SAGEMAKER_BIND_TO_PORT": "8123"}, {}) == {"LORAPLEX_PORT": "8123"}


@pytest.mark.parametrize("value", ["", "tcp://10.43.1.39:8000"])
def test_what_kubernetes_sets_and_what_is_empty_is_not_given(value: str) -> None:
    assert config_of({"LORAPLEX_PORT": value, "SAGEMAKER_BIND_TO_PORT": ""}, {}).port == 8080


@pytest.mark.parametrize(
    ("given", "level"),
    [("0", "debug"), ("10", "debug"), ("15", "info"), ("20", "info"), ("50", "error"), ("WARN", "warning")],
)
def test_levels(given: str, level: str) -> None:
    assert config_of({"SAGEMAKER_CONTAINER_LOG_LEVEL": given}, {"log_level": "debug"}).log_level == level


@pytest.mark.parametrize(("megabytes", "num_bytes"), [("6", 6 * 2**20), ("100", 100 * 2**20), ("0", 10**9)])
def test_the_largest_payload_of_a_batch_transform(megabytes: str, num_bytes: int) -> None:
    assert config_of({"SAGEMAKER_MAX_PAYLOAD_IN_MB": megabytes}, {"max_body_bytes": 5000}).max_body_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAGEMAKER_BIND_TO_PORT", "http"),
        ("SAGEMAKER_BIND_TO_PORT", "0"),
        ("SAGEMAKER_BIND_TO_PORT", "65536"),
        ("SAGEMAKER_MAX_PAYLOAD_IN_MB", "-1"),
        ("SAGEMAKER_MAX_PAYLOAD_IN_MB", "9" * 5000),
        ("SAGEMAKER_CONTAINER_LOG_LEVEL", "loud"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        variables({name: value}, {})
    assert refused.value.message.startswith(f"{name}={value[:20]}") and len(refused.value.message) < 400


# ------------------------------------------------------------------------------------------- the model's folder


def refusal(folder: Path) -> BundleError:
    with pytest.raises(BundleError) as refused:
        check_model(folder)
    assert str(folder) in refused.value.message
    return refused.value


def test_a_folder_that_is_missing_empty_or_a_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "model").message
    assert "empty" in refusal(tmp_path).message
    (tmp_path / "file").touch()
    assert "Not a directory" in refusal(tmp_path / "file").message


def test_an_archive_that_nobody_unpacked(tmp_path: Path) -> None:
    (tmp_path / "model.tar.gz").write_bytes(b"\x1f\x8b")
    assert "is an archive" in refusal(tmp_path).message


def test_a_bundle_that_was_packed_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "config.json").write_text("{}")
    (tmp_path / "code").mkdir()
    error = refusal(tmp_path)
    assert "one folder deeper, in 'bundle'" in error.message and "tar -C" in error.remedy


def test_files_that_are_shorter_than_packed(tmp_path: Path) -> None:
    files: dict[str, Any] = {"config.json": {"size": 2}, "model.safetensors": {"size": 100}, "a/b": {"size": 1}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 60)
    (tmp_path / MANIFEST).write_text(json.dumps({"files": files}))
    error = refusal(tmp_path)
    assert "'model.safetensors (60 of 100 bytes)', 'a/b (missing)'" in error.message and "config" not in error.message
    assert "sagemaker verify" in error.remedy


@pytest.mark.parametrize("text", ["{}", '{"files": []}', '{"files": {"config.json": null, "x": {"size": null}}}'])
def test_a_manifest_that_says_no_sizes_is_no_reason(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / MANIFEST).write_text(text)
    check_model(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    assert "not readable as JSON" in refusal(tmp_path).message


def test_adapters_beside_sagemakers_folder_may_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There SageMaker puts those of inference components."""
    folder = tmp_path / "ml" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(container, "FOLDER", str(folder))
    container._prepare()
    assert os.environ["LORAPLEX_ADAPTER_ROOT"] == str(tmp_path / "ml")
    for given in ({container.MODEL_DIR: str(folder)}, {"LORAPLEX_ADAPTER_ROOT": "/data"}):
        monkeypatch.setattr(os, "environ", dict(given))
        container._prepare()
        assert os.environ.get("LORAPLEX_ADAPTER_ROOT") == given.get("LORAPLEX_ADAPTER_ROOT")
