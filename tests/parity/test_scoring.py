"""The log probabilities of a prompt's own tokens equal PEFT's, however the prompt is cut into windows and whatever is
cached."""

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import tiny
from checks import check_pool
from loraplex import Loraplex
from loraplex.errors import InvalidRequestError
from loraplex.generation import GenerateRequest, GenerateResult
from loraplex.service import scoring

TEXT = "Customer: hello, a table for two\nAgent: at what time?\nCustomer: at seven<|ask|>Is it done? yes, thanks"
ADAPTERS: tuple[str | None, ...] = (None, "plain", "active1", "verbatim")
BACKENDS: dict[str, dict[str, Any]] = {
    "native": {},
    "native without blocks": {"kv_cache": "0"},
    "peft": {"backend": "peft"},
    "peft mixed": {"backend": "peft", "peft_batching": "mixed"},
}


def long(config: PreTrainedConfig) -> PreTrainedConfig:
    return type(config).from_dict(config.to_dict() | {"max_position_embeddings": 1024})


@pytest.fixture(scope="module", params=["mistral", "gemma2"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = long(tiny.FAMILIES[request.param])
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("scoring") / "bundle", config)


@pytest.fixture(scope="module", params=BACKENDS)
def loraplex(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, dtype="float32", **BACKENDS[request.param]) as loraplex:
        yield loraplex


@pytest.fixture(scope="module")
def peft(bundle: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(bundle, attn_implementation="eager", dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(model, bundle / "plain", adapter_name="plain")
    for other in ("verbatim", "active1"):
        peft.load_adapter(bundle / other, adapter_name=other)
    return peft.eval()


def log_probs_of(peft: Any, adapter: str | None, ids: list[int]) -> torch.Tensor:
    """[len(ids), vocab]: row i is about the token after `ids[i]`."""
    if adapter is not None:
        peft.set_adapter(adapter)
    with nullcontext() if adapter is not None else peft.disable_adapter(), torch.inference_mode():
        logits: torch.Tensor = peft(input_ids=torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def check_blocks(loraplex: Loraplex) -> None:
    if loraplex.service.computing.computation.num_blocks[0]:
        check_pool(loraplex)


def check(result: GenerateResult, expected: torch.Tensor, ids: list[int], num_top: int) -> None:
    assert [token.id for token in result.prompt_tokens] == ids
    first, *rest = result.prompt_tokens
    assert (first.log_prob, first.top, first.offset) == (None, (), 0)
    for token, row in zip(rest, expected[:-1], strict=True):
        assert token.log_prob == pytest.approx(row[token.id].item(), abs=1e-3)
        assert [one.log_prob for one in token.top] == pytest.approx(row.topk(num_top).values.tolist(), abs=1e-3)
        assert [row[one.id].item() for one in token.top] == pytest.approx([o.log_prob for o in token.top], abs=1e-3)
        if num_top and token.top[0].id == token.id:
            assert token.top[0].log_prob == token.log_prob  # exactly: lm-eval compares them to see what is greedy


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("window", [256, 17, 5])
def test_every_token_of_a_prompt_has_pefts_log_probability(
    loraplex: Loraplex, bundle: Path, peft: Any, adapter: str | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the prompt, or its beginning, was computed and kept before."""
    monkeypatch.setattr(scoring, "WINDOW", window)
    ids = AutoTokenizer.from_pretrained(bundle)(TEXT)["input_ids"]
    expected = log_probs_of(peft, adapter, ids)
    for num_top, max_tokens in ((0, 0), (1, 1), (3, 2)):
        result = loraplex.generate(
            TEXT,
            adapter,
            num_top=num_top,
            max_tokens=max_tokens,
            echo=True,
            scores_prompt=True,
            conversation_id="c",
        )
        check(result, expected, ids, num_top)
        assert result.prompt_text == TEXT and len(result.tokens) == max_tokens
        assert result.usage.prompt_tokens == len(ids)
        if max_tokens:
            assert result.tokens[0].log_prob == pytest.approx(expected[-1][result.tokens[0].id].item(), abs=1e-3)
    check_blocks(loraplex)


def test_scored_prompts_beside_others(loraplex: Loraplex, bundle: Path, peft: Any) -> None:
    """Of all adapters at once, beside texts that are only continued."""
    encode = AutoTokenizer.from_pretrained(bundle)
    texts = [TEXT, "Customer: hi<|ask|>no", TEXT[10:]]
    requests = [
        GenerateRequest(prompt=text, adapter=name, num_top=index, max_tokens=3, scores_prompt=index != 1)
        for name in ADAPTERS
        for index, text in enumerate(texts)
    ]

    async def all_of_them() -> list[GenerateResult]:
        return await asyncio.gather(*(loraplex.service.generate(request) for request in requests))

    for request, result in zip(requests, loraplex.run(all_of_them()), strict=True):
        ids = encode(request.prompt)["input_ids"]
        if request.scores_prompt:
            check(result, log_probs_of(peft, request.adapter, ids), ids, request.num_top)
        else:
            assert result.prompt_tokens == ()
    check_blocks(loraplex)


def test_a_long_prompt_is_computed_once(bundle: Path, peft: Any) -> None:
    """In windows that find each other's K/V, in steps with few rows of logits."""
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    text = "".join(f"Customer: number {i} is not done yet, thank you\n" for i in range(60))
    ids = tokenizer(text)["input_ids"][:900]
    assert len(ids) == 900
    with Loraplex.load(bundle, dtype="float32", max_step_sequences=4) as loraplex:
        rows = []
        runner = loraplex.service.computing.computation.runner  # type: ignore[attr-defined]
        run = runner.run

        def counted(step: Any) -> Any:
            rows.append(step.num_rows)
            return run(step)

        runner.run = counted
        result = loraplex.generate(tuple(ids), "plain", num_top=1, max_tokens=0, echo=True, scores_prompt=True)
        check(result, log_probs_of(peft, "plain", ids), ids, 1)
        assert result.prompt_text == tokenizer.decode(ids)
        assert max(rows) <= 513 and len(rows) >= 2
        assert result.usage.computed_tokens <= len(ids) + 4 * 16
        check_pool(loraplex)


def test_the_echo_of_token_ids(loraplex: Loraplex, bundle: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    ids: list[int] = tokenizer("Customer: é ü 😀 yes")["input_ids"]
    by_ids = loraplex.generate(tuple(ids), max_tokens=0, echo=True, scores_prompt=True)
    by_text = loraplex.generate("Customer: é ü 😀 yes", max_tokens=0, echo=True, scores_prompt=True)
    assert by_ids.prompt_text == by_text.prompt_text == "Customer: é ü 😀 yes"
    assert by_ids.text == by_text.text == "" and by_ids.tokens == ()
    assert by_ids.finish_reason == "length"
    for token in by_ids.prompt_tokens:
        if "\ufffd" not in token.text:
            assert by_ids.prompt_text[token.offset :].startswith(token.text)
    one = loraplex.generate(tuple(ids[:1]), max_tokens=0, echo=True, scores_prompt=True)
    assert len(one.prompt_tokens) == 1 and one.usage.computed_tokens == 0
    with pytest.raises(InvalidRequestError, match="max_tokens is 0"):
        loraplex.generate(tuple(ids), max_tokens=0)
