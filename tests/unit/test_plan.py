"""`loraplex plan`: sizes against real files and tensors, what fits by arithmetic, and the command's own mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tiny
from loraplex.adapters.checkpoint import read_unidentified
from loraplex.bundle import open_adapter, open_bundle
from loraplex.cli.main import app
from loraplex.config import EngineConfig
from loraplex.errors import ConfigurationError
from loraplex.hardware.instances import instance
from loraplex.model.loader import load_model, read_config, read_layers
from loraplex.planning import asked as asked_module
from loraplex.planning.adapter_size import adapter_in_memory, adapter_of, read_adapter_size, target_paths
from loraplex.planning.asked import Asked, read_asked
from loraplex.planning.plan import Plan
from loraplex.planning.plan_json import metrics
from loraplex.planning.report import fitting

GB = 10**9


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


def mistral(**options: Any) -> Asked:
    return read_asked(**{"model": "mistral-7b-v0.3", "gpu": "a10g", "rank": 32, **options})


def line(plan: Plan, name: str) -> int:
    [found] = [one.expected for one in plan.lines if one.name == name]
    return found


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapters_size_is_that_of_its_saved_tensors(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["qwen2"])
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "activated": {"alora_invocation_tokens": [3]},
        "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "patterned": {"rank_pattern": {"q_proj": 7}},
    }
    layers, _ = read_layers(read_config(tmp_path), tmp_path)
    for name, config in kinds.items():
        tiny.save_adapter(tmp_path, tmp_path / name, **config)
        read = read_adapter_size(open_adapter(name, tmp_path / name), layers)
        weights = read_unidentified(tmp_path / name, layers).weights
        base = load_model(read_config(tmp_path), tmp_path, torch.float32, torch.device("cpu"))
        assert read == adapter_in_memory(weights.without_base_copies(base.parameter)), name
    assert (
        adapter_of(layers, 4, "all-linear").num_lora
        == read_adapter_size(open_adapter("plain", tmp_path / "plain"), layers).num_lora
    )


def test_targets_are_named_as_peft_does() -> None:
    layers = read_asked(model="mistral-7b-v0.3", gpu="a10g").plan.base.layers
    assert len(target_paths(layers, "all-linear")) == 32 * 7
    assert target_paths(layers, "attention") == target_paths(layers, "q_proj,k_proj, v_proj,o_proj")
    with pytest.raises(ConfigurationError, match=r"--targets q_proj,query: the base has no linear layer 'query'"):
        target_paths(layers, "q_proj,query")


def test_the_articles_memory_section() -> None:
    """Base, adapters and K/V of a Mistral 7B, as ../shared/reference counts them."""
    plan = mistral(targets="attention", conversation_tokens=4096).plan
    assert line(plan, "weights") == 2 * 7_248_023_552
    assert plan.adapters[0].num_placed * 2 / 1e6 == pytest.approx(54.5, abs=0.1)
    assert mistral(rank=16).plan.adapters[0].num_placed * 2 / 1e6 == pytest.approx(83.9, abs=0.1)
    assert mistral().plan.adapters[0].num_placed * 2 / 1e6 == pytest.approx(167.8, abs=0.1)
    assert plan.kv_token_bytes == 131_072
    assert 7 * GB // plan.kv_conversation_bytes[1] == 13
    shared = next(case for case in mistral(conversation_tokens=500, suffix_tokens=12).plan.cases if case.shares)
    assert shared.floor_s == pytest.approx(0.140, rel=0.05)  # with rank 32 and the last layer's rows only


def test_the_cache_takes_what_is_planned(tiny_bundle: Path) -> None:
    plan = read_asked(bundle=str(tiny_bundle), dtype="float32", conversation_tokens=100, turns=1).plan
    model = load_model(read_config(tiny_bundle), tiny_bundle, torch.float32, torch.device("cpu"))
    model.allocate_cache(112)  # 100 tokens in blocks of 16
    cache = model._cache  # type: ignore[attr-defined]
    assert plan.kv_conversation_bytes[1] == sum(one.nbytes for index in range(3) for one in cache.layer(index))


def test_float32_has_no_rates_on_a_gpu() -> None:
    """PyTorch computes float32 products without tensor cores, and the data do not say how fast."""
    assert [case.floor_s for case in mistral(dtype="float32", gpu="h100").plan.cases] == [None] * 4
    ran = run("--model", "mistral-7b-v0.3", "--gpu", "h100", "--dtype", "float32")
    assert ran.exit_code == 0 and "do not say how fast NVIDIA H100" in ran.stdout and "--dtype bfloat16" in ran.stdout


def test_one_conversation_must_fit() -> None:
    long = mistral(num_adapters=1, conversation_tokens=32_000).plan
    assert long.chosen.kv_cache_bytes < long.kv_conversation_bytes[1] and not long.short_bytes
    told = run("--model", "mistral-7b-v0.3", "--gpu", "a10g", "--adapters", "1", "--conversation-tokens", "32000")
    assert "the K/V cache holds less than one conversation" in told.stdout and "--kv-cache 4000MiB" in told.stdout
    short = read_asked(model="llama-3.1-8b", gpu="a10g", num_adapters=1, conversation_tokens=100_000).plan
    assert short.short_bytes > 0
    with pytest.raises(ConfigurationError, match=r"are 100,020; phi-3-mini-4k takes at most 4,096"):
        read_asked(model="phi-3-mini-4k", gpu="l4", conversation_tokens=100_000)


def test_settings_are_chosen_only_where_they_fit() -> None:
    ran = run("--model", "llama-3.3-70b", "--gpu", "a10g", "--adapters", "1", "--fit")
    assert ran.exit_code == 2 and "max_step_tokens:" not in ran.stdout


def test_measured_rates_give_times(tiny_bundle: Path) -> None:
    plan = read_asked(bundle=str(tiny_bundle), conversation_tokens=100, measure=lambda base, dtype: (1e9, 1e9)).plan
    for case in plan.cases:
        assert case.floor_s == case.work.seconds(1e9, 1e9, 4 if plan.use.item_bytes == 4 else 2)
        assert case.expected is not None and case.floor_s <= case.expected[0] < case.expected[1]


def test_a_bundles_other_backend_is_told(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "copy", symlinks=True)
    with (tmp_path / "copy" / "loraplex.yaml").open("a") as file:
        file.write("\nengine: {backend: peft}\n")
    ran = run(str(tmp_path / "copy"), "--conversation-tokens", "100")
    assert "the bundle names peft" in ran.stdout, ran.output


def test_fit_gives_each_part_its_room() -> None:
    plan = mistral(num_adapters=16, conversation_tokens=4096, fits=True).plan
    whole = plan.target.memory_bytes
    assert whole is not None and not plan.short_bytes
    assert plan.num_placed == 16 and 0.9 * whole < plan.total("device") <= whole
    assert plan.chosen.kv_cache_bytes >= plan.kv_conversation_bytes[1]
    more = mistral(num_adapters=1000, conversation_tokens=4096, fits=True).plan
    assert more.num_placed < 1000 and more.total("device") <= whole
    assert more.use.max_step_tokens < plan.use.max_step_tokens or more.use.max_step_tokens == 256


def test_what_does_not_fit_is_told_with_the_difference() -> None:
    plan = read_asked(model="llama-3.3-70b", gpu="a10g", num_adapters=1).plan
    assert plan.short_bytes > 100 * GB
    ran = run("--model", "llama-3.3-70b", "--gpu", "a10g", "--adapters", "1")
    assert ran.exit_code == 2 and "does not fit: 1" in ran.stdout and " GB are missing" in ran.stdout


def test_instances_have_room_and_the_cheapest_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(run("--model", "mistral-7b-v0.3", "--gpu", "a10g", "--json", "--fit").stdout)
    prices = [one["usd_per_hour"] for one in found["instances"]]
    known = [price for price in prices if price is not None]
    assert known == sorted(known) and prices[: len(known)] == known
    assert all(instance(one["name"]).device for one in found["instances"])
    asked = mistral(rank=16, fits=True)
    weights = asked.plan.base.sizes.num_weights * 2
    for one in fitting(asked):
        assert one.instance.device is not None and weights < one.instance.device.memory_bytes
    assert {one["name"] for one in found["instances"]} == {one.instance.name for one in fitting(asked)}
    # Each is planned for its own memory, not for the device of the plan: H100s have no less room than an A10G.
    large = json.loads(run("--model", "mistral-7b-v0.3", "--gpu", "h100", "--json", "--fit").stdout)
    assert {one["name"] for one in found["instances"]} == {one["name"] for one in large["instances"]}
    four = json.loads(run("--model", "mistral-7b-v0.3", "--gpu", "a10g", "--count", "4", "--json").stdout)
    assert four["instances"] and all(instance(one["name"]).num_devices >= 4 for one in four["instances"])
    # The settings are valid ones.
    assert EngineConfig(**found["settings"]).max_adapters == 16


def test_metrics_have_the_form_of_amazons_recommendations() -> None:
    rows = metrics(mistral())
    assert {tuple(row) for row in rows} == {("Metric", "Stat", "Value", "Unit")}
    assert {"Metric": "WeightsMemory", "Stat": "limit", "Value": "14496047104", "Unit": "Bytes"} in rows
    assert all(isinstance(value, str) for row in rows for value in row.values())


def test_a_bundle_is_planned_with_its_own_adapters(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_module, "free_bytes", lambda device: 10 * GB)
    ran = run(str(tiny_bundle), "--json", "--dtype", "float32", "--rate", "3")
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert found["adapters"]["number"] == len(open_bundle(tiny_bundle).adapters)
    assert found["target"]["memory_bytes"] == 10 * GB and found["fits"]
    shown = run(str(tiny_bundle), "--dtype", "float32", "--rate", "3", "--fit").stdout
    assert "weights" in shown and "max_step_tokens: 1024" in shown and "must be measured" in shown


def test_a_config_is_enough(tmp_path: Path) -> None:
    tiny.FAMILIES["gemma2"].save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        ran = run("--config", str(path), "--adapters", "3", "--rank", "4", "--targets", "q_proj,v_proj", "--json")
        assert ran.exit_code == 0, ran.output
        assert json.loads(ran.stdout)["adapters"]["number"] == 3


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"num_hidden_layers": None}, "key 'num_hidden_layers' is missing"),
        ({"num_hidden_layers": 1_000_000}, "key 'num_hidden_layers' is 1000000"),
        ({"hidden_size": 0}, "key 'hidden_size' is 0"),
    ],
)
def test_a_config_must_hold_its_sizes(tmp_path: Path, values: dict[str, int | None], told: str) -> None:
    config = tiny.FAMILIES["llama"].to_dict() | values
    (tmp_path / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one is not None}))
    ran = run("--config", str(tmp_path))
    assert ran.exit_code == 1 and told in ran.output, ran.output


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "give one of BUNDLE, --config and --model"),
        (["bundle", "--model", "mistral-7b-v0.3"], 2, "give one of BUNDLE"),
        (["--model", "mistral-7b-v0.3", "--dtype", "int8"], 2, "--dtype"),
        (["--model", "mistral-7b-v0.3", "--turns", "501"], 2, "--turns"),
        (["--model", "mistral-7b-v0.3", "--rank", "0"], 2, "--rank"),
        (["--model", "mistral-7b-v0.3", "--rate", "inf"], 2, "--rate"),
        (["--model", "mistral-7b-v0.3", "--rate", "0"], 2, "--rate"),
        (["--model", "mistral-7b-v0.33"], 1, "mistral-7b-v0.3"),
        (["--model", "mistral-7b-v0.3", "--gpu", "a10"], 1, "a10g"),
        (["--model", "mistral-7b-v0.3", "--targets", "query"], 1, "q_proj"),
        (["--model", "mistral-7b-v0.3", "--measure"], 1, "needs a bundle"),
        (["nowhere/at/all"], 1, "nowhere/at/all"),
        (["--config", "nowhere/at/all"], 1, "nowhere/at/all"),
    ],
)
def test_mistakes_are_told(arguments: list[str], code: int, told: str) -> None:
    ran = run(*arguments)
    assert (ran.exit_code, told in ran.output) == (code, True), ran.output
