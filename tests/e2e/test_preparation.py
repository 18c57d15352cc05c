"""Mistakes in options are told before PyTorch or transformers is imported, which can take a minute."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import serving
from loraplex.bundle import open_bundle
from loraplex.config import EngineConfig, resolve
from loraplex.errors import BundleError, ConfigurationError, StateError
from loraplex.service.preparation import check_effects, prepare
from loraplex.service.state import AdapterState

FORBID = """
import sys

class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "vllm", "peft"):
            raise RuntimeError(f"{name} was imported")

sys.meta_path.insert(0, Forbidden())
"""


@pytest.fixture
def without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands that are run now fail where they import PyTorch."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(FORBID)
    paths = [str(tmp_path / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_start_without_mistakes_does_import_it(tiny_bundle: Path, without_torch: Path) -> None:
    run = serving.loraplex("serve", tiny_bundle, "--port", 0)
    assert run.returncode == 1 and "loading" in run.stderr and "was imported" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--host", "203.0.113.7", "--insecure"], "--host 203.0.113.7 --port 8000: cannot be bound: "),
        (["--host", "a..b"], "--host a..b --port 8000: cannot be bound: "),
        (["--port", "{taken}"], "cannot be bound: Address already in use"),
        (["--host", "0.0.0.0", "--port", "0"], "--host 0.0.0.0: can be reached from other machines"),
        (["--key-concurrency", "2"], "--key-concurrency 2: has no effect without API keys"),
        (["--preload", "task0,tsak1"], "--preload task0,tsak1: there is no classifier 'tsak1'"),
        (["--preload", " , "], "names no classifier"),
        (["--port", "22a"], "--port 22a: is not a whole number"),
        (["--idle-timeout", "inf"], "--idle-timeout inf: is above 86400"),
        (["--state-dir", "{folder}/file"], "/file: is no folder"),
        (["--state-dir", "{folder}/missing/state"], "/missing/state: cannot be made: there is no folder"),
        (["--state-dir", "/proc/state"], "/proc/state/loraplex.sqlite: cannot be read or written"),
        (["--state-dir", "{folder}/held"], "/held: another server uses it"),
        (["--adapter-root", "/nope"], "--adapter-root /nope: is no folder"),
        (["--kv-cache", "200%"], "--kv-cache 200%: is more than all of the free memory"),
        (["--vllm-arg", "max_num_seqs=3"], "--vllm-arg max_num_seqs=3: has no effect with --backend native"),
        (["--cuda-graphs", "--device", "cpu"], "--device cpu: CUDA graphs are for CUDA devices only"),
        (["--api-key-file", "{folder}/nope"], "cannot be read: No such file or directory"),
        (["--adapter", "broken={folder}/broken"], "key 'r': 0 is below 1"),
        (["--adapter", "task0={folder}"], "a second classifier named 'task0'"),
    ],
)
def test_a_mistake_of_a_server_is_told_without_torch(
    tiny_bundle: Path, without_torch: Path, taken: int, arguments: list[str], mentions: str
) -> None:
    (without_torch / "file").write_text("")
    shutil.copytree(tiny_bundle / "task0", without_torch / "broken")
    broken = without_torch / "broken" / "adapter_config.json"
    broken.write_text(json.dumps(json.loads(broken.read_text()) | {"r": 0}))
    (without_torch / "held").mkdir()
    held = AdapterState(without_torch / "held")
    held.acquire()
    filled = [one.format(taken=taken, folder=without_torch) for one in arguments]
    run = serving.loraplex("serve", tiny_bundle, *filled)
    held.release()
    assert run.returncode == 1 and mentions in run.stderr, run.stderr
    assert "remedy: " in run.stderr and "Traceback" not in run.stderr and "loading" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["classify", "{bundle}", "--all", "--text", ""], "the input is empty"),
        (["classify", "{bundle}", "--all", "--text", " \n"], "the input is empty"),
        (["classify", "{bundle}", "-c", "tsak0", "--text", "x"], "no classifier named 'tsak0'"),
        (["classify", "{bundle}", "-c", "task0", "-c", "tsak0", "--text", "x"], "no classifier named 'tsak0'"),
        (["classify", "{bundle}", "--all", "--text", "x", "--dtype", "int4"], "--dtype int4: is not 'auto'"),
        (["adapters", "verify", "{bundle}/task0", "--text", ""], "the input is empty"),
        (["adapters", "verify", "{bundle}/nope"], "no such folder"),
        (["adapters", "verify", "{bundle}/task0", "--base", "./nope"], "no folder './nope'"),
    ],
)
def test_a_mistake_of_a_command_is_told_without_torch(
    tiny_bundle: Path, without_torch: Path, arguments: list[str], mentions: str
) -> None:
    run = serving.loraplex(*(one.format(bundle=tiny_bundle) for one in arguments))
    assert run.returncode == 1 and mentions in run.stderr, run.stderr
    assert "remedy: " in run.stderr and "Traceback" not in run.stderr


def test_a_classifier_that_only_a_route_names_is_known(tiny_bundle: Path, tmp_path: Path) -> None:
    for part in tiny_bundle.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "loraplex.yaml").write_text(yaml.safe_dump({"routes": {"alias": "task1"}}))
    run = serving.loraplex("classify", tmp_path, "-c", "alias", "--text", "hello", "--json")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("settings", "mentions"),
    [
        ({"vllm_arg": ("seed=1",)}, "--vllm-arg seed=1: has no effect with --backend native"),
        ({"peft_batching": "mixed"}, "--peft-batching mixed: has no effect with --backend native"),
        ({"backend": "peft", "kv_cache": "1GiB"}, "--kv-cache 1GiB: has no effect with --backend peft"),
        ({"backend": "peft", "max_step_sequences": 4}, "--max-step-sequences 4: has no effect with --backend peft"),
        ({"backend": "peft", "cuda_graphs": True}, "--cuda-graphs: has no effect with --backend peft"),
        ({"backend": "vllm", "cuda_graphs": True}, "--cuda-graphs: has no effect with --backend vllm"),
        ({"backend": "vllm", "adapter_memory": "1GiB"}, "--adapter-memory 1GiB: has no effect with --backend vllm"),
        ({"adhoc_correction": "none"}, "--adhoc-correction none: has no effect without --adhoc-questions"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(settings: dict[str, Any], mentions: str) -> None:
    with pytest.raises(ConfigurationError, match=mentions) as caught:
        check_effects(resolve(EngineConfig, {}, settings), settings)
    assert caught.value.remedy.startswith("leave it out, or give --")


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "vllm", "vllm_arg": ("seed=1",), "kv_cache": "1GiB"},
        {"backend": "peft", "peft_batching": "mixed", "max_step_sequences": 4, "kv_cache": "0"},
        {"cuda_graphs": True, "adapter_memory": "1GiB", "peft_batching": "sequential"},
    ],
)
def test_an_option_with_an_effect_is_taken(settings: dict[str, Any]) -> None:
    check_effects(resolve(EngineConfig, {}, settings), settings)


def test_the_state_decides_which_names_there_are(tiny_bundle: Path, tmp_path: Path) -> None:
    for part in tiny_bundle.iterdir():
        (tmp_path / part.name).symlink_to(part)
    state = AdapterState(tmp_path / "state")
    state.remember(name="task0", source=None, is_pinned=False)
    state.remember(name="late", source="/somewhere", is_pinned=True)
    config = resolve(EngineConfig, {}, {"state_dir": str(tmp_path / "state"), "preload": "late, task1"})
    preparation = prepare(open_bundle(tmp_path), config)
    assert preparation.own == {"task1", "task2", "verbatim"}
    assert preparation.names == {"task1", "task2", "verbatim", "late"}
    assert preparation.preload is not None and set(preparation.preload) == {"late", "task1"}
    with pytest.raises(StateError, match="another server"):
        prepare(open_bundle(tmp_path), config)
    assert preparation.state is not None
    preparation.state.release()
    (tmp_path / "loraplex.yaml").write_text(yaml.safe_dump({"routes": {"alias": "task0"}}))
    for _ in range(2):  # the lock was given back
        with pytest.raises(BundleError, match="there is no classifier 'task0'"):
            prepare(open_bundle(tmp_path), config)
