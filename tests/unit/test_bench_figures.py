"""The benchmark's arithmetic on samples made by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from loraplex.bench.call import Answer, Call, Reply, Status
from loraplex.bench.figures import Slice, figures, saturation, turns
from loraplex.bench.load import Job, Load, Phase, Sample
from loraplex.bench.quality import agreement, mean, qualities
from loraplex.bench.work import Work

NAMES = ("done", "calm")
WORK = Work(layers=((4, 10, 2),), per_token=80, per_row=100, lora={"done": 20, "calm": 0})


def job(index: int, phase: Phase = "measured", at_s: float = 0.0, turns: int = 1, classifiers: Any = (NAMES,)) -> Job:
    calls = tuple(Call(input="x", classifiers=names) for names in classifiers)
    return Job(index=index, conversation=index, turns=(calls,) * turns, phase=phase, at_s=at_s)


def sample(of: Job, sent_s: float, done_s: float, status: Status = "ok", turn: int = 0, **reply: Any) -> Sample:
    names = of.turns[0][0].classifiers
    usage = {"prompt_tokens": 100, "computed_tokens": 40, "cached_tokens": 60, "engine_ms": 500.0} | reply
    found = Reply(status=status, verdicts={name: Answer(label="yes") for name in names}, **usage)
    if status != "ok":
        found = Reply(status=status, error=reply.get("error", status))
    return Sample(
        job=of, turn=turn, classifiers=names, scheduled_s=of.at_s or sent_s, sent_s=sent_s, done_s=done_s, reply=found
    )


def closed(times: Sequence[tuple[Phase, float, float]]) -> Slice:
    jobs = [job(index, phase) for index, (phase, _, _) in enumerate(times)]
    samples = [sample(one, sent, done) for one, (_, sent, done) in zip(jobs, times, strict=True)]
    return Slice(load=Load(jobs=tuple(jobs), concurrency=2), samples=tuple(samples))


def opened(ends: Mapping[float, float], statuses: Mapping[float, Status] | None = None) -> Slice:
    """A slice of the open loop, measured from 0 to 10 s. ends: when a conversation arrives -> when it is answered."""
    jobs = [job(index, at_s=at_s) for index, at_s in enumerate(ends)]
    samples = [
        sample(one, one.at_s, end, (statuses or {}).get(one.at_s, "ok"))
        for one, end in zip(jobs, ends.values(), strict=True)
    ]
    return Slice(load=Load(jobs=tuple(jobs), window_s=(0.0, 10.0)), samples=tuple(samples))


def test_a_closed_loop_is_counted_while_all_clients_are_at_work() -> None:
    """Two clients, a second for each answer: two a second, whatever the beginning and the end look like."""
    found = closed(
        [
            ("warm-up", 0, 5),
            ("warm-up", 0, 4),
            *[("measured", 5 + i // 2, 6 + i // 2) for i in range(6)],
            ("cool-down", 8, 9),
        ]
    )
    assert found.window_s == (5, 8) and found.num_answered == 6
    told = figures([found], WORK, 1000.0)
    assert told["conversations_per_s"] == {"median": 2.0, "low": 2.0, "high": 2.0, "rounds": 1}
    assert told["verdicts_per_s"]["median"] == 4.0 and told["tokens_asked_per_s"]["median"] == 200.0
    assert told["tokens_computed_per_s"]["median"] == 80.0
    assert told["latency_ms"]["p50"]["median"] == 1000.0 and told["http_adds_ms"]["median"] == 500.0
    assert told["requests"] == {"ok": 6, "refused": 0, "failed": 0, "timeout": 0, "errors": {}}
    assert told["excluded"]["ok"] == 3
    # 40 tokens x 80 weights and the mean of both adapters' 20, and the head's row for each classifier.
    assert told["share_of_gemm_rate"] == 2 * (2 * 40 * (80 + 10) + 2 * 2 * 100) / 1000


def test_figures_are_medians_over_slices() -> None:
    slices = [closed([("warm-up", 0, 1), ("measured", 1, 1 + seconds)]) for seconds in (1.0, 2.0, 4.0)]
    told = figures(slices, WORK, None)
    assert told["latency_ms"]["p50"] == {"median": 2000.0, "low": 1000.0, "high": 4000.0, "rounds": 3}
    assert told["conversations_per_s"]["high"] == 1.0 and told["share_of_gemm_rate"] is None


def test_a_percentile_is_of_all_slices_together() -> None:
    """The slowest of 10 requests is no p99, and the largest of 3 slices' is no p99 of theirs."""
    slices = []
    for first in (0, 1):
        times: list[tuple[Phase, float, float]] = [("measured", 1, 1 + ms / 1000) for ms in range(first, 120, 2)]
        slices.append(closed([("warm-up", 0, 1), *times]))
    told = figures(slices, WORK, None)["latency_ms"]
    assert told["n"] == 120 and told["p99"]["median"] == pytest.approx(118)
    assert told["p90"]["median"] == pytest.approx(107) and told["p50"]["rounds"] == 2
    assert told["p90"]["low"] == pytest.approx(106) and told["p90"]["high"] == pytest.approx(107)
    few = figures(slices[:1], WORK, None)["latency_ms"]
    assert few["p99"] is None and few["n"] == 60 and few["max"] == pytest.approx(118) and few["p90"] is not None


def test_what_was_given_up_is_counted_apart_and_took_at_least_as_long() -> None:
    found = opened({1.0: 2.0, 2.0: 2.5, 3.0: 9.0, 4.0: 5.0}, {2.0: "refused", 3.0: "timeout", 4.0: "failed"})
    told = figures([found], WORK, None)
    assert told["requests"] == {
        **{"ok": 1, "refused": 1, "failed": 1, "timeout": 1},
        "errors": {"failed": 1, "refused": 1, "timeout": 1},
    }
    latency = told["latency_ms"]
    assert (latency["n"], latency["p50"]["median"], latency["max"], latency["at_least"]) == (2, 1000.0, 6000.0, 6000.0)
    assert told["all_verdicts_ms"]["max"] == 6000.0 and told["requests_per_s"]["median"] == pytest.approx(0.1)


def test_a_conversation_counts_when_all_its_verdicts_are_there() -> None:
    each = job(0, classifiers=(("done",), ("calm",)))
    other = job(1, classifiers=(("done",), ("calm",)))
    samples = (sample(each, 0, 2), sample(each, 2, 3), sample(other, 1, 4), sample(other, 4, 5, "failed"))
    found = Slice(load=Load(jobs=(each, other), window_s=(0.0, 10.0)), samples=samples)
    assert found.num_answered == 1 and found.all_verdicts_s == [(3.0, False)]
    assert figures([found], WORK, None)["requests_per_s"]["median"] == pytest.approx(0.3)


def test_turns_have_figures_of_their_own() -> None:
    one = job(0, turns=2)
    samples = (sample(one, 0, 2), sample(one, 2, 3, turn=1, computed_tokens=10, cached_tokens=90))
    first, second = turns([Slice(load=Load(jobs=(one,), concurrency=1), samples=samples)])
    assert (first["turn"], first["cached_share"], first["tokens_computed"]) == (1, 0.6, 40)
    assert (second["turn"], second["cached_share"], second["latency_ms"]["p50"]["median"]) == (2, 0.9, 1000.0)


def test_a_system_that_keeps_up_is_not_saturated() -> None:
    assert saturation([opened({i / 4: i / 4 + 0.5 for i in range(1, 40)})]) is None
    # Two conversations are under way at the end, as two were at the beginning: chance, not saturation.
    assert saturation([opened({float(i): i + 2.5 for i in range(1, 10)})]) is None


def test_a_queue_that_grows_is_saturation() -> None:
    late = opened({i / 4: i / 2 for i in range(1, 40)})
    assert saturation([late, late]) == "40 of 78 conversations were answered in time"


def test_a_short_slice_saturates_nothing_by_chance() -> None:
    assert saturation([opened({i / 2: i / 2 + (0.5 if i < 15 else 9.0) for i in range(1, 19)})]) is None


def test_one_refusal_is_saturation() -> None:
    found = opened({i / 4: i / 4 + 0.1 for i in range(1, 40)}, {5.0: "refused"})
    assert saturation([found]) == "1 requests were refused"


def answers(labels: Mapping[int, str], share: float = 0.9, mass: float = 1.0) -> dict[tuple[int, int], Any]:
    return {
        (conversation, 0): {"done": Answer(label=label, scores={"yes": share, "no": 1 - share}, label_mass=mass)}
        for conversation, label in labels.items()
    }


def test_accuracy_and_f1() -> None:
    said = answers({0: "yes", 1: "yes", 2: "no", 3: "no"})
    truth = {0: {"done": "yes"}, 1: {"done": "no"}, 2: {"done": "no"}, 4: {"done": "yes"}}
    found = qualities(said, truth, {"done": ("yes", "no")})["done"]
    assert found.n == 3 and found.accuracy == pytest.approx(2 / 3) == found.f1
    several = qualities(said, truth, {"done": ("yes", "no", "maybe")})["done"]
    assert several.f1 == pytest.approx(2 / 3), "nothing is maybe"
    assert mean({}) is None and mean({"done": found}) == {
        **{"n": 3, "positives": 1, "accuracy": found.accuracy, "f1": found.f1}
    }


@pytest.mark.parametrize("label", ["yes", "no"])
def test_a_label_that_is_right_nowhere_has_no_f1(label: str) -> None:
    truth = {0: {"done": "no", "calm": "yes"}, 1: {"done": "no", "calm": "no"}}
    said = {key: {"done": one["done"], "calm": one["done"]} for key, one in answers({0: label, 1: "no"}).items()}
    found = qualities(said, truth, dict.fromkeys(NAMES, ("yes", "no")))
    assert found["done"].f1 is None and found["done"].positives == 0 and found["calm"].f1 == float(label == "yes")
    assert (mean(found) or {})["f1"] == found["calm"].f1 and (mean({"done": found["done"]}) or {})["f1"] is None


def test_the_last_turn_is_what_a_label_is_about() -> None:
    said = {**answers({0: "no"}), (0, 1): answers({0: "yes"})[0, 0]}
    assert qualities(said, {0: {"done": "yes"}}, {"done": ("yes", "no")})["done"].accuracy == 1.0


def test_agreement_is_over_verdicts_that_both_gave() -> None:
    one, other = answers({0: "yes", 1: "no", 2: "yes"}), answers({0: "yes", 1: "yes", 3: "no"}, 0.8, 0.99)
    found = agreement(one, other)
    assert (found["verdicts"], found["labels_equal"]) == (2, 1)
    assert found["difference_max"] == pytest.approx(0.1) == found["difference_mean"]
    assert agreement(one, {})["difference_max"] is None
