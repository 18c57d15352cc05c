"""The way from the event loop to the computation and back: tokenizes in threads, admits, submits, awaits outcomes."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from loraplex.engine.sequence import EngineRequest, Outcome, Sequence
from loraplex.errors import DeadlineExceededError
from loraplex.executors.executor import Computation
from loraplex.exhaustion import exhaustion
from loraplex.service.admission import Admission
from loraplex.text.threads import LONG_CHARS, TokenizerThreads
from loraplex.types import Message

logger = logging.getLogger(__name__)


class Computing:
    """The service's access to one computation. All methods are called from one event loop."""

    def __init__(self, computation: Computation, *, max_queue: int, max_queue_tokens: int | None) -> None:
        self.computation, self._threads = computation, TokenizerThreads()
        self.admission = Admission(computation, max_queue=max_queue, max_queue_tokens=max_queue_tokens)

    @property
    def num_waiting(self) -> int:
        """Evaluations that were accepted and do not run yet."""
        accepted = self.admission.num_evaluations
        return max(self.computation.num_waiting, accepted - self.computation.num_running)

    async def close(self) -> None:
        """Finish all accepted requests, then stop. Safe to call twice."""
        await asyncio.to_thread(self.computation.close)
        self._threads.close()

    async def tokenize(
        self,
        make: Callable[[], list[Sequence]],
        num_chars: int,
        deadline_s: float | None,
        release: Callable[[], None] = lambda: None,
    ) -> EngineRequest | None:
        """Return a request of the sequences that `make` makes in a tokenizer's thread; None where it makes none.

        release: called on the event loop when the computation is done with the request, or once it is clear that the
        request is not submitted. Raises DeadlineExceededError, QueueFullError, NotReadyError, and what `make` raises.
        """
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and all leases with it
                loop.call_soon_threadsafe(release)

        def work() -> EngineRequest | None:
            sequences = make()
            if not sequences:
                return None
            request = EngineRequest(sequences, deadline_s=deadline_s, on_end=on_end)
            request.num_tokens = self.computation.cost(request)
            return request

        try:
            if num_chars >= LONG_CHARS:
                self.admission.check_long_text(self._threads.num_long_chars, num_chars)
            request = await self._threads.run(work, num_chars, deadline_s)
            if request is None:
                release()
            else:
                self.admission.check_tokens(request.num_tokens)
        except BaseException as exc:
            release()
            if (error := exhaustion(exc)) is not None:  # no thread for a tokenizer, or no memory for the text
                logger.error("a request was not tokenized", exc_info=exc)
                raise error from None
            raise
        return request

    async def compute(self, request: EngineRequest | None) -> Seq[Outcome]:
        """Submit a request and return one outcome per sequence. A sequence without an outcome at the deadline gets a
        DeadlineExceededError. If the caller is cancelled, the request leaves the queue. Raises NotReadyError where the
        request was not accepted."""
        if request is None:
            return ()
        try:
            self.computation.submit(request)
        except BaseException:
            request.abandon()
            raise
        left_s = None if request.deadline_s is None else max(0.0, request.deadline_s - time.monotonic())
        future = asyncio.wrap_future(request.future)
        try:
            await asyncio.wait({future}, timeout=left_s)
            if future.done():
                return future.result()
            late = DeadlineExceededError(
                "not computed before the deadline", remedy="allow more time or send less at once"
            )
            return request.outcomes(late)  # before the future is cancelled, as the engine may react at once
        finally:
            request.future.cancel()  # late, or the caller left: the scheduler drops waiting sequences

    async def compute_now(self, sequences: Seq[Sequence]) -> Seq[Outcome]:
        """Compute sequences that the service itself asks for, without admission."""
        return await self.compute(EngineRequest(sequences) if sequences else None)


def num_chars(text: str | Seq[int] | Seq[Message] | Seq[int | Message]) -> int:
    """Return about how many characters there are to tokenize; a token id counts as one."""
    return len(text) + sum(len(one.content) for one in text if isinstance(one, Message))
