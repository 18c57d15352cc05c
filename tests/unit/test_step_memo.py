"""What is kept between small steps goes with the adapters that it was computed from."""

import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig, PreTrainedConfig

import tiny
from loraplex.adapters.slots import prefix_slot
from loraplex.adapters.weights import AdapterWeights, LoRAWeights
from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sequence import EngineRequest, Sequence, SequenceOutput, Target
from loraplex.engine.step import Placed, Step
from loraplex.model.decoder import Decoder
from loraplex.model.graphs import Graph
from loraplex.model.inputs import Segment, Segments
from loraplex.model.loader import load_model, read_config
from loraplex.model.step_memo import CAPTURED_AT, StepMemo

COMMON = tiny.FAMILIES["llama"].to_dict() | {"attention_bias": True, "rope_parameters": None}
CONFIGS: dict[str, PreTrainedConfig] = {
    "decoder": LlamaConfig(**COMMON),
    "hooked": GemmaConfig(**{**COMMON, "model_type": "gemma", "head_dim": 8}),
}
PATH = "model.layers.0.self_attn.k_proj"
ACTIVATION = 38


def adapter(runner: ModelRunner, value: float) -> AdapterWeights:
    """An aLoRA that also replaces a bias of the base, so that it computes its prefix in a slot of its own."""
    weight = runner.model.parameter(f"{PATH}.weight")
    assert weight is not None
    num_out, num_in = weight.shape
    lora = LoRAWeights(lora_A=torch.ones(2, num_in), lora_B=torch.ones(num_out, 2), scaling=1.0)
    bias = torch.linspace(-value, value, num_out)
    return AdapterWeights(modules={PATH: lora}, kv_id="00" * 32, invocation_tokens=(1,), biases={PATH: bias})


def answer(runner: ModelRunner) -> float:
    """Write the K/V of the prefix in a step of its own, then compute the rest."""
    sequence = Sequence(
        token_ids=tuple(range(5, 45)),
        slot=0,
        activation=ACTIVATION,
        prefix_slot=prefix_slot(0),
        targets=(Target(position=-1, token_id=3),),
    )
    EngineRequest([sequence])
    chunk, rest = Step(), Step()
    chunk.add(Placed(sequence, 32, kept={0: 0, 1: 1}))
    assert runner.run(chunk) == []
    rest.add(Placed(sequence, sequence.num_tokens, 32, cached=(0, 1)))
    [(_, output)] = runner.run(rest)
    assert isinstance(output, SequenceOutput)
    return output.log_probs[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_slot_that_is_used_again_keeps_nothing_of_its_prefix(tmp_path: Path, kind: str) -> None:
    tiny.save_base(tmp_path, CONFIGS[kind])
    config = read_config(tmp_path)

    def runner() -> ModelRunner:
        runner = ModelRunner(load_model(config, tmp_path, torch.float32, torch.device("cpu")))
        runner.model.allocate_cache(2 * BLOCK_SIZE)
        return runner

    used, new = runner(), runner()
    assert isinstance(used.model, Decoder) == (kind == "decoder")
    used.model.set_slot(0, adapter(used, 1.0))
    before = answer(used)
    for one in (used, new):
        one.model.set_slot(0, adapter(one, 9.0))
    assert answer(used) == pytest.approx(answer(new), abs=1e-6)
    assert answer(new) != pytest.approx(before, abs=1e-3)  # else the biases change nothing


def test_four_sets_of_adapters_in_turn_find_what_was_kept() -> None:
    memo, found = StepMemo(1 << 30), []
    for _ in range(3):
        for first in range(0, 12, 3):
            slots = range(first, first + 3)
            segments = Segments([Segment(-1, 0, 100), *(Segment(one, 100 + one, 101 + one) for one in slots)])
            last = Segments([Segment(one, i, i + 1) for i, one in enumerate(slots)])
            memo.begin(segments, last)
            assert segments.stacked is not None and last.stacked is not None
            found.append(len(segments.stacked) + len(last.stacked))
            layer: Any = object()
            segments.stacked[layer] = last.stacked[layer] = ()
            memo.end(segments, last)
    assert found == [0] * 4 + [2] * 4 + [4] * 4


def test_graphs_of_a_removed_adapter_are_destroyed_on_the_thread_that_replays_them() -> None:
    memo, destroyed_on = StepMemo(1 << 30, captures=True), []
    segments = Segments([Segment(3, 0, 20)])

    def step() -> None:
        memo.begin(segments, segments)
        if segments.graphs is not None and not segments.graphs:
            graph = Graph(lambda: None, {})
            weakref.finalize(graph, lambda: destroyed_on.append(threading.current_thread()))
            segments.graphs["piece"] = graph
        memo.end(segments)

    for _ in range(CAPTURED_AT):
        step()
    other = threading.Thread(target=memo.clear_slot, args=(3,))
    other.start()
    other.join()
    assert destroyed_on == []
    step()
    assert destroyed_on == [threading.current_thread()]
