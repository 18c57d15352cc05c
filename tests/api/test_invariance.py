"""The same question gets the same probability, whatever is asked beside it, in any order, under any name, in any
neighbourhood, state of the cache and cutting of the work into steps."""

import asyncio
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

import asked
import tiny
from loraplex import Loraplex, Question
from loraplex.types import ClassifyRequest, ClassifyResult

TEXTS = (
    "Customer: hello, I would like to book a table for two\nAgent: at what time?\nCustomer: at seven, thanks",
    "Customer: hello, I would like to book a table for two\nAgent: at what time?\nCustomer: at seven, no\nAgent: done",
    "Customer: is my payment done?",
)
QUESTIONS: Mapping[str, Question] = {
    **asked.QUESTIONS,
    "many": Question(type="choice", instructions="Which?", labels=tuple(map(str, range(30)))),
}
TRAINED = ("task0", "task1", "task2", "plain", "levels")
# What may be worse than alone: bounds that docs/decisions.md states.
BOUNDS: Mapping[str, float] = {"float32": 1e-4, "bfloat16": 0.08}
# How the work is cut into steps, and what is kept between requests.
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "one step, a cache": {"kv_cache": "4MiB"},
    "many steps, no cache": {"kv_cache": "0", "max_step_tokens": 40},
    "many steps, a cache that evicts": {"kv_cache": "256KiB", "max_step_tokens": 70, "max_step_sequences": 3},
}
Scores = dict[str, float]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activated classifiers behind the base's chat template, one with a template of its own, and a plain one."""
    folder = asked.save_chat_bundle(tmp_path_factory.mktemp("invariance") / "bundle")
    tiny.save_adapter(folder, folder / "plain", contract={"labels": ["yes", "no"]}, seed=50)
    levels = {**tiny.CONTRACT, "type": "score", "labels": ["calm", "not at all", "now"]}
    tiny.save_adapter(folder, folder / "levels", contract=levels, seed=51, alora_invocation_tokens=[3])
    return folder


@pytest.fixture(scope="module", params=BOUNDS)
def dtype(request: pytest.FixtureRequest) -> Literal["float32", "bfloat16"]:
    return "float32" if request.param == "float32" else "bfloat16"


@pytest.fixture(scope="module")
def alone(bundle: Path, dtype: Literal["float32", "bfloat16"]) -> dict[tuple[str, str], Scores]:
    """Each question about each text, asked alone of an engine that keeps nothing."""
    with Loraplex.load(bundle, dtype=dtype, kv_cache="0", adhoc_questions=True) as loraplex:
        found = {}
        for text in TEXTS:
            for name in (*TRAINED, *QUESTIONS):
                asked_ = {"x": QUESTIONS[name]} if name in QUESTIONS else {}
                classifiers = () if name in QUESTIONS else (name,)
                request = ClassifyRequest(input=text, classifiers=classifiers, questions=asked_)
                [verdict] = loraplex.run(loraplex.router.classify(request)).verdicts
                found[text, name] = dict(verdict.scores or {})
        return found


@pytest.fixture(params=ENGINES)
def loraplex(request: pytest.FixtureRequest, bundle: Path, dtype: Literal["float32", "bfloat16"]) -> Iterator[Loraplex]:
    with Loraplex.load(
        bundle, dtype=dtype, adhoc_questions=True, max_queue_tokens=100_000, **ENGINES[request.param]
    ) as loraplex:
        yield loraplex


def mix(random_: random.Random) -> tuple[ClassifyRequest, dict[str, str]]:
    """Return a request for some questions, and what each of its names stands for."""
    adhoc = random_.sample(list(QUESTIONS), random_.randint(0, 3))
    classifiers = random_.sample(TRAINED, random_.randint(0 if adhoc else 1, len(TRAINED)))
    names = {f"{random_.choice(['x', 'ü', 'a b'])}{name}": name for name in adhoc}
    questions = {shown: QUESTIONS[name] for shown, name in names.items()}
    if random_.random() < 0.5:  # one that is new to the cache
        questions["extra"] = Question(type="predicate", instructions=f"Is it {random_.random()}?")
    return ClassifyRequest(
        input=random_.choice(TEXTS),
        classifiers=tuple(classifiers),
        questions=dict(random_.sample(list(questions.items()), len(questions))),
        conversation_id=random_.choice([None, "c1", "c2"]),
    ), {**names, **{name: name for name in classifiers}}


def test_a_random_mix_changes_no_probability(
    loraplex: Loraplex, alone: Mapping[tuple[str, str], Scores], dtype: str, record_property: Any
) -> None:
    random_, worst = random.Random(7), 0.0

    async def together(requests: list[ClassifyRequest]) -> list[ClassifyResult]:
        return list(await asyncio.gather(*map(loraplex.router.classify, requests)))

    for _ in range(10):
        mixes = [mix(random_) for _ in range(random_.randint(1, 4))]
        results = loraplex.run(together([request for request, _ in mixes]))
        for (request, names), result in zip(mixes, results, strict=True):
            assert isinstance(request.input, str)
            for shown, name in names.items():
                found, expected = result[shown].scores, alone[request.input, name]
                assert found is not None and list(found) == list(expected), result[shown]
                worst = max(worst, *(abs(found[label] - expected[label]) for label in expected))
    print(f"largest difference in {dtype}: {worst:.2g}")
    record_property("largest_difference", worst)
    assert worst <= BOUNDS[dtype]


def test_a_neighbour_that_fails_changes_nothing(bundle: Path) -> None:
    with Loraplex.load(bundle, dtype="float32", adhoc_questions=True) as loraplex:
        question = QUESTIONS["topic"]
        asked_ = {"topic": question}
        long = replace(question, instructions="Which? " * 2000)
        one, two = (
            loraplex.run(loraplex.router.classify(ClassifyRequest(input=TEXTS[0], classifiers=(), questions=questions)))
            for questions in (asked_, {"long": long, **asked_})
        )
        assert two["long"].error is not None
        assert two["topic"].scores == pytest.approx(one["topic"].scores, abs=BOUNDS["float32"])
