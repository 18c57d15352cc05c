"""The one load generator, for every system and transport: closed loop, open loop, turns. Knows no HTTP.

Times are seconds of the event loop's clock since the load began, so that a test can bring its own clock.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loraplex.bench.call import Call, Reply

BACKOFF_S = 1.0  # a client of the closed loop waits so long after a request that was not answered

Phase = Literal["warm-up", "measured", "cool-down"]
Ask = Callable[[Call], Awaitable[Reply]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One conversation of a load.

    index:         its place among the load's jobs.
    conversation:  its number in the data; a conversation can stand in a load more than once.
    turns:         the calls of each turn. A turn begins when the one before it is answered.
    at_s:          when the conversation arrives, in an open loop.
    repeat:        how often this run has asked it before. A repeated text begins with a number, so no cache knows it.
    """

    index: int
    conversation: int
    turns: tuple[tuple[Call, ...], ...]
    phase: Phase = "measured"
    at_s: float = 0.0
    repeat: int = 0

    @property
    def num_calls(self) -> int:
        return sum(map(len, self.turns))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Conversations, and how they are asked.

    concurrency:  a closed loop of so many clients. Each takes the next conversation and asks its calls one after the
                  other. None: an open loop, in which conversations arrive at their time, and the calls of a turn are
                  asked at once.
    window_s:     open loop: when arrivals are measured. Arrivals go on after it until all of those are answered.
    timeout_s:    a request that takes longer is given up.
    """

    jobs: tuple[Job, ...]
    concurrency: int | None = None
    window_s: tuple[float, float] | None = None
    timeout_s: float = 300.0

    def to_json(self) -> dict[str, Any]:
        return {
            "jobs": [
                {
                    "conversation": job.conversation,
                    "turns": [[call.body for call in calls] for calls in job.turns],
                    "phase": job.phase,
                    "at_s": job.at_s,
                }
                for job in self.jobs
            ],
            "concurrency": self.concurrency,
            "window_s": self.window_s,
            "timeout_s": self.timeout_s,
        }

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> "Load":
        jobs = tuple(
            Job(
                index=index,
                conversation=job["conversation"],
                turns=tuple(tuple(map(Call.from_body, calls)) for calls in job["turns"]),
                phase=job["phase"],
                at_s=job["at_s"],
            )
            for index, job in enumerate(given["jobs"])
        )
        window_s = given["window_s"]
        return cls(**{**given, "jobs": jobs, "window_s": None if window_s is None else tuple(window_s)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request that has ended. scheduled_s: when it should have been sent; latency counts from there."""

    job: Job
    turn: int
    classifiers: tuple[str, ...]
    scheduled_s: float
    sent_s: float
    done_s: float
    reply: Reply

    @property
    def latency_s(self) -> float:
        return self.done_s - self.scheduled_s

    def to_json(self) -> list[Any]:
        times = self.scheduled_s, self.sent_s, self.done_s
        return [self.job.index, self.turn, self.classifiers, times, self.reply.to_json()]

    @classmethod
    def from_json(cls, given: list[Any], load: Load) -> "Sample":
        """load: the one that was sampled."""
        index, turn, classifiers, (scheduled_s, sent_s, done_s), reply = given
        return cls(
            job=load.jobs[index],
            turn=turn,
            classifiers=tuple(classifiers),
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            done_s=done_s,
            reply=Reply.from_json(reply),
        )


def arrivals(rate: float, end_s: float, seed: str) -> list[float]:
    """Return the times of Poisson arrivals at `rate` a second, up to `end_s`."""
    draw, at_s, found = random.Random(seed), 0.0, []
    while (at_s := at_s + draw.expovariate(rate)) < end_s:
        found.append(at_s)
    return found


async def generate(ask: Ask, load: Load, tell: Callable[[], None] = lambda: None) -> list[Sample]:
    """Ask all calls of a load. Returns when the last measured conversation has ended. What still runs then is
    cancelled, and has no sample. tell: called at the end of each conversation."""
    run = _Run(ask, load, tell)
    async with asyncio.TaskGroup() as group:
        if load.concurrency is None:
            tasks = [group.create_task(run.arrive(job)) for job in load.jobs]
        else:
            jobs = iter(load.jobs)
            tasks = [group.create_task(run.client(jobs)) for _ in range(load.concurrency)]
        await run.over.wait()
        for task in tasks:
            task.cancel()
    return run.samples


class _Run:
    def __init__(self, ask: Ask, load: Load, tell: Callable[[], None]) -> None:
        self._ask, self._load, self._tell = ask, load, tell
        self._clock = asyncio.get_running_loop().time
        self._started = self._clock()
        self._num_left = sum(job.phase == "measured" for job in load.jobs)
        self.samples: list[Sample] = []
        self.over = asyncio.Event()
        if not self._num_left:
            self.over.set()

    def _now(self) -> float:
        return self._clock() - self._started

    async def client(self, jobs: Iterator[Job]) -> None:
        """Ask conversations one after the other, as long as there are any."""
        for job in jobs:
            is_ok = True
            for turn, calls in enumerate(job.turns):
                for call in calls:
                    sample = await self._one(job, turn, call, self._now())
                    is_ok &= sample.reply.status == "ok"
            self._end(job)
            if not is_ok:
                await asyncio.sleep(BACKOFF_S)

    async def arrive(self, job: Job) -> None:
        """Wait for the conversation's time, then ask its turns."""
        scheduled_s = job.at_s
        await asyncio.sleep(scheduled_s - self._now())
        for turn, calls in enumerate(job.turns):
            await asyncio.gather(*(self._one(job, turn, call, scheduled_s) for call in calls))
            scheduled_s = self._now()
        self._end(job)

    async def _one(self, job: Job, turn: int, call: Call, scheduled_s: float) -> Sample:
        sent_s = self._now()
        try:
            async with asyncio.timeout(self._load.timeout_s):
                reply = await self._ask(call)
        except TimeoutError:
            reply = Reply(status="timeout", error="timeout")
        sample = Sample(
            job=job,
            turn=turn,
            classifiers=call.classifiers,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            done_s=self._now(),
            reply=reply,
        )
        self.samples.append(sample)
        return sample

    def _end(self, job: Job) -> None:
        self._num_left -= job.phase == "measured"
        self._tell()
        if not self._num_left:
            self.over.set()
