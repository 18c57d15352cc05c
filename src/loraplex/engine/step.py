"""One step: sequences laid out as a tree of runs, so that the tokens that they share are computed once."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class Run:
    """Consecutive new tokens under one slot, computed once for all sequences that pass through it."""

    slot: int
    token_ids: tuple[int, ...]
    start: int  # position of the first token
    parent: "Run | None"
    cached: tuple[int, ...]  # blocks that hold the positions before the root's start
    owner: Sequence  # the first sequence that needs the run; its tokens count for this one
    children: dict[tuple[int, int], list["Run"]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    def path(self) -> list["Run"]:
        """Return the runs from the root to this run."""
        runs = [self]
        while runs[-1].parent is not None:
            runs.append(runs[-1].parent)
        return runs[::-1]


@dataclass(slots=True, eq=False)
class Placed:
    """A sequence in a step, up to `end`: all of it, or a chunk that writes K/V and has no outcome yet.

    cached:  blocks that hold the tokens before `start`, referenced until the step is over. If the sequence generates,
             the last one may be its own and not full.
    kept:    blocks to write, by index in the chain: the blocks after `cached`, and the last of `cached` if not full.
    """

    sequence: Sequence
    end: int
    start: int = 0
    cached: tuple[int, ...] = ()
    kept: dict[int, int] = field(default_factory=dict)
    last: Run | None = None  # the run that holds the token before `end`

    @property
    def is_chunk(self) -> bool:
        return self.end < self.sequence.num_tokens

    @property
    def blocks(self) -> dict[int, int]:
        """The cached and the kept blocks, by index in the chain."""
        return {**dict(enumerate(self.cached)), **self.kept}

    def kept_positions(self, index: int) -> range:
        """Return the positions whose K/V this step writes into block `index` of the chain."""
        return range(max(self.start, index * BLOCK_SIZE), min(self.end, (index + 1) * BLOCK_SIZE))


class Step:
    """The sequences of one forward pass. They join one by one; a prefix that they share in one slot is computed once.

    Sequences of one request share a prefix of any length. Sequences of different requests share at least a block of
    tokens: fewer are not worth the extra attention calls (every text begins with the same BOS).
    """

    def __init__(self, *, shares: bool = True, min_shared: int = BLOCK_SIZE) -> None:
        """shares: whether sequences share prefixes. If False, every sequence is computed whole. min_shared: tokens that
        sequences of different requests have to share."""
        self.placed: list[Placed] = []
        self.num_tokens = 0
        self.num_rows = 0  # of logits, at most: sequences may share rows
        self._shares, self._min_shared = shares, min_shared
        self._roots: dict[tuple[tuple[int, ...], int, int], list[Run]] = {}

    @classmethod
    def of(cls, sequences: Seq[Sequence]) -> "Step":
        """Return a step of whole sequences that read no cached blocks and keep none."""
        step = cls()
        for sequence in sequences:
            step.add(Placed(sequence, sequence.num_tokens))
        return step

    def __len__(self) -> int:
        return len(self.placed)

    def cost(self, placed: Placed) -> int:
        """Return how many more tokens the step computes if `placed` joins."""
        cost = placed.end - placed.start
        at = placed.start
        siblings = self._roots.get((placed.cached, *_key(placed.sequence, at)))
        while at < placed.end and siblings is not None:
            run, num_common = self._best(siblings, placed, at)
            if run is None:
                break
            cost -= num_common
            at += num_common
            if num_common < run.num_tokens or at == placed.end:
                break
            siblings = run.children.get(_key(placed.sequence, at))
        return cost

    def add(self, placed: Placed) -> None:
        sequence, at, parent = placed.sequence, placed.start, None
        assert at < placed.end, "nothing to compute"
        while at < placed.end:
            if parent is None:
                siblings = self._roots.setdefault((placed.cached, *_key(sequence, at)), [])
            else:
                siblings = parent.children.setdefault(_key(sequence, at), [])
            run, num_common = self._best(siblings, placed, at)
            if run is None:
                tokens = sequence.token_ids[at : _end_of_slot(placed, at)]
                run = Run(_slot(sequence, at), tokens, at, parent, placed.cached, sequence)
                siblings.append(run)
                self.num_tokens += len(tokens)
            elif num_common < run.num_tokens:
                self._split(run, num_common)
            parent, at = run, run.end
        placed.last = parent
        self.placed.append(placed)
        self.num_rows += 0 if placed.is_chunk else sequence.num_rows

    def runs(self) -> Iterator[Run]:
        """All runs, parents first."""
        stack = [run for siblings in self._roots.values() for run in siblings]
        while stack:
            run = stack.pop()
            yield run
            stack.extend(child for siblings in run.children.values() for child in siblings)

    def halves(self) -> "tuple[Step, Step]":
        """Return two steps with half of the sequences each, to retry a step that failed. They read and write the same
        blocks as this step, so neither computes more tokens than this step."""
        middle = len(self.placed) // 2
        # Sequences that share through a third one, which is now in the other half, may share less than a block.
        first, second = (Step(shares=self._shares, min_shared=1) for _ in range(2))
        for index, one in enumerate(self.placed):
            (first if index < middle else second).add(Placed(one.sequence, one.end, one.start, one.cached, one.kept))
        return first, second

    def _best(self, siblings: Seq[Run], placed: Placed, at: int) -> tuple[Run | None, int]:
        """Return the run that shares most tokens with the sequence from `at`, and how many. The run is None where no
        run shares enough."""
        best, most = None, 0
        end = _end_of_slot(placed, at)
        for run in siblings if self._shares else ():
            num_common = _num_common(run.token_ids, placed.sequence.token_ids, at, end)
            same_request = run.owner.request is placed.sequence.request
            if num_common > most and (same_request or num_common >= self._min_shared):
                best, most = run, num_common
        return best, most

    def _split(self, run: Run, num_tokens: int) -> None:
        """Cut `run` after `num_tokens` tokens. The rest becomes a child of `run` and takes over its children."""
        rest = Run(
            run.slot, run.token_ids[num_tokens:], run.start + num_tokens, run, run.cached, run.owner, run.children
        )
        for siblings in rest.children.values():
            for child in siblings:
                child.parent = rest
        run.token_ids = run.token_ids[:num_tokens]
        run.children = {(rest.slot, rest.token_ids[0]): [rest]}
        for placed in self.placed:
            if placed.last is run:
                placed.last = rest


def _slot(sequence: Sequence, at: int) -> int:
    return sequence.prefix_slot if at < sequence.activation else sequence.slot


def _end_of_slot(placed: Placed, at: int) -> int:
    activation = placed.sequence.activation
    return min(activation, placed.end) if at < activation else placed.end


def _key(sequence: Sequence, at: int) -> tuple[int, int]:
    return _slot(sequence, at), sequence.token_ids[at]


def _num_common(tokens: tuple[int, ...], others: tuple[int, ...], at: int, end: int) -> int:
    """Return the length of the common prefix of `tokens` and `others[at:end]`. Compares slices, which is fast."""
    low, high = 0, min(len(tokens), end - at)
    if tokens[:high] == others[at : at + high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if tokens[low:middle] == others[at + low : at + middle]:
            low = middle
        else:
            high = middle
    return low
