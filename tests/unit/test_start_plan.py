"""What cannot fit is refused before the base's weights are read, and nothing that could run is."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
from loraplex import Loraplex
from loraplex.config import EngineConfig
from loraplex.errors import ConfigurationError
from loraplex.executors import native
from loraplex.model.loader import read_config
from loraplex.planning import start_plan
from loraplex.planning.adapter_size import AdapterSize
from loraplex.planning.start_plan import StartPlan, plan_start

ADAPTER = AdapterSize(num_placed=10_000, host_bytes=40_000, num_lora=10_000, rank=4)


def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, swap: int = 0, **engine: object) -> StartPlan:
    monkeypatch.setattr(start_plan, "free_bytes", lambda device: free)
    monkeypatch.setattr(start_plan, "swap_bytes", lambda: swap)
    config = EngineConfig(**{"device": "cpu", "dtype": "float32", **engine})
    return plan_start(folder, read_config(folder), config, [ADAPTER] * 3, packs=config.backend != "vllm")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder, tiny.FAMILIES["mistral"])
    return folder


def test_weights_beyond_the_free_memory_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * 48_352
    plan = planned(base, monkeypatch, 100 * weights)
    assert (plan.weights, plan.adapters, plan.host) == (weights, 3 * 40_000, 3 * 40_000)
    assert plan.kv == 99 * weights // 5 and len(plan.lines()) == 5
    message = r"does not fit on cpu: weights of 193.4 kB \(48,352 parameters in float32\) need 193.4 kB"
    with pytest.raises(ConfigurationError, match=message) as refused:
        planned(base, monkeypatch, weights - 1)
    assert "--dtype bfloat16" in refused.value.remedy
    assert "--dtype bfloat16" not in _remedy(base, monkeypatch, weights // 4)


def _remedy(base: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> str:
    with pytest.raises(ConfigurationError) as refused:
        planned(base, monkeypatch, free)
    return refused.value.remedy


def test_adapters_count_as_far_as_their_budget_reaches(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * 48_352
    planned(base, monkeypatch, weights + 1000, adapter_memory="20%")  # a share of what is left always has room
    with pytest.raises(ConfigurationError, match=r"and adapters of 120\.0 kB") as refused:
        planned(base, monkeypatch, weights + 1000, adapter_memory="1MiB")
    assert "--preload" in refused.value.remedy


@pytest.mark.parametrize(
    ("free", "swap", "engine"),
    [
        (0, 0, {}),  # the machine does not say
        (1000, 10**9, {}),  # there is swap
        (1000, 0, {"backend": "vllm", "vllm_arg": ("quantization=fp8",)}),
    ],
)
def test_what_might_run_is_not_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, free: int, swap: int, engine: dict[str, object]
) -> None:
    planned(base, monkeypatch, free, swap, **engine)


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_a_start_refuses_before_it_reads_weights(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(start_plan, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(start_plan, "swap_bytes", lambda: 0)
    monkeypatch.setattr(native, "load_model", lambda *_: pytest.fail("the base was read"))
    with pytest.raises(ConfigurationError, match="does not fit on cpu"):
        Loraplex.load(tiny_bundle, device="cpu", backend=backend)


def test_vllm_computes_with_quantized_weights_as_they_are_stored(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    save_file({"weight": torch.zeros(1000, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert planned(tmp_path, monkeypatch, 10**9, backend="vllm").weights == 1000


def test_the_plan_takes_milliseconds(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned(base, monkeypatch, 10**9)  # reads the allowances
    config = read_config(base)
    started = time.process_time()
    plan_start(base, config, EngineConfig(device="cpu"), [ADAPTER] * 3, packs=True)
    assert time.process_time() - started < 0.02


def test_the_record_is_json(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(base, monkeypatch, 10**9)
    found = json.loads(json.dumps(plan.fields()))["plan"]
    assert found["weights"] + found["adapters"] + found["kv_cache"] + found["step"] == found["needed"]
