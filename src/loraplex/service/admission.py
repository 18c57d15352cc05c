"""Admission control. Decides which requests may wait for the engine, and which are refused at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.errors import QueueFullError
from loraplex.executors.executor import Computation

MAX_LONG_CHARS = 1 << 22  # of long texts that wait for the tokenizer
STEPS_WORTH = 32  # steps' worth of tokens that may wait by default: seconds, as steps are sized for the device


class Admission:
    """Counts evaluations from before tokenization until the answer, and checks the tokens and long texts that wait.

    Every method raises QueueFullError above its limit. A request that is larger than a limit by itself is accepted when
    nothing else waits; otherwise it could never run. All methods are called from one event loop.
    """

    def __init__(self, computation: Computation, *, max_queue: int, max_queue_tokens: int | None) -> None:
        """max_queue: evaluations that wait or run. max_queue_tokens: tokens to compute that wait."""
        self._computation, self._max_queue = computation, max_queue
        self._max_queue_tokens = max_queue_tokens or STEPS_WORTH * computation.max_step_tokens
        self.num_evaluations = 0  # accepted, not yet answered

    @contextmanager
    def evaluations(self, num: int) -> Iterator[None]:
        """Accept `num` evaluations until the `with` statement ends. Also refuses them, before they are tokenized, where
        not even one more token may wait."""
        self._check("evaluations are being answered", self.num_evaluations, num, self._max_queue, "--max-queue")
        self.check_tokens(1)
        self.num_evaluations += num
        try:
            yield
        finally:
            self.num_evaluations -= num

    def check_tokens(self, num: int) -> None:
        """Check the tokens to compute for a request that was just tokenized."""
        num_waiting = self._computation.num_waiting_tokens
        self._check("tokens wait already", num_waiting, num, self._max_queue_tokens, "--max-queue-tokens")

    def check_long_text(self, num_waiting: int, num: int) -> None:
        """Check the characters of a long text: `num` come now, while `num_waiting` wait for the tokenizer."""
        self._check("characters of long texts wait for the tokenizer", num_waiting, num, MAX_LONG_CHARS, None)

    def _check(self, what: str, num_waiting: int, num: int, limit: int, option: str | None) -> None:
        if num_waiting and num_waiting + num > limit:
            raise QueueFullError(
                f"{num_waiting} {what}, of {limit} at most",
                remedy=f"send it again later, or {'shorten it' if option is None else f'raise {option}'}",
                retry_after_s=self._computation.wait_s,
            )
