"""Sequences (one text under one adapter each) and the request that they belong to. No torch."""

import logging
import random
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.block_pool import BASE_KV, BLOCK_SIZE, block_hashes
from loraplex.errors import LoraplexError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Asks for the log probability of `token_id` after `position`, counted from the end (-1 is the last token)."""

    position: int
    token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How many tokens to generate, and how to choose each.

    At temperature 0 the likeliest token is chosen. Otherwise a token is drawn from the smallest set of likeliest tokens
    whose probabilities add up to `top_p`.

    stop_ids:     tokens that end the text: the first of them is the last token.
    min_tokens:   before so many tokens, none of `stop_ids` is chosen.
    biases:       (token id, number added to its logit before a token is chosen).
    allowed_ids:  if not empty, only these tokens are chosen.
    num_top:      how many of the likeliest tokens to report with each token.
    """

    max_tokens: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    biases: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] = ()
    num_top: int = 0


NEXT_TOKEN = Sampling()


class Token(NamedTuple):
    """A token and its log probability in the model's own distribution, before Sampling changes anything.

    top:  the likeliest tokens at the same position with their log probabilities, likeliest first.
    """

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOutput:
    """The engine's result for one sequence.

    log_probs:   one per target: natural logarithm, over the whole vocabulary. With a score head: one per label.
    tokens:      the tokens that follow the sequence, one or as many as its sampling asks for.
    tops:        for each target the likeliest tokens at its position with their log probabilities, likeliest first;
                 empty if the sequence's `num_target_top` is 0.
    queued_s:    seconds from the arrival to the first step.
    computed_s:  seconds from the first step to the result.
    """

    log_probs: tuple[float, ...]
    tokens: tuple[Token, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()
    queued_s: float
    computed_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Token ids to compute under the adapter in `slot`, and the `targets` to read.

    kv_id:       identity of the K/V that the slot computes (32 bytes).
    activation:  index of the first token that the adapter acts on (aLoRA). The tokens before it run in `prefix_slot`,
                 and their K/V has the identity `prefix_kv_id`. Both are the bare base's, unless the adapter also
                 changes the tokens before its activation.
    num_kept:    leading tokens whose K/V is looked up, and kept for later requests. All, if more than one token is
                 generated.
    num_target_top:  how many of the likeliest tokens to report with each target.
    on_token:    called after each token, on the engine's thread; returns whether to go on. If it raises, an EngineError
                 is the outcome.
    num_computed_tokens:  tokens run through the model so far. Tokens that sequences share count for one of them.
    """

    token_ids: tuple[int, ...]
    slot: int
    kv_id: bytes = BASE_KV
    activation: int = 0
    prefix_slot: int = NO_ADAPTER
    prefix_kv_id: bytes = BASE_KV
    num_kept: int = 0
    targets: tuple[Target, ...] = ()
    num_target_top: int = 0
    sampling: Sampling = NEXT_TOKEN
    on_token: Callable[[Token], bool] | None = None
    arrived_s: float = 0.0
    started_s: float | None = field(init=False, default=None)
    request: "EngineRequest" = field(init=False, repr=False)
    index: int = field(init=False, default=0)
    num_computed_tokens: int = field(init=False, default=0)
    tokens: tuple[Token, ...] = field(init=False, default=())  # generated so far, and appended to token_ids
    _hashes: Seq[bytes] = field(init=False, repr=False, default=())
    _random: random.Random | None = field(init=False, repr=False, default=None)
    _drawn: list[float] = field(init=False, repr=False, default_factory=list)  # one number per token

    def __post_init__(self) -> None:
        if self.slot == NO_ADAPTER:
            self.activation = len(self.token_ids)
        if self.generates:
            assert not self.targets, "a target's position is counted from the end, which moves"
            self.num_kept = len(self.token_ids)

    @property
    def generates(self) -> bool:
        """Whether more than one token is asked for. The sequence then runs in one step per token."""
        return self.sampling.max_tokens > 1

    def append(self, token: Token) -> bool:
        """Append the token that was chosen. Return False where it is the last one."""
        self.tokens += (token,)
        goes_on = self.on_token is None or self.on_token(token)
        if not goes_on or len(self.tokens) >= self.sampling.max_tokens or token.id in self.sampling.stop_ids:
            return False
        self.token_ids += (token.id,)
        self.num_kept = len(self.token_ids)
        if self.slot == NO_ADAPTER:
            self.activation = len(self.token_ids)
        return True

    def draw(self) -> float:
        """Return the random number in [0, 1) for the next token. The same seed gives the same numbers, whatever else
        runs and however often a step is repeated."""
        if self._random is None:
            self._random = random.Random(self.sampling.seed)
        while len(self._drawn) <= len(self.tokens):
            self._drawn.append(self._random.random())
        return self._drawn[-1]

    @property
    def hashes(self) -> Seq[bytes]:
        """The hashes of all full blocks, computed on first use."""
        if len(self._hashes) < self.num_tokens // BLOCK_SIZE:
            self._hashes = block_hashes(self.token_ids, self.activation, self.kv_id, self._hashes, self.prefix_kv_id)
        return self._hashes

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """Rows of logits that the sequence reads."""
        return len({-1, *(target.position for target in self.targets)})

    @property
    def num_cacheable_blocks(self) -> int:
        """Full blocks before the first token whose logits are wanted. That token and later ones must be computed."""
        first = min((target.position for target in self.targets), default=-1)
        return (self.num_tokens + min(first, -1)) // BLOCK_SIZE


Outcome = SequenceOutput | LoraplexError


class EngineRequest:
    """Sequences whose outcomes are wanted together.

    `future` resolves exactly once, to one outcome per sequence in order. An error of one sequence is the outcome of
    that sequence alone.
    """

    def __init__(
        self,
        sequences: Seq[Sequence],
        *,
        deadline_s: float | None = None,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        """deadline_s: on the clock of `time.monotonic`. on_end: called once, on any thread, when the engine is done
        with all sequences, even if the future was cancelled."""
        assert sequences, "a request needs at least one sequence"
        self.sequences = tuple(sequences)
        self.deadline_s = deadline_s
        self.num_tokens = 0  # estimated tokens to compute; 0 if not estimated
        self._on_end = on_end
        self.future: Future[list[Outcome]] = Future()
        self._outcomes: list[Outcome | None] = [None] * len(self.sequences)
        self._num_open = len(self.sequences)
        self._lock = threading.Lock()
        for index, sequence in enumerate(self.sequences):
            sequence.request, sequence.index = self, index

    def outcomes(self, error: LoraplexError) -> list[Outcome]:
        """Return the outcomes so far, and `error` for each sequence that has none and may still be running."""
        with self._lock:
            return [error if outcome is None else outcome for outcome in self._outcomes]

    def abandon(self) -> None:
        """End a request that the engine did not accept: cancel the future and call `on_end`."""
        self.future.cancel()
        self._on_end()

    def resolve(self, sequence: Sequence, outcome: Outcome) -> bool:
        """Record the outcome of one sequence; only its first outcome counts. The last sequence resolves the future.
        Returns whether all sequences have an outcome now."""
        with self._lock:
            if self._outcomes[sequence.index] is not None:
                return not self._num_open
            self._outcomes[sequence.index] = outcome
            self._num_open -= 1
            if self._num_open:
                return False
        try:
            self._on_end()
        except Exception:
            logger.exception("a request's on_end failed")
        outcomes = [outcome for outcome in self._outcomes if outcome is not None]
        # A cancelled future takes no result, and nobody waits for one.
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(outcomes)
        return True


def lone_sequence(token_ids: Seq[int], *targets: Target) -> Sequence:
    """Return a sequence on the bare base, in a request of its own."""
    sequence = Sequence(token_ids=tuple(token_ids), slot=NO_ADAPTER, targets=targets)
    EngineRequest([sequence])
    return sequence
