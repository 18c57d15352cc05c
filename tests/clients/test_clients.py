"""Programs that were written for OpenAI's and vLLM's servers, unchanged, against ours: `make test-clients`.

They run in an environment of their own, `.venv-clients`, which holds what they need beyond `.venv`. The server and the
tests run in `.venv`.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import serving
import tiny

BIN = serving.ROOT / ".venv-clients/bin"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "TOKENIZERS_PARALLELISM": "false",
}
ADAPTERS = ("task0", "task1")
QUESTIONS = ["Customer: is it done?", "Customer: hello, a table for two", "Agent: at what time?"]
CHOICES = [" yes", " no", " not at all"]

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not BIN.is_dir(), reason="needs .venv-clients: make test-clients"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_bundle(tmp_path_factory.mktemp("clients") / "bundle", len(ADAPTERS))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(bundle, "--dtype", "float32") as server:
        yield server


def run(tmp_path: Path, program: str, *arguments: object) -> str:
    """Run a program of `.venv-clients` to its end. Return what it prints."""
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "hub")}
    environment.pop("PYTHONPATH", None)
    command = list(map(str, (BIN / program, *arguments)))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


# ------------------------------------------------------------------------------------------------- lm-eval


@pytest.fixture(scope="module")
def samples(
    bundle: Path, server: serving.Server, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Return what lm-eval found with a task of each kind, by the task's name: one for each question."""
    folder = tmp_path_factory.mktemp("lm_eval")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps({"text": text, "choices": CHOICES}) + "\n" for text in QUESTIONS))
    tasks: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "written": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "yes",
            "generation_kwargs": {"until": ["\n", "Customer:"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "bypass"}],
        },
    }
    for name, task in tasks.items():
        read = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **read, **task}))  # JSON is YAML
    asked = f"model=task0,base_url={server.url}/v1/completions,tokenizer={bundle},num_concurrent=4,max_length=256"
    which = ["--model", "local-completions", "--model_args", asked, "--tasks", ",".join(tasks)]
    run(folder, "lm_eval", "run", *which, "--include_path", folder, "--output_path", "out", "--log_samples")
    found = {}
    for name in tasks:
        [path] = folder.glob(f"out/*/samples_{name}_*.jsonl")
        found[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda one: int(one["doc_id"]))
        assert len(found[name]) == len(QUESTIONS)
    return found


@pytest.fixture(scope="module")
def peft(bundle: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(bundle, attn_implementation="eager", dtype=torch.float32)
    return PeftModel.from_pretrained(model, bundle / "task0").eval()


def log_likelihood(peft: Any, ids: list[int], num_context: int) -> tuple[float, bool]:
    """The log probability of the tokens after the context, and whether each is the likeliest one."""
    with torch.inference_mode():
        rows = peft(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)[num_context - 1 : -1]
    wanted = torch.tensor(ids[num_context:])
    return rows.gather(1, wanted[:, None]).sum().item(), bool((rows.argmax(-1) == wanted).all())


def test_lm_evals_log_likelihoods_are_pefts(samples: dict[str, list[dict[str, Any]]], bundle: Path, peft: Any) -> None:
    encode = AutoTokenizer.from_pretrained(bundle)
    for text, sample in zip(QUESTIONS, samples["choice"], strict=True):
        num_context = len(encode(text)["input_ids"])
        for choice, [[found, is_greedy]] in zip(CHOICES, sample["resps"], strict=True):
            expected = log_likelihood(peft, encode(text + choice)["input_ids"], num_context)
            assert float(found) == pytest.approx(expected[0], abs=1e-3)
            assert str(is_greedy) == str(expected[1])
    for text, sample in zip(QUESTIONS, samples["rolling"], strict=True):
        ids = [encode.bos_token_id, *encode(text)["input_ids"]]  # lm-eval puts its prefix token before
        [[found]] = sample["resps"]
        assert float(found) == pytest.approx(log_likelihood(peft, ids, 1)[0], abs=1e-3)


def test_lm_evals_texts_are_the_completions(samples: dict[str, list[dict[str, Any]]], server: serving.Server) -> None:
    with serving.client(server) as http:
        for text, sample in zip(QUESTIONS, samples["written"], strict=True):
            body = {"model": "task0", "prompt": text, "max_tokens": 8, "temperature": 0, "stop": ["\n", "Customer:"]}
            assert sample["resps"] == [[http.post("/v1/completions", json=body).json()["choices"][0]["text"]]]


# ------------------------------------------------------------------------------------------------- guidellm


@pytest.mark.parametrize(("adapter", "path"), [("task0", "/v1/completions"), ("task1", "/v1/chat/completions")])
def test_guidellm_measures_an_adapter(
    server: serving.Server, bundle: Path, tmp_path: Path, adapter: str, path: str
) -> None:
    report = tmp_path / "report.json"
    run(
        tmp_path,
        "guidellm",
        "run",
        *("--backend", f"kind=openai_http,target={server.url},model={adapter},request_format={path}"),
        *("--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=5"),
        *("--tokenizer", f"kind=huggingface_auto,model={bundle}"),
        *("--data", "kind=synthetic_text,prompt_tokens=30,output_tokens=8"),
        *("--output", f"kind=json,path={report}", "--disable-console"),
    )
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (5, 0)
    for one in requests["successful"]:
        assert json.loads(one["request_args"])["body"]["model"] == adapter
        assert one["output_tokens"] == 8  # by `ignore_eos`
        assert one["prompt_tokens"] >= 30 and one["time_to_first_token_ms"] > 0


# ------------------------------------------------------------------------------------------------- libraries


LANGCHAIN = """
import json, sys
from langchain_openai import ChatOpenAI, OpenAI

found = {}
for model in sys.argv[2:]:
    options = dict(base_url=sys.argv[1], api_key="none", model=model, temperature=0, max_tokens=4)
    chat, llm = ChatOpenAI(logprobs=True, top_logprobs=3, **options), OpenAI(**options)
    answer = chat.invoke("is it done?")
    found[model] = {
        "chats": [answer.content, *(one.content for one in chat.batch(["is it done?"] * 2)),
                  "".join(one.content for one in chat.stream("is it done?"))],
        "texts": [llm.invoke("hello"), *llm.batch(["hello"] * 2), "".join(llm.stream("hello"))],
        "num_tokens": [len(answer.response_metadata["logprobs"]["content"]), answer.usage_metadata["output_tokens"]],
    }
print(json.dumps(found))
"""
LITELLM = """
import json, sys
import litellm

found = {}
options = dict(api_base=sys.argv[1], api_key="none", temperature=0, max_tokens=4)
messages = [{"role": "user", "content": "is it done?"}]
for model in sys.argv[2:]:
    chats = []
    for provider in ("openai", "hosted_vllm"):
        chat = dict(model=f"{provider}/{model}", messages=messages, **options)
        answer = litellm.completion(logprobs=True, top_logprobs=2, **chat)
        chats.append(answer.choices[0].message.content)
        chats.append("".join(one.choices[0].delta.content or "" for one in litellm.completion(stream=True, **chat)))
    text = litellm.text_completion(model=f"text-completion-openai/{model}", prompt="hello", logprobs=1, **options)
    found[model] = {
        "chats": chats,
        "texts": [text.choices[0].text],
        "num_tokens": [len(answer.choices[0].logprobs.content), answer.usage.completion_tokens],
    }
print(json.dumps(found))
"""


@pytest.mark.parametrize("program", [LANGCHAIN, LITELLM], ids=["langchain-openai", "litellm"])
def test_a_library_gets_the_adapters_answers(server: serving.Server, tmp_path: Path, program: str) -> None:
    found = json.loads(run(tmp_path, "python", "-c", program, f"{server.url}/v1", *ADAPTERS).splitlines()[-1])
    with serving.client(server) as http:
        for model in ADAPTERS:
            asked: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 4}
            chat, text = (
                http.post(path, json=asked | given).json()
                for path, given in (
                    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "is it done?"}]}),
                    ("/v1/completions", {"prompt": "hello"}),
                )
            )
            assert set(found[model]["chats"]) == {chat["choices"][0]["message"]["content"]}
            assert set(found[model]["texts"]) == {text["choices"][0]["text"]}
            assert set(found[model]["num_tokens"]) == {chat["usage"]["completion_tokens"]}
    assert found["task0"] != found["task1"]
