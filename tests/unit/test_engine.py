"""The engine's thread around a runner whose behaviour each test sets."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

import pytest

from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.block_pool import BlockPool
from loraplex.engine.engine import Engine
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Outcome, Sampling, Sequence, SequenceOutput, Token
from loraplex.engine.step import Step
from loraplex.errors import DeadlineExceededError, EngineError, NotReadyError

TIMEOUT = 10.0


def request(*num_tokens: int, slot: int = NO_ADAPTER, deadline_s: float | None = None) -> EngineRequest:
    """Sequences that share nothing."""
    sequences = [Sequence(token_ids=(1000 * i + n, *range(n - 1)), slot=slot) for i, n in enumerate(num_tokens)]
    return EngineRequest(sequences, deadline_s=deadline_s)


def output(sequence: Sequence) -> SequenceOutput:
    """An answer that tells which sequence it is for."""
    return SequenceOutput(
        log_probs=(),
        tokens=(*sequence.tokens, Token(sequence.num_tokens, 0.0)),
        queued_s=0.0,
        computed_s=0.0,
    )


def assert_set(event: threading.Event) -> None:
    assert event.wait(TIMEOUT)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


def scheduler(*, tokens: int = 100, sequences: int = 10) -> Scheduler:
    return Scheduler(max_step_tokens=tokens, max_step_sequences=sequences)


class FakeRunner:
    """Honours the Runner contract; records the steps and runs `before` first."""

    def __init__(self, before: Callable[[Seq[Sequence]], None] = lambda step: None) -> None:
        self.before = before
        self.steps: list[int] = []

    def run(self, step: Step) -> list[tuple[Sequence, Outcome]]:
        sequences = [placed.sequence for placed in step.placed]
        self.steps.append(len(sequences))
        self.before(sequences)
        answered = [placed.sequence for placed in step.placed if not placed.is_chunk]
        return [(sequence, output(sequence)) for sequence in reversed(answered)]  # any order will do


@pytest.fixture
def engine_of() -> Iterator[Callable[[FakeRunner, Scheduler], Engine]]:
    engines = []

    def make(runner: FakeRunner, policy: Scheduler) -> Engine:
        engine = Engine(runner, policy)
        engines.append(engine)
        engine.start()
        return engine

    yield make
    for engine in engines:
        engine.close()


EngineOf = Callable[[FakeRunner, Scheduler], Engine]


def top_ids(wanted: EngineRequest) -> list[int]:
    outcomes = wanted.future.result(TIMEOUT)
    assert all(isinstance(outcome, SequenceOutput) for outcome in outcomes), outcomes
    return [outcome.tokens[-1].id for outcome in outcomes if isinstance(outcome, SequenceOutput)]


def test_outcomes_come_in_the_requests_order(engine_of: EngineOf) -> None:
    engine, wanted = engine_of(FakeRunner(), scheduler(tokens=5)), request(3, 1, 2)
    engine.submit(wanted)
    assert top_ids(wanted) == [3, 1, 2]


def test_requests_from_many_threads_share_steps_and_each_resolves(engine_of: EngineOf) -> None:
    hold = threading.Event()
    runner = FakeRunner(lambda step: assert_set(hold))
    engine = engine_of(runner, scheduler(tokens=1000, sequences=1000))
    wanted = [request(1 + i, 2) for i in range(40)]
    threads = [threading.Thread(target=engine.submit, args=(one,)) for one in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hold.set()
    assert [top_ids(one) for one in wanted] == [[1 + i, 2] for i in range(40)]
    assert len(runner.steps) < 40, "what waited while a step ran was not batched"


def test_a_sequence_that_fails_a_step_is_found_and_the_others_answer(engine_of: EngineOf) -> None:
    def fail_on_7(step: Seq[Sequence]) -> None:
        if any(sequence.num_tokens == 7 for sequence in step):
            raise ValueError("broken")

    engine, mixed, good = engine_of(FakeRunner(fail_on_7), scheduler()), request(1, 2, 7, 4, 5), request(3)
    engine.submit(mixed)
    outcomes = mixed.future.result(TIMEOUT)
    assert [isinstance(outcome, EngineError) for outcome in outcomes] == [False, False, True, False, False]
    assert isinstance(outcomes[2], EngineError) and "broken" in outcomes[2].message
    engine.submit(good)
    assert top_ids(good) == [3]


def test_an_engine_whose_device_is_gone_stops_and_says_so(engine_of: EngineOf) -> None:
    def gone(step: Seq[Sequence]) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine, wanted = engine_of(FakeRunner(gone), scheduler()), request(1, 2, 3)
    engine.submit(wanted)
    assert all(isinstance(outcome, EngineError) for outcome in wanted.future.result(TIMEOUT))
    wait_until(lambda: not engine.alive)
    with pytest.raises(NotReadyError):
        engine.submit(request(1))


def test_a_thread_that_dies_within_a_split_step_answers_all_of_it(engine_of: EngineOf) -> None:
    def die_in_the_first_half(step: Seq[Sequence]) -> None:
        if len(step) > 2:
            raise MemoryError
        raise SystemExit

    engine, wanted = engine_of(FakeRunner(die_in_the_first_half), scheduler()), request(1, 2, 3, 4)
    engine.submit(wanted)
    assert all(isinstance(outcome, EngineError) for outcome in wanted.future.result(TIMEOUT))


def test_out_of_memory_splits_the_step_until_it_fits(engine_of: EngineOf) -> None:
    def holds_two(step: Seq[Sequence]) -> None:
        if len(step) > 2:
            raise MemoryError

    runner = FakeRunner(holds_two)
    engine, wanted = engine_of(runner, scheduler()), request(1, 2, 3, 4, 5)
    engine.submit(wanted)
    assert top_ids(wanted) == [1, 2, 3, 4, 5]
    assert max(runner.steps[1:]) < 5


def test_out_of_memory_with_one_sequence_is_that_sequences_error(engine_of: EngineOf) -> None:
    def too_long(step: Seq[Sequence]) -> None:
        if any(sequence.num_tokens > 50 for sequence in step):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    engine, wanted = engine_of(FakeRunner(too_long), scheduler()), request(10, 60, 20)
    engine.submit(wanted)
    outcomes = wanted.future.result(TIMEOUT)
    assert [isinstance(outcome, EngineError) for outcome in outcomes] == [False, True, False]


def test_a_dead_thread_answers_everyone_and_accepts_nobody(engine_of: EngineOf) -> None:
    started, die = threading.Event(), threading.Event()

    def exit_thread(step: Seq[Sequence]) -> None:
        started.set()
        die.wait(TIMEOUT)
        raise SystemExit

    engine, running, waiting = engine_of(FakeRunner(exit_thread), scheduler(sequences=1)), request(1), request(2)
    engine.submit(running)
    assert started.wait(TIMEOUT)
    engine.submit(waiting)
    die.set()
    for one in (running, waiting):
        assert isinstance(one.future.result(TIMEOUT)[0], EngineError)
    assert not engine.alive
    with pytest.raises(NotReadyError):
        engine.submit(request(1))


def test_an_abandoned_request_is_not_computed(engine_of: EngineOf) -> None:
    started, hold = threading.Event(), threading.Event()

    def block(step: Seq[Sequence]) -> None:
        started.set()
        hold.wait(TIMEOUT)

    runner = FakeRunner(block)
    engine, first, abandoned, last = engine_of(runner, scheduler(sequences=1)), request(1), request(2), request(3)
    engine.submit(first)
    assert started.wait(TIMEOUT)
    engine.submit(abandoned)
    engine.submit(last)
    assert abandoned.future.cancel()
    hold.set()
    assert top_ids(last) == [3]
    assert runner.steps == [1, 1]


def test_a_passed_deadline_is_an_outcome(engine_of: EngineOf) -> None:
    engine, wanted = engine_of(FakeRunner(), scheduler()), request(1, deadline_s=time.monotonic() - 1)
    engine.submit(wanted)
    assert isinstance(wanted.future.result(TIMEOUT)[0], DeadlineExceededError)


def test_close_finishes_what_is_queued_and_refuses_more(engine_of: EngineOf) -> None:
    engine, wanted = engine_of(FakeRunner(), scheduler(sequences=1)), request(1, 2, 3)
    engine.submit(wanted)
    engine.close()
    assert top_ids(wanted) == [1, 2, 3]
    with pytest.raises(NotReadyError):
        engine.submit(request(1))
    engine.close()


def test_a_sequence_is_asked_after_each_token_whether_to_go_on(engine_of: EngineOf) -> None:
    told: list[int] = []

    def until_four(token: Token) -> bool:
        told.append(token.id)
        return len(told) < 4

    asking = Sequence(token_ids=(1, 2, 3), slot=NO_ADAPTER, sampling=Sampling(max_tokens=9), on_token=until_four)
    wanted, runner = EngineRequest([asking]), FakeRunner()
    engine_of(runner, scheduler()).submit(wanted)
    [outcome] = wanted.future.result(TIMEOUT)
    assert isinstance(outcome, SequenceOutput)
    assert [token.id for token in outcome.tokens] == told == [3, 4, 5, 6]
    assert len(runner.steps) == 4


def test_a_callback_that_raises_fails_its_own_sequence_only(engine_of: EngineOf) -> None:
    def fail(token: Token) -> bool:
        raise ValueError("no such token")

    sampling = Sampling(max_tokens=3)
    failing = Sequence(token_ids=(1, 2, 3), slot=NO_ADAPTER, sampling=sampling, on_token=fail)
    other = Sequence(token_ids=(7, 8, 9), slot=NO_ADAPTER, sampling=sampling)
    wanted = EngineRequest([failing, other])
    engine = engine_of(FakeRunner(), scheduler())
    engine.submit(wanted)
    first, second = wanted.future.result(TIMEOUT)
    assert isinstance(first, EngineError) and "no such token" in first.message
    assert isinstance(second, SequenceOutput) and len(second.tokens) == 3
    assert engine.alive


def test_who_stops_waiting_gets_what_there_is() -> None:
    gate = threading.Event()
    policy = scheduler(sequences=1)
    runner = FakeRunner(lambda step: assert_set(gate) if len(runner.steps) > 1 else None)
    engine = Engine(runner, policy)
    engine.start()
    ended = threading.Event()
    asked = EngineRequest(
        [Sequence(token_ids=(i, 1, 2), slot=NO_ADAPTER) for i in range(3)], on_end=lambda: ended.set()
    )
    engine.submit(asked)
    late = DeadlineExceededError("late", remedy="none")
    wait_until(lambda: asked.outcomes(late)[0] is not late)
    found = asked.outcomes(late)
    assert isinstance(found[0], SequenceOutput) and found[1:] == [late, late]
    asked.future.cancel()
    assert not ended.is_set(), "the engine still computes one of them"
    gate.set()
    assert_set(ended)
    engine.close()


class RaisingAt:
    """Stands before an object and raises once the `n`-th call of any of its methods is done, counted over all objects
    that share the counter."""

    def __init__(self, real: Any, calls: "itertools.count[int]", n: int) -> None:
        self._real, self._calls, self._n = real, calls, n

    def _done(self, result: Any) -> Any:
        if next(self._calls) == self._n:
            raise RuntimeError(f"call {self._n} fails")
        return result

    def __len__(self) -> int:
        return int(self._done(len(self._real)))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._real, name)
        return (lambda *args, **kwargs: self._done(found(*args, **kwargs))) if callable(found) else found


def fail_on_7(step: Seq[Sequence]) -> None:
    if any(sequence.num_tokens == 7 for sequence in step):
        raise ValueError("broken")


@pytest.mark.parametrize("n", range(90))
def test_every_accepted_request_resolves_whichever_call_of_the_engine_raises(n: int) -> None:
    """The traffic makes the engine call everything that it ever calls: chunks, tokens, a step that fails, a probe. The
    scheduler's own calls, of the pool, fail within its methods."""
    calls = itertools.count()
    pool: Any = RaisingAt(BlockPool(20), calls, n)
    policy: Any = RaisingAt(Scheduler(max_step_tokens=32, max_step_sequences=4, pool=pool), calls, n)
    runner: Any = RaisingAt(FakeRunner(fail_on_7), calls, n)
    engine = Engine(runner, policy)
    generating = Sequence(token_ids=(1, 2, 3), slot=NO_ADAPTER, sampling=Sampling(max_tokens=3))
    accepted = []
    engine.start()
    for one in (request(100, 2, 7), EngineRequest([generating]), request(3, deadline_s=0.0), request(5, 6)):
        try:
            engine.submit(one)
        except (RuntimeError, NotReadyError):  # not accepted
            continue
        accepted.append(one)
    for one in accepted:
        assert len(one.future.result(TIMEOUT)) == len(one.sequences)
    engine.close()
    assert next(calls) > n, "the engine does not make so many calls: nothing was raised"


def test_nothing_waits_or_runs_in_an_engine_that_died() -> None:
    """Else admission would say for ever that the queue is full, and not that the engine is gone."""
    accepted, go_on = threading.Event(), threading.Event()

    def die(step: Seq[Sequence]) -> None:
        accepted.set()
        assert_set(go_on)
        raise KeyboardInterrupt

    engine = Engine(FakeRunner(die), scheduler(sequences=1))
    engine.start()
    requests = [request(5, 5), request(5, 5)]
    engine.submit(requests[0])
    assert_set(accepted)
    engine.submit(requests[1])
    assert (engine.num_waiting, engine.num_running) == (3, 1)
    go_on.set()
    for one in requests:
        assert len(one.future.result(TIMEOUT)) == 2
    assert (engine.num_waiting, engine.num_waiting_tokens, engine.num_running) == (0, 0, 0)


def test_a_repeated_step_draws_the_same_numbers() -> None:
    def sampled() -> Sequence:
        return Sequence(token_ids=(1, 2), slot=NO_ADAPTER, sampling=Sampling(max_tokens=3, temperature=1.0, seed=7))

    once, repeated = sampled(), sampled()
    for _ in range(3):
        numbers = {repeated.draw() for _ in range(4)}  # the step failed three times
        assert numbers == {once.draw()}
        for one in (once, repeated):
            one.append(Token(5, 0.0))


def test_submitting_does_not_wait_for_a_step_to_be_laid_out() -> None:
    laying_out, go_on = threading.Event(), threading.Event()

    class Slow(Scheduler):
        def next_step(self, now: float) -> Any:
            laying_out.set()
            assert_set(go_on)
            return super().next_step(now)

    engine = Engine(FakeRunner(), Slow(max_step_tokens=100, max_step_sequences=10))
    engine.start()
    first, second = request(1), request(2)
    engine.submit(first)
    assert_set(laying_out)
    submitting = threading.Thread(target=engine.submit, args=(second,), daemon=True)
    submitting.start()
    submitting.join(2)
    was_done = not submitting.is_alive()
    assert engine.num_waiting == 2 or not was_done
    go_on.set()
    assert was_done, "submit waited for the step"
    assert top_ids(first) == [1] and top_ids(second) == [2]
    engine.close()


def test_tokens_are_counted_once_however_often_their_step_was_split(engine_of: EngineOf) -> None:
    def holds_two(step: Seq[Sequence]) -> None:
        if len(step) > 2:
            raise MemoryError

    wanted = request(10, 20, 30, 40)
    engine_of(FakeRunner(holds_two), scheduler()).submit(wanted)
    top_ids(wanted)
    assert [sequence.num_computed_tokens for sequence in wanted.sequences] == [10, 20, 30, 40]
    failing = request(10, 7)
    engine_of(FakeRunner(fail_on_7), scheduler()).submit(failing)
    failing.future.result(TIMEOUT)
    assert [sequence.num_computed_tokens for sequence in failing.sequences] == [10, 0]


def test_a_step_that_is_split_reads_the_blocks_that_it_would_have_read() -> None:
    """Else its halves would compute whole conversations, and memory that is short would get shorter."""
    sizes: list[int] = []

    class Runner(FakeRunner):
        def run(self, step: Step) -> list[tuple[Sequence, Outcome]]:
            sizes.append(step.num_tokens)
            return super().run(step)

    def asked(last: int) -> EngineRequest:
        return EngineRequest(
            [Sequence(token_ids=(*range(96), 200 + i, last), slot=NO_ADAPTER, num_kept=96) for i in range(4)]
        )

    def holds_two(step: Seq[Sequence]) -> None:
        if len(step) > 2:
            raise MemoryError

    policy = Scheduler(max_step_tokens=1000, max_step_sequences=10, pool=BlockPool(100))
    runner = Runner()
    engine = Engine(runner, policy)
    engine.start()
    first, second = asked(1), asked(2)
    engine.submit(first)
    top_ids(first)
    runner.before = holds_two
    engine.submit(second)
    top_ids(second)
    engine.close()
    assert sizes == [96 + 8, 8, 4, 4]
    assert policy.pool.num_available == 100
