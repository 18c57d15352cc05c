"""Turns the samples of a system's slices into figures. Pure arithmetic."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.bench.call import Reply
from loraplex.bench.load import Load, Sample
from loraplex.bench.work import Work
from loraplex.measuring.cores import Busy
from loraplex.measuring.samples import percentile, spread

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
BUSY = ("client", "system", "others")
FEWEST_SAMPLES = {"p50": 1, "p90": 10, "p99": 100}  # with fewer, the percentile is the largest of them
WAITED = ("ok", "timeout")  # a request that was given up took at least as long as it was waited for
Latency = tuple[float, bool]  # seconds, and whether the request was given up then
ENOUGH = 0.95  # of what was offered must be answered, or the system is saturated
BY_CHANCE = 2  # conversations by which a slice's answers and arrivals differ all the same
DEVIATIONS = 2  # of the number of arrivals, which chance makes too


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A system under one load for a while: the load, the samples of what has ended, and how busy the cores were."""

    load: Load
    samples: tuple[Sample, ...]
    busy: Busy | None = None

    @property
    def measured(self) -> list[Sample]:
        return [one for one in self.samples if one.job.phase == "measured"]

    @property
    def ends(self) -> list[tuple[float, bool]]:
        """When each conversation ended, in order, and whether all its verdicts came."""
        jobs = self._jobs()
        return sorted(
            (max(one.done_s for one in found), all(one.reply.status == "ok" for one in found))
            for found in jobs.values()
            if len(found) == found[0].job.num_calls
        )

    def _jobs(self) -> dict[int, list[Sample]]:
        jobs: dict[int, list[Sample]] = defaultdict(list)
        for one in self.samples:
            jobs[one.job.index].append(one)
        return jobs

    @property
    def window_s(self) -> tuple[float, float]:
        """When rates are counted. Closed loop: from the end of the last conversation of the warm-up to the end of as
        many more as are measured, so that all clients are at work at both. Open loop: when arrivals are measured."""
        if self.load.window_s is not None:
            return self.load.window_s
        ends = [end for end, _ in self.ends]
        num_warm = sum(job.phase == "warm-up" for job in self.load.jobs)
        num = sum(job.phase == "measured" for job in self.load.jobs)
        begin = ends[num_warm - 1] if 0 < num_warm <= len(ends) else 0.0
        return begin, ends[min(num_warm + num, len(ends)) - 1] if ends else begin

    def rate(self, amount: Callable[[Sample], float]) -> float | None:
        """Return the amount a second of what was answered in the window."""
        begin, end = self.window_s
        within = (one for one in self.samples if begin < one.done_s <= end and one.reply.status == "ok")
        return sum(map(amount, within)) / (end - begin) if end > begin else None

    @property
    def num_answered(self) -> int:
        """Conversations whose verdicts all came within the window."""
        begin, end = self.window_s
        return sum(is_ok and begin < at_s <= end for at_s, is_ok in self.ends)

    @property
    def conversations_per_s(self) -> float | None:
        begin, end = self.window_s
        return self.num_answered / (end - begin) if end > begin else None

    @property
    def all_verdicts_s(self) -> list[Latency]:
        """Seconds from a measured conversation's turn to all of its verdicts, for those that have all of them or waited
        for them until they were given up."""
        turns: dict[tuple[int, int], list[Sample]] = defaultdict(list)
        for one in self.measured:
            turns[one.job.index, one.turn].append(one)
        return [
            (
                max(one.done_s for one in found) - min(one.scheduled_s for one in found),
                any(one.reply.status == "timeout" for one in found),
            )
            for found in turns.values()
            if len(found) == len(found[0].job.turns[found[0].turn]) and all(one.reply.status in WAITED for one in found)
        ]


def latencies(slices: Iterable[Sequence[Latency]]) -> dict[str, Any]:
    """Return the percentiles of the seconds in milliseconds. `median` is that of all slices together, and `low` and
    `high` are those of single slices. Where too few latencies are known for a percentile, it is None: 100 for p99.

    n:         how many latencies; max: the largest of them.
    at_least:  the least of those that were given up; percentiles that are not below it are lower bounds."""
    kept = [list(one) for one in slices]
    by_slice = [[1000 * seconds for seconds, _ in one] for one in kept]
    together = [value for one in by_slice for value in one]
    found: dict[str, Any] = {}
    for name, share in PERCENTILES.items():
        found[name] = spread(percentile(one, share) for one in by_slice)
        if len(together) < FEWEST_SAMPLES[name]:
            found[name] = None
        elif found[name] is not None:
            found[name]["median"] = percentile(together, share)
    late = [1000 * seconds for one in kept for seconds, is_late in one if is_late]
    return {**found, "n": len(together), "max": max(together, default=None), "at_least": min(late, default=None)}


def figures(slices: Sequence[Slice], work: Work, gemm_flops_per_s: float | None) -> dict[str, Any]:
    """Return the figures of a load. See docs/bench.md for what each means."""
    measured = [one for a_slice in slices for one in a_slice.measured]
    others = [one for a_slice in slices for one in a_slice.samples if one.job.phase != "measured"]
    answered = [[one for one in a_slice.measured if one.reply.status == "ok"] for a_slice in slices]
    rates = [one.rate(work.of) for one in slices]
    flops = spread(rates)
    return {
        "slices": len(slices),
        "requests": _counts(measured),
        "excluded": _counts(others),
        "latency_ms": latencies(_waits(one.measured) for one in slices),
        "all_verdicts_ms": latencies(one.all_verdicts_s for one in slices),
        "requests_per_s": spread(one.rate(lambda _: 1) for one in slices),
        "conversations_per_s": spread(one.conversations_per_s for one in slices),
        "verdicts_per_s": spread(one.rate(lambda sample: len(sample.reply.verdicts)) for one in slices),
        "tokens_asked_per_s": spread(one.rate(lambda sample: sample.reply.prompt_tokens) for one in slices),
        "tokens_computed_per_s": spread(one.rate(lambda sample: sample.reply.computed_tokens) for one in slices),
        "http_adds_ms": spread(percentile(_added_ms(found), 0.5) for found in answered),
        "busy_cores": {
            name: spread(None if one.busy is None else getattr(one.busy, name) for one in slices) for name in BUSY
        },
        "share_of_gemm_rate": flops["median"] / gemm_flops_per_s if flops and gemm_flops_per_s else None,
    }


def _waits(samples: Iterable[Sample]) -> list[Latency]:
    return [(one.latency_s, one.reply.status == "timeout") for one in samples if one.reply.status in WAITED]


def _added_ms(samples: Iterable[Sample]) -> list[float]:
    """Milliseconds that requests took, beyond what the system says of them."""
    return [
        1000 * (one.done_s - one.sent_s) - one.reply.engine_ms for one in samples if one.reply.engine_ms is not None
    ]


def _counts(samples: Sequence[Sample]) -> dict[str, Any]:
    statuses = Counter(one.reply.status for one in samples)
    errors = Counter(one.reply.error or one.reply.status for one in samples if one.reply.status != "ok")
    return {
        **{status: statuses[status] for status in ("ok", "refused", "failed", "timeout")},
        "errors": dict(sorted(errors.items())),
    }


def turns(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """Return the figures of each turn: over all slices, of the requests that were answered."""
    found: dict[int, list[list[Sample]]] = defaultdict(lambda: [[] for _ in slices])
    for index, a_slice in enumerate(slices):
        for one in a_slice.measured:
            if one.reply.status in WAITED:
                found[one.turn][index].append(one)
    return [_turn(turn, by_slice) for turn, by_slice in sorted(found.items())]


def _turn(turn: int, by_slice: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    answered = [one.reply for each in by_slice for one in each if one.reply.status == "ok"]
    return {
        "turn": turn + 1,
        "conversations": len({(index, one.job.index) for index, each in enumerate(by_slice) for one in each}),
        "latency_ms": latencies(map(_waits, by_slice)),
        "tokens_asked": _mean([one.prompt_tokens for one in answered]),
        "tokens_computed": _mean([one.computed_tokens for one in answered]),
        "cached_share": _share(answered),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _share(replies: Sequence[Reply]) -> float | None:
    """The part of the asked tokens that was not computed."""
    asked = sum(one.prompt_tokens for one in replies)
    return sum(one.cached_tokens for one in replies) / asked if asked else None


def saturation(slices: Sequence[Slice]) -> str | None:
    """Return why an open loop's slices were more than the system could answer; None where they were not.

    What arrives in a slice and is not answered in it makes the queue longer."""
    arrived = answered = 0
    for one in slices:
        begin, end = one.window_s
        arrived += sum(begin < job.at_s <= end for job in one.load.jobs)
        answered += one.num_answered
    refused = sum(sample.reply.status == "refused" for one in slices for sample in one.measured)
    if refused:
        return f"{refused} requests were refused"
    chance = max(BY_CHANCE * len(slices), DEVIATIONS * math.sqrt(arrived))
    if answered < min(ENOUGH * arrived, arrived - chance):
        return f"{answered} of {arrived} conversations were answered in time"
    return None
