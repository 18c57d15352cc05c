"""The thread that owns the model: takes requests from any thread, runs steps, resolves every request exactly once."""

import logging
import threading
import time
from collections.abc import Sequence as Seq
from typing import Protocol

from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Outcome, Sequence
from loraplex.errors import EngineError, NotReadyError

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a model."""

    def run(self, sequences: Seq[Sequence]) -> list[tuple[Sequence, Outcome]]: ...

    def probe(self) -> None:
        """Raises where the model no longer computes at all."""


class Engine:
    """Continuous batching: each step takes what waits by then, within the scheduler's budgets."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._changed = threading.Condition()  # guards the scheduler and the two flags
        self._stopping = False
        self._failure: BaseException | None = None
        self._step_taken: Seq[Sequence] = ()  # off the queue, not yet resolved; the thread's own
        self._thread = threading.Thread(target=self._main, name="loraplex-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None

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
        if step:
            self._step_taken = step
            self._run(step)
            self._step_taken = ()
        return True

    def _run(self, step: Seq[Sequence]) -> None:
        """One forward pass. Where it fails, or the device's memory does not hold it, two halves, so that what fails in
        the end is one sequence, which carries the error while the others answer."""
        try:
            outcomes = self._runner.run(step)
        except Exception as exc:
            if len(step) == 1:
                logger.exception("a sequence of %d tokens failed", step[0].num_tokens)
                self._fail(step, exc)
            else:
                logger.warning("a step of %d sequences failed, split: %s: %s", len(step), type(exc).__name__, exc)
        else:
            for sequence, outcome in outcomes:
                sequence.request.resolve(sequence, outcome)
            return
        # Outside the except block: the failed step's tensors, which its traceback held, are free by now.
        if len(step) == 1:
            self._runner.probe()  # raises, and ends the engine, where not the sequence was at fault
        else:
            self._run(step[: len(step) // 2])
            self._run(step[len(step) // 2 :])

    @staticmethod
    def _fail(sequences: Seq[Sequence], exc: BaseException) -> None:
        for sequence in sequences:
            sequence.request.resolve(
                sequence,
                EngineError(
                    f"the engine failed: {type(exc).__name__}: {exc}",
                    remedy="send it again; the server's log has the details",
                ),
            )
