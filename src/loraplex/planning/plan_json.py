"""Writes a plan as JSON."""

from collections.abc import Mapping
from typing import Any

from loraplex.planning.asked import Asked
from loraplex.planning.plan import share_the_conversation
from loraplex.planning.report import fitting, settings


def as_json_report(
    asked: Asked, measured: Mapping[str, int] | None, rate: float | None, *, fits: bool
) -> dict[str, Any]:
    """Return the plan as JSON. `metrics` has the form of Amazon's recommendation jobs."""
    plan = asked.plan
    found: dict[str, Any] = {
        "format": 1,
        "kind": "plan",
        "base": asked.name,
        "dtype": asked.dtype,
        "parameters": plan.base.sizes.num_weights,
        "target": {"name": plan.target.name, "count": plan.target.count, "memory_bytes": plan.target.memory_bytes},
        "traffic": {
            "classifiers": plan.traffic.num_classifiers,
            "conversation_tokens": plan.traffic.conversation_tokens,
            "suffix_tokens": plan.traffic.suffix_tokens,
        },
        "adapters": {
            "number": len(plan.adapters),
            "placed": plan.num_placed,
            "share_the_conversation": share_the_conversation(plan.adapters),
        },
        "memory": [
            {"name": one.name, "where": one.where, "limit": one.limit, "expected": one.expected, "note": one.note}
            for one in plan.lines
        ],
        "total": {"limit": plan.total(plan.on_target, "limit"), "expected": plan.total(plan.on_target)},
        "measured": None if measured is None else dict(measured),
        "kv_token_bytes": plan.kv_token_bytes,
        "kv_conversation_bytes": dict(zip(("plain", "shared"), plan.kv_conversation_bytes, strict=True)),
        "fits": plan.fits is not None and not plan.short_bytes,
        "short_bytes": plan.short_bytes,
        "room_for": None
        if plan.fits is None
        else {
            "adapters": plan.fits.adapters,
            "conversations": dict(zip(("plain", "shared"), plan.fits.conversations, strict=True)),
            "conversations_in_the_cache": dict(zip(("plain", "shared"), plan.fits.cached, strict=True)),
        },
        "time": [
            {
                "name": one.name,
                "shared": one.shares,
                "is_next_turn": one.is_next_turn,
                "tokens": one.num_tokens,
                "flop": one.work.total,
                "floor_s": one.floor_s,
                "expected_s": one.expected,
                "most_per_s": one.most_per_s,
                "expected_per_s": one.expected_per_s(plan.target),
            }
            for one in plan.cases
        ],
        "instances": [
            {"name": one.instance.name, "usd_per_hour": None if one.price is None else float(one.price.usd_per_hour)}
            for one in fitting(asked)
        ],
        "rate": rate,
        "metrics": metrics(asked),
    }
    return found | ({"settings": settings(asked)} if fits and not plan.short_bytes else {})


def metrics(asked: Asked) -> list[dict[str, str]]:
    """Return the figures as AWS's `AIRecommendationPerformanceMetric`: Metric, Stat, Value and Unit, all text."""
    plan = asked.plan
    rows = [
        (f"{_camel(line.name)}Memory", stat, str(getattr(line, stat)), "Bytes")
        for line in plan.lines
        for stat in ("limit", "expected")
    ]
    if plan.fits is not None:
        rows.append(("AdaptersThatFit", "expected", str(plan.fits.adapters), "Count"))
        rows.append(("SharedConversationsThatFit", "expected", str(plan.fits.conversations[1]), "Count"))
    for case in plan.cases:
        if case.floor_s is not None and case.expected is not None and case.most_per_s is not None:
            name = f"{'NextTurn' if case.is_next_turn else 'Conversation'}{'Shared' if case.shares else 'Plain'}"
            rows.append((f"{name}Latency", "limit", f"{case.floor_s * 1000:.3f}", "Milliseconds"))
            rows.append((f"{name}Latency", "expected", f"{case.expected[1] * 1000:.3f}", "Milliseconds"))
            rows.append((f"{name}Throughput", "limit", f"{case.most_per_s:.3f}", "Count/Second"))
    return [dict(zip(("Metric", "Stat", "Value", "Unit"), row, strict=True)) for row in rows]


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.replace("/", " ").split())
