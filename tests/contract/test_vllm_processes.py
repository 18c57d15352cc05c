"""vLLM's processes: how they start, and that they end with the server. Where it is installed."""

import json
import os
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import GPT2Config

import serving
import tiny
from loraplex import Loraplex
from loraplex.errors import EngineError

pytestmark = [
    pytest.mark.slow,  # each test starts vLLM for itself
    pytest.mark.skipif(not tiny.HAS_VLLM, reason="vLLM is not installed here: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's
]

OPTIONS: dict[str, Any] = {"dtype": "float32", "backend": "vllm", "kv_cache": "64MiB"}
EAGER = "enforce_eager=true"
FLAGS = ["--dtype", "float32", "--backend", "vllm", "--kv-cache", "64MiB", "--vllm-arg", EAGER]
TEXT = "Customer: is it done?\nAgent: yes, it is"


def test_a_base_that_vllm_does_not_take_does_not_start(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=tiny.VOCAB_SIZE, n_layer=1, n_positions=256, bos_token_id=0, eos_token_id=1)
    tiny.save_bundle(tmp_path / "bundle", 1, config)
    done = serving.loraplex("serve", tmp_path / "bundle", *FLAGS, "--port", 0)
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr[done.stderr.rindex("error ") :]
    assert last.startswith("error unsupported_model") and "see vLLM's log above" in last
    assert "does not support LoRA" in done.stderr


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_base_in_two_parts(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with Loraplex.load(tiny_bundle, dtype="float32") as native:
        expected = native.classify(TEXT).verdicts
    with Loraplex.load(tiny_bundle, **OPTIONS, vllm_arg=(EAGER, "tensor_parallel_size=2")) as loraplex:
        verdicts = loraplex.classify(TEXT).verdicts
    assert "VLLM_RPC_BASE_PATH" not in os.environ  # which named a folder that is gone
    for one, other in zip(verdicts, expected, strict=True):
        assert one.label == other.label and one.confidence == pytest.approx(other.confidence, abs=1e-3)


def descendants(server: serving.Server) -> list[psutil.Process]:
    family: list[psutil.Process] = psutil.Process(server.process.pid).children(recursive=True)
    return family


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all have ended. What a killed parent leaves may wait for long until somebody reads its status."""
    alive = psutil.wait_procs(processes, timeout=10)[1]
    return all(one.status() == psutil.STATUS_ZOMBIE for one in alive)


def test_a_killed_vllm_answers_what_waits_and_ends_the_server(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving.serve(tiny_bundle, *FLAGS, log=str(tmp_path / "log")) as server, serving.client(server) as http:
        family = descendants(server)
        [core] = [one for one in family if "EngineCore" in " ".join(one.cmdline())]

        def ask(_: int) -> httpx.Response:
            return http.post("/v1/completions", json={"model": "task0", "prompt": "hello", "max_tokens": 200})

        with ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(ask, i) for i in range(8)]
            time.sleep(0.1)
            os.kill(core.pid, signal.SIGKILL)
            answers = [one.result(30) for one in waiting]
        codes = {json.loads(one.text)["error"]["code"] for one in answers if one.status_code != 200}
        assert codes <= {"engine_error", "not_ready"} and "engine_error" in codes, [one.text for one in answers]
        assert server.process.wait(30) == 1
        assert gone(family)
    assert "the engine died" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_at_a_signal_and_leaves_nothing(tiny_bundle: Path, number: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,  # a short path: vLLM's sockets go there, too
        serving.serve(tiny_bundle, *FLAGS, TMPDIR=folder) as server,
        serving.client(server) as http,
    ):
        assert http.post("/v1/classify", json={"input": TEXT}).status_code == 200
        family = descendants(server)
        assert any("EngineCore" in " ".join(one.cmdline()) for one in family)
        assert server.stop(number) == (0 if number == signal.SIGTERM else -number)
        assert gone(family)
        assert number == signal.SIGKILL or not list(Path(folder).glob("loraplex-*"))


def test_a_load_does_not_wait_for_a_dead_vllm(tiny_bundle: Path) -> None:
    with Loraplex.load(tiny_bundle, **OPTIONS, vllm_arg=(EAGER,)) as loraplex, ThreadPoolExecutor(1) as pool:
        engine: Any = loraplex.service.computing.computation
        [core] = engine.pids
        os.kill(core, signal.SIGSTOP)
        loading = pool.submit(loraplex.load_adapter, "again", str(tiny_bundle / "task0"))
        unloading = pool.submit(loraplex.unload_adapter, "task1")
        time.sleep(0.5)
        assert not loading.done()
        os.kill(core, signal.SIGKILL)
        with pytest.raises(EngineError, match="vLLM died"):
            loading.result(10)
        unloading.result(10)
        assert not loraplex.service.alive
