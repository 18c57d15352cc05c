"""The thread that owns the model: takes requests from any thread, runs steps, resolves every request exactly once."""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol, Self

from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Outcome, Sequence
from loraplex.engine.step import Step
from loraplex.errors import EngineError, LoraplexError, NotReadyError

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a model."""

    def run(self, step: Step) -> list[tuple[Sequence, Outcome]]:
        """An outcome for each sequence, but for those of which only a chunk ran."""
        ...

    def probe(self) -> None:
        """Raises where the model no longer computes at all."""


class Steps(NamedTuple):
    """What ran."""

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
    """Continuous batching: each step takes what waits by then, within the scheduler's budgets. The scheduler belongs to
    the engine's thread; other threads hand their requests over and never wait for a step to be laid out."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self._changed = threading.Condition()  # guards the five below; held for moments only
        self._arrived: deque[EngineRequest] = deque()  # handed over, not yet in the scheduler
        self._num_arrived = 0, 0  # their sequences, and tokens to compute for them
        self._open: set[EngineRequest] = set()  # accepted, not yet resolved
        self._stopping = False
        self._failure: BaseException | None = None
        self._running: Seq[Sequence] = ()
        self.steps = Steps()  # so far
        self._thread = threading.Thread(target=self._main, name="loraplex-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self.scheduler) + self._num_arrived[0]

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to compute for them."""
        return self.scheduler.num_waiting_tokens + self._num_arrived[1]

    @property
    def max_step_tokens(self) -> int:
        return self.scheduler.max_step_tokens

    def cost(self, request: EngineRequest) -> int:
        """Tokens to compute for a request, from any thread, before it is submitted."""
        return self.scheduler.cost(request)

    @property
    def num_running(self) -> int:
        """Sequences in the step that runs now."""
        return len(self._running)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Of K/V: all, and those that are free or could be."""
        return self.scheduler.pool.num_blocks, self.scheduler.pool.num_available

    @property
    def wait_s(self) -> float:
        """How long what waits now will take."""
        return self.scheduler.wait_s

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Hand over a request, from any thread; its future resolves. NotReadyError: it was not accepted."""
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
        """Finish what is queued, then stop the thread. Safe to call twice."""
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
        """Run one step; False when stopped and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or len(self.scheduler) or self._stopping)
        while self._arrived:
            request = self._arrived.popleft()
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
        """One forward pass. Where it fails, or the device's memory does not hold it, two halves, until one sequence is
        left that fails: its error is its outcome, and the others answer. Returns the outcomes, and which failed."""
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
            self.runner.probe()  # raises, and ends the engine, where not the sequence was at fault
            sequence = step.placed[0].sequence
            return [(sequence, error)], {sequence}
        (first, first_failed), (second, second_failed) = map(self._run, step.halves())
        return first + second, first_failed | second_failed

    def _count_arrived(self, request: EngineRequest, sign: int) -> None:
        num_sequences, num_tokens = self._num_arrived
        self._num_arrived = num_sequences + sign * len(request.sequences), num_tokens + sign * request.num_tokens

    def _resolve(self, sequence: Sequence, outcome: Outcome) -> None:
        if sequence.request.resolve(sequence, outcome):
            with self._changed:
                self._open.discard(sequence.request)

    def _fail_all(self, exc: BaseException) -> None:
        """Resolve every accepted request, wherever it was when the thread died."""
        with self._changed:
            self._failure = exc
            abandoned = tuple(self._open)
            self._open.clear()
            self._arrived.clear()
            self._num_arrived = 0, 0
        for request in abandoned:
            for sequence in request.sequences:
                request.resolve(sequence, _engine_error(exc))


def _append_tokens(outcomes: Seq[tuple[Sequence, Outcome]]) -> tuple[list[tuple[Sequence, Outcome]], set[Sequence]]:
    """Each sequence takes its token. Returns what came of it, and those that want another."""
    taken, generating = [], set()
    for sequence, outcome in outcomes:
        try:
            if not isinstance(outcome, LoraplexError) and sequence.append(outcome.tokens[-1]):
                generating.add(sequence)
        except Exception as exc:  # of the sequence's own callback: it is no reason to stop the others
            logger.exception("a token was not taken")
            outcome = _engine_error(exc)
        taken.append((sequence, outcome))
    return taken, generating


def _engine_error(exc: BaseException) -> EngineError:
    return EngineError(
        f"the engine failed: {type(exc).__name__}: {exc}", remedy="send it again; the server's log has the details"
    )
