"""The real openai client against a real server: what works with OpenAI or vLLM works here, or is refused by name."""

import json
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer, MistralConfig

import serving
import tiny

PROMPT = "Customer: hello, is my payment done?<|ask|>"
MESSAGES: Any = [{"role": "user", "content": "hello, I would like to book a table for two"}]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}<|ask|>"
FOR_EVER = 7000  # tokens, which take far longer than any test waits


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a chat template that takes long texts; `task0` has a contract, `verbatim` has none."""
    config = MistralConfig.from_dict(tiny.FAMILIES["mistral"].to_dict() | {"max_position_embeddings": 8192})
    folder = tiny.save_bundle(tmp_path_factory.mktemp("openai") / "bundle", 1, config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(bundle, "--dtype", "float32") as server:
        yield server


def client_of(server: serving.Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(server: serving.Server) -> Iterator[OpenAI]:
    with client_of(server) as client:
        yield client


@pytest.fixture
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as http:
        yield http


def letters(bundle: Path) -> list[int]:
    """Tokens of which none ends a text."""
    ids: list[int] = AutoTokenizer.from_pretrained(bundle)("abc", add_special_tokens=False)["input_ids"]
    return ids


def sample(http: httpx.Client, name: str, *labels: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    found = {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}
    return found.get((name, *labels), 0.0)


# ------------------------------------------------------------------------------------------------- completions


@pytest.mark.parametrize("model", ["verbatim", "task0", "bundle"])
def test_a_classification_script_written_for_vllm(client: OpenAI, http: httpx.Client, model: str) -> None:
    response = client.completions.create(model=model, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=5)
    [choice] = response.choices
    assert choice.logprobs is not None and choice.logprobs.top_logprobs is not None
    [top] = choice.logprobs.top_logprobs
    probabilities = {token: math.exp(log_prob) for token, log_prob in top.items()}
    label = max(probabilities, key=probabilities.__getitem__)

    adapter = {} if model == "bundle" else {"adapter_name": model, "raw": True}
    [expected] = http.post("/invocations", json={"input_text": PROMPT, **adapter}).json()
    assert label == expected["predicted_text"] == choice.text
    assert probabilities[label] == pytest.approx(expected["confidence_score"], abs=1e-5)
    assert list(top.values()) == sorted(top.values(), reverse=True)
    assert len(top) == 5 or (len(top) == 4 and "\ufffd" in top)  # a name for all that are no whole characters
    assert choice.logprobs.tokens == [label] and choice.logprobs.token_logprobs == [top[label]]
    assert choice.logprobs.text_offset == [0]
    assert (response.object, response.model, choice.index, choice.finish_reason) == (
        "text_completion",
        model,
        0,
        "length",
    )
    assert response.id.startswith("cmpl-") and abs(response.created - time.time()) < 60
    version = None if model == "bundle" else http.get(f"/v1/adapters/{model}").json()["version"]
    assert response.system_fingerprint == version
    assert response.usage is not None
    assert (response.usage.completion_tokens, response.usage.total_tokens) == (1, response.usage.prompt_tokens + 1)


def test_every_model_that_is_listed_answers(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["bundle", "task0", "verbatim"]
    assert [client.models.retrieve(name).id for name in names] == names
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    answers = {
        name: client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0) for name in names
    }
    assert len({answer.choices[0].text for answer in answers.values()}) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_404_and_never_the_base(client: OpenAI, stream: bool) -> None:
    for name in ("nope", "", "Bundle"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=name, prompt=PROMPT, stream=stream)
        assert caught.value.code == "unknown_classifier" and "remedy" in str(caught.value.body)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=name, messages=MESSAGES, stream=stream)


def test_a_route_is_a_model(client: OpenAI, http: httpx.Client) -> None:
    assert http.put("/v1/routes/done", json={"targets": {"verbatim": 1}}).status_code == 200
    try:
        by_route, by_name = (
            client.completions.create(model=name, prompt=PROMPT, max_tokens=4, temperature=0)
            for name in ("done", "verbatim")
        )
        assert by_route.choices == by_name.choices and by_route.model == "done"
        assert by_route.system_fingerprint == by_name.system_fingerprint
    finally:
        http.delete("/v1/routes/done")


def test_several_prompts_and_choices_have_their_indexes(client: OpenAI) -> None:
    prompts = [PROMPT, "Customer: no\n", "Agent: yes"]
    sampling: Any = {"model": "verbatim", "max_tokens": 6, "temperature": 1.5, "seed": 7}
    alone = [client.completions.create(prompt=prompt, n=2, **sampling) for prompt in prompts]
    together = client.completions.create(prompt=prompts, n=2, **sampling)
    assert [choice.index for choice in together.choices] == list(range(6))
    assert [one.text for one in together.choices] == [choice.text for one in alone for choice in one.choices]
    assert len({choice.text for choice in together.choices}) > 3  # the choices of a prompt draw differently
    assert together.usage is not None
    assert together.usage.prompt_tokens == sum(one.usage.prompt_tokens for one in alone if one.usage)
    assert together.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone if one.usage)
    [third] = client.completions.create(prompt=prompts[2], **(sampling | {"seed": 8})).choices
    assert third.text == together.choices[5].text


def test_token_ids_are_a_prompt_and_lists_of_them_are_several(client: OpenAI, bundle: Path) -> None:
    encode = AutoTokenizer.from_pretrained(bundle)
    prompts = [PROMPT, "Customer: no\n"]
    ids = [encode(prompt)["input_ids"] for prompt in prompts]
    sampling: Any = {"model": "task0", "max_tokens": 5, "temperature": 0}
    by_text = client.completions.create(prompt=prompts, **sampling)
    by_ids = client.completions.create(prompt=ids, **sampling)
    [one] = client.completions.create(prompt=ids[0], **sampling).choices
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in by_text.choices]
    assert one.text == by_text.choices[0].text


def test_text_ends_before_a_stop_string(client: OpenAI) -> None:
    sampling: Any = {"model": "verbatim", "prompt": PROMPT, "max_tokens": 40, "temperature": 2.0, "seed": 5}
    [whole] = client.completions.create(**sampling).choices
    at = next(i for i in range(5, 40) if whole.text.find(whole.text[i : i + 2]) == i)
    stop = whole.text[at : at + 2]
    for given in (stop, ["never said", stop], [stop, "never said", "nor this", "nor that"]):
        [cut] = client.completions.create(stop=given, **sampling).choices
        assert (cut.text, cut.finish_reason) == (whole.text[:at], "stop")


def test_the_usage_counts_what_the_cache_held(client: OpenAI) -> None:
    prompt = "Customer: I would like to know what a cache is, is it done? yes or no, thanks\nAgent: yes\n" + PROMPT
    before, after = (
        client.completions.create(model="verbatim", prompt=prompt, max_tokens=2, temperature=0) for _ in range(2)
    )
    assert before.usage is not None and before.usage.prompt_tokens_details is not None
    assert after.usage is not None and after.usage.prompt_tokens_details is not None
    assert before.usage.prompt_tokens_details.cached_tokens == 0
    cached = after.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and 16 <= cached < after.usage.prompt_tokens == before.usage.prompt_tokens
    several = client.completions.create(model="verbatim", prompt=[prompt + " ok" * 20] * 2, n=3, max_tokens=2)
    assert several.usage is not None and several.usage.prompt_tokens > 2 * before.usage.prompt_tokens


def test_a_conversation_is_kept_for_its_next_turn(client: OpenAI) -> None:
    prompt = "Customer: this is a conversation of which something is kept, if it is named\nAgent: yes\n"
    cached = []
    for conversation_id in (None, None, "c1", "c1"):
        response = client.completions.create(
            model="verbatim", prompt=prompt, max_tokens=1, extra_body={"conversation_id": conversation_id}
        )
        assert response.usage is not None and response.usage.prompt_tokens_details is not None
        cached.append(response.usage.prompt_tokens_details.cached_tokens)
    assert cached[:3] == [0, 0, 0] and cached[3]


def test_vllms_extras_for_classification(client: OpenAI, bundle: Path) -> None:
    encode = AutoTokenizer.from_pretrained(bundle)
    yes, no = (encode(one, add_special_tokens=False)["input_ids"][0] for one in ("yes", "no"))

    def ask(**extra: Any) -> Any:
        [choice] = client.completions.create(
            model="verbatim", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=20, **extra
        ).choices
        return choice

    free = ask()
    restricted = ask(extra_body={"allowed_token_ids": [yes, no]})
    biased = ask(logit_bias={str(yes): 100, str(no): 100})
    assert free.text not in ("yes", "no")
    assert restricted.text == biased.text and restricted.text in (encode.decode([yes]), encode.decode([no]))
    assert restricted.logprobs.token_logprobs == pytest.approx(biased.logprobs.token_logprobs, abs=1e-5)
    top = dict(restricted.logprobs.top_logprobs[0])
    assert top.pop(restricted.text) == restricted.logprobs.token_logprobs[0]
    assert set(free.logprobs.top_logprobs[0]) <= {*top, restricted.text}
    named = ask(extra_body={"return_tokens_as_token_ids": True})
    [name] = named.logprobs.tokens
    assert encode.decode([int(name.removeprefix("token_id:"))]) == free.text


def test_special_tokens_are_left_out_of_the_text_unless_asked_for(client: OpenAI, bundle: Path) -> None:
    ask_id = tiny.SPECIAL_TOKENS.index("<|ask|>")
    for skip, expected in ((None, ""), (True, ""), (False, "<|ask|>" * 3)):
        extra = {"allowed_token_ids": [ask_id], "skip_special_tokens": skip}
        [choice] = client.completions.create(
            model="verbatim", prompt=PROMPT, max_tokens=3, logprobs=0, extra_body=extra
        ).choices
        assert choice.text == expected
        assert choice.logprobs is not None and choice.logprobs.tokens == ["<|ask|>"] * 3
        assert choice.logprobs.text_offset == ([0, 7, 14] if skip is False else [0, 0, 0])


def test_the_prompts_own_log_probabilities(client: OpenAI, bundle: Path) -> None:
    """`echo`, as lm-eval asks for them: those of the prompt, then those of the answer."""
    encode = AutoTokenizer.from_pretrained(bundle)
    ids = encode(PROMPT)["input_ids"]
    sampling: Any = {"model": "verbatim", "temperature": 0, "logprobs": 1}
    [whole] = client.completions.create(prompt=PROMPT, max_tokens=2, echo=True, **sampling).choices
    [answer] = client.completions.create(prompt=PROMPT, max_tokens=2, **sampling).choices
    assert whole.text == PROMPT + answer.text and whole.finish_reason == answer.finish_reason
    assert whole.logprobs is not None and answer.logprobs is not None
    tokens, log_probs, top, offsets = (
        getattr(whole.logprobs, name) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    )
    assert {len(one) for one in (tokens, log_probs, top, offsets)} == {len(ids) + 2}
    assert tokens == [encode.decode([one]) for one in ids] + (answer.logprobs.tokens or [])
    assert log_probs[0] is None and top[0] is None
    assert log_probs[-2:] == pytest.approx(answer.logprobs.token_logprobs, abs=1e-5)
    assert offsets[-2:] == [len(PROMPT) + one for one in answer.logprobs.text_offset or ()]
    for i in range(1, len(ids)):
        [expected] = client.completions.create(prompt=ids[:i], max_tokens=1, **sampling).choices
        assert expected.logprobs is not None and expected.logprobs.tokens is not None
        assert log_probs[i] <= max(top[i].values()) and log_probs[i] == top[i][tokens[i]]
        assert top[i][expected.logprobs.tokens[0]] == max(top[i].values())
        assert PROMPT[offsets[i] :].startswith(tokens[i])
    several = client.completions.create(prompt=[ids, ids[:5]], max_tokens=0, n=2, echo=True, **sampling)
    assert [one.text for one in several.choices] == [PROMPT] * 2 + [encode.decode(ids[:5])] * 2
    assert several.usage is not None and several.usage.completion_tokens == 0
    for choice in several.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        found = choice.logprobs.token_logprobs
        assert found[1:] == pytest.approx(log_probs[1 : len(found)], abs=1e-4)
    [text] = client.completions.create(prompt=PROMPT, model="verbatim", max_tokens=0, echo=True).choices
    assert text.text == PROMPT and text.logprobs is None


def test_what_ends_a_text_can_be_chosen(client: OpenAI, bundle: Path) -> None:
    """guidellm sends `ignore_eos`, which goes on behind the end. A client's own token ends the text, too."""
    end, *others = tiny.SPECIAL_TOKENS.index("</s>"), *letters(bundle)
    sampling: Any = {"model": "verbatim", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 0}

    def ask(**extra: Any) -> tuple[int, str]:
        [choice] = client.completions.create(**sampling, extra_body=extra).choices
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        return len(choice.logprobs.tokens), choice.finish_reason

    both = {"allowed_token_ids": [end, others[0]], "logit_bias": {str(end): 100}}
    assert ask(**both) == (1, "stop")
    assert ask(**both, ignore_eos=True) == (12, "length")
    assert ask(**both, min_tokens=5) == (6, "stop")
    assert ask(**both, min_tokens=12) == (12, "length")
    assert ask(allowed_token_ids=others[:1]) == (12, "length")
    assert ask(allowed_token_ids=others[:1], stop_token_ids=others) == (1, "stop")
    assert ask(**both, ignore_eos=True, stop_token_ids=[end], min_tokens=3) == (4, "stop")
    [text] = client.completions.create(
        **sampling, extra_body={"allowed_token_ids": others[:1], "stop_token_ids": others}
    ).choices
    assert text.text == ""


def test_the_number_of_tokens_has_two_names(client: OpenAI) -> None:
    for extra in ({"max_completion_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 3}):
        answer = client.completions.create(
            model="verbatim", prompt=PROMPT, temperature=0, extra_body={**extra, "ignore_eos": True}
        )
        assert answer.usage is not None and answer.usage.completion_tokens == 3


# ------------------------------------------------------------------------------------------------- chat


def test_special_tokens_beside_the_chat_templates(client: OpenAI, http: httpx.Client) -> None:
    sampling: Any = {"model": "bundle", "messages": MESSAGES, "max_tokens": 1}
    default, without, added = (
        client.chat.completions.create(**sampling, extra_body={"add_special_tokens": value}).usage
        for value in (None, False, True)
    )
    assert default is not None and without is not None and added is not None
    assert default.prompt_tokens == without.prompt_tokens == added.prompt_tokens  # this tokenizer adds none


@pytest.mark.parametrize("model", ["task0", "verbatim", "bundle"])
def test_chat_log_probabilities(client: OpenAI, model: str) -> None:
    """Through the contract's template or the base's: equal to the completion of the rendered text."""
    text = MESSAGES[0]["content"]
    rendered = {"task0": f"Customer: {text}<|ask|>Is it done?\n"}.get(model, f"user: {text}\n<|ask|>")
    sampling: Any = {"model": model, "max_tokens": 1, "temperature": 0}
    chat = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=5, **sampling)
    completion = client.completions.create(prompt=rendered, logprobs=5, **sampling)
    [choice], [expected] = chat.choices, completion.choices
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert expected.logprobs is not None and expected.logprobs.top_logprobs is not None
    [token] = choice.logprobs.content
    assert token.token == choice.message.content == expected.text
    assert token.bytes is None or bytes(token.bytes).decode(errors="replace") == token.token
    assert {one.token: one.logprob for one in token.top_logprobs} == pytest.approx(
        expected.logprobs.top_logprobs[0], abs=1e-5
    )
    assert [one.logprob for one in token.top_logprobs] == sorted((o.logprob for o in token.top_logprobs), reverse=True)
    assert (chat.object, choice.finish_reason, choice.message.role) == ("chat.completion", "length", "assistant")
    assert chat.usage is not None and completion.usage is not None
    assert chat.usage.prompt_tokens == completion.usage.prompt_tokens


def test_chat_answers_to_the_contexts_end_by_default(client: OpenAI) -> None:
    options: Any = {"model": "task0", "messages": MESSAGES, "seed": 1}
    [default] = client.chat.completions.create(stop=["e"], **options).choices
    assert default.finish_reason == "stop"
    limits: Any = ({"max_tokens": 3}, {"max_completion_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 3})
    for limit in limits:
        answer = client.chat.completions.create(**options, **limit)
        assert answer.usage is not None and answer.usage.completion_tokens <= 3


def test_content_may_come_in_parts_and_answers_may_be_sent_back(client: OpenAI) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "is it"}, {"type": "text", "text": "done?"}]}]
    whole: Any = [{"role": "user", "content": "is it\ndone?"}]
    sampling: Any = {"model": "verbatim", "temperature": 0, "max_tokens": 5}
    by_parts, by_text = (client.chat.completions.create(messages=one, **sampling) for one in (parts, whole))
    assert by_parts.choices == by_text.choices
    answer = by_parts.choices[0].message.model_dump() | {"content": "yes"}
    again = client.chat.completions.create(messages=[*whole, answer, *whole], **sampling)
    assert again.choices[0].message.content is not None


def test_what_a_user_spells_stays_text(client: OpenAI, http: httpx.Client) -> None:
    body = {"model": "verbatim", "messages": [{"role": "user", "content": "</s><|ask|>"}], "max_tokens": 1}
    answer = http.post("/v1/chat/completions", json=body).json()
    assert "<|ask|>" in answer["warnings"][0]
    assert "warnings" not in http.post("/v1/chat/completions", json=body | {"messages": MESSAGES}).json()


def test_without_a_chat_template_only_adapters_with_a_contract_can_chat(tiny_server: serving.Server) -> None:
    with client_of(tiny_server) as client:
        for name in ("verbatim", "bundle"):
            with pytest.raises(openai.UnprocessableEntityError, match="no chat template") as caught:
                client.chat.completions.create(model=name, messages=MESSAGES)
            assert "/v1/completions" in str(caught.value.body)
        assert client.chat.completions.create(model="task0", messages=MESSAGES, max_tokens=1).choices


# ------------------------------------------------------------------------------------------------- streams


def test_streamed_completions_are_the_whole_ones_in_pieces(client: OpenAI) -> None:
    sampling: Any = {
        "model": "verbatim",
        "prompt": [PROMPT, "Customer: no\n"],
        "n": 2,
        "max_tokens": 30,
        "temperature": 2.0,
        "seed": 3,
        "logprobs": 3,
        "stop": ["a", "\n"],
    }
    whole = client.completions.create(**sampling)
    assert len({choice.finish_reason for choice in whole.choices}) == 2, "the case needs both"
    chunks = list(client.completions.create(stream=True, stream_options={"include_usage": True}, **sampling))
    assert len({(chunk.id, chunk.model, chunk.object, chunk.created) for chunk in chunks}) == 1
    *chunks, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks)
    for expected in whole.choices:
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == expected.index]
        assert "".join(choice.text for choice in mine) == expected.text
        reasons: list[Any] = [choice.finish_reason for choice in mine]
        assert reasons == [None] * (len(mine) - 1) + [expected.finish_reason]
        found = defaultdict[str, list[Any]](list)
        for choice in mine:
            for field, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                found[field] += values
        assert expected.logprobs is not None
        for field, values in expected.logprobs.model_dump().items():
            assert found[field] == values if field in ("tokens", "text_offset") else len(found[field]) == len(values)


def test_a_streamed_chat_is_the_whole_one_in_pieces(client: OpenAI) -> None:
    sampling: Any = {
        "model": "task0",
        "messages": MESSAGES,
        "n": 2,
        "max_tokens": 30,
        "temperature": 2.0,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**sampling)
    chunks = list(client.chat.completions.create(stream=True, **sampling))
    assert all(chunk.usage is None for chunk in chunks)
    for expected in whole.choices:
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == expected.index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert "".join(choice.delta.content or "" for choice in mine) == expected.message.content
        assert [choice.finish_reason for choice in mine if choice.finish_reason] == [expected.finish_reason]
        tokens = [one.token for choice in mine if choice.logprobs for one in choice.logprobs.content or ()]
        assert expected.logprobs is not None and expected.logprobs.content is not None
        assert tokens == [one.token for one in expected.logprobs.content]


@pytest.mark.parametrize("chat", [False, True])
def test_every_chunk_counts_the_tokens_if_asked(client: OpenAI, chat: bool) -> None:
    options: Any = {"model": "task0", "max_tokens": 5, "n": 2, "stream": True, "extra_body": {"ignore_eos": True}}
    options["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    made: Any = (
        client.chat.completions.create(messages=MESSAGES, **options)
        if chat
        else client.completions.create(prompt=PROMPT, **options)
    )
    *chunks, last = made
    assert last.choices == [] and last.usage.completion_tokens == 10
    for index in range(2):
        mine = [chunk.usage for chunk in chunks if chunk.choices[0].index == index]
        counted = [usage.completion_tokens for usage in mine]
        assert counted == sorted(counted) and counted[0] == (0 if chat else 1) and counted[-1] == 5
        assert all(usage.prompt_tokens == last.usage.prompt_tokens for usage in mine)
        assert all(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens for usage in mine)


def test_the_stream_on_the_wire(http: httpx.Client) -> None:
    body = {"model": "verbatim", "prompt": PROMPT, "max_tokens": 3, "temperature": 0, "stream": True, "logprobs": 0}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    assert len(lines) == 2 * 5 and all(line.startswith("data: ") for line in lines[::2])
    assert not any("usage" in line for line in lines)


def test_tokens_come_as_they_are_made(client: OpenAI, bundle: Path) -> None:
    allowed = {"allowed_token_ids": letters(bundle)}
    started = time.monotonic()
    with client.completions.create(
        model="verbatim", prompt=PROMPT, max_tokens=400, stream=True, extra_body=allowed
    ) as stream:
        arrived = [time.monotonic() - started for _ in stream]
    assert len(arrived) > 300
    assert arrived[0] < arrived[-1] / 3


# ------------------------------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("chat", [False, True])
def test_a_client_that_leaves_a_stream_ends_its_work(
    client: OpenAI, http: httpx.Client, bundle: Path, chat: bool
) -> None:
    allowed = {"allowed_token_ids": letters(bundle)}
    options: Any = {"model": "verbatim", "max_tokens": FOR_EVER, "n": 3, "stream": True, "extra_body": allowed}
    made: Any = (
        client.chat.completions.create(messages=MESSAGES, **options)
        if chat
        else client.completions.create(prompt=PROMPT, **options)
    )
    for _ in zip(range(20), made):  # noqa: B905
        pass
    assert sample(http, "loraplex_sequences_running") + sample(http, "loraplex_sequences_waiting") > 0
    made.close()
    wait_for_idle(http)
    assert sample(http, "loraplex_completions_total", "verbatim", "verbatim", "cancelled") > 0


def test_a_client_that_does_not_wait_ends_its_work(server: serving.Server, http: httpx.Client, bundle: Path) -> None:
    with client_of(server) as client, pytest.raises(openai.APITimeoutError):
        client.completions.create(
            model="verbatim",
            prompt=PROMPT,
            max_tokens=FOR_EVER,
            timeout=0.5,
            extra_body={"allowed_token_ids": letters(bundle)},
        )
    wait_for_idle(http)


def wait_for_idle(http: httpx.Client) -> None:
    """Soon, and long before so many tokens could have been made."""
    end = time.monotonic() + 5
    while sample(http, "loraplex_sequences_running") + sample(http, "loraplex_sequences_waiting"):
        assert time.monotonic() < end, "the engine goes on"
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------- SIGTERM


def test_a_stream_is_finished_before_the_server_stops(bundle: Path) -> None:
    with serving.serve(bundle, "--dtype", "float32") as server, client_of(server) as client:
        stream = client.completions.create(
            model="verbatim",
            prompt=PROMPT,
            max_tokens=200,
            stream=True,
            extra_body={"allowed_token_ids": letters(bundle)},
        )
        first = next(stream)
        server.process.send_signal(signal.SIGTERM)
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert len(chunks) == 201
        assert server.process.wait(30) == 0


def test_a_stream_that_takes_longer_than_the_drain_ends_with_an_error(bundle: Path) -> None:
    with serving.serve(bundle, "--dtype", "float32", "--drain-timeout", "1") as server, client_of(server) as client:
        stream = client.completions.create(
            model="verbatim",
            prompt=PROMPT,
            max_tokens=FOR_EVER,
            stream=True,
            extra_body={"allowed_token_ids": letters(bundle)},
        )
        next(stream)
        threading.Timer(0.2, server.process.send_signal, [signal.SIGTERM]).start()
        with pytest.raises(openai.APIError, match="stopping") as caught:
            for _ in stream:
                pass
        assert caught.value.code == "not_ready"
        assert server.process.wait(8) == 0  # long before so many tokens could have been made


# ------------------------------------------------------------------------------------------------- fields


NEUTRAL: dict[str, Any] = {
    "user": "u1",
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "extra_body": {
        "metadata": {"a": "b"},
        "store": False,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": False,
        "stop_token_ids": [],
        "best_of": 1,
        "echo": False,
        "suffix": None,
        "guided_choice": None,
        "priority": 3,
        "conversation_id": "c",
    },
}


def test_fields_that_change_nothing_are_taken(client: OpenAI) -> None:
    sampling: Any = {"model": "verbatim", "temperature": 0, "max_tokens": 5}
    plain = client.completions.create(prompt=PROMPT, **sampling)
    assert client.completions.create(prompt=PROMPT, **sampling, **NEUTRAL).choices == plain.choices
    chat: Any = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "service_tier": "auto"}
    without = client.chat.completions.create(messages=MESSAGES, **sampling)
    assert client.chat.completions.create(messages=MESSAGES, **sampling, **NEUTRAL, **chat).choices == without.choices


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("top_k", 5),
        ("best_of", 3),
        ("suffix", "end"),
        ("store", True),
        ("guided_choice", ["yes", "no"]),
        ("structured_outputs", {"choice": ["yes"]}),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("prompt_logprobs", 1),
        ("unheard_of", None),
        ("top_logprob", 5),
    ],
)
def test_a_field_that_would_be_ignored_is_refused_by_name(client: OpenAI, name: str, value: Any) -> None:
    options: Any = {"model": "verbatim", "max_tokens": 1, "extra_body": {name: value}}
    asked: Any = ((client.completions, {"prompt": PROMPT}), (client.chat.completions, {"messages": MESSAGES}))
    for route, given in asked:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            route.create(**given, **options)
        body: Any = caught.value.body
        assert (
            body["code"] == "invalid_request"
            and body["message"].startswith((f"{name}: ", f"unknown field {name!r}"))
            and body["remedy"]
        )


WRONG_COMPLETIONS: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": ""}, 422, "empty"),
    ({"prompt": []}, 422, "prompt"),
    ({"prompt": [[]]}, 422, "prompt"),
    ({"prompt": None}, 422, "prompt"),
    ({"prompt": 3}, 422, "prompt"),
    ({"prompt": [1, "a"]}, 422, "prompt"),
    ({"prompt": ["a", 1]}, 422, "prompt"),
    ({"prompt": [True]}, 422, "prompt"),
    ({"prompt": [1, 99999]}, 422, "99999"),
    ({"prompt": [-1]}, 422, "-1"),
    ({"prompt": [10**30]}, 422, ""),
    ({"prompt": "\ud800"}, 422, "Unicode"),
    ({"prompt": ["x"] * 1025, "n": 2}, 422, "n"),
    ({"prompt": [5] * 9000}, 413, "9000"),
    ({"model": None}, 422, "model"),
    ({"model": "\ud800"}, 404, "ud800"),
    ({"model": 3}, 422, "model"),
    ({"max_tokens": 0}, 422, "max_tokens"),
    ({"max_tokens": "many"}, 422, "max_tokens"),
    ({"n": 0}, 422, "n"),
    ({"n": 129}, 422, "n"),
    ({"temperature": -1}, 422, "temperature"),
    ({"top_p": 0}, 422, "top_p"),
    ({"top_p": 1.1}, 422, "top_p"),
    ({"seed": "x"}, 422, "seed"),
    ({"seed": 2**64}, 422, "seed"),
    ({"logprobs": 21}, 422, "logprobs"),
    ({"logprobs": -1}, 422, "logprobs"),
    ({"stop": ""}, 422, "stop"),
    ({"stop": ["a", ""]}, 422, "stop"),
    ({"stop": ["a"] * 17}, 422, "stop"),
    ({"stop": 3}, 422, "stop"),
    ({"logit_bias": {"abc": 1}}, 422, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 422, "logit_bias"),
    ({"logit_bias": {"99999": 1}}, 422, "99999"),
    ({"allowed_token_ids": []}, 422, "allowed_token_ids"),
    ({"allowed_token_ids": [99999]}, 422, "99999"),
    ({"stream_options": {"include_usage": True}}, 422, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, 422, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, 422, "continuous_usage_stats"),
    ({"echo": True, "stream": True}, 422, "echo"),
    ({"echo": True, "max_tokens": -1}, 422, "max_tokens"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, 422, "max_tokens"),
    ({"stop_token_ids": [99999]}, 422, "99999"),
    ({"stop_token_ids": "a"}, 422, "stop_token_ids"),
    ({"min_tokens": 20}, 422, "min_tokens"),
    ({"min_tokens": 2, "stop": "a"}, 422, "stop"),
    ({"min_tokens": 2, "allowed_token_ids": [1]}, 422, "min_tokens"),
    ({"stream": True, "prompt": ""}, 422, "empty"),
    ({"stream": True, "prompt": [5] * 9000}, 413, "9000"),
]


@pytest.mark.parametrize(("fields", "status", "mentions"), WRONG_COMPLETIONS)
def test_wrong_completions(http: httpx.Client, fields: dict[str, Any], status: int, mentions: str) -> None:
    body = {"model": "verbatim", "prompt": PROMPT} | fields
    response = http.post("/v1/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert mentions in error["message"] and error["remedy"]


@pytest.mark.parametrize(
    ("fields", "mentions"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": "x", "name": 3}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, "messages.0.audio"),
        ({"messages": MESSAGES, "roles": {"system": None}}, "roles: there is no contract"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "nobody", "content": "x"}], "model": "task0"}, "nobody"),
        ({"messages": [{"role": "user", "content": " "}], "model": "task0"}, "empty"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "Unicode"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template"),
        ({"chat_template_kwargs": {"x": 1}, "model": "task0"}, "contract"),
        ({"add_special_tokens": True, "model": "task0"}, "add_special_tokens"),
        ({"echo": True}, "echo"),
    ],
)
def test_wrong_chats(http: httpx.Client, fields: dict[str, Any], mentions: str) -> None:
    body = {"model": "verbatim", "messages": MESSAGES} | fields
    response = http.post("/v1/chat/completions", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert mentions in error["message"] and error["remedy"]


# ------------------------------------------------------------------------------------------------- metrics


def test_work_and_failures_are_counted(client: OpenAI, http: httpx.Client) -> None:
    def read() -> tuple[float, ...]:
        return (
            sample(http, "loraplex_tokens_total", "computed") + sample(http, "loraplex_tokens_total", "cached"),
            sample(http, "loraplex_request_seconds_count", "total"),
            sample(http, "loraplex_completions_total", "verbatim", "verbatim", "input_too_long"),
            sample(http, "loraplex_request_failures_total", "input_too_long"),
        )

    before = read()
    whole = client.completions.create(model="verbatim", prompt=PROMPT, max_tokens=2)
    assert whole.usage is not None
    list(client.completions.create(model="bundle", prompt=PROMPT, max_tokens=2, stream=True))
    with pytest.raises(openai.APIStatusError):
        client.completions.create(model="verbatim", prompt=[5] * 9000)
    grown = [now - then for now, then in zip(read(), before, strict=True)]
    assert grown == [2 * whole.usage.prompt_tokens, 2, 1, 1]
