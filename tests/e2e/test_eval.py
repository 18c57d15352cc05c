"""`loraplex eval` and `loraplex calibrate` as users run them, on tiny bundles and on the demo."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from sklearn.metrics import f1_score, roc_auc_score

import serving
import tiny
from loraplex import Loraplex
from loraplex.classifier import read_contract
from loraplex.server.keys import new_key

TEXTS = [f"Customer: hello {'x' * (i % 7)} {i}, is it done? <b>yes</b>" for i in range(24)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"text": text, "labels": {"task0": i % 2 == 0, "verbatim": "a"} | ({"task1": "no"} if i % 3 == 0 else {})}
        for i, text in enumerate(TEXTS)
    ]
    rows += [{"text": "Customer: nobody asks"}, {"text": "Customer: hm", "labels": {"stranger": True}}]
    return write(tmp_path_factory.mktemp("eval") / "data.jsonl", rows)


def run(command: str, *arguments: object, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = serving.loraplex(command, *arguments, stdin=None, **environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def report(*arguments: object, code: int = 0, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("eval", *arguments, "--json", code=code, **environment).stdout)
    return found


@pytest.fixture(scope="module")
def in_process(tiny_bundle: Path, data: Path) -> dict[str, Any]:
    return report(tiny_bundle, "--data", data, "--dtype", "float32")


def test_the_figures_are_scikit_learns(in_process: dict[str, Any], tiny_bundle: Path) -> None:
    with Loraplex.load(tiny_bundle, dtype="float32") as loraplex:
        found = [loraplex.classify(text, "task0")["task0"] for text in TEXTS]
    truth = numpy.arange(len(TEXTS)) % 2 == 0
    figures = in_process["classifiers"]["task0"]
    assert figures["n"] == 24 and figures["failed"] == 0 and figures["labels"] == ["yes", "no"]
    assert figures["f1"] == pytest.approx(f1_score(truth, [one.label == "yes" for one in found]))
    assert figures["auc"] == pytest.approx(roc_auc_score(truth, [(one.scores or {})["yes"] for one in found]), abs=1e-6)
    assert figures["coverage"] == 1.0 and len(figures["intervals"]["f1"]) == 2


def test_what_has_no_figures_is_told(in_process: dict[str, Any]) -> None:
    assert in_process["classifiers"].keys() == {"task0", "task1"} and in_process["classifiers"]["task1"]["n"] == 8
    assert in_process["classifiers"]["task1"]["f1"] is None and in_process["mean"]["n"] == 32
    assert "no contract" in in_process["left_out"]["verbatim"] and "no conversation" in in_process["left_out"]["task2"]
    assert in_process["unknown_labels"] == {"stranger": 1} and in_process["about"]["dtype"] == "float32"
    assert in_process["data"]["conversations"] == 24 and in_process["verdicts_per_s"] > 0


def test_a_server_has_the_same_figures(
    in_process: dict[str, Any], tiny_server: serving.Server, data: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    found = report(tiny_server.url, "--data", data, "--concurrency", 3, "--html", page)
    for name, figures in in_process["classifiers"].items():
        other = found["classifiers"][name]
        assert other["confusion"] == figures["confusion"]
        assert other["log_loss"] == pytest.approx(figures["log_loss"], abs=1e-4)  # texts were packed otherwise
    assert found["left_out"] == in_process["left_out"] and found["mean"].keys() == in_process["mean"].keys()
    text = page.read_text()
    assert "&lt;b&gt;yes" in text and "<b>" not in text and text.count("<svg") == 2


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server whose key may only ask, and that has loaded nothing yet; the key."""
    secret, line = new_key("me", "infer")
    (path := tmp_path_factory.mktemp("keys") / "keys").write_text(line + "\n")
    with serving.serve(tiny_bundle, "--dtype", "float32", "--api-key-file", path, "--preload", "none") as server:
        yield server.url, secret


def test_a_key_that_may_only_ask_is_enough(
    guarded: tuple[str, str], data: Path, in_process: dict[str, Any], tmp_path: Path
) -> None:
    url, secret = guarded
    found = report(url, "--data", data, LORAPLEX_API_KEY=secret)
    assert found["classifiers"]["task0"]["confusion"] == in_process["classifiers"]["task0"]["confusion"]
    assert "no contract" in found["left_out"]["verbatim"]
    wrong = write(tmp_path / "wrong.jsonl", [{"text": "hello", "labels": {"task0": "maybe"}}])
    assert "line 1: label 'maybe'" in run("eval", url, "--data", wrong, code=1, LORAPLEX_API_KEY=secret).stderr
    assert "unauthorized" in run("eval", url, "--data", data, code=1).stderr


def test_one_classifiers_labels_need_no_name(tiny_bundle: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", [{"text": text, "label": False} for text in TEXTS[:2]])
    assert report(tiny_bundle, "--data", data, "--classifiers", "task0")["classifiers"]["task0"]["n"] == 2


def test_a_question_that_fails_is_counted_and_named(tiny_bundle: Path, tmp_path: Path) -> None:
    messages = [{"role": "wizard", "content": "hello"}]
    rows: list[dict[str, Any]] = [
        {"text": TEXTS[0], "labels": {"task0": True}},
        {"messages": messages, "labels": {"task0": False, "task1": True}},
        {"text": TEXTS[1], "labels": {"task1": False}},
    ]
    data = write(tmp_path / "data.jsonl", rows)
    found = report(tiny_bundle, "--data", data, code=1)
    assert (found["classifiers"]["task0"]["n"], found["classifiers"]["task0"]["failed"]) == (1, 1)
    [failure] = found["classifiers"]["task1"]["failures"]
    assert failure["code"] == "invalid_request" and failure["lines"] == [2] and "wizard" in failure["message"]


@pytest.mark.parametrize(
    ("rows", "arguments", "told"),
    [
        ([{"text": "a", "labels": {"task0": "maybe"}}], [], "line 1: label 'maybe' of 'task0' is not among"),
        ([{"text": "a", "labels": {"task0": 3}}], [], "line 1: the label of 'task0' is 3, a number"),
        ([{"text": "a", "label": True}], [], "line 1: has a 'label' for no classifier: give one --classifier NAME"),
        ([{"text": "a", "labels": {"other": True}}], [], "no conversation has a label that can be asked for"),
        ([{"text": "a", "labels": {"task0": True}}], ["--classifiers", "task0,isFraud"], "named 'isFraud'"),
        ([{"text": "a", "labels": {"task0": True}}], ["--conversations", "2"], "holds 1"),
        ([{"text": "a", "labels": {"task0": True}}], ["--html", "no/such/folder.html"], "no such folder"),
        ([{"text": "a", "labels": {"task0": True}}], ["--html", "."], "--html .: is a folder"),
        ([{"text": "a", "labels": {"task0": True}}], ["--html", "DATA"], "is the file of --data"),
        ([], [], "holds no conversations"),
    ],
)
def test_wrong_input_is_told_before_anything_is_loaded(
    tiny_bundle: Path, tmp_path: Path, rows: list[dict[str, Any]], arguments: list[str], told: str
) -> None:
    broken = tmp_path / "bundle"  # loading it would fail otherwise
    shutil.copytree(tiny_bundle, broken)
    (broken / "model.safetensors").write_bytes(b"")
    data = write(tmp_path / "data.jsonl", rows)
    arguments = [str(data) if one == "DATA" else one for one in arguments]
    for command in ("eval", "calibrate"):
        if command == "eval" or "--html" not in arguments:
            done = run(command, broken, "--data", data, *arguments, code=1)
            assert told in done.stderr and "remedy" in done.stderr
    assert [json.loads(line) for line in data.read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["http://127.0.0.1:9", "--dtype", "float32"], "no effect on a running server"),
        (["http://127.0.0.1:9", "--bare-base"], "no effect on a running server"),
        (["bundle", "--concurrency", "2"], "no effect on a bundle"),
    ],
)
def test_options_without_an_effect_are_refused(arguments: list[str], told: str) -> None:
    assert told in run("eval", *arguments, "--data", "x.jsonl", code=2).stderr


def test_figures_are_shown_on_80_columns_also_where_the_page_cannot_be_written(tiny_bundle: Path, data: Path) -> None:
    page = data.parent / f"{'long' * 62}.html"  # a name that fits, but not with the end of a half-written file's
    done = run("eval", tiny_bundle, "--data", data, "--html", page, code=1, COLUMNS="80")
    assert "cannot be written: File name too long" in done.stderr
    head = done.stdout.splitlines()
    assert head[1].split() == ["classifier", "n", "accuracy", "F1", "AUC", "ECE", "through", "of", "these"]
    assert max(map(len, head[:5])) <= 80 and all(head), head


def test_a_url_is_the_server_s_alone(tiny_server: serving.Server, data: Path) -> None:
    assert (
        "give the server's URL without a path" in run("eval", f"{tiny_server.url}/foo", "--data", data, code=1).stderr
    )
    assert "contracts are files of a bundle" in run("calibrate", tiny_server.url, "--data", data, code=1).stderr


def test_a_server_that_is_not_there_is_an_error(data: Path) -> None:
    assert "unreachable" in run("eval", "http://127.0.0.1:9", "--data", data, code=1).stderr


def test_the_bare_base_answers_as_without_adapters(tiny_bundle: Path, data: Path, in_process: dict[str, Any]) -> None:
    """All adapters have the same contract here, so the base has the same answer for each of them."""
    same = [{"text": text, "labels": {"task0": i % 2 == 0, "task1": i % 2 == 0}} for i, text in enumerate(TEXTS)]
    path = write(data.parent / "same.jsonl", same)
    found = report(tiny_bundle, "--data", path, "--dtype", "float32", "--bare-base")["classifiers"]
    loss = found["task0"]["log_loss"]
    assert found["task0"]["n"] == 24 and loss == pytest.approx(found["task1"]["log_loss"], rel=1e-4)
    assert loss != pytest.approx(in_process["classifiers"]["task0"]["log_loss"], rel=0.01)


@pytest.mark.slow
def test_the_demo_beats_its_bare_base(demo_bundle: Path, tmp_path: Path) -> None:
    texts = {
        "Customer: My order never came.\nAgent: I sent a new one.\nCustomer: Great, thank you, bye!": True,
        "Customer: I need a table for two.\nAgent: Where?\nCustomer: In San Jose.": False,
    }
    rows = [{"conversation": text, "labels": {"issueResolved": label}} for text, label in texts.items()]
    data = write(tmp_path / "data.jsonl", rows)
    assert report(demo_bundle, "--data", data)["mean"]["accuracy"] == 1.0
    assert report(demo_bundle, "--data", data, "--bare-base")["mean"]["accuracy"] < 1.0


CONTRACT = """\
# How it is asked.
question: Is it done?
template: "{conversation}<|ask|>{question}\\n"
labels: ['yes', 'no']  # the positive one first
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Two adapters whose scores are of use, but whose thresholds are not."""
    folder = tmp_path / "bundle"
    tiny.save_base(folder, tiny.fitted(tiny.FAMILIES["llama"]))
    for seed, name in enumerate(("done", "calm"), 1):
        tiny.save_adapter(folder, folder / name, seed=seed)
        (folder / name / "classifier.yaml").write_text(CONTRACT)
    return folder


@pytest.fixture
def labelled(bundle: Path, tmp_path: Path) -> Path:
    """The highest third of the scores is right for `done`, but for a few; `calm` has few labels."""
    texts = [f"Customer: {word} {i % 10}, is it done?" for i in range(10) for word in "abcdefghijkl"]
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        scores = [(loraplex.classify(text, "done")["done"].scores or {})["yes"] for text in texts]
    least = sorted(scores)[-40]
    rows: list[dict[str, Any]] = [
        {"text": text, "labels": {"done": (score >= least) != (i % 17 == 0)}}
        for i, (text, score) in enumerate(zip(texts, scores, strict=True))
    ]
    rows[0]["labels"]["calm"] = True
    return write(tmp_path / "labelled.jsonl", rows)


def test_a_contract_is_fitted_and_loads_again(bundle: Path, labelled: Path) -> None:
    weights = hashlib.sha256((bundle / "done" / "adapter_model.safetensors").read_bytes()).hexdigest()
    options = ["--data", labelled, "--dtype", "float32", "--classifiers", "done"]
    tried = run("calibrate", bundle, *options, "--abstain-error", "0.1", "--dry-run")
    assert "nothing was written" in tried.stdout
    assert (bundle / "done" / "classifier.yaml").read_text() == CONTRACT
    done = json.loads(run("calibrate", bundle, *options, "--abstain-error", "0.1", "--json").stdout)
    one = done["classifiers"]["done"]
    assert done["is_written"] and one["num_fitted"] + one["after"]["n"] == 120
    assert one["after"]["log_loss"] < one["before"]["log_loss"] and one["after"]["f1"] > one["before"]["f1"]
    text = (bundle / "done" / "classifier.yaml").read_text()
    assert all(line in text for line in CONTRACT.splitlines())
    contract = read_contract(bundle / "done" / "classifier.yaml")
    assert contract.threshold == one["contract"]["threshold"]
    assert contract.calibration.temperature == one["contract"]["calibration"]["temperature"]
    assert hashlib.sha256((bundle / "done" / "adapter_model.safetensors").read_bytes()).hexdigest() == weights
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        said = [loraplex.classify(row["text"], "done")["done"].label == "yes" for row in rows]
    assert f1_score([row["labels"]["done"] for row in rows], said) > one["before"]["f1"]


def test_a_golden_example_that_would_break_keeps_the_contract(bundle: Path, labelled: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        texts = [json.loads(line)["text"] for line in labelled.read_text().splitlines()]
        said = {text: loraplex.classify(text, "done")["done"] for text in texts}
    nearest = min(said, key=lambda text: abs((said[text].scores or {})["yes"] - 0.5))
    path = bundle / "done" / "classifier.yaml"
    before = CONTRACT + f"golden: [{json.dumps({'text': nearest, 'label': said[nearest].label})}]\n"
    path.write_text(before)
    scores = sorted((one.scores or {})["yes"] for one in said.values())
    edge = scores[-20] if said[nearest].label == "yes" else scores[20]  # the example is on its other side
    rows = [{"text": text, "labels": {"done": (one.scores or {})["yes"] >= edge}} for text, one in said.items()]
    write(labelled, rows)
    done = run("calibrate", bundle, "--data", labelled, "--dtype", "float32", code=1)
    assert "left as it is, because its golden example" in done.stdout and path.read_text() == before


def test_what_is_not_fitted_has_a_reason(bundle: Path, labelled: Path) -> None:
    done = run("calibrate", bundle, "--data", labelled, "--dtype", "float32", code=1)
    assert "calm: left as it is, because two labels with 10 conversations each are needed" in done.stdout
    assert "done/classifier.yaml: written" in done.stdout and "threshold" in done.stdout
    assert all(done.stdout.splitlines()) and max(map(len, done.stdout.splitlines()[:4])) <= 80, done.stdout
    assert (bundle / "calm" / "classifier.yaml").read_text() == CONTRACT
    assert "--objective F2" in run("calibrate", bundle, "--data", labelled, "--objective", "F2", code=1).stderr
    assert "--abstain-error" in run("calibrate", bundle, "--data", labelled, "--abstain-error", "2", code=2).stderr
