"""Rates and percentiles between two readings of metrics, and the table that `loraplex watch` makes of them."""

import pytest
from rich.console import Console

from loraplex.cli.watch import rows, view
from loraplex.measuring.readings import Reading
from loraplex.metrics import Metrics
from loraplex.types import AdapterRef, ClassifyResult, ErrorInfo, Stats, Timings, Usage, Verdict

HISTOGRAM = """\
# TYPE t histogram
t_bucket{phase="total",le="0.1"} %d
t_bucket{phase="total",le="0.5"} %d
t_bucket{phase="total",le="+Inf"} %d
t_bucket{phase="queue",le="0.1"} 1000
t_bucket{phase="queue",le="+Inf"} 1000
"""


def test_a_percentile_is_of_the_time_between_two_readings() -> None:
    before, now = Reading(HISTOGRAM % (100, 100, 100), 0), Reading(HISTOGRAM % (100, 110, 110), 2)
    assert now.percentile(before, "t", 0.5, phase="total") == pytest.approx(0.3)
    assert now.percentile(now, "t", 0.5, phase="total") is None
    assert now.percentile(before, "nothing", 0.5) is None


def test_a_percentile_beyond_all_bounds_is_the_last_bound() -> None:
    before, now = Reading(HISTOGRAM % (0, 0, 0), 0), Reading(HISTOGRAM % (0, 0, 5), 2)
    assert now.percentile(before, "t", 0.99, phase="total") == 0.5


def test_a_restarted_server_has_no_negative_rate() -> None:
    before, now = (Reading(f"# TYPE c counter\nc_total {value}\n", at) for value, at in ((100, 0), (4, 2)))
    assert now.per_second(before, "c_total") == 0
    assert Reading("# TYPE c counter\nc_total 7\n", 4).per_second(now, "c_total") == 1.5


def verdict(name: str, label: str, **more: object) -> Verdict:
    scores = {"yes": 0.9, "no": 0.1}
    return Verdict(classifier=name, label=label, scores=scores, adapter=AdapterRef(name=name, version="v"), **more)  # type: ignore[arg-type]


def test_the_table_has_rates_shares_and_what_needs_a_look() -> None:
    zeros = dict.fromkeys(set(Stats.__dataclass_fields__) - {"adapters", "active", "placing"}, 0)
    stats = Stats(adapters={"a": "ready", "b": "ready", "never": "ready"}, active=(), placing=(), **zeros)
    metrics = Metrics(lambda: stats, lambda name: True, lambda: 0)
    before = Reading(metrics.render().decode(), 0)
    broken = Verdict(classifier="b", error=ErrorInfo(code="adapter_error", message="", remedy=""))
    low = verdict("b", "yes", abstained=True, warnings=("low_label_mass: 0.01",))
    for verdicts in ((verdict("a", "yes"), low), (verdict("a", "no"), broken), (verdict("a", "no"),)):
        metrics.observe(ClassifyResult(id="x", verdicts=verdicts, usage=Usage(), timings=Timings(total_ms=40)))
    now = Reading(metrics.render().decode(), 2)
    a, b = rows(before, now)
    assert (a.name, a.num_answered, a.per_second, a.labels) == ("a", 3, 1.5, {"yes": 1, "no": 2})
    assert (b.num_answered, b.num_abstained, b.num_errors, b.num_low_mass) == (1, 1, 1, 1)
    console = Console(width=200, record=True, file=None, force_terminal=False)
    with console.capture() as shown:
        console.print(view(before, now))
    text = shown.get()
    assert "1.5 requests/s, p50 " in text and "yes 33.3%, no 66.7%" in text and "never" not in text


def test_before_anything_was_asked_the_table_says_so() -> None:
    empty = Reading("", 0)
    console = Console(width=200)
    with console.capture() as shown:
        console.print(view(empty, empty))
    assert "nothing was asked yet" in shown.get()
