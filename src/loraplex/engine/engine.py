"""The thread that owns the model: takes requests from any thread, runs steps, resolves every request exactly once."""

import logging
import threading
import time
from collections.abc import Sequence as Seq
from typing import Protocol

from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Sequence, SequenceOutput
from loraplex.errors import EngineError, NotReadyError

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a model."""

    def run(self, sequences: Seq[Sequence]) -> list[tuple[Sequence, SequenceOutput]]: ...


class Engine:
    """Continuous batching: each step takes what waits by then, within the scheduler's budgets."""

    def __init__(self, runner: Runner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._changed = threading.Condition()  # guards the scheduler and the two flags
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="loraplex-engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._failure is None

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler)

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
            self._fail(abandoned, exc)

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
            self._run(step)
        return True

    def _run(self, step: list[Sequence]) -> None:
        """One forward pass. Where the device's memory does not hold it, two halves; where a single sequence does not
        fit, or the step fails otherwise, its sequences carry the error and the engine goes on."""
        try:
            outputs = self._runner.run(step)
        except Exception as exc:
            if not (_is_out_of_memory(exc) and len(step) > 1):
                logger.exception("a step of %d sequences failed", len(step))
                self._fail(step, exc)
                return
        except BaseException as exc:
            self._fail(step, exc)
            raise
        else:
            for sequence, output in outputs:
                sequence.request.resolve(sequence, output)
            return
        # Outside the except block: the failed step's tensors, which its traceback held, are free by now.
        logger.warning("out of memory with %d sequences: split", len(step))
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


def _is_out_of_memory(exc: Exception) -> bool:
    """torch.OutOfMemoryError on CUDA, a RuntimeError of the CPU allocator; told by name, for no torch is known here."""
    return (
        type(exc).__name__ == "OutOfMemoryError" or isinstance(exc, MemoryError) or "can't allocate memory" in str(exc)
    )
