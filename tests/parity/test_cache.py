"""Whatever is found in blocks, shared in a step or run in chunks, the answer is that of an uncached run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recorded
import tiny
from checks import check_pool, memo_of, model_of, num_bytes_of
from loraplex import ClassifyRequest, ClassifyResult, Loraplex
from loraplex.engine import sequence
from loraplex.engine.block_pool import block_hashes
from loraplex.errors import ContractError, InvalidRequestError
from loraplex.model import step_memo
from loraplex.model.decoder import Decoder

TOLERANCE = 1e-4
INVOCATION = tiny.SPECIAL_TOKENS.index("<|ask|>")
Pair = tuple[Loraplex, Loraplex]
NAMES = ["active0", "active1", "active2", "plain"]


@pytest.fixture(scope="module", params=["mistral", "mistral-window", "mistral-captured", "gemma2"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Loraplex, Loraplex]]:
    """Without blocks, and with few and with steps of 64 tokens, so that long prompts run in chunks."""
    family = request.param.removesuffix("-captured")
    options = {"kv_cache": "180KiB", "max_step_tokens": 64, "cuda_graphs": family != request.param}
    bundle = tiny.save_shared_bundle(tmp_path_factory.mktemp("shared") / "bundle", tiny.FAMILIES[family])
    with (
        recorded.captures(at=1),
        Loraplex.load(bundle, dtype="float32", kv_cache="0") as plain,
        Loraplex.load(bundle, dtype="float32", **options) as cached,
    ):
        yield plain, cached


def assert_equal(one: ClassifyResult, other: ClassifyResult) -> None:
    for verdict, expected in zip(one.verdicts, other.verdicts, strict=True):
        assert verdict.error is None and expected.error is None
        assert verdict.scores == pytest.approx(expected.scores, abs=TOLERANCE)
        assert verdict.label_mass == pytest.approx(expected.label_mass, abs=TOLERANCE)


WORDS = st.lists(st.sampled_from(["hello", "is it done?", "yes", "no <|ask|> way", "seven"]), min_size=1, max_size=12)
TURN = st.tuples(st.integers(0, 2), WORDS, st.lists(st.sampled_from(NAMES), min_size=1, unique=True), st.booleans())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(TURN, min_size=1, max_size=8))
def test_random_dialogues_turn_by_turn(pair: Pair, turns: list[tuple[int, list[str], list[str], bool]]) -> None:
    """Three conversations grow past what the base takes, with and without an id, asked by changing classifiers."""
    plain, cached = pair
    conversations = ["", "", "Customer: hello"]
    for which, words, names, has_id in turns:
        conversations[which] += f"\nCustomer: {' '.join(words)}"
        text = conversations[which].strip()
        conversation_id = str(which) if has_id else None
        assert_equal(cached.classify(text, names, conversation_id=conversation_id), plain.classify(text, names))
    check_pool(cached)


def test_without_the_adapters_identity_in_the_hash_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny.save_shared_bundle(tmp_path)
    monkeypatch.setattr(sequence, "block_hashes", lambda ids, activation, *others: block_hashes(ids, len(ids), *others))
    text = "Customer: hello, is it done? " * 5
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        expected = loraplex.classify(text, "plain")["plain"].scores
        loraplex.classify(text, "active0")  # leaves the base's blocks behind
        assert loraplex.classify(text, "plain", conversation_id="x")["plain"].scores != pytest.approx(
            expected, abs=0.01
        )


def test_what_layers_keep_for_small_steps_goes_with_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two places: the new adapter gets that of the old one, beside the same other."""
    monkeypatch.setattr(step_memo, "MAX_MEMOS", 100)
    bundle, text = tiny.save_bundle(tmp_path / "bundle", adapters=3), "Customer: hello"
    with Loraplex.load(bundle, dtype="float32", max_adapters=2, preload="none") as loraplex:
        expected = loraplex.classify(text, "task2")["task2"].scores
        loraplex.classify(text, ["task0", "task1"])
        before = loraplex.classify(text, ["task0", "task1"])["task0"].scores  # now that both are there, in one step
        loraplex.unload_adapter("task0")
        loraplex.load_adapter("task0", bundle / "task2")
        after = loraplex.classify(text, ["task0", "task1"])["task0"].scores
    assert after == pytest.approx(expected, abs=TOLERANCE)
    assert after != pytest.approx(before, abs=0.01)


def test_what_layers_keep_stays_in_its_memory(tmp_path: Path) -> None:
    bundle, text = tiny.save_bundle(tmp_path / "bundle", adapters=3), "Customer: hello"
    names = ["task0", "task1", "task2"]
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        memo = memo_of(loraplex)
        memo.clear()
        for _ in range(2):
            expected = loraplex.classify(text, names)
        assert len(memo._memos) == 1 and num_bytes_of(memo) > 0  # the last layer's has the same key: its slots' order
        memo.budget_bytes = num_bytes_of(memo)
        assert_equal(loraplex.classify(text, names), expected)
        assert len(memo._memos) == 1
        memo.budget_bytes -= 1
        for _ in range(2):
            assert_equal(loraplex.classify(text, names), expected)
            assert not memo._memos


def test_what_was_kept_for_a_step_that_did_not_fit_is_given_back(tmp_path: Path) -> None:
    """The head has memory for one row only, so the step is split until each has but one."""
    bundle, text = tiny.save_bundle(tmp_path / "bundle", adapters=3), "Customer: hello"
    names = ["task0", "task1", "task2"]

    def fails(module: object, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("no memory is left")

    with Loraplex.load(bundle, dtype="float32") as loraplex:
        expected = loraplex.classify(text, names)
        model = model_of(loraplex)
        assert isinstance(model, Decoder)
        before = num_bytes_of(model.memo)
        assert before > 0
        model.lm_head.base_layer.register_forward_pre_hook(fails)
        assert_equal(loraplex.classify(text, names), expected)
        assert num_bytes_of(model.memo) == 0, "single adapters are not stacked"


def test_the_next_turn_is_computed_where_it_is_new(pair: Pair) -> None:
    _, cached = pair
    first = "Customer: hello, I would like to book a table for two. Is it done? seven"
    for names in (NAMES[:2], ["plain"]):
        cached.classify(first, names, conversation_id="x")
        again = cached.classify(first, names, conversation_id="x").usage
        assert again.cached_tokens > 0 and again.computed_tokens + again.cached_tokens == again.prompt_tokens


def test_text_that_spells_the_invocation_does_not_activate(pair: Pair) -> None:
    _, cached = pair
    [verdict] = cached.classify("Customer: hello <|ask|>Is it done 1?", "active0").verdicts
    assert verdict.warnings and "<|ask|>" in verdict.warnings[0]
    [(_, prompt, token_ids)] = cached.show_prompt(
        ClassifyRequest(input="Customer: hello <|ask|>Is it done 1?", classifiers=("active0",))
    )
    assert token_ids.count(INVOCATION) == 1 and prompt.endswith("<|ask|>Is it done 0?\n")


def test_a_verbatim_prompt_without_the_invocation_is_an_error_and_not_the_bases_answer(pair: Pair) -> None:
    _, cached = pair
    assert cached.classify("hello<|ask|>", "verbatim")["verbatim"].label
    with pytest.raises(InvalidRequestError, match="lacks the adapter's invocation tokens"):
        cached.classify("hello", "verbatim")


def test_a_template_without_the_invocation_behind_the_conversation_is_refused(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    for template in ("{conversation}\n{question}\n", "<|ask|>{conversation}\n{question}\n"):
        contract = {**tiny.CONTRACT, "template": template}
        tiny.save_adapter(tmp_path, tmp_path / "task", contract=contract, alora_invocation_tokens=[INVOCATION])
        with pytest.raises(ContractError, match=r"template.*invocation tokens \[3\]"):
            Loraplex.load(tmp_path)
