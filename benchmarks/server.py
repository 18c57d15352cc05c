"""What a server does under load: requests that arrive whether or not the ones before them were answered.

    python -m benchmarks.server --json FILE --plot FILE.svg

Starts `loraplex serve` on a bundle (the demo's) in a process of its own and asks every classifier about conversations
that no other request repeats. First one request at a time: what HTTP adds to the engine. Then as many clients as keep
it busy: its capacity. Then open-loop Poisson arrivals at shares of that capacity, in an order that is drawn anew each
round. The figures are over all rounds. What is answered under overload is compared with the capacity measured right
before and right after it: the machine's speed changes.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

BUNDLE = Path(__file__).parent.parent / "examples" / "support_desk" / "bundle"
OVERLOAD = 2.0
LOADS = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, OVERLOAD)  # shares of the capacity
NUM_TURNS, TIMEOUT_S = 12, 30.0
WORDS = (
    "I you we the a to for with my your order booking flight hotel room table account card payment refund "
    "ticket restaurant doctor bus train seat date time please thanks can could would like need want find "
    "book change cancel confirm help tomorrow monday evening two three four cheap near center address "
    "phone number email name city is are it that this "
).split()


@dataclass(slots=True, kw_only=True)
class Outcomes:
    """Of the requests at one rate. seconds: from a request's planned arrival to its answer, of those answered."""

    offered: float
    duration_s: float = 0.0
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def report(self) -> dict[str, Any]:
        total = sum(self.statuses.values())
        return {
            "offered_per_s": self.offered,
            "answered_per_s": self.statuses["200"] / self.duration_s,
            "p50_ms": percentile(self.seconds, 0.5),
            "p99_ms": percentile(self.seconds, 0.99),
            "refused": self.statuses["429"] / max(1, total),
            "timed_out": self.statuses["timeout"],
            "other": total - self.statuses["200"] - self.statuses["429"] - self.statuses["timeout"],
        }


def percentile(seconds: list[float], share: float) -> float | None:
    return 1000 * sorted(seconds)[int(share * (len(seconds) - 1))] if seconds else None


@contextlib.contextmanager
def served(bundle: str, *options: str) -> Iterator[str]:
    """The server's URL."""
    command = [sys.executable, "-m", "loraplex.cli.main", "serve", bundle, "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://[^/ ]+", process.stdout.readline())
        assert found, f"the server did not start: {' '.join(command)}"
        try:
            yield found[0]
        finally:
            process.terminate()


class Load:
    """The clients are bare sockets: what a client's library takes is not what HTTP adds to the engine, and the server
    would lack it."""

    def __init__(self, url: str, num_classifiers: int | None, seed: int) -> None:
        self.random = random.Random(seed)
        host, _, port = url.removeprefix("http://").partition(":")
        self._address = host, int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        models = httpx.get(f"{url}/v1/models").json()["data"]
        names = [model["id"] for model in models if model.get("parent")]
        self._classifiers = names[:num_classifiers]

    @property
    def num_classifiers(self) -> int:
        return len(self._classifiers)

    def request(self) -> bytes:
        """About a conversation that no other begins like."""
        turns = [
            f"{('Customer', 'Agent')[i % 2]}: {' '.join(self.random.choices(WORDS, k=self.random.randint(6, 18)))}"
            for i in range(NUM_TURNS - 1)
        ]
        body = json.dumps({"input": "\n".join(turns), "classifiers": self._classifiers}).encode()
        head = b"POST /v1/classify HTTP/1.1\r\nHost: benchmark\r\nContent-Type: application/json\r\n"
        return head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    async def ask(self) -> str:
        """The answer's status, or "timeout" or what else went wrong."""
        connection = None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                reader, writer = connection = self._take() or await asyncio.open_connection(*self._address)
                writer.write(self.request())
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(content_length(head))
        except (TimeoutError, OSError, EOFError) as exc:
            if connection is not None:
                connection[1].close()
            return "timeout" if isinstance(exc, TimeoutError) else type(exc).__name__
        self._idle.append(connection)
        return head.split(maxsplit=2)[1].decode()

    def _take(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """One that the server has not closed."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    def one_at_a_time(self, num: int) -> tuple[list[float], list[float], int]:
        """Seconds as the client sees them and as the engine tells them, and tokens asked for in one request."""
        seen, told, tokens = [], [], []
        with socket.create_connection(self._address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(num):
                request = self.request()
                started = time.perf_counter()
                sock.sendall(request)
                read = read_answer(sock)
                seen.append(time.perf_counter() - started)
                answer = json.loads(read)
                told.append(answer["timings"]["total_ms"] / 1000)
                tokens.append(answer["usage"]["prompt_tokens"])
        return seen, told, round(statistics.median(tokens))

    async def capacity(self, num_clients: int, duration_s: float) -> float:
        """Requests a second while `num_clients` ask one after the other, and wait a second where they are refused."""
        num = 0
        end = time.perf_counter() + duration_s

        async def client() -> None:
            nonlocal num
            while time.perf_counter() < end:
                status = await self.ask()
                num += status == "200"
                await asyncio.sleep(status == "429")

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(num_clients)))
        return num / (time.perf_counter() - started)

    async def arrive(self, outcomes: Outcomes, duration_s: float) -> float:
        """Poisson arrivals at the offered rate. Answers a second, until the last one has come."""
        num_before = outcomes.statuses["200"]

        async def request(arrival: float) -> None:
            status = await self.ask()
            outcomes.statuses[status] += 1
            if status == "200":
                outcomes.seconds.append(time.perf_counter() - arrival)

        started = arrival = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            while (arrival := arrival + self.random.expovariate(outcomes.offered)) < started + duration_s:
                await asyncio.sleep(arrival - time.perf_counter())
                group.create_task(request(arrival))
        seconds = time.perf_counter() - started
        outcomes.duration_s += seconds
        return (outcomes.statuses["200"] - num_before) / seconds


def read_answer(sock: socket.socket) -> bytes:
    """The body of the next answer."""
    received = b""
    while True:
        piece = sock.recv(1 << 16)
        assert piece, f"the server closed the connection after {received!r}"
        received += piece
        head, end, body = received.partition(b"\r\n\r\n")
        if end and len(body) >= content_length(head):
            return body


def content_length(head: bytes) -> int:
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert length, f"an answer without a length: {head!r}"
    return int(length[1])


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    load = Load(url, args.classifiers, args.seed)
    load.one_at_a_time(3)
    seen, told, num_tokens = load.one_at_a_time(args.requests)
    await load.capacity(args.clients, args.seconds / 4)  # warm
    capacities = [await load.capacity(args.clients, args.seconds)]
    rates = {share: Outcomes(offered=share * capacities[0]) for share in LOADS}
    runs = [share for _ in range(args.rounds) for share in load.random.sample(LOADS, len(LOADS))]
    goodputs: list[float] = []
    for share in track(runs, "open loop", console=Console(stderr=True)):
        if share < OVERLOAD:
            await load.arrive(rates[share], args.seconds)
            continue
        before = await load.capacity(args.clients, args.seconds)
        rates[share].offered = share * before
        answered = await load.arrive(rates[share], args.seconds)
        capacities += [before, await load.capacity(args.clients, args.seconds)]
        goodputs.append(answered / statistics.mean(capacities[-2:]))
    reports = {share: outcomes.report() for share, outcomes in rates.items() if args.rounds}
    seen_ms, told_ms = 1000 * statistics.median(seen), 1000 * statistics.median(told)
    return {
        "classifiers": load.num_classifiers,
        "prompt_tokens": num_tokens,
        "latency": {
            "http_p50_ms": seen_ms,
            "engine_p50_ms": told_ms,
            "http_adds_ms": 1000 * statistics.median(a - b for a, b in zip(seen, told, strict=True)),
        },
        "capacity_per_s": statistics.median(capacities),
        "capacities_per_s": capacities,
        "loads": reports,
        "goodput_at_2x": statistics.mean(goodputs) if goodputs else None,
        "goodputs_at_2x": goodputs,
    }


def show(report: dict[str, Any]) -> None:
    console = Console()
    latency = report["latency"]
    console.print(
        f"{report['classifiers']} classifiers, {report['prompt_tokens']} prompt tokens a request. One at a time: HTTP "
        f"p50 {latency['http_p50_ms']:.1f} ms, engine p50 {latency['engine_p50_ms']:.1f} ms, HTTP adds "
        f"{latency['http_adds_ms']:.2f} ms. Capacity: {report['capacity_per_s']:.1f} requests/s."
    )
    if not report["loads"]:
        return
    table = Table("load", "offered/s", "answered/s", "p50 ms", "p99 ms", "429", "timed out", "other")
    for share, one in report["loads"].items():
        numbers = [f"{one[key]:.1f}" for key in ("offered_per_s", "answered_per_s")]
        times = [f"{one[key]:.0f}" if one[key] is not None else "" for key in ("p50_ms", "p99_ms")]
        table.add_row(f"{share}x", *numbers, *times, f"{one['refused']:.0%}", str(one["timed_out"]), str(one["other"]))
    console.print(table)
    each = ", ".join(f"{one:.0%}" for one in report["goodputs_at_2x"])
    console.print(f"Answered at 2x: {report['goodput_at_2x']:.0%} of the capacity measured before and after ({each})")


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = list(report["loads"].values())
    offered = [one["offered_per_s"] for one in loads]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(offered, [one["p50_ms"] for one in loads], "o-", label="p50")
    left.plot(offered, [one["p99_ms"] for one in loads], "s-", label="p99")
    left.set(xlabel="offered requests/s", ylabel="latency of answered requests, ms", yscale="log")
    right.plot(offered, offered, ":", color="gray", label="offered")
    right.plot(offered, [one["answered_per_s"] for one in loads], "o-", label="answered")
    right.plot(offered, [one["refused"] * one["offered_per_s"] for one in loads], "s-", label="refused (429)")
    right.set(xlabel="offered requests/s", ylabel="requests/s")
    for axes in (left, right):
        axes.axvline(report["capacity_per_s"], color="lightgray", zorder=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=str(BUNDLE))
    parser.add_argument("--classifiers", type=int, help="ask the first so many; all by default")
    parser.add_argument("--requests", type=int, default=100, help="one at a time")
    parser.add_argument("--clients", type=int, default=16, help="that find out the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="at each rate in each round")
    parser.add_argument("--rounds", type=int, default=2, help="of open-loop arrivals; 0: only latency and capacity")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("options", nargs="*", help="behind --: more options of `loraplex serve`")
    args = parser.parse_args()
    with served(args.bundle, *args.options) as url:
        report = asyncio.run(measure(url, args))
    show(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot is not None:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
