"""Greedy tokens and their log probabilities equal PEFT's, whoever else is in the batch; sampling is seeded."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from checks import check_pool
from loraplex import Loraplex
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.sequence import EngineRequest, Sequence
from loraplex.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    UnknownClassifierError,
)
from loraplex.generation import GenerateRequest, GenerateResult
from loraplex.service.computing import Computing

NUM_TOKENS = 40  # past two block boundaries, whatever the prompt's length
PROMPTS = [
    "Customer: hi<|ask|>Is it done?",
    "Customer: hello, I would like to book a table for two\nAgent: at what time?\nCustomer: at seven<|ask|>done?",
]
ADAPTERS: tuple[str | None, ...] = (
    None,
    "plain",
    "verbatim",
    "active1",
)  # the base, a plain adapter and two activated ones

Answers = dict[tuple[str | None, str], list[tuple[int, float]]]  # (adapter, prompt) -> tokens, log probabilities


@pytest.fixture(scope="module", params=["mistral", "mistral-window", "gemma2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("generate") / "bundle", tiny.FAMILIES[request.param])


@pytest.fixture(scope="module", params=["roomy", "tight"])
def loraplex(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Loraplex]:
    """With blocks for all, and with steps so small that prompts run in chunks and sequences wait for each other."""
    engine: dict[str, Any] = {"max_step_tokens": 24, "kv_cache": "60KiB"} if request.param == "tight" else {}
    with Loraplex.load(bundle, dtype="float32", **engine) as loraplex:
        yield loraplex


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Answers:
    """PEFT's greedy tokens with their log probabilities."""
    model = AutoModelForCausalLM.from_pretrained(bundle, attn_implementation="eager", dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(model, bundle / "plain", adapter_name="plain")
    for other in ("verbatim", "active1"):
        peft.load_adapter(bundle / other, adapter_name=other)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    answers: Answers = {}
    for name in ADAPTERS:
        if name is not None:
            peft.set_adapter(name)
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with nullcontext() if name is not None else peft.disable_adapter(), torch.inference_mode():
                answer = peft.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=NUM_TOKENS,
                    do_sample=False,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            log_probs = torch.cat(answer.logits).log_softmax(-1)
            found = [(int(row.argmax()), row.max().item()) for row in log_probs]
            answers[name, prompt] = found
    return answers


def generate_all(loraplex: Loraplex, *requests: GenerateRequest) -> list[GenerateResult]:
    """At the same time."""

    async def all_of_them() -> list[GenerateResult]:
        return await asyncio.gather(*(loraplex.service.generate(request) for request in requests))

    return loraplex.run(all_of_them())


def test_greedy_equals_peft(loraplex: Loraplex, expected: Answers) -> None:
    requests = [
        GenerateRequest(prompt=prompt, adapter=name, max_tokens=NUM_TOKENS) for name in ADAPTERS for prompt in PROMPTS
    ]
    for request, result in zip(requests, generate_all(loraplex, *requests), strict=True):
        assert isinstance(request.prompt, str)
        tokens = expected[request.adapter, request.prompt]
        assert [token.id for token in result.tokens] == [token_id for token_id, _ in tokens]
        assert [t.log_prob for t in result.tokens] == pytest.approx([log_prob for _, log_prob in tokens], abs=1e-3)
        assert result.finish_reason == ("length" if len(tokens) == NUM_TOKENS else "stop")
    check_pool(loraplex)


def test_the_case_can_fail(expected: Answers) -> None:
    """Every adapter says something of its own, and not one token again and again."""
    said = [tuple(token_id for token_id, _ in tokens) for tokens in expected.values()]
    assert len(set(said)) == len(said)
    assert sum(len(set(tokens)) > 5 for tokens in said) > len(said) // 2


def test_the_same_seed_draws_the_same_whoever_is_beside_it(loraplex: Loraplex) -> None:
    def request(seed: int, adapter: str | None = "plain") -> GenerateRequest:
        return GenerateRequest(prompt=PROMPTS[0], adapter=adapter, max_tokens=12, temperature=1.5, seed=seed)

    [alone] = generate_all(loraplex, request(1))
    beside = generate_all(loraplex, request(2), request(3, None), request(1), request(1, "active1"))
    assert [token.id for token in beside[2].tokens] == [token.id for token in alone.tokens]
    assert beside[0].tokens != alone.tokens


def test_the_next_call_finds_what_was_generated(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        first = loraplex.generate(PROMPTS[1], "plain", max_tokens=30)
        again = loraplex.generate(PROMPTS[1] + first.text, "plain", max_tokens=2)
        assert again.usage.cached_tokens >= first.usage.prompt_tokens // 16 * 16


def test_text_ends_with_the_bases_stop_token_which_is_not_part_of_it(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        results = [loraplex.generate(PROMPTS[0], max_tokens=200, temperature=3.0, seed=seed) for seed in range(6)]
    stopped = [result for result in results if result.finish_reason == "stop"]
    assert stopped, "none of them came to an end"
    for result in stopped:
        assert result.tokens[-1].id == 1 and 1 not in [token.id for token in result.tokens[:-1]]
        assert "</s>" not in result.text


def test_generates_up_to_what_the_base_takes(loraplex: Loraplex) -> None:
    result = loraplex.generate(PROMPTS[0], max_tokens=10_000)
    if result.finish_reason == "length":
        assert result.usage.prompt_tokens + len(result.tokens) == 256 + 1


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0)]
)
def test_a_wrong_parameter_is_named(loraplex: Loraplex, field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        loraplex.generate("hello", None, **{field: value})


def test_an_unknown_adapter_is_not_the_base(loraplex: Loraplex) -> None:
    with pytest.raises(UnknownClassifierError):
        loraplex.generate("hello", "nobody")


def test_a_deadline_ends_it_and_gives_its_blocks_back(loraplex: Loraplex) -> None:
    with pytest.raises(DeadlineExceededError):
        loraplex.generate(PROMPTS[1], "plain", max_tokens=180, temperature=2.0, seed=0, deadline_ms=15)
    check_pool(loraplex)


def test_who_is_late_is_not_told_that_it_left() -> None:
    """Giving up cancels the request, which the engine may see at once."""

    class Engine:
        max_step_tokens = 100

        def submit(self, request: EngineRequest) -> None:
            [sequence] = request.sequences
            left = CancelledError("the client left", remedy="none")
            request.future.add_done_callback(lambda _: request.resolve(sequence, left))

    async def ask() -> None:
        engine: Any = Engine()
        computing = Computing(engine, max_queue=1, max_queue_tokens=None)
        sequence = Sequence(token_ids=(1, 2), slot=NO_ADAPTER)
        [outcome] = await computing.compute(EngineRequest([sequence], deadline_s=time.monotonic() + 0.01))
        assert isinstance(outcome, DeadlineExceededError)
        assert sequence.request.future.cancelled()

    asyncio.run(ask())
