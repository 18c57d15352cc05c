"""PEFT in fp32, one text at a time, is the oracle: whole next-token distributions agree within 1e-4, for every family,
with ranks and base rows mixed in one batch. Each feature that matters is then switched off, and must be missed."""

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from adapter_files import read_adapter
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.adapters.weights import AdapterWeights
from loraplex.engine.block_pool import BASE_KV
from loraplex.engine.runner import ModelRunner
from loraplex.engine.sequence import EngineRequest, Sequence, SequenceOutput, Target
from loraplex.engine.step import Placed, Step
from loraplex.errors import UnsupportedModelError
from loraplex.model import decoder, hooked
from loraplex.model.loader import load_model, read_config, read_layers
from loraplex.ops import attention as ops_attention
from loraplex.ops.layout import Layout, Span, layout_of
from loraplex.ops.staging import Staging
from loraplex.text.prompt import last_match
from loraplex.text.tokenizer import Tokenizer

TOLERANCE = 1e-4
TEXTS = [
    "Customer: hi<|ask|>Is it done?",
    "Customer: hello, I would like to book a table for two\nAgent: at what time?\nCustomer: at seven<|ask|>done?",
    "Customer: hello, I would like to book a table for three<|ask|>",
    "Customer: is my payment <|ask|> done?\nAgent: yes, it is<|ask|>Is it done? yes or no",
    "<|ask|>x",
]
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "small": {"r": 1, "lora_alpha": 3},
    "medium": {"r": 5, "lora_alpha": 8, "use_rslora": True},
    "mixed": {"r": 4, "lora_alpha": 4, "rank_pattern": {"o_proj": 7}, "alpha_pattern": {r"layers\.1\..*": 9}},
    "activated": {"r": 3, "lora_alpha": 6, "alora_invocation_tokens": [3]},
    "activated-too": {"r": 6, "lora_alpha": 6, "alora_invocation_tokens": [3]},
}

Distributions = dict[tuple[str | None, int], torch.Tensor]  # (adapter, text) -> [vocab] probabilities


@dataclasses.dataclass(frozen=True)
class Case:
    """A base with its adapters in `folder`, and what PEFT answers."""

    folder: Path
    token_ids: Seq[Seq[int]]
    expected: Distributions

    def runner(self) -> ModelRunner:
        config = read_config(self.folder)
        return ModelRunner(load_model(config, self.folder, torch.float32, torch.device("cpu")))

    def adapters(self) -> dict[str, AdapterWeights]:
        layers, _ = read_layers(read_config(self.folder), self.folder)
        return {name: read_adapter(self.folder / name, layers) for name in ADAPTERS}

    def actual(
        self,
        token_ids: Seq[Seq[int]] | None = None,
        adapters: Mapping[str, AdapterWeights] | None = None,
        together: bool = True,
    ) -> Distributions:
        """All texts under all adapters and the base, in one batch or one by one."""
        runner = self.runner()
        adapters = adapters or self.adapters()
        slots: dict[str | None, int] = {None: NO_ADAPTER}
        for slot, (name, weights) in enumerate(adapters.items()):
            runner.model.set_slot(slot, weights)
            slots[name] = slot
        every_token = tuple(Target(position=-1, token_id=i) for i in range(tiny.VOCAB_SIZE))
        keys, sequences = [], []
        for text, ids in enumerate(token_ids or self.token_ids):  # texts outermost: adapters alternate in the batch
            for key, slot in slots.items():
                keys.append((key, text))
                invocation = adapters[key].invocation_tokens if key is not None else None
                activation = last_match(ids, invocation) if invocation is not None else 0
                assert activation is not None
                sequences.append(
                    Sequence(
                        token_ids=tuple(ids),
                        slot=slot,
                        kv_id=BASE_KV if key is None else bytes.fromhex(adapters[key].kv_id),
                        activation=activation,
                        targets=every_token,
                    )
                )
        for request in [sequences] if together else [[sequence] for sequence in sequences]:
            EngineRequest(request)
        batches = [sequences] if together else [[sequence] for sequence in sequences]
        outcomes = [pair for batch in batches for pair in runner.run(Step.of(batch))]
        outputs = {id(sequence): outcome for sequence, outcome in outcomes if isinstance(outcome, SequenceOutput)}
        return {
            key: torch.tensor(outputs[id(sequence)].log_probs).exp()
            for key, sequence in zip(keys, sequences, strict=True)
        }


def difference(actual: Distributions, expected: Distributions) -> float:
    return max((actual[key] - expected[key]).abs().max().item() for key in expected)


@torch.inference_mode()
def ask_peft(folder: Path, token_ids: Seq[Seq[int]]) -> Distributions:
    """Eager attention, because sdpa ignores soft-capping."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    answers: Distributions = {}

    def ask(name: str | None, run: torch.nn.Module) -> None:
        for text, ids in enumerate(token_ids):
            answers[name, text] = run(input_ids=torch.tensor([list(ids)])).logits[0, -1].softmax(-1)

    ask(None, model)
    names = list(ADAPTERS)
    peft = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        peft.load_adapter(folder / name, adapter_name=name)
    for name in names:
        peft.set_adapter(name)
        ask(name, peft.eval())
    return answers


@pytest.fixture(scope="module", params=[*tiny.FAMILIES, "llama-metaspace"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, _, metaspace = request.param.partition("-meta")
    return make_case(tmp_path_factory.mktemp(request.param), family, bool(metaspace))


def make_case(folder: Path, family: str, metaspace: bool = False) -> Case:
    tokenizer = tiny.metaspace_tokenizer() if metaspace else tiny.byte_level_tokenizer()
    tiny.save_base(folder, tiny.FAMILIES[family], tokenizer)
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        tiny.save_adapter(folder, folder / name, seed=seed, **config)
    token_ids = AutoTokenizer.from_pretrained(folder)(TEXTS)["input_ids"]
    return Case(folder, token_ids, ask_peft(folder, token_ids))


def test_batch_of_mixed_adapters_equals_peft(case: Case) -> None:
    actual = case.actual()
    assert difference(actual, case.expected) <= TOLERANCE
    assert all(actual[key].argmax() == expected.argmax() for key, expected in case.expected.items())


def test_batch_of_n_equals_n_batches_of_one(case: Case) -> None:
    assert difference(case.actual(together=False), case.actual()) <= TOLERANCE


def test_what_is_shared_is_computed_once(case: Case) -> None:
    """The base's and both activated adapters' tokens before the invocation are the same."""
    runner, adapter = case.runner(), case.adapters()["activated"]
    ids = tuple(case.token_ids[1])
    activation = last_match(ids, adapter.invocation_tokens or ())
    assert activation is not None and activation > 20
    step = Step()
    sequences = [
        Sequence(token_ids=ids, slot=slot, kv_id=bytes([slot + 1] * 32), activation=activation) for slot in (0, 1)
    ]
    sequences.append(Sequence(token_ids=ids, slot=NO_ADAPTER))
    EngineRequest(sequences)
    for sequence in sequences:
        step.add(Placed(sequence, len(ids)))
    assert step.num_tokens == activation + 3 * (len(ids) - activation)
    assert all(isinstance(outcome, SequenceOutput) for _, outcome in runner.run(step))


def test_the_case_can_fail(case: Case) -> None:
    """Answers are peaked, and every adapter changes them."""
    peaks = torch.stack([distribution.max() for distribution in case.expected.values()])
    assert peaks.median() > 0.2
    for name in ADAPTERS:
        changed = max((case.expected[name, text] - case.expected[None, text]).abs().max() for text in range(len(TEXTS)))
        assert changed > 0.1


# ------------------------------------------------------------------------------- each feature, switched off


def test_without_scaling_it_fails(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama")
    unscaled = {
        name: dataclasses.replace(
            adapter,
            modules={path: dataclasses.replace(lora, scaling=1.0) for path, lora in adapter.modules.items()},
        )
        for name, adapter in case.adapters().items()
    }
    assert difference(case.actual(adapters=unscaled), case.expected) > 100 * TOLERANCE


def test_with_ranks_cut_to_the_smallest_it_fails(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama")
    cut = {
        name: dataclasses.replace(
            adapter,
            modules={
                path: dataclasses.replace(lora, lora_A=lora.lora_A[:1], lora_B=lora.lora_B[:, :1])
                for path, lora in adapter.modules.items()
            },
        )
        for name, adapter in case.adapters().items()
    }
    assert difference(case.actual(adapters=cut), case.expected) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "feature"), [("gemma2", "softcap"), ("mistral-window", "window"), ("gemma3", "window")]
)
def test_without_the_attention_feature_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, feature: str
) -> None:
    case = make_case(tmp_path, family)

    def without(*args: Any, **kwargs: Any) -> torch.Tensor:
        return ops_attention.packed_attention(*args, **(kwargs | {feature: None}))

    for module in (decoder, hooked):
        monkeypatch.setattr(module, "packed_attention", without)
    if family.startswith("gemma"):  # such a model is compared with transformers' attention when it is loaded
        with pytest.raises(UnsupportedModelError, match="log probabilities with packed attention differ"):
            case.runner()
        monkeypatch.setattr(hooked, "_distance", lambda some, others: 0.0)
    assert difference(case.actual(), case.expected) > 100 * TOLERANCE


def test_with_the_activation_a_token_late_it_fails(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama")
    late = {
        name: dataclasses.replace(adapter, invocation_tokens=None if adapter.invocation_tokens is None else (31,))
        for name, adapter in case.adapters().items()
    }
    moved = [[31 if token == 3 else token for token in ids] for ids in case.token_ids]
    actual = case.actual(token_ids=moved, adapters=late)
    assert difference(actual, ask_peft(tmp_path, moved)) > 100 * TOLERANCE


def test_without_the_bos_it_fails(tmp_path: Path) -> None:
    case = make_case(tmp_path, "llama", metaspace=True)
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.encode(text) for text in TEXTS] == case.token_ids
    bare = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert bare != case.token_ids
    assert difference(case.actual(token_ids=bare), case.expected) > 100 * TOLERANCE


def test_without_separate_texts_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(tmp_path, "llama")

    def across(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Layout, **kwargs: Any) -> torch.Tensor:
        layout = layout_of((Span(start=0, end=len(query)),), Staging(query.device))
        return ops_attention.packed_attention(query, key, value, layout, **kwargs)

    monkeypatch.setattr(decoder, "packed_attention", across)
    assert difference(case.actual(), case.expected) > 100 * TOLERANCE
