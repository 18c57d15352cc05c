"""What is wrong with a run is told with a remedy before anything is loaded."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex.bench.process import last_error
from loraplex.bench.settings import Settings, prepare
from loraplex.cli.main import app
from loraplex.errors import LoraplexError

LLAMACPP = ("native", "llamacpp")
NO_VLLM = "loraplex.bench.settings.probe"


@pytest.fixture
def given(tmp_path: Path, tiny_bundle: Path) -> dict[str, Any]:
    rows = [{"text": f"Customer: hello {i}", "labels": {"task0": i % 2 == 0, "task1": "yes"}} for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {
        "bundle": str(tiny_bundle),
        "data": tmp_path / "data.jsonl",
        "out": tmp_path / "out",
        "concurrency": 2,
        "systems": ("native", "peft"),
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"systems": ("native", "tgi")}, "no system 'tgi'"),
        ({"systems": ()}, "name each system once"),
        ({"systems": ("peft", "peft")}, "name each system once"),
        ({"classifiers": ("task0", "isFraud")}, "no classifier named 'isFraud'"),
        ({"concurrency": None}, "exactly one load"),
        ({"rate": 1.0}, "--rate and --concurrency: exactly one load"),
        ({"concurrency": 0}, "--concurrency 0"),
        ({"concurrency": None, "rate": float("nan")}, "--rate nan"),
        ({"concurrency": None, "rate": 90000.0}, "1,800,000 conversations in a slice"),
        ({"concurrency": 20_000}, "--concurrency 20000: is not above 0 and at most 10,000"),
        ({"slices": 0}, "--slices 0"),
        ({"slices": 21}, "there are 20 conversations"),
        ({"seconds": -1.0}, "--seconds -1"),
        ({"conversations": 21}, "holds 20"),
        ({"asking": "all"}, "--ask all"),
        ({"python": {"vllm": sys.executable}}, "--python vllm: is for a system that is not measured"),
        ({"python": {"peft": "/no/such/python"}}, "is no program"),
        ({"urls": {"peft": "http://x"}, "transport": "in-process"}, "over HTTP"),
        ({"llamacpp_server": Path(__file__)}, "--llamacpp-server: is for a system that is not measured"),
        ({"systems": LLAMACPP, "llamacpp_model": Path("/no/such/model.gguf")}, "model.gguf: is no file"),
        ({"systems": LLAMACPP, "llamacpp_model": Path(__file__)}, "--llamacpp-model: needs --llamacpp-server"),
        (
            {"systems": LLAMACPP, "llamacpp_server": Path(__file__), "urls": {"llamacpp": "http://x"}},
            "--llamacpp-server: is for a server that is started here",
        ),
        ({"systems": LLAMACPP, "python": {"llamacpp": sys.executable}}, "--python llamacpp: has no effect"),
        ({"systems": LLAMACPP, "only": {"llamacpp": {"dtype": "float32"}}}, "--engine llamacpp: has no effect"),
        ({"systems": LLAMACPP, "transport": "in-process"}, "llama.cpp's server is asked over HTTP"),
        ({"engine": {"dtype": "float8"}}, "float8"),
        ({"engine": {"no_such": "1"}}, "no_such"),
        ({"only": {"native": {"kv_cache": "lots"}}}, "lots"),
        ({"bundle": "/no/such/bundle"}, "/no/such/bundle"),
        ({"data": Path("/no/such/data.jsonl")}, "/no/such/data.jsonl"),
        ({"out": Path(__file__)}, "is no folder"),
        ({"out": Path(__file__).parent}, "other files"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(LoraplexError) as caught:
        prepare(Settings(**given | change))
    assert told in caught.value.message and caught.value.remedy and caught.value.code != "error"


def test_a_folder_of_an_earlier_run_is_taken_again(given: dict[str, Any]) -> None:
    given["out"].mkdir()
    prepare(Settings(**given))
    (given["out"] / "report.json").write_text('{"kind": "bench"}')
    (given["out"] / "native.log").write_text("")
    prepare(Settings(**given))


def test_a_label_that_the_contract_does_not_know_is_an_error_of_its_line(given: dict[str, Any]) -> None:
    given["data"].write_text('{"text": "a", "labels": {"task1": "perhaps"}}\n')
    with pytest.raises(LoraplexError, match="line 1: label 'perhaps' of 'task1' is not among the contract's"):
        prepare(Settings(**given))


def test_a_run_is_prepared(given: dict[str, Any]) -> None:
    found = prepare(Settings(**given | {"engine": {"dtype": "float32", "kv_cache": "1GiB"}, "conversations": 10}))
    assert found.classifiers == ("task0", "task1", "task2"), "those with a contract"
    assert len(found.rows) == 10 and found.truth[0].keys() == {"task0", "task1"}
    assert [row.line for row in found.rows] != sorted(row.line for row in found.rows), "they are shuffled"
    assert found.rows == prepare(Settings(**given | {"conversations": 10})).rows, "in the order of the seed"
    assert found.engine["native"] == {"backend": "native", "dtype": "float32", "kv_cache": "1GiB"}
    assert found.engine["peft"] == {"backend": "peft", "dtype": "float32"}, "PEFT has no cache"


def test_what_is_not_installed_is_skipped_by_name(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NO_VLLM, lambda python, _: {"loraplex": "1", "peft": "1"})
    found = prepare(Settings(**given | {"systems": ("native", "vllm")}))
    assert found.systems == ("native",)
    assert "vllm is not installed" in found.skipped["vllm"] and "--python vllm=PATH" in found.skipped["vllm"]
    with pytest.raises(LoraplexError, match="none of them can be measured"):
        prepare(Settings(**given | {"systems": ("vllm",)}))


def test_the_last_error_of_a_log_is_told_with_its_remedy(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("loading\nerror bundle_error: no base\nremedy: give one\nstopped\n")
    assert last_error(log) == "bundle_error: no base (give one)"
    log.write_text("Traceback\nZeroDivisionError\n")
    assert last_error(log) == ""


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--systems", "tgi"], 1, "configuration_error"),
        (["--classifiers", "isFraud"], 1, "unknown_classifier"),
        (["--sweep", "--rate", "3"], 1, "exactly one load"),
        (["--engine", "dtype"], 2, "KEY=VALUE"),
        (["--engine", "backend=vllm"], 2, "--systems"),
        (["--url", "native"], 2, "SYSTEM=VALUE"),
    ],
)
def test_the_command_says_so(given: dict[str, Any], more: list[str], code: int, told: str) -> None:
    known = [given["bundle"], "--data", str(given["data"]), "--out", str(given["out"])]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["bench", *known, *more])
    assert result.exit_code == code and told in result.output and not given["out"].exists()


def test_llamacpp_without_a_server_is_skipped(given: dict[str, Any]) -> None:
    prepared = prepare(Settings(**{**given, "systems": LLAMACPP}))
    assert prepared.systems == ("native",) and "--llamacpp-server" in prepared.skipped["llamacpp"]
