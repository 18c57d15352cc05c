"""report.json: everything that a run has measured, with every sample. The other files are made from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loraplex.bench.figures import figures, turns
from loraplex.bench.measured import LoadPlan, Measured
from loraplex.bench.quality import agreement, mean, qualities
from loraplex.bench.run import Run
from loraplex.measuring.files import sha256
from loraplex.measuring.samples import spread

FORMAT = 1
REFERENCES = ("peft", "peft-mixed", "native")  # the first of them that was measured is what others agree with
COLUMNS = (
    "system load slice phase conversation turn classifier scheduled_s sent_s done_s status verdicts prompt_tokens "
    "computed_tokens cached_tokens engine_ms".split()
)


def report(run: Run, *, cut_short: bool = False) -> dict[str, Any]:
    """Return what was measured so far. cut_short: the run was interrupted."""
    prepared, settings = run.prepared, run.prepared.settings
    measured = {name: one for name, one in run.measured.items() if one.slices}
    reference = next((name for name in REFERENCES if name in measured), None)
    gemm = spread(run.gemm)
    systems: dict[str, Any] = {name: {"state": f"skipped: {why}"} for name, why in prepared.skipped.items()}
    for name, one in run.measured.items():
        systems[name] = _system(run, one, None if gemm is None else gemm["median"], measured.get(reference or ""))
    labelled = {name: sum(name in row for row in prepared.truth.values()) for name in prepared.classifiers}
    return {
        "format": FORMAT,
        "kind": "bench",
        "cut_short": cut_short,
        "about": {**run.about, "settings": settings.to_json(), "seed": settings.seed},
        "data": {
            "file": settings.data.name,
            "sha256": sha256(settings.data),
            "conversations": len(prepared.rows),
            "turns": settings.turns,
            "classifiers": list(prepared.classifiers),
            "labelled": {name: num for name, num in labelled.items() if num},
            "unknown_labels": dict(sorted(prepared.strangers.items())),
        },
        "limits": {"gemm_flops_per_s": gemm, "bytes_per_s": spread(run.bandwidth)},
        "systems": {name: systems[name] for name in settings.systems},
        "samples": {"columns": COLUMNS, "rows": [row for one in measured.values() for row in _samples(one)]},
    }


def report_text(found: Mapping[str, Any]) -> str:
    """Return the text of report.json, with each sample on a line of its own. A value that is no JSON raises."""
    samples = found["samples"]
    text = json.dumps({**found, "samples": {**samples, "rows": []}}, indent=1, allow_nan=False)
    rows = ",\n   ".join(json.dumps(row, allow_nan=False) for row in samples["rows"])
    before, _, after = text.rpartition('"rows": []')
    return f'{before}"rows": [\n   {rows}\n  ]{after}\n'


def _system(run: Run, one: Measured, gemm: float | None, reference: Measured | None) -> dict[str, Any]:
    prepared = run.prepared
    found: dict[str, Any] = {
        "state": one.state,
        "versions": one.system.versions,
        "transport": one.system.transport,
        "url": prepared.settings.urls.get(one.name),
        "engine": prepared.engine.get(one.name),
        "shares_prefix": one.system.shares_prefix,
        "facts": dict(one.system.facts),
        "memory": {
            "peak_rss_bytes": one.peak_rss_bytes,
            "starting_rss_bytes": one.starting_rss_bytes,
            "peak_device_bytes": one.peak_device_bytes,
        },
    }
    if not one.slices:
        return found | ({"state": "not measured: the run was interrupted"} if one.is_well else {})
    is_base = one.system.facts.get("adapters") is False
    quality = qualities({} if is_base else one.answers, prepared.truth, prepared.labels)
    same = reference is None or reference is one or is_base
    return found | {
        "loads": [_load(run, one, plan, gemm) for plan in one.slices],
        "cut_conversations": len(
            {
                (plan, number, sample.job.index)
                for plan, slices in one.slices.items()
                for number, each in enumerate(slices)
                for sample in each.measured
                if sample.reply.is_cut
            }
        ),
        "saturation": _saturation(one),
        "goodput_at_2x": spread(one.goodputs),
        "quality": {"classifiers": {name: asdict(value) for name, value in quality.items()}, "mean": mean(quality)},
        "agreement": None
        if same or reference is None
        else {"with": reference.name, **agreement(one.answers, reference.answers)},
        "turns": _turns(one) if prepared.settings.turns else [],
    }


def _load(run: Run, one: Measured, plan: LoadPlan, gemm: float | None) -> dict[str, Any]:
    slices, work = one.slices[plan], run.work
    tokens = [sample.reply.computed_tokens for each in slices for sample in each.measured]
    num = len({(index, sample.job.index) for index, each in enumerate(slices) for sample in each.measured})
    flops = sum(work.of(sample) for each in slices for sample in each.measured) / num if num else None
    offered = spread(one.offered[plan]) if plan.kind == "open" else None
    return {
        "kind": plan.kind,
        **({"concurrency": plan.concurrency} if plan.kind == "closed" else {}),
        **({"offered_per_s": offered and offered["median"], "share_of_capacity": plan.share} if offered else {}),
        "conversations": num,
        **figures(slices, work, gemm),
        "floor": {
            "flop_per_conversation": flops if sum(tokens) else None,
            "weights_bytes": work.num_weights * run.dtype.itemsize,
        },
    }


def _saturation(one: Measured) -> dict[str, Any]:
    """Return the conversations/s that the system answers at most: in the closed loop that looks for it, or under the
    load that saturated it, where that is more; or else under the only load."""
    found = spread(one.capacity or [each.conversations_per_s for each in next(iter(one.slices.values()))])
    at = None
    if one.saturated is not None:
        plan = one.saturated[0]
        offered = spread(one.offered[plan]) or {"median": 0.0}
        times = f" ({plan.share:g}x the capacity)" if plan.share else ""
        at = f"open, {offered['median']:.3g} conversations/s offered{times}"
        answered = spread(each.conversations_per_s for each in one.slices[plan])
        if answered and (not found or answered["median"] > found["median"]):
            found = answered
    return {
        "reached": one.saturated is not None,
        "conversations_per_s": found,
        "clients": one.clients and one.clients.concurrency,
        "at": at,
        "why": one.saturated and one.saturated[1],
    }


def _turns(one: Measured) -> list[dict[str, Any]]:
    return turns([each for slices in one.slices.values() for each in slices])


def _samples(one: Measured) -> list[Sequence[Any]]:
    rows: list[Sequence[Any]] = []
    for number, slices in enumerate(one.slices.values()):
        for index, each in enumerate(slices):
            for sample in each.samples:
                reply = sample.reply
                row = (
                    *(one.name, number, index, sample.job.phase, sample.job.conversation, sample.turn + 1),
                    sample.classifiers[0] if len(sample.classifiers) == 1 else None,
                    *(round(time, 6) for time in (sample.scheduled_s, sample.sent_s, sample.done_s)),
                    *(reply.status, len(reply.verdicts), reply.prompt_tokens, reply.computed_tokens),
                    *(reply.cached_tokens, reply.engine_ms),
                )
                rows.append(row)
    return rows
