"""One contract, every backend: the same bundle, the same requests, the same labels, probabilities within 1e-3 in fp32.
Native's answers are what the others are held against; tests/parity holds native against PEFT itself.

Where vLLM is installed, which is an environment of its own (`make test-vllm`), it is vLLM that is tested."""

import asyncio
import math
import random
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import asked
import tiny
from loraplex import Loraplex, Question
from loraplex.errors import AdapterError, DeadlineExceededError, InputTooLongError, UnknownClassifierError
from loraplex.model.decoder import Decoder
from loraplex.types import ClassifyRequest, Verdict

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, about its own use of transformers

TOLERANCE = 1e-3
BACKENDS: Mapping[str, Mapping[str, Any]] = (
    {"vllm": {"backend": "vllm", "kv_cache": "64MiB", "vllm_arg": ("enforce_eager=true",)}}
    if tiny.HAS_VLLM
    else {"native": {}, "peft": {"backend": "peft"}, "peft mixed": {"backend": "peft", "peft_batching": "mixed"}}
)
OTHERS = [name for name in BACKENDS if name != "native"]
TEXTS = [
    "Customer: hi",
    "Customer: hello, I would like to book a table for two\nAgent: at what time?\nCustomer: at seven",
    "Customer: is my payment done?\nAgent: yes, it is\nCustomer: thanks",
    "Customer: hello <|ask|> there",
]
PROMPT = "Customer: hello, a table for two<|ask|>Is it done?\n"
# Positions are added to its embeddings, so that what stands on the left moves the answer.
GPT2 = GPT2Config(
    vocab_size=tiny.VOCAB_SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1
)
# vLLM takes no LoRA on GPT-2; each family costs it a start of 20 s.
FAMILIES = ["mistral-window", "gemma2", *([] if tiny.HAS_VLLM else ["qwen3", "gpt2"])]
ADAPTERS = ["active0", "active1", "active2", "plain"]


def load(bundle: Path, backend: str, **engine: Any) -> Loraplex:
    return Loraplex.load(bundle, dtype="float32", **{} if backend == "native" else BACKENDS[backend], **engine)


@pytest.fixture(scope="module")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("shared") / "bundle", is_activated=not tiny.HAS_VLLM)


@pytest.fixture(scope="module", params=BACKENDS)
def shared(request: pytest.FixtureRequest, shared_bundle: Path) -> Iterator[Loraplex]:
    with load(shared_bundle, request.param) as loraplex:
        yield loraplex


@pytest.fixture(scope="module")
def ranked_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of its own, because adapters come into it."""
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("ranked") / "bundle"))


@pytest.fixture(scope="module", params=BACKENDS)
def ranked(request: pytest.FixtureRequest, ranked_bundle: Path) -> Iterator[Loraplex]:
    """Plain adapters of several ranks. What a test loads here, it must take away again."""
    with load(ranked_bundle, request.param) as loraplex:
        yield loraplex


@pytest.fixture(scope="module")
def native(shared_bundle: Path) -> Iterator[Loraplex]:
    with load(shared_bundle, "native") as loraplex:
        yield loraplex


def check_verdicts(actual: tuple[Verdict, ...], expected: tuple[Verdict, ...]) -> None:
    assert [one.classifier for one in actual] == [one.classifier for one in expected]
    for one, other in zip(actual, expected, strict=True):
        assert (one.label, one.abstained, one.error, one.adapter) == (
            other.label,
            other.abstained,
            other.error,
            other.adapter,
        )
        assert one.confidence == pytest.approx(other.confidence, abs=TOLERANCE)
        assert one.label_mass == pytest.approx(other.label_mass, abs=TOLERANCE)
        assert (one.scores is None) == (other.scores is None)
        for label, score in (one.scores or {}).items():
            assert score == pytest.approx((other.scores or {})[label], abs=TOLERANCE)


# --------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("text", TEXTS)
def test_every_classifier_answers_as_native(shared: Loraplex, native: Loraplex, text: str) -> None:
    names = ADAPTERS  # `verbatim` is activated by what the text holds, below
    check_verdicts(shared.classify(text, names).verdicts, native.classify(text, names).verdicts)


def test_without_a_contract_the_top_token_is_the_answer(shared: Loraplex, native: Loraplex) -> None:
    actual, expected = (one.classify(PROMPT, "verbatim").verdicts for one in (shared, native))
    assert actual[0].scores is None
    check_verdicts(actual, expected)


@pytest.mark.parametrize("adapter", [None, "plain", "active1"])
@pytest.mark.parametrize("num_top", [0, 2])
def test_the_log_probabilities_of_a_prompts_tokens_are_natives(
    shared: Loraplex, native: Loraplex, adapter: str | None, num_top: int
) -> None:
    for prompt in (PROMPT, "Customer: yes<|ask|>no"):
        actual, expected = (
            one.generate(prompt, adapter, num_top=num_top, max_tokens=1, echo=True, scores_prompt=True)
            for one in (shared, native)
        )
        assert actual.prompt_text == expected.prompt_text == prompt
        for one, other in zip(actual.prompt_tokens, expected.prompt_tokens, strict=True):
            assert (one.id, one.text, one.offset, len(one.top)) == (other.id, other.text, other.offset, len(other.top))
            assert one.log_prob == pytest.approx(other.log_prob, abs=TOLERANCE)
            tops = ([likely.log_prob for likely in which.top] for which in (one, other))
            assert next(tops) == pytest.approx(next(tops), abs=TOLERANCE)


@pytest.mark.parametrize("backend", OTHERS)
def test_questions_without_an_adapter_are_answered_as_native(tmp_path: Path, backend: str) -> None:
    """Beside classifiers, so that the base's rows and adapters' rows are in one batch where there are batches."""
    bundle = asked.save_chat_bundle(tmp_path, is_activated=not tiny.HAS_VLLM)
    many = Question(type="choice", instructions="Which?", labels=tuple(map(str, range(30))))  # a pair is two tokens
    questions = {**asked.QUESTIONS, "many": many}
    requests = [ClassifyRequest(input=text, classifiers="*", questions=questions) for text in TEXTS]
    with load(bundle, backend, adhoc_questions=True) as other, load(bundle, "native", adhoc_questions=True) as native:
        for request in requests:
            actual, expected = (one.run(one.router.classify(request)).verdicts for one in (other, native))
            check_verdicts(actual, expected)


@pytest.mark.parametrize("ranked", OTHERS, indirect=True)
def test_plain_adapters_of_several_ranks_answer_as_native(ranked: Loraplex, ranked_bundle: Path) -> None:
    with load(ranked_bundle, "native") as native:
        for text in TEXTS:
            check_verdicts(ranked.classify(text).verdicts, native.classify(text).verdicts)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.slow] if tiny.HAS_VLLM else []) for name in FAMILIES]
)
def test_windows_soft_caps_and_positions_hold_beside_longer_texts(tmp_path: Path, family: str, backend: str) -> None:
    config = GPT2 if family == "gpt2" else tiny.FAMILIES[family]
    tiny.save_shared_bundle(tmp_path / "bundle", config, is_activated=not tiny.HAS_VLLM)
    with load(tmp_path / "bundle", backend) as loraplex, load(tmp_path / "bundle", "native") as native:
        requests = [ClassifyRequest(input=text, classifiers=tuple(ADAPTERS)) for text in TEXTS]
        for one, other in zip(ask_all(loraplex, requests), ask_all(native, requests), strict=True):
            check_verdicts(one, other)


def ask_all(loraplex: Loraplex, requests: list[ClassifyRequest]) -> list[tuple[Verdict, ...]]:
    """At the same time."""

    async def gather() -> list[tuple[Verdict, ...]]:
        results = await asyncio.gather(*(loraplex.service.classify(request) for request in requests))
        return [result.verdicts for result in results]

    return loraplex.run(gather())


def test_the_base_is_the_base_whatever_ran_before(shared: Loraplex, shared_bundle: Path) -> None:
    """Its own tokens, as transformers computes them without PEFT."""
    model: Any = AutoModelForCausalLM.from_pretrained(shared_bundle, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shared_bundle)
    for text in TEXTS:
        shared.classify(text, random.choice(ADAPTERS))
        with torch.inference_mode():
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            log_prob, token_id = model(input_ids=ids).logits[0, -1].log_softmax(-1).max(-1)
        [token] = shared.generate(text).tokens
        assert token.id == token_id
        assert math.exp(token.log_prob) == pytest.approx(log_prob.exp().item(), abs=TOLERANCE)


def test_adapters_change_the_answer(shared: Loraplex) -> None:
    """Else most tests here could not fail."""
    assert len({round(one.confidence or 0, 6) for one in shared.classify(TEXTS[1], ADAPTERS).verdicts}) == 4
    tokens = {shared.generate(PROMPT, name).tokens[0].log_prob for name in (None, "plain", "active1", "verbatim")}
    assert len(tokens) == 4


@pytest.mark.parametrize("adapter", [None, "plain", "active1", "verbatim"])
def test_greedy_text_equals_native(shared: Loraplex, native: Loraplex, adapter: str | None) -> None:
    actual, expected = (one.generate(PROMPT, adapter, max_tokens=24, num_top=3) for one in (shared, native))
    assert [token.id for token in actual.tokens] == [token.id for token in expected.tokens]
    for one, other in zip(actual.tokens, expected.tokens, strict=True):
        assert math.exp(one.log_prob) == pytest.approx(math.exp(other.log_prob), abs=TOLERANCE)
        assert [top.id for top in one.top] == [top.id for top in other.top]
    assert (actual.text, actual.finish_reason) == (expected.text, expected.finish_reason)


def test_drawn_and_biased_text_equals_native(shared: Loraplex, native: Loraplex) -> None:
    drawn: dict[str, Any] = {"temperature": 1.5, "seed": 3, "top_p": 0.9}
    if tiny.HAS_VLLM:  # which has random numbers of its own: the same again for the same seed
        ids = [[token.id for token in shared.generate(PROMPT, "plain", max_tokens=8, **drawn).tokens] for _ in range(3)]
        assert ids[0] == ids[1] == ids[2]
    for options in (*([] if tiny.HAS_VLLM else [drawn]), {"logit_bias": {40: 30.0}}, {"stop": ("e",)}):
        actual, expected = (one.generate(PROMPT, "plain", max_tokens=8, **options) for one in (shared, native))
        assert [token.id for token in actual.tokens] == [token.id for token in expected.tokens]
        assert actual.text == expected.text


@pytest.mark.skipif(tiny.HAS_VLLM, reason="vLLM serves no activated adapters")
def test_what_is_generated_does_not_move_the_activation(shared: Loraplex, native: Loraplex) -> None:
    """The invocation token comes up again in the answer."""
    invocation = tiny.SPECIAL_TOKENS.index("<|ask|>")
    bias = {invocation: 100.0}
    actual, expected = (one.generate(PROMPT, "active1", max_tokens=4, logit_bias=bias) for one in (shared, native))
    assert [token.id for token in actual.tokens] == [invocation] * 4
    for one, other in zip(actual.tokens, expected.tokens, strict=True):
        assert one.log_prob == pytest.approx(other.log_prob, abs=TOLERANCE)


# --------------------------------------------------------------------------------------------- never another's


def test_many_at_once_are_answered_as_each_alone(shared: Loraplex) -> None:
    """By any adapter or the base, in any order, from many threads."""
    asked = [(text, name) for text in TEXTS[:3] for name in [*ADAPTERS, "verbatim", None]]

    def ask(one: tuple[str, str | None]) -> tuple[Any, float]:
        text, name = one
        if name is None or name == "verbatim":
            [token] = shared.generate(text + "<|ask|>", name).tokens
            return token.id, token.log_prob
        [verdict] = shared.classify(text, name).verdicts
        assert verdict.confidence is not None and verdict.adapter is not None and verdict.adapter.name == name
        return verdict.label, math.log(verdict.confidence)

    alone = {one: ask(one) for one in asked}
    together = asked * 6
    random.Random(0).shuffle(together)
    with ThreadPoolExecutor(12) as pool:
        for one, (answer, log_prob) in zip(together, pool.map(ask, together), strict=True):
            assert answer == alone[one][0]
            assert log_prob == pytest.approx(alone[one][1], abs=TOLERANCE)


def test_an_unknown_name_is_never_the_base(shared: Loraplex) -> None:
    known, unknown = shared.classify("hello", ["plain", "nobody"]).verdicts
    assert known.label and unknown.label is None
    assert unknown.error is not None and unknown.error.code == "unknown_classifier"
    with pytest.raises(UnknownClassifierError):
        shared.classify("hello", "nobody")
    with pytest.raises(UnknownClassifierError):
        shared.generate("hello", "nobody")


def test_too_long_is_refused(shared: Loraplex) -> None:
    with pytest.raises(InputTooLongError):
        shared.generate("hello " * 1000, "plain")


def test_usage_counts_what_was_computed(shared: Loraplex) -> None:
    before = shared.service.stats().num_step_tokens
    usage = shared.classify(TEXTS[1], ["active1", "active0"]).usage
    assert usage.prompt_tokens > 0
    if shared.service.executor.name == "peft":
        assert usage.computed_tokens == usage.prompt_tokens and usage.cached_tokens == 0
    stats = shared.service.stats()
    assert stats.num_step_tokens - before == usage.computed_tokens
    assert stats.num_steps > 0 and stats.num_step_tokens > 0 and set(stats.adapters.values()) == {"ready"}


# --------------------------------------------------------------------------------------------- coming and going


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_come_change_and_go_under_traffic(shared_bundle: Path, tmp_path: Path, backend: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(shared_bundle, bundle)
    with load(bundle, backend) as loraplex:
        before = {name: loraplex.classify(TEXTS[1], name).verdicts[0] for name in ADAPTERS}
        changed = tmp_path / "changed"
        tiny.save_adapter(bundle, changed, contract=tiny.CONTRACT, seed=77, r=6)
        is_over = False

        def ask_others() -> int:
            asked = 0
            while not is_over:
                for name in ("active0", "active2"):
                    check_verdicts(loraplex.classify(TEXTS[1], name).verdicts, (before[name],))
                    asked += 1
            return asked

        with ThreadPoolExecutor(2) as pool:
            others = [pool.submit(ask_others) for _ in range(2)]
            try:
                loraplex.unload_adapter("active1")
                with pytest.raises(UnknownClassifierError):
                    loraplex.classify(TEXTS[1], "active1")
                new = loraplex.load_adapter("plain", _below(bundle, changed))
                [verdict] = loraplex.classify(TEXTS[1], "plain").verdicts
                assert verdict.adapter is not None and verdict.adapter.version == new.version
                assert verdict.confidence != pytest.approx(before["plain"].confidence, abs=TOLERANCE)
                loraplex.load_adapter("plain", str(bundle / "plain"))
                loraplex.load_adapter("active1", str(bundle / "active1"))
            finally:
                is_over = True
            assert all(one.result() > 0 for one in others)
        for name, verdict in before.items():
            check_verdicts(loraplex.classify(TEXTS[1], name).verdicts, (verdict,))
        base = loraplex.generate(PROMPT).tokens
        for name in [*ADAPTERS, "verbatim"]:
            loraplex.unload_adapter(name)
        assert loraplex.generate(PROMPT).tokens == base  # without any
        if backend.startswith("peft"):
            engine: Any = loraplex.service.computing.computation
            assert not [one for one in engine.runner.model.modules() if type(one).__module__.startswith("peft")]
        loraplex.load_adapter("plain", str(bundle / "plain"))  # and with the first again
        check_verdicts(loraplex.classify(TEXTS[1], "plain").verdicts, (before["plain"],))


def _below(bundle: Path, folder: Path) -> str:
    """A copy from where adapters may be loaded."""
    return str(shutil.copytree(folder, bundle / f"copy-of-{folder.name}"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_adapters_than_places(tiny_bundle: Path, backend: str) -> None:
    with load(tiny_bundle, "native") as native:
        expected = {name: native.classify(TEXTS[0], name).verdicts for name in native.service.names()}
    with load(tiny_bundle, backend, max_adapters=2) as loraplex, ThreadPoolExecutor(6) as pool:
        names = list(expected) * 4
        for name, verdicts in zip(
            names, pool.map(lambda name: loraplex.classify(TEXTS[0], name).verdicts, names), strict=True
        ):
            check_verdicts(verdicts, expected[name])
        assert loraplex.service.stats().num_slots <= 2


def test_a_broken_replacement_replaces_nothing(ranked: Loraplex, ranked_bundle: Path, tmp_path: Path) -> None:
    before = ranked.classify(TEXTS[0], "task0").verdicts
    label = ranked.classify("Customer: hi", "task1").verdicts[0].label
    contract = {
        **tiny.CONTRACT,
        "golden": [{"text": "Customer: hi", "label": {"yes": "no", "no": "yes"}[str(label)]}],
    }
    wrong = shutil.copytree(ranked_bundle / "task1", tmp_path / "wrong")
    (wrong / "adapter_model.safetensors").write_bytes(b"nothing")
    untrue = shutil.copytree(ranked_bundle / "task1", tmp_path / "untrue")
    (untrue / "classifier.yaml").write_text(str(contract).replace("'", '"'))
    for folder in (wrong, untrue):
        with pytest.raises(Exception, match=r"adapter_model|golden"):
            ranked.load_adapter("task0", _below(ranked_bundle, folder))
        shutil.rmtree(ranked_bundle / f"copy-of-{folder.name}")
        check_verdicts(ranked.classify(TEXTS[0], "task0").verdicts, before)


@pytest.mark.skipif(tiny.HAS_VLLM, reason="it is given what was read, and looks into no folder again")
@pytest.mark.parametrize("backend", OTHERS)
def test_files_that_changed_under_an_adapter_are_never_served(tiny_bundle: Path, tmp_path: Path, backend: str) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    with load(bundle, backend, max_adapters=2) as loraplex:
        shutil.copy(bundle / "task1" / "adapter_model.safetensors", bundle / "task0")
        shutil.copy(bundle / "task1" / "adapter_config.json", bundle / "task0")
        loraplex.classify(TEXTS[0], ["task1", "task2"])  # which take task0's place
        with pytest.raises(AdapterError, match="changed on disk"):
            loraplex.classify(TEXTS[0], "task0")
        assert loraplex.load_adapter("task0", str(bundle / "task0")).error is None
        actual, expected = (loraplex.classify(TEXTS[0], name).verdicts[0] for name in ("task0", "task1"))
        assert actual.scores == pytest.approx(expected.scores, abs=TOLERANCE)


# --------------------------------------------------------------------------------------------- deadlines, failures


def test_a_deadline_leaves_the_verdicts_that_were_reached(
    shared: Loraplex, shared_bundle: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: str = request.node.callspec.params["shared"]
    with nullcontext(shared) if backend == "vllm" else load(shared_bundle, backend, max_step_sequences=1) as loraplex:
        engine: Any = loraplex.service.computing.computation
        if backend == "vllm":
            compute, one_by_one = engine.compute, asyncio.Lock()

            async def compute_slowly(sequence: Any) -> Any:
                async with one_by_one:
                    await asyncio.sleep(0.1)
                    return await compute(sequence)

            monkeypatch.setattr(engine, "compute", compute_slowly)
        else:
            run = engine.runner.run

            def run_slowly(step: Any) -> Any:
                time.sleep(0.1)
                return run(step)

            monkeypatch.setattr(engine.runner, "run", run_slowly)
        verdicts = loraplex.classify(TEXTS[1], ADAPTERS, deadline_ms=250).verdicts
        errors = [one.error.code for one in verdicts if one.error is not None]
        assert 0 < len(errors) < len(verdicts) and set(errors) == {"deadline_exceeded"}
        with pytest.raises(DeadlineExceededError):
            loraplex.classify(TEXTS[1], "plain", deadline_ms=0.001)


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in test_vllm_processes.py: it ends vLLM's process")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_failed_forward_pass_leaves_nothing_behind(
    shared_bundle: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's hooks stay where it fails, and with them another request's adapters."""
    with load(shared_bundle, backend) as loraplex:
        before = [loraplex.classify(text, ADAPTERS).verdicts for text in TEXTS]
        base = loraplex.generate(PROMPT).tokens
        engine: Any = loraplex.service.computing.computation
        model = engine.runner.model
        head = model.lm_head.base_layer if isinstance(model, Decoder) else model.lm_head

        def fail(*args: Any) -> None:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(engine, "_probe", lambda: None)
            handle = head.register_forward_hook(fail)
            for name in ADAPTERS:
                with pytest.raises(Exception, match="out of memory"):
                    loraplex.classify(TEXTS[1], name)
            handle.remove()
        if backend != "native":
            assert not any(module._forward_pre_hooks for module in engine.runner.model.modules())
        assert loraplex.generate(PROMPT).tokens == base
        for text, verdicts in zip(TEXTS, before, strict=True):
            check_verdicts(loraplex.classify(text, ADAPTERS).verdicts, verdicts)
