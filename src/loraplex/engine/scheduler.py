"""Which waiting sequences make the next step. Pure policy: no threads, no torch, the clock is an argument."""

from collections import deque
from collections.abc import Sequence as Seq

from loraplex.engine.sequence import EngineRequest, Sequence
from loraplex.errors import CancelledError, DeadlineExceededError, LoraplexError, QueueFullError


class Scheduler:
    """First come, first served under a token and a sequence budget; bounded; drops what is late or abandoned."""

    def __init__(self, *, max_step_tokens: int, max_step_sequences: int, max_queue: int) -> None:
        self.max_step_tokens = max_step_tokens
        self.max_step_sequences = max_step_sequences
        self.max_queue = max_queue
        self._waiting: deque[Sequence] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue all of a request's sequences, or QueueFullError and none of them. A request larger than the whole
        queue is let in when nothing waits, else it could never run."""
        if self._waiting and len(self._waiting) + len(request.sequences) > self.max_queue:
            raise QueueFullError(
                f"{len(self._waiting)} sequences wait already, of {self.max_queue} at most",
                remedy="send it again later, or raise --max-queue",
            )
        for sequence in request.sequences:
            sequence.arrived_s = now
            self._waiting.append(sequence)

    def next_step(self, now: float) -> tuple[list[Sequence], list[tuple[Sequence, LoraplexError]]]:
        """Take the sequences of the next step, and those to be refused with why. A prompt beyond the token budget
        makes a step alone."""
        step: list[Sequence] = []
        dropped: list[tuple[Sequence, LoraplexError]] = []
        num_tokens = 0
        while self._waiting and len(step) < self.max_step_sequences:
            sequence = self._waiting[0]
            error = self._reason_to_drop(sequence, now)
            if error is not None:
                dropped.append((self._waiting.popleft(), error))
                continue
            if step and num_tokens + sequence.num_tokens > self.max_step_tokens:
                break
            num_tokens += sequence.num_tokens
            step.append(self._waiting.popleft())
        return step, dropped

    def clear(self) -> Seq[Sequence]:
        """Take everything that waits."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    @staticmethod
    def _reason_to_drop(sequence: Sequence, now: float) -> LoraplexError | None:
        request = sequence.request
        if request.cancelled:
            return CancelledError("the client left", remedy="none is needed")
        if request.deadline_s is not None and now >= request.deadline_s:
            return DeadlineExceededError(
                "not computed before the deadline", remedy="allow more time or send less at once"
            )
        return None
