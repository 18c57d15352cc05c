"""Routes, shadows and the verdict log, around a service whose answers each test sets."""

import asyncio
import sqlite3
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from loraplex.config import RouteSettings
from loraplex.database import Database
from loraplex.errors import (
    AdapterInUseError,
    BundleError,
    EngineError,
    InvalidRequestError,
    LoraplexError,
    NoRevisionError,
    QueueFullError,
    RefusedError,
    StateError,
    UnknownClassifierError,
    UnknownRouteError,
    UnknownVerdictError,
)
from loraplex.routing.batch import MAX_CONCURRENT, classify_batch
from loraplex.routing.draw import choose
from loraplex.routing.route_store import RouteStore
from loraplex.routing.router import Router
from loraplex.routing.shadows import MAX_WAITING
from loraplex.routing.verdict_log import SCHEMA, LoggedVerdict, VerdictLog
from loraplex.types import (
    AdapterInfo,
    AdapterRef,
    ClassifyRequest,
    ClassifyResult,
    ErrorInfo,
    Failure,
    Route,
    Timings,
    Usage,
    Verdict,
)

if TYPE_CHECKING:  # it imports torch
    from loraplex.service.service import Service

A, B, C = "a", "b", "c"


class FakeService:
    """Answers with a label for each adapter, or raises; honours what the router needs of a service."""

    base_names = ("base",)

    def __init__(self, labels: dict[str, str | LoraplexError]) -> None:
        self.labels, self.is_running = labels, True
        self.num_waiting = 0
        self.asked: list[tuple[str, ...]] = []
        self.before: Callable[[], Coroutine[Any, Any, None]] | None = None

    async def close(self) -> None:
        self.is_running = False

    def unload_adapter(self, name: str) -> "asyncio.Task[None]":
        del self.labels[name]
        return asyncio.create_task(asyncio.sleep(0.002))

    def names(self) -> tuple[str, ...]:
        return tuple(self.labels)

    def knows(self, name: str) -> bool:
        return name in self.labels

    def adapter(self, name: str) -> AdapterInfo:
        return AdapterInfo(
            name=name, version="v1", rank=1, num_parameters=1, labels=("yes", "no"), question=None, path=name
        )

    async def classify(self, request: ClassifyRequest) -> ClassifyResult:
        self.asked.append(tuple(request.classifiers))
        if self.before is not None:
            await self.before()
        verdicts, errors = [], []
        for name in dict.fromkeys(request.classifiers):
            label = self.labels.get(name) or UnknownClassifierError(name, [])
            if isinstance(label, LoraplexError):
                verdicts.append(Verdict(classifier=name, error=ErrorInfo.of(label)))
            else:
                ref = AdapterRef(name=name, version="v1")
                verdicts.append(Verdict(classifier=name, label=label, confidence=0.75, adapter=ref))
            errors.append(label)
        if all(isinstance(error, LoraplexError) for error in errors):
            raise cast(LoraplexError, errors[0])
        return ClassifyResult(
            id=f"cls-{len(self.asked)}", verdicts=tuple(verdicts), usage=Usage(), timings=Timings(total_ms=10.0)
        )


def as_service(fake: FakeService) -> "Service":
    return cast("Service", fake)


def routed(
    labels: dict[str, str | LoraplexError],
    routes: dict[str, RouteSettings],
    use: Callable[[Router, FakeService], Coroutine[Any, Any, None]],
    store: RouteStore | None = None,
    log: VerdictLog | None = None,
) -> None:
    """Run `use` on a started router."""

    async def run() -> None:
        service = FakeService(labels)
        router = Router(as_service(service), routes, store, log or VerdictLog(max_verdicts=1000))
        await router.start()
        try:
            await use(router, service)
        finally:
            await router.close()

    asyncio.run(run())


def ask(*names: str, conversation_id: str | None = None) -> ClassifyRequest:
    return ClassifyRequest(input="hello", classifiers=names, conversation_id=conversation_id)


def to(*targets: str, shadows: tuple[str, ...] = (), **weights: float) -> RouteSettings:
    return RouteSettings(targets=dict.fromkeys(targets, 1.0) | weights, shadows=shadows)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


# ------------------------------------------------------------------------------------------------- choosing


def route(**targets: float) -> Route:
    return Route(name="r", targets=targets)


def test_a_conversation_stays_with_its_target_and_weights_are_kept() -> None:
    ids = [f"conversation {i}" for i in range(4000)]
    found = [choose(route(a=90, b=10), one) for one in ids]
    assert found == [choose(route(a=90, b=10), one) for one in ids]
    assert 0.08 < found.count("b") / len(ids) < 0.12


def test_more_weight_moves_only_those_that_must() -> None:
    ids = [f"conversation {i}" for i in range(2000)]
    before = [choose(route(a=80, b=10, c=10), one) for one in ids]
    after = [choose(route(a=80, b=30, c=10), one) for one in ids]
    moved = Counter((x, y) for x, y in zip(before, after, strict=True) if x != y)
    assert moved and {y for _, y in moved} == {"b"}


def test_without_an_id_targets_are_drawn_by_weight_and_none_of_weight_zero() -> None:
    drawn = Counter(choose(route(a=3, b=1, c=0), None) for _ in range(4000))
    assert 0.70 < drawn["a"] / 4000 < 0.80 and "c" not in drawn
    assert choose(route(a=0, b=1), "x") == "b"
    tiny = Counter(choose(route(a=1e-320, b=1e-320), f"{i}") for i in range(100))
    assert min(tiny["a"], tiny["b"]) > 20


# ------------------------------------------------------------------------------------------------- resolving


def test_verdicts_are_named_as_asked_and_say_who_answered() -> None:
    async def use(router: Router, service: FakeService) -> None:
        result = await router.classify(ask("alias", B))
        assert [(one.classifier, one.label) for one in result.verdicts] == [("alias", "yes"), (B, "no")]
        assert [one.adapter.name for one in result.verdicts if one.adapter] == [A, B]
        assert [one.id for one in result.verdicts] == ["cls-1-0", "cls-1-1"]

    routed({A: "yes", B: "no"}, {"alias": to(A)}, use)


def test_a_star_asks_every_route_once_and_what_no_route_leads_to() -> None:
    async def use(router: Router, service: FakeService) -> None:
        result = await router.classify(ClassifyRequest(input="hello"))
        assert [one.classifier for one in result.verdicts] == [A, "d"]
        assert service.asked == [(A, "d")]

    routed({A: "yes", B: "no", C: "yes", "d": "no"}, {A: to(a=1, b=0, shadows=(C,))}, use)


def test_two_names_for_one_adapter_are_one_evaluation_and_two_verdicts() -> None:
    async def use(router: Router, service: FakeService) -> None:
        result = await router.classify(ask("one", "two", A))
        assert [one.classifier for one in result.verdicts] == ["one", "two", A]
        assert len({one.id for one in result.verdicts}) == 3

    routed({A: "yes"}, {"one": to(A), "two": to(A)}, use)


def test_a_target_that_was_unloaded_is_an_error_and_nobody_elses_answer() -> None:
    async def use(router: Router, service: FakeService) -> None:
        del service.labels[A]
        result = await router.classify(ask("alias", B))
        assert result["alias"].error is not None and result["alias"].error.code == "unknown_classifier"
        assert result[B].label == "no"

    routed({A: "yes", B: "no"}, {"alias": to(A)}, use)


def test_a_route_in_the_bundle_that_leads_nowhere_stops_the_start() -> None:
    async def use(router: Router, service: FakeService) -> None:
        raise AssertionError("it started")

    with pytest.raises(BundleError, match=r"routes\.alias.*'nope'"):
        routed({A: "yes"}, {"alias": to("nope")}, use)
    with pytest.raises(BundleError, match=r"routes\.a/b"):
        routed({A: "yes"}, {"a/b": to(A)}, use)


def test_what_a_client_sets_must_be_sound() -> None:
    async def use(router: Router, service: FakeService) -> None:
        for name, settings, error in (
            ("alias", to("nope"), RefusedError),
            ("alias", to(A, shadows=("nope",)), RefusedError),
            ("*", to(A), RefusedError),
            ("base", to(A), InvalidRequestError),
        ):
            with pytest.raises(error):
                await router.set_route(name, settings)
        with pytest.raises(UnknownRouteError):
            await router.delete_route("alias")
        with pytest.raises(NoRevisionError):
            await router.rollback_route("alias")
        assert router.routes() == ()

    routed({A: "yes"}, {}, use)


@pytest.mark.parametrize(
    "targets", [{}, {"a": -1}, {"a": 0}, {"a": float("inf")}, {"a": float("nan")}, {"a": 1e308, "b": 1e308}]
)
def test_weights_must_add_up_to_something(targets: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"weight|greater|finite|at least 1"):
        RouteSettings(targets=targets)


# ------------------------------------------------------------------------------------------------- revisions


def test_a_rollback_undoes_the_last_change_and_a_deletion_too() -> None:
    store = RouteStore()
    first, second = store.put("r", to(A)), store.put("r", to(a=1, b=1))
    assert first.revision < second.revision
    assert store.rollback("r") == first
    with pytest.raises(NoRevisionError):
        store.rollback("r")
    assert store.routes() == {"r": first}, "the refused rollback undid nothing"
    store.delete("r")
    assert store.routes() == {}
    assert store.rollback("r") == first
    assert store.put("r", to(B)).revision > second.revision, "a revision names one thing only"


def test_nothing_that_a_client_does_leaves_a_route_that_leads_nowhere() -> None:
    async def use(router: Router, service: FakeService) -> None:
        await router.set_route("r", to(A))
        await router.set_route("r", to(B))
        for name in (B, C):
            with pytest.raises(AdapterInUseError) if name == B else nullcontext():
                await router.unload_adapter(name)
        await router.unload_adapter(A)
        with pytest.raises(RefusedError, match="'a'"):
            await router.rollback_route("r")
        assert router.route("r").targets == {B: 1}

        async def outcome(work: Coroutine[Any, Any, Any]) -> type[BaseException] | None:
            try:
                await work
            except LoraplexError as exc:
                return type(exc)
            return None

        for i in range(20):
            service.labels["x"] = "yes"
            works = [router.set_route("s", to("x")), router.unload_adapter("x")]
            outcomes = await asyncio.gather(*(outcome(work) for work in works[:: 1 if i % 2 else -1]))
            assert len([one for one in outcomes if one is None]) == 1, outcomes
            assert "s" not in [one.name for one in router.routes()] or service.knows("x")
            if "s" in [one.name for one in router.routes()]:
                await router.delete_route("s")

    routed({A: "yes", B: "no", C: "no"}, {}, use)


def test_changes_at_once_are_all_in_effect() -> None:
    async def use(router: Router, service: FakeService) -> None:
        await asyncio.gather(*(router.set_route(f"r{i}", to(A)) for i in range(20)))
        assert {one.name for one in router.routes()} == {f"r{i}" for i in range(20)}

    routed({A: "yes"}, {}, use)


def test_routes_outlive_the_process_and_the_file_has_its_say_only_where_it_changed(tmp_path: Path) -> None:
    path = tmp_path / "routes.sqlite"

    def restarted(**routes: RouteSettings) -> dict[str, list[str]]:
        store = RouteStore(path)
        store.read_file(routes)
        return {name: list(found.targets) for name, found in store.routes().items()}

    assert restarted(x=to(A), y=to(B)) == {"x": [A], "y": [B]}
    RouteStore(path).put("x", to(C))
    RouteStore(path).put("z", to(C))
    assert restarted(x=to(A), y=to(B)) == {"y": [B], "x": [C], "z": [C]}, "the file says what it said before"
    assert restarted(x=to(B), y=to(B))["x"] == [B], "the file was changed last"
    assert restarted(x=to(B)) == {"z": [C], "x": [B]}, "y was taken out of the file"
    RouteStore(path).rollback("y")
    assert restarted(x=to(B))["y"] == [B], "and put back at run time"


# ------------------------------------------------------------------------------------------------- shadows


def test_a_shadow_is_asked_recorded_and_never_returned() -> None:
    async def use(router: Router, service: FakeService) -> None:
        result = await router.classify(ask("r", "s"))
        assert [one.classifier for one in result.verdicts] == ["r", "s"] and service.asked == [(A,) * 2]
        await until(lambda: len(service.asked) == 2)
        assert service.asked[1] == (B, C), "one request for all shadows"
        stats = await router.stats("r")
        found = {(one.target, one.role): one for one in stats.targets}
        assert set(found) == {(A, "primary"), (B, "shadow")}
        agreement = found[B, "shadow"].agreement
        assert agreement is not None and (agreement.num_compared, agreement.share) == (1, 0.0)
        assert found[A, "primary"].agreement is None

    routed({A: "yes", B: "no", C: "yes"}, {"r": to(A, shadows=(B,)), "s": to(A, shadows=(C,))}, use)


def test_shadows_wait_for_an_idle_backend_and_the_oldest_are_shed() -> None:
    async def use(router: Router, service: FakeService) -> None:
        service.num_waiting = 1
        for _ in range(MAX_WAITING + 10):
            await router.classify(ask("r"))
        await asyncio.sleep(0.05)
        assert set(service.asked) == {(A,)} and router.num_shadows_shed() == 10
        service.num_waiting = 0
        await until(lambda: service.asked.count((B,)) == MAX_WAITING)
        assert (await router.stats("r")).targets[1].num_verdicts == MAX_WAITING

    routed({A: "yes", B: "no"}, {"r": to(A, shadows=(B,))}, use)


def test_a_shadow_that_fails_counts_and_the_next_is_asked() -> None:
    async def use(router: Router, service: FakeService) -> None:
        for _ in range(2):
            await router.classify(ask("r"))
        await until(lambda: len(service.asked) == 4)
        shadow = (await router.stats("r")).targets[1]
        assert (shadow.num_verdicts, shadow.num_errors, shadow.agreement) == (2, 2, None)

    routed({A: "yes", B: EngineError("no", remedy="none")}, {"r": to(A, shadows=(B,))}, use)


# ------------------------------------------------------------------------------------------------- verdicts


def verdict(id: str, label: str | None = "yes", **values: Any) -> LoggedVerdict:
    return LoggedVerdict(
        id=id,
        route="r",
        target=A,
        version="v1",
        is_shadow=False,
        label=label,
        confidence=0.5,
        latency_ms=1.0,
        error=None,
    )._replace(**values)


def test_stats_are_those_of_each_version_in_each_role() -> None:
    log = VerdictLog(max_verdicts=1000)
    log.add(verdict(f"{i}", "yes" if i < 75 else "no", confidence=i / 100, latency_ms=float(i)) for i in range(100))
    log.add([verdict("failed", None, confidence=None, latency_ms=None, error="engine_error")])
    log.add([verdict("other", version="v2"), verdict("elsewhere", route="q")])
    one, two = log.stats("r").targets
    assert (one.num_verdicts, one.num_errors) == (101, 1)
    assert one.label_shares == {"yes": 0.75, "no": 0.25}
    assert one.mean_confidence == pytest.approx(0.495)
    assert one.latency_ms is not None
    assert (one.latency_ms.p50, one.latency_ms.p99) == (49, 98)
    assert one.accuracy is None and (two.version, two.num_verdicts) == ("v2", 1)
    assert log.stats("nobody asked").targets == ()


def test_feedback_judges_all_that_answered_and_the_last_word_counts() -> None:
    log = VerdictLog(max_verdicts=1000)
    log.add([verdict("1", "yes"), verdict("1", "no", target=B, is_shadow=True), verdict("2", "yes")])
    assert log.set_truth("1", "yes") == 2
    assert log.set_truth("1", "no") == 2
    assert log.set_truth("2", "yes") == 1
    log.add([verdict("2", "no", target=B, is_shadow=True)])  # answers after the feedback
    for one in log.stats("r").targets:
        assert one.accuracy is not None and (one.accuracy.num_labelled, one.accuracy.share) == (2, 0.5)
    with pytest.raises(UnknownVerdictError):
        log.set_truth("3", "yes")


def test_only_the_newest_are_kept_and_they_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    log = VerdictLog(path, max_verdicts=10)
    for i in range(25):
        log.add([verdict(str(i))])
        log.flush()
    again = VerdictLog(path, max_verdicts=10)
    assert again.stats("r").targets[0].num_verdicts == 10
    assert again.set_truth("24", "no") == 1
    with pytest.raises(UnknownVerdictError):
        again.set_truth("14", "no")


def test_what_could_not_be_written_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.database.TIMEOUT_S", 0.01)
    path = tmp_path / "verdicts.sqlite"
    log = VerdictLog(path, max_verdicts=10)
    log.add(verdict(str(i)) for i in range(4))
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StateError):
            log.flush()
        log.add(verdict(str(i)) for i in range(4, 14))
    assert log.stats("r").targets[0].num_verdicts == 10
    assert log.targets_of("13") == {A: []}


def test_of_more_than_can_wait_the_newest_do(monkeypatch: pytest.MonkeyPatch) -> None:
    log = VerdictLog(max_verdicts=10)
    log.add(verdict(f"old{i}") for i in range(6))

    def fail(added: object) -> None:
        log.add(verdict(f"new{i}") for i in range(7))  # while it is tried
        raise StateError("disk: is full", remedy="none")

    with monkeypatch.context() as patch:
        patch.setattr(log, "_write", fail)
        with pytest.raises(StateError):
            log.flush()
    assert log.targets_of("new6") == log.targets_of("new0") == log.targets_of("old3") == {A: []}
    with pytest.raises(UnknownVerdictError):
        log.targets_of("old2")


def test_statistics_count_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraplex.database.TIMEOUT_S", 0.01)
    path = tmp_path / "verdicts.sqlite"
    log = VerdictLog(path, max_verdicts=10)
    log.add(verdict(str(i)) for i in range(4))
    log.flush()
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")  # as on a full disk: others can read, and nobody can write
        log.add(verdict(str(i), "no") for i in range(4, 12))
        assert log.stats("r").targets[0].label_shares == {"no": 0.8, "yes": 0.2}, "of the newest ten"
        assert log.targets_of("11") == log.targets_of("2") == {A: []}
        with pytest.raises(StateError):
            log.set_truth("11", "yes")
    assert log.set_truth("11", "yes") == 1
    assert VerdictLog(path, max_verdicts=10).stats("r") == log.stats("r")


def test_a_log_that_was_removed_is_missed_and_its_loss_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = VerdictLog(tmp_path / "verdicts.sqlite", max_verdicts=10)
    (tmp_path / "verdicts.sqlite").unlink()
    with pytest.raises(StateError, match="removed or replaced"):
        log.flush()
    log.add(verdict(str(i)) for i in range(4))
    log.close()
    assert "4 verdicts could not be written, and are lost" in caplog.text


def test_without_their_files_routes_answer_and_do_not_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "state"
    store, log = RouteStore(folder / "routes.sqlite"), VerdictLog(folder / "verdicts.sqlite", max_verdicts=10)

    async def use(router: Router, service: FakeService) -> None:
        folder.rename(tmp_path / "aside")
        answered = (await router.classify(ask("r"))).verdicts[0]
        assert answered.label == "yes" and answered.id
        for change in (
            router.set_route("r", to(B)),
            router.set_route("s", to(B)),
            router.delete_route("r"),
            router.rollback_route("r"),
            router.set_truth(answered.id, "no"),
            router.stats("r"),
        ):
            with pytest.raises(StateError, match=r"sqlite: was removed or replaced.*restart"):
                await change
        assert [(one.name, list(one.targets)) for one in router.routes()] == [("r", [A])]
        assert not folder.exists()
        for _ in range(3):
            log.try_to_flush()
        assert caplog.text.count("verdicts cannot be written") == 1
        (tmp_path / "aside").rename(folder)
        assert await router.set_truth(answered.id, "no") == 1
        await router.set_route("s", to(B))

    routed({A: "yes", B: "no"}, {"r": to(A)}, use, store, log)
    assert set(RouteStore(folder / "routes.sqlite").routes()) == {"r", "s"}


def test_settings_that_cannot_be_read_are_found_when_the_file_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "routes.sqlite"
    RouteStore(path).put("x", to(A))
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE revisions SET settings = '{'")
    with pytest.raises(StateError, match=r"routes\.sqlite.*'x'.*restore"):
        RouteStore(path)


def test_verdicts_of_an_older_version_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    schema = (
        SCHEMA[0].replace(",\n        request_id TEXT,\n        key TEXT,\n        labels TEXT", ""),
        *SCHEMA[1:-1],
    )
    Database(path, format=1, schema=schema)
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("INSERT INTO verdicts (id, route, target, is_shadow, label) VALUES ('old', 'r', 'a', 0, 'yes')")
    log = VerdictLog(path, max_verdicts=10)
    log.add([verdict("new", request_id="q")])
    assert log.set_truth("old", "yes") == 1
    assert log.answers_to("q", None) == {"r": (1, {A: []})} and log.answers_to("p", None) == {}


def test_feedback_through_the_router_knows_the_labels() -> None:
    async def use(router: Router, service: FakeService) -> None:
        result = await router.classify(ask(A, B))
        ids = [one.id or "" for one in result.verdicts]
        assert await router.set_truth(ids[0], "no") == 1
        with pytest.raises(InvalidRequestError, match="'maybe' is no label"):
            await router.set_truth(ids[1], "maybe")
        with pytest.raises(UnknownVerdictError):
            await router.set_truth("cls-9-0", "yes")
        accuracy = (await router.stats(A)).targets[0].accuracy
        assert accuracy is not None and accuracy.share == 0
        with pytest.raises(UnknownRouteError):
            await router.stats("nope")

    routed({A: "yes", B: "no"}, {}, use)


def test_a_request_that_fails_as_a_whole_counts_for_its_targets() -> None:
    async def use(router: Router, service: FakeService) -> None:
        with pytest.raises(EngineError):
            await router.classify(ask(A))
        [found] = (await router.stats(A)).targets
        assert (found.num_verdicts, found.num_errors) == (1, 1)

    routed({A: EngineError("broken", remedy="none")}, {}, use)


# ------------------------------------------------------------------------------------------------- batches


def test_a_batch_answers_in_order_and_a_failure_stands_in_its_place() -> None:
    async def use(router: Router, service: FakeService) -> None:
        most = running = 0

        async def before() -> None:
            nonlocal most, running
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1

        service.before = before
        requests = [ask(A) for _ in range(3 * MAX_CONCURRENT)]
        requests[1] = replace(requests[1], classifiers=(B,))
        batch = await classify_batch(router, requests)
        assert len(batch.results) == len(requests) and most == MAX_CONCURRENT
        failure = batch.results[1]
        assert isinstance(failure, Failure) and failure.error.code == "engine_error"
        assert all(isinstance(one, ClassifyResult) for one in (batch.results[0], *batch.results[2:]))
        with pytest.raises(EngineError):
            await classify_batch(router, [ask(B), ask(B)])

    routed({A: "yes", B: EngineError("broken", remedy="none")}, {}, use)


def test_a_batch_paces_itself_and_is_shed_by_others_load_only() -> None:
    async def use(router: Router, service: FakeService) -> None:
        num_running = 0
        most = 3

        async def before() -> None:
            nonlocal num_running
            if num_running >= most:
                raise QueueFullError("full", remedy="wait")
            num_running += 1
            await asyncio.sleep(0.001)
            num_running -= 1

        service.before = before
        batch = await classify_batch(router, [ask(A) for _ in range(50)])
        assert all(isinstance(one, ClassifyResult) for one in batch.results)
        assert len(service.asked) < 50 * MAX_CONCURRENT, "it asks again when there is room, and not all the time"
        assert (await router.stats(A)).targets[0].num_errors == 0
        most = 0
        with pytest.raises(QueueFullError):
            await classify_batch(router, [ask(A) for _ in range(50)])

    routed({A: "yes"}, {}, use)


def test_a_batchs_deadline_counts_from_the_call() -> None:
    async def use(router: Router, service: FakeService) -> None:
        async def before() -> None:
            await asyncio.sleep(0.03)

        service.before = before
        requests = [replace(ask(A), deadline_ms=20.0) for _ in range(MAX_CONCURRENT + 1)]
        batch = await classify_batch(router, requests)
        last = batch.results[-1]
        assert isinstance(last, Failure) and last.error.code == "deadline_exceeded"

    routed({A: "yes"}, {}, use)
