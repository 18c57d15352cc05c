"""What is vLLM's own: kinds of requests that it mixes up, its limits. Where it is installed."""

import asyncio
import json
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from loraplex import Loraplex
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.config import EngineConfig
from loraplex.engine.sequence import Sequence, SequenceOutput, Target
from loraplex.environment import variable
from loraplex.errors import AdapterError, ConfigurationError, QueueFullError, UnsupportedModelError
from loraplex.generation import GenerateRequest
from loraplex.sagemaker.handlers import Model, input_fn, model_fn, predict_fn
from loraplex.types import ClassifyRequest

pytestmark = [
    pytest.mark.skipif(not tiny.HAS_VLLM, reason="vLLM is not installed here: make test-vllm"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's
]

OPTIONS: dict[str, Any] = {"dtype": "float32", "backend": "vllm", "kv_cache": "64MiB"}
EAGER = "enforce_eager=true"
TEXT = "Customer: is it done?\nAgent: yes, it is"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_bundle(tmp_path_factory.mktemp("vllm") / "bundle")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From where adapters may be loaded."""
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def handled(bundle: Path, root: Path) -> Iterator[Model]:
    """Loaded by SageMaker's handlers, from variables of the environment."""
    options = {**OPTIONS, "adapter_root": root, "max_queue_tokens": 20_000, "vllm_arg": f"{EAGER} max_num_seqs=16"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            patch.setenv(variable(name), str(value))
        model = model_fn(bundle)
    assert isinstance(model, Model)
    with model.loraplex:
        yield model


@pytest.fixture(scope="module")
def vllm(handled: Model) -> Loraplex:
    return handled.loraplex


# --------------------------------------------------------------------------------------------- answers


def test_rows_of_the_base_and_top_tokens_beside_adapters_are_as_alone(vllm: Loraplex) -> None:
    """vLLM computes the base's rows with an adapter where a CPU has both in a batch, and leaves a row its top tokens
    where another row asks for certain tokens. So they take turns."""
    requests: list[Any] = [GenerateRequest(prompt=TEXT, max_tokens=6)]
    requests += [GenerateRequest(prompt=TEXT, adapter=f"task{i}", max_tokens=6, num_top=5) for i in range(3)]
    requests += [ClassifyRequest(input=TEXT, classifiers=(f"task{i}",)) for i in range(3)]

    async def ask(one: Any) -> Any:
        if isinstance(one, ClassifyRequest):
            [verdict] = (await vllm.service.classify(one)).verdicts
            return [(verdict.label, math.log(verdict.confidence or 0))]
        tokens = (await vllm.service.generate(one)).tokens
        assert all(len(token.top) == one.num_top for token in tokens)
        return [(token.id, token.log_prob) for token in tokens]

    async def ask_all(times: int) -> list[Any]:
        return await asyncio.gather(*(ask(one) for _ in range(times) for one in requests))

    alone = [vllm.run(ask(one)) for one in requests]
    for index, found in enumerate(vllm.run(ask_all(8))):
        for (answer, log_prob), (expected, expected_log_prob) in zip(found, alone[index % len(alone)], strict=True):
            assert answer == expected
            assert log_prob == pytest.approx(expected_log_prob, abs=1e-3)


def test_sagemakers_handlers_answer_as_it_does(handled: Model, vllm: Loraplex) -> None:
    bodies = [{"input_text": TEXT, "adapter_name": f"task{i}"} for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda body: predict_fn(input_fn(json.dumps(body)), handled), bodies))
    for body, [answer] in zip(bodies, found, strict=True):
        verdict = vllm.classify(TEXT, body["adapter_name"])[body["adapter_name"]]
        assert answer["predicted_text"] == verdict.label
        assert answer["confidence_score"] == pytest.approx(verdict.confidence, abs=1e-3)
    [base] = predict_fn({"input_text": TEXT}, handled)
    [token] = vllm.generate(TEXT).tokens
    assert base["predicted_text"] == token.text
    assert base["confidence_score"] == pytest.approx(math.exp(token.log_prob), abs=1e-3)


def test_any_number_of_tokens_may_be_asked(vllm: Loraplex, bundle: Path) -> None:
    """vLLM takes 128 a request. Also at two places, as labels of several tokens ask."""
    ids = tuple(range(40, 60))
    targets = [Target(position=-1, token_id=i) for i in range(300)] + [Target(position=-3, token_id=i) for i in (7, 9)]
    sequence = Sequence(token_ids=ids, slot=NO_ADAPTER, targets=tuple(targets))
    [output] = vllm.run(vllm.service.computing.compute_now([sequence]))
    assert isinstance(output, SequenceOutput)
    model: Any = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    with torch.inference_mode():
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [log_probs[target.position, target.token_id].item() for target in targets]
    assert output.log_probs == pytest.approx(expected, abs=1e-3)
    assert output.tokens[0].id == log_probs[-1].argmax()


def test_labels_of_many_tokens_do_not_compute_the_prompt_for_each(vllm: Loraplex, bundle: Path, root: Path) -> None:
    contract = {**tiny.CONTRACT, "labels": ["yes, it is done at last", "no, it is not done at all"]}
    tiny.save_adapter(bundle, root / "wordy", contract=contract, seed=3)
    vllm.load_adapter("wordy", str(root / "wordy"))
    text = "Customer: hello, I would like to book a table for two\nAgent: at what time?\n" * 2
    first, again = (vllm.classify(text, "wordy") for _ in range(2))
    vllm.unload_adapter("wordy")
    with Loraplex.load(bundle, dtype="float32", adapter_root=(str(root),)) as native:
        native.load_adapter("wordy", str(root / "wordy"))
        expected = native.classify(text, "wordy")
    assert first["wordy"].scores == pytest.approx(expected["wordy"].scores, abs=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    num_tokens = sum(len(tokenizer(label)["input_ids"]) for label in contract["labels"])
    assert first.usage.computed_tokens < first.usage.prompt_tokens + 64 * num_tokens
    assert again.usage.computed_tokens < 64 * num_tokens


def test_patterns_of_ranks_and_scalings_are_kept(vllm: Loraplex, bundle: Path, root: Path) -> None:
    tiny.save_adapter(
        bundle,
        root / "patterned",
        contract=tiny.CONTRACT,
        r=4,
        seed=5,
        use_rslora=True,
        rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7},
        alpha_pattern={"v_proj": 31},
        target_modules=["q_proj", "v_proj", "down_proj"],
        layers_to_transform=[0, 1],
    )
    vllm.load_adapter("patterned", str(root / "patterned"))
    [verdict] = vllm.classify(TEXT, "patterned").verdicts
    vllm.unload_adapter("patterned")
    with Loraplex.load(bundle, dtype="float32", adapter_root=(str(root),)) as native:
        native.load_adapter("patterned", str(root / "patterned"))
        [expected] = native.classify(TEXT, "patterned").verdicts
    assert verdict.scores == pytest.approx(expected.scores, abs=1e-3)
    assert verdict.label_mass == pytest.approx(expected.label_mass, abs=1e-3)


# --------------------------------------------------------------------------------------------- bases of its own

QUANTIZED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's int8 products need AMX in this form")
def test_a_quantized_base(bundle: Path, tmp_path: Path) -> None:
    """Eight bits a weight and an activation, and adapters on it: nearly the verdicts of the base it was made of."""
    quantized = shutil.copytree(bundle, tmp_path / "quantized")
    tensors = {}
    for name, tensor in load_file(bundle / "model.safetensors").items():
        tensors[name] = tensor
        if "_proj" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor / scale).round().to(torch.int8)
            tensors[name.replace(".weight", ".weight_scale")] = scale
    save_file(tensors, quantized / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((bundle / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": QUANTIZED}))
    with pytest.raises(UnsupportedModelError, match=r"quantized.*--backend vllm"):
        Loraplex.load(quantized)
    with Loraplex.load(bundle, dtype="float32") as native:
        expected = native.classify(TEXT).verdicts
    with Loraplex.load(quantized, **{**OPTIONS, "dtype": "bfloat16"}, vllm_arg=(EAGER,)) as loraplex:
        verdicts = loraplex.classify(TEXT).verdicts
    assert [one.label for one in verdicts] == [one.label for one in expected]
    assert [one.confidence for one in verdicts] == pytest.approx([one.confidence for one in expected], abs=0.1)


# --------------------------------------------------------------------------------------------- refused


def test_what_it_cannot_do_is_refused_and_loses_nothing(vllm: Loraplex, bundle: Path, root: Path) -> None:
    before = vllm.classify(TEXT, "task0").verdicts[0]
    invocation = [tiny.SPECIAL_TOKENS.index("<|ask|>")]
    refused: list[tuple[dict[str, Any], str, str]] = [
        ({"alora_invocation_tokens": invocation}, "aLoRA", "--backend native"),
        ({"use_dora": True}, "DoRA", "--backend native"),
        ({"lora_bias": True}, "lora_bias", "--backend native"),
        ({"target_modules": ["q_proj", "lm_head"]}, "output head", "--backend native"),
        ({"r": 17}, "rank 17 is above 16", "max_lora_rank=32"),
    ]
    for number, (config, problem, remedy) in enumerate(refused):
        folder = root / f"refused{number}"
        tiny.save_adapter(bundle, folder, contract=tiny.CONTRACT, **config)
        with pytest.raises(AdapterError) as caught:
            vllm.load_adapter("task0", str(folder))
        assert problem in caught.value.message and remedy in caught.value.remedy
    after = vllm.classify(TEXT, "task0").verdicts[0]
    assert after.adapter == before.adapter and after.scores == pytest.approx(before.scores, abs=1e-6)


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("max_model_len", "not KEY=VALUE"),
        ("max_modell_len=9", "may be set"),
        ("trust_remote_code=true", "may be set"),
        ("--load-format=pt", "may be set"),
        ('lora_target_modules=["q_proj"]', "may be set"),  # would leave adapters out in silence
        ("log_config_file=log.json", "may be set"),  # which may name any function to be called
        ("worker_cls=os.system", "may be set"),
        ("max_loras=abc", "vLLM refuses"),
        ("max_model_len=100000", "does not take"),
        ("max_model_len=auto", "does not take"),
        ("max_lora_rank=17", "vLLM refuses"),
        ("max_num_seqs=0", "vLLM refuses"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_loaded(bundle: Path, argument: str, problem: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigurationError, match=problem):
        Loraplex.load(bundle, **OPTIONS, vllm_arg=(argument,))
    assert time.monotonic() - started < 10


def test_an_argument_given_twice_and_no_room_for_kv_are_refused(bundle: Path) -> None:
    with pytest.raises(ConfigurationError, match="given twice"):
        Loraplex.load(bundle, **OPTIONS, vllm_arg=("max_loras=2", "--max-loras=3"))
    with pytest.raises(ConfigurationError, match="--kv-cache 0"):
        Loraplex.load(bundle, **{**OPTIONS, "kv_cache": "0"})


def test_the_other_device_is_refused(bundle: Path) -> None:
    from loraplex.executors.vllm import VllmExecutor

    with pytest.raises(ConfigurationError, match="computes on cpu"):
        VllmExecutor(EngineConfig(backend="vllm")).check_device(torch.device("cuda"))


# --------------------------------------------------------------------------------------------- full, late


def test_more_than_the_queue_holds_is_refused_at_once(vllm: Loraplex) -> None:
    request = ClassifyRequest(input="Customer: hello " * 10, classifiers="*")

    async def flood() -> list[Any]:
        asked = (vllm.service.classify(request) for _ in range(200))
        answers: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        return answers

    results = vllm.run(flood())
    refused = [one for one in results if isinstance(one, QueueFullError)]
    assert 0 < len(refused) < 200 and all(one.retry_after_s > 0 for one in refused)
    assert all(isinstance(one, QueueFullError) or len(one.verdicts) == 4 for one in results)
    stats = vllm.service.stats()
    assert (stats.num_waiting, stats.num_running) == (0, 0)


def test_who_leaves_is_dropped(vllm: Loraplex) -> None:
    async def leave() -> float:
        request = GenerateRequest(prompt="Customer: hi", max_tokens=200, logit_bias={1: -100.0})
        tasks = [asyncio.create_task(vllm.service.generate(request)) for _ in range(8)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        started = time.monotonic()
        await asyncio.gather(*tasks, return_exceptions=True)
        while vllm.service.computing.computation.num_waiting_tokens:
            await asyncio.sleep(0.001)
        return time.monotonic() - started

    started = time.monotonic()
    vllm.run(vllm.service.generate(GenerateRequest(prompt="Customer: hi", max_tokens=200, logit_bias={1: -100.0})))
    assert vllm.run(leave()) < time.monotonic() - started
    vllm.classify(TEXT)
