"""What may wait, and what is refused at once."""

from types import SimpleNamespace
from typing import Any

import pytest

from loraplex.errors import QueueFullError
from loraplex.service.admission import MAX_LONG_CHARS, STEPS_WORTH, Admission


def admission(max_queue: int = 10, max_queue_tokens: int | None = 100) -> tuple[Admission, Any]:
    computation: Any = SimpleNamespace(num_waiting_tokens=0, wait_s=3.0, max_step_tokens=50)
    return Admission(computation, max_queue=max_queue, max_queue_tokens=max_queue_tokens), computation


def test_evaluations_count_until_they_are_answered() -> None:
    asked, _ = admission()
    with asked.evaluations(8):
        with pytest.raises(QueueFullError, match="8 evaluations are being answered, of 10 at most") as caught:
            with asked.evaluations(3):
                raise AssertionError("it was let in")
        assert caught.value.retry_after_s == 3.0 and "--max-queue" in caught.value.remedy
        with asked.evaluations(2):
            assert asked.num_evaluations == 10
    with pytest.raises(ValueError), asked.evaluations(1):
        raise ValueError
    assert asked.num_evaluations == 0


def test_what_is_larger_than_the_queue_gets_in_when_nothing_waits() -> None:
    asked, computation = admission()
    with asked.evaluations(99):
        asked.check_tokens(999)
        asked.check_long_text(0, 2 * MAX_LONG_CHARS)
    computation.num_waiting_tokens = 1
    with pytest.raises(QueueFullError, match="1 tokens wait already, of 100 at most"):
        asked.check_tokens(100)


def test_a_full_queue_is_seen_before_anything_is_tokenized_and_a_cached_request_is_not_taken_for_a_large_one() -> None:
    asked, computation = admission()
    computation.num_waiting_tokens = 100
    with pytest.raises(QueueFullError, match="100 tokens wait"), asked.evaluations(1):
        raise AssertionError("it was let in")
    computation.num_waiting_tokens = 60
    with asked.evaluations(1):
        with pytest.raises(QueueFullError):
            asked.check_tokens(41)
        asked.check_tokens(40)  # whatever was refused before it


def test_long_texts_are_bounded() -> None:
    asked, _ = admission()
    with pytest.raises(QueueFullError, match="characters of long texts") as caught:
        asked.check_long_text(MAX_LONG_CHARS, 1)
    assert "shorten it" in caught.value.remedy


def test_by_default_some_steps_worth_of_tokens_may_wait() -> None:
    asked, computation = admission(max_queue_tokens=None)
    computation.num_waiting_tokens = STEPS_WORTH * 50 - 1
    asked.check_tokens(1)
    with pytest.raises(QueueFullError):
        asked.check_tokens(2)
