"""Chooses the waiting sequences of the next step, and the blocks that they read and write. Pure policy: no threads, no
torch, and the clock is an argument."""

import heapq
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from loraplex.engine.block_pool import BLOCK_SIZE, BlockPool
from loraplex.engine.sequence import EngineRequest, Sequence
from loraplex.engine.step import Placed, Step
from loraplex.errors import CancelledError, DeadlineExceededError, LoraplexError

# Tokens by which a request's work counts as shorter for each second that it has waited longer than another request.
WAITING_BONUS = 2000.0
# Rows of logits in a step of several sequences, which bounds their memory: with a vocabulary of 150,000, a row takes
# 0.6 MB in float32.
MAX_STEP_ROWS = 512

Flow = frozenset[int]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A queued request and its sequences that have not run.

    A flow's requests run in the order of `key`: the least work first, minus a bonus for waiting. The bonus grows
    equally for all requests, so it is applied once, at arrival.
    """

    request: EngineRequest
    pending: deque[Sequence]
    key: float
    num_tokens: int  # to compute for the pending sequences

    def pop(self) -> int:
        """Remove the first sequence. Return the tokens counted for it: an equal share of `num_tokens`."""
        num_tokens = self.num_tokens // len(self.pending)
        self.pending.popleft()
        self.num_tokens -= num_tokens
        return num_tokens

    def __lt__(self, other: "_Waiting") -> bool:
        return self.key < other.key


class Scheduler:
    """Queues requests fairly between flows. A flow is the requests that ask the same set of adapters.

    The flow that was served the fewest tokens is next, and within it the request with the shortest work. A flow that
    returns starts level with the others.
    """

    def __init__(
        self,
        *,
        max_step_tokens: int,
        max_step_sequences: int,
        pool: BlockPool | None = None,
        shares: bool = True,
    ) -> None:
        """shares: whether sequences of a step compute the tokens that they have in common only once."""
        self.max_step_tokens = max_step_tokens
        self.max_step_sequences = max_step_sequences
        self.pool = BlockPool(0) if pool is None else pool
        self._shares = shares
        self._flows: dict[Flow, list[_Waiting]] = {}  # heaps
        self._served: dict[Flow, float] = {}  # tokens served to each flow that waits
        self._level = 0.0  # tokens served to the flow that was chosen last
        self._num_waiting = 0
        self.num_waiting_tokens = 0  # to compute for the waiting sequences
        self._tokens_per_s: float | None = None  # moving average
        self._held_blocks: dict[Sequence, tuple[int, tuple[int, ...]]] = {}  # sequences between steps: tokens, blocks

    def __len__(self) -> int:
        return self._num_waiting

    def cost(self, request: EngineRequest) -> int:
        """Return the tokens to compute for a request that is not queued yet, in a step of its own with the blocks
        that are cached now. This is the only method that any thread may call: it only looks blocks up."""
        alone = Step(shares=self._shares)
        for sequence in request.sequences:
            alone.add(self._place(sequence))
        return alone.num_tokens

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue all of a request's sequences."""
        for sequence in request.sequences:
            sequence.arrived_s = now
        num_tokens = request.num_tokens or self.cost(request)
        self._push(_Waiting(request, deque(request.sequences), num_tokens + WAITING_BONUS * now, num_tokens))

    @property
    def wait_s(self) -> float:
        """Estimated seconds until the waiting sequences are computed, from the speed of the last steps."""
        return 1.0 if self._tokens_per_s is None else self.num_waiting_tokens / self._tokens_per_s

    def next_step(self, now: float) -> tuple[Step | None, list[tuple[Sequence, LoraplexError]]]:
        """Take the sequences of the next step from the queue. Also return the sequences to refuse, each with its
        error. The caller ends the step with `finish`."""
        dropped = self._drop(now)
        step = Step(shares=self._shares)
        written: set[bytes] = set()
        turns = [(served, index, flow) for index, (flow, served) in enumerate(self._served.items())]
        heapq.heapify(turns)
        while turns and len(step) < self.max_step_sequences:
            served, index, flow = heapq.heappop(turns)
            waiting = self._flows[flow][0]
            placed = self._fit(waiting.pending[0], step)
            if placed is None:
                break
            self._level = served
            num_tokens = step.num_tokens
            self._reserve(placed, written)
            step.add(placed)
            self.num_waiting_tokens -= waiting.pop()
            self._num_waiting -= 1
            self._served[flow] = served + step.num_tokens - num_tokens
            if not waiting.pending:
                heapq.heappop(self._flows[flow])
            if self._flows[flow]:
                heapq.heappush(turns, (self._served[flow], index, flow))
            else:
                del self._flows[flow], self._served[flow]
        return (step if len(step) else None), dropped

    def finish(
        self,
        step: Step,
        *,
        failed: Collection[Sequence] = (),
        generating: Collection[Sequence] = (),
        seconds: float | None = None,
    ) -> None:
        """Release the step's blocks, and let later requests find the K/V that the step computed.

        A sequence of which a chunk ran is queued for its next chunk, a generating sequence for its next token.

        failed:      sequences that were not computed. They leave the scheduler, and their blocks hold nothing.
        generating:  sequences that took a token and need another.
        seconds:     duration of the step.
        """
        if seconds:
            rate = step.num_tokens / seconds
            self._tokens_per_s = rate if self._tokens_per_s is None else 0.9 * self._tokens_per_s + 0.1 * rate
        for placed in step.placed:
            sequence, held = placed.sequence, None
            computed = sequence not in failed
            if computed:
                for index, block in placed.kept.items():
                    if (index + 1) * BLOCK_SIZE <= placed.end:
                        self.pool.register(block, sequence.hashes[index])
            is_chunk = placed.is_chunk and computed and sequence not in generating
            if computed and (is_chunk or sequence in generating):
                held = self._held(placed)
                self.pool.acquire(held[1])
            self._release(sequence)
            self.pool.release(placed.blocks.values())
            if held is not None:
                self._held_blocks[sequence] = held
            if is_chunk:  # ahead of its flow, because nobody else can use the blocks that it holds
                rest = sequence.num_tokens - placed.end
                self._push(_Waiting(sequence.request, deque([sequence]), float("-inf"), rest))
            elif sequence in generating:
                key = 1 + WAITING_BONUS * sequence.arrived_s
                self._push(_Waiting(sequence.request, deque([sequence]), key, 1))

    def _push(self, waiting: _Waiting) -> None:
        flow = frozenset(sequence.slot for sequence in waiting.pending)
        if flow not in self._flows:
            self._flows[flow], self._served[flow] = [], self._level
        heapq.heappush(self._flows[flow], waiting)
        self._num_waiting += len(waiting.pending)
        self.num_waiting_tokens += waiting.num_tokens

    def _place(self, sequence: Sequence) -> Placed:
        """Lay out all tokens of the sequence whose K/V is not cached."""
        start, cached = self._held_blocks.get(sequence, (0, ()))
        if start % BLOCK_SIZE == 0 and (cached or sequence.num_kept):
            cached += self.pool.match(sequence.hashes[len(cached) : sequence.num_cacheable_blocks])
            start = len(cached) * BLOCK_SIZE
        return Placed(sequence, sequence.num_tokens, start, cached)

    def _fit(self, sequence: Sequence, step: Step) -> Placed | None:
        """Lay out the part of the sequence that joins the step; None where the step has no room.

        A sequence joins whole. Where no step could hold it, a chunk of it runs, with what still fits beside it. Where
        no blocks are available for a chunk, the whole sequence runs in a step of its own.
        """
        placed = self._place(sequence)
        if len(step) and step.num_rows + sequence.num_rows > max(MAX_STEP_ROWS, self.max_step_sequences):
            return None
        cost = step.cost(placed)
        if step.num_tokens + cost <= self.max_step_tokens:
            return placed
        if len(step):
            return None
        num_blocks = min(placed.start + self.max_step_tokens, sequence.num_cacheable_blocks * BLOCK_SIZE) // BLOCK_SIZE
        num_new = num_blocks - len(placed.cached)
        # Cached blocks that nobody references yet count as available. They must not be evicted for the chunk.
        if 0 < num_new <= self.pool.num_available - self.pool.num_evictable(placed.cached):
            placed.end = num_blocks * BLOCK_SIZE
        return placed

    def _reserve(self, placed: Placed, written: set[bytes]) -> None:
        """Reference the blocks that the sequence reads, and allocate the blocks that it writes, if available."""
        sequence = placed.sequence
        self.pool.acquire(placed.cached)
        end = placed.end if placed.is_chunk else min(sequence.num_kept, placed.end)
        num_full = end // BLOCK_SIZE
        # Only a sequence that generates writes a block that is not full: its next tokens fill the block.
        for index in range(placed.start // BLOCK_SIZE, -(-end // BLOCK_SIZE) if sequence.generates else num_full):
            if index < len(placed.cached):
                placed.kept[index] = placed.cached[index]
                continue
            if index < num_full and sequence.hashes[index] in written and not placed.is_chunk:
                continue
            block = self.pool.allocate(1)
            if block is None:
                assert not placed.is_chunk, "a chunk needs all of its blocks"
                break
            if index < num_full:
                written.add(sequence.hashes[index])
            placed.kept[index] = block[0]

    def _held(self, placed: Placed) -> tuple[int, tuple[int, ...]]:
        """Return how many of the sequence's first tokens are in blocks after the step, and the blocks."""
        blocks, mine, hashes = list(placed.cached), placed.blocks, placed.sequence.hashes
        for index in range(len(blocks), -(-placed.end // BLOCK_SIZE)):
            # A block that this sequence did not write was written by an earlier one.
            found = (mine[index],) if index in mine else self.pool.match(hashes[index : index + 1])
            if not found:
                break
            blocks += found
        return min(placed.end, len(blocks) * BLOCK_SIZE), tuple(blocks)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(self._held_blocks.pop(sequence, (0, ()))[1])

    def _drop(self, now: float) -> list[tuple[Sequence, LoraplexError]]:
        dropped: list[tuple[Sequence, LoraplexError]] = []
        for flow, heap in list(self._flows.items()):
            late = [(one, error) for one in heap if (error := _reason_to_drop(one.request, now)) is not None]
            for one, error in late:
                heap.remove(one)
                self._num_waiting -= len(one.pending)
                self.num_waiting_tokens -= one.num_tokens
                for sequence in one.pending:
                    self._release(sequence)
                    dropped.append((sequence, error))
            if late:
                heapq.heapify(heap)
            if not heap:
                del self._flows[flow], self._served[flow]
        return dropped


def _reason_to_drop(request: EngineRequest, now: float) -> LoraplexError | None:
    if request.future.cancelled():
        return CancelledError("the client left", remedy="none is needed")
    if request.deadline_s is not None and now >= request.deadline_s:
        return DeadlineExceededError("not computed before the deadline", remedy="allow more time or send less at once")
    return None
