"""An adapter's identity is that of all its parts, and it knows what it changes."""

import dataclasses
from typing import Any

import torch

from loraplex.adapters.weights import AdapterWeights, LoRAWeights, SavedModule


def every_part() -> AdapterWeights:
    lora = LoRAWeights(lora_A=torch.ones(1, 6), lora_B=torch.ones(8, 1), scaling=2.0)
    return AdapterWeights(
        modules={"q_proj": lora, "v_proj": lora},
        kv_id="",
        invocation_tokens=(3, 4),
        embeddings={"model.embed_tokens": lora},
        output=dataclasses.replace(lora, lora_bias=torch.ones(8), magnitude=torch.ones(8)),
        saved={"lm_head": SavedModule(weight=torch.ones(10, 6), bias=torch.ones(10))},
        biases={"a": torch.ones(8), "b": torch.zeros(8)},
        token_rows={"model.embed_tokens": ((1, 2), torch.ones(2, 6))},
        score=SavedModule(weight=torch.ones(3, 6)),
        output_path="lm_head",
    )


def test_the_hash_covers_every_part_and_no_order() -> None:
    adapter = every_part()
    first = adapter.with_content_id().kv_id
    seen = {first}
    lora, nothing = adapter.modules["q_proj"], torch.zeros(8)
    assert adapter.output is not None
    output = adapter.output
    changes: list[dict[str, Any]] = [
        {"invocation_tokens": (4, 3)},
        {"invocation_tokens": None},
        {"modules": {**adapter.modules, "q_proj": dataclasses.replace(lora, scaling=2.5)}},
        {"modules": {**adapter.modules, "other": lora}},
        {"embeddings": {}},
        {"embeddings": {}, "modules": {**adapter.modules, "model.embed_tokens": lora}},
        {"output": None},
        {"output": dataclasses.replace(output, lora_bias=None)},
        {"output": dataclasses.replace(output, lora_bias=nothing)},
        {"output": dataclasses.replace(output, magnitude=nothing)},
        {"output": dataclasses.replace(output, magnitude=None)},
        {"saved": {"lm_head": SavedModule(weight=torch.ones(10, 6))}},
        {"biases": {"a": torch.zeros(8), "b": torch.ones(8)}},
        {"token_rows": {"model.embed_tokens": ((2, 1), torch.ones(2, 6))}},
        {"token_rows": {"lm_head": ((1, 2), torch.ones(2, 6))}},
        {"score": SavedModule(weight=torch.ones(6, 3))},
    ]
    for change in changes:
        changed = dataclasses.replace(adapter, **change).with_content_id().kv_id
        assert changed not in seen, change
        seen.add(changed)
    for part in ("modules", "biases"):
        backwards: Any = dict(reversed(getattr(adapter, part).items()))
        assert dataclasses.replace(adapter, **{part: backwards}).with_content_id().kv_id == first


def test_what_changes_the_prefix_and_what_is_zero() -> None:
    adapter, nothing = every_part(), AdapterWeights(modules={}, kv_id="", output_path="lm_head")
    for part in ("embeddings", "biases", "token_rows"):
        changed: Any = {part: getattr(adapter, part)}
        assert dataclasses.replace(nothing, **changed).changes_prefix
    after: Any = {part: getattr(adapter, part) for part in ("modules", "output", "saved", "score")}
    assert not dataclasses.replace(nothing, **after).changes_prefix, "the head comes after all keys and values"
    for part in ("modules", "output", "saved", "biases", "token_rows", "score"):
        alone: Any = {part: getattr(adapter, part)}
        assert not dataclasses.replace(nothing, **alone).is_zero, part
    lora = adapter.modules["q_proj"]
    for zero in ({"lora_A": torch.zeros(1, 6)}, {"lora_B": torch.zeros(8, 1)}):
        still: Any = zero
        made = dataclasses.replace(lora, **still)
        assert dataclasses.replace(nothing, modules={"a": made}).is_zero
        biased = dataclasses.replace(made, lora_bias=torch.ones(8))
        assert not dataclasses.replace(nothing, modules={"a": biased}).is_zero


def test_shared_tensors_count_once() -> None:
    weight = SavedModule(weight=torch.ones(10, 6))
    tied = AdapterWeights(modules={}, kv_id="", saved={"model.embed_tokens": weight, "lm_head": weight})
    assert (tied.num_parameters, tied.num_bytes) == (60, 240)
