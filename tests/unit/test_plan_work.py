"""Sizes and work against transformers' own models: parameters, files, FLOPs as PyTorch counts them, keys one by one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import tiny
from loraplex.config import EngineConfig
from loraplex.model.decoder import decoder_layers
from loraplex.model.loader import build_skeleton, load_model, read_config
from loraplex.planning.adapter_size import AdapterSize
from loraplex.planning.base_shape import shape_of, stored_sizes
from loraplex.planning.memory import Use, adapter_lines, budgets, memo_line
from loraplex.planning.work import Run, num_lora_weights, visible_keys, work


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_visible_keys_are_those_of_each_token(window: int | None) -> None:
    for before in range(12):
        for num_tokens in range(12):
            seen = [min(before + 1 + i, window or before + 1 + i) for i in range(num_tokens)]
            assert visible_keys(Run(num_tokens, before), window) == sum(seen)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_linear_work_is_what_pytorch_counts(family: str) -> None:
    """transformers' eager attention computes the scores of later tokens, too, and masks them."""
    config, num_tokens = tiny.FAMILIES[family], 12
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.zeros(1, num_tokens, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    base = shape_of(config, Path(family))
    found = work(base, [Run(num_tokens)], num_rows=num_tokens)
    squares = sum(2 * one.num_heads * (one.key_dim + one.value_dim) for one in base.sizes.attention) * num_tokens**2
    assert counter.get_total_flops() == found.linear + squares


def test_lora_counts_the_tokens_that_an_adapter_changes() -> None:
    base = shape_of(tiny.FAMILIES["llama"], Path())
    lora = num_lora_weights(base.layers, 4)
    assert lora == 3 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    found = work(base, [Run(100), Run(10, 100, lora), Run(10, 100, lora)], num_rows=2, num_adapter_weights=2 * lora)
    assert found.lora == 2 * 20 * lora
    assert found.num_weights == base.num_dense + base.num_head + 2 * lora
    assert found.seconds(1e9, 1e30, 2) == pytest.approx(found.total / 1e9)
    assert found.seconds(1e30, 1e9, 2) == pytest.approx(2 * (found.num_weights + found.num_kv) / 1e9)


def test_the_last_layer_need_not_compute_every_token() -> None:
    base = shape_of(tiny.FAMILIES["llama"], Path())
    full, least = (work(base, [Run(100, 0, 7)], num_rows=1, last_in_full=full) for full in (True, False))
    keys_and_values = 2 * 32 * 16
    assert full.linear - least.linear == 2 * 99 * (base.num_dense // 3 - keys_and_values)
    assert least.attention < full.attention and least.lora < full.lora


def test_a_mixture_keeps_all_experts_and_computes_some() -> None:
    config = MixtralConfig(**tiny._COMMON, num_local_experts=8, num_experts_per_tok=2)
    base = shape_of(config, Path())
    experts = 3 * 8 * 3 * 32 * 64
    assert (base.num_experts, base.active) == (experts, 0.25)
    assert base.sizes.num_weights > experts
    one, many = (work(base, [Run(n)], num_rows=1) for n in (1, 100))
    assert one.linear == 2 * (base.num_dense + experts // 4 + base.num_head)
    assert (
        many.num_weights == one.num_weights == base.num_dense + experts // 4 + base.num_head
    )  # at least: the same ones


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_tied_head_is_kept_once(is_tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(**{**tiny._COMMON, "tie_word_embeddings": is_tied})
    tiny.save_base(tmp_path, config)
    read = read_config(tmp_path)
    num_parameters = sum(one.numel() for one in build_skeleton(read, tmp_path).parameters())
    assert shape_of(read, tmp_path).sizes == stored_sizes(read, tmp_path)
    assert stored_sizes(read, tmp_path).num_weights == num_parameters
    model = load_model(read, tmp_path, torch.float32, torch.device("cpu"))
    assert model.kv_bytes == 4 * stored_sizes(read, tmp_path).num_kv
    assert decoder_layers(read) == shape_of(read, tmp_path).layers


def test_stacked_adapters_are_one_steps_beside_those_that_are_kept() -> None:
    """Only adapters with a place are stacked, and what exceeds the budget goes once its step is over."""
    adapters = [AdapterSize(num_placed=1000, host_bytes=4000, num_lora=1000, rank=4)] * 16
    use = Use(item_bytes=2, is_cuda=True, num_classifiers=16, max_step_tokens=1024, call_tokens=2000)
    one = 16 * 1000 * 2
    assert memo_line(adapters, 16, use).expected == 7 * one
    assert memo_line(adapters, 8, use).expected == 7 * one // 2
    assert memo_line(adapters, 1, use).expected == 0
    tight = memo_line(adapters, 16, replace(use, free_bytes=20 * one // 2))
    assert tight.expected == one + one // 2 and "each step makes them again" in tight.note
    assert memo_line(adapters, 16, replace(use, free_bytes=40 * one)).expected == one + 2 * one
    assert "each step" not in memo_line(adapters, 16, replace(use, free_bytes=40 * one)).note


def test_shares_count_from_what_is_left_and_sizes_are_as_given() -> None:
    config = EngineConfig(kv_cache="50%", adapter_memory="50%", host_memory="10%")
    assert budgets(config, 1000, 1000, is_cuda=False) == (500, 500, 100)
    assert budgets(config, 1000, None, is_cuda=True) == (500, 250, None)  # the K/V is there first
    assert budgets(config, None, None, is_cuda=True) == (None, None, None)
    fixed = EngineConfig(kv_cache="1KiB", adapter_memory="2KiB", host_memory="3KiB")
    assert budgets(fixed, None, None, is_cuda=True) == (1024, 2048, 3072)


def test_host_memory_bounds_the_copies_of_adapters() -> None:
    adapters = [AdapterSize(num_placed=1000, host_bytes=4000, num_lora=1000, rank=4)] * 16
    use = Use(item_bytes=2, is_cuda=True, num_classifiers=16, max_step_tokens=1024)
    assert adapter_lines(adapters, 16, use)[1].expected == 64_000
    found = adapter_lines(adapters, 16, use, 8_000)[1]
    assert found.expected == 8_000 and "as much of 64.0 kB" in found.note
