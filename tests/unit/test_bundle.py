import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from loraplex.bundle import open_bundle
from loraplex.config import EngineConfig, ServerConfig, resolve
from loraplex.errors import BundleError, ConfigurationError, ContractError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The files that discovery looks at, without weights."""
    make_base(tmp_path)
    make_adapter(tmp_path / "isDone", contract="labels: ['yes', 'no']")
    make_adapter(tmp_path / "isFraud")
    return tmp_path


def make_base(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def make_adapter(folder: Path, contract: str | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    if contract is not None:
        (folder / "classifier.yaml").write_text(contract)


def test_finds_the_base_and_adapters_with_and_without_a_contract(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert opened.base == bundle
    assert [source.name for source in opened.adapters] == ["isDone", "isFraud"]
    assert opened.adapters[0].contract is not None and opened.adapters[1].contract is None


def test_finds_adapters_at_any_depth_but_not_a_trainers_checkpoints(bundle: Path) -> None:
    make_adapter(bundle / "more" / "isAngry")
    make_adapter(bundle / "isDone" / "checkpoint-100")
    make_adapter(bundle / ".cache" / "isHidden")
    assert [source.name for source in open_bundle(bundle).adapters] == ["isDone", "isFraud", "isAngry"]


def test_the_base_may_live_elsewhere(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    make_adapter(elsewhere / "isLate")
    (elsewhere / "loraplex.yaml").write_text(f"base: {bundle}\nengine: {{dtype: float32}}\nserver: {{port: 9000}}")
    opened = open_bundle(elsewhere)
    assert opened.base == bundle
    assert [source.name for source in opened.adapters] == ["isLate"]
    assert resolve(EngineConfig, opened.settings.engine, {}).dtype == "float32"
    assert resolve(ServerConfig, opened.settings.server, {"port": None}).port == 9000
    assert resolve(ServerConfig, opened.settings.server, {"port": 9001}).port == 9001


def test_adapters_may_be_named_without_a_bundle(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "somewhere")
    opened = open_bundle(tmp_path / "base").with_adapters({"isNew": tmp_path / "somewhere"})
    assert [(source.name, source.path) for source in opened.adapters] == [("isNew", tmp_path / "somewhere")]


def test_two_of_one_name_are_refused(bundle: Path) -> None:
    make_adapter(bundle / "other" / "isDone")
    with pytest.raises(BundleError, match=r"second classifier named 'isDone'.*isDone"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["", "*", "a b", "../x", ".hidden", "x" * 129])
def test_a_name_that_cannot_stand_in_a_url_is_refused(bundle: Path, name: str) -> None:
    with pytest.raises(BundleError, match="cannot name a classifier"):
        open_bundle(bundle).with_adapters({name: bundle / "isDone"})


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_of_the_base_is_named(bundle: Path, missing: str) -> None:
    (bundle / missing).unlink()
    with pytest.raises(BundleError, match=re.escape(missing.split(".")[0])) as caught:
        open_bundle(bundle)
    assert str(bundle) in caught.value.message


def test_a_missing_shard_is_named(bundle: Path) -> None:
    (bundle / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (bundle / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BundleError, match=r"model-1\.safetensors"):
        open_bundle(bundle)
    (bundle / "model-1.safetensors").write_bytes(b"")
    assert open_bundle(bundle).base == bundle


def test_adapter_weights_missing_or_pickled_are_refused(bundle: Path) -> None:
    weights = bundle / "isDone" / "adapter_model.safetensors"
    weights.unlink()
    with pytest.raises(BundleError, match=r"no adapter_model\.safetensors"):
        open_bundle(bundle)
    weights.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(BundleError, match="pickled"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("bsae: x", "bsae"),
        ("engine: {dtipe: x}", "dtipe"),
        ("engine: {dtype: int4}", "dtype"),
        ("server: {port: 99999}", "port"),
        ("base: ./missing", "missing"),
        ("base: 3", "base"),
    ],
)
def test_wrong_settings_name_the_file_and_the_key(bundle: Path, text: str, wrong: str) -> None:
    (bundle / "loraplex.yaml").write_text(text)
    with pytest.raises(BundleError, match=wrong) as caught:
        open_bundle(bundle)
    assert "loraplex.yaml" in caught.value.message


def test_a_wrong_option_is_an_error_of_its_own() -> None:
    with pytest.raises(ConfigurationError, match=r"max_queue=0: is below 1"):
        resolve(EngineConfig, {}, {"max_queue": 0})


def test_a_wrong_contract_stops_the_bundle(bundle: Path) -> None:
    (bundle / "isDone" / "classifier.yaml").write_text("labels: []")
    with pytest.raises(ContractError, match=r"isDone/classifier\.yaml"):
        open_bundle(bundle)


def test_a_bare_yes_as_a_key_is_told_to_be_quoted(bundle: Path) -> None:
    (bundle / "isDone" / "classifier.yaml").write_text("labels: ['yes', 'no']\ncalibration: {bias: {yes: -0.3}}")
    with pytest.raises(ContractError, match="key yes is read as True and not as text; quote it: 'yes'"):
        open_bundle(bundle)


def test_a_size_without_a_unit_is_told_the_sizes_at_once(bundle: Path) -> None:
    (bundle / "loraplex.yaml").write_text("engine: {kv_cache: 5}")
    with pytest.raises(BundleError, match="'5' is no size") as caught:
        open_bundle(bundle)
    assert "write 2GiB" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("server: {idle_timeout: .inf}", "Infinity is above 86400"),
        ("server: {keep_verdicts: 1000000000000000000000000000000}", "is above 1000000000"),
        ("engine: {max_queue: true}", "max_queue': true is not a number"),
        ("routes: {a: {targets: {isDone: true}}}", "isDone': true is not a number"),
        ("engine:\n\tkv_cache: 0", "indent with spaces"),
        ("base: one: two", "put quotes around a text"),
    ],
)
def test_numbers_have_limits_and_yaml_errors_remedies(bundle: Path, text: str, wrong: str) -> None:
    (bundle / "loraplex.yaml").write_text(text)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert wrong in str(caught.value) and "unicode string" not in str(caught.value)


def test_an_adapter_is_no_bundle(bundle: Path) -> None:
    with pytest.raises(BundleError, match="isDone: is an adapter, without a base") as caught:
        open_bundle(bundle / "isDone")
    assert "BASE --adapter isDone=" in caught.value.remedy


def test_a_path_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no folder"):
        open_bundle(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_fetched_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BundleError, match="cannot be fetched from the hub") as caught:
        open_bundle("nobody/nothing")
    assert "HF_TOKEN" in caught.value.remedy


def test_a_base_of_the_hub_is_called_by_its_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--acme--tiny-base"
    make_base(repository / "snapshots" / ("1" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1" * 40)
    opened = open_bundle("acme/tiny-base")
    assert opened.base_name == "acme/tiny-base" and opened.base.name == "1" * 40
    assert open_bundle(repository) == replace(opened, root=opened.base)
    (tmp_path / "bundle").mkdir()
    for base in ("acme/tiny-base", f"../{repository.name}"):
        (tmp_path / "bundle" / "loraplex.yaml").write_text(f"base: {base}\nengine: {{served_model_name: one}}")
        opened = open_bundle(tmp_path / "bundle")
        assert opened.base_name == "acme/tiny-base"
        assert resolve(EngineConfig, opened.settings.engine, {}).served_model_name == ("one",)
