"""One text under one adapter, on its way through the engine, and the request that it belongs to. No torch."""

import threading
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field

from loraplex.engine.block_pool import BASE_KV, BLOCK_SIZE, block_hashes
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
    last position and its log probability. num_computed_tokens: run through the model for this sequence and not counted
    for another that shares them."""

    log_probs: tuple[float, ...]
    top_token_id: int
    top_log_prob: float
    num_computed_tokens: int
    queued_s: float
    computed_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """token_ids under the adapter in `slot`; `targets` say what is asked.

    kv_id:       identity of the keys and values that the slot computes (32 bytes).
    activation:  index of the first token that the adapter acts on; those before it run on the bare base (aLoRA).
    num_kept:    leading tokens whose K/V is worth keeping for later requests, and is looked up in turn.
    """

    token_ids: tuple[int, ...]
    slot: int
    kv_id: bytes = BASE_KV
    activation: int = 0
    num_kept: int = 0
    targets: tuple[Target, ...] = ()
    arrived_s: float = 0.0
    request: "EngineRequest" = field(init=False, repr=False)
    index: int = field(init=False, default=0)
    num_computed_tokens: int = field(init=False, default=0)  # so far, in chunks that ran already
    _hashes: Seq[bytes] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        if self.slot == NO_ADAPTER:
            self.activation = len(self.token_ids)

    @property
    def hashes(self) -> Seq[bytes]:
        """Of all its full blocks, computed when first asked for."""
        if self._hashes is None:
            self._hashes = block_hashes(self.token_ids, self.activation, self.kv_id)
        return self._hashes

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_cacheable_blocks(self) -> int:
        """Blocks before the first token whose logits are wanted; those must be computed."""
        first = min((target.position for target in self.targets), default=-1)
        return (self.num_tokens + min(first, -1)) // BLOCK_SIZE


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
