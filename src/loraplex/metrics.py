"""Prometheus metrics. Labels are names of known adapters, stable codes and fixed words, never a client's text."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loraplex.errors import BY_CODE, CancelledError
from loraplex.types import ClassifyResult, Stats, Timings, Usage

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
UNKNOWN = "(unknown)"
QUESTION = "(question)"  # the bare base answered it

disable_created_metrics()  # type: ignore[no-untyped-call]  # `_created` metrics would double the series


class Metrics(Collector):
    """Counts answers as they are given. Reads everything else from `stats` when Prometheus scrapes."""

    def __init__(
        self, stats: Callable[[], Stats], is_known: Callable[[str], bool], num_shadows_shed: Callable[[], int]
    ) -> None:
        """is_known: whether a name is a classifier's or a route's. num_shadows_shed: shadow requests dropped so far."""
        self._stats, self._is_known, self._num_shadows_shed = stats, is_known, num_shadows_shed
        self._registry = CollectorRegistry()
        self._verdicts = self._counter(
            "loraplex_classifications",
            "Verdicts by classifier or route, adapter, and outcome: ok, abstained, skipped, or an error's code",
            ["classifier", "adapter", "outcome"],
        )
        self._labels = self._counter(
            "loraplex_labels",
            "Verdicts by classifier or route, adapter and label; is_positive: the contract's first label",
            ["classifier", "adapter", "label", "is_positive"],
        )
        self._warnings = self._counter(
            "loraplex_warnings",
            "Verdicts with a warning, by classifier or route, adapter and the warning's code, such as low_label_mass",
            ["classifier", "adapter", "code"],
        )
        self._completions = self._counter(
            "loraplex_completions",
            "Generated texts by requested model, adapter that answered (empty: the base), and outcome",
            ["model", "adapter", "outcome"],
        )
        self._failures = Counter(
            "loraplex_request_failures", "Requests answered with an error", ["code"], registry=self._registry
        )
        for code in BY_CODE:  # at 0 from the start: a rate cannot see a series' first increase
            if code != CancelledError.code:
                self._failures.labels(code)
        ProcessCollector(registry=self._registry)  # memory, CPU time, open files, time of the start
        self._cancelled = Counter("loraplex_requests_cancelled", "Requests whose clients left", registry=self._registry)
        seconds = Histogram(
            "loraplex_request_seconds",
            "Where a request's time went: tokenize, queue, compute, total",
            ["phase"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._phases = {phase: seconds.labels(phase) for phase in ("tokenize", "queue", "compute", "total")}
        tokens = Counter("loraplex_tokens", "Prompt tokens: computed, or cached", ["kind"], registry=self._registry)
        self._computed_tokens, self._cached_tokens = tokens.labels("computed"), tokens.labels("cached")
        self._skipped_tokens = Counter(
            "loraplex_skipped_tokens", "Prompt tokens of skipped classifiers, estimated", registry=self._registry
        )
        self._registry.register(self)

    def observe(self, result: ClassifyResult, questions: Collection[str] = ()) -> None:
        """Count a request that was answered. questions: the names of those that the bare base was asked."""
        for verdict in result.verdicts:
            if verdict.skipped_by is not None:
                self._verdicts.inc(self._known(verdict.classifier), "", "skipped")
                continue
            # Callers choose the names and the labels of questions.
            is_question = verdict.adapter is None and (verdict.error is None or verdict.classifier in questions)
            name = QUESTION if is_question else self._known(verdict.classifier)
            adapter = "" if verdict.adapter is None else verdict.adapter.name
            outcome = verdict.error.code if verdict.error is not None else "abstained" if verdict.abstained else "ok"
            self._verdicts.inc(name, adapter, outcome)
            if (
                verdict.label is not None and verdict.scores and not is_question
            ):  # without scores the label may be any token
                is_positive = verdict.label == next(iter(verdict.scores))
                self._labels.inc(name, adapter, verdict.label, str(is_positive).lower())
            for warning in verdict.warnings or ():
                self._warnings.inc(name, adapter, warning.partition(":")[0])
        self._skipped_tokens.inc(result.usage.skipped_tokens or 0)
        self.observe_work(result.usage, result.timings)

    def observe_work(self, usage: Usage, timings: Timings) -> None:
        self._computed_tokens.inc(usage.computed_tokens)
        self._cached_tokens.inc(usage.cached_tokens)
        for phase, seconds in self._phases.items():
            seconds.observe(getattr(timings, f"{phase}_ms") / 1000)

    def fail(self, code: str) -> None:
        """Count a request that was answered with an error. A request whose client left is counted apart."""
        if code == CancelledError.code:
            self._cancelled.inc()
        else:
            self._failures.labels(code).inc()

    def observe_failure(self, names: Iterable[str], code: str, num_questions: int = 0) -> None:
        """Count the classifiers that a failed request named, and the questions to the bare base."""
        for name in names:
            self._verdicts.inc(self._known(name), "", code)
        if num_questions:
            self._verdicts.inc(QUESTION, "", code, by=num_questions)

    def observe_completion(self, model: str, adapter: str | None, outcome: str) -> None:
        """Count a generated text. outcome: "ok", or an error's code."""
        self._completions.inc(self._known(model), adapter or "", outcome)

    def _known(self, name: str) -> str:
        return name if self._is_known(name) else UNKNOWN

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format.

        Adapters that no request has asked count 0, instead of being absent. Series of removed names are dropped;
        otherwise names that come and go would fill the memory."""
        for counter in (self._verdicts, self._labels, self._warnings, self._completions):
            counter.forget(lambda name: name not in ("", UNKNOWN, QUESTION) and not self._is_known(name))
        for name in self._stats().adapters:
            self._verdicts.inc(name, name, "ok", by=0)
            self._warnings.inc(name, name, "low_label_mass", by=0)  # the one to watch, as a share of the verdicts
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics that `stats` holds. Prometheus calls this at each scrape."""
        stats = self._stats()
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("loraplex_sequences_waiting", "Accepted evaluations that do not run yet", stats.num_waiting)
        yield gauge("loraplex_sequences_running", "Evaluations in the present step", stats.num_running)
        yield gauge("loraplex_kv_blocks", "K/V blocks", stats.num_blocks)
        yield gauge("loraplex_kv_blocks_free", "K/V blocks that are free or can be evicted", stats.num_available_blocks)
        yield gauge("loraplex_adapters_on_device", "Adapters in slots", stats.num_slots)
        yield gauge("loraplex_adapter_device_bytes", "Bytes of adapters in slots", stats.device_bytes)
        yield gauge("loraplex_adapter_host_bytes", "Bytes of adapters in host memory", stats.host_bytes)
        yield counter("loraplex_adapter_reads", "Adapters read from disk", stats.num_reads)
        yield counter("loraplex_steps", "Forward passes", stats.num_steps)
        yield counter(
            "loraplex_step_tokens",
            "Tokens in forward passes; divided by loraplex_steps: tokens a step",
            stats.num_step_tokens,
        )
        yield counter("loraplex_step_sequences", "Sequences in forward passes", stats.num_step_sequences)
        yield counter(
            "loraplex_step_seconds",
            "Seconds in forward passes; the rate is the engine's busy share",
            stats.step_seconds,
        )
        yield counter("loraplex_shadows_shed", "Shadow requests dropped under load", self._num_shadows_shed())
        states = GaugeMetricFamily(
            "loraplex_adapter_state", "1 for the adapter's present state", labels=["adapter", "state"]
        )
        for name, state in stats.adapters.items():
            states.add_metric([name, state], 1.0)
        yield states
        # Routers that know LoRA read these names of vLLM's.
        yield gauge("vllm:num_requests_waiting", "Same as loraplex_sequences_waiting", stats.num_waiting)
        yield gauge("vllm:num_requests_running", "Same as loraplex_sequences_running", stats.num_running)
        lora = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with running requests, and adapters that wait for a slot; value: time of the scrape",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        lora.add_metric([str(stats.max_slots), ",".join(stats.active), ",".join(stats.placing)], time.time())
        yield lora

    def _counter(self, name: str, what: str, labels: list[str]) -> "_NamedCounter":
        return _NamedCounter(Counter(name, what, labels, registry=self._registry))


class _NamedCounter:
    """A counter whose first two labels are names."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._children: dict[tuple[str, ...], Counter] = {}  # cached: the counter's own lookup is slow

    def inc(self, *labels: str, by: int = 1) -> None:
        child = self._children.get(labels)
        if child is None:
            child = self._children[labels] = self._counter.labels(*labels)
        child.inc(by)

    def forget(self, is_gone: Callable[[str], bool]) -> None:
        for labels in [labels for labels in self._children if any(map(is_gone, labels[:2]))]:
            del self._children[labels]
            self._counter.remove(*labels)
