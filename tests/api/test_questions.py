"""Questions that no adapter was trained for: who answers them, with which probabilities, and what is computed."""

import asyncio
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import asked
import serving
import tiny
from asked import QUESTIONS
from loraplex import Client, Loraplex, Question
from loraplex.errors import DeadlineExceededError, InputTooLongError, InvalidRequestError, UnknownClassifierError
from loraplex.service.questions import QuestionEvaluation
from loraplex.text.codes import PAIRS
from loraplex.types import ClassifyRequest, ClassifyResult, Message, ToolCall

TEXT = "Customer: hello, I would like to book a table for two\nAgent: at what time?\nCustomer: at seven, thanks"
OTHERS = ("Customer: is my payment done?", TEXT + "\nAgent: yes, it is done", "{}", "Customer: <|ask|> yes or no")
EXACT = 1e-4  # in float32, whatever else is computed


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return asked.save_chat_bundle(tmp_path_factory.mktemp("chat") / "bundle")


@pytest.fixture(scope="module")
def loraplex(bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, dtype="float32", kv_cache="2MiB", adhoc_questions=True) as loraplex:
        yield loraplex


@pytest.fixture(scope="module")
def uncorrected(bundle: Path) -> Iterator[Loraplex]:
    with Loraplex.load(bundle, dtype="float32", adhoc_questions=True, adhoc_correction="none") as loraplex:
        yield loraplex


def ask(
    loraplex: Loraplex,
    questions: Mapping[str, Question] = QUESTIONS,
    classifiers: Iterable[str] = (),
    input: Any = TEXT,
    **more: Any,
) -> ClassifyResult:
    request = ClassifyRequest(input=input, classifiers=tuple(classifiers), questions=questions, **more)
    return loraplex.run(loraplex.router.classify(request))


def scores(result: ClassifyResult) -> dict[str, dict[str, float]]:
    return {verdict.classifier: dict(verdict.scores or {}) for verdict in result.verdicts}


def test_a_verdict_says_that_no_adapter_answered(loraplex: Loraplex) -> None:
    result = ask(loraplex, classifiers=("task0",))
    assert [verdict.classifier for verdict in result.verdicts] == ["task0", *QUESTIONS]
    assert result["task0"].adapter is not None and not any("zero_shot" in one for one in result["task0"].warnings or ())
    for name, question in QUESTIONS.items():
        verdict = result[name]
        assert verdict.error is None and verdict.adapter is None
        assert verdict.warnings is not None and verdict.warnings[0].startswith("zero_shot: no adapter")
        assert tuple(verdict.scores or ()) == question.labels and verdict.label in question.labels
        assert sum((verdict.scores or {}).values()) == pytest.approx(1)
        assert verdict.confidence == max((verdict.scores or {}).values())
        assert verdict.label_mass is not None and 0 < verdict.label_mass <= 1
    levels = list((result["hurry"].scores or {}).values())
    assert result["hurry"].score == pytest.approx(levels[1] + 2 * levels[2]) and result["topic"].score is None


def test_without_the_option_no_question_is_answered(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32") as loraplex:
        before = loraplex.service.stats().num_step_tokens
        with pytest.raises(UnknownClassifierError, match="isDone") as caught:
            ask(loraplex, classifiers=("task0",))
        assert "--adhoc-questions" in caught.value.remedy
        assert loraplex.service.stats().num_step_tokens == before
        assert ask(loraplex, {}, ("task0",))["task0"].label


def test_probabilities_are_those_of_the_base_after_the_prompt(uncorrected: Loraplex, bundle: Path) -> None:
    """The slow reference: transformers, one prompt at a time."""
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    model: Any = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    written = {
        "isDone": ("Is the payment done?\nAnswer with one word, yes or no.", "yes no"),
        "topic": (
            "What is it about?\n- table: a table for two\n- payment\n- other\nAnswer with the name of one option.",
            "table payment other",
        ),
        "hurry": ("How urgent is it?\n0. calm\n1. soon\n2. now\nAnswer with the number of one level.", "0 1 2"),
        "alike": (
            "When?\nA. done before the end of today\nB. done before the end of the week\n"
            "Answer with the letter of one option.",
            "A B",
        ),
        "untold": ("Which option fits best?\n- hello\n- thanks\nAnswer with the name of one option.", "hello thanks"),
    }

    def probability(ids: list[int], behind: Iterable[int]) -> Any:
        with torch.inference_mode():
            rows = model(torch.tensor([[*ids, *behind]])).logits[0].softmax(-1)
        return math.prod(rows[len(ids) - 1 + at, token].item() for at, token in enumerate(behind))

    verdicts = ask(uncorrected)
    assert uncorrected.service.base.questions is not None
    for name, (text, codes) in written.items():
        prompt = f"<|ask|>user\n{TEXT}</s>\n<|ask|>user\nQuestion about the text above: {text}</s>\n<|ask|>assistant\n"
        ids = tokenizer(prompt)["input_ids"]
        [presentation] = uncorrected.service.base.questions.present(QUESTIONS[name])
        found = []
        for code, answers in zip(codes.split(), presentation.answers, strict=True):
            assert {str(tokenizer.decode([*answer])).strip().lower() for answer in answers} == {code.lower()}
            found.append(sum(probability(ids, answer) for answer in answers))
        assert verdicts[name].label_mass == pytest.approx(sum(found), rel=1e-3)
        expected = dict(zip(QUESTIONS[name].labels, (one / sum(found) for one in found), strict=True))
        assert verdicts[name].scores == pytest.approx(expected, abs=EXACT)


def test_the_same_question_gets_the_same_probability_in_any_mix(loraplex: Loraplex) -> None:
    """Whatever is asked beside it, in any order, under any name, in any neighbourhood and state of the cache."""
    every = {name: scores(ask(loraplex, {name: question}))[name] for name, question in QUESTIONS.items()}
    trained = scores(ask(loraplex, {}, ("task0", "task1", "task2")))
    random_ = random.Random(26)

    async def together(requests: list[ClassifyRequest]) -> list[ClassifyResult]:
        return list(await asyncio.gather(*map(loraplex.router.classify, requests)))

    for _ in range(25):
        requests, names = [], []
        for _ in range(random_.randint(1, 4)):
            renamed = {name: f"{random_.choice(['x', 'ü', 'a b'])}{name}" for name in QUESTIONS}
            some = random_.sample(list(QUESTIONS), random_.randint(1, len(QUESTIONS)))
            questions = {renamed[name]: QUESTIONS[name] for name in some}
            extra = Question(type="predicate", instructions=f"Is it {random_.random()}?")
            if random_.random() < 0.5:
                questions = {"extra": extra, **questions}
            classifiers = tuple(random_.sample(list(trained), random_.randint(0, len(trained))))
            id = random_.choice([None, "c1", "c2"])
            text = TEXT if random_.random() < 0.7 else random_.choice(OTHERS)
            requests.append(
                ClassifyRequest(input=text, classifiers=classifiers, questions=questions, conversation_id=id)
            )
            names.append({renamed[name]: name for name in some})
        for request, of, result in zip(requests, names, loraplex.run(together(requests)), strict=True):
            if request.input != TEXT:
                continue
            for verdict in result.verdicts:
                if verdict.classifier != "extra":
                    alone = every[of[verdict.classifier]] if verdict.adapter is None else trained[verdict.classifier]
                    assert verdict.scores == pytest.approx(alone, abs=EXACT)


def test_the_state_is_computed_once_for_classifiers_and_questions(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32", kv_cache="0", adhoc_questions=True) as loraplex:
        trained = ask(loraplex, {}, ("task0", "task1", "task2"))
        before = loraplex.service.stats().num_steps
        both = ask(loraplex, QUESTIONS, ("task0", "task1", "task2"))
        assert loraplex.service.stats().num_steps == before + 1, "one forward pass"
        short = ask(loraplex, QUESTIONS, (), input="x")
        shorter = ask(loraplex, {}, ("task0", "task1", "task2"), input="x")
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    state = len(tokenizer(TEXT)["input_ids"])
    own = short.usage.computed_tokens - len(tokenizer("<|ask|>user\nx</s>\n<|ask|>")["input_ids"])
    # The base computes the activation's first token, too.
    assert both.usage.computed_tokens <= trained.usage.computed_tokens + own + 1
    assert trained.usage.computed_tokens == shorter.usage.computed_tokens + state - 1
    assert both.usage.prompt_tokens > 8 * state


def test_on_the_command_line_with_the_prompts_that_are_asked(bundle: Path, loraplex: Loraplex) -> None:
    asks = ("-q", "Is it done?", "-q", "Is the customer polite?", "--show-prompt")
    run = serving.loraplex("classify", bundle, *asks, "--dtype", "float32", "--json", "--text", TEXT)
    answer = json.loads(run.stdout)
    wanted = ask(loraplex, {name: Question(type="predicate", instructions=name) for name in asks[1:4:2]})
    assert {one["classifier"]: one["scores"] for one in answer["verdicts"]} == {
        name: pytest.approx(of, abs=EXACT) for name, of in scores(wanted).items()
    }
    assert [one["classifier"] for one in answer["prompts"]] == ["Is it done?"] * 2 + ["Is the customer polite?"] * 2
    assert "Is the customer polite?" in answer["prompts"][3]["text"], "each question is asked in both orders"


def test_the_order_of_the_labels_changes_nothing(loraplex: Loraplex, uncorrected: Loraplex) -> None:
    for question in (QUESTIONS["topic"], QUESTIONS["alike"]):
        turned = replace(question, labels=question.labels[::-1])
        one, other = (scores(ask(loraplex, {"q": asked}))["q"] for asked in (question, turned))
        assert one == pytest.approx(other, abs=EXACT)
        one, other = (scores(ask(uncorrected, {"q": asked}))["q"] for asked in (question, turned))
        assert one != pytest.approx(other, abs=EXACT), "the base prefers places in the list"
    assert len(loraplex.run(_sequences(loraplex))) == 2 * len(loraplex.run(_sequences(uncorrected)))


async def _sequences(loraplex: Loraplex) -> Any:
    before = loraplex.service.stats().num_step_sequences
    await loraplex.router.classify(ClassifyRequest(input=TEXT, classifiers=(), questions=QUESTIONS))
    return range(loraplex.service.stats().num_step_sequences - before)


def test_texts_of_a_question_write_no_special_tokens(loraplex: Loraplex) -> None:
    told = Question(type="choice", instructions="a</s>b<|ask|>c", labels=("<s>", "</s>x"))
    verdict = ask(loraplex, {"q": told})["q"]
    assert verdict.error is None and tuple(verdict.scores or ()) == ("<s>", "</s>x"), (
        "the answer has the labels as given"
    )


def test_messages_are_written_as_for_classifiers(loraplex: Loraplex) -> None:
    messages = (
        Message(role="user", content="hello, I would like to book a table for two"),
        Message(role="assistant", content="at what time?"),
        Message(role="user", content="at seven, thanks"),
    )
    by_text = scores(ask(loraplex))
    for name, found in scores(ask(loraplex, input=messages)).items():
        assert found == pytest.approx(by_text[name], abs=EXACT)


def test_turns_of_systems_and_tools_are_written_and_calls_of_tools_told(loraplex: Loraplex) -> None:
    """No contract says what becomes of them."""
    calls = Message(role="assistant", content="", tool_calls=(ToolCall(name="book", arguments="{}"),))
    messages = (
        Message(role="system", content="be kind"),
        Message(role="user", content="a table"),
        calls,
        Message(role="tool", content="booked"),
    )
    verdict = ask(loraplex, {"q": QUESTIONS["isDone"]}, input=messages)["q"]
    assert any(one.startswith("left_out_tool_calls") for one in verdict.warnings or ())
    text = "System: be kind\nCustomer: a table\nTool: booked"
    assert verdict.scores == pytest.approx(ask(loraplex, {"q": QUESTIONS["isDone"]}, input=text)["q"].scores, abs=EXACT)
    with pytest.raises(InvalidRequestError, match="unknown role 'wizard'"):
        ask(loraplex, {"q": QUESTIONS["isDone"]}, input=(Message(role="wizard", content="x"),))


@pytest.mark.parametrize(
    ("question", "told"),
    [
        (Question(type="predicate", instructions=" "), "no instructions"),
        (Question(type="predicate", instructions="Is it?", labels=("a", "b", "c")), "has 3 labels"),
        (Question(type="choice", instructions="Which?", labels=("a",)), "has 1 labels"),
        (Question(type="choice", instructions="Which?", labels=("a", "a")), "the same"),
        (Question(type="choice", instructions="Which?", labels=("a", "a ")), "the same"),
        (Question(type="choice", instructions="Which?", labels=("\ufeffa\u2028b", "a\nb")), "the same"),
        (Question(type="score", instructions="How?", labels=("a", " ")), "empty"),
        (Question(type="choice", instructions="W?", labels=("a", "b"), descriptions={"c": "d"}), "'c'"),
        (Question(type="choice", instructions="\ud800", labels=("a", "b")), "Unicode"),
        (Question(type="choice", instructions="W?", labels=tuple(map(str, range(256)))), "has 256 labels"),
    ],
)
def test_a_question_that_nobody_can_answer_is_refused_before_any_work(
    loraplex: Loraplex, question: Question, told: str
) -> None:
    before = loraplex.service.stats().num_step_tokens
    with pytest.raises(InvalidRequestError, match=told):
        ask(loraplex, {**QUESTIONS, "q": question}, ("task0",))
    assert loraplex.service.stats().num_step_tokens == before


def test_a_question_that_does_not_fit_fails_alone(loraplex: Loraplex) -> None:
    long = Question(type="predicate", instructions="Is it? " * 1000)
    result = ask(loraplex, {"long": long, **QUESTIONS})
    assert result["long"].error is not None and result["long"].error.code == InputTooLongError.code
    assert all(result[name].error is None for name in QUESTIONS)
    with pytest.raises(InputTooLongError):
        ask(loraplex, {"long": long})


def test_many_labels_are_told_apart_by_two_letters_that_are_a_token_each(uncorrected: Loraplex, bundle: Path) -> None:
    """The tiny tokenizer has no tokens of two letters. The slow reference reads one pair after the other."""
    many = Question(type="choice", instructions="Which?", labels=tuple(map(str, range(60))))
    before = uncorrected.service.stats().num_steps
    verdict = ask(uncorrected, {"many": many})["many"]
    assert uncorrected.service.stats().num_steps == before + 1, "one forward pass"
    tokenizer = AutoTokenizer.from_pretrained(bundle)
    model: Any = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    lines = "".join(f"{pair}. {label}\n" for pair, label in zip(PAIRS, many.labels, strict=False))
    asked_ = f"Question about the text above: Which?\n{lines}Answer with the letters of one option."
    prompt = f"<|ask|>user\n{TEXT}</s>\n<|ask|>user\n{asked_}</s>\n<|ask|>assistant\n"
    start = len(tokenizer(prompt)["input_ids"])
    found = {}
    for label, pair in zip(many.labels, PAIRS, strict=False):
        found[label] = 0.0
        for spelled in (pair, f" {pair}"):
            ids = tokenizer(prompt + spelled)["input_ids"]
            with torch.inference_mode():
                rows = model(torch.tensor([ids])).logits[0].softmax(-1)
            found[label] += math.prod(rows[at - 1, ids[at]].item() for at in range(start, len(ids)))
    mass = sum(found.values())
    assert verdict.label_mass == pytest.approx(mass, rel=1e-3)
    assert verdict.scores == pytest.approx({label: one / mass for label, one in found.items()}, abs=EXACT)


def test_the_order_of_many_labels_changes_nothing(loraplex: Loraplex) -> None:
    many = Question(type="choice", instructions="Which?", labels=tuple(map(str, range(60))))
    result = ask(loraplex, {"many": many, "turned": replace(many, labels=many.labels[::-1])})
    assert result["many"].scores == pytest.approx(result["turned"].scores, abs=EXACT)
    letters = replace(many, labels=many.labels[:26])
    assert len(ask(loraplex, {"letters": letters})["letters"].scores or ()) == 26


def test_a_base_without_a_chat_template_is_asked_in_plain_text(tmp_path: Path) -> None:
    tiny.save_base(tmp_path, asked.config())
    with Loraplex.load(tmp_path, dtype="float32", adhoc_questions=True) as loraplex:
        result = ask(loraplex, classifiers=())
    assert all(verdict.error is None for verdict in result.verdicts) and math.isfinite(result["hurry"].score or 0)


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[serving.Server]:
    with serving.serve(bundle, "--dtype", "float32", "--adhoc-questions") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(server) as client:
        yield client


def test_python_answers_the_same_over_http_and_in_process(server: serving.Server, loraplex: Loraplex) -> None:
    questions = {
        **QUESTIONS,
        "tone": Question(
            type="predicate", instructions="Rude?", labels=("rude", "polite"), descriptions={"polite": "kind words"}
        ),
        "task0": QUESTIONS["isDone"],
    }
    with Client(server.url) as client:
        remote = client.decide(TEXT, questions)
        asked.assert_same(remote, loraplex.decide(TEXT, questions))
        assert [*(remote["tone"].scores or {})] == ["rude", "polite"] and remote["tone"].label in ("rude", "polite")
        for wrong, told in asked.WRONG.values():
            for one in (client, loraplex):
                asked.assert_refused(one, wrong, told, "isDone")
                asked.assert_refused(one, wrong, told)


BODIES: Mapping[str, Any] = {
    "isDone": {"type": "predicate", "instructions": "Is the payment done?"},
    "topic": {
        "type": "choice",
        "instructions": "What is it about?",
        "criteria": {"table": "a table for two", "payment": None, "other": ""},
    },
    "hurry": {"type": "score", "instructions": "How urgent is it?", "labels": ["calm", "soon", "now"]},
    "alike": {
        "type": "choice",
        "instructions": "When?",
        "labels": ["done before the end of today", "done before the end of the week"],
    },
    "untold": {"type": "choice", "labels": ["hello", "thanks"]},
}


def test_over_http_beside_classifiers(http: httpx.Client, loraplex: Loraplex) -> None:
    response = http.post("/v1/classify", json={"input": TEXT, "classifiers": ["task0"], "questions": BODIES})
    assert response.status_code == 200, response.text
    verdicts = {verdict.pop("classifier"): verdict for verdict in response.json()["verdicts"]}
    assert list(verdicts) == ["task0", *QUESTIONS]
    expected = scores(ask(loraplex))
    for name, found in expected.items():
        assert verdicts[name]["scores"] == pytest.approx(found, abs=EXACT)
        assert "adapter" not in verdicts[name] and verdicts[name]["warnings"][0].startswith("zero_shot: ")
    assert "adapter" in verdicts["task0"]
    several = http.post("/v1/classify", json={"inputs": [TEXT, "hi"], "classifiers": [], "questions": BODIES}).json()
    assert [len(one["verdicts"]) for one in several["results"]] == [5, 5]
    assert several["results"][0]["verdicts"][1]["scores"] == pytest.approx(expected["topic"], abs=EXACT)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ({"instructions": "Is it?"}, "questions.q.type: is missing"),
        ({"type": "noul", "instructions": "Is it?"}, "predicate"),
        ({"type": "predicate"}, "'q' has no instructions"),
        ({"type": "choice", "instructions": "Which?"}, "'q' has 0 labels"),
        ({"type": "choice", "labels": ["a", "a"]}, "the same"),
        ({"type": "choice", "labels": ["a", "b"], "criteria": {"c": "d"}}, "describes 'c'"),
        ({"type": "choice", "labels": ["a", "b"], "options": ["a"]}, "questions.q.options"),
        ({"type": "score", "labels": "calm"}, "a list"),
        ({"type": "choice", "labels": list(map(str, range(300)))}, "255"),
    ],
)
def test_a_wrong_question_is_named_with_what_to_give(http: httpx.Client, question: Any, told: str) -> None:
    response = http.post("/v1/classify", json={"input": TEXT, "questions": {**BODIES, "q": question}})
    error = response.json()["error"]
    assert response.status_code == 422 and error["code"] == "invalid_request"
    assert told in f"{error['message']} {error['remedy']}"


def test_without_the_option_the_answer_is_404(tiny_server: serving.Server) -> None:
    with serving.client(tiny_server) as client:
        response = client.post("/v1/classify", json={"input": TEXT, "questions": BODIES})
    assert response.status_code == 404 and response.json()["error"]["code"] == "unknown_classifier"
    assert "--adhoc-questions" in response.json()["error"]["remedy"]


def test_feedback_and_metrics_know_questions(http: httpx.Client) -> None:
    """Under one name in the metrics: callers may name questions and labels in any way."""
    answer = http.post("/v1/classify", json={"input": TEXT, "classifiers": [], "questions": BODIES}).json()
    ids = [verdict["id"] for verdict in answer["verdicts"]]
    assert len(set(ids)) == 5
    told = http.post("/v1/feedback", json={"verdict_id": ids[1], "label": "payment"})
    assert told.status_code == 200 and told.json()["num_answers"] == 1
    wrong = http.post("/v1/feedback", json={"verdict_id": ids[1], "label": "nonsense"})
    assert wrong.status_code == 422 and "'nonsense' is no label of the question" in wrong.text
    assert "'table', 'payment', 'other'" in wrong.json()["error"]["remedy"]
    assert http.post("/v1/feedback", json={"verdict_id": ids[0], "label": "true"}).status_code == 200
    [stats] = http.get("/v1/routes/isDone/stats").json()["targets"]
    assert stats["accuracy"]["num_labelled"] == 1 and set(stats["label_shares"]) <= {"yes", "no"}
    was_right = answer["verdicts"][0]["label"] == "yes"
    assert stats["accuracy"]["share"] == was_right, "true stands for yes"
    assert http.get("/v1/routes/nobody/stats").status_code == 404
    metrics = http.get("/metrics").text
    of_questions = 'loraplex_classifications_total{adapter="",classifier="(question)",outcome="ok"}'
    [line] = [one for one in metrics.splitlines() if one.startswith(of_questions)]
    assert float(line.split()[-1]) >= 5
    assert "topic" not in metrics and "payment" not in metrics
    long = {"type": "predicate", "instructions": "Is it? " * 1000}
    for questions in ({"long": long}, {"long": long, **BODIES}):
        http.post("/v1/classify", json={"input": TEXT, "classifiers": [], "questions": questions})
    counted = http.get("/metrics").text
    assert 'classifier="(question)",outcome="input_too_long"} 2' in counted and "(unknown)" not in counted


def test_the_same_request_is_answered_before_and_after_an_adapter_is_trained_for_its_question(
    http: httpx.Client,
) -> None:
    """By /v1/classify and by the typed routes, which then say who answered."""
    question = {"type": "predicate", "instructions": "Is it so?"}
    asked: dict[str, Any] = {"isDone": BODIES["isDone"], "task1": question}
    body: dict[str, Any] = {"input": TEXT, "classifiers": ["task0"], "questions": asked}
    answered = http.post("/v1/classify", json=body)
    verdicts = {one["classifier"]: one for one in answered.json()["verdicts"]}
    assert list(verdicts) == ["task0", "task1", "isDone"] and asked.keys() < verdicts.keys()
    alone = http.post("/v1/classify", json={"input": TEXT, "classifiers": ["task1"]}).json()["verdicts"][0]
    assert verdicts["task1"]["scores"] == pytest.approx(alone["scores"], abs=EXACT)
    assert verdicts["task1"]["adapter"]["name"] == "task1" and "adapter" not in verdicts["isDone"]
    assert any(one.startswith("instructions_not_used") for one in verdicts["task1"]["warnings"])
    every = http.post("/v1/classify", json={**body, "classifiers": "*"}).json()["verdicts"]
    assert [one["classifier"] for one in every].count("task1") == 1 and len(every) > 3
    several = {"inputs": [TEXT, "hi"], "classifiers": [], "questions": asked}
    for result in http.post("/v1/classify", json=several).json()["results"]:
        assert [one["classifier"] for one in result["verdicts"]] == ["task1", "isDone"]
    other = {**question, "labels": ["solved", "open"]}
    refused = http.post("/v1/classify", json={**body, "questions": {"task1": other}})
    assert refused.status_code == 422 and "are not the labels of 'task1'" in refused.json()["error"]["message"]


def test_an_adapter_that_is_loaded_meanwhile_refuses_no_typed_question(loraplex: Loraplex) -> None:
    """Between the plan and the work the name of a question may become a classifier's."""
    assert ask(loraplex, {"task0": QUESTIONS["isDone"]}, ("task1",))["task0"].adapter is None


@pytest.mark.parametrize(
    ("questions", "told"),
    [
        ({"q" * 129: BODIES["isDone"]}, "at most 128 characters"),
        ({"q": {"type": "choice", "labels": ["a", "b" * 201]}}, "at most 200 characters"),
    ],
)
def test_names_and_labels_that_are_kept_have_a_limit(http: httpx.Client, questions: Any, told: str) -> None:
    response = http.post("/v1/classify", json={"input": TEXT, "classifiers": [], "questions": questions})
    assert response.status_code == 422 and told in response.json()["error"]["remedy"], response.text
    assert len(response.text) < 2000


def test_a_request_asks_the_bare_base_400_questions_at_most(http: httpx.Client) -> None:
    questions = {f"q{number}": {"type": "noul", "instructions": "Is it?"} for number in range(401)}
    response = http.post("/v1/systemone", json={"state": TEXT, "questions": questions})
    assert response.status_code == 422 and response.json()["error"]["param"] == "questions"
    assert "400 in one request" in response.json()["error"]["remedy"]
    questions = {"x" * 100_000: {"type": "noul", "instructions": "Is it?"}}
    assert len(http.post("/v1/systemone", json={"state": TEXT, "questions": questions}).text) < 3000


def test_a_question_counts_as_two_evaluations_and_is_not_tokenized_for_nobody(loraplex: Loraplex) -> None:
    service = loraplex.service
    admission = service.computing.admission
    evaluations = admission.evaluations
    counted: list[int] = []

    def count(num: int) -> Any:
        counted.append(num)
        return evaluations(num)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(admission, "evaluations", count)
        ask(loraplex, QUESTIONS, ("task0",))
        assert counted == [1 + 2 * len(QUESTIONS)]
        tokenized = []
        make = QuestionEvaluation.tokenize

        def slow(self: QuestionEvaluation, *arguments: Any) -> None:
            tokenized.append(self.name)
            make(self, *arguments)
            time.sleep(0.2)

        patched.setattr(QuestionEvaluation, "tokenize", slow)
        with pytest.raises(DeadlineExceededError):
            ask(loraplex, QUESTIONS, (), deadline_ms=100)
        time.sleep(0.5)
        assert 1 <= len(tokenized) <= 2 < len(QUESTIONS)
