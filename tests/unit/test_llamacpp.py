"""llama.cpp's server as a system. A small HTTP server answers as the real one was recorded to (b11434); the real one is
asked where LORAPLEX_LLAMA_SERVER names the program."""

import asyncio
import json
import math
import os
import struct
import threading
from array import array
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import gguf_base
import tiny
from loraplex import Loraplex
from loraplex.bench import gguf
from loraplex.bench.call import Call, Reply
from loraplex.bench.llamacpp import LlamaCpp
from loraplex.bench.load import Job, Load
from loraplex.bench.prompts import Prompts
from loraplex.bench.system import SystemEnded
from loraplex.bundle import open_bundle
from loraplex.errors import AdapterError, ConfigurationError, UnknownClassifierError, UnsupportedModelError
from loraplex.types import ClassifyRequest

PROGRAM = os.environ.get("LORAPLEX_LLAMA_SERVER")
TEXT = "Customer: is my payment done? yes or no\nAgent: yes, it is done\nCustomer: no, it is not"
ACTIVE = ("active0", "active1", "active2")  # the last has labels of several tokens


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_shared_bundle(tmp_path_factory.mktemp("llama") / "bundle", tiny.FAMILIES["llama"])


JOB: dict[str, Any] = {name: 0 for name in ("index", "conversation") if name in Job.__dataclass_fields__}


# ------------------------------------------------------------------------------------------------- a recorded server


def log_prob(token_id: int) -> float:
    """The base's: each token is likelier than those with higher ids."""
    return -(token_id + 1) * math.log(2)


class Recorded(ThreadingHTTPServer):
    """Answers as llama.cpp's server does. Knows the tokenizer, and no model."""

    def __init__(self, tokenizer: Any, adapters: tuple[str, ...] = (), num_tokens: int = tiny.VOCAB_SIZE) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.adapters, self.num_tokens = tokenizer, adapters, num_tokens
        self.bodies: list[dict[str, Any]] = []
        self.cached: Iterator[int] = iter(())
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.url = f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/props":
            return 200, {
                "total_slots": 4,
                "model_path": "/models/tiny.gguf",
                "model_ftype": "all F32",
                "build_info": "b1",
            }
        if path == "/v1/models":
            meta = {"vocab_type": 2, "n_vocab": self.num_tokens, "n_ctx": 256, "n_ctx_train": 256, "n_embd": 32}
            return 200, {"object": "list", "data": [{"id": "tiny.gguf", "object": "model", "meta": meta}]}
        if path == "/lora-adapters":
            listed = [
                {"id": at, "path": f"/a/{name}.gguf", "scale": 1.0, "task_name": "", "prompt_prefix": ""}
                for at, name in enumerate(self.adapters)
            ]
            return 200, listed
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["content"])["input_ids"]}
        if path == "/completion":
            self.bodies.append(body)
            return self.refusal or (200, self.completion(body))
        return 404, {"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        [[sampled, _]] = body["logit_bias"]
        num_tokens = len(body["prompt"])

        def one(token_id: int) -> dict[str, Any]:
            return {"id": token_id, "token": "x", "bytes": [120], "logprob": log_prob(token_id)}

        return {
            "index": 0,
            "content": "x",
            "tokens": [],
            "id_slot": 0,
            "stop": True,
            "tokens_predicted": 1,
            "tokens_evaluated": num_tokens,
            "stop_type": "limit",
            "timings": {
                "cache_n": next(self.cached, num_tokens - 4),
                "prompt_n": 4,
                "prompt_ms": 2.0,
                "predicted_n": 1,
                "predicted_ms": 0.5,
            },
            "completion_probabilities": [{**one(sampled), "top_logprobs": [one(at) for at in range(body["n_probs"])]}],
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Recorded

    def do_GET(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
        status, answer = self.server.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(bundle: Path) -> Iterator[Recorded]:
    with Recorded(AutoTokenizer.from_pretrained(bundle)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    bundle: Path, names: tuple[str, ...], *calls: Call | str, **options: Any
) -> tuple[list[Reply], dict[str, Any], LlamaCpp]:
    async def run() -> list[Reply]:
        try:
            await system.start(names)
            given = [Call(input=one, classifiers=names) if isinstance(one, str) else one for one in calls]
            return [await system.ask(one) for one in given]
        finally:
            await system.close()

    system = LlamaCpp(open_bundle(bundle), **{"log": bundle.parent / "llamacpp.log", **options})
    return asyncio.run(run()), system.facts, system


def test_the_prompts_are_ours_token_for_token_and_no_probability_is_made_up(bundle: Path, server: Recorded) -> None:
    [reply], facts, _ = ask(bundle, ACTIVE, TEXT, url=server.url)
    assert facts["prompts_as"] == "token ids" and facts["adapters"] is False
    prompts = Prompts(open_bundle(bundle), ACTIVE)
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        shown = {name: ids for name, _, ids in loraplex.show_prompt(ClassifyRequest(input=TEXT, classifiers=ACTIVE))}
    asked = [tuple(body["prompt"]) for body in server.bodies]
    assert asked[0] == shown["active0"] and set(shown.values()) <= set(asked)
    for name in ACTIVE:
        labels = prompts.questions[name].label_ids
        found = {label: math.exp(sum(map(log_prob, ids))) for label, ids in labels.items()}
        answer = reply.verdicts[name]
        assert answer.label == max(found, key=found.__getitem__)
        assert answer.scores == pytest.approx({label: one / sum(found.values()) for label, one in found.items()})
        assert answer.label_mass == pytest.approx(sum(found.values()))
        for ids in labels.values():  # a later token is asked for behind those before it
            for end, token_id in enumerate(ids):
                sent = [body for body in server.bodies if tuple(body["prompt"]) == shown[name] + ids[:end]]
                assert token_id < 20 or token_id in [body["logit_bias"][0][0] for body in sent]
    assert (reply.status, reply.prompt_tokens) == ("ok", sum(map(len, shown.values())))
    assert reply.computed_tokens == 4 * len(asked) and reply.engine_ms == pytest.approx(2.5 * len(asked))
    assert all(body["cache_prompt"] and body["n_predict"] == 1 and "lora" not in body for body in server.bodies)


def test_labels_beyond_the_likeliest_tokens_are_counted(bundle: Path, server: Recorded) -> None:
    async def run() -> dict[str, Any]:
        system = LlamaCpp(open_bundle(bundle), log=bundle.parent / "log", url=server.url)
        await system.start(["active0"])
        call = Call(input=TEXT, classifiers=("active0",))
        [sample] = await system.run(Load(jobs=(Job(**JOB, turns=((call,),)),), concurrency=1), lambda: None)
        await system.close()
        assert sample.reply.status == "ok"
        return system.facts

    assert asyncio.run(run())["labels_asked_again"] == len(server.bodies) - 1 == 1


def test_a_log_probability_that_rounds_above_0_is_0(
    bundle: Path, server: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "log_prob", lambda _: 1e-8)
    [reply], _, _ = ask(bundle, ("active0",), TEXT, url=server.url)
    assert reply.status == "ok" and set((reply.verdicts["active0"].scores or {}).values()) == {0.5}


def test_tokens_are_cached_where_the_first_request_finds_them(bundle: Path, server: Recorded) -> None:
    server.cached = iter([0, 50])
    [reply], _, _ = ask(bundle, ("active0",), TEXT, url=server.url)
    assert len(server.bodies) == 2 and reply.cached_tokens == 0


def test_a_classifier_without_labels_answers_with_the_likeliest_token(bundle: Path, server: Recorded) -> None:
    [reply], _, _ = ask(bundle, ("verbatim",), TEXT + "<|ask|>", url=server.url)
    assert reply.verdicts["verbatim"].label == server.tokenizer.decode([0])
    assert reply.verdicts["verbatim"].scores is None and len(server.bodies) == 1


def test_adapters_are_named_by_their_files(bundle: Path, server: Recorded) -> None:
    server.adapters = ("other", "active1", "active0")
    _, facts, system = ask(bundle, ("active0", "active1"), TEXT, url=server.url)
    assert facts["adapters"] is True and system.shares_prefix
    prompts = {tuple(body["prompt"][-8:]): body["lora"] for body in server.bodies}
    assert sorted(lora[0]["id"] for lora in prompts.values()) == [1, 2]
    assert facts["adapters_begin"] != 0  # the recorded server's cache ends at no activation


def test_one_adapter_that_lacks_leaves_all_to_the_base(bundle: Path, server: Recorded) -> None:
    server.adapters = ("active0",)
    _, facts, system = ask(bundle, ("active0", "active1"), TEXT, url=server.url)
    assert facts["adapters"] is False and "active1" in facts["no_adapters"] and system.shares_prefix
    assert all(body["lora"] == [{"id": 0, "scale": 0.0}] for body in server.bodies)


def test_another_tokenizer_gets_texts_and_its_own_labels(bundle: Path, server: Recorded, tmp_path: Path) -> None:
    tiny.metaspace_tokenizer().save_pretrained(tmp_path)
    server.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    [reply], facts, system = ask(bundle, ("active2",), TEXT, url=server.url)
    assert facts["prompts_as"] == "text" and reply.status == "ok"
    assert all(isinstance(body["prompt"], str | list) for body in server.bodies)
    text = server.bodies[0]["prompt"]
    assert text.startswith(TEXT)
    for label, ids in system._labels["active2"].items():
        whole = server.tokenizer(text + label)["input_ids"]
        assert tuple(whole[-len(ids) :]) == ids
    longer = [body["prompt"] for body in server.bodies if isinstance(body["prompt"], list)]
    assert longer and all(one[0] == text and all(isinstance(at, int) for at in one[1:]) for one in longer)


@pytest.mark.parametrize(
    ("refusal", "status", "error"),
    [
        ((503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}), "refused", "503"),
        ((400, {"error": {"code": 400, "type": "exceed_context_size_error", "n_ctx": 256}}), "failed", "400"),
        ((200, {"index": 0, "content": "\ufffd", "timings": {"cache_n": 0}}), "failed", "no_probabilities"),
        ((200, "text"), "failed", "no_probabilities"),
    ],
)
def test_what_the_server_answers_is_a_reply(
    bundle: Path, server: Recorded, refusal: tuple[int, Any], status: str, error: str
) -> None:
    server.refusal = refusal
    [reply], _, _ = ask(bundle, ("active0",), TEXT, url=server.url)
    assert (reply.status, reply.error, reply.verdicts) == (status, error, {})


def test_a_conversation_that_makes_no_prompt_is_a_reply(bundle: Path, server: Recorded) -> None:
    [reply], _, _ = ask(bundle, ("active0",), "  ", url=server.url)
    assert (reply.status, reply.error) == ("failed", "invalid_request")


def test_what_cannot_be_asked_is_refused(bundle: Path, server: Recorded, tmp_path: Path) -> None:
    with pytest.raises(UnknownClassifierError, match="nobody"):
        ask(bundle, ("nobody",), url=server.url)
    server.num_tokens = 100
    with pytest.raises(ConfigurationError, match="another base: its n_vocab is 100"):
        ask(bundle, ("active0",), url=server.url)
    with pytest.raises(ConfigurationError, match="does not answer /props"):
        ask(bundle, ("active0",), url="http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match="--url llamacpp=tcp://x: is not the URL"):
        ask(bundle, ("active0",), url="tcp://x")


def test_a_program_that_ends_at_once_is_told(bundle: Path, tmp_path: Path) -> None:
    program, model = tmp_path / "llama-server", tmp_path / "tiny.gguf"
    program.write_text("#!/bin/sh\necho 'no such library' >&2; exit 3\n")
    with pytest.raises(ConfigurationError, match=r"llamacpp: does not start: .*Permission denied"):
        ask(bundle, ("active0",), server=program, model=model)
    program.chmod(0o755)
    with pytest.raises(ConfigurationError, match=r"llamacpp: does not start: it ended with status 3; see .*\.log"):
        ask(bundle, ("active0",), server=program, model=model)


# ------------------------------------------------------------------------------------------------- adapters as GGUF


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the file holds, read by the format's description."""
    data, at = path.read_bytes(), 0

    def take(form: str) -> Any:
        nonlocal at
        [found] = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return found

    def text() -> str:
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind: int) -> Any:
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return text() if kind == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    assert (take("4s"), take("I")) == (b"GGUF", 3)
    num_tensors, num_keys = take("Q"), take("Q")
    metadata = {text(): value(take("I")) for _ in range(num_keys)}
    infos = []
    for _ in range(num_tensors):
        name, dims = text(), take("I")
        shape = [take("Q") for _ in range(dims)][::-1]
        assert take("I") == 0  # float32
        infos.append((name, shape, take("Q")))
    start = at + -at % gguf.ALIGNMENT
    tensors = {}
    for name, shape, offset in infos:
        assert offset % gguf.ALIGNMENT == 0
        count = math.prod(shape)
        tensors[name] = torch.tensor(struct.unpack_from(f"<{count}f", data, start + offset)).reshape(shape)
    return metadata, tensors


def test_an_adapter_is_written_with_its_scaling_and_llama_cpps_order_of_rows(bundle: Path, tmp_path: Path) -> None:
    prompts = Prompts(open_bundle(bundle), ("active1", "plain"))
    config, [active, plain] = prompts.config, prompts.questions.values()
    gguf.write_adapter(tmp_path / "a.gguf", active.weights, active.version.source.path, config, behind=(7, 8))
    metadata, tensors = read(tmp_path / "a.gguf")
    assert metadata["general.architecture"] == "llama" and metadata["adapter.lora.alpha"] == 0.0
    assert metadata["adapter.alora.invocation_tokens"] == [7, 8]
    assert len(tensors) == 2 * len(active.weights.modules)
    for path, lora in active.weights.modules.items():
        [*_, layer, room, last] = path.split(".")
        name = f"blk.{layer}.{gguf.MODULES[f'{room}.{last}']}.weight"
        wanted = lora.scaling * lora.lora_B @ lora.lora_A
        if last in ("q_proj", "k_proj"):  # a head's rows 0 1 2 3 | 4 5 6 7 become 0 4 1 5 2 6 3 7
            order = [head * 8 + half * 4 + at for head in range(len(wanted) // 8) for at in range(4) for half in (0, 1)]
            wanted = wanted[order]
        torch.testing.assert_close(tensors[f"{name}.lora_b"] @ tensors[f"{name}.lora_a"], wanted)
    gguf.write_adapter(tmp_path / "p.gguf", plain.weights, plain.version.source.path, config)
    assert "adapter.alora.invocation_tokens" not in read(tmp_path / "p.gguf")[0]


def test_qwens_rows_keep_their_order(tmp_path: Path) -> None:
    bundle = tiny.save_bundle(tmp_path / "bundle", 1, tiny.FAMILIES["qwen2"])
    prompts = Prompts(open_bundle(bundle), ("task0",))
    weights = prompts.questions["task0"].weights
    gguf.write_adapter(tmp_path / "a.gguf", weights, bundle, prompts.config)
    metadata, tensors = read(tmp_path / "a.gguf")
    lora = weights.modules["model.layers.1.self_attn.q_proj"]
    assert metadata["general.architecture"] == "qwen2"
    torch.testing.assert_close(tensors["blk.1.attn_q.weight.lora_b"], lora.scaling * lora.lora_B)


def test_what_llama_cpp_would_compute_otherwise_is_not_written(bundle: Path, tmp_path: Path) -> None:
    prompts = Prompts(open_bundle(bundle), ("active0",))
    weights, path = prompts.questions["active0"].weights, tmp_path / "a.gguf"
    with pytest.raises(AdapterError, match="no token follows it"):
        gguf.write_adapter(path, weights, bundle, prompts.config)
    with pytest.raises(UnsupportedModelError, match="'gemma2' are not written"):
        gguf.write_adapter(path, weights, bundle, tiny.FAMILIES["gemma2"], behind=(1,))
    tiny.save_adapter(bundle, tmp_path / "dora", contract=tiny.CONTRACT, use_dora=True)
    dora = Prompts(open_bundle(bundle).with_adapters({"dora": tmp_path / "dora"}), ("dora",)).questions["dora"]
    with pytest.raises(AdapterError, match="no such adapter"):
        gguf.write_adapter(path, dora.weights, bundle, prompts.config)


def test_every_kind_of_value_is_written(tmp_path: Path) -> None:
    given: dict[str, gguf.Value] = {"a": True, "b": 7, "c": 0.5, "d": "ä", "e": ["x", "yz"], "f": array("i", [-1])}
    gguf.write(tmp_path / "v.gguf", given, {"t": torch.arange(3.0)})
    metadata, tensors = read(tmp_path / "v.gguf")
    assert metadata == {**given, "f": [-1]} and tensors["t"].tolist() == [0.0, 1.0, 2.0]


# ------------------------------------------------------------------------------------------------- the real server


@pytest.mark.skipif(PROGRAM is None, reason="LORAPLEX_LLAMA_SERVER names no llama-server")
@pytest.mark.parametrize("names", [ACTIVE, (*ACTIVE, "plain"), ("verbatim",)], ids=len)
def test_the_real_servers_probabilities_are_ours(bundle: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """All of them, in any order, with whatever the prompt cache holds."""
    gguf_base.write_base(bundle, tmp_path / "tiny.gguf")
    options = ("--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32", "--threads", "1")
    given = {"server": Path(PROGRAM or ""), "model": tmp_path / "tiny.gguf", "arguments": options}
    texts = [TEXT, "Customer: hello", TEXT + "\nAgent: well", TEXT] * 2
    if names == ("verbatim",):  # llama.cpp would adapt one token too early
        [reply], facts, _ = ask(bundle, names, TEXT + "<|ask|>", **given)
        assert facts["adapters"] is False and "no token follows" in facts["no_adapters"] and reply.status == "ok"
        return
    replies, facts, system = ask(bundle, names, *texts, **given)
    assert facts["adapters"] is True and facts["prompts_as"] == "token ids" and "adapters_begin" not in facts
    assert system.pid is not None and system.shares_prefix == (names == ACTIVE)
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        for text, reply in zip(texts, replies, strict=True):
            for name, verdict in ((one.classifier, one) for one in loraplex.classify(text, names).verdicts):
                assert verdict.scores is not None and reply.verdicts[name].label == verdict.label
                assert reply.verdicts[name].scores == pytest.approx(verdict.scores, abs=1e-4)
                assert reply.verdicts[name].label_mass == pytest.approx(verdict.label_mass, rel=1e-2)
    assert replies[-1].cached_tokens > 0.6 * replies[-1].prompt_tokens


@pytest.mark.skipif(PROGRAM is None, reason="LORAPLEX_LLAMA_SERVER names no llama-server")
def test_a_program_that_dies_ends_the_run(bundle: Path, tmp_path: Path) -> None:
    gguf_base.write_base(bundle, tmp_path / "tiny.gguf")

    async def run() -> None:
        system = LlamaCpp(
            open_bundle(bundle), log=tmp_path / "log", server=Path(PROGRAM or ""), model=tmp_path / "tiny.gguf"
        )
        try:
            await system.start(["active0"])
            assert system.pid is not None
            os.kill(system.pid, 9)
            call = Call(input=TEXT, classifiers=("active0",))
            await system.run(Load(jobs=(Job(**JOB, turns=((call,),)),) * 3, concurrency=1), lambda: None)
        finally:
            await system.close()

    with pytest.raises(SystemEnded, match="it ended with status"):
        asyncio.run(run())
