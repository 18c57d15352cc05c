"""Writes the figures of report.json as a table's cells."""

from collections.abc import Mapping
from typing import Any


def spread_text(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    """Return a median with its spread, as "12.3 (11.9-13.0)"; "-" where nothing was measured."""
    if found is None:
        return "-"
    median, low, high = (number(found[name], digits) for name in ("median", "low", "high"))
    return median if found["rounds"] == 1 else f"{median} ({low}-{high})"


def latency(found: Mapping[str, Any], name: str, unit: str = "") -> str:
    """Return a percentile of latencies in milliseconds, as spread_text() does; of too few, the largest of them. A bound
    that comes from requests that were given up begins with "≥"."""
    value = found[name] and found[name]["median"]
    if value is None:
        return "-" if found["max"] is None else f"{_bound(found, found['max'])}{unit}, max of {found['n']}"
    return _bound(found, value, spread_text(found[name])) + unit


def _bound(found: Mapping[str, Any], value: float, text: str = "") -> str:
    is_bound = found["at_least"] is not None and value >= found["at_least"]
    return ("≥ " if is_bound else "") + (text or number(value))


def number(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def percent(share: float, digits: int = 0) -> str:
    return f"{share:.{digits}%}".replace("%", " %")
