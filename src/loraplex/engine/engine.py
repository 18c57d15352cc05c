"""The thread that owns the model: takes requests from any thread, runs steps, resolves every request exactly once."""

import logging
import threading
import time
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
    """Continuous batching: each step takes what waits by then, within the scheduler's budgets."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._changed = threading.Condition()  # guards the scheduler and the two flags
        self._stopping = False
        self._failure: BaseException | None = None
        self._step_taken: Seq[Sequence] = ()  # off the queue, not yet resolved; the thread's own
        self.steps = Steps()  # so far
        self._thread = threading.Thread(target=self._main, name="loraplex-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._scheduler)

    @property
    def num_running(self) -> int:
        """Sequences in the step that runs now."""
        return len(self._step_taken)

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Of K/V: all, and those that are free or could be."""
        return self._scheduler.pool.num_blocks, self._scheduler.pool.num_available

    @property
    def wait_s(self) -> float:
        """How long what waits now will take."""
        return self._scheduler.wait_s

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: EngineRequest) -> None:
        """Queue a request, from any thread; its future resolves. QueueFullError, NotReadyError: it was not accepted."""
        with self._changed:
            if self._stopping or not self.alive:
                raise NotReadyError("the engine is not running", remedy="send the request to another server, or later")
            self._scheduler.add(request, time.monotonic())
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
            with self._changed:
                self._failure = exc
                abandoned = self._scheduler.clear()
            self._fail([*self._step_taken, *abandoned], exc)

    def _step(self) -> bool:
        """Run one step; False when stopped and nothing waits."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._scheduler) or self._stopping)
            if not len(self._scheduler):
                return False
            step, dropped = self._scheduler.next_step(time.monotonic())
        for sequence, error in dropped:
            sequence.request.resolve(sequence, error)
        if step is not None:
            self._step_taken = [placed.sequence for placed in step.placed]
            started = time.monotonic()
            outcomes, computed = self._run(step)
            seconds = time.monotonic() - started
            self.steps = self.steps.plus(step, seconds)
            outcomes, generating = _append_tokens(outcomes)
            with self._changed:
                self._scheduler.finish(step, computed=computed, generating=generating, seconds=seconds)
            for sequence, outcome in outcomes:
                if sequence not in generating:
                    sequence.request.resolve(sequence, outcome)
            self._step_taken = ()
        return True

    def _run(self, step: Step) -> tuple[list[tuple[Sequence, Outcome]], bool]:
        """One forward pass; the flag says that this was all. Where it fails, or the device's memory does not hold it,
        two halves, so that what fails in the end is one sequence, which carries the error while the others answer."""
        try:
            return self._runner.run(step), True
        except Exception as exc:
            error = _engine_error(exc)
            if len(step) == 1:
                logger.exception("a sequence of %d tokens failed", step.num_tokens)
            else:
                logger.warning("a step of %d sequences failed, split: %s", len(step), error.message)
        # Outside the except block: the failed step's tensors, which its traceback held, are free by now.
        if len(step) == 1:
            self._runner.probe()  # raises, and ends the engine, where not the sequence was at fault
            return [(step.placed[0].sequence, error)], False
        first, second = step.halves()
        return self._run(first)[0] + self._run(second)[0], False

    @staticmethod
    def _fail(sequences: Seq[Sequence], exc: BaseException) -> None:
        for sequence in sequences:
            sequence.request.resolve(sequence, _engine_error(exc))


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
