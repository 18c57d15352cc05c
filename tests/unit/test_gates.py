"""Gates: who runs, who is skipped, in how many passes, and what happens where a gate cannot say."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, cast

import pytest

from loraplex.cascades import Gate, check_gates, in_passes
from loraplex.config import BundleSettings, RouteSettings, validate
from loraplex.errors import (
    BundleError,
    DeadlineExceededError,
    EngineError,
    LoraplexError,
    QueueFullError,
    UnknownClassifierError,
)
from loraplex.metrics import Metrics
from loraplex.routing.batch import classify_batch
from loraplex.routing.router import Router
from loraplex.routing.verdict_log import VerdictLog
from loraplex.types import (
    AdapterInfo,
    AdapterRef,
    ClassifyRequest,
    ClassifyResult,
    ErrorInfo,
    Question,
    Timings,
    Usage,
    Verdict,
)

if TYPE_CHECKING:  # it imports torch
    from loraplex.service.service import Service

YES = {"kind": "fraud", "amount": "kind"}  # name -> gate: a chain of three


def gates(of: Mapping[str, str] = YES, at_least: float = 0.3) -> dict[str, Gate]:
    return {name: Gate(classifier=gate, label="yes", at_least=at_least) for name, gate in of.items()}


class FakeService:
    """Gives "yes" the probability that a test sets for each adapter, or fails. Each prompt has 10 tokens, and that of a
    question 100."""

    base_name, base_names = "base", ("base",)
    num_waiting = 0

    def __init__(self, probabilities: Mapping[str, float | LoraplexError]) -> None:
        self.probabilities = dict(probabilities)
        self.asked: list[ClassifyRequest] = []
        self.refusals: dict[int, LoraplexError] = {}  # number of a call -> what it raises

    async def close(self) -> None:
        pass

    def names(self) -> tuple[str, ...]:
        return tuple(self.probabilities)

    def knows(self, name: str) -> bool:
        return name in self.probabilities

    def adapter(self, name: str) -> AdapterInfo:
        return AdapterInfo(name=name, labels=("yes", "no"), path=name)

    async def classify(self, request: ClassifyRequest, *, may_fail: bool = False) -> ClassifyResult:
        self.asked.append(request)
        if refusal := self.refusals.get(len(self.asked)):
            raise refusal
        verdicts, errors = [], []
        for name in (*dict.fromkeys(request.classifiers), *request.questions):
            found = 0.5 if name in request.questions else self.probabilities.get(name)
            if found is None:
                found = UnknownClassifierError(name, [])
            if isinstance(found, LoraplexError):
                errors.append(found)
                verdicts.append(Verdict(classifier=name, error=ErrorInfo.of(found)))
                continue
            scores = {"yes": found, "no": 1 - found}
            ref = AdapterRef(name=name, version="v1")
            verdicts.append(Verdict(classifier=name, label="yes" if found >= 0.5 else "no", scores=scores, adapter=ref))
        if len(errors) == len(verdicts) and not may_fail:
            raise errors[0]
        of_questions = 100 * len(request.questions)
        num_classifiers = len(verdicts) - len(errors) - len(request.questions)
        usage = Usage(
            prompt_tokens=10 * num_classifiers + of_questions, computed_tokens=7, question_tokens=of_questions or None
        )
        return ClassifyResult(
            id=f"cls-{len(self.asked)}", verdicts=tuple(verdicts), usage=usage, timings=Timings(compute_ms=5)
        )

    @property
    def passes(self) -> list[tuple[str, ...]]:
        return [tuple(one.classifiers) for one in self.asked]


def routed(
    service: FakeService,
    use: Callable[[Router], Coroutine[Any, Any, None]],
    routes: Mapping[str, RouteSettings] | None = None,
    of: Mapping[str, Gate] | None = None,
) -> None:
    async def run() -> None:
        log = VerdictLog(max_verdicts=100)
        router = Router(cast("Service", service), routes or {}, None, log, gates() if of is None else of)
        await router.start()
        try:
            await use(router)
        finally:
            await router.close()

    asyncio.run(run())


def classified(
    service: FakeService, *names: str, routes: Mapping[str, RouteSettings] | None = None, **more: Any
) -> ClassifyResult:
    found: list[ClassifyResult] = []

    async def use(router: Router) -> None:
        found.append(await router.classify(ClassifyRequest(input="hello", classifiers=names or "*", **more)))

    routed(service, use, routes)
    return found[0]


def told(result: ClassifyResult) -> dict[str, str | None]:
    """Return name -> label, or who skipped it, or the error's code."""
    return {
        one.classifier: f"skipped by {one.skipped_by}" if one.skipped_by else one.error.code if one.error else one.label
        for one in result.verdicts
    }


# ------------------------------------------------------------------------------------------------- settings


def test_gates_come_from_loraplex_yaml() -> None:
    when = {"classifier": "fraud", "label": "yes", "at_least": 0.3}
    settings = validate(BundleSettings, {"classifiers": {"kind": {"when": when}}}, "loraplex.yaml", BundleError)
    assert settings.gates == {"kind": Gate(classifier="fraud", label="yes", at_least=0.3)}


@pytest.mark.parametrize(
    ("settings", "mentions"),
    [
        ({}, "classifiers.kind.when"),
        ({"when": {"classifier": "fraud", "label": "yes"}}, "classifiers.kind.when.at_least"),
        ({"when": {"classifier": "fraud", "label": True, "at_least": 0.3}}, "classifiers.kind.when.label"),
        ({"when": {"classifier": "fraud", "label": "yes", "at_least": 0}}, "classifiers.kind.when.at_least"),
        ({"when": {"classifier": "fraud", "label": "yes", "at_least": 1.1}}, "classifiers.kind.when.at_least"),
        ({"when": {"classifier": "fraud", "label": "yes", "at_least": True}}, "at_least"),
        ({"when": {"classifier": "fraud", "label": "yes", "at_least": 0.3, "below": 1}}, "below"),
    ],
)
def test_a_wrong_gate_is_named(settings: dict[str, Any], mentions: str) -> None:
    with pytest.raises(BundleError, match=mentions.replace(".", r"\.")):
        validate(BundleSettings, {"classifiers": {"kind": settings}}, "loraplex.yaml", BundleError)


@pytest.mark.parametrize(
    ("of", "label", "mentions"),
    [
        ({"kind": "nobody"}, "yes", r"classifiers\.kind\.when\.classifier: there is no classifier or route 'nobody'"),
        ({"nobody": "fraud"}, "yes", r"classifiers\.nobody: there is no classifier or route 'nobody'"),
        ({"kind": "fraud"}, "maybe", r"classifiers\.kind\.when\.label: 'maybe' is no label of 'fraud'.*'yes', 'no'"),
        ({"kind": "kind"}, "yes", "kind -> kind"),
        ({"kind": "amount", "amount": "fraud", "fraud": "kind"}, "yes", "kind -> amount -> fraud -> kind"),
        ({"other": "kind", "kind": "fraud", "fraud": "kind"}, "yes", "kind -> fraud -> kind"),
    ],
)
def test_gates_that_lead_nowhere_are_refused(of: dict[str, str], label: str, mentions: str) -> None:
    wrong = {name: Gate(classifier=gate, label=label, at_least=0.3) for name, gate in of.items()}
    known = {"fraud", "kind", "amount", "other"}
    with pytest.raises(BundleError, match=mentions):
        check_gates(wrong, known.__contains__, lambda name: {name: ("yes", "no")})
    check_gates(gates(), known.__contains__, lambda name: {name: (" yes", " no")})


def test_a_gates_pass_comes_before_those_that_wait_for_it() -> None:
    assert in_passes(["amount", "other"], gates()) == [["fraud", "other"], ["kind"], ["amount"]]
    assert in_passes(["fraud", "other"], gates()) == [["fraud", "other"]]
    wide = {str(i): "fraud" for i in range(9)}
    assert len(in_passes(wide, gates(wide))) == 2


# ------------------------------------------------------------------------------------------------- passes


def test_a_classifier_runs_only_if_its_gate_says_so() -> None:
    service = FakeService({"fraud": 0.29, "kind": 0.9, "amount": 0.9, "other": 0.9})
    result = classified(service, "other", "kind", "fraud")
    assert told(result) == {"other": "yes", "kind": "skipped by fraud", "fraud": "no"}
    assert [one.id for one in result.verdicts] == ["cls-1-0", None, "cls-1-2"]
    assert result["kind"] == Verdict(classifier="kind", skipped_by="fraud")
    assert service.passes == [("fraud", "other")] or service.passes == [("other", "fraud")]
    service = FakeService({"fraud": 0.3, "kind": 0.9, "other": 0.9})
    result = classified(service, "other", "kind", "fraud")
    assert told(result) == {"other": "yes", "kind": "yes", "fraud": "no"}
    assert len(service.passes) == 2 and service.passes[1] == ("kind",)
    assert result["kind"].id == "cls-1-1" and result.usage.skipped_tokens is None
    assert result.usage.prompt_tokens == 30 and result.usage.computed_tokens == 14 and result.timings.compute_ms == 10


def test_a_chain_has_one_pass_a_level_and_ends_where_a_gate_says_no() -> None:
    service = FakeService({"fraud": 0.9, "kind": 0.9, "amount": 0.9})
    assert told(classified(service)) == {"fraud": "yes", "kind": "yes", "amount": "yes"}
    assert service.passes == [("fraud",), ("kind",), ("amount",)]
    service = FakeService({"fraud": 0.1, "kind": 0.9, "amount": 0.9})
    result = classified(service)
    assert told(result) == {"fraud": "no", "kind": "skipped by fraud", "amount": "skipped by kind"}
    assert service.passes == [("fraud",)] and result.usage.skipped_tokens == 20


def test_a_gate_that_was_not_asked_runs_and_is_not_returned() -> None:
    service = FakeService({"fraud": 0.9, "kind": 0.9, "amount": 0.9})
    assert told(classified(service, "amount")) == {"amount": "yes"}
    assert service.passes == [("fraud",), ("kind",), ("amount",)]
    service = FakeService({"fraud": 0.1, "kind": 0.9})
    result = classified(service, "kind")
    assert told(result) == {"kind": "skipped by fraud"} and result.usage.prompt_tokens == 10


def test_a_client_can_ask_for_all() -> None:
    service = FakeService({"fraud": 0.1, "kind": 0.9, "amount": 0.9})
    assert told(classified(service, "amount", "kind", cascade=False)) == {"amount": "yes", "kind": "yes"}
    assert service.passes == [("amount", "kind")]


def test_questions_are_asked_in_the_first_pass_alone() -> None:
    service = FakeService({"fraud": 0.9, "kind": 0.9})
    questions = {"polite": Question(type="predicate", instructions="Is it polite?")}
    result = classified(service, "kind", questions=questions)
    assert [one.classifier for one in result.verdicts] == ["kind", "polite"]
    assert [len(one.questions) for one in service.asked] == [1, 0]
    assert [one.id for one in result.verdicts] == ["cls-1-0", "cls-1-1"]


def test_what_a_gate_saves_is_estimated_from_classifiers_alone() -> None:
    questions = {"polite": Question(type="predicate", instructions="Is it polite?")}
    result = classified(FakeService({"fraud": 0.1, "kind": 0.9}), questions=questions)
    assert result.usage.skipped_tokens == 10 and result.usage.prompt_tokens == 110


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("names", [("kind",), ("fraud", "kind")])
def test_where_a_gate_fails_the_classifier_runs_and_says_so(names: tuple[str, ...]) -> None:
    service = FakeService({"fraud": EngineError("broken", remedy="none"), "kind": 0.9})
    result = classified(service, *names)
    assert told(result) == ({"fraud": "engine_error", "kind": "yes"} if "fraud" in names else {"kind": "yes"})
    [warning] = result["kind"].warnings or ()
    assert warning.startswith("gate_failed: 'fraud' gave no probability of 'yes' (engine_error)")


def test_a_gate_that_was_unloaded_lets_all_run() -> None:
    result = classified(FakeService({"kind": 0.9}), "kind")
    assert told(result) == {"kind": "yes"} and "(unknown_classifier)" in str(result["kind"].warnings)


def test_where_nothing_is_answered_the_first_error_is_raised() -> None:
    error = EngineError("broken", remedy="none")
    with pytest.raises(EngineError, match="broken"):
        classified(FakeService({"fraud": error, "kind": error}), "kind", "fraud")
    service = FakeService({"fraud": 0.9, "kind": 0.9})
    service.refusals = {1: QueueFullError("full", remedy="later", retry_after_s=7)}
    with pytest.raises(QueueFullError) as caught:
        classified(service, "kind", "fraud")
    assert caught.value.retry_after_s == 7 and len(service.asked) == 1


def test_an_overload_between_the_passes_is_an_error_of_what_was_to_run() -> None:
    service = FakeService({"fraud": 0.9, "kind": 0.9, "amount": 0.9})
    service.refusals = {2: QueueFullError("full", remedy="later")}
    result = classified(service, "fraud", "kind")
    assert told(result) == {"fraud": "yes", "kind": "queue_full"}


def test_the_deadline_counts_over_all_passes() -> None:
    service = FakeService({"fraud": 0.9, "kind": DeadlineExceededError("late", remedy="more time")})
    result = classified(service, "fraud", "kind", deadline_ms=1000)
    assert told(result) == {"fraud": "yes", "kind": "deadline_exceeded"}
    first, second = (one.deadline_ms or 0 for one in service.asked)
    assert 0 < second < first <= 1000


# ------------------------------------------------------------------------------------------------- routes and the log


def test_a_gate_may_be_a_route_and_so_may_what_waits_for_it() -> None:
    routes = {
        "fraud": RouteSettings(targets={"fraud-v2": 1}),
        "kind": RouteSettings(targets={"kind-v1": 1}, shadows=("kind-v2",)),
    }
    service = FakeService({"fraud-v1": 0.9, "fraud-v2": 0.1, "kind-v1": 0.9, "kind-v2": 0.9})
    assert told(classified(service, routes=routes)) == {"fraud": "no", "kind": "skipped by fraud", "fraud-v1": "yes"}
    assert [set(one) for one in service.passes] == [{"fraud-v2", "fraud-v1"}], "and no shadow of what was skipped"


def test_a_split_gate_is_drawn_once_for_its_own_verdict_and_for_those_that_wait() -> None:
    routes = {"fraud": RouteSettings(targets={"low": 1, "high": 1})}
    service = FakeService({"low": 0.1, "high": 0.9, "kind": 0.9})

    async def use(router: Router) -> None:
        for _ in range(40):
            result = await router.classify(ClassifyRequest(input="hello", classifiers=("kind", "fraud")))
            assert result["fraud"].adapter is not None
            assert (result["kind"].skipped_by is None) == (result["fraud"].adapter.name == "high")

    routed(service, use, routes, gates({"kind": "fraud"}))
    assert len(service.asked) > 40


def test_an_adapter_that_answers_for_a_gate_too_is_computed_once() -> None:
    routes = {name: RouteSettings(targets={"one": 1}) for name in ("fraud", "kind")}
    service = FakeService({"one": 0.9})
    assert told(classified(service, "kind", "fraud", routes=routes)) == {"kind": "yes", "fraud": "yes"}
    assert service.passes == [("one",)]


def test_what_was_skipped_is_not_logged_and_takes_no_feedback() -> None:
    async def use(router: Router) -> None:
        request = ClassifyRequest(input="hello", classifiers=("kind", "other"), request_id="r")
        result = await router.classify(request)
        assert await router.set_truth_of_request("r", None, "no") == 1, "only `other` answered"
        assert (await router.stats("kind")).targets == () == (await router.stats("fraud")).targets
        assert result["kind"].id is None and await router.set_truth(result["other"].id or "", "no") == 1

    routed(FakeService({"fraud": 0.1, "kind": 0.9, "other": 0.9}), use)


def test_a_batch_sums_what_was_skipped() -> None:
    async def use(router: Router) -> None:
        request = ClassifyRequest(input="hello", classifiers=("kind", "fraud"))
        assert (await classify_batch(router, [request, request])).usage.skipped_tokens == 20

    routed(FakeService({"fraud": 0.1, "kind": 0.9}), use)


def test_metrics_count_what_was_skipped() -> None:
    service = FakeService({"fraud": 0.1, "kind": 0.9, "amount": 0.9})
    metrics = Metrics(lambda: cast(Any, None), lambda name: True, lambda: 0)
    metrics._stats = lambda: cast(Any, _Stats())
    metrics.observe(classified(service))
    series = metrics._registry.get_sample_value
    by = {"adapter": "", "outcome": "skipped"}
    assert series("loraplex_classifications_total", {"classifier": "kind", **by}) == 1
    assert series("loraplex_skipped_tokens_total") == 20


class _Stats:
    adapters: Mapping[str, str] = {}
    active = placing = ()

    def __getattr__(self, name: str) -> int:
        return 0
