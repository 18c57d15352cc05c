"""What cannot fit is refused before the base's weights are read, and nothing that could run is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
from loraplex import Loraplex
from loraplex.adapters.tensor_file import TensorFile
from loraplex.bundle import open_adapter
from loraplex.config import EngineConfig
from loraplex.errors import ConfigurationError
from loraplex.executors import native
from loraplex.model.loader import read_config, read_layers
from loraplex.planning import start_plan
from loraplex.planning.adapter_size import AdapterSize
from loraplex.planning.start_plan import StartPlan, plan_start

ADAPTER = AdapterSize(num_placed=10_000, host_bytes=40_000, num_lora=10_000, rank=4)


def planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, free: int, total: int | None = None, **engine: object
) -> StartPlan:
    """total: by default as much as is free."""
    monkeypatch.setattr(start_plan, "free_bytes", lambda device: free)
    monkeypatch.setattr(start_plan, "total_bytes", lambda device: free if total is None else total)
    monkeypatch.setattr(start_plan, "swap_bytes", lambda: 0)
    config, packs = EngineConfig(**{"device": "cpu", "dtype": "float32", **engine}), engine.get("backend") != "vllm"
    model_config = read_config(folder, packs=packs)
    layers, _ = read_layers(model_config, folder, packs=packs)
    sources = [open_adapter("one", folder / "one")] * 5
    return plan_start(folder, model_config, config, [ADAPTER] * 3, layers=layers, sources=sources, packs=packs)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.save_base(folder, tiny.FAMILIES["mistral"])
    tiny.save_adapter(folder, folder / "one", r=20)
    return folder


def test_weights_beyond_the_free_memory_are_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * 48_352
    plan = planned(base, monkeypatch, 100 * weights)
    found = [plan.of(name) for name in ("weights", "adapters", "adapters in host memory")]
    assert found == [weights, 3 * 40_000, 3 * 40_000]
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
    ("free", "total", "engine"),
    [
        (0, 0, {}),  # the machine does not say
        (1000, 10**9, {}),  # others may give memory back, and it may be swapped out
        (1000, 1000, {"backend": "vllm", "vllm_arg": ("quantization=fp8",)}),
    ],
)
def test_what_might_run_is_not_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch, free: int, total: int, engine: dict[str, object]
) -> None:
    plan = planned(base, monkeypatch, free, total, **engine)
    assert (plan.warning is not None) == bool(free)


def test_an_argument_of_vllm_that_leaves_the_weights_alone_does_not_end_the_check(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="does not fit on cpu"):
        planned(base, monkeypatch, 1000, backend="vllm", vllm_arg=("seed=3",))


def test_more_than_is_free_is_told(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(base, monkeypatch, 10**10).warning is None
    warning = planned(base, monkeypatch, 10**6, 10**10).warning or ""
    assert "are planned on cpu, and 1.0 MB are free now: weights 193.4 kB" in warning


def test_a_fixed_cache_that_has_no_room_is_refused_before_the_weights_are_read(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"--kv-cache 500GiB: does not fit: 536.87 GB beside weights of 193.4 kB need 536.87 GB, and 1.00 GB are"
    with pytest.raises(ConfigurationError, match=message):
        planned(base, monkeypatch, 10**9, 10**10, kv_cache="500GiB")
    planned(base, monkeypatch, 10**9, 10**10, kv_cache="500MiB")
    planned(base, monkeypatch, 10**9, 10**10, kv_cache="500GiB", backend="peft")  # which has no K/V cache


def test_vllm_decides_its_cache_on_a_gpu(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_plan, "resolve_device", torch.device)
    plan = planned(base, monkeypatch, 1000, backend="vllm", device="cuda", dtype="float32")
    assert plan.fields()["plan"]["kv_cache"] is None and plan.free is None
    text = "\n".join(plan.lines())
    assert "vLLM decides: gpu_memory_utilization" in text and "0 B" not in text
    # vLLM makes room for all 5 adapters of the bundle, at the rank above 20, on all linear layers.
    assert plan.of("adapters") == 5 * 32 * 4 * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert "vLLM's room for 5 of rank 32" in text


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_a_start_refuses_before_it_reads_weights(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(start_plan, "total_bytes", lambda device: 1000)
    monkeypatch.setattr(native, "load_model", lambda *_: pytest.fail("the base was read"))
    with pytest.raises(ConfigurationError, match="does not fit on cpu"):
        Loraplex.load(tiny_bundle, device="cpu", backend=backend)


def test_vllm_computes_with_quantized_weights_as_they_are_stored(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base / "one", tmp_path / "one")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1000, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert planned(tmp_path, monkeypatch, 10**9, backend="vllm").of("weights") == 4000  # whatever the files hold
    config["quantization_config"] = {"quant_method": "awq", "bits": 8, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert planned(tmp_path, monkeypatch, 10**9, backend="vllm").of("weights") == 1000


def test_no_weights_are_read_for_a_plan(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("weights were read"))
    planned(base, monkeypatch, 10**9)


def test_the_record_is_json(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(base, monkeypatch, 10**9)
    found = json.loads(json.dumps(plan.fields()))["plan"]
    parts = ("weights", "adapters", "kv_cache", "step", "stacked_adapters")
    assert sum(found[name] for name in parts) == found["needed"] and found["stacked_adapters"]
