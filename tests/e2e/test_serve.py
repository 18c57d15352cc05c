"""The commands as users run them, against the demo bundle."""

import json
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import serving
import tiny
from loraplex import Loraplex, UnknownClassifierError
from loraplex.cli.serve import example_request
from loraplex.config import ServerConfig
from loraplex.errors import ConfigurationError, ContractError, InvalidRequestError, NotReadyError
from loraplex.server.process import listen

# Written for this test. Each names what must be answered yes and what no.
CONVERSATIONS = [
    (
        "Customer: Can you find me a good Italian restaurant in San Jose?\nAgent: There is Bella Mia. "
        "Shall I book a table?\nCustomer: No, that is all I needed. Thanks for your help, goodbye!",
        {"issueResolved"},
        {"isTravelRelated", "wantsAlternatives"},
    ),
    (
        "Customer: I need a flight from Seattle to Chicago next Monday.\nAgent: There is one with Delta at 9 am for "
        "$210.\nCustomer: Is there another flight, maybe with a different airline?",
        {"isTravelRelated", "wantsAlternatives"},
        {"issueResolved", "isConfirming"},
    ),
    (
        "Customer: Please book a hotel room in Paris for two nights.\nAgent: Please confirm: one room at the Hotel Du "
        "Nord in Paris for two nights from March 3rd.\nCustomer: Yes, that is correct.",
        {"isConfirming", "isTravelRelated"},
        {"issueResolved", "wantsAlternatives", "isRejecting"},
    ),
    (
        "Customer: I am looking for a dentist in Oakland.\nAgent: How about Dr. Chen?\nCustomer: What is the address "
        "and the phone number?",
        {"isAskingInformation"},
        {"isTravelRelated", "issueResolved", "isConfirming"},
    ),
    (
        "Customer: Send 50 dollars to Anna from my checking account.\nAgent: Please confirm: 50 dollars to Anna from "
        "your checking account.\nCustomer: No, make it 80 dollars instead.",
        {"isRejecting", "isChangingDetails"},
        {"issueResolved", "isTravelRelated", "isConfirming"},
    ),
]


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[serving.Server]:
    with serving.imported_anew(), serving.serve(demo_bundle) as server:
        yield server


def test_the_printed_curl_line_works(server: serving.Server) -> None:
    run = subprocess.run(shlex.split(server.curl), capture_output=True, text=True, check=True)
    verdicts = {verdict["classifier"]: verdict["label"] for verdict in json.loads(run.stdout)["verdicts"]}
    assert len(verdicts) == 16
    assert verdicts["issueResolved"] == "yes"


def test_the_printed_request_loads_no_more_than_it_needs(tiny_bundle: Path) -> None:
    with Loraplex.load(tiny_bundle, preload="none") as loraplex:
        path, body = example_request(loraplex.service)
        assert path == "/v1/classify" and body["classifiers"] in loraplex.service.names()
        for name in loraplex.service.names():
            loraplex.classify("hello", name)
        assert example_request(loraplex.service)[1]["classifiers"] == "*"
        for name in loraplex.service.names():
            loraplex.unload_adapter(name)
        path, body = example_request(loraplex.service)
        assert path == "/v1/completions" and body["model"] == loraplex.service.base_name


@pytest.mark.parametrize(("text", "yes", "no"), CONVERSATIONS)
def test_verdicts_on_conversations_make_sense(server: serving.Server, text: str, yes: set[str], no: set[str]) -> None:
    with serving.client(server) as http:
        answer = http.post("/v1/classify", json={"input": text, "classifiers": "*"}).json()
    said = {verdict["classifier"] for verdict in answer["verdicts"] if verdict["label"] == "yes"}
    assert yes <= said, f"not said: {yes - said}"
    assert not no & said


def test_classify_json_equals_the_http_answer(tiny_server: serving.Server, tiny_bundle: Path) -> None:
    text = "Customer: hello there"
    run = serving.loraplex("classify", tiny_bundle, "--all", "--text", text, "--json", "--dtype", "float32")
    assert run.returncode == 0, run.stderr
    with serving.client(tiny_server) as http:
        answer = http.post("/v1/classify", json={"input": text}).json()
    ours = json.loads(run.stdout)
    assert set(ours) == set(answer)
    for one, other in zip(ours["verdicts"], answer["verdicts"], strict=True):
        assert one.pop("id").endswith(other.pop("id")[-2:])
        for key in {"confidence", "label_mass", "scores"} & set(other):
            assert one.pop(key) == pytest.approx(other.pop(key), rel=1e-4)
        assert one == other


def test_classify_reads_a_file_or_standard_input_and_prints_a_table(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("Customer: hello\n")
    by_file = serving.loraplex("classify", tiny_bundle, "-c", "task0", "--file", tmp_path / "c.txt", "--show-prompt")
    by_stdin = serving.loraplex("classify", tiny_bundle, "-c", "task0", "-", "--show-prompt", stdin=b"Customer: hello")
    assert by_file.returncode == by_stdin.returncode == 0, by_file.stderr + by_stdin.stderr
    assert "--- task0: " in by_file.stdout and "Customer: hello<|ask|>Is it done?\n" in by_file.stdout
    assert by_file.stdout.splitlines()[:-1] == by_stdin.stdout.splitlines()[:-1]  # the last line tells the time
    assert "confidence" in by_file.stdout
    assert "warning: low_label_mass: " in by_file.stdout, "the tiny model is random, so no label is likely"


@pytest.mark.parametrize(
    ("arguments", "code", "mentions"),
    [
        (["--all"], 2, "give exactly one conversation"),
        (["--all", "--text", "x", "-"], 2, "give exactly one conversation"),
        (["--text", "x"], 2, "--classifier"),
        (["-c", "nope", "--text", "x"], 1, "unknown_classifier"),
        (["-c", "task0", "-c", "nope", "--text", "x", "--json"], 1, ""),
        (["--all", "--text", ""], 1, "empty"),
        (["--all", "--file", "missing.txt"], 1, "missing.txt"),
        (["--all", "--text", "x", "--adapter", "nonsense"], 2, "NAME=SOURCE"),
        (["--all", "--text", "x", "--dtype", "int4"], 1, "dtype"),
        (["-c", "task0", "-c", "[/x]", "--text", "x"], 1, ""),
        (["-c", "*", "--text", "x"], 0, ""),
    ],
)
def test_classify_exit_codes(tiny_bundle: Path, arguments: list[str], code: int, mentions: str) -> None:
    run = serving.loraplex("classify", tiny_bundle, *arguments)
    assert run.returncode == code, run.stderr
    assert mentions in run.stderr
    assert "Traceback" not in run.stderr


def test_a_wrong_option_is_told_as_it_was_given(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = serving.loraplex("serve", tiny_bundle, "--kv-cache", "2GB")
    assert run.returncode == 1
    told = "--kv-cache 2GB: is no size\nremedy: write 2GiB, 512MiB, 20% or 0\n"
    assert run.stderr == f"error configuration_error: {told}"
    monkeypatch.setenv("LORAPLEX_KV_CACHE", "2GB")
    run = serving.loraplex("serve", tiny_bundle)
    assert run.stderr == f"error configuration_error: {told}".replace("--kv-cache ", "LORAPLEX_KV_CACHE=")


def test_help_shows_choices_in_lower_case() -> None:
    shown = serving.loraplex("serve", "--help", COLUMNS="120").stdout
    assert all(one in shown for one in ("[native|vllm|peft]", "[text|json]", "[auto|float32|bfloat16]"))


def test_either_case_of_a_choice_is_served(tiny_bundle: Path) -> None:
    with serving.serve(tiny_bundle, "--log-format", "JSON", "--backend", "Native", "--dtype", "FLOAT32") as server:
        assert server.stop() == 0


def test_a_base_and_named_adapters_need_no_bundle(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base", tiny.FAMILIES["llama"])
    tiny.save_adapter(tmp_path / "base", tmp_path / "elsewhere", contract=tiny.CONTRACT)
    with serving.serve(tmp_path / "base", "--adapter", f"mine={tmp_path / 'elsewhere'}") as server:
        with serving.client(server) as http:
            answer = http.post("/v1/classify", json={"input": "hello"}).json()
        assert [verdict["classifier"] for verdict in answer["verdicts"]] == ["mine"]


def test_what_is_wrong_with_an_adapter_is_said_and_nothing_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["qwen2"].from_dict(tiny.FAMILIES["qwen2"].to_dict() | {"hidden_size": 64}))
    run = serving.loraplex("serve", tmp_path, "--adapter", f"task0={tiny_bundle / 'task0'}", "--port", 0)
    assert run.returncode == 1
    assert "adapter_error" in run.stderr and "adapter_model.safetensors" in run.stderr and "remedy" in run.stderr
    assert "curl" not in run.stdout and "Traceback" not in run.stderr


def test_a_taken_port_is_said_before_anything_is_loaded(tiny_bundle: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        run = serving.loraplex("serve", tiny_bundle, "--port", taken.getsockname()[1])
    assert run.returncode == 1
    assert "cannot be bound" in run.stderr and "loading" not in run.stderr


def test_two_servers_do_not_share_a_port() -> None:
    with listen(ServerConfig(port=0), ()) as first, pytest.raises(ConfigurationError, match="cannot be bound"):
        listen(ServerConfig(port=first.getsockname()[1]), ())


def test_an_ipv6_host_is_printed_as_a_url(tiny_bundle: Path) -> None:
    with serving.serve(tiny_bundle, "--host", "::1") as server:
        assert server.url.startswith("http://[::1]:")
        with serving.client(server) as http:
            assert http.get("/ready").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly(tiny_bundle: Path, number: int) -> None:
    with serving.serve(tiny_bundle, LORAPLEX_DTYPE="float32") as server:
        assert server.stop(number) == 0


def test_a_golden_example_that_fails_keeps_it_from_starting(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"])
    tiny.save_adapter(tmp_path, tmp_path / "task", contract=tiny.CONTRACT)
    with Loraplex.load(tmp_path, dtype="float32") as loraplex:
        label = loraplex.classify("hello")["task"].label
    wrong = "no" if label == "yes" else "yes"
    tiny.save_adapter(
        tmp_path, tmp_path / "task", contract={**tiny.CONTRACT, "golden": [{"text": "hello", "label": wrong}]}
    )
    run = serving.loraplex("serve", tmp_path, "--dtype", "float32", "--require-all", "--port", 0)
    assert run.returncode == 1 and "golden" in run.stderr
    tiny.save_adapter(
        tmp_path, tmp_path / "task", contract={**tiny.CONTRACT, "golden": [{"text": " ", "label": "yes"}]}
    )
    with pytest.raises(ContractError, match=r"golden.*empty"):
        Loraplex.load(tmp_path, dtype="float32")


def test_a_token_that_the_base_has_no_embedding_for_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as fine-tuning scripts do, without resizing the base
    tiny.save_base(tmp_path, tiny.FAMILIES["llama"], tokenizer)
    tiny.save_adapter(tmp_path, tmp_path / "task")
    with Loraplex.load(tmp_path) as loraplex:
        assert loraplex.classify("hello")["task"].label
        with pytest.raises(InvalidRequestError, match=r"'\[PAD\]'.*320 embeddings"):
            loraplex.classify("hello [PAD]")


def test_in_python(tiny_bundle: Path) -> None:
    with Loraplex.load(tiny_bundle, dtype="float32") as loraplex:
        result = loraplex.classify([{"role": "user", "content": "hello"}], classifiers=["task1", "task0"])
        assert [verdict.classifier for verdict in result.verdicts] == ["task1", "task0"]
        assert result["task1"].scores is not None
        with pytest.raises(UnknownClassifierError):
            loraplex.classify("hello", "nope")
        assert [info.rank for info in loraplex.adapters()] == [2, 5, 8, 4]
        assert len(loraplex.classify("hello", ["*"]).verdicts) == 4
        with pytest.raises(InvalidRequestError, match="content"):
            loraplex.classify([{"role": "user"}])
    loraplex.close()
    with pytest.raises(NotReadyError):
        loraplex.classify("hello")


def test_a_start_that_fails_gives_its_state_back(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nobody"):
        Loraplex.load(tiny_bundle, dtype="float32", state_dir=str(tmp_path), preload="nobody")
    with Loraplex.load(tiny_bundle, dtype="float32", state_dir=str(tmp_path), preload="none") as loraplex:
        assert len(loraplex.adapters()) == 4


def test_what_other_threads_asked_before_close_is_answered(tiny_bundle: Path) -> None:
    loraplex = Loraplex.load(tiny_bundle, dtype="float32")
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(loraplex.classify, f"hello {i}") for i in range(64)]
        while not calls[0].done():
            time.sleep(0.001)
        loraplex.close()
        outcomes = [call.exception(timeout=30) for call in calls]
    assert outcomes[0] is None
    assert all(exc is None or isinstance(exc, NotReadyError) for exc in outcomes), outcomes


def test_an_adapter_of_another_base_is_warned_of_wherever_adapters_are_listed(tmp_path: Path) -> None:
    base, log = tmp_path / "Tiny-0.1M", tmp_path / "log"
    tiny.save_base(base, tiny.FAMILIES["llama"])
    for name, trained_on in (("mine", "org/Tiny-0.1M-bnb-4bit"), ("others", "org/Tiny-0.2M")):
        tiny.save_adapter(base, base / name, contract=tiny.CONTRACT)
        config = base / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": trained_on}))
    warning = "it was trained on 'org/Tiny-0.2M' (base_model_name_or_path), and the base served here is 'Tiny-0.1M'"
    with serving.serve(base, "--dtype", "float32", log=str(log)) as server, serving.client(server) as client:
        listed = {one["name"]: one["warnings"] for one in client.get("/v1/adapters").json()["adapters"]}
        assert listed["mine"] is None and listed["others"][0].startswith(warning)
        assert client.get("/v1/adapters/others").json()["warnings"] == listed["others"]
        for command in (["list"], ["show", "others"], ["show", "others", "--json"]):
            run = serving.loraplex("adapters", *command, "--url", server.url)
            assert run.returncode == 0 and warning in run.stdout, run.stdout
    assert f"others: {warning}" in log.read_text() and "mine: " not in log.read_text()
