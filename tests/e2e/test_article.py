"""The article's programs run as their page says, and answer as Loraplex does."""

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import serving
import tiny
from loraplex import Loraplex

ARTICLE = serving.ROOT / "examples" / "article"
Answers = dict[str, tuple[str, float]]


def run(name: str, *arguments: str) -> Answers:
    """What it prints: a task, the answer, its confidence."""
    command = [sys.executable, str(ARTICLE / name), *arguments]
    done = subprocess.run(command, cwd=serving.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return {task: (text, float(confidence)) for task, text, confidence in rows}


@pytest.fixture(scope="module")
def expected(demo_bundle: Path) -> Iterator[Answers]:
    """By the top token of the verbatim prompt, as the article's programs answer."""
    sys.path.insert(0, str(ARTICLE))
    try:
        from prompt import CONVERSATION, TASKS, format_prompt
    finally:
        sys.path.remove(str(ARTICLE))
    answers = {}
    with Loraplex.load(demo_bundle, dtype="float32") as loraplex:
        for task in TASKS:
            [token] = loraplex.generate(format_prompt(CONVERSATION, task), task).tokens
            answers[task] = (token.text, math.exp(token.log_prob))
    yield answers


def check(answers: Answers, expected: Answers) -> None:
    assert len(answers) == 16 and answers.keys() == expected.keys()
    for task, (text, confidence) in expected.items():
        assert answers[task][0] == text
        assert answers[task][1] == pytest.approx(confidence, abs=1e-3)
    assert {text for text, _ in expected.values()} == {"yes", "no"}


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
def test_with_peft(expected: Answers) -> None:
    check(run("with_peft.py"), expected)


@pytest.mark.skipif(tiny.HAS_VLLM, reason="in the other environment")
def test_the_client(expected: Answers, demo_bundle: Path) -> None:
    with serving.serve(demo_bundle, "--dtype", "float32") as server:
        check(run("classify_conversation.py", server.url), expected)


@pytest.mark.skipif(not tiny.HAS_VLLM, reason="vLLM is not installed here")
def test_with_vllm(expected: Answers) -> None:
    check(run("with_vllm.py"), expected)
