"""From the event loop to the computation and back: tokenizes in threads, admits, submits, and waits for outcomes."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

from loraplex.engine.engine import Steps
from loraplex.engine.sequence import EngineRequest, Outcome, Sequence
from loraplex.errors import DeadlineExceededError
from loraplex.executors.executor import Computation
from loraplex.service.admission import Admission
from loraplex.text.threads import LONG_CHARS, TokenizerThreads
from loraplex.types import Message


class Computing:
    """One computation, as the service uses it. All methods are called from one event loop."""

    def __init__(self, computation: Computation, *, max_queue: int, max_queue_tokens: int | None) -> None:
        self.computation, self._threads = computation, TokenizerThreads()
        self.admission = Admission(computation, max_queue=max_queue, max_queue_tokens=max_queue_tokens)

    @property
    def alive(self) -> bool:
        return self.computation.alive

    @property
    def num_waiting(self) -> int:
        """Evaluations that were accepted and do not run yet."""
        accepted = self.admission.num_evaluations
        return max(self.computation.num_waiting, accepted - self.computation.num_running)

    @property
    def num_running(self) -> int:
        return self.computation.num_running

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Blocks of K/V: all, and those that are free or could be."""
        return self.computation.num_blocks

    @property
    def steps(self) -> Steps:
        return self.computation.steps

    async def close(self) -> None:
        """Finish what was accepted. Safe to call twice."""
        await asyncio.to_thread(self.computation.close)
        self._threads.close()

    async def tokenize(
        self,
        make: Callable[[], list[Sequence]],
        num_chars: int,
        deadline_s: float | None,
        release: Callable[[], None] = lambda: None,
    ) -> EngineRequest | None:
        """A request of the sequences that `make` makes in a tokenizer's thread; None where it makes none. release:
        called on the event loop when the computation is done with the request, or when it does not come to that.
        DeadlineExceededError, QueueFullError, NotReadyError, and what `make` raises."""
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
        except BaseException:
            release()
            raise
        return request

    async def compute(self, request: EngineRequest | None) -> Seq[Outcome]:
        """One outcome a sequence; DeadlineExceededError for each that has none by the deadline. A request whose caller
        leaves is dropped from the queue. NotReadyError: it was not accepted."""
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
            return request.outcomes(late)  # before it is cancelled, which the engine may see at once
        finally:
            request.future.cancel()  # where its caller left or is late: the scheduler drops what has not run

    async def compute_now(self, sequences: Seq[Sequence]) -> Seq[Outcome]:
        """Without admission: for what the service itself asks."""
        return await self.compute(EngineRequest(sequences) if sequences else None)


def num_chars(text: str | Seq[int] | Seq[Message] | Seq[int | Message]) -> int:
    """About how much there is to tokenize."""
    return len(text) + sum(len(one.content) for one in text if isinstance(one, Message))
