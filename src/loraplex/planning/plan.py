"""A plan: the memory of a base with adapters on a target, what fits there, and how long calls take."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraplex.config import EngineConfig
from loraplex.model.loader import step_token_bytes, step_tokens
from loraplex.planning.adapter_size import AdapterSize
from loraplex.planning.base_shape import BaseShape
from loraplex.planning.memory import (
    DEVICE,
    Budgets,
    Line,
    Use,
    adapter_lines,
    budgets,
    kv_conversation_bytes,
    kv_token_bytes,
    memo_line,
    overhead_lines,
    step_line,
    weights_line,
)
from loraplex.planning.target import Target
from loraplex.planning.timing import Case, Traffic, cases

KV_CACHE = "K/V cache"
LEAST_STEP = 256
SPARE = 0.03  # of the memory that is left, which --fit keeps free


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Settings for `loraplex.yaml`."""

    max_adapters: int
    kv_cache_bytes: int
    adapter_memory_bytes: int
    host_memory_bytes: int | None
    max_step_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fits:
    """How many fit: the largest number of one thing, with everything else as planned.

    adapters:       of the largest one's size, with the K/V of one conversation.
    conversations:  whose K/V is kept: (for plain adapters, a copy for each; for aLoRA, one copy).
    cached:         the same, within the K/V cache as planned.
    """

    adapters: int
    conversations: tuple[int, int]
    cached: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan for one target.

    kv_conversation_bytes:  (plain: a copy for each classifier; shared: one copy).
    short_bytes:            how much memory is missing; 0 where everything has room.
    chosen:                 the settings of the plan: those that are set, or those that `--fit` chose.
    """

    base: BaseShape
    adapters: tuple[AdapterSize, ...]
    target: Target
    traffic: Traffic
    use: Use
    lines: tuple[Line, ...]
    num_placed: int
    kv_token_bytes: int
    kv_conversation_bytes: tuple[int, int]
    fits: Fits | None
    short_bytes: int
    cases: tuple[Case, ...]
    chosen: Chosen

    def total(self, where: str | None, what: str = "expected") -> int:
        """Return the sum of the lines: on the device or in host memory; None for both. what: `limit` or `expected`."""
        return sum(int(getattr(line, what)) for line in self.lines if where in (None, line.where))

    @property
    def on_target(self) -> str | None:
        """Which lines the target's memory holds: all of them where it is a CPU's."""
        return DEVICE if self.target.is_cuda else None

    @property
    def least_bytes(self) -> int:
        """The target's memory that is needed with a K/V cache for one conversation only."""
        [kv] = [line for line in self.lines if line.name == KV_CACHE]
        return self.total(self.on_target) - kv.expected + kv.limit


def make_plan(
    base: BaseShape,
    adapters: Sequence[AdapterSize],
    traffic: Traffic,
    config: EngineConfig,
    target: Target,
    *,
    item_bytes: int,
    tokenizer_bytes: int | None = None,
    fits: bool = False,
) -> Plan:
    """Return the plan. config: the settings; a share of the free memory counts from what the target leaves. fits:
    choose the settings anew, so that everything has room."""
    use = Use(
        item_bytes=item_bytes,
        is_cuda=target.is_cuda,
        num_classifiers=traffic.num_classifiers,
        max_step_tokens=1,
        call_tokens=_call_tokens(adapters, traffic),
        free_bytes=target.memory_bytes,
        tokenizer_bytes=tokenizer_bytes,
    )
    fixed = [weights_line(base.sizes, use), *overhead_lines(use)]
    on_target = DEVICE if target.is_cuda else None
    left = None if target.memory_bytes is None else target.memory_bytes - _sum(fixed, on_target)
    per_token = step_token_bytes(base.sizes.hidden_size, base.sizes.inner_size, item_bytes)
    tokens = step_tokens(item_bytes, per_token, max(0, left or 0) if target.is_cuda else None)
    use = replace(use, max_step_tokens=config.max_step_tokens or tokens)
    length = traffic.conversation_tokens + traffic.suffix_tokens
    one = kv_conversation_bytes(base.sizes, use, traffic.conversation_tokens)
    plain = kv_conversation_bytes(base.sizes, use, length, max(1, traffic.num_classifiers))
    chosen = _chosen(budgets(config, left, None if target.is_cuda else left, is_cuda=target.is_cuda), config, use)
    if fits and left is not None:
        use, chosen = _fitted(base, adapters, use, left, one, config)
    num_placed = min(len(adapters), chosen.max_adapters, _num_within(adapters, use, chosen.adapter_memory_bytes))
    lines = [fixed[0], *adapter_lines(adapters, num_placed, use, chosen.host_memory_bytes)]
    lines += [step_line(base.sizes, use), memo_line(adapters, num_placed, use), *fixed[1:]]
    rest = None if target.memory_bytes is None else target.memory_bytes - _sum(lines, on_target)
    kv = Line(
        name=KV_CACHE,
        where=DEVICE,
        limit=one if chosen.kv_cache_bytes else 0,
        expected=chosen.kv_cache_bytes,
        note=f"{kv_token_bytes(base.sizes, use):,} bytes a token; {one:,} for one conversation",
    )
    lines.insert(3, kv)
    return Plan(
        base=base,
        adapters=tuple(adapters),
        target=target,
        traffic=traffic,
        use=use,
        lines=tuple(lines),
        num_placed=num_placed,
        kv_token_bytes=kv_token_bytes(base.sizes, use),
        kv_conversation_bytes=(plain, one),
        fits=None if rest is None else _fits(adapters, use, rest, num_placed, (plain, one), kv.expected),
        short_bytes=0 if rest is None else max(0, max(kv.limit, kv.expected) - rest),
        cases=cases(base, adapters, traffic, target, item_bytes),
        chosen=chosen,
    )


def share_the_conversation(adapters: Sequence[AdapterSize]) -> bool:
    """Whether all of the adapters leave a conversation to the base."""
    return bool(adapters) and all(one.shares_prefix for one in adapters)


def _call_tokens(adapters: Sequence[AdapterSize], traffic: Traffic) -> int:
    copies = 1 if share_the_conversation(adapters) else traffic.num_classifiers
    return copies * traffic.conversation_tokens + traffic.num_classifiers * traffic.suffix_tokens


def _chosen(allowed: Budgets, config: EngineConfig, use: Use) -> Chosen:
    """Return the settings as the server would resolve them on the target."""
    return Chosen(
        max_adapters=config.max_adapters,
        kv_cache_bytes=allowed.kv or 0,
        adapter_memory_bytes=sys.maxsize if allowed.adapters is None else allowed.adapters,
        host_memory_bytes=allowed.host,
        max_step_tokens=use.max_step_tokens,
    )


def _fitted(
    base: BaseShape, adapters: Sequence[AdapterSize], use: Use, left: int, wanted: int, config: EngineConfig
) -> tuple[Use, Chosen]:
    """Choose settings: first room for the adapters and for the K/V of one conversation, with smaller steps where memory
    is tight. The rest is K/V."""
    left = round(left * (1 - SPARE))
    memo = memo_line(adapters, len(adapters), use).expected
    per_adapter = max((_adapter_bytes(one, use) for one in adapters), default=0)
    num_adapters = min(len(adapters), config.max_adapters)
    while True:
        rest = left - memo - step_line(base.sizes, use).expected
        if rest - num_adapters * per_adapter >= wanted or use.max_step_tokens <= LEAST_STEP:
            break
        use = replace(use, max_step_tokens=max(LEAST_STEP, use.max_step_tokens // 2))
    while num_adapters > 1 and rest - num_adapters * per_adapter < wanted:
        num_adapters = max(1, min(num_adapters - 1, (rest - wanted) // per_adapter))
    placed = num_adapters * max((one.num_placed for one in adapters), default=0) * use.item_bytes
    return use, Chosen(
        max_adapters=max(1, num_adapters),
        kv_cache_bytes=max(0, rest - num_adapters * per_adapter) // 2**20 * 2**20,
        adapter_memory_bytes=-(-placed // 2**20) * 2**20,
        host_memory_bytes=None if use.is_cuda else num_adapters * max((one.host_bytes for one in adapters), default=0),
        max_step_tokens=use.max_step_tokens,
    )


def _fits(
    adapters: Sequence[AdapterSize], use: Use, rest: int, num_placed: int, kv: tuple[int, int], cache: int
) -> Fits:
    """rest: bytes that everything but the K/V leaves. kv: bytes of a conversation, plain and shared. cache: of the
    planned K/V."""
    each = max((_adapter_bytes(one, use) for one in adapters), default=0)
    return Fits(
        adapters=max(0, num_placed + (rest - kv[1]) // each) if each else 0,
        conversations=(max(0, rest) // kv[0], max(0, rest) // kv[1]),
        cached=(cache // kv[0], cache // kv[1]),
    )


def _adapter_bytes(adapter: AdapterSize, use: Use) -> int:
    """Return what one more adapter takes of the target's memory. On a CPU its copy in host memory counts, too."""
    return adapter.num_placed * use.item_bytes + (0 if use.is_cuda else adapter.host_bytes)


def _num_within(adapters: Sequence[AdapterSize], use: Use, budget: int) -> int:
    """Return how many of the largest adapters the budget holds."""
    num, total = 0, 0
    for one in sorted((one.num_placed * use.item_bytes for one in adapters), reverse=True):
        total += one
        if total > budget:
            break
        num += 1
    return num


def _sum(lines: Sequence[Line], where: str | None) -> int:
    return sum(line.expected for line in lines if where in (None, line.where))
