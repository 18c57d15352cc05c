"""IBM's intrinsics: on a base with a chat template like Granite's, prompts have the tokens of granite-common's own
rewriting, labels have PEFT's probabilities, and the value is what granite-common makes of them."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

import tiny
from loraplex.executors.peft import PeftOracle
from loraplex.inprocess import Loraplex
from loraplex.io_yaml import IO_YAML
from loraplex.types import ClassifyRequest, Message, Verdict

granite: Any = pytest.importorskip("granite_common", reason="granite-common is not installed (make dev)")
output: Any = pytest.importorskip("granite_common.intrinsics.output", reason="granite-common is not installed")

TOLERANCE = 1e-4
ASSISTANT = "<|start_of_role|>assistant<|end_of_role|>"  # what IBM's activated adapters begin with
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>You are helpful.<|end_of_text|>\n"
    "{% endif %}{% for message in messages %}<|start_of_role|>{{ message.role }}<|end_of_role|>{{ message.content }}"
    "<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": "hello, is my payment done?"},
    {"role": "assistant", "content": "yes, it is done"},
    {"role": "user", "content": "at what time?"},
]


def io_yaml(schema: Mapping[str, Any], path: list[str], values: Mapping[Any, float], instruction: str | None) -> Any:
    return {
        "model": None,
        "response_format": json.dumps(schema),
        "transformations": [
            {"type": "likelihood", "input_path": path, "categories_to_values": dict(values)},
            {"type": "nest", "input_path": [], "field_name": "likelihood"},
        ],
        "instruction": instruction,
        "parameters": {"max_completion_tokens": 6},
        "sentence_boundaries": None,
    }


DIGITS = {str(digit): 0.05 + digit / 10 for digit in range(10)}
SCORE = {"type": "object", "properties": {"score": {"type": "string", "enum": list(DIGITS)}}, "required": ["score"]}
YES_NO = {"type": "object", "properties": {"score": {"type": "string", "enum": ["yes", "no"]}}}
# name -> the file, and the answer in JSON up to the label
INTRINSICS: Mapping[str, tuple[Any, str]] = {
    "answerability": (
        io_yaml({"type": "string", "enum": ["it is done", "not"]}, [], {"it is done": 1.0, "not": 0.0}, None),
        '"',
    ),
    "guardian": (io_yaml(YES_NO, ["score"], {"yes": 1.0, "no": 0.0}, "<guardian> Is it {{done}}?\n"), '{"score": "'),
    "requirement": (io_yaml({"type": "boolean"}, [], {True: 1.0, False: 0.0}, "Is it done?"), ""),
    "uncertainty": (
        io_yaml(
            {"type": "integer", "enum": list(range(10))}, [], {int(key): DIGITS[key] for key in DIGITS}, "<certainty>"
        ),
        "",
    ),
    "certainty": (io_yaml(SCORE, ["score"], DIGITS, "<certainty>"), '{"score": "'),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intrinsics")
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|ask|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    config = tiny.FAMILIES["llama"]
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    tiny.save_base(folder, type(config)(**(config.to_dict() | sizes)), tokenizer)
    invocation = tokenizer(ASSISTANT, add_special_tokens=False)["input_ids"]
    for index, (name, (keys, _)) in enumerate(INTRINSICS.items()):
        for kind, tokens in (("lora", None), ("alora", invocation)):
            adapter = folder / f"{name}-{kind}"
            tiny.save_adapter(folder, adapter, seed=index + 1, alora_invocation_tokens=tokens)
            (adapter / IO_YAML).write_text(yaml.safe_dump(keys, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def loraplex(bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, dtype="float32", device="cpu") as served:
        yield served


@pytest.fixture(scope="module")
def verdicts(loraplex: Loraplex) -> dict[str, Verdict]:
    """All of them, of one call."""
    return {
        one.classifier: one
        for one in loraplex.classify([Message(role=one["role"], content=one["content"]) for one in MESSAGES]).verdicts
    }


def rewritten(folder: Path) -> list[dict[str, str]]:
    """The messages as granite-common sends them."""
    rewriter = granite.IntrinsicsRewriter(config_file=folder / IO_YAML)
    request = rewriter.transform(granite.ChatCompletion.model_validate({"messages": MESSAGES}))
    return [{"role": one.role, "content": one.content} for one in request.messages]


NAMES = [f"{name}-{kind}" for name in INTRINSICS for kind in ("lora", "alora")]


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_and_the_probabilities_are_those_of_granite_common_and_peft(
    bundle: Path, loraplex: Loraplex, verdicts: Mapping[str, Verdict], name: str
) -> None:
    start = INTRINSICS[name.partition("-")[0]][1]
    tokenizer: Any = AutoTokenizer.from_pretrained(bundle)
    asked = tokenizer.apply_chat_template(rewritten(bundle / name), add_generation_prompt=True)["input_ids"]
    prompt = [*asked, *tokenizer(start, add_special_tokens=False)["input_ids"]]
    request = ClassifyRequest(
        input=tuple(Message(role=one["role"], content=one["content"]) for one in MESSAGES), classifiers=(name,)
    )
    [(_, text, token_ids)] = loraplex.show_prompt(request)
    assert list(token_ids) == prompt and text.endswith(ASSISTANT + start)

    verdict = verdicts[name]
    assert verdict.error is None and verdict.scores is not None and verdict.label_mass is not None
    labels = {label: tokenizer(label, add_special_tokens=False)["input_ids"] for label in verdict.scores}
    oracle = PeftOracle(bundle, bundle / name, num_labels=None)
    expected = dict(zip(labels, oracle.label_log_probs(prompt, list(labels.values())), strict=True))
    mass = math.fsum(map(math.exp, expected.values()))
    assert verdict.label_mass == pytest.approx(mass, abs=TOLERANCE)
    for label, log_prob in expected.items():
        assert verdict.scores[label] == pytest.approx(math.exp(log_prob) / mass, abs=TOLERANCE)
    if name.startswith("requirement"):  # granite-common knows true and false as "True" and "False", which match nothing
        assert decoded(bundle / name, start, expected) == (1.0 if expected["true"] > expected["false"] else 0.0)
    elif not name.startswith("answerability"):  # where it takes a label's first token for all of it
        assert verdict.value == pytest.approx(decoded(bundle / name, start, expected), abs=TOLERANCE)


def decoded(folder: Path, start: str, log_probs: Mapping[str, float]) -> float:
    """What granite-common makes of an answer whose label had these log probabilities, its alternatives included."""
    best = max(log_probs, key=log_probs.__getitem__)
    end = start.count('"') % 2 * '"' + start.count("{") * "}"
    tops = [{"token": label, "logprob": log_prob} for label, log_prob in log_probs.items()]
    tokens = [{"token": start, "logprob": 0.0, "top_logprobs": []}] if start else []
    tokens.append({"token": best, "logprob": log_probs[best], "top_logprobs": tops})
    tokens.append({"token": end, "logprob": 0.0, "top_logprobs": []})
    message = {"role": "assistant", "content": start + best + end}
    answer = {"choices": [{"index": 0, "message": message, "logprobs": {"content": tokens}}]}
    processor = output.IntrinsicsResultProcessor(config_file=folder / IO_YAML)
    made = processor.transform(granite.ChatCompletionResponse.model_validate(answer))
    value = json.loads(made.choices[0].message.content)["likelihood"]
    return float(value["score"] if isinstance(value, dict) else value)
