"""Every kind of adapter that PEFT writes, on every tiny base, all of a base's kinds in one step: PEFT's answers, one by
one and in float32, within 1e-4 in probability, and 1e-3 in log probability, which says more of flat answers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import tiny
from loraplex.adapters.checkpoint import read_unidentified
from loraplex.adapters.slots import NO_ADAPTER, prefix_slot
from loraplex.adapters.weights import AdapterWeights
from loraplex.engine.block_pool import BASE_KV
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sequence import EngineRequest, Sequence, SequenceOutput, Target
from loraplex.engine.step import Step
from loraplex.model.loader import load_model, read_config, read_layers
from loraplex.text.prompt import last_match
from peft_cases import BASES, CASES, TOKEN_IDS, Bases, Case, case, logits, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of embeddings, ties and what else it thinks unwise

TOLERANCE, LOG_TOLERANCE = 1e-4, 1e-3
EVERY_TOKEN = tuple(Target(position=-1, token_id=i) for i in range(tiny.VOCAB_SIZE))


def expect(bases: Bases, case: Case, folder: Path) -> torch.Tensor:
    """PEFT's log probabilities of the next token, or of the labels."""
    found = logits(PeftModel.from_pretrained(bases.load(case.base, case.is_classifier), folder))[0]
    return (found if case.is_classifier else found[-1]).log_softmax(-1)


def sequence_of(slot: int, adapter: AdapterWeights | None) -> Sequence:
    if adapter is None:
        return Sequence(token_ids=tuple(TOKEN_IDS), slot=NO_ADAPTER, targets=EVERY_TOKEN)
    invocation = adapter.invocation_tokens
    activation = 0 if invocation is None else last_match(TOKEN_IDS, invocation)
    assert activation is not None
    return Sequence(
        token_ids=tuple(TOKEN_IDS),
        slot=slot,
        kv_id=bytes.fromhex(adapter.kv_id),
        activation=activation,
        prefix_slot=prefix_slot(slot) if adapter.changes_prefix else NO_ADAPTER,
        prefix_kv_id=bytes([slot + 1] * 32) if adapter.changes_prefix else BASE_KV,
        targets=EVERY_TOKEN if adapter.score is None else (),
    )


@pytest.mark.parametrize("base", BASES)
def test_all_kinds_in_one_step_equal_peft(base: str, tmp_path: Path) -> None:
    check(base, {name: case for name, case in CASES.items() if case.base == base}, tmp_path)


KINDS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [3]},
    "lora-bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "pattern": {"rank_pattern": {"o_proj": 5}, "alpha_pattern": {"down_proj": 9}},
    "layers": {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "embedding": {"target_modules": ["o_proj", "embed_tokens"]},
    "head": {"target_modules": ["o_proj", "lm_head"]},
    "save-head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [21, 8]},
    "seq": {"task_type": "SEQ_CLS"},
}


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in BASES])
def test_kinds_at_two_ranks_each_equal_peft_on_every_family(family: str, tmp_path: Path) -> None:
    cases = {}
    for number, (kind, config) in enumerate(KINDS.items()):
        parts = "modules score" if kind == "seq" else "modules"
        for rank in (1 + number % 3, 4 + number % 5):
            settings: dict[str, Any] = {"target_modules": "all-linear", "r": rank} | dict(config)
            cases[f"{kind}-r{rank}"] = case(family, parts, **settings)
    check(family, cases, tmp_path)


def check(base: str, cases: Mapping[str, Case], tmp_path: Path) -> None:
    bases = Bases(tmp_path / "bases")
    folder = bases.folder(base)
    config = read_config(folder)
    layers, _ = read_layers(config, folder)
    runner = ModelRunner(load_model(config, folder, torch.float32, torch.device("cpu")))
    bare = logits(bases.load(base))[0, -1].log_softmax(-1)
    expected: dict[str | None, torch.Tensor] = {None: bare}
    adapters: dict[str | None, AdapterWeights | None] = {None: None}
    for slot, (kind, one) in enumerate(cases.items()):
        where = write(bases, tmp_path / kind, one)
        expected[kind] = expect(bases, one, where)
        assert one.is_classifier or (expected[kind] - bare).abs().max() > 100 * LOG_TOLERANCE, (
            f"{kind} changes too little"
        )
        adapter = adapters[kind] = read_unidentified(where, layers).identify(runner.model.parameter)
        runner.model.set_slot(slot, adapter)
    sequences = [sequence_of(slot - 1, adapter) for slot, adapter in enumerate(adapters.values())]
    EngineRequest(sequences)
    outputs = dict(runner.run(Step.of(sequences)))
    for name, sequence in zip(adapters, sequences, strict=True):
        output = outputs[sequence]
        assert isinstance(output, SequenceOutput), name
        found = torch.tensor(output.log_probs)
        assert found.shape == expected[name].shape
        assert (found - expected[name]).abs().max() <= LOG_TOLERANCE, name
        assert (found.exp() - expected[name].exp()).abs().max() <= TOLERANCE, name
        assert found.argmax() == expected[name].argmax(), name

    for slot in range(len(cases)):
        runner.model.clear_slot(slot)
    again = Sequence(token_ids=tuple(TOKEN_IDS), slot=0, targets=EVERY_TOKEN)
    EngineRequest([again])
    [(_, output)] = runner.run(Step.of([again]))
    assert isinstance(output, SequenceOutput)
    assert (torch.tensor(output.log_probs) - bare).abs().max() <= LOG_TOLERANCE, "something stayed behind"
