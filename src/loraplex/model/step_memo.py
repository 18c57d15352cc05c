"""Keeps stacks and CUDA graphs between small steps of the same slots."""

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from threading import Lock

from loraplex.adapters.slots import prefix_slot
from loraplex.model.graphs import Graphs
from loraplex.model.inputs import Segment, Segments
from loraplex.model.lora_linear import LoRALinear, StackedUpdate

# Stacking the adapters' weights takes a large part of a step of at most SMALL_STEP tokens. Stacks are copies of the
# weights, so they are kept for at most MAX_MEMOS sets of slots, within a budget in bytes. A step has two sets: the
# slots of its segments, and those of the wanted rows in its last layer.
SMALL_STEP, MAX_MEMOS = 1024, 8
# A small step is captured when its segments come for the third time. MAX_CAPTURED bounds the captured steps of each set
# of slots, MAX_COUNTED the counted ones.
CAPTURED_AT, MAX_CAPTURED, MAX_COUNTED = 3, 48, 256

Key = tuple[tuple[int, bool], ...]


@dataclass(slots=True)
class _Memo:
    """The stacks and graphs of steps with the same slots in the same order."""

    stacked: dict[LoRALinear, tuple[StackedUpdate, ...]] = field(default_factory=dict)
    _counted: tuple[int, int] = 0, 0  # number of layers, and the bytes of their stacks
    num_seen: Counter[Seq[Segment]] = field(default_factory=Counter)
    graphs: dict[Seq[Segment], Graphs] = field(default_factory=dict)  # oldest first; the graphs read the stacks

    @property
    def num_bytes(self) -> int:
        """Bytes of the stacks."""
        if self._counted[0] != len(self.stacked):
            self._counted = len(self.stacked), sum(one.num_bytes for layer in self.stacked.values() for one in layer)
        return self._counted[1]

    def graphs_of(self, segments: Seq[Segment]) -> Graphs | None:
        """Return the graphs for these segments; None where the segments have not come often enough."""
        if segments not in self.graphs:
            if len(self.num_seen) > MAX_COUNTED:
                self.num_seen.clear()
            self.num_seen[segments] += 1
            if self.num_seen[segments] < CAPTURED_AT:
                return None
        found = self.graphs[segments] = self.graphs.pop(segments, {})
        while len(self.graphs) > MAX_CAPTURED:
            evicted = next(iter(self.graphs))
            del self.graphs[evicted], self.num_seen[evicted]
        return found


class StepMemo:
    """Keeps the memos of the last few sets of slots. The thread that runs the steps calls `begin`, `end` and `clear`;
    any thread may call `clear_slot`."""

    def __init__(self, budget_bytes: int, *, captures: bool = False) -> None:
        """captures: whether steps are captured as CUDA graphs."""
        self.budget_bytes, self.captures = budget_bytes, captures
        self._memos: dict[Key, _Memo] = {}  # by the segments' key, oldest first
        self._removed: list[dict[Seq[Segment], Graphs]] = []  # by `clear_slot`
        self._lock = Lock()

    def begin(self, segments: Segments, last_segments: Segments) -> None:
        """Give a step and its last layer the stacks and graphs of earlier steps with the same slots."""
        if segments.num_tokens > SMALL_STEP:
            return
        with self._lock:
            memo = self._memo(segments)
            segments.stacked, last_segments.stacked = memo.stacked, self._memo(last_segments).stacked
            if self.captures:
                segments.graphs = memo.graphs_of(segments.all)

    def end(self, *all_segments: Segments) -> None:
        """End a step, whether it succeeded or failed. Memos above the limits are evicted, oldest first."""
        for segments in all_segments:
            segments.stacked = segments.graphs = None
        with self._lock:
            self._removed.clear()
            total = sum(memo.num_bytes for memo in self._memos.values())
            while self._memos and (len(self._memos) > MAX_MEMOS or total > self.budget_bytes):
                total -= self._memos.pop(next(iter(self._memos))).num_bytes

    def clear(self) -> None:
        """Drop all memos, to free memory."""
        with self._lock:
            self._memos.clear()
            self._removed.clear()

    def clear_slot(self, slot: int) -> None:
        """Drop the memos that use the slot or its prefix slot, because its adapter is removed or replaced."""
        own = {slot, prefix_slot(slot)}
        with self._lock:
            for key in [key for key in self._memos if not own.isdisjoint(used for used, _ in key)]:
                # Graphs are destroyed on the thread that captures and replays them: at its next `end`.
                self._removed.append(self._memos.pop(key).graphs)

    def _memo(self, segments: Segments) -> _Memo:
        memo = self._memos[segments.key] = self._memos.pop(segments.key, _Memo())
        return memo
