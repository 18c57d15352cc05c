"""Keeps what is known of a system while it is measured, and makes the loads that it is measured under."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from loraplex.bench.call import Answer
from loraplex.bench.figures import Slice
from loraplex.bench.load import Job, Load, Phase, arrivals
from loraplex.bench.quality import Answers
from loraplex.bench.supply import Supply
from loraplex.bench.system import System

FEWEST = 10  # conversations that a slice expects at least, where its length is a time


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """One load. Closed loop: so many clients. Open loop: conversations a second, or a share of the capacity."""

    kind: Literal["closed", "open"]
    concurrency: int | None = None
    rate: float | None = None
    share: float | None = None

    def __str__(self) -> str:
        if self.kind == "closed":
            return f"closed loop, {self.concurrency} client{'s' if self.concurrency != 1 else ''}"
        return f"open loop, {self.share:g}x the capacity" if self.share else f"open loop, {self.rate:g} conversations/s"


@dataclass(kw_only=True)
class Measured:
    """One system, and its slices.

    state:      "measured", or why it is not.
    slices:     by plan; offered: conversations/s of each slice of an open loop.
    rate:       conversations/s of the last closed loop.
    clients:    the closed loop that finds its capacity; capacity: conversations/s of each of that loop's slices.
    saturated:  under which plan, and why.
    goodputs:   what was answered at twice the capacity, as a share of the capacity right before and after.
    starting_rss_bytes, peak_rss_bytes, peak_device_bytes:
                the most memory until it answered, and in the whole run.
    loaded_device_bytes:
                what it took on the device when it had answered its first requests; 0 once it is closed.
    device_before:
                what was taken on the device before it started, without the other systems.
    """

    system: System
    supply: Supply
    state: str = "not measured"
    slices: dict[LoadPlan, list[Slice]] = field(default_factory=lambda: defaultdict(list))
    offered: dict[LoadPlan, list[float]] = field(default_factory=lambda: defaultdict(list))
    rate: float = 1.0
    clients: LoadPlan | None = None
    capacity: list[float] = field(default_factory=list)
    saturated: tuple[LoadPlan, str] | None = None
    goodputs: list[float] = field(default_factory=list)
    starting_rss_bytes: int | None = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None
    loaded_device_bytes: int = 0
    device_before: int | None = None

    @property
    def name(self) -> str:
        return self.system.name

    @property
    def is_well(self) -> bool:
        return self.state == "measured"

    @property
    def answers(self) -> Answers:
        """The verdicts on texts that were asked unchanged."""
        found: dict[tuple[int, int], dict[str, Answer]] = defaultdict(dict)
        for slices in self.slices.values():
            for one in (sample for each in slices for sample in each.measured if not sample.job.repeat):
                found[one.job.conversation, one.turn].update(one.reply.verdicts)
        return found

    def keep(self, plan: LoadPlan, found: Slice, offered: float | None) -> None:
        """Add a slice."""
        self.slices[plan].append(found)
        if offered is not None:
            self.offered[plan].append(offered)
        else:
            self.rate = found.conversations_per_s or self.rate


def closed_load(supply: Supply, concurrency: int, num: int, timeout_s: float, *, counts: bool | None = None) -> Load:
    """Return a closed loop of `num` measured conversations, between as many others as there are clients."""
    phases: Sequence[tuple[Phase, int]] = (("warm-up", concurrency), ("measured", num), ("cool-down", concurrency))
    planned = [phase for phase, count in phases for _ in range(count)]
    jobs = tuple(
        supply.take(phase, index, counts=counts if phase == "measured" else None) for index, phase in enumerate(planned)
    )
    return Load(jobs=jobs, concurrency=concurrency, timeout_s=timeout_s)


def open_load(supply: Supply, rate: float, seconds: float, timeout_s: float, seed: str) -> Load:
    """Return an open loop. Arrivals are measured for `seconds`, after a quarter of that as a warm-up, or for longer if
    fewer than FEWEST would come. They go on for at most as long again, until the measured ones are answered."""
    seconds = max(seconds, FEWEST / rate)
    begin, end = seconds / 4, seconds / 4 + seconds
    jobs: list[Job] = []
    for at_s in arrivals(rate, end + seconds, seed):
        phase: Phase = "warm-up" if at_s <= begin else "measured" if at_s <= end else "cool-down"
        jobs.append(supply.take(phase, len(jobs), at_s))
    return Load(jobs=tuple(jobs), window_s=(begin, end), timeout_s=timeout_s)
