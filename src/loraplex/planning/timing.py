"""How long the usual calls take: the floor from FLOPs and bandwidth, and what is expected from the shares that were
reached elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraplex.engine.block_pool import BLOCK_SIZE
from loraplex.planning.adapter_size import AdapterSize
from loraplex.planning.allowances import Efficiency, allowances
from loraplex.planning.base_shape import BaseShape
from loraplex.planning.target import Target
from loraplex.planning.work import Run, Work, work


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Says what is asked.

    conversation_tokens:  of the whole conversation, which arrives in `turns` equal turns.
    suffix_tokens:        a classifier's own part of its prompt.
    """

    conversation_tokens: int
    suffix_tokens: int
    turns: int
    num_classifiers: int

    @property
    def turn_tokens(self) -> int:
        return max(1, self.conversation_tokens // self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of call, each asking all classifiers once.

    shares:    whether the conversation is computed once for all classifiers, which needs aLoRA adapters.
    work:      the least work: our own decoder computes most of its last layer for the wanted rows only.
    floor_s:   no machine with the target's rates is faster; None where the rates are not known.
    expected:  (shortest, longest) seconds. The shares that were reached elsewhere count the last layer in full, and so
               does this.
    """

    name: str
    shares: bool
    is_next_turn: bool
    num_tokens: int
    work: Work
    floor_s: float | None = None
    expected: tuple[float, float] | None = None
    most_per_s: float | None = None

    def expected_per_s(self, target: Target) -> tuple[float, float] | None:
        """Return (least, most) conversations/s at the shares of the limit that were reached elsewhere."""
        if self.most_per_s is None:
            return None
        reached = efficiency(target)
        return reached.low * self.most_per_s, reached.high * self.most_per_s


def cases(
    base: BaseShape, adapters: Sequence[AdapterSize], traffic: Traffic, target: Target, item_bytes: int
) -> tuple[Case, ...]:
    """Return the cases: a whole conversation, and its last turn with the K/V of the turns before it, where there are
    several turns. Each is counted without and with sharing."""
    n, length, suffix = traffic.num_classifiers, traffic.conversation_tokens, traffic.suffix_tokens
    loras = sorted((one.num_lora for one in adapters), reverse=True)[:n]
    loras += [0] * (n - len(loras))
    suffixes = [Run(suffix, length, lora) for lora in loras]
    old = (length - traffic.turn_tokens) // BLOCK_SIZE * BLOCK_SIZE
    texts = f"{n} verdicts on a conversation", f"{n} verdicts on its next turn"
    asked = [
        (texts[0], False, [Run(length, 0, lora) for lora in loras] + suffixes, 0),
        (texts[0], True, [Run(length), *suffixes], 0),
    ]
    if old:
        asked += [
            (texts[1], False, [Run(length - old, old, lora) for lora in loras] + suffixes, n * old),
            (texts[1], True, [Run(length - old, old), *suffixes], old),
        ]
    found = []
    for name, shares, runs, num_cached in asked:
        full, least = (
            work(
                base,
                runs,
                num_rows=n,
                num_adapter_weights=sum(loras),
                num_cached=num_cached,
                last_in_full=last_in_full,
            )
            for last_in_full in (True, not base.sizes.has_own_decoder)
        )
        case = Case(
            name=name,
            shares=shares,
            is_next_turn=num_cached > 0,
            num_tokens=sum(run.num_tokens for run in runs),
            work=least,
        )
        found.append(_timed(case, full, target, item_bytes))
    return tuple(found)


def efficiency(target: Target) -> Efficiency:
    return allowances().efficiency["cuda" if target.is_cuda else "cpu"]


def _timed(case: Case, full: Work, target: Target, item_bytes: int) -> Case:
    if target.flops_per_s is None or target.bytes_per_s is None:
        return case
    reached = efficiency(target)
    floor, whole = (one.seconds(target.flops_per_s, target.bytes_per_s, item_bytes) for one in (case.work, full))
    return replace(
        case,
        floor_s=floor,
        expected=(max(floor, whole / reached.high), whole / reached.low),
        # Several conversations in one step read the weights once, so only the products count.
        most_per_s=target.count * target.flops_per_s / case.work.total,
    )
