"""The load generator against systems that are simulated, on a virtual clock."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

import virtual
from loraplex.bench.call import Call, Reply
from loraplex.bench.load import Ask, Job, Load, Phase, Sample, arrivals, generate

OK = Reply(status="ok")


class Server:
    """Answers one request at a time, each after `seconds`, and stalls from `stall_s[0]` to `stall_s[1]`."""

    def __init__(self, seconds: float, stall_s: tuple[float, float] = (0.0, 0.0), max_waiting: int = 10**9) -> None:
        self.seconds, self.stall_s, self.max_waiting = seconds, stall_s, max_waiting
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._at_once = 0
        self._free = asyncio.Lock()

    async def ask(self, call: Call) -> Reply:
        if self._at_once >= self.max_waiting:
            return Reply(status="refused", error="queue_full")
        self.calls.append(call)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            async with self._free:
                now = asyncio.get_running_loop().time()
                begin, end = self.stall_s
                await asyncio.sleep(self.seconds + (end - now if begin <= now < end else 0))
        finally:
            self._at_once -= 1
        return OK


def job(index: int, phase: Phase = "measured", at_s: float = 0.0, turns: int = 1, calls: int = 1) -> Job:
    one = tuple(Call(input=f"text {index}", classifiers=(f"c{i}",)) for i in range(calls))
    return Job(index=index, conversation=index, turns=(one,) * turns, phase=phase, at_s=at_s)


def jobs(phases: Sequence[Phase], **more: int) -> tuple[Job, ...]:
    return tuple(job(index, phase, **more) for index, phase in enumerate(phases))


def run(ask: Ask, load: Load) -> list[Sample]:
    return virtual.run(generate(ask, load))


def test_a_closed_loop_keeps_its_clients_busy_and_ends_with_the_last_measured_conversation() -> None:
    server = Server(1.0)
    counts: dict[Phase, int] = {"warm-up": 3, "measured": 9, "cool-down": 3}
    phases = [phase for phase, num in counts.items() for _ in range(num)]
    samples = run(server.ask, Load(jobs=jobs(phases), concurrency=3))
    assert server.most_at_once == 3
    # The cool-down keeps three at work until the last measured one is answered; what runs then is dropped.
    assert Counter(one.job.phase for one in samples) == {"warm-up": 3, "measured": 9}
    assert [one.done_s for one in samples] == pytest.approx(range(1, 13))
    assert all(one.latency_s == pytest.approx(min(3, one.done_s)) for one in samples)


def test_a_stall_shows_in_what_should_have_been_sent_meanwhile() -> None:
    """Coordinated omission: a client that waits for the stalled answer would record one slow request, not 50."""
    planned = tuple(job(i, at_s=i * 0.1) for i in range(100))
    samples = run(Server(0.01, stall_s=(2.0, 7.0)).ask, Load(jobs=planned, window_s=(0.0, 10.0)))
    assert len(samples) == 100
    assert sum(one.latency_s > 0.5 for one in samples) == pytest.approx(50, abs=3)
    assert max(one.latency_s for one in samples) == pytest.approx(5.0, abs=0.1)
    assert [one.scheduled_s for one in sorted(samples, key=lambda one: one.job.index)] == [one.at_s for one in planned]


def test_an_open_loop_goes_on_until_the_measured_ones_are_answered() -> None:
    server = Server(2.0)  # half as fast as the arrivals
    planned = tuple(job(i, "measured" if 5 <= i < 10 else "warm-up" if i < 5 else "cool-down", i) for i in range(60))
    samples = run(server.ask, Load(jobs=planned, window_s=(5.0, 10.0)))
    assert sum(one.job.phase == "measured" for one in samples) == 5
    assert max(one.done_s for one in samples) == 20
    assert 19 <= len(server.calls) <= 21, "conversations went on to arrive after the end"


def test_poisson_arrivals_are_drawn_from_the_seed() -> None:
    found = arrivals(50.0, 200.0, "0 native")
    assert found == arrivals(50.0, 200.0, "0 native") != arrivals(50.0, 200.0, "1 native")
    assert found == sorted(found) and 0 < found[0] and found[-1] < 200
    assert len(found) == pytest.approx(10_000, rel=0.05)
    gaps = [b - a for a, b in pairwise(found)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.1), "the gaps of Poisson arrivals are exponential"


@pytest.mark.parametrize("is_open", [False, True])
def test_a_turn_waits_for_the_turn_before_it(is_open: bool) -> None:
    planned = (job(0, turns=3, calls=2, at_s=1.0 if is_open else 0.0),)
    samples = run(Server(1.0).ask, Load(jobs=planned, concurrency=None if is_open else 1))
    assert [one.turn for one in samples] == [0, 0, 1, 1, 2, 2]
    start = 1 if is_open else 0
    # In the open loop both calls of a turn are sent at once, and the later one's latency holds its wait.
    latency = [1, 2] * 3 if is_open else [1] * 6
    assert [one.latency_s for one in samples] == pytest.approx(latency)
    assert [one.done_s for one in samples] == pytest.approx([start + i for i in range(1, 7)])


def test_what_is_refused_or_late_is_a_sample_like_any_other() -> None:
    server = Server(1.0, max_waiting=2)
    samples = run(server.ask, Load(jobs=tuple(job(i, at_s=0.1 * i) for i in range(8))))
    assert Counter(one.reply.status for one in samples) == {"ok": 2, "refused": 6}
    samples = run(Server(10.0).ask, Load(jobs=jobs(["measured"] * 2), concurrency=1, timeout_s=4.0))
    assert [(one.reply.status, one.latency_s) for one in samples] == [("timeout", 4.0)] * 2


def test_a_client_that_was_refused_waits_before_it_asks_again() -> None:
    async def refuse(call: Call) -> Reply:
        return Reply(status="refused", error="queue_full")

    samples = run(refuse, Load(jobs=jobs(["measured"] * 4), concurrency=1))
    assert [one.sent_s for one in samples] == [0, 1, 2, 3]


def test_a_mistake_in_a_system_is_raised() -> None:
    async def wrong(call: Call) -> Reply:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        run(wrong, Load(jobs=jobs(["measured"] * 2), concurrency=2))
    assert caught.group_contains(ZeroDivisionError)


def test_a_load_without_measured_conversations_ends_at_once() -> None:
    assert run(Server(1.0).ask, Load(jobs=jobs(["warm-up"]), concurrency=1)) == []
