"""Top log probabilities equal PEFT's; text ends where it should; what restricts the choice leaves the numbers alone."""

import asyncio
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
from loraplex.errors import InputTooLongError, InvalidRequestError
from loraplex.generation import GeneratedToken, GenerateRequest, GenerateResult
from loraplex.types import Message

NUM_TOP = 20
PROMPTS = ["Customer: hi<|ask|>Is it done?", "Customer: hello, a table for two\nAgent: at what time?<|ask|>done?"]
ADAPTERS: tuple[str | None, ...] = (None, "plain", "verbatim", "active1")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if shout is defined and shout %}!{% endif %}<|ask|>"
)


@pytest.fixture(scope="module", params=["mistral", "gemma2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save_shared_bundle(tmp_path_factory.mktemp("completion") / "bundle", tiny.FAMILIES[request.param])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def loraplex(bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        yield loraplex


@pytest.fixture(scope="module")
def peft(bundle: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(bundle, attn_implementation="eager", dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(model, bundle / "plain", adapter_name="plain")
    for other in ("verbatim", "active1"):
        peft.load_adapter(bundle / other, adapter_name=other)
    return peft.eval()


def log_probs_of(peft: Any, adapter: str | None, ids: list[int], num_generated: int) -> torch.Tensor:
    """[num_generated, vocab], for the tokens that `ids` end with."""
    if adapter is not None:
        peft.set_adapter(adapter)
    # An activated adapter must find its invocation tokens in every forward pass; generate takes care of that.
    with nullcontext() if adapter is not None else peft.disable_adapter(), torch.inference_mode():
        prompt = torch.tensor([ids[: len(ids) - num_generated]])
        answer = peft.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_generated,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert answer.sequences[0].tolist() == ids
    return torch.cat(answer.logits).log_softmax(-1)


def generate_all(loraplex: Loraplex, *requests: GenerateRequest) -> list[GenerateResult]:
    """At the same time."""

    async def all_of_them() -> list[GenerateResult]:
        return await asyncio.gather(*(loraplex.service.generate(request) for request in requests))

    return loraplex.run(all_of_them())


def streamed(loraplex: Loraplex, request: GenerateRequest) -> tuple[GenerateResult, list[tuple[GeneratedToken, str]]]:
    told: list[tuple[GeneratedToken, str]] = []

    async def stream() -> GenerateResult:
        return await loraplex.service.generate(request, lambda token, text: told.append((token, text)))

    return loraplex.run(stream()), told


def test_top_log_probabilities_equal_pefts(loraplex: Loraplex, bundle: Path, peft: Any) -> None:
    """Of each token of several, whoever else is in the batch and whatever they ask for."""
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    nums = [NUM_TOP, 5, 0, 1]
    requests = [
        GenerateRequest(prompt=prompt, adapter=adapter, max_tokens=6, num_top=num)
        for adapter, num in zip(ADAPTERS, nums, strict=True)
        for prompt in PROMPTS
    ]
    for request, result in zip(requests, generate_all(loraplex, *requests), strict=True):
        assert isinstance(request.prompt, str)
        ids = [*tokenizer(request.prompt)["input_ids"], *(token.id for token in result.tokens)]
        expected = log_probs_of(peft, request.adapter, ids, len(result.tokens))
        for token, row in zip(result.tokens, expected, strict=True):
            assert len(token.top) == request.num_top
            values, best = row.topk(NUM_TOP)
            assert [one.log_prob for one in token.top] == pytest.approx(values[: request.num_top].tolist(), abs=1e-3)
            assert [row[one.id].item() for one in token.top] == pytest.approx(
                values[: request.num_top].tolist(), abs=1e-3
            )
            assert token.log_prob == pytest.approx(row[token.id].item(), abs=1e-3)
            if request.num_top:
                assert token.top[0].id == token.id == best[0]
                assert all(one.text == tokenizer.decode([one.id]) for one in token.top)


def test_drawn_tokens_have_the_models_own_log_probabilities(loraplex: Loraplex) -> None:
    greedy = loraplex.generate(PROMPTS[0], "plain", num_top=NUM_TOP)
    log_probs = {one.id: one.log_prob for one in greedy.tokens[0].top}
    drawn = [loraplex.generate(PROMPTS[0], "plain", num_top=2, temperature=3.0, seed=seed) for seed in range(20)]
    found = {result.tokens[0].id: result.tokens[0].log_prob for result in drawn}
    assert len(found) > 3
    for token_id in found.keys() & log_probs.keys():
        assert found[token_id] == pytest.approx(log_probs[token_id], abs=1e-5)


def test_only_allowed_tokens_are_chosen_by_their_likelihood(loraplex: Loraplex) -> None:
    top = loraplex.generate(PROMPTS[0], "plain", num_top=NUM_TOP).tokens[0].top
    allowed = (top[9].id, top[4].id, top[14].id)
    sampling: dict[str, Any] = {"allowed_token_ids": allowed, "num_top": 1}
    [token] = loraplex.generate(PROMPTS[0], "plain", **sampling).tokens
    assert token.id == top[4].id and token.log_prob == pytest.approx(top[4].log_prob, abs=1e-5)
    assert token.top[0].id == top[0].id
    drawn = [loraplex.generate(PROMPTS[0], "plain", temperature=5.0, seed=i, **sampling) for i in range(20)]
    assert {result.tokens[0].id for result in drawn} == set(allowed)
    text = loraplex.generate(PROMPTS[0], "plain", max_tokens=10, allowed_token_ids=allowed)
    assert {token.id for token in text.tokens} <= set(allowed) and len(text.tokens) == 10


def test_a_bias_moves_the_choice(loraplex: Loraplex) -> None:
    top = loraplex.generate(PROMPTS[0], "plain", num_top=NUM_TOP).tokens[0].top
    gap = top[0].log_prob - top[3].log_prob
    for bias, expected in ((gap - 0.01, top[0]), (gap + 0.01, top[3])):
        [token] = loraplex.generate(PROMPTS[0], "plain", logit_bias={top[3].id: bias}).tokens
        assert token.id == expected.id and token.log_prob == pytest.approx(expected.log_prob, abs=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_text_ends_before_the_first_stop_string(loraplex: Loraplex, adapter: str | None) -> None:
    """Wherever in a token it begins: cut out of what is generated without it."""
    request: dict[str, Any] = {"adapter": adapter, "max_tokens": 24, "temperature": 1.5, "seed": 3}
    whole = loraplex.generate(PROMPTS[1], **request)
    # A stop string ends at the first token by which it is complete, so those are looked for that come once.
    places = [
        (start, stop)
        for start in range(len(whole.text) - 3)
        for stop in [whole.text[start : start + 3]]
        if whole.text.find(stop) == start and "\ufffd" not in stop
    ]
    assert len(places) > 5
    for start, stop in places[:: len(places) // 5]:
        result = loraplex.generate(PROMPTS[1], stop=("never said", stop), **request)
        assert (result.text, result.finish_reason) == (whole.text[:start], "stop")
        tokens = [token.id for token in result.tokens]
        assert tokens == [token.id for token in whole.tokens][: len(tokens)]
        assert len(tokens) == sum(token.offset < start + len(stop) for token in whole.tokens)
    assert loraplex.generate(PROMPTS[1], stop=("never said",), **request).text == whole.text
    check_pool(loraplex)


def test_streamed_pieces_are_the_text_and_the_tokens(loraplex: Loraplex) -> None:
    for seed in range(5):
        request = GenerateRequest(
            prompt=PROMPTS[1], adapter="plain", max_tokens=20, temperature=2.0, seed=seed, num_top=2, stop=("a", "\n")
        )
        result, told = streamed(loraplex, request)
        [alone] = generate_all(loraplex, request)
        assert (result.text, result.tokens, result.finish_reason) == (alone.text, alone.tokens, alone.finish_reason)
        assert "".join(text for _, text in told) == result.text
        assert tuple(token for token, _ in told) == result.tokens
        assert "a" not in result.text and "\n" not in result.text


def test_token_ids_are_taken_as_they_are(loraplex: Loraplex, bundle: Path) -> None:
    ids = tuple(AutoTokenizer.from_pretrained(bundle)(PROMPTS[0])["input_ids"])
    for adapter in ADAPTERS:
        by_text, by_ids = generate_all(
            loraplex,
            *(GenerateRequest(prompt=one, adapter=adapter, max_tokens=4, num_top=3) for one in (PROMPTS[0], ids)),
        )
        assert [token.id for token in by_ids.tokens] == [token.id for token in by_text.tokens]
        assert by_ids.text == by_text.text and by_ids.usage.prompt_tokens == len(ids)
    other = generate_all(loraplex, GenerateRequest(prompt=ids[:-1], num_top=1))
    assert other[0].tokens != by_text.tokens


@pytest.mark.parametrize("adapter", [None, "verbatim"])
def test_messages_go_through_the_bases_chat_template(loraplex: Loraplex, bundle: Path, adapter: str | None) -> None:
    """As the tokenizer applies it, with special tokens in the messages kept as text."""
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    messages = (Message(role="system", content="be brief"), Message(role="user", content="is it done?"))
    plain: Any = [{"role": one.role, "content": one.content} for one in messages]
    several: Any = ({}, {"shout": True})
    for options in several:
        ids: Any = tokenizer.apply_chat_template(
            plain, tokenize=True, return_dict=True, add_generation_prompt=True, **options
        )
        by_chat, by_ids = generate_all(
            loraplex,
            GenerateRequest(prompt=messages, adapter=adapter, num_top=3, chat_template_kwargs=options),
            GenerateRequest(prompt=tuple(ids["input_ids"]), adapter=adapter, num_top=3),
        )
        [one], [other] = by_chat.tokens, by_ids.tokens
        assert [likely.id for likely in one.top] == [likely.id for likely in other.top]
        log_probs = [likely.log_prob for likely in other.top]
        assert [likely.log_prob for likely in one.top] == pytest.approx(log_probs, abs=1e-4)
        assert by_chat.usage.prompt_tokens == len(ids["input_ids"])
        assert by_chat.warnings == ()
    spelling = (Message(role="user", content="</s><|ask|>"),)
    [escaped] = generate_all(loraplex, GenerateRequest(prompt=spelling, adapter=adapter))
    assert "'<|ask|>'" in escaped.warnings[0]


def test_messages_go_through_an_adapters_contract(loraplex: Loraplex, bundle: Path) -> None:
    messages = (Message(role="user", content="hi"), Message(role="assistant", content="hello"))
    rendered = "Customer: hi\nAgent: hello<|ask|>Is it done?\n"
    by_contract, by_text = generate_all(
        loraplex,
        GenerateRequest(prompt=messages, adapter="plain", num_top=3),
        GenerateRequest(prompt=rendered, adapter="plain", num_top=3),
    )
    assert [token.id for token in by_contract.tokens] == [token.id for token in by_text.tokens]
    label = loraplex.classify([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "plain")
    assert label["plain"].scores


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"prompt": (1, 2, 5000)}, "the token 5000"),
        ({"prompt": (-1,)}, "the token -1"),
        ({"prompt": ()}, "empty"),
        ({"prompt": "x", "logit_bias": {320: 1.0}}, "320"),
        ({"prompt": "x", "logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"prompt": "x", "logit_bias": {3: 101.0}}, "logit_bias"),
        ({"prompt": "x", "allowed_token_ids": (3, 320)}, "320"),
        ({"prompt": "x", "num_top": 21}, "num_top"),
        ({"prompt": "x", "stop": ("",)}, "stop"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": (Message(role="nobody", content="x"),), "adapter": "plain"}, "nobody"),
        ({"prompt": (Message(role="user", content="x"),), "chat_template_kwargs": {"chat_template": "x"}}, "chat_temp"),
        (
            {"prompt": (Message(role="user", content="x"),), "adapter": "plain", "chat_template_kwargs": {"a": 1}},
            "contract",
        ),
    ],
)
def test_a_wrong_request_is_refused(loraplex: Loraplex, fields: Any, mentions: str) -> None:
    with pytest.raises(InvalidRequestError, match=mentions):
        generate_all(loraplex, GenerateRequest(**fields))


def test_too_many_token_ids_are_refused(loraplex: Loraplex) -> None:
    with pytest.raises(InputTooLongError):
        generate_all(loraplex, GenerateRequest(prompt=(5,) * 300))
