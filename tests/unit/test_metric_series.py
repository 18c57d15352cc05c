"""Series of names that come and go do not add up."""

from collections.abc import Collection

from loraplex.metrics import Metrics
from loraplex.types import AdapterRef, ClassifyResult, Stats, Timings, Usage, Verdict


def stats_of(names: Collection[str]) -> Stats:
    zeros = dict.fromkeys(set(Stats.__dataclass_fields__) - {"adapters", "active", "placing"}, 0)
    return Stats(adapters=dict.fromkeys(names, "ready"), active=(), placing=(), **zeros)


def test_what_is_gone_is_forgotten() -> None:
    known = {"kept"}
    metrics = Metrics(lambda: stats_of(known), lambda name: name in known, lambda: 0)

    def ask(name: str) -> None:
        verdict = Verdict(
            classifier=name,
            label="yes",
            scores={"yes": 1.0},
            adapter=AdapterRef(name=name, version="v"),
            warnings=("low_label_mass: 0.01",),
        )
        metrics.observe(ClassifyResult(id="x", verdicts=(verdict,), usage=Usage(), timings=Timings()))
        metrics.observe_completion(name, name, "ok")
        metrics.observe_failure([name], "queue_full")

    def series() -> set[str]:
        return {line.rpartition(" ")[0] for line in metrics.render().decode().splitlines()}

    ask("kept")
    before = series()
    for i in range(20):
        known.add(f"adapter{i}")
        ask(f"adapter{i}")
        assert len(series()) > len(before)
        known.remove(f"adapter{i}")
    assert series() == before
    ask("kept")
    assert (
        'loraplex_classifications_total{adapter="kept",classifier="kept",outcome="ok"} 2.0' in metrics.render().decode()
    )


def test_that_a_client_left_is_no_failure() -> None:
    metrics = Metrics(lambda: stats_of(()), lambda name: True, lambda: 0)
    assert 'failures_total{code="queue_full"} 0.0' in metrics.render().decode()
    assert "process_resident_memory_bytes" in metrics.render().decode()
    for code in ("cancelled", "queue_full"):
        metrics.fail(code)
    assert 'failures_total{code="queue_full"} 1.0' in metrics.render().decode()
    assert '{code="cancelled"}' not in metrics.render().decode()
    assert "loraplex_requests_cancelled_total 1.0" in metrics.render().decode()
