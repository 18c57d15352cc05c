"""Kept texts of a real server: which are kept, who may read them, and that the files hold nothing for longer."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import serving
import tiny

ID = "X-Amzn-SageMaker-Inference-Id"
SECRET = "the card is 4711-0815"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "state"


@pytest.fixture(scope="module")
def log(state: Path) -> Path:
    return state.with_name("log")


@pytest.fixture(scope="module")
def own(tiny_bundle: Path, state: Path, log: Path) -> Iterator[httpx.Client]:
    options = ("--dtype", "float32", "--state-dir", state, "--keep-inputs", "1h")
    with serving.serve(tiny_bundle, *options, log=str(log)) as server, serving.client(server) as client:
        yield client


def examples(http: httpx.Client, status: int = 200, **body: Any) -> Any:
    response = http.post("/v1/examples", json=body)
    assert response.status_code == status, response.text
    return response.json()


def every(http: httpx.Client, **body: Any) -> list[Any]:
    page = examples(http, **body)
    found: list[Any] = page["examples"]
    while page["after"] is not None:
        page = examples(http, **body, after=page["after"])
        found += page["examples"]
    return found


def ask(http: httpx.Client, path: str = "/v1/classify", **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def correct(http: httpx.Client, id: str, label: str = "no") -> None:
    http.post("/v1/feedback", json={"verdict_id": id, "label": label}).raise_for_status()


def bytes_below(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_it_is_said_loudly(own: httpx.Client, log: Path, state: Path, http: httpx.Client) -> None:
    [line] = [line for line in log.read_text().splitlines() if "ARE STORED" in line]
    assert "WARNING" in line and "--keep-inputs 1h" in line and str(state / "inputs") in line
    assert own.get("/health").json() == {"status": "ok", "keeps_inputs": "1h"}
    for path in ("/ready", "/ping"):
        assert own.get(path).json() == {"status": "ok", "num_failed": 0, "failed": [], "keeps_inputs": "1h"}
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ok", "num_failed": 0, "failed": []}


def test_a_request_is_kept_once_with_all_its_corrections(own: httpx.Client, state: Path) -> None:
    text = "Customer: once, and not once a classifier"
    answer = ask(own, input=text, classifiers=["task0", "task1", "task2"])
    assert every(own) == []
    correct(own, answer["verdicts"][0]["id"])
    correct(own, answer["verdicts"][2]["id"], "yes")
    [one] = every(own)
    labels = {"task0": "no", "task2": "yes"}
    assert one == {
        "id": answer["id"],
        "input": text,
        "labels": labels,
        "corrected": ["task0", "task2"],
        "conversation_id": None,
    }
    assert every(own, classifiers="task2")[0]["labels"] == {"task2": "yes"}
    assert every(own, classifiers=["task1"]) == []
    [one] = every(own, classifiers="task1", only="all")
    assert one["labels"] == {"task1": answer["verdicts"][1]["label"]} and one["corrected"] == []
    assert every(own, since_s=3600) and every(own, since_s=1e-6) == []
    assert bytes_below(state).count(text.encode()) == 1


MESSAGES = [{"role": "user", "content": "messages stay"}, {"role": "assistant", "content": "messages"}]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/classify", {"input": MESSAGES, "classifiers": "task0"}, [MESSAGES]),
        ("/v1/classify", {"inputs": ["first of two", "second of two"], "classifiers": "task0"}, None),
        ("/v1/classify", {"model": "task0", "input": "as vLLM"}, ["as vLLM"]),
        ("/invocations", {"input_text": "as the article", "adapter_name": "task0"}, ["as the article"]),
        ("/invocations", {"inputs": "as HF", "parameters": {"adapter_id": "task0"}}, ["as HF"]),
        ("/endpoints/any/invocations", {"input": "as boto3", "classifiers": "task0"}, ["as boto3"]),
        ("/invocations", {"input_text": "verbatim", "adapter_name": "task0", "raw": True}, []),
        ("/v1/completions", {"model": "task0", "prompt": "completed", "max_tokens": 1}, []),
        ("/v1/chat/completions", {"model": "task0", "messages": MESSAGES, "max_tokens": 1}, []),
    ],
)
def test_what_has_a_verdict_is_kept_on_every_path(own: httpx.Client, path: str, body: Any, expected: Any) -> None:
    before = len(every(own, only="all"))
    ask(own, path, **body)
    found = [one["input"] for one in every(own, only="all")[before:]]
    if expected is None:
        assert sorted(found) == sorted(body["inputs"])
    else:
        assert found == expected


def test_feedback_by_sagemakers_id_corrects_a_kept_text(own: httpx.Client) -> None:
    body = {"input_text": "found by its id", "adapter_name": "task1"}
    own.post("/invocations", json=body, headers={ID: "order-1"}).raise_for_status()
    own.post("/v1/feedback", json={"request_id": "order-1", "label": "yes"}).raise_for_status()
    assert every(own, classifiers="task1")[-1]["input"] == "found by its id"


def test_a_shadows_answer_is_no_label_and_feedback_judges_it(own: httpx.Client) -> None:
    own.put("/v1/routes/shadowed", json={"targets": {"task0": 1}, "shadows": ["task1"]}).raise_for_status()
    [verdict] = ask(own, input="with a shadow", classifiers="shadowed")["verdicts"]
    until = time.monotonic() + 10
    while len(found := own.get("/v1/routes/shadowed/stats").json()["targets"]) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    correct(own, verdict["id"])
    [one] = every(own, classifiers="shadowed", only="all")
    assert one["labels"] == {"shadowed": "no"} and {one["role"] for one in found} == {"primary", "shadow"}


def test_what_fails_is_not_kept(own: httpx.Client) -> None:
    before = len(every(own, only="all"))
    assert own.post("/v1/classify", json={"input": SECRET, "classifiers": "nope"}).status_code == 404
    ask(own, input="one of two", classifiers=["nope", "task0"])
    assert [one["input"] for one in every(own, only="all")[before:]] == ["one of two"]


@pytest.mark.parametrize(
    ("body", "status", "mentions"),
    [
        ({"classifiers": "nobody"}, 404, "nobody"),
        ({"since_s": 0}, 422, "since_s"),
        ({"only": "wrong"}, 422, "only"),
        ({"after": "x"}, 422, "after"),
        ({"classifiers": []}, 422, "classifiers"),
        ({"since": 1}, 422, "since_s"),
    ],
)
def test_what_is_wrong_is_named(own: httpx.Client, body: Any, status: int, mentions: str) -> None:
    error = examples(own, status, **body)["error"]
    assert mentions in error["message"] + error["remedy"]


def test_without_the_option_nothing_is_kept_and_the_error_says_how(tiny_bundle: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with serving.serve(tiny_bundle, "--state-dir", state, "--preload", "none") as server:
        with serving.client(server) as http:
            [verdict] = ask(http, input=SECRET, classifiers="task0")["verdicts"]
            correct(http, verdict["id"])
            error = examples(http, 422)["error"]
            assert "no texts are kept" in error["message"] and "--keep-inputs" in error["remedy"]
            run = serving.loraplex("routes", "export", "task0", "--since", "1h", "--url", server.url)
            assert run.returncode == 1 and "--keep-inputs" in run.stderr
        assert server.stop() == 0
    assert SECRET.encode() not in bytes_below(state)


def test_keys_that_ask_may_not_read(tiny_bundle: Path) -> None:
    keys = {name: f"{name}-secret-0123456789" for name in ("infer", "admin")}
    given = ",".join(f"{name}:{name}:{secret}" for name, secret in keys.items())
    options = ("--preload", "none", "--keep-inputs", "1h")
    with serving.serve(tiny_bundle, *options, LORAPLEX_API_KEYS=given) as server, serving.client(server) as http:
        for name, status in (("infer", 403), ("admin", 200)):
            assert http.post("/v1/examples", json={}, headers={"X-API-Key": keys[name]}).status_code == status
        assert http.post("/v1/examples", json={}).status_code == 401
        assert http.get("/health").json()["keeps_inputs"] == "1h"


@pytest.mark.slow
def test_no_file_holds_a_text_when_its_time_is_over(tiny_bundle: Path, tmp_path: Path) -> None:
    """Neither without traffic, nor after kill -9, nor when a later start keeps none."""
    state = tmp_path / "state"
    options = (tiny_bundle, "--preload", "none", "--state-dir", state, "--keep-inputs")
    with serving.serve(*options, "5s") as server, serving.client(server) as http:
        ask(http, input=SECRET, classifiers="task0")
        came = time.monotonic()
        while SECRET.encode() not in bytes_below(state):
            assert time.monotonic() < came + 3
            time.sleep(0.05)
        while SECRET.encode() in bytes_below(state):
            time.sleep(0.05)
        assert time.monotonic() < came + 5
    with serving.serve(*options, "1h") as server, serving.client(server) as http:
        ask(http, input=SECRET, classifiers="task0")
        time.sleep(1.5)
        server.process.kill()
    assert SECRET.encode() in bytes_below(state)
    with serving.serve(*options, "1s"):
        assert SECRET.encode() not in bytes_below(state)
    with serving.serve(*options, "1h") as server, serving.client(server) as http:
        ask(http, input=SECRET, classifiers="task0")
        assert server.stop() == 0
    assert SECRET.encode() in bytes_below(state), "what came last is written at the end"
    with serving.serve(*options[:-1]) as server:
        assert SECRET.encode() not in bytes_below(state) and not (state / "inputs").exists()


def test_the_command_writes_what_a_training_reads(own: httpx.Client, tmp_path: Path) -> None:
    url, out = str(own.base_url), tmp_path / "rows.jsonl"
    own.put("/v1/routes/exported", json={"targets": {"task0": 1}}).raise_for_status()
    ids = [
        verdict["id"]
        for text in ("a", "b")
        for verdict in ask(own, input=f"Customer: export {text}", classifiers=["exported", "task1"])["verdicts"]
    ]

    def export(*arguments: object) -> Any:
        return serving.loraplex("routes", "export", *arguments, "--url", url)

    none = export("exported", "--since", "1h", "--out", out)
    assert none.returncode == 1 and "feedback gave" in none.stderr and "--only all" in none.stderr and not out.exists()
    correct(own, ids[2], "yes")
    correct(own, ids[3], "no")
    done = export("exported", "task1", "--since", "1h", "--out", out)
    assert done.returncode == 0 and "delete the file after the training" in done.stderr, done.stderr
    last = json.loads(out.read_text().splitlines()[-1])
    assert last["text"] == "Customer: export b" and last["labels"] == {"exported": True, "task1": False}
    assert ids[2].startswith(last["ids"][0])
    one, other = (
        export("exported", "--since", "1h", "--only", "all"),
        export("exported", "--since", "60m", "--only", "all"),
    )
    assert one.stdout == other.stdout and len(one.stdout.splitlines()) == 2
    assert len(export("*", "--since", "1h").stdout.splitlines()) >= 3
    for wrong, mentions in (
        (("exported", "--since", "soon"), "30m, 12h or 7d"),
        (("exported",), "--since"),
        (("nobody", "--since", "1h"), "nobody"),
        (("exported", "--since", "1h", "--only", "some"), "corrected"),
    ):
        run = export(*wrong)
        assert run.returncode and mentions in run.stderr and "Traceback" not in run.stderr


def test_settings_that_cannot_be_are_told_at_the_start(tiny_bundle: Path) -> None:
    for options, mentions in (
        (("--keep-inputs", "soon"), "--keep-inputs soon: is no duration"),
        (("--keep-inputs", "7d", "--keep-verdicts", "0"), "keep_verdicts"),
    ):
        run = serving.loraplex("serve", tiny_bundle, "--port", 0, *options)
        assert run.returncode == 1 and mentions in run.stderr and "Traceback" not in run.stderr


# ------------------------------------------------------------------------------------------------- new versions


def test_new_versions_are_shadows_or_nothing_changes(tiny_bundle: Path, tmp_path: Path) -> None:
    from loraplex.cli.train_load import check_server, load_shadows
    from loraplex.errors import ConfigurationError, LoraplexError

    out, said = tmp_path / "trained", list[str]()
    tiny.save_adapter(tiny_bundle, out / "task0", contract=tiny.CONTRACT, seed=70)
    tiny.save_adapter(tiny_bundle, out / "routed", contract={**tiny.CONTRACT, "labels": [" yes", " no"]}, seed=71)
    tiny.save_adapter(tiny_bundle, out / "task2", contract={**tiny.CONTRACT, "labels": ["good", "bad"]}, seed=72)
    options = ("--dtype", "float32", "--adapter-root", tmp_path)
    with serving.serve(tiny_bundle, *options) as server, serving.client(server) as http:

        def there() -> Any:
            routes = http.get("/v1/routes").json()["routes"]
            adapters = http.get("/v1/adapters").json()["adapters"]
            return {one["name"]: (one["targets"], one["shadows"]) for one in routes}, [one["name"] for one in adapters]

        http.put("/v1/routes/routed", json={"targets": {"task1": 3, "task0": 1}, "shadows": ["task2"]})
        before = there()
        check_server(server.url, out, ["task0", "routed"])
        for names, mentions in ((["task0", "nobody"], "'nobody'"), (["task0", "missing"], "'missing'")):
            with pytest.raises(ConfigurationError, match=mentions):
                check_server(server.url, out, names)
        with pytest.raises(ConfigurationError, match=r"reads its adapter 'task0' from there"):
            check_server(server.url, tiny_bundle, ["task0"])
        with pytest.raises(LoraplexError, match="missing"):
            load_shadows(server.url, out, ["task0", "routed", "missing"], said.append)
        assert there() == before and said == [f"nothing was changed at {server.url}"]
        said.clear()
        [task0, routed] = load_shadows(server.url, out, ["task0", "routed"], said.append)
        assert (task0.name, task0.adapter, routed.adapter) == ("task0", "task0-v2", "routed-v2")
        routes, adapters = there()
        assert routes == {
            "routed": ({"task1": 3, "task0": 1}, ["task2", "routed-v2"]),
            "task0": ({"task0": 1}, ["task0-v2"]),
        }
        assert set(adapters) - set(before[1]) == {"task0-v2", "routed-v2"} and said == []
        [again] = load_shadows(server.url, out, ["task0"], said.append)
        assert again.adapter == "task0-v3" and again.route.shadows == ("task0-v2", "task0-v3")
        load_shadows(server.url, out, ["task2"], said.append)
        [warning] = said
        assert "'good', 'bad'" in warning and "task2-v2" in warning
        [verdict] = ask(http, input="Customer: hi", classifiers="routed")["verdicts"]
        correct(http, verdict["id"], "yes")  # whatever token a version writes the label with
