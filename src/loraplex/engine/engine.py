"""The thread that owns the model. Takes requests from any thread, runs steps, resolves every request exactly once."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol, Self

from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Outcome, Sequence, lone_sequence
from loraplex.engine.step import Step
from loraplex.errors import EngineError, LoraplexError, NotReadyError
from loraplex.exhaustion import exhaustion

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """Runs steps on a model. The engine calls it on its own thread."""

    def run(self, step: Step) -> list[tuple[Sequence, Outcome]]:
        """Run one step. Return an outcome for each sequence, except for sequences of which only a chunk ran."""
        ...


class Steps(NamedTuple):
    """Totals over all steps that ran."""

    num_steps: int = 0
    num_tokens: int = 0
    num_sequences: int = 0
    seconds: float = 0.0

    def plus(self, step: Step, seconds: float) -> Self:
        return self._replace(
            num_steps=self.num_steps + 1,
            num_tokens=self.num_tokens + step.num_tokens,
            num_sequences=self.num_sequences + len(step),
            seconds=self.seconds + seconds,
        )


class Engine:
    """Continuous batching: each step takes the sequences that wait by then, within the scheduler's budgets.

    The scheduler belongs to the engine's thread. Other threads only queue their requests, so they never wait while a
    step is laid out.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.max_step_tokens = scheduler.max_step_tokens
        self._changed = threading.Condition()  # guards the five fields below; held briefly
        self._arrived: deque[EngineRequest] = deque()  # submitted, not yet in the scheduler
        self._num_arrived = 0, 0  # sequences and tokens to compute in `_arrived`
        self._open: set[EngineRequest] = set()  # accepted, not yet resolved
        self._stopping = False
        self._failure: BaseException | None = None
        self._running: Seq[Sequence] = ()
        self.steps = Steps()
        self._thread = threading.Thread(target=self._main, name="loraplex-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    @property
    def num_waiting(self) -> int:
        """Sequences that are queued."""
        return self._num_arrived[0] + (0 if self._failure else len(self.scheduler))

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to compute for the queued sequences."""
        return self._num_arrived[1] + (0 if self._failure else self.scheduler.num_waiting_tokens)

    def cost(self, request: EngineRequest) -> int:
        """Return the tokens to compute for a request that is not submitted yet. Any thread may call."""
        return self.scheduler.cost(request)

    @property
    def num_running(self) -> int:
        """Sequences in the step that runs now."""
        return len(self._running)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """K/V blocks: how many there are, and how many are free or can be evicted."""
        return self.scheduler.pool.num_blocks, self.scheduler.pool.num_available

    @property
    def wait_s(self) -> float:
        """Estimated seconds until the sequences in the scheduler's queue are computed."""
        return self.scheduler.wait_s

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request; its future resolves exactly once. Any thread may call. Raises NotReadyError where the
        engine does not accept the request."""
        now = time.monotonic()
        for sequence in request.sequences:
            sequence.arrived_s = now
        with self._changed:
            if self._stopping or not self.alive:
                raise NotReadyError("the engine is not running", remedy="send the request to another server, or later")
            self._open.add(request)
            self._arrived.append(request)
            self._count_arrived(request, 1)
            self._changed.notify()

    def close(self) -> None:
        """Finish all queued requests, then stop the thread. Safe to call twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        try:
            while self._step():
                pass
        except BaseException as exc:
            logger.critical("the engine thread died", exc_info=exc)
            self._fail_all(exc)

    def _step(self) -> bool:
        """Run one step. Return False when the engine is stopped and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or len(self.scheduler) or self._stopping)
        while self._arrived:
            request = self._arrived.popleft()  # atomic, and no other thread pops
            self.scheduler.add(request, request.sequences[0].arrived_s)
            with self._changed:
                self._count_arrived(request, -1)
        if not len(self.scheduler):
            return not self._stopping
        step, dropped = self.scheduler.next_step(time.monotonic())
        for sequence, error in dropped:
            self._resolve(sequence, error)
        if step is not None:
            self._running = [placed.sequence for placed in step.placed]
            started = time.monotonic()
            outcomes, failed = self._run(step)
            seconds = time.monotonic() - started
            self.steps = self.steps.plus(step, seconds)
            outcomes, generating = _append_tokens(outcomes)
            self.scheduler.finish(step, failed=failed, generating=generating, seconds=seconds)
            for sequence, outcome in outcomes:
                if sequence not in generating:
                    self._resolve(sequence, outcome)
            self._running = ()
        return True

    def _run(self, step: Step) -> tuple[list[tuple[Sequence, Outcome]], set[Sequence]]:
        """Run a step. Return the outcomes, and the sequences that failed.

        A step that fails or exceeds the device's memory is split into halves, down to the one sequence at fault. The
        error becomes the outcome of that sequence; the others are computed. Raises where the model itself fails.
        """
        try:
            outcomes = self.runner.run(step)
        except Exception as exc:
            error = _engine_error(exc)
            if len(step) == 1:
                logger.exception("a sequence of %d tokens failed", step.num_tokens)
            else:
                logger.warning("a step of %d sequences failed, split: %s", len(step), error.message)
        else:
            for run in step.runs():
                run.owner.num_computed_tokens += run.num_tokens
            return outcomes, set()
        # Outside the except block: the failed step's tensors, which its traceback held, are free by now.
        if len(step) == 1:
            self._probe()  # raises, and ends the engine, where the model is at fault
            sequence = step.placed[0].sequence
            return [(sequence, error)], {sequence}
        (first, first_failed), (second, second_failed) = map(self._run, step.halves())
        return first + second, first_failed | second_failed

    def _probe(self) -> None:
        """Compute one token on the base. Raises where the model no longer computes at all."""
        [(_, outcome)] = self.runner.run(Step.of([lone_sequence([0])]))
        if isinstance(outcome, LoraplexError):
            raise outcome

    def _count_arrived(self, request: EngineRequest, sign: int) -> None:
        num_sequences, num_tokens = self._num_arrived
        self._num_arrived = num_sequences + sign * len(request.sequences), num_tokens + sign * request.num_tokens

    def _resolve(self, sequence: Sequence, outcome: Outcome) -> None:
        if sequence.request.resolve(sequence, outcome):
            with self._changed:
                self._open.discard(sequence.request)

    def _fail_all(self, exc: BaseException) -> None:
        """Resolve every accepted request with an error, whether it was queued or running when the thread died."""
        with self._changed:
            self._failure = exc
            abandoned = tuple(self._open)
            self._open.clear()
            self._arrived.clear()
            self._num_arrived = 0, 0
            self._running = ()
        for request in abandoned:
            for sequence in request.sequences:
                request.resolve(sequence, _engine_error(exc))


def _append_tokens(outcomes: Seq[tuple[Sequence, Outcome]]) -> tuple[list[tuple[Sequence, Outcome]], set[Sequence]]:
    """Append to each sequence its token. Return the outcomes, and the sequences that need another token."""
    taken, generating = [], set()
    for sequence, outcome in outcomes:
        try:
            if not isinstance(outcome, LoraplexError) and sequence.append(outcome.tokens[-1]):
                generating.add(sequence)
        except Exception as exc:  # raised by the sequence's own `on_token`: the others go on
            logger.exception("a sequence's on_token failed")
            outcome = _engine_error(exc)
        taken.append((sequence, outcome))
    return taken, generating


def _engine_error(exc: BaseException) -> EngineError:
    return exhaustion(exc) or EngineError(
        f"the engine failed: {type(exc).__name__}: {exc}", remedy="send it again; the server's log has the details"
    )
