"""Whole runs of the benchmark on systems that are simulated, in virtual time."""

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from typer.testing import CliRunner

import virtual
from loraplex.bench.call import Answer, Call, Reply
from loraplex.bench.figures import Slice
from loraplex.bench.load import Load, Sample, generate
from loraplex.bench.markdown import markdown
from loraplex.bench.measured import closed_load
from loraplex.bench.report import COLUMNS, report, report_text
from loraplex.bench.run import ALONE, Run
from loraplex.bench.sections import main_load
from loraplex.bench.settings import Prepared, Settings, prepare
from loraplex.bench.system import SystemEnded, Tell, Transport
from loraplex.cli.main import app
from loraplex.errors import ConfigurationError

SETTINGS = {"systems": ("native", "peft", "peft-mixed"), "seconds": 40.0, "slices": 3}


class Fake:
    """Answers `at_once` calls together in `seconds`, and refuses where `most` wait. Ends after `ends_after` calls."""

    transport: Transport = "http"
    shares_prefix = False
    facts: Mapping[str, Any] = MappingProxyType({})
    pid = None

    def __init__(
        self,
        name: str,
        seconds: float,
        most: int = 10**9,
        ends_after: int = 10**9,
        error: str = "",
        log: list[str] | None = None,
        at_once: int = 1,
    ) -> None:
        self.at_once = at_once
        self.name, self.seconds, self.most, self.ends_after, self.error = name, seconds, most, ends_after, error
        self.log = [] if log is None else log
        self.versions = {"loraplex": "1"}
        self._num_waiting = 0
        self.calls: list[Call] = []

    async def start(self, classifiers: Sequence[str]) -> None:
        self.log.append(f"start {self.name}")
        self._free = asyncio.Semaphore(self.at_once)
        if self.error:
            raise ConfigurationError("base", self.error, remedy="none")

    async def ask(self, call: Call) -> Reply:
        if self._num_waiting >= self.most:
            return Reply(status="refused", error="queue_full")
        self.calls.append(call)
        self._num_waiting += 1
        try:
            async with self._free:
                await asyncio.sleep(self.seconds)
        finally:
            self._num_waiting -= 1
        tokens = len(call.classifiers) * 100
        verdicts = {name: Answer(label="yes", scores={"yes": 0.75, "no": 0.25}) for name in call.classifiers}
        return Reply(
            status="ok",
            verdicts=verdicts,
            prompt_tokens=tokens,
            computed_tokens=tokens,
            engine_ms=1.0,
            is_cut="hello 7" in str(call.input),
        )

    async def run(self, load: Load, tell: Tell) -> list[Sample]:
        self.log.append(self.name)
        if len(self.calls) >= self.ends_after:
            raise SystemEnded("it ended with status -9")
        return await generate(self.ask, load, tell)

    async def close(self) -> None:
        self.log.append(f"close {self.name}")


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take real time."""
    monkeypatch.setattr("loraplex.bench.run.gemm_rate", lambda *_: 1e9)
    monkeypatch.setattr("loraplex.bench.run.bandwidth", lambda *_: 1e9)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"text": f"Customer: hello {i}", "labels": {"task0": i % 4 != 0}} for i in range(60)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def settings(bundle: Path, data: Path, **more: Any) -> Settings:
    return Settings(bundle=str(bundle), data=data, out=data.parent / "out", **{**SETTINGS, **more})


def measured(given: Settings, fakes: Mapping[str, Fake]) -> tuple[dict[str, Any], Run]:
    def open_system(prepared: Prepared, name: str) -> Fake:
        return fakes[name]

    run = Run(prepare(given), open_system)
    shown: list[tuple[float, float]] = []
    virtual.run(run.measure(lambda what, done, total: shown.append((done, total))))
    assert all(done <= total for done, total in shown) and shown
    return json.loads(report_text(report(run))), run


def test_systems_take_turns_and_get_the_same_conversations(tiny_bundle: Path, data: Path) -> None:
    log: list[str] = []
    fakes = {name: Fake(name, seconds, log=log) for name, seconds in (("native", 0.5), ("peft", 2.0))}
    given = settings(tiny_bundle, data, systems=("native", "peft"), concurrency=4)
    found, run = measured(given, fakes)
    assert log[:4] == ["start native", "native", "start peft", "peft"]
    assert [set(log[i : i + 2]) for i in (4, 6, 8)] == [{"native", "peft"}] * 3
    assert set(log[10:]) == {"close native", "close peft"}
    asked = [
        [str(call.input) for call in fake.calls if str(call.input).startswith("Customer")] for fake in fakes.values()
    ]
    assert asked[0] == asked[1] and len(asked[0]) == 60
    native, peft = found["systems"]["native"], found["systems"]["peft"]
    [load] = native["loads"]
    assert load["requests"]["ok"] == 60 and load["slices"] == 3 and load["concurrency"] == 4
    assert load["conversations_per_s"]["median"] == pytest.approx(2.0)
    assert peft["loads"][0]["conversations_per_s"]["median"] == pytest.approx(0.5)
    assert load["verdicts_per_s"]["median"] == pytest.approx(6.0), "three classifiers have contracts"
    assert load["latency_ms"]["p50"]["median"] == pytest.approx(2000), "four clients wait for each other"
    assert native["quality"]["classifiers"]["task0"] == {
        **{"n": 60, "positives": 45, "accuracy": 0.75, "f1": pytest.approx(6 / 7)}
    }
    assert native["agreement"]["with"] == "peft" and native["agreement"]["labels_equal"] == 180
    assert peft["agreement"] is None and not native["saturation"]["reached"]
    assert len(run.gemm) == 3 and found["limits"]["gemm_flops_per_s"]["rounds"] == 3
    assert found["samples"]["columns"] == COLUMNS and all(len(row) == len(COLUMNS) for row in found["samples"]["rows"])
    assert sum(row[3] == "measured" for row in found["samples"]["rows"]) == 120
    text = markdown(found)
    assert "| P50 latency | 45 ms | 18 ms | 2,000 (2,000-2,000) ms | 8,000 (8,000-8,000) ms |" in text


def test_a_sweep_finds_where_each_system_is_saturated(tiny_bundle: Path, data: Path) -> None:
    fakes = {"native": Fake("native", 0.25), "peft": Fake("peft", 1.0), "peft-mixed": Fake("peft-mixed", 0.5, most=9)}
    found, _ = measured(settings(tiny_bundle, data, sweep=True, seconds=30.0), fakes)
    for name, capacity in (("native", 4.0), ("peft", 1.0), ("peft-mixed", 2.0)):
        one = found["systems"][name]
        told = one["saturation"]
        assert told["conversations_per_s"]["median"] == pytest.approx(capacity, rel=0.05)
        assert told["reached"] and told["why"]
        shares = [load["share_of_capacity"] for load in one["loads"] if load["kind"] == "open"]
        assert shares[:3] == [0.25, 0.5, 0.75] and shares[-1] == 2.0, "it was offered more and more"
        stopped = shares[-2]
        assert 0.75 <= stopped <= 1.5 and told["at"] == (
            f"open, {stopped * capacity:.3g} conversations/s offered ({stopped:g}x the capacity)"
        )
        assert one["goodput_at_2x"]["median"] == pytest.approx(1.0, abs=0.05), "a queue without a limit loses nothing"
    refused = found["systems"]["peft-mixed"]["loads"][-1]["requests"]
    assert refused["refused"] > 0 and refused["errors"] == {"queue_full": refused["refused"]}
    alone = found["systems"]["native"]["loads"][0]
    assert alone["concurrency"] == 1 and alone["http_adds_ms"]["median"] == pytest.approx(249)
    assert "## Saturation" in markdown(found)


def test_a_sweep_finds_the_capacity_of_a_system_that_batches(tiny_bundle: Path, data: Path) -> None:
    """Eight clients reach 8 conversations/s of its 64."""
    fake = Fake("native", 1.0, at_once=64)
    given = settings(tiny_bundle, data, systems=("native",), sweep=True, seconds=5.0, slices=1)
    one = measured(given, {"native": fake})[0]["systems"]["native"]
    told = one["saturation"]
    assert told["conversations_per_s"]["median"] == pytest.approx(64, rel=0.05)
    assert told["reached"] and told["clients"] == 64
    clients = [load["concurrency"] for load in one["loads"] if load["kind"] == "closed"]
    assert clients == [1, 8, 16, 32, 64, 128] and main_load(one)["concurrency"] == 64


def test_a_sweep_doubles_its_clients_until_some_are_refused(tiny_bundle: Path, data: Path) -> None:
    fake = Fake("native", 1.0, at_once=64, most=20)
    given = settings(tiny_bundle, data, systems=("native",), sweep=True, seconds=5.0, slices=1)
    assert measured(given, {"native": fake})[0]["systems"]["native"]["saturation"]["clients"] == 16


def test_a_rate_above_the_capacity_is_saturation(tiny_bundle: Path, data: Path) -> None:
    found, _ = measured(settings(tiny_bundle, data, systems=("native",), rate=8.0), {"native": Fake("native", 0.25)})
    told = found["systems"]["native"]["saturation"]
    assert told["reached"] and told["at"] == "open, 8 conversations/s offered"
    assert told["conversations_per_s"]["median"] == pytest.approx(4.0, rel=0.02)
    assert "| Loraplex | 4 (4-4) | open, 8 conversations/s offered: " in markdown(found)
    assert "conversations arrived" not in markdown(found)


def test_too_few_arrivals_are_told(tiny_bundle: Path, data: Path) -> None:
    given = settings(tiny_bundle, data, systems=("native",), rate=1.0, seconds=10.0, slices=2)
    found, _ = measured(given, {"native": Fake("native", 0.25)})
    num = found["systems"]["native"]["loads"][0]["conversations"]
    assert 0 < num < 100 and f"only {num} conversations arrived" in markdown(found)


def test_an_open_loop_at_a_rate(tiny_bundle: Path, data: Path) -> None:
    found, _ = measured(settings(tiny_bundle, data, systems=("native",), rate=1.0), {"native": Fake("native", 0.25)})
    [load] = found["systems"]["native"]["loads"]
    assert load["kind"] == "open" and load["offered_per_s"] == 1.0
    assert 60 < load["requests"]["ok"] < 180, "40 s in each of three slices"
    assert not found["systems"]["native"]["saturation"]["reached"]


@pytest.mark.parametrize("systems", [("native",), ("native", "peft")])
def test_device_memory_is_at_most_what_a_system_had_at_once(
    systems: tuple[str, ...], tiny_bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system alone gives its cache back between slices, and takes it again in each. Two keep theirs."""
    taken = {"before": 1000}

    class Caches(Fake):
        pid = os.getpid()  # type: ignore[assignment]

        async def start(self, classifiers: Sequence[str]) -> None:
            await super().start(classifiers)
            taken[self.name] = 100

        async def run(self, load: Load, tell: Tell) -> list[Sample]:
            found = await super().run(load, tell)
            taken[self.name] = 500
            return found

    def load_after_a_pause(*arguments: Any, **more: Any) -> Load:
        if len(systems) == 1:
            taken["native"] = 100
        return closed_load(*arguments, **more)

    monkeypatch.setattr("loraplex.bench.run.closed_load", load_after_a_pause)
    for module in ("bench.run", "measuring.memory"):
        monkeypatch.setattr(f"loraplex.{module}.used_device_bytes", lambda _: sum(taken.values()))
    fakes = {name: Caches(name, 0.1) for name in systems}
    found, _ = measured(settings(tiny_bundle, data, systems=systems, concurrency=1, slices=6), fakes)
    assert [one["memory"]["peak_device_bytes"] for one in found["systems"].values()] == [500] * len(systems)


def test_a_system_that_fails_is_named_and_the_others_go_on(tiny_bundle: Path, data: Path) -> None:
    fakes = {
        "native": Fake("native", 0.5),
        "peft": Fake("peft", 0.5, error="no such base"),
        "peft-mixed": Fake("peft-mixed", 0.5, ends_after=30),
    }
    found, _ = measured(settings(tiny_bundle, data, concurrency=2), fakes)
    systems = found["systems"]
    assert systems["native"]["loads"][0]["requests"]["ok"] == 60
    assert systems["peft"]["state"] == "failed: base: no such base (none)" and "loads" not in systems["peft"]
    assert fakes["peft"].log == ["start peft", "close peft", "close peft"], "it is stopped at once"
    assert systems["peft-mixed"]["state"] == "failed: it ended with status -9"
    assert systems["peft-mixed"]["loads"][0]["slices"] < 3, "what it had answered is kept"
    assert systems["native"]["agreement"]["with"] == "peft-mixed"
    assert "PEFT: failed: base: no such base" in markdown(found)


def test_a_system_that_answers_nothing_has_failed(tiny_bundle: Path, data: Path) -> None:
    given = settings(tiny_bundle, data, systems=("native",), concurrency=2)
    found, _ = measured(given, {"native": Fake("native", 1.0, most=0)})
    assert "answers none of its first requests: queue_full" in found["systems"]["native"]["state"]
    assert "None" not in markdown(found)


def test_with_one_slice_a_system_is_stopped_before_the_next_starts(tiny_bundle: Path, data: Path) -> None:
    log: list[str] = []
    fakes = {name: Fake(name, 0.1, log=log) for name in ("native", "peft")}
    measured(settings(tiny_bundle, data, systems=("native", "peft"), concurrency=1, slices=1), fakes)
    assert log == ["start native", "native", "native", "close native", "start peft", "peft", "peft", "close peft"]


def test_an_interrupted_run_stops_its_systems_and_keeps_what_it_measured(tiny_bundle: Path, data: Path) -> None:
    class Interrupts(Fake):
        async def run(self, load: Load, tell: Tell) -> list[Sample]:
            if self.log.count(self.name) == 3:  # the first one is before the slices
                raise KeyboardInterrupt
            return await super().run(load, tell)

    # Interrupted in its third slice, when peft may have had three.
    fakes = {"native": Interrupts("native", 0.5), "peft": Fake("peft", 0.5)}
    given = settings(tiny_bundle, data, systems=("native", "peft"), concurrency=2)
    run = Run(prepare(given), lambda _, name: fakes[name])
    run.measured["peft"].slices[ALONE].append(Slice(load=Load(jobs=()), samples=()))
    with pytest.raises(KeyboardInterrupt):
        virtual.run(run.measure())
    assert [fake.log[-1] for fake in fakes.values()] == ["close native", "close peft"]
    run.drop_unfinished()
    one, other = (run.measured[name] for name in fakes)
    [plan] = one.slices
    assert len(one.slices[plan]) == len(other.slices[plan]) == 2 and one.answers.keys() == other.answers.keys()
    assert other.slices.pop(ALONE), "what only one has finished stays"
    found = report(run, cut_short=True)
    assert found["systems"]["native"]["loads"][0]["slices"] == 2 and "was interrupted" in markdown(found)


def test_an_interrupt_before_a_slice_keeps_an_earlier_report(
    tiny_bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loraplex.cli.bench._measure", lambda run: False)
    file = data.parent / "out" / "report.json"
    command = ["bench", tiny_bundle, "--data", data, "--out", file.parent, "--systems", "native"]
    for earlier in ("", '{"kind": "bench"}'):
        if earlier:
            assert "before a slice was measured" in file.with_suffix(".md").read_text()
            file.write_text(earlier)
        found = CliRunner().invoke(app, list(map(str, command)))
        assert found.exit_code == 130, found.output
    assert file.read_text() == earlier


def test_conversations_that_were_cut_and_labels_of_nobody_are_told(tiny_bundle: Path, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[3]["labels"]["noSuch"] = rows[5]["labels"]["noSuch"] = True
    data.write_text("\n".join(map(json.dumps, rows)))
    found, _ = measured(
        settings(tiny_bundle, data, concurrency=1, slices=1, systems=("native",)), {"native": Fake("native", 0.1)}
    )
    assert found["data"]["unknown_labels"] == {"noSuch": 2}
    assert found["systems"]["native"]["cut_conversations"] == 1
    page = markdown(found)
    assert "Labels of `noSuch` (2 conversations) belong to no classifier" in page
    assert "Loraplex cut old turns of 1 conversations" in page
