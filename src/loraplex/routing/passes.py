"""Asks the service for a request's verdicts: in one pass, or gates first and then those that wait for them."""

import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import TYPE_CHECKING

from loraplex.cascades import Gate, in_passes
from loraplex.errors import ConfigurationError, LoraplexError, error_answered
from loraplex.types import ClassifyRequest, ClassifyResult, ErrorInfo, Timings, Usage, Verdict

if TYPE_CHECKING:  # the service imports torch
    from loraplex.service.service import Service

SHORTEST_MS = 0.001  # a deadline that has passed, so that the service says so


async def classify(
    service: "Service",
    request: ClassifyRequest,
    adapters: Mapping[str, str],
    gates: Mapping[str, Gate],
    resolve: Callable[[str, str | None], str],
) -> ClassifyResult:
    """Return a verdict for each requested name, under this name and with an id, then one for each question.

    adapters:  requested name -> the adapter that answers.
    gates:     name -> its gate. A name whose gate says no is skipped. One whose gate cannot say is run, with a warning.
    resolve:   finds the adapter of a gate that was not requested. The gate runs, and its verdict is not returned.
    Raises as `Service.classify` does; an overload in a later pass is an error of that pass's verdicts."""
    passes = in_passes(adapters, gates) if gates and request.cascade else [[*adapters]]
    if len(passes) == 1:
        result = await service.classify(replace(request, classifiers=tuple(adapters.values())))
        found = {verdict.classifier: verdict for verdict in result.verdicts}
        verdicts = {name: found[adapter] for name, adapter in adapters.items()}
    else:
        hidden = {name for names in passes for name in names} - adapters.keys()
        all_adapters = {**adapters, **{name: resolve(name, request.conversation_id) for name in hidden}}
        result, verdicts, found = await _in_passes(service, request, all_adapters, gates, passes)
    verdicts = {name: verdicts[name] for name in adapters} | {name: found[name] for name in request.questions}
    failed = [(name, verdict.error) for name, verdict in verdicts.items() if verdict.error is not None]
    if len(failed) == len(verdicts):
        raise raised(*failed[0])
    named = (_as_asked(one, name, f"{result.id}-{index}") for index, (name, one) in enumerate(verdicts.items()))
    result = replace(result, verdicts=tuple(named))
    num_skipped = sum(verdict.skipped_by is not None for verdict in result.verdicts)
    num_run = sum(verdict.error is None for name, verdict in found.items() if name not in request.questions)
    if num_skipped and num_run:
        of_classifiers = result.usage.prompt_tokens - (result.usage.question_tokens or 0)
        num_tokens = round(num_skipped * of_classifiers / num_run)
        result = replace(result, usage=replace(result.usage, skipped_tokens=num_tokens))
    return result


async def _in_passes(
    service: "Service",
    request: ClassifyRequest,
    adapters: Mapping[str, str],
    gates: Mapping[str, Gate],
    passes: Seq[Seq[str]],
) -> tuple[ClassifyResult, dict[str, Verdict], dict[str, Verdict]]:
    """Return the usage and timings of all passes, the verdicts by name, and those by adapter and question."""
    started = time.monotonic()
    results: list[ClassifyResult] = []
    verdicts: dict[str, Verdict] = {}
    found: dict[str, Verdict] = {}
    for names in passes:
        run: dict[str, str] = {}  # name -> a warning, or nothing
        for name in names:
            gate = gates.get(name)
            opens = True if gate is None else gate.opens(verdicts[gate.classifier])
            if gate is not None and opens is False:
                verdicts[name] = Verdict(classifier=name, skipped_by=gate.classifier)
            else:
                run[name] = "" if gate is None or opens else _cannot_say(gate, verdicts[gate.classifier])
        left_ms = request.deadline_ms
        if left_ms is not None:
            left_ms = max(SHORTEST_MS, left_ms - (time.monotonic() - started) * 1000)
        asked = tuple(dict.fromkeys(adapters[name] for name in run if adapters[name] not in found))
        part = replace(request, classifiers=asked, questions={} if results else request.questions, deadline_ms=left_ms)
        if part.classifiers or part.questions:
            try:
                result = await service.classify(part, may_fail=True)
            except LoraplexError as exc:
                if not results:
                    raise
                found |= {name: Verdict(classifier=name, error=ErrorInfo.of(exc)) for name in asked}
            else:
                results.append(result)
                found |= {verdict.classifier: verdict for verdict in result.verdicts}
        verdicts |= {name: _warned(found[adapters[name]], warning) for name, warning in run.items()}
    total_ms = (time.monotonic() - started) * 1000
    return replace(results[0], usage=_usage(results), timings=_timings(results, total_ms)), verdicts, found


def _cannot_say(gate: Gate, verdict: Verdict) -> str:
    reason = f" ({verdict.error.code})" if verdict.error is not None else ""
    return (
        f"gate_failed: {gate.classifier!r} gave no probability of {gate.label!r}{reason}, so this classifier was run "
        "without its gate"
    )


def _warned(verdict: Verdict, warning: str) -> Verdict:
    if not warning or verdict.error is not None:
        return verdict
    return replace(verdict, warnings=(*(verdict.warnings or ()), warning))


def _as_asked(verdict: Verdict, name: str, id: str) -> Verdict:
    """Return the verdict with the requested name and id. Most verdicts have both, and are not copied. One that was
    skipped has no id, because feedback has nothing to correct."""
    asked = verdict.classifier == name and verdict.id == id
    return verdict if asked or verdict.skipped_by is not None else replace(verdict, id=id, classifier=name)


def raised(name: str, info: ErrorInfo) -> LoraplexError:
    """Return a verdict's error as one to raise. name: of the classifier that failed."""
    error = error_answered(info.code, info.message, remedy=info.remedy)
    if isinstance(error, ConfigurationError):
        error.adapter = name
    return error


def _usage(results: Iterable[ClassifyResult]) -> Usage:
    usages = [result.usage for result in results]
    return Usage(
        prompt_tokens=sum(one.prompt_tokens for one in usages),
        computed_tokens=sum(one.computed_tokens for one in usages),
        cached_tokens=sum(one.cached_tokens for one in usages),
        question_tokens=sum(one.question_tokens or 0 for one in usages) or None,
    )


def _timings(results: Iterable[ClassifyResult], total_ms: float) -> Timings:
    """Passes run one after the other, so their phases are added."""
    timings = [result.timings for result in results]
    return Timings(
        tokenize_ms=sum(one.tokenize_ms for one in timings),
        queue_ms=sum(one.queue_ms for one in timings),
        compute_ms=sum(one.compute_ms for one in timings),
        total_ms=total_ms,
    )
