"""One text under one adapter, on its way through the engine, and the request that it belongs to. No torch."""

import threading
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field

from loraplex.errors import LoraplexError

NO_ADAPTER = -1  # the slot of sequences that run on the bare base


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Asks for the log probability of `token_id` after `position` (from the sequence's end: -1 is its last token)."""

    position: int
    token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutput:
    """log_probs: one for each target, natural logarithm, over the whole vocabulary. top: the likeliest token after the
    last position and its log probability."""

    log_probs: tuple[float, ...]
    top_token_id: int
    top_log_prob: float
    queued_s: float
    computed_s: float


@dataclass(slots=True, kw_only=True)
class Sequence:
    """token_ids under the adapter in `slot`; `targets` say what is asked."""

    token_ids: Seq[int]
    slot: int
    targets: tuple[Target, ...] = ()
    arrived_s: float = 0.0
    request: "EngineRequest" = field(init=False, repr=False)
    index: int = field(init=False, default=0)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


Outcome = SequenceOutput | LoraplexError


class EngineRequest:
    """Sequences whose outcomes are wanted together. `future` resolves exactly once, to one outcome a sequence in order;
    a sequence's own error is its outcome, so that the others still answer."""

    def __init__(self, sequences: Seq[Sequence], *, deadline_s: float | None = None) -> None:
        """deadline_s: on the clock of `time.monotonic`."""
        assert sequences, "a request needs at least one sequence"
        self.sequences = tuple(sequences)
        self.deadline_s = deadline_s
        self.future: Future[list[Outcome]] = Future()
        self._outcomes: list[Outcome | None] = [None] * len(self.sequences)
        self._num_open = len(self.sequences)
        self._lock = threading.Lock()
        for index, sequence in enumerate(self.sequences):
            sequence.request, sequence.index = self, index

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()

    def resolve(self, sequence: Sequence, outcome: Outcome) -> None:
        """Record one outcome; the first counts. The last one open resolves the future."""
        with self._lock:
            if self._outcomes[sequence.index] is not None:
                return
            self._outcomes[sequence.index] = outcome
            self._num_open -= 1
            if self._num_open:
                return
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        # A future that its owner cancelled takes no result; nobody waits for it any more.
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(outcomes)
